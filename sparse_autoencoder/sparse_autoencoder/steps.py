"""One optimiser step, and the one place that chooses how it is computed."""

from dataclasses import dataclass

from torch import Tensor

from sparse_autoencoder.losses import item_losses
from sparse_autoencoder.model import SparseAutoencoder
from sparse_autoencoder.optimizer import Adam


@dataclass(frozen=True)
class StepResult:
    """What a step found before it changed the parameters."""

    loss: Tensor
    """The mean loss of the batch, a scalar."""
    l2: Tensor
    """Its reconstruction part, a scalar."""
    penalty: Tensor
    """Its sparsity part, a scalar."""
    fired: Tensor
    """For how many items of the batch each latent was active (F, int64)."""


def dense_step(model: SparseAutoencoder, adam: Adam, x: Tensor) -> StepResult:
    """A step on transformed inputs x (B x D) by autograd, on any device."""
    losses = item_losses(model, x)
    l2, penalty = losses.l2.mean(), losses.penalty.mean()
    loss = l2 + penalty
    loss.backward()
    adam.step()
    return StepResult(loss.detach(), l2.detach(), penalty.detach(), (losses.latents.detach() > 0).sum(dim=0))
