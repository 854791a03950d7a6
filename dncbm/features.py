"""Image features: FeatureStore, the memory-mapped folder of .npy shards that holds them, and the stages that make them."""

import json
import os
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dncbm.artifacts import DEFAULT_SEED, Artifacts
from dncbm.datasets import ImageShards
from dncbm.datasets.cc3m import sae_images
from dncbm.datasets.probe import DATASET_SPLITS, ProbeImages, ProbeShards, probe_images, split_train
from dncbm.devices import resolve_device
from dncbm.encoders import Encoder, describe_encoder, load_encoder
from dncbm.errors import UserError
from dncbm.extraction import Extraction, are_from, extract
from dncbm.manifests import Outcome, Recipe, begin, finish, read_manifest, whole_file, write_json
from dncbm.ranks import Ranks, device_name, joined
from dncbm.settings import SPLITS, Settings

ARRAYS = "[0-9]*.npy"
"""The files of a store; hidden ones are what a killed process was writing."""

# ---------------------------------------------------------------------------------------------------------------- store


class FeatureStore:
    """Features on disk: a folder of `NNNNN.npy` (rows x D, float16 or float32) with `NNNNN.keys.npy` beside each.

    Nothing is read until rows are asked for; shards are memory maps.
    """

    def __init__(self, folder: Path, made_by: str) -> None:
        """Open a finished store.

        Args:
            folder: the folder.
            made_by: the command that makes it, for the error.

        Raises:
            UserError: it is not there or not finished.
        """
        if not (folder / "manifest.json").is_file():
            state = "are not finished" if folder.is_dir() else "are not there"
            raise UserError(f"the features {folder} {state}: make them with `{made_by}`")
        self.folder = folder
        paths = sorted(path for path in folder.glob(ARRAYS) if not path.name.endswith(".keys.npy"))
        maps = [np.load(path, mmap_mode="r") for path in paths]
        self.paths = [path for path, shard in zip(paths, maps, strict=True) if len(shard)]
        self._shards = [shard for shard in maps if len(shard)]
        if not self.paths:
            raise UserError(f"the features {folder} hold no row: remove the folder and run `{made_by}`")
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def width(self) -> int:
        """D, the number of features of an item."""
        return int(self._shards[0].shape[1])

    @cached_property
    def keys(self) -> NDArray[Any]:
        """Key of every row: the sample's key (webdataset) or the index in the dataset's own split (probe datasets)."""
        return np.concatenate([np.load(path.with_suffix(".keys.npy")) for path in self.paths])

    def gather(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Rows in the order asked for, n x D float32. Shards are visited once each, in order.

        Raises:
            IndexError: there is no such row.
        """
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"rows {indices.min()} to {indices.max()} of {len(self)} in {self.folder}")
        out = np.empty((len(indices), self.width), dtype=np.float32)
        order = np.argsort(indices, kind="stable")
        edges = np.searchsorted(indices[order], self._starts)
        for shard, start, first, last in zip(self._shards, self._starts, edges, edges[1:], strict=False):
            rows = order[first:last]
            if len(rows):
                out[rows] = shard[indices[rows] - start]
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
        """Where a row lies, for messages."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"row {index - int(self._starts[shard])} of {self.paths[shard]}"


# --------------------------------------------------------------------------------------------------------------- stages


def save_sae_features(settings: Settings, dataset: str, encoder: str, hook: str, extraction: Extraction) -> Outcome:
    """Stage 1: features of the images that the SAE is trained on, every split (METHOD section 1).

    Raises:
        UserError: no such dataset, shards or encoder; too many bad images; NaN features.
        StaleArtifact: there are features from other images or another encoder.
    """
    with joined() as ranks:
        sources = ranks.first_makes(partial(sae_images, settings, dataset))
        return _save_features(settings, "sae_features", dataset, encoder, hook, sources, extraction, ranks)


def save_probe_features(
    settings: Settings, dataset: str, encoder: str, hook: str, splits: tuple[str, ...], extraction: Extraction
) -> Outcome:
    """Stage 5: labels, split and features of a probe dataset.

    Raises:
        UserError: no such dataset or encoder; too many bad images; NaN features.
        StaleArtifact: there are labels or features from other images or another encoder.
    """
    with joined() as ranks:
        images, indices = ranks.first_makes(partial(_probe_split, settings, dataset, extraction.overwrite))
        sources: dict[str, ImageShards] = {
            split: ProbeShards(images["val" if split == "val" else "train"], indices[split]) for split in splits
        }
        return _save_features(settings, "probe_features", dataset, encoder, hook, sources, extraction, ranks)


def _probe_split(
    settings: Settings, dataset: str, overwrite: bool
) -> tuple[dict[str, ProbeImages], dict[str, NDArray[np.int64]]]:
    """The images of a probe dataset, and the indices of each of our splits; written down with the labels."""
    images = {split: probe_images(settings, dataset, split) for split in DATASET_SPLITS}
    artifacts = Artifacts(settings)
    indices = split_train(len(images["train"].labels), DEFAULT_SEED) | {"val": np.arange(len(images["val"].labels))}

    # The split does not follow --seed: runs of several seeds are compared on the same images.
    split_file = artifacts.probe_split(dataset)
    recipe = Recipe(
        "probe_split",
        {"seed": DEFAULT_SEED},
        {f"{split} images of {dataset}": images[split].content_hash for split in DATASET_SPLITS},
    )
    if begin(split_file, recipe, overwrite=overwrite) is Outcome.RAN:
        arrays = {artifacts.labels(dataset, split): images[split].labels for split in DATASET_SPLITS}
        arrays |= {artifacts.split_indices(dataset, split): indices[split] for split in ("train", "train_val")}
        for split, found in images.items():
            if found.groups is not None:
                arrays[artifacts.groups(dataset, split)] = found.groups
        for path, array in arrays.items():
            with whole_file(path) as temporary:
                np.save(temporary, array)
        about: dict[str, Any] = {"class_names": images["train"].class_names}
        if images["train"].group_names:
            about["group_names"] = images["train"].group_names
        write_json(split_file, about | {"sizes": {split: len(indices[split]) for split in SPLITS}})
        finish(split_file, recipe, [split_file, *arrays])
    return images, indices


def _save_features(
    settings: Settings,
    stage: str,
    dataset: str,
    encoder_name: str,
    hook: str,
    sources: Mapping[str, ImageShards],
    extraction: Extraction,
    ranks: Ranks,
) -> Outcome:
    description = ranks.first_makes(partial(describe_encoder, settings, encoder_name))
    outcome = Outcome.ALREADY_DONE
    encoder = None
    for split, shards in sources.items():
        folder = Artifacts(settings).features(dataset, encoder_name, hook, split)
        wanted = description | {"hook": hook, "precision": extraction.precision or "the device's"}
        recipe = Recipe(stage, wanted, {f"{split} images of {dataset}": shards.fingerprint()})
        begun = ranks.first_makes(
            partial(begin, folder, recipe, overwrite=extraction.overwrite, parts_hold=partial(are_from, shards, folder))
        )
        if begun is Outcome.ALREADY_DONE:
            continue
        outcome = Outcome.RAN
        if encoder is None:
            device = device_name(extraction.device, ranks)
            load = partial(_load, settings, encoder_name, device, extraction.precision)
            encoder = load() if ranks.rank == 0 else None  # downloads what is not there, or fails, for all
            ranks.wait()
            encoder = encoder or load()
        details = extract(shards, encoder, folder, extraction, f"{dataset} {split}", ranks)
        ranks.first_makes(partial(_finish, folder, recipe, details, f"{dataset} {split}"))
    return outcome


def _load(settings: Settings, name: str, device: str, precision: str | None) -> Encoder:
    return load_encoder(settings, name, resolve_device(device), precision)


def _finish(folder: Path, recipe: Recipe, details: dict[str, Any], title: str) -> None:
    finish(folder, recipe, folder.glob(ARRAYS), details)
    print(f"{details['images']} images of {title}: {folder}")


def open_features(settings: Settings, dataset: str, encoder: str, hook: str, split: str) -> FeatureStore:
    """The finished features of a split. Raises UserError, naming the command that makes them, if there are none."""
    if dataset in settings.sae_datasets:
        command = f"python scripts/01_save_cc3m_features.py --img_enc_name {encoder} --sae_dataset {dataset}"
    else:
        command = f"python scripts/05_save_probe_features.py --img_enc_name {encoder} --probe_dataset {dataset}"
    return FeatureStore(Artifacts(settings).features(dataset, encoder, hook, split), command)


def probe_labels(settings: Settings, dataset: str, split: str, keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels of the rows with these keys (indices in the dataset's own split), int64.

    Raises:
        UserError: the labels are not there.
    """
    path = Artifacts(settings).labels(dataset, "val" if split == "val" else "train")
    if not path.is_file():
        raise UserError(
            f"no labels {path}: make them with `python scripts/05_save_probe_features.py --probe_dataset {dataset}`"
        )
    labels: NDArray[np.int64] = np.load(path)[keys]
    return labels


def probe_class_names(settings: Settings, dataset: str) -> list[str]:
    """Class names of a probe dataset, in label order. Raises UserError if its split was not made."""
    path = Artifacts(settings).probe_split(dataset)
    read_manifest(path)
    names: list[str] = json.loads(path.read_text(encoding="utf-8"))["class_names"]
    return names


def default_workers() -> int:
    """Worker processes that leave the encoder cores: half of those this process may use and shares, at most 16."""
    return max(1, min(16, default_cores() // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def default_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
