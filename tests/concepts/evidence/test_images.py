"""The table of what images say: what is in it, when it is made, and what the user is told."""

import csv
import json
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.stats import false_discovery_control
from sklearn.metrics import roc_auc_score

from dncbm.concepts.evidence import images
from dncbm.concepts.evidence.images import COLUMNS, SPLIT, evidence_datasets, name_evidence, read_evidence
from dncbm.concepts.evidence.random_directions import decoder_like, random_sae
from dncbm.concepts.naming import ABSTAINS, NAMED, ConceptName, write_names
from dncbm.concepts.sae import load_sae
from dncbm.concepts.strengths import encode_in_memory
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Evidence, SAERun
from dncbm.runs.errors import StaleArtifact, UserError
from dncbm.runs.manifests import Outcome, file_hash, making, manifest_path, read_manifest
from dncbm.runs.settings import Settings
from sparse_autoencoder import SparseAutoencoder, load_checkpoint, save_checkpoint

RUN = SAERun(encoder="enc", dataset="pictures")
WORDS = [f"word {i}" for i in range(30)]
N, D, F = 120, 6, 16
ENCODERS = {"judge": ("RN50", "openai")}


@dataclass(frozen=True)
class Setting:
    """Features of `pictures`, the SAE's, and of `birds`, a probe's; an SAE, its names, and 30 words."""

    settings: Settings
    x: np.ndarray
    words: np.ndarray
    codes: np.ndarray
    names: list[ConceptName]
    make_store: object

    @property
    def artifacts(self) -> Artifacts:
        return Artifacts(self.settings)

    def write_features(self, dataset: str, x: np.ndarray, encoder: str = "enc", keys: np.ndarray | None = None) -> None:
        keys = np.arange(len(x)) if keys is None else keys
        parts = [np.split(rows, [50, 51]) for rows in (x.astype(np.float32), keys)]
        self.make_store(self.artifacts.features(dataset, encoder, "out", SPLIT), *parts)

    def write_names(self, names: list[ConceptName]) -> None:
        write_names(self.artifacts.concept_names(RUN), names)

    def run(self, *given: str | None) -> Outcome | None:
        return name_evidence(self.settings, RUN, Evidence(*given), device="cpu")


@pytest.fixture
def there(make_settings, make_store) -> Setting:
    rng = np.random.default_rng(0)
    settings = make_settings(sae_datasets={"pictures": "pictures"}, probe_datasets={"birds": "birds"}, encoders=ENCODERS)
    artifacts = Artifacts(settings)
    model = SparseAutoencoder(D, F, seed=3)
    with torch.no_grad():
        model.encoder_weight.normal_(generator=torch.Generator().manual_seed(1))
        model.encoder_bias.fill_(-1.5)
        model.encoder_bias[0] = -1000  # never active
    save_checkpoint(model, artifacts.sae(RUN))
    x, words = rng.normal(size=(N, D)).astype(np.float32), rng.normal(size=(30, D))
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    artifacts.words().parent.mkdir()
    artifacts.words().write_text("\n".join(WORDS))
    np.save(artifacts.embeddings("enc"), words.astype(np.float32))
    names = [ConceptName(i, WORDS[(3 * i) % 30], 0.5, NAMED if i % 2 else ABSTAINS) for i in range(F)]
    found = Setting(settings, x, words, model.encode(torch.from_numpy(x)).detach().numpy(), names, make_store)
    found.write_features("pictures", x)
    found.write_names(names)
    return found


def monoscore(code: np.ndarray, x: np.ndarray) -> float:
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = np.triu(np.outer(code, code), 1)
    return float((pairs * (x @ x.T)).sum() / pairs.sum())


def test_the_table_holds_what_images_say(there, capsys) -> None:
    assert there.run() is Outcome.RAN
    assert f"evidence from {N} images of pictures" in capsys.readouterr().out
    found = read_evidence(there.settings, RUN)
    np.testing.assert_array_equal(found.n_active, (there.codes > 0).sum(axis=0))
    cosines = there.words @ (there.x / np.linalg.norm(there.x, axis=1, keepdims=True)).T
    few = (found.n_active < 5) | (found.n_active > N - 5)
    assert few[0]
    assert 5 < (~few).sum() < F + 1
    for latent, name in enumerate(there.names):
        active = there.codes[:, latent] > 0
        assert found.evidence[latent] == ("too few images" if few[latent] else "tested")
        assert np.isnan([found.auc[latent], found.auc_p[latent]]).tolist() == [few[latent]] * 2
        if few[latent]:
            continue
        aucs = [roc_auc_score(active, word) for word in cosines]
        place = WORDS.index(name.name)
        assert found.auc[latent] == pytest.approx(aucs[place], abs=1e-5)
        assert found.auc_p[latent] == pytest.approx((1 + sum(auc > aucs[place] - 1e-9 for auc in aucs)) / 31, abs=1e-5)
        other = WORDS.index(found.wpmi_name[latent])
        assert found.wpmi_similarity[latent] == pytest.approx(there.words[place] @ there.words[other], abs=1e-5)
        assert found.wpmi_agrees[latent] == (found.wpmi_name[latent] == name.name)
        assert found.monoscore[latent] == pytest.approx(monoscore(there.codes[:, latent], there.x), abs=1e-5)
    assert found.wpmi_agrees.any()
    assert not found.wpmi_agrees.all()
    with there.artifacts.name_evidence(RUN, "pictures").open() as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == COLUMNS
    assert rows[1] == ["0", "word 0", "0", "too few images", *[""] * 9]  # blank, not NaN


def test_the_manifest_sums_it_up(there) -> None:
    there.run()
    found, details = read_evidence(there.settings, RUN), read_evidence(there.settings, RUN).details
    assert json.dumps(details, allow_nan=False)
    assert (details["images"], details["latents"], details["dataset"]) == (N, F, "pictures")
    assert (details["judging_encoder"], details["circular"]) == ("enc", True)
    tested = np.array([one == "tested" for one in found.evidence])
    assert details["tested"] == pytest.approx(tested.mean())
    assert sum(details["evidence"].values()) == F
    has, named = np.array([bool(name) for name in found.wpmi_name]), np.arange(F) % 2 == 1
    assert details["wpmi"]["agreement"] == pytest.approx(found.wpmi_agrees[has].mean())
    assert details["wpmi"]["agreement_named"] == pytest.approx(found.wpmi_agrees[has & named].mean())
    assert details["wpmi"]["mean_similarity"] == pytest.approx(np.nanmean(found.wpmi_similarity), rel=1e-4)
    assert list(details["by_verdict"]) == [NAMED, ABSTAINS]  # none is in collision
    for verdict, of in ((NAMED, named), (ABSTAINS, ~named)):
        assert details["by_verdict"][verdict] == {
            "latents": F // 2,
            "auc": pytest.approx(np.nanmean(found.auc[of]), rel=1e-4),
            "agreement": pytest.approx(found.wpmi_agrees[has & of].mean()),
            "monoscore": pytest.approx(np.nanmean(found.monoscore[of]), rel=1e-4),
        }
    for column in ("auc", "monoscore", "monoscore_pairs", "monoscore_random"):
        numbers = getattr(found, column)
        kept = numbers[~np.isnan(numbers)]
        assert details[column]["left_out"] == F - len(kept) > 0
        assert details[column]["mean"] == pytest.approx(kept.mean(), rel=1e-4)
        assert details[column]["quartiles"] == pytest.approx(np.percentile(kept, [25, 50, 75]).tolist(), rel=1e-4)


def test_untested_and_published_names_work_too(there) -> None:
    """The authors' files have no verdicts, and may hold names that our vocabulary lacks."""
    there.artifacts.concept_names(RUN).unlink()
    lines = [f"{name.index},{name.name}" for name in there.names]
    lines[3] = "3,an unknown name"
    there.artifacts.published_names(RUN).write_text("\n".join(lines))
    assert there.run() is Outcome.RAN
    found = read_evidence(there.settings, RUN)
    assert found.evidence[3] == "not in the vocabulary"
    assert np.isnan([found.auc[3], found.auc_p[3], found.wpmi_similarity[3]]).all()
    assert np.isfinite(found.monoscore[3])
    assert found.wpmi_name[3] in WORDS
    assert not found.wpmi_agrees[3]
    assert found.details["wpmi"]["agreement_named"] is None
    assert found.details["by_verdict"] == {}


def test_a_latent_that_never_fires_is_dead(there) -> None:
    """On these images and, as training has recorded, on those."""
    rates, target, path = np.full(F, 0.1), there.artifacts.sae(RUN), there.artifacts.firing_rates(RUN)
    rates[0] = 0
    with making(target, "sae", {}, {}, overwrite=True) as work:
        save_checkpoint(load_checkpoint(target), target)
        np.save(path, rates)
        work.done([target, path])
    there.run()
    found = read_evidence(there.settings, RUN)
    assert found.evidence[0] == "dead"
    assert found.evidence.count("dead") == found.details["evidence"]["dead"] == 1


def test_another_encoder_may_judge_whether_a_latent_is_one_thing(there) -> None:
    other = np.random.default_rng(9).normal(size=(N, 11))
    there.write_features("pictures", other, "judge")
    there.run(None, "judge")
    found = read_evidence(there.settings, RUN)
    assert (found.details["judging_encoder"], found.details["circular"]) == ("judge", False)
    for latent in np.flatnonzero(found.n_active >= 2):
        assert found.monoscore[latent] == pytest.approx(monoscore(there.codes[:, latent], other), abs=1e-5)
    # Random directions, active on as many images each, are judged by the same encoder.
    store, model = there.make_store(there.settings.path.parent / "same", [there.x]), load_sae(there.settings, RUN)
    random = encode_in_memory(random_sae(model, store, (there.codes > 0).mean(axis=0), RUN.training.seed), store).toarray()
    assert (random > 1e-6).sum(axis=0).tolist() == found.n_active.tolist()
    expected = [monoscore(code, other) if n >= 2 else np.nan for code, n in zip(random.T, found.n_active, strict=True)]
    np.testing.assert_allclose(found.monoscore_random, expected, atol=1e-5)
    assert there.run(None, "judge") is Outcome.ALREADY_DONE
    assert there.run() is Outcome.ALREADY_DONE  # it stays the judge
    change_names(there)
    assert there.run() is Outcome.RAN
    assert read_evidence(there.settings, RUN).details["judging_encoder"] == "judge"
    assert there.run(None, "enc") is Outcome.RAN  # the SAE's own, by name
    assert read_evidence(there.settings, RUN).details["circular"]
    assert there.run() is Outcome.ALREADY_DONE


def test_names_of_random_directions_are_tested_too(there) -> None:
    """By hand: one direction per live latent, active on as many images, with the word nearest to it."""
    there.run()
    found = read_evidence(there.settings, RUN)
    store, model = there.make_store(there.settings.path.parent / "same", [there.x]), load_sae(there.settings, RUN)
    like = decoder_like(model, np.ones(F, dtype=bool), RUN.training.seed)  # training recorded no dead ones
    codes = encode_in_memory(random_sae(model, store, found.n_active / N, RUN.training.seed, like), store).toarray() > 1e-6
    assert codes.sum(axis=0).tolist() == found.n_active.tolist()
    cosines = there.words @ (there.x / np.linalg.norm(there.x, axis=1, keepdims=True)).T
    nearest = (like.numpy() @ there.words.T).argmax(axis=1)
    tested = ~np.isnan(found.auc)
    aucs = np.array([[roc_auc_score(codes[:, f], word) for word in cosines] for f in np.flatnonzero(tested)])
    own = aucs[np.arange(len(aucs)), nearest[tested]]
    p = (1 + (aucs > own[:, None] - 1e-9).sum(axis=1)) / 31
    expected = {
        "latents": tested.sum(),
        "passed": (false_discovery_control(p) <= 0.05).mean(),
        "auc": pytest.approx(own.mean(), abs=1e-5),
    }
    assert found.details["random_names"] == expected
    assert expected["latents"] > 5


def test_a_judge_of_the_same_weights_is_circular_whatever_its_name(there) -> None:
    for judge, weights, circular in (("judge", "abc", True), ("other", "xyz", False)):
        there.write_features("pictures", there.x, judge)
        for encoder, digest in (("enc", "abc"), (judge, weights)):
            path = manifest_path(there.artifacts.features("pictures", encoder, "out", SPLIT))
            made = json.loads(path.read_text())
            path.write_text(json.dumps(made | {"settings": {"model": encoder, "weights": {f"{encoder}.pt": digest}}}))
        there.run(None, judge)
        assert read_evidence(there.settings, RUN).details["circular"] is circular


def test_a_judge_whose_features_were_removed_no_longer_judges(there) -> None:
    there.write_features("pictures", np.random.default_rng(9).normal(size=(N, 11)), "judge")
    there.run(None, "judge")
    shutil.rmtree(there.artifacts.features("pictures", "judge", "out", SPLIT))
    assert there.run() is Outcome.RAN
    assert read_evidence(there.settings, RUN).details["circular"]


@pytest.mark.parametrize("keys", [np.arange(N) + 1, np.arange(N)[::-1].copy(), np.arange(N - 1)])
def test_another_encoders_features_of_other_images_are_refused(there, refusal, keys: np.ndarray) -> None:
    there.write_features("pictures", np.ones((len(keys), 3)), "judge", keys)
    with refusal("judge", "not of the same images", f"{N} and" if len(keys) == N else f"{N - 1} and", "--overwrite"):
        there.run(None, "judge")
    assert evidence_datasets(there.settings, RUN) == []


def test_images_of_a_probe_data_set_may_judge_too(there) -> None:
    there.write_features("birds", there.x[:60] + 0.1)
    assert there.run("birds") is Outcome.RAN
    assert there.run() is Outcome.RAN
    assert evidence_datasets(there.settings, RUN) == ["pictures", "birds"]  # the SAE's own first
    assert read_evidence(there.settings, RUN, "birds").details["images"] == 60
    assert read_evidence(there.settings, RUN).details["images"] == N


def test_without_features_of_the_default_names_are_made_all_the_same(there, capsys) -> None:
    for absent in ("features", "embeddings"):
        path = {
            "features": there.artifacts.features("pictures", "enc", "out", SPLIT) / "manifest.json",
            "embeddings": there.artifacts.embeddings("enc"),
        }[absent]
        kept = path.read_bytes()
        path.unlink()
        assert there.run() is None
        said = capsys.readouterr().out
        assert str(path) in said
        assert said.count("\n") == 1
        assert evidence_datasets(there.settings, RUN) == []
        path.write_bytes(kept)
    assert there.run() is Outcome.RAN


def test_what_was_asked_for_and_is_missing_names_its_command(there, refusal) -> None:
    with refusal("05_save_probe_features.py", "--img_enc_name enc", "--probe_dataset birds"):
        there.run("birds")
    with refusal("01_save_cc3m_features.py", "--img_enc_name judge", "--sae_dataset pictures"):
        there.run(None, "judge")
    with refusal("encoder 'nope' is not in `encoders`", "judge"):
        there.run(None, "nope")
    with refusal("--evidence_dataset 'fish'", "pictures, birds"):
        there.run("fish")
    there.artifacts.embeddings("enc").unlink()
    with refusal("03_save_vocab_embeddings.py"):
        there.run("pictures")
    with refusal("04_assign_names.py --evidence_dataset birds"):
        read_evidence(there.settings, RUN, "birds")


def change_names(there: Setting) -> None:
    there.write_names([replace(there.names[0], name="word 7"), *there.names[1:]])


def change_sae(there: Setting) -> None:
    save_checkpoint(SparseAutoencoder(D, F, seed=9), there.artifacts.sae(RUN))


def change_features(there: Setting) -> None:
    there.write_features("pictures", there.x + 1)


def change_words(there: Setting) -> None:
    there.artifacts.words().write_text("\n".join(reversed(WORDS)))


def change_word_embeddings(there: Setting) -> None:
    np.save(there.artifacts.embeddings("enc"), there.words[::-1].astype(np.float32))


@pytest.mark.parametrize("change", [change_names, change_sae, change_features, change_words, change_word_embeddings])
def test_it_is_made_again_of_other_names_latents_or_images(there, change) -> None:
    there.run()
    assert there.run() is Outcome.ALREADY_DONE
    before = there.artifacts.name_evidence(RUN, "pictures").read_bytes()
    change(there)
    with pytest.raises(StaleArtifact) as caught:
        read_evidence(there.settings, RUN)
    assert "run `python scripts/04_assign_names.py --evidence_dataset pictures` with the SAE's flags" in str(caught.value)
    assert "--overwrite" not in str(caught.value)  # which would replace names that were edited
    assert there.run("pictures") is Outcome.RAN
    assert there.artifacts.name_evidence(RUN, "pictures").read_bytes() != before
    read_evidence(there.settings, RUN)


def test_a_stale_table_is_not_lost_if_what_is_asked_for_cannot_be_made(there, refusal) -> None:
    there.run()
    path = there.artifacts.name_evidence(RUN, "pictures")
    before = path.read_bytes()
    with refusal("judge"):
        there.run(None, "judge")
    assert path.read_bytes() == before
    assert there.run() is Outcome.ALREADY_DONE


def test_an_interrupted_run_starts_again(there, monkeypatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    there.write_features("pictures", np.random.default_rng(9).normal(size=(N, 11)), "judge")
    for judge in (None, "judge"):  # for the first time, and again
        with monkeypatch.context() as patched:
            patched.setattr(images, "monosemanticity", interrupted)
            with pytest.raises(KeyboardInterrupt):
                there.run(None, judge)
        assert evidence_datasets(there.settings, RUN) == []
        there.write_names([replace(there.names[0], name=f"word {9 if judge else 7}"), *there.names[1:]])  # by hand
        assert there.run() is Outcome.RAN
        assert read_evidence(there.settings, RUN).details["judging_encoder"] == (judge or "enc")


@pytest.mark.parametrize(("cell", "value"), [("auc", "high"), ("n_active", ""), ("index", None)])
def test_a_damaged_table_names_the_command(there, refusal, cell: str, value: str | None) -> None:
    there.run()
    path = there.artifacts.name_evidence(RUN, "pictures")
    with path.open() as file:
        rows = list(csv.reader(file))
    place = rows[0].index(cell)
    for row in rows[1:] if value is not None else rows:
        row[place : place + 1] = [] if value is None else [value]
    with making(path, "names", {}, {}, overwrite=True) as work:  # as if an older version had written it
        path.write_text("\n".join(",".join(row) for row in rows))
        work.done([path])
    assert read_manifest(path)["outputs"]
    made_again_as_said(there)


def made_again_as_said(there: Setting) -> None:
    """What the error of a damaged table says helps."""
    path = there.artifacts.name_evidence(RUN, "pictures")
    with pytest.raises(UserError) as caught:
        read_evidence(there.settings, RUN)
    said = str(caught.value)
    assert "\n" not in said
    assert str(path) in said
    assert "--overwrite" not in said
    assert "run `python scripts/04_assign_names.py --evidence_dataset pictures` with the SAE's flags" in said
    if "remove it and" in said:
        path.unlink()
    assert there.run("pictures") is Outcome.RAN
    assert read_evidence(there.settings, RUN).details["images"] == N


@pytest.mark.parametrize("way", ["table removed", "manifest removed", "manifest damaged", "table edited", "row cut"])
def test_what_the_error_says_makes_the_table_again(there, way: str) -> None:
    there.run()
    path = there.artifacts.name_evidence(RUN, "pictures")
    manifest = manifest_path(path)
    if way.endswith("removed"):
        (path if way.startswith("table") else manifest).unlink()
    elif way == "manifest damaged":
        manifest.write_text("{")
    elif way == "table edited":
        path.write_text(path.read_text().replace("tested", "dead"))
    else:  # of the same recipe, as another version may have written it
        path.write_text(path.read_text()[:-30].rpartition(",")[0].rpartition("\n")[0] + "\n15\n")
        made = json.loads(manifest.read_text())
        made["outputs"][path.name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        manifest.write_text(json.dumps(made))
    made_again_as_said(there)


def test_what_does_not_belong_together_is_refused(there, refusal) -> None:
    np.save(there.artifacts.embeddings("enc"), np.ones((30, D + 1), dtype=np.float32))
    with refusal(f"the words have {D + 1}", "do not belong together"):
        there.run()
    assert evidence_datasets(there.settings, RUN) == []
