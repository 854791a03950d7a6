"""The processes of one command, which torchrun starts on one or several machines."""

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TypeVar

from dncbm.runs.errors import UserError, first_line
from dncbm.runs.manifests import Outcome, Work
from sparse_autoencoder.parallel import Processes

T = TypeVar("T")


class Ranks(Processes):
    """One process among those of its command."""

    def first_makes(self, make: Callable[[], T]) -> T:
        """Return in every process what `make` returns in the process of rank 0."""
        if self.size == 1:
            return make()
        from torch import distributed

        made = [make() if self.rank == 0 else None]
        _or_leave(lambda: distributed.broadcast_object_list(made))
        return made[0]  # type: ignore[return-value]

    def after_first(self, make: Callable[[], T]) -> T:
        """Return what `make` returns in this process. Rank 0 calls it before the others, so that it fails once for all."""
        if self.rank == 0:
            made = make()
            self.wait()
            return made
        self.wait()
        return make()

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
            _or_leave(lambda: self.agreed(False))

    def share_of(self, items: list[T]) -> list[T]:
        """Every `size`-th item, starting at the rank."""
        return items[self.rank :: self.size]

    def titled(self, title: str) -> str:
        """The title of a progress bar, which shows the share of rank 0."""
        return title if self.size == 1 else f"{title} (process 1 of {self.size})"


ALONE = Ranks()


def world_size() -> int:
    """Number of processes that torchrun started for this command."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that torchrun started, according to its environment variables; without them, work alone. A block
    within such a block joins the same processes.

    Messages and tensors of the CPU go through gloo, tensors of GPUs through NCCL, which needs a GPU for each process.

    Raises UserError if the processes do not reach each other.
    """
    size = world_size()
    if size == 1:
        yield ALONE
        return
    import torch
    from torch import distributed

    if distributed.is_initialized():
        yield Ranks(distributed.get_rank(), size)
        return
    try:
        backend = "cpu:gloo,cuda:nccl" if distributed.is_nccl_available() and torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(days=30))  # work is unevenly divided
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this run cannot reach each other: {first_line(error)}; start them with torchrun"
        ) from error
    try:
        yield Ranks(distributed.get_rank(), size)
    except BaseException as error:
        if isinstance(error, UserError):
            print(file=sys.stderr)  # end the line of the progress bar, so that the message has its own
        if "nccl" in backend:
            atexit.register(_exit_at_once)
        else:
            distributed.destroy_process_group()
        raise
    distributed.destroy_process_group()


def _exit_at_once() -> None:
    """Exits without ending NCCL's communicators: that would wait for the other processes, which wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def device_name(name: str, ranks: Ranks) -> str:
    """The device of this process for `auto` and `cuda`: a GPU of its own, if there are as many as processes."""
    import torch

    if ranks.size == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{int(os.environ.get('LOCAL_RANK', ranks.rank)) % torch.cuda.device_count()}"


def own_gpu(name: str, ranks: Ranks) -> str:
    """`device_name` for processes that exchange tensors, which on GPUs must not share one.
    Raises UserError if this machine has fewer GPUs than processes."""
    import torch

    found = device_name(name, ranks)
    n_here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    if ranks.size > 1 and name.startswith("cuda:"):
        raise UserError(f"processes that train together need a GPU each: pass --device cuda, not {name}")
    if found.startswith("cuda:") and ranks.size > 1 and n_here > torch.cuda.device_count():
        raise UserError(
            f"{n_here} processes that train together need a GPU each, and this machine has {torch.cuda.device_count()}: "
            "lower torchrun's --nproc_per_node"
        )
    return found


@contextmanager
def leaving_if_alone(ranks: Ranks) -> Iterator[None]:
    """If another process dies while tensors are exchanged, exits without a message: that process, or torchrun, prints the
    reason."""
    try:
        yield
    except RuntimeError as error:
        from torch.distributed import DistError

        if ranks.size > 1 and (isinstance(error, DistError) or "gloo" in str(error)):
            raise SystemExit(1) from error
        raise


def _or_leave(communicate: Callable[[], object]) -> None:
    """Communicate. If another process has died, exit without a message: that process, or torchrun, prints the reason."""
    try:
        communicate()
    except RuntimeError as error:
        raise SystemExit(1) from error
