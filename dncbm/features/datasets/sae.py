"""The images an SAE is trained on: webdataset shards (CC3M in the paper) or any folder of images."""

import hashlib
import json
import logging
import os
import re
import string
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dncbm.features import datasets
from dncbm.features.datasets import (
    DAMAGED,
    IMAGE_SUFFIXES,
    BadImage,
    ImageShards,
    KeyedImage,
    SlicedShards,
    check_size,
    counted,
    find_images,
    identity,
    is_hidden,
    read_file,
    read_suffixes,
    suffix_of,
    suffixes,
)
from dncbm.runs.declarations import SPLITS
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import text_hash
from dncbm.runs.settings import Settings
from sparse_autoencoder import DEFAULT_SEED

FOLDER_SEED = DEFAULT_SEED
"""Seed of the permutation that divides a folder of images. It does not follow --seed: all runs see the same images."""
HELD_OUT = 0.05
"""Share of a folder's images in train_val, and again in val."""
MAX_KEY = 1024
"""Characters of a key. Keys are saved in an array, where each takes as much room as the longest."""
MAX_HEADER = 1 << 20
"""Bytes that a tar may spend on the name and the attributes of a member."""
SAMPLES, SAMPLE = 8, 4096
"""Blocks of a tar that its fingerprint looks at, and their bytes."""
MAX_DEPTH = 20
"""How deeply the braces of a pattern may be nested."""
MANY_MISSING = 1000
"""Missing shards after which the rest of a pattern is not looked for."""


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
            n = int(json.loads(path.with_name(path.stem + "_stats.json").read_text())["successes"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None
        return n if 0 <= n < 10_000_000 else None

    def size(self, shard: int) -> int:
        """Bytes of the tar."""
        try:
            return self.paths[shard].stat().st_size
        except OSError:
            return 0

    def fingerprint(self) -> str:
        """From the tars' names, sizes and samples: hashing three million images would take as long as the stage."""
        return text_hash(self.state(shard, ()) for shard in range(len(self)))

    def state(self, shard: int, bad_keys: Sequence[Any]) -> str:
        """Name, size and a sample; with bad images also the time, since what was fixed can be missing from the sample."""
        path = self.paths[shard]
        digest = hashlib.sha256()
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            for number in range(SAMPLES):  # not the first header, which holds the time of writing
                file.seek(stat.st_size * (2 * number + 1) // (2 * SAMPLES))
                digest.update(file.read(SAMPLE))
        return f"{path.name} {stat.st_size} {digest.hexdigest()[:16]}" + (f" {stat.st_mtime_ns}" if bad_keys else "")

    def read(self, shard: int, on_bad: Callable[[str], None]) -> Iterator[KeyedImage]:
        """One image of each key, in the order of the tar.

        A key ends at the first dot of a name, as webdataset has it, and the last part of a name tells an image. Of several
        images with one key, that without a further dot is taken (`1.jpg`, not `1.mask.png`), else the first.

        The number of images lost to damage is known from img2dataset's count; without a count, damage is one bad image.
        """
        images: dict[str, str] = {}
        others: dict[str, None] = {}
        further: Counter[str] = Counter()
        passed_over: Counter[str] = Counter()
        damage: list[str] = []
        refused = 0
        waiting: tuple[str, str, Callable[[], bytes]] | None = None
        for key, suffix, load in _members(self.paths[shard], damage.append):
            if waiting and waiting[0] != key:
                yield waiting[0], waiting[2]
                waiting = None
            if load is None:
                others[key] = None
                passed_over[suffix.rpartition(".")[2]] += 1
            elif len(key) > MAX_KEY:
                on_bad(f"key of more than {MAX_KEY} characters")
                refused += 1
            elif images.get(key) == suffix:
                on_bad("duplicate key")
            elif waiting and "." not in suffix:
                further[waiting[1]] += 1
                waiting, images[key] = None, suffix
                yield key, load
            elif key in images:
                further[suffix] += 1
            else:
                images[key] = suffix
                if "." in suffix:
                    waiting = key, suffix, load
                else:
                    yield key, load
        if waiting:
            yield waiting[0], waiting[2]

        named_with_dots = [suffix for suffix, n in further.items() if n == 1 and "." in suffix]
        if len(named_with_dots) > len(images):  # `2024.01.jpg`, not the masks and views that some samples hold
            for _ in named_with_dots:
                on_bad("image with the key of another (keys end at the first dot of a name)")
                refused += 1
        without = [key for key in others if key not in images]
        if damage and without and without[-1] == next(reversed(others)):
            without.pop()  # its image came after the damage
        expected = self.count(shard)
        lost = len(without) + len(damage) if expected is None else max(0, expected - len(images) - refused)
        no_image = "no image in the sample" + (f", only {suffixes(passed_over)}" if not images else "")
        for number in range(lost):
            on_bad(no_image if number < len(without) else (*damage, "missing from the shard")[0])


class _Headers:
    """A tar as tarfile reads it: headers, and the long names and attributes that precede some, which it takes whole."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, n: int) -> bytes:
        if n > MAX_HEADER:
            raise tarfile.ReadError("a name or an attribute of a member is too long")
        return self.file.read(n)


def _members(path: Path, on_damage: Callable[[str], None]) -> Iterator[tuple[str, str, Callable[[], bytes] | None]]:
    """Key, suffix and, for images, content of the files in a tar, named as webdataset names them.

    Stops at the first damage, after calling `on_damage` once. (webdataset's own reader ignores a missing end and stops at
    a duplicate key.)
    """
    from webdataset.tariterators import base_plus_ext

    try:
        with path.open("rb") as file, tarfile.open(fileobj=_Headers(file), mode="r:", encoding="utf-8") as tar:  # type: ignore[call-overload]
            size = os.fstat(file.fileno()).st_size
            while (member := tar.next()) is not None:
                tar.members.clear()  # it would keep every member in memory
                end = tar.offset if member.issparse() else member.offset_data + member.size
                if member.size < 0 or tar.offset <= member.offset or end > size:
                    raise tarfile.ReadError("a member does not fit into the file")
                key, suffix = base_plus_ext(member.name)
                if not member.isreg() or not key or not suffix or any(map(_is_left_out, member.name.split("/"))):
                    continue
                is_image = suffix_of(member.name) in IMAGE_SUFFIXES
                yield key, suffix.lower(), _content(file, member) if is_image else None
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # the block of zeros that ends every tar
                raise tarfile.ReadError("the end is missing")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; run the same command once it can be read") from error
    except Exception:  # a damaged header can make tarfile raise anything
        on_damage(DAMAGED)


def _is_left_out(part: str) -> bool:
    """Whether a part of a path is hidden."""
    return is_hidden(part) and part not in (".", "..")


def _content(file: BinaryIO, member: tarfile.TarInfo) -> Callable[[], bytes]:
    """Reads an image at once, since the tar is closed when it is decoded; what is too large is not read."""
    try:
        if member.issparse():
            raise BadImage("sparse file in a tar")
        check_size(member.size)
    except BadImage as error:
        return partial(_refuse, str(error))
    file.seek(member.offset_data)
    return partial(bytes, file.read(member.size))


def _refuse(reason: str) -> bytes:
    raise BadImage(reason)


@dataclass(frozen=True)
class FolderShards(SlicedShards):
    """Image files under a folder. Keys are their paths relative to the folder."""

    root: Path
    items: NDArray[np.bytes_]
    """Relative paths as the system encodes them, in an array: millions of strings would fill the memory."""
    sizes: NDArray[np.int64]
    """Size of each file in bytes, -1 for a link that leads nowhere."""

    def name(self, shard: int) -> str:
        return f"{super().name(shard)} of {self.root}"

    def fingerprint(self) -> str:
        """From the files' names and sizes."""
        return text_hash(self._lines(slice(None)))

    def state(self, shard: int, bad_keys: Sequence[Any]) -> str:
        first = shard * datasets.SHARD_SIZE
        bad = datasets.file_states([self.root / key for key in bad_keys])
        return text_hash([*self._lines(slice(first, first + datasets.SHARD_SIZE)), *bad])

    def _lines(self, part: slice) -> Iterator[str]:
        for name, size in zip(self.items[part], self.sizes[part].tolist(), strict=True):
            yield f"{os.fsdecode(name)} {size}"

    def read(self, shard: int, on_bad: Callable[[str], None]) -> Iterator[KeyedImage]:
        for key in map(os.fsdecode, self.slice(shard)):
            yield key, partial(read_file, self.root / key)

    def part(self, indices: NDArray[np.int64]) -> "FolderShards":
        """Some of the images."""
        return FolderShards(self.root, self.items[indices], self.sizes[indices])


def sae_images(settings: Settings, dataset: str) -> Mapping[str, ImageShards]:
    """The images of every split of an SAE data set.

    Raises UserError if config has no such data set, shards are missing or no tars, or a folder has no images or cannot be
    divided.
    """
    source = settings.sae_dataset(dataset)
    name = f"sae_datasets[{dataset!r}]"
    if isinstance(source, Path):
        return _folder_splits(source, f"{name} in {settings.path} names it")
    base = f"{settings.path.parent}{os.sep}"
    return {
        split: _shards_of(source[split], base, f"{name}[{split!r}] in {settings.path} is {source[split]!r}")
        for split in SPLITS
    }


def _shards_of(pattern: str, base: str, where: str) -> WebdatasetShards:
    """The shards of a pattern. Braces in `base`, the config's own folder, are part of its name."""
    written = pattern.removeprefix(base)
    paths: list[Path] = []
    missing: list[Path] = []
    try:
        for place in expand_braces(written):
            path = Path(base, place)
            (paths if os.path.isfile(path) else missing).append(path)
            if len(missing) == MANY_MISSING:
                break
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if missing:
        of = f"{len(missing)} of {len(paths) + len(missing)}" if len(missing) < MANY_MISSING else f"{MANY_MISSING} or more"
        raise UserError(f"{of} shards are missing, first {missing[0]}: {where}; list the shards you have")
    wrong = [(path, what) for path in paths if (what := _instead_of_tar(path))]
    if wrong:
        path, what = wrong[0]
        raise UserError(
            f"{len(wrong)} of {len(paths)} shards cannot be read, first {path}: it is {what}; {where}; fetch it again, or "
            "list only the others"
        )
    return WebdatasetShards(tuple(paths))


def _instead_of_tar(path: Path) -> str | None:
    """What a file is that does not begin as a tar."""
    try:
        with path.open("rb") as file:
            header = file.read(tarfile.BLOCKSIZE)
    except OSError as error:
        return f"not readable ({error.strerror})"
    try:
        tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        return None  # whole, and without members
    except tarfile.HeaderError:
        pass
    else:
        return None
    if not header:
        return "empty"
    packed = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
    if names := [name for magic, name in packed.items() if header.startswith(magic)]:
        return f"compressed with {names[0]}: unpack it to a plain tar"
    if header.lstrip().startswith(b"<"):
        return "a web page"
    return "not a tar"


def expand_braces(pattern: str) -> Iterator[str]:
    """What a pattern with braces stands for, as in bash, one after another: `{00..12}.tar`, `{a,b}.tar`, `{0..9..3}.tar`.

    A backslash takes the meaning from a brace or comma. (The package braceexpand holds all alternatives in memory at once.)

    Raises ValueError if braces are not balanced, or nested more than MAX_DEPTH deep.
    """
    depth = 0
    for match in _BRACES.finditer(pattern):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if not 0 <= depth <= MAX_DEPTH:
            break
    if depth:
        raise ValueError(
            f"its braces are not balanced, or more than {MAX_DEPTH} deep; write a backslash before those that belong to a name"
        )
    return (re.sub(r"\\(.)", r"\1", path) for path in _expanded(pattern))


_BRACES = re.compile(r"\\.|[{},]", re.DOTALL)
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?|([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?", re.ASCII)
_LETTERS = string.ascii_uppercase + string.ascii_lowercase


def _expanded(pattern: str) -> Iterator[str]:
    depth, opening = 0, 0
    for match in _BRACES.finditer(pattern):
        if match[0] == "{":
            opening = match.start() if depth == 0 else opening
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if depth == 0:
                break
    else:
        yield pattern
        return
    head, inner, tail = pattern[:opening], pattern[opening + 1 : match.start()], pattern[match.end() :]
    for middle in _alternatives(inner):
        for end in _expanded(tail):
            yield head + middle + end


def _alternatives(inner: str) -> Iterator[str]:
    """What stands for a pair of braces and what is between them."""
    if found := _RANGE.fullmatch(inner):
        first, last, by, first_letter, last_letter, letters_by = found.groups()
        if first_letter:
            return (_LETTERS[i] for i in _steps(_LETTERS.index(first_letter), _LETTERS.index(last_letter), letters_by))
        padded = any(text.lstrip("-").startswith("0") and text.lstrip("-") != "0" for text in (first, last))
        width = max(len(first), len(last)) if padded else 0
        return (f"{number:0{width}d}" for number in _steps(int(first), int(last), by))
    parts, depth, start = [], 0, 0
    for match in _BRACES.finditer(inner):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if match[0] == "," and depth == 0:
            parts.append(inner[start : match.start()])
            start = match.end()
    if parts:
        return chain.from_iterable(map(_expanded, [*parts, inner[start:]]))
    return (f"{{{text}}}" for text in _expanded(inner))


def _steps(first: int, last: int, by: str | None) -> range:
    step = int(by or 1) or 1
    return range(first, last + 1, step) if first < last else range(first, last - 1, -step)


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
    others: Counter[str] = Counter()

    def images_of(folder: Path) -> FolderShards:
        apart = {identity(other) for other in (root, *folders.values())} - {identity(folder)}
        found = find_images(folder, apart)
        others.update(found.others)
        names, sizes = np.array(found.names, dtype=np.bytes_), np.array(found.sizes, dtype=np.int64)
        order = np.argsort(names, kind="stable")
        return FolderShards(folder, names[order], sizes[order])

    splits = {split: images_of(folder) for split, folder in folders.items()}
    if "train_val" not in splits:
        shares = {"train_val": HELD_OUT} if folders else {"val": HELD_OUT, "train_val": HELD_OUT}
        whole = splits["train"] if folders else images_of(root)
        drawn = datasets.random_split(len(whole.items), FOLDER_SEED, shares)
        splits |= {split: whole.part(drawn[split]) for split in drawn}
    if empty := [split for split in SPLITS if len(splits[split]) == 0]:
        n = sum(len(shards.items) for shards in splits.values())
        raise UserError(
            f"no images for {empty[0]} in {root}, which has {counted(n, 'image')}: {where}; {read_suffixes(others)}; at least "
            f"{datasets.least_to_divide(HELD_OUT)} images are needed to hold some out"
        )
    if others:
        logging.getLogger(__name__).warning(f"{root}: {read_suffixes(others)}")
    return {split: splits[split] for split in SPLITS}
