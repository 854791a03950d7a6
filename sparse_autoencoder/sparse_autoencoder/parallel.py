"""The processes that train one SAE together: each reads a part of the items, and all hold the same model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # Command lines ask for the number of processes; torch is imported where it is needed.
    from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among those of a training, which all belong to torch's default process group.

    Tensors on a GPU need NCCL in that group, and `agreed` needs gloo: `init_process_group("cpu:gloo,cuda:nccl")` has both.
    Every process must call the same methods in the same order.
    """

    rank: int = 0
    size: int = 1

    def own(self, n_items: int) -> range:
        """The items that this process reads: the rank-th of `size` ranges of almost equal length."""
        return range(n_items * self.rank // self.size, n_items * (self.rank + 1) // self.size)

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its sum over the processes."""
        if self.size > 1:
            from torch import distributed

            for tensor in tensors:
                distributed.all_reduce(tensor)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by that of the first process."""
        if self.size > 1:
            from torch import distributed

            for tensor in tensors:
                distributed.broadcast(tensor, src=0)

    def joined(self, tensor: Tensor) -> Tensor:
        """The processes' tensors, all of one shape, stacked by rank."""
        import torch

        if self.size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        torch.distributed.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def agreed(self, wish: bool) -> bool:
        """Whether any process wishes it: the same answer in all, by a message among hosts."""
        if self.size == 1:
            return wish
        import torch

        votes = torch.tensor(int(wish))
        torch.distributed.all_reduce(votes)
        return bool(votes)


ALONE = Processes()


@dataclass(frozen=True)
class Part:
    """What a process must know of a batch of which it has a part."""

    n_items: int  # in the whole batch
    across: Processes
