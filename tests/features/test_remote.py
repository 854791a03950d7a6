"""Shards at an address or from a command: whole whatever drops, refused in one line, and read as local ones."""

import email.utils
import gzip
import logging
import multiprocessing
import os
import re
import resource
import select
import shlex
import signal
import socket
import struct
import tarfile
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from dncbm.features.datasets import remote
from dncbm.features.datasets.remote import Pipe, Url, asked, checked, fetched
from dncbm.features.datasets.sae import WebdatasetShards, sae_images
from dncbm.features.stage import open_features, save_sae_features
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, Extraction, SAEFeatures
from dncbm.runs.errors import StaleArtifact, UserError
from dncbm.runs.manifests import Outcome
from dncbm.runs.settings import Settings

# ---------------------------------------------------------------------------------------------- a server that can fail


@dataclass
class Fault:
    """What goes wrong with one answer."""

    status: int = 0
    """Instead of the file."""
    headers: Mapping[str, str] = field(default_factory=dict)
    drops_after: int | None = None
    """Bytes of the body after which the connection ends."""
    resets: bool = False
    """Whether it ends with a reset."""
    seconds: float = 0
    """Before the answer."""


@dataclass
class Served:
    """A file of the server."""

    content: bytes
    etag: str = '"1"'
    modified: str = ""
    knows_ranges: bool = True
    block: int = 1
    """Ranges begin with a multiple of it, whatever was asked for."""
    framing: str = "length"
    """How a whole answer tells where it ends: `length`, `chunks`, or `nothing`."""
    claims: int = 0
    """Bytes that it says to have beyond those it has."""
    faults: list[Fault] = field(default_factory=list)
    always: Fault | None = None


class Server(ThreadingHTTPServer):
    """Serves `files`, and notes what was asked: path, Range, If-Range."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, Served] = {}
        self.seen: list[tuple[str, str | None, str | None]] = []

    def handle_error(self, *_: object) -> None:
        """A client that has gone is none."""

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def shard(self, path: str, served: Served) -> Url:
        """Put a file there, and ask for it."""
        faults, served.faults = served.faults, []
        always, served.always = served.always, None
        self.files[path] = served
        (answer,) = asked([self.url(path)])
        assert answer.shard
        self.seen.clear()
        served.faults, served.always = faults, always
        return answer.shard

    def fetches(self) -> Counter[str]:
        """How often the shards were asked for, apart from their first block."""
        return Counter(path for path, part, _ in self.seen if part != "bytes=0-511")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path, asked_part, same = self.path.partition("?")[0], self.headers["Range"], self.headers["If-Range"]
        self.server.seen.append((path, asked_part, same))
        served = self.server.files.get(path)
        fault = (served.faults.pop(0) if served.faults else served.always or Fault()) if served else Fault(404)
        time.sleep(fault.seconds)
        start, end, status, headers = 0, None, fault.status or 200, dict(fault.headers)
        body = b"sorry"
        if served and not fault.status:
            headers |= {"ETag": served.etag} if served.etag else {}
            headers |= {"Last-Modified": served.modified} if served.modified else {}
            total = len(served.content) + served.claims
            if asked_part and served.knows_ranges and same in (None, served.etag, served.modified):
                first, _, last = asked_part.removeprefix("bytes=").partition("-")
                start, end, status = int(first) // served.block * served.block, int(last) + 1 if last else None, 206
                headers["Content-Range"] = f"bytes {start}-{min(end or total, total) - 1}/{total}"
            body = served.content[start:end]
            if status == 206 and not body:
                status, headers = 416, {"Content-Range": f"bytes */{total}"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        framing = served.framing if served and status == 200 else "length"
        claims = served.claims if served and status in (200, 206) and end is None else 0
        self.close_connection = bool(claims) or framing == "nothing"
        if framing == "length":
            self.send_header("Content-Length", str(len(body) + claims))
        if framing == "chunks":
            self.send_header("Transfer-Encoding", "chunked")
            body = b"".join(b"%x\r\n%s\r\n" % (len(body[i : i + 99]), body[i : i + 99]) for i in range(0, len(body), 99))
            body += b"0\r\n\r\n"
        self.end_headers()
        self.wfile.write(body[: fault.drops_after])
        if fault.drops_after is not None:
            self.close_connection = True
            if fault.resets:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "BACKOFF", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as started:
        yield started


def content_of(shard: Url | Pipe) -> bytes:
    with fetched(shard) as file:
        return file.read()


CONTENT = np.random.default_rng(0).bytes(30_000)
DATES = [email.utils.formatdate(1e9 + day, usegmt=True) for day in (0, 86_400)]

# ------------------------------------------------------------------------------------------------------------- arrival


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 30_000),
    drops=st.lists(st.tuples(st.integers(0, 32_000), st.booleans()), max_size=4),
    knows_ranges=st.booleans(),
    framing=st.sampled_from(["length", "chunks", "nothing"]),
    etag=st.sampled_from(["", '"1"', 'W/"1"']),
    modified=st.sampled_from(["", DATES[0]]),
)
def test_a_shard_arrives_whole_whatever_drops(
    server: Server, size: int, drops: list[tuple[int, bool]], knows_ranges: bool, framing: str, etag: str, modified: str
) -> None:
    faults = [Fault(drops_after=place, resets=resets) for place, resets in drops]
    end_of_tar = bytes(1024 if framing == "nothing" else 0)  # else nothing tells that it dropped
    content = CONTENT[:size] + b"." + end_of_tar
    served = Served(content, etag, modified, knows_ranges, framing=framing, faults=faults)
    assert content_of(server.shard("/0.tar", served)) == content


@pytest.mark.parametrize(
    ("etag", "modified", "same"),
    [('"1"', "", '"1"'), ('"1"', DATES[0], '"1"'), ('W/"1"', DATES[0], DATES[0]), ('W/"1"', "", None), ("", "", None)],
)
def test_a_connection_is_taken_up_where_it_ended(server: Server, etag: str, modified: str, same: str | None) -> None:
    """More often than something is tried without progress."""
    faults = [Fault(drops_after=1000) for _ in range(2 * remote.TRIES)]
    shard = server.shard("/0.tar", Served(CONTENT, etag, modified, faults=faults))
    assert content_of(shard) == CONTENT
    again = [("/0.tar", f"bytes={n}000-", same) for n in range(1, 2 * remote.TRIES + 1)]
    assert server.seen == [("/0.tar", None, None), *again]


def test_a_server_that_ignores_ranges_may_drop_later_each_time(server: Server) -> None:
    faults = [Fault(drops_after=1000 * n) for n in range(2 * remote.TRIES)]
    shard = server.shard("/0.tar", Served(CONTENT, knows_ranges=False, faults=faults))
    assert content_of(shard) == CONTENT


def test_another_part_than_was_asked_for_is_not_appended(server: Server) -> None:
    faults = [Fault(drops_after=1000), Fault(), Fault(drops_after=1024)]
    assert content_of(server.shard("/0.tar", Served(CONTENT, block=512, faults=faults))) == CONTENT
    assert [part for _, part, _ in server.seen] == [None, "bytes=1000-", None, "bytes=1024-"]


@pytest.mark.parametrize(
    ("answer", "waits"),
    [
        ({"Retry-After": "0"}, [0.0]), ({"Retry-After": " 7 "}, [7.0]), ({"Retry-After": "86400"}, [remote.LONGEST_WAIT]),
        ({"Retry-After": DATES[0]}, [0.0]), ({"Retry-After": "soon"}, [3.0]), ({}, [3.0]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("status", [429, 503])
def test_a_server_may_say_when_to_ask_again(
    server: Server, monkeypatch, status: int, answer: dict[str, str], waits: list[float]
) -> None:
    shard = server.shard("/0.tar", Served(CONTENT, faults=[Fault(status, answer)]))
    waited: list[float] = []
    monkeypatch.setattr(remote, "BACKOFF", 3.0)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: seconds and waited.append(seconds))
    assert content_of(shard) == CONTENT
    assert waited == [wait for wait in waits if wait]


def test_waits_double_until_there_is_progress(server: Server, monkeypatch, refusal) -> None:
    faults = [*[Fault(500)] * 3, Fault(drops_after=10), *[Fault(502)] * 4]
    shard = server.shard("/0.tar", Served(CONTENT, faults=faults))
    waited: list[float] = []
    monkeypatch.setattr(remote, "BACKOFF", 1.0)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: seconds and waited.append(seconds))
    with refusal("502 Bad Gateway", "tried 8 times"):
        content_of(shard)
    assert waited == [1, 2, 4, 1, 2, 4, 8]


@pytest.mark.parametrize(
    ("now", "difference"),
    [
        (Served(CONTENT[::-1], '"2"'), 'ETag "1", now "2"'),
        (Served(CONTENT[::-1], '"2"', knows_ranges=False), 'ETag "1", now "2"'),
        (Served(CONTENT[:-1], '"1"'), "30000 bytes, now 29999"),
        (Served(CONTENT[:500], '"1"', DATES[0]), "30000 bytes, now 500"),
        (Served(CONTENT[::-1], "", DATES[1]), f"Last-Modified {DATES[0]}, now {DATES[1]}"),
    ],
)
@pytest.mark.parametrize("is_midway", [True, False])
def test_two_versions_of_a_shard_are_not_mixed(
    server: Server, refusal, monkeypatch, now: Served, difference: str, is_midway: bool
) -> None:
    shard = server.shard("/0.tar", Served(CONTENT, modified=DATES[0], faults=[Fault(drops_after=1000)] * is_midway))

    def replace(*_: object) -> None:
        server.files["/0.tar"] = now

    monkeypatch.setattr(remote.time, "sleep", lambda seconds: replace())
    if not is_midway:
        replace()
    with refusal(server.url("/0.tar"), "was replaced while the stage ran", difference, "same command"):
        content_of(shard)


@pytest.mark.parametrize("now", [{"etag": 'W/"1"'}, {"etag": ""}, {"modified": DATES[1]}, {"etag": "", "modified": ""}])
def test_a_server_may_say_less_of_the_same_version(server: Server, now: dict[str, str]) -> None:
    shard = server.shard("/0.tar", Served(CONTENT, '"1"', DATES[0]))
    server.files["/0.tar"] = Served(CONTENT, **{"etag": '"1"', "modified": DATES[0], **now}, faults=[Fault(drops_after=9)])
    assert content_of(shard) == CONTENT


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("served", "n_tries", "parts"),
    [
        *((Served(CONTENT, always=Fault(status)), 1, [f"answers {status}", "docs/DATA.md"]) for status in (401, 403)),
        *((Served(CONTENT, always=Fault(status)), 1, [f"answers {status}"]) for status in (400, 404, 410, 451)),
        *((Served(CONTENT, always=Fault(status)), 5, [f"answers {status}", "5 times"]) for status in (408, 429, 500, 503)),
        (Served(CONTENT, always=Fault(drops_after=0)), 5, ["after 0 of 30000 bytes", "5 times"]),
        (Served(CONTENT, always=Fault(drops_after=0, resets=True)), 5, ["5 times"]),
        (Served(CONTENT, claims=9, knows_ranges=False), 5, ["after 30000 of 30009 bytes", "5 times"]),
        (Served(CONTENT, claims=9), None, ["30000 of 30009 bytes", "times"]),
        (Served(CONTENT, knows_ranges=False, always=Fault(drops_after=10)), 5, ["after 10 of 30000 bytes"]),
        (Served(CONTENT, always=Fault(seconds=1)), 5, ["timed out", "5 times"]),
        (Served(CONTENT, framing="nothing", knows_ranges=False), 5, ["after 30000 bytes, before the tar did", "5 times"]),
    ],
)  # fmt: skip
def test_the_last_failure_is_one_line_without_the_token(
    server: Server, refusal, monkeypatch, served: Served, n_tries: int | None, parts: list[str]
) -> None:
    served = Served(**vars(served))
    url = server.url("/a/0.tar")
    shard = server.shard("/a/0.tar", served)
    monkeypatch.setattr(remote, "TIMEOUT", 0.05)
    with pytest.raises(UserError) as caught:
        content_of(Url(f"{url}?token=secret#x", shard.size, shard.etag))
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    for part in (f"cannot read {url}: ", *parts, "run the same command again"):
        assert part in str(caught.value)
    assert n_tries in (None, len(server.seen))


def test_a_server_that_does_not_answer_is_named(server: Server, refusal) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/0.tar"
    with refusal(f"cannot read {url}: Connection refused (tried 5 times); run the same command"):
        list(asked([f"{url}?token=secret"] * 3))
    with refusal("cannot read http://no-such-host.invalid/0.tar: ", "tried 5 times"):
        list(asked(["http://no-such-host.invalid/0.tar"]))


def test_a_redirect_is_followed_and_a_loop_is_refused(server: Server, refusal) -> None:
    server.files["/0.tar"] = Served(CONTENT)
    server.files["/moved"] = Served(b"", always=Fault(302, {"Location": "/0.tar?signed=1"}))
    server.files["/loop"] = Served(b"", always=Fault(302, {"Location": "/loop"}))
    (answer,) = asked([server.url("/moved")])
    assert answer.shard == Url(server.url("/moved"), len(CONTENT), '"1"')
    assert content_of(answer.shard) == CONTENT
    with refusal(server.url("/loop"), "answers 302"):
        list(asked([server.url("/loop")]))
    server.files["/wrong"] = Served(b"", always=Fault(302, {"Location": "http://a..b/0.tar?secret"}))
    with refusal(f"cannot read {server.url('/wrong')}: the connection failed (UnicodeError)"):
        list(asked([server.url("/wrong")]))


def test_an_address_may_hold_any_character(server: Server) -> None:
    server.files["/a%20b%c3%bc.tar"] = server.files["/a%20b%C3%BC.tar"] = Served(CONTENT)
    for url in (server.url("/a bü.tar?c d"), server.url("/a%20b%c3%bc.tar")):
        (answer,) = asked([checked(url)])
        assert answer.shard
        assert content_of(answer.shard) == CONTENT


def test_a_proxy_is_asked_if_the_environment_names_one(server: Server, monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", server.url(""))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)
    server.files["http://images.invalid/0.tar"] = Served(CONTENT)
    try:
        (answer,) = asked(["http://images.invalid/0.tar"])
        assert answer.shard
        assert content_of(answer.shard) == CONTENT
    finally:
        urllib.request._opener = None


@pytest.mark.parametrize("is_piped", [False, True])
def test_a_full_disk_is_no_failure_of_the_server(server: Server, refusal, monkeypatch, is_piped: bool) -> None:
    shard = Pipe("yes | head -c 9999") if is_piped else server.shard("/0.tar", Served(CONTENT))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with refusal("cannot write a temporary file in", "File too large", "TMPDIR"):
            content_of(shard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    with refusal("cannot write a temporary file in /no/such/folder", "TMPDIR"):
        content_of(shard)


# ------------------------------------------------------------------------------------------------------------- asking


def test_servers_are_asked_in_order_and_for_little(server: Server) -> None:
    for n in range(0, 90, 2):
        framing = "length" if n % 4 else "nothing" if n % 8 else "chunks"
        faults = [Fault(503), *[Fault(drops_after=3)] * (framing != "nothing")]
        server.files[f"/{n}.tar"] = Served(CONTENT[: 20 * n], f'"{n}"', DATES[0], n % 3 == 0, framing=framing, faults=faults)
    for n in range(1, 90, 6):
        server.files[f"/{n}.tar"] = Served(CONTENT, always=Fault(410))
    answers = list(asked(server.url(f"/{n}.tar") for n in range(90)))
    assert [answer.url for answer in answers] == [server.url(f"/{n}.tar") for n in range(90)]
    for n, answer in enumerate(answers):
        assert (answer.shard is None) == (n % 2 == 1)
        if answer.shard:
            is_told = n % 3 == 0 or n % 4
            assert answer.shard == Url(answer.url, 20 * n if is_told else None, f'"{n}"' if n else "", DATES[0] if n else "")
            assert answer.header == CONTENT[: min(512, 20 * n)]
    assert {part for _, part, _ in server.seen} == {"bytes=0-511"}


@pytest.mark.parametrize("place", [0, 2])
def test_a_refusal_does_not_wait_for_other_shards(server: Server, refusal, place: int) -> None:
    """Whichever comes first."""
    for n in range(3):
        always = Fault(403, seconds=0.2) if n == place else Fault(503, {"Retry-After": "30"})
        server.files[f"/{n}.tar"] = Served(CONTENT, always=always)
    with refusal(server.url(f"/{place}.tar"), "answers 403"):
        list(asked(server.url(f"/{n}.tar") for n in range(3)))
    assert sorted(path for path, *_ in server.seen) == ["/0.tar", "/1.tar", "/2.tar"]  # none was asked again


# ------------------------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize(
    ("command", "n_runs", "parts"),
    [
        ("echo 'first' >&2; printf 'a\\nlast \\033[31mline\\n\\n' >&2; exit 3", 5, ["ended with status 3: last", "5 times"]),
        ("head -c 700 /dev/zero; exit 1", 5, ["ended with status 1", "5 times"]),
        ("false | cat", 5, ["ended with status 1"]),
        ("no-such-command -x", 1, ["ended with status 127", "no-such-command"]),
        ("kill -9 $$", 5, ["ended with signal 9"]),
    ],
)
def test_a_command_that_fails_is_run_again(
    server: Server, tmp_path: Path, refusal, command: str, n_runs: int, parts: list[str]
) -> None:
    runs = tmp_path / "runs"
    with refusal(f"pipe:echo >> {runs}; ", *parts, "run the same command again"):
        content_of(Pipe(f"echo >> {runs}; {command}"))
    assert len(runs.read_text()) == n_runs


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("printf abc", b"abc"),
        ("cat; printf abc", b"abc"),
        ("printf abc | tr a-c x-z", b"xyz"),
        ("printf '%s' {a,b}", b"{a,b}"),
        ("echo cut off; test -e F || { touch F; exit 1; }; true", b"cut off\n"),
    ],
)
def test_a_command_prints_the_shard(server: Server, tmp_path: Path, monkeypatch, command: str, output: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    assert content_of(Pipe(command)) == output


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_command_and_its_children_end_with_the_process_that_reads(tmp_path: Path, how: signal.Signals) -> None:
    held = tmp_path / "held"  # by all of the command's processes: it ends when they have
    os.mkfifo(held)
    shard = Pipe(f"exec 9> {held}; echo >&9; sleep 77 & head -c 2000000 /dev/zero; sleep 77 | cat; wait")
    reader = multiprocessing.get_context("fork").Process(target=content_of, args=(shard,))
    reader.start()
    with held.open("rb", buffering=0) as file:
        assert file.read(1)
        assert reader.pid
        os.kill(reader.pid, how)
        assert select.select([file], [], [], 30)[0]
        assert not file.read(1)
    reader.join()


# ------------------------------------------------------------------------------------------------------- in the config


@pytest.fixture
def tars(tmp_path: Path, write_tar, random_image, encoded) -> list[Path]:
    """Ten tars of four images; the seed of an image is its key."""

    def write(shard: int) -> Path:
        seeds = range(shard * 10, shard * 10 + 4)
        samples = {f"{seed:09d}": {"png": encoded(random_image(seed)), "txt": b"caption"} for seed in seeds}
        return write_tar(tmp_path / f"tars/{shard}.tar", samples)

    return [write(shard) for shard in range(10)]


@pytest.fixture
def put_on(server: Server) -> Callable[[list[Path]], None]:
    """Serves tars as /wds/<name>."""

    def put(paths: list[Path]) -> None:
        for path in paths:
            server.files[f"/wds/{path.name}"] = Served(path.read_bytes(), f'"{path.name}"')

    return put


def entry(train: object) -> dict[str, object]:
    return {"mine": {"train": train, "train_val": "tars/0.tar", "val": "tars/0.tar"}}


@pytest.mark.parametrize("damage", [lambda content: content, lambda content: content[:3000], lambda content: content[:1536]])
def test_a_remote_tar_is_read_as_a_local_one(
    server: Server, tars: list[Path], put_on, damage: Callable[[bytes], bytes]
) -> None:
    tars[0].write_bytes(damage(tars[0].read_bytes()))
    put_on(tars)
    shard = server.shard("/wds/0.tar", Served(tars[0].read_bytes(), faults=[Fault(drops_after=700), Fault(503)]))
    found = []
    for path in (tars[0], shard, Pipe(f"cat {shlex.quote(str(tars[0]))}")):
        bad: list[str] = []
        found.append(([(key, load()) for key, load in WebdatasetShards((path,)).read(0, bad.append)], bad))
    assert found[1] == found[0] == found[2]
    if damage(b"x" * 9999) == b"x" * 9999:
        with tarfile.open(tars[0]) as tar:
            members = {member.name: tar.extractfile(member) for member in tar if member.name.endswith(".png")}
            expected = [(name.removesuffix(".png"), file.read()) for name, file in members.items() if file]
        assert found[0] == (expected, [])
    else:
        assert found[0][1] == ["cut off or damaged tar"]


def test_every_form_mixes_and_keeps_its_order(
    server: Server, make_settings, tars: list[Path], put_on, tmp_path: Path, caplog
) -> None:
    put_on(tars)
    patterns = [
        "tars/{8,7}.tar", server.url("/wds/{4..3}.tar?token=secret"), f"pipe:cat {tmp_path}/tars/{{2,1}}.tar", "tars/[89].tar",
        str(tmp_path / "tars/../tars/8.tar"), server.url("/wds/4.tar?id=2"),
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        shards = sae_images(make_settings(sae_datasets=entry(patterns)), "mine")["train"]
    assert [next(iter(shards.read(shard, pytest.fail)))[0] for shard in range(len(shards))] == [
        f"{n}0".zfill(9) for n in (8, 7, 4, 3, 2, 1, 9, 4)
    ]
    assert [shards.name(shard) for shard in (0, 2, 4)] == [
        f"{tmp_path}/tars/8.tar", server.url("/wds/4.tar"), f"pipe:cat {tmp_path}/tars/2.tar"
    ]  # fmt: skip
    size = tars[0].stat().st_size
    assert [shards.size(shard) for shard in range(len(shards))] == [size] * 8  # a command's is taken to be the mean
    said, *_ = [message for message in caplog.messages if "share" not in message]
    assert said.startswith("2 shards are named again, and read once, first ")
    assert "tars/8.tar: sae_datasets['mine']['train'][3] in" in said


def test_a_command_keeps_its_backslashes_except_before_braces(server: Server, make_settings, tars: list[Path]) -> None:
    config = make_settings(sae_datasets=entry(r"pipe:tr '\t' {\\0,b} < \{x\,y\} | awk '{print $1}'"))
    commands = [str(path) for path in sae_images(config, "mine")["train"].paths]
    assert commands == [rf"pipe:tr '\t' {one} < {{x,y}} | awk '{{print $1}}'" for one in ("\\\\0", "b")]


def test_shards_that_are_missing_are_counted(server: Server, make_settings, tars: list[Path], put_on, refusal) -> None:
    put_on(tars[2:])
    pattern = server.url("/wds/{0..9}.tar?token=secret")
    config = make_settings(sae_datasets=entry(["tars/{0..9}.tar", pattern, "tars/10.tar"]))
    with pytest.raises(UserError) as caught:
        sae_images(config, "mine")
    assert "secret" not in str(caught.value)
    first = f"3 of 21 shards are missing, first {server.url('/wds/0.tar')}: sae_datasets['mine']['train'][1] in {config.path}"
    assert str(caught.value).startswith(first)
    server.seen.clear()
    config = make_settings(sae_datasets=entry(server.url("/none/{0..99999999}.tar")))
    with refusal("1000 or more shards are missing, first", server.url("/none/0.tar")):
        sae_images(config, "mine")
    assert len(server.seen) < 1100


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("s3://bucket/{0..9}.tar", ["s3:// is not read", "pipe:aws s3 cp s3://bucket/{0..9}.tar -"]),
        ("gs://bucket/0.tar", ["gs:// is not read", "pipe:gcloud storage cat gs://bucket/0.tar"]),
        ("hf://datasets/a/b/0.tar", ["hf:// is not read", "pipe:curl", "https://huggingface.co/datasets/"]),
        ("FTP://host/0.tar", ["ftp:// is not read", "pipe:curl -s -f -L FTP://host/0.tar"]),
        ("ftp://me:secret@host/0.tar?secret", ["is 'ftp://host/0.tar'", "pipe:curl -s -f -L ftp://host/0.tar"]),
        ("file:///data/0.tar", ["file:// is not read", "pipe:curl"]),
        ("pipe: ", ["write a command behind pipe:"]),
        ("pipe:cat {0..1.tar", ["braces are not balanced"]),
        ("https:///0.tar", ["is no address"]),
        ("https://host:x/0.tar?secret", ["is no address"]),
        ("https://a b/0.tar", ["is no address"]),
        ("https://a..b/0.tar", ["https://a..b/0.tar is no address"]),
        ("https://[::1/0.tar", ["is no address"]),
        ("https://me:secret@host/0.tar", ["must not hold a user or a password", "pipe:curl"]),
        ("https://host/*.tar", ["globs match local files only"]),
        ("tars/x*.tar", ["no file matches", "/tars/x*.tar"]),
        ("tars/{0,x?}.tar", ["no file matches", "/tars/x?.tar"]),
        ("SERVER/page.tar", ["1 of 1 shards cannot be read, first http://", "page.tar: it is a web page"]),
        ("SERVER/gzip.tar", ["it is compressed with gzip"]),
        ("SERVER/empty.tar", ["it is empty"]),
        ("SERVER/private.tar?secret", ["private.tar: the server answers 401 Unauthorized", "docs/DATA.md"]),
    ],
)
def test_patterns_that_cannot_be_read_are_one_line(
    server: Server, make_settings, tars: list[Path], pattern: str, parts: list[str]
) -> None:
    server.files["/page.tar"] = Served(b"\n<html>log in" + b" " * 600)
    server.files["/gzip.tar"] = Served(gzip.compress(CONTENT))
    server.files["/empty.tar"] = Served(b"")
    server.files["/private.tar"] = Served(CONTENT, always=Fault(401))
    config = make_settings(sae_datasets=entry(["tars/1.tar", pattern.replace("SERVER", server.url(""))][-1:]))
    with pytest.raises(UserError) as caught:
        sae_images(config, "mine")
    message = str(caught.value)
    assert "\n" not in message
    assert "secret" not in message
    assert not [part for part in parts if part not in message], message
    if "private" not in pattern:
        assert f"sae_datasets['mine']['train'] in {config.path} is" in message


def test_a_command_that_prints_no_tar_is_named(server: Server, refusal) -> None:
    for command, what in (("echo '<html>'", "a web page"), ("true", "empty")):
        with refusal(f"cannot read pipe:{command}: it is {what}"):
            list(WebdatasetShards((Pipe(command),)).read(0, pytest.fail))


def test_a_fingerprint_follows_what_the_server_says(server: Server, make_settings, tars: list[Path], put_on) -> None:
    put_on(tars)

    def prints(pattern: str) -> tuple[str, str]:
        shards = sae_images(make_settings(sae_datasets=entry(pattern)), "mine")["train"]
        return shards.fingerprint(), shards.state(1, ["a bad key"])

    pattern = server.url("/wds/{0..1}.tar")
    before = prints(pattern)
    assert prints(pattern) == prints(f"{pattern}?token=another") == before
    served = server.files["/wds/1.tar"]
    server.files["/wds/1.tar"] = Served(**vars(served) | {"etag": f"W/{served.etag}"})
    assert prints(pattern) == before
    changes = [{"etag": '"2"'}, {"content": served.content + bytes(512)}]
    changes += [{"etag": "", "modified": date} for date in DATES]
    found = []
    for change in changes:
        server.files["/wds/1.tar"] = Served(**vars(served) | change)
        found.append(prints(pattern))
    assert all(len({before[part], *(one[part] for one in found)}) == 5 for part in (0, 1))
    assert len({prints(f"pipe:{command} /{{0,1}}")[0] for command in ("cat", "cat -u", "cat")}) == 2


def test_a_query_tells_shards_apart_of_which_nothing_is_known(server: Server) -> None:
    server.files["/a"] = Served(CONTENT, "", knows_ranges=False, framing="nothing")
    queries = ["", "?id=0", "?id=1", "?id=0#part", "?token=secret"]
    states = [answer.shard.state() for answer in asked(server.url(f"/a{query}") for query in queries) if answer.shard]
    assert [states.index(state) for state in states] == [0, 1, 2, 1, 4]
    assert not [state for state in states if "secret" in state]


# ------------------------------------------------------------------------------------------------------------- stage 1


class Means(torch.nn.Module):
    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))


def save(config: Settings, n_workers: int = 0) -> Outcome:
    extraction = Extraction(batch_size=4, num_workers=n_workers)
    return save_sae_features(config, SAEFeatures("enc", "out", "mine"), extraction, device="cpu")


def test_progress_of_commands_is_estimated_until_all_is_read(
    server: Server, make_settings, tars: list[Path], make_encoder, monkeypatch, tmp_path: Path, capsys
) -> None:
    """Their sizes are not known."""
    monkeypatch.setattr("dncbm.features.stage.load_encoder", lambda *_: make_encoder(Means()))
    monkeypatch.setattr("dncbm.features.stage.describe_encoder", lambda _, name, *made: {"encoder": name})
    monkeypatch.setattr("dncbm.features.encoding.tqdm", partial(tqdm, mininterval=0))
    save(make_settings(sae_datasets=entry(f"pipe:cat {tmp_path}/tars/{{0..4}}.tar")))
    shown = re.findall(r"train: +(\d+)%[^\r]* (\d+)/(\d+) ", capsys.readouterr().err)
    assert shown[-1] == ("100", "20", "20")
    assert {n for percent, n, _ in shown if percent == "100"} == {"20"}


def test_features_are_the_same_wherever_shards_lie(
    server: Server, make_settings, tars: list[Path], put_on, make_encoder, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("dncbm.features.stage.load_encoder", lambda *_: make_encoder(Means()))
    monkeypatch.setattr("dncbm.features.stage.describe_encoder", lambda _, name, *made: {"encoder": name})
    put_on(tars)
    others = {"train_val": server.url("/wds/8.tar"), "val": [f"pipe:cat {tmp_path}/tars/9.tar"]}
    train = [
        "tars/{0,1}.tar", server.url("/wds/4.tar?token=a"), "tars/[2-3].tar", f"pipe:cat {tmp_path}/tars/{{6..7}}.tar",
        server.url("/wds/5.tar"),
    ]  # fmt: skip
    mixed = make_settings(data_dir="mixed", sae_datasets={"mine": {"train": train, **others}})
    served = server.files["/wds/5.tar"]
    served.always = Fault(drops_after=600)
    server.files["/wds/4.tar"].faults = [Fault(), Fault(drops_after=100), Fault(503, {"Retry-After": "0"})]
    served.knows_ranges = False
    with pytest.raises(
        UserError, match=r"^cannot read http://[^?\n]*/5.tar: .* \(tried 5 times\); run the same command again"
    ):
        save(mixed, n_workers=2)  # a process of its own

    served.always, served.knows_ranges = None, True
    server.seen.clear()
    assert save(mixed, n_workers=2) is Outcome.RAN
    assert server.fetches() == {"/wds/5.tar": 1, "/wds/8.tar": 1}  # all others had been read
    splits = {"train": "tars/{0,1,4,2,3,6,7,5}.tar", "train_val": "tars/8.tar", "val": "tars/9.tar"}
    local = make_settings(data_dir="local", sae_datasets={"mine": splits})
    assert save(local) is Outcome.RAN
    for split in SPLITS:
        stores = [open_features(config, "mine", "enc", "out", split) for config in (mixed, local)]
        assert list(stores[0].keys) == list(stores[1].keys)
        folders = [Artifacts(config).features("mine", "enc", "out", split) for config in (mixed, local)]
        files = [{path.name: path.read_bytes() for path in folder.glob("*.npy")} for folder in folders]
        assert files[0] == files[1]
        assert len(files[0]) == (16 if split == "train" else 2)
    texts = [path.read_text() for path in (tmp_path / "mixed").rglob("*.json")]
    assert not [text for text in texts if "token" in text]

    server.seen.clear()
    assert save(mixed) is Outcome.ALREADY_DONE
    assert not server.fetches()
    served.etag = '"other"'
    with pytest.raises(StaleArtifact, match="train images of mine has changed"):
        save(mixed)
    server.seen.clear()
    assert len(open_features(mixed, "mine", "enc", "out", "train")) == 32
    assert not server.seen  # later stages read the features
