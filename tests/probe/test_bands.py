"""Intervals over images and seeds, and comparisons with controls: against scipy."""

import numpy as np
import pytest
import scipy.stats
import torch

import dncbm.probe.bands as bands
from dncbm.probe.bands import Comparison, compare, leaks, over_seeds, percentiles, resampled, said_of


def rights(n: int, *shares: float, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([rng.random(n) < share for share in shares]))


def test_an_interval_is_that_of_scipys_bootstrap() -> None:
    correct = rights(300, 0.7, 0.05)
    samples = resampled(correct, seed=1, draws=4000)
    assert samples.shape == (4000, 2)
    for row, of_row in zip(correct.numpy().astype(float), samples.T, strict=True):
        theirs = scipy.stats.bootstrap((row,), np.mean, n_resamples=4000, method="percentile", random_state=2)
        assert percentiles(of_row) == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)
        assert of_row.mean() == pytest.approx(row.mean(), abs=0.003)


def test_draws_take_the_same_images_for_every_row_and_call(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = rights(200, 0.5)
    both = torch.cat([correct, ~correct, correct])
    samples = resampled(both, seed=3)
    np.testing.assert_array_equal(samples[:, 0], samples[:, 2])
    np.testing.assert_allclose(samples[:, 0] + samples[:, 1], 1, atol=1e-12)
    np.testing.assert_array_equal(resampled(correct, seed=3)[:, 0], samples[:, 0])
    assert (resampled(correct, seed=4)[:, 0] != samples[:, 0]).any()
    monkeypatch.setattr(bands, "NUMBERS", 900)  # four draws at a time
    pieces = resampled(both, seed=3)
    assert pieces.shape == samples.shape
    assert percentiles(pieces[:, 0]) == pytest.approx(percentiles(samples[:, 0]), abs=0.02)


def test_an_interval_over_seeds_is_students() -> None:
    values = [0.61, 0.64, 0.58, 0.66]
    mean, low, high = over_seeds(values)
    theirs = scipy.stats.t.interval(0.95, 3, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert (mean, low, high) == pytest.approx((np.mean(values), *theirs))


def test_a_comparison_is_paired_over_images() -> None:
    """The control errs on a subset of the images that the concepts get right: the difference is far surer than either."""
    concepts = rights(400, 0.6)[0]
    worse = concepts & rights(400, 0.9, seed=1)[0]
    drawn = resampled(torch.stack([concepts, worse, concepts]), seed=0)
    samples = {("concepts", "a"): drawn[:, 0], ("random", "a"): drawn[:, 1], ("untrained", "a"): drawn[:, 2]}
    top1 = {key: float(of.double().mean()) for key, of in zip(samples, (concepts, worse, concepts), strict=True)}
    random, untrained = compare({"figure": ("a",)}, samples, top1, ("random", "untrained"))
    assert (random.figure, random.against) == ("figure", "random")
    lost = float((concepts & ~worse).double().mean())
    assert random.advantage == pytest.approx(lost)
    width = 2 * 1.96 * np.sqrt(lost * (1 - lost) / 400)
    assert random.high - random.low == pytest.approx(width, rel=0.15)
    assert (untrained.advantage, untrained.low, untrained.high) == (0, 0, 0)
    assert not leaks([random, untrained]), "it is the random directions that count"


@pytest.mark.parametrize(("low", "flagged"), [(0.01, False), (0.0, True), (-0.02, True)])
def test_leakage_is_an_advantage_that_is_not_above_zero(low: float, flagged: bool) -> None:
    one = Comparison("anec_5", "random", 0.5, 0.45, 0.05, low, 0.1)
    sure = Comparison("anec_avg", "random", 0.5, 0.2, 0.3, 0.2, 0.4)
    assert leaks([one, sure]) is leaks([sure, one]) is flagged
    assert said_of(one) == (
        f"ANEC-5: concepts 50.0%, random directions 45.0%, +5.0 points (95 % of draws of images: {100 * low:+.1f} to +10.0)"
    )
