"""Global explanations (METHOD section 5): the concepts that lead a class.

Arrays of `numbers.npz`, a row for each class that has images in the split:

- `class_number`, `size`, `recall`: the class, how many images, the share of them that is predicted right.
- `concepts`, `contributions`: the N_CONCEPTS largest mean contributions over its images; -1 where there are fewer.
- `remaining`, `n_remaining`, `mean_logit`: sum and number of the others, and the mean logit that all sum to.
- `strength_concepts`, `strengths`: the latents of largest mean-centred strength, as the authors rank them.
- `images`: indices of N_IMAGES of its images, drawn at random; -1 where there are fewer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dncbm.artifacts import Artifacts, ProbeRun, SAERun
from dncbm.dumps import (
    Computed,
    Dump,
    Integers,
    Selection,
    about_run,
    choose,
    class_texts,
    make_dump,
    narrowed,
    probed_sources_of,
)
from dncbm.explanations import contributions, leading, mean_centred, mean_strengths, predict
from dncbm.manifests import Recipe
from dncbm.settings import Settings

N_CONCEPTS = 10
N_IMAGES = 9
RankBy = Literal["contribution", "strength"]


@dataclass(frozen=True)
class Page:
    """A figure: a class, its leading concepts and some of its images."""

    name: str
    title: str
    class_name: str
    size: int
    recall: float
    rank_by: RankBy
    concepts: tuple[tuple[str, float], ...]
    """Label and mean contribution, or mean-centred strength, the largest first."""
    remaining: float
    """The sum of the other mean contributions; with those shown it is the mean logit. Not shown when ranked by strength."""
    n_remaining: int
    mean_logit: float
    images: tuple[Path, ...]


def dump(
    settings: Settings,
    run: SAERun,
    probe: ProbeRun,
    split: str,
    selection: Selection | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Explain all classes by the images of a split, and gather the images of the classes to draw.

    Args:
        settings: the config.
        run: the SAE.
        probe: the probe on its concepts.
        split: of the probe's dataset.
        selection: which classes to draw.
        overwrite: replace what was computed from other inputs.

    Returns:
        The dump's folder.

    Raises:
        UserError: no probe, strengths or names.
        StaleArtifact: there is a dump from other inputs.
    """
    sources, weight = probed_sources_of(settings, run, probe, split)
    seed = run.training.seed
    recipe = Recipe("global_explanations", {"concepts": N_CONCEPTS, "seed": seed}, sources.inputs)

    def compute() -> Computed:
        found = sources.strengths()
        strengths, keys, labels = found.matrix, found.keys, sources.labels(found)
        n_classes = weight.shape[1]
        sizes = np.bincount(labels, minlength=n_classes)
        classes = np.flatnonzero(sizes)
        predictions = predict(strengths, weight, labels)
        right = np.bincount(labels[predictions.classes == labels], minlength=n_classes)
        logits = np.bincount(labels, weights=predictions.true_logits, minlength=n_classes)
        means = mean_strengths(strengths, labels, n_classes)
        by_contribution = leading(contributions(means, weight, np.arange(n_classes))[classes], N_CONCEPTS)
        by_strength = leading(mean_centred(means, strengths)[classes], N_CONCEPTS)
        images = np.full((len(classes), N_IMAGES), -1, dtype=np.int64)
        for place, number in enumerate(classes):
            rows = np.flatnonzero(labels == number)
            chosen = np.random.default_rng([seed, int(number)]).permutation(rows)[:N_IMAGES]
            images[place, : len(chosen)] = keys[np.sort(chosen)]
        arrays = {
            "class_number": classes,
            "size": sizes[classes],
            "recall": right[classes] / sizes[classes],
            "mean_logit": logits[classes] / sizes[classes],
            "concepts": by_contribution.concepts,
            "contributions": by_contribution.values,
            "remaining": by_contribution.remaining,
            "n_remaining": by_contribution.n_remaining,
            "strength_concepts": by_strength.concepts,
            "strengths": by_strength.values,
            "images": images,
        }
        texts = about_run(run, split, sources.names) | class_texts(settings, probe.dataset)
        return arrays, texts | {"probe": probe.config_name}

    artifacts = Artifacts(settings)
    folder = artifacts.dump(artifacts.global_explanations(run, probe, split))
    made = make_dump(folder, recipe, compute, overwrite=overwrite)
    choose(settings, made, "classes", items(made, selection or Selection()), lambda classes: _images(made, classes))
    return folder


def items(dump: Dump, selection: Selection) -> list[int]:
    """The numbers of the classes to draw. A concept chooses the classes that it leads with others.

    Raises:
        UserError: a selection names what is not there.
    """
    numbers = dump.numbers
    classes = numbers["class_number"]
    what = f"class with images in the {dump.about['split']} split and the number"
    concepts = np.hstack([numbers["concepts"], numbers["strength_concepts"]])
    return limited(narrowed(dump, selection, classes, what, classes[:, None], concepts), selection.limit)


def limited(classes: list[int], n_figures: int | None) -> list[int]:
    """The first of them."""
    return classes[:n_figures]


def pages(dump: Dump, classes: Sequence[int], rank_by: RankBy = "contribution") -> list[Page]:
    """A figure for each class."""
    return [_page(dump, _row(dump, number), rank_by) for number in classes]


def _page(dump: Dump, row: int, rank_by: RankBy) -> Page:
    about = dump.about
    of = {key: values[row] for key, values in dump.numbers.items()}
    kind = ("concepts", "contributions") if rank_by == "contribution" else ("strength_concepts", "strengths")
    shown = zip(*(of[key].tolist() for key in kind), strict=True)
    class_name = about["classes"][of["class_number"]]
    file_name = "".join(letter if letter.isalnum() else "_" for letter in class_name)[:60]
    return Page(
        name=f"class_{of['class_number']:04d}_{file_name}" + ("" if rank_by == "contribution" else "_by_strength"),
        title=class_name,
        class_name=class_name,
        size=int(of["size"]),
        recall=float(of["recall"]),
        rank_by=rank_by,
        concepts=tuple((about["labels"][concept], value) for concept, value in shown if concept >= 0),
        remaining=float(of["remaining"]),
        n_remaining=int(of["n_remaining"]),
        mean_logit=float(of["mean_logit"]),
        images=tuple(dump.image(about["dataset"], key) for key in of["images"].tolist() if key >= 0),
    )


def _row(dump: Dump, number: int) -> int:
    return int(np.flatnonzero(dump.numbers["class_number"] == number)[0])


def _images(dump: Dump, classes: Iterable[int]) -> dict[str, Integers]:
    images = dump.numbers["images"][[_row(dump, number) for number in classes]].ravel()
    return {dump.about["dataset"]: images[images >= 0]}
