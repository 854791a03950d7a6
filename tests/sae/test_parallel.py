"""Several processes train the SAE that one trains."""

import csv
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "parallel_run.py"
RUN = runpy.run_path(str(SCRIPT))
CASES, trained = RUN["CASES"], RUN["trained"]


def in_processes(n: int, folder: Path, *cases: str) -> list[int]:
    """Trains cases in n processes. Returns their exit codes."""
    folder.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), *cases]
    running = [subprocess.Popen(command, env=env | {"RANK": str(rank)}) for rank in range(n)]
    return [process.wait(timeout=300) for process in running]


def results(folder: Path, case: str, n: int) -> dict[str, Tensor]:
    """The result of a case, which is the same in all processes."""
    found = [load_file(folder / f"{case}.{rank}.safetensors") for rank in range(n)]
    for other in found[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in found[0].items())
    return found[0]


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    assert in_processes(2, folder, *CASES) == [0, 0]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_trains(case: str, by_two: Path, tmp_path: Path) -> None:
    found, wanted = results(by_two, case, 2), trained(case, tmp_path)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-3, atol=2e-3 * float(tensor.abs().max()), msg=name)
    logs = [list(csv.DictReader((folder / f"{case}.csv").open())) for folder in (by_two, tmp_path)]
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys()
        for column in ours.keys() - {"items_per_second", "sparse_step"}:
            numbers = [float(row[column] or "nan") for row in (ours, theirs)]
            assert numbers[0] == pytest.approx(numbers[1], rel=2e-3, abs=2e-3, nan_ok=True), column


@pytest.mark.parametrize(("fate", "codes"), [("SIGTERM", [0, 0]), ("SIGKILL", [1, -9])])
def test_a_run_stopped_in_one_process_resumes_to_the_same_bits(
    fate: str, codes: list[int], by_two: Path, tmp_path: Path
) -> None:
    assert in_processes(2, tmp_path, f"relu:{fate}:15") == codes
    assert (tmp_path / "relu.state").exists()
    assert len(list(csv.DictReader((tmp_path / "relu.csv").open()))) < len(list(csv.DictReader((by_two / "relu.csv").open())))
    assert in_processes(2, tmp_path, "relu") == [0, 0]
    found, wanted = results(tmp_path, "relu", 2), results(by_two, "relu", 2)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_processes_without_an_item_of_a_batch(tmp_path: Path) -> None:
    """Four processes share a last batch of ten items, and groups of eight pieces."""
    assert in_processes(4, tmp_path / "four", "batchtopk", "shards") == [0] * 4
    for case in ("batchtopk", "shards"):
        found, wanted = results(tmp_path / "four", case, 4), trained(case, tmp_path)
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=2e-3, atol=2e-3 * float(tensor.abs().max()), msg=name)
