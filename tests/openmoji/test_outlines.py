"""The second probe data set: the same emoji as black lines."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

pytestmark = pytest.mark.slow

DRAWING = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">
  <g id="color"><rect x="0" y="0" width="72" height="72" fill="#d22f27"/></g>
  <g id="hair"><path d="M1 1h9v9z" fill="#a57939"/></g>
  <g id="skin"><path d="M2 2h9v9z" fill="#fcea2b"/></g>
  <g id="skin-shadow"><path d="M3 3h9v9z" fill="#f1b31c"/></g>
  <g id="color-foreground"><path d="M4 4h9v9z" fill="#3f3f3f"/></g>
  <g id="line" stroke="#000"><g id="color"><path d="M5 36h60"/></g></g>
  <g id="line-supplement" transform="scale(2)"><path d="M6 6h9v9z"/></g>
  <g id="line-2"><path d="M7 7h9v9z"/></g>
</svg>"""


def images_below(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*.jpg")}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_outline_removes_the_colour_groups_at_the_top_and_nothing_else(example: SimpleNamespace) -> None:
    lines = [text for text in DRAWING.splitlines() if not text.startswith('  <g id="') or text.startswith('  <g id="line')]
    # Canonical, since the writer is free in quotes and white space.
    canonical = example.images.ElementTree.canonicalize
    assert canonical(example.images.outline(DRAWING), strip_text=True) == canonical("\n".join(lines), strip_text=True)


def test_an_outline_is_drawn(example: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "lines.jpg").write_bytes(example.images.render(example.images.outline(DRAWING)))
    drawn = pixels(tmp_path / "lines.jpg")
    assert drawn[200:, :].min() > 250  # red in the drawing
    assert drawn[120:136, 100].min() < 50  # the line across the middle


def test_a_drawing_without_lines_has_no_outline(example: SimpleNamespace) -> None:
    colour = '<g id="color"><path d="M1 1h9v9z"/></g>'
    assert example.images.outline(f'<svg xmlns="http://www.w3.org/2000/svg">{colour}<g id="line"/></svg>') == ""
    records = example.emoji_data.select_emoji()
    kept = set(example.images.outlined(records))
    left_out = [record for record in records if record not in kept and record.category != "flags"]
    assert [record.name for record in left_out] == ["new button"]
    assert "flags" not in {record.category for record in kept}


def test_a_category_that_gets_too_thin_is_left_out(example: SimpleNamespace) -> None:
    symbols = [record for record in example.emoji_data.select_emoji() if record.category == "symbols"]
    held_out = [record for record in symbols if record.split == "val"][:2]
    new_button = next(record for record in symbols if record.name == "new button")
    others = [record for record in symbols if record.split == "train" and record is not new_button][:2]
    assert example.images.outlined([*held_out, others[0], new_button]) == []
    assert example.images.outlined([*held_out, *others, new_button]) == [*held_out, *others]


def test_outlines_are_those_of_every_emoji_but_flags_in_the_same_places(built: SimpleNamespace) -> None:
    outlines = images_below(built.output / "outlines")
    coloured = images_below(built.output / "categories")
    assert outlines == {path for path in coloured if path.parts[1] != "flags" and path.stem != "1F195_new_button"}
    assert {path.parts[0] for path in outlines} == {"train", "val"}
    assert f"{built.output / 'outlines'}  {{" in built.text


def test_outlines_are_an_image_folder_with_the_same_classes_on_both_sides(built: SimpleNamespace) -> None:
    train, val = (ImageFolder(str(built.output / "outlines" / side)) for side in ("train", "val"))
    assert train.classes == val.classes
    assert len(train.classes) == 8
    assert min(side.targets.count(target) for side in (train, val) for target in range(8)) >= 2


def test_outlines_have_lines_and_no_colour(built: SimpleNamespace) -> None:
    same = 0
    outlines = images_below(built.output / "outlines")
    for path in outlines:
        lines, coloured = pixels(built.output / "outlines" / path), pixels(built.output / "categories" / path)
        assert lines.shape == coloured.shape == (256, 256, 3)
        assert np.ptp(lines, axis=2).max() <= 8
        assert lines.min() < 50
        assert lines[0, 0].min() > 250  # on white
        same += bool((lines == coloured).all())
    assert same < 0.1 * len(outlines)  # a snowflake has no colour to lose
