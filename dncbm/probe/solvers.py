"""Exact solutions of the probe's objective: proximal gradient steps, which leave exact zeros, and a path of lambdas.

The objective is that of METHOD section 4, cross-entropy + lambda * mean |W|, over all images at once. It is convex, so the
solution does not depend on the start. The steps are FISTA's (Beck and Teboulle 2009), restarted when the momentum points
uphill (O'Donoghue and Candes 2015), with a step size per input: by Jensen's inequality

    D_f = 1 / (2 n) * sum over images i of |x_if| * sum over inputs g of |x_ig|

bounds the curvature, however differently the inputs are scaled, so a rarely active input moves as fast as any other. The
path follows GLM-SAGA (Wong, Santurkar and Madry 2021): lambda falls geometrically, and each solution starts at the previous.

A penalty by input (the group lasso of Yuan and Lin 2006) sets all weights of an input to 0 or none. Since these weights share
their step size, its proximal step has a closed form too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch.nn import functional

from dncbm.features.store import FeatureStore
from dncbm.probe.model import Batch, ProbeData, linear
from dncbm.probe.rows import SparseRows
from dncbm.probe.step import BatchSlopes, add_gradient
from dncbm.runs.devices import widest_float

BATCH = 4096
"""Images whose logits are in memory at once."""
FLOATS = 2**28
"""About the most numbers that the gradient of a sparse product may need: on CUDA, embedding_bag takes C per entry."""
STALLED_OVER = 10
"""The objective is compared with its value this many passes ago."""


@dataclass
class Progress:
    """The state of the steps for one lambda, from which they can resume."""

    weight: torch.Tensor
    """inputs x C."""
    previous: torch.Tensor
    """The weights one pass ago."""
    momentum: float = 1.0
    """FISTA's t."""
    objectives: list[float] = field(default_factory=list)
    """One per pass: the objective at the point where its gradient was computed, FISTA's extrapolation of the weights."""

    @classmethod
    def at(cls, weight: torch.Tensor) -> "Progress":
        """A start without momentum."""
        return cls(weight, weight)


class CrossEntropy:
    """Mean cross-entropy of a split as a function of the weights, with its gradient and a bound of its curvature."""

    def __init__(
        self,
        data: ProbeData,
        device: torch.device,
        scale: torch.Tensor | None = None,
        image_weights: torch.Tensor | None = None,
    ) -> None:
        """For weights on a device; each input is divided by its scale (default: 1).

        With `image_weights` (not negative, one per image), the cross-entropy of each image is multiplied by its weight before
        the mean over all images is taken. An input whose scale is infinite is always 0.
        """
        self.data, self.device = data, device
        self._image_weights = None if image_weights is None else image_weights.float().to(device)
        self._scale = (torch.ones(data.width) if scale is None else scale).to(device)[:, None]
        sparse_on_cpu = device.type == "cpu" and not isinstance(data.inputs, FeatureStore)
        self._slopes = BatchSlopes(data.width) if sparse_on_cpu else None

    def __call__(self, weight: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The mean cross-entropy at the weights (inputs x C), and its gradient."""
        own = weight / self._scale
        loss, gradient = self._autograd(own) if self._slopes is None else self._compiled(own, self._slopes)
        return loss, gradient / self._scale

    def _autograd(self, weight: torch.Tensor) -> tuple[float, torch.Tensor]:
        weight = weight.detach().requires_grad_()
        total = torch.zeros((), device=self.device, dtype=widest_float(self.device))
        for batch, labels, of_images in self._batches(weight.shape[1]):
            if of_images is None:
                loss = functional.cross_entropy(linear(batch, weight), labels, reduction="sum") / len(self.data)
            else:
                losses = functional.cross_entropy(linear(batch, weight), labels, reduction="none")
                loss = (losses * of_images).sum() / len(self.data)
            loss.backward()
            total += loss.detach()
        assert weight.grad is not None
        return float(total), weight.grad

    def _compiled(self, weight: torch.Tensor, slopes: BatchSlopes) -> tuple[float, torch.Tensor]:
        total, gradient = 0.0, torch.zeros_like(weight)
        for start in range(0, len(self.data), BATCH):
            rows = np.arange(start, min(start + BATCH, len(self.data)))
            of_images = None if self._image_weights is None else self._image_weights[start : start + BATCH]
            labels = self.data.labels[start : start + BATCH]
            found = slopes(weight, self.data.inputs, rows, labels, len(self.data), of_images)
            total += found.ce
            slopes.over_inputs(partial(add_gradient, *found[1:], gradient.numpy()))
        return total, gradient

    def _batches(self, n_columns: int = 1) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor | None]]:
        """All images in order: their inputs, labels and weights, in batches for products with this many columns."""
        inputs, size = self.data.inputs, BATCH
        if not isinstance(inputs, FeatureStore):
            size = max(1, min(BATCH, FLOATS * len(self.data) // max(1, inputs.nnz * n_columns)))
        for number, (batch, labels) in enumerate(self.data.batches(size, self.device)):
            start = number * size
            yield batch, labels, None if self._image_weights is None else self._image_weights[start : start + size]

    def curvature(self) -> torch.Tensor:
        """D_f (see the module's docstring) of every input, times `_tightness` for features; images count by their weights."""
        inverse = (1 / self._scale).requires_grad_()
        for batch, _, of_images in self._batches():
            sums = linear(_absolute(batch), inverse)
            fixed = sums.detach() if of_images is None else sums.detach() * of_images[:, None]
            (sums * fixed).sum().backward()
        assert inverse.grad is not None
        bound = (inverse.grad / self._scale)[:, 0] / (2 * len(self.data))
        return bound if not isinstance(self.data.inputs, FeatureStore) else bound * self._tightness(bound)

    def _tightness(self, bound: torch.Tensor) -> float:
        """The factor, at most 1, by which the bound can be lowered for features: the largest eigenvalue in its units.

        Features of opposite sign cancel, which Jensen's inequality ignores. They are few enough for their Gram matrix.
        """
        gram = torch.zeros(len(bound), len(bound), device=self.device)
        for batch, _, of_images in self._batches():
            assert isinstance(batch, torch.Tensor)
            x = batch / self._scale.T
            x = x if of_images is None else x * of_images.sqrt()[:, None]
            gram.addmm_(x.T, x, alpha=0.5 / len(self.data))
        unit = bound.clamp(min=1e-30).rsqrt()
        # On the CPU, since mps has no float64. The margin covers the rounding of the products.
        return min(1.0, 1.001 * float(torch.linalg.eigvalsh((unit[:, None] * gram * unit).cpu().double())[-1]))

    def close(self) -> None:
        """End the threads."""
        if self._slopes is not None:
            self._slopes.close()


def _absolute(batch: Batch) -> Batch:
    return batch._replace(values=batch.values.abs()) if isinstance(batch, SparseRows) else batch.abs()


def root_mean_square(data: ProbeData, device: torch.device) -> torch.Tensor:
    """Root mean square of every input over the images; 1 for an input that is always 0."""
    ones = torch.ones(data.width, 1, device=device, requires_grad=True)
    for batch, _ in data.batches(BATCH, device):
        squares = batch._replace(values=batch.values.square()) if isinstance(batch, SparseRows) else batch.square()
        linear(squares, ones).sum().backward()
    assert ones.grad is not None
    found = (ones.grad[:, 0] / len(data)).sqrt()
    return torch.where(found > 0, found, torch.ones_like(found))


def soft_threshold(values: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """The proximal step of |W|: move every value towards 0 by `by`, and stop at 0."""
    return values - values.clamp(min=-by, max=by)


def group_threshold(values: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """The proximal step of the norms of rows: shorten every row by `by` (rows x 1), and stop at 0."""
    return values * (1 - by / _row_norms(values).clamp(min=1e-30)).clamp(min=0)


def _row_norms(values: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(values, dim=1, keepdim=True)


def minimise(
    loss: CrossEntropy,
    curvature: torch.Tensor,
    progress: Progress,
    sparsity_lambda: float,
    *,
    max_passes: int,
    tolerance: float,
    support: torch.Tensor | None = None,
    penalised: torch.Tensor | None = None,
    by_input: bool = False,
    on_pass: Callable[[Progress], None] | None = None,
) -> Progress:
    """Minimise cross-entropy + lambda * mean |W|, starting or resuming from `progress`.

    Stops when the objective has fallen by less than `tolerance` of itself over STALLED_OVER passes, or after `max_passes`
    passes over the images, those of `progress` included; `on_pass` is called after each. `curvature` is `loss.curvature()`.
    Weights of an input that is always 0, and those outside `support` (bool, inputs x C), become 0. The penalty counts only the
    weights of inputs that are `penalised` (bool, one per input; by default all): an intercept's are not.

    `by_input` replaces mean |W| by the mean over inputs of the root mean square of their weights, which sets all weights of an
    input to 0 or none. A `support` must then hold whole inputs.
    """
    penalty = sparsity_lambda / progress.weight.numel()
    shrink = group_threshold if by_input else soft_threshold
    length: Callable[[torch.Tensor], torch.Tensor] = _row_norms if by_input else torch.abs
    if by_input:
        penalty *= progress.weight.shape[1] ** 0.5
    # With step size 0, the weights of an input that is always 0 would stay at their start: `used` sets them to 0.
    size = torch.where(curvature > 0, 1 / curvature.clamp(min=1e-30), torch.zeros_like(curvature))[:, None]
    used = (curvature > 0)[:, None].expand_as(progress.weight)
    used = used if support is None else used & support
    threshold = size * penalty if penalised is None else size * penalty * penalised[:, None]
    while len(progress.objectives) < max_passes and not _stalled(progress.objectives, tolerance):
        weight, previous = progress.weight, progress.previous
        grown = (1 + (1 + 4 * progress.momentum**2) ** 0.5) / 2
        ahead = weight + (progress.momentum - 1) / grown * (weight - previous)
        ce, gradient = loss(ahead)
        after = torch.where(used, shrink(ahead - size * gradient, threshold), torch.zeros_like(weight))
        uphill = float(((ahead - after) / size.clamp(min=1e-30) * (after - weight) * used).sum()) > 0
        objective = ce + penalty * float(length(ahead if penalised is None else ahead[penalised]).sum())
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


def largest_lambda(loss: CrossEntropy, n_classes: int, *, by_input: bool = False) -> float:
    """The smallest lambda at which all weights are 0: the largest absolute gradient there, times the number of weights.

    With a penalty `by_input`, the largest root mean square of an input's gradient counts.
    """
    zero = torch.zeros(loss.data.width, n_classes, device=loss.device)
    gradient = loss(zero)[1]
    largest = float(_row_norms(gradient).max()) / n_classes**0.5 if by_input else float(gradient.abs().max())
    return largest * zero.numel()


def falling_lambdas(first: float, last: float, ratio: float) -> list[float]:
    """Lambdas from below `first` down to `last`, each at least `ratio` of the previous; only `last` if `first` is smaller."""
    if not 0 < last < first:
        return [last]
    n = int(np.ceil(np.log(last / first) / np.log(ratio) - 1e-9))
    return [float(first * (last / first) ** (i / n)) for i in range(1, n)] + [last]
