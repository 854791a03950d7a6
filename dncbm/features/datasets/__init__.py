"""Images as the extraction reads them: numbered shards of (key, image) pairs, and the rules for what an image is."""

import heapq
import itertools
import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dncbm.runs.errors import UserError

Encoded = bytes | Image.Image
"""The bytes of an image file, or an image that was never encoded (of an array of pixels)."""
KeyedImage = tuple[Any, Callable[[], Encoded]]
"""A key (a string for SAE images, an index for a probe data set) and a function that reads the image, or raises."""

FORMATS = {
    "JPEG": ("jpg", "jpeg"), "PNG": ("png",), "WEBP": ("webp",), "BMP": ("bmp",), "TIFF": ("tif", "tiff"),
    "PPM": ("ppm", "pgm"), "GIF": (),
}  # fmt: skip
"""PIL's name of each format that is read -> suffixes of the files that are taken for images. Add others here.

PIL looks at the content, not at the suffix. Other formats stay closed because some hand the file to another program (EPS to
Ghostscript). GIFs are often called .jpg on the web.
"""
IMAGE_SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
MAX_BYTES = 1 << 28
"""Largest image file that is read: what the largest image that PIL opens takes without compression."""
MAX_ASPECT = 200
"""How many times longer than wide an image may be: preprocessing scales the short side up to the encoder's."""
SHARD_SIZE = 8192
"""Images per shard of a data set that is not stored in shards."""
_FILTERING = Lock()
"""Filters of warnings are those of the process: threads that set and restore them at once would leave them set."""
DAMAGED = "cut off or damaged tar"
"""The reason under which images are counted that a damaged tar has lost."""


class ImageShards(Protocol):
    """A sequence of shards of images. One worker process reads a shard, and its features become one file."""

    def __len__(self) -> int:
        """Number of shards."""

    def name(self, shard: int) -> str:
        """The shard's name in messages."""

    def count(self, shard: int) -> int | None:
        """Number of images in a shard, if it is known without reading the shard."""

    def size(self, shard: int) -> int:
        """Size of a shard, in any unit; the number of its images is estimated from it where it is not known."""

    def fingerprint(self) -> str:
        """Hash that identifies the images, cheap to compute."""

    def state(self, shard: int, bad_keys: Sequence[Any]) -> str:
        """The state of a shard's data, cheap to compute; it changes when the images with `bad_keys` have been fixed.

        A key of None stands for bad images without a key. Raises OSError if the data no longer exists.
        """

    def read(self, shard: int, on_bad: Callable[[str], None]) -> Iterator[KeyedImage]:
        """The images of a shard, in a fixed order. Calls `on_bad` with the reason for each member it cannot read."""


class SlicedShards:
    """Shards of SHARD_SIZE items of an array."""

    items: NDArray[Any]

    def __len__(self) -> int:
        return -(-len(self.items) // SHARD_SIZE)

    def name(self, shard: int) -> str:
        first, n = shard * SHARD_SIZE, self.count(shard)
        return f"images {first} to {first + n - 1}" if n != 1 else f"image {first}"

    def count(self, shard: int) -> int:
        return len(self.slice(shard))

    def size(self, shard: int) -> int:
        return self.count(shard)

    def slice(self, shard: int) -> NDArray[Any]:
        """The items of one shard."""
        return self.items[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]


# ------------------------------------------------------------------------------------------------------- one image


class BadImage(Exception):
    """An image that is not decoded. The message is the reason under which it is counted."""


def read_file(path: str | Path) -> bytes:
    """The content of an image file.

    Raises BadImage if it has more than MAX_BYTES, OSError if it cannot be read.
    """
    with open(path, "rb") as file:
        check_size(os.fstat(file.fileno()).st_size)
        return file.read(MAX_BYTES)


def check_size(n_bytes: int) -> None:
    """Raises BadImage if a file is too large to be read."""
    if n_bytes > MAX_BYTES:
        raise BadImage(f"file of more than {MAX_BYTES >> 20} MiB")


def open_image(encoded: Encoded) -> Image.Image:
    """Open an image without decoding the pixels.

    Raises BadImage if the file is empty, the image is far longer than wide, or it has more pixels than PIL's limit
    (`Image.MAX_IMAGE_PIXELS`; PIL itself only warns up to twice the limit), and OSError if it is not an image of FORMATS.
    """
    if encoded == b"":
        raise BadImage("empty file")
    with _FILTERING, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(BytesIO(encoded), formats=list(FORMATS)) if isinstance(encoded, bytes) else encoded
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise BadImage(f"decompression bomb: more than {Image.MAX_IMAGE_PIXELS} pixels") from error
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise BadImage(f"more than {MAX_ASPECT} times longer than wide")
    return image


def to_rgb(image: Image.Image, background: str = "none") -> tuple[Image.Image, bool]:
    """Decode an image: in RGB, and whether pixels of it are transparent.

    A `background` of `white` or `black` is put behind transparent images. With `none` their hidden colours show, as in the
    authors' and torchvision's loaders. Of 16 bits the upper eight are kept, as PIL does with colours; it clips greys, so that
    nearly all become white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # the latter in old versions of PIL
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB"), False
    is_transparent = False
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        with_alpha = image.convert("RGBA")
        alpha = with_alpha.getchannel("A")
        is_transparent = alpha.getextrema() != (255, 255)
        if is_transparent and background != "none":
            behind = Image.new("RGB", image.size, background)
            behind.paste(with_alpha, mask=alpha)
            return behind, True
        image.info.pop("transparency", None)  # of which PIL would only warn
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB"), is_transparent


def reason_of(error: Exception) -> str:
    """The reason under which a skipped image is counted."""
    return str(error) if isinstance(error, BadImage) else type(error).__name__


# ------------------------------------------------------------------------------------------------- folders of images


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's data: hidden, or what macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def suffix_of(name: str) -> str:
    """The last part of a file name, in lower case: `a.input.JPG` -> `jpg`; "" if there is none."""
    return name.rpartition(".")[2].lower() if "." in name[1:] else ""


@dataclass
class Found:
    """Image files under a folder, in no particular order."""

    names: list[bytes]
    """Paths relative to the folder, as the system encodes them."""
    sizes: list[int]
    """Size of each file in bytes; -1 for a link that leads nowhere."""
    others: Counter[str]
    """Suffix -> number of the files that are no images."""


def find_images(top: Path, entered: set[tuple[int, int]]) -> Found:
    """The images under a folder, at any depth, without hidden files and folders.

    A folder that several paths lead to is entered once, by a path without links if there is one; `entered` holds those that
    are not entered (again), by device and inode.

    Raises UserError if a folder cannot be read.
    """
    found = Found([], [], Counter())
    root = os.fsencode(top)
    folders, links = [b""], list[bytes]()  # links wait until all folders proper have been entered
    while folders or links:
        folder = folders.pop() if folders else heapq.heappop(links)
        path = os.path.join(root, folder)
        try:
            about = os.stat(path)
            if (about.st_dev, about.st_ino) in entered:
                continue
            entered.add((about.st_dev, about.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    name = os.fsdecode(entry.name)
                    if is_hidden(name):
                        continue
                    if is_folder(entry):
                        place = os.path.join(folder, entry.name)
                        heapq.heappush(links, place) if entry.is_symlink() else folders.append(place)
                        continue
                    size = _image_size(entry) if (suffix := suffix_of(name)) in IMAGE_SUFFIXES else None
                    if size is None:
                        found.others[suffix] += 1
                    else:
                        found.names.append(os.path.join(folder, entry.name))
                        found.sizes.append(size)
        except OSError as error:
            raise UserError(f"cannot read the folder {os.fsdecode(path)}: {error.strerror}") from error
    return found


def is_folder(entry: "os.DirEntry[Any]") -> bool:
    """Whether a file, or what it links to, is a folder."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _image_size(entry: "os.DirEntry[bytes]") -> int | None:
    """Size of a file; None if it is no file (opening a pipe would wait for ever)."""
    try:
        about = entry.stat()
    except OSError:
        return -1
    return about.st_size if stat.S_ISREG(about.st_mode) else None


def identity(folder: Path) -> tuple[int, int]:
    """What `find_images` knows a folder by."""
    about = folder.stat()
    return about.st_dev, about.st_ino


def suffixes(counts: Mapping[str, int], most: int = 5) -> str:
    """The commonest suffixes, with their numbers: `30 .svg, 2 .txt`."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {f'.{suffix}' if suffix else 'without a suffix'}" for suffix, count in ordered[:most]]
    rest = sum(count for _, count in ordered[most:])
    return ", ".join([*shown, f"{rest} others"] if rest else shown)


def read_suffixes(others: Mapping[str, int]) -> str:
    """For messages: which files are taken for images, and how many others were found."""
    read = f"files named .{', .'.join(sorted(IMAGE_SUFFIXES))} are read"
    return f"{read}; passed over: {suffixes(others)}" if others else read


def counted(n: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def file_sizes(paths: Sequence[str]) -> NDArray[np.int64]:
    """Size of each file in bytes; -1 if it is missing."""

    def size(path: str) -> int:
        try:
            return os.stat(path).st_size
        except OSError:
            return -1

    return np.fromiter(map(size, paths), dtype=np.int64, count=len(paths))


def file_states(paths: Sequence[Path]) -> list[str]:
    """Sizes and modification times of files, which show later whether a file was replaced."""
    stats = [path.stat() if path.is_file() else None for path in paths]
    return [f"{stat.st_size} {stat.st_mtime_ns}" if stat else "missing" for stat in stats]


# --------------------------------------------------------------------------------------------------------- splitting


def random_split(n: int, seed: int, held_out: Mapping[str, float]) -> dict[str, NDArray[np.int64]]:
    """Divide the indices 0..n-1 by a seeded random permutation: split -> indices, sorted so that files are read in order.

    The shares of `held_out` are taken in turn from the start of the permutation; `train` gets the rest.
    """
    order = np.random.default_rng(seed).permutation(n)
    splits, first = {}, 0
    for split, share in held_out.items():
        last = first + round(n * share)
        splits[split] = np.sort(order[first:last])
        first = last
    return {"train": np.sort(order[first:])} | splits


def least_to_divide(*shares: float) -> int:
    """The smallest number of images from which each share, taken in turn from what is left, is an image at least."""

    def suffices(n: int) -> bool:
        for share in shares:
            taken = round(n * share)
            if not taken:
                return False
            n -= taken
        return n > 0

    return next(n for n in itertools.count(1) if suffices(n))
