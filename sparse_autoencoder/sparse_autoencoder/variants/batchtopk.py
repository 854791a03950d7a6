"""BatchTopK: the largest pre-activations of a batch, k per item on average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_autoencoder.variants.largest_k import LargestK

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparse_autoencoder.kernels import Array
    from sparse_autoencoder.parallel import Part


@dataclass(frozen=True)
class BatchTopK(LargestK, kernels=True):
    """The k B largest positive pre-activations of a batch of B: Bussmann et al., "BatchTopK sparse autoencoders" (2024,
    arXiv 2412.06410).

    Outside training, an item's latents must not depend on its batch. Those above a threshold are active: the running mean of
    the smallest active value of each training batch.
    """

    kind: ClassVar[str] = "batchtopk"
    threshold_decay: ClassVar[float] = 0.99

    def extra_buffers(self, n_latents: int) -> dict[str, Tensor]:
        import torch

        return {"threshold": torch.zeros(())}

    def threshold(self, model: nn.Module) -> Tensor | None:
        return model.get_buffer("threshold")

    def activate(self, pre: Tensor, threshold: Tensor | None = None, training: bool = False) -> Tensor:
        if not training:
            return pre.where(pre > (0 if threshold is None else threshold), 0).clamp_min(0)
        values, indices = pre.flatten().topk(min(self.k * len(pre), pre.numel()), sorted=False)
        return pre.new_zeros(pre.shape).flatten().scatter(0, indices, values.relu()).view_as(pre)

    def activate_part(self, pre: Tensor, threshold: Tensor | None, part: Part) -> Tensor:
        n_kept = self.k * part.n_items
        largest = pre.new_zeros(n_kept)
        found = pre.detach().flatten().topk(min(n_kept, pre.numel())).values
        largest[: len(found)] = found
        edge = part.across.joined(largest).flatten().topk(n_kept).values[-1]
        return pre.where(pre >= edge, 0).clamp_min(0)

    def after_batch(self, model: nn.Module, latents: Tensor) -> None:
        self._move_threshold(model, self._smallest(latents))

    def after_part(self, model: nn.Module, latents: Tensor, part: Part) -> None:
        self._move_threshold(model, part.across.joined(self._smallest(latents)).min())

    def _smallest(self, latents: Tensor) -> Tensor:
        """The smallest active latent, or infinity."""
        import torch

        positive = torch.where(latents > 0, latents, torch.inf)
        return positive.min() if positive.numel() else positive.new_full((), torch.inf)

    def _move_threshold(self, model: nn.Module, smallest: Tensor) -> None:
        """Updates the running mean of the threshold; a batch without active latents leaves it as it was."""
        import torch

        threshold = model.get_buffer("threshold")
        with torch.no_grad():
            smallest = smallest.to(threshold.dtype)
            mean = torch.where(threshold > 0, torch.lerp(smallest, threshold, self.threshold_decay), smallest)
            threshold.copy_(torch.where(torch.isfinite(smallest), mean, threshold))

    def level(self, threshold: Array | None) -> float:
        assert threshold is not None
        return float(threshold)

    def batch_limit(self, n_items: int) -> int | None:
        return self.k * n_items
