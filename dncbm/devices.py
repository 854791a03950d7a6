"""Which device the work runs on."""

import ctypes

import torch

from dncbm.errors import UserError


def resolve_device(name: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu, whichever is there first; any other name is taken as it is.

    Raises:
        UserError: torch knows no such device, or it is not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here: {reason}; use auto, cpu, cuda or mps") from error
    return device


def keep_freed_memory() -> None:
    """Tell the C library to reuse large freed blocks instead of returning each to the kernel.

    A network on a CPU allocates and frees the same large activations for every batch. By default glibc maps and unmaps them
    each time, and the page faults cost more than the arithmetic. No effect where the C library is another.
    """
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 1 << 30)
