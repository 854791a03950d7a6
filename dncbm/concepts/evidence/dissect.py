"""CLIP-Dissect's soft-WPMI (Oikarinen and Weng, ICLR 2023): a second way of naming latents, which reads images.

It is a second opinion, not a test: on the demo's held-out images it ranks names worse than their plain similarity does, and
it uses the same embeddings as the names (METHOD section 3).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize
from tqdm import tqdm

from dncbm.concepts.evidence.prediction import LEAST, sent
from dncbm.features.store import FeatureStore

TOP_K, SCALE, MIN_PROB, P_START, P_END = 100, 10.0, 1e-7, 0.998, 0.97
"""The defaults of the official code, whose `lam` is 1. SCALE is its `a`."""
FACTORS = 10
"""Factors multiplied before a logarithm is taken. Each lies between 1 and 1 / (1 - P_START) = 500, so the product fits."""
MEMORY = 1 << 28
"""Bytes that the probabilities of a block of words may take."""
BATCH = 1024
"""Images whose similarities to all words are computed at a time."""
WORDS = 512
"""Most words of a block, whose probabilities are gathered many times, from a cache if they fit."""
IN_CACHE = 1 << 16
"""Numbers that a CPU works on at a time."""


@dataclass(frozen=True, eq=False)
class Dissected:
    """The word that soft-WPMI gives each latent."""

    word: NDArray[np.int64]
    """F; -1 where fewer than LEAST images activate the latent."""
    score: NDArray[np.float64]
    """Soft-WPMI of the word and the latent; NaN where there is none."""
    top_k: int
    """Most images that count for a latent."""


def dissect(
    codes: scipy.sparse.csc_matrix, images: FeatureStore, words: torch.Tensor,
    *, device: torch.device, top_k: int = TOP_K,
) -> Dissected:  # fmt: skip
    """The word with the largest soft-WPMI for each latent; arguments as for `soft_wpmi`, which explains it."""
    top_k = min(top_k, codes.shape[0])
    word, score = np.full(codes.shape[1], -1), np.full(codes.shape[1], np.nan)
    latents = enough_images(codes)
    best = torch.full((len(latents),), -torch.inf, device=device)
    of_best = torch.zeros(len(latents), dtype=torch.int64, device=device)
    with tqdm(desc="soft-WPMI", total=len(words), unit="word") as bar:
        for start, found in soft_wpmi(codes, images, words, device=device, top_k=top_k):
            largest, place = found.max(dim=1)
            is_better = largest > best
            best, of_best = largest.where(is_better, best), (place + start).where(is_better, of_best)
            bar.update(found.shape[1])
    word[latents], score[latents] = of_best.cpu().numpy(), best.double().cpu().numpy()
    return Dissected(word, score, top_k)


def enough_images(codes: scipy.sparse.csc_matrix) -> NDArray[np.int64]:
    """The latents that at least LEAST images activate."""
    return np.flatnonzero(np.diff(codes.indptr) >= LEAST)


@torch.inference_mode()
def soft_wpmi(
    codes: scipy.sparse.csc_matrix, images: FeatureStore, words: torch.Tensor,
    *, device: torch.device, top_k: int = TOP_K,
) -> Iterator[tuple[int, torch.Tensor]]:  # fmt: skip
    """Soft-WPMI of the latents that have `enough_images`, and all words, in blocks of words (first word, latents x block).

    With P[i, w] = softmax over words of SCALE x similarity(i, w), and i_1, i_2, ... the images that activate a latent most,

        S[f, w] = sum over j of log(1 - p_j + MIN_PROB + p_j P[i_j, w]) - log(1 - p_j + MIN_PROB)
        soft-WPMI[f, w] = S[f, w] - log(mean over latents of exp S[., w])

    where p_j falls from P_START towards P_END over `top_k` images. The second term of S is the same for all latents that are
    active on `top_k` images, and cancels: then this is the official formula. The official code also counts images that do not
    activate a latent, in no defined order, where fewer than `top_k` do. Here only active images count, and latents with fewer
    than LEAST are left out, of the mean too; the second term makes the others comparable.

    Args:
        codes: N x F, the latents of every image.
        images: their N features, of any norm.
        words: V x D, text embeddings of unit norm.
        device: where this is computed.
        top_k: most images that count for a latent; all images, if there are fewer.
    """
    top_k = min(top_k, codes.shape[0])
    latents = enough_images(codes)
    if not len(latents):
        return
    used, top = top_images(codes[:, latents], top_k)
    p = P_START - np.arange(top_k) / top_k * (P_START - P_END)
    ratios = (p / (1 - p + MIN_PROB)).tolist()
    there = words.to(device)
    log_sums = torch.cat([(SCALE * x @ there.T).logsumexp(dim=1) for x in _rows(images, used, device)])
    block = min(WORDS, max(16, MEMORY // (4 * max(len(used) + 1, len(latents)))))
    of_latents = torch.from_numpy(top).to(device)
    room = torch.empty((len(used) + 1) * min(block, len(words)), device=device)
    for start in range(0, len(words), block):
        of_block = there[start : start + block]
        probabilities = room[: (len(used) + 1) * len(of_block)].view(-1, len(of_block))
        probabilities[-1] = 0  # the last row stands for no image
        first = 0
        for x in _rows(images, used, device):
            rows = probabilities[first : first + len(x)]
            torch.mm(x, of_block.T, out=rows).mul_(SCALE).sub_(log_sums[first : first + len(x), None]).exp_()
            first += len(x)
        found = _log_products(probabilities, of_latents, ratios)
        yield start, found.sub_(found.logsumexp(dim=0) - np.log(len(found)))


def top_images(codes: scipy.sparse.csc_matrix, top_k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The images that activate latents most: their numbers in order (U), and for each latent the places there of its own, the
    strongest first (F x k). U stands for none. Of equally strong ones, the first counts."""
    n_active = np.diff(codes.indptr)
    latent = np.repeat(np.arange(len(n_active)), n_active)
    order = np.lexsort((codes.indices, -codes.data, latent))  # the latents stay in order
    place = np.arange(len(latent)) - np.repeat(codes.indptr[:-1], n_active)
    is_top = place < top_k
    used, of_image = np.unique(codes.indices[order][is_top], return_inverse=True)
    top = np.full((len(n_active), top_k), len(used))
    top[latent[is_top], place[is_top]] = of_image
    return used.astype(np.int64), top


def _rows(images: FeatureStore, used: NDArray[np.int64], device: torch.device) -> Iterator[torch.Tensor]:
    """Unit features of some images, in batches."""
    for start in range(0, len(used), BATCH):
        yield normalize(sent(images.gather(used[start : start + BATCH]), device), dim=-1)


def _log_products(probabilities: torch.Tensor, top: torch.Tensor, ratios: list[float]) -> torch.Tensor:
    """sum over j of log(1 + ratio_j x probability of the latent's j-th image): latents x words of the block."""
    n_words, device = probabilities.shape[1], probabilities.device
    found = torch.zeros(len(top), n_words, device=device)
    at_once = len(top) if device.type != "cpu" else max(1, IN_CACHE // n_words)
    columns = top.T.contiguous()
    for start in range(0, len(top), at_once):
        sums = found[start : start + at_once]
        product, factor = torch.ones_like(sums), torch.empty_like(sums)
        for j, ratio in enumerate(ratios, start=1):
            torch.index_select(probabilities, 0, columns[j - 1, start : start + at_once], out=factor)
            product.addcmul_(product, factor, value=ratio)
            if j % FACTORS == 0 or j == len(ratios):
                sums += product.log_()
                product.fill_(1)
    return found
