"""Steps captured in CUDA graphs, so that a step costs the host one launch."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sparse_autoencoder.steps import StepResult

WARM_UP = 3  # steps before a capture, in which libraries choose algorithms and kernels are compiled


class GraphedStep:
    """A step on batches of one shape, captured in a CUDA graph.

    What a replay returns is valid until the next one.
    """

    def __init__(
        self, step: Callable[[Tensor, Tensor | None], StepResult], x: Tensor, dead: Tensor | None, changed: Iterable[Tensor]
    ) -> None:
        """Captures `step` on inputs shaped like x (B x D) and `dead` (F, bool). All tensors that the step changes are
        `changed`; they hold afterwards what they held before.

        Raises RuntimeError if the step cannot be captured.
        """
        self.x, self.dead = x.clone(), None if dead is None else dead.clone()
        # If a capture fails, torch.cuda.graph leaves its own stream the current one.
        with restored(changed), torch.cuda.device(x.device), torch.cuda.stream(torch.cuda.current_stream(x.device)):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    step(self.x, self.dead)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            # Another thread may pin memory meanwhile, which the default mode takes for an error.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.result = step(self.x, self.dead)

    def __call__(self, x: Tensor, dead: Tensor | None) -> StepResult:
        """The step on inputs x (B x D) and `dead` (F, bool)."""
        self.x.copy_(x)
        if self.dead is not None and dead is not None:
            self.dead.copy_(dead)
        with torch.cuda.device(self.x.device):
            self.graph.replay()
        return self.result


class restored:
    """A context after which tensors hold what they held before; `copies` are those values."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = [tensor.detach() for tensor in tensors]
        self.copies = [tensor.clone() for tensor in self.tensors]

    def __enter__(self) -> "restored":
        return self

    def __exit__(self, *error: object) -> None:
        for tensor, copy in zip(self.tensors, self.copies, strict=True):
            tensor.copy_(copy)
