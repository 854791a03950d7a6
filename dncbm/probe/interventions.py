"""Interventions: concepts are removed, kept or scaled, and what that does to a probe's accuracy (METHOD section 6)."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from dncbm.concepts.lookup import Named, concepts_of, find, spellings_of
from dncbm.concepts.naming import ConceptName, concept_labels
from dncbm.features.store import FeatureStore
from dncbm.probe.fit import PATH_PASSES, PATH_RATIO, PATH_TOLERANCE
from dncbm.probe.model import ProbeData, accuracy_of_groups
from dncbm.probe.reweighting import independence_weights
from dncbm.probe.solvers import BATCH, CrossEntropy, Progress, falling_lambdas, largest_lambda, minimise
from dncbm.runs.errors import UserError

DRAWS = 20
"""Random edits that an edit is compared with."""
MATCHED = 0.01
"""How far the strength that a random edit takes away may be from the edit's, as a share of that."""
SWAPS, STARTS = 5000, 10
"""Swaps tried for one random edit, and starts from other concepts while none comes near enough."""
MAX_PASSES, TOLERANCE = 3000, 1e-7
"""For the last lambda of a refit: as tight as the tests of the solver ask for."""
Floats = NDArray[np.float64]


def factors_of(
    names: Sequence[ConceptName],
    *,
    remove: Iterable[Named] = (),
    keep: Iterable[Named] | None = None,
    scale: Mapping[Named, float] | Mapping[int, float] | None = None,
) -> torch.Tensor:
    """The factor of each concept's strength, F float32: 0 removes the concept, 1 leaves it as it is.

    Args:
        names: the names of the latents, F.
        remove: names, labels or indices of concepts to remove. A name stands for all latents that share it (`spellings_of`).
        keep: if given, all others are removed.
        scale: name, label or index -> factor, at least 0.

    Raises UserError if a name is unknown, a factor is negative or not finite, or a concept is named for two edits.
    """
    known, removed, scaled = spellings_of(names), concepts_of(names, remove), dict[int, float]()
    for wanted, factor in (scale or {}).items():
        if not 0 <= factor < float("inf"):
            raise UserError(f"the factor of {wanted!r} must be finite and at least 0, not {factor}")
        for index in find(wanted, known, len(names)):
            if scaled.setdefault(index, factor) != factor:
                label = concept_labels(names)[index]
                raise UserError(f"the concept {index}, {label}, is scaled by {scaled[index]} and by {factor}")
    kept = set(range(len(names)) if keep is None else concepts_of(names, keep)) | scaled.keys()
    if twice := [index for index in removed if index in scaled or (keep is not None and index in kept)]:
        label = concept_labels(names)[twice[0]]
        raise UserError(f"the concept {twice[0]}, {label}, is removed, and also kept or scaled")
    factors = torch.zeros(len(names))
    factors[sorted(kept)] = 1.0
    factors[removed] = 0.0
    for index, factor in scaled.items():
        factors[index] = factor
    return factors


def edited(weight: torch.Tensor, factors: torch.Tensor, classes: Sequence[int] | None = None) -> torch.Tensor:
    """The weights (F x C) of a probe that gives for all strengths what the unedited one gives for scaled strengths.

    With `classes`, only their logits are edited.
    """
    scaled = weight * factors.to(weight.device)[:, None]
    if classes is None:
        return scaled
    found = weight.clone()
    found[:, list(classes)] = scaled[:, list(classes)]
    return found


# -------------------------------------------------------------------------------------------------- what an edit does


@dataclass(frozen=True)
class Row:
    """The accuracies (fractions) on `val` of one probe, or of one per random draw. NaN: a class or group without images."""

    kind: str
    """`unedited`, `unedited, refit`, `edited`, `refit`, `refit, reweighted` or `random`."""
    overall: Floats
    """One per draw; a row that is not random has one."""
    classes: Floats
    """Draws x C."""
    groups: Floats | None
    """Draws x groups; None without groups."""
    weight: torch.Tensor | None = None
    """F x C, for unedited strengths; None for random draws."""
    about: Mapping[str, float] = field(default_factory=dict)
    """What else was measured: for `random` see `_compared`, for `refit, reweighted` see `independence_weights`."""

    def figures(self) -> dict[str, Floats]:
        """Overall, mean and worst accuracy, one per draw, by their columns of the results without `val_`."""
        found = {"top1": self.overall}
        for kind, shares in (("class", self.classes), ("group", self.groups)):
            if shares is not None:
                found |= {f"mean_{kind}_top1": np.nanmean(shares, axis=1), f"worst_{kind}_top1": np.nanmin(shares, axis=1)}
        return found


def intervene(
    train: ProbeData,
    val: ProbeData,
    weight: torch.Tensor,
    factors: torch.Tensor,
    sparsity_lambda: float,
    *,
    reweight: bool = False,
    seed: int = 0,
    n_draws: int = DRAWS,
) -> list[Row]:
    """What an edit does to the accuracy of a probe, beside what a refit and random edits do (METHOD section 6).

    Args:
        train: concept strengths of the images that the probe was trained on.
        val: concept strengths of the images on which accuracy is measured.
        weight: the probe, F x C, on the device where to compute.
        factors: the factor of each concept's strength (`factors_of`), F.
        sparsity_lambda: the lambda of the probe.
        reweight: also refit with images weighted so that class and edited concepts are independent.
        seed: seed of the random edits and of the folds in which image weights are fitted.
        n_draws: number of random edits.

    Returns:
        The rows in the order of `Row.kind`.

    Raises UserError if the edited strengths are too large.
    """
    device, n_classes, totals = weight.device, weight.shape[1], total_strengths(train)
    of_concepts = factors.cpu().double().numpy()
    solve = partial(refit, train, n_classes=n_classes, sparsity_lambda=sparsity_lambda, device=device)
    kinds = {
        "unedited": weight,
        "unedited, refit": solve(torch.ones_like(factors), said="unedited, refit"),
        "edited": edited(weight, factors),
        "refit": solve(factors),
    }
    about: dict[str, dict[str, float]] = {}
    if reweight:
        concepts = np.flatnonzero((of_concepts != 1) & (totals > 0))
        weights, about["refit, reweighted"] = independence_weights(train, concepts, n_classes, seed, device)
        kinds["refit, reweighted"] = solve(factors, image_weights=weights, said="refit, reweighted")
    rows = [_measured(kind, val, [found], found, about.get(kind, {})) for kind, found in kinds.items()]
    draws = [random_factors(totals, factors, np.random.default_rng([seed, draw])) for draw in range(n_draws)]
    bar = tqdm(draws, desc="random edits", unit="edit")
    return [
        *rows,
        _measured("random", val, (edited(weight, draw) for draw in bar), None, _compared(totals, of_concepts, draws)),
    ]


def _measured(
    kind: str, val: ProbeData, probes: Iterable[torch.Tensor], weight: torch.Tensor | None, about: Mapping[str, float]
) -> Row:
    """The row of one or several probes, F x C each."""
    groups = torch.zeros_like(val.labels) if val.groups is None else val.groups
    n_groups, found = int(groups.max()) + 1, list[list[torch.Tensor]]()
    for probe in probes:
        n_classes = probe.shape[1]
        counts = accuracy_of_groups(probe, val, groups * n_classes + val.labels, n_groups * n_classes)
        images, right = (of_cells.reshape(n_groups, n_classes).double() for of_cells in counts)
        by_class, by_group = (right.sum(dim=axis) / images.sum(dim=axis) for axis in (0, 1))  # NaN without images
        found.append([right.sum() / len(val), by_class, by_group])
    overall, classes, of_groups = (torch.stack(part).numpy() for part in zip(*found, strict=True))
    return Row(kind, overall, classes, None if val.groups is None else of_groups, weight, about)


def total_strengths(data: ProbeData) -> Floats:
    """The sum of the strengths of each concept over all images, F."""
    assert not isinstance(data.inputs, FeatureStore)
    matrix, totals = data.inputs, np.zeros(data.width)
    for start in range(0, len(data), BATCH):
        first, last = matrix.indptr[start], matrix.indptr[min(start + BATCH, len(data))]
        totals += np.bincount(matrix.indices[first:last], matrix.data[first:last], minlength=data.width)
    return totals


def refit(
    train: ProbeData,
    factors: torch.Tensor,
    *,
    n_classes: int,
    sparsity_lambda: float,
    device: torch.device,
    image_weights: torch.Tensor | None = None,
    said: str = "refit",
) -> torch.Tensor:
    """Solve the probe's objective again on edited strengths. Concepts that are removed have no weights.

    The penalty per weight is that of the unedited probe, lambda / (C F), whatever is removed. Lambda halves from where all
    weights are 0, as in `fit_prox`. With `image_weights` (one per image), the cross-entropies count by them.

    Returns:
        The weights for unedited strengths, F x C: those of the solution, times `factors`.

    Raises UserError if the edited strengths are too large.
    """
    factors = factors.to(device)
    progress = Progress.at(torch.zeros(train.width, n_classes, device=device))
    with closing(CrossEntropy(train, device, 1 / factors, image_weights)) as loss, tqdm(desc=said, unit="pass") as bar:
        curvature = loss.curvature()
        if not bool(curvature.isfinite().all()):
            raise UserError("the edited strengths are too large for single precision: scale concepts by smaller factors")
        *path, last = falling_lambdas(largest_lambda(loss, n_classes), sparsity_lambda, PATH_RATIO)
        solve = partial(minimise, loss, curvature, on_pass=lambda _: bar.update())
        for on_the_way in path:
            progress = solve(progress, on_the_way, max_passes=PATH_PASSES, tolerance=PATH_TOLERANCE)
            progress = Progress.at(progress.weight)
        progress = solve(progress, last, max_passes=MAX_PASSES, tolerance=TOLERANCE)
    return progress.weight * factors[:, None]


def random_factors(totals: Floats, factors: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """The factors of an edit, given to as many random concepts that lose the same total strength, F float32.

    `totals` is `total_strengths`; concepts that are always 0 do not count and are not drawn. The strengths agree within
    MATCHED, or as nearly as STARTS starts find. The edit itself is no random one: where nothing else matches it, for example
    because it takes the strongest concepts, only other concepts are drawn.
    """
    of_concepts = factors.cpu().double().numpy()
    fires, is_edited = totals > 0, of_concepts != 1
    own = of_concepts[fires & is_edited]
    if not len(own):
        return torch.ones(len(totals))
    wanted = float((1 - of_concepts) @ totals)
    edit = np.where(fires, of_concepts, 1)
    found = edit
    for pool in (fires, fires & ~is_edited):
        smallest = float("inf")
        for _ in range(STARTS if pool.sum() >= len(own) else 0):
            concepts, gap = _matched(np.flatnonzero(pool), totals, own, wanted, rng)
            drawn = np.ones(len(totals))
            drawn[concepts] = own
            if abs(gap) < smallest and not np.array_equal(drawn, edit):
                smallest, found = abs(gap), drawn
            if smallest <= MATCHED * abs(wanted):
                break
        if smallest < float("inf"):
            break
    return torch.from_numpy(found).float()


def _matched(
    pool: NDArray[np.int64], totals: Floats, own: Floats, wanted: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], float]:
    """Random concepts of a pool, one per factor, that lose about the wanted strength together; and what they lose beyond it.

    Random swaps of two concepts are kept if they lower the difference.
    """
    place = rng.permutation(pool)  # the first places have the factors
    shares, strength = np.r_[1 - own, np.zeros(len(pool) - len(own))].tolist(), totals[place].tolist()
    gap = float(np.dot(shares, strength)) - wanted
    pairs = rng.integers(len(own), size=SWAPS).tolist(), rng.integers(len(place), size=SWAPS).tolist()
    for i, j in zip(*pairs, strict=True):
        if abs(gap) <= MATCHED * abs(wanted):
            break
        after = gap + (shares[i] - shares[j]) * (strength[j] - strength[i])
        if abs(after) < abs(gap):
            gap, strength[i], strength[j] = after, strength[j], strength[i]
            place[i], place[j] = place[j], place[i]
    return place[: len(own)], gap


def _compared(totals: Floats, factors: Floats, draws: Sequence[torch.Tensor]) -> dict[str, float]:
    """How well random edits match an edit.

    `concepts`: how many each edits; `shared`: the mean share of these that are the edit's own. If the edit takes strength
    away, `strength`: the mean strength that a draw takes away, as a share of the edit's; `furthest`: the share that is
    furthest from 1.
    """
    own = (factors != 1) & (totals > 0)
    if not own.any() or not draws:
        return {"concepts": 0.0}
    others = torch.stack(list(draws)).double().numpy()
    found = {"concepts": float(own.sum()), "shared": float(((others != 1) & own).sum() / (len(draws) * own.sum()))}
    if wanted := float((1 - factors) @ totals):
        ratios = (1 - others) @ totals / wanted
        found |= {"strength": float(ratios.mean()), "furthest": float(ratios[np.abs(ratios - 1).argmax()])}
    return found
