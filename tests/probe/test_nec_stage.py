"""Stage 10: accuracies at NEC and NCC on concepts and controls, their table, and tables of older versions."""

import csv
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import dncbm.probe.nec
from dncbm.concepts.evidence.random_directions import random_sae
from dncbm.concepts.naming import ABSTAINS, COLLISION, NAMED, ConceptName, write_names
from dncbm.concepts.strengths import encode_in_memory, load_concept_strengths, save_concept_strengths
from dncbm.features.stage import open_features
from dncbm.probe.bands import leaks
from dncbm.probe.model import ProbeData
from dncbm.probe.nec import accuracy_at_nec, read_leakage, read_nec, read_points
from dncbm.probe.nec_seeds import banded_points
from dncbm.probe.nec_table import INPUTS, MAJORITY, MEASURES, Curve, Point, mean_of
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, ProbeDataset, SAERun, Splits
from dncbm.runs.manifests import Outcome, file_hash, fingerprint, read_manifest
from dncbm.runs.results import NECS, read_results
from dncbm.runs.settings import Settings
from sparse_autoencoder import SparseAutoencoder, TrainingSettings, save_checkpoint

pytestmark = pytest.mark.slow

C = 3
RUN = SAERun(encoder="enc", training=TrainingSettings(seed=5))
MINE = ProbeDataset("mine")
SIZES = {"train": 150, "train_val": 30, "val": 40}


def sae(seed: int = 4) -> SparseAutoencoder:
    model = SparseAutoencoder(5, 40, seed=3)
    with torch.no_grad():
        model.encoder_weight.normal_(generator=torch.Generator().manual_seed(seed))
        model.encoder_bias.fill_(-2)
        model.encoder_bias[7] = -100  # it is dead
        model.tied_bias.fill_(0.1)
    return model


@pytest.fixture
def settings(make_settings: Callable[..., Settings], make_store, write_labels, monkeypatch) -> Settings:
    """The class of an image is the largest of its first three features."""
    monkeypatch.setattr(dncbm.probe.nec, "PATH_END", 0.1)
    monkeypatch.setattr(dncbm.probe.nec, "MAX_PASSES", 15)
    settings = make_settings(probe_datasets={"mine": "images"})
    artifacts = Artifacts(settings)
    save_checkpoint(sae(), artifacts.sae(RUN))
    x = {split: np.random.default_rng(i).normal(size=(n, 5)).astype(np.float32) for i, (split, n) in enumerate(SIZES.items())}
    for split in SPLITS:
        make_store(artifacts.features("mine", "enc", "out", split), [x[split][:20], x[split][20:]])
    # The keys of train_val are those of train's first rows here; its labels do not matter.
    own = {split: x[split][:, :C].argmax(axis=1) for split in ("train", "val")}
    write_labels(settings, {"class_names": ["a", "b", "c"]}, own)
    save_concept_strengths(settings, RUN, MINE, Splits(), device="cpu")
    name(settings, [ABSTAINS if index % 8 == 0 else COLLISION if index % 8 == 1 else NAMED for index in range(40)])
    return settings


def name(settings: Settings, verdicts: list[str] | list[None]) -> None:
    """Write names of latents."""
    names = [ConceptName(index, f"word {index}", 0.5, verdict) for index, verdict in enumerate(verdicts)]
    write_names(Artifacts(settings).concept_names(RUN), names)


def measure(settings: Settings, run: SAERun = RUN, **options) -> Outcome:
    return accuracy_at_nec(settings, run, MINE, **{"device": "cpu"} | options)


def test_the_stage_writes_a_table_and_rows(settings: Settings) -> None:
    assert measure(settings) is Outcome.RAN
    artifacts = Artifacts(settings)
    with artifacts.nec_table(RUN, "mine").open(newline="") as file:
        table = list(csv.DictReader(file))
    expected = [(on, measured, str(target)) for on in INPUTS for measured in MEASURES for target in (*NECS, "avg")]
    assert [(row["on"], row["measure"], row["target"]) for row in table] == [*expected, (MAJORITY, "", "")]
    for measured in MEASURES:
        numbers = [row for row in table if row["measure"] == measured and row["target"] != "avg"]
        assert read_nec(settings, RUN, "mine", measured) == {
            on: {int(row["target"]): float(row["val_top1"]) for row in numbers if row["on"] == on} for on in INPUTS
        }
    points = read_points(settings, RUN, "mine")
    for point, row in zip(points, table, strict=True):
        for column in ("nonzero", "ncc", "in_use", "cea", "train_val_ncc", "val_low", "val_high"):
            assert getattr(point, column) == (float(row[column]) if row[column] else None)
        assert point.val_low <= point.val_top1 <= point.val_high
    assert max(point.nonzero for point in points if point.on == "features" and point.target) <= 5
    rows = read_results(artifacts.probe_results())
    assert [(row["method"], row["on"], row["sae"], row["seed"]) for row in rows] == [
        ("nec", on, RUN.config_name, "5") for on in INPUTS
    ]
    for row in rows:
        for measured in MEASURES:
            curve = [point for point in points if (point.on, point.measure) == (row["on"], measured) and point.target]
            accuracies = [point.val_top1 for point in curve]
            assert [float(row[f"val_{measured}_{target}"]) for target in NECS] == pytest.approx(accuracies, rel=1e-5)
            assert float(row[f"val_a{measured}_5"]) == pytest.approx(accuracies[0], rel=1e-5)
            assert float(row[f"val_a{measured}_avg"]) == pytest.approx(sum(accuracies) / 6, rel=1e-5)
            assert mean_of(points, row["on"], measured).val_top1 == pytest.approx(sum(accuracies) / 6)
        last = next(point for point in points if (point.on, point.measure, point.target) == (row["on"], "nec", 30))
        assert float(row["val_cea"]) == pytest.approx(last.cea, rel=1e-5)
        assert float(row["val_effective"]) == pytest.approx(last.effective, rel=1e-5)
        assert float(row["val_majority"]) == pytest.approx(points[-1].val_top1, rel=1e-5)
    assert float(rows[INPUTS.index("features")]["val_nec_5"]) > 0.9, "the features are what the labels were made of"
    assert not list(artifacts.nec(RUN, "mine").glob("state*"))
    manifest = read_manifest(artifacts.nec(RUN, "mine"))
    assert manifest["run"]["sae_type"] == "relu"
    of_splits = {f"{split} {kind}" for split in SPLITS for kind in ("concepts", "features")}
    assert manifest["inputs"].keys() == {"SAE", "set of named latents", "split", *of_splits}
    fires = load_concept_strengths(settings, RUN, "mine", "train").matrix.toarray().any(axis=0)
    named = np.arange(40) % 8 != 0
    firing = {point.on: point.firing for point in points if point.target}
    assert 0 < firing.pop("random") <= 40
    assert 0 < firing.pop("untrained") <= 40
    assert firing == {"concepts": fires.sum(), "named": (fires & named).sum(), "features": 5, "shuffled": fires.sum()}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, ProbeData]]:
    """What the stage measures on each kind of inputs; nothing is solved."""
    found = {}

    def take(on: str, splits: dict[str, ProbeData], n_classes: int, *_: object) -> Curve:
        assert n_classes == C
        found[on] = splits
        points = tuple(
            Point(on, measured, target, 1.0, train_val_top1=0.5, val_top1=0.5) for measured in MEASURES for target in NECS
        )
        return Curve(points, (torch.arange(SIZES["val"]) % 2 == 0).expand(len(points), -1))

    monkeypatch.setattr(dncbm.probe.nec, "curve_on", take)
    return found


def test_the_controls_are_of_the_same_images(settings: Settings, given: dict[str, dict[str, ProbeData]]) -> None:
    """Rows of random strengths are in the order of the concept strengths, whose labels they take, and as sparse."""
    measure(settings)
    stores = {split: open_features(settings, "mine", "enc", "out", split) for split in SPLITS}
    concepts = load_concept_strengths(settings, RUN, "mine", "train").matrix
    share = concepts.nnz / np.prod(concepts.shape)
    expected = random_sae(sae(), stores["train"], share, seed=5)
    for split in SPLITS:
        found = load_concept_strengths(settings, RUN, "mine", split)
        np.testing.assert_array_equal(found.keys, stores[split].keys)
        np.testing.assert_array_equal(given["concepts"][split].inputs.toarray(), found.matrix.toarray())
        assert given["features"][split].inputs.folder == stores[split].folder
        random = given["random"][split]
        np.testing.assert_array_equal(random.inputs.toarray(), encode_in_memory(expected, stores[split]).toarray())
        named = [index for index in range(40) if index % 8]
        np.testing.assert_array_equal(given["named"][split].inputs.toarray(), found.matrix.toarray()[:, named])
        mixed = given["shuffled"][split].inputs.toarray()
        np.testing.assert_array_equal(np.sort(mixed, axis=0), np.sort(found.matrix.toarray(), axis=0))
        assert (mixed != found.matrix.toarray()).any()
        for on in INPUTS:
            assert torch.equal(given[on][split].labels, given["concepts"][split].labels)
        active = np.diff(given["untrained"][split].inputs.indptr)
        assert active.max() <= round(concepts.nnz / len(stores["train"]))
    assert given["random"]["train"].inputs.nnz == pytest.approx(concepts.nnz, abs=40 / 2), "a direction's images are whole"
    assert list(given) == list(INPUTS)


@pytest.mark.parametrize(
    ("verdicts", "said", "kinds"),
    [
        ([None] * 40, "were not tested", set(INPUTS) - {"named"}),
        ([ABSTAINS] * 40, "every name abstains", set(INPUTS) - {"named"}),
        ([NAMED] * 40, "no name abstains", set(INPUTS)),
    ],
    ids=["untested", "all abstain", "none abstains"],
)
def test_named_concepts_are_left_out_or_are_all_concepts(
    settings: Settings, given: dict, capsys: pytest.CaptureFixture[str], verdicts: list, said: str, kinds: set[str]
) -> None:
    name(settings, verdicts)
    assert measure(settings) is Outcome.RAN
    assert sum(said in line for line in capsys.readouterr().out.splitlines()) == 1
    assert set(read_nec(settings, RUN, "mine")) == kinds
    assert "named" not in given, "nothing is solved for it"


def test_names_that_are_missing_or_of_another_sae_are_named(settings: Settings, given: dict, refusal) -> None:
    name(settings, [NAMED] * 39)
    with refusal("39 names", "40 latents"):
        measure(settings)
    Artifacts(settings).concept_names(RUN).unlink()
    with refusal("names", "04_assign_names.py"):
        measure(settings)
    assert not given


def test_done_stale_and_loaded_only_to_be_measured(settings: Settings, given: dict, refusal, monkeypatch) -> None:
    with refusal("--device nonsense"):
        measure(settings, device="nonsense")
    assert measure(settings) is Outcome.RAN
    given.clear()

    def fail(*_: object) -> None:
        raise AssertionError("loaded")

    with monkeypatch.context() as patched:
        for loads in ("load_probe_data", "load_sae"):
            patched.setattr(dncbm.probe.nec, loads, fail)
        assert measure(settings, device="nonsense") is Outcome.ALREADY_DONE
    with refusal("seed was 5, now 49"):  # at the same path, random directions would differ
        measure(settings, SAERun(encoder="enc", suffix="_seed5"))
    save_checkpoint(sae(seed=8), Artifacts(settings).sae(RUN))
    with refusal("SAE", "has changed", "--overwrite"):
        measure(settings)
    with refusal("SAE", "has changed", "--overwrite"):
        read_nec(settings, RUN, "mine")
    save_concept_strengths(settings, RUN, MINE, Splits(), device="cpu", overwrite=True)
    with refusal("SAE has changed; train concepts has changed", "--overwrite"):
        measure(settings)
    assert not given
    assert measure(settings, overwrite=True) is Outcome.RAN
    assert set(given) == set(INPUTS)


def test_an_interrupted_stage_ends_with_the_same_table(settings: Settings, monkeypatch) -> None:
    monkeypatch.setattr(dncbm.probe.nec, "PATH_END", 0.5)
    monkeypatch.setattr(dncbm.probe.nec, "MAX_PASSES", 5)
    measure(settings)
    artifacts = Artifacts(settings)
    whole = artifacts.nec_table(RUN, "mine").read_bytes()
    for path in artifacts.nec(RUN, "mine").iterdir():
        path.unlink()
    solve = dncbm.probe.nec.curve_on

    def die_at_the_last(on: str, *rest: object) -> Curve:
        if on == "random":
            raise KeyboardInterrupt
        return solve(on, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(dncbm.probe.nec, "curve_on", die_at_the_last)
        with pytest.raises(KeyboardInterrupt):
            measure(settings)
    states = sorted(path.name for path in artifacts.nec(RUN, "mine").glob("state*"))
    assert states == [f"state_{on}.safetensors" for on in ("concepts", "features", "named")]
    assert measure(settings) is Outcome.RAN
    assert artifacts.nec_table(RUN, "mine").read_bytes() == whole


# --------------------------------------------------------------------------------------------------------- other names

OTHERS = {
    "other latents": [NAMED if index % 4 else ABSTAINS for index in range(40)],
    "all": [NAMED] * 40,
    "none": [ABSTAINS] * 40,
    "not tested": [None] * 40,
}


def test_other_words_of_the_same_latents_change_nothing(settings: Settings, given: dict) -> None:
    measure(settings)
    found = read_points(settings, RUN, "mine")
    verdicts = [ABSTAINS if index % 8 == 0 else NAMED for index in range(40)]  # no longer in collision
    write_names(
        Artifacts(settings).concept_names(RUN), [ConceptName(i, f"other {i}", 0.4, of) for i, of in enumerate(verdicts)]
    )
    assert read_points(settings, RUN, "mine") == found
    assert measure(settings) is Outcome.ALREADY_DONE


@pytest.mark.parametrize("verdicts", OTHERS.values(), ids=OTHERS)
def test_if_other_latents_are_named_only_these_are_measured_again(
    settings: Settings, refusal, monkeypatch: pytest.MonkeyPatch, verdicts: list
) -> None:
    """With the same files as if all were measured."""
    monkeypatch.setattr(dncbm.probe.nec, "PATH_END", 0.5)
    monkeypatch.setattr(dncbm.probe.nec, "MAX_PASSES", 5)
    measure(settings)
    name(settings, verdicts)
    for ask in (lambda: read_nec(settings, RUN, "mine"), lambda: measure(settings)):
        with refusal("set of named latents has changed", "--overwrite"):
            ask()
    solve, solved = dncbm.probe.nec.curve_on, list[str]()
    monkeypatch.setattr(dncbm.probe.nec, "curve_on", lambda on, *rest: solved.append(on) or solve(on, *rest))
    assert measure(settings, overwrite=True) is Outcome.RAN
    assert solved == (["named"] if verdicts == OTHERS["other latents"] else [])
    artifacts = Artifacts(settings)
    outputs = [artifacts.nec_table(RUN, "mine"), artifacts.nec_leakage(RUN, "mine")]
    found, results = [path.read_bytes() for path in outputs], read_results(artifacts.probe_results())
    for path in artifacts.nec(RUN, "mine").iterdir():
        path.unlink()
    artifacts.probe_results().unlink()
    measure(settings)
    assert [path.read_bytes() for path in outputs] == found
    expected = read_results(artifacts.probe_results())
    assert [row | {"time": ""} for row in results] == [row | {"time": ""} for row in expected], "no row of before is left"


@pytest.mark.parametrize("also", ["SAE", "SAE of another path", "seed", "table"])
def test_if_more_has_changed_all_are_measured_again(settings: Settings, given: dict, also: str) -> None:
    measure(settings)
    name(settings, OTHERS["other latents"])
    run, manifest = RUN, Artifacts(settings).nec(RUN, "mine") / "manifest.json"
    if also == "SAE of another path":  # as if the one that was read had been moved away, so that it is not compared
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"sources": {}}))
    if also.startswith("SAE"):
        save_checkpoint(sae(seed=8), Artifacts(settings).sae(RUN))
        save_concept_strengths(settings, RUN, MINE, Splits(), device="cpu", overwrite=True)
    elif also == "seed":
        run = SAERun(encoder="enc", suffix="_seed5")  # at the same path
    else:
        path = Artifacts(settings).nec_table(RUN, "mine")
        path.write_text(path.read_text().replace("0.5", "0.6"))
    given.clear()
    assert measure(settings, run, overwrite=True) is Outcome.RAN
    assert list(given) == list(INPUTS)


def test_a_table_that_was_made_from_the_file_of_names_stays_valid(settings: Settings, given: dict, refusal) -> None:
    measure(settings)
    names, manifest = Artifacts(settings).concept_names(RUN), Artifacts(settings).nec(RUN, "mine") / "manifest.json"
    made = json.loads(manifest.read_text())
    del made["inputs"]["set of named latents"]
    made["inputs"]["names"] = fingerprint(names)
    made["sources"]["names"] = os.path.relpath(names, manifest.parent)
    manifest.write_text(json.dumps(made))
    given.clear()
    assert set(read_nec(settings, RUN, "mine")) == set(INPUTS)
    assert measure(settings) is Outcome.ALREADY_DONE
    names.write_text(names.read_text().replace("word 3", "sea"))
    for ask in (lambda: read_nec(settings, RUN, "mine"), lambda: measure(settings)):
        with refusal("names", "has changed", "--overwrite"):
            ask()
    assert measure(settings, overwrite=True) is Outcome.RAN
    assert set(given) == set(INPUTS)
    assert set(read_nec(settings, RUN, "mine")) == set(INPUTS)


# ------------------------------------------------------------------------------------------------- damaged and missing

DAMAGES: dict[str, Callable[[str], str]] = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "reversed": lambda text: text[::-1],
    "of other columns": lambda text: "kind,index,name,images,top1\nclass,0,a,3,1\n",
    "without an input": lambda text: "".join(line for line in text.splitlines(True) if not line.startswith("random")),
    "without a number": lambda text: "".join(line for line in text.splitlines(True) if not line.startswith("named,ncc,5")),
    "of another input": lambda text: text.replace("untrained,", "chance,"),
    "no number": lambda text: text.replace("random,nec,5,", "random,nec,five,"),
    "no accuracy": lambda text: re.sub(r",[\d.]+(,[\d.]*,[\d.]*\s*)$", r",\1", text),
    "NaN": lambda text: re.sub(r",[\d.]+\s*$", ",nan\n", text),
    "per cent": lambda text: re.sub(r",[\d.]+\s*$", ",50\n", text),
}


def test_a_damaged_table_is_named_with_the_stage_that_makes_it(settings: Settings, given: dict, refusal) -> None:
    measure(settings)
    path = Artifacts(settings).nec_table(RUN, "mine")
    manifest = path.with_name("manifest.json")
    table, made = path.read_text(), json.loads(manifest.read_text())
    for how in DAMAGES.values():
        path.write_text(how(table))
        for in_the_manifest in (False, True):  # as if the stage had written it so
            now = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
            changed = {path.name: now} if in_the_manifest else {}
            manifest.write_text(json.dumps(made | {"outputs": made["outputs"] | changed}))
            with refusal(path, "--overwrite"):
                read_nec(settings, RUN, "mine")


def test_an_unfinished_table_is_not_read(settings: Settings, given: dict, refusal) -> None:
    measure(settings)
    Artifacts(settings).nec_table(RUN, "mine").with_name("manifest.json").unlink()
    with refusal("unfinished", "10_accuracy_at_nec.py"):
        read_nec(settings, RUN, "mine")


def test_a_damaged_state_is_named_or_with_overwrite_made_again(settings: Settings, monkeypatch, refusal) -> None:
    monkeypatch.setattr(dncbm.probe.nec, "PATH_END", 0.5)
    monkeypatch.setattr(dncbm.probe.nec, "MAX_PASSES", 5)

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(dncbm.probe.nec, "save_results", die)
        with pytest.raises(KeyboardInterrupt):
            measure(settings)
    states = [Artifacts(settings).nec_state(RUN, "mine", on) for on in INPUTS]
    states[1].write_bytes(states[0].read_bytes())  # of other inputs
    states[2].write_bytes(b"")
    with refusal(states[1], "delete it", "--overwrite"):
        measure(settings)
    assert measure(settings, overwrite=True) is Outcome.RAN
    assert not any(state.exists() for state in states)


def test_what_is_missing_is_named(settings: Settings, refusal) -> None:
    with refusal("05_save_probe_features.py"):
        measure(settings, SAERun(encoder="other"))
    with refusal("02_train_sae_img.py"):
        measure(settings, SAERun(encoder="enc"))
    with refusal("10_accuracy_at_nec.py"):
        read_nec(settings, RUN, "mine")


@pytest.mark.parametrize(
    "damage", [lambda text: text.replace("random", "chance"), lambda text: text[:-9], lambda text: "figure"]
)
def test_a_damaged_comparison_is_named(settings: Settings, given: dict, refusal, damage: Callable[[str], str]) -> None:
    measure(settings)
    path = Artifacts(settings).nec_leakage(RUN, "mine")
    manifest = path.with_name("manifest.json")
    path.write_text(damage(path.read_text()))
    made = json.loads(manifest.read_text())
    made["outputs"][path.name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    manifest.write_text(json.dumps(made))
    with refusal(path, "--overwrite"):
        read_leakage(settings, RUN, "mine")


# ------------------------------------------------------------------------------------------- tables of older versions


def made_before(settings: Settings) -> Path:
    """Rewrite the finished table as an older version left it."""
    path = Artifacts(settings).nec_table(RUN, "mine")
    rows = [
        f"{on},{nec},{nec}.0,1.5,{nec}.5,0.5,{place / 10}"
        for place, on in enumerate(("concepts", "features", "random"), start=3)
        for nec in NECS
    ]
    path.write_text("\n".join(["on,nec,nonzero,path_lambda,path_nonzero,train_val_top1,val_top1", *rows, ""]))
    path.with_name("leakage.csv").unlink()
    manifest = path.with_name("manifest.json")
    made = json.loads(manifest.read_text())
    del made["inputs"]["set of named latents"]
    made["outputs"] = {path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)}}
    manifest.write_text(json.dumps(made))
    return path


def test_a_table_of_an_older_version_stays_valid(settings: Settings, given: dict, capsys, refusal) -> None:
    measure(settings)
    path = made_before(settings)
    given.clear()
    accuracies = {"concepts": 0.3, "features": 0.4, "random": 0.5}
    assert read_nec(settings, RUN, "mine") == {on: dict.fromkeys(NECS, top1) for on, top1 in accuracies.items()}
    assert read_nec(settings, RUN, "mine", "ncc") == {}
    assert read_leakage(settings, RUN, "mine") == []
    points = read_points(settings, RUN, "mine")
    assert mean_of(points, "features", "nec").val_top1 == pytest.approx(0.4)
    assert (points[0].nonzero, points[0].path_nonzero, points[0].ncc, points[0].val_low) == (5, 5.5, None, None)
    assert banded_points(settings, RUN, "mine").points == tuple(points)
    capsys.readouterr()
    Artifacts(settings).concept_names(RUN).unlink()  # which it did not read
    assert measure(settings) is Outcome.ALREADY_DONE
    assert "--overwrite measures all" in capsys.readouterr().out
    assert not given
    name(settings, [NAMED] * 39 + [ABSTAINS])
    assert measure(settings, overwrite=True) is Outcome.RAN
    assert set(given) == set(INPUTS)
    assert set(read_nec(settings, RUN, "mine", "ncc")) == set(INPUTS)
    path = made_before(settings)
    path.write_text(path.read_text().replace("random,30,", "random,31,"))
    with refusal(path, "--overwrite"):
        read_nec(settings, RUN, "mine")


# ---------------------------------------------------------------------------------------------------------- over seeds


def test_accuracies_over_seeds(settings: Settings, given: dict, capsys, monkeypatch) -> None:
    """Means and t-intervals over all SAEs that differ in nothing but their seed and have such a table."""
    measure(settings)
    own = read_points(settings, RUN, "mine")
    found = banded_points(settings, RUN, "mine")
    assert (found.seeds, found.points) == ((5,), tuple(own))
    others = {seed: replace(RUN, training=replace(RUN.training, seed=seed)) for seed in (6, 7, 8, 9)}
    tables = {5: own}
    for seed, shift in ((6, 0.1), (7, 0.3), (8, 0.0)):  # 9 has no table
        tables[seed] = [replace(p, val_top1=p.val_top1 + shift) for p in own if seed != 8 or p.on != "named"]
        folder = Artifacts(settings).nec(others[seed], "mine")
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    monkeypatch.setattr("dncbm.probe.nec_seeds.runs_to_compare", lambda *_: others)
    monkeypatch.setattr("dncbm.probe.nec_seeds.read_points", lambda _, run, __: tables[run.training.seed])
    found = banded_points(settings, RUN, "mine")
    assert found.seeds == (5, 6, 7)
    assert "seed 8, whose table lacks named" in capsys.readouterr().out
    point = next(point for point in found.points if (point.on, point.measure, point.target) == ("random", "ncc", 10))
    assert point.val_top1 == pytest.approx(0.5 + 0.4 / 3)
    reach = 4.302653 * np.std([0.5, 0.6, 0.8], ddof=1) / np.sqrt(3)  # Student's t, 2 degrees of freedom
    assert (point.val_low, point.val_high) == (pytest.approx(0.5 + 0.4 / 3 - reach, rel=1e-5), 1.0)
    assert found.named_seeds == (5, 6, 7)
    for seed in (6, 7):
        names = Artifacts(settings).concept_names(others[seed])
        names.parent.mkdir(parents=True)
        naming = {"stage": "names", "settings": {"name_fdr": 0.2}, "inputs": {}, "outputs": {"a": {"bytes": 1, "sha256": ""}}}
        names.with_name(f"{names.name}.manifest.json").write_text(json.dumps(naming))
        found = banded_points(settings, RUN, "mine")
        assert f"named concepts: seed {seed}, whose names differ in name_fdr" in capsys.readouterr().out
        assert (found.seeds, found.named_seeds) == ((5, 6, 7), (5, 7) if seed == 6 else (5,))
        assert next(one for one in found.points if (one.on, one.measure, one.target) == ("random", "ncc", 10)) == point
    own_named, named = ([one for one in points if one.on == "named"] for points in (own, found.points))
    assert named == own_named, "intervals over draws of the images"
    features = [point for point in found.points if point.on == "features"]
    assert features == [point for point in own if point.on == "features"], "no seed changes them"


# -------------------------------------------------------------------------------------------------------------- leakage


@pytest.fixture
def leaky_or_not(make_settings: Callable[..., Settings], make_store, write_labels, monkeypatch) -> Callable[[bool], Settings]:
    """A finished stage on features of which each image shows two of 16 planted directions; the first decides its class.

    Its latents are these directions, or random ones, which tell the classes no better than any other random ones.
    """
    monkeypatch.setattr(dncbm.probe.nec, "MAX_PASSES", 12)
    sizes = {"train": 500, "train_val": 100, "val": 200}

    def run(has_concepts: bool) -> Settings:
        settings = make_settings(probe_datasets={"mine": "images"})
        artifacts, rng = Artifacts(settings), np.random.default_rng(8)
        directions = np.linalg.qr(rng.normal(size=(16, 16)))[0]
        chosen = {split: np.array([rng.permutation(16)[:2] for _ in range(n)]) for split, n in sizes.items()}
        x = {}
        for split, of in chosen.items():
            noise = 0.02 * rng.normal(size=(len(of), 16))
            x[split] = (directions[of[:, 0]] + 0.4 * directions[of[:, 1]] + noise).astype(np.float32)
        x["train_val"] = x["train"][: sizes["train_val"]]  # its labels are those of train's rows with the same keys
        for split in SPLITS:
            make_store(artifacts.features("mine", "enc", "out", split), [x[split]])
        classes = {split: chosen[split][:, 0] % 4 for split in ("train", "val")}
        write_labels(settings, {"class_names": ["a", "b", "c", "d"]}, classes)
        model = SparseAutoencoder(16, 16, seed=3)
        random = np.linalg.qr(np.random.default_rng(9).normal(size=(16, 16)))[0]
        with torch.no_grad():
            model.encoder_weight.copy_(torch.from_numpy(directions if has_concepts else random))
            model.encoder_bias.fill_(-0.5)
        save_checkpoint(model, artifacts.sae(RUN))
        save_concept_strengths(settings, RUN, MINE, Splits(), device="cpu")
        name(settings, [None] * 16)
        assert measure(settings) is Outcome.RAN
        return settings

    return run


@pytest.mark.parametrize("has_concepts", [True, False], ids=["concepts", "leakage"])
def test_planted_concepts_are_above_random_directions_and_planted_leakage_is_not(
    leaky_or_not: Callable[[bool], Settings], capsys: pytest.CaptureFixture[str], has_concepts: bool
) -> None:
    settings = leaky_or_not(has_concepts)
    points, compared = read_points(settings, RUN, "mine"), read_leakage(settings, RUN, "mine")
    at_5 = {point.on: point.val_top1 for point in points if (point.measure, point.target) == ("nec", 5)}
    average = {point.on: point.val_top1 for point in points if (point.measure, point.target) == ("nec", None)}
    figures = (("anec_5", at_5), ("anec_avg", average))
    expected = [
        (figure, control, of["concepts"], of[control]) for figure, of in figures for control in ("random", "untrained")
    ]
    assert [(one.figure, one.against) for one in compared] == [(figure, control) for figure, control, *_ in expected]
    for one, (_, _, ours, theirs) in zip(compared, expected, strict=True):
        assert (one.concepts, one.control, one.advantage) == pytest.approx((ours, theirs, ours - theirs))
        assert one.low <= one.advantage <= one.high
    assert leaks(compared) is not has_concepts
    assert ("may leak" in capsys.readouterr().out) is not has_concepts
    assert (average["concepts"] > 0.95) is has_concepts
    shuffled = mean_of(points, "shuffled", "nec")
    majority = next(point for point in points if point.on == MAJORITY)
    assert shuffled.val_low <= 1 / 4 <= shuffled.val_high
    assert shuffled.val_low <= majority.val_top1, "it falls to the commonest class"
