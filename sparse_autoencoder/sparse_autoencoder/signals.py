"""Signals that ask a long loop to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Stop:
    """Whether a loop was asked to stop: call it between two pieces of work."""

    by: signal.Signals | None = None  # the first signal that arrived

    def __call__(self) -> bool:
        return self.by is not None


@contextmanager
def stopping() -> Iterator[Stop]:
    """In this block, SIGTERM and the first SIGINT (Ctrl-C) ask to stop instead of ending the process.

    A second SIGINT raises KeyboardInterrupt at once, as always. A signal that the process ignores stays ignored (SIGINT in a
    job that a script started in the background). In threads other than the main one, nothing is ever asked.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _: Any) -> None:
        stop.by = stop.by or signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    asking = [one for one in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(one) is not signal.SIG_IGN]
    before = {one: signal.signal(one, ask) for one in asking}
    try:
        yield stop
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
