"""The solver of the probe's objective, against scikit-learn, autograd and the conditions of an optimum."""

import itertools
from collections.abc import Callable
from contextlib import closing
from functools import cache

import numpy as np
import pytest
import scipy.sparse
import torch

import dncbm.probe.solvers
from dncbm.probe.model import ProbeData, linear, probe_loss
from dncbm.probe.solvers import (
    CrossEntropy,
    Progress,
    falling_lambdas,
    largest_lambda,
    minimise,
    root_mean_square,
    soft_threshold,
)

CPU = torch.device("cpu")
N, F, C = 200, 24, 4


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    """Concept strengths of very different sizes and rates of activity; the last is always 0."""
    rng = np.random.default_rng(0)
    rates, sizes = rng.uniform(0.02, 0.6, F), 10.0 ** rng.uniform(-1, 1, F)
    z = rng.exponential(size=(N, F)) * sizes * (rng.random((N, F)) < rates)
    z[:, -1] = 0
    return z.astype(np.float32)


@pytest.fixture(scope="module")
def labels(values: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(1)
    truth = rng.normal(size=(F, C)) * (rng.random((F, C)) < 0.4)
    return (values @ truth + rng.gumbel(size=(N, C))).argmax(axis=1)


@pytest.fixture(params=["strengths", "features"])
def data(request, values: np.ndarray, labels: np.ndarray, tmp_path, make_store) -> ProbeData:
    if request.param == "strengths":
        return ProbeData(scipy.sparse.csr_matrix(values), torch.from_numpy(labels))
    return ProbeData(make_store(tmp_path / "store", [values[:90], values[90:]]), torch.from_numpy(labels))


def solve(loss: CrossEntropy, penalty: float, start: Progress | None = None, **options) -> Progress:
    start = start or Progress.at(torch.zeros(F, C))
    return minimise(loss, loss.curvature(), start, penalty, **{"max_passes": 3000, "tolerance": 1e-7} | options)


def objective(
    weight: np.ndarray, values: np.ndarray, labels: np.ndarray, penalty: float, of_images: np.ndarray | None = None
) -> float:
    logits = values.astype(np.float64) @ weight
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(N), labels]
    return float((losses * (1 if of_images is None else of_images)).mean() + penalty * np.abs(weight).sum() / (F * C))


OF_IMAGES = torch.from_numpy(np.random.default_rng(2).exponential(size=N) * (np.arange(N) % 9 > 0))
"""Weights of images, some of them 0."""


@pytest.fixture(scope="module")
def optimum(values: np.ndarray, labels: np.ndarray, saga) -> Callable[[float], np.ndarray]:
    """Penalty -> scikit-learn's weights, inputs x C; solved once for strengths and features."""
    return cache(lambda penalty: saga(values, labels, F * C / (penalty * N), 1e-7).T)


@pytest.mark.parametrize("penalty", [0.5, 3.0, 20.0])
def test_the_optimum_is_that_of_scikit_learns_saga(
    data: ProbeData, values: np.ndarray, labels: np.ndarray, penalty: float, optimum: Callable[[float], np.ndarray]
) -> None:
    coefficients = optimum(penalty)
    theirs = objective(coefficients, values, labels, penalty)
    with closing(CrossEntropy(data, CPU)) as loss:
        found = solve(loss, penalty)
    ours = objective(found.weight.numpy(), values, labels, penalty)
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ours < 0.999 * objective(np.zeros((F, C)), values, labels, penalty)
    zeros = found.weight.numpy() == 0
    assert 0 < zeros.sum() < F * C
    assert (zeros == (np.abs(coefficients) < 1e-6)).mean() > 0.95
    assert zeros[-1].all()


def test_with_weights_of_images_the_optimum_is_that_of_scikit_learns_sample_weight(
    data: ProbeData, values: np.ndarray, labels: np.ndarray, saga
) -> None:
    of_images = OF_IMAGES.numpy()
    theirs = saga(values, labels, F * C / (3.0 * N), 1e-7, of_images).T
    with closing(CrossEntropy(data, CPU, image_weights=OF_IMAGES)) as loss:
        ours = solve(loss, 3.0).weight.numpy()
    found, expected = (objective(weight, values, labels, 3.0, of_images) for weight in (ours, theirs))
    assert found == pytest.approx(expected, rel=1e-3)
    assert found < 0.99 * objective(theirs * 0, values, labels, 3.0, of_images)


def test_an_intercept_is_not_penalised(values: np.ndarray, labels: np.ndarray) -> None:
    """So that classes are predicted as often as they are there; other weights fulfil the conditions of the penalty."""
    x = np.hstack([values, np.ones((N, 1), dtype=np.float32)])
    data, penalised = ProbeData(scipy.sparse.csr_matrix(x), torch.from_numpy(labels)), torch.arange(F + 1) < F
    with closing(CrossEntropy(data, CPU)) as loss:
        start = Progress.at(torch.zeros(F + 1, C))
        weight = solve(loss, 10.0, start, tolerance=0, max_passes=2000, penalised=penalised).weight
        gradient = loss(weight)[1][:F]
    predicted = torch.softmax(torch.from_numpy(x) @ weight, dim=1).mean(dim=0)
    torch.testing.assert_close(predicted, data.labels.bincount().float() / N, rtol=1e-3, atol=0)
    assert float(gradient.abs().max()) == pytest.approx(10.0 / ((F + 1) * C), rel=0.01)
    assert 0 < int((weight[:F] == 0).sum()) < F * C


def test_at_the_optimum_the_subgradient_holds_zero(data: ProbeData) -> None:
    """|gradient| <= lambda / (C F) where a weight is 0, and gradient = -sign * lambda / (C F) elsewhere."""
    with closing(CrossEntropy(data, CPU)) as loss:
        found = solve(loss, 3.0, tolerance=0.0, max_passes=2000)
        gradient = loss(found.weight)[1]
    limit = 3.0 / (F * C)
    zero = found.weight == 0
    assert float(gradient[zero].abs().max()) <= limit * 1.01
    torch.testing.assert_close(gradient[~zero], -limit * found.weight[~zero].sign(), rtol=0.01, atol=0)


def test_loss_and_gradient_are_autograds(data: ProbeData, values: np.ndarray, monkeypatch) -> None:
    monkeypatch.setattr(dncbm.probe.solvers, "BATCH", 64)
    monkeypatch.setattr(dncbm.probe.solvers, "FLOATS", 100)  # batches of fewer images where autograd is used for strengths
    weight = torch.randn(F, C, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(F, generator=torch.Generator().manual_seed(1)) + 0.5
    for divide, of_images in itertools.product((None, scale), (None, OF_IMAGES)):
        x, times = torch.from_numpy(values) / (1 if divide is None else divide), 1 if of_images is None else of_images.float()
        dense = weight.clone().requires_grad_()
        expected = (torch.nn.functional.cross_entropy(x @ dense, data.labels, reduction="none") * times).mean()
        expected.backward()
        with closing(CrossEntropy(data, CPU, divide, of_images)) as loss:
            found, gradient = loss(weight)
            torch.testing.assert_close(gradient, dense.grad, rtol=1e-4, atol=1e-6)
            by_hand = ((x.abs() * x.abs().sum(dim=1, keepdim=True)).T * times).sum(dim=1) / (2 * N)
            torch.testing.assert_close(loss.curvature(), by_hand, rtol=1e-4, atol=1e-6)
        assert found == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("of_images", [None, OF_IMAGES], ids=["all alike", "by weight"])
def test_the_curvature_bounds_the_hessian(data: ProbeData, values: np.ndarray, of_images: torch.Tensor | None) -> None:
    x = torch.from_numpy(values).double()

    def mean_loss(weight: torch.Tensor) -> torch.Tensor:
        losses = torch.nn.functional.cross_entropy(x @ weight.reshape(F, C), data.labels, reduction="none")
        return (losses * (1 if of_images is None else of_images)).mean()

    with closing(CrossEntropy(data, CPU, image_weights=of_images)) as loss:
        bound = loss.curvature().double().repeat_interleave(C).diag()
    for scale in (0.0, 0.05):
        at = scale * torch.randn(F * C, generator=torch.Generator().manual_seed(0)).double()
        hessian = torch.autograd.functional.hessian(mean_loss, at)
        assert float(torch.linalg.eigvalsh(bound - hessian).min()) > -1e-6


def test_the_objective_is_the_probes(values: np.ndarray, labels: np.ndarray) -> None:
    weight = torch.randn(F, C, generator=torch.Generator().manual_seed(0))
    data = ProbeData(scipy.sparse.csr_matrix(values), torch.from_numpy(labels))
    with closing(CrossEntropy(data, CPU)) as loss:
        progress = minimise(loss, loss.curvature(), Progress.at(weight), 0.7, max_passes=1, tolerance=0)
    expected = probe_loss(linear(torch.from_numpy(values), weight), data.labels, weight, 0.7)
    assert progress.objectives == [pytest.approx(expected.item(), rel=1e-5)]


def test_from_the_largest_lambda_on_every_weight_is_zero(data: ProbeData) -> None:
    with closing(CrossEntropy(data, CPU)) as loss:
        largest = largest_lambda(loss, C)
        assert not solve(loss, largest * 1.001).weight.any()
        assert solve(loss, largest * 0.97).weight.any()


def test_where_it_begins_does_not_matter(data: ProbeData, values: np.ndarray, labels: np.ndarray) -> None:
    with closing(CrossEntropy(data, CPU)) as loss:
        cold = solve(loss, 2.0)
        warm = solve(loss, 2.0, Progress.at(solve(loss, 4.0).weight))
    ends = [objective(found.weight.numpy(), values, labels, 2.0) for found in (cold, warm)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)


def test_it_stops_once_the_objective_stalls(data: ProbeData) -> None:
    """When ten passes lower it by no more than the tolerance."""
    with closing(CrossEntropy(data, CPU)) as loss:
        found = [solve(loss, 2.0, tolerance=tolerance).objectives for tolerance in (1e-2, 1e-5)]
    assert 10 < len(found[0]) < len(found[1]) < 3000
    for objectives, tolerance in zip(found, (1e-2, 1e-5), strict=True):
        best = np.minimum.accumulate(objectives)
        falls = (best[:-10] - best[10:]) / best[10:]
        assert falls[-1] <= tolerance < falls[:-1].min()


def test_progress_is_all_that_going_on_needs(data: ProbeData) -> None:
    seen: list[Progress] = []
    with closing(CrossEntropy(data, CPU)) as loss:
        whole = solve(loss, 2.0, max_passes=40, on_pass=seen.append)
        resumed = solve(loss, 2.0, seen[16], max_passes=40)
    assert len(seen) == len(whole.objectives) == 40
    assert torch.equal(whole.weight, resumed.weight)
    assert whole.objectives == resumed.objectives


def test_soft_threshold() -> None:
    found = soft_threshold(torch.tensor([3.0, -3.0, 0.5, -0.5, 0.0, 1.0]), torch.tensor(1.0))
    assert found.tolist() == [2, -2, 0, 0, 0, 0]


def test_root_mean_square(data: ProbeData, values: np.ndarray) -> None:
    expected = np.sqrt((values.astype(np.float64) ** 2).mean(axis=0))
    expected[-1] = 1
    np.testing.assert_allclose(root_mean_square(data, CPU), expected, rtol=1e-5)


def test_lambdas_fall_by_no_more_than_the_ratio() -> None:
    found = falling_lambdas(8.0, 1.0, 0.5)
    assert found == pytest.approx([4, 2, 1])
    found = falling_lambdas(7.0, 1.0, 0.5)
    assert len(found) == 3
    assert found[-1] == 1
    assert all(after / before >= 0.5 for before, after in zip([7.0, *found], found, strict=False))
    assert falling_lambdas(1.0, 2.0, 0.5) == [2.0]
    assert falling_lambdas(1.0, 0.0, 0.5) == [0.0]
