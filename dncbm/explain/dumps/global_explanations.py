"""Global explanations (METHOD section 5): the concepts that lead a class.

Arrays of `numbers.npz`, with one row per class that has images in the split:

- `class_number`, `size`, `recall`: the class, its number of images, the share of them that is predicted right.
- `concepts`, `contributions`: the N_CONCEPTS largest mean contributions over its images; -1 fills a row that has fewer.
- `remaining`, `n_remaining`, `mean_logit`: sum and number of the others, and the mean logit that all sum to.
- `strength_concepts`, `strengths`: the latents of largest mean-centred strength, the authors' ranking.
- `images`: indices of N_IMAGES of its images, drawn at random; -1 fills a row that has fewer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dncbm.concepts.naming import NAMES
from dncbm.concepts.strengths import STRENGTHS
from dncbm.explain.dumps.dump import (
    Array,
    Arrays,
    Dump,
    Kind,
    Plan,
    counted,
    dump_stage,
    images_of,
    listed,
    narrowed,
    probed_sources_of,
    real,
    whole,
)
from dncbm.explain.explanations import contributions, leading, mean_centred, mean_strengths, predict
from dncbm.probe.stage import PROBE
from dncbm.runs import commands
from dncbm.runs.declarations import Explained, ProbeRun, Ranking, SAERun, Selection
from dncbm.runs.settings import Settings
from sparse_autoencoder.declare import values

N_CONCEPTS = 10
N_IMAGES = 9


@dataclass(frozen=True)
class Page:
    """A figure: a class, its leading concepts and some of its images."""

    name: str
    title: str
    class_name: str
    size: int
    recall: float | None
    """Share of the images that is predicted right, if it is known."""
    rank_by: str
    concepts: tuple[tuple[str, float], ...]
    """Label and mean contribution, or mean-centred strength, the largest first."""
    remaining: float
    """The sum of the other mean contributions, which completes the mean logit. Not shown when ranked by strength."""
    n_remaining: int
    mean_logit: float
    images: tuple[Path, ...]


def plan(settings: Settings, run: SAERun, probe: ProbeRun, explained: Explained) -> Plan:
    """How all classes are explained by the images of a split. Raises UserError if an input is missing."""
    sources, weight = probed_sources_of(settings, run, probe, explained.split)
    seed = run.training.seed

    def compute(overwrite: bool) -> Arrays:
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
        return {
            "class_number": classes, "size": sizes[classes],
            "recall": right[classes] / sizes[classes], "mean_logit": logits[classes] / sizes[classes],
            "concepts": by_contribution.concepts, "contributions": by_contribution.values,
            "remaining": by_contribution.remaining, "n_remaining": by_contribution.n_remaining,
            "strength_concepts": by_strength.concepts, "strengths": by_strength.values, "images": images,
        }  # fmt: skip

    about = sources.about_classes() | {"probe": probe.config_name}
    run_values = values(run) | values(probe) | values(explained)
    return Plan(sources.inputs, {"concepts": N_CONCEPTS, "seed": seed}, run=run_values, about=about, compute=compute)


def arrays(about: Mapping[str, Any]) -> dict[str, Array]:
    """What the arrays must be."""
    latents, values = whole(len(about["labels"]), width=N_CONCEPTS, filled=True), real(width=N_CONCEPTS)
    return {
        "class_number": whole(len(about["classes"])), "size": whole(), "recall": real(), "mean_logit": real(),
        "concepts": latents, "contributions": values, "remaining": real(), "n_remaining": whole(),
        "strength_concepts": latents, "strengths": values, "images": whole(width=N_IMAGES, filled=True),
    }  # fmt: skip


def select(dump: Dump, selection: Selection) -> list[int]:
    """Numbers of classes. A concept chooses the classes that it is among the leading concepts of, in either ranking."""
    what = f"class with images in the {dump.about['split']} split and the number"
    concepts = np.hstack([dump.numbers["concepts"], dump.numbers["strength_concepts"]])
    return narrowed(dump, selection, "class_number", what, dump.numbers["class_number"], concepts)


def page(dump: Dump, classes: Sequence[int], ranking: Ranking) -> Page:
    """The figure of a class."""
    of = dump.row("class_number", classes[0])
    by_contribution = ranking.rank_by == "contribution"
    shown = ("concepts", "contributions") if by_contribution else ("strength_concepts", "strengths")
    class_name = dump.about["classes"][of["class_number"]]
    safe = "".join(letter if letter.isalnum() else "_" for letter in class_name)
    file_name = safe.encode()[:120].decode(errors="ignore")  # file systems count bytes
    return Page(
        name=f"class_{of['class_number']:04d}_{file_name}" + ("" if by_contribution else "_by_strength"),
        title=class_name, class_name=class_name, size=of["size"], recall=of["recall"], rank_by=ranking.rank_by,
        concepts=dump.labelled(*(of[key] for key in shown)), remaining=of["remaining"], n_remaining=of["n_remaining"],
        mean_logit=of["mean_logit"], images=dump.images(of["images"]),
    )  # fmt: skip


def sized(page: Page) -> str:
    """The number of images of a class, and how many of them are predicted right."""
    return counted(page.size, "images") + ("" if page.recall is None else f", {page.recall:.0%} predicted right")


def describe(page: Page) -> str:
    """The figure in words."""
    what = "Mean contributions" if page.rank_by == "contribution" else "Mean-centred strengths"
    said = f"Class {page.class_name}, {sized(page)}."
    return f"{said} {what}: {listed(page.concepts)}."


KIND = Kind(
    name=commands.GLOBAL_EXPLANATIONS.name, things="classes", takes=commands.GLOBAL_EXPLANATIONS.takes,
    files=lambda artifacts, run, probe, explained, *_: artifacts.global_explanations(run, probe, explained.split),
    plan=plan, arrays=arrays, select=select, images=partial(images_of, "class_number"), page=page, describe=describe,
)  # fmt: skip
DUMP = dump_stage(
    KIND, commands.GLOBAL_EXPLANATIONS.script, commands.GLOBAL_EXPLANATIONS.dump_summary, (STRENGTHS, NAMES, PROBE), PROBE
)
