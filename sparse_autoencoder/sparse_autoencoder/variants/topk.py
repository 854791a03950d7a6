"""TopK: the k largest pre-activations of each item."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_autoencoder import kernels
from sparse_autoencoder.kernels import Array, ItemMajor, Selection
from sparse_autoencoder.variants.largest_k import LargestK


@dataclass(frozen=True)
class TopK(LargestK, kernels=True):
    """The k largest positive pre-activations of each item: Gao et al., "Scaling and evaluating sparse autoencoders"
    (2024, arXiv 2406.04093). Items with fewer positive pre-activations have fewer active latents."""

    kind: ClassVar[str] = "topk"

    def activate(self, pre: Tensor, threshold: Tensor | None = None, training: bool = False) -> Tensor:
        values, indices = pre.topk(min(self.k, pre.shape[1]), dim=1, sorted=False)
        return torch.zeros_like(pre).scatter(1, indices, torch.relu(values))

    def select(self, pre: Array, bias: Array, threshold: Array | None, level: float, out: Selection) -> ItemMajor:
        kernels.select_largest(pre, bias, self.k, *out)
        return kernels.packed(*out)
