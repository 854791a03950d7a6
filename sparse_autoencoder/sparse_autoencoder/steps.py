"""One optimiser step by autograd, for every variant and device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_autoencoder.losses import item_losses
from sparse_autoencoder.model import SparseAutoencoder
from sparse_autoencoder.optimizer import Adam


@dataclass(frozen=True)
class StepResult:
    """Losses and activity of a batch, from before the step changed the parameters."""

    loss: Tensor  # the mean objective of the batch, a scalar
    l2: Tensor  # its reconstruction term, a scalar
    penalty: Tensor  # its sparsity term, a scalar
    fired: Tensor  # the number of items for which each latent was active (F, int64)


def dense_step(
    model: SparseAutoencoder, adam: Adam, x: Tensor, dead: Tensor | None = None, *, bf16: bool = False
) -> StepResult:
    """A step on transformed inputs x (B x D) by autograd, on any device.

    `dead` holds the indices (int64) of the latents that AuxK revives. With `bf16`, matrix products run in bfloat16
    (autocast), while parameters, losses and Adam stay in float32.
    """
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        losses = item_losses(model, x, training=True, dead=dead)
    loss = losses.objective.mean()
    loss.backward()
    adam.step()
    latents = losses.latents.detach()
    model.sparsity.code.after_batch(model, latents)
    l2, penalty = losses.l2.detach().mean(), losses.penalty.detach().mean()
    return StepResult(loss.detach(), l2, penalty, (latents > 0).sum(dim=0))
