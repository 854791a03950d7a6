"""The loss of an item, its parts, and how much of the data a reconstruction explains."""

from typing import NamedTuple

from torch import Tensor

from sparse_autoencoder.model import SparseAutoencoder


def squared_error(reconstruction: Tensor, x: Tensor) -> Tensor:
    """Mean over D of (x_hat - x)^2 for each item (B), from two B x D tensors."""
    return (reconstruction - x).square().mean(dim=1)


class ItemLosses(NamedTuple):
    """The loss of each item of a batch in its two parts, and the latents that it came from."""

    l2: Tensor
    """Mean squared error over the D inputs (B)."""
    penalty: Tensor
    """The sparsity term, coefficient included (B): the loss is l2 + penalty."""
    latents: Tensor
    """B x F."""


def item_losses(model: SparseAutoencoder, x: Tensor) -> ItemLosses:
    """The losses (DN-CBM, section 3.1) of transformed inputs x (B x D)."""
    latents = model.encode_transformed(x)
    return ItemLosses(squared_error(model.decode_transformed(latents), x), model.sparsity.penalty(latents), latents)


class RunningVariance:
    """Sum of squared deviations from the mean over batches of a stream (merged in float64: Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.total = 0.0

    def add(self, x: Tensor) -> None:
        """Takes a batch (B x D)."""
        batch_mean = x.mean(dim=0)
        self.total += float((x - batch_mean).square().sum())
        mean = batch_mean.double().cpu()
        if self.mean is None:
            self.mean, self.count = mean, len(x)
            return
        count = self.count + len(x)
        gap = mean - self.mean
        self.total += float(gap.square().sum()) * self.count * len(x) / count
        self.mean += gap * (len(x) / count)
        self.count = count


def explained_variance(squared_error_sum: float, variance_sum: float) -> float:
    """1 - sum (x - x_hat)^2 / sum (x - mean)^2; NaN where the data does not vary."""
    return 1 - squared_error_sum / variance_sum if variance_sum > 0 else float("nan")
