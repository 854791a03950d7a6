"""One optimiser step by autograd, for every variant and device."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_autoencoder.losses import ExtraLoss, item_losses
from sparse_autoencoder.model import SparseAutoencoder
from sparse_autoencoder.optimizer import Adam
from sparse_autoencoder.parallel import Part


@contextmanager
def matmul_precision(name: str, device: torch.device) -> Iterator[None]:
    """A context in which float32 products on a GPU may use TF32, unless the precision is "highest"."""
    if device.type != "cuda":
        yield
        return
    matmul, before, newer = torch.backends.cuda.matmul, None, None
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # a caller has used the switch of torch 2.9 and later, beside which this one cannot be read
        newer = matmul.fp32_precision
    torch.set_float32_matmul_precision("highest" if name == "highest" else "high")
    try:
        yield
    finally:
        if before is not None:
            torch.set_float32_matmul_precision(before)
        else:
            matmul.fp32_precision = newer


@dataclass(frozen=True)
class StepResult:
    """Losses and activity of a batch, from before the step changed the parameters."""

    loss: Tensor  # the mean objective of the batch, a scalar
    l2: Tensor  # its reconstruction term, a scalar
    penalty: Tensor  # its sparsity term, a scalar
    fired: Tensor  # the number of items for which each latent was active (F, int64 or int32)


def dense_step(
    model: SparseAutoencoder,
    adam: Adam,
    x: Tensor,
    dead: Tensor | None = None,
    *,
    bf16: bool = False,
    part: Part | None = None,
    extra: ExtraLoss | None = None,
) -> StepResult:
    """A step on transformed inputs x (B x D) by autograd, on any device.

    AuxK revives the latents of the mask `dead` (F, bool). With `bf16`, matrix products run in bfloat16 (autocast), while
    parameters, losses and Adam stay in float32. If x is a `part` of a batch, the result and the update are those of the
    whole batch, in every process. `extra` is one more term of the loss.
    """
    adam.prepare()
    result = dense_update(model, adam, x, dead, bf16=bf16, part=part, extra=extra)
    adam.count()
    return result


def dense_update(
    model: SparseAutoencoder,
    adam: Adam,
    x: Tensor,
    dead: Tensor | None,
    *,
    bf16: bool,
    part: Part | None = None,
    extra: ExtraLoss | None = None,
) -> StepResult:
    """What `dense_step` does on the device, without a wait for it: a CUDA graph can capture this."""
    model.zero_grad()  # a step that ran out of memory halfway leaves gradients, to which this one would add its own
    # A cast that autocast kept from before would become part of a captured graph.
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
        losses = item_losses(model, x, training=True, dead=dead, part=part)
    n_items = len(x) if part is None else part.n_items
    objective = losses.objective if extra is None else losses.objective + extra(model, losses.latents)
    loss = objective.sum() / n_items
    loss.backward()
    latents = losses.latents.detach()
    l2, penalty = losses.l2.detach().sum() / n_items, losses.penalty.detach().sum() / n_items
    result = StepResult(loss.detach(), l2, penalty, (latents > 0).sum(dim=0))
    if part is not None:
        sum_over_parts(model, result, part)
    adam.update()
    if part is None:
        model.sparsity.code.after_batch(model, latents)
    else:
        model.sparsity.code.after_part(model, latents, part)
    return result


def sum_over_parts(model: SparseAutoencoder, result: StepResult, part: Part) -> None:
    """Sums the gradients and the results of the processes' parts of a batch, in place."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    part.across.sum([*gradients, result.loss, result.l2, result.penalty, result.fired])
