"""The images an SAE is trained on: webdataset shards (CC3M in the paper) or any folder of images."""

import hashlib
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

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
from dncbm.features.datasets.patterns import expand_braces, matching_files
from dncbm.features.datasets.remote import Pipe, Remote, asked, checked, fetched, shown
from dncbm.runs.declarations import SPLITS
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import text_hash
from dncbm.runs.settings import PIPE, WEB, Settings, scheme_of
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
UNKNOWN_SIZE = 100_000_000
"""Bytes that a tar is taken to have where no size is known. Progress is estimated from it until the first tar is read."""
MANY_MISSING = 1000
"""Missing shards after which the others are not looked for."""
INSTEAD = {
    "s3": "aws s3 cp {url} -",
    "gs": "gcloud storage cat {url}",
    "hf": "curl -s -f -L https://huggingface.co/datasets/OWNER/NAME/resolve/main/SHARD.tar",
}
"""Scheme that is not read -> the command that is."""


@dataclass(frozen=True)
class WebdatasetShards:
    """The tars of one split, as img2dataset or webdataset write them: local files, or what is fetched to be read."""

    paths: tuple[Path | Remote, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, shard: int) -> str:
        return str(self.paths[shard])

    def count(self, shard: int) -> int | None:
        """The number that img2dataset saved beside a local tar in `<shard>_stats.json`; None without that file."""
        path = self.paths[shard]
        if not isinstance(path, Path):
            return None
        try:
            n = int(json.loads(path.with_name(path.stem + "_stats.json").read_text())["successes"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None
        return n if 0 <= n < 10_000_000 else None

    def size(self, shard: int) -> int:
        """Bytes of the tar; where they are not known, the mean of the others, or UNKNOWN_SIZE if none are."""
        size = _size_of(self.paths[shard])
        return self._mean_size if size is None else size

    @cached_property
    def _mean_size(self) -> int:
        sizes = [size for path in self.paths if (size := _size_of(path)) is not None]
        return max(1, sum(sizes) // len(sizes)) if sizes else UNKNOWN_SIZE

    def fingerprint(self) -> str:
        """From the tars' names, sizes and samples: hashing three million images would take as long as the stage."""
        return text_hash(self.state(shard, ()) for shard in range(len(self)))

    def state(self, shard: int, bad_keys: Sequence[Any]) -> str:
        """Name, size and a sample; with bad images also the time, since what was fixed can be missing from the sample.

        Of what is not local, what the server said, or the command.
        """
        path = self.paths[shard]
        if not isinstance(path, Path):
            return path.state()
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

        Raises UserError if the tar cannot be read, or fetched.
        """
        with _opened(self.paths[shard]) as file:
            yield from self._images(file, shard, on_bad)

    def _images(self, file: BinaryIO, shard: int, on_bad: Callable[[str], None]) -> Iterator[KeyedImage]:
        images: dict[str, str] = {}
        others: dict[str, None] = {}
        further: Counter[str] = Counter()
        passed_over: Counter[str] = Counter()
        damage: list[str] = []
        refused = 0
        waiting: tuple[str, str, Callable[[], bytes]] | None = None
        for key, suffix, load in _members(file, self.name(shard), damage.append):
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


def _size_of(path: Path | Remote) -> int | None:
    """Bytes of a tar; None if they are not known."""
    if not isinstance(path, Path):
        return path.size
    try:
        return path.stat().st_size
    except OSError:
        return 0


@contextmanager
def _opened(path: Path | Remote) -> Iterator[BinaryIO]:
    """A tar to be read. Raises UserError if it cannot be opened, or fetched, or is something else."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb") if isinstance(path, Path) else fetched(path))
        except OSError as error:
            raise _unreadable(str(path), error) from error
        if not isinstance(path, Path):
            if what := _instead_of_tar(file.read(tarfile.BLOCKSIZE)):
                raise UserError(f"cannot read {path}: it is {what}; correct sae_datasets in the config, or leave it out")
            file.seek(0)
        yield file


def _unreadable(name: str, error: OSError) -> UserError:
    return UserError(f"cannot read {name}: {error.strerror}; run the same command once it can be read")


def _members(
    file: BinaryIO, name: str, on_damage: Callable[[str], None]
) -> Iterator[tuple[str, str, Callable[[], bytes] | None]]:
    """Key, suffix and, for images, content of the files in a tar, named as webdataset names them.

    Stops at the first damage, after calling `on_damage` once. (webdataset's own reader ignores a missing end and stops at
    a duplicate key.)
    """
    from webdataset.tariterators import base_plus_ext

    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:", encoding="utf-8") as tar:  # type: ignore[call-overload]
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
        raise _unreadable(name, error) from error
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
    """The images of every split of an SAE data set. Servers are asked for their shards; nothing is fetched yet.

    Raises UserError if config has no such data set, shards are missing or no tars, a server refuses them or does not answer,
    or a folder has no images or cannot be divided.
    """
    source = settings.sae_dataset(dataset)
    name = f"sae_datasets[{dataset!r}]"
    if isinstance(source, Path):
        return _folder_splits(source, f"{name} in {settings.path} names it")
    base = f"{settings.path.parent}{os.sep}"
    found = {split: _shards_of(source[split], base, f"{name}[{split!r}]", settings.path) for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        if shared := set(found[one].paths) & set(found[other].paths):
            n = counted(len(shared), "shard")
            logging.getLogger(__name__).warning(
                f"{name} in {settings.path}: {one} and {other} share {n}: what is measured on {other} is not of unseen images"
            )
    return found


@dataclass(frozen=True)
class _Found:
    """What there is where a pattern says that a shard is."""

    key: str
    """The same for the same shard."""
    name: str
    """For messages."""
    shard: Path | Remote | None
    """None if there is nothing."""
    instead: str | None
    """What it is, if not a tar, as far as that is known before it is fetched."""
    where: str
    """Which pattern of the config names it."""


def _shards_of(patterns: Sequence[str], base: str, entry: str, config: Path) -> WebdatasetShards:
    """The shards of a split, each once. Braces and globs in `base`, the config's own folder, are part of its name."""
    shards: dict[str, Path | Remote] = {}
    missing: list[_Found] = []
    wrong: list[_Found] = []
    again: list[_Found] = []
    for found in _all_found(patterns, base, entry, config):
        if found.shard is None:
            missing.append(found)
            if len(missing) == MANY_MISSING:
                break
        elif found.key in shards:
            again.append(found)
        else:
            shards[found.key] = found.shard
            wrong += [found] if found.instead else []
    if missing:
        of = f"{len(missing)} of {len(shards) + len(missing)}" if len(missing) < MANY_MISSING else f"{MANY_MISSING} or more"
        raise UserError(f"{of} shards are missing, first {missing[0].name}: {missing[0].where}; list the shards you have")
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(shards)} shards cannot be read, first {wrong[0].name}: it is {wrong[0].instead}; "
            f"{wrong[0].where}; fetch it again, or list only the others"
        )
    if again:
        are = "shard is" if len(again) == 1 else "shards are"
        logging.getLogger(__name__).warning(
            f"{len(again)} {are} named again, and read once, first {again[0].name}: {again[0].where}"
        )
    return WebdatasetShards(tuple(shards.values()))


def _all_found(patterns: Sequence[str], base: str, entry: str, config: Path) -> Iterator[_Found]:
    for number, pattern in enumerate(patterns):
        written = pattern if scheme_of(pattern) in ("", PIPE) else shown(pattern)
        where = f"{entry}{f'[{number}]' if len(patterns) > 1 else ''} in {config} is {written!r}"
        try:
            yield from _found(pattern, base, where)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error


def _found(pattern: str, base: str, where: str) -> Iterator[_Found]:
    """What a pattern stands for, in order. Raises ValueError if it is malformed, or nothing reads it."""
    scheme = scheme_of(pattern)
    if not scheme:
        for path in matching_files(pattern.removeprefix(base), base):
            shard = path if os.path.isfile(path) else None
            yield _Found(os.path.normpath(path), str(path), shard, _read_instead(path) if shard else None, where)
    elif scheme == PIPE:
        for command in expand_braces(pattern.partition(":")[2], escapable="{},"):
            if not command.strip():
                raise ValueError(f"write a command behind {PIPE}:")
            pipe = Pipe(command)
            yield _Found(pipe.state(), str(pipe), pipe, None, where)
    elif scheme in WEB:
        answers = asked(map(checked, expand_braces(pattern)))
        for answer in tqdm(answers, desc="asking for shards", unit="shard", leave=False, delay=2):
            instead = _instead_of_tar(answer.header) if answer.shard else None
            yield _Found(answer.url, shown(answer.url), answer.shard, instead, where)
    else:
        command = INSTEAD.get(scheme, "curl -s -f -L {url}").format(url=shown(pattern))
        raise ValueError(f"{scheme}:// is not read: write a command that prints the shard, {PIPE}:{command}")


def _read_instead(path: Path) -> str | None:
    """What a file is that does not begin as a tar."""
    try:
        with path.open("rb") as file:
            return _instead_of_tar(file.read(tarfile.BLOCKSIZE))
    except OSError as error:
        return f"not readable ({error.strerror})"


def _instead_of_tar(header: bytes) -> str | None:
    """What something is whose first block is not that of a tar."""
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
