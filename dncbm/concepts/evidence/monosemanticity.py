"""MonoScore (Pach et al., NeurIPS 2025): how alike the images are that activate a latent, from sums alone.

It knows no name, so it tests none. With the SAE's own encoder it is circular: the latents are directions of the space in which
it compares images.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch.nn.functional import embedding_bag
from tqdm import tqdm

from dncbm.concepts.evidence.prediction import sent
from dncbm.features.store import FeatureStore

BATCH = 4096
"""Images read at a time."""


@dataclass(frozen=True, eq=False)
class MonoScores:
    """MonoScore in both published definitions, for each latent; NaN where fewer than two images have a weight."""

    by_weights: NDArray[np.float64]
    """Divided by the sum of the weights of pairs, as in the official code: the weighted mean cosine, from -1 to 1."""
    by_pairs: NDArray[np.float64]
    """Divided by the number of pairs, as in the paper's equation: it also grows with how often the latent is active."""


@torch.inference_mode()
def monosemanticity(codes: scipy.sparse.csc_matrix, images: FeatureStore, *, device: torch.device) -> MonoScores:
    """MonoScore of every latent: the cosine of two images, weighted by the product of their scaled activations.

    Activations a of a latent are scaled to lie between 0 and 1 over all images: (a - min) / (max - min), where the minimum is
    0 unless every image activates the latent. With unit features x and s = sum over i of a_i x_i,

        sum over i < j of a_i a_j x_i . x_j = (|s|^2 - sum of a_i^2 |x_i|^2) / 2
        sum over i < j of a_i a_j           = ((sum of a_i)^2 - sum of a_i^2) / 2

    Their ratio is `by_weights`. `by_pairs` is the first, divided by the N (N - 1) / 2 unordered pairs; the paper's N (N - 1)
    goes with the sum over ordered pairs i != j, which is twice as large. Sums are in float64. The features stream, and D sums
    per latent are in memory.

    Args:
        codes: N x F, the latents of every image.
        images: N features of the same images, of any encoder and norm.
        device: where this is computed; it must have float64.
    """
    n_images, n_latents = codes.shape
    scaled = scaled_activations(codes).tocsr()
    sums = torch.zeros(n_latents, images.width, dtype=torch.float64, device=device)
    own = torch.zeros(n_latents, 1, dtype=torch.float64, device=device)
    start = 0
    with tqdm(desc="MonoScore", total=n_images, unit="image") as bar:
        for rows in images.batches(BATCH):
            part = scaled[start : start + len(rows)].tocsc()
            place, first = (torch.from_numpy(one.astype(np.int64)).to(device) for one in (part.indices, part.indptr[:-1]))
            weight = torch.from_numpy(part.data).to(device)
            x = sent(rows, device).double()
            x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-30)  # a row of zeros is like no other, as in the official code
            sums += embedding_bag(place, x, first, mode="sum", per_sample_weights=weight)
            squares = (x * x).sum(dim=1, keepdim=True)
            own += embedding_bag(place, squares, first, mode="sum", per_sample_weights=weight * weight)
            start += len(rows)
            bar.update(len(rows))
    similarity = ((sums * sums).sum(dim=1) - own[:, 0]).cpu().numpy()
    total, of_squares = (np.asarray(one.sum(axis=0)).ravel() for one in (scaled, scaled.multiply(scaled)))
    has_pairs = scaled.getnnz(axis=0) >= 2
    weights = np.where(has_pairs, total**2 - of_squares, np.nan)
    pairs = np.where(has_pairs, n_images * (n_images - 1.0), np.nan)
    return MonoScores(similarity / weights, similarity / pairs)


def scaled_activations(codes: scipy.sparse.csc_matrix) -> scipy.sparse.csc_matrix:
    """Activations (N x F) of each latent from 0 to 1 over all images, float64, without zeros. What never varies becomes 0."""
    n_images = codes.shape[0]
    n_active = np.diff(codes.indptr)
    values = codes.data.astype(np.float64)
    low, high = np.zeros(len(n_active)), np.zeros(len(n_active))
    is_active = np.flatnonzero(n_active)
    if len(is_active):
        starts = codes.indptr[:-1][is_active]
        high[is_active] = np.maximum.reduceat(values, starts)
        low[is_active] = np.where(n_active[is_active] == n_images, np.minimum.reduceat(values, starts), 0)
    reach = np.where(high > low, high - low, np.inf)
    scaled = (values - np.repeat(low, n_active)) / np.repeat(reach, n_active)
    found = scipy.sparse.csc_matrix((scaled, codes.indices.copy(), codes.indptr.copy()), shape=codes.shape)
    found.eliminate_zeros()
    return found
