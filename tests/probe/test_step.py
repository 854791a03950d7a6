"""The compiled training step against nn.Linear, autograd and torch's Adam."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st

from dncbm.probe.fit import initial_weight
from dncbm.probe.model import ProbeData, linear, probe_loss
from dncbm.probe.rows import ResidentRows
from dncbm.probe.step import BatchSlopes, SparseAdamStep, take_rows

CPU = torch.device("cpu")


@given(
    n_rows=st.integers(1, 9),
    n_concepts=st.integers(1, 30),
    n_classes=st.integers(1, 5),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    penalty=st.sampled_from([0.0, 0.5, 20.0]),
    seed=st.integers(0, 99),
)
def test_every_compiled_step_is_torchs(
    strengths, n_rows: int, n_concepts: int, n_classes: int, density: float, penalty: float, seed: int
) -> None:
    values = strengths(n_rows, n_concepts, seed, density)
    matrix = scipy.sparse.csr_matrix(values)
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, n_classes, n_rows))
    layer = torch.nn.Linear(n_concepts, n_classes, bias=False)
    with torch.no_grad():
        layer.weight[0, 0] = 0  # where |w| has no derivative, torch's is 0
    weight = layer.weight.detach().T.clone().contiguous().requires_grad_()
    adams = [torch.optim.Adam([parameter], lr=0.01) for parameter in (layer.weight, weight)]
    step = SparseAdamStep(weight, adams[1], penalty)
    for number in range(4):
        rows = rng.permutation(n_rows)[: 1 + number]
        loss = torch.nn.functional.cross_entropy(layer(torch.from_numpy(values[rows])), labels[rows])
        loss = loss + penalty * layer.weight.abs().mean()
        adams[0].zero_grad()
        loss.backward()
        adams[0].step()
        assert step(matrix, rows, labels[rows]) == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
        theirs, ours = adams[0].state[layer.weight], adams[1].state[weight]
        assert theirs["step"] == ours["step"]
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours[moment].T, theirs[moment], rtol=1e-4, atol=1e-7)
        with torch.no_grad():  # a gradient that is rounding alone sets Adam's direction: continue from the same weights
            assert float((weight.T - layer.weight).abs().max()) <= 0.021
            moved = theirs["exp_avg"].abs() > 1e-5
            torch.testing.assert_close(weight.T[moved], layer.weight[moved], rtol=1e-4, atol=1e-5)
            weight.copy_(layer.weight.T)
    step.close()


@pytest.mark.parametrize("n_threads", [2, 3])
def test_bits_do_not_depend_on_threads_and_torch_can_continue(strengths, sparse, n_threads: int) -> None:
    train = sparse(strengths(64, 12, 1), np.arange(64) % 4)
    rows, found = np.arange(64), []
    for threads in (1, n_threads):
        torch.set_num_threads(threads)
        weight = initial_weight(12, 4, 49).requires_grad_()
        adam = torch.optim.Adam([weight], lr=0.01)
        step = SparseAdamStep(weight, adam, 0.5)
        for _ in range(3):
            step(train.inputs, rows, train.labels)
        step.close()
        found.append(weight.detach().clone())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    reference = initial_weight(12, 4, 49).requires_grad_()
    torchs = torch.optim.Adam([reference], lr=0.01)
    for parameter, optimizer, n_steps in ((reference, torchs, 4), (weight, adam, 1)):
        for _ in range(n_steps):
            optimizer.zero_grad()
            batch, labels = train.batch(rows, CPU)
            probe_loss(linear(batch, parameter), labels, parameter, 0.5).backward()
            optimizer.step()
    torch.testing.assert_close(weight, reference, rtol=1e-3, atol=1e-6)


def test_rows_are_taken_as_scipy_takes_them(strengths) -> None:
    matrix = scipy.sparse.csr_matrix(strengths(20, 7, 5))
    rows = np.array([19, 0, 3, 3, 11])
    start, indices, data = take_rows(matrix, rows)
    expected = matrix[rows]
    np.testing.assert_array_equal(start, expected.indptr)
    np.testing.assert_array_equal(indices, expected.indices)
    np.testing.assert_array_equal(data, expected.data)
    assert [len(part) for part in take_rows(matrix, np.array([], dtype=np.int64))] == [1, 0, 0]


def _replaced(part: str, at: int, value: int) -> Callable[[scipy.sparse.csr_matrix], None]:
    def damage(matrix: scipy.sparse.csr_matrix) -> None:
        getattr(matrix, part)[at] = value

    return damage


def _shortened(part: str) -> Callable[[scipy.sparse.csr_matrix], None]:
    return lambda matrix: setattr(matrix, part, getattr(matrix, part)[:-3].copy())


@pytest.mark.parametrize(
    "damage",
    [
        *(_replaced("indices", at, value) for at in (0, -1) for value in (7, -1, 2**31 - 1, -(2**31))),
        *(_replaced("indptr", at, value) for at in (0, 9, -1) for value in (-1, 500, 2**31 - 1, -(2**31))),
        _replaced("indptr", 9, 0),
        _shortened("indices"),
        _shortened("data"),
        _shortened("indptr"),
    ],
)
def test_a_malformed_matrix_is_refused_before_anything_is_read(strengths, sparse, damage) -> None:
    """Compiled code would read, or write, whatever lies there."""
    matrix = scipy.sparse.csr_matrix(strengths(20, 7, 5))
    weight = initial_weight(7, 3, 0).requires_grad_()
    before, labels, rows = weight.detach().clone(), torch.zeros(20, dtype=torch.int64), np.arange(20)
    step = SparseAdamStep(weight, torch.optim.Adam([weight]), 0.0)
    damage(matrix)
    for attempt in (
        lambda: take_rows(matrix, rows),
        lambda: step(matrix, rows, labels),
        lambda: ProbeData(matrix, labels).batch(rows, CPU),
        lambda: ResidentRows(matrix, CPU),
    ):
        with pytest.raises(IndexError):
            attempt()
    step.close()
    assert torch.equal(weight, before)


def test_rows_and_inputs_that_do_not_exist_are_refused(strengths) -> None:
    matrix = scipy.sparse.csr_matrix(strengths(20, 7, 5))
    for rows in ([-1], [20], [3, -20]):
        with pytest.raises(IndexError):
            take_rows(matrix, np.array(rows))
    weight = initial_weight(6, 3, 0).requires_grad_()
    step = SparseAdamStep(weight, torch.optim.Adam([weight]), 0.0)
    with pytest.raises(IndexError, match="7 inputs for weights of 6"):
        step(matrix, np.arange(3), torch.zeros(3, dtype=torch.int64))
    for label in (-1, 3):
        with pytest.raises(IndexError, match="for 3 classes"):
            step(matrix[:, :6], np.arange(3), torch.full((3,), label))
    step.close()


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e4])
def test_slopes_are_those_of_double_precision_however_large_the_logits(strengths, size: float) -> None:
    """With a number of classes that is no multiple of a vector's length."""
    values, labels = strengths(40, 12, 3), torch.from_numpy(np.random.default_rng(3).integers(0, 85, 40))
    weight = size * torch.randn(12, 85, generator=torch.Generator().manual_seed(3))
    logits = (torch.from_numpy(values).double() @ weight.double()).requires_grad_()
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    slopes = BatchSlopes(12)
    found = slopes(weight, scipy.sparse.csr_matrix(values), np.arange(40), labels, 40)
    slopes.close()
    assert found.ce == pytest.approx(loss.item(), rel=1e-6)
    # The logits are rounded to single precision before anything else.
    torch.testing.assert_close(torch.from_numpy(found.slopes).double(), logits.grad, rtol=1e-6 + 1e-6 * size, atol=1e-7)
