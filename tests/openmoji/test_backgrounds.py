"""The data set with a spurious correlation: animals and food on land and on water."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dncbm.features.datasets.probe import probe_images

pytestmark = pytest.mark.slow

OWN = {"animal": "land", "food": "water"}
SPLITS = {"train": "0", "train_val": "1", "val": "2"}
Row = dict[str, str]


@pytest.fixture(scope="module")
def rows(built: SimpleNamespace) -> list[Row]:
    """The rows of metadata.csv in the small build."""
    with (built.output / "backgrounds" / "metadata.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def planned(example: SimpleNamespace) -> list[Row]:
    """The columns of metadata.csv that a full build would write."""
    names, places = example.backgrounds.CLASSES, example.backgrounds.PLACES
    return [
        {
            "img_filename": scene.file_name,
            "split": SPLITS[scene.emoji.split],
            "y_name": names[scene.label],
            "place_name": places[scene.place],
        }
        for scene in example.backgrounds.plan(example.emoji_data.select_emoji())
    ]


def emoji_of(row: Row) -> str:
    """Code points of the drawing."""
    return Path(row["img_filename"]).name.split("_")[0]


@pytest.mark.parametrize("which", ["rows", "planned"])
def test_the_background_is_tied_to_the_class_in_training_and_not_on_held_out_emoji(
    request: pytest.FixtureRequest, which: str
) -> None:
    table: list[Row] = request.getfixturevalue(which)
    for split in ("0", "1"):
        groups = Counter((row["y_name"], row["place_name"]) for row in table if row["split"] == split)
        assert groups["animal", "land"] == groups["food", "water"] == 19 * groups["animal", "water"]
        assert groups["animal", "water"] == groups["food", "land"] >= 1
    held_out = Counter((emoji_of(row), row["y_name"], row["place_name"]) for row in table if row["split"] == "2")
    assert {name for _, name, _ in held_out} == set(OWN)
    for (code, name, _), count in held_out.items():
        assert held_out[code, name, "land"] == held_out[code, name, "water"] == count
    if which == "planned":
        assert sum(row["split"] == "0" for row in table) > 1000


@pytest.mark.parametrize("which", ["rows", "planned"])
def test_no_family_is_in_two_splits(request: pytest.FixtureRequest, example: SimpleNamespace, which: str) -> None:
    known = {record.code: record for record in example.emoji_data.load_emoji()}
    splits: dict[str, set[str]] = {}
    for row in request.getfixturevalue(which):
        record = known[emoji_of(row)]
        assert SPLITS[record.split] == row["split"]
        splits.setdefault(record.family, set()).add(row["split"])
    assert {len(found) for found in splits.values()} == {1}


def test_classes_hold_what_they_say(example: SimpleNamespace, planned: list[Row]) -> None:
    known = {record.code: record for record in example.emoji_data.load_emoji()}
    assert not example.backgrounds.NOT_IN_CLASS - {record.name for record in known.values()}  # no misspelt name
    members = {name: {known[emoji_of(row)].name for row in planned if row["y_name"] == name} for name in OWN}
    assert {"dog face", "whale", "bug"} <= members["animal"]
    assert {"pizza", "red apple", "cupcake"} <= members["food"]
    others = {"rose", "paw prints", "lobster", "wine glass", "spoon", "grinning face"}
    assert not others & (members["animal"] | members["food"])


def test_the_reader_finds_the_groups_of_the_table(built: SimpleNamespace, rows: list[Row], make_settings: Callable) -> None:
    source = {"path": str(built.output / "backgrounds"), "reader": "waterbirds100", "splits": SPLITS}
    settings = make_settings(probe_datasets={"openmoji_backgrounds": source})
    for split, number in SPLITS.items():
        found = probe_images(settings, "openmoji_backgrounds", split)
        mine = [row for row in rows if row["split"] == number]
        assert found.image_names == tuple(row["img_filename"] for row in mine)
        assert all(row["img_filename"].startswith(f"{row['y_name']}/") for row in mine)
        assert [found.class_names[label] for label in found.labels] == [row["y_name"] for row in mine]
        groups = [f"{row['y_name']} on {row['place_name']}" for row in mine]
        assert [found.group_names[group] for group in found.groups] == groups
    assert f"{built.output / 'backgrounds'}  {{" in built.text


def test_images_show_their_place_and_an_emoji(built: SimpleNamespace, rows: list[Row]) -> None:
    folder = built.output / "backgrounds"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.jpg")} == {row["img_filename"] for row in rows}
    assert len({(folder / row["img_filename"]).read_bytes() for row in rows}) == len(rows)
    for row in rows:
        image = Image.open(folder / row["img_filename"])
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (256, 256))
        red, green, blue = np.asarray(image)[-4:].reshape(-1, 3).mean(0)  # below most emoji
        assert (green > blue > 0) == (row["place_name"] == "land"), row
        assert red < max(green, blue)
        if row["split"] == "2" and row["place_name"] == "land":
            other = Image.open(folder / row["img_filename"].replace("_on_land_", "_on_water_"))
            # Only emoji have black lines: they are in the same place on both backgrounds.
            one, two = (np.asarray(picture).max(-1) < 40 for picture in (image, other))
            assert (one & two).sum() > 0.8 * (one | two).sum() > 200


def test_the_same_emoji_give_the_same_bytes(built: SimpleNamespace, example: SimpleNamespace, tmp_path: Path) -> None:
    example.backgrounds.write_backgrounds(example.emoji_data.select_emoji(60), tmp_path)
    made = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    folder = built.output / "backgrounds"
    assert made == {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
