"""Prediction: does the text of a latent's name tell the images that activate it from those that do not?

Measured, this says little about names. On the demo's held-out images it ranks names worse than their plain similarity to the
decoder does. Its p-values control the false discovery rate against unrelated words (0.02 to 0.10 at 0.1), but not against near
misses (0.40 to 0.82). So no verdict uses it: it stands beside the names as evidence (METHOD section 3).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch.nn.functional import embedding_bag, normalize
from tqdm import tqdm

from dncbm.features.store import FeatureStore
from sparse_autoencoder import DEFAULT_SEED

FDR = 0.05
"""False discovery rate of the tests of names in claims, whatever verdicts are given at."""
LEAST = 5
"""Images with a latent, and without it, below which nothing is said about it."""
DRAWS = 1000
"""Random words that a name is compared with."""
BATCH = 4096
"""Images read at a time."""
MEMORY = 1 << 29
"""Bytes that the ranks of a block of words may take."""
_PER_RANK = 36
"""Bytes per image and word: a similarity, its place in the order, its rank, and copies of them."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """How well names predict the images that activate their latents."""

    auc: NDArray[np.float64]
    """F; NaN where fewer than LEAST images activate the latent, or fewer do not, or its name is unknown."""
    p: NDArray[np.float64]
    """(1 + number of random words that do at least as well) / (1 + number of random words); NaN as above."""


def predict(
    codes: scipy.sparse.csc_matrix, images: FeatureStore, words: torch.Tensor, names: NDArray[np.int64],
    *, device: torch.device, draws: int = DRAWS, seed: int = DEFAULT_SEED,
) -> Prediction:  # fmt: skip
    """AUC of the similarity of each latent's name for telling images that activate it from the others, and its p-value.

    Every image with the latent counts the same, however strong the activation, so that all strata of activation have equal
    weight by construction; an image without it counts half where both are equally similar. The null is the AUC of `draws`
    random words for the same images: a permutation of names over words. Rank sums are exact in float64, so ties are, too.

    Args:
        codes: N x F, the latents of every image.
        images: their N features, of any norm.
        words: V x D, text embeddings of unit norm.
        names: F, the number of each latent's word; -1 if it is unknown.
        device: where this is computed; it must have float64.
        draws: number of random words, drawn without replacement; all words, if there are fewer.
        seed: of the random words.
    """
    n_images, n_latents = codes.shape
    n_active = np.diff(codes.indptr)
    tested = np.flatnonzero((n_active >= LEAST) & (n_images - n_active >= LEAST) & (names >= 0))
    auc, p = np.full(n_latents, np.nan), np.full(n_latents, np.nan)
    if not len(tested):
        return Prediction(auc, p)
    active = codes[:, tested]
    entries = torch.from_numpy(active.indices.astype(np.int64)).to(device)
    starts = torch.from_numpy(active.indptr[:-1].astype(np.int64)).to(device)
    own_words = np.unique(names[tested])
    drawn = np.random.default_rng(seed).choice(len(words), min(draws, len(words)), replace=False)
    block = max(1, MEMORY // (_PER_RANK * max(n_images, len(tested))))
    with tqdm(desc="prediction", total=len(own_words) + len(drawn), unit="word") as bar:
        own = _own_rank_sums(active, entries, names[tested], own_words, _ranked(images, words, own_words, block, device, bar))
        at_least = torch.zeros(len(tested), dtype=torch.int64, device=device)
        for _, ranks in _ranked(images, words, drawn, block, device, bar):
            sums = embedding_bag(entries, ranks.T.contiguous(), starts, mode="sum")
            at_least += (sums >= own[:, None]).sum(dim=1)
    n_with = n_active[tested].astype(np.float64)
    auc[tested] = (own.cpu().numpy() - n_with * (n_with + 1) / 2) / (n_with * (n_images - n_with))
    p[tested] = (1 + at_least.cpu().numpy()) / (1 + len(drawn))
    return Prediction(auc, p)


def _own_rank_sums(
    active: scipy.sparse.csc_matrix, entries: torch.Tensor, names: NDArray[np.int64], own_words: NDArray[np.int64],
    blocks: Iterator[tuple[NDArray[np.int64], torch.Tensor]],
) -> torch.Tensor:  # fmt: skip
    """Sum of the ranks of the images that activate each latent, by the similarity of its own name; float64."""
    device = entries.device
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)
    latent_of = torch.from_numpy(np.repeat(np.arange(len(names)), np.diff(active.indptr))).to(device)
    word_of = torch.from_numpy(np.searchsorted(own_words, names)).to(device)[latent_of]
    by_word = word_of.argsort()
    ends = np.cumsum(np.bincount(np.searchsorted(own_words, names), np.diff(active.indptr), len(own_words)).astype(np.int64))
    first_entry, first_word = 0, 0
    for block, ranks in blocks:
        last_entry = int(ends[first_word + len(block) - 1])
        of_block = by_word[first_entry:last_entry]
        sums.index_add_(0, latent_of[of_block], ranks[word_of[of_block] - first_word, entries[of_block]])
        first_entry, first_word = last_entry, first_word + len(block)
    return sums


def _ranked(
    images: FeatureStore, words: torch.Tensor, chosen: NDArray[np.int64], block: int, device: torch.device, bar: tqdm
) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
    """Some words in blocks, each with the ranks of all images by similarity to each of its words."""
    for start in range(0, len(chosen), block):
        of_block = chosen[start : start + block]
        yield of_block, average_ranks(similarities(words[torch.from_numpy(of_block)].to(device), images))
        bar.update(len(of_block))


def similarities(words: torch.Tensor, images: FeatureStore) -> torch.Tensor:
    """Cosine of words (B x D, of unit norm) and images: B x N float32, on the words' device. Features stream."""
    found = torch.empty(len(words), len(images), device=words.device)
    start = 0
    for x in images.batches(BATCH):
        found[:, start : start + len(x)] = words @ normalize(sent(x, words.device), dim=-1).T
        start += len(x)
    return found


def sent(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on a device, which on CUDA is not waited for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def average_ranks(values: torch.Tensor) -> torch.Tensor:
    """Rank of each value within its row, from 1; equal values share the mean of their ranks. Float64."""
    n = values.shape[1]
    on_cpu = values.device.type == "cpu"  # where numpy's vectorised sort takes a seventh of the time of torch's
    order = torch.from_numpy(np.argsort(values.numpy(), axis=1)) if on_cpu else values.argsort(dim=1)
    ordered = values.gather(1, order)
    place = torch.arange(1, n + 1, dtype=torch.float64, device=values.device).repeat(len(values), 1)
    repeats = torch.zeros_like(ordered, dtype=torch.bool)  # a row's first is never one, so that no run leaves its row
    torch.eq(ordered[:, 1:], ordered[:, :-1], out=repeats[:, 1:])
    at = repeats.flatten().nonzero()[:, 0]  # few, as a rule: only they are touched again
    begins = torch.ones_like(at, dtype=torch.bool)
    begins[1:] = at[1:] != at[:-1] + 1
    run, first = begins.cumsum(0) - 1, at[begins] - 1
    means = place.view(-1)[first] + run.bincount() / 2
    place.view(-1)[first] = means
    place.view(-1)[at] = means[run]
    return torch.empty_like(place).scatter_(1, order, place)
