"""Images, as the extraction of features reads them: numbered shards of (key, image) pairs."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

KeyedImage = tuple[Any, Callable[[], Image.Image]]
"""A key (a string for SAE images, an index for a probe dataset) and a function that decodes the image, or raises."""

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
SHARD_SIZE = 8192
"""Images in a shard of what does not come in shards, and so rows in a file of features."""


class ImageShards(Protocol):
    """A sequence of shards of images. A shard is read in one worker process, and becomes one file of features."""

    def __len__(self) -> int:
        """Number of shards."""

    def name(self, shard: int) -> str:
        """What to call a shard in messages."""

    def count(self, shard: int) -> int | None:
        """Number of images in a shard, if it is known without reading it."""

    def fingerprint(self) -> str:
        """Hash of what identifies the images, cheap to compute."""

    def state(self, shard: int, bad_keys: Sequence[Any]) -> str:
        """What a shard is made of, cheap to compute; it changes when the images that were bad have been mended.

        Args:
            shard: its number.
            bad_keys: keys that could not be read, None for what has no key; none: nothing was bad.

        Raises:
            OSError: it is not there any more.
        """

    def read(self, shard: int, on_bad: Callable[[str], None]) -> Iterator[KeyedImage]:
        """The images of a shard, in a fixed order. Calls `on_bad` with the reason for each member it cannot read."""


class BadImage(Exception):
    """An image that is not decoded; the text is the reason, as it is counted."""


def open_image(source: bytes | str | Path) -> Image.Image:
    """Open an encoded image, pixels still undecoded, from its bytes or its path.

    Raises:
        BadImage: the file is empty, or the image has more pixels than PIL's limit (`Image.MAX_IMAGE_PIXELS`), from which PIL
            itself only warns up to its double.
        OSError: it is not there, or no image.
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
    """Why an image was skipped, in the words that are counted."""
    return str(error) if isinstance(error, BadImage) else type(error).__name__


def file_states(paths: Sequence[Path]) -> list[str]:
    """Sizes and times of files, to see later whether they were replaced."""
    stats = [path.stat() if path.is_file() else None for path in paths]
    return [f"{stat.st_size} {stat.st_mtime_ns}" if stat else "missing" for stat in stats]


def random_split(n: int, seed: int, held_out: Mapping[str, float]) -> dict[str, NDArray[np.int64]]:
    """Divide the indices 0..n-1 by a seeded random permutation.

    Args:
        n: number of items.
        seed: of the permutation.
        held_out: split -> its share, taken from the start of the permutation in turn; `train` gets the rest.

    Returns:
        Split -> indices, each sorted, so that files are read in the dataset's order.
    """
    order = np.random.default_rng(seed).permutation(n)
    splits, first = {}, 0
    for split, share in held_out.items():
        last = first + round(n * share)
        splits[split] = np.sort(order[first:last])
        first = last
    return {"train": np.sort(order[first:])} | splits
