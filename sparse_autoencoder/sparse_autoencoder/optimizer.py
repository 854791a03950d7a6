"""Adam that keeps the decoder's rows at unit norm."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparse_autoencoder.model import SparseAutoencoder


def project_decoder_gradient(gradient: Tensor, decoder_weight: Tensor) -> Tensor:
    """The gradient (F x D) without its component along each unit row of the decoder (F x D).
    That component only changes a row's norm, which the step restores to 1 (DN-CBM, after Bricken et al. 2023)."""
    along = (gradient * decoder_weight).sum(dim=1, keepdim=True)
    return gradient - along * decoder_weight


class Adam:
    """torch's Adam, with moments that can be read, reset and saved by the parameter's name.

    `moments` maps "<parameter>.mean" and "<parameter>.variance" to tensors shaped like the parameter; `steps` counts
    the updates.
    """

    def __init__(
        self,
        model: SparseAutoencoder,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.model = model
        self.lr, self.betas, self.epsilon, self.weight_decay = lr, betas, epsilon, weight_decay
        fused = model.tied_bias.device.type in ("cpu", "cuda")
        self._adam = torch.optim.Adam(
            model.parameters(), lr=lr, betas=betas, eps=epsilon, weight_decay=weight_decay, fused=fused
        )
        self.moments: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            # torch would create these at the first step; created here, the dense and the sparse step share them.
            state = self._adam.state[parameter]
            state["step"] = torch.zeros((), device=parameter.device if fused else "cpu")
            state["exp_avg"] = self.moments[f"{name}.mean"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = self.moments[f"{name}.variance"] = torch.zeros_like(parameter)
        self._steps = 0

    @property
    def steps(self) -> int:
        return self._steps

    @steps.setter
    def steps(self, value: int) -> None:
        self._steps = value
        for state in self._adam.state.values():
            state["step"].fill_(value)

    @torch.no_grad()
    def step(self) -> None:
        """Updates the parameters from their .grad (projection, Adam, unit norm) and clears it."""
        decoder = self.model.decoder_weight
        assert decoder.grad is not None
        decoder.grad = project_decoder_gradient(decoder.grad, decoder)
        for group in self._adam.param_groups:
            group["lr"] = self.lr
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._steps += 1
        decoder.copy_(normalize(decoder, dim=1))

    @torch.no_grad()
    def reset(self, latents: Tensor) -> None:
        """Zeroes the moments of the decoder rows, encoder rows and encoder biases of latents (int64 indices)."""
        for name in ("decoder_weight", "encoder_weight", "encoder_bias"):
            self.moments[f"{name}.mean"][latents] = 0
            self.moments[f"{name}.variance"][latents] = 0
