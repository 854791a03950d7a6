"""Local explanations (METHOD section 5): the concepts that a prediction is made of.

Arrays of `numbers.npz`, with one row per image of the split:

- `image`: its index in the data set's own split.
- `true_class`, `true_logit`: the true class and its logit.
- `predicted_class`, `logit`, `probability`: the predicted class, its logit and its softmax probability.
- `concepts`, `contributions`: the N_CONCEPTS contributions to the predicted class that are largest in absolute value; -1
  fills a row that has fewer.
- `remaining`, `n_remaining`: sum and number of the other contributions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dncbm.concepts.naming import NAMES
from dncbm.concepts.strengths import STRENGTHS
from dncbm.explain.dumps.dump import (
    Array,
    Arrays,
    Dump,
    Kind,
    Plan,
    dump_stage,
    listed,
    narrowed,
    probed_sources_of,
    real,
    whole,
)
from dncbm.explain.explanations import contributions, leading, predict
from dncbm.probe.stage import PROBE
from dncbm.runs import commands
from dncbm.runs.declarations import Explained, ProbeRun, SAERun, Selection
from dncbm.runs.settings import Settings
from sparse_autoencoder.declare import values

N_CONCEPTS = 5
FIGURES = 1000
"""Figures where neither a limit nor indices are given."""


@dataclass(frozen=True)
class Page:
    """A figure: an image and what its prediction is made of."""

    name: str
    title: str
    image: Path | Image.Image | None
    index: int | None
    """In the data set's own split; None if the image belongs to no data set."""
    predicted: str
    true: str | None
    """The true class, if it is known."""
    right: bool
    probability: float
    logit: float
    """Logit of the predicted class."""
    true_logit: float | None
    concepts: tuple[tuple[str, float], ...]
    """Label and contribution, the largest in absolute value first."""
    remaining: float
    """The sum of the other contributions."""
    n_remaining: int


def plan(settings: Settings, run: SAERun, probe: ProbeRun, explained: Explained) -> Plan:
    """How the predictions of all images of a split are explained. Raises UserError if an input is missing."""
    sources, weight = probed_sources_of(settings, run, probe, explained.split)

    def compute(overwrite: bool) -> Arrays:
        strengths = sources.strengths()
        labels = sources.labels(strengths)
        predictions = predict(strengths.matrix, weight, labels)
        found = contributions(strengths.matrix, weight, predictions.classes)
        top = leading(found, N_CONCEPTS, by_magnitude=True)
        return {
            "image": strengths.keys, "true_class": labels, "predicted_class": predictions.classes,
            "logit": predictions.logits, "probability": predictions.probabilities, "true_logit": predictions.true_logits,
            "concepts": top.concepts, "contributions": top.values,
            "remaining": top.remaining, "n_remaining": top.n_remaining,
        }  # fmt: skip

    about = sources.about_classes() | {"probe": probe.config_name}
    run_values = values(run) | values(probe) | values(explained)
    return Plan(sources.inputs, settings={"concepts": N_CONCEPTS}, run=run_values, about=about, compute=compute)


def arrays(about: Mapping[str, Any]) -> dict[str, Array]:
    """What the arrays must be."""
    index, of_class = whole(), whole(len(about["classes"]))
    return {
        "image": index, "true_class": of_class, "true_logit": real(), "predicted_class": of_class, "logit": real(),
        "probability": real(), "concepts": whole(len(about["labels"]), width=N_CONCEPTS, filled=True),
        "contributions": real(width=N_CONCEPTS), "remaining": real(), "n_remaining": whole(),
    }  # fmt: skip


def select(dump: Dump, selection: Selection) -> list[int]:
    """Indices of images. A class chooses its images, a concept those to which it is shown to contribute."""
    what = f"image in the {dump.about['split']} split with the index"
    return narrowed(dump, selection, "image", what, dump.numbers["true_class"], dump.numbers["concepts"])


def page(dump: Dump, images: Sequence[int]) -> Page:
    """The figure of an image."""
    of = dump.row("image", images[0])
    right = of["predicted_class"] == of["true_class"]
    predicted, true = (dump.about["classes"][of[key]] for key in ("predicted_class", "true_class"))
    return Page(
        name=f"image_{of['image']:06d}",
        title=f"{of['image']}: {predicted}" + ("" if right else f" (is {true})"),
        image=dump.files.image(dump.about["dataset"], of["image"]), index=of["image"],
        predicted=predicted, true=true, right=right,
        probability=of["probability"], logit=of["logit"], true_logit=of["true_logit"],
        concepts=dump.labelled(of["concepts"], of["contributions"]),
        remaining=of["remaining"], n_remaining=of["n_remaining"],
    )  # fmt: skip


def describe(page: Page) -> str:
    """The figure in words."""
    right = "" if page.true is None else ", which is right" if page.right else f", which is wrong: it is {page.true}"
    which = "An image" if page.index is None else f"Image {page.index}"
    said = f"{which}, predicted {page.predicted} with probability {page.probability:.0%}{right}."
    return f"{said} Contributions to the logit: {listed(page.concepts)}."


KIND = Kind(
    name=commands.LOCAL_EXPLANATIONS.name, things="images", takes=commands.LOCAL_EXPLANATIONS.takes,
    files=lambda artifacts, run, probe, explained, *_: artifacts.local_explanations(run, probe, explained.split),
    plan=plan, arrays=arrays, select=select, images=lambda dump, images: {dump.about["dataset"]: images}, page=page,
    describe=describe,
    most=lambda selection: None if selection.indices else FIGURES, spread=True,
)  # fmt: skip
DUMP = dump_stage(
    KIND, commands.LOCAL_EXPLANATIONS.script, commands.LOCAL_EXPLANATIONS.dump_summary, (STRENGTHS, NAMES, PROBE), PROBE
)
