"""Some latents of a run with the images that activate them most: the best named, the worst, and others at random."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dncbm.concepts.strengths import load_concept_strengths
from dncbm.explain.explanations import top_activating
from dncbm.explain.report.findings import Names
from dncbm.features.datasets.probe import ProbeImages, probe_images
from dncbm.features.stage import features_background
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SAERun
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import manifest_path
from dncbm.runs.settings import Settings

SHOWN, TOP = 10, 5
"""Latents of each kind that are shown, and images of each."""
LEAST_IMAGES = 5
"""Latents that fewer training images activate are not shown: their names would describe single images."""
SIZE = 64
"""Pixels per side of a thumbnail."""


@dataclass(frozen=True)
class Pictured:
    """A latent, and the images that activate it most."""

    index: int
    n_images: int
    """Training images that activate it."""
    jpeg: bytes
    images: tuple[str, ...]


@dataclass(frozen=True)
class Shown:
    """The latents that are shown, by the reason."""

    best: Sequence[Pictured]
    worst: Sequence[Pictured]
    drawn: Sequence[Pictured]
    dataset: str
    by: str
    """What is best."""
    problem: str = ""
    """Why there are no pictures."""


def read_shown(settings: Settings, run: SAERun, dataset: str, names: Names) -> Shown | None:
    """The best, the worst and some random latents with their images; None if there are no concept strengths.

    Best and worst are by z, where names were tested, else by similarity. The random ones have the run's seed.
    """
    if not manifest_path(Artifacts(settings).strengths(run, dataset, "train")).is_file():
        return None
    strengths = load_concept_strengths(settings, run, dataset, "train")
    n_images = np.bincount(strengths.matrix.indices[strengths.matrix.data > 0], minlength=len(names.names))
    score = names.similarity if names.z is None else names.z
    eligible = np.flatnonzero(n_images >= LEAST_IMAGES)
    known = eligible[~np.isnan(score[eligible])]
    ranked = known[np.argsort(-score[known], kind="stable")]
    best, worst = ranked[:SHOWN], ranked[SHOWN:][-SHOWN:][::-1]
    rest = np.setdiff1d(eligible, [*best, *worst])
    drawn = np.sort(np.random.default_rng(run.training.seed).permutation(rest)[:SHOWN])
    chosen = np.concatenate([best, worst, drawn])
    try:
        images, problem = probe_images(settings, dataset, settings.own_split(dataset, "train")), ""
    except UserError as error:  # the numbers do not need the images
        images, problem = None, str(error)
    tops = dict(zip(chosen.tolist(), top_activating(strengths.matrix, chosen, TOP), strict=True))
    background = features_background(settings, dataset, run.encoder, run.hook, "train")

    def pictured(indices: NDArray[np.int64]) -> list[Pictured]:
        found = []
        for index in indices.tolist():
            keys = strengths.keys[tops[index]].tolist()
            jpeg, shown = _strip(images, keys, background) if images is not None else (b"", ())
            found.append(Pictured(index, int(n_images[index]), jpeg, shown))
        return found

    by = "similarity to the name" if names.z is None else "z, how far the word stands out"
    return Shown(pictured(best), pictured(worst), pictured(drawn), dataset, by, problem)


def _strip(images: ProbeImages, keys: Sequence[int], background: str) -> tuple[bytes, tuple[str, ...]]:
    """A JPEG of images side by side, and their names. Images that cannot be read are left out."""
    tiles, shown = list[Image.Image](), list[str]()
    for key in keys:
        try:
            tiles.append(images.image(key, background).resize((SIZE, SIZE)))
        except Exception:  # whatever a damaged file raises, the others can be shown
            continue
        shown.append(images.image_name(key).rsplit("/", 1)[-1].rsplit(".", 1)[0])
    if not tiles:
        return b"", ()
    strip = Image.new("RGB", (len(tiles) * (SIZE + 2) - 2, SIZE), "white")
    for place, tile in enumerate(tiles):
        strip.paste(tile, (place * (SIZE + 2), 0))
    file = io.BytesIO()
    strip.save(file, "JPEG", quality=80, optimize=True)
    return file.getvalue(), tuple(shown)
