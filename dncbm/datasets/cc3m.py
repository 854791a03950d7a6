"""Webdataset shards (tars as img2dataset writes them): the images an SAE is trained on. CC3M is the paper's."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from dncbm.datasets import KeyedImage
from dncbm.errors import UserError
from dncbm.manifests import text_hash
from dncbm.settings import Settings

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class WebdatasetShards:
    """The tars of one split."""

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
        except (OSError, ValueError, KeyError):
            return None

    def fingerprint(self) -> str:
        """From the tars' names and sizes: reading three million images to hash them would cost as much as the stage."""
        return text_hash(f"{path.name} {path.stat().st_size}" for path in self.paths)

    def read(self, shard: int, on_bad: Callable[[str], None]) -> Iterator[KeyedImage]:
        from webdataset.tariterators import group_by_keys, tar_file_expander

        def skip(error: Exception) -> bool:
            on_bad(f"{type(error).__name__} in the tar")
            return True

        # Opened here, because webdataset would take a path with `#`, `?` or braces for a URL or a pattern.
        with self.paths[shard].open("rb") as stream:
            files = tar_file_expander([{"url": self.name(shard), "stream": stream}], handler=skip)
            for sample in group_by_keys(files, handler=skip):
                encoded = next((sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample), None)
                if encoded is None:
                    on_bad("no image in the sample")
                else:
                    yield sample["__key__"], lambda encoded=encoded: Image.open(BytesIO(encoded))  # type: ignore[misc]


def sae_images(settings: Settings, dataset: str, split: str) -> WebdatasetShards:
    """The shards of a split of an SAE dataset.

    Raises:
        UserError: config has no such dataset, or shards that its pattern names are not there.
    """
    from braceexpand import braceexpand

    pattern = settings.sae_dataset(dataset)[split]
    paths = tuple(Path(path) for path in braceexpand(pattern))
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} shards are not there, the first is {missing[0]}: "
            f"sae_datasets[{dataset!r}][{split!r}] in {settings.path} is {pattern!r}; set it to the shards you have"
        )
    return WebdatasetShards(paths)
