"""What a report rests on: the figures of each part of a run, as they were measured. None: its stage was not run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Z95 = 1.959964
"""Standard deviations on either side of a mean that hold 95 % of a normal distribution."""


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Floats) -> Interval:
    """The mean of independent values with its normal 95 % interval; NaN for fewer than two values."""
    if len(values) < 2:
        return Interval(np.nan, np.nan, np.nan)
    mean, half = float(values.mean()), Z95 * float(values.std(ddof=1)) / sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def share_interval(n_true: float, n: int) -> Interval:
    """A share with its 95 % interval after Wilson (1927), which stays within 0 and 1; NaN without trials."""
    if not n:
        return Interval(np.nan, np.nan, np.nan)
    share, z2 = n_true / n, Z95**2 / n
    centre = (share + z2 / 2) / (1 + z2)
    half = Z95 / (1 + z2) * sqrt(share * (1 - share) / n + z2 / (4 * n))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def independent_difference(one: float, other: float, n: int) -> Interval:
    """The difference of two accuracies, each on n images, with a 95 % interval as if the images were different ones."""
    half = Z95 * sqrt((one * (1 - one) + other * (1 - other)) / n) if n else np.nan
    return Interval(one - other, one - other - half, one - other + half)


@dataclass(frozen=True)
class SAEFound:
    """The sparse autoencoder."""

    metrics: Mapping[str, Mapping[str, float | None]]
    """Split -> l0, explained_variance, dead_fraction (`sae_metrics`)."""
    rates: Floats | None = None
    """Share of images that each latent fires on, F."""
    rates_of: str = ""
    """Which images."""
    aligned_from: str = ""
    """The SAE of which it is a copy, fine-tuned towards its names; blank: it is none."""


@dataclass(frozen=True, eq=False)
class Names:
    """The names of F latents and their tests."""

    names: Sequence[str]
    labels: Sequence[str]
    """As they are shown."""
    verdicts: Sequence[str | None]
    """NAMED, COLLISION, ABSTAINS; None: not tested."""
    similarity: Floats
    """F."""
    live: NDArray[np.bool_]
    """F."""
    z: Floats | None = None
    """How far the nearest word stands out, F. None: no name was tested."""
    p: Floats | None = None
    """F; NaN for latents that were not tested."""
    q: Floats | None = None
    """p after Benjamini-Hochberg, F."""
    fdr: float = np.nan
    """The false discovery rate that verdicts are given at."""
    alternatives: Sequence[str] = ()
    """The more specific word offered to each latent; blank for none. Empty: none are known."""
    centred: Sequence[str] = ()
    """The name after centring, of each latent."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """What held-out images say about names and latents."""

    dataset: str
    images: int
    auc: Floats
    """Of each tested latent's name, F; NaN: too few images."""
    q: Floats
    """Of the test against random words, after Benjamini-Hochberg, F; NaN: too few images."""
    agrees: Floats
    """Whether CLIP-Dissect gives the same word, 1 or 0, F; NaN: it gives none."""
    mono: Floats
    """MonoScore divided by the weights of pairs, F; NaN: fewer than two images."""
    mono_pairs: Floats
    """MonoScore divided by the number of pairs, F."""
    mono_random: Floats
    """MonoScore divided by the weights of pairs, of random directions active on as many images, F; NaN as for `mono`, and
    throughout in a table of an older version."""
    encoder: str
    """Whose embeddings MonoScore is of."""
    circular: bool
    """Whether that is the SAE's own, by its weights."""
    names_encoder: str = ""
    """Whose embeddings the other tests use: the one that the names come from."""
    random_passed: float = np.nan
    """Share that passes of random directions like the decoder's, active on as many images and named after the nearest word;
    NaN in a table of an older version."""
    random_auc: float = np.nan
    """The mean AUC of their names."""

    @property
    def n_tested(self) -> int:
        """How many latents have enough images."""
        return int((~np.isnan(self.q)).sum())


@dataclass(frozen=True, eq=False)
class Stable:
    """How far other seeds find the same latents."""

    seeds: Sequence[int]
    """Of the SAEs that this one is compared with."""
    above: Floats
    """Share of these SAEs in which the matched latent has a cosine above STABLE after centring, F; NaN for dead latents."""
    rows: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """Kind of decoders (`this SAE`, ...) -> figure -> value."""
    random_above: float = 0.0
    """The mean of `above` for random decoders with the same mean and covariance."""
    edges: Floats = field(default_factory=lambda: np.empty(0))
    counts: Floats = field(default_factory=lambda: np.empty(0))
    """Matches of this SAE's latents in each bin of cosines."""
    random_counts: Floats = field(default_factory=lambda: np.empty(0))
    left_out: Mapping[int, int] = field(default_factory=dict)
    """Seed that was left out -> the seed whose SAE has the same start."""


@dataclass(frozen=True)
class Probed:
    """The linear probe on concepts and its baselines."""

    top1: float
    """Fractions, on val."""
    images: int
    features: float | None = None
    """Top-1 of the probe on raw features."""
    difference: Interval | None = None
    """Concepts less raw features."""
    paired: bool = False
    """Whether the difference is of the same images."""


class Point(NamedTuple):
    """An accuracy (a fraction) with its band; NaN: it has none."""

    top1: float
    low: float = float("nan")
    high: float = float("nan")


Curves = Mapping[str, Mapping[int, Point]]
"""Kind of input -> number of effective or contributing concepts -> accuracy."""


class Advantage(NamedTuple):
    """How much better concepts are than a control, on the same images: a difference of accuracies with its 95 % interval."""

    figure: str
    """`anec_5` or `anec_avg`."""
    against: str
    difference: Interval


@dataclass(frozen=True)
class Few:
    """Accuracies with few concepts."""

    nec: Curves
    ncc: Curves = field(default_factory=dict)
    averages: Mapping[tuple[str, str], Point] = field(default_factory=dict)
    """(kind of input, `nec` or `ncc`) -> the mean of its curve."""
    advantages: Sequence[Advantage] = ()
    details: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Kind of input -> ncc, effective, in_use, cea, at the largest NEC."""
    majority: float | None = None
    """Accuracy of always saying the commonest class."""
    bands: str = ""
    """What the accuracies of curves are means over, and what their bands are."""
    own: Mapping[str, float] = field(default_factory=dict)
    """Kind of input -> ANEC-avg of this SAE alone."""
    reached: Mapping[str, float] = field(default_factory=dict)
    """Kind of input -> NCC on val at the largest NCC asked for, of this SAE alone."""

    def average(self, kind: str, measure: str = "nec") -> Point:
        """The mean of a curve; without a band if none was measured."""
        curve = (self.nec if measure == "nec" else self.ncc)[kind]
        return self.averages.get((kind, measure)) or Point(float(np.mean([point.top1 for point in curve.values()])))


@dataclass(frozen=True)
class Edit:
    """An intervention: top-1 on val of each of its rows, as mean and standard deviation (0 for a single probe)."""

    what: str
    """`remove`, `keep`, `scale` or a list of them."""
    concepts: Sequence[str]
    """Their names."""
    overall: Mapping[str, tuple[float, float]]
    """`unedited`, `unedited, refit`, `edited`, `refit`, `refit, reweighted`, `random`."""
    worst: Mapping[str, tuple[float, float]]
    """Of the worst group, or where there are no groups, of the worst class."""
    worst_of: str = "class"
    images: int = 0
    """On which accuracies are measured."""
    worst_images: int = 0
    """Those of them that are of the group or class that is worst after the edit."""
    incomparable: str = ""
    """Why the random edits are nothing to compare it with; blank: they are."""
