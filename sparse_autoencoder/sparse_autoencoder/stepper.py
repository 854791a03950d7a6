"""Chooses how each step is computed."""

import logging

import torch
from torch import Tensor

from sparse_autoencoder.cuda_stepper import CudaStepper
from sparse_autoencoder.losses import CodeLosses, ExtraLoss, code_losses
from sparse_autoencoder.model import SparseAutoencoder
from sparse_autoencoder.optimizer import Adam
from sparse_autoencoder.parallel import Part
from sparse_autoencoder.sparse_step import SparseStep
from sparse_autoencoder.steps import StepResult, dense_step

SPARSE_BELOW = 0.25
"""The fraction of active latents up to which the sparse step is faster on a CPU.

Measured (benchmarks/sae_step.py, "density"): at D = 1024 and F = 8192 the two meet near 0.25, at D = 512 near 0.35; at 0.05
the sparse step is three times as fast.
"""

SPARSE_BELOW_ON_GPU = {"highest": 0.037, "high": 0.0094, "medium": 0.0117}
"""The same on a GPU, by --matmul_precision. Counted from bytes and operations (docs/PERFORMANCE.md), not measured."""

LOOK_EVERY = 100
"""Steps between looks at what only a GPU knows, each of which waits for it: the density, and whether latents are dead."""

log = logging.getLogger(__name__)


class Stepper:
    """Makes optimiser steps: sparse ones while few latents are active, else dense ones by autograd.

    The choice follows from `density`, the fraction of latents active in the previous step (on a GPU: when it was last looked
    at), so a resumed run chooses as an uninterrupted one does. Variants without kernels always take dense steps, and so
    do bfloat16 products on a CPU, Matryoshka and the revival of dead latents on a GPU, processes that share a batch, and
    an `extra` term of the loss.
    """

    def __init__(
        self,
        model: SparseAutoencoder,
        adam: Adam,
        *,
        batch_size: int,
        matmul_precision: str = "highest",
        extra: ExtraLoss | None = None,
    ) -> None:
        self.model, self.adam, self.bf16 = model, adam, matmul_precision == "medium"
        self.extra = extra
        self.sparse_below_on_gpu = SPARSE_BELOW_ON_GPU[matmul_precision]
        self.density = model.sparsity.code.expected_density(model.n_latents)
        self.was_sparse: bool | None = None
        self._on_cpu: SparseStep | None = None
        self._on_gpu: CudaStepper | None = None
        device = model.tied_bias.device.type
        has_kernels = model.sparsity.has_kernels and model.sparsity.code.has_kernels
        if extra is not None:
            return
        if device == "cuda":
            self._on_gpu = CudaStepper(model, adam, batch_size=batch_size, precision=matmul_precision)
        elif device == "cpu" and has_kernels and not self.bf16:
            self._on_cpu = SparseStep(model, adam)

    def __call__(self, x: Tensor, dead: Tensor | None = None, part: Part | None = None) -> StepResult:
        """A step on transformed inputs x (B x D), which may be a `part` of a batch. AuxK revives the latents of the mask
        `dead` (F, bool)."""
        if part is not None or self.extra is not None:
            result = dense_step(self.model, self.adam, x, dead, bf16=self.bf16, part=part, extra=self.extra)
            is_sparse = False
        elif self._on_gpu is not None:
            sparse = dead is None and self.density <= self.sparse_below_on_gpu and self._on_gpu.can_be_sparse
            result, is_sparse = self._on_gpu(x, dead, sparse=sparse)
        elif self._on_cpu is not None and self.density + self._auxiliary(dead) <= SPARSE_BELOW:
            result, is_sparse = self._on_cpu(x, dead), True
        else:
            result, is_sparse = dense_step(self.model, self.adam, x, dead, bf16=self.bf16), False
        if self.was_sparse is not None and is_sparse != self.was_sparse:
            kind, active = "sparse" if is_sparse else "dense", f"{self.density:.1%}"
            log.info("step %d: %s of the latents are active, so steps are %s from here", self.adam.steps, active, kind)
        self.was_sparse = is_sparse
        if self._on_cpu is not None or (self._on_gpu is not None and self.adam.steps % LOOK_EVERY == 0):
            n_items = len(x) if part is None else part.n_items
            self.density = float(result.fired.sum()) / (n_items * self.model.n_latents)
        return result

    def _auxiliary(self, dead: Tensor | None) -> float:
        """The fraction of latents that AuxK adds to the active ones."""
        model = self.model
        n_dead = 0 if dead is None else int(torch.count_nonzero(dead))
        return model.sparsity.code.n_auxiliary(model.n_inputs, n_dead) / model.n_latents

    def losses(self, x: Tensor) -> CodeLosses:
        """The losses of transformed inputs x (B x D), without a step."""
        if self._on_cpu is not None and self.density <= SPARSE_BELOW:
            return self._on_cpu.losses(x)
        return code_losses(self.model, x)

    def close(self) -> None:
        """Ends the threads."""
        if self._on_cpu is not None:
            self._on_cpu.close()
