"""Explanations of latents, images, classes and groups of images, as numbers (METHOD section 5).

Strengths stay sparse: every result has their sparsity, or one row per class or cluster.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray

from dncbm.probe import model as probe_model
from dncbm.probe.model import ProbeData

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]

BATCH = 4096
"""Rows processed at a time."""


def top_activating(strengths: scipy.sparse.csr_matrix, latents: Integers, k: int) -> list[Integers]:
    """The images that activate each latent most, the strongest first, without those that do not activate it.

    Returns, for each of the latents, at most k row numbers of `strengths` (images x F); ties go to the lower row.
    """
    columns = strengths[:, latents].tocsc()
    columns.sort_indices()
    tops = []
    for start, end in zip(columns.indptr, columns.indptr[1:], strict=False):
        values, rows = columns.data[start:end], columns.indices[start:end].astype(np.int64)
        order = np.argsort(-values, kind="stable")
        tops.append(rows[order][values[order] > 0][:k])
    return tops


# ------------------------------------------------------------------------------------------------------- predictions


@dataclass(frozen=True)
class Predictions:
    """A probe's predictions, one entry per image."""

    classes: Integers
    """The predicted class."""
    logits: Floats
    """Logit of the predicted class."""
    probabilities: Floats
    """Softmax probability of the predicted class."""
    true_logits: Floats
    """Logit of the true class."""


@torch.inference_mode()
def predict(
    strengths: scipy.sparse.csr_matrix, weight: torch.Tensor, labels: Integers, batch_size: int = BATCH
) -> Predictions:
    """Predictions of a probe of weight F x C, from strengths, images x F; `labels` has the true class of each image.

    `batch_size` images are processed at a time, which needs batch_size x C floats beyond the result.
    """
    data = ProbeData(strengths, torch.from_numpy(labels))
    parts = []
    for batch, truth in data.batches(batch_size, weight.device):
        logits = probe_model.linear(batch, weight)
        classes = logits.argmax(dim=1)  # of equal logits the lower class, as in the probe's accuracy
        highest = logits.gather(1, classes[:, None])[:, 0]
        probability = (highest - logits.logsumexp(dim=1)).exp()
        parts.append((classes, highest, probability, logits.gather(1, truth[:, None])[:, 0]))
    return Predictions(*(torch.cat(columns).cpu().numpy() for columns in zip(*parts, strict=True)))


def contributions(strengths: scipy.sparse.csr_matrix, weight: torch.Tensor, classes: Integers) -> scipy.sparse.csr_matrix:
    """Contribution of each active concept to the logit of one class per row, z_f * W[f, c]; a row sums to the logit.

    Takes the strengths of images or the means of classes, rows x F, the weights, F x C, and the class of each row. Returns
    rows x F, with the sparsity of `strengths`.
    """
    data = ProbeData(strengths, torch.from_numpy(classes))
    parts = [probe_model.contributions(batch, weight, of).cpu().numpy() for batch, of in data.batches(BATCH, weight.device)]
    values = np.concatenate([*parts, np.empty(0, dtype=np.float32)])
    return scipy.sparse.csr_matrix((values, strengths.indices, strengths.indptr), shape=strengths.shape)


class Leading(NamedTuple):
    """The leading entries of each row of a matrix."""

    concepts: Integers
    """rows x n, column numbers, the leading one first; -1 fills a row that has fewer."""
    values: Floats
    """rows x n; 0 fills a row that has fewer."""
    remaining: Floats
    """rows, the sum of the other entries."""
    n_remaining: Integers
    """rows, the number of other entries that are not 0."""


def leading(matrix: scipy.sparse.csr_matrix, n: int, *, by_magnitude: bool = False) -> Leading:
    """The n largest positive entries of each row, or with `by_magnitude` the n largest in absolute value.

    Ties go to the lower column.
    """
    starts = range(0, max(matrix.shape[0], 1), BATCH)
    parts = [_leading(matrix[start : start + BATCH], n, by_magnitude) for start in starts]
    return Leading(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _leading(matrix: scipy.sparse.csr_matrix, n: int, by_magnitude: bool) -> Leading:
    row = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    rank_by = np.abs(matrix.data) if by_magnitude else matrix.data
    order = np.lexsort((matrix.indices, -rank_by, row))
    place = np.arange(len(order)) - matrix.indptr[row]  # rows are in order: an entry's place is its rank
    shown = (place < n) & (rank_by[order] > 0)
    at = row[shown], place[shown]
    concepts = np.full((matrix.shape[0], n), -1, dtype=np.int64)
    values = np.zeros((matrix.shape[0], n), dtype=np.float32)
    concepts[at], values[at] = matrix.indices[order[shown]], matrix.data[order[shown]]
    rest = matrix.data[order[~shown]].astype(np.float64)
    remaining = np.bincount(row[~shown], weights=rest, minlength=matrix.shape[0]).astype(np.float32)
    n_remaining = np.bincount(row[~shown][rest != 0], minlength=matrix.shape[0])
    return Leading(concepts, values, remaining, n_remaining)


# -------------------------------------------------------------------------------------------------- classes, clusters


def mean_strengths(strengths: scipy.sparse.csr_matrix, groups: Integers, n_groups: int) -> scipy.sparse.csr_matrix:
    """Mean concept strengths of each group (class or cluster) of images, n_groups x F; 0 for an empty group."""
    sizes = np.bincount(groups, minlength=n_groups)
    n_images = len(groups)
    shares = (1 / np.maximum(sizes, 1)).astype(np.float64)[groups]
    membership = scipy.sparse.csr_matrix((shares, (groups, np.arange(n_images))), shape=(n_groups, n_images))
    means = (membership @ strengths).tocsr().astype(np.float32)  # summed in float64, the type of the shares
    means.sort_indices()
    return means


def mean_centred(group_means: scipy.sparse.csr_matrix, strengths: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """Group means minus the mean of all images, at the concepts that a group has; elsewhere the difference is at most 0."""
    overall = np.asarray(strengths.mean(axis=0, dtype=np.float64)).ravel()
    centred = (group_means.data - overall[group_means.indices]).astype(np.float32)
    return scipy.sparse.csr_matrix((centred, group_means.indices, group_means.indptr), shape=group_means.shape)


@dataclass(frozen=True)
class Clustering:
    """State of K-means after some iterations."""

    centres: Floats
    """k x F."""
    labels: Integers
    """N, the nearest centre of each image."""
    iterations: int
    inertia: float
    """Sum of squared distances to the nearest centres."""
    ended: bool
    """Whether no image changed its cluster, the centres hardly moved, or MAX_ITERATIONS is reached."""


MAX_ITERATIONS = 300
ITERATIONS_AT_ONCE = 10


def kmeans(
    strengths: scipy.sparse.csr_matrix,
    n_clusters: int,
    seed: int,
    *,
    begun: Clustering | None = None,
    on_progress: Callable[[Clustering], None] | None = None,
) -> Clustering:
    """K-means on sparse strengths: scikit-learn's Lloyd iterations from k-means++, ITERATIONS_AT_ONCE at a time.

    Args:
        strengths: images x F; never made dense, unlike the centres, n_clusters x F.
        n_clusters: k, at most the number of images.
        seed: seed of k-means++.
        begun: state of an interrupted run; resuming from it gives the same clusters.
        on_progress: called with the state after every ITERATIONS_AT_ONCE.
    """
    from sklearn.cluster import KMeans, kmeans_plusplus

    if begun is None:
        chosen, _ = kmeans_plusplus(strengths, n_clusters, random_state=seed)
        centres = np.asarray(chosen.todense()) if scipy.sparse.issparse(chosen) else chosen
        begun = Clustering(centres, np.zeros(strengths.shape[0], dtype=np.int64), 0, float("inf"), False)
    now = begun
    while not now.ended:
        steps = min(ITERATIONS_AT_ONCE, MAX_ITERATIONS - now.iterations)
        model = KMeans(n_clusters, init=now.centres, n_init=1, max_iter=steps).fit(strengths)
        done = now.iterations + model.n_iter_
        ended = model.n_iter_ < steps or done >= MAX_ITERATIONS
        labels = model.labels_.astype(np.int64)
        now = Clustering(model.cluster_centers_.astype(np.float32), labels, done, float(model.inertia_), ended)
        if on_progress is not None:
            on_progress(now)
    return now
