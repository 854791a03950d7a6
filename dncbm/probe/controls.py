"""Controls of an accuracy: inputs of a probe that hold no concept, or only those that have a name.

Each is measured as the concepts are (`dncbm.probe.nec`). An accuracy that a control reaches, too, says nothing about concepts.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray

from dncbm.concepts.evidence.random_directions import random_sae
from dncbm.concepts.naming import ABSTAINS, ConceptName
from dncbm.concepts.strengths import BATCH, encode_in_memory, to_csr
from dncbm.features.store import FeatureStore
from dncbm.probe.model import ProbeData
from dncbm.runs.errors import UserError
from sparse_autoencoder import SparseAutoencoder

Splits = dict[str, ProbeData]
"""train, train_val and val."""


def strengths_of(data: ProbeData) -> scipy.sparse.csr_matrix:
    """The inputs of a probe on concepts."""
    assert not isinstance(data.inputs, FeatureStore)
    return data.inputs


def random_directions(sae: SparseAutoencoder, concepts: Splits, stores: Mapping[str, FeatureStore], seed: int) -> Splits:
    """As many random directions as latents, each active on as many images as a latent is on average."""
    strengths = strengths_of(concepts["train"])
    share = strengths.nnz / (strengths.shape[0] * strengths.shape[1])
    model = random_sae(sae, stores["train"], share, seed)
    # Strengths and features of a split have the same images in the same order, so the labels are the same.
    return {split: replace(data, inputs=encode_in_memory(model, stores[split])) for split, data in concepts.items()}


def untrained_latents(sae: SparseAutoencoder, concepts: Splits, stores: Mapping[str, FeatureStore], seed: int) -> Splits:
    """The latents of the SAE as its training starts, with as many active per image as the trained one has on average.

    An untrained ReLU SAE is active on about half of its latents, so only the L0 largest positive ones of each image are kept,
    where L0 is the trained SAE's mean on train, rounded, and at least 1.
    """
    strengths = strengths_of(concepts["train"])
    model, active = untrained_sae(sae, seed), max(round(strengths.nnz / strengths.shape[0]), 1)
    return {split: replace(data, inputs=largest_latents(model, stores[split], active)) for split, data in concepts.items()}


@torch.no_grad()
def untrained_sae(sae: SparseAutoencoder, seed: int) -> SparseAutoencoder:
    """An SAE as training with this seed starts. The shape, the input transform and the centre of the inputs, which is not
    trained, are those of `sae`."""
    start = SparseAutoencoder(
        sae.n_inputs, sae.n_latents, sparsity=sae.sparsity, input_transform=sae.input_transform, seed=seed
    )
    if sae.input_transform == "centre":
        start.input_centre.copy_(sae.input_centre)
    return start.to(sae.encoder_weight.device).requires_grad_(False)


@torch.inference_mode()
def largest_latents(sae: SparseAutoencoder, store: FeatureStore, active: int) -> scipy.sparse.csr_matrix:
    """The largest positive pre-activations of every image, at most `active` of them, with a batch of dense ones in memory."""
    codes = []
    for shard in range(len(store.paths)):
        for x in store.shard_batches(shard, BATCH):
            pre = sae.pre_activations(sae.transform(x.to(sae.encoder_weight.device))[0])
            largest = pre.topk(min(active, sae.n_latents), dim=1)
            codes.append(to_csr(torch.zeros_like(pre).scatter_(1, largest.indices, largest.values.clamp(min=0))))
    return scipy.sparse.vstack(codes, format="csr")


def shuffled(concepts: Splits, seed: int) -> Splits:
    """Every column of the strengths of every split permuted over the images, which leaves nothing to tell classes by."""
    return {
        split: replace(data, inputs=with_shuffled_columns(strengths_of(data), np.random.default_rng([seed, number])))
        for number, (split, data) in enumerate(concepts.items())
    }


def with_shuffled_columns(matrix: scipy.sparse.csr_matrix, rng: np.random.Generator) -> scipy.sparse.csr_matrix:
    """A CSR matrix whose columns are permuted, each on its own and uniformly; needs a few times the memory of the matrix.

    The rows of a column's entries are drawn until they differ. Of a column with more entries than zeros, the rows of the zeros
    are drawn instead, so that at least half of all draws count.
    """
    n_rows, n_columns = matrix.shape
    columns = matrix.tocsc()
    counts = np.diff(columns.indptr).astype(np.int64)
    is_dense = 2 * counts > n_rows
    drawn = _distinct_rows(np.where(is_dense, n_rows - counts, counts), n_rows, rng)
    if is_dense.any():
        of_dense = is_dense[drawn // n_rows]
        every = (np.flatnonzero(is_dense)[:, None] * n_rows + np.arange(n_rows)).ravel()
        filled = np.setdiff1d(every, drawn[of_dense], assume_unique=True)
        drawn = np.sort(np.concatenate([drawn[~of_dense], filled]))
    of_entry = np.repeat(np.arange(n_columns), counts)
    values = columns.data[np.argsort(of_entry + rng.random(len(of_entry)))]  # in random order within each column
    rows = (drawn % n_rows).astype(columns.indices.dtype)
    return scipy.sparse.csc_matrix((values, rows, columns.indptr), shape=matrix.shape).tocsr()


def _distinct_rows(counts: NDArray[np.int64], n_rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """For each column, this many different rows, uniformly drawn, as column * n_rows + row, sorted."""
    found = np.empty(0, dtype=np.int64)
    missing = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    while len(missing):
        keys = np.sort(missing * n_rows + rng.integers(n_rows, size=len(missing)))
        keys = keys[np.append(True, keys[1:] != keys[:-1])]
        place = np.searchsorted(found, keys)
        is_new = np.ones(len(keys), dtype=bool)
        inside = place < len(found)
        is_new[inside] = found[place[inside]] != keys[inside]
        found = np.insert(found, place[is_new], keys[is_new])
        left = counts - np.bincount(found // n_rows, minlength=len(counts))
        missing = np.repeat(np.arange(len(counts), dtype=np.int64), left)
    return found


def named_columns(names: list[ConceptName], n_latents: int) -> NDArray[np.int64] | None:
    """The latents whose names do not abstain; None if the names were not tested.

    Raises UserError if there is not one name for each latent.
    """
    if len(names) != n_latents:
        raise UserError(f"there are {len(names)} names, but {n_latents} latents: they do not belong together")
    if all(name.verdict is None for name in names):
        return None
    return np.flatnonzero([name.verdict != ABSTAINS for name in names])


def with_columns(concepts: Splits, columns: NDArray[np.int64]) -> Splits:
    """Some of the concepts alone."""
    return {split: replace(data, inputs=strengths_of(data)[:, columns]) for split, data in concepts.items()}


def of_majority(train: ProbeData, data: ProbeData) -> torch.Tensor:
    """Whether each image has the commonest class of `train` (of equally common ones, the first); bool."""
    return data.labels == train.labels.bincount().argmax()
