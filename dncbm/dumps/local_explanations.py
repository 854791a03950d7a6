"""Local explanations (METHOD section 5): the concepts that a prediction is made of.

Arrays of `numbers.npz`, a row for each image of the split:

- `image`: its index in the dataset's own split.
- `true_class`, `true_logit`, `predicted_class`, `logit`, `probability`: the last two are the predicted class's.
- `concepts`, `contributions`: the N_CONCEPTS contributions to the predicted class that are largest in absolute value; -1 where
  there are fewer.
- `remaining`, `n_remaining`: sum and number of the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dncbm.artifacts import Artifacts, ProbeRun, SAERun
from dncbm.dumps import (
    Computed,
    Dump,
    Selection,
    about_run,
    choose,
    class_texts,
    make_dump,
    narrowed,
    probed_sources_of,
)
from dncbm.explanations import contributions, leading, predict
from dncbm.manifests import Recipe
from dncbm.settings import Settings

N_CONCEPTS = 5
FIGURES = 1000
"""Where nothing is chosen: so many images, evenly spread over the split."""


@dataclass(frozen=True)
class Page:
    """A figure: an image and what its prediction is made of."""

    name: str
    title: str
    image: Path
    index: int
    predicted: str
    true: str
    right: bool
    probability: float
    logit: float
    """Of the predicted class."""
    true_logit: float
    concepts: tuple[tuple[str, float], ...]
    """Label and contribution, the largest in absolute value first."""
    remaining: float
    """The sum of the other contributions."""
    n_remaining: int


def dump(
    settings: Settings,
    run: SAERun,
    probe: ProbeRun,
    split: str,
    selection: Selection | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Explain the predictions of all images of a split, and gather the images to draw.

    Args:
        settings: the config.
        run: the SAE.
        probe: the probe on its concepts.
        split: of the probe's dataset.
        selection: which images to draw.
        overwrite: replace what was computed from other inputs.

    Returns:
        The dump's folder.

    Raises:
        UserError: no probe, strengths or names.
        StaleArtifact: there is a dump from other inputs.
    """
    sources, weight = probed_sources_of(settings, run, probe, split)
    recipe = Recipe("local_explanations", {"concepts": N_CONCEPTS}, sources.inputs)

    def compute() -> Computed:
        strengths = sources.strengths()
        labels = sources.labels(strengths)
        predictions = predict(strengths.matrix, weight, labels)
        found = contributions(strengths.matrix, weight, predictions.classes)
        top = leading(found, N_CONCEPTS, by_magnitude=True)
        arrays = {
            "image": strengths.keys,
            "true_class": labels,
            "predicted_class": predictions.classes,
            "logit": predictions.logits,
            "probability": predictions.probabilities,
            "true_logit": predictions.true_logits,
            "concepts": top.concepts,
            "contributions": top.values,
            "remaining": top.remaining,
            "n_remaining": top.n_remaining,
        }
        texts = about_run(run, split, sources.names) | class_texts(settings, probe.dataset)
        return arrays, texts | {"probe": probe.config_name}

    artifacts = Artifacts(settings)
    folder = artifacts.dump(artifacts.local_explanations(run, probe, split))
    made = make_dump(folder, recipe, compute, overwrite=overwrite)
    chosen = items(made, selection or Selection())
    choose(settings, made, "images", chosen, lambda images: {probe.dataset: np.array(list(images))})
    return folder


def items(dump: Dump, selection: Selection) -> list[int]:
    """The indices of the images to draw. A class chooses its images, a concept those that it is shown to contribute to.

    Raises:
        UserError: a selection names what is not there.
    """
    numbers = dump.numbers
    what = f"image in the {dump.about['split']} split with the index"
    images = narrowed(dump, selection, numbers["image"], what, numbers["true_class"][:, None], numbers["concepts"])
    return limited(images, selection.limit or (None if selection.indices else FIGURES))


def limited(images: list[int], n_figures: int | None) -> list[int]:
    """Some of them, evenly from the first to the last, so that a dataset in the order of its classes shows them all."""
    if n_figures is None or n_figures >= len(images):
        return images
    return [images[place * len(images) // n_figures] for place in range(n_figures)]


def pages(dump: Dump, images: Sequence[int]) -> list[Page]:
    """A figure for each image."""
    row_of = {image: row for row, image in enumerate(dump.numbers["image"].tolist())}
    return [_page(dump, row_of[image]) for image in images]


def _page(dump: Dump, row: int) -> Page:
    about = dump.about
    of = {key: values[row] for key, values in dump.numbers.items()}
    shown = zip(of["concepts"].tolist(), of["contributions"].tolist(), strict=True)
    right = bool(of["predicted_class"] == of["true_class"])
    predicted, true = about["classes"][of["predicted_class"]], about["classes"][of["true_class"]]
    return Page(
        name=f"image_{of['image']:06d}",
        title=f"{of['image']}: {predicted}" + ("" if right else f" (is {true})"),
        image=dump.image(about["dataset"], int(of["image"])),
        index=int(of["image"]),
        predicted=predicted,
        true=true,
        right=right,
        probability=float(of["probability"]),
        logit=float(of["logit"]),
        true_logit=float(of["true_logit"]),
        concepts=tuple((about["labels"][concept], value) for concept, value in shown if concept >= 0),
        remaining=float(of["remaining"]),
        n_remaining=int(of["n_remaining"]),
    )
