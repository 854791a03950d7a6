"""Does a latent's direction hold a word? A test against directions that hold none, and what else the words say (METHOD 3)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize
from tqdm import tqdm

N_NEAREST = 5
"""Words that are listed for each latent."""
N_NULL, NULL_PER_LATENT = 10_000, 20
"""Directions that hold no word, for comparison: N_NULL, or NULL_PER_LATENT times the number of live latents if that is more.

With n of them no p is below 1 / (n + 1). Of m latents, at least m / (q (n + 1)) must therefore reach it before one has the
q-value q: with 20 m directions a single one is enough at q = 0.05."""
NULL_SEED = 0
NEAR_SYNONYMS = 0.6
"""Cosine of two centred words from which they mean nearly the same, so that a small margin between them is no doubt."""
CHUNK = 1024
"""Directions that are compared with all words at a time, unless the vocabulary is very large."""
_CELLS, _SHORT = 1 << 25, 1 << 26
"""Comparisons that are made at a time, and those from which a bar shows progress: they take seconds."""
_NOTHING, _ROUNDING = 1e-6, 1e-5
"""Norms and spreads up to the first are those of rounding alone; z that differ by less than the second part are equal."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class NameTest:
    """What words say about F latents."""

    z: Floats
    """How far the best word stands out of all words, in standard deviations, F; NaN if the words or the direction do not tell
    any apart."""
    p: Floats
    """Share of directions without a word whose best word stands out as far, F; NaN where z is."""
    q: Floats
    """p after Benjamini and Hochberg over the live latents, F; NaN for dead latents and where p is."""
    centred: Integers
    """The word that z is of, F: the nearest one after words and latents are centred; -1 where z is NaN."""


def nearest(dictionary: torch.Tensor, words: torch.Tensor, k: int, chunk: int = CHUNK) -> tuple[Integers, Floats]:
    """The k words (fewer if there are not as many) of largest cosine with each latent, the largest first, and the cosines.

    Computed on the CPU in float32, so that names are the same on any machine. Of equal cosines the first word is nearest.

    Args:
        dictionary: F x D; its rows may have any norm.
        words: V x D of unit norm.
        k: at least 1.
        chunk: latents compared with all words at a time.

    Returns:
        F x k each.
    """
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    words = words.cpu()
    for directions in normalize(dictionary.detach().cpu().float(), dim=-1).split(chunk):
        cosines = directions @ words.T
        best, word = cosines.max(dim=1, keepdim=True)
        cosines.scatter_(1, word, -torch.inf)  # ties: topk might prefer another word
        others = cosines.topk(min(k, len(words)) - 1, dim=1)
        found.append((torch.cat([word, others.indices], dim=1), torch.cat([best, others.values], dim=1)))
    indices, cosines = (torch.cat(parts) for parts in zip(*found, strict=True))
    return indices.numpy(), cosines.double().numpy()


def run_name_test(
    dictionary: torch.Tensor,
    words: torch.Tensor,
    live: NDArray[np.bool_],
    *,
    n_null: int | None = None,
    seed: int = NULL_SEED,
    device: str | torch.device = "cpu",
) -> NameTest:
    """Test which latents hold a word (METHOD section 3).

    Words and latents are centred; z is how far the best word stands out of all words. It is compared with that of `n_null`
    random directions that have the mean and the covariance of the live latents, and p becomes q by Benjamini and Hochberg.
    With a single word, or latents that are all the same, z is NaN. The random directions are the same on every device.

    Args:
        dictionary: F x D; its rows may have any norm.
        words: V x D of unit norm.
        live: which latents any image activates, F. Only these are tested; z and p of the others are those of a live latent.
        n_null: number of random directions; by default as N_NULL and NULL_PER_LATENT say.
        seed: theirs.
        device: where directions and words are compared.
    """
    directions = normalize(dictionary.detach().cpu().double(), dim=1)
    centred = centred_words(words).to(device)
    n = len(directions)
    if not live.any():
        unknown = np.full(n, np.nan)
        return NameTest(unknown, unknown, unknown, np.full(n, -1))
    alive = directions[torch.from_numpy(live)]
    mean = alive.mean(dim=0)
    z, word = _best(directions - mean, centred)
    n_null = max(N_NULL, NULL_PER_LATENT * len(alive)) if n_null is None else n_null
    is_short = n_null * len(words) < _SHORT
    chunks = tqdm(_null(alive, n_null, seed), "test of names", -(-n_null // CHUNK), unit="chunk", disable=is_short)
    null = np.concatenate([_best(drawn - mean, centred)[0] for drawn in chunks])
    p = p_values(z, null)
    q = np.full(n, np.nan)
    q[live] = benjamini_hochberg(p[live])
    return NameTest(z, p, q, np.where(np.isnan(z), -1, word))


def centred_words(words: torch.Tensor) -> torch.Tensor:
    """Words less their mean, of unit norm, V x D float32. A word at the mean becomes 0."""
    found = words.cpu().double()
    return _unit(found - found.mean(dim=0)).float()


def near_synonyms(words: torch.Tensor, pairs: Integers) -> NDArray[np.bool_]:
    """Whether the first two words of each row, as numbers of words, are nearly the same. A row of one word has no second.

    Centred words are compared: the embeddings of a CLIP model share a large mean, so that any two have a large cosine.
    """
    if pairs.shape[1] < 2:
        return np.zeros(len(pairs), dtype=bool)
    centred = centred_words(words)
    one, other = (centred[torch.from_numpy(pairs[:, place])] for place in (0, 1))
    return ((one * other).sum(dim=1) >= NEAR_SYNONYMS).numpy()


def most_specific(candidates: Integers, excluded: Integers) -> Integers:
    """Of the candidates of each row, the one that is a candidate in the fewest rows, F; the first one of several.

    Args:
        candidates: F x K numbers, the best first; equal numbers stand for one word.
        excluded: a number per row that is not taken, F.

    Returns:
        Numbers; -1 where no candidate is left.
    """
    of_each, at = np.unique(np.sort(candidates, axis=1), return_inverse=True)
    ordered = at.reshape(candidates.shape)
    is_new = np.diff(ordered, axis=1, prepend=-1) > 0  # a word that stands in a row twice counts once
    rows = np.bincount(ordered[is_new], minlength=len(of_each))
    counts = rows[np.searchsorted(of_each, candidates)].astype(float)
    counts[candidates == excluded[:, None]] = np.inf
    best = counts.argmin(axis=1)
    chosen = candidates[np.arange(len(candidates)), best]
    return np.where(np.isinf(counts.min(axis=1)), -1, chosen)


def p_values(values: Floats, null: Floats) -> Floats:
    """(1 + number of null values that are at least as large) / (1 + number of null values); NaN stays NaN.

    Null values that are NaN count as large.
    """
    n = len(null)
    ordered = np.sort(np.nan_to_num(null, nan=np.inf))
    below = np.searchsorted(ordered, values - _ROUNDING * np.abs(values))
    return np.where(np.isnan(values), np.nan, (1 + n - below) / (1 + n))


def benjamini_hochberg(p: Floats) -> Floats:
    """The q-values of p-values (Benjamini, Hochberg 1995): those with q <= alpha have a false discovery rate of at most alpha.

    NaN stays NaN and counts for nothing.
    """
    q = np.full(len(p), np.nan)
    known = np.flatnonzero(~np.isnan(p))
    if len(known):
        falling = known[np.argsort(-p[known], kind="stable")]
        ranks = np.arange(len(falling), 0, -1)
        q[falling] = np.minimum.accumulate(p[falling] * len(falling) / ranks).clip(max=1)
    return q


def mean_and_root(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of rows (D), and the symmetric square root of their covariance (D x D), to draw others like them.

    That root is unique, which eigenvectors are not, and exists also where fewer rows than dimensions make the covariance
    singular.
    """
    mean = rows.mean(dim=0)
    apart = rows - mean
    variances, axes = torch.linalg.eigh(apart.T @ apart / max(len(rows) - 1, 1))
    return mean, (axes * variances.clamp(min=0).sqrt()) @ axes.T


def _null(live: torch.Tensor, n: int, seed: int) -> Iterator[torch.Tensor]:
    """Random directions of unit norm with the mean and the covariance of live latents, in chunks of CHUNK x D float64."""
    mean, root = mean_and_root(live)
    generator = np.random.default_rng([seed, 4])  # shares no draws with those that others make from the seed alone
    for start in range(0, n, CHUNK):
        normal = torch.from_numpy(generator.standard_normal((min(CHUNK, n - start), len(mean))))
        yield normalize(mean + normal @ root, dim=1)


def _best(apart: torch.Tensor, centred: torch.Tensor) -> tuple[Floats, Integers]:
    """z and number of the best word for directions less their mean, N x D; NaN if no word stands out."""
    z, words = [], []
    for chunk in _unit(apart).float().split(max(1, min(CHUNK, _CELLS // len(centred)))):
        cosines = chunk.to(centred.device) @ centred.T
        spread, mean = torch.std_mean(cosines, dim=1, correction=0)
        best, word = cosines.max(dim=1)
        z.append(torch.where(spread > _NOTHING, (best - mean) / spread, torch.nan).cpu())
        words.append(word.cpu())
    return torch.cat(z).double().numpy(), torch.cat(words).numpy()


def _unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows of unit norm; those that are rounding errors of rows of about unit norm become 0."""
    norms = rows.norm(dim=1, keepdim=True)
    return torch.where(norms > _NOTHING, rows / norms, 0.0)
