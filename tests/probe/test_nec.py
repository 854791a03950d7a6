"""Accuracy at a number of effective concepts: the path of penalties, its controls, and the stage."""

import csv
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

import dncbm.probe.nec
from dncbm.concepts.strengths import encode_in_memory, load_concept_strengths, save_concept_strengths
from dncbm.features.stage import open_features
from dncbm.probe.model import ProbeData
from dncbm.probe.nec import NECPoint, accuracy_at_nec, nec_points, random_sae, read_nec, truncate
from dncbm.probe.solvers import CrossEntropy
from dncbm.probe.state import StateFile
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, ProbeDataset, SAERun, Splits
from dncbm.runs.manifests import Outcome, file_hash, read_manifest
from dncbm.runs.results import NECS, read_results
from dncbm.runs.settings import Settings
from sparse_autoencoder import SparseAutoencoder, TrainingSettings, save_checkpoint

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
C = 3
INPUTS = ("concepts", "features", "random")


def decided(n: int, width: int, seed: int) -> ProbeData:
    """Strengths of which the first 12 decide the class."""
    rng = np.random.default_rng(seed)
    z = (rng.exponential(size=(n, width)) * (rng.random((n, width)) < 0.3)).astype(np.float32)
    truth = np.zeros((width, C))
    truth[:12] = np.random.default_rng(99).normal(size=(12, C)) * 2
    labels = (z @ truth + 0.3 * rng.gumbel(size=(n, C))).argmax(axis=1)
    return ProbeData(scipy.sparse.csr_matrix(z), torch.from_numpy(labels))


@pytest.fixture(scope="module")
def splits() -> dict[str, ProbeData]:
    return {split: decided(n, 45, seed) for seed, (split, n) in enumerate(zip(SPLITS, (300, 50, 80), strict=True))}


@pytest.fixture(scope="module")
def few(splits: dict[str, ProbeData]) -> dict[str, ProbeData]:
    """Fewer inputs than effective concepts."""
    return {split: ProbeData(data.inputs[:, :8], data.labels) for split, data in splits.items()}


@pytest.fixture(scope="module")
def points(splits: dict[str, ProbeData], tmp_path_factory: pytest.TempPathFactory) -> list[NECPoint]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dncbm.probe.nec, "MAX_PASSES", 60)
        return nec_points("concepts", splits, C, CPU, StateFile(tmp_path_factory.mktemp("nec") / "state.safetensors"))


def test_truncation_keeps_the_largest_over_all_classes() -> None:
    weight = torch.tensor([[0.1, -3.0], [2.0, 0.0], [-2.0, 0.5]])
    assert truncate(weight, 2).tolist() == [[0, -3], [2, 0], [0, 0]]  # of equal ones, the first
    assert truncate(weight, 4).tolist() == [[0, -3], [2, 0], [-2, 0.5]]
    assert torch.equal(truncate(weight, 99), weight)


def test_every_number_of_effective_concepts_has_its_point(points: list[NECPoint]) -> None:
    assert [point.nec for point in points] == list(NECS)
    for point in points:
        assert point.nonzero <= point.nec <= point.path_nonzero
        assert point.nonzero > 0.8 * point.nec, "solving again may leave a few at 0"
    lambdas = [point.path_lambda for point in points]
    assert lambdas == sorted(lambdas, reverse=True)
    assert points[1].val_top1 > 0.6 > 1.5 / C


def test_the_path_is_that_of_scikit_learns_saga(splits: dict[str, ProbeData], points: list[NECPoint], saga) -> None:
    """On inputs divided by their root mean square: as many non-zero weights, and an accuracy like that of the largest."""
    x, y = splits["train"].inputs.toarray().astype(np.float64), splits["train"].labels.numpy()
    scale = np.sqrt((x**2).mean(axis=0))
    for point in points[:3]:
        coefficients = saga(x / scale, y, 45 * C / (point.path_lambda * len(x)), 1e-6)
        assert (np.abs(coefficients) > 1e-4).sum() / C == pytest.approx(point.path_nonzero, rel=0.1)
        for split, found in (("train_val", point.train_val_top1), ("val", point.val_top1)):
            logits = splits[split].inputs.toarray() / scale @ coefficients.T
            assert found == pytest.approx((logits.argmax(axis=1) == splits[split].labels.numpy()).mean(), abs=0.1)


def test_the_scale_of_an_input_does_not_matter(few: dict[str, ProbeData], tmp_path: Path, monkeypatch) -> None:
    """Powers of two leave every bit of the solution as it was."""
    monkeypatch.setattr(dncbm.probe.nec, "PATH_END", 0.1)
    powers = np.float32([1, 16, 1 / 16, 4, 1 / 4, 256, 2, 1 / 2])
    scaled = {
        split: ProbeData(scipy.sparse.csr_matrix(data.inputs.toarray() * powers), data.labels) for split, data in few.items()
    }
    plain, found = (nec_points("concepts", of, C, CPU, StateFile(tmp_path / f"{id(of)}.safetensors")) for of in (few, scaled))
    assert found == plain


def test_fewer_inputs_than_effective_concepts_end_the_path(splits: dict[str, ProbeData], tmp_path: Path) -> None:
    """As soon as every weight is non-zero. (Of an odd number of classes one is always 0: logits may be shifted.)"""
    three = {split: ProbeData(data.inputs[:, :3], data.labels % 2) for split, data in splits.items()}
    steps: list[int] = []
    points = nec_points("features", three, 2, CPU, StateFile(tmp_path / "state.safetensors"), on_step=steps.append)
    assert [(point.on, point.nec) for point in points] == [("features", nec) for nec in NECS]
    assert all(point.path_nonzero == 3 >= point.nonzero for point in points)
    assert len({point.val_top1 for point in points}) == 1
    assert 0.8 ** len(steps) > dncbm.probe.nec.PATH_END


def test_a_path_ends_at_its_last_lambda(splits: dict[str, ProbeData], tmp_path: Path, monkeypatch) -> None:
    """However few weights are non-zero there: a number that it never has gets its end."""
    monkeypatch.setattr(dncbm.probe.nec, "PATH_END", 0.5)
    steps: list[int] = []
    points = nec_points("concepts", splits, C, CPU, StateFile(tmp_path / "state.safetensors"), on_step=steps.append)
    assert steps == [1, 2, 3, 4]  # 0.8 ** 4 < 0.5
    assert [point.nec for point in points] == list(NECS)
    assert points[-1].path_nonzero < 30
    assert points[-1].path_lambda == pytest.approx(points[0].path_lambda * 0.8 ** (0 if points[0].path_nonzero < 5 else 1))


@pytest.mark.parametrize("at", [1, 11])
def test_an_interrupted_path_ends_with_the_same_points(
    few: dict[str, ProbeData], tmp_path: Path, monkeypatch, at: int
) -> None:
    monkeypatch.setattr(dncbm.probe.nec, "MAX_PASSES", 30)
    monkeypatch.setattr(dncbm.probe.nec, "PATH_END", 0.05)

    def die(step: int) -> None:
        if step == at:
            raise KeyboardInterrupt

    state = StateFile(tmp_path / "state.safetensors")
    whole = nec_points("concepts", few, C, CPU, StateFile(tmp_path / "whole.safetensors"))
    with pytest.raises(KeyboardInterrupt):
        nec_points("concepts", few, C, CPU, state, on_step=die)
    steps: list[int] = []
    assert nec_points("concepts", few, C, CPU, state, on_step=steps.append) == whole
    assert steps[0] == at + 1
    assert nec_points("concepts", few, C, CPU, state) == whole, "killed before the table was written"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("at", [3, 40, 150])
def test_ctrl_c_and_sigterm_within_a_lambda_lose_at_most_its_passes(
    few: dict[str, ProbeData], tmp_path: Path, monkeypatch, at: int, number: signal.Signals
) -> None:
    """At any pass: of the path, or of what is solved again."""
    monkeypatch.setattr(dncbm.probe.nec, "MAX_PASSES", 30)
    monkeypatch.setattr(dncbm.probe.nec, "PATH_END", 0.2)
    passes: list[int] = []
    evaluate = CrossEntropy.__call__

    def counted(self: CrossEntropy, weight: torch.Tensor) -> tuple[float, torch.Tensor]:
        passes.append(len(passes))
        if len(passes) == at and stop:
            os.kill(os.getpid(), number)
        return evaluate(self, weight)

    monkeypatch.setattr(CrossEntropy, "__call__", counted)
    stop = False
    whole = nec_points("concepts", few, C, CPU, StateFile(tmp_path / "whole.safetensors"))
    needed, stop = len(passes), True
    passes.clear()
    state = StateFile(tmp_path / "state.safetensors")
    with pytest.raises(KeyboardInterrupt):
        nec_points("concepts", few, C, CPU, state)
    stop = False
    passes.clear()
    assert nec_points("concepts", few, C, CPU, state) == whole
    again = len(passes) - (needed - at) - 2  # two: the gradient at 0, which sets the first lambda, and the pass itself
    assert again == 0 if at == 3 else 0 <= again <= 30, "of the path none is made again, of what is solved again at most one's"


# ---------------------------------------------------------------------------------------------------------------- stage

RUN = SAERun(encoder="enc", training=TrainingSettings(seed=5))
MINE = ProbeDataset("mine")
SIZES = {"train": 150, "train_val": 30, "val": 40}


def sae(seed: int = 4) -> SparseAutoencoder:
    model = SparseAutoencoder(5, 40, seed=3)
    with torch.no_grad():
        model.encoder_weight.normal_(generator=torch.Generator().manual_seed(seed))
        model.encoder_bias.fill_(-2)
        model.tied_bias.fill_(0.1)
    return model


@pytest.fixture
def settings(make_settings: Callable[..., Settings], make_store, write_labels, monkeypatch) -> Settings:
    """The class of an image is the largest of its first three features."""
    monkeypatch.setattr(dncbm.probe.nec, "PATH_END", 0.1)
    monkeypatch.setattr(dncbm.probe.nec, "MAX_PASSES", 30)
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
    return settings


def measure(settings: Settings, run: SAERun = RUN, **options) -> Outcome:
    return accuracy_at_nec(settings, run, MINE, **{"device": "cpu"} | options)


def test_random_directions_are_as_sparse_as_latents_are_on_average(make_store, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(3000, 5)).astype(np.float32)
    store = make_store(tmp_path / "store", [x])
    for transform in ("none", "centre", "unit_norm"):
        trained = SparseAutoencoder(5, 40, input_transform=transform)
        model = random_sae(trained, store, 0.1, seed=1)
        assert model.input_transform == transform
        found = encode_in_memory(model, store)
        assert found.shape == (3000, 40)
        np.testing.assert_allclose((found > 0).mean(axis=0), 0.1, atol=0.001)
        assert np.asarray((found > 0).sum(axis=0)).std() < 3
        np.testing.assert_allclose(model.encoder_weight.norm(dim=1), 1, rtol=1e-5)
    assert not torch.equal(model.encoder_weight, random_sae(trained, store, 0.1, seed=2).encoder_weight)


def test_the_stage_writes_a_table_and_rows(settings: Settings, refusal) -> None:
    assert measure(settings) is Outcome.RAN
    artifacts = Artifacts(settings)
    with artifacts.nec_table(RUN, "mine").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["on"], int(row["nec"])) for row in table] == [(on, nec) for on in INPUTS for nec in NECS]
    assert read_nec(settings, RUN, "mine") == {
        on: {int(row["nec"]): float(row["val_top1"]) for row in table if row["on"] == on} for on in INPUTS
    }
    assert max(float(row["nonzero"]) for row in table if row["on"] == "features") <= 5
    rows = read_results(artifacts.probe_results())
    assert [(row["method"], row["on"], row["sae"], row["seed"]) for row in rows] == [
        ("nec", on, RUN.config_name, "5") for on in INPUTS
    ]
    for row in rows:
        curve = [float(point["val_top1"]) for point in table if point["on"] == row["on"]]
        assert [float(row[f"val_nec_{nec}"]) for nec in NECS] == pytest.approx(curve, rel=1e-5)
        assert float(row["val_anec_5"]) == pytest.approx(curve[0], rel=1e-5)
        assert float(row["val_anec_avg"]) == pytest.approx(sum(curve) / 6, rel=1e-5)
    assert float(rows[1]["val_nec_5"]) > 0.9, "the features are what the labels were made of"
    assert not list(artifacts.nec(RUN, "mine").glob("state*"))
    manifest = read_manifest(artifacts.nec(RUN, "mine"))
    assert manifest["run"]["sae_type"] == "relu"
    of_splits = {f"{split} {kind}" for split in SPLITS for kind in ("concepts", "features")}
    assert manifest["inputs"].keys() == {"SAE", "split", *of_splits}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, ProbeData]]:
    """What the stage measures on each kind of inputs; nothing is solved."""
    found = {}

    def take(on: str, splits: dict[str, ProbeData], n_classes: int, *_: object) -> list[NECPoint]:
        assert n_classes == C
        found[on] = splits
        return [NECPoint(on, nec, 1.0, 1.0, 1.0, 0.5, 0.5) for nec in NECS]

    monkeypatch.setattr(dncbm.probe.nec, "nec_points", take)
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
        for on in INPUTS:
            assert torch.equal(given[on][split].labels, given["concepts"][split].labels)
    assert given["random"]["train"].inputs.nnz == pytest.approx(concepts.nnz, rel=0.01)


def test_done_stale_and_loaded_only_to_be_measured(settings: Settings, given: dict, refusal, monkeypatch) -> None:
    with refusal("--device nonsense"):
        measure(settings, device="nonsense")
    assert measure(settings) is Outcome.RAN
    given.clear()

    def fail(*_: object) -> None:
        raise AssertionError("loaded")

    with monkeypatch.context() as patched:
        for name in ("load_probe_data", "load_sae"):
            patched.setattr(dncbm.probe.nec, name, fail)
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
    solve = dncbm.probe.nec.nec_points

    def die_at_the_last(on: str, *rest: object) -> list[NECPoint]:
        if on == "random":
            raise KeyboardInterrupt
        return solve(on, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(dncbm.probe.nec, "nec_points", die_at_the_last)
        with pytest.raises(KeyboardInterrupt):
            measure(settings)
    states = sorted(path.name for path in artifacts.nec(RUN, "mine").glob("state*"))
    assert states == ["state_concepts.safetensors", "state_features.safetensors"]
    assert measure(settings) is Outcome.RAN
    assert artifacts.nec_table(RUN, "mine").read_bytes() == whole


DAMAGES: dict[str, Callable[[str], str]] = {
    "truncated": lambda text: text[:-40],
    "empty": lambda text: "",
    "reversed": lambda text: text[::-1],
    "of other columns": lambda text: "kind,index,name,images,top1\nclass,0,a,3,1\n",
    "without an input": lambda text: "".join(line for line in text.splitlines(True) if not line.startswith("random")),
    "of another input": lambda text: text.replace("random,", "chance,"),
    "no number": lambda text: text.replace("random,5,", "random,five,"),
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
            output = (
                {"bytes": path.stat().st_size, "sha256": file_hash(path)} if in_the_manifest else made["outputs"][path.name]
            )
            manifest.write_text(json.dumps(made | {"outputs": {path.name: output}}))
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
