"""Who makes an artifact: one process, or the workers of a partition together.

The kernel releases the lock of a process that dies, so none is ever stale.
"""

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dncbm.runs.errors import UserError

ORPHANS_S = 30.0
"""Seconds to wait for a lock whose owner has died: its worker processes hold it until they notice."""
PATIENCE_S = 3600.0
"""Seconds to wait for a turn. Its holder may be hashing what was made, which takes minutes."""
SAID_AFTER_S = 5.0
"""Seconds after which a process says that it waits."""
SHARING = " (a worker of --partition)"
"""What follows the name of a process that shares its lock."""


def lock_path(artifact: Path) -> Path:
    """The hidden file beside an artifact that is locked while it is made."""
    return artifact.with_name(f".{artifact.name[:100]}.lock")


def turn_path(artifact: Path) -> Path:
    """The hidden file that is locked while one of several workers begins or finishes an artifact."""
    return artifact.with_name(f".{artifact.name[:100]}.turn")


@dataclass
class Lock:
    """A lock that is held."""

    artifact: Path
    handle: int | None
    """The locked file; None if there are no locks."""
    is_shared: bool
    is_alone: bool = False
    """Whether a lock that is shared has been taken alone for a while."""

    def take_alone(self) -> None:
        """Hold a shared lock alone until `share_again`. Raises UserError if other workers hold it, too."""
        if self.handle is None or not self.is_shared or self.is_alone:
            return
        if _flock(self.handle, exclusive=True) is False:
            raise UserError(
                f"other workers of --partition are making {self.artifact} from other inputs or settings: wait until they end, "
                "or stop them"
            )
        self.is_alone = True

    def share_again(self) -> None:
        """Let others share the lock again. Raises UserError if a process without --partition was faster."""
        if self.handle is not None and self.is_alone:
            self.is_alone = False
            if _flock(self.handle, exclusive=False) is False:
                raise _refusal(_owner(self.handle), self.artifact)


@contextmanager
def locked(artifact: Path, *, shared: bool = False, patience: float = 0.0) -> Iterator[Lock]:
    """Hold the lock of an artifact. Where the file system has no locks, or nothing can be written, work without one.

    Args:
        artifact: file or folder.
        shared: let others share it that ask for the same.
        patience: seconds to wait for a lock that another process holds.

    Raises UserError, which names the process, if another one holds it.
    """
    path = lock_path(artifact)
    lock = Lock(artifact, _acquired(path, artifact, shared, patience), shared)
    try:
        yield lock
    finally:
        if lock.handle is not None:
            _release(path, lock.handle, is_last=not shared or lock.is_alone)


@contextmanager
def turn(artifact: Path) -> Iterator[None]:
    """Wait until no other worker begins or finishes an artifact, and let none do so during the block."""
    path = turn_path(artifact)
    handle = _acquired(path, artifact, False, PATIENCE_S)
    try:
        yield
    finally:
        if handle is not None:
            _release(path, handle, is_last=True)


def remove_left_locks(artifact: Path) -> None:
    """Remove the lock files that killed processes left. Raises OSError if that is not allowed."""
    for path in (lock_path(artifact), turn_path(artifact)):
        if path.is_file():
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            _release(path, handle, is_last=False)


def _release(path: Path, handle: int, is_last: bool) -> None:
    """Close a lock's file; remove it first if nobody else holds it. Whoever has opened it meanwhile sees that it is gone."""
    try:
        if (is_last or _flock(handle, exclusive=True)) and _is_at(handle, path):
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _acquired(path: Path, artifact: Path, shared: bool, patience: float) -> int | None:
    begun, has_said = time.monotonic(), False
    while True:
        is_new = not path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
                return None
            raise
        is_held = _flock(handle, exclusive=not shared)
        if is_held is None:
            os.close(handle)
            if is_new:
                path.unlink(missing_ok=True)
            return None
        if is_held and _is_at(handle, path):
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}{SHARING if shared else ''}".encode())
            return handle
        owner = _owner(handle)
        os.close(handle)
        if is_held:  # the owner before us removed this file: lock the new one
            continue
        waited = time.monotonic() - begun
        # A worker of a partition is alone only while it begins again or ends.
        soon = _is_dead(owner) or (shared and owner.endswith(SHARING))
        if waited >= (max(patience, ORPHANS_S) if soon else patience):
            raise _refusal(owner, artifact)
        if patience and not has_said and waited > SAID_AFTER_S:
            print(f"waiting for {owner}: {artifact}", flush=True)
            has_said = True
        time.sleep(0.2)


def _flock(handle: int, *, exclusive: bool) -> bool | None:
    """Lock a file unless another process holds it. Returns whether it is locked; None if there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system has none
        return None
    return True


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _owner(handle: int) -> str:
    """What the owner wrote into a lock's file."""
    os.lseek(handle, 0, os.SEEK_SET)
    return os.read(handle, 1000).decode(errors="replace")


def _refusal(owner: str, artifact: Path) -> UserError:
    if owner.endswith(SHARING):
        who, what = "workers of --partition are", "wait until they end, stop them, or join them with --partition"
    elif owner and _is_dead(owner):
        who, what = f"processes that {owner} left behind are", "wait until they end, or stop them"
    else:
        who, what = f"{owner or 'another process'} is", "wait until it ends, or stop it"
    return UserError(f"{who} making {artifact}: {what}")


def _is_dead(owner: str) -> bool:
    """Whether the process that wrote its name into a lock has ended, as far as this machine knows."""
    words = owner.removesuffix(SHARING).split()
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
