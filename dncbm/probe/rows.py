"""Rows of concept strengths as tensors: gathered on the CPU and sent to a device, or gathered where they are."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray

from dncbm.probe.step import malformed, take_rows

GATHERED = 65536
"""About this many rows are gathered at once on a GPU, so that a batch costs few kernel launches."""


class SparseRows(NamedTuple):
    """Some rows of a CSR matrix, as tensors."""

    indices: torch.Tensor
    """Column of each entry: int64 on a CPU, else int32, which a GPU sorts in half the time."""
    offsets: torch.Tensor
    """First entry of each row, of the same type."""
    values: torch.Tensor
    """float32."""


def sent_rows(
    matrix: scipy.sparse.csr_matrix, rows: NDArray[np.int64], labels: torch.Tensor, device: torch.device
) -> tuple[SparseRows, torch.Tensor]:
    """Some rows of a CSR matrix, gathered on the CPU, with their labels (int64, one per row of the matrix), on a device.

    Raises IndexError if there is no such row, or the matrix is malformed.
    """
    start, indices, values = (torch.from_numpy(part) for part in take_rows(matrix, rows))
    of_rows = labels[torch.from_numpy(rows)]
    if device.type == "cpu":
        return SparseRows(indices, start[:-1], values), of_rows
    indices, offsets, values, of_rows = packed([indices.int(), start[:-1].int(), values, of_rows.int()], device)
    return SparseRows(indices, offsets, values), of_rows.long()


def packed(parts: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Vectors on the CPU, whose types have four bytes, sent to a device in one copy, which is not waited for on CUDA."""
    sizes = [len(part) for part in parts]
    whole = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
    torch.cat([part.view(torch.int32) for part in parts], out=whole)
    there = whole.to(device, non_blocking=device.type == "cuda").split(sizes)
    return [found.view(part.dtype) for found, part in zip(there, parts, strict=True)]


class ResidentRows:
    """A CSR matrix in the memory of a device, which gathers batches of its rows.

    The host knows how many entries each batch has, so it never waits for the device, and launches the kernels of later batches
    while that computes.
    """

    def __init__(self, matrix: scipy.sparse.csr_matrix, device: torch.device) -> None:
        """Raises IndexError if the matrix is malformed: what a GPU reads out of bounds ends the process."""
        starts, (n_rows, n_columns), indices = matrix.indptr.astype(np.int64), matrix.shape, matrix.indices
        n = min(len(indices), len(matrix.data))
        if len(starts) != n_rows + 1 or starts[0] < 0 or starts[-1] > n or (starts[1:] < starts[:-1]).any():
            raise malformed(matrix)
        if len(indices) and not 0 <= indices.min() <= indices.max() < n_columns:
            raise malformed(matrix)
        self._host_starts, self._starts = starts, torch.tensor(starts, device=device)
        self._indices = torch.tensor(indices, dtype=torch.int32, device=device)
        self._values = torch.tensor(matrix.data, dtype=torch.float32, device=device)

    @staticmethod
    def n_bytes(matrix: scipy.sparse.csr_matrix) -> int:
        """What the matrix needs of a device's memory."""
        return 8 * len(matrix.indptr) + 8 * len(matrix.indices)

    def batches(self, batch_size: int, order: NDArray[np.int64] | None = None) -> Iterator[SparseRows]:
        """All rows in batches, in the given order or as they are."""
        starts = self._host_starts
        if order is not None:
            starts = np.concatenate([[0], np.cumsum(np.diff(starts)[order])])
            places = torch.from_numpy(order).to(self._values.device)
        n_rows, at_once = len(starts) - 1, batch_size * max(1, GATHERED // batch_size)
        for first in range(0, n_rows, at_once):
            last = min(first + at_once, n_rows)
            begin, end = int(starts[first]), int(starts[last])
            if order is None:
                own = self._starts[first:last] - begin
                indices, values = self._indices[begin:end], self._values[begin:end]
            else:
                own, indices, values = self._gathered(places[first:last], end - begin)
            own = own.int()
            for row, next_row in pairwise([*range(first, last, batch_size), last]):
                entries = slice(int(starts[row]) - begin, int(starts[next_row]) - begin)
                yield SparseRows(indices[entries], own[row - first : next_row - first] - entries.start, values[entries])

    def _gathered(self, rows: torch.Tensor, n_entries: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The first entry of each row among those gathered, and the column and value of each entry."""
        begin = self._starts[rows]
        n_of_row = self._starts[rows + 1] - begin
        ends = n_of_row.cumsum(dim=0)
        start = ends - n_of_row
        entry = torch.arange(n_entries, device=rows.device)
        row = torch.searchsorted(ends, entry, right=True)  # the first that ends behind the entry
        place = entry + (begin - start)[row]
        return start, self._indices[place], self._values[place]
