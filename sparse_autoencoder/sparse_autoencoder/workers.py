"""Threads that share out a step: each runs torch and compiled loops on one core, and takes the next piece when free."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """A pool of `n_threads` threads, in each of which torch uses one core.

    A piece that one thread computes alone gives the same bits whichever thread that is. There is no second pool of threads
    that spins while torch's own works, and little is lost when another program takes a core for a while.
    """

    def __init__(self, n_threads: int) -> None:
        self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="sparse_step")
        own = torch.get_num_threads()
        ready = threading.Barrier(n_threads + 1)

        def start() -> None:
            torch.set_num_threads(1)  # of this thread; but threads that start later would take it for their own, so ...
            ready.wait()

        for _ in range(n_threads):
            self._pool.submit(start)
        ready.wait()
        torch.set_num_threads(own)  # ... it is set back once all are up

    def submit(self, function: Callable[[], R]) -> "Future[R]":
        """Starts a piece of work."""
        return self._pool.submit(function)

    def map(self, function: Callable[[T], R], pieces: Iterable[T]) -> list[R]:
        """The results in the order of the pieces; the first error is raised once the pieces before it are done."""
        return list(self._pool.map(function, pieces))

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
