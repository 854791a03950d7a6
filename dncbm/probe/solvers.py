"""The probe's objective solved exactly: proximal gradient steps, so that weights are true zeros, and a path of penalties.

The objective is that of METHOD section 4, cross-entropy + lambda * mean |W|, over all images at once. It is convex, so where
the steps end does not depend on where they began. They are those of FISTA (Beck and Teboulle 2009), started anew when momentum
points uphill (O'Donoghue and Candes 2015), with a step size for every input: by Jensen's inequality

    D_f = 1 / (2 n) * sum over images i of |x_if| * sum over inputs g of |x_ig|

bounds the curvature, however differently the inputs are scaled, and an input that is rarely active moves as fast as any.
The path follows GLM-SAGA (Wong, Santurkar and Madry 2021): penalties fall geometrically, each starts at the one before.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch.nn import functional

from dncbm.features.store import FeatureStore
from dncbm.probe.model import Batch, ProbeData, SparseRows, linear
from dncbm.probe.step import BatchSlopes, Slopes, add_gradient

BATCH = 4096
"""Images whose logits are in memory at once."""
STALLED_OVER = 10
"""Passes over which the objective is compared with itself."""


@dataclass
class Progress:
    """Where the steps for one penalty are; all that going on needs."""

    weight: torch.Tensor
    """inputs x C."""
    previous: torch.Tensor
    """The weights before."""
    momentum: float = 1.0
    """FISTA's t."""
    objectives: list[float] = field(default_factory=list)
    """The objective at the weights each pass began with (their look-ahead), one a pass."""

    @classmethod
    def at(cls, weight: torch.Tensor) -> "Progress":
        """At a start, without momentum."""
        return cls(weight, weight)


class CrossEntropy:
    """Mean cross-entropy of a split as a function of the weights, with its gradient and a bound of its curvature."""

    def __init__(self, data: ProbeData, device: torch.device, scale: torch.Tensor | None = None) -> None:
        """Args: data: the split. device: where weights lie. scale: what each input is divided by first; None: by 1."""
        self.data, self.device = data, device
        self._divide = None if scale is None else scale.to(device)[:, None]
        sparse_on_cpu = device.type == "cpu" and not isinstance(data.inputs, FeatureStore)
        self._slopes = BatchSlopes(data.width) if sparse_on_cpu else None

    def __call__(self, weight: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The mean cross-entropy at some weights (inputs x C), and its gradient."""
        own = weight if self._divide is None else weight / self._divide
        loss, gradient = self._autograd(own) if self._slopes is None else self._compiled(own, self._slopes)
        return loss, gradient if self._divide is None else gradient / self._divide

    def _autograd(self, weight: torch.Tensor) -> tuple[float, torch.Tensor]:
        weight = weight.detach().requires_grad_()
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for batch, labels in self.data.batches(BATCH, self.device):
            loss = functional.cross_entropy(linear(batch, weight), labels, reduction="sum") / len(self.data)
            loss.backward()
            total += loss.detach()
        assert weight.grad is not None
        return float(total), weight.grad

    def _compiled(self, weight: torch.Tensor, slopes: BatchSlopes) -> tuple[float, torch.Tensor]:
        total, gradient = 0.0, torch.zeros_like(weight)
        for start in range(0, len(self.data), BATCH):
            rows = np.arange(start, min(start + BATCH, len(self.data)))
            found = slopes(weight, self.data.inputs, rows, self.data.labels[start : start + BATCH], len(self.data))
            total += found.ce
            slopes.over_inputs(partial(_add_to, gradient.numpy(), found))
        return total, gradient

    def curvature(self) -> torch.Tensor:
        """D_f above for every input, times `_tightness` for features."""
        ones = torch.ones(self.data.width, 1, device=self.device)
        probe = (ones if self._divide is None else ones / self._divide).requires_grad_()
        for batch, _ in self.data.batches(BATCH, self.device):
            sums = linear(_absolute(batch), probe)
            (sums * sums.detach()).sum().backward()
        assert probe.grad is not None
        found = probe.grad if self._divide is None else probe.grad / self._divide
        bound = found[:, 0] / (2 * len(self.data))
        return bound if not isinstance(self.data.inputs, FeatureStore) else bound * self._tightness(bound)

    def _tightness(self, bound: torch.Tensor) -> float:
        """How much smaller a bound of the curvature of features may be: the largest eigenvalue in its units, at most 1.

        Features of either sign cancel, which Jensen's inequality does not see; and they are few enough for their Gram matrix.
        """
        gram = torch.zeros(len(bound), len(bound), device=self.device)
        for batch, _ in self.data.batches(BATCH, self.device):
            assert isinstance(batch, torch.Tensor)
            x = batch if self._divide is None else batch / self._divide.T
            gram.addmm_(x.T, x, alpha=0.5 / len(self.data))
        unit = bound.clamp(min=1e-30).rsqrt()
        # On a CPU, since mps has no float64. A little is added for the rounding of the products.
        return min(1.0, 1.001 * float(torch.linalg.eigvalsh((unit[:, None] * gram * unit).cpu().double())[-1]))

    def close(self) -> None:
        """End the threads."""
        if self._slopes is not None:
            self._slopes.close()


@contextmanager
def cross_entropy_of(
    data: ProbeData, device: torch.device, scale: torch.Tensor | None = None
) -> Iterator[CrossEntropy]:
    """A CrossEntropy whose threads end with the block."""
    loss = CrossEntropy(data, device, scale)
    try:
        yield loss
    finally:
        loss.close()


def _add_to(gradient: np.ndarray, found: Slopes, first: int, last: int) -> None:
    add_gradient(first, last, found.input_start, found.item, found.value, found.slopes, gradient)


def _absolute(batch: Batch) -> Batch:
    return batch._replace(values=batch.values.abs()) if isinstance(batch, SparseRows) else batch.abs()


def root_mean_square(data: ProbeData, device: torch.device) -> torch.Tensor:
    """Of every input over the images; 1 for an input that is always 0."""
    ones = torch.ones(data.width, 1, device=device, requires_grad=True)
    for batch, _ in data.batches(BATCH, device):
        squares = batch._replace(values=batch.values.square()) if isinstance(batch, SparseRows) else batch.square()
        linear(squares, ones).sum().backward()
    assert ones.grad is not None
    found = (ones.grad[:, 0] / len(data)).sqrt()
    return torch.where(found > 0, found, torch.ones_like(found))


def soft_threshold(values: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """The proximal step of |W|: every value moved towards 0 by so much, and 0 where it would cross it."""
    return values - values.clamp(min=-by, max=by)


def minimise(
    loss: CrossEntropy,
    curvature: torch.Tensor,
    progress: Progress,
    sparsity_lambda: float,
    *,
    max_passes: int,
    tolerance: float,
    support: torch.Tensor | None = None,
    on_pass: Callable[[Progress], None] | None = None,
) -> Progress:
    """Minimise cross-entropy + lambda * mean |W|, going on from `progress`.

    It ends when the objective has fallen by less than `tolerance` of itself over STALLED_OVER passes, or after `max_passes`
    passes over the images. An input without curvature (one that is always 0) gets weights 0.

    Args:
        loss: of the images.
        curvature: its bound, `loss.curvature()`.
        progress: where to begin.
        sparsity_lambda: lambda.
        max_passes: passes for this penalty, those of `progress` included.
        tolerance: relative.
        support: bool, like the weights: which of them may be other than 0; None: all.
        on_pass: called after each pass.
    """
    penalty = sparsity_lambda / progress.weight.numel()
    # A step size of 0 would leave the weights of an input that is always 0 where they began.
    size = torch.where(curvature > 0, 1 / curvature.clamp(min=1e-30), torch.zeros_like(curvature))[:, None]
    used = (curvature > 0)[:, None].expand_as(progress.weight)
    used = used if support is None else used & support
    while len(progress.objectives) < max_passes and not _stalled(progress.objectives, tolerance):
        weight, previous = progress.weight, progress.previous
        grown = (1 + (1 + 4 * progress.momentum**2) ** 0.5) / 2
        ahead = weight + (progress.momentum - 1) / grown * (weight - previous)
        ce, gradient = loss(ahead)
        after = torch.where(used, soft_threshold(ahead - size * gradient, size * penalty), torch.zeros_like(weight))
        uphill = float(((ahead - after) / size.clamp(min=1e-30) * (after - weight) * used).sum()) > 0
        objective = ce + penalty * float(ahead.abs().sum())
        progress = Progress(after, weight, 1.0 if uphill else grown, [*progress.objectives, objective])
        if uphill:
            progress.previous = after
        if on_pass is not None:
            on_pass(progress)
    return progress


def _stalled(objectives: list[float], tolerance: float) -> bool:
    if len(objectives) <= STALLED_OVER:
        return False
    before, now = min(objectives[:-STALLED_OVER]), min(objectives)
    return before - now <= tolerance * abs(now)


def largest_lambda(loss: CrossEntropy, n_classes: int) -> float:
    """The lambda from which on all weights are 0: the largest absolute gradient there, times the number of weights."""
    zero = torch.zeros(loss.data.width, n_classes, device=loss.device)
    return float(loss(zero)[1].abs().max()) * zero.numel()


def falling_lambdas(first: float, last: float, ratio: float) -> list[float]:
    """From below `first` down to `last`, each at most `ratio` of the one before; only `last` where it is not below."""
    if not 0 < last < first:
        return [last]
    n = int(np.ceil(np.log(last / first) / np.log(ratio) - 1e-9))
    return [float(first * (last / first) ** (i / n)) for i in range(1, n)] + [last]
