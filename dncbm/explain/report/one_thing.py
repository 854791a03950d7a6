"""Whether latents are one thing each: MonoScore in both published definitions."""

import numpy as np

from dncbm.explain.report.document import Block, Figure, Name, Section, Table, note, said
from dncbm.explain.report.figures import histogram
from dncbm.explain.report.findings import Evidence, Floats


def one_thing_section(evidence: Evidence) -> Section:
    """MonoScore of every latent that is active on two images, its histogram, and whether it is circular."""
    known = ~np.isnan(evidence.mono)
    blocks: list[Block] = [
        said(
            "MonoScore is the similarity of two images, weighted by how strongly both activate a latent: high, if what "
            "activates it looks alike. It knows no name. Two definitions are published: the official code divides by the sum "
            "of the weights of all pairs, the paper's equation by the number of pairs, so that it also grows with how often a "
            f"latent is active. Images are {evidence.images:,} of ", Name(evidence.dataset), " that the SAE was not trained "
            "on, embedded by ", Name(evidence.encoder), ".",
        )
    ]  # fmt: skip
    if evidence.circular:
        blocks.append(
            note(
                "Circular: these are the embeddings that the SAE was trained on, whose directions the latents are. Name "
                "another encoder with --evidence_encoder for a test."
            )
        )
    rows = (
        ("divided by weights (official code)", *_summary(evidence.mono)),
        ("divided by pairs (paper's equation)", *_summary(evidence.mono_pairs)),
    )
    header = ("definition", "mean", "lower quartile", "median", "upper quartile")
    blocks.append(Table(f"MonoScore of {known.sum()} latents", header, rows))
    beside = "unknown" if np.isnan(evidence.pair_similarity) else f"{evidence.pair_similarity:.3f}"
    blocks.append(
        said(
            f"Mean similarity of two images, whatever activates: {beside}. {(~known).sum()} latents are active on fewer than "
            "two images and have no score."
        )
    )
    if known.any():
        marks = {} if np.isnan(evidence.pair_similarity) else {f"two images: {beside}": evidence.pair_similarity}
        summary = f"median {np.median(evidence.mono[known]):.3f}; mean similarity of two images {beside}"
        blocks.append(
            Figure(
                "monoscore", histogram({"latents": evidence.mono[known]}, "MonoScore, divided by weights", marks=marks),
                f"Histogram of the MonoScore of {known.sum()} latents: {summary}.",
                f"MonoScore of each latent, divided by weights: {summary}.",
            )
        )  # fmt: skip
    return Section("one-thing", "Is each latent one thing?", tuple(blocks))


def _summary(scores: Floats) -> tuple[str, ...]:
    known = scores[~np.isnan(scores)]
    if not len(known):
        return ("", "", "", "")
    digits = 3 if known.mean() >= 0.01 else 6
    return tuple(f"{value:.{digits}f}" for value in (known.mean(), *np.quantile(known, (0.25, 0.5, 0.75))))
