"""FeatureStore: the memory-mapped folder of .npy shards that holds image features."""

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dncbm.runs.artifacts import shard_keys
from dncbm.runs.errors import UserError, first_line
from dncbm.runs.manifests import check_chain, manifest_path, read_manifest

ARRAYS = "[0-9]*.npy"
"""The files of a store, without the hidden temporary files of killed processes."""


def _number(name: str) -> int:
    return int(name.removesuffix(".npy"))


def _run(indices: NDArray[np.int64]) -> NDArray[np.int64] | slice:
    """The indices, as a slice if they follow one another."""
    first, last = int(indices[0]), int(indices[-1])
    follow = last - first == len(indices) - 1 and bool((np.diff(indices) == 1).all())
    return slice(first, last + 1) if follow else indices


class FeatureStore:
    """Features on disk: files `NNNNN.npy` (rows x D, float16 or float32) in a folder, each with its `NNNNN.keys.npy`.

    The files are memory maps: rows are read when they are asked for. Raises UserError, which names the command `made_by`,
    if the folder is missing, unfinished, empty or damaged; StaleArtifact if a file or an input of the features has changed.
    """

    def __init__(self, folder: Path, made_by: str) -> None:
        if not manifest_path(folder).is_file():
            state = "unfinished" if folder.is_dir() else "missing"
            raise UserError(f"the features {folder} are {state}: run {made_by}")
        check_chain(folder)
        self.folder, self._made_by = folder, made_by
        names = (name for name in read_manifest(folder)["outputs"] if re.fullmatch(r"\d+\.npy", name))
        maps = {path: rows for name in sorted(names, key=_number) if len(rows := self._opened(path := folder / name))}
        if not maps:
            raise UserError(f"the features {folder} have no rows: remove the folder and run {made_by}")
        self.paths, self._shards = list(maps), list(maps.values())
        self._starts = np.cumsum([0, *map(len, self._shards)])
        self._dtype = np.result_type(*(rows.dtype for rows in self._shards))
        for path, rows in maps.items():
            if rows.shape[1] != self.width:
                raise self._damaged(path, f"{rows.shape[1]} features per row, where others have {self.width}")
            self._keys_of(path, len(rows))

    def _opened(self, path: Path) -> NDArray[Any]:
        rows = self._loaded(path)
        if rows.ndim != 2 or rows.dtype not in (np.float16, np.float32):
            raise self._damaged(path, f"{rows.dtype} of shape {rows.shape}, not rows of float16 or float32")
        return rows

    def _keys_of(self, path: Path, n_rows: int) -> NDArray[Any]:
        keys = self._loaded(shard_keys(path))
        if keys.shape != (n_rows,) or keys.dtype.kind not in "iuU":
            raise self._damaged(shard_keys(path), f"{keys.dtype} of shape {keys.shape}, not a key for each of {n_rows} rows")
        return keys

    def _loaded(self, path: Path) -> NDArray[Any]:
        try:
            found = np.load(path, mmap_mode="r")
            if not isinstance(found, np.ndarray):
                raise ValueError("not an array")
            return found
        except Exception as error:  # numpy parses the header, and a foreign one can make it raise anything
            raise self._damaged(path, first_line(error)) from error

    def _damaged(self, path: Path, reason: str) -> UserError:
        return UserError(f"cannot read {path}: {reason}; make the features again: run {self._made_by} --overwrite")

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def width(self) -> int:
        """D, the number of features per row."""
        return int(self._shards[0].shape[1])

    @cached_property
    def keys(self) -> NDArray[Any]:
        """Key of every row: the sample's key (SAE images) or the index in the data set's own split (probe data sets)."""
        return np.concatenate([self._keys_of(path, len(rows)) for path, rows in zip(self.paths, self._shards, strict=True)])

    def gather(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Rows in the order asked for, n x D float32. Every shard is visited at most once, in order; consecutive rows are read
        in one go.

        Raises IndexError if there is no such row.
        """
        return self.gather_stored(indices).float()

    def gather_stored(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """`gather` in the type in which the rows are stored; in float32 if that of some is float16 and of others float32."""
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"rows {indices.min()} to {indices.max()} of {len(self)} in {self.folder}")
        out = np.empty((len(indices), self.width), dtype=self._dtype)
        order = np.argsort(indices, kind="stable")
        edges = np.searchsorted(indices[order], self._starts)
        for shard, start, first, last in zip(self._shards, self._starts, edges, edges[1:], strict=False):
            rows = order[first:last]
            if len(rows):
                out[_run(rows)] = shard[_run(indices[rows] - start)]
        return torch.from_numpy(out)

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """All rows in order, as float32 batches that never cross a shard."""
        for shard in range(len(self.paths)):
            yield from self.shard_batches(shard, batch_size)

    def shard_batches(self, shard: int, batch_size: int) -> Iterator[torch.Tensor]:
        """The rows of one shard in order, as float32 batches."""
        rows = self._shards[shard]
        for start in range(0, len(rows), batch_size):
            yield torch.from_numpy(rows[start : start + batch_size].astype(np.float32))

    def describe(self, index: int) -> str:
        """The place of a row, for messages."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"row {index - int(self._starts[shard])} of {self.paths[shard]}"
