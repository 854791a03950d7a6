"""The datasets that the linear probe classifies: places365, cifar10, cifar100, waterbirds100 and any image folder."""

import csv
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dncbm.datasets import SHARD_SIZE, KeyedImage, file_states, open_image, random_split
from dncbm.errors import UserError
from dncbm.manifests import text_hash
from dncbm.settings import Settings

DATASET_SPLITS = ("train", "val")
"""The splits a dataset comes with: `val` is its validation split, or the test split where that is the labelled one."""


@dataclass(frozen=True)
class ProbeImages:
    """One split of a labelled dataset, as the dataset itself divides it."""

    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    image: Callable[[int], Image.Image]
    """Index -> PIL image; may raise on a corrupt file."""
    image_names: tuple[str, ...] | None
    """A path for each image, relative to the dataset; None where the dataset is an array."""
    content_hash: str
    root: Path = Path()
    """What `image_names` are relative to."""
    groups: NDArray[np.int64] | None = None
    """Group of each image, for a dataset that has groups beside its classes."""
    group_names: tuple[str, ...] = ()

    def image_name(self, index: int) -> str:
        return self.image_names[index] if self.image_names else f"{index:06d}"


@dataclass(frozen=True)
class ProbeShards:
    """Some images of a split, cut into shards of SHARD_SIZE. Keys are the indices."""

    images: ProbeImages
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return -(-len(self.indices) // SHARD_SIZE)

    def name(self, shard: int) -> str:
        return f"images {shard * SHARD_SIZE} to {shard * SHARD_SIZE + self.count(shard) - 1}"

    def count(self, shard: int) -> int:
        return len(self._members(shard))

    def fingerprint(self) -> str:
        return text_hash([self.images.content_hash, hashlib.sha256(self.indices.tobytes()).hexdigest()])

    def state(self, shard: int, bad_keys: Sequence[Any]) -> str:
        names = self.images.image_names
        if names is None:
            return text_hash([self.images.content_hash, str(self._members(shard).tolist())])
        bad = file_states([self.images.root / names[index] for index in bad_keys])
        return text_hash([*(f"{index} {names[index]}" for index in self._members(shard)), *bad])

    def read(self, shard: int, on_bad: Callable[[str], None]) -> Iterator[KeyedImage]:
        for index in self._members(shard):
            yield int(index), lambda index=int(index): self.images.image(index)  # type: ignore[misc]

    def _members(self, shard: int) -> NDArray[np.int64]:
        return self.indices[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]


def probe_images(settings: Settings, dataset: str, dataset_split: str) -> ProbeImages:
    """Open the `train` or `val` split of a probe dataset.

    Raises:
        UserError: config has no such dataset, or its folder does not hold what it should.
    """
    root = settings.probe_dataset(dataset)
    readers = {"places365": _places365, "cifar10": _cifar, "cifar100": _cifar, "waterbirds100": _waterbirds}
    try:
        return readers.get(dataset, _image_folder)(root, dataset, dataset_split)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot read the {dataset_split} split of {dataset} in {root}: {reason}; "
            f"probe_datasets[{dataset!r}] in {settings.path} names the folder"
        ) from error


def _image_folder(root: Path, dataset: str, split: str) -> ProbeImages:
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import find_classes

    folder = root / split if (root / split).is_dir() or split == "train" else root / "test"
    found = ImageFolder(str(folder))
    class_names = tuple(find_classes(str(root / "train"))[0])  # val may lack some
    index_of = {name: index for index, name in enumerate(class_names)}
    unknown = [name for name in found.classes if name not in index_of]
    if unknown:
        raise ValueError(f"{folder} has the class {unknown[0]!r}, which {root / 'train'} has not")
    samples = [(path, index_of[found.classes[label]]) for path, label in found.samples]
    if len(class_names) == 1000 and all(name[0] == "n" and name[1:].isdigit() for name in class_names):
        from open_clip import IMAGENET_CLASSNAMES

        class_names = tuple(IMAGENET_CLASSNAMES)  # in the order of the sorted WordNet ids, as the folders are
    return _from_files(samples, class_names, root)


def _places365(root: Path, dataset: str, split: str) -> ProbeImages:
    from torchvision.datasets import Places365

    small = not (root / "data_large_standard").is_dir()
    found = Places365(str(root), split="train-standard" if split == "train" else "val", small=small)
    class_names = tuple(sorted(found.class_to_idx, key=found.class_to_idx.__getitem__))
    return _from_files(found.imgs, class_names, root)


def _cifar(root: Path, dataset: str, split: str) -> ProbeImages:
    from torchvision.datasets import CIFAR10, CIFAR100

    found = (CIFAR10 if dataset == "cifar10" else CIFAR100)(str(root), train=split == "train")
    return ProbeImages(
        labels=np.asarray(found.targets, dtype=np.int64),
        class_names=tuple(found.classes),
        image=partial(_image_of_array, found.data),
        image_names=None,
        content_hash=hashlib.sha256(found.data.tobytes()).hexdigest(),
    )


def _waterbirds(root: Path, dataset: str, split: str) -> ProbeImages:
    wanted = {"train": "0", "val": "2"}[split]  # 2 is the test split
    with (root / "metadata.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == wanted]
    samples = [(str(root / row["img_filename"]), int(row["y"])) for row in rows]
    groups = np.asarray([2 * int(row["y"]) + int(row["place"]) for row in rows], dtype=np.int64)
    found = _from_files(samples, ("landbird", "waterbird"), root)
    return replace(
        found,
        groups=groups,
        group_names=("landbird on land", "landbird on water", "waterbird on land", "waterbird on water"),
        content_hash=text_hash([found.content_hash, *map(str, groups)]),
    )


def _from_files(samples: list[tuple[str, int]], class_names: tuple[str, ...], root: Path) -> ProbeImages:
    paths = [path for path, _ in samples]
    labels = np.asarray([label for _, label in samples], dtype=np.int64)
    names = tuple(Path(path).relative_to(root).as_posix() for path in paths)
    return ProbeImages(
        labels=labels,
        class_names=class_names,
        image=partial(_image_of_file, paths),
        image_names=names,
        content_hash=text_hash((*class_names, *(f"{name} {label}" for name, label in zip(names, labels, strict=True)))),
        root=root,
    )


# Functions and not lambdas, because worker processes may be started by pickling what they need.


def _image_of_array(data: NDArray[np.uint8], index: int) -> Image.Image:
    return Image.fromarray(data[index])


def _image_of_file(paths: list[str], index: int) -> Image.Image:
    return open_image(paths[index])


def split_train(n: int, seed: int, held_out: float = 0.1) -> dict[str, NDArray[np.int64]]:
    """Divide the indices 0..n-1 of a train split by a seeded random permutation (DN-CBM's code: 90 % and 10 %).

    Returns:
        `train` and `train_val`, each sorted, so that features are read from disk in the dataset's order.
    """
    return random_split(n, seed, {"train_val": held_out})


def display_name(class_name: Any) -> str:
    """A class name as people write it: `/b/bedroom` -> `bedroom`, `animals_and_nature` -> `animals and nature`."""
    parts = [part for part in str(class_name).split("/") if part]
    if len(parts) > 1 and len(parts[0]) == 1:  # places365 files its classes under their first letter
        parts = parts[1:]
    return " ".join(reversed([part.replace("_", " ") for part in parts]))
