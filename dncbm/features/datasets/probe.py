"""The data sets that the linear probe classifies: places365, cifar10, cifar100, waterbirds100 and any image folder."""

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dncbm.features.datasets import (
    Encoded,
    KeyedImage,
    SlicedShards,
    file_sizes,
    file_states,
    find_images,
    identity,
    is_folder,
    is_hidden,
    open_image,
    random_split,
    read_file,
    read_suffixes,
    to_rgb,
)
from dncbm.runs.errors import UserError, first_line
from dncbm.runs.manifests import text_hash
from dncbm.runs.settings import Settings
from sparse_autoencoder import DEFAULT_SEED

HELD_OUT = 0.1
"""Share of a folder's images in val, if it has no folder of its own; and then of the rest in train_val (METHOD section 1)."""
SPLIT_FOLDERS = ("train", "training", "train_val", "val", "valid", "validation", "test", "testing", "dev")
"""Names of folders that are splits and not classes."""
IMAGENET = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
"""SHA-256 of ImageNet's 1000 WordNet ids, sorted, one per line. A test compares it with the list that timm ships."""


@dataclass(frozen=True)
class ProbeImages:
    """One of a labelled data set's own splits."""

    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    source: Callable[[int], Encoded]
    """Index -> content of the image file, or pixels; may raise."""
    image_names: tuple[str, ...] | None
    """Path of each image, relative to `root`; None if the images are an array."""
    content_hash: str
    root: Path = Path()
    groups: NDArray[np.int64] | None = None
    """Group of each image, for a data set that has groups beside its classes."""
    group_names: tuple[str, ...] = ()
    sizes: NDArray[np.int64] | None = None
    """Bytes of each image's file, -1 if it is missing."""
    notes: tuple[str, ...] = ()
    """What the user should know about the images: what was passed over, what is missing."""

    def image(self, index: int, background: str = "none") -> Image.Image:
        """An image in RGB, `background` behind what is transparent (`to_rgb`). May raise anything on a corrupt file."""
        return to_rgb(open_image(self.source(index)), background)[0]

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
        sizes = self.images.sizes if self.images.sizes is not None else np.zeros(len(names))
        bad = file_states([self.images.root / names[index] for index in bad_keys])
        return text_hash([*(f"{index} {names[index]} {sizes[index]}" for index in self.slice(shard)), *bad])

    def read(self, shard: int, on_bad: Callable[[str], None]) -> Iterator[KeyedImage]:
        for index in self.slice(shard).tolist():
            yield index, partial(self.images.source, index)


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
    if source.reader not in READERS and source.names_reader:
        raise UserError(f"{where}: there is no reader {source.reader!r}, only {', '.join(READERS)}")
    reader = READERS.get(source.reader, READERS["folder"])
    if unknown := [name for name in source.splits.values() if reader.known and name not in reader.known]:
        known = ", ".join(reader.known)
        raise UserError(f"{where}: the reader {source.reader} has the splits {known}, not {unknown[0]!r}")
    try:
        images = reader.read(source.path, {**reader.splits, **source.splits}, own_split)
        if not len(images.labels):
            raise ValueError("it has no images")
    except (OSError, RuntimeError, LookupError, ValueError, csv.Error) as error:
        reason = first_line(error)
        raise UserError(
            f"cannot read the {own_split} split of {dataset} in {source.path}: {reason}; {where} names the folder"
        ) from error
    return images


def _image_folder(root: Path, own_names: Mapping[str, str], split: str) -> ProbeImages:
    folder, classes_in, share = _own_folder(root, own_names, split)
    class_names = _subfolders(classes_in)
    if unknown := [name for name in _subfolders(folder) if name not in class_names]:
        raise ValueError(f"{folder} has the class {unknown[0]!r}, which {classes_in} lacks")
    tops = (root, folder, *(root / name for name in (*own_names.values(), "test")))
    found = _class_folders(folder, class_names, {identity(top) for top in tops if top.is_dir()})
    if share:
        drawn = random_split(len(found.labels), DEFAULT_SEED, {"val": share})[split]
        found = _Samples([found.paths[i] for i in drawn], found.labels[drawn], found.sizes[drawn], found.others)
    if not len(found.labels):
        raise ValueError(f"no images in {folder}; {read_suffixes(found.others)}")
    notes = [f"{folder}: {read_suffixes(found.others)}"] if found.others else []
    n_images = np.bincount(found.labels, minlength=len(class_names))
    if empty := [name for name, n in zip(class_names, n_images, strict=True) if n == 0]:
        names = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        notes.append(f"{len(empty)} of {len(class_names)} classes without images in the {split} split of {root}: {names}")
    if hashlib.sha256("\n".join(class_names).encode(errors="surrogateescape")).hexdigest() == IMAGENET:
        from open_clip import IMAGENET_CLASSNAMES

        class_names = tuple(IMAGENET_CLASSNAMES)  # in the order of the sorted WordNet ids, like the folders
    images = _from_files(found.paths, found.labels, class_names, root, found.sizes)
    return replace(images, notes=tuple(notes))


def _own_folder(root: Path, own_names: Mapping[str, str], split: str) -> tuple[Path, Path, float]:
    """The folder that holds the images of a split, the folder that has a subfolder for each class, and val's share of both.

    The share is 0 if val has a folder of its own. Otherwise val is held out of the folder train, or of folders of classes.

    Raises ValueError if it is not clear which folders are the splits.
    """
    folders = {own: root / name for own, name in own_names.items()}
    train = folders["train"]
    if not folders["val"].is_dir() and folders["val"].name == "val":
        folders["val"] = root / "test"
    missing = [folder for folder in (train, folders["val"], folders[split]) if not folder.is_dir()]
    if not missing:
        return folders[split], train, 0.0
    if own_names != READERS["folder"].splits:
        raise ValueError(f"the folder {missing[0]} is missing")
    names = _subfolders(root)
    splits = [name for name in names if name.lower() in SPLIT_FOLDERS]
    if splits == ["train"]:
        return train, train, HELD_OUT
    if splits:
        raise ValueError(
            f"it has the folder {' and '.join(splits)} but not {'val' if train.is_dir() else 'train'}: name the folders of "
            "its splits under `splits`"
        )
    if not names:
        raise ValueError("it has neither train/<class>/<image> nor <class>/<image>")
    return root, root, HELD_OUT


def _subfolders(folder: Path) -> tuple[str, ...]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        return tuple(sorted(entry.name for entry in entries if is_folder(entry) and not is_hidden(entry.name)))


@dataclass(frozen=True)
class _Samples:
    """Labelled files, in the order of torchvision's ImageFolder."""

    paths: list[str]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    others: Counter[str]


def _class_folders(folder: Path, class_names: Sequence[str], apart: set[tuple[int, int]]) -> _Samples:
    """The images of folders named as classes. No folder is entered twice, so that no image has two labels."""
    others: Counter[str] = Counter()
    files: dict[str, list[tuple[str, str, int]]] = {}
    tops = {name: identity(folder / name) for name in class_names if (folder / name).is_dir()}
    entered, done = apart | set(tops.values()), set[tuple[int, int]]()
    for name in sorted(tops, key=lambda name: (folder / name).is_symlink()):
        if tops[name] in done:
            continue
        done.add(tops[name])
        entered.discard(tops[name])
        found = find_images(folder / name, entered)
        others.update(found.others)
        places = (os.path.split(os.fsdecode(place)) for place in found.names)
        files[name] = sorted((*place, size) for place, size in zip(places, found.sizes, strict=True))
    paths, labels, sizes = [], [], []
    for label, name in enumerate(class_names):
        for place, file, size in files.get(name, ()):
            paths.append(os.path.join(folder, name, place, file))
            labels.append(label)
            sizes.append(size)
    return _Samples(paths, np.array(labels, dtype=np.int64), np.array(sizes, dtype=np.int64), others)


def _places365(root: Path, own_names: Mapping[str, str], split: str) -> ProbeImages:
    from torchvision.datasets import Places365

    found = Places365(str(root), split=own_names[split], small=not any(root.glob("data_large_*")))
    class_names = tuple(sorted(found.class_to_idx, key=found.class_to_idx.__getitem__))
    return _from_files([path for path, _ in found.imgs], [label for _, label in found.imgs], class_names, root)


def _cifar(name: str, root: Path, own_names: Mapping[str, str], split: str) -> ProbeImages:
    import torchvision.datasets

    found = getattr(torchvision.datasets, name)(str(root), train=own_names[split] == "train")
    labels = np.asarray(found.targets, dtype=np.int64)
    content = hashlib.sha256(found.data.tobytes()).hexdigest()
    return ProbeImages(labels, tuple(found.classes), partial(_source, found.data), None, content)


def _waterbirds(root: Path, own_names: Mapping[str, str], split: str) -> ProbeImages:
    """A folder with Waterbirds' `metadata.csv`: img_filename, y (class), place (background), both 0 or 1, and split (0 to 2).

    The optional columns `y_name` and `place_name` name classes and backgrounds; without them, the names are Waterbirds' own.
    Groups are called `<class> on <background>`.

    Raises ValueError for a table that breaks these rules, or gives a number two names or two numbers the same name.
    """
    table = root / "metadata.csv"
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except UnicodeDecodeError as error:
        raise ValueError(f"{table} is not UTF-8") from error
    # Of all rows, so that the names are the same in every split.
    class_names = _names_in(table, rows, "y", ("landbird", "waterbird"))
    place_names = _names_in(table, rows, "place", ("land", "water"))
    rows = [row for row in rows if row["split"] == own_names[split]]
    labels, places = ([int(row[column] or "") for row in rows] for column in ("y", "place"))
    if not {*labels, *places} <= {0, 1}:
        raise ValueError(f"y and place in {table} must be 0 or 1")
    groups = 2 * np.asarray(labels, dtype=np.int64) + np.asarray(places, dtype=np.int64)
    paths = [os.path.join(root, row["img_filename"] or "") for row in rows]
    found = _from_files(paths, labels, class_names, root)
    return replace(
        found,
        groups=groups,
        group_names=tuple(f"{name} on {place}" for name in class_names for place in place_names),
        content_hash=text_hash([found.content_hash, *map(str, groups)]),
    )


def _names_in(table: Path, rows: Sequence[Mapping[str, str]], column: str, default: tuple[str, str]) -> tuple[str, str]:
    """The names of the numbers 0 and 1 in a column, from the column `<column>_name` if the table has that."""
    named = f"{column}_name"
    if not rows or named not in rows[0]:
        return default
    pairs = {(row[column], row[named]) for row in rows}
    names = dict(pairs)
    if len(pairs) != 2 or names.keys() != {"0", "1"} or not all(names.values()) or names["0"] == names["1"]:
        raise ValueError(f"{named} in {table} must have one name for {column} 0 and another for {column} 1")
    return names["0"], names["1"]


def _from_files(
    paths: list[str],
    labels: Sequence[int] | NDArray[np.int64],
    class_names: tuple[str, ...],
    root: Path,
    sizes: NDArray[np.int64] | None = None,
) -> ProbeImages:
    top = f"{root}{os.sep}"
    names = tuple(path.removeprefix(top).replace(os.sep, "/") for path in paths)
    for path, name in zip(paths, names, strict=True):
        if not path.startswith(top) or ".." in name.split("/"):
            raise ValueError(f"{path} lies elsewhere")
    labels = np.asarray(labels, dtype=np.int64)
    sizes = file_sizes(paths) if sizes is None else sizes
    lines = (f"{name} {label} {size}" for name, label, size in zip(names, labels.tolist(), sizes.tolist(), strict=True))
    content = text_hash((*class_names, *lines))
    return ProbeImages(labels, class_names, partial(_source, paths), names, content, root, sizes=sizes)


def _source(images: list[str] | NDArray[np.uint8], index: int) -> Encoded:
    """One of many paths or pixel arrays as an image. (Not a lambda, because worker processes may get it pickled.)"""
    image = images[index]
    return read_file(image) if isinstance(image, str) else Image.fromarray(image)


READERS = {
    "folder": Reader(_image_folder, {"train": "train", "val": "val"}),
    "places365": Reader(_places365, {"train": "train-standard", "val": "val"}, ("train-standard", "train-challenge", "val")),
    "cifar10": Reader(partial(_cifar, "CIFAR10"), {"train": "train", "val": "test"}, ("train", "test")),
    "cifar100": Reader(partial(_cifar, "CIFAR100"), {"train": "train", "val": "test"}, ("train", "test")),
    # metadata.csv numbers its splits; by default 1, the validation split, is unused, since train_val is held out of train
    "waterbirds100": Reader(_waterbirds, {"train": "0", "val": "2"}, ("0", "1", "2")),
}


def display_name(class_name: Any) -> str:
    """A class name for people and prompts: `/b/bedroom` -> `bedroom`, `animals_and_nature` -> `animals and nature`.

    Parts keep their order, as in the authors' code (METHOD, the differences): `/p/pub/indoor` -> `pub indoor`.
    """
    parts = [part for part in str(class_name).split("/") if part]
    if len(parts) > 1 and len(parts[0]) == 1:  # places365 files its classes under their first letter
        parts = parts[1:]
    return " ".join(part.replace("_", " ") for part in parts)
