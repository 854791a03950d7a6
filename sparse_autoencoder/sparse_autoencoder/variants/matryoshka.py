"""Matryoshka: nested dictionaries over a TopK or BatchTopK code."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from sparse_autoencoder.variants.base import Sparsity
from sparse_autoencoder.variants.batchtopk import BatchTopK
from sparse_autoencoder.variants.largest_k import LargestK


@dataclass(frozen=True)
class Matryoshka(Sparsity, kernels=True):
    """Nested dictionaries: Bussmann et al., "Learning multi-level features with Matryoshka SAEs" (2025, arXiv 2503.17547).

    `code` makes the code: a BatchTopK, as in the paper, or a TopK. Each of the first `fractions` of the latents must
    reconstruct the input without the rest: the loss sums the squared error over these prefixes.
    """

    kind: ClassVar[str] = "matryoshka"

    code: LargestK = BatchTopK()  # noqa: RUF009 - frozen
    fractions: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)

    def __post_init__(self) -> None:
        if not isinstance(self.code, LargestK):
            raise ValueError(f"Matryoshka: code must be a TopK or a BatchTopK, not {self.code!r}")
        object.__setattr__(self, "fractions", tuple(self.fractions))
        ascending = [0.0, *self.fractions]
        if ascending[-1] != 1 or any(a >= b for a, b in pairwise(ascending)):
            raise ValueError(f"Matryoshka: fractions must rise from above 0 to 1, not {self.fractions}")

    @property
    def sparser(self) -> str:  # type: ignore[override]
        return self.code.sparser

    @property
    def denser(self) -> str:  # type: ignore[override]
        return self.code.denser

    @property
    def name_part(self) -> str:
        return f"matryoshka_{self.code.name_part}"

    def check_latents(self, n_latents: int) -> None:
        self.code.check_latents(n_latents)

    def prefix_ends(self, n_latents: int) -> tuple[int, ...]:
        return tuple(sorted({max(1, round(fraction * n_latents)) for fraction in self.fractions}))
