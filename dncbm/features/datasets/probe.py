"""The data sets that the linear probe classifies: places365, cifar10, cifar100, waterbirds100 and any image folder."""

import csv
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dncbm.features.datasets import KeyedImage, SlicedShards, file_states, open_image
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import text_hash
from dncbm.runs.settings import Settings


@dataclass(frozen=True)
class ProbeImages:
    """One of a labelled data set's own splits."""

    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    image: Callable[[int], Image.Image]
    """Index -> PIL image; may raise on a corrupt file."""
    image_names: tuple[str, ...] | None
    """Path of each image, relative to `root`; None if the images are an array."""
    content_hash: str
    root: Path = Path()
    groups: NDArray[np.int64] | None = None
    """Group of each image, for a data set that has groups beside its classes."""
    group_names: tuple[str, ...] = ()

    def image_name(self, index: int) -> str:
        return self.image_names[index] if self.image_names else f"{index:06d}"


@dataclass(frozen=True)
class ProbeShards(SlicedShards):
    """Some images of a split. Keys are their indices."""

    images: ProbeImages
    items: NDArray[np.int64]
    """The indices."""

    def fingerprint(self) -> str:
        return text_hash([self.images.content_hash, hashlib.sha256(self.items.tobytes()).hexdigest()])

    def state(self, shard: int, bad_keys: Sequence[Any]) -> str:
        names = self.images.image_names
        if names is None:
            return text_hash([self.images.content_hash, str(self.slice(shard).tolist())])
        bad = file_states([self.images.root / names[index] for index in bad_keys])
        return text_hash([*(f"{index} {names[index]}" for index in self.slice(shard)), *bad])

    def read(self, shard: int, on_bad: Callable[[str], None]) -> Iterator[KeyedImage]:
        for index in self.slice(shard).tolist():
            yield index, partial(self.images.image, index)


@dataclass(frozen=True)
class Reader:
    """How a data set is stored."""

    read: Callable[[Path, Mapping[str, str], str], ProbeImages]
    """Folder, names of the data set's own splits, and which of them (`train`, `train_val` or `val`) -> its images."""
    splits: Mapping[str, str]
    """Default names of the own splits; `val` is the test split if that has labels."""
    known: tuple[str, ...] = ()
    """The names that own splits can have; empty: any."""


def probe_images(settings: Settings, dataset: str, own_split: str) -> ProbeImages:
    """Open one of a probe data set's own splits: `train`, `val` or, if it has one, `train_val`.

    Raises UserError if config has no such data set or reader, or the reader does not find its files in the folder.
    """
    source = settings.probe_dataset(dataset)
    where = f"probe_datasets[{dataset!r}] in {settings.path}"
    if source.reader not in READERS and source.reader != dataset:
        raise UserError(f"{where}: there is no reader {source.reader!r}, only {', '.join(READERS)}")
    reader = READERS.get(source.reader, READERS["folder"])
    if unknown := [name for name in source.splits.values() if reader.known and name not in reader.known]:
        known = ", ".join(reader.known)
        raise UserError(f"{where}: the reader {source.reader} has the splits {known}, not {unknown[0]!r}")
    try:
        images = reader.read(source.path, {**reader.splits, **source.splits}, own_split)
        if not len(images.labels):
            raise ValueError("it has no images")
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot read the {own_split} split of {dataset} in {source.path}: {reason}; {where} names the folder"
        ) from error
    return images


def _image_folder(root: Path, own_names: Mapping[str, str], split: str) -> ProbeImages:
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import find_classes

    folder = root / own_names[split]
    if split == "val" and not folder.is_dir() and folder.name == "val":
        folder = root / "test"
    found = ImageFolder(str(folder))
    class_names = tuple(find_classes(str(root / own_names["train"]))[0])  # other splits may lack some
    index_of = {name: index for index, name in enumerate(class_names)}
    if unknown := [name for name in found.classes if name not in index_of]:
        raise ValueError(f"{folder} has the class {unknown[0]!r}, which {root / own_names['train']} lacks")
    samples = [(path, index_of[found.classes[label]]) for path, label in found.samples]
    if len(class_names) == 1000 and all(name[0] == "n" and name[1:].isdigit() for name in class_names):
        from open_clip import IMAGENET_CLASSNAMES

        class_names = tuple(IMAGENET_CLASSNAMES)  # in the order of the sorted WordNet ids, like the folders
    return _from_files(samples, class_names, root)


def _places365(root: Path, own_names: Mapping[str, str], split: str) -> ProbeImages:
    from torchvision.datasets import Places365

    found = Places365(str(root), split=own_names[split], small=not any(root.glob("data_large_*")))
    return _from_files(found.imgs, tuple(sorted(found.class_to_idx, key=found.class_to_idx.__getitem__)), root)


def _cifar(name: str, root: Path, own_names: Mapping[str, str], split: str) -> ProbeImages:
    import torchvision.datasets

    found = getattr(torchvision.datasets, name)(str(root), train=own_names[split] == "train")
    labels = np.asarray(found.targets, dtype=np.int64)
    content = hashlib.sha256(found.data.tobytes()).hexdigest()
    return ProbeImages(labels, tuple(found.classes), partial(_image, found.data), None, content)


def _waterbirds(root: Path, own_names: Mapping[str, str], split: str) -> ProbeImages:
    with (root / "metadata.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == own_names[split]]
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
    content = text_hash((*class_names, *(f"{name} {label}" for name, label in zip(names, labels, strict=True))))
    return ProbeImages(labels, class_names, partial(_image, paths), names, content, root)


def _image(images: list[str] | NDArray[np.uint8], index: int) -> Image.Image:
    """One of many paths or pixel arrays as an image. (Not a lambda, because worker processes may get it pickled.)"""
    image = images[index]
    return open_image(image) if isinstance(image, str) else Image.fromarray(image)


READERS = {
    "folder": Reader(_image_folder, {"train": "train", "val": "val"}),
    "places365": Reader(_places365, {"train": "train-standard", "val": "val"}, ("train-standard", "train-challenge", "val")),
    "cifar10": Reader(partial(_cifar, "CIFAR10"), {"train": "train", "val": "test"}, ("train", "test")),
    "cifar100": Reader(partial(_cifar, "CIFAR100"), {"train": "train", "val": "test"}, ("train", "test")),
    # metadata.csv numbers its splits; by default 1, the validation split, is unused, since train_val is held out of train
    "waterbirds100": Reader(_waterbirds, {"train": "0", "val": "2"}, ("0", "1", "2")),
}


def display_name(class_name: Any) -> str:
    """A class name for people: `/b/bedroom` -> `bedroom`, `animals_and_nature` -> `animals and nature`."""
    parts = [part for part in str(class_name).split("/") if part]
    if len(parts) > 1 and len(parts[0]) == 1:  # places365 files its classes under their first letter
        parts = parts[1:]
    return " ".join(reversed([part.replace("_", " ") for part in parts]))
