"""Whether images that activate a latent are alike: MonoScore in both published definitions, beside random directions."""

from collections.abc import Sequence

import numpy as np

from dncbm.explain.report.document import Block, Figure, Name, Section, Table, said
from dncbm.explain.report.figures import shares
from dncbm.explain.report.findings import Evidence, Floats

BINS = 25


def one_thing_section(evidence: Evidence, absent: Sequence[Block]) -> Section:
    """MonoScore of every latent that is active on two images, and histograms. `absent` are notes on what is missing."""
    known, random = (scores[~np.isnan(scores)] for scores in (evidence.mono, evidence.mono_random))
    about = said(
        "MonoScore is the similarity of two images, weighted by how strongly both activate a latent: high, if what activates "
        "it looks alike. It knows no name. Two definitions are published: the official code divides by the sum of the weights "
        "of all pairs, the paper's equation by the number of pairs, so that it also grows with how often a latent is active. "
        "The images of any direction are somewhat alike, so each latent stands beside a random one that is active on as many. "
        f"Images are {evidence.images:,} of ", Name(evidence.dataset), " that the SAE was not trained on, embedded by ",
        Name(evidence.encoder), ".",
    )  # fmt: skip
    rows = (
        ("divided by weights (official code)", *_summary(evidence.mono)),
        *([("the same, random directions", *_summary(evidence.mono_random))] if len(random) else []),
        ("divided by pairs (paper's equation)", *_summary(evidence.mono_pairs)),
    )
    header = ("definition", "mean", "lower quartile", "median", "upper quartile")
    blocks: list[Block] = [about, *absent, Table(f"MonoScore of {len(known)} latents", header, rows)]
    if n_without := len(evidence.mono) - len(known):
        blocks.append(said(f"{n_without} latents are active on fewer than two images and have no score."))
    if len(known):
        groups = {"latents": known} | ({"random directions": random} if len(random) else {})
        edges = np.histogram_bin_edges(np.concatenate([*groups.values()]), BINS)
        counts = {label: np.histogram(of, edges)[0].astype(float) for label, of in groups.items()}
        summary = "; ".join(f"{label} have a median of {np.median(of):.3f}" for label, of in groups.items())
        blocks.append(
            Figure(
                "monoscore", shares(counts, edges, "MonoScore, divided by weights", "each"),
                f"Histograms of MonoScore: {summary}.", f"MonoScore, divided by weights: {summary}.",
            )
        )  # fmt: skip
    return Section("one-thing", "Is each latent one thing?", tuple(blocks))


def _summary(scores: Floats) -> tuple[str, ...]:
    known = scores[~np.isnan(scores)]
    if not len(known):
        return ("", "", "", "")
    digits = 3 if known.mean() >= 0.01 else 6
    return tuple(f"{value:.{digits}f}" for value in (known.mean(), *np.quantile(known, (0.25, 0.5, 0.75))))
