"""The model card of a bundle: its README.md, with the hub's YAML header."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dncbm.bottleneck.contents import Contents
from dncbm.concepts.naming import ABSTAINS, ConceptName, concept_labels
from dncbm.explain.explanations import contributions, leading
from dncbm.features.hub import published_on_hub

LIBRARY = "dncbm"
TAGS = ["dncbm", "concept-bottleneck", "sparse-autoencoder", "interpretability", "clip"]
CLASSES_SHOWN, CONCEPTS_SHOWN = 8, 5
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that turn the direction of whatever follows. Letters that are written from right to left need none of them."""

CITATION = r"""@inproceedings{rao2024discover,
  title     = {Discover-then-Name: Task-Agnostic Concept Bottlenecks via Automated Concept Discovery},
  author    = {Rao, Sukrut and Mahajan, Sweta and B\"ohle, Moritz and Schiele, Bernt},
  booktitle = {European Conference on Computer Vision (ECCV)}, year = {2024}
}"""


def card(contents: Contents, source: str, license: str | None) -> str:
    """The text of the card. `source` is what `from_pretrained` loads, `license` an identifier of the hub."""
    return "\n\n".join([f"---\n{_header(contents, source, license)}\n---", *_body(contents, source, license)]) + "\n"


def _header(contents: Contents, source: str, license: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    about = contents.about
    results = [
        EvalResult(
            task_type="image-classification", dataset_type=about["datasets"]["probe"], dataset_name=about["datasets"]["probe"],
            dataset_split=contents.statistics.split, metric_type="accuracy", metric_value=round(top1, 4), metric_name="top-1",
        )
        for top1 in [about["metrics"]["probe"].get(f"{contents.statistics.split}_top1")]
        if top1 is not None and not about["interventions"]
    ]  # fmt: skip
    data = ModelCardData(
        library_name=LIBRARY, tags=TAGS, pipeline_tag="image-classification", license=license, language=None,
        base_model=published_on_hub(contents.encoder.settings.encoder(contents.encoder.location)),
        eval_results=results or None, model_name=source if results else None,
    )  # fmt: skip
    return data.to_yaml().strip()


def _body(contents: Contents, source: str, license: str | None) -> list[str]:
    about, encoder = contents.about, contents.encoder
    title, name = _shown(f"{about['datasets']['probe']} by named concepts of {encoder.title}"), _shown(encoder.title)
    edits = "; ".join(map(_shown, about["interventions"]))
    edits = f"\n\nIts concepts were edited after training: {edits}." if edits else ""
    return [
        f"# {title}",
        "A concept bottleneck after Discover-then-Name (DN-CBM). A sparse autoencoder divides the features of the image "
        f"encoder {name} into {len(contents.names)} concepts, each named after its nearest word, and a sparse "
        f"linear probe classifies {len(contents.classes)} classes by the strengths of these concepts. Every prediction is a "
        f"sum of contributions of concepts.{edits}",
        "## Load it",
        f"```python\nfrom dncbm import ConceptBottleneckModel\n\nmodel = ConceptBottleneckModel.from_pretrained({source!r})\n"
        'print(model.explain("image.jpg").table(5))\n```',
        _encoder_note(contents),
        "## Results",
        _metrics(about, contents.statistics.split),
        "## Concepts of some classes",
        f"The {CONCEPTS_SHOWN} concepts of largest mean contribution to the logit, over the images of the `"
        f"{contents.statistics.split}` split:",
        _leading_concepts(contents),
        "A name is the word nearest to a latent's direction: what the latent is most like, which need not be what it means. "
        + _names_note(contents.names),
        "## How it was made",
        _settings(about),
        "## Licence and citation",
        (f"The weights are under the licence `{license}`." if license else "The licence of the weights is not stated.")
        + " The library, dncbm, is under the MIT licence. The images and the encoder have licences of their own.",
        f"```bibtex\n{CITATION}\n```",
    ]


def _names_note(names: Sequence[ConceptName]) -> str:
    """What the verdicts of names mean."""
    if all(name.verdict is None for name in names):
        return "The names were not tested."
    abstaining = [name for name in names if name.verdict == ABSTAINS]
    if not abstaining:
        return "No latent abstains, so every one is shown by its name: it is named, and its name may still be wrong."
    example = _shown(concept_labels(names)[abstaining[0].index])
    return (
        f"{len(abstaining)} of {len(names)} latents abstain, which a label such as {example} says: the latent's direction was "
        "not told from directions that hold no word, and the word is merely the nearest. All others are named, which does not "
        "say that their names are right."
    )


def _encoder_note(contents: Contents) -> str:
    entry = contents.encoder.settings.encoder(contents.encoder.location)
    if entry.pretrained and "/" not in entry.pretrained:
        return f"open_clip loads the encoder, `{entry.model}` with the weights `{entry.pretrained}`, on first use."
    return (
        "The encoder's weights are not part of this bundle. If they are not where they were, say where they are: "
        '`from_pretrained(..., encoder="local-dir:FOLDER")`.'
    )


def _metrics(about: Mapping[str, Any], split: str) -> str:
    probe, sae = about["metrics"]["probe"], about["metrics"]["sae"]
    when = " before the edits" if about["interventions"] else ""
    rows = [
        (f"top-1 of the probe on {split}{when}", probe.get(f"{split}_top1"), "{:.1%}"),
        (f"mean top-1 of the classes{when}", probe.get(f"{split}_mean_class_top1"), "{:.1%}"),
        (f"top-1 of the worst group{when}", probe.get(f"{split}_worst_group_top1"), "{:.1%}"),
    ]
    for on, found in sae.items():
        rows += [(f"active latents per image (L0) on {on}", found.get("l0"), "{:.1f}")]
        rows += [(f"explained variance of the SAE on {on}", found.get("explained_variance"), "{:.3f}")]
        rows += [(f"dead latents on {on}", found.get("dead_fraction"), "{:.1%}")]
    known = [(what, _shown(form.format(value))) for what, value, form in rows if value is not None]
    return _table(("what", "value"), known) if known else "Nothing is recorded."


def _leading_concepts(contents: Contents) -> str:
    found, labels = contents.statistics, concept_labels(contents.names)
    chosen = np.argsort(-found.sizes, kind="stable")[:CLASSES_SHOWN]
    chosen = np.sort(chosen[found.sizes[chosen] > 0])
    top = leading(contributions(found.class_strengths[chosen], contents.weight, chosen), CONCEPTS_SHOWN)
    rows = [
        (
            _shown(contents.classes[number]),
            ", ".join(f"{_shown(labels[f])} ({v:+.2f})" for f, v in zip(*pair, strict=True) if f >= 0) or "none",
        )
        for number, *pair in zip(chosen.tolist(), top.concepts.tolist(), top.values.tolist(), strict=True)
    ]
    return _table(("class", "concepts"), rows)


def _settings(about: Mapping[str, Any]) -> str:
    rows = [("SAE trained on", about["datasets"]["sae"]), ("probe trained on", about["datasets"]["probe"])]
    rows += [("vocabulary", about["vocabulary"]), ("dncbm", about["dncbm"])]
    named = [(what, _shown(value)) for what, value in rows]
    settings = about["sae"] | about["probe"]  # which share --seed
    flags = [(f"`{flag}`", _shown(str(value))) for flag, value in settings.items() if value != ""]
    return _table(("setting", "value"), [*named, *flags])


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {a} | {b} |" for a, b in rows)])


_ACTIVE = str.maketrans({c: f"\\{c}" for c in "\\`*_[]<>|~$"} | {"&": "&amp;"} | dict.fromkeys(map(ord, _TURNING)))


def _shown(text: str) -> str:
    """A text that shows as it is: it ends no cell, and becomes neither HTML nor an image of somebody else."""
    return " ".join(text.split()).translate(_ACTIVE)
