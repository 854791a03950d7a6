"""Matches of latents: against all permutations, and against what chance does."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from dncbm.concepts.evidence.matching import centred, match, n_own_index, random_like, share_start


def directions(n: int, width: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 2), (5, 5), (6, 6), (3, 6), (6, 3), (1, 5), (5, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_pairing_has_a_larger_sum(n: int, m: int, seed: int) -> None:
    one, other = directions(n, 3, seed), directions(m, 3, 100 + seed)
    found = match(one, other)
    cosines = (one.double() @ other.double().T).numpy()
    few, many = (cosines, m) if n <= m else (cosines.T, n)
    best = max(sum(few[i, j] for i, j in enumerate(chosen)) for chosen in permutations(range(many), len(few)))
    assert found.cosine.sum() == pytest.approx(best, abs=1e-6)
    partnered = found.partner >= 0
    assert len(set(found.partner[partnered])) == partnered.sum() == min(n, m)
    assert found.cosine[partnered] == pytest.approx(cosines[np.flatnonzero(partnered), found.partner[partnered]], abs=1e-6)
    assert (found.cosine[~partnered] == 0).all()


def test_an_order_is_found_again() -> None:
    one = directions(200, 16, 0)
    order = np.random.default_rng(1).permutation(200)
    found = match(one, one[order])
    assert (order[found.partner] == np.arange(200)).all()
    assert found.cosine == pytest.approx(np.ones(200), abs=1e-6)


def test_centring_removes_what_latents_share() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 8)) + 5
    expected = rows - rows.mean(axis=0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert centred(torch.from_numpy(rows)).numpy() == pytest.approx(expected)
    assert centred(torch.from_numpy(rows - 9)).numpy() == pytest.approx(expected)
    assert (centred(directions(1, 4, 0).repeat(3, 1)) == 0).all()  # none differs from the mean


def test_random_directions_have_the_mean_and_the_covariance_of_a_decoder() -> None:
    rng = np.random.default_rng(0)
    factor, mean = rng.normal(size=(6, 6)) / 4, rng.normal(size=6)
    decoder = normalize(torch.from_numpy(mean + rng.normal(size=(20_000, 6)) @ factor), dim=1)
    found = random_like(decoder, np.random.default_rng(1))
    # numpy draws the reference: directions of the same normal distribution, then of unit norm.
    drawn = rng.multivariate_normal(decoder.numpy().mean(axis=0), np.cov(decoder.numpy().T), size=20_000)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    assert found.norm(dim=1).numpy() == pytest.approx(np.ones(20_000))
    assert found.numpy().mean(axis=0) == pytest.approx(drawn.mean(axis=0), abs=0.01)
    assert np.cov(found.numpy().T) == pytest.approx(np.cov(drawn.T), abs=0.004)
    assert np.abs(np.cov(drawn.T)).max() > 0.05


def test_random_directions_stay_in_the_space_of_a_decoder_and_are_drawn_again_from_a_seed() -> None:
    decoder = torch.zeros(10, 30)
    decoder[:, :4] = directions(10, 4, 0)  # a singular covariance
    first, again, other = (random_like(decoder, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first.dtype == decoder.dtype
    assert first[:, 4:].abs().max() < 1e-6
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)


def test_equal_indices_are_counted() -> None:
    one, other = directions(40, 4, 0), directions(40, 4, 1)
    other[:7] = one[:7]
    mine, others = centred(one).numpy(), centred(other).numpy()
    nearest = [max(range(40), key=lambda j: float(mine[i] @ others[j])) for i in range(40)]
    expected = sum(i == j for i, j in enumerate(nearest))
    assert expected >= 7
    assert n_own_index(one, other) == expected


@pytest.mark.parametrize("groups", [1, 5])
def test_a_start_is_shared_if_chance_is_below_one_in_a_million(groups: int) -> None:
    for n_own in range(40):
        chance = 1 - sum(math.exp(-groups) * groups**k / math.factorial(k) for k in range(n_own))
        assert share_start(n_own, groups) == (chance < 1e-6)


def test_what_shares_no_start_is_not_said_to() -> None:
    """Also where a few latents are near to all others, or all SAEs find the same latents in another order."""
    rng = np.random.default_rng(0)
    counts = []
    for seed in range(300):
        one, other = directions(64, 8, seed), directions(64, 8, 1000 + seed)
        if seed % 3 == 1:
            one, other = (normalize(of + 2 * of[:2].repeat(32, 1), dim=1) for of in (one, other))
        if seed % 3 == 2:
            other = one[rng.permutation(64)]
        counts.append(n_own_index(one, other))
        assert not share_start(counts[-1])
    assert np.mean(counts) == pytest.approx(1, abs=0.25)  # about 4 standard errors of Poisson's law
