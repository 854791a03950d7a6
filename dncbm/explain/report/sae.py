"""The SAE of a run: what it was trained for, and how often its latents fire."""

from typing import Any

import numpy as np

from dncbm.concepts.sae import SAE_SPLITS, firing_rates, sae_metrics, sae_path
from dncbm.concepts.strengths import load_concept_strengths
from dncbm.explain.report.document import Block, Figure, Note, Section, Table, note, percent, said
from dncbm.explain.report.figures import histogram
from dncbm.explain.report.findings import SAEFound
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SAERun
from dncbm.runs.manifests import ALIGNED, manifest_path, read_manifest
from dncbm.runs.settings import Settings

FIGURES = {"l0": "active latents per image (L0)", "explained_variance": "explained variance", "dead_fraction": "dead latents"}


def read_sae(settings: Settings, run: SAERun, dataset: str) -> SAEFound:
    """The SAE's metrics, and the rates that its latents fire at on its own training images.

    Where training left no rates, they are those of the training images of the probe's data set, if it has strengths.

    Without metrics, if training recorded none and its features are missing now.

    Raises UserError if the SAE is missing or a file is damaged.
    """
    artifacts, path = Artifacts(settings), sae_path(settings, run)
    features = (artifacts.features(run.dataset, run.encoder, run.hook, split) for split in SAE_SPLITS)
    made: dict[str, Any] = read_manifest(path) if manifest_path(path).is_file() else {"stage": "", "details": {}}
    recorded = "metrics" in made["details"]
    aligned_from = str(made["details"].get("copy_of", "another SAE")) if made["stage"] == ALIGNED else ""
    can_measure = all(manifest_path(folder).is_file() for folder in features)
    metrics = sae_metrics(settings, run) if recorded or can_measure else {}
    if (rates := firing_rates(settings, run)) is not None:
        return SAEFound(metrics, rates, f"training images of {run.dataset}", aligned_from)
    if manifest_path(artifacts.strengths(run, dataset, "train")).is_file():
        matrix = load_concept_strengths(settings, run, dataset, "train").matrix
        active = np.bincount(matrix.indices[matrix.data > 0], minlength=matrix.shape[1])
        return SAEFound(metrics, active / matrix.shape[0], f"training images of {dataset}", aligned_from)
    return SAEFound(metrics, aligned_from=aligned_from)


def sae_section(found: SAEFound, absent: Note) -> Section:
    """The SAE's figures on both splits, and the histogram of its feature densities. `absent` says how figures are made."""
    splits = list(found.metrics)
    table = Table(
        "The SAE on its own images", ("", *splits),
        tuple((title, *(shown_metric(key, found.metrics[split][key]) for split in splits)) for key, title in FIGURES.items()),
    )  # fmt: skip
    blocks: list[Block] = [
        said("The SAE was trained on train and has not seen train_val. A large gap between them means that it memorises."),
        table if splits else absent,
    ]
    if found.rates is None:
        blocks.append(note("How often each latent fires is not known: neither training nor concept strengths recorded it."))
        return Section("sae", "The sparse autoencoder", tuple(blocks))
    live = found.rates[found.rates > 0]
    n_dead, median = len(found.rates) - len(live), float(np.median(live)) if len(live) else 0.0
    summary = (
        f"{len(live)} of {len(found.rates)} latents fire on the {found.rates_of}; the median one on {percent(median, 2)}."
    )
    blocks.append(
        Figure(
            "feature_densities", histogram({"latents": 100 * live}, "share of images that a latent fires on, %", log=True),
            f"Histogram of the share of images that each live latent fires on, on a logarithmic axis. {summary}",
            f"Feature densities: {summary} {n_dead} never fire and are not drawn.",
        )
    )  # fmt: skip
    return Section("sae", "The sparse autoencoder", tuple(blocks))


def shown_metric(key: str, value: float | None) -> str:
    """One of FIGURES as text."""
    if value is None:
        return "undefined"
    return percent(value) if key == "dead_fraction" else f"{value:.{2 if key == 'l0' else 3}f}"
