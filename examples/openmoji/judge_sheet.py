"""Sheets of images from which a person judges names: random latents of verdict `named` with what activates them most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dncbm.cli import main
from dncbm.concepts.naming import NAMED, NAMES, NameTests, read_name_tests
from dncbm.concepts.sae import load_sae
from dncbm.concepts.strengths import encode_in_memory
from dncbm.explain.explanations import top_activating
from dncbm.features.datasets import counted, open_image, to_rgb
from dncbm.features.datasets.sae import sae_images
from dncbm.features.stage import open_features
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SAERun
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import Outcome, write_json
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from sparse_autoencoder.declare import setting
from sparse_autoencoder.files import whole_file

N_TOP, SIDE = 10, 96
"""Images of each latent, and their pixels."""
PER_PAGE = 8
TEXT, GAP, LINE = 290, 8, 21
"""Pixels: width of a latent's texts, space between images, height of a line."""


@dataclass(frozen=True)
class Judged:
    """Which latents are judged."""

    n: int = setting(40, "number of latents", flag="judged", least=1)
    draw: int = setting(0, "seed of the choice", flag="judged_seed", least=0)


@dataclass(frozen=True)
class Tile:
    """A latent on a sheet."""

    lines: tuple[str, ...]
    """The first is the name."""
    images: tuple[Image.Image, ...]
    captions: tuple[str, ...]


def sheet(tiles: Sequence[Tile], path: Path) -> None:
    """Draw latents below one another, their images in a row, into a PNG."""
    font, bold = (
        ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)
        for name, size in (("DejaVuSans.ttf", 14), ("DejaVuSans-Bold.ttf", 17))
    )
    row = SIDE + 2 * LINE
    page = Image.new("RGB", (TEXT + N_TOP * (SIDE + GAP), row * len(tiles)), "white")
    pen = ImageDraw.Draw(page)
    for place, tile in enumerate(tiles):
        top = place * row + GAP
        for number, line in enumerate(tile.lines):
            pen.text((GAP, top + number * LINE), line, fill="black" if number == 0 else "#444", font=font if number else bold)
        for number, (image, caption) in enumerate(zip(tile.images, tile.captions, strict=True)):
            left = TEXT + number * (SIDE + GAP)
            page.paste(image, (left, top))
            pen.text((left + SIDE // 2, top + SIDE + 3), caption, fill="#444", font=font, anchor="ma")
        pen.line((0, top - GAP, page.width, top - GAP), fill="#ccc")
    with whole_file(path) as temporary:
        page.save(temporary, format="PNG")


def train_images(settings: Settings, dataset: str, keys: set[str]) -> dict[str, Image.Image]:
    """The training images of an SAE data set that have these keys, SIDE pixels wide and high."""
    shards = sae_images(settings, dataset)["train"]
    found: dict[str, Image.Image] = {}
    for shard in range(len(shards)):
        for key, load in shards.read(shard, lambda _: None):
            if key in keys:
                found[key] = to_rgb(open_image(load()), "white")[0].resize((SIDE, SIDE))
    return found


def judge_sheets(settings: Settings, run: SAERun, judged: Judged, *, device: str, overwrite: bool) -> Outcome:
    """Draw the sheets, and write the latents in their order with their names into a JSON list beside them.

    Raises UserError if the names are not tested.
    """
    if (tests := read_name_tests(settings, run)) is None:
        raise UserError(f"the names are not tested: run {NAMES.command('--overwrite')}")
    named = np.flatnonzero(np.array(tests.verdicts) == NAMED)
    latents = np.sort(np.random.default_rng(judged.draw).permutation(named)[: judged.n])
    store = open_features(settings, run.dataset, run.encoder, run.hook, "train")
    strengths = encode_in_memory(load_sae(settings, run), store)
    tops = top_activating(strengths, latents, N_TOP)
    images = train_images(settings, run.dataset, {str(store.keys[row]) for rows in tops for row in rows})
    tiles = [
        Tile(
            _lines(tests, latent, int((strengths[:, [latent]] > 0).sum())),
            tuple(images[str(store.keys[row])] for row in rows),
            tuple(f"{strengths[row, latent]:.2f}" for row in rows),
        )
        for latent, rows in zip(latents.tolist(), tops, strict=True)
    ]
    folder = Artifacts(settings).judge_sheets()
    folder.mkdir(parents=True, exist_ok=True)
    pages = [tiles[start : start + PER_PAGE] for start in range(0, len(tiles), PER_PAGE)]
    for number, page in enumerate(pages, 1):
        sheet(page, folder / f"sheet_{number}.png")
    write_json(folder / "latents.json", [{"index": int(latent), "name": tests.names[latent]} for latent in latents.tolist()])
    print(f"{len(tiles)} latents on {len(pages)} sheets: {folder}")
    return Outcome.RAN


def _lines(tests: NameTests, latent: int, n_images: int) -> tuple[str, ...]:
    first, *rest = tests.words[latent]
    half, centred = len(rest) // 2, tests.centred_names[latent]
    return (
        f"{latent}: {first}",
        f"similarity {tests.similarity[latent]:.2f}, q {tests.q[latent]:.2g}",
        f"then {', '.join(rest[:half])},",
        ", ".join(rest[half:]),
        f"active on {counted(n_images, 'image')}",
        *([f"centred: {centred}"] if centred != first else []),
    )


SHEETS = Stage(name="judge_sheets", script="", summary=__doc__ or "", function=judge_sheets, takes=(SAERun, Judged))

if __name__ == "__main__":
    main(SHEETS)
