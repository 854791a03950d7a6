"""numba's compiler, with a cache that is found on every machine."""

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(**options: Any) -> Callable[[F], F]:
    """A decorator like `numba.njit(nogil=True, cache=True, **options)` that works in a read-only installation too.

    numba keeps compiled code beside the source, or else in the user's home. Where neither can be written, it goes to a
    folder of the user's own among the temporary files. NUMBA_CACHE_DIR names another place.
    """

    def decorate(function: F) -> F:
        compiler = numba.njit(nogil=True, cache=True, **options)
        try:
            return compiler(function)
        except RuntimeError as error:  # "cannot cache function ...: no locator available"
            if "locator" not in str(error):
                raise
        numba.config.CACHE_DIR = str(_temporary_cache())  # type: ignore[attr-defined]
        return compiler(function)

    return decorate


def _temporary_cache() -> Path:
    """A folder that only this user can write: numba runs what it finds there."""
    user = getattr(os, "getuid", os.getpid)()
    folder = Path(tempfile.gettempdir()) / f"numba-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
        if stat.S_ISDIR(about.st_mode) and about.st_uid == user and not about.st_mode & 0o022:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="numba-"))  # compiled again in every process
