"""Files that appear whole or not at all."""

import errno
import json
import os
import re
import socket
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

if TYPE_CHECKING:  # whoever has tensors to write has imported torch
    from torch import Tensor

_UMASK = os.umask(0)  # the only way to read the umask is to set it
os.umask(_UMASK)


def _process_numbers() -> str:
    """What gives processes their numbers: the machine, or a container on it."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


_HOST = f"{zlib.crc32(_process_numbers().encode()):08x}"
_TEMPORARY = re.compile(rf"\..*-{_HOST}-(\d+)-\w{{8}}(\..*)?")
"""A temporary file of this machine, with the process that writes it."""


@contextmanager
def whole_file(path: Path, *, replaces: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside `path`. When the block ends without an error, that file replaces `path`; or, unless it
    `replaces`, it becomes `path` only if no other process was faster.

    The content reaches the disk before the rename, so a killed process or a power cut leaves the old file or the new one,
    never a part. If the block raises (full disk, interrupt), the temporary file is removed and `path` is untouched.
    Missing parent folders are made.

    Raises OSError that names `path` if the block, whatever writes there, or the system fails to write.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The suffix is kept because numpy and others append theirs to a name that lacks it.
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem[:40]}-{_HOST}-{os.getpid()}-", suffix=path.suffix
        )
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_UMASK)  # mkstemp makes files that only their owner can read
        if replaces or not _linked(temporary, path):
            os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if (failure := _failure(error, path, temporary)) is not None:
            raise failure from error
        raise
    if hasattr(os, "O_DIRECTORY"):  # flushes the rename itself, which Windows neither allows nor needs
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _linked(temporary: Path, path: Path) -> bool:
    """Renames a file, or removes it if `path` exists. False if the file system has no hard links, which do so in one go."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:
        return False
    temporary.unlink()
    return True


def _failure(error: BaseException, path: Path, temporary: Path) -> OSError | None:
    """The OSError that names `path` for an error of the system that names nothing, or only the temporary file.

    safetensors wraps the system's error in its own, and numpy reports a short write without a number.
    """
    if isinstance(error, SafetensorError) and (found := re.search(r"os error (\d+)|Os \{ code: (\d+)", str(error))):
        number = int(found[1] or found[2])
        return OSError(number, os.strerror(number), str(path))
    if isinstance(error, OSError) and error.filename in (None, str(temporary), temporary):
        return OSError(error.errno or errno.EIO, error.strerror or str(error), str(path))
    return None


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that killed processes of this machine left in a folder."""
    for path in folder.glob(".*"):
        found = _TEMPORARY.fullmatch(path.name)
        if found and not _is_running(int(found[1])):
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to somebody else
        pass
    return True


def write_safetensors(tensors: "dict[str, Tensor]", path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all, whose bytes depend only on its content.
    The library writes the metadata in an order that changes from call to call; here it is sorted."""
    from safetensors.torch import save_file

    with whole_file(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        with open(temporary, "rb+") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
            if len(text) == size:  # as long as json and the library escape alike
                file.seek(8)
                file.write(text)
