import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_autoencoder.files import remove_leftovers, whole_file


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "x.npy"
    with whole_file(path) as first, whole_file(path) as second:
        assert first != second  # two processes may write the same file
        assert {first.suffix, second.suffix} == {".npy"}  # numpy appends its suffix to other names
        assert first.parent == path.parent
        first.write_text("first")
        second.write_text("second")
        assert not path.exists()
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "x.csv"
    path.write_text("old")

    def write_half() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_reaches_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the order of the system calls is tested, not the disk."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(handle: int) -> None:
        calls.append("flush folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "flush file")
        fsync(handle)

    def recorded_replace(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    with whole_file(tmp_path / "x") as temporary:
        temporary.write_text("new")
    assert calls == ["flush file", "rename", "flush folder"]


WRITERS = {
    "text": "path.write_text('x' * 100_000)",
    "numpy": "import numpy; numpy.save(path, numpy.zeros(100_000))",
    "numpy zip": "import numpy; numpy.savez(path, a=numpy.zeros(100_000))",
    "safetensors": "import torch; from safetensors.torch import save_file; save_file({'a': torch.zeros(100_000)}, path)",
    "PIL": "import numpy; from PIL import Image; "
    "Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (300, 300), dtype=numpy.uint8)).save(path, 'PNG')",
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS.keys())
def test_a_write_that_fails_names_the_file(tmp_path: Path, writer: str) -> None:
    """A limit on the size of files stands for a full disk; each library reports the failure in its own way."""
    code = (
        "import resource, sys; from pathlib import Path; from sparse_autoencoder.files import whole_file\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        f"try:\n with whole_file(Path(sys.argv[1])) as path:\n  {writer}\n"
        "except OSError as error: print(error.errno is not None, error.filename)"
    )
    path = tmp_path / ("x.npy" if "numpy.save(" in writer else "x.npz")
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert done.stdout == f"True {path}\n", done.stderr
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file") as caught, whole_file(tmp_path / "file" / "x"):
        pass
    assert caught.value.filename == str(tmp_path / "file" / "x")


def test_long_names_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 125 + ".json")  # 255 bytes, the longest name that file systems allow
    with whole_file(path) as temporary:
        temporary.write_text("x")
    assert path.read_text() == "x"


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from sparse_autoencoder.files import whole_file\n"
        "with whole_file(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.b.npz"], check=False)
    others = {tmp_path / name for name in (".hidden", ".a-1-2.npz", "b.npz")}
    for path in others:
        path.touch()
    assert len(list(tmp_path.iterdir())) == 4
    with whole_file(tmp_path / "a.b.npz") as alive:
        remove_leftovers(tmp_path)
        assert set(tmp_path.iterdir()) == others | {alive}
