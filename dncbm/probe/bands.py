"""How sure an accuracy is: intervals over images (bootstrap) or seeds, and whether concepts do better than their controls."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
import torch
from numpy.typing import NDArray

DRAWS, CONFIDENCE = 1000, 0.95
NUMBERS = 2**22
"""About the most numbers that drawing images holds in memory."""

Interval = tuple[float, float]
Samples = NDArray[np.float64]
"""A figure for each draw of images."""


def resampled(correct: torch.Tensor, seed: int, draws: int = DRAWS) -> Samples:
    """Accuracies on images drawn with replacement, draws x rows, for `correct` (bool, rows x images).

    A draw takes the same images for all rows, so that means and differences of rows keep what they share.
    """
    n = correct.shape[1]
    generator, found = torch.Generator().manual_seed(seed), []
    chunk, of_image = max(1, NUMBERS // max(n, 1)), correct.T.float().contiguous()
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        drawn = torch.randint(n, (size, n), generator=generator)
        times = (drawn + n * torch.arange(size)[:, None]).flatten().bincount(minlength=size * n).view(size, n)
        found.append((times.float() @ of_image).double() / n)  # sums of whole numbers: exact up to 2^24 images
    return torch.cat(found).numpy()


def percentiles(samples: Samples) -> Interval:
    """The interval that holds the middle 95 % of the draws."""
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % t-interval, of one accuracy per seed, of which there are at least two."""
    mean = float(np.mean(values))
    t = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    reach = t * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - reach, mean + reach


@dataclass(frozen=True)
class Comparison:
    """The accuracy of the concepts beside that of a control, on the same images."""

    figure: str
    """anec_5 or anec_avg."""
    against: str
    """random or untrained."""
    concepts: float
    control: float
    """Accuracies on val, fractions."""
    advantage: float
    """Their difference."""
    low: float
    high: float
    """The 95 % interval of the difference over draws of images."""

    @property
    def is_above(self) -> bool:
        """Whether the concepts do better than the control by more than the choice of images explains."""
        return self.low > 0


def compare(
    figures: Mapping[str, Sequence[str]], samples: Mapping[tuple[str, str], Samples], top1: Mapping[tuple[str, str], float],
    controls: Iterable[str],
) -> list[Comparison]:  # fmt: skip
    """Concepts beside each control in each figure, the mean over some points.

    Args:
        figures: name of a figure -> its points.
        samples: (kind of inputs, point) -> its accuracy for each draw of images.
        top1: the same, its accuracy on all images.
        controls: kinds of inputs.
    """
    found = []
    for figure, points in figures.items():
        for control in controls:
            ours, theirs = (float(np.mean([top1[on, point] for point in points])) for on in ("concepts", control))
            differences = [samples["concepts", point] - samples[control, point] for point in points]
            interval = percentiles(np.mean(differences, axis=0))
            found.append(Comparison(figure, control, ours, theirs, ours - theirs, *interval))
    return found


def said_of(one: Comparison) -> str:
    """A comparison in one line."""
    figure = one.figure.replace("anec", "ANEC").replace("_", "-")
    control = {"random": "random directions", "untrained": "untrained SAE"}[one.against]
    interval = f"95 % of draws of images: {100 * one.low:+.1f} to {100 * one.high:+.1f}"
    return (
        f"{figure}: concepts {one.concepts:.1%}, {control} {one.control:.1%}, {100 * one.advantage:+.1f} points ({interval})"
    )


LEAKS = "the accuracy may leak: with few weights, concepts are not clearly above random directions"


def leaks(comparisons: Iterable[Comparison]) -> bool:
    """Whether the accuracy may owe nothing to the concepts: in some figure, it is not above that of random directions."""
    return any(one.against == "random" and not one.is_above for one in comparisons)
