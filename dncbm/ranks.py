"""The processes of one command, as torchrun starts them on one or several machines."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from dncbm.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One process among those of its command."""

    rank: int = 0
    size: int = 1

    def first_makes(self, make: Callable[[], T]) -> T:
        """What `make` returns in the process of rank 0, in every process; none goes on before."""
        if self.size == 1:
            return make()
        made = [make() if self.rank == 0 else None]
        _or_leave(lambda: distributed.broadcast_object_list(made))
        return made[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            _or_leave(distributed.barrier)

    def share_of(self, items: list[T]) -> list[T]:
        """Every n-th item, beginning at the rank's own."""
        return items[self.rank :: self.size]


ALONE = Ranks()


def world_size() -> int:
    """Number of processes that torchrun started for this command."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process among those that torchrun started, told from its environment variables; without them, alone.

    The processes exchange a few short messages and no tensors, so they always talk over gloo: NCCL would want a GPU of its own
    for each, and take one that waits ten minutes for a slower one for dead.

    Raises:
        UserError: the processes do not reach each other.
    """
    size = world_size()
    if size == 1:
        yield ALONE
        return
    try:
        distributed.init_process_group("gloo", timeout=timedelta(days=30))  # one may have much more to do
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the processes of this run do not reach each other: {reason}; start them with torchrun"
        ) from error
    try:
        yield Ranks(distributed.get_rank(), size)
    except UserError:
        print(file=sys.stderr)  # the progress bar of rank 0 has begun a line, and the message is to have its own
        raise
    finally:
        distributed.destroy_process_group()


def device_name(name: str, ranks: Ranks) -> str:
    """`auto` and `cuda` as this process is to take them: a GPU of its own, while there are as many as processes."""
    if ranks.size == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{int(os.environ.get('LOCAL_RANK', ranks.rank)) % torch.cuda.device_count()}"


def _or_leave(communicate: Callable[[], object]) -> None:
    """Communicate; leave in silence where another process is gone, since it, or torchrun, says why."""
    try:
        communicate()
    except RuntimeError as error:
        raise SystemExit(1) from error
