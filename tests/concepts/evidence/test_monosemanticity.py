"""MonoScore from sums against all pairs of images, and against the official code's numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

from dncbm.concepts.evidence import monosemanticity as module
from dncbm.concepts.evidence.monosemanticity import monosemanticity

CPU = torch.device("cpu")
# `made` in the file says how, from which commits.
OFFICIAL = json.loads((Path(__file__).parents[2] / "fixtures" / "evidence_reference.json").read_text())


def csc(codes: object) -> scipy.sparse.csc_matrix:
    return scipy.sparse.csc_matrix(np.array(codes, dtype=np.float32))


def by_brute_force(codes: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both definitions, pair by pair, over ordered pairs as in the paper's equation; the ratio is that of unordered ones."""
    codes, x = codes.astype(np.float64), x.astype(np.float64)
    norms = np.linalg.norm(x, axis=1)
    n = len(x)
    similarity, weights = np.zeros(codes.shape[1]), np.zeros(codes.shape[1])
    with np.errstate(invalid="ignore"):
        scaled = (codes - codes.min(axis=0)) / (codes.max(axis=0) - codes.min(axis=0))
    for i in range(n):
        for j in range(n):
            if i != j:
                cosine = float(x[i] @ x[j]) / (norms[i] * norms[j]) if norms[i] * norms[j] else 0.0
                similarity += scaled[i] * scaled[j] * cosine
                weights += scaled[i] * scaled[j]
    weights[~(weights > 0)] = np.nan
    return similarity / weights, np.where(np.isnan(weights), np.nan, similarity / (n * (n - 1)))


@pytest.fixture
def official(make_store, tmp_path):
    return make_store(tmp_path / "official", np.split(np.array(OFFICIAL["images"], dtype=np.float32), [11, 12]))


def test_divided_by_weights_it_is_that_of_the_official_code(official) -> None:
    """Latent 5 is active on every image, 6 on none, 7 on one."""
    found = monosemanticity(csc(OFFICIAL["codes"]), official, device=CPU)
    theirs = np.array([np.nan if score is None else score for score in OFFICIAL["monosemanticity_of_codes"]])
    assert np.isnan(theirs).tolist() == [False] * 6 + [True] * 2
    np.testing.assert_allclose(found.by_weights, theirs, atol=2e-6)  # theirs are sums in float32
    np.testing.assert_array_equal(np.isnan(found.by_pairs), np.isnan(theirs))


@pytest.mark.parametrize("batch", [5, 4096])
def test_both_definitions_are_those_of_all_pairs(make_store, tmp_path, monkeypatch, batch: int) -> None:
    monkeypatch.setattr(module, "BATCH", batch)
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(45, 7)) * rng.uniform(0.1, 9, (45, 1)) + 0.4).astype(np.float32)
    x[4] = 0  # is like no other
    codes = np.maximum(rng.normal(-0.3, 1, (45, 9)), 0).astype(np.float32)
    codes[:, 1] = rng.uniform(3, 4, 45)  # active on every image
    codes[:, 2] = 0
    codes[:, 3] = 2.5  # always the same: no image stands out
    codes[:, 4] = np.where(np.arange(45) == 7, 1, 0)
    codes[:, 5] = np.where(np.arange(45) == 7, 1, 0.5)  # one image alone has a weight
    codes[[3, 9], 6:7] = 1e-12
    codes[:, 7] *= np.float32(1e12)
    found = monosemanticity(csc(codes), make_store(tmp_path / "x", np.split(x, [8, 31])), device=CPU)
    by_weights, by_pairs = by_brute_force(codes, x)
    assert np.flatnonzero(np.isnan(by_weights)).tolist() == [2, 3, 4, 5]
    np.testing.assert_allclose(found.by_weights, by_weights, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(found.by_pairs, by_pairs, rtol=1e-10, atol=1e-15)


def test_two_active_images_give_their_cosine(make_store, tmp_path) -> None:
    x = np.array([[1, 0], [1, 1], [0, 1], [-1, 0]], dtype=np.float32)
    codes = csc([[1, 2, 0], [1, 0, 3], [0, 0, 0], [0, 5, 3]])
    found = monosemanticity(codes, make_store(tmp_path / "x", [x]), device=CPU)
    np.testing.assert_allclose(found.by_weights, [0.5**0.5, -1, -(0.5**0.5)], atol=1e-12)
    np.testing.assert_allclose(found.by_pairs, np.array([0.5**0.5, -0.4, -(0.5**0.5)]) / 6, atol=1e-12)


def test_the_codes_stay_as_they_are(official) -> None:
    codes = csc(OFFICIAL["codes"])
    before = codes.toarray()
    monosemanticity(codes, official, device=CPU)
    np.testing.assert_array_equal(codes.toarray(), before)


def test_one_image_has_no_pairs(make_store, tmp_path) -> None:
    found = monosemanticity(csc([[1, 0]]), make_store(tmp_path / "x", [np.ones((1, 3), dtype=np.float32)]), device=CPU)
    assert np.isnan([*found.by_weights, *found.by_pairs]).all()
