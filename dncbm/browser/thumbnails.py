"""Thumbnails of the images of a site, on small sheets, since a page shows single images from all over a data set."""

import hashlib
import json
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from dncbm.browser.folder import NEW, THUMBNAILS
from dncbm.browser.shown import Kept
from dncbm.explain.dumps.dump import counted, square
from dncbm.features.datasets import open_image, reason_of, to_rgb
from dncbm.features.datasets.probe import ProbeImages, probe_images
from dncbm.features.stage import PROBE_FEATURES, are_extracted, features_background, images_print
from dncbm.runs.declarations import SAERun
from dncbm.runs.devices import default_cores
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import write_json
from dncbm.runs.settings import Settings
from sparse_autoencoder.files import remove_leftovers, whole_file

COLUMNS, PER_SHEET, PER_FOLDER = 3, 9, 256
"""A page decodes all of a sheet for one of its images: with 4 x 4, a concept of a large site took 1.3 times as long."""
SIDES = ((10_000, 160), (60_000, 96))
"""Up to this many images on the site -> pixels per side of each."""
SMALLEST = 64
"""Pixels per side if there are more."""
QUALITY = 60
"""Of WebP. A photo of 64 pixels then takes about 0.8 kB, one of 96 pixels 1.4 kB, one of 160 pixels 3.4 kB."""
RECORD = "made.json"
"""What the sheets beside it are of."""
GREY = (128, 128, 128)
"""In place of an image that cannot be read."""


@dataclass(frozen=True)
class NoPictures:
    """Why the images of a data set are not shown."""

    why: str
    """In one sentence, for the page."""
    to_do: str
    """What is wrong and what to do, for whoever makes the site."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """The images of a data set as a site shows them: where they are, or the sheets that were made of them."""

    of: dict[str, Any]
    """What tells sheets of these images from others: the images, and `layout`."""
    layout: dict[str, int]
    """Thumbnails of `types.d.ts`."""
    names: list[str]
    """Of the image files, without folders."""
    sheets: dict[int, Path]
    """Those that are there already: in the site, or in the new one of a run that was interrupted."""
    grey: frozenset[int]
    """Those of them with images that could not be read."""
    images: ProbeImages | None
    """None if all sheets are there, and nobody looked."""


def find_pictures(
    settings: Settings, run: SAERun, kept: Kept, split: str, folder: Path, number: int, n_shown: int
) -> Pictures | NoPictures:
    """What a site can show of the images of a data set. They are listed only if it does not have all of their sheets.

    Args:
        settings: the config.
        run: an SAE whose features are of these images.
        kept: the images.
        split: the split of the images.
        folder: folder of the site.
        number: the data set's number in the site.
        n_shown: images of all data sets of the site, which the size follows.

    Raises UserError if the manifest of the features is damaged.
    """
    features = kept.dataset, run.encoder, run.hook, split
    side = next((side for most, side in SIDES if n_shown <= most), SMALLEST)
    layout = {"side": side, "columns": COLUMNS, "per_sheet": PER_SHEET, "per_folder": PER_FOLDER}
    keys = hashlib.sha256(kept.keys.tobytes()).hexdigest()
    of = {"dataset": kept.dataset, "split": split, "images": images_print(settings, *features), "keys": keys} | layout
    names, sheets, grey = list[str](), dict[int, Path](), set[int]()
    for top in _tops(folder, number):
        if (record := _read(top, of)) is not None:
            names = record["names"]
            found = {sheet: path for sheet in range(_n_sheets(kept)) if (path := _place(top, sheet)).is_file()}
            sheets |= found
            grey = grey - found.keys() | set(record["grey"]) & found.keys()
    images = None if len(sheets) == _n_sheets(kept) else own_images(settings, run, kept, split)
    if isinstance(images, NoPictures):
        return images
    if images is not None:
        names = [images.image_name(key).rpartition("/")[2] for key in kept.keys.tolist()]
    return Pictures(of, layout, names, sheets, frozenset(grey), images)


def own_images(settings: Settings, run: SAERun, kept: Kept, split: str) -> ProbeImages | NoPictures:
    """The images of a data set's own split, or why they cannot be shown: they are missing, or not those of the features."""
    dataset, own = kept.dataset, settings.own_split(kept.dataset, split)
    why = f"The images of {dataset} were missing when this site was made."
    try:
        images = probe_images(settings, dataset, own)
    except UserError as error:
        return NoPictures(why, str(error))
    if images.sizes is not None and (images.sizes < 0).all():
        where = f"probe_datasets[{dataset!r}] in {settings.path} names the folder"
        return NoPictures(why, f"{images.root} has none of them; {where}")
    if are_extracted(settings, images, dataset, run.encoder, run.hook, split) and int(kept.keys.max()) < len(images.labels):
        return images
    again = PROBE_FEATURES.command("--probe_dataset", dataset, "--overwrite")
    return NoPictures(
        f"The images of {dataset} have changed since the features were extracted.",
        f"put those of the {own} split back, or run {again} and the stages after it",
    )


def write_thumbnails(
    settings: Settings, run: SAERun, kept: Kept, split: str, folder: Path, number: int, pictures: Pictures
) -> list[Path]:
    """Write the sheets of a data set that a site lacks to its new folder, `thumbnails/<number>/<folder>/<sheet>.webp`, so that
    an interrupted run resumes. Those with images that could not be read are tried again.

    An image that cannot be read is grey and counted in a warning. Arguments are those of `find_pictures`, which returns
    `pictures`.

    Returns:
        The files of the site that stay as they are, if it shows the same images.

    Raises OSError if a sheet cannot be written.
    """
    (here, new), found = _tops(folder, number), pictures.images
    if found is None and pictures.grey:
        again = own_images(settings, run, kept, split)
        found = None if isinstance(again, NoPictures) else again
    if _read(new, pictures.of) is None:
        shutil.rmtree(new, ignore_errors=True)
    todo = [sheet for sheet in range(_n_sheets(kept)) if sheet not in pictures.sheets or sheet in pictures.grey]
    if found is not None and todo:
        background = features_background(settings, kept.dataset, run.encoder, run.hook, split)
        _make_sheets(found, kept, background, new, pictures, todo)
    if _read(here, pictures.of) is None:
        return []
    return [here / RECORD, *(path for path in pictures.sheets.values() if path.is_relative_to(here))]


def _make_sheets(
    images: ProbeImages, kept: Kept, background: str, top: Path, pictures: Pictures, todo: Sequence[int]
) -> None:  # fmt: skip
    """Write some sheets, each in one thread, and the record of all. Warns if images cannot be read."""

    def record(grey: Collection[int]) -> None:
        write_json(top / RECORD, {"of": pictures.of, "names": pictures.names, "grey": sorted(grey)})

    def make(sheet: int, *, even_grey: bool = False) -> list[str]:
        picture, problems = _sheet(images, kept, background, pictures.layout["side"], sheet)
        if even_grey or not problems:
            with whole_file(_place(top, sheet)) as temporary:
                picture.save(temporary, "WEBP", quality=QUALITY)
        return problems

    record(pictures.grey)  # before the sheets, so that those of an interrupted run count
    for parent in {_place(top, sheet).parent for sheet in todo}:
        remove_leftovers(parent)
    problems, n = dict[int, list[str]](), _n_sheets(kept)
    with (
        tqdm(desc=f"thumbnails of {kept.dataset}", total=n, initial=n - len(todo), unit="sheet") as bar,
        ThreadPoolExecutor(default_cores()) as pool,
    ):
        try:
            for sheet, of_sheet in zip(todo, pool.map(make, todo), strict=True):
                bar.update()
                problems |= {sheet: of_sheet} if of_sheet else {}
            record(problems)  # before these sheets, or an interrupted run would count them as whole
            list(pool.map(partial(make, even_grey=True), problems))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # otherwise leaving the block waits for all remaining sheets
            raise
    if reasons := [reason for of_sheet in problems.values() for reason in of_sheet]:
        logging.getLogger(__name__).warning(
            f"{len(reasons)} of {counted(len(kept.keys), 'images')} of the {pictures.of['split']} split of {kept.dataset} "
            f"cannot be read ({reasons[0]}) and are grey in the browser"
        )


def _sheet(images: ProbeImages, kept: Kept, background: str, side: int, sheet: int) -> tuple[Image.Image, list[str]]:
    """A sheet, and for each of its images that cannot be read why."""
    picture, problems = Image.new("RGB", (COLUMNS * side, PER_SHEET // COLUMNS * side), GREY), list[str]()
    for place, index in enumerate(kept.keys[sheet * PER_SHEET : (sheet + 1) * PER_SHEET].tolist()):
        try:
            tile = _tile(images, index, background, side)
        except Exception as error:  # decoders raise anything
            problems.append(reason_of(error))
        else:
            picture.paste(tile, (place % COLUMNS * side, place // COLUMNS * side))
    return picture, problems


def _tile(images: ProbeImages, index: int, background: str, side: int) -> Image.Image:
    image = open_image(images.source(index))
    image.draft(None, (2 * side, 2 * side))  # a large JPEG is decoded at a fraction of its size
    tile = square(to_rgb(image, background)[0], side)
    return tile if tile.width == side else tile.resize((side, side), Image.Resampling.LANCZOS)


def _tops(folder: Path, number: int) -> tuple[Path, Path]:
    """Where the sheets of a data set are: in the site, and in the one that is being made."""
    return folder / THUMBNAILS / str(number), folder / NEW / THUMBNAILS / str(number)


def _place(top: Path, sheet: int) -> Path:
    return top / str(sheet // PER_FOLDER) / f"{sheet}.webp"


def _n_sheets(kept: Kept) -> int:
    return -(-len(kept.keys) // PER_SHEET)


def _read(top: Path, of: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of the sheets in a folder; None if they are of other images, or there is none."""
    try:
        found: dict[str, Any] = json.loads((top / RECORD).read_text(encoding="utf-8"))
        is_theirs = found["of"] == of and {type(found[part]) for part in ("names", "grey")} == {list}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if is_theirs else None
