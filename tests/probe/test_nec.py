"""Accuracy at a number of effective and of contributing concepts: the path of penalties."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

import dncbm.probe.nec
from dncbm.probe.model import ProbeData
from dncbm.probe.ncc import Decisions, decisions
from dncbm.probe.nec import curve_on, truncate
from dncbm.probe.nec_table import Curve, Point
from dncbm.probe.solvers import CrossEntropy
from dncbm.probe.state import StateFile
from dncbm.runs.declarations import SPLITS
from dncbm.runs.results import NECS

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
C = 3


def decided(n: int, width: int, seed: int, by: int = 12, active: float = 0.3) -> ProbeData:
    """Strengths of which the first ones decide the class."""
    rng = np.random.default_rng(seed)
    z = (rng.exponential(size=(n, width)) * (rng.random((n, width)) < active)).astype(np.float32)
    truth = np.zeros((width, C))
    truth[:by] = np.random.default_rng(99).normal(size=(by, C)) * 2
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
def curve(splits: dict[str, ProbeData], tmp_path_factory: pytest.TempPathFactory) -> Curve:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dncbm.probe.nec, "MAX_PASSES", 60)
        return curve_on("concepts", splits, C, CPU, StateFile(tmp_path_factory.mktemp("nec") / "state.safetensors"))


@pytest.fixture(scope="module")
def points(curve: Curve) -> list[Point]:
    """Those at NEC."""
    return list(curve.points[: len(NECS)])


def points_on(*arguments: object, **options: object) -> tuple[Point, ...]:
    """All points of a path, without what each says of every image."""
    return curve_on(*arguments, **options).points


def test_truncation_keeps_the_largest_over_all_classes() -> None:
    weight = torch.tensor([[0.1, -3.0], [2.0, 0.0], [-2.0, 0.5]])
    assert truncate(weight, 2).tolist() == [[0, -3], [2, 0], [0, 0]]  # of equal ones, the first
    assert truncate(weight, 4).tolist() == [[0, -3], [2, 0], [-2, 0.5]]
    assert torch.equal(truncate(weight, 99), weight)


VLG_CBM = {
    1: (1, [3, 48, 59, 62]),
    3: (2, [3, 7, 21, 24, 27, 30, 38, 42, 48, 58, 59, 62]),
    5: (3, [3, 7, 13, 15, 21, 24, 27, 30, 34, 36, 38, 42, 43, 48, 55, 56, 57, 58, 59, 62]),
    6: (5, [3, 7, 13, 15, 21, 24, 26, 27, 28, 30, 33, 34, 36, 38, 42, 43, 45, 48, 55, 56, 57, 58, 59, 62]),
}
"""NEC -> place in the path below, and the weights (concept * 4 + class) that stay, as VLG-CBM's code has them: its choice of
the sparsity (`measure_acc` of evaluations/sparse_utils.py) and its `weight_truncation` of model/utils.py, run on these weights
at commit 376a768 of Trustworthy-ML-Lab/VLG-CBM. (There, weights within 1e-5 of 0 count as 0, and nothing is solved again.)"""


@pytest.mark.parametrize("nec", VLG_CBM)
def test_counting_and_truncation_are_those_of_vlg_cbm(nec: int) -> None:
    base = np.random.default_rng(0).normal(size=(4, 16)).T
    thresholds = (2.0, 1.5, 1.2, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
    path = [torch.from_numpy(np.sign(base) * np.maximum(np.abs(base) - t, 0)).float() for t in thresholds]
    place, kept = VLG_CBM[nec]
    assert place == next(i for i, weight in enumerate(path) if (weight != 0).sum() / 4 >= nec)
    assert truncate(path[place], nec * 4).flatten().nonzero().flatten().tolist() == kept


def test_every_number_of_effective_concepts_has_its_point(points: list[Point]) -> None:
    assert [(point.measure, point.target) for point in points] == [("nec", nec) for nec in NECS]
    for point in points:
        assert point.nonzero <= point.target <= point.path_nonzero
        assert point.nonzero > 0.8 * point.target, "solving again may leave a few at 0"
    lambdas = [point.path_lambda for point in points]
    assert lambdas == sorted(lambdas, reverse=True)
    assert points[1].val_top1 > 0.6 > 1.5 / C


def test_an_ncc_gets_the_best_probe_by_train_val_of_those_that_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all probes on the way, as far as their decisions tell; `val` is only measured."""
    sizes = zip(SPLITS, (600, 100, 120), strict=True)
    splits = {split: decided(n, 45, seed, by=45, active=0.9) for seed, (split, n) in enumerate(sizes)}
    seen: dict[str, list[Decisions]] = {"train_val": [], "val": []}

    def noted(weight: torch.Tensor, data: ProbeData) -> Decisions:
        found = decisions(weight, data)
        seen["train_val" if data is splits["train_val"] else "val"].append(found)
        return found

    monkeypatch.setattr(dncbm.probe.nec, "decisions", noted)
    monkeypatch.setattr(dncbm.probe.nec, "MAX_PASSES", 60)
    found = curve_on("concepts", splits, C, CPU, StateFile(tmp_path / "state.safetensors"))
    ncc = found.points[len(NECS) :]
    assert [(point.measure, point.target) for point in ncc] == [("ncc", target) for target in NECS]
    for point in ncc:
        best = min((one for one in seen["train_val"] if one.ncc <= point.target), key=lambda one: one.ce)
        assert (point.train_val_ncc, point.train_val_top1) == (best.ncc, best.top1)
    assert len({point.train_val_ncc for point in ncc}) > 3
    assert ncc[0].val_top1 < ncc[2].val_top1 - 0.05
    rights = [one.correct for one in seen["val"]]
    for point, correct in zip(found.points, found.correct, strict=True):
        assert point.val_top1 == float(correct.double().mean())
        assert any(torch.equal(correct, one) for one in rights)


def test_where_weights_only_harm_the_probe_without_weights_counts(
    splits: dict[str, ProbeData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On train_val every class is another here. The path then ends as soon as it has reached the last NEC."""
    monkeypatch.setattr(dncbm.probe.nec, "MAX_PASSES", 20)
    other = ProbeData(splits["train"].inputs, (splits["train"].labels + 1) % C)
    steps: list[int] = []
    state = StateFile(tmp_path / "state.safetensors")
    points = curve_on("concepts", splits | {"train_val": other}, C, CPU, state, on_step=steps.append).points
    for point in points[len(NECS) :]:
        assert (point.nonzero, point.ncc, point.effective, point.in_use, point.cea) == (0, 0, 0, 0, None)
        assert point.val_top1 == float((splits["val"].labels == 0).double().mean()), "of equal logits the first class"
    assert points[len(NECS) - 1].path_lambda == pytest.approx(points[-1].path_lambda * 0.8 ** len(steps))


def test_the_path_is_that_of_scikit_learns_saga(splits: dict[str, ProbeData], points: list[Point], saga) -> None:
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
    plain, found = (points_on("concepts", of, C, CPU, StateFile(tmp_path / f"{id(of)}.safetensors")) for of in (few, scaled))
    assert found == plain


def test_fewer_inputs_than_effective_concepts_end_the_path(splits: dict[str, ProbeData], tmp_path: Path) -> None:
    """As soon as every weight is non-zero. (Of an odd number of classes one is always 0: logits may be shifted.)"""
    three = {split: ProbeData(data.inputs[:, :3], data.labels % 2) for split, data in splits.items()}
    steps: list[int] = []
    points = points_on("features", three, 2, CPU, StateFile(tmp_path / "state.safetensors"), on_step=steps.append)
    at_nec = [point for point in points if point.measure == "nec"]
    assert [(point.on, point.target) for point in at_nec] == [("features", nec) for nec in NECS]
    assert all(point.path_nonzero == 3 >= point.nonzero for point in at_nec)
    assert len({point.val_top1 for point in at_nec}) == 1
    assert 0.8 ** len(steps) > dncbm.probe.nec.PATH_END


def test_a_path_ends_at_its_last_lambda(splits: dict[str, ProbeData], tmp_path: Path, monkeypatch) -> None:
    """However few weights are non-zero there: a number that it never has gets its end."""
    monkeypatch.setattr(dncbm.probe.nec, "PATH_END", 0.5)
    steps: list[int] = []
    points = points_on("concepts", splits, C, CPU, StateFile(tmp_path / "state.safetensors"), on_step=steps.append)
    assert steps == [1, 2, 3, 4]  # 0.8 ** 4 < 0.5
    points = [point for point in points if point.measure == "nec"]
    assert [point.target for point in points] == list(NECS)
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
    whole = points_on("concepts", few, C, CPU, StateFile(tmp_path / "whole.safetensors"))
    with pytest.raises(KeyboardInterrupt):
        points_on("concepts", few, C, CPU, state, on_step=die)
    steps: list[int] = []
    assert points_on("concepts", few, C, CPU, state, on_step=steps.append) == whole
    assert steps[0] == at + 1
    assert points_on("concepts", few, C, CPU, state) == whole, "killed before the table was written"


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
    whole = points_on("concepts", few, C, CPU, StateFile(tmp_path / "whole.safetensors"))
    needed, stop = len(passes), True
    passes.clear()
    state = StateFile(tmp_path / "state.safetensors")
    with pytest.raises(KeyboardInterrupt):
        points_on("concepts", few, C, CPU, state)
    stop = False
    passes.clear()
    assert points_on("concepts", few, C, CPU, state) == whole
    again = len(passes) - (needed - at) - 2  # two: the gradient at 0, which sets the first lambda, and the pass itself
    assert again == 0 if at == 3 else 0 <= again <= 30, "of the path none is made again, of what is solved again at most one's"
