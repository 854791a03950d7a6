"""Stage 0 for real: img2dataset against an image server on this machine, with some addresses broken."""

import functools
import http.server
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dncbm.datasets.cc3m import WebdatasetShards
from dncbm.datasets.download import copy_with_header
from dncbm.settings import load_settings

SCRIPT = Path(__file__).parent.parent / "scripts" / "download_cc3m.py"


@pytest.fixture
def server(tmp_path: Path, random_image) -> Iterator[str]:
    """Serves 0.jpg to 11.jpg, and a text that is no image."""
    folder = tmp_path / "served"
    folder.mkdir()
    for i in range(12):
        random_image(i, (300, 200)).save(folder / f"{i}.jpg")
    (folder / "text.jpg").write_text("no image")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_download_from_tsvs_without_header(server: str, tmp_path: Path) -> None:
    names = [*range(10), "missing", "text"]
    train = tmp_path / "Train_GCC-training.tsv"
    train.write_text("".join(f"a caption, {name}\t{server}/{name}.jpg\n" for name in names))
    val = tmp_path / "some name (1).tsv"
    val.write_text(f"one\t{server}/10.jpg\ntwo\t{server}/11.jpg\n")
    command = [sys.executable, str(SCRIPT), str(train), str(val), "--output_folder", "cc3m", "--processes_count", "1"]
    command += ["--thread_count", "4", "--number_sample_per_shard", "4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 of 12 images arrived (83.3%), 3 shards: cc3m/training" in done.stdout
    assert "2 of 2 images arrived (100.0%), 1 shards: cc3m/validation" in done.stdout
    assert train.read_text().startswith("a caption, 0\t"), "the downloaded file is left as it was"

    # What it printed is what config.py takes.
    said = done.stdout[done.stdout.index('    "cc3m": {') :].split("    },")[0] + "    }"
    roots = "".join(f"{key} = '{key}'\n" for key in ("data_dir", "sae_dir", "probe_dir", "vocab_dir", "analysis_dir"))
    config = tmp_path / "config.py"
    config.write_text(f"{roots}vocabulary = 'v'\nsae_datasets = {{{said}}}\nprobe_datasets = {{}}\nencoders = {{}}\n")
    splits = load_settings(config).sae_dataset("cc3m")
    assert splits["train"].endswith("cc3m/training/{00000..00001}.tar")
    assert splits["train_val"].endswith("cc3m/training/00002.tar")
    shards = WebdatasetShards(tuple(sorted((tmp_path / "cc3m/training").glob("*.tar"))))
    images = [decode() for shard in range(len(shards)) for _, decode in shards.read(shard, pytest.fail)]
    assert [image.size for image in images] == [(256, 256)] * 10

    # Again: complete shards are left as they are.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cc3m").rglob("*.tar")}
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cc3m").rglob("*.tar")} == before
    with tarfile.open(tmp_path / "cc3m/training/00000.tar") as tar:
        assert {Path(name).suffix for name in tar.getnames()} == {".jpg", ".txt", ".json"}


def test_a_header_that_is_there_is_not_an_address(tmp_path: Path) -> None:
    tsv = tmp_path / "a.tsv"
    tsv.write_text('caption\turl\nred, "green"\thttp://x/1\n\nblue\thttps://x/2\n')
    assert copy_with_header(tsv, tmp_path / "b.tsv") == 2
    assert (tmp_path / "b.tsv").read_text() == 'caption\turl\nred, "green"\thttp://x/1\nblue\thttps://x/2\n'


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "no file"),
        ("", "holds no address"),
        ("a\thttp://x\nb c d\n", "line 2"),
        ("http://x\tcaption\n", "line 1"),
    ],
)
def test_a_tsv_that_is_not_one(tmp_path: Path, refusal, content: str | None, problem: str) -> None:
    tsv = tmp_path / "a.tsv"
    if content is not None:
        tsv.write_text(content)
    with refusal(tsv, problem):
        copy_with_header(tsv, tmp_path / "b.tsv")
    assert not (tmp_path / "b.tsv").exists()
