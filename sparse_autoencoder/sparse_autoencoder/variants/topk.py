"""TopK: the k largest pre-activations of each item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_autoencoder.variants.largest_k import LargestK

if TYPE_CHECKING:
    from torch import Tensor

    from sparse_autoencoder.kernels import Array, ItemMajor, Selection


@dataclass(frozen=True)
class TopK(LargestK, kernels=True):
    """The k largest positive pre-activations of each item: Gao et al., "Scaling and evaluating sparse autoencoders"
    (2024, arXiv 2406.04093). Items with fewer positive pre-activations have fewer active latents."""

    kind: ClassVar[str] = "topk"

    def activate(self, pre: Tensor, threshold: Tensor | None = None, training: bool = False) -> Tensor:
        values, indices = pre.topk(min(self.k, pre.shape[1]), dim=1, sorted=False)
        return pre.new_zeros(pre.shape).scatter(1, indices, values.relu())

    def select(self, pre: Array, bias: Array, threshold: Array | None, level: float, out: Selection) -> ItemMajor:
        from sparse_autoencoder import kernels

        kernels.select_largest(pre, bias, self.k, *out)
        return kernels.packed(*out)
