"""One process at a time makes an artifact. The kernel releases the lock of a process that dies, so none is ever stale."""

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dncbm.runs.errors import UserError

ORPHANS_S = 30.0
"""Worker processes of a killed process hold its lock until they notice; this long a lock without its owner is waited for."""


def lock_path(artifact: Path) -> Path:
    """The hidden file beside an artifact that is locked while it is made."""
    return artifact.with_name(f".{artifact.name[:100]}.lock")


@contextmanager
def locked(artifact: Path) -> Iterator[None]:
    """Hold the lock of an artifact. Where the file system has no locks, or nothing can be written, work without one.

    Raises UserError, which names the process, if another one holds it.
    """
    path = lock_path(artifact)
    handle = _acquired(path, artifact)
    try:
        yield
    finally:
        if handle is not None:
            try:
                path.unlink(missing_ok=True)  # while the lock is held: whoever opened this file sees that it is gone
            finally:
                os.close(handle)


def _acquired(path: Path, artifact: Path) -> int | None:
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    deadline = time.monotonic() + ORPHANS_S
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
                return None
            raise
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 1000).decode(errors="replace")
            os.close(handle)
            if _is_dead(owner) and time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            raise UserError(f"{owner or 'another process'} is making {artifact}: wait until it ends, or stop it") from None
        except OSError:  # no locks on this file system
            os.close(handle)
            return None
        try:
            same = os.path.samestat(os.fstat(handle), os.stat(path))
        except FileNotFoundError:
            same = False
        if same:
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return handle
        os.close(handle)  # the owner before us removed this file: lock the new one


def _is_dead(owner: str) -> bool:
    """Whether the process that wrote its name into a lock has ended, as far as this machine knows."""
    words = owner.split()
    if len(words) != 4 or not words[1].isdigit():
        return True  # it has only just opened the file
    if words[3] != socket.gethostname():
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
