"""Random directions in place of latents: what a figure is if it owes nothing to training."""

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray

from dncbm.concepts.evidence.matching import random_like
from dncbm.concepts.strengths import encode_in_memory
from dncbm.features.store import FeatureStore
from sparse_autoencoder import ReLU, SparseAutoencoder

SAMPLE = 4096
"""Images from which the thresholds of random directions are set."""
_ROUNDING = 1e-5
"""Activations up to this share of the largest are those of images at a threshold, which rounding lets through."""


def random_codes(model: SparseAutoencoder, store: FeatureStore) -> scipy.sparse.csc_matrix:
    """Activations of the random directions of `random_sae` on all images, N x F."""
    codes = encode_in_memory(model, store).tocsc()
    codes.data[codes.data <= _ROUNDING * codes.data.max(initial=0)] = 0
    codes.eliminate_zeros()
    return codes


@torch.inference_mode()
def random_sae(
    sae: SparseAutoencoder, store: FeatureStore, share: float | NDArray[np.float64], seed: int,
    directions: torch.Tensor | None = None,
) -> SparseAutoencoder:  # fmt: skip
    """An SAE with random directions, each of which is active on a share of the images: the same for all, or one for each.

    Its inputs, input transform, tied bias and number of latents are those of `sae`. Its encoder biases are set by a sample of
    the features in `store`. `directions` (F x D) take the place of those drawn evenly.
    """
    model = SparseAutoencoder(sae.n_inputs, sae.n_latents, sparsity=ReLU(), input_transform=sae.input_transform)
    model = model.to(sae.encoder_weight.device)
    model.tied_bias.copy_(sae.tied_bias)
    if sae.input_transform == "centre":
        model.input_centre.copy_(sae.input_centre)
    if directions is None:
        directions = torch.randn(sae.n_latents, sae.n_inputs, generator=torch.Generator().manual_seed(seed))
    model.encoder_weight.copy_(directions / directions.norm(dim=1, keepdim=True))
    model.encoder_bias.zero_()
    rows: NDArray[np.int64] = np.random.default_rng(seed).permutation(len(store))[:SAMPLE]
    x, _ = model.transform(store.gather(rows).to(model.encoder_weight.device))
    ranks = np.clip(np.round(len(rows) * (1 - np.broadcast_to(share, sae.n_latents))), 1, len(rows)).astype(np.int64)
    ordered, ranks_here = model.pre_activations(x).sort(dim=0).values, torch.from_numpy(ranks).to(x.device)
    model.encoder_bias.copy_(-ordered.gather(0, ranks_here[None] - 1)[0])
    return model.requires_grad_(False)


@torch.inference_mode()
def decoder_like(sae: SparseAutoencoder, live: NDArray[np.bool_], seed: int) -> torch.Tensor:
    """A random direction for each latent, F x D of unit norm, with the mean and the covariance of the live decoder columns.

    Dead latents keep their own.
    """
    directions = torch.nn.functional.normalize(sae.dictionary.float(), dim=1).clone()
    where = torch.from_numpy(np.flatnonzero(live)).to(directions.device)
    if len(where):
        directions[where] = random_like(directions[where], np.random.default_rng(seed))
    return directions
