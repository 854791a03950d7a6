"""What the example draws of what it found."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image


def test_a_sheet_of_concepts_is_in_order(example: SimpleNamespace, tmp_path: Path) -> None:
    """Tiles from left to right, then down; in each the images from left to right."""
    wanted = [
        [(5 * number, 250 - 3 * number, 97 * number % 256) for number in range(10 * tile, 10 * tile + n)]
        for tile, n in enumerate((3, 3, 2, 3, 1))
    ]
    images = [[Image.new("RGB", (20, 20), one) for one in tile] for tile in wanted]
    example.summarise.concept_sheet([f"concept {i}" for i in range(5)], images, tmp_path / "sheet.png", columns=4)
    with Image.open(tmp_path / "sheet.png") as sheet:
        shown = np.asarray(sheet.convert("RGB")).astype(int)
    tile_height, tile_width = shown.shape[0] / 2, shown.shape[1] / 4
    for tile, members in enumerate(wanted):
        top, left = int(tile // 4 * tile_height), int(tile % 4 * tile_width)
        part = shown[top : top + int(tile_height), left : left + int(tile_width)]
        middles = []
        for one in members:
            columns = np.nonzero((np.abs(part - one).max(axis=2) < 3).any(axis=0))[0]
            assert len(columns) > 20, (tile, one)
            middles.append(columns.mean())
        assert middles == sorted(middles), tile
