"""The concepts of a run: what is known of each, its images, and the concepts and classes nearest to it (METHOD section 8)."""

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from dncbm.browser.pack import write_chunk
from dncbm.browser.shown import CONCEPTS_PER_CHUNK, Kept, ShownRun
from dncbm.concepts.evidence.images import read_evidence
from dncbm.concepts.evidence.name_test import N_NEAREST
from dncbm.concepts.evidence.stability import read_stability
from dncbm.concepts.lists import lines_of
from dncbm.concepts.naming import ConceptName, concept_labels, name_similarities
from dncbm.concepts.sae import firing_rates
from dncbm.explain.explanations import Floats, Leading, leading
from dncbm.explain.report.names import read_images_of_names
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SAERun
from dncbm.runs.errors import StaleArtifact, UserError
from dncbm.runs.settings import Settings

N_CARD, N_TOP = 6, 12
"""Top images of a concept on its card, and on its own page."""
N_PARTS, N_SAMPLED = 6, 3
"""Equal parts of the range of strengths, and images drawn from each."""
N_BARS = 24
N_NEAR = 10
"""Concepts that are like a concept, or active together with it; and classes that it votes for or against."""
BLOCK = 256
"""Concepts processed at a time."""

Numbers = NDArray[np.int32]
Arrays = dict[str, NDArray[Any]]


def write_concepts(
    settings: Settings, shown: ShownRun, kept: Sequence[Kept], data: Path, number: int, n_classes: Numbers | None,
    device: torch.device,
) -> None:  # fmt: skip
    """Write the chunks `concepts`, `tops_<d>` and `concept_<k>` of a run; `types.d.ts` says what they hold.

    Besides a second copy of one data set's strengths, it needs memory for BLOCK x F numbers.

    Args:
        settings: the config.
        shown: the run.
        kept: the images of each data set.
        data: folder of the chunks.
        number: the run's number in the site.
        n_classes: for each concept, F, the number of classes that have it among their leading ones; None without a probe.
        device: where decoder columns are compared.

    Raises UserError if firing rates, evidence or stability are damaged. Evidence and stability that are out of date are left
    out.
    """
    rates, seed = firing_rates(settings, shown.run), shown.run.training.seed
    images, uses = list[Arrays](), list[Use]()
    for d, (one, strengths) in enumerate(zip(kept, shown.strengths, strict=True)):
        columns = None if strengths is None else strengths.tocsc()
        uses.append(use_of(columns, shown.n_latents))
        found = images_of(scipy.sparse.csc_matrix((len(one.keys), shown.n_latents)) if columns is None else columns, seed)
        images.append(found)
        if columns is None:
            found["top_strengths"][:] = found["sampled_strengths"][:] = np.nan
        write_chunk(data, f"{number}/tops_{d}", {"images": found["top"][:, :N_CARD]})
    use = {
        name: np.array([getattr(one, name) for one in uses], np.float32).reshape(-1, shown.n_latents).T for name in Use._fields
    }  # fmt: skip
    used = np.zeros(shown.n_latents, dtype=np.int32) if n_classes is None else n_classes
    rate = np.full(shown.n_latents, np.nan) if rates is None else rates
    write_chunk(
        data, f"{number}/concepts",
        name_columns(settings, shown) | evidence_columns(settings, shown) | {"n_classes": used, "rate": _single(rate)} | use,
    )  # fmt: skip
    near = _near(shown, rates, device) | votes(shown.weight, shown.n_latents)
    for k, start in enumerate(range(0, shown.n_latents, CONCEPTS_PER_CHUNK)):
        part = slice(start, start + CONCEPTS_PER_CHUNK)
        write_chunk(data, f"{number}/concept_{k}", {"datasets": [_part(one, part) for one in images]} | _part(near, part))


def _part(arrays: Arrays, part: slice) -> Arrays:
    return {name: values[part] for name, values in arrays.items()}


def _single(values: NDArray[np.float64]) -> Floats:
    return values.astype(np.float32)


# ------------------------------------------------------------------------------------------------- names and evidence


def name_columns(settings: Settings, shown: ShownRun) -> dict[str, object]:
    """The columns of `Concepts` about names. What is unknown is NaN, "" or an empty list."""
    n, names, tests = shown.n_latents, shown.names, shown.tests
    unknown, blank = np.full(n, np.nan), [""] * n
    times = Counter(name.name for name in names or ())
    return {
        "labels": [f"latent {index}" for index in range(n)] if names is None else concept_labels(names),
        "names": blank if names is None else [name.name for name in names],
        "words": [[]] * n if tests is None else tests.words,
        "verdicts": blank if names is None else [name.verdict or "" for name in names],
        "tested": blank if tests is None else tests.centred_names,
        "alternatives": blank if tests is None else tests.alternatives,
        "spellings": {} if names is None else spellings_of_labels(names),
        "similarity": _single(unknown if names is None else _similarities(settings, shown.run, names)),
        "similarities": _single(np.full((n, N_NEAREST), np.nan) if tests is None else tests.similarities),
        **{column: _single(unknown if tests is None else getattr(tests, column)) for column in ("q", "z", "margin")},
        "shared": np.array([0] * n if names is None else [times[name.name] for name in names], dtype=np.int32),
    }


def spellings_of_labels(names: Sequence[ConceptName]) -> dict[str, str]:
    """Index -> how a list of concepts writes it, where that is not its label."""
    pairs = zip(lines_of(names), concept_labels(names), strict=True)
    return {str(index): line for index, (line, label) in enumerate(pairs) if line != label}


def _similarities(settings: Settings, run: SAERun, names: Sequence[ConceptName]) -> NDArray[np.float64]:
    """Cosine of each name and its decoder column, F; NaN where it is neither stored nor can be computed."""
    if Artifacts(settings).embeddings_in_use(run.encoder).is_file():
        with suppress(UserError):  # names that were edited by hand may be no words of the vocabulary
            return name_similarities(settings, run, names)
    return np.array([name.similarity for name in names])


def evidence_columns(settings: Settings, shown: ShownRun) -> dict[str, object]:
    """The columns of `Concepts` about evidence and stability. What is unknown is NaN or "".

    The evidence is that by which a report judges claims. What is out of date is left out. Raises UserError if a table is
    damaged.
    """
    n, run, unknown = shown.n_latents, shown.run, np.full(shown.n_latents, np.nan)
    columns: dict[str, object] = {"evidence_dataset": "", "wpmi_words": [""] * n}
    numbers = dict.fromkeys(("auc", "auc_q", "wpmi_agrees", "monoscore", "stability"), unknown)
    with suppress(StaleArtifact):
        if shown.names is not None and (found := read_images_of_names(settings, run)):
            first = found[0]
            words = read_evidence(settings, run, first.dataset).wpmi_name
            columns = {"evidence_dataset": first.dataset, "wpmi_words": words}
            numbers |= {"auc": first.auc, "auc_q": first.q, "wpmi_agrees": first.agrees, "monoscore": first.mono}
    with suppress(StaleArtifact):
        if (stable := read_stability(settings, run)) is not None:
            numbers["stability"] = stable.stability
    return columns | {name: _single(values) for name, values in numbers.items()}


# ------------------------------------------------------------------------------------------------------------- images


class Use(NamedTuple):
    """How F concepts are used by images; NaN where there are none."""

    activity: Floats
    """Share of the images that each fires on."""
    most: Floats
    """Largest strength."""
    mean: Floats
    """Mean strength over all images."""


def use_of(columns: scipy.sparse.csc_matrix | None, n_latents: int) -> Use:
    """How concepts are used, from their strengths, images x F without stored zeros; None: there are none."""
    if columns is None or not (n := columns.shape[0]):
        return Use(*(np.full(n_latents, np.nan, dtype=np.float32) for _ in Use._fields))
    mean = np.asarray(columns.mean(axis=0, dtype=np.float64)).ravel()
    return Use(_single(np.diff(columns.indptr) / n), strongest(columns), _single(mean))


def strongest(columns: scipy.sparse.csc_matrix) -> Floats:
    """The largest strength of each concept, F, from images x F without stored zeros; 0 for one without images."""
    most, fires = np.zeros(columns.shape[1], dtype=np.float32), np.diff(columns.indptr) > 0
    most[fires] = np.maximum.reduceat(columns.data, columns.indptr[:-1][fires]) if fires.any() else 0
    return most


def images_of(columns: scipy.sparse.csc_matrix, seed: int) -> Arrays:
    """The images of each concept as `ConceptImages` has them, from images x F without stored zeros."""
    rng, parts = np.random.default_rng(seed), list[Arrays]()
    for start in range(0, columns.shape[1], BLOCK):
        block = columns[:, start : start + BLOCK]
        (top, top_strengths), (sampled, strengths) = top_images(block, N_TOP), sampled_images(block, N_PARTS, N_SAMPLED, rng)
        parts.append(
            {
                "top": top, "top_strengths": top_strengths, "sampled": sampled, "sampled_strengths": strengths,
                "histogram": histograms(block, N_BARS),
            }
        )  # fmt: skip
    return _joined(parts)


def _joined(parts: Sequence[Arrays]) -> Arrays:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def top_images(columns: scipy.sparse.csc_matrix, k: int) -> tuple[Numbers, Floats]:
    """The k images that activate each concept most, the strongest first, and their strengths; ties go to the lower image.

    `columns` are strengths, images x F. Both results are F x k; what is missing is -1, with a strength of 0.
    """
    return _pair(leading(columns.T.tocsr(), k))


def _pair(found: Leading) -> tuple[Numbers, Floats]:
    return found.concepts.astype(np.int32), found.values


def sampled_images(
    columns: scipy.sparse.csc_matrix, n_parts: int, n_each: int, rng: np.random.Generator
) -> tuple[Numbers, Floats]:
    """Images drawn at random from each of `n_parts` equal parts of the range (0, most] of a concept's strengths.

    Args:
        columns: strengths, images x F, without stored zeros.
        n_parts: number of parts.
        n_each: number of images per part.
        rng: where the draws come from.

    Returns:
        Images and strengths, both F x (n_parts * n_each): the highest part first, within a part by falling strength. Where a
        part has fewer images, -1 with a strength of 0 follows them.
    """
    concept, part = parts_of(columns, n_parts)
    n, group = columns.shape[1] * n_parts, concept * n_parts + n_parts - 1 - part
    order = np.lexsort((rng.random(len(group)), group))
    place = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    drawn = order[place < n_each]
    chosen = scipy.sparse.coo_matrix(
        (columns.data[drawn], (group[drawn], columns.indices[drawn])), shape=(n, columns.shape[0])
    )
    images, strengths = _pair(leading(chosen.tocsr(), n_each))
    return images.reshape(-1, n_parts * n_each), strengths.reshape(-1, n_parts * n_each)


def histograms(columns: scipy.sparse.csc_matrix, n_bars: int) -> Numbers:
    """Number of images in each of `n_bars` equal parts of (0, most], the lowest first: F x n_bars, from images x F."""
    concept, part = parts_of(columns, n_bars)
    n = columns.shape[1]
    return np.bincount(concept * n_bars + part, minlength=n * n_bars).reshape(n, n_bars).astype(np.int32)


def parts_of(columns: scipy.sparse.csc_matrix, n_parts: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The concept of each stored strength of images x F, and in which of `n_parts` equal parts of (0, most] it lies.

    Parts are open below and closed above. In float64, the quotient of two float32 rounds to no integer that it is not.
    """
    concept = np.repeat(np.arange(columns.shape[1]), np.diff(columns.indptr))
    share = columns.data.astype(np.float64) * n_parts / strongest(columns)[concept]
    return concept, np.ceil(share).astype(np.int64) - 1


# ------------------------------------------------------------------------------------------------ concepts and classes


def _near(shown: ShownRun, rates: NDArray[np.float64] | None, device: torch.device) -> Arrays:
    """The fields of `ConceptDetails` about other concepts, F x N_NEAR."""
    live = np.ones(shown.n_latents, dtype=bool) if rates is None else rates > 0
    similar, cosine = alike(shown.dictionary, live, N_NEAR, device)
    available = [one for one in shown.strengths if one is not None]
    probed = None if shown.probed is None else shown.strengths[shown.probed]
    if probed is None:
        probed = available[0] if available else scipy.sparse.csr_matrix((0, shown.n_latents), dtype=np.float32)
    beside, share = together(probed, N_NEAR)
    return {"alike": similar, "alike_cosine": cosine, "together": beside, "together_share": share}


def alike(dictionary: torch.Tensor, live: NDArray[np.bool_], k: int, device: torch.device) -> tuple[Numbers, Floats]:
    """The k concepts whose decoder columns have the largest positive cosine with that of each concept, and the cosines.

    Args:
        dictionary: F x D; its rows may have any norm.
        live: which concepts fire at all, F. The others are nobody's neighbours and have none.
        k: number of neighbours.
        device: where the cosines are computed, BLOCK x F at a time.

    Returns:
        Concepts and cosines, both F x k, the largest first; what is missing is -1, with a cosine of 0.
    """
    directions = normalize(dictionary.detach().float(), dim=1).to(device)
    directions[torch.from_numpy(~live).to(device)] = 0

    def cosines(start: int) -> Floats:
        found: Floats = (directions[start : start + BLOCK] @ directions.T).cpu().numpy()
        return found

    return _leading_others((cosines(start) for start in range(0, len(live), BLOCK)), k)


def together(strengths: scipy.sparse.csr_matrix, k: int) -> tuple[Numbers, Floats]:
    """The k concepts that are most often active together with each concept, by |A and B| / |A or B|, and these shares.

    A and B are the images that two concepts are active on. `strengths` are images x F, without stored zeros; BLOCK x F
    shares are computed at a time. Both results are F x k, the largest first; what is missing is -1, with a share of 0.
    """
    ones = np.ones(strengths.nnz, dtype=np.float32)
    rows = scipy.sparse.csr_matrix((ones, strengths.indices, strengths.indptr), shape=strengths.shape)
    columns, sizes = rows.tocsc(), np.bincount(rows.indices, minlength=rows.shape[1]).astype(np.float32)

    def shares(start: int) -> Floats:
        both: Floats = (columns[:, start : start + BLOCK].T @ rows).toarray()
        either = sizes[start : start + BLOCK, None] + sizes - both
        return np.divide(both, either, out=both, where=both > 0)

    return _leading_others((shares(start) for start in range(0, len(sizes), BLOCK)), k)


def _leading_others(blocks: Iterable[Floats], k: int) -> tuple[Numbers, Floats]:
    """The k largest positive entries of each row of a square matrix off its diagonal; ties go to the lower column.

    The matrix comes in blocks of rows, which are overwritten.
    """
    parts, start = list[tuple[Numbers, Floats]](), 0
    for block in blocks:
        own = np.arange(len(block))
        block[own, start + own] = 0
        parts.append(_leading_of_rows(block, k))
        start += len(block)
    concepts, values = zip(*parts, strict=True)
    return np.concatenate(concepts), np.concatenate(values)


def _leading_of_rows(values: Floats, k: int) -> tuple[Numbers, Floats]:
    """The k largest positive entries of each row, as columns and values; ties go to the lower column."""
    least = np.partition(values, -k, axis=1)[:, -k, None] if k < values.shape[1] else 0
    return _pair(leading(scipy.sparse.csr_matrix(np.where(values >= least, values, 0)), k))


def votes(weight: torch.Tensor | None, n_latents: int) -> Arrays:
    """The classes of the largest positive and of the most negative weights of each concept, and these weights.

    `weight` is the probe's, F x C. Returns the four fields of `ConceptDetails`, F x N_NEAR, the furthest from 0 first; what is
    missing is -1, with a weight of 0. Without a probe they are F x 0.
    """
    fields = ("for_classes", "for_weights", "against_classes", "against_weights")
    if weight is None:
        return {name: np.zeros((n_latents, 0), np.int32 if "classes" in name else np.float32) for name in fields}
    parts = []
    for block in weight.detach().float().cpu().split(BLOCK):
        (most, most_weights), (least, least_weights) = (_leading_of_rows(w.numpy(), N_NEAR) for w in (block, -block))
        parts.append(dict(zip(fields, (most, most_weights, least, -least_weights), strict=True)))
    return _joined(parts)
