"""The images an SAE is trained on: webdataset shards (CC3M is the paper's), or any folder of images."""

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

from dncbm.features.datasets import (
    IMAGE_SUFFIXES,
    SHARD_SIZE,
    ImageShards,
    KeyedImage,
    file_states,
    open_image,
    random_split,
)
from dncbm.runs.declarations import SPLITS
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import text_hash
from dncbm.runs.settings import Settings

FOLDER_SEED = 49
"""Of the permutation that divides a folder of images; it does not follow --seed, or runs would see other images."""
HELD_OUT = 0.05
"""Share of a folder's images that becomes train_val, and as much val."""


@dataclass(frozen=True)
class WebdatasetShards:
    """The tars of one split, as img2dataset or webdataset write them."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, shard: int) -> str:
        return str(self.paths[shard])

    def count(self, shard: int) -> int | None:
        """What img2dataset counted, from the `<shard>_stats.json` it leaves beside a tar; None without that file."""
        path = self.paths[shard]
        try:
            return int(json.loads(path.with_name(path.stem + "_stats.json").read_text())["successes"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def fingerprint(self) -> str:
        """From the tars' names and sizes: reading three million images to hash them would cost as much as the stage."""
        return text_hash(self.state(shard, ()) for shard in range(len(self)))

    def state(self, shard: int, bad_keys: Sequence[Any]) -> str:
        """Name and size; where something was bad, the time too, for a tar of the same size that was fetched again."""
        path = self.paths[shard]
        stat = path.stat()
        return f"{path.name} {stat.st_size}" + (f" {stat.st_mtime_ns}" if bad_keys else "")

    def read(self, shard: int, on_bad: Callable[[str], None]) -> Iterator[KeyedImage]:
        """The first image of each key, in the order of the tar.

        What is lost to damage is counted from img2dataset's number of images; without it, damage counts as one image.
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
            without.pop()  # its image was behind the cut
        expected = self.count(shard)
        lost = len(without) + len(damage) if expected is None else max(0, expected - len(images))
        for number in range(lost):
            on_bad("no image in the sample" if number < len(without) else (*damage, "missing from the shard")[0])


def _members(path: Path, on_damage: Callable[[str], None]) -> Iterator[tuple[str, str, bytes | None]]:
    """Key, suffix and, for images, content of the files in a tar, named as webdataset names them.

    Ends at the first damage, after calling `on_damage` once. (webdataset's own reader passes over a cut-off end in
    silence, and stops at a duplicate.)
    """
    from webdataset.tariterators import base_plus_ext

    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            size = os.fstat(file.fileno()).st_size
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep every member
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
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # what ends every tar
                raise tarfile.ReadError("the end is missing")
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; the same command goes on when it can be read"
        ) from error
    except Exception:  # whatever a damaged header makes tarfile raise
        on_damage("cut off or damaged tar")


@dataclass(frozen=True)
class FolderShards:
    """Image files under a folder, cut into shards of SHARD_SIZE. Keys are their paths relative to the folder."""

    root: Path
    names: NDArray[np.bytes_]
    """Relative paths as the system encodes them: an array, because millions of strings would fill the memory."""

    def __len__(self) -> int:
        return -(-len(self.names) // SHARD_SIZE)

    def name(self, shard: int) -> str:
        return f"images {shard * SHARD_SIZE} to {shard * SHARD_SIZE + self.count(shard) - 1} of {self.root}"

    def count(self, shard: int) -> int:
        return len(self._keys(shard))

    def fingerprint(self) -> str:
        """From the files' names."""
        return text_hash(os.fsdecode(name) for name in self.names)

    def state(self, shard: int, bad_keys: Sequence[Any]) -> str:
        return text_hash([*self._keys(shard), *file_states([self.root / key for key in bad_keys])])

    def read(self, shard: int, on_bad: Callable[[str], None]) -> Iterator[KeyedImage]:
        for key in self._keys(shard):
            yield key, partial(open_image, self.root / key)

    def _keys(self, shard: int) -> list[str]:
        return [os.fsdecode(name) for name in self.names[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]]


def sae_images(settings: Settings, dataset: str) -> Mapping[str, ImageShards]:
    """The images of every split of an SAE dataset.

    Raises:
        UserError: config has no such dataset, shards that its patterns name are not there, or its folder has no images.
    """
    source = settings.sae_dataset(dataset)
    name = f"sae_datasets[{dataset!r}]"
    if isinstance(source, Path):
        return _folder_splits(source, f"{name} in {settings.path} names it")
    return {
        split: _shards_of(source[split], f"{name}[{split!r}] in {settings.path} is {source[split]!r}")
        for split in SPLITS
    }


def _shards_of(pattern: str, where: str) -> WebdatasetShards:
    from braceexpand import braceexpand

    paths = tuple(Path(path) for path in braceexpand(pattern))
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} shards are not there, the first is {missing[0]}: "
            f"{where}; set it to the shards you have"
        )
    return WebdatasetShards(paths)


def _folder_splits(root: Path, where: str) -> dict[str, ImageShards]:
    """The splits of a folder of images.

    Folders train, train_val and val in it are the splits; without train_val, it is drawn from train. Without any of them,
    train_val and val are drawn from all images.
    """
    if not root.is_dir():
        raise UserError(f"no folder {root}: {where}; put the images there")
    folders = {split: root / split for split in SPLITS if (root / split).is_dir()}
    if not folders:
        names = _image_names(root)
        drawn = random_split(len(names), FOLDER_SEED, {"val": HELD_OUT, "train_val": HELD_OUT})
        splits = {split: FolderShards(root, names[drawn[split]]) for split in SPLITS}
    elif "train" not in folders or "val" not in folders:
        raise UserError(
            f"{root} has the folder {' and '.join(folders)} but not train and val: make both, or have none of them, and "
            f"the images are divided for you; {where}"
        )
    else:
        splits = {split: FolderShards(folder, _image_names(folder)) for split, folder in folders.items()}
        if "train_val" not in folders:
            names = splits["train"].names
            drawn = random_split(len(names), FOLDER_SEED, {"train_val": HELD_OUT})
            splits |= {split: FolderShards(folders["train"], names[drawn[split]]) for split in drawn}
    empty = [split for split in SPLITS if len(splits[split]) == 0]
    if empty:
        raise UserError(
            f"no images for {empty[0]} in {root}: {where}; .{', .'.join(IMAGE_SUFFIXES)} files are read, and "
            f"{round(1 / HELD_OUT)} are needed to hold some out"
        )
    return {split: splits[split] for split in SPLITS}


def _image_names(root: Path) -> NDArray[np.bytes_]:
    """Images under a folder, hidden ones and those in hidden folders left out: sorted relative paths."""
    top = os.fsencode(root)
    names = []
    for folder, subfolders, files in os.walk(top, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(b".")]
        for name in files:
            if not name.startswith(b".") and name.rpartition(b".")[2].lower() in _ENCODED_SUFFIXES:
                names.append(os.path.relpath(os.path.join(folder, name), top))
    return np.sort(np.array(names, dtype=np.bytes_))


_ENCODED_SUFFIXES = tuple(suffix.encode() for suffix in IMAGE_SUFFIXES)
