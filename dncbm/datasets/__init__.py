"""Images, as the extraction of features reads them: numbered shards of (key, image) pairs."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from PIL import Image

KeyedImage = tuple[Any, Callable[[], Image.Image]]
"""A key (a string for webdataset, an index for a probe dataset) and a function that decodes the image, or raises."""


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

    def read(self, shard: int, on_bad: Callable[[str], None]) -> Iterator[KeyedImage]:
        """The images of a shard, in a fixed order. Calls `on_bad` with the reason for each member it cannot read."""
