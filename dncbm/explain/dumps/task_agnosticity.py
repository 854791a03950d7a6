"""Task agnosticity (METHOD section 5): the images of several data sets that activate a latent most.

Arrays of `numbers.npz`:

- `similarity`: F, the cosine similarity of each latent and its name.
- `order`: the latents that activate on some image, by falling similarity.
- `top_<dataset>`: indices of images, latent after latent, the strongest first.
- `ends_<dataset>`: F, where each latent's images end in `top_<dataset>`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dncbm.concepts.naming import NAMES, name_similarities
from dncbm.concepts.sae import SAE
from dncbm.concepts.strengths import STRENGTHS
from dncbm.explain.dumps.dump import (
    Array,
    Arrays,
    Dump,
    Integers,
    Kind,
    Plan,
    chosen_concepts,
    dump_stage,
    known_indices,
    real,
    sources_of,
    whole,
)
from dncbm.explain.explanations import top_activating
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Explained, LatentSelection, SAERun, ShownDatasets
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import manifest_path
from dncbm.runs.settings import Settings
from sparse_autoencoder.declare import values

N_STORED = 500
"""Top images kept per latent and data set."""
N_SHOWN = 4
"""Top images shown per latent and data set."""
FIGURES = 100
"""Figures where nothing is chosen: the best-named of thousands of latents."""


@dataclass(frozen=True)
class LatentImages:
    """A latent in a figure."""

    index: int
    label: str
    similarity: float
    images: tuple[tuple[Path, ...], ...]
    """For each data set its top images, at most N_SHOWN."""


@dataclass(frozen=True)
class Page:
    """A figure."""

    name: str
    title: str
    datasets: tuple[str, ...]
    split: str
    latents: tuple[LatentImages, ...]


def plan(settings: Settings, run: SAERun, explained: Explained, shown: ShownDatasets) -> Plan:
    """How the top images of every latent are found. Raises UserError if an input is missing."""
    split = explained.split
    datasets = shown.datasets or _with_strengths(settings, run, split)
    sources = {dataset: sources_of(settings, run, dataset, split) for dataset in datasets}
    first = sources[datasets[0]]
    similarity = name_similarities(settings, run, first.names)

    def compute(overwrite: bool) -> Arrays:
        arrays: Arrays = {"similarity": similarity}
        n_shown = np.zeros(len(similarity), dtype=np.int64)
        for dataset, source in sources.items():
            strengths = source.strengths()
            tops = top_activating(strengths.matrix, np.arange(len(similarity)), N_STORED)
            arrays[f"top_{dataset}"] = strengths.keys[np.concatenate(tops)]
            arrays[f"ends_{dataset}"] = np.cumsum([len(top) for top in tops])
            n_shown += [len(top) for top in tops]
        order = np.argsort(-similarity, kind="stable")
        arrays["order"] = order[n_shown[order] > 0]
        return arrays

    return Plan(
        inputs={name: path for source in sources.values() for name, path in source.inputs.items()},
        settings={"datasets": list(datasets), "stored": N_STORED}, run=values(run) | values(explained),
        about=first.about() | {"datasets": list(datasets)}, compute=compute,
    )  # fmt: skip


def _with_strengths(settings: Settings, run: SAERun, split: str) -> tuple[str, ...]:
    known, artifacts = settings.probe_datasets, Artifacts(settings)
    found = tuple(name for name in known if manifest_path(artifacts.strengths(run, name, split)).is_file())
    if not found:
        raise UserError(
            f"no data set of {settings.path} has concept strengths of its {split} split for the SAE {run.config_name}: "
            f"run {STRENGTHS.command()}"
        )
    left_out = ", ".join(name for name in known if name not in found)
    print(f"data sets: {', '.join(found)}" + (f" (no strengths of {left_out})" if left_out else ""))
    return found


def arrays(about: Mapping[str, Any]) -> dict[str, Array]:
    """What the arrays must be."""
    n = len(about["labels"])
    found = {"similarity": real(length=n), "order": whole(n, length=None)}
    for dataset in about["datasets"]:
        top = f"top_{dataset}"
        found |= {top: whole(length=None), f"ends_{dataset}": Array(True, length=n, ends=top)}
    return found


def select(dump: Dump, selection: LatentSelection) -> list[int]:
    """Latents, by falling similarity to their names."""
    latents: Integers = dump.numbers["order"]
    if not len(latents):
        raise UserError(f"no image of {', '.join(dump.about['datasets'])} activates any latent: there is nothing to draw")
    if selection.indices:
        latents = known_indices(selection, latents, "active latent")
    if (named := chosen_concepts(dump, selection)) is not None:
        latents = latents[np.isin(latents, named)]
        if not len(latents):
            raise UserError(f"--concepts: no image activates a latent named {', '.join(selection.concepts)}")
    return latents.tolist()


def page(dump: Dump, latents: Sequence[int]) -> Page:
    """A figure of some latents."""
    datasets = tuple(dump.about["datasets"])
    shown = tuple(
        LatentImages(
            latent, dump.about["labels"][latent], float(dump.numbers["similarity"][latent]),
            tuple(tuple(dump.files.image(name, key) for key in top_images(dump, name, latent)) for name in datasets),
        )
        for latent in latents
    )  # fmt: skip
    title = ", ".join(latent.label for latent in shown)
    return Page("latents_" + "_".join(map(str, latents)), title, datasets, dump.about["split"], shown)


def top_images(dump: Dump, dataset: str, latent: int) -> list[int]:
    """Indices of the images of a data set that a figure shows for a latent, the strongest first."""
    ends = dump.numbers[f"ends_{dataset}"]
    start = int(ends[latent - 1]) if latent else 0
    return dump.numbers[f"top_{dataset}"][start : ends[latent]][:N_SHOWN].tolist()


def images(dump: Dump, latents: Sequence[int]) -> dict[str, list[int]]:
    """Data set -> indices of the images in the figures of some latents."""
    datasets = dump.about["datasets"]
    return {name: [key for latent in latents for key in top_images(dump, name, latent)] for name in datasets}


def describe(page: Page) -> str:
    """The figure in words."""
    of = ", ".join(page.datasets)
    return f"The images of {of} ({page.split}) that most activate " + "; ".join(
        f"{_called(latent)} (similarity {latent.similarity:.2f})" for latent in page.latents
    )


def _called(latent: LatentImages) -> str:
    """Its index and label; the label of a latent that abstains already has the index."""
    index = f"latent {latent.index}"
    return latent.label if latent.label.startswith(f"{index} (") else f"{index}, {latent.label}"


KIND = Kind(
    name=commands.TASK_AGNOSTICITY.name, things="latents", takes=commands.TASK_AGNOSTICITY.takes,
    files=lambda artifacts, run, explained, *_: artifacts.task_agnosticity(run, explained.split),
    plan=plan, arrays=arrays, texts=("datasets",), select=select, images=images, page=page, describe=describe,
    dump_takes=commands.TASK_AGNOSTICITY.dump_takes, selects=commands.TASK_AGNOSTICITY.selects, per_figure=4,
    most=lambda selection: None if selection.indices or selection.concepts else FIGURES,
)  # fmt: skip
DUMP = dump_stage(KIND, commands.TASK_AGNOSTICITY.script, commands.TASK_AGNOSTICITY.dump_summary, (STRENGTHS, NAMES), SAE)
