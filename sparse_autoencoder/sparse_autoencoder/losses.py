"""The loss of each item, its terms, and the explained variance."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_autoencoder.model import SparseAutoencoder
from sparse_autoencoder.parallel import Part, Processes


def squared_error(reconstruction: Tensor, x: Tensor) -> Tensor:
    """Mean over D of (x_hat - x)^2 for each item (B), from two B x D tensors."""
    return (reconstruction - x).square().mean(dim=1)


class ItemLosses(NamedTuple):
    """The loss of each item of a batch, its terms, and the latents."""

    objective: Tensor  # what training minimises the mean of (B): l2 + penalty, plus Matryoshka's prefixes and AuxK's term
    l2: Tensor  # mean squared error over the D inputs of the whole reconstruction (B)
    penalty: Tensor  # the sparsity term, coefficient included (B)
    latents: Tensor  # B x F


def item_losses(
    model: SparseAutoencoder, x: Tensor, *, training: bool = False, dead: Tensor | None = None, part: Part | None = None
) -> ItemLosses:
    """The losses of transformed inputs x (B x D) (DN-CBM, section 3.1; `variants` for other codes). With `training`, the code
    may depend on the batch (BatchTopK), of which x may be a `part`; AuxK revives the latents of the mask `dead` (F, bool)."""
    code = model.sparsity.code
    pre, threshold = model.pre_activations(x), code.threshold(model)
    latents = code.activate(pre, threshold, training) if part is None else code.activate_part(pre, threshold, part)
    penalty = code.penalty(pre, latents, threshold)
    ends = model.sparsity.prefix_ends(model.n_latents)
    reconstruction = torch.addmm(model.tied_bias, latents[:, : ends[0]], model.decoder_weight[: ends[0], :])
    l2 = squared_error(reconstruction, x)
    objective = l2 + penalty
    for start, end in pairwise(ends):
        reconstruction = torch.addmm(reconstruction, latents[:, start:end], model.decoder_weight[start:end])
        l2 = squared_error(reconstruction, x)
        objective = objective + l2
    n_aux = code.n_auxiliary(model.n_inputs, model.n_latents) if training and dead is not None else 0
    if dead is not None and n_aux:
        # Shapes must not depend on the number of dead latents, which only the device knows. The other latents, and the places
        # of missing dead ones, become 0.
        largest, place = pre.masked_fill(~dead, -torch.inf).topk(n_aux, dim=1, sorted=False)
        revived = torch.zeros_like(pre).scatter(1, place, torch.relu(largest))
        residual = (x - reconstruction).detach()
        objective = objective + code.aux_coeff * squared_error(revived @ model.decoder_weight, residual) * dead.any()
    return ItemLosses(objective, l2, penalty, latents)


ExtraLoss = Callable[[SparseAutoencoder, Tensor], Tensor]
"""A term that a caller of `train` adds to the loss of each item (B), from the model and a training batch's latents (B x F)."""


class CodeLosses(NamedTuple):
    """The loss terms of each item of a batch outside training."""

    l2: Tensor  # B
    penalty: Tensor  # B
    fired: Tensor  # the number of items for which each latent was active (F, int64)


@torch.no_grad()
def code_losses(model: SparseAutoencoder, x: Tensor) -> CodeLosses:
    """The losses of transformed inputs x (B x D), from the dense code."""
    losses = item_losses(model, x)
    return CodeLosses(losses.l2, losses.penalty, (losses.latents > 0).sum(dim=0))


class RunningVariance:
    """Sum of squared deviations from the mean of a stream, batch by batch (merged in float64: Chan et al. 1979).

    Batches may be on a GPU, which is not waited for until the result is asked for.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[int, Tensor]] = []  # items; their mean (D), squared deviations from it, and squares
        self._count = 0
        self._mean: Tensor | None = None
        self._total = 0.0
        self._squares = 0.0  # sum of squares, about 0

    def add(self, x: Tensor) -> None:
        """Adds a batch (B x D), which may be empty."""
        if len(x) > 0:
            mean = x.mean(dim=0)
            sums = torch.stack([(x - mean).square().sum(), x.square().sum()])
            self._batches.append((len(x), torch.cat([mean, sums])))

    def _merge(self) -> None:
        """Adds the batches that are waiting."""
        if not self._batches:
            return
        found = torch.stack([about for _, about in self._batches]).cpu().double()  # on the CPU, since mps has no float64
        for (n, _), about in zip(self._batches, found, strict=True):
            self._add(n, about[:-2], *about[-2:].tolist())
        self._batches.clear()

    def _add(self, n: int, mean: Tensor, total: float, squares: float) -> None:
        """Adds n items with this mean (D), this sum of squared deviations from it, and this sum of squares."""
        self._total += total
        self._squares += squares
        if self._mean is None:
            self._mean, self._count = mean.clone(), n
            return
        count = self._count + n
        gap = mean - self._mean
        self._total += float(gap.square().sum()) * self._count * n / count
        self._mean += gap * (n / count)
        self._count = count

    def merged(self, width: int, across: Processes) -> "RunningVariance":
        """That of the items of all processes, which are D = `width` wide."""
        self._merge()
        mean = torch.zeros(width, dtype=torch.float64) if self._mean is None else self._mean
        own = torch.cat([mean, torch.tensor([self._total, self._squares, self._count], dtype=torch.float64)])
        found = RunningVariance()
        for part in across.joined(own):
            total, squares, n = part[width:].tolist()
            if n:
                found._add(int(n), part[:width], total, squares)
        return found

    @property
    def total(self) -> float:
        """The sum of squared deviations."""
        self._merge()
        return self._total

    @property
    def varies(self) -> bool:
        """Whether the items differ by more than float32 rounds."""
        return self.total > self._squares * (16 * torch.finfo(torch.float32).eps) ** 2


def explained_variance(squared_error_sum: float, variance: RunningVariance) -> float:
    """1 - sum (x - x_hat)^2 / sum (x - mean)^2; NaN if the data does not vary."""
    return 1 - squared_error_sum / variance.total if variance.varies else float("nan")
