"""The interface that the sparsity variants implement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sparse_autoencoder.declare import check

if TYPE_CHECKING:  # Command lines name the variants; torch and numba are imported where they are needed.
    import torch
    from torch import Tensor, nn

    from sparse_autoencoder.kernels import Array, ItemMajor, LatentMajor, Selection
    from sparse_autoencoder.parallel import Part


@dataclass(frozen=True)
class Sparsity:
    """How a code is kept sparse. Each variant is a frozen dataclass of its parameters that overrides these methods.

    By default, the encoder starts equal to the decoder, the loss has no sparsity term, dead latents stay dead, and every step
    uses autograd. The class keyword `kernels=True` declares that the methods of the sparse step compute the same code and
    penalty as `activate` and `penalty`. Subclasses do not inherit it, since they may override only one side.
    """

    kind: ClassVar[str]  # the variant's name in checkpoints and on command lines
    has_kernels: ClassVar[bool] = False  # whether the sparse step can compute this variant
    resamples: ClassVar[bool] = False  # whether DN-CBM's resampling restarts dead latents
    aux_coeff = 0.0  # weight of AuxK's loss on dead latents
    sparser: ClassVar[str] = "make the code sparser"  # what makes fewer latents active, as advice
    denser: ClassVar[str] = "make the code less sparse"

    def __init_subclass__(cls, *, kernels: bool = False, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.has_kernels = kernels

    def __post_init__(self) -> None:
        check(self)

    @property
    def name_part(self) -> str:
        """The variant's part of a run's name."""
        return self.kind

    @property
    def code(self) -> Sparsity:
        """The variant that makes the code: itself, unless it wraps another."""
        return self

    def check_latents(self, n_latents: int) -> None:
        """Raises ValueError if the variant cannot work with this many latents."""

    def extra_parameters(self, n_latents: int) -> dict[str, Tensor]:
        """Initial values of the parameters that the variant adds to the model."""
        return {}

    def extra_buffers(self, n_latents: int) -> dict[str, Tensor]:
        """Initial values of the buffers that the variant adds to the model."""
        return {}

    def start_encoder(self, weight: Tensor, bias: Tensor, decoder: Tensor, generator: torch.Generator) -> None:
        """Initialises the encoder's weight (F x D) and bias (F) in place, given the decoder (F x D)."""
        weight.copy_(decoder)
        bias.zero_()

    def threshold(self, model: nn.Module) -> Tensor | None:
        """The thresholds of a model's latents: F, a scalar, or None if there are none."""
        return None

    def activate(self, pre: Tensor, threshold: Tensor | None = None, training: bool = False) -> Tensor:
        """Latents (B x F) of pre-activations (B x F)."""
        raise NotImplementedError

    def activate_part(self, pre: Tensor, threshold: Tensor | None, part: Part) -> Tensor:
        """The latents in training of a part of a batch. To override if an item's latents depend on the rest of the batch."""
        return self.activate(pre, threshold, training=True)

    def penalty(self, pre: Tensor, latents: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The sparsity term of each item's loss (B)."""
        return latents.new_zeros(len(latents))

    def prefix_ends(self, n_latents: int) -> tuple[int, ...]:
        """Sizes of the prefixes of the latents that must each reconstruct the input, ascending."""
        return (n_latents,)

    def dead(self, unfired: Tensor, longest: int) -> Tensor | None:
        """A mask (F, bool) of the latents that AuxK revives; None without AuxK, or if none is dead for certain.
        `unfired` (F) counts the items since each latent was last active. None of them exceeds `longest`."""
        return None

    def n_auxiliary(self, n_inputs: int, n_dead: int) -> int:
        """How many dead latents reconstruct each item in AuxK's loss."""
        return 0

    def after_batch(self, model: nn.Module, latents: Tensor) -> None:
        """Updates the model's buffers after a training batch, given its latents (any shape; zeros may be left out)."""

    def after_part(self, model: nn.Module, latents: Tensor, part: Part) -> None:
        """`after_batch` of a part of a batch. To override together with that."""
        self.after_batch(model, latents)

    # The sparse step uses the methods below.

    def expected_density(self, n_latents: int) -> float:
        """The fraction of latents active in a fresh model; it decides how the first step is computed."""
        return 1.0

    def level(self, threshold: Array | None) -> float:
        """The value above which entries are active outside training."""
        return 0.0

    def select(self, pre: Array, bias: Array, threshold: Array | None, level: float, out: Selection) -> ItemMajor:
        """The entries above `level` of n items, from pre-activations without their bias (n x F).
        `out` is working memory: latents and values (both n x F), and row starts (n + 1)."""
        from sparse_autoencoder import kernels

        kernels.select_above(pre, bias, bias, np.float32(level), *out)
        return kernels.packed(*out)

    def batch_limit(self, n_items: int) -> int | None:
        """How many entries a training batch may keep in total; None if items are independent."""
        return None

    def penalties(self, entries: ItemMajor) -> Array:
        """The sparsity term of each item's loss (n, float32)."""
        return np.zeros(len(entries.row_start) - 1, np.float32)

    def add_slopes(self, entries: ItemMajor, n_items: int) -> None:
        """Adds the penalty's derivative by each entry, averaged over the batch's n_items, to its slope, in place."""

    def gradients(self, entries: LatentMajor, threshold: Array | None, n_items: int, fired: Array) -> dict[str, Array]:
        """Gradients of the extra parameters, by name. May correct the slopes and firing counts `fired` (F) in place."""
        return {}
