"""Steps on a GPU: dense or sparse, each captured once in a CUDA graph, and checked before it is trusted."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_autoencoder.graphs import GraphedStep, restored
from sparse_autoencoder.model import SparseAutoencoder
from sparse_autoencoder.optimizer import Adam, adam_rates
from sparse_autoencoder.steps import StepResult, dense_update

log = logging.getLogger(__name__)

DENSE_ONLY = "SPARSE_AUTOENCODER_DENSE"
"""The environment variable that keeps steps on a GPU dense: the way out if a kernel crashes the driver."""

TOLERANCES = {"highest": 1e-3, "high": 2e-2, "medium": 1e-1}
"""How far the first step may differ from a dense one, by --matmul_precision: relative, in the norm of each tensor. The dense
step rounds the factors of every product; the sparse one only those of the encoder's (and in bfloat16 the decoder's)."""

CHANGE_TOLERANCE = 0.4
"""The same for the change of a parameter. Adam's first steps depend on little more than the sign of a gradient, so rounding
turns some of them round."""


@dataclass
class _Way:
    """One way of making steps."""

    name: str
    prepare: Callable[[], None]
    update: Callable[[Tensor, Tensor | None], StepResult]
    count: Callable[[], None]
    graphed: bool = True
    proved: bool = False


class CudaStepper:
    """Makes steps of one model and its optimiser on a GPU, without a wait for the device.

    Full batches are replayed from a CUDA graph; other batches are launched kernel by kernel. The first step of each way is
    compared with a dense step that is launched so. A way that fails or differs is given up, with a warning, and costs nothing:
    the dense step counts in its place.
    """

    def __init__(self, model: SparseAutoencoder, adam: Adam, *, batch_size: int, precision: str) -> None:
        self.model, self.adam, self.batch_size, self.precision = model, adam, batch_size, precision
        self.can_be_sparse = _has_kernels(model) and not os.environ.get(DENSE_ONLY)
        self._dense = _Way("dense", adam.prepare, self._dense_update, adam.count)
        self._sparse: _Way | None = None
        self._graphs: dict[tuple[str, bool], GraphedStep] = {}  # by way, and by whether dead latents are revived

    def _dense_update(self, x: Tensor, dead: Tensor | None) -> StepResult:
        return dense_update(self.model, self.adam, x, dead, bf16=self.precision == "medium")

    def _sparse_way(self) -> _Way:
        """Raises whatever a machine without Triton, a compiler or enough memory raises."""
        from sparse_autoencoder.gpu_step import GpuStep

        step = GpuStep(self.model, self.adam, self.batch_size, precision=self.precision)

        def count() -> None:
            self.adam.steps += 1

        return _Way("sparse", lambda: step.set_rates(adam_rates(self.adam)), lambda x, _: step(x), count)

    def __call__(self, x: Tensor, dead: Tensor | None, *, sparse: bool) -> tuple[StepResult, bool]:
        """A step on transformed inputs x (B x D) and the mask `dead` (F, bool), and whether it was sparse."""
        if sparse and self._sparse is None:
            try:
                self._sparse = self._sparse_way()
            except Exception as error:  # a compiler can raise anything
                self._give_up(error)
        way = self._sparse if sparse and self._sparse is not None else self._dense
        try:
            result = self._run(way, x, dead) if way.proved else self._first(way, x, dead)
        except torch.cuda.OutOfMemoryError as error:  # of the comparison, which holds copies of everything
            if way.proved:
                raise
            self._drop(way, error)
            result = None
        if result is None:  # outside the handler, where the error would keep the memory of the failed step
            del way
            return self(x, dead, sparse=False)
        made = self._sparse if way is self._sparse and self._sparse is not None else self._dense
        made.count()
        # Copied, since the next step overwrites them.
        loss, l2, penalty = torch.stack([result.loss, result.l2, result.penalty]).unbind()
        return StepResult(loss, l2, penalty, result.fired), made is not self._dense

    def _compared(self) -> dict[str, Tensor]:
        """What every way of making a step must change alike."""
        return {**self.model.state_dict(), **self.adam.moments}

    def _changed(self) -> dict[str, Tensor]:
        """Everything that a step changes."""
        return {**self._compared(), **self.adam.counts}

    def _run(self, way: _Way, x: Tensor, dead: Tensor | None) -> StepResult:
        way.prepare()
        is_full, kind = len(x) == self.batch_size, (way.name, dead is not None)
        if way.graphed and is_full and kind not in self._graphs:
            try:
                self._graphs[kind] = GraphedStep(way.update, x, dead, self._changed().values())
            except RuntimeError as error:
                log.warning("%s steps are launched one by one, since a CUDA graph failed: %s", way.name, _line(error))
                way.graphed = False
                self._graphs.clear()
        return self._graphs[kind](x, dead) if way.graphed and is_full else way.update(x, dead)

    def _first(self, way: _Way, x: Tensor, dead: Tensor | None) -> StepResult:
        """The first step of a way. If it fails or differs from a dense step, that one is the result and the way given up."""
        before = {name: tensor.clone() for name, tensor in self._compared().items()}
        self.adam.prepare()  # before the copies: `prepare` does not fill the counts again once they are restored
        with restored(self._changed().values()):
            wanted = self._dense_update(x, dead)
            after = {name: tensor.clone() for name, tensor in self._changed().items()}
        try:
            found = self._run(way, x, dead)
            found_all, wanted_all = self._compared() | vars(found), after | vars(wanted)
            complaint = _disagreement(before, found_all, wanted_all, TOLERANCES[self.precision])
        except Exception as error:  # whatever a compiler or the driver raises
            complaint = _line(error)
        if not complaint:
            way.proved = len(x) == self.batch_size  # others do not use the graph
            return found
        for name, tensor in self._changed().items():
            tensor.copy_(after[name])
        self._drop(way, complaint)
        return wanted

    def _drop(self, way: _Way, reason: object) -> None:
        """Gives up a way, or of dense steps their graph, and the memory that it takes."""
        self._graphs.clear()
        if way is self._dense:
            log.warning("CUDA graphs are disabled (%s): steps are launched one by one", _line(reason))
            way.graphed, way.proved = False, True
        else:
            self._give_up(reason)

    def _give_up(self, reason: object) -> None:
        log.warning("sparse steps are disabled on this GPU, and steps stay dense: %s", _line(reason))
        self.can_be_sparse, self._sparse = False, None


def _has_kernels(model: SparseAutoencoder) -> bool:
    """Whether there are kernels for a model's steps, and Triton, which comes with torch except on macOS and Windows."""
    try:
        from sparse_autoencoder.gpu_step import supports
    except ImportError as error:
        log.warning("steps on this GPU are dense: %s", _line(error))
        return False
    return supports(model)


def _line(reason: object) -> str:
    """The first line of an error or complaint."""
    text = str(reason).strip() or type(reason).__name__
    return text.splitlines()[0]


def _disagreement(before: dict[str, Tensor], found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> str:
    """Which tensor differs most from what is wanted, if any differs by too much; else "".

    Parameters are compared by how they changed from `before`, everything else as it is.
    """
    excess: dict[str, float] = {}
    for name, tensor in found.items():
        is_parameter = name in before and "." not in name
        base = before[name] if is_parameter else torch.zeros_like(wanted[name])
        size = torch.linalg.vector_norm((wanted[name] - base).double())
        gap = float(torch.linalg.vector_norm((tensor - wanted[name]).double()))
        allowed = float(size) * (CHANGE_TOLERANCE if is_parameter else tolerance)
        if not gap <= allowed:  # also if it is NaN
            excess[name] = gap / allowed if allowed else float("inf")
    if not excess:
        return ""
    name = max(excess, key=lambda name: excess[name])
    return f"{name} differs from a dense step's by {excess[name]:.2g} times what is allowed"
