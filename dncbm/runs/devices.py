"""Devices, cores and memory of this machine."""

import ctypes
import os
from typing import TYPE_CHECKING

from dncbm.runs.errors import UserError, first_line

if TYPE_CHECKING:
    import torch


def resolve_device(name: str) -> "torch.device":
    """The device of a name; `auto` is the first available of cuda, mps and cpu.

    A GPU becomes the current one of this process. Otherwise, pinned memory would take up the first GPU, too.

    Raises UserError if there is no such device, or this machine lacks it.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):  # meta, for one, computes nothing
            raise RuntimeError("nothing is computed there")
        torch.empty(1, device=device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)[:200]
        raise UserError(f"--device {name} is not available: {reason}; use auto, cpu, cuda or mps") from error
    return device


def widest_float(device: "torch.device") -> "torch.dtype":
    """The widest type of numbers that a device computes with; mps has no float64."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def keep_freed_memory() -> None:
    """Tell glibc to reuse large freed blocks instead of returning them to the kernel; other C libraries are left alone.

    A network on a CPU allocates and frees the same large activations for every batch. By default glibc maps and unmaps them
    each time, and the page faults cost more than the arithmetic.
    """
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 1 << 30)


def default_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(on_gpu: bool) -> int:
    """Number of workers that decode images, at most 16: one per core of this process's share, or half as many if the encoder
    needs cores, too."""
    cores = default_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(16, cores if on_gpu else cores // 2))
