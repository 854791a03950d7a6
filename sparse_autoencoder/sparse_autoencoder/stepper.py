"""Chooses how each step is computed."""

import logging

from torch import Tensor

from sparse_autoencoder.losses import CodeLosses, code_losses
from sparse_autoencoder.model import SparseAutoencoder
from sparse_autoencoder.optimizer import Adam
from sparse_autoencoder.sparse_step import SparseStep
from sparse_autoencoder.steps import StepResult, dense_step

SPARSE_BELOW = 0.25
"""The fraction of active latents up to which the sparse step is faster.

Measured (benchmarks/sae_step.py, "density"): at D = 1024 and F = 8192 the two meet near 0.25, at D = 512 near 0.35; at 0.05
the sparse step is three times as fast.
"""

log = logging.getLogger(__name__)


class Stepper:
    """Makes optimiser steps: sparse ones on the CPU while few latents are active, else dense ones by autograd.

    The choice follows from `density`, the fraction of latents active in the previous step, so a resumed run chooses as an
    uninterrupted one does. Variants without kernels, CUDA and bf16 always take dense steps.
    """

    def __init__(self, model: SparseAutoencoder, adam: Adam, *, bf16: bool = False) -> None:
        self.model, self.adam, self.bf16 = model, adam, bf16
        self.density = model.sparsity.code.expected_density(model.n_latents)
        self.was_sparse: bool | None = None
        has_kernels = model.sparsity.has_kernels and model.sparsity.code.has_kernels
        can_be_sparse = has_kernels and model.tied_bias.device.type == "cpu" and not bf16
        self._sparse = SparseStep(model, adam) if can_be_sparse else None

    def __call__(self, x: Tensor, dead: Tensor | None = None) -> StepResult:
        """A step on transformed inputs x (B x D); `dead` (int64) holds the latents that AuxK revives."""
        model = self.model
        n_dead = 0 if dead is None else len(dead)
        active = self.density + model.sparsity.code.n_auxiliary(model.n_inputs, n_dead) / model.n_latents
        if self._sparse is not None and active <= SPARSE_BELOW:
            result, is_sparse = self._sparse(x, dead), True
        else:
            result, is_sparse = dense_step(model, self.adam, x, dead, bf16=self.bf16), False
        if self.was_sparse is not None and is_sparse != self.was_sparse:
            kind = "sparse" if is_sparse else "dense"
            log.info(
                "step %d: %s of the latents are active, so steps are %s from here", self.adam.steps, f"{active:.1%}", kind
            )
        self.was_sparse = is_sparse
        if self._sparse is not None:  # otherwise the density is unused, and reading it would wait for the device
            self.density = float(result.fired.sum()) / (len(x) * model.n_latents)
        return result

    def losses(self, x: Tensor) -> CodeLosses:
        """The losses of transformed inputs x (B x D), without a step."""
        if self._sparse is not None and self.density <= SPARSE_BELOW:
            return self._sparse.losses(x)
        return code_losses(self.model, x)

    def close(self) -> None:
        """Ends the threads."""
        if self._sparse is not None:
            self._sparse.close()
