"""The loss of each item, its terms, and the explained variance."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_autoencoder.model import SparseAutoencoder


def squared_error(reconstruction: Tensor, x: Tensor) -> Tensor:
    """Mean over D of (x_hat - x)^2 for each item (B), from two B x D tensors."""
    return (reconstruction - x).square().mean(dim=1)


class ItemLosses(NamedTuple):
    """The loss of each item of a batch, its terms, and the latents."""

    objective: Tensor  # what training minimises the mean of (B): l2 + penalty, plus Matryoshka's prefixes and AuxK's term
    l2: Tensor  # mean squared error over the D inputs of the whole reconstruction (B)
    penalty: Tensor  # the sparsity term, coefficient included (B)
    latents: Tensor  # B x F


def item_losses(model: SparseAutoencoder, x: Tensor, *, training: bool = False, dead: Tensor | None = None) -> ItemLosses:
    """The losses of transformed inputs x (B x D) (DN-CBM, section 3.1; `variants` for other codes). With `training`, the code
    may depend on the batch (BatchTopK), and the latents with indices `dead` (int64) are revived by AuxK's loss."""
    code = model.sparsity.code
    pre, threshold = model.pre_activations(x), code.threshold(model)
    latents = code.activate(pre, threshold, training)
    penalty = code.penalty(pre, latents, threshold)
    ends = model.sparsity.prefix_ends(model.n_latents)
    reconstruction = torch.addmm(model.tied_bias, latents[:, : ends[0]], model.decoder_weight[: ends[0]])
    l2 = squared_error(reconstruction, x)
    objective = l2 + penalty
    for start, end in pairwise(ends):
        reconstruction = torch.addmm(reconstruction, latents[:, start:end], model.decoder_weight[start:end])
        l2 = squared_error(reconstruction, x)
        objective = objective + l2
    n_aux = code.n_auxiliary(model.n_inputs, len(dead)) if training and dead is not None else 0
    if n_aux:
        largest, place = pre[:, dead].topk(n_aux, dim=1, sorted=False)
        revived = torch.zeros_like(pre[:, dead]).scatter(1, place, torch.relu(largest))
        residual = (x - reconstruction).detach()
        objective = objective + code.aux_coeff * squared_error(revived @ model.decoder_weight[dead], residual)
    return ItemLosses(objective, l2, penalty, latents)


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
    """Sum of squared deviations from the mean of a stream, batch by batch (merged in float64: Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.total = 0.0
        self.squares = 0.0  # sum of squares, about 0

    def add(self, x: Tensor) -> None:
        """Adds a batch (B x D)."""
        batch_mean = x.mean(dim=0)
        self.total += float((x - batch_mean).square().sum())
        self.squares += float(x.square().sum())
        mean = batch_mean.cpu().double()  # mps has no float64
        if self.mean is None:
            self.mean, self.count = mean, len(x)
            return
        count = self.count + len(x)
        gap = mean - self.mean
        self.total += float(gap.square().sum()) * self.count * len(x) / count
        self.mean += gap * (len(x) / count)
        self.count = count

    @property
    def varies(self) -> bool:
        """Whether the items differ by more than float32 rounds."""
        return self.total > self.squares * (16 * torch.finfo(torch.float32).eps) ** 2


def explained_variance(squared_error_sum: float, variance: RunningVariance) -> float:
    """1 - sum (x - x_hat)^2 / sum (x - mean)^2; NaN if the data does not vary."""
    return 1 - squared_error_sum / variance.total if variance.varies else float("nan")
