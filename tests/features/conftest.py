"""What the tests of features share: small shards of noise, and the features that a plain loop gives them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dncbm.features.datasets.sae import WebdatasetShards

N_IMAGES = 7


@pytest.fixture
def shards(tmp_path: Path, write_tar, random_image, encoded) -> WebdatasetShards:
    """Three shards of seven images; the seed of an image is its key."""

    def write(shard: int) -> Path:
        seeds = range(shard * 10, shard * 10 + N_IMAGES)
        samples = {f"{seed:09d}": {"png": encoded(random_image(seed))} for seed in seeds}
        return write_tar(tmp_path / f"tars/{shard:05d}.tar", samples)

    return WebdatasetShards(tuple(write(shard) for shard in range(3)))


@pytest.fixture
def members(random_image, encoded) -> Callable[[int], dict[str, dict[str, bytes]]]:
    """n samples as img2dataset writes them: the image, then its JSON and its caption."""

    def make(n: int) -> dict[str, dict[str, bytes]]:
        return {f"{i:09d}": {"jpg": encoded(random_image(i)), "json": b"{}", "txt": b"caption"} for i in range(n)}

    return make


@pytest.fixture
def means(random_image) -> Callable[[Any], np.ndarray]:
    """Seeds of images -> their features, by a plain loop."""

    def loop(seeds: Any) -> np.ndarray:
        return np.array([np.asarray(random_image(int(seed))).mean(axis=(0, 1)) / 255 for seed in seeds])

    return loop


@pytest.fixture
def put(random_image) -> Callable[[Path, int], Image.Image]:
    """Writes an image of noise, and returns it."""

    def save(path: Path, seed: int) -> Image.Image:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = random_image(seed)
        image.save(path, "png")
        return image

    return save
