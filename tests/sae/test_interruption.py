"""Processes that are killed, and rerun, end with the bytes of one that was not."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "interrupted_run.py"


def run(folder: Path, *moment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), str(folder), *moment], capture_output=True, text=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    finished = run(folder)
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.mark.parametrize(
    "moments",
    [
        # Eight steps an epoch; resampling after epochs 3 and 6 reads eight more. Reads run two batches ahead.
        [("read", "13"), ("read", "14"), ("rename", "9")],  # mid-epoch, within the resampling, while a state is written
        [("read", "1"), ("read", "27"), ("rename", "1")],  # before the first step, around the resampling, a first file
    ],
)
def test_sigkill(tmp_path: Path, uninterrupted: Path, moments: list[tuple[str, str]]) -> None:
    for moment in moments:
        killed = run(tmp_path, *moment)
        assert killed.returncode == -9, killed.stderr
    finished = run(tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "final.safetensors").read_bytes() == (uninterrupted / "final.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize("read", ["20", "30"])  # mid-epoch; while the resampling reads
def test_sigterm(tmp_path: Path, uninterrupted: Path, read: str) -> None:
    """It finishes the step, saves, says so, and leaves the exit code to the caller, who gets a result."""
    stopped = run(tmp_path, "term", read)
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped early at" in stopped.stdout
    if read == "30":
        assert "stopped early at 24" in stopped.stdout
    assert "training stopped after step" in stopped.stderr
    assert (tmp_path / "state.safetensors").exists()
    assert not (tmp_path / "final.safetensors").exists()
    assert run(tmp_path).returncode == 0
    assert (tmp_path / "final.safetensors").read_bytes() == (uninterrupted / "final.safetensors").read_bytes()
