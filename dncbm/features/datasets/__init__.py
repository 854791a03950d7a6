"""Images as the extraction reads them: numbered shards of (key, image) pairs."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

KeyedImage = tuple[Any, Callable[[], Image.Image]]
"""A key (a string for SAE images, an index for a probe data set) and a function that decodes the image, or raises."""

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
SHARD_SIZE = 8192
"""Images per shard of a data set that is not stored in shards."""


class ImageShards(Protocol):
    """A sequence of shards of images. One worker process reads a shard, and its features become one file."""

    def __len__(self) -> int:
        """Number of shards."""

    def name(self, shard: int) -> str:
        """The shard's name in messages."""

    def count(self, shard: int) -> int | None:
        """Number of images in a shard, if it is known without reading the shard."""

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
        return f"images {shard * SHARD_SIZE} to {shard * SHARD_SIZE + self.count(shard) - 1}"

    def count(self, shard: int) -> int:
        return len(self.slice(shard))

    def slice(self, shard: int) -> NDArray[Any]:
        """The items of one shard."""
        return self.items[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]


class BadImage(Exception):
    """An image that is not decoded. The message is the reason under which it is counted."""


def open_image(source: bytes | str | Path) -> Image.Image:
    """Open an image from its encoded bytes or its path, without decoding the pixels.

    Raises BadImage if the file is empty, or the image has more pixels than PIL's limit (`Image.MAX_IMAGE_PIXELS`; PIL itself
    only warns up to twice the limit), and OSError if the file is missing or is not an image.
    """
    if source == b"" if isinstance(source, bytes) else Path(source).stat().st_size == 0:
        raise BadImage("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(BytesIO(source) if isinstance(source, bytes) else source)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise BadImage(f"decompression bomb: more than {Image.MAX_IMAGE_PIXELS} pixels") from error


def reason_of(error: Exception) -> str:
    """The reason under which a skipped image is counted."""
    return str(error) if isinstance(error, BadImage) else type(error).__name__


def file_states(paths: Sequence[Path]) -> list[str]:
    """Sizes and modification times of files, which show later whether a file was replaced."""
    stats = [path.stat() if path.is_file() else None for path in paths]
    return [f"{stat.st_size} {stat.st_mtime_ns}" if stat else "missing" for stat in stats]


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
