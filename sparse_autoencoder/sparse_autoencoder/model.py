"""The sparse autoencoder: parameters, initialisation, encode and decode."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from sparse_autoencoder.settings import DEFAULT_SEED, INPUT_TRANSFORMS
from sparse_autoencoder.variants import ReLU, Sparsity


class SAEOutput(NamedTuple):
    """The output of a forward pass."""

    latents: Tensor
    """B x F, non-negative and mostly zero."""
    reconstruction: Tensor
    """B x D, in the space of the inputs."""


class SparseAutoencoder(nn.Module):
    """A sparse autoencoder of D-dimensional inputs with F latents.

    z = activate((x - b) W_e^T + b_e) and x_hat = z W_d + b, where x is the input after `input_transform`.

    Parameters: `tied_bias` b (D), `encoder_weight` W_e (F x D), `encoder_bias` b_e (F) and `decoder_weight` W_d (F x D; row f,
    of unit norm, is latent f's direction), and those that the variant adds.

    Args:
        n_inputs: D.
        n_latents: F, the expansion factor times D.
        sparsity: how the code is kept sparse.
        input_transform: "none" (DN-CBM); "centre" subtracts the geometric median of the training data, stored in the buffer
            `input_centre` (D); "unit_norm" divides every input by its L2 norm. Losses are computed after the transform.
        seed: seed of the initial weights.

    Raises:
        ValueError: a size is below 1, or the transform is unknown.
    """

    input_centre: Tensor

    def __init__(
        self,
        n_inputs: int,
        n_latents: int,
        *,
        sparsity: Sparsity = ReLU(),  # noqa: B008 - frozen
        input_transform: str = "none",
        seed: int = DEFAULT_SEED,
    ) -> None:
        super().__init__()
        if n_inputs < 1 or n_latents < 1:
            raise ValueError(f"n_inputs and n_latents must be at least 1, not {n_inputs} and {n_latents}")
        if input_transform not in INPUT_TRANSFORMS:
            raise ValueError(f"input_transform must be one of {', '.join(INPUT_TRANSFORMS)}, not {input_transform!r}")
        self.n_inputs, self.n_latents = n_inputs, n_latents
        self.sparsity, self.input_transform = sparsity, input_transform
        self.tied_bias = nn.Parameter(torch.zeros(n_inputs))
        self.encoder_weight = nn.Parameter(torch.empty(n_latents, n_inputs))
        self.encoder_bias = nn.Parameter(torch.empty(n_latents))
        self.decoder_weight = nn.Parameter(torch.empty(n_latents, n_inputs))
        if input_transform == "centre":
            self.register_buffer("input_centre", torch.zeros(n_inputs))
        for name, start in sparsity.code.extra_parameters(n_latents).items():
            self.register_parameter(name, nn.Parameter(start))
        for name, start in sparsity.code.extra_buffers(n_latents).items():
            self.register_buffer(name, start)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.decoder_weight.normal_(generator=generator)
            self.decoder_weight.copy_(normalize(self.decoder_weight, dim=1))
            sparsity.code.start_encoder(self.encoder_weight, self.encoder_bias, self.decoder_weight, generator)

    @property
    def dictionary(self) -> Tensor:
        """Each latent's direction (F x D, unit rows). Concepts are named by these."""
        return normalize(self.decoder_weight.detach(), dim=1)

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Inputs (B x D) in the space where losses are computed, and their norms (B x 1) for "unit_norm", else None.
        Raises ValueError if `x` is not B x D."""
        if x.ndim != 2 or x.shape[1] != self.n_inputs:
            raise ValueError(f"inputs must be B x {self.n_inputs}, not {' x '.join(map(str, x.shape))}")
        if self.input_transform == "centre":
            return x - self.input_centre, None
        if self.input_transform == "unit_norm":
            norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
            norm = torch.where(norm > 0, norm, torch.ones_like(norm))  # a zero input stays zero
            return x / norm, norm
        return x, None

    def pre_activations(self, x: Tensor) -> Tensor:
        """(x - b) W_e^T + b_e (B x F) for transformed inputs x (B x D).
        The tied bias is folded into the encoder's, c = b_e - W_e b: the same sum without a copy of x."""
        return linear(x, self.encoder_weight, self.encoder_bias - self.encoder_weight @ self.tied_bias)

    def encode(self, x: Tensor) -> Tensor:
        """Latents (B x F) of inputs (B x D). Each item's latents are independent of the rest of the batch."""
        return self._encode_transformed(self.transform(x)[0])

    def _encode_transformed(self, x: Tensor) -> Tensor:
        code = self.sparsity.code
        return code.activate(self.pre_activations(x), code.threshold(self))

    def decode(self, latents: Tensor, scale: Tensor | None = None) -> Tensor:
        """Reconstruction (B x D) of latents (B x F), in the space of the inputs.
        `scale` (B x 1) holds the inputs' norms under "unit_norm"; without it the result stays in the unit-norm space."""
        reconstruction = torch.addmm(self.tied_bias, latents, self.decoder_weight)
        if self.input_transform == "centre":
            return reconstruction + self.input_centre
        return reconstruction if scale is None else reconstruction * scale

    def forward(self, x: Tensor) -> SAEOutput:
        """Latents and reconstruction of inputs (B x D)."""
        transformed, scale = self.transform(x)
        latents = self._encode_transformed(transformed)
        return SAEOutput(latents, self.decode(latents, scale))
