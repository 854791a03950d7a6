"""DN-CBM's resampling: dead latents restart at inputs that the SAE reconstructs badly.

After Bricken et al., "Towards Monosemanticity" (2023), appendix "neuron resampling".
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparse_autoencoder.data import Features, in_batches, lies_in, part_of, shuffled
from sparse_autoencoder.losses import CodeLosses, code_losses
from sparse_autoencoder.model import SparseAutoencoder
from sparse_autoencoder.optimizer import Adam
from sparse_autoencoder.parallel import ALONE, Processes
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
    group: int = 0,
    reader: Workers | None = None,
    stop: Callable[[], bool] = lambda: False,
    across: Processes = ALONE,
) -> Tensor | None:
    """Restarts the latents that `fired` (F) counts as never active: changes their parameters and Adam's moments in place.

    Inputs are drawn without replacement, by `sampling_probability`, from at most `dataset_size` random items; with a `group`,
    from items of random pieces (`shuffled`). If there are fewer items to draw than dead latents, only the first dead latents
    restart. `losses` is a faster equivalent of `code_losses`. With several processes, `features` are those that this one reads
    (`Processes.own`), and `fired` counts for all.

    Returns:
        The indices (int64) of the restarted latents; None, with nothing changed, if `stop`, asked before each batch,
        returned True.
    """
    dead = (fired == 0).nonzero().flatten()
    if len(dead) == 0:
        return dead
    n_items = torch.tensor(len(features))
    across.sum([n_items])
    own = across.own(int(n_items))
    n_drawn_from = min(dataset_size, int(n_items))
    if group > 0:
        subset = shuffled(int(n_items), generator, group)[:n_drawn_from]
    else:
        subset = generator.choice(int(n_items), size=n_drawn_from, replace=False)
    device = model.tied_bias.device
    mine, bounds = part_of(subset, batch_size, own)
    found = [torch.empty(0, 2)]
    stopped = False
    batches = in_batches(
        features,
        mine,
        batch_size,
        name=lambda i: f"resampling, batch {i}",
        reader=reader,
        device=device,
        group=group,
        bounds=bounds,
    )
    for batch in batches:
        stopped = stop()
        if stopped:
            break
        x, _ = model.transform(batch)
        of_batch = code_losses(model, x) if losses is None else losses(x)
        usable = (x != 0).any(dim=1)  # a zero input has no direction
        found.append(torch.stack([of_batch.l2 + of_batch.penalty, usable], dim=1).cpu())
    if across.agreed(stopped):
        return None
    loss_and_usable = torch.zeros(len(subset), 2)
    loss_and_usable[torch.from_numpy(lies_in(subset, own))] = torch.cat(found)
    across.sum([loss_and_usable])
    loss, is_usable = loss_and_usable[:, 0], loss_and_usable[:, 1] > 0
    probability = sampling_probability(torch.where(is_usable, loss, 0)).numpy()
    n_drawn = min(len(dead), int(np.count_nonzero(probability)))
    if n_drawn == 0 or not bool(is_usable.any()):
        return dead[:0]
    drawn = subset[generator.choice(len(subset), size=n_drawn, replace=False, p=probability)]
    inputs = torch.zeros(n_drawn, model.n_inputs, device=device)
    is_mine = lies_in(drawn, own)
    inputs[torch.from_numpy(is_mine).to(device)] = features.gather(drawn[is_mine] - own.start).to(device)
    across.sum([inputs])
    inputs, _ = model.transform(inputs)
    dead = dead[:n_drawn]
    model.encoder_weight[dead] = resampled_encoder_rows(inputs, model.encoder_weight, fired > 0)
    model.decoder_weight[dead] = normalize(inputs, dim=1)
    model.encoder_bias[dead] = 0
    adam.reset(dead)
    return dead
