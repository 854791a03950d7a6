"""Sheets of thumbnails against PIL by hand, and what is made again when."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from dncbm.browser import thumbnails
from dncbm.browser.folder import NEW, put_in_place
from dncbm.browser.shown import Kept
from dncbm.browser.thumbnails import NoPictures, Pictures, find_pictures, write_thumbnails
from dncbm.features.datasets.probe import ProbeShards, probe_images
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SAERun
from dncbm.runs.manifests import making, manifest_path
from dncbm.runs.settings import Settings

RUN = SAERun()
N = 45
SIZES = ((500, 375), (375, 500), (1600, 900), (161, 160), (40, 30), (64, 64))
LARGE, MEDIUM = 60_001, 60_000
"""Images on a site with tiles of 64 and of 96 pixels."""


def sheets_in(site: Path) -> list[Path]:
    """Every file of the data set but the record, hidden ones too."""
    found = (path for path in (site / "thumbnails/3").rglob("*") if path.is_file())
    return sorted((path for path in found if path.name != "made.json"), key=lambda path: int(path.stem))


@dataclass(frozen=True)
class Photos:
    """A data set of N images, of which every second is kept, and the site."""

    settings: Settings
    root: Path
    kept: Kept
    site: Path

    def find(self, n_shown: int = LARGE) -> Pictures | NoPictures:
        return find_pictures(self.settings, RUN, self.kept, "val", self.site, 3, n_shown)

    def write(self, n_shown: int = LARGE) -> dict[str, int] | NoPictures:
        """As a site does that shows nothing else."""
        found, stay = self.find(n_shown), list[Path]()
        if isinstance(found, Pictures):
            stay = write_thumbnails(self.settings, RUN, self.kept, "val", self.site, 3, found)
        (self.site / NEW).mkdir(parents=True, exist_ok=True)
        put_in_place(self.site, stay)
        return found.layout if isinstance(found, Pictures) else found

    def save_features(self, **settings: Any) -> None:
        """Features as if they had just been extracted; nothing reads more than the manifest."""
        images = probe_images(self.settings, "photos", "val")
        inputs = {"val images of photos": ProbeShards(images, np.arange(len(images.labels))).fingerprint()}
        folder = Artifacts(self.settings).features("photos", RUN.encoder, RUN.hook, "val")
        manifest_path(folder).unlink(missing_ok=True)
        with making(folder, "tests", settings, inputs, overwrite=True) as work:
            (folder / "0.npz").write_bytes(b"")
            work.done([folder / "0.npz"])

    def remove_features(self) -> None:
        shutil.rmtree(Artifacts(self.settings).features("photos", RUN.encoder, RUN.hook, "val"))

    def path(self, index: int) -> Path:
        return next((self.root / "val").glob(f"*/{index:03d}.*"))

    def whole(self) -> list[bytes]:
        """The sheets of a site that is made at once, while all images can be read."""
        apart = replace(self, site=self.site.with_name("apart"))
        apart.write()
        return [path.read_bytes() for path in apart.sheets]

    @property
    def sheets(self) -> list[Path]:
        return sheets_in(self.site)

    def tiles(self, side: int) -> np.ndarray:
        """The tiles of the kept images, n x side x side x 3."""
        found = []
        for path in self.sheets:
            pixels = np.asarray(Image.open(path).convert("RGB"))
            assert pixels.shape == (3 * side, 3 * side, 3)
            found += [pixels[y : y + side, x : x + side] for y in range(0, 3 * side, side) for x in range(0, 3 * side, side)]
        return np.stack(found[: len(self.kept.keys)]).astype(float)


@pytest.fixture
def photos(make_settings: Callable[..., Settings], tmp_path: Path) -> Photos:
    root = tmp_path / "photos"
    for index in range(N):
        pixels = np.random.default_rng(index).integers(0, 256, (2, 2, 4), dtype=np.uint8)
        is_clear = index % 6 == 0  # PNGs with a transparent half
        if is_clear:
            pixels[:, 0, 3], pixels[:, 1, 3] = 0, 255
        image = Image.fromarray(pixels).resize(SIZES[index % len(SIZES)], Image.Resampling.BILINEAR)
        path = root / "val" / ("b" if index >= N // 2 else "a") / f"{index:03d}.{'png' if is_clear else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path) if is_clear else image.convert("RGB").save(path, quality=90)
    for name in "ab":
        (root / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / "train" / name / "0.png")
    settings = make_settings(probe_datasets={"photos": "photos", "others": "photos"})
    keys = np.arange(0, N, 2)
    kept = Kept("photos", keys, N, np.zeros(len(keys), np.int64), ("a", "b"), None, ())
    found = Photos(settings, root, kept, tmp_path / "site")
    found.save_features()
    return found


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every image that is opened."""
    opened: list[int] = []
    real = thumbnails.open_image
    monkeypatch.setattr(thumbnails, "open_image", lambda content: (opened.append(1), real(content))[1])
    return opened


@pytest.mark.parametrize(("n_shown", "side"), [(10_000, 160), (10_001, 96), (60_000, 96), (60_001, 64)])
@pytest.mark.parametrize("background", ["none", "white"])
def test_tiles_are_the_centres_of_the_images(
    photos: Photos, monkeypatch: pytest.MonkeyPatch, n_shown: int, side: int, background: str
) -> None:
    monkeypatch.setattr(thumbnails, "QUALITY", 100)  # so that what differs is where the pixels are from
    photos.save_features(background=background)
    assert photos.write(n_shown) == {"side": side, "columns": 3, "per_sheet": 9, "per_folder": 256}
    expected = []
    for key in photos.kept.keys:
        image = Image.open(photos.path(key))
        if background == "white" and image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        expected.append(np.asarray(ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)))
    differences = np.abs(photos.tiles(side)[:, None] - np.stack(expected)).mean(axis=(2, 3, 4))
    print("MAX", differences.diagonal().max())
    assert differences.diagonal().max() < 2.5
    np.testing.assert_array_equal(differences.argmin(axis=1), np.arange(len(expected)))


def test_sheets_are_divided_among_folders(photos: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thumbnails, "PER_FOLDER", 2)
    whole = replace(photos, kept=replace(photos.kept, keys=np.arange(N)))
    assert whole.write() == {"side": 64, "columns": 3, "per_sheet": 9, "per_folder": 2}
    top = photos.site / "thumbnails/3"
    assert whole.sheets == [top / f"{sheet // 2}/{sheet}.webp" for sheet in range(5)]


def test_sheets_of_the_same_images_are_kept(photos: Photos, read: list[int], caplog: pytest.LogCaptureFixture) -> None:
    layout, n = photos.write(), len(photos.kept.keys)
    assert len(read) == n
    assert photos.write() == layout
    assert len(read) == n
    photos.sheets[1].unlink()
    photos.write()
    assert len(read) == n + 9
    shutil.rmtree(photos.root)  # whole sheets need no images
    assert photos.write() == layout
    assert not caplog.records
    found = photos.find()
    assert isinstance(found, Pictures)
    assert found.names == [f"{key:03d}.{'png' if key % 6 == 0 else 'jpg'}" for key in photos.kept.keys]


@pytest.mark.parametrize("change", ["side", "keys", "images", "background", "data set", "record"])
def test_sheets_of_others_are_made_again(photos: Photos, read: list[int], change: str) -> None:
    photos.write()
    now, n_shown = photos, LARGE
    if change == "side":
        n_shown = MEDIUM
    elif change == "keys":
        now = replace(photos, kept=replace(photos.kept, keys=np.arange(1, 17)))
    elif change == "images":
        Image.new("RGB", (50, 50), "red").save(photos.path(2))
        photos.save_features()
    elif change == "background":
        photos.save_features(background="black")
    elif change == "data set":  # without manifests, nothing else tells them apart
        photos.remove_features()
        photos.write()
        now = replace(photos, kept=replace(photos.kept, dataset="others"))
    else:
        (photos.site / "thumbnails/3/made.json").write_text("{")
    read.clear()
    assert isinstance(now.write(n_shown), dict)
    assert len(read) == len(now.kept.keys)
    assert len(now.sheets) == -(-len(now.kept.keys) // 9)
    if change == "images":
        assert np.abs(photos.tiles(64)[1] - [255, 0, 0]).mean() < 6


def test_an_interrupted_run_resumes(photos: Photos, read: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The earlier sheets stay meanwhile, and one with an image that cannot be read counts only when that is recorded."""
    photos.write()
    first = {path: path.read_bytes() for path in photos.sheets}
    photos = replace(photos, kept=replace(photos.kept, keys=np.arange(N)))
    photos.path(2).write_bytes(b"no image")
    photos.save_features()
    read.clear()
    with monkeypatch.context() as during:
        during.setattr(thumbnails, "default_cores", lambda: 1)
        real = thumbnails.square

        def stopped(image: Image.Image, side: int) -> Image.Image:
            if len(read) >= 29:
                raise KeyboardInterrupt
            return real(image, side)

        during.setattr(thumbnails, "square", stopped)
        with pytest.raises(KeyboardInterrupt):
            photos.write()
    assert [path.name for path in sheets_in(photos.site / NEW)] == ["1.webp", "2.webp"]
    assert {path: path.read_bytes() for path in photos.sheets} == first
    read.clear()
    photos.write()
    assert len(read) == N - 18 + 9  # the sheet with the grey image twice
    assert len(photos.sheets) == 5
    assert json.loads((photos.site / "thumbnails/3/made.json").read_text())["grey"] == [0]


@pytest.mark.parametrize("when", ["nothing", "record", "sheet"])
def test_no_interruption_makes_a_grey_sheet_count_as_whole(
    photos: Photos, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:  # fmt: skip
    """Interrupted before the record of the grey sheets, after the first of them, or once all is there."""
    photos.remove_features()  # published ones are of any images
    whole = photos.whole()
    content = {index: photos.path(index).read_bytes() for index in (2, 20)}
    for index in content:
        photos.path(index).write_bytes(b"no image")
    records, record, place = list[Path](), thumbnails.write_json, thumbnails._place

    def stopped(path: Path, value: Any) -> None:
        records.append(path)
        if when == "record" and len(records) == 2:
            raise KeyboardInterrupt
        record(path, value)

    def gone(top: Path, sheet: int) -> Path:
        if when == "sheet" and sheet == 1 and sheets_in(photos.site / NEW)[:1] == [place(top, 0)]:
            raise KeyboardInterrupt
        return place(top, sheet)

    found = photos.find()
    assert isinstance(found, Pictures)
    with monkeypatch.context() as during:
        during.setattr(thumbnails, "default_cores", lambda: 1)
        during.setattr(thumbnails, "write_json", stopped)
        during.setattr(thumbnails, "_place", gone)
        with nullcontext() if when == "nothing" else pytest.raises(KeyboardInterrupt):
            write_thumbnails(photos.settings, RUN, photos.kept, "val", photos.site, 3, found)
    for index in content:
        photos.path(index).write_bytes(content[index])
    photos.write()
    assert [path.read_bytes() for path in photos.sheets] == whole


def test_a_sheet_that_an_interrupted_run_has_made_whole_is_not_tried_again(photos: Photos, read: list[int]) -> None:
    photos.remove_features()
    content, whole = photos.path(20).read_bytes(), photos.whole()
    photos.path(20).write_bytes(b"no image")
    photos.write()
    photos.path(20).write_bytes(content)
    found = photos.find()
    assert isinstance(found, Pictures)
    assert found.grey == {1}
    write_thumbnails(photos.settings, RUN, photos.kept, "val", photos.site, 3, found)  # not put in its place
    found = photos.find()
    assert isinstance(found, Pictures)
    assert found.grey == set()
    read.clear()
    photos.write()
    assert read == []
    assert [path.read_bytes() for path in photos.sheets] == whole


def test_images_that_cannot_be_read_are_grey(photos: Photos, caplog: pytest.LogCaptureFixture) -> None:
    photos.path(2).write_bytes(b"no image")
    cut = photos.path(10)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    photos.path(5).write_bytes(b"")  # not kept
    photos.save_features()
    photos.write()
    assert [record.getMessage()[:30] for record in caplog.records] == [
        f"2 of {len(photos.kept.keys)} images of the val split"[:30]
    ]
    is_grey = np.abs(photos.tiles(64) - 128).mean(axis=(1, 2, 3)) < 3
    np.testing.assert_array_equal(photos.kept.keys[is_grey], [2, 10])


def test_images_that_could_not_be_read_are_tried_again(
    photos: Photos, read: list[int], caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    photos.remove_features()  # published ones are of any images
    whole = photos.whole()
    content = photos.path(20).read_bytes()
    photos.path(20).write_bytes(b"no image")
    photos.write()
    away = photos.root.rename(photos.root.with_name("away"))
    layout = photos.write()  # a grey tile is better than none
    away.rename(photos.root)
    read.clear()
    assert photos.write() == layout
    assert len(read) == 2 * 9
    photos.path(20).write_bytes(content)
    read.clear()
    photos.write()
    assert len(read) == 9
    assert [path.read_bytes() for path in photos.sheets] == whole
    photos.write()
    assert len(read) == 9


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("folder", "The images of photos were missing when this site was made."),
        ("files", "The images of photos were missing when this site was made."),
        ("split", "The images of photos were missing when this site was made."),
        ("more", "The images of photos have changed since the features were extracted."),
        ("fewer", "The images of photos have changed since the features were extracted."),
    ],
)
def test_without_the_images_there_is_a_reason(
    photos: Photos, monkeypatch: pytest.MonkeyPatch, case: str, expected: str
) -> None:  # fmt: skip
    photos.write(MEDIUM)
    if case in ("folder", "split"):
        shutil.rmtree(photos.root / ("val" if case == "split" else ""))
    elif case == "files":  # a table lists them
        images = probe_images(photos.settings, "photos", "val")
        gone = replace(images, sizes=np.full(N, -1))
        monkeypatch.setattr(thumbnails, "probe_images", lambda *_: gone)
        photos.remove_features()
    elif case == "more":
        shutil.copy(photos.path(1), photos.root / "val" / "a" / "more.jpg")
    elif case == "fewer":  # of published features, which have no manifest
        photos.remove_features()
        photos.path(N - 1).unlink()
    found = photos.write()
    assert isinstance(found, NoPictures)
    assert found.why == expected
    assert "\n" not in found.to_do
    assert ("put" if "changed" in expected else "config.py") in found.to_do
    assert not photos.sheets


def test_published_features_are_taken_to_be_of_the_images(photos: Photos, caplog: pytest.LogCaptureFixture) -> None:
    photos.remove_features()
    assert isinstance(photos.write(), dict)
    assert len(photos.sheets) == 3
    assert not caplog.records
