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
from dncbm.concepts.naming import (
    ConceptName,
    assign_names,
    concept_labels,
    name_similarities,
    nearest_words,
    read_names,
    write_names,
)
from dncbm.concepts.vocabulary import Vocabulary
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SAERun
from dncbm.runs.errors import StaleArtifact
from dncbm.runs.manifests import Outcome, making, read_manifest
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
