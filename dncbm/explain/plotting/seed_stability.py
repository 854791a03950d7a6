"""How close latents are to their matches in other seeds, and random directions to theirs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dncbm.concepts.evidence.stability import BINS, SEED_STABILITY, read_stability, seed_stability
from dncbm.explain.plotting.colours import CONCEPTS, RANDOM
from dncbm.explain.plotting.fonts import families, quiet, wrapped
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SAERun, Seeds
from dncbm.runs.manifests import Outcome
from dncbm.runs.settings import Settings
from sparse_autoencoder.files import whole_file

WIDTH, TITLE = 4.8, 10.0
"""Inches of the figure; points of its title."""


def stability_histogram(
    trained: Sequence[int] | NDArray[np.int64], random: Sequence[int] | NDArray[np.int64], medians: tuple[float, float],
    title: str, path: Path,
) -> None:  # fmt: skip
    """Draw two histograms over BINS, and save the figure as a PNG.

    Args:
        trained: number of cosines of matched latents in each bin.
        random: the same of random directions.
        medians: of the two.
        title: any text.
        path: where the figure is saved.
    """
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    drawn = (("SAEs", trained, CONCEPTS, "-"), ("random directions", random, RANDOM, "--"))
    for (label, counts, colour, style), median in zip(drawn, medians, strict=True):
        shares = 100 * np.asarray(counts) / max(int(np.sum(counts)), 1)
        label = f"{label}, median {median:.2f}"
        axes.stairs(shares, BINS, fill=True, color=colour, alpha=0.35)
        axes.stairs(shares, BINS, color=colour, linestyle=style, label=label)
    axes.set_xlim(BINS[0], BINS[-1])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("cosine of a latent and its match in another seed")
    axes.set_ylabel("share of latents, %")
    # Names of data sets and encoders are no formulas, and may be long or in other scripts.
    lines = "\n".join(wrapped(title, WIDTH - 0.8, TITLE, lines=3))
    axes.set_title(lines, fontsize=TITLE, family=list(families(lines)), parse_math=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    with whole_file(path) as temporary, quiet():
        figure.savefig(temporary, dpi=130, format="png")


def draw_stability(settings: Settings, run: SAERun) -> None:
    """Draw what stage 14 measured; nothing if it was not run."""
    found, path = read_stability(settings, run), Artifacts(settings).seed_stability_figure(run)
    if found is None:
        return
    cosines = np.concatenate([matches.cosine for matches in found.matches.values()])
    cosines = cosines[~np.isnan(cosines)].clip(BINS[0], BINS[-1])  # dead latents have none
    medians = (found.centred.trained.median, found.centred.random.median)
    others = ", ".join(map(str, found.seeds))
    title = f"{run.dataset}, {run.encoder}: seed {found.seed} against {others}"
    stability_histogram(np.histogram(cosines, BINS)[0], found.random_counts, medians, title, path)
    print(f"figure: {path}")


def stability_and_figure(
    settings: Settings, run: SAERun, seeds: Seeds, *, device: str = "auto", overwrite: bool = False
) -> Outcome:
    """Stage 14 and its figure.

    Raises as `seed_stability` does.
    """
    outcome = seed_stability(settings, run, seeds, device=device, overwrite=overwrite)
    drawn = Artifacts(settings).seed_stability_figure(run).is_file()
    if outcome is Outcome.RAN or (outcome is Outcome.ALREADY_DONE and not drawn):
        draw_stability(settings, run)
    return outcome


STABILITY_AND_FIGURE = replace(SEED_STABILITY, function=stability_and_figure)
