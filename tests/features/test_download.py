"""Stage 0 for real: img2dataset against an image server on this machine, with some addresses broken."""

import functools
import http.server
import multiprocessing
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dncbm.cli import main
from dncbm.features.datasets import open_image
from dncbm.features.datasets.download import Download, copy_with_header, download_cc3m
from dncbm.features.datasets.sae import WebdatasetShards
from dncbm.runs.settings import load_settings


@pytest.fixture
def server(tmp_path: Path, random_image) -> Iterator[str]:
    """Serves 0.jpg to 11.jpg, and a text that is no image."""
    folder = tmp_path / "served"
    folder.mkdir()
    for i in range(12):
        random_image(i, (60, 40)).save(folder / f"{i}.jpg")
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


@pytest.fixture
def no_new_interpreters(monkeypatch) -> None:
    """img2dataset's processes are forked: each spawned one would import everything again."""
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
    get_context = multiprocessing.get_context
    for place in ("multiprocessing.get_context", "img2dataset.distributor.get_context"):
        monkeypatch.setattr(place, lambda _=None: get_context("fork"))
    popen = staticmethod(multiprocessing.context.ForkProcess._Popen)
    monkeypatch.setattr("img2dataset.logger.LoggerProcess._Popen", popen)


@pytest.mark.usefixtures("no_new_interpreters")
def test_download_from_tsvs_without_header(server: str, tmp_path: Path, write_config, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DNCBM_CONFIG", str(write_config()))
    names = [*range(10), "missing", "text"]
    train = tmp_path / "Train_GCC-training.tsv"
    train.write_text("".join(f"a caption, {name}\t{server}/{name}.jpg\n" for name in names))
    val = tmp_path / "some name (1).tsv"
    val.write_text(f"one\t{server}/10.jpg\ntwo\t{server}/11.jpg\n")
    flags = [str(train), str(val), "--output_folder", "cc3m", "--processes_count", "1"]
    flags += ["--thread_count", "4", "--number_sample_per_shard", "4", "--image_size", "32"]
    main("download", flags)
    said = capsys.readouterr().out
    assert f"12 addresses of training: {train}" in said
    assert "10 of 12 images arrived (83.3%), 3 shards: cc3m/training" in said
    assert "2 of 2 images arrived (100.0%), 1 shards: cc3m/validation" in said
    assert train.read_text().startswith("a caption, 0\t"), "the downloaded file is left as it was"

    # It prints an entry for config.py.
    entry = said[said.index('    "cc3m": {') :].split("    },")[0] + "    }"
    path = write_config()
    path.write_text(path.read_text().replace("sae_datasets = {}", f"sae_datasets = {{{entry}}}"))
    splits = load_settings(path).sae_dataset("cc3m")
    assert splits["train"].endswith("cc3m/training/{00000..00001}.tar")
    assert splits["train_val"].endswith("cc3m/training/00002.tar")
    shards = WebdatasetShards(tuple(sorted((tmp_path / "cc3m/training").glob("*.tar"))))
    images = [open_image(read()) for shard in range(len(shards)) for _, read in shards.read(shard, pytest.fail)]
    assert [image.size for image in images] == [(32, 32)] * 10

    # The second time, complete shards are left as they are.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cc3m").rglob("*.tar")}
    main("download", flags)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cc3m").rglob("*.tar")} == before
    with tarfile.open(tmp_path / "cc3m/training/00000.tar") as tar:
        assert {Path(name).suffix for name in tar.getnames()} == {".jpg", ".txt", ".json"}


@pytest.fixture
def fake_img2dataset(monkeypatch) -> dict[str, list[int]]:
    """Folder -> numbers of the shards that `img2dataset` makes there, of nine images each."""
    shards: dict[str, list[int]] = {}

    def make(tsv: Path, folder: Path, download: Download) -> None:
        folder.mkdir(parents=True)
        for number in shards[folder.name]:
            (folder / f"{number:05d}.tar").touch()
            (folder / f"{number:05d}_stats.json").write_text('{"successes": 9}')

    monkeypatch.setattr("dncbm.features.datasets.download._run_img2dataset", make)
    return shards


@pytest.mark.parametrize(
    ("training", "train", "train_val"),
    [
        (332, "{00000..00299}", "{00300..00331}"),  # as in the paper
        (20, "{00000..00017}", "{00018..00019}"),
        (1, "00000", "00000"),
    ],
)
def test_a_tenth_of_the_training_shards_is_held_out(
    make_settings, tmp_path: Path, capsys, fake_img2dataset, training: int, train: str, train_val: str
) -> None:
    (tmp_path / "a.tsv").write_text("a caption\thttp://x/1\n" * 10)
    fake_img2dataset |= {"training": list(range(training)), "validation": [0]}
    download_cc3m(make_settings(), Download(tmp_path / "a.tsv", tmp_path / "a.tsv", tmp_path / "out"))
    said = capsys.readouterr().out
    assert f'"train": "{tmp_path}/out/training/{train}.tar"' in said
    assert f'"train_val": "{tmp_path}/out/training/{train_val}.tar"' in said
    assert f'"val": "{tmp_path}/out/validation/00000.tar"' in said


@pytest.mark.parametrize(("training", "problem"), [([], "no image of"), ([0, 2], "shards are missing between")])
def test_a_download_that_failed_is_an_error(
    make_settings, tmp_path: Path, fake_img2dataset, refusal, training: list[int], problem: str
) -> None:
    (tmp_path / "a.tsv").write_text("a caption\thttp://x/1\n")
    fake_img2dataset |= {"training": [*training, *([3] if training else [])], "validation": [0]}
    with refusal(problem, tmp_path / "out" / "training"):
        download_cc3m(make_settings(), Download(tmp_path / "a.tsv", tmp_path / "a.tsv", tmp_path / "out"))


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
