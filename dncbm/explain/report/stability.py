"""Stability over seeds: how far other SAEs find the same latents, beside random decoders."""

import numpy as np

from dncbm.concepts.evidence.stability import BINS, Compared, read_stability
from dncbm.explain.report.claims import STABLE
from dncbm.explain.report.document import Block, Figure, Section, Table, listed, note, percent, said
from dncbm.explain.report.figures import shares
from dncbm.explain.report.findings import Stable
from dncbm.runs.declarations import SAERun
from dncbm.runs.settings import Settings

HEADER = ("decoders", "median cosine", "above 0.7", f"above {STABLE}", "same name", f"same name, if above {STABLE}")
SHARES = ("above_07", "above_09", "names_agree", "names_agree_above_09")


def read_stable(settings: Settings, run: SAERun) -> Stable | None:
    """How stable the latents are; None if it was not measured. Raises as `read_stability`."""
    found = read_stability(settings, run)
    if found is None:
        return None
    rows = dict[str, dict[str, float | None]]()
    for way, compared in (("", found.centred), (", not centred", found.uncentred)):
        rows |= {f"this SAE{way}": _figures(compared, "trained"), f"random decoders{way}": _figures(compared, "random")}
    cosines = np.concatenate([match.cosine[~np.isnan(match.cosine)] for match in found.matches.values()])
    counts, _ = np.histogram(cosines.clip(0, 1), BINS)
    random = np.asarray(found.random_counts, dtype=np.float64)
    above = np.mean(
        [np.where(np.isnan(match.cosine), np.nan, match.cosine > STABLE) for match in found.matches.values()], axis=0
    )
    return Stable(
        found.seeds, above, rows, found.centred.random.above_09, BINS, counts.astype(np.float64), random, found.left_out
    )  # fmt: skip


def _figures(compared: Compared, kind: str) -> dict[str, float | None]:
    figures = getattr(compared, kind)
    return {"median": figures.median} | {name: getattr(figures, name) for name in SHARES}


def stability_section(found: Stable) -> Section:
    """The shares of latents that are found again, beside those of random decoders, and both histograms."""
    known = found.above[~np.isnan(found.above)]
    rows = tuple(
        (kind, f"{of['median']:.3f}", *("" if of[name] is None else percent(float(of[name] or 0)) for name in SHARES))
        for kind, of in found.rows.items()
    )
    blocks: list[Block] = [
        said(
            f"Each latent is matched with one of each SAE that differs only in its seed ({listed([*map(str, found.seeds)])}), "
            "so that the sum of cosines is largest, after decoders are centred: a mean that all latents share makes any two "
            "SAEs look alike. Random decoders have the same mean and covariance. Shares are of all matches: one per latent "
            "and other SAE."
        ),
        Table(f"Matches of {len(known)} live latents in {len(found.seeds)} other SAEs", HEADER, rows),
    ]
    if found.left_out:
        twins = [f"{seed} (the same as {twin})" for seed, twin in found.left_out.items()]
        blocks.append(note(f"Left out, since another SAE has the same start: seed {listed(twins)}."))
    if not any(of["names_agree"] is not None for of in found.rows.values()):
        blocks.append(note("Names were not compared: the vocabulary was not embedded."))
    if found.counts.sum():
        counts = {"this SAE": found.counts, "random decoders": found.random_counts}
        summary = (
            f"{percent(float(known.mean()))} of matches are above {STABLE}, of random decoders {percent(found.random_above)}"
        )
        blocks.append(
            Figure(
                "stability", shares(counts, found.edges, "cosine of matched latents, centred", "matches"),
                f"Two histograms of the cosine of matched latents, this SAE and random decoders: {summary}.",
                f"Cosine of matched latents; {summary}.",
            )
        )  # fmt: skip
    return Section("stability", "Stability over seeds", tuple(blocks))
