"""Stage 0 for real: img2dataset against an image server on this machine, with some addresses broken."""

import ast
import errno
import http.client
import http.server
import json
import multiprocessing
import os
import re
import signal
import socket
import struct
import sys
import tarfile
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from dncbm.cli import INTERRUPTED, main
from dncbm.features.datasets import open_image
from dncbm.features.datasets.download import Failure, copy_with_header, download_cc3m, kind_of
from dncbm.features.datasets.sae import WebdatasetShards, sae_images
from dncbm.runs.declarations import Download
from dncbm.runs.settings import load_settings


@dataclass
class Server:
    """Serves 0.jpg to 19.jpg, and what `answers` says instead."""

    folder: Path
    url: str = ""
    answers: dict[str, list[str]] = field(default_factory=dict)
    """Name -> what its requests get, one after another; the last holds for all further ones."""
    log: list[tuple[str, str]] = field(default_factory=list)
    """Name and answer of every request."""
    n_answered: int | None = None
    """The requests that are answered before the next ones are held; None: all."""
    held: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    released: threading.Event = field(default_factory=threading.Event)

    def answer(self, handler: http.server.SimpleHTTPRequestHandler) -> None:
        name = Path(handler.path).stem
        answers = self.answers.get(name, ["image"])
        if self.n_answered is not None and len(self.log) >= self.n_answered:
            self.held.release()
            self.released.wait()
            return
        kind = answers.pop(0) if len(answers) > 1 else answers[0]
        self.log.append((name, kind))
        if kind.isdigit():
            handler.send_error(int(kind))
        elif kind == "slow":
            handler.connection.recv(1)  # until the client gives up
        elif kind == "reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif kind == "cut":
            handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\nJFIF")
        elif kind == "garbled":
            handler.wfile.write(b"HTTP/1.0 a23\r\n\r\n")
        elif kind == "robots":
            handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-Robots-Tag: noai\r\n\r\nimage")
        elif kind == "text":
            handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\nno image")
        else:
            content = (self.folder / f"{name}.jpg").read_bytes()
            handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + content)


@pytest.fixture
def server(tmp_path: Path, random_image) -> Iterator[Server]:
    served = Server(tmp_path / "served")
    served.folder.mkdir()
    for i in range(20):
        random_image(i, (60, 40)).save(served.folder / f"{i}.jpg")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            served.answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        served.url = f"http://127.0.0.1:{running.server_address[1]}"
        yield served
        served.released.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def no_new_interpreters(monkeypatch) -> None:
    """img2dataset's processes are forked: each spawned one would import everything again."""
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
    get_context = multiprocessing.get_context
    for place in ("multiprocessing.get_context", "img2dataset.distributor.get_context"):
        monkeypatch.setattr(place, lambda _=None: get_context("fork"))
    popen = staticmethod(multiprocessing.context.ForkProcess._Popen)
    monkeypatch.setattr("img2dataset.logger.LoggerProcess._Popen", popen)


def captions(tars: Iterable[Path]) -> Iterator[str]:
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if member.name.endswith(".txt") and content is not None:
                    yield content.read().decode()


def in_a_group_of_its_own(flags: list[str]) -> None:
    """What a child does that is killed with all processes that it starts."""
    os.setsid()
    main("download", flags)


def told(said: str, name: str) -> dict[str, int]:
    """Kind -> number of missing images, as printed for a split."""
    _, found, after = said.partition(f" images of {name} are missing:\n")
    assert found, said
    rows = after.partition("images arrived")[0]
    return {kind: int(n) for n, kind in re.findall(r"^ *(\d+) (\w+): ", rows, flags=re.M)}


@pytest.fixture
def shards_of(write_config: Callable[..., Path]) -> Callable[[str], dict[str, list[str]]]:
    """What is printed -> split -> the shards that config.py has with the printed entry."""

    def read(said: str) -> dict[str, list[str]]:
        entry = ast.literal_eval("{" + said[said.index('    "cc3m": {') :].split("    },")[0] + "    }}")
        path = write_config(sae_datasets=entry)
        found = sae_images(load_settings(path), "cc3m")
        return {
            split: [os.path.relpath(images.name(shard), path.parent / "cc3m") for shard in range(len(images))]
            for split, images in found.items()
        }

    return read


@pytest.mark.usefixtures("no_new_interpreters")
def test_download_from_tsvs_without_header(
    server: Server, tmp_path: Path, write_config, monkeypatch, capsys, shards_of
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DNCBM_CONFIG", str(write_config()))
    names = [*range(10), "missing", "text"]
    server.answers = {"missing": ["404"], "text": ["text"]}
    train = tmp_path / "Train_GCC-training.tsv"
    train.write_text("".join(f"a caption, {name}\t{server.url}/{name}.jpg\n" for name in names))
    val = tmp_path / "some name (1).tsv"
    val.write_text(f"one\t{server.url}/10.jpg\ntwo\t{server.url}/11.jpg\n")
    flags = [str(train), str(val), "--output_folder", "cc3m", "--processes_count", "1"]
    flags += ["--thread_count", "4", "--number_sample_per_shard", "4", "--image_size", "32"]
    main("download", flags)
    said = capsys.readouterr().out
    assert f"12 addresses of training: {train}" in said
    assert "10 of 12 images arrived (83.3%), 3 shards: cc3m/training" in said
    assert told(said, "training") == {"gone": 2}
    assert "2 of 2 images arrived (100.0%), 1 shards: cc3m/validation" in said
    assert train.read_text().startswith("a caption, 0\t"), "the downloaded file is left as it was"

    # It prints an entry for config.py.
    assert shards_of(said) == {
        "train": ["training/00000.tar", "training/00001.tar"],
        "train_val": ["training/00002.tar"],
        "val": ["validation/00000.tar"],
    }
    shards = WebdatasetShards(tuple(sorted((tmp_path / "cc3m/training").glob("*.tar"))))
    images = [open_image(read()) for shard in range(len(shards)) for _, read in shards.read(shard, pytest.fail)]
    assert [image.size for image in images] == [(32, 32)] * 10

    # The second time, complete shards are left as they are.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cc3m").rglob("*.tar")}
    main("download", flags)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cc3m").rglob("*.tar")} == before
    with tarfile.open(tmp_path / "cc3m/training/00000.tar") as tar:
        assert {Path(name).suffix for name in tar.getnames()} == {".jpg", ".txt", ".json"}


@pytest.mark.usefixtures("no_new_interpreters")
def test_a_retry_gets_what_had_failed_for_a_passing_reason(
    server: Server, tmp_path: Path, write_config, monkeypatch, capsys, shards_of
) -> None:
    kinds = {"404": "gone", "text": "gone", "403": "refused", "robots": "refused", "garbled": "unknown"}  # all others pass
    server.answers = {
        "1": ["503", "image"], "2": ["slow", "image"], "3": ["reset", "image"], "4": ["cut", "image"],
        "5": ["garbled", "image"], "6": ["429", "503", "503", "404"], "missing": ["404"], "forbidden": ["403"],
        "noai": ["robots"], "text": ["text"], "13": ["503", "image"],
    }  # fmt: skip
    names = [*range(8), "missing", "forbidden", "noai", "text"]
    train, val = tmp_path / "train.tsv", tmp_path / "val.tsv"
    train.write_text("".join(f'" a caption, {name}\t{server.url}/{name}.jpg\n' for name in names))
    val.write_text("".join(f"a caption\t{server.url}/{name}.jpg\n" for name in (12, 13)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DNCBM_CONFIG", str(write_config()))
    flags = [str(train), str(val), "--output_folder", "cc3m", "--processes_count", "1"]
    flags += ["--thread_count", "2", "--number_sample_per_shard", "4", "--image_size", "32"]

    def run(*more: str) -> str:
        main("download", [*flags, *more])
        said = capsys.readouterr().out
        # Whatever happened so far, what is printed is what the server did last for each address.
        for name, listed in (("training", names), ("validation", [12, 13])):
            last = dict(server.log)
            missing = Counter(kinds.get(last[str(one)], "passing") for one in listed if last[str(one)] != "image")
            assert f"{len(listed) - missing.total()} of {len(listed)} images arrived" in said
            assert not missing or told(said, name) == missing
        return said

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in Path("cc3m").rglob("[0-9]*.*")}

    urlopen = urllib.request.urlopen
    with monkeypatch.context() as impatient:
        impatient.setattr("urllib.request.urlopen", lambda request, timeout: urlopen(request, timeout=2))
        said = run()
    assert told(said, "training") == {"gone": 2, "refused": 2, "passing": 5, "unknown": 1}
    assert "of the unknown: 'HTTP/N.N aN" in said, "commonest texts of what has no kind"
    whole, first = files(), server.log.copy()

    # Killed in the second shard of the retry.
    server.n_answered = len(server.log) + 4
    retry = multiprocessing.get_context("fork").Process(target=in_a_group_of_its_own, args=([*flags, "--retry_failed"],))
    retry.start()
    assert server.held.acquire(timeout=60)
    assert server.held.acquire(timeout=60)
    assert retry.pid is not None
    os.killpg(retry.pid, signal.SIGKILL)
    retry.join()
    server.n_answered = None
    server.released.set()
    of_first_shard = {name for name, _ in server.log[len(first) :]}
    assert len(of_first_shard) == 4
    whole |= {path: when for path, when in files().items() if path.name.startswith("00000") and "retry_1" in str(path)}
    assert len([path for path in whole if "retry_1" in str(path)]) == 3
    Path("cc3m/training/retry_1/00001_stats.json").write_text('{"count"')  # killed while it wrote this
    main("download", flags)
    assert "the retry in cc3m/training/retry_1 was interrupted: --retry_failed resumes it" in capsys.readouterr().out

    # The same command resumes: only what failed for a passing reason, each address once.
    said = run("--retry_failed")
    again = Counter(name for name, _ in server.log[len(first) :])
    assert again == dict.fromkeys(["1", "2", "3", "4", "5", "6", "13"], 1)
    assert whole.items() <= files().items(), "complete shards are left as they are"
    splits = shards_of(said)
    assert splits == {
        "train": [f"training/{name}.tar" for name in ("00000", "00001", "retry_1/00000", "retry_1/00001")],
        "train_val": ["training/00002.tar"],
        "val": ["validation/00000.tar", "validation/retry_1/00000.tar"],
    }
    assert Counter(captions(Path("cc3m/training").rglob("*.tar"))) == {f'" a caption, {i}': 1 for i in (0, 1, 2, 3, 4, 5, 7)}

    # What is still missing is tried again, until it is gone.
    for _ in range(2):
        before = len(server.log)
        said = run("--retry_failed")
        assert [name for name, _ in server.log[before:]] == ["6"]
        assert shards_of(said) == splits, "a retry without an image is not part of the data set"
    assert told(said, "training") == {"gone": 3, "refused": 2}
    before = len(server.log)
    main("download", [*flags, "--retry_failed"])
    said = capsys.readouterr().out
    assert said == "nothing is left to retry in cc3m/training and cc3m/validation\n"
    assert len(server.log) == before


def test_ctrl_c_is_no_success(tmp_path: Path, write_config, monkeypatch, download_of, capsys) -> None:
    def interrupted(**_: object) -> None:
        signal.signal(signal.SIGINT, lambda *_: sys.exit(0))  # as img2dataset does
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("img2dataset.download", interrupted)
    monkeypatch.setenv("DNCBM_CONFIG", str(write_config()))
    download = download_of(1)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        main("download", [str(download.train_tsv), str(download.val_tsv), "--output_folder", str(download.output)])
    assert stopped.value.code == INTERRUPTED
    assert "run the same command again to resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def fake_img2dataset(monkeypatch) -> dict[str, list[int]]:
    """Folder -> numbers of the shards that `img2dataset` makes there, of ten addresses and nine images each."""
    shards: dict[str, list[int]] = {}

    def make(listed: Path, folder: Path, download: Download) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        statuses = {"success": 9, "HTTP Error 404: Not Found": 1}
        for number in shards[folder.name]:
            (folder / f"{number:05d}.tar").touch()
            stats = {"count": 10, "successes": 9, "status_dict": statuses}
            (folder / f"{number:05d}_stats.json").write_text(json.dumps(stats))

    monkeypatch.setattr("dncbm.features.datasets.download._run_img2dataset", make)
    return shards


@pytest.fixture
def download_of(tmp_path: Path) -> Callable[..., Download]:
    """A download of this many training shards of ten addresses, and of one validation shard."""

    def make(n_shards: int, **changes: Any) -> Download:
        for name, n in (("a", n_shards), ("b", 1)):
            (tmp_path / f"{name}.tsv").write_text("a caption\thttp://x/1\n" * 10 * n)
        declared = {"output": tmp_path / "out", "shard_size": 10} | changes
        return Download(tmp_path / "a.tsv", tmp_path / "b.tsv", **declared)

    return make


@pytest.mark.parametrize(
    ("training", "train", "train_val"),
    [
        (332, "{00000..00299}", "{00300..00331}"),  # as in the paper
        (20, "{00000..00017}", "{00018..00019}"),
        (1, "00000", "00000"),
    ],
)
def test_a_tenth_of_the_training_shards_is_held_out(
    make_settings, tmp_path: Path, capsys, monkeypatch, fake_img2dataset, download_of, training: int, train: str,
    train_val: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("dncbm.features.datasets.download.PAPER_IMAGES", 3000)
    fake_img2dataset |= {"training": list(range(training)), "validation": [0]}
    download_cc3m(make_settings(), download_of(training))
    said = capsys.readouterr().out
    assert f'"train": "{tmp_path}/out/training/{train}.tar"' in said
    assert f'"train_val": "{tmp_path}/out/training/{train_val}.tar"' in said
    assert f'"val": "{tmp_path}/out/validation/00000.tar"' in said
    # A list as long as the paper's is compared with it.
    assert ("100% of the number that the paper had" in said, "the paper" in said) == (training == 332,) * 2
    assert told(said, "training") == {"gone": training}


@pytest.mark.parametrize(
    ("training", "changes", "problem"),
    [
        ([], {}, "no image of"),
        ([0, 2, 3], {}, "shards are missing between"),
        ([0, 1, 2], {}, "00003.tar"),
        ([0, 1, 2, 3], {"retry_failed": True}, "no download to retry"),
    ],
)
def test_a_download_that_failed_is_an_error(
    make_settings, tmp_path: Path, fake_img2dataset, download_of, refusal, training: list[int], changes: dict, problem: str
) -> None:
    fake_img2dataset |= {"training": training, "validation": [0]}
    with refusal(problem, tmp_path / "out" / "training"):
        download_cc3m(make_settings(), download_of(4, **changes))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"retry_failed": True}, "is not complete"), ({"shard_size": 20}, "00000.tar holds 10 addresses, not 20")],
)
def test_only_a_complete_download_is_retried_and_only_as_it_began_is_it_resumed(
    make_settings, tmp_path: Path, fake_img2dataset, download_of, refusal, changes: dict, problem: str
) -> None:
    fake_img2dataset |= {"training": [0, 1], "validation": [0]}
    download_cc3m(make_settings(), download_of(2))
    with refusal(problem, tmp_path / "out" / "training"):
        download_cc3m(make_settings(), download_of(3, **changes))


def test_without_img2datasets_notes_nothing_can_be_retried(
    make_settings, tmp_path: Path, fake_img2dataset, download_of, refusal
) -> None:
    fake_img2dataset |= {"training": [0, 1], "validation": [0]}
    download_cc3m(make_settings(), download_of(2))
    path = tmp_path / "out" / "training" / "00001_stats.json"
    path.write_text(path.read_text().replace("404", "503"))
    with refusal("cannot read", tmp_path / "out" / "training" / "00000.parquet"):
        download_cc3m(make_settings(), download_of(2, retry_failed=True))
    assert not list((tmp_path / "out").glob("*retry*"))


def http_error(code: int, reason: str) -> str:
    return str(urllib.error.HTTPError("http://x/1", code, reason, Message(), None))


def url_error(reason: Exception | str) -> str:
    return str(urllib.error.URLError(reason))


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (http_error(404, "the database timed out"), Failure.GONE),
        (http_error(410, "Gone"), Failure.GONE),
        (http_error(301, "a redirect error that would lead to an infinite loop.\nMoved"), Failure.GONE),
        (url_error(socket.gaierror(socket.EAI_NONAME, "Name or service not known")), Failure.GONE),
        (url_error("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired"), Failure.GONE),
        (url_error("unknown url type: timeout"), Failure.GONE),
        ("Image decoding error", Failure.GONE),
        ("OpenCV(4.11.0) error: (-215:Assertion failed) !buf.empty() in function 'imdecode_'\n", Failure.GONE),
        (http_error(401, "Unauthorized"), Failure.REFUSED),
        (http_error(403, "Forbidden"), Failure.REFUSED),
        (http_error(451, "Unavailable For Legal Reasons"), Failure.REFUSED),
        ("Use of image disallowed by X-Robots-Tag directive", Failure.REFUSED),
        (http_error(429, "Too Many Requests"), Failure.PASSING),
        (http_error(503, "Forbidden"), Failure.PASSING),
        (http_error(522, ""), Failure.PASSING),
        (url_error(TimeoutError("timed out")), Failure.PASSING),
        (url_error(OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))), Failure.PASSING),
        (url_error(ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))), Failure.PASSING),
        (url_error(ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))), Failure.PASSING),
        (url_error(OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))), Failure.PASSING),
        (url_error(socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")), Failure.PASSING),
        (str(http.client.IncompleteRead(b"", 9)), Failure.PASSING),
        (str(http.client.RemoteDisconnected("Remote end closed connection without response")), Failure.PASSING),
        (url_error("EOF occurred in violation of protocol (_ssl.c:1007)"), Failure.PASSING),
        (url_error("[SSL: CERTIFICATE_VERIFY_FAILED] unable to get local issuer certificate (_ssl.c:1)"), Failure.PASSING),
        ("", Failure.UNKNOWN),
        (str(http.client.BadStatusLine("<html>")), Failure.UNKNOWN),
    ],
)
def test_failures_are_told_apart_by_what_python_says(message: str, kind: Failure) -> None:
    assert kind_of(message) is kind


def test_a_header_is_not_an_address(tmp_path: Path) -> None:
    tsv = tmp_path / "a.tsv"
    tsv.write_text('caption\turl\nred, "green"\thttp://x/1\n\nblue\thttps://x/2\n')
    assert copy_with_header(tsv, tmp_path / "b.tsv") == 2
    assert (tmp_path / "b.tsv").read_text() == 'caption\turl\nred, "green"\thttp://x/1\nblue\thttps://x/2\n'


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "is missing"), ("", "holds no address"), ("a\thttp://x\nb c d\n", "line 2"), ("http://x\tcaption\n", "line 1")],
)
def test_a_tsv_that_is_not_one(tmp_path: Path, refusal, content: str | None, problem: str) -> None:
    tsv = tmp_path / "a.tsv"
    if content is not None:
        tsv.write_text(content)
    with refusal(tsv, problem):
        copy_with_header(tsv, tmp_path / "b.tsv")
    assert not (tmp_path / "b.tsv").exists()
