"""One optimiser step by autograd, the same for every variant and device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_autoencoder.losses import item_losses
from sparse_autoencoder.model import SparseAutoencoder
from sparse_autoencoder.optimizer import Adam
from sparse_autoencoder.sparsity import BatchTopK, code_of


@dataclass(frozen=True)
class StepResult:
    """What a step found before it changed the parameters."""

    loss: Tensor
    """The mean objective of the batch, a scalar."""
    l2: Tensor
    """Its reconstruction part, a scalar."""
    penalty: Tensor
    """Its sparsity part, a scalar."""
    fired: Tensor
    """For how many items of the batch each latent was active (F, int64)."""


def dense_step(
    model: SparseAutoencoder, adam: Adam, x: Tensor, dead: Tensor | None = None, *, bf16: bool = False
) -> StepResult:
    """A step on transformed inputs x (B x D) by autograd, on any device; `dead` (int64) are the latents for AuxK.

    `bf16`: products in bfloat16 (autocast); parameters, losses and Adam stay in float32.
    """
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        losses = item_losses(model, x, training=True, dead=dead)
    loss = losses.objective.mean()
    loss.backward()
    adam.step()
    latents = losses.latents.detach()
    code = code_of(model.sparsity)
    if isinstance(code, BatchTopK):
        code.update_threshold(model.threshold, torch.where(latents > 0, latents, torch.inf).min())
    l2, penalty = losses.l2.detach().mean(), losses.penalty.detach().mean()
    return StepResult(loss.detach(), l2, penalty, (latents > 0).sum(dim=0))
