"""Threads that share the work of a step. Each runs torch and compiled loops on one core."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """A pool of `n_threads` threads, in each of which torch uses one core.

    Each piece of work is computed by one thread, so its bits do not depend on the number of threads. A thread that finishes
    takes the next piece, so little time is lost when another program occupies a core.
    """

    def __init__(self, n_threads: int) -> None:
        self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="sparse_step")
        own = torch.get_num_threads()
        ready = threading.Barrier(n_threads + 1)

        def start() -> None:
            torch.get_num_threads()  # torch sets each thread's number when that thread first asks; later it would undo this:
            torch.set_num_threads(1)  # for this thread, but threads that start later inherit it, so ...
            ready.wait()

        for _ in range(n_threads):
            self._pool.submit(start)
        ready.wait()
        torch.set_num_threads(own)  # ... the caller resets it once all have started

    def submit(self, function: Callable[[], R]) -> "Future[R]":
        """Starts a piece of work."""
        return self._pool.submit(function)

    def map(self, function: Callable[[T], R], pieces: Iterable[T]) -> list[R]:
        """The results of all pieces, in order. The first error is raised once the pieces before it are done."""
        return list(self._pool.map(function, pieces))

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
