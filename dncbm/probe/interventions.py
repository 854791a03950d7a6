"""Interventions: concepts are removed, kept or scaled, and what that does to a probe's accuracy (METHOD section 6)."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from dncbm.concepts.lookup import Named, concepts_of
from dncbm.concepts.naming import ConceptName
from dncbm.features.store import FeatureStore
from dncbm.probe.fit import PATH_PASSES, PATH_RATIO, PATH_TOLERANCE
from dncbm.probe.model import Batch, ProbeData, linear, true_class_ranks
from dncbm.probe.reweighting import independence_weights
from dncbm.probe.solvers import BATCH, CrossEntropy, Progress, falling_lambdas, largest_lambda, minimise
from dncbm.runs.errors import UserError

DRAWS = 20
"""Random edits that an edit is compared with."""
MATCHED = 0.01
"""A random edit takes away as much strength as the edit, up to this share of it, if swaps find one that does."""
SWAPS, STARTS = 5000, 10
"""Swaps tried for one random edit, and how often they start again from other concepts if none of them is near enough."""
MAX_PASSES, TOLERANCE = 3000, 1e-7
"""For the last lambda of a refit: as tight as the tests of the solver ask for."""
Floats = NDArray[np.float64]


def factors_of(
    names: Sequence[ConceptName],
    *,
    remove: Iterable[Named] = (),
    keep: Iterable[Named] | None = None,
    scale: Mapping[Named, float] | None = None,
) -> torch.Tensor:
    """By what the strength of each concept is multiplied, F float32: 0 if it is removed, 1 if it stays as it is.

    Args:
        names: the names of the latents, F.
        remove: names, labels or indices of concepts to remove. A name stands for all latents that share it.
        keep: if given, all others are removed.
        scale: name, label or index -> factor, at least 0.

    Raises UserError if a name is unknown, a factor is negative or not finite, or a concept is named for two edits.
    """
    removed, scaled = concepts_of(names, remove), dict[int, float]()
    for wanted, factor in (scale or {}).items():
        if not 0 <= factor < float("inf"):
            raise UserError(f"the factor of {wanted!r} must be finite and at least 0, not {factor}")
        for index in concepts_of(names, [wanted]):
            if scaled.setdefault(index, factor) != factor:
                raise UserError(f"the concept {index}, {names[index].name}, is scaled by {scaled[index]} and by {factor}")
    kept = set(range(len(names)) if keep is None else concepts_of(names, keep)) | scaled.keys()
    if twice := [index for index in removed if index in scaled or (keep is not None and index in kept)]:
        raise UserError(f"the concept {twice[0]}, {names[twice[0]].name}, is removed, and kept or scaled, too")
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
    """The accuracies (fractions) of one probe on `val`, or of several random ones. A class or group without images has NaN."""

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
    """What else was measured. Of `random`: `concepts`, how many are edited in each draw; `strength`, the mean strength that a
    draw takes away, as a share of what the edit takes; `furthest`, the share that is furthest from 1; `shared`, the mean share
    of a draw's concepts that are the edit's own. Of `refit, reweighted`: what `Reweighting.about` holds."""

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
        factors: by what the strength of each concept is multiplied (`factors_of`), F.
        sparsity_lambda: the lambda of the probe.
        reweight: also refit with images weighted so that class and edited concepts are independent.
        seed: seed of the random edits and of the folds in which image weights are fitted.
        n_draws: number of random edits.

    Returns:
        The rows in the order of `Row.kind`.

    Raises UserError if the edited strengths are too large.
    """
    device, n_classes, totals = weight.device, weight.shape[1], total_strengths(train)
    solve = partial(refit, train, n_classes=n_classes, sparsity_lambda=sparsity_lambda, device=device)
    kinds: dict[str, torch.Tensor] = {
        "unedited": weight,
        "unedited, refit": solve(torch.ones_like(factors), said="unedited, refit"),
        "edited": edited(weight, factors),
        "refit": solve(factors, said="refit"),
    }
    about: dict[str, dict[str, float]] = {}
    if reweight:
        concepts = np.flatnonzero((factors.cpu().numpy() != 1) & (totals > 0))
        found = independence_weights(train, concepts, n_classes, seed, device)
        kinds["refit, reweighted"] = solve(factors, image_weights=found.weights, said="refit, reweighted")
        about["refit, reweighted"] = found.about
    draws = [random_factors(totals, factors, np.random.default_rng([seed, draw])) for draw in range(n_draws)]
    about["random"] = _compared(totals, factors.cpu().numpy(), draws)

    probes = [(found, None) for found in kinds.values()]
    right = right_predictions(val, [*probes, *((weight, draw) for draw in draws)])
    places = [[place] for place in range(len(kinds))] + [list(range(len(kinds), len(right)))]
    rows = []
    for (kind, own), chosen in zip([*kinds.items(), ("random", None)], places, strict=True):
        groups = None if val.groups is None else _shares(right[chosen], val.groups)
        classes = _shares(right[chosen], val.labels, n_classes)
        overall = right[chosen].double().mean(dim=1).numpy()
        rows.append(Row(kind, overall, classes, groups, own, about.get(kind, {})))
    return rows


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
    """The factors of an edit, given to as many random concepts so that they take away the same strength in total, F float32.

    `totals` is `total_strengths`; concepts that are always 0 do not count and are not drawn. Random swaps, each kept if it
    lowers the difference, go on until that is at most MATCHED of the strength; else the nearest found counts.
    """
    of_concepts = factors.cpu().double().numpy()
    fires = np.flatnonzero(totals > 0)
    own = of_concepts[fires][of_concepts[fires] != 1]
    found = torch.ones(len(totals))
    if not len(own):
        return found
    taken = np.zeros(len(fires))
    taken[: len(own)] = 1 - own
    wanted = float(((1 - of_concepts) * totals).sum())
    near, best, nearest = MATCHED * abs(wanted), float("inf"), fires
    for _ in range(STARTS):
        place = rng.permutation(fires)  # the concept at each place; the first places have the factors of the edit
        gap = _swap(place, taken, totals[place], wanted, near, rng)
        if abs(gap) < best:
            best, nearest = abs(gap), place
        if best <= near:
            break
    found[nearest[: len(own)]] = torch.from_numpy(own).float()
    return found


def _swap(
    place: NDArray[np.int64], taken: Floats, strength: Floats, wanted: float, near: float, rng: np.random.Generator
) -> float:
    """Swap what is at two places, one of them edited, while that lowers the difference, which is returned."""
    gap, shares, strengths = float(taken @ strength) - wanted, taken.tolist(), strength.tolist()
    n_edited = int(taken.nonzero()[0].max()) + 1
    pairs = zip(rng.integers(n_edited, size=SWAPS).tolist(), rng.integers(len(place), size=SWAPS).tolist(), strict=True)
    for i, j in pairs:
        if abs(gap) <= near:
            break
        after = gap + (shares[i] - shares[j]) * (strengths[j] - strengths[i])
        if abs(after) < abs(gap):
            gap, strengths[i], strengths[j] = after, strengths[j], strengths[i]
            place[i], place[j] = place[j], place[i]
    return gap


def _compared(totals: Floats, factors: NDArray[Any], draws: Sequence[torch.Tensor]) -> dict[str, float]:
    """How like the edit the random ones are; see `Row.about`."""
    own = (factors != 1) & (totals > 0)
    if not own.any() or not draws:
        return {"concepts": 0.0}
    wanted = float((1 - factors.astype(np.float64)) @ totals)
    others = np.stack([draw.numpy() for draw in draws]).astype(np.float64)
    shared = float(((others != 1) & own).sum() / (len(draws) * own.sum()))
    found = {"concepts": float(own.sum()), "shared": shared}
    if wanted:
        ratios = (1 - others) @ totals / wanted
        found |= {"strength": float(ratios.mean()), "furthest": float(ratios[np.abs(ratios - 1).argmax()])}
    return found


@torch.inference_mode()
def right_predictions(data: ProbeData, probes: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> torch.Tensor:
    """Which images each of several probes classifies correctly; probes x images, bool, on the CPU.

    A probe is its weights (inputs x C) and the factors of its inputs, if they are edited. Each batch is gathered once.
    """
    device = probes[0][0].device
    on_device = [(weight, None if factors is None else factors.to(device)) for weight, factors in probes]
    right = []
    for batch, labels in data.batches(BATCH, device):
        logits = (linear(batch if factors is None else _scaled(batch, factors), weight) for weight, factors in on_device)
        right.append(torch.stack([true_class_ranks(of_probe, labels) == 0 for of_probe in logits]))
    return torch.cat(right, dim=1).cpu()


def _scaled(batch: Batch, factors: torch.Tensor) -> Batch:
    if isinstance(batch, torch.Tensor):
        return batch * factors
    return batch._replace(values=batch.values * factors[batch.indices])


def _shares(right: torch.Tensor, membership: torch.Tensor, n: int = 0) -> Floats:
    """The share of right predictions in each class or group, draws x n."""
    counts = membership.bincount(minlength=n).double()
    rows = torch.stack([membership[row].bincount(minlength=len(counts)) for row in right]).double()
    found: Floats = (rows / counts).numpy()  # NaN without images
    return found
