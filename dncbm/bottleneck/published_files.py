"""The authors' file formats: what a file of theirs holds, checked, and the same in our formats.

Their tensors are memory-mapped where the file allows, so that features and dense strengths are never in memory as a whole.
"""

import pickle
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from dncbm.concepts.strengths import to_csr, write_part
from dncbm.features.datasets import SHARD_SIZE, counted
from dncbm.features.datasets.probe import ProbeImages
from dncbm.runs.artifacts import published_name, shard_files, strengths_part
from dncbm.runs.declarations import SPLITS
from dncbm.runs.errors import UserError, first_line
from sparse_autoencoder.files import whole_file

BATCH = 1024
"""Rows of a dense tensor that are read at a time."""


def read_torch(path: Path) -> Any:
    """What a file of the authors holds, on the CPU and memory-mapped where its format allows. Nothing in it is run.

    Raises UserError if it is damaged or holds more than tensors, numbers and texts.
    """
    load = partial(torch.load, path, map_location="cpu", weights_only=True)
    try:
        with warnings.catch_warnings():  # torch warns of what it then refuses
            warnings.simplefilter("ignore")
            with path.open("rb") as file:
                is_zip = file.read(2) == b"PK"  # else of a version of torch from before 2020
            return load(mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path.name} is damaged, or holds more than tensors; nothing in it was run: remove it") from error
    except MemoryError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path.name}: {error.strerror or first_line(error)}") from error
    except Exception as error:  # torch raises anything for a damaged file
        raise UserError(f"{path.name} is damaged, or no file of PyTorch: get it again, or remove it") from error


def read_matrix(path: Path) -> torch.Tensor:
    """Rows of numbers, N x D; an axis of components between them (N x 1 x D) is removed. Raises UserError otherwise."""
    found = read_torch(path)
    if not isinstance(found, torch.Tensor) or not found.is_floating_point() or found.layout != torch.strided:
        raise UserError(f"{path.name} does not hold one dense tensor of floating-point numbers")
    found = found.detach()
    if found.ndim == 3 and found.shape[1] == 1:
        found = found[:, 0]
    if found.ndim != 2 or 0 in found.shape:
        raise UserError(f"{path.name} has the shape {list(found.shape)}, where rows of numbers were expected")
    return found


def read_integers(path: Path) -> NDArray[np.int64]:
    """Labels or indices. Raises UserError if it holds anything else."""
    found = read_torch(path)
    if not isinstance(found, torch.Tensor) or found.ndim != 1 or found.is_floating_point() or found.is_complex():
        raise UserError(f"{path.name} does not hold one row of whole numbers")
    numbers: NDArray[np.int64] = found.to(torch.int64).numpy()
    if not len(numbers) or numbers.min() < 0:
        raise UserError(f"{path.name} holds no numbers, or negative ones")
    return numbers


def read_probe(path: Path) -> tuple[torch.Tensor, float | None]:
    """The weights of a probe, C x inputs float32, and the top-1 on val that its file records.

    Raises UserError if it is no checkpoint of the authors' `train_linear_probe.py`.
    """
    found = read_torch(path)
    state = found.get("model") if isinstance(found, dict) else None
    weight = state.get("weight") if isinstance(state, dict) and set(state) == {"weight"} else None
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise UserError(f"{path.name} is no probe of the authors: its `model` must hold `weight`, classes x inputs, alone")
    if not bool(torch.isfinite(weight).all()):
        raise UserError(f"{path.name} holds NaN or infinity")
    accuracy = found.get("test_acc_top1")  # their test split is our val
    known = isinstance(accuracy, float) or (isinstance(accuracy, torch.Tensor) and accuracy.numel() == 1)
    return weight.detach().float(), float(accuracy) if known else None


def check_rows(found: torch.Tensor, least: float = -np.inf) -> None:
    """Raises UserError if rows hold NaN, infinity, also as float32, or a number below `least`."""
    for start in range(0, len(found), BATCH):
        rows = found[start : start + BATCH].float()
        low, high = torch.aminmax(rows)  # NaN if there is one
        if not (-np.inf < low and high < np.inf):
            bad = start + int((~torch.isfinite(rows)).any(dim=1).nonzero()[0])
            raise UserError(f"it holds NaN or infinity, first in row {bad}")
        if low < least:
            raise UserError(f"it holds the negative strength {float(low):g}")


def own_labels(
    images: Mapping[str, ProbeImages], indices: Mapping[str, NDArray[np.int64]], labels: Mapping[str, NDArray[np.int64]]
) -> dict[str, NDArray[np.int64]]:
    """Own split -> labels: those of the images if they exist, else those of the authors' files.

    Raises UserError if the files contradict the images, or, without images, if some are missing or of another length.
    """
    n_train = sum(map(len, indices.values()))
    put_images = "put the images where `probe_datasets` in config.py says, and the labels are read from them"
    if images:
        own, root = {split: found.labels for split, found in images.items()}, images["train"].root
        if n_train != len(own["train"]):
            found = counted(n_train, "image")
            raise UserError(f"the indices divide {found}, but {root} has {len(own['train'])} for train: it has other images")
        wanted = {split: own["train"][rows] for split, rows in indices.items()} | {"val": own["val"]}
        for split, given in labels.items():
            # The authors' save_probe_features.py writes the labels of train_val over those of train.
            written_over = split == "train" and np.array_equal(given, wanted["train_val"])
            if not np.array_equal(given, wanted[split]) and not written_over:
                name = published_name("labels", split)
                raise UserError(
                    f"{name} has other labels than {root}: it belongs to other images, or they are in another order"
                )
        return own
    if missing := [published_name("labels", split) for split in SPLITS if split not in labels]:
        raise UserError(f"there is no {' and no '.join(missing)} beside them: {put_images}")
    train = np.empty(n_train, dtype=np.int64)
    for split, rows in indices.items():
        if (n := len(labels[split])) != len(rows):
            is_other = split == "train" and n == len(indices["train_val"])
            why = " (the authors' save_probe_features.py writes those of train_val over them)" if is_other else ""
            name, where = published_name("labels", split), f"{counted(len(rows), 'image')} of {split}"
            raise UserError(f"{name} has {counted(n, 'label')} for {where}{why}: {put_images}")
        train[rows] = labels[split]
    return {"train": train, "val": labels["val"]}


def write_features(found: torch.Tensor, keys: NDArray[np.int64], folder: Path, title: str) -> list[Path]:
    """Write rows as shards of a FeatureStore, in float16 or float32."""
    dtype = found.dtype if found.dtype in (torch.float16, torch.float32) else torch.float32
    outputs = list[Path]()
    for number, rows in enumerate(_shards(len(found), title)):
        _, *paths = shard_files(folder, number)
        for path, array in zip(paths, (keys[rows], found[rows].to(dtype).numpy()), strict=True):
            with whole_file(path) as temporary:
                np.save(temporary, array)
        outputs += paths
    return outputs


def write_strengths(found: torch.Tensor, keys: NDArray[np.int64], folder: Path, title: str) -> list[Path]:
    """Write dense strengths as CSR parts, with a dense batch in memory."""
    outputs = list[Path]()
    for number, rows in enumerate(_shards(len(found), title)):
        batches = [to_csr(batch.float()) for batch in found[rows].split(BATCH)]
        part = strengths_part(folder, shard_files(folder, number)[-1])
        write_part(part, scipy.sparse.vstack(batches, format="csr"), keys[rows])
        outputs.append(part)
    return outputs


def _shards(n_rows: int, title: str) -> Iterator[slice]:
    with tqdm(desc=title, total=n_rows, unit="image") as bar:
        for start in range(0, n_rows, SHARD_SIZE):
            yield (rows := slice(start, min(start + SHARD_SIZE, n_rows)))
            bar.update(rows.stop - rows.start)
