"""The sparse autoencoder: parameters, initialisation, encode and decode."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from sparse_autoencoder.sparsity import BatchTopK, JumpReLU, ReLU, Sparsity, code_of

INPUT_TRANSFORMS = ("none", "centre", "unit_norm")


class SAEOutput(NamedTuple):
    """What a forward pass returns."""

    latents: Tensor
    """B x F, non-negative and mostly zero."""
    reconstruction: Tensor
    """B x D, in the space of the inputs."""


class SparseAutoencoder(nn.Module):
    """A sparse autoencoder of D-dimensional inputs with F latents.

    z = activate((x - b) W_e^T + b_e) and x_hat = z W_d + b, where x is the input after `input_transform`.

    Parameters: `tied_bias` b (D), `encoder_weight` W_e (F x D), `encoder_bias` b_e (F) and `decoder_weight` W_d (F x
    D: a latent's direction is a row, of unit norm, contiguous in memory). JumpReLU adds
    `log_threshold` (F), BatchTopK the buffer `threshold` (a scalar).

    Args:
        n_inputs: D.
        n_latents: F, the expansion factor times D.
        sparsity: how the code is kept sparse.
        input_transform: "none" (DN-CBM); "centre" subtracts the geometric median of the training data, kept in the
            buffer `input_centre` (D); "unit_norm" divides every input by its L2 norm. Losses are computed after the
            transform.
        seed: of the initial weights.

    Raises:
        ValueError: a size below 1, or an unknown transform.
    """

    input_centre: Tensor
    threshold: Tensor

    def __init__(
        self,
        n_inputs: int,
        n_latents: int,
        *,
        sparsity: Sparsity = ReLU(l1_coeff=3e-5),  # noqa: B008 - frozen
        input_transform: str = "none",
        seed: int = 49,
    ) -> None:
        super().__init__()
        if n_inputs < 1 or n_latents < 1:
            raise ValueError(f"n_inputs and n_latents must be at least 1, not {n_inputs} and {n_latents}")
        if input_transform not in INPUT_TRANSFORMS:
            raise ValueError(f"input_transform must be one of {', '.join(INPUT_TRANSFORMS)}, not {input_transform!r}")
        self.n_inputs = n_inputs
        self.n_latents = n_latents
        self.sparsity = sparsity
        self.input_transform = input_transform
        self.tied_bias = nn.Parameter(torch.empty(n_inputs))
        self.encoder_weight = nn.Parameter(torch.empty(n_latents, n_inputs))
        self.encoder_bias = nn.Parameter(torch.empty(n_latents))
        self.decoder_weight = nn.Parameter(torch.empty(n_latents, n_inputs))
        if input_transform == "centre":
            self.register_buffer("input_centre", torch.zeros(n_inputs))
        code = code_of(sparsity)
        if isinstance(code, JumpReLU):
            self.log_threshold = nn.Parameter(torch.full((n_latents,), math.log(code.initial_threshold)))
        if isinstance(code, BatchTopK):
            self.register_buffer("threshold", torch.zeros(()))
        self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """The start of DN-CBM's authors (section 3.1 and their code), or for other variants their papers': W_e = W_d.

        Their tensors have a leading axis of size 1, so that PyTorch counts F * D inputs to a latent, not D: the
        encoder's bound is sqrt(6 / (F D)) and its bias's 1 / sqrt(F).
        """
        generator = torch.Generator().manual_seed(seed)
        weight_bound = math.sqrt(6 / (self.n_latents * self.n_inputs))
        bias_bound = 1 / math.sqrt(self.n_latents)
        self.tied_bias.zero_()
        self.decoder_weight.normal_(generator=generator)
        self.decoder_weight.copy_(normalize(self.decoder_weight, dim=1))
        if isinstance(self.sparsity, ReLU):
            self.encoder_weight.uniform_(-weight_bound, weight_bound, generator=generator)
            self.encoder_bias.uniform_(-bias_bound, bias_bound, generator=generator)
        else:
            self.encoder_weight.copy_(self.decoder_weight)
            self.encoder_bias.zero_()

    @property
    def dictionary(self) -> Tensor:
        """F x D, each latent's direction, of unit norm: what a latent is named by."""
        return normalize(self.decoder_weight.detach(), dim=1)

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Inputs (B x D) in the space where losses are computed, and their norms (B x 1) for "unit_norm", else None.

        Raises:
            ValueError: `x` is not B x D.
        """
        if x.ndim != 2 or x.shape[1] != self.n_inputs:
            raise ValueError(f"inputs must be B x {self.n_inputs}, not {' x '.join(map(str, x.shape))}")
        if self.input_transform == "centre":
            return x - self.input_centre, None
        if self.input_transform == "unit_norm":
            norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
            norm = torch.where(norm > 0, norm, torch.ones_like(norm))  # a zero input stays one
            return x / norm, norm
        return x, None

    def pre_activations(self, x: Tensor) -> Tensor:
        """(x - b) W_e^T + b_e (B x F) for inputs x (B x D) that `transform` has been applied to.

        The tied bias is folded into the encoder's, c = b_e - W_e b: the same sum without a copy of x.
        """
        return linear(x, self.encoder_weight, self.encoder_bias - self.encoder_weight @ self.tied_bias)

    def thresholds(self) -> Tensor | None:
        """JumpReLU's thresholds (F), BatchTopK's (a scalar), else None."""
        code = code_of(self.sparsity)
        if isinstance(code, JumpReLU):
            return self.log_threshold.exp()
        return self.threshold if isinstance(code, BatchTopK) else None

    def encode(self, x: Tensor) -> Tensor:
        """Latents (B x F) of inputs (B x D), each item's independent of the rest of the batch."""
        return self._encode_transformed(self.transform(x)[0])

    def _encode_transformed(self, x: Tensor) -> Tensor:
        return code_of(self.sparsity).activate(self.pre_activations(x), self.thresholds())

    def decode(self, latents: Tensor, scale: Tensor | None = None) -> Tensor:
        """Reconstruction (B x D) of latents (B x F), in the space of the inputs.

        `scale` (B x 1) are the inputs' norms under "unit_norm"; without it the result stays in the unit-norm space.
        """
        reconstruction = torch.addmm(self.tied_bias, latents, self.decoder_weight)
        if self.input_transform == "centre":
            return reconstruction + self.input_centre
        return reconstruction if scale is None else reconstruction * scale

    def forward(self, x: Tensor) -> SAEOutput:
        """Latents and reconstruction of inputs (B x D)."""
        transformed, scale = self.transform(x)
        latents = self._encode_transformed(transformed)
        return SAEOutput(latents, self.decode(latents, scale))
