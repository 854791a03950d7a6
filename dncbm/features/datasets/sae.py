"""The images an SAE is trained on: webdataset shards (CC3M in the paper) or any folder of images."""

import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dncbm.features import datasets
from dncbm.features.datasets import IMAGE_SUFFIXES, ImageShards, KeyedImage, SlicedShards, open_image
from dncbm.runs.declarations import SPLITS
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import text_hash
from dncbm.runs.settings import Settings
from sparse_autoencoder import DEFAULT_SEED

FOLDER_SEED = DEFAULT_SEED
"""Seed of the permutation that divides a folder of images. It does not follow --seed: all runs see the same images."""
HELD_OUT = 0.05
"""Share of a folder's images in train_val, and again in val."""


@dataclass(frozen=True)
class WebdatasetShards:
    """The tars of one split, as img2dataset or webdataset write them."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, shard: int) -> str:
        return str(self.paths[shard])

    def count(self, shard: int) -> int | None:
        """The number that img2dataset saved beside the tar in `<shard>_stats.json`; None without that file."""
        path = self.paths[shard]
        try:
            return int(json.loads(path.with_name(path.stem + "_stats.json").read_text())["successes"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def fingerprint(self) -> str:
        """From the tars' names and sizes: hashing three million images would take as long as the stage."""
        return text_hash(self.state(shard, ()) for shard in range(len(self)))

    def state(self, shard: int, bad_keys: Sequence[Any]) -> str:
        """Name and size; with bad images also the time, since a tar that was fetched again can have the same size."""
        path = self.paths[shard]
        stat = path.stat()
        return f"{path.name} {stat.st_size}" + (f" {stat.st_mtime_ns}" if bad_keys else "")

    def read(self, shard: int, on_bad: Callable[[str], None]) -> Iterator[KeyedImage]:
        """The first image of each key, in the order of the tar.

        The number of images lost to damage is known from img2dataset's count; without a count, damage is one bad image.
        """
        images: dict[str, str] = {}
        others: dict[str, None] = {}
        damage: list[str] = []
        for key, suffix, encoded in _members(self.paths[shard], damage.append):
            if encoded is None:
                others[key] = None
            elif key not in images:
                images[key] = suffix
                yield key, partial(open_image, encoded)
            elif images[key] == suffix:
                on_bad("duplicate key")

        without = [key for key in others if key not in images]
        if damage and without and without[-1] == next(reversed(others)):
            without.pop()  # its image came after the damage
        expected = self.count(shard)
        lost = len(without) + len(damage) if expected is None else max(0, expected - len(images))
        for number in range(lost):
            on_bad("no image in the sample" if number < len(without) else (*damage, "missing from the shard")[0])


def _members(path: Path, on_damage: Callable[[str], None]) -> Iterator[tuple[str, str, bytes | None]]:
    """Key, suffix and, for images, content of the files in a tar, named as webdataset names them.

    Stops at the first damage, after calling `on_damage` once. (webdataset's own reader ignores a missing end and stops at
    a duplicate key.)
    """
    from webdataset.tariterators import base_plus_ext

    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            size = os.fstat(file.fileno()).st_size
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep every member in memory
                if member.size < 0 or tar.offset <= member.offset or member.offset_data + member.size > size:
                    raise tarfile.ReadError("a member does not fit into the file")
                key, suffix = base_plus_ext(member.name)
                if member.isreg() and key and suffix:
                    encoded = None
                    if suffix.lower() in IMAGE_SUFFIXES:
                        file.seek(member.offset_data)
                        encoded = file.read(member.size)
                    yield key, suffix.lower(), encoded
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # the block of zeros that ends every tar
                raise tarfile.ReadError("the end is missing")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; run the same command once it can be read") from error
    except Exception:  # a damaged header can make tarfile raise anything
        on_damage("cut off or damaged tar")


@dataclass(frozen=True)
class FolderShards(SlicedShards):
    """Image files under a folder. Keys are their paths relative to the folder."""

    root: Path
    items: NDArray[np.bytes_]
    """Relative paths as the system encodes them, in an array: millions of strings would fill the memory."""

    def name(self, shard: int) -> str:
        return f"{super().name(shard)} of {self.root}"

    def fingerprint(self) -> str:
        """From the files' names."""
        return text_hash(map(os.fsdecode, self.items))

    def state(self, shard: int, bad_keys: Sequence[Any]) -> str:
        bad = datasets.file_states([self.root / key for key in bad_keys])
        return text_hash([*map(os.fsdecode, self.slice(shard)), *bad])

    def read(self, shard: int, on_bad: Callable[[str], None]) -> Iterator[KeyedImage]:
        for key in map(os.fsdecode, self.slice(shard)):
            yield key, partial(open_image, self.root / key)


def sae_images(settings: Settings, dataset: str) -> Mapping[str, ImageShards]:
    """The images of every split of an SAE data set.

    Raises UserError if config has no such data set, shards are missing, or a folder has no images or cannot be divided.
    """
    source = settings.sae_dataset(dataset)
    name = f"sae_datasets[{dataset!r}]"
    if isinstance(source, Path):
        return _folder_splits(source, f"{name} in {settings.path} names it")
    return {split: _shards_of(source[split], f"{name}[{split!r}] in {settings.path} is {source[split]!r}") for split in SPLITS}


def _shards_of(pattern: str, where: str) -> WebdatasetShards:
    from braceexpand import braceexpand

    paths = tuple(map(Path, braceexpand(pattern)))
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(
            f"{len(missing)} of {len(paths)} shards are missing, first {missing[0]}: {where}; list the shards you have"
        )
    return WebdatasetShards(paths)


def _folder_splits(root: Path, where: str) -> dict[str, ImageShards]:
    """The splits of a folder of images.

    They are its folders train, train_val and val, if it has any; without train_val, that is drawn from train. Otherwise
    train_val and val are drawn from all images.
    """
    if not root.is_dir():
        raise UserError(f"the folder {root} is missing: {where}; put the images there")
    folders = {split: root / split for split in SPLITS if (root / split).is_dir()}
    if folders and not {"train", "val"} <= set(folders):
        raise UserError(
            f"{root} has the folder {' and '.join(folders)} but not both train and val: make both, or none for a random "
            f"division; {where}"
        )
    splits = {split: FolderShards(folder, _image_names(folder)) for split, folder in folders.items()}
    if "train_val" not in splits:
        shares = {"train_val": HELD_OUT} if folders else {"val": HELD_OUT, "train_val": HELD_OUT}
        whole = splits["train"] if folders else FolderShards(root, _image_names(root))
        drawn = datasets.random_split(len(whole.items), FOLDER_SEED, shares)
        splits |= {split: FolderShards(whole.root, whole.items[drawn[split]]) for split in drawn}
    if empty := [split for split in SPLITS if len(splits[split]) == 0]:
        raise UserError(
            f"no images for {empty[0]} in {root}: {where}; .{', .'.join(IMAGE_SUFFIXES)} files are read, and "
            f"{round(1 / HELD_OUT)} are needed to hold some out"
        )
    return {split: splits[split] for split in SPLITS}


def _image_names(root: Path) -> NDArray[np.bytes_]:
    """Sorted relative paths of the images under a folder, without hidden files and folders."""
    top = os.fsencode(root)
    suffixes = tuple(suffix.encode() for suffix in IMAGE_SUFFIXES)
    names = []
    for folder, subfolders, files in os.walk(top, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(b".")]
        for name in files:
            if not name.startswith(b".") and name.rpartition(b".")[2].lower() in suffixes:
                names.append(os.path.relpath(os.path.join(folder, name), top))
    return np.sort(np.array(names, dtype=np.bytes_))
