"""What the example draws of what it found."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
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


def test_the_sae_is_shown_on_held_out_images_first(example: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"train_val": {"l0": 13.39, "explained_variance": 0.501, "dead_fraction": 0.141}}
    figures["train"] = {"l0": 4.96, "explained_variance": None, "dead_fraction": 0.0547}
    probe = dict.fromkeys(("concepts_top1", "features_top1", "zero_shot_top1", "majority_top1"), 0.5)
    nec = {on: {5: 0.5} for on in ("concepts", "features", "random")}
    rest = {"encoder": dict.fromkeys(("retrieval_r1", "retrieval_r5", "retrieval_r10"), 0.1), "names": [], "seconds": {}}
    example.summarise.print_summary({"sae": figures, "probe": probe, "nec": nec, **rest})
    assert capsys.readouterr().out.splitlines()[1:3] == [
        "SAE      on train_val: L0 13.4, explained variance 0.50, 14.1% of latents dead",
        "         on train:     L0 5.0, explained variance undefined, 5.5% of latents dead",
    ]
