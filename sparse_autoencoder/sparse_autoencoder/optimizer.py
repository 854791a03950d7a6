"""Adam that keeps the decoder's rows at unit norm."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim.adam import adam

from sparse_autoencoder.model import SparseAutoencoder


def project_decoder_gradient(gradient: Tensor, decoder_weight: Tensor) -> Tensor:
    """The gradient (F x D) without its component along each unit row of the decoder (F x D).
    That component only changes a row's norm, which the step restores to 1 (DN-CBM, after Bricken et al. 2023)."""
    along = (gradient * decoder_weight).sum(dim=1, keepdim=True)
    return gradient - along * decoder_weight


def adam_rates(adam: "Adam") -> tuple[np.float32, ...]:
    """The coefficients of compiled kernels for the next update, each rounded once from float64."""
    step = adam.steps + 1
    beta_1, beta_2 = adam.betas
    lr = adam.lr / (1 - beta_1**step)
    inverse_root = 1 / math.sqrt(1 - beta_2**step)
    rates = (lr, beta_1, 1 - beta_1, beta_2, 1 - beta_2, inverse_root, adam.epsilon, adam.weight_decay)
    return tuple(np.float32(rate) for rate in rates)


class Adam:
    """torch's Adam, with moments that can be read, reset and saved by the parameter's name.

    `moments` maps "<parameter>.mean" and "<parameter>.variance" to tensors shaped like the parameter; `steps` counts
    the updates, and `counts` is where the device counts them. `step` makes one; a CUDA graph captures `update` alone,
    between `prepare` and `count`.
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
        self.steps = 0
        self.moments: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            self.moments[f"{name}.mean"], self.moments[f"{name}.variance"] = (torch.zeros_like(parameter) for _ in range(2))
        device = model.tied_bias.device
        self._fused = device.type in ("cpu", "cuda")
        # What an update reads, and on a GPU must find in its memory: the learning rate, and the updates made so far.
        self._lr = torch.zeros((), device=device) if device.type == "cuda" else None
        self.counts = {
            f"{name}.count": torch.zeros((), device=device if self._fused else "cpu") for name, _ in model.named_parameters()
        }
        self._lr_there, self._steps_there = 0.0, 0

    @torch.no_grad()
    def prepare(self) -> None:
        """Makes the next `update` one with the present `lr` and `steps`."""
        if self._lr is not None and self._lr_there != self.lr:
            self._lr.fill_(self.lr)
            self._lr_there = self.lr
        if self._steps_there != self.steps:
            for count in self.counts.values():
                count.fill_(self.steps)
            self._steps_there = self.steps

    @torch.no_grad()
    def update(self) -> None:
        """Updates the parameters from their .grad (projection, Adam, unit norm) and clears it."""
        parameters = dict(self.model.named_parameters())
        decoder = self.model.decoder_weight
        assert decoder.grad is not None
        decoder.grad = project_decoder_gradient(decoder.grad, decoder)
        gradients = [parameter.grad for parameter in parameters.values()]
        assert all(gradient is not None for gradient in gradients)
        adam(
            list(parameters.values()),
            gradients,  # type: ignore[arg-type]
            [self.moments[f"{name}.mean"] for name in parameters],
            [self.moments[f"{name}.variance"] for name in parameters],
            [],
            list(self.counts.values()),
            foreach=False,
            fused=self._fused,
            capturable=self._lr is not None,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=self.lr if self._lr is None else self._lr,
            weight_decay=self.weight_decay,
            eps=self.epsilon,
            maximize=False,
        )
        for parameter in parameters.values():
            parameter.grad = None
        decoder.copy_(normalize(decoder, dim=1))

    def count(self) -> None:
        """Counts an `update`, which has counted itself in the device's memory."""
        self.steps += 1
        self._steps_there += 1

    def step(self) -> None:
        """One update: `prepare`, `update`, `count`."""
        self.prepare()
        self.update()
        self.count()

    @torch.no_grad()
    def reset(self, latents: Tensor) -> None:
        """Zeroes the moments of the decoder rows, encoder rows and encoder biases of latents (int64 indices)."""
        for name in ("decoder_weight", "encoder_weight", "encoder_bias"):
            self.moments[f"{name}.mean"][latents] = 0
            self.moments[f"{name}.variance"][latents] = 0
