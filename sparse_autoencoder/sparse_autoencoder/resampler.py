"""DN-CBM's resampling: dead latents restart at inputs that the SAE reconstructs badly.

After Bricken et al., "Towards Monosemanticity" (2023), appendix "neuron resampling".
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparse_autoencoder.data import Features, in_batches
from sparse_autoencoder.losses import CodeLosses, code_losses
from sparse_autoencoder.model import SparseAutoencoder
from sparse_autoencoder.optimizer import Adam
from sparse_autoencoder.workers import Workers

ENCODER_SCALE = 0.2  # the norm of new encoder rows, relative to the mean of the alive latents


def sampling_probability(losses: Tensor) -> Tensor:
    """Each item's probability (N, float64) of restarting a dead latent: proportional to its loss (N) squared.
    If every loss is 0, the probabilities are uniform."""
    squared = losses.double().square()
    total = squared.sum()
    return squared / total if total > 0 else torch.full_like(squared, 1 / len(squared))


def resampled_encoder_rows(inputs: Tensor, encoder_weight: Tensor, alive: Tensor) -> Tensor:
    """Encoder rows (n x D) for dead latents that restart at these inputs (n x D).

    They point along the inputs. Their norm is ENCODER_SCALE times the mean norm of the rows of `encoder_weight` (F x D)
    that are `alive` (F, bool), or of all rows if none is.
    """
    rows = encoder_weight[alive] if bool(alive.any()) else encoder_weight
    return normalize(inputs, dim=1) * (ENCODER_SCALE * torch.linalg.vector_norm(rows, dim=1).mean())


@torch.no_grad()
def resample(
    model: SparseAutoencoder,
    adam: Adam,
    features: Features,
    fired: Tensor,
    *,
    losses: Callable[[Tensor], CodeLosses] | None = None,
    dataset_size: int,
    batch_size: int,
    generator: np.random.Generator,
    reader: Workers | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Tensor | None:
    """Restarts the latents that `fired` (F) counts as never active: changes their parameters and Adam's moments in place.

    Inputs are drawn without replacement, by `sampling_probability`, from at most `dataset_size` random items. If there are
    fewer items to draw than dead latents, only the first dead latents restart. `losses` is a faster equivalent of
    `code_losses`.

    Returns:
        The indices (int64) of the restarted latents; None, with nothing changed, if `stop`, asked before each batch,
        returned True.
    """
    dead = (fired == 0).nonzero().flatten()
    if len(dead) == 0:
        return dead
    subset = generator.choice(len(features), size=min(dataset_size, len(features)), replace=False)
    device = model.tied_bias.device
    loss_parts, usable = [], []
    for batch in in_batches(features, subset, batch_size, name=lambda i: f"resampling, batch {i}", reader=reader):
        if stop():
            return None
        x, _ = model.transform(batch.to(device))
        found = code_losses(model, x) if losses is None else losses(x)
        loss_parts.append((found.l2 + found.penalty).cpu())
        usable.append((x != 0).any(dim=1).cpu())  # a zero input has no direction
    loss = torch.cat(loss_parts) * torch.cat(usable)
    probability = sampling_probability(loss).numpy()
    n_drawn = min(len(dead), int(np.count_nonzero(probability)))
    if n_drawn == 0 or not bool(torch.cat(usable).any()):
        return dead[:0]
    drawn = subset[generator.choice(len(subset), size=n_drawn, replace=False, p=probability)]
    inputs, _ = model.transform(features.gather(drawn).to(device))
    dead = dead[:n_drawn]
    model.encoder_weight[dead] = resampled_encoder_rows(inputs, model.encoder_weight, fired > 0)
    model.decoder_weight[dead] = normalize(inputs, dim=1)
    model.encoder_bias[dead] = 0
    adam.reset(dead)
    return dead
