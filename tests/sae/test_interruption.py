"""Runs that are killed and rerun end with the bytes of an uninterrupted run."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "interrupted_run.py"
Run = Callable[..., int]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs interrupted_run.py's training in a process of its own; returns the exit code."""
    with subprocess.Popen([sys.executable, SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(folder: Path, *moment: str | int) -> int:
            server.stdin.write(json.dumps([str(folder), *moment]) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        yield run
        server.stdin.close()


def said(folder: Path) -> str:
    return (folder / "said.txt").read_text()


@pytest.fixture(scope="module")
def uninterrupted(run: Run, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder) == 0, said(folder)
    return (folder / "final.safetensors").read_bytes()


@pytest.mark.parametrize(
    "moments",
    [
        # Eight steps per epoch; resampling after epoch 3 reads eight more batches. Reads run two batches ahead.
        [("read", 13), ("read", 14), ("rename", 9)],  # mid-epoch, within the resampling, while a state is written
        [("read", 1), ("read", 27), ("rename", 1)],  # before the first step, around the resampling, a first file
    ],
)
def test_sigkill(run: Run, tmp_path: Path, uninterrupted: bytes, moments: list[tuple[str, int]]) -> None:
    for moment in moments:
        assert run(tmp_path, *moment) == -9, said(tmp_path)
    assert run(tmp_path) == 0, said(tmp_path)
    assert (tmp_path / "final.safetensors").read_bytes() == uninterrupted
    # A process killed while it writes leaves its temporary file behind, hidden; no other file may remain.
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert names == {"final.safetensors", "log.csv", "said.txt", "state.safetensors"}
    assert len(list(tmp_path.iterdir())) <= len(names) + len(moments)


@pytest.mark.parametrize(("read", "steps"), [(20, ""), (30, 24)])  # mid-epoch; while the resampling reads
@pytest.mark.parametrize(("moment", "name"), [("term", "SIGTERM"), ("int", "SIGINT")])
def test_sigterm_and_ctrl_c(
    run: Run, tmp_path: Path, uninterrupted: bytes, moment: str, name: str, read: int, steps: int | str
) -> None:
    """It finishes the step, saves, reports it, and leaves the exit code to the caller, who gets a result."""
    assert run(tmp_path, moment, read) == 0, said(tmp_path)
    assert f"stopped by {name} at {steps}" in said(tmp_path)
    assert "training stopped after step" in said(tmp_path)
    assert (tmp_path / "state.safetensors").exists()
    assert not (tmp_path / "final.safetensors").exists()
    assert run(tmp_path) == 0, said(tmp_path)
    assert (tmp_path / "final.safetensors").read_bytes() == uninterrupted
