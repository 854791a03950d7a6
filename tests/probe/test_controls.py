"""Controls: random directions, an untrained SAE, shuffled columns, named concepts and the commonest class."""

import numpy as np
import pytest
import scipy.sparse
import scipy.stats
import torch

from dncbm.concepts.evidence.random_directions import random_sae
from dncbm.concepts.naming import ABSTAINS, COLLISION, NAMED, ConceptName
from dncbm.concepts.strengths import encode_in_memory
from dncbm.probe.controls import (
    largest_latents,
    named_columns,
    of_majority,
    shuffled,
    untrained_latents,
    untrained_sae,
    with_shuffled_columns,
)
from dncbm.probe.model import ProbeData
from sparse_autoencoder import VARIANTS, SparseAutoencoder


def test_random_directions_are_as_sparse_as_latents_are_on_average(make_store, tmp_path) -> None:
    x = np.random.default_rng(0).normal(size=(3000, 5)).astype(np.float32)
    store = make_store(tmp_path / "store", [x])
    for transform in ("none", "centre", "unit_norm"):
        trained = SparseAutoencoder(5, 40, input_transform=transform)
        model = random_sae(trained, store, 0.1, seed=1)
        assert model.input_transform == transform
        found = encode_in_memory(model, store)
        assert found.shape == (3000, 40)
        np.testing.assert_allclose((found > 0).mean(axis=0), 0.1, atol=0.001)
        assert np.asarray((found > 0).sum(axis=0)).std() < 3
        np.testing.assert_allclose(model.encoder_weight.norm(dim=1), 1, rtol=1e-5)
    assert not torch.equal(model.encoder_weight, random_sae(trained, store, 0.1, seed=2).encoder_weight)


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("transform", ["none", "centre", "unit_norm"])
def test_an_untrained_sae_is_the_one_that_training_starts_from(kind: str, transform: str) -> None:
    """Its centre of the inputs is the trained one's, which is measured and not trained."""
    sparsity = VARIANTS[kind]()
    trained = SparseAutoencoder(6, 48, sparsity=sparsity, input_transform=transform, seed=7)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.3)
        if transform == "centre":
            trained.input_centre.fill_(2)
    start, found = SparseAutoencoder(6, 48, sparsity=sparsity, input_transform=transform, seed=7), untrained_sae(trained, 7)
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    if transform == "centre":
        start.input_centre.fill_(2)
    assert torch.equal(found.encode(x), start.encode(x))
    assert not torch.equal(untrained_sae(trained, 8).encoder_weight, found.encoder_weight)


def test_an_untrained_sae_has_as_many_active_latents_as_the_trained_one(make_store, tmp_path) -> None:
    """At most: of those above zero, the largest."""
    x = np.random.default_rng(0).normal(size=(70, 6)).astype(np.float32)
    store, model = make_store(tmp_path / "store", [x[:40], x[40:]]), SparseAutoencoder(6, 12, seed=3)
    pre = model.pre_activations(torch.from_numpy(x)).detach().numpy()
    found = largest_latents(model, store, 5).toarray()
    for row, values in zip(found, pre, strict=True):
        kept = [index for index in np.argsort(-values)[:5] if values[index] > 0]
        expected = np.zeros(12)
        expected[kept] = values[kept]
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)
    assert largest_latents(model, store, 99).nnz == (pre > 0).sum()
    strengths = scipy.sparse.csr_matrix((np.random.default_rng(1).random((70, 12)) < 0.3).astype(np.float32))
    concepts = {"train": ProbeData(strengths, torch.arange(70))}
    of_train = untrained_latents(model, concepts, {"train": store}, seed=4)["train"]
    expected = largest_latents(SparseAutoencoder(6, 12, seed=4), store, round(strengths.nnz / 70))
    np.testing.assert_array_equal(of_train.inputs.toarray(), expected.toarray())
    assert torch.equal(of_train.labels, torch.arange(70))


@pytest.mark.parametrize(("n_rows", "density"), [(50, 0.1), (50, 0.5), (50, 0.97), (1, 0.5), (400, 0.01)])
def test_shuffled_columns_hold_what_they_held(n_rows: int, density: float) -> None:
    """Sparse, dense, full and empty ones; each goes its own way."""
    rng = np.random.default_rng(5)
    values = rng.uniform(0.1, 1, (n_rows, 30)) * (rng.random((n_rows, 30)) < density)
    values[:, 0], values[:, 1] = 0, rng.uniform(0.1, 1, n_rows)
    matrix = scipy.sparse.csr_matrix(values.astype(np.float32))
    found = with_shuffled_columns(matrix, np.random.default_rng(0))
    assert isinstance(found, scipy.sparse.csr_matrix)
    assert (found.dtype, found.nnz, found.has_canonical_format) == (np.float32, matrix.nnz, True)
    np.testing.assert_array_equal(np.sort(found.toarray(), axis=0), np.sort(matrix.toarray(), axis=0))
    again = with_shuffled_columns(matrix, np.random.default_rng(0))
    np.testing.assert_array_equal(found.toarray(), again.toarray())
    if n_rows == 50:
        assert (found.toarray() != matrix.toarray()).any(axis=0)[1:].mean() > 0.8


@pytest.mark.parametrize("filled", [1, 2, 3, 4, 5])
def test_every_permutation_of_a_column_is_equally_likely(filled: int) -> None:
    """12,000 columns of five rows, with as many entries as is said, all different: chi-squared over all arrangements."""
    n = 12_000
    column = np.array([1.0, 2, 3, 4, 5]) * (np.arange(5) < filled)
    matrix = scipy.sparse.csr_matrix(np.tile(column[:, None], n).astype(np.float32))
    found = with_shuffled_columns(matrix, np.random.default_rng(filled)).toarray().T
    _, times = np.unique(found, axis=0, return_counts=True)
    n_arrangements = int(np.prod(np.arange(5 - filled + 1, 6)))
    assert len(times) == n_arrangements
    assert scipy.stats.chisquare(times).pvalue > 1e-3
    pairs = np.unique(np.hstack([found[:-1], found[1:]]), axis=0, return_counts=True)[1]
    if n_arrangements <= 20:
        assert scipy.stats.chisquare(pairs).pvalue > 1e-3, "neighbouring columns are independent"


def test_splits_are_shuffled_differently() -> None:
    matrix = scipy.sparse.csr_matrix(np.random.default_rng(0).random((40, 6), dtype=np.float32))
    data = ProbeData(matrix, torch.arange(40))
    found = shuffled({"train": data, "val": data}, seed=3)
    assert (found["train"].inputs != found["val"].inputs).nnz > 100
    assert torch.equal(found["val"].labels, data.labels)
    assert (shuffled({"train": data}, seed=4)["train"].inputs != found["train"].inputs).nnz > 100


def test_named_concepts_are_those_that_do_not_abstain(refusal) -> None:
    verdicts = [NAMED, ABSTAINS, COLLISION, ABSTAINS, NAMED]
    names = [ConceptName(index, "word", 0.5, verdict) for index, verdict in enumerate(verdicts)]
    assert named_columns(names, 5).tolist() == [0, 2, 4]
    assert named_columns([ConceptName(0, "word", 0.5)], 1) is None
    with refusal("5 names", "6 latents"):
        named_columns(names, 6)


def test_the_commonest_class_is_that_of_train() -> None:
    """Of equally common ones, the first."""
    empty = scipy.sparse.csr_matrix((4, 1), dtype=np.float32)
    train = ProbeData(empty, torch.tensor([2, 1, 2, 1]))
    assert of_majority(train, ProbeData(empty, torch.tensor([1, 0, 2, 1]))).tolist() == [True, False, False, True]
