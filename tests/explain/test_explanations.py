import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans, kmeans_plusplus

import dncbm.explain.explanations
from dncbm.explain.explanations import (
    Clustering,
    contributions,
    kmeans,
    leading,
    mean_centred,
    mean_strengths,
    predict,
    top_activating,
)


def by_brute_force(dense: np.ndarray, latent: int, k: int) -> list[int]:
    """Images by falling strength, without those that do not activate the latent; ties go to the lower row."""
    rows = sorted(range(len(dense)), key=lambda row: (-dense[row, latent], row))
    return [row for row in rows if dense[row, latent] > 0][:k]


@given(
    n_images=st.integers(1, 12), n_latents=st.integers(1, 6), k=st.integers(1, 15), seed=st.integers(0, 999), data=st.data()
)
def test_top_images_are_the_strongest(n_images: int, n_latents: int, k: int, seed: int, data: st.DataObject) -> None:
    dense = np.random.default_rng(seed).integers(0, 4, (n_images, n_latents)).astype(np.float32)  # many ties and zeros
    latents = np.array(data.draw(st.lists(st.integers(0, n_latents - 1), min_size=1, max_size=8)))
    tops = top_activating(scipy.sparse.csr_matrix(dense), latents, k)
    assert [list(top) for top in tops] == [by_brute_force(dense, latent, k) for latent in latents]


def test_stored_zeros_are_zeros() -> None:
    strengths = scipy.sparse.csr_matrix(
        (np.array([0.0, 2.0, 0.0], np.float32), np.array([0, 0, 0]), np.array([0, 1, 2, 3])), shape=(3, 2)
    )
    assert strengths.nnz == 3
    assert [list(top) for top in top_activating(strengths, np.array([0, 1]), 3)] == [[1], []]


def test_the_strengths_do_not_change() -> None:
    strengths = scipy.sparse.random(20, 5, 0.4, format="csr", random_state=0, dtype=np.float32)
    before = strengths.copy()
    top_activating(strengths, np.arange(5), 3)
    assert (strengths != before).nnz == 0
    np.testing.assert_array_equal(strengths.indices, before.indices)


# ------------------------------------------------------------------------------------- contributions and leaders


def sparse(dense: np.ndarray) -> scipy.sparse.csr_matrix:
    return scipy.sparse.csr_matrix(dense.astype(np.float32))


SHAPES = {"n": st.integers(1, 9), "f": st.integers(1, 8), "c": st.integers(1, 4), "seed": st.integers(0, 999)}


def strengths_and_weight(n: int, f: int, c: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 3, (n, f)).astype(np.float32), rng.integers(-3, 4, (f, c)).astype(np.float32)


@given(**SHAPES)
def test_contributions_are_strengths_times_weights(n: int, f: int, c: int, seed: int) -> None:
    z, weight = strengths_and_weight(n, f, c, seed)
    classes = np.random.default_rng(seed).integers(0, c, n)
    found = contributions(sparse(z), torch.from_numpy(weight), classes)
    expected = np.array([[z[i, j] * weight[j, classes[i]] for j in range(f)] for i in range(n)])
    np.testing.assert_array_equal(found.toarray(), expected)
    assert found.nnz == np.count_nonzero(z), "nothing is made dense"


@given(**SHAPES, batch_size=st.integers(1, 5))
def test_predictions_are_those_of_the_dense_product(n: int, f: int, c: int, seed: int, batch_size: int) -> None:
    z, weight = strengths_and_weight(n, f, c, seed)
    labels = np.random.default_rng(seed + 1).integers(0, c, n)
    found = predict(sparse(z), torch.from_numpy(weight), labels, batch_size)
    logits = z @ weight
    np.testing.assert_array_equal(found.logits, logits.max(axis=1))
    np.testing.assert_array_equal(found.classes, logits.argmax(axis=1))  # the first of equal ones
    np.testing.assert_array_equal(found.true_logits, logits[np.arange(n), labels])
    softmax = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(found.probabilities, (softmax / softmax.sum(axis=1, keepdims=True)).max(axis=1), rtol=1e-5)


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 8),
    k=st.integers(1, 10),
    seed=st.integers(0, 999),
    by_magnitude=st.booleans(),
)
def test_leading_entries_by_brute_force(rows: int, columns: int, k: int, seed: int, by_magnitude: bool) -> None:
    dense = np.random.default_rng(seed).integers(-3, 4, (rows, columns)).astype(np.float32)  # many ties and zeros
    found = leading(sparse(dense), k, by_magnitude=by_magnitude)
    for row in range(rows):
        key = np.abs(dense[row]) if by_magnitude else dense[row]
        expected = [f for f in sorted(range(columns), key=lambda f: (-key[f], f)) if key[f] > 0][:k]
        n = len(expected)
        assert found.concepts[row].tolist() == expected + [-1] * (k - n)
        assert found.values[row].tolist() == dense[row, expected].tolist() + [0] * (k - n)
        others = np.delete(dense[row], expected)
        assert found.remaining[row] == others.sum()
        assert found.n_remaining[row] == np.count_nonzero(others)


def test_batches_do_not_change_results(monkeypatch) -> None:
    z, weight = strengths_and_weight(11, 8, 3, 0)
    classes = np.arange(11) % 3
    whole = contributions(sparse(z), torch.from_numpy(weight), classes)
    top = leading(whole, 3)
    monkeypatch.setattr(dncbm.explain.explanations, "BATCH", 4)
    np.testing.assert_array_equal(contributions(sparse(z), torch.from_numpy(weight), classes).toarray(), whole.toarray())
    for found, expected in zip(leading(whole, 3), top, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_leading_entries_do_not_need_sorted_columns() -> None:
    shuffled = scipy.sparse.csr_matrix(
        (np.array([1, 3, 2], np.float32), np.array([4, 0, 2]), np.array([0, 2, 3])), shape=(2, 5)
    )
    assert leading(shuffled, 2).concepts.tolist() == [[0, 4], [2, -1]]


@given(**SHAPES)
def test_means_of_groups(n: int, f: int, c: int, seed: int) -> None:
    z, _ = strengths_and_weight(n, f, c, seed)
    groups = np.random.default_rng(seed).integers(0, c, n)
    means = mean_strengths(sparse(z), groups, c)
    expected = np.array([z[groups == g].mean(axis=0) if (groups == g).any() else np.zeros(f) for g in range(c)])
    np.testing.assert_allclose(means.toarray(), expected, rtol=1e-6)
    centred = mean_centred(means, sparse(z))
    dense = expected - z.mean(axis=0)
    for g in range(c):  # concepts that a group lacks are at most the mean, so leaving them out changes no ranking
        kept = set(centred[[g]].indices.tolist())
        np.testing.assert_allclose(centred[[g]].toarray()[0][sorted(kept)], dense[g][sorted(kept)], atol=1e-6)
        assert all(dense[g, j] <= 0 for j in range(f) if j not in kept)


# ---------------------------------------------------------------------------------------------------------- clusters


def topics(n: int, f: int, seed: int) -> scipy.sparse.csr_matrix:
    rng = np.random.default_rng(seed)
    return sparse(rng.exponential(size=(n, f)) * (rng.random((n, f)) < 0.3))


def test_kmeans_is_scikit_learns() -> None:
    """Whole and dense, from the same first centres."""
    strengths = topics(300, 20, 0)
    found = kmeans(strengths, 7, 3)
    first, _ = kmeans_plusplus(strengths.toarray(), 7, random_state=3)
    dense = KMeans(7, init=first, n_init=1).fit(strengths.toarray())
    np.testing.assert_array_equal(found.labels, dense.labels_)
    assert found.inertia == pytest.approx(dense.inertia_, rel=1e-5)
    distances = ((strengths.toarray()[:, None] - found.centres[None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(found.labels, distances.argmin(axis=1))


@pytest.mark.parametrize("at_once", [2, 3])
def test_kmeans_ends_the_same_however_it_is_cut(monkeypatch, at_once: int) -> None:
    strengths = topics(300, 20, 0)
    whole = kmeans(strengths, 7, 3)
    monkeypatch.setattr(dncbm.explain.explanations, "ITERATIONS_AT_ONCE", at_once)
    seen: list[Clustering] = []
    cut = kmeans(strengths, 7, 3, on_progress=seen.append)
    assert [now.iterations for now in seen[:2]] == [at_once, 2 * at_once]
    resumed = kmeans(strengths, 7, 99, begun=seen[0])  # the seed is only for the start
    for other in (cut, resumed):
        np.testing.assert_array_equal(other.labels, whole.labels)
        np.testing.assert_allclose(other.centres, whole.centres, rtol=1e-5)


def test_kmeans_ends_after_the_most_iterations(monkeypatch) -> None:
    monkeypatch.setattr(dncbm.explain.explanations, "MAX_ITERATIONS", 2)
    assert kmeans(topics(300, 20, 0), 7, 3).iterations == 2
