"""Names of latents: the nearest words, the stage, the file."""

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dncbm.concepts.naming
import dncbm.concepts.vocabulary
from dncbm.cli import main
from dncbm.concepts.naming import (
    ABSTAINS,
    COLLISION,
    COLUMNS,
    NAMED,
    ConceptName,
    assign_names,
    concept_labels,
    name_latents,
    name_similarities,
    nearest_words,
    read_name_tests,
    read_names,
    share_abstaining,
    write_names,
)
from dncbm.concepts.vocabulary import Vocabulary, load_vocabulary
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Naming, SAERun
from dncbm.runs.errors import StaleArtifact, UserError
from dncbm.runs.manifests import Outcome, making, manifest_path, read_manifest
from dncbm.runs.settings import Settings
from sparse_autoencoder import SparseAutoencoder, load_checkpoint, save_checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures"
RUN = SAERun(encoder="enc")
WORDS = ["dog", "sea, the", 'a "quoted" word', "café", "tree"]


def by_brute_force(dictionary: np.ndarray, embeddings: np.ndarray) -> list[tuple[int, float]]:
    """Word and cosine of every latent, one pair at a time."""
    names = []
    for direction in dictionary:
        cosines = [
            float(direction @ word) / math.sqrt(float(direction @ direction) * float(word @ word)) for word in embeddings
        ]
        best = max(range(len(cosines)), key=cosines.__getitem__)
        names.append((best, cosines[best]))
    return names


def vocabulary_of(embeddings: np.ndarray) -> Vocabulary:
    words = [f"word {i}" for i in range(len(embeddings))]
    return Vocabulary(words, torch.nn.functional.normalize(torch.from_numpy(embeddings).float(), dim=1))


@given(
    n_latents=st.integers(1, 12),
    n_words=st.integers(1, 9),
    width=st.integers(2, 6),
    chunk=st.integers(1, 15),
    seed=st.integers(0, 1000),
)
def test_a_name_is_the_word_of_the_largest_cosine(n_latents: int, n_words: int, width: int, chunk: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dictionary = rng.normal(size=(n_latents, width)) * rng.uniform(0.1, 10, (n_latents, 1))
    embeddings = rng.normal(size=(n_words, width)) * rng.uniform(0.1, 10, (n_words, 1))
    names = nearest_words(torch.from_numpy(dictionary), vocabulary_of(embeddings), chunk)
    expected = by_brute_force(dictionary, embeddings)
    assert [name.index for name in names] == list(range(n_latents))
    assert [name.name for name in names] == [f"word {word}" for word, _ in expected]
    assert [name.similarity for name in names] == pytest.approx([cosine for _, cosine in expected], abs=1e-5)


def test_two_latents_may_share_a_name() -> None:
    dictionary = torch.tensor([[1.0, 0.1], [0.0, 1.0], [2.0, -0.1]])
    names = nearest_words(dictionary, vocabulary_of(np.eye(2)))
    assert [name.name for name in names] == ["word 0", "word 1", "word 0"]


def test_another_encoders_vocabulary_is_refused(refusal) -> None:
    with refusal("3 dimensions", "words 2", "another encoder"):
        nearest_words(torch.ones(4, 3), vocabulary_of(np.eye(2)))


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    """An SAE of 6 latents in 3 dimensions, and embeddings of 5 words."""
    settings = make_settings()
    artifacts = Artifacts(settings)
    save_checkpoint(SparseAutoencoder(3, 6, seed=1), artifacts.sae(RUN))
    artifacts.words().parent.mkdir()
    artifacts.words().write_text("\n".join(WORDS), encoding="utf-8")
    torch.save(torch.randn(5, 3, generator=torch.Generator().manual_seed(2)), artifacts.published_embeddings("enc"))
    return settings


def test_the_stage_names_the_decoder_columns(settings: Settings) -> None:
    assert assign_names(settings, RUN) is Outcome.RAN
    artifacts = Artifacts(settings)
    decoder = load_checkpoint(artifacts.sae(RUN)).decoder_weight.detach().double().numpy()  # a row is a column of W_d
    embeddings = torch.load(artifacts.published_embeddings("enc"), weights_only=True).double().numpy()
    expected = by_brute_force(decoder, embeddings)
    names = read_names(settings, RUN)
    assert [(name.index, name.name) for name in names] == [(i, WORDS[word]) for i, (word, _) in enumerate(expected)]
    assert [name.similarity for name in names] == pytest.approx([cosine for _, cosine in expected], abs=2e-6)
    assert artifacts.concept_names(RUN).read_text(encoding="utf-8").startswith("index,name,similarity")
    manifest = read_manifest(artifacts.concept_names(RUN))
    assert (manifest["run"]["sae_type"], manifest["details"]["latents"]) == ("relu", 6)
    assert manifest["details"]["distinct_names"] == len({word for word, _ in expected})
    mean = np.mean([cosine for _, cosine in expected])
    assert manifest["details"]["mean_similarity"] == pytest.approx(mean, rel=1e-5)
    assert assign_names(settings, RUN) is Outcome.ALREADY_DONE


def test_a_published_sae_is_named_too(settings: Settings) -> None:
    artifacts = Artifacts(settings)
    artifacts.sae(RUN).unlink()
    published = FIXTURES / "published_format_sparse_autoencoder_final.pt"
    artifacts.published_sae(RUN).write_bytes(published.read_bytes())
    columns = torch.load(published, weights_only=True)["decoder._weight"][0].T.double().numpy()
    embeddings = np.random.default_rng(0).normal(size=(5, columns.shape[1]))
    torch.save(torch.from_numpy(embeddings), artifacts.published_embeddings("enc"))
    assign_names(settings, RUN)
    expected = by_brute_force(columns, embeddings)
    assert [name.name for name in read_names(settings, RUN)] == [WORDS[word] for word, _ in expected]


def test_another_sae_or_vocabulary_is_stale(settings: Settings) -> None:
    assign_names(settings, RUN)
    artifacts = Artifacts(settings)
    save_checkpoint(SparseAutoencoder(3, 6, seed=2), artifacts.sae(RUN))
    torch.save(torch.ones(5, 3), artifacts.published_embeddings("enc"))
    with pytest.raises(StaleArtifact, match="SAE has changed; word embeddings has changed"):
        assign_names(settings, RUN)
    assert assign_names(settings, RUN, overwrite=True) is Outcome.RAN


def test_names_of_a_replaced_sae_are_not_read(settings: Settings, refusal) -> None:
    assign_names(settings, RUN)
    save_checkpoint(SparseAutoencoder(3, 6, seed=2), Artifacts(settings).sae(RUN))
    with refusal(Artifacts(settings).concept_names(RUN), "SAE", "has changed", "--overwrite"):
        read_names(settings, RUN)


def test_nothing_is_loaded_if_there_is_nothing_to_do(settings: Settings, monkeypatch) -> None:
    assign_names(settings, RUN)
    for name in ("load_sae", "load_vocabulary", "save_vocabulary_embeddings"):
        monkeypatch.setattr(dncbm.concepts.naming, name, lambda *_, **__: pytest.fail("loaded"))
    assert assign_names(settings, RUN, device="nonsense") is Outcome.ALREADY_DONE


def test_missing_embeddings_are_made_first(settings: Settings, monkeypatch, refusal) -> None:
    Artifacts(settings).published_embeddings("enc").unlink()
    monkeypatch.setattr(dncbm.concepts.vocabulary, "describe_encoder", lambda _, name, *made: {"encoder": name})
    with refusal("--device nonsense"):
        assign_names(settings, RUN, device="nonsense")

    class Encoder:
        device = "cpu"

        def encode_texts(self, words: list[str]) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.arange(len(words)) % 3, 3).float()

    monkeypatch.setattr(dncbm.concepts.vocabulary, "load_encoder", lambda *_: Encoder())
    assert assign_names(settings, RUN, device="cpu") is Outcome.RAN
    assert np.load(Artifacts(settings).embeddings("enc")).shape == (5, 3)


def test_other_words_are_stale(settings: Settings) -> None:
    assign_names(settings, RUN)
    Artifacts(settings).words().write_text("\n".join(reversed(WORDS)), encoding="utf-8")
    with pytest.raises(StaleArtifact, match="words has changed"):
        assign_names(settings, RUN)


def test_a_missing_sae_names_the_command(settings: Settings, refusal) -> None:
    Artifacts(settings).sae(RUN).unlink()
    with refusal(Artifacts(settings).sae(RUN), "02_train_sae_img.py"):
        assign_names(settings, RUN)


def test_names_survive_the_file(settings: Settings) -> None:
    names = [ConceptName(i, word, 0.25 * i) for i, word in enumerate(WORDS)]
    write_names(Artifacts(settings).concept_names(RUN), names)
    assert read_names(settings, RUN) == names


@pytest.mark.parametrize("place", ["published_names", "concept_names"])
def test_the_authors_file_has_no_header_and_no_quotes(settings: Settings, place: str) -> None:
    """It is found where the authors' code writes it, in the run's folder, and beside the SAE."""
    path = getattr(Artifacts(settings), place)(RUN)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('0,index\n1,dog\n2,dog\n3,sea, the\n4,a "quoted" word\n5,"\n')
    names = read_names(settings, RUN)
    assert [name.index for name in names] == list(range(6))
    assert [name.name for name in names] == ["index", "dog", "dog", "sea, the", 'a "quoted" word', '"']
    assert all(math.isnan(name.similarity) for name in names)
    assert assign_names(settings, RUN) is Outcome.PROVIDED


def test_our_names_win_over_the_authors(settings: Settings) -> None:
    Artifacts(settings).published_names(RUN).write_text("".join(f"{i},theirs\n" for i in range(6)))
    write_names(Artifacts(settings).concept_names(RUN), [ConceptName(i, "ours", 0.5) for i in range(6)])
    assert {name.name for name in read_names(settings, RUN)} == {"ours"}


@pytest.mark.parametrize("place", ["published_names", "concept_names"])
def test_given_names_must_fit_the_sae(settings: Settings, refusal, place: str) -> None:
    path = getattr(Artifacts(settings), place)(RUN)
    path.write_text("".join(f"{i},dog\n" for i in range(5)))
    with refusal(path, "5 latents", "has 6"):
        assign_names(settings, RUN)


def test_rows_belong_to_latents_by_their_index(settings: Settings) -> None:
    """A file that was sorted by name in a spreadsheet, its columns too, and saved with a byte order mark."""
    names = [ConceptName(i, word, 0.25 * i) for i, word in enumerate([*WORDS, "apple"])]
    path = Artifacts(settings).concept_names(RUN)
    write_names(path, names)
    header, *rows = list(csv.reader(path.open(newline="", encoding="utf-8")))
    for order in ([0, 1, 2], [2, 0, 1]):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            shuffled = sorted(rows, key=lambda row: row[1])
            csv.writer(file).writerows([row[column] for column in order] for row in [header, *shuffled])
        assert read_names(settings, RUN) == names


def test_a_header_and_similarities_may_be_left_out(settings: Settings) -> None:
    path = Artifacts(settings).concept_names(RUN)
    path.write_text('1,"sea, the",0.5\n0,dog,0.25\n')
    assert read_names(settings, RUN) == [ConceptName(0, "dog", 0.25), ConceptName(1, "sea, the", 0.5)]
    path.write_text("index,name,similarity\n0,dog,\n")
    (name,) = read_names(settings, RUN)
    assert name.name == "dog"
    assert math.isnan(name.similarity)


def test_similarities_that_the_file_leaves_out_are_computed(settings: Settings, refusal) -> None:
    assign_names(settings, RUN)
    path = Artifacts(settings).concept_names(RUN)
    names = read_names(settings, RUN)
    given = name_similarities(settings, RUN, names)
    assert given.tolist() == [name.similarity for name in names]
    unknown = [replace(name, similarity=math.nan) for name in names]
    np.testing.assert_allclose(name_similarities(settings, RUN, unknown), given, atol=2e-6)
    with refusal(path, "'a ship'", Artifacts(settings).words()):
        name_similarities(settings, RUN, [replace(unknown[0], name="a ship")])


def test_labels_tell_latents_of_one_name_apart() -> None:
    names = [ConceptName(i, name, 0.5) for i, name in enumerate(["dog", "sea", "dog"])]
    assert concept_labels(names) == ["dog #0", "sea", "dog #2"]


# ------------------------------------------------------------------------------------------------------------- verdicts


@pytest.fixture
def held(make_settings: Callable[..., Settings]) -> Settings:
    """An SAE of 60 latents in 64 dimensions: word 0 is planted into the latents 0 and 1, words 2 to 9 into one each, of which
    latent 9 is dead; the others are noise. 150 words, of which `word 149` is another spelling of word 3."""
    settings = make_settings()
    artifacts, rng = Artifacts(settings), np.random.default_rng(0)
    embeddings = rng.normal(size=(150, 64)) / 8 + 0.1
    embeddings[149] = embeddings[3] + 0.02 * rng.normal(size=64)
    artifacts.words().parent.mkdir()
    artifacts.words().write_text("".join(f"word {i}\n" for i in range(150)))
    torch.save(torch.from_numpy(embeddings), artifacts.published_embeddings("enc"))
    words = embeddings - embeddings.mean(axis=0)
    decoder = rng.normal(size=(60, 64)) / 8
    planted = words[[0, 0, *range(2, 10)]]
    decoder[:10] = 0.6 * decoder[:10] + 0.8 * planted / np.linalg.norm(planted, axis=1, keepdims=True)
    model = SparseAutoencoder(64, 60, seed=1)
    with torch.no_grad():
        model.decoder_weight.copy_(torch.nn.functional.normalize(torch.from_numpy(decoder + 0.02).float(), dim=1))
    rates = np.full(60, 0.1)
    rates[9] = 0
    target, rates_path = artifacts.sae(RUN), artifacts.firing_rates(RUN)
    with making(target, "sae", {}, {}, overwrite=False) as work:
        save_checkpoint(model, target)
        np.save(rates_path, rates)
        work.done([target, rates_path])
    return settings


def rows_of(settings: Settings) -> list[dict[str, str]]:
    with Artifacts(settings).concept_names(RUN).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_names_that_fail_their_test_abstain(held: Settings, capsys) -> None:
    assert assign_names(held, RUN, device="cpu") is Outcome.RAN
    rows = rows_of(held)
    assert tuple(rows[0]) == COLUMNS
    verdicts = [row["verdict"] for row in rows]
    assert verdicts[:10] == [COLLISION] * 2 + [NAMED] * 7 + [ABSTAINS]
    assert verdicts[10:].count(ABSTAINS) >= 48
    assert [row["name"] for row in rows[:10]] == [f"word {i}" for i in (0, 0, 2, 149, *range(4, 10))]
    assert [(row["q"] == "", row["p"] == "", row["z"] == "") for row in rows] == [(i == 9, False, False) for i in range(60)]
    assert all(row["verdict"] == ABSTAINS or float(row["q"]) <= 0.05 for row in rows)
    assert rows[3]["near_synonyms"] == "true"
    assert {rows[3]["word_1"], rows[3]["word_2"]} == {"word 3", "word 149"}
    assert [row["near_synonyms"] for row in rows].count("true") < 5
    said = next(line for line in capsys.readouterr().out.splitlines() if "distinct names" in line)
    counts = {verdict: verdicts.count(verdict) for verdict in (NAMED, COLLISION, ABSTAINS)}
    assert f"; {counts[NAMED]} named, {counts[COLLISION]} in collision, {counts[ABSTAINS]} abstain: " in said
    details = read_manifest(Artifacts(held).concept_names(RUN))["details"]
    assert {verdict: details[verdict] for verdict in counts} == counts
    names = read_names(held, RUN)
    assert [name.verdict for name in names] == verdicts
    assert share_abstaining(names) == counts[ABSTAINS] / 60
    labels = concept_labels(names)
    assert labels[:3] == ["word 0 #0", "word 0 #1", "word 2"]
    assert labels[9] == "latent 9 (word 9?)"
    for name, label in zip(names, labels, strict=True):
        assert (" #" in label) == (name.verdict == COLLISION)
        assert (label == f"latent {name.index} ({name.name}?)") == (name.verdict == ABSTAINS)


def test_every_column_is_what_it_says(held: Settings) -> None:
    """Against names, words and margins found one pair at a time; the first three columns are what they were without a test."""
    assign_names(held, RUN, device="cpu")
    artifacts = Artifacts(held)
    vocabulary = load_vocabulary(held, "enc")
    decoder = load_checkpoint(artifacts.sae(RUN)).decoder_weight.detach()
    plain = [[str(name.index), name.name, f"{name.similarity:.6f}"] for name in nearest_words(decoder, vocabulary)]
    rows = rows_of(held)
    assert [[row["index"], row["name"], row["similarity"]] for row in rows] == plain
    cosines = decoder.double().numpy() @ vocabulary.embeddings.double().numpy().T
    top = [[vocabulary.words[word] for word in np.argsort(-of_latent)[:5]] for of_latent in cosines]
    directions, words = decoder.double().numpy(), vocabulary.embeddings.double().numpy()
    apart, words = directions - np.delete(directions, 9, axis=0).mean(axis=0), words - words.mean(axis=0)
    centred = apart @ words.T / np.linalg.norm(apart, axis=1, keepdims=True) / np.linalg.norm(words, axis=1)
    z = (centred.max(axis=1) - centred.mean(axis=1)) / centred.std(axis=1)
    for latent, row in enumerate(rows):
        ordered = -np.sort(-cosines[latent])
        assert [row[f"word_{place}"] for place in range(1, 6)] == top[latent]
        assert [float(row[f"similarity_{place}"]) for place in range(1, 6)] == pytest.approx(ordered[:5], abs=2e-6)
        assert float(row["margin"]) == pytest.approx(ordered[0] - ordered[1], abs=2e-6)
        assert float(row["z"]) == pytest.approx(z[latent], abs=2e-4)
        assert row["centred_name"] == vocabulary.words[centred[latent].argmax()]
        assert int(row["shared_by"]) == sum(other["name"] == row["name"] for other in rows)
        others = {word: sum(word in words for words in top) for word in top[latent] if word != row["name"]}
        specific = min(others, key=others.__getitem__)  # the nearest of several
        assert row["alternative"] == (specific if row["verdict"] == COLLISION else "")
    found = read_name_tests(held, RUN)
    assert found is not None
    for column, values in {
        "name": found.names, "verdict": found.verdicts, "centred_name": found.centred_names, "alternative": found.alternatives
    }.items():  # fmt: skip
        assert values == [row[column] for row in rows]
    assert found.words == top
    for column in ("similarity", "q", "p", "z", "margin", "shared_by"):
        np.testing.assert_array_equal(getattr(found, column), [float(row[column] or "nan") for row in rows])
    assert found.near_synonyms.tolist() == [row["near_synonyms"] == "true" for row in rows]
    np.testing.assert_allclose(found.similarities, -np.sort(-cosines, axis=1)[:, :5], atol=2e-6)


@pytest.mark.parametrize("remain", [False, True], ids=["none", "of another SAE"])
def test_without_firing_rates_every_latent_counts_as_live(held: Settings, capsys, caplog, remain: bool) -> None:
    """Those that are left beside an SAE that was put there by hand do not count, which is a warning."""
    manifest_path(Artifacts(held).sae(RUN)).unlink()
    if not remain:
        Artifacts(held).firing_rates(RUN).unlink()
    assign_names(held, RUN, device="cpu")
    said = capsys.readouterr().out + caplog.text
    assert "all latents count as live" in said
    assert (f"{Artifacts(held).firing_rates(RUN)} is not used" in caplog.text) == remain
    rows = rows_of(held)
    assert rows[9]["verdict"] == NAMED
    assert all(row["q"] for row in rows)


def test_the_rate_that_is_asked_for_decides(held: Settings) -> None:
    assign_names(held, RUN, device="cpu")
    q = np.array([float(row["q"] or "nan") for row in rows_of(held)])
    for rate, flags in ((1e-6, {"names": "tested"}), (0.9, {}), (0.05, {"names": "all"})):
        naming = Naming(name_fdr=rate, **flags)
        with pytest.raises(StaleArtifact, match=r"names? was the default, now 'all'|name_fdr was"):
            assign_names(held, RUN, naming, device="cpu")
        assert assign_names(held, RUN, naming, device="cpu", overwrite=True) is Outcome.RAN
        rows = rows_of(held)
        assert [float(row["q"] or "nan") for row in rows] == pytest.approx(q, nan_ok=True)
        passed = q <= rate if flags.get("names") != "all" else np.ones(60, dtype=bool)
        assert [row["verdict"] != ABSTAINS for row in rows] == passed.tolist()
        assert assign_names(held, RUN, naming, device="cpu") is Outcome.ALREADY_DONE
    with pytest.raises(StaleArtifact, match=r"move it away; to keep it, add .*--names all"):
        assign_names(held, RUN, device="cpu")


def test_the_script_names_all(held: Settings, monkeypatch) -> None:
    """As in the paper: dead latents and those that fail the test too, whose q stand in the file nonetheless."""
    monkeypatch.setenv("DNCBM_CONFIG", str(held.path))
    config = held.path.read_text() + "encoders = {'enc': ('RN50', 'openai')}\n"
    held.path.write_text(config)
    main("names", ["--img_enc_name", "enc", "--device", "cpu", "--names", "all"])
    rows = rows_of(held)
    times = {row["name"]: sum(other["name"] == row["name"] for other in rows) for row in rows}
    assert [row["verdict"] for row in rows] == [NAMED if times[row["name"]] == 1 else COLLISION for row in rows]
    assert sum(float(row["q"] or "nan") > 0.05 for row in rows) >= 48
    names = read_names(held, RUN)
    assert concept_labels(names) == concept_labels([replace(name, verdict=None) for name in names])


def write_untested_names(settings: Settings) -> list[ConceptName]:
    """As an older version did."""
    artifacts = Artifacts(settings)
    target = artifacts.concept_names(RUN)
    inputs = {"SAE": artifacts.sae(RUN), "words": artifacts.words(), "word embeddings": artifacts.published_embeddings("enc")}
    names = nearest_words(load_checkpoint(artifacts.sae(RUN)).decoder_weight.detach(), load_vocabulary(settings, "enc"))
    with making(target, "names", {"vocabulary": "words"}, inputs, overwrite=False) as work:
        write_names(target, names)
        work.done([target])
    return names


def test_names_of_an_older_version_stay_valid(held: Settings, capsys, refusal) -> None:
    target = Artifacts(held).concept_names(RUN)
    names = write_untested_names(held)
    before = target.read_bytes()
    assert before.startswith(b"index,name,similarity\r\n0,word 0,")
    capsys.readouterr()
    assert assign_names(held, RUN, device="nonsense") is Outcome.ALREADY_DONE
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"already done: {target}"
    assert "not tested: --overwrite tests them" in second
    assert target.read_bytes() == before
    assert {name.verdict for name in read_names(held, RUN)} == {None}
    assert read_name_tests(held, RUN) is None
    assert share_abstaining(read_names(held, RUN)) is None
    with refusal("--device nonsense"):
        assign_names(held, RUN, device="nonsense", overwrite=True)
    assert target.read_bytes() == before
    assert assign_names(held, RUN, device="cpu", overwrite=True) is Outcome.RAN
    assert [row["name"] for row in rows_of(held)] == [name.name for name in names]
    assert rows_of(held)[0]["verdict"] == COLLISION
    assert assign_names(held, RUN, device="cpu", overwrite=True) is Outcome.ALREADY_DONE


def spoil_sae(artifacts: Artifacts) -> None:
    artifacts.sae(RUN).write_bytes(artifacts.sae(RUN).read_bytes()[:-1])


def spoil_sae_by_hand(artifacts: Artifacts) -> None:
    manifest_path(artifacts.sae(RUN)).unlink()
    artifacts.sae(RUN).write_bytes(b"no tensors")


def spoil_rates(artifacts: Artifacts) -> None:
    artifacts.firing_rates(RUN).write_bytes(b"")


def spoil_embeddings(artifacts: Artifacts) -> None:
    torch.save(torch.ones(3, 64), artifacts.published_embeddings("enc"))


def narrow_embeddings(artifacts: Artifacts) -> None:
    torch.save(torch.ones(150, 63), artifacts.published_embeddings("enc"))


@pytest.mark.parametrize("are_tested", [False, True])
@pytest.mark.parametrize("spoil", [spoil_sae, spoil_sae_by_hand, spoil_rates, spoil_embeddings, narrow_embeddings])
def test_names_are_not_removed_before_new_ones_can_be_made(held: Settings, spoil: Callable, are_tested: bool) -> None:
    if are_tested:
        assign_names(held, RUN, Naming(names="all"), device="cpu")
    else:
        write_untested_names(held)
    target = Artifacts(held).concept_names(RUN)
    before = target.read_bytes()
    spoil(Artifacts(held))
    with pytest.raises(UserError):
        assign_names(held, RUN, device="cpu", overwrite=True)
    assert target.read_bytes() == before
    assert manifest_path(target).is_file()


def edit(settings: Settings, changes: dict[int, dict[str, str]]) -> None:
    """Change cells of the names by hand, as the documentation says."""
    rows, path = rows_of(settings), Artifacts(settings).concept_names(RUN)
    for index, cells in changes.items():
        rows[index] |= cells
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    manifest_path(path).unlink(missing_ok=True)


def test_a_corrected_name_is_shown_if_its_verdict_is_corrected_too(held: Settings) -> None:
    assign_names(held, RUN, device="cpu")
    edit(held, {9: {"name": "ball"}})
    assert concept_labels(read_names(held, RUN))[9] == "latent 9 (ball?)"
    edit(held, {9: {"verdict": NAMED}})
    assert concept_labels(read_names(held, RUN))[9] == "ball"
    assert assign_names(held, RUN, device="cpu") is Outcome.PROVIDED


@pytest.mark.filterwarnings("error")
def test_blank_cells_are_unknown(held: Settings, refusal) -> None:
    assign_names(held, RUN, device="cpu")
    tested = read_name_tests(held, RUN)
    abstaining = share_abstaining(read_names(held, RUN))
    assert tested is not None
    assert abstaining is not None
    assert tested.shared_by[0] == 2
    edit(held, {0: dict.fromkeys(COLUMNS[2:], ""), 2: {"name": tested.names[0], "shared_by": ""}})
    names, found = read_names(held, RUN), read_name_tests(held, RUN)
    assert found is not None
    assert (names[0].verdict, found.verdicts[0]) == (None, "")
    assert found.verdicts[1:] == tested.verdicts[1:]
    assert share_abstaining(names) == abstaining  # one latent of unknown verdict does not make all unknown
    texts = [name.name for name in names]
    assert found.shared_by.tolist() == [texts.count(text) for text in texts]  # in the names as they are now
    assert found.shared_by[0] == 3
    for column in ("similarity", "q", "p", "z", "margin"):
        assert np.isnan(getattr(found, column)[0])
        np.testing.assert_array_equal(getattr(found, column)[1:], getattr(tested, column)[1:])
    assert (found.words[0], found.alternatives[0], found.centred_names[0]) == ([], "", "")
    edit(held, {0: {"z": "far"}})
    with refusal("'far'", "correct it, or run `python scripts/04_assign_names.py --overwrite`"):
        read_name_tests(held, RUN)


@pytest.mark.parametrize(
    ("n_latents", "n_words", "listed"), [(1, 20, 5), (6, 1, 1), (6, 2, 2), (6, 4, 4)], ids=["one latent", "1", "2", "4 words"]
)
def test_few_words_or_latents_abstain(n_latents: int, n_words: int, listed: int) -> None:
    rng = np.random.default_rng(0)
    vocabulary = vocabulary_of(rng.normal(size=(n_words, 8)))
    dictionary, live = torch.from_numpy(rng.normal(size=(n_latents, 8))), np.ones(n_latents, dtype=bool)
    found = name_latents(dictionary, vocabulary, live)
    assert found.verdicts == [ABSTAINS] * n_latents
    assert [len(words) for words in found.words] == [listed] * n_latents
    assert np.isnan(found.similarities).sum() == n_latents * (5 - listed)
    assert np.isnan(found.margin).all() == (n_words == 1)
    every = name_latents(dictionary, vocabulary, live, Naming(names="all"))
    assert ABSTAINS not in every.verdicts
    if n_words == 1:
        assert every.verdicts == [COLLISION] * 6
        assert every.alternatives == [""] * 6


def test_a_word_that_the_list_holds_twice_is_one_name() -> None:
    embeddings = np.eye(4)[[0, 0, 1, 2, 3]] + 1e-3 * np.arange(5)[:, None]
    vocabulary = Vocabulary(
        ["dog", "dog", "cat", "sea", "sky"], torch.nn.functional.normalize(torch.tensor(embeddings).float())
    )
    found = name_latents(torch.eye(4)[[0, 0, 1]], vocabulary, np.ones(3, dtype=bool), Naming(names="all"))
    assert found.verdicts == [COLLISION, COLLISION, NAMED]
    assert "dog" not in found.alternatives


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"0\n", "has no name"),
        (b"0,\n", "has no name"),
        (b"", "no latent"),
        (b"zero,dog\n", "no latent"),
        (b"zero,dog\n1,cat\n", "line 2 lacks an index"),
        (b"index,name,similarity\nzero,dog,1\n", "'zero'"),
        (b"index,name,similarity\n0,dog,near\n", "'near'"),
        (b"index,name,similarity\n0\n", "line 2 lacks"),
        (b"index,name,similarity,verdict\n0,dog,1,right\n", "line 2 has the verdict 'right'"),
        (b"index;name;similarity\n0;dog;1\n", "lacks an index"),
        (b"0,dog\n0,cat\n", "latent 0 twice"),
        (b"0,dog\n2,cat\n", "none for latent 1"),
        (b"1,dog\n2,cat\n", "none for latent 0"),
        (b"index,name\n0,caf\xe9\n", "UTF-8"),
        (b'index,name\n0,"' + b"x" * 200_000 + b'"\n', "limit"),
        (b"\x00\x93\xff", "UTF-8"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_a_malformed_file_is_named(settings: Settings, refusal, content: bytes, said: str) -> None:
    path = Artifacts(settings).concept_names(RUN)
    path.write_bytes(content)
    with refusal(path, said):
        read_names(settings, RUN)


OLD = {"encoder": "enc", "model": "m", "pretrained": "file", "weights": {"w.pt": "1"}}


@pytest.mark.parametrize(
    ("new", "differing"),
    [
        ({"model": "n"}, "model"),
        ({"weights": {"w.pt": "2"}}, "weights"),
        ({"weights": {"w.bin": "2"}}, "weights"),
        ({"weights": {"w.pt": "1", "tokenizer.json": "3"}}, None),  # older recipes name fewer files
        ({"encoder": "of another name"}, None),
    ],
)
def test_words_embedded_with_other_weights_name_nothing(
    settings: Settings, refusal, new: dict[str, Any], differing: str | None
) -> None:
    """The SAE is of an encoder whose weights were replaced before its words were embedded."""
    artifacts = Artifacts(settings)
    artifacts.published_embeddings("enc").unlink()
    features, embeddings = artifacts.features("cc3m", "enc", "out", "train"), artifacts.embeddings("enc")
    with making(features, "sae_features", OLD, {}, overwrite=True) as work:
        np.save(features / "00000.npy", np.ones((2, 3)))
        work.done([features / "00000.npy"])
    artifacts.sae(RUN).unlink()
    with making(artifacts.sae(RUN), "sae", {}, {"train features": features}, overwrite=True) as work:
        save_checkpoint(SparseAutoencoder(3, 6, seed=1), artifacts.sae(RUN))
        work.done([artifacts.sae(RUN)])
    with making(embeddings, "vocabulary", OLD | new, {"words": artifacts.words()}, overwrite=True) as work:
        np.save(embeddings, np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32))
        work.done([embeddings])
    if differing is None:
        assert assign_names(settings, RUN) is Outcome.RAN
        return
    with refusal(artifacts.sae(RUN), embeddings, "different encoders", differing, "--overwrite"):
        assign_names(settings, RUN)
    assert not artifacts.concept_names(RUN).exists()


def test_missing_names_name_the_command(settings: Settings, refusal) -> None:
    with refusal(Artifacts(settings).concept_names(RUN), "04_assign_names.py"):
        read_names(settings, RUN)
