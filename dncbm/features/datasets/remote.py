"""Shards that are not local files: at an address (https, http), or the output of a command (`pipe:`).

A shard is fetched whole into a temporary file and read from there, so that a tar is the same wherever it comes from. Nothing
stays open between two calls: shards are sent to the processes that decode them.
"""

import email.utils
import http
import http.client
import os
import re
import shutil
import ssl
import subprocess
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedReader, FileIO
from typing import BinaryIO, TypeVar
from urllib.parse import quote, urlsplit

from dncbm.runs.errors import UserError, first_line
from dncbm.runs.manifests import text_hash

TRIES = 5
"""How often something is tried without progress."""
BACKOFF = 1.0
"""Seconds before the second try; they double with every further one."""
LONGEST_WAIT = 120.0
"""Seconds that a server may ask to wait before the next try."""
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as lost."""
N_ASKING = 16
"""Threads that ask servers for shards."""
PIECE = 1 << 20
"""Bytes that are read at a time."""
END = 2 * tarfile.BLOCKSIZE
"""Bytes of zeros that end every tar."""
PASSING = (408, 425, 429)
"""Refusals that pass. Others below 500 do not."""
RUN_AGAIN = "run the same command again, which keeps finished shards"

T = TypeVar("T")


@dataclass(frozen=True)
class Url:
    """A shard at an address, as the server described it when it was asked first."""

    url: str
    size: int | None = None
    """Bytes; None if the server does not say."""
    etag: str = ""
    modified: str = ""
    """The header Last-Modified."""

    def __str__(self) -> str:
        return shown(self.url)

    def state(self) -> str:
        """Address, size and version. Where both are unknown, a hash of the query, which can be all that tells shards apart."""
        version = self.etag.removeprefix("W/") or self.modified
        if self.size is None and not version and (query := urlsplit(self.url).query):
            version = text_hash([query])[:16]
        return f"{self} {self.size} {version}"

    def fetch(self, file: FileIO) -> None:
        """Write the shard into an empty file. A connection that drops is taken up where it ended, if the server can do that.

        Raises UserError if the server refuses it or has another version by now, the connection drops TRIES times without
        progress, or the file cannot be written.
        """

        def attempt() -> None:
            have = file.tell()
            try:
                with _answer(self.url, self._range_from(have) if have else {}) as answer:
                    self._receive(answer, file, have)
            except _Status as error:
                if error.code == 416:  # the shard ends before: begin again
                    _empty(file)
                    raise _Failed(f"the server has no more than {have} of {self.size or 'its'} bytes") from error
                raise

        _repeated(str(self), attempt, file.tell)

    def _range_from(self, first: int) -> dict[str, str]:
        same = self.etag if self.etag and not self.etag.startswith("W/") else self.modified
        return {"Range": f"bytes={first}-"} | ({"If-Range": same} if same else {})

    def _receive(self, answer: http.client.HTTPResponse, file: FileIO, have: int) -> None:
        now, start = _described(self.url, answer)
        if difference := self._difference(now):
            raise UserError(
                f"{self} was replaced while the stage ran ({difference}): {RUN_AGAIN}; if the server says so every time, "
                f"write pipe:curl -s -f -L {self}"
            )
        if start != have:
            _empty(file)
            if start:
                raise _Failed("the server sent another part than it was asked for")
        size = self.size if now.size is None else now.size
        while size is None or file.tell() < size:
            if not (piece := answer.read1(PIECE)):
                break
            _write(file, piece)
        if size is not None and file.tell() < size:
            raise _Failed(f"the connection ended after {file.tell()} of {size} bytes")
        if size is None and not answer.chunked and not _ends_as_tar(file):  # http.client notices if a chunk is missing
            raise _Failed(f"the connection ended after {file.tell()} bytes, before the tar did")

    def _difference(self, now: "Url") -> str:
        """How the shard differs from what it was; empty if nothing shows that it does."""
        if None not in (self.size, now.size) and self.size != now.size:
            return f"{self.size} bytes, now {now.size}"
        if self.etag and now.etag:
            was, is_now = (tag.removeprefix("W/") for tag in (self.etag, now.etag))
            return "" if was == is_now else f"ETag {was}, now {is_now}"
        if self.modified and now.modified and self.modified != now.modified:
            return f"Last-Modified {self.modified}, now {now.modified}"
        return ""


@dataclass(frozen=True)
class Pipe:
    """A shard that a shell command writes to its standard output."""

    command: str

    def __str__(self) -> str:
        return f"pipe:{' '.join(self.command.split())}"

    @property
    def size(self) -> None:
        """The size is not known."""

    def state(self) -> str:
        """The command: nothing else is known of it."""
        return f"pipe:{self.command}"

    def fetch(self, file: FileIO) -> None:
        """Write the command's output into an empty file.

        Raises UserError if the command fails TRIES times, or the file cannot be written.
        """

        def attempt() -> None:
            _empty(file)
            with tempfile.TemporaryFile() as said:
                arguments = ["/bin/sh", "-c", _WATCHED, "sh", *_shell(), self.command]
                pipe = subprocess.PIPE
                with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=said, start_new_session=True) as process:
                    assert process.stdout is not None
                    while piece := process.stdout.read(PIECE):
                        _write(file, piece)
                    process.wait()
                if process.returncode:
                    reason = f"the command ended with {_ending(process.returncode)}{_last_line(said)}"
                    raise (_Refused if process.returncode in (126, 127) else _Failed)(reason)

        _repeated(str(self), attempt)


Remote = Url | Pipe


_WATCHED = 'exec 3<&0 </dev/null; { read -r line <&3; kill -KILL 0; } >/dev/null 2>&1 & exec 3<&- "$@"'
"""Runs a command beside a watcher, which kills the command and its children when the standard input of both is closed: after
an exception, or however the process that reads ends. (No signal handler can answer SIGKILL.)"""


def _shell() -> list[str]:
    """A shell in which a command fails if a part of its pipe does, and which leaves braces alone."""
    bash = shutil.which("bash")
    return [bash, "+B", "-o", "pipefail", "-c"] if bash else ["/bin/sh", "-c"]


def _ending(code: int) -> str:
    return f"status {code}" if code > 0 else f"signal {-code}"


def _last_line(said: BinaryIO) -> str:
    """The last line that a command wrote to its standard error."""
    said.seek(-min(4096, said.seek(0, os.SEEK_END)), os.SEEK_END)
    lines = [line.strip() for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    return f": {''.join(filter(str.isprintable, lines[-1]))[:200]}" if lines else ""


@contextmanager
def fetched(shard: Remote) -> Iterator[BinaryIO]:
    """A temporary file with a shard, in the folder that TMPDIR names. It has no name, so that nothing of it can stay.

    Raises UserError if the shard cannot be fetched, or the file cannot be written.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile(buffering=0))  # closing a buffer can fail for want of room
        except OSError as error:
            raise _no_room(error) from error
        shard.fetch(file)
        file.seek(0)
        yield BufferedReader(file)


def _write(file: FileIO, piece: bytes) -> None:
    rest = memoryview(piece)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise _no_room(error) from error


def _no_room(error: OSError) -> UserError:
    return UserError(
        f"cannot write a temporary file in {tempfile.tempdir or '/tmp'}: {error.strerror}; every process that decodes needs "
        "room for a shard: set the environment variable TMPDIR to a folder with more, or pass fewer --num_workers"
    )


def _ends_as_tar(file: FileIO) -> bool:
    """Whether what was written ends with zeros, as every tar does."""
    file.seek(max(0, file.tell() - END))
    return file.read(END) == bytes(END)


def _empty(file: FileIO) -> None:
    file.seek(0)
    file.truncate()


# ------------------------------------------------------------------------------------------------------- what is there


@dataclass(frozen=True)
class Answer:
    """What a server says of an address."""

    url: str
    shard: Url | None
    """None if there is nothing."""
    header: bytes = b""
    """The first block of the shard."""


def asked(urls: Iterable[str]) -> Iterator[Answer]:
    """Ask servers for the first block of shards, some at a time; the answers in the order of the addresses.

    This costs as much as asking whether they exist, and tells a web page from a tar.

    Raises UserError as soon as a server refuses an address, or does not answer after TRIES tries.
    """
    pool, stop = ThreadPoolExecutor(N_ASKING), threading.Event()
    coming: deque[Future[Answer]] = deque()
    try:
        for url in urls:
            coming.append(pool.submit(_ask, url, stop))
            if len(coming) > 2 * N_ASKING:
                yield _next(coming)
        while coming:
            yield _next(coming)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _next(coming: deque[Future[Answer]]) -> Answer:
    """The first answer. Raises the error of any other that fails before it comes."""
    while not coming[0].done():
        wait([future for future in coming if not future.done()], return_when=FIRST_COMPLETED)
        for future in coming:
            if future.done():
                future.result()
    return coming.popleft().result()


def _ask(url: str, stop: threading.Event) -> Answer:
    def pause(seconds: float) -> None:
        if stop.wait(seconds):
            raise CancelledError

    def attempt() -> Answer:
        try:
            with _answer(url, {"Range": f"bytes=0-{tarfile.BLOCKSIZE - 1}"}) as answer:
                shard, _ = _described(url, answer)
                header = b""
                while len(header) < tarfile.BLOCKSIZE and (piece := answer.read1(tarfile.BLOCKSIZE - len(header))):
                    header += piece
        except _Status as error:
            if error.code in (404, 410):
                return Answer(url, None)
            if error.code == 416:  # not even a first byte
                return Answer(url, Url(url, 0))
            raise
        if shard.size is not None and len(header) < min(tarfile.BLOCKSIZE, shard.size):
            raise _Failed(f"the connection ended after {len(header)} bytes")
        return Answer(url, shard, header)

    return _repeated(shown(url), attempt, pause=pause)


def shown(url: str) -> str:
    """An address for messages and records: without user, password, query and fragment, which may hold a token."""
    return re.sub(r"(?<=://)[^/]*@", "", re.split(r"[?#]", url, maxsplit=1)[0])


def checked(url: str) -> str:
    """An address that can be asked for. Raises ValueError, without its query, if it is malformed."""
    try:
        parts = urlsplit(url)
        (parts.hostname or "").encode("idna")  # raises UnicodeError if a label is empty or too long
        is_sound = parts.port != 0 and bool(re.fullmatch(r"[\w.:-]+", parts.hostname or "", re.ASCII))
    except ValueError:
        is_sound = False
    if not is_sound:
        raise ValueError(f"{shown(url)} is no address: write https://HOST/PATH.tar")
    if parts.username is not None:
        raise ValueError(
            "an address must not hold a user or a password: write pipe:curl -s -f -L --netrc https://HOST/PATH.tar"
        )
    if "*" in parts.path:
        raise ValueError("servers do not list their files, so that globs match local files only: write braces")
    return quote(url, safe="%/:=&?~#+!$,;'@()*[]")


# ------------------------------------------------------------------------------------------------------------- trying


class _Failed(Exception):
    """A try that failed, and may succeed later."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait
        """Seconds to wait, if the server says so."""


class _Refused(Exception):
    """A try that would fail again."""


class _Status(_Refused):
    """A permanent refusal by a server."""

    def __init__(self, code: int) -> None:
        token = "; it asks for a login: a token can be passed as docs/DATA.md shows" if code in (401, 403) else ""
        super().__init__(f"the server answers {_named(code)}{token}")
        self.code = code


def _named(code: int) -> str:
    return f"{code} {http.client.responses.get(code, '')}".strip()


def _repeated(
    what: str,
    attempt: Callable[[], T],
    progress: Callable[[], int] = lambda: 0,
    pause: Callable[[float], None] = lambda seconds: time.sleep(seconds),
) -> T:
    """Try until an attempt succeeds, is refused for good, or fails TRIES times in a row without more `progress` than ever."""
    n_tries = n_vain = furthest = 0
    while True:
        try:
            return attempt()
        except _Refused as error:
            raise UserError(f"cannot read {what}: {error}; once it can be read, {RUN_AGAIN}") from error
        except _Failed as error:
            n_tries += 1
            n_vain = 1 if progress() > furthest else n_vain + 1
            furthest = max(furthest, progress())
            if n_vain == TRIES:
                raise UserError(f"cannot read {what}: {error} (tried {n_tries} times); {RUN_AGAIN}") from error
            pause(BACKOFF * 2 ** (n_vain - 1) if error.wait is None else min(error.wait, LONGEST_WAIT))


@contextmanager
def _answer(url: str, headers: Mapping[str, str]) -> Iterator[http.client.HTTPResponse]:
    """The answer of a server. Raises _Status if it refuses for good, _Failed if that or the connection in the block fails."""
    request = urllib.request.Request(url, headers={"User-Agent": "dncbm", **headers})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        error.close()
        if error.code < 500 and error.code not in PASSING:
            raise _Status(error.code) from error
        raise _Failed(f"the server answers {_named(error.code)}", _seconds(error.headers.get("Retry-After"))) from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a redirect to a malformed address
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise _Refused(f"the server's certificate is not valid: {cause.verify_message}") from error
        if isinstance(cause, OSError):
            raise _Failed(cause.strerror or first_line(cause)) from error
        # Not the message, which can hold an address with its token.
        raise _Failed(f"the connection failed ({cause if isinstance(cause, str) else type(error).__name__})") from error


def _seconds(retry_after: str | None) -> float | None:
    """The seconds of the header Retry-After, which holds a number or a date."""
    if retry_after is None:
        return None
    if re.fullmatch(r"\s*\d{1,9}\s*", retry_after, re.ASCII):
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _described(url: str, answer: http.client.HTTPResponse) -> tuple[Url, int]:
    """The shard that an answer is about, and at which of its bytes the answer begins."""
    headers = answer.headers
    length = headers.get("Content-Length", "")
    size = int(length) if re.fullmatch(r"\d{1,18}", length, re.ASCII) else None
    start = 0
    if answer.status == http.HTTPStatus.PARTIAL_CONTENT:
        part = re.fullmatch(r"bytes (\d{1,18})-\d+/(\d{1,18}|\*)", headers.get("Content-Range", "").strip(), re.ASCII)
        if not part:
            raise _Failed("the server sent a part without saying which")
        start, size = int(part[1]), None if part[2] == "*" else int(part[2])
    return Url(url, size, headers.get("ETag", ""), headers.get("Last-Modified", "")), start
