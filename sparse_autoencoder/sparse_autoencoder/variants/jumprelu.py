"""JumpReLU: a learned threshold per latent, under an L0 penalty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sparse_autoencoder.declare import setting
from sparse_autoencoder.variants.base import Sparsity

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparse_autoencoder.kernels import Array, ItemMajor, LatentMajor, Selection


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
    sparser: ClassVar[str] = "raise --l0_coeff"
    denser: ClassVar[str] = "lower --l0_coeff"

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
        import torch

        return {"log_threshold": torch.full((n_latents,), math.log(self.initial_threshold))}

    def threshold(self, model: nn.Module) -> Tensor | None:
        return model.get_parameter("log_threshold").exp()

    def activate(self, pre: Tensor, threshold: Tensor | None = None, training: bool = False) -> Tensor:
        from sparse_autoencoder.variants.pseudo_derivatives import Jump

        return Jump.apply(pre, threshold, self.bandwidth)

    def penalty(self, pre: Tensor, latents: Tensor, threshold: Tensor | None = None) -> Tensor:
        from sparse_autoencoder.variants.pseudo_derivatives import Step

        return self.l0_coeff * Step.apply(pre, threshold, self.bandwidth).sum(dim=1)

    def select(self, pre: Array, bias: Array, threshold: Array | None, level: float, out: Selection) -> ItemMajor:
        """Entries in the window below the threshold are kept with z = 0, since the threshold learns from them."""
        from sparse_autoencoder import kernels

        assert threshold is not None
        offset = bias - threshold + np.float32(self.bandwidth / 2)
        kernels.select_above(pre, bias, offset, np.float32(level), *out)
        entries = kernels.packed(*out)
        entries.z[entries.z <= threshold[entries.latent]] = 0
        return entries

    def penalties(self, entries: ItemMajor) -> Array:
        from sparse_autoencoder import kernels

        return np.float32(self.l0_coeff) * kernels.item_sums(entries)[1]

    def gradients(self, entries: LatentMajor, threshold: Array | None, n_items: int, fired: Array) -> dict[str, Array]:
        from sparse_autoencoder import kernels

        assert threshold is not None
        gradient = np.empty(len(fired), np.float32)
        kernels.learn_thresholds(entries, threshold, self.bandwidth, self.l0_coeff / n_items, gradient, fired)
        return {"log_threshold": gradient}
