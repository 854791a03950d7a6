"""Soft-WPMI against the official code's numbers and the formula, one logarithm at a time."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

from dncbm.concepts.evidence import dissect as module
from dncbm.concepts.evidence.dissect import LEAST, dissect, soft_wpmi

CPU = torch.device("cpu")
# `made` in the file says how, from which commits.
OFFICIAL = json.loads((Path(__file__).parents[2] / "fixtures" / "evidence_reference.json").read_text())
MEMORIES = [pytest.param(1, 1, 3, id="small blocks"), pytest.param(1 << 28, 1 << 16, 512, id="one block")]


def csc(codes: object) -> scipy.sparse.csc_matrix:
    return scipy.sparse.csc_matrix(np.array(codes, dtype=np.float32))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture
def official(make_store, tmp_path):
    """Images in shards, and the words."""
    store = make_store(tmp_path / "official", np.split(np.array(OFFICIAL["images"], dtype=np.float32), [11, 12]))
    return store, torch.nn.functional.normalize(torch.tensor(OFFICIAL["words"]), dim=1)


@pytest.mark.parametrize(("memory", "in_cache", "batch"), MEMORIES)
@pytest.mark.parametrize(
    ("codes", "latents", "top_k", "expected"),
    [
        ("codes", slice(0, 6), 25, "soft_wpmi_top_25_of_codes_0_to_5"),
        ("dense_codes", slice(None), 40, "soft_wpmi_top_40_of_dense_codes"),
        ("dense_codes", slice(None), 100, "soft_wpmi_top_40_of_dense_codes"),  # there are only 40 images
    ],
)
def test_it_is_that_of_the_official_code(
    official, monkeypatch, codes: str, latents: slice, top_k: int, expected: str, memory: int, in_cache: int, batch: int
) -> None:
    for name, value in (("MEMORY", memory), ("IN_CACHE", in_cache), ("BATCH", batch)):
        monkeypatch.setattr(module, name, value)
    store, words = official
    matrix = csc(np.array(OFFICIAL[codes])[:, latents])
    blocks = list(soft_wpmi(matrix, store, words, device=CPU, top_k=top_k))
    assert [start for start, _ in blocks] == np.cumsum([0, *(found.shape[1] for _, found in blocks)])[:-1].tolist()
    theirs = np.array(OFFICIAL[expected])
    np.testing.assert_allclose(torch.cat([found for _, found in blocks], dim=1), theirs, atol=2e-4)  # float32, up to 80
    best = dissect(matrix, store, words, device=CPU, top_k=top_k)
    np.testing.assert_array_equal(best.word, theirs.argmax(axis=1))
    np.testing.assert_allclose(best.score, theirs.max(axis=1), atol=2e-4)
    assert best.top_k == min(top_k, 40)


def by_hand(codes: np.ndarray, x: np.ndarray, words: np.ndarray, top_k: int) -> np.ndarray:
    """The formula of `soft_wpmi`, in float64."""
    exponentials = np.exp(10 * unit(x) @ unit(words).T)
    probability = exponentials / exponentials.sum(axis=1, keepdims=True)
    sums = []
    for code in codes.T:
        order = [i for i in np.argsort(-code, kind="stable") if code[i] > 0][:top_k]
        p = 0.998 - np.arange(len(order)) / top_k * (0.998 - 0.97)
        with_word = np.log(1 + p[:, None] * (probability[order] - 1) + 1e-7).sum(axis=0)
        sums.append(with_word - np.log(1 - p + 1e-7).sum())
    found = np.array(sums)
    return found - np.log(np.exp(found).mean(axis=0))


@pytest.mark.parametrize(("memory", "in_cache", "batch"), MEMORIES)
def test_only_images_that_activate_a_latent_count(make_store, tmp_path, monkeypatch, memory, in_cache, batch) -> None:
    """Latents of few to many active images, among them ones with too few, which are left out."""
    for name, value in (("MEMORY", memory), ("IN_CACHE", in_cache), ("BATCH", batch)):
        monkeypatch.setattr(module, name, value)
    rng = np.random.default_rng(4)
    x, words = rng.normal(size=(70, 6)), rng.normal(size=(40, 6))
    codes = np.zeros((70, 8))
    sizes = [0, 1, LEAST - 1, LEAST, 12, 19, 20, 55]
    for latent, size in enumerate(sizes):
        codes[rng.choice(65, size, replace=False), latent] = rng.uniform(0.1, 2, size)
    store = make_store(tmp_path / "x", np.split(x.astype(np.float32), [9]))
    expected = by_hand(codes[:, 3:].astype(np.float32), x, words, top_k=20)
    there = torch.from_numpy(unit(words)).float()
    found = torch.cat([one for _, one in soft_wpmi(csc(codes), store, there, device=CPU, top_k=20)], dim=1)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    best = dissect(csc(codes), store, there, device=CPU, top_k=20)
    assert best.word.tolist() == [-1, -1, -1, *expected.argmax(axis=1)]
    assert np.isnan(best.score).tolist() == [True] * 3 + [False] * 5


def test_products_of_factors_do_not_overflow(make_store, tmp_path) -> None:
    """One word that describes every image with certainty gives the largest factor, 500, for all of 100 images."""
    x = np.zeros((120, 3), dtype=np.float32)
    x[:, 0] = 1
    words = np.vstack([[1, 0, 0], np.tile([-1, 0, 0], (5, 1))])
    codes = np.random.default_rng(5).uniform(0.1, 1, (120, 2)).astype(np.float32)
    found = [one for _, one in soft_wpmi(csc(codes), make_store(tmp_path / "x", [x]), torch.tensor(words).float(), device=CPU)]
    assert torch.cat(found, dim=1).isfinite().all()
    np.testing.assert_allclose(torch.cat(found, dim=1), by_hand(codes, x, words, 100), atol=1e-3)


def test_planted_words_are_found(make_store, tmp_path) -> None:
    rng = np.random.default_rng(6)
    words = unit(rng.normal(size=(300, 24)))
    of_image = rng.integers(0, 30, 900)
    store = make_store(tmp_path / "x", [(2 * words[of_image] + 0.2 * rng.normal(size=(900, 24))).astype(np.float32)])
    codes = (of_image[:, None] == np.arange(30)) * rng.uniform(0.5, 1, (900, 30))
    found = dissect(csc(codes), store, torch.from_numpy(words).float(), device=CPU)
    assert found.word.tolist() == list(range(30))


def test_without_any_latent_to_name_there_are_no_words(make_store, tmp_path) -> None:
    store = make_store(tmp_path / "x", [np.eye(8, dtype=np.float32)])
    found = dissect(scipy.sparse.csc_matrix((8, 3), dtype=np.float32), store, torch.eye(8), device=CPU)
    assert found.word.tolist() == [-1] * 3
