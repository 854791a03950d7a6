"""The number k and the AuxK loss on dead latents, which TopK and BatchTopK share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_autoencoder.declare import setting
from sparse_autoencoder.variants.base import Sparsity

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LargestK(Sparsity):
    """Keeps k active latents per item, and revives dead latents by AuxK (Gao et al. 2024, section 2.4).

    A latent is dead if it was inactive for the last `dead_after` training items. The `aux_k` largest pre-activations of dead
    latents reconstruct the code's residual; the loss adds `aux_coeff` times the mean squared error of that reconstruction.
    If `aux_k` is None, it is half the number of inputs, as in the paper.
    """

    sparser: ClassVar[str] = "lower --k"
    denser: ClassVar[str] = "raise --k"

    k: int = setting(32, "active latents per item", least=1)
    aux_coeff: float = 1 / 32
    aux_k: int | None = None
    dead_after: int = 10_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.aux_coeff >= 0 or self.dead_after < 1 or (self.aux_k is not None and self.aux_k < 1):
            raise ValueError(
                f"{type(self).__name__}: aux_coeff must be at least 0, aux_k and dead_after at least 1, not"
                f" {self.aux_coeff}, {self.aux_k} and {self.dead_after}"
            )

    @property
    def name_part(self) -> str:
        return f"{self.kind}{self.k}"

    def check_latents(self, n_latents: int) -> None:
        if self.k > n_latents:
            raise ValueError(f"--k {self.k} asks for more active latents than the SAE has: {n_latents}")

    def dead(self, unfired: Tensor, longest: int) -> Tensor | None:
        return unfired >= self.dead_after if self.aux_coeff > 0 and longest >= self.dead_after else None

    def n_auxiliary(self, n_inputs: int, n_dead: int) -> int:
        if self.aux_coeff == 0:
            return 0
        return min(self.aux_k if self.aux_k is not None else max(1, n_inputs // 2), n_dead)

    def expected_density(self, n_latents: int) -> float:
        return min(1.0, self.k / n_latents)
