"""The processes of one command, which torchrun starts on one or several machines."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from dncbm.runs.errors import UserError, first_line
from dncbm.runs.manifests import Outcome, Work

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One process among those of its command."""

    rank: int = 0
    size: int = 1

    def first_makes(self, make: Callable[[], T]) -> T:
        """Return in every process what `make` returns in the process of rank 0."""
        if self.size == 1:
            return make()
        from torch import distributed

        made = [make() if self.rank == 0 else None]
        _or_leave(lambda: distributed.broadcast_object_list(made))
        return made[0]  # type: ignore[return-value]

    @contextmanager
    def first(self, making: Callable[[], AbstractContextManager[Work]]) -> Iterator[Work]:
        """Work that rank 0 begins and finishes; the other processes see its outcome and wait for the end."""
        if self.rank == 0:
            with making() as work:
                self.first_makes(lambda: work.outcome)
                yield work
        else:
            yield Work(self.first_makes(lambda: Outcome.RAN))
        self.wait()

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            from torch import distributed

            _or_leave(distributed.barrier)

    def share_of(self, items: list[T]) -> list[T]:
        """Every `size`-th item, starting at the rank."""
        return items[self.rank :: self.size]


ALONE = Ranks()


def world_size() -> int:
    """Number of processes that torchrun started for this command."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that torchrun started, according to its environment variables; without them, work alone.

    The processes exchange a few short messages and no tensors, so they always use gloo: NCCL would need one GPU per process,
    and would give up on a process that waits ten minutes for a slower one.

    Raises UserError if the processes do not reach each other.
    """
    size = world_size()
    if size == 1:
        yield ALONE
        return
    from torch import distributed

    try:
        distributed.init_process_group("gloo", timeout=timedelta(days=30))  # work is unevenly divided
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this run cannot reach each other: {first_line(error)}; start them with torchrun"
        ) from error
    try:
        yield Ranks(distributed.get_rank(), size)
    except UserError:
        print(file=sys.stderr)  # end the line of the progress bar, so that the message has its own
        raise
    finally:
        distributed.destroy_process_group()


def device_name(name: str, ranks: Ranks) -> str:
    """The device of this process for `auto` and `cuda`: a GPU of its own, if there are as many as processes."""
    import torch

    if ranks.size == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{int(os.environ.get('LOCAL_RANK', ranks.rank)) % torch.cuda.device_count()}"


def _or_leave(communicate: Callable[[], object]) -> None:
    """Communicate. If another process has died, exit without a message: that process, or torchrun, prints the reason."""
    try:
        communicate()
    except RuntimeError as error:
        raise SystemExit(1) from error
