"""Task agnosticity (METHOD section 5): the images of several data sets that activate a latent most.

Arrays of `numbers.npz`:

- `similarity`: F, of each latent and its name.
- `order`: the latents that activate an image, by falling similarity.
- `top_<dataset>`, `ends_<dataset>`: indices of images, each latent's strongest first; and F numbers, where each latent's end.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dncbm.artifacts import Artifacts, SAERun
from dncbm.dumps import (
    Computed,
    Dump,
    Integers,
    Selection,
    about_run,
    choose,
    chosen_concepts,
    known_indices,
    make_dump,
    sources_of,
)
from dncbm.errors import UserError
from dncbm.explanations import top_activating
from dncbm.manifests import Recipe, manifest_path
from dncbm.naming import name_similarities
from dncbm.settings import Settings

N_STORED = 500
"""Top images of a latent in each dataset."""
N_SHOWN = 4
"""Of them in a figure."""
PER_FIGURE = 4
"""Latents."""
FIGURES = 100
"""Where no limit is given: of the thousands of latents, those whose names are best."""


@dataclass(frozen=True)
class LatentImages:
    """A latent in a figure."""

    index: int
    label: str
    similarity: float
    images: tuple[tuple[Path, ...], ...]
    """Its top images of each dataset; fewer than N_SHOWN where fewer activate it."""


@dataclass(frozen=True)
class Page:
    """A figure."""

    name: str
    title: str
    datasets: tuple[str, ...]
    split: str
    latents: tuple[LatentImages, ...]


def dump(
    settings: Settings,
    run: SAERun,
    split: str,
    datasets: Sequence[str] = (),
    selection: Selection | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Compute top images of every latent, and gather those of the latents to draw.

    Args:
        settings: the config.
        run: the SAE.
        split: of the datasets.
        datasets: names of probe_datasets; none: all whose strengths there are.
        selection: which latents to draw.
        overwrite: replace what was computed from other inputs.

    Returns:
        The dump's folder.

    Raises:
        UserError: no strengths or names.
        StaleArtifact: there is a dump from other inputs.
    """
    artifacts = Artifacts(settings)
    if not datasets:
        datasets = [
            name for name in settings.probe_datasets if manifest_path(artifacts.strengths(run, name, split)).is_file()
        ]
        if not datasets:
            raise UserError(
                f"no data set of {settings.path} has concept strengths of its {split} split for the SAE {run.config_name}: "
                "make them with `python scripts/06_save_concept_strengths.py`"
            )
        left_out = [name for name in settings.probe_datasets if name not in datasets]
        print(f"data sets: {', '.join(datasets)}" + (f" (no strengths of {', '.join(left_out)})" if left_out else ""))
    sources = {dataset: sources_of(settings, run, dataset, split) for dataset in datasets}
    inputs = {key: value for source in sources.values() for key, value in source.inputs.items()}
    names = next(iter(sources.values())).names
    similarity = name_similarities(settings, run, names)

    def compute() -> Computed:
        arrays: dict[str, Any] = {"similarity": similarity}
        n_shown = np.zeros(len(names), dtype=np.int64)
        for dataset, source in sources.items():
            strengths = source.strengths()
            tops = top_activating(strengths.matrix, np.arange(len(names)), N_STORED)
            arrays[f"top_{dataset}"] = strengths.keys[np.concatenate(tops)]
            arrays[f"ends_{dataset}"] = np.cumsum([len(top) for top in tops])
            n_shown += [len(top) for top in tops]
        order = np.argsort(-similarity, kind="stable")
        arrays["order"] = order[n_shown[order] > 0]
        return arrays, about_run(run, split, names) | {"datasets": list(datasets)}

    recipe = Recipe("task_agnosticity", {"datasets": list(datasets), "stored": N_STORED}, inputs)
    folder = artifacts.dump(artifacts.task_agnosticity(run, split))
    made = make_dump(folder, recipe, compute, overwrite=overwrite)
    choose(settings, made, "latents", items(made, selection or Selection()), lambda latents: _images(made, latents))
    return folder


def items(dump: Dump, selection: Selection) -> list[int]:
    """The latents to draw, by falling similarity of their names.

    Raises:
        UserError: a selection names what is not there.
    """
    latents: Integers = dump.numbers["order"]
    if selection.indices:
        latents = known_indices(selection, latents, "active latent")
    if (named := chosen_concepts(dump, selection)) is not None:
        latents = latents[np.isin(latents, named)]
        if not len(latents):
            raise UserError(f"--concepts: no image activates a latent named {', '.join(selection.concepts)}")
    chosen: list[int] = latents.tolist()
    return limited(chosen, selection.limit or (None if selection.indices or selection.concepts else FIGURES))


def limited(latents: list[int], n_figures: int | None) -> list[int]:
    """The first of them."""
    return latents[: n_figures * PER_FIGURE if n_figures else None]


def pages(dump: Dump, latents: Sequence[int]) -> list[Page]:
    """Figures of PER_FIGURE latents."""
    datasets = tuple(dump.about["datasets"])
    found = []
    for start in range(0, len(latents), PER_FIGURE):
        members = latents[start : start + PER_FIGURE]
        shown = tuple(
            LatentImages(
                latent,
                dump.about["labels"][latent],
                float(dump.numbers["similarity"][latent]),
                tuple(tuple(dump.image(name, key) for key in _top(dump, name, latent)) for name in datasets),
            )
            for latent in members
        )
        title = ", ".join(latent.label for latent in shown)
        found.append(Page("latents_" + "_".join(map(str, members)), title, datasets, dump.about["split"], shown))
    return found


def _top(dump: Dump, dataset: str, latent: int) -> list[int]:
    ends = dump.numbers[f"ends_{dataset}"]
    start = int(ends[latent - 1]) if latent else 0
    return dump.numbers[f"top_{dataset}"][start : ends[latent]][:N_SHOWN].tolist()


def _images(dump: Dump, latents: Iterable[int]) -> dict[str, Integers]:
    return {
        dataset: np.array([key for latent in latents for key in _top(dump, dataset, latent)], dtype=np.int64)
        for dataset in dump.about["datasets"]
    }
