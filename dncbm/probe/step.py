"""The probe's training step on concept strengths, compiled for CPUs: the same numbers as nn.Linear, autograd and Adam.

Only the active entries of a batch are read. The gradient (inputs x C) is never stored: the row of each input is summed in
the cache, and Adam updates that row of the weights at once, with the L1 gradient written out.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch.nn import functional

from sparse_autoencoder.compiled import compiled
from sparse_autoencoder.workers import Workers

Array: TypeAlias = np.ndarray
T = TypeVar("T")
FASTMATH = {"reassoc", "contract", "nsz"}
PIECES_PER_THREAD = 4
"""Ranges of inputs per thread in a step: several, so that no thread waits long for another."""
SPANS_PER_THREAD = 2
"""Ranges of items per thread."""
LOWEST, ONE = np.float32(-87), np.float32(1)
LOG2_E, LOG_2_HIGH, LOG_2_LOW = np.float32(1 / np.log(2)), np.float32(0.693359375), np.float32(np.log(2) - 0.693359375)
ROUNDER = np.float32(1.5 * 2**23)
"""Adding it rounds a float32 to an integer, which its lower bits then hold."""
LANES = 64
"""Loops over a multiple of this are vector instructions throughout, of which compilers put four into one round."""
SERIES = tuple(np.float32(1 / math.factorial(n)) for n in range(2, 8))


@compiled()
def gather_rows(
    rows: Array, indptr: Array, indices: Array, data: Array, n_columns: int, start: Array, to_indices: Array, to_data: Array
) -> bool:
    """Copy some rows of a CSR matrix, each to its `start` (rows + 1). Returns False at an entry that does not exist."""
    for i in range(rows.shape[0]):
        first, to = indptr[rows[i]], start[i]
        n = start[i + 1] - to
        if first < 0 or n < 0 or first + n > min(indices.shape[0], data.shape[0]) or to + n > to_indices.shape[0]:
            return False
        for p in range(n):
            column = indices[first + p]
            if column < 0 or column >= n_columns:
                return False
            to_indices[to + p] = column
            to_data[to + p] = data[first + p]
    return True


def take_rows(
    matrix: scipy.sparse.csr_matrix, rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Some rows of a CSR matrix: the first entry of each (rows + 1), and the column and value of every entry.

    Raises IndexError if there is no such row, or the matrix is malformed: what comes out can be used without looking.
    """
    start = row_starts(matrix, rows)
    indices, data = np.empty(start[-1], dtype=np.int64), np.empty(start[-1], dtype=np.float32)
    if not gather_rows(rows, matrix.indptr, matrix.indices, matrix.data, matrix.shape[1], start, indices, data):
        raise malformed(matrix)
    return start, indices, data


def row_starts(matrix: scipy.sparse.csr_matrix, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first entry of each row, and the number of entries, where these rows follow one another (rows + 1).

    Raises IndexError if there is no such row, or the rows would have more entries than the matrix.
    """
    if len(rows) and rows.min() < 0:
        raise IndexError(f"row {rows.min()} of a matrix of {matrix.shape[0]}")
    start = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(matrix.indptr[rows + 1].astype(np.int64) - matrix.indptr[rows], out=start[1:])
    if not 0 <= start[-1] <= len(matrix.indices) * max(len(rows), 1):  # no more than rows can have
        raise malformed(matrix)
    return start


def malformed(matrix: scipy.sparse.csr_matrix) -> IndexError:
    """The error of a matrix that must not be read."""
    return IndexError(f"the CSR matrix of shape {matrix.shape} is malformed: its row pointers or columns are out of range")


@compiled()
def sort_by_input(
    start: Array, indices: Array, data: Array, input_start: Array, item: Array, value: Array, cursor: Array
) -> None:
    """Transpose a batch by counting: sort its entries by input, then by item.

    Reads the first entry of each item (`start`, items + 1) and the input and value of each entry; fills what `Slopes` has.
    `cursor` is scratch space, one per input.
    """
    input_start[:] = 0
    for p in range(indices.shape[0]):
        input_start[indices[p] + 1] += 1
    for f in range(cursor.shape[0]):
        input_start[f + 1] += input_start[f]
        cursor[f] = input_start[f]
    for i in range(start.shape[0] - 1):
        for p in range(start[i], start[i + 1]):
            to = cursor[indices[p]]
            cursor[indices[p]] = to + 1
            item[to] = i
            value[to] = data[p]


@compiled(fastmath=FASTMATH)
def add_rows(total: Array, rows: Array, number: Array, factor: Array, first: int, last: int) -> None:
    """Add factor[p] * rows[number[p]] for p from `first` to `last` - 1: by twos, to read and write `total` half as often."""
    p = first
    if (last - first) % 2:
        row, a = rows[number[p]], factor[p]
        for c in range(total.shape[0]):
            total[c] += a * row[c]
        p += 1
    while p < last:
        row, other, a, b = rows[number[p]], rows[number[p + 1]], factor[p], factor[p + 1]
        for c in range(total.shape[0]):
            total[c] += a * row[c] + b * other[c]
        p += 2


@compiled(fastmath={"contract", "nsz"}, error_model="numpy")
def exponentials(x: Array, rounded: Array, bits: Array) -> None:
    """Replace x, from -87 to 0, by exp(x) with a relative error of about 1e-7.

    `rounded` and `bits` are scratch space: the same memory as float32 and as int32. These loops become vector instructions, as
    calls of exp do not.
    """
    for c in range(x.shape[0]):
        rounded[c] = x[c] * LOG2_E + ROUNDER
    for c in range(x.shape[0]):
        n = rounded[c] - ROUNDER  # x / log 2, rounded
        r = (x[c] - n * LOG_2_HIGH) - n * LOG_2_LOW  # at most log 2 / 2, where Taylor's series is short
        tail = SERIES[2] + r * (SERIES[3] + r * (SERIES[4] + r * SERIES[5]))
        x[c] = ONE + r * (ONE + r * (SERIES[0] + r * (SERIES[1] + r * tail)))
    for c in range(x.shape[0]):
        bits[c] = (bits[c] << np.int32(23)) + np.int32(127 << 23)  # now 2^n
    for c in range(x.shape[0]):
        x[c] *= rounded[c]


@compiled(fastmath=FASTMATH, error_model="numpy")
def classify(logits: Array, labels: Array, factor: Array, slopes: Array, losses: Array) -> None:
    """The cross-entropy of each item times its factor, and the derivative of that by each logit.

    Takes items x C logits (float32), and fills `slopes`, of the same shape, and `losses` (float64).
    """
    n_classes = logits.shape[1]
    x = np.empty(-(-n_classes // LANES) * LANES, dtype=np.float32)
    rounded = np.empty_like(x)
    for i in range(logits.shape[0]):
        largest = logits[i, 0]
        for c in range(n_classes):
            largest = max(largest, logits[i, c])
        for c in range(n_classes):
            below = logits[i, c] - largest
            x[c] = LOWEST if below < LOWEST else below  # NaN stays
        x[n_classes:] = LOWEST
        own = np.float64(logits[i, labels[i]]) - np.float64(largest)
        exponentials(x, rounded, rounded.view(np.int32))
        total = np.float32(0)
        for c in range(n_classes):
            total += x[c]
        losses[i] = (np.log(np.float64(total)) - own) * factor[i]
        scale = factor[i] / total
        for c in range(n_classes):
            slopes[i, c] = x[c] * scale
        slopes[i, labels[i]] -= factor[i]


@compiled(fastmath=FASTMATH, error_model="numpy")
def update_inputs(
    input_start: Array, item: Array, value: Array, slopes: Array, weight: Array, mean: Array, variance: Array,
    rates: tuple[np.float32, ...], first: int, last: int,
) -> float:  # fmt: skip
    """Adam's step, in place, on the weights of inputs `first` to `last` - 1, for cross-entropy + penalty * sum |W|.

    The first four arguments are those of Slopes; the next are inputs x C, with Adam's moments as `mean` and `variance`.
    `rates` are the penalty per weight, 1 - beta_1, beta_2, 1 - beta_2, the step size, the inverse square root of the second
    bias correction, and epsilon; all float32.

    Returns:
        The sum of |W| before the step.
    """
    penalty, rise, keep, square_rise, size, inverse_root, epsilon = rates
    n_classes = weight.shape[1]
    gradient = np.zeros(n_classes, dtype=np.float32)
    total = 0.0
    for f in range(first, last):
        w, m, v = weight[f], mean[f], variance[f]
        # Most inputs have few entries in a batch: the last two are added on the way.
        p, end = input_start[f], input_start[f + 1]
        rest = max(p, end - 2)
        add_rows(gradient, slopes, item, value, p, rest)
        a = value[rest] if rest < end else np.float32(0)
        b = value[rest + 1] if rest + 1 < end else np.float32(0)
        slope = slopes[item[rest] if rest < end else 0]
        other = slopes[item[rest + 1] if rest + 1 < end else 0]
        absolute = np.float32(0)
        for c in range(n_classes):
            before = w[c]
            absolute += abs(before)
            sign = penalty if before > 0 else (-penalty if before < 0 else np.float32(0))
            g = gradient[c] + sign + a * slope[c] + b * other[c]
            average = m[c] + rise * (g - m[c])
            square = keep * v[c] + square_rise * g * g
            m[c] = average
            v[c] = square
            w[c] = before - size * average / (np.sqrt(square) * inverse_root + epsilon)
        total += absolute
        if rest > p:
            gradient[:] = 0
    return total


@compiled(fastmath=FASTMATH)
def add_gradient(input_start: Array, item: Array, value: Array, slopes: Array, gradient: Array, first: int, last: int) -> None:
    """Add the gradient of the cross-entropy by the weights of inputs `first` to `last` - 1; arguments as above."""
    for f in range(first, last):
        add_rows(gradient[f], slopes, item, value, input_start[f], input_start[f + 1])


class Slopes(NamedTuple):
    """The cross-entropy of a batch, and the factors of its gradient by the weights."""

    ce: float
    """Sum over the items / divisor."""
    input_start: Array
    """First entry of each input (inputs + 1, int64), where entries are sorted by input."""
    item: Array
    """Item of each entry (int32)."""
    value: Array
    """Value of each entry (float32)."""
    slopes: Array
    """Derivative of `ce` by each logit, items x C float32."""


class BatchSlopes:
    """Computes the slopes of batches of a CSR matrix, and work on ranges of inputs, in threads of its own.

    A thread computes whole items and whole inputs, so the bits do not depend on the number of threads.
    """

    def __init__(self, n_inputs: int) -> None:
        self._n_threads = torch.get_num_threads()
        self._workers = Workers(self._n_threads)
        self._input_start, self._cursor = np.empty(n_inputs + 1, dtype=np.int64), np.empty(n_inputs, dtype=np.int64)
        edges = np.linspace(0, n_inputs, self._n_threads * PIECES_PER_THREAD + 1).astype(int)
        self._pieces = list(pairwise(edges.tolist()))

    def __call__(
        self,
        weight: torch.Tensor,
        matrix: scipy.sparse.csr_matrix,
        rows: NDArray[np.int64],
        labels: torch.Tensor,
        divisor: int,
        row_weights: torch.Tensor | None = None,
    ) -> Slopes:
        """The slopes of some rows with their labels, for the sum of their cross-entropies / `divisor`.

        With `row_weights` (float32, one per row), each cross-entropy is multiplied by its row's.

        Raises IndexError if the matrix is malformed or has other inputs than the weights, or there is no class of a label.
        """
        if matrix.shape[1] != len(weight) or len(weight) != len(self._cursor):
            raise IndexError(f"{matrix.shape[1]} inputs for weights of {len(weight)}")
        if len(rows) and not 0 <= labels.min() <= labels.max() < weight.shape[1]:
            raise IndexError(f"labels from {labels.min()} to {labels.max()} for {weight.shape[1]} classes")
        start = row_starts(matrix, rows)
        indices, data = np.empty(start[-1], dtype=np.int64), np.empty(start[-1], dtype=np.float32)
        factor = np.full(len(rows), 1 / divisor, dtype=np.float32)
        if row_weights is not None:
            factor *= row_weights.numpy()
        slopes, losses = np.empty((len(rows), weight.shape[1]), dtype=np.float32), np.empty(len(rows))

        def fill(span: tuple[int, int]) -> bool:
            first, last = span
            own = start[first : last + 1]
            whole = matrix.indptr, matrix.indices, matrix.data, matrix.shape[1]
            if not gather_rows(rows[first:last], *whole, own, indices, data):
                return False
            logits = functional.embedding_bag(
                torch.from_numpy(indices[own[0] : own[-1]]),
                weight,
                torch.from_numpy(own[:-1] - own[0]),
                mode="sum",
                per_sample_weights=torch.from_numpy(data[own[0] : own[-1]]),
            )
            classify(logits.numpy(), labels[first:last].numpy(), factor[first:last], slopes[first:last], losses[first:last])
            return True

        edges = np.linspace(0, len(rows), self._n_threads * SPANS_PER_THREAD + 1).astype(int)
        if not all(self._workers.map(fill, [(first, last) for first, last in pairwise(edges.tolist()) if last > first])):
            raise malformed(matrix)
        item, value = np.empty(len(indices), dtype=np.int32), np.empty(len(indices), dtype=np.float32)
        sort_by_input(start, indices, data, self._input_start, item, value, self._cursor)
        return Slopes(float(losses.sum()), self._input_start, item, value, slopes)

    def over_inputs(self, work: Callable[[int, int], T]) -> list[T]:
        """Do work on all inputs, in ranges `first` to `last` - 1."""
        return self._workers.map(lambda piece: work(*piece), self._pieces)

    def close(self) -> None:
        """End the threads."""
        self._workers.close()


class SparseAdamStep:
    """Training steps on rows of a CSR matrix, for weights on a CPU.

    The moments are those in the state of a torch.optim.Adam (new ones if it has none), so that either can continue where the
    other stopped.
    """

    def __init__(self, weight: torch.Tensor, optimizer: torch.optim.Adam, sparsity_lambda: float) -> None:
        """For weights of inputs x C float32, the only ones of the optimizer."""
        self.weight = weight.detach()
        self.optimizer = optimizer
        self.penalty = sparsity_lambda / weight.numel()
        state = optimizer.state[weight]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(self.weight)
            state["exp_avg_sq"] = torch.zeros_like(self.weight)
        self._state = state
        self._arrays = self.weight.numpy(), state["exp_avg"].numpy(), state["exp_avg_sq"].numpy()
        self._slopes = BatchSlopes(len(weight))

    def __call__(self, matrix: scipy.sparse.csr_matrix, rows: NDArray[np.int64], labels: torch.Tensor) -> float:
        """One step on some rows. Returns the loss before it: mean cross-entropy + lambda * mean |W| (METHOD section 4)."""
        found = self._slopes(self.weight, matrix, rows, labels, len(rows))
        self._state["step"] += 1
        rates = self._rates(int(self._state["step"]))
        totals = self._slopes.over_inputs(partial(update_inputs, *found[1:], *self._arrays, rates))
        return found.ce + self.penalty * sum(totals)

    def _rates(self, step: int) -> tuple[np.float32, ...]:
        group: dict[str, Any] = self.optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        size = group["lr"] / (1 - beta1**step)
        rates = (self.penalty, 1 - beta1, beta2, 1 - beta2, size, (1 - beta2**step) ** -0.5, group["eps"])
        return tuple(np.float32(rate) for rate in rates)

    def close(self) -> None:
        """End the threads."""
        self._slopes.close()
