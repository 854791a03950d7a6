"""Metrics of a model over a whole data set."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sparse_autoencoder.data import Features, as_features, in_batches
from sparse_autoencoder.losses import CodeLosses, RunningVariance, code_losses, explained_variance
from sparse_autoencoder.model import SparseAutoencoder
from sparse_autoencoder.parallel import ALONE, Processes
from sparse_autoencoder.workers import Workers

ALMOST_DEAD = 1e-5  # a latent that fires, but for a smaller fraction of the items than this, is almost dead


def count_dead(fired: Tensor, n_items: int) -> tuple[int, int]:
    """The number of dead latents and of almost dead ones (excluding the dead), from firing counts (F) over n_items."""
    dead = fired == 0
    return int(dead.sum()), int((~dead & (fired < ALMOST_DEAD * n_items)).sum())


def evaluate(
    model: SparseAutoencoder, data: Features | Tensor, *, batch_size: int = 4096, device: str | torch.device = "cpu"
) -> dict[str, float]:
    """Metrics of the model over all items of the data (N x D), computed batch by batch.

    Returns:
        loss (= l2_loss + l1_loss), l2_loss (the squared error, averaged over items and inputs), l1_loss (the sparsity
        term with its coefficient, averaged over items), l0 (mean number of active latents per item), explained_variance
        (1 - sum (x - x_hat)^2 / sum (x - mean)^2; NaN if all items are the same) and dead_fraction (the fraction of latents
        that no item activates).
        Errors are measured in the transformed space.

    Raises:
        NonFiniteError: the features hold NaN or infinity.
        ValueError: the data has no items, or its items are not D wide.
    """
    measured = measure(model, as_features(data), batch_size=batch_size, device=device)
    assert measured is not None
    return measured[0]


@torch.no_grad()
def measure(
    model: SparseAutoencoder,
    features: Features,
    *,
    batch_size: int,
    device: str | torch.device,
    losses: Callable[[Tensor], CodeLosses] | None = None,
    reader: Workers | None = None,
    stop: Callable[[], bool] = lambda: False,
    across: Processes = ALONE,
) -> tuple[dict[str, float], Tensor] | None:
    """`evaluate`'s metrics and each latent's firing count (F, int64), over the features of all processes.
    `losses` is a faster equivalent of `code_losses`. Returns None if `stop`, asked before each batch, returns True."""
    model = model.to(device)
    found = [torch.zeros(2, device=device)]  # read at the end: reading makes a GPU wait
    stopped = False
    fired = torch.zeros(model.n_latents, dtype=torch.int64, device=device)
    variance = RunningVariance()
    batches = in_batches(
        features, np.arange(len(features)), batch_size, name=lambda i: f"evaluation, batch {i}", reader=reader, device=device
    )
    for batch in batches:
        stopped = stop()
        if stopped:
            break
        x, _ = model.transform(batch)
        batch_losses = code_losses(model, x) if losses is None else losses(x)
        found.append(torch.stack([batch_losses.l2.sum(), batch_losses.penalty.sum()]))
        fired += batch_losses.fired
        variance.add(x)
    if across.agreed(stopped):
        return None
    n_items, sums = torch.tensor(len(features)), torch.stack(found).cpu().double().sum(dim=0)
    across.sum([n_items, sums, fired])
    variance = variance.merged(model.n_inputs, across)
    n, (l2, penalty) = int(n_items), sums.tolist()
    metrics = {
        "loss": (l2 + penalty) / n,
        "l2_loss": l2 / n,
        "l1_loss": penalty / n,
        "l0": float(fired.sum()) / n,
        "explained_variance": explained_variance(l2 * model.n_inputs, variance),
        "dead_fraction": count_dead(fired, n)[0] / model.n_latents,
    }
    return metrics, fired.cpu()
