"""Prediction: the AUC of a name's similarity and its p-value, against scikit-learn and a planted truth."""

import numpy as np
import pytest
import scipy.sparse
import scipy.stats
import torch
from sklearn.metrics import roc_auc_score

from dncbm.concepts.evidence import prediction
from dncbm.concepts.evidence.prediction import LEAST, average_ranks, predict, similarities

CPU = torch.device("cpu")


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def in_shards(make_store, folder, x: np.ndarray):
    """A store whose shards are of different sizes."""
    return make_store(folder, np.split(x.astype(np.float32), [3, len(x) // 2]))


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_equal_values_share_the_mean_of_their_ranks(levels: int) -> None:
    values = np.random.default_rng(levels).integers(0, levels, (4, 50)).astype(np.float32)
    np.testing.assert_array_equal(average_ranks(torch.from_numpy(values)), scipy.stats.rankdata(values, axis=1))


@pytest.mark.parametrize(("memory", "batch"), [(1, 4096), (20_000, 7), (1 << 29, 4096)])
def test_auc_and_p_are_those_of_one_pair_at_a_time(make_store, tmp_path, monkeypatch, memory: int, batch: int) -> None:
    """With as many draws as words, the null is all words, so that brute force knows it. Images along the axes make
    similarities exact, and many of them equal."""
    monkeypatch.setattr(prediction, "MEMORY", memory)
    monkeypatch.setattr(prediction, "BATCH", batch)
    rng = np.random.default_rng(0)
    directions = np.eye(10)[rng.integers(0, 10, 60)] * rng.choice([-1, 1], (60, 1))
    directions[0] = 0  # an image without a direction
    words = rng.integers(-8, 9, (25, 10)) / 16
    cosines = words @ directions.T
    assert max(len(np.unique(word)) for word in cosines) < 21
    codes = np.maximum(rng.normal(-0.5, 1, (60, 12)), 0)
    names = rng.integers(0, 25, 12)
    names[3] = names[4]
    store = in_shards(make_store, tmp_path / "x", directions * rng.integers(1, 9, (60, 1)))
    there = torch.from_numpy(words).float()
    np.testing.assert_array_equal(similarities(there, store), cosines)
    found = predict(scipy.sparse.csc_matrix(codes.astype(np.float32)), store, there, names, device=CPU, draws=100)
    for latent in range(12):
        aucs = np.array([roc_auc_score(codes[:, latent] > 0, word) for word in cosines])
        assert found.auc[latent] == pytest.approx(aucs[names[latent]], abs=1e-12)
        at_least = (aucs >= aucs[names[latent]] - 1e-12).sum()
        assert found.p[latent] == pytest.approx((1 + at_least) / (1 + 25))


def test_names_that_predict_are_told_from_shuffled_ones(make_store, tmp_path) -> None:
    """A latent is active on the images of its word."""
    rng = np.random.default_rng(1)
    words = unit(rng.normal(size=(200, 30)))
    of_image = rng.integers(0, 40, 800)
    store = in_shards(make_store, tmp_path / "x", 3 * words[of_image] + 0.3 * rng.normal(size=(800, 30)))
    codes = scipy.sparse.csc_matrix((of_image[:, None] == np.arange(40)).astype(np.float32))
    there = torch.from_numpy(words).float()
    planted = predict(codes, store, there, np.arange(40), device=CPU, draws=99)
    assert planted.auc.min() > 0.99
    assert planted.p.max() <= 0.02  # of 99 random words, at most the name itself is as good
    shuffled = predict(codes, store, there, np.roll(np.arange(40), 1), device=CPU, draws=99)
    assert 0.3 < np.median(shuffled.p) < 0.7
    assert (shuffled.p <= 0.05).mean() < 0.15
    assert shuffled.p.min() >= 1 / 100


@pytest.mark.parametrize(
    ("n_active", "name", "is_tested"),
    [(0, 0, False), (LEAST - 1, 0, False), (LEAST, 0, True), (15, 0, True), (16, 0, False), (20, 0, False), (10, -1, False)],
)
def test_too_few_images_or_no_known_name_give_no_number(make_store, tmp_path, n_active: int, name: int, is_tested) -> None:
    rng = np.random.default_rng(2)
    codes = np.zeros((20, 2), dtype=np.float32)
    codes[:n_active, 0] = 1
    codes[:10, 1] = 1  # another one, which is tested
    store = in_shards(make_store, tmp_path / "x", rng.normal(size=(20, 4)))
    words = torch.from_numpy(unit(rng.normal(size=(6, 4)))).float()
    found = predict(scipy.sparse.csc_matrix(codes), store, words, np.array([name, 1]), device=CPU)
    assert np.isfinite([found.auc[0], found.p[0]]).tolist() == [is_tested] * 2
    assert np.isfinite([found.auc[1], found.p[1]]).all()


def test_without_any_latent_to_test_there_are_no_numbers(make_store, tmp_path) -> None:
    store = in_shards(make_store, tmp_path / "x", np.eye(8))
    found = predict(scipy.sparse.csc_matrix((8, 3), dtype=np.float32), store, torch.eye(8), np.zeros(3, int), device=CPU)
    assert np.isnan(found.auc).all()
    assert np.isnan(found.p).all()


def test_how_strong_an_activation_is_does_not_count(make_store, tmp_path) -> None:
    rng = np.random.default_rng(3)
    store = in_shards(make_store, tmp_path / "x", rng.normal(size=(50, 4)))
    words, names = torch.from_numpy(unit(rng.normal(size=(30, 4)))).float(), rng.integers(0, 30, 5)
    codes = np.maximum(rng.normal(size=(50, 5)), 0).astype(np.float32)
    first, second = (predict(scipy.sparse.csc_matrix(c), store, words, names, device=CPU) for c in (codes, codes**3))
    np.testing.assert_array_equal(first.auc, second.auc)
    np.testing.assert_array_equal(first.p, second.p)
