"""Thumbnails of the images of a site, on small sheets, since a page shows single images from all over a data set."""

import hashlib
import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

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
"""A page decodes all of a sheet for one of its images: 4 x 4 took twice the time and memory, and 2 x 2 twice the files."""
SIDES = ((10_000, 160), (60_000, 96))
"""Up to this many images on the site -> pixels per side of each."""
SMALLEST = 64
"""Pixels per side if there are more."""
QUALITY = 60
"""Of WebP. A photo of 64 pixels then takes about 0.8 kB, one of 96 pixels 1.4 kB, one of 160 pixels 3.4 kB."""
GREY = (128, 128, 128)
"""In place of an image that cannot be read."""


def write_thumbnails(
    settings: Settings, run: SAERun, kept: Kept, split: str, folder: Path, number: int, n_shown: int
) -> dict[str, int] | str:
    """Write the sheets of a data set, `thumbnails/<number>/<folder>/<sheet>.webp`. Sheets of the same images are kept, so that
    an interrupted run resumes; sheets of others are removed.

    Args:
        settings: the config.
        run: an SAE whose features are of these images.
        kept: the images.
        split: the split of the images.
        folder: folder of the site.
        number: the data set's number in the site.
        n_shown: images of all data sets of the site, which the size follows.

    Returns:
        Thumbnails of `types.d.ts`; or in one sentence why there are none, which is logged, too. An image that cannot be read
        is grey and counted in a warning.

    Raises UserError if the manifest of the features is damaged, OSError if a sheet cannot be written.
    """
    top, n, features = folder / "thumbnails" / str(number), len(kept.keys), (kept.dataset, run.encoder, run.hook, split)
    side = next((side for most, side in SIDES if n_shown <= most), SMALLEST)
    layout = {"side": side, "columns": COLUMNS, "per_sheet": PER_SHEET, "per_folder": PER_FOLDER}
    keys = hashlib.sha256(kept.keys.tobytes()).hexdigest()
    images = {"dataset": kept.dataset, "split": split, "images": images_print(settings, *features), "keys": keys}
    record, made = top / "made.json", images | layout
    if _read(record) != made:
        for path in top.glob("*/*.webp"):
            path.unlink()
    sheets = [top / str(sheet // PER_FOLDER) / f"{sheet}.webp" for sheet in range(-(-n // PER_SHEET))]
    missing = [sheet for sheet, path in enumerate(sheets) if not path.is_file()]
    if not missing:
        return layout
    found = _images(settings, kept, features)
    if isinstance(found, str):
        return found
    write_json(record, made)  # before the sheets, so that those of an interrupted run count
    for parent in {sheets[sheet].parent for sheet in missing}:
        remove_leftovers(parent)
    background = features_background(settings, *features)
    problems = _make_sheets(found, kept, background, side, {sheet: sheets[sheet] for sheet in missing})
    if problems:
        logging.getLogger(__name__).warning(
            f"{len(problems)} of {counted(n, 'images')} of the {split} split of {kept.dataset} cannot be read "
            f"({problems[0]}) and are grey in the browser"
        )
    return layout


def _make_sheets(images: ProbeImages, kept: Kept, background: str, side: int, sheets: Mapping[int, Path]) -> list[str]:
    """Write some sheets, each in one thread. Returns why an image cannot be read, for each that cannot."""
    n, problems = len(kept.keys), list[str]()

    def make(sheet: int) -> int:
        picture = Image.new("RGB", (COLUMNS * side, PER_SHEET // COLUMNS * side), GREY)
        indices = kept.keys[sheet * PER_SHEET : (sheet + 1) * PER_SHEET].tolist()
        for place, index in enumerate(indices):
            try:
                tile = _tile(images, index, background, side)
            except Exception as error:  # decoders raise anything
                problems.append(reason_of(error))
            else:
                picture.paste(tile, (place % COLUMNS * side, place // COLUMNS * side))
        with whole_file(sheets[sheet]) as temporary:
            picture.save(temporary, "WEBP", quality=QUALITY)
        return len(indices)

    there = n - sum(min(PER_SHEET, n - sheet * PER_SHEET) for sheet in sheets)
    with (
        tqdm(desc=f"thumbnails of {kept.dataset}", total=n, initial=there, unit="image") as bar,
        ThreadPoolExecutor(default_cores()) as pool,
    ):
        try:
            for done in pool.map(make, sheets):
                bar.update(done)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # otherwise leaving the block waits for all remaining sheets
            raise
    return problems


def _tile(images: ProbeImages, index: int, background: str, side: int) -> Image.Image:
    image = open_image(images.source(index))
    image.draft(None, (2 * side, 2 * side))  # a large JPEG is decoded at a fraction of its size
    tile = square(to_rgb(image, background)[0], side)
    return tile if tile.width == side else tile.resize((side, side), Image.Resampling.LANCZOS)


def _images(settings: Settings, kept: Kept, features: tuple[str, str, str, str]) -> ProbeImages | str:
    """The images of a data set's own split, or in one sentence why they are not shown, which is logged."""
    dataset, split = kept.dataset, settings.own_split(kept.dataset, features[-1])
    reason = f"The images of {dataset} were missing when this site was made."
    try:
        images = probe_images(settings, dataset, split)
        if images.sizes is not None and (images.sizes < 0).all():
            raise UserError(f"{images.root} has none of them; probe_datasets[{dataset!r}] in {settings.path} names the folder")
        if not are_extracted(settings, images, *features) or int(kept.keys.max()) >= len(images.labels):
            reason = f"The images of {dataset} have changed since the features were extracted."
            again = PROBE_FEATURES.command("--probe_dataset", dataset, "--overwrite")
            raise UserError(f"put those of the {split} split back, or run {again} and the stages after it")
    except UserError as error:
        logging.getLogger(__name__).warning(f"no thumbnails: {reason.removesuffix('.')}: {error}")
        return reason
    return images


def _read(record: Path) -> Any:
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
