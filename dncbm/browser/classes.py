"""The classes of a probe: their leading concepts, what they are confused with, and its predictions (METHOD section 8)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray

from dncbm.browser.pack import write_chunk
from dncbm.browser.shown import CLASSES_PER_CHUNK, Kept, ShownRun
from dncbm.explain.dumps.global_explanations import N_CONCEPTS as LEADING
from dncbm.explain.explanations import Floats, Integers, contributions, leading, mean_strengths, predict

Arrays = dict[str, NDArray[np.int32] | Floats]

N_FOR, N_AGAINST = 20, 8
"""Concepts of a class that are shown, of positive and of negative mean contribution."""
N_IMAGES = 24
N_CONFUSED = 6
"""Classes that a class is most often taken for."""
N_BEHIND, N_TAKEN = 6, 6
"""Concepts and images of a confusion."""


def write_classes(shown: ShownRun, kept: Sequence[Kept], data: Path, number: int) -> NDArray[np.int32] | None:
    """Write the chunks `classes`, `class_<k>` and `predictions` of a run; `types.d.ts` says what they hold.

    Besides the strengths, it needs memory for the images of CLASSES_PER_CHUNK classes.

    Args:
        shown: the run.
        kept: the images of each data set.
        data: folder of the chunks.
        number: the run's number in the site.

    Returns:
        For each concept, F, the number of classes that have it among the LEADING of largest positive mean contribution; None
        if the run has no probe.
    """
    if shown.weight is None or shown.probed is None or (strengths := shown.strengths[shown.probed]) is None:
        return None
    weight, labels, seed = shown.weight, kept[shown.probed].labels, shown.run.training.seed
    n_classes = weight.shape[1]
    found = predict(strengths, weight, labels)
    write_chunk(data, f"{number}/predictions", {"predicted": found.classes.astype(np.int32)})
    size = np.bincount(labels, minlength=n_classes)
    right = np.bincount(labels[found.classes == labels], minlength=n_classes)
    logits = np.bincount(labels, weights=found.true_logits, minlength=n_classes)
    mean_logit = np.divide(logits, size, out=np.full(n_classes, np.nan), where=size > 0).astype(np.float32)
    classes = {"size": size.astype(np.int32), "right": right.astype(np.int32), "mean_logit": mean_logit}
    write_chunk(data, f"{number}/classes", classes)

    n_leading = np.zeros(weight.shape[0], dtype=np.int32)
    by_class = np.argsort(labels, kind="stable")
    ends = np.searchsorted(labels[by_class], np.arange(0, n_classes + CLASSES_PER_CHUNK, CLASSES_PER_CHUNK))
    for k in range(len(ends) - 1):
        rows = by_class[ends[k] : ends[k + 1]]
        numbers = np.arange(k * CLASSES_PER_CHUNK, min((k + 1) * CLASSES_PER_CHUNK, n_classes))
        rng = np.random.default_rng([seed, k])
        lead = _leading_concepts(strengths[rows], weight, labels[rows], numbers)
        confusions = _confusions(strengths, weight, rows, labels[rows], found.classes[rows], numbers, rng)
        images = {"images": _drawn(rows, labels[rows] - numbers[0], len(numbers), N_IMAGES, rng)}
        write_chunk(data, f"{number}/class_{k}", lead | images | confusions)
        leaders = lead["concepts"][:, :LEADING]
        n_leading += np.bincount(leaders[leaders >= 0], minlength=len(n_leading)).astype(np.int32)
    return n_leading


def _leading_concepts(strengths: scipy.sparse.csr_matrix, weight: torch.Tensor, labels: Integers, numbers: Integers) -> Arrays:
    """The concepts of largest and of most negative mean contribution to some classes, from the strengths of their images."""
    means = mean_strengths(strengths, labels - numbers[0], len(numbers))
    values = contributions(means, weight, numbers)
    most, least = leading(values, N_FOR), leading(-values, N_AGAINST)
    return {
        "concepts": most.concepts.astype(np.int32), "contributions": most.values,
        "weights": _weights(weight, most.concepts, numbers),
        "against": least.concepts.astype(np.int32), "against_contributions": -least.values,
        "against_weights": _weights(weight, least.concepts, numbers),
        "remaining": most.remaining + least.values.sum(axis=1),
        "n_remaining": (most.n_remaining - (least.concepts >= 0).sum(axis=1)).astype(np.int32),
    }  # fmt: skip


def _weights(weight: torch.Tensor, concepts: Integers, classes: Integers) -> Floats:
    """The weight of each of a class's concepts, classes x n; 0 where there is none."""
    found = weight.cpu()[torch.from_numpy(concepts.clip(0)), torch.from_numpy(classes)[:, None]].numpy()
    return np.where(concepts >= 0, found, np.float32(0))


def _confusions(
    strengths: scipy.sparse.csr_matrix, weight: torch.Tensor, rows: Integers, labels: Integers, predicted: Integers,
    numbers: Integers, rng: np.random.Generator,
) -> Arrays:  # fmt: skip
    """What some classes are taken for, from the rows of their images in `strengths`, true class and prediction of each."""
    first, n, n_classes = numbers[0], len(numbers), weight.shape[1]
    wrong = predicted != labels
    rows, place, predicted = rows[wrong], labels[wrong] - first, predicted[wrong]
    ones = np.ones(len(rows), dtype=np.float32)
    taken = leading(scipy.sparse.coo_matrix((ones, (place, predicted)), shape=(n, n_classes)).tocsr(), N_CONFUSED)

    is_of = taken.concepts[place] == predicted[:, None]  # wrong images x N_CONFUSED
    often = is_of.any(axis=1)
    rows, pairs = rows[often], (place * N_CONFUSED + is_of.argmax(axis=1))[often]
    means = mean_strengths(strengths[rows], pairs, n * N_CONFUSED)
    for_it = contributions(means, weight, taken.concepts.ravel().clip(0))
    behind = leading(for_it - contributions(means, weight, numbers.repeat(N_CONFUSED)), N_BEHIND)
    return {
        "confused": taken.concepts.astype(np.int32), "confused_count": taken.values.astype(np.int32),
        "confused_concepts": behind.concepts.astype(np.int32).reshape(n, -1),
        "confused_values": behind.values.reshape(n, -1),
        "confused_images": _drawn(rows, pairs, n * N_CONFUSED, N_TAKEN, rng).reshape(n, -1),
    }  # fmt: skip


def _drawn(rows: Integers, groups: Integers, n_groups: int, n: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """At most n rows of each group, drawn at random, in ascending order; n_groups x n, filled with -1."""
    order = rng.permutation(len(rows))
    order = order[np.argsort(groups[order], kind="stable")]
    rows, groups = rows[order], groups[order]
    among = np.arange(len(rows)) - np.searchsorted(groups, groups) < n
    rows, groups = rows[among], groups[among]
    order = np.lexsort((rows, groups))
    rows, groups = rows[order], groups[order]
    drawn = np.full((n_groups, n), -1, dtype=np.int32)
    drawn[groups, np.arange(len(rows)) - np.searchsorted(groups, groups)] = rows
    return drawn
