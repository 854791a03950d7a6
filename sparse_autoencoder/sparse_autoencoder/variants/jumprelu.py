"""JumpReLU: a learned threshold per latent, under an L0 penalty."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sparse_autoencoder import kernels
from sparse_autoencoder.declare import setting
from sparse_autoencoder.kernels import Array, ItemMajor, LatentMajor, Selection
from sparse_autoencoder.variants.base import Sparsity


@dataclass(frozen=True)
class JumpReLU(Sparsity, kernels=True):
    """Pre-activations above a threshold that each latent learns, under an L0 penalty: Rajamanoharan et al., "Jumping
    ahead" (2024, arXiv 2407.14435).

    z = pre where pre > threshold, else 0; the loss of an item adds `l0_coeff` times its number of active latents. The
    threshold learns through the paper's pseudo-derivatives, in a window of width `bandwidth` around it; the model stores its
    logarithm. The paper scales inputs to a mean squared norm of 1 and sums the squared error over the inputs; here it is
    averaged, so the coefficient is the paper's divided by D.
    """

    kind: ClassVar[str] = "jumprelu"

    l0_coeff: float = setting(1e-5, "weight of the L0 loss", least=0)
    bandwidth: float = 1e-3
    initial_threshold: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.bandwidth > 0 or not self.initial_threshold > 0:
            raise ValueError(
                f"JumpReLU: bandwidth and initial_threshold must be above 0, not {self.bandwidth} and {self.initial_threshold}"
            )

    @property
    def name_part(self) -> str:
        return f"jumprelu{self.l0_coeff}"

    def extra_parameters(self, n_latents: int) -> dict[str, Tensor]:
        return {"log_threshold": torch.full((n_latents,), math.log(self.initial_threshold))}

    def threshold(self, model: nn.Module) -> Tensor | None:
        return model.get_parameter("log_threshold").exp()

    def activate(self, pre: Tensor, threshold: Tensor | None = None, training: bool = False) -> Tensor:
        return _Jump.apply(pre, threshold, self.bandwidth)

    def penalty(self, pre: Tensor, latents: Tensor, threshold: Tensor | None = None) -> Tensor:
        return self.l0_coeff * _Step.apply(pre, threshold, self.bandwidth).sum(dim=1)

    def select(self, pre: Array, bias: Array, threshold: Array | None, level: float, out: Selection) -> ItemMajor:
        """Entries in the window below the threshold are kept with z = 0, since the threshold learns from them."""
        assert threshold is not None
        offset = bias - threshold + np.float32(self.bandwidth / 2)
        kernels.select_above(pre, bias, offset, np.float32(level), *out)
        entries = kernels.packed(*out)
        entries.z[entries.z <= threshold[entries.latent]] = 0
        return entries

    def penalties(self, entries: ItemMajor) -> Array:
        return np.float32(self.l0_coeff) * kernels.item_sums(entries)[1]

    def gradients(self, entries: LatentMajor, threshold: Array | None, n_items: int, fired: Array) -> dict[str, Array]:
        assert threshold is not None
        gradient = np.empty(len(fired), np.float32)
        kernels.learn_thresholds(entries, threshold, self.bandwidth, self.l0_coeff / n_items, gradient, fired)
        return {"log_threshold": gradient}


def _in_window(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype)


class _Jump(torch.autograd.Function):
    """pre * H(pre - threshold), and the pseudo-derivative -threshold/bandwidth in the window around the threshold."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre > threshold, pre, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        window = _in_window(pre, threshold, ctx.bandwidth)
        by_threshold = -(gradients[0] * window).sum(dim=0) * threshold / ctx.bandwidth
        return torch.where(pre > threshold, gradients[0], 0), by_threshold, None


class _Step(torch.autograd.Function):
    """H(pre - threshold), and its pseudo-derivative by the threshold, -1/bandwidth in the window around it."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        return None, -(gradients[0] * _in_window(pre, threshold, ctx.bandwidth)).sum(dim=0) / ctx.bandwidth, None
