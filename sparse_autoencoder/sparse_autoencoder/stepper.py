"""The one place that chooses how a step is computed."""

import logging

from torch import Tensor

from sparse_autoencoder.losses import CodeLosses, code_losses
from sparse_autoencoder.model import SparseAutoencoder
from sparse_autoencoder.optimizer import Adam
from sparse_autoencoder.sparse_step import SparseStep
from sparse_autoencoder.sparsity import BatchTopK, TopK, code_of, n_auxiliary
from sparse_autoencoder.steps import StepResult, dense_step

SPARSE_BELOW = 0.25
"""The share of active latents up to which the sparse step is the faster one.

Measured (benchmarks/sae_step.py, "density"): at D = 1024 and F = 8192 the two meet near 0.25, at D = 512 near 0.35, and at
0.05 the sparse step is three times as fast.
"""

log = logging.getLogger(__name__)


class Stepper:
    """Makes optimiser steps: sparse ones on the CPU while few latents are active, else dense ones by autograd.

    The choice follows from `density`, the share of latents that was active in the step before, so that it is the same in
    every run and after a resumption. A step on CUDA is always dense.
    """

    def __init__(self, model: SparseAutoencoder, adam: Adam, *, bf16: bool = False) -> None:
        self.model = model
        self.adam = adam
        self.bf16 = bf16
        code = code_of(model.sparsity)
        self.density = min(1.0, code.k / model.n_latents) if isinstance(code, TopK | BatchTopK) else 1.0
        self.was_sparse: bool | None = None
        can_be_sparse = model.tied_bias.device.type == "cpu" and not bf16
        self._sparse = SparseStep(model, adam) if can_be_sparse else None

    def __call__(self, x: Tensor, dead: Tensor | None = None) -> StepResult:
        """A step on transformed inputs x (B x D); `dead` (int64) are the latents for AuxK."""
        n_dead = 0 if dead is None else len(dead)
        share = self.density + n_auxiliary(self.model.sparsity, self.model.n_inputs, n_dead) / self.model.n_latents
        if self._sparse is not None and share <= SPARSE_BELOW:
            result, is_sparse = self._sparse(x, dead), True
        else:
            result, is_sparse = dense_step(self.model, self.adam, x, dead, bf16=self.bf16), False
        if is_sparse != self.was_sparse:
            kind = "sparse" if is_sparse else "dense"
            log.info("step %d: %.2g %% of the latents active, %s steps from here", self.adam.steps, 100 * share, kind)
            self.was_sparse = is_sparse
        if self._sparse is not None:  # where it is never used, the number need not be fetched from the device
            self.density = float(result.fired.sum()) / (len(x) * self.model.n_latents)
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
