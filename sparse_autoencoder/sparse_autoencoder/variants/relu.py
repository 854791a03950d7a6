"""ReLU under an L1 penalty: the SAE of DN-CBM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sparse_autoencoder.declare import setting
from sparse_autoencoder.variants.base import Sparsity

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sparse_autoencoder.kernels import Array, ItemMajor


@dataclass(frozen=True)
class ReLU(Sparsity, kernels=True):
    """Non-negative latents under an L1 penalty: the SAE of DN-CBM (Rao et al., ECCV 2024, arXiv 2407.14499).

    After Bricken et al., "Towards Monosemanticity" (2023): z = max(pre, 0), and the loss of an item adds
    `l1_coeff` times the sum of its latents. Dead latents are resampled.
    """

    kind: ClassVar[str] = "relu"
    resamples: ClassVar[bool] = True
    sparser: ClassVar[str] = "raise --l1_coeff"
    denser: ClassVar[str] = "lower --l1_coeff"

    l1_coeff: float = setting(3e-5, "weight of the L1 loss", least=0)

    @property
    def name_part(self) -> str:
        return f"l1coeff{self.l1_coeff}"

    def start_encoder(self, weight: Tensor, bias: Tensor, decoder: Tensor, generator: torch.Generator) -> None:
        """DN-CBM's start (section 3.1 and the authors' code). The authors' tensors have a leading axis of size 1, so PyTorch
        counts F * D inputs per latent, not D: the weight's bound is sqrt(6 / (F D)) and the bias's is 1 / sqrt(F)."""
        weight_bound, bias_bound = math.sqrt(6 / weight.numel()), 1 / math.sqrt(len(bias))
        weight.uniform_(-weight_bound, weight_bound, generator=generator)
        bias.uniform_(-bias_bound, bias_bound, generator=generator)

    def activate(self, pre: Tensor, threshold: Tensor | None = None, training: bool = False) -> Tensor:
        return pre.relu()

    def penalty(self, pre: Tensor, latents: Tensor, threshold: Tensor | None = None) -> Tensor:
        return self.l1_coeff * latents.sum(dim=1)  # none is negative

    def penalties(self, entries: ItemMajor) -> Array:
        from sparse_autoencoder import kernels

        return np.float32(self.l1_coeff) * kernels.item_sums(entries)[0]

    def add_slopes(self, entries: ItemMajor, n_items: int) -> None:
        np.add(entries.slope, np.float32(self.l1_coeff / n_items), out=entries.slope)
