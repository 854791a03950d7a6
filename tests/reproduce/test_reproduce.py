"""The whole experiment on a small build of the embedded default: two data sets, two seeds, a sweep of two."""

import csv
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dncbm.cli import main
from dncbm.probe import nec
from dncbm.reproduce import run as reproduce
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.manifests import MANIFEST, manifest_path
from dncbm.runs.settings import load_settings

sys.path.insert(0, str(Path(__file__).parent))  # processes that are forked import it by its name
import killed_run

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[2] / "examples" / "openmoji"
DATASETS = ["--probe_dataset", "openmoji_categories,openmoji_backgrounds"]
SHORT = [
    "--num_epochs", "4", "--probe_epochs", "4", "--num_workers", "0", "--batch_size", "32", "--limit", "1",
    "--n_clusters", "2", "--templates", "an emoji of {}", "--suggest", "an animal", "--suggest_n", "5",
]  # fmt: skip
WHOLE = [*DATASETS, *SHORT, "--seed", "49,50", "--sweep", "l1_coeff=3e-4,5e-4"]
QUICK = [*WHOLE, "--without", "explanations,interventions"]
Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run scripts/reproduce.py in this process. Returns what it prints, errors included."""

    def call(config: Path, *flags: str, code: int = 0, measured: bool = False) -> str:
        monkeypatch.setenv("DNCBM_CONFIG", str(config))
        monkeypatch.setattr(nec, "MAX_PASSES", 8)
        if not measured:
            monkeypatch.setattr(reproduce, "estimate", lambda *_: {})
        capsys.readouterr()
        found, message = 0, ""
        try:
            main("reproduce", flags)
        except SystemExit as error:
            found, message = (error.code, "") if isinstance(error.code, int) else (1, str(error.code))
        printed = capsys.readouterr()
        assert found == code, printed.out + printed.err + message
        return printed.out + message

    return call


def make_config(build: Path, folder: Path) -> Path:
    """A config for a build, whose data are linked and whose results are of its own."""
    (folder / "run").mkdir(parents=True)
    shutil.copy(EXAMPLE / "config.py", folder)
    for path in build.iterdir():
        if path.name in ("webdataset", "categories", "backgrounds", "clip"):
            (folder / "run" / path.name).symlink_to(path)
    shutil.copytree(build / "vocab", folder / "run" / "vocab")
    return folder / "config.py"


@pytest.fixture(scope="module")
def finished(small_build: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The config of a reproduction that has run to its end, and what it printed. It ran in a process of its own."""
    config = make_config(small_build, tmp_path_factory.mktemp("whole"))
    output = config.with_name("output.txt")
    child = start(config, WHOLE, output)
    child.join()
    text = output.read_text()
    assert child.exitcode == 0, text[-2000:]
    return config, text


@pytest.fixture
def copied(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """The config of a copy of that reproduction, to change."""
    shutil.copytree(finished[0].parent, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy" / "config.py"


def start(config: Path, flags: list[str], output: Path) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_run"])
    child = context.Process(target=killed_run.run_in_file, args=(str(config), flags, str(output)))
    child.start()
    return child


def tables(config: Path) -> str:
    return Artifacts(load_settings(config)).reproduction_table("csv").read_text()


def steps(text: str) -> list[str]:
    """The names of the steps that were not done before."""
    found = re.findall(r"^== \d+/\d+ (.*?)(?: \(estimated.*\))?(: done|: not needed)?$", text, re.M)
    return [name for name, done in found if not done]


def test_a_whole_run_ends_with_the_tables(finished: tuple[Path, str]) -> None:
    config, text = finished
    assert len(steps(text)) == int(re.findall(r"^== \d+/(\d+) ", text, re.M)[0])
    with Artifacts(load_settings(config)).probe_results().open() as file:
        rows = list(csv.DictReader(file))
    probes = [row for row in rows if (row["method"], row["on"]) == ("probe", "concepts")]
    assert len({(row["sae"], row["probe_dataset"]) for row in probes}) == len(probes) == 2 * 2 * 2
    assert {row["edit"].split("_")[0] for row in rows if row["method"] == "intervention"} == {"keep5", "remove5"}
    for line in ("DN-CBM", "Linear probe", "Zero-shot", "ANEC-5"):
        assert line in tables(config)
    assert "== the SAEs" in text


def test_what_a_step_reads_was_made_by_a_step_before(finished: tuple[Path, str]) -> None:
    """By the manifests: every artifact names the artifacts that it was made from."""
    config, _ = finished
    made = [path for path in config.parent.glob(f"run/*/**/*{MANIFEST}") if "webdataset" not in path.parts]
    when = {path: json.loads(path.read_text())["made"] for path in made}
    assert len(made) > 40
    for path in made:
        for place in json.loads(path.read_text())["sources"].values():
            source = Path(os.path.normpath(path.parent / place))
            assert manifest_path(source) in when or source.is_file(), f"{path} reads {source}"
            assert when.get(manifest_path(source), "") <= when[path]


def test_the_same_again_runs_nothing(finished: tuple[Path, str], run: Run) -> None:
    config, _ = finished
    before = tables(config)
    times = {path: path.stat().st_mtime_ns for path in config.parent.rglob("*.safetensors")}
    assert all("_dump" in name or "_plot" in name for name in steps(run(config, *WHOLE)))
    assert tables(config) == before
    assert times == {path: path.stat().st_mtime_ns for path in config.parent.rglob("*.safetensors")}
    planned = run(config, *WHOLE, "--dry-run")
    assert re.search(r"(\d+) steps: \1 done, 0 to run", planned)
    assert all(line.startswith(("#", "cd ", "export ")) for line in planned.splitlines())


def test_a_wider_plan_shares_what_is_there(finished: tuple[Path, str], run: Run) -> None:
    """Another seed adds its SAE and what is made of it, and nothing else."""
    config, _ = finished
    planned = run(
        config, *DATASETS, *SHORT, "--seed", "49,51", "--l1_coeff", "5e-4", "--without", "explanations,nec", "--dry-run"
    )
    to_do = [line for line in planned.splitlines() if line.startswith("python ")]
    assert to_do
    assert all("--seed 51" in line for line in to_do)


def test_killed_ten_times_it_ends_with_the_same_tables(
    small_build: Path, finished: tuple[Path, str], run: Run, tmp_path: Path
) -> None:
    config, output, chance = make_config(small_build, tmp_path / "killed"), tmp_path / "output.txt", random.Random(0)
    n_killed, n_steps = 0, len(re.findall("^# [0-9]+\\. ", run(config, *QUICK, "--dry-run"), re.M))
    for kill in range(10):
        target = 1 + kill * n_steps // 10
        child = start(config, QUICK, output)
        while child.is_alive() and not (output.is_file() and f"== {target}/" in output.read_text()):
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.4))
        if child.is_alive():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        n_killed += child.exitcode == -signal.SIGKILL
        output.unlink(missing_ok=True)
    assert n_killed == 10
    last = start(config, QUICK, output)
    last.join()
    assert last.exitcode == 0, output.read_text()[-2000:]
    expected = [line for line in tables(finished[0]).splitlines() if not line.startswith("edits on ")]
    assert tables(config).splitlines() == expected
    for path in finished[0].parent.glob("run/SAE/**/*_final.safetensors"):
        ours = config.parent / path.relative_to(finished[0].parent)
        assert ours.read_bytes() == path.read_bytes(), "the SAE, bit for bit"


def test_the_commands_of_the_plan_do_what_it_does(copied: Path, run: Run) -> None:
    """A dry run's lines are a shell script; after it, nothing is left to do. What is there is not estimated."""
    flags = [*DATASETS[:1], "openmoji_categories", *SHORT, "--seed", "60", "--with", "zero_shot"]
    planned = run(copied, *flags, "--dry-run", measured=True)
    to_do = [line for line in planned.splitlines() if not line.startswith("#")]
    assert [re.findall(r"scripts/(\d\d)", line) for line in to_do[2:]] == [["02"], ["04"], ["06"], ["07"]]
    assert re.search(r"# to run: .* of disk space", planned)
    script = "\n".join(line.replace("python", sys.executable, 1) for line in to_do[:4])
    subprocess.run(["bash", "-euc", script], check=True, capture_output=True)
    assert "2 to run" in run(copied, *flags, "--dry-run")
    assert steps(run(copied, *flags)) == [
        "strengths openmoji_clip openmoji_categories",
        "probe openmoji_clip openmoji_categories",
    ]


def test_what_cannot_run_is_known_before_anything_starts(copied: Path, run: Run) -> None:
    """A data set that is missing and an encoder that does not load: one line each; --keep_going does the rest."""
    text = copied.read_text().replace("encoders = {", 'encoders = {"lost": "local-dir:run/no_such", ')
    copied.write_text(text.replace("probe_datasets = {", 'probe_datasets = {"cifar10": "run/cifar10", '))
    flags = ["--img_enc_name", "openmoji_clip,lost", "--probe_dataset", "cifar10,openmoji_categories", *SHORT]
    flags += ["--seed", "60", "--with", "zero_shot"]
    refused = run(copied, *flags, code=1)
    assert "run/cifar10 is missing" in refused
    assert "torchvision.datasets.CIFAR10(FOLDER, download=True)" in refused
    assert "no_such" in refused
    assert steps(refused) == [], "nothing has started"
    assert run(copied, *flags, "--dry-run").count("# missing: ") == 2
    done = run(copied, *flags, "--keep_going", code=1)
    assert "failed: probe_features openmoji_clip cifar10: " in done
    assert "failed: zero_shot openmoji_clip cifar10: it needs `probe_features openmoji_clip cifar10`" in done
    assert "openmoji_categories" in tables(copied)


def test_a_failure_stops_only_what_needs_it(copied: Path, run: Run) -> None:
    """A stage that fails although nothing seemed to be missing."""
    flags = [*DATASETS[:1], "openmoji_categories", *SHORT[:-4], "--seed", "60", "--with", "linear_probe"]
    results = Artifacts(load_settings(copied)).probe_results()
    good = results.read_bytes()
    results.write_text("this is no table of results\n")
    failed = run(copied, *flags, "--keep_going", code=1)
    assert failed.count("is not a results file") >= 2
    assert "2 of 8 steps have failed" in failed
    assert "is not a results file" in run(copied, *flags, code=1), "without the flag, the first failure is the end"
    results.write_bytes(good)
    last = ["probe linear_probe openmoji_clip openmoji_categories", "probe openmoji_clip openmoji_categories"]
    assert steps(run(copied, *flags)) == last


def test_what_was_made_from_something_else_is_made_again_on_request(copied: Path, run: Run) -> None:
    flags = [*DATASETS[:1], "openmoji_categories", *SHORT, "--with", "zero_shot", "--l1_coeff", "3e-4"]
    assert "(" not in "".join(steps(run(copied, *flags)))
    words = Artifacts(load_settings(copied)).words()
    words.write_text("\n".join(words.read_text().split()[:50]) + "\n")
    refused = run(copied, *flags, code=1)
    assert "words" in refused
    assert "--overwrite" in refused
    assert steps(refused) == []
    assert steps(run(copied, *flags, "--overwrite")) == ["vocabulary openmoji_clip", "names openmoji_clip"]


def test_what_only_finished_steps_read_is_not_made_again(copied: Path, run: Run) -> None:
    """The SAE's images and features are gone, as with an imported SAE; the results are all there."""
    shutil.rmtree(load_settings(copied).data_dir / "activations_img" / "openmoji")
    (copied.parent / "run/webdataset").unlink()
    again = run(copied, *QUICK)
    assert "sae_features openmoji_clip: not needed" in again
    assert steps(again) == []
    assert re.search(r"(\d+) steps: \1 done", run(copied, *QUICK, "--dry-run"))


SBATCH = """#!/bin/bash
# Runs a job at once, as SLURM would, if those that it waits for have succeeded.
job="${@: -1}"
echo "$*" >> "$LOG"
for id in $(grep -o 'afterok:[0-9:]*' <<< "$*" | tr ':' ' '); do
    case $id in afterok) ;; *) test -f "$LOG.$id" || exit 1 ;; esac
done
n=$(wc -l < "$LOG")
bash "$job" > "$LOG.out" 2>&1 && touch "$LOG.$n"
echo "$n"
"""


def test_slurm_jobs_run_in_order(copied: Path, run: Run, tmp_path: Path) -> None:
    """An sbatch that runs what it is given at once; the last of the jobs writes the tables."""
    flags = [*DATASETS[:1], "openmoji_categories", *SHORT, "--seed", "60", "--with", "zero_shot"]
    submit = Path(re.findall(r"bash (\S+)", run(copied, *flags, "--slurm"))[0])
    jobs = sorted(submit.parent.glob("*.sbatch"))
    assert [re.findall(r"\d+_([a-z]+)", job.name)[0] for job in jobs] == ["sae", "names", "strengths", "probe", "tables"]
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    done = subprocess.run(
        ["bash", str(submit), "--account=mine"], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + (tmp_path / "log.out").read_text()
    submitted = (tmp_path / "log").read_text().splitlines()
    assert ["afterok" in line for line in submitted] == [False, True, True, True, True]
    assert all("--account=mine" in line for line in submitted)
    assert len(list(tmp_path.glob("log.[0-9]*"))) == len(jobs), "every job has succeeded"
    assert "DN-CBM" in tables(copied)


@pytest.mark.parametrize(("code", "requeued"), [(0, True), (0, False), (3, False)])
def test_a_slurm_job_that_is_stopped_returns_to_the_queue(
    copied: Path, run: Run, tmp_path: Path, code: int, requeued: bool
) -> None:
    """The python of the job is a script that ends on SIGTERM, as training does, or by itself."""
    flags = [*DATASETS[:1], "openmoji_categories", *SHORT, "--seed", "60", "--with", "zero_shot"]
    submit = Path(re.findall(r"bash (\S+)", run(copied, *flags, "--slurm"))[0])
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/bash\ntrap 'touch {tmp_path}/saved; exit 0' TERM\ntouch {tmp_path}/begun\n")
    with fake.open("a") as file:
        file.write("for i in $(seq 1000); do sleep 0.02; done\n" if requeued else f"exit {code}\n")
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$*" > {tmp_path}/requeued\n')
    for path in (fake, tmp_path / "scontrol"):
        path.chmod(0o755)
    job = next(submit.parent.glob("001_*.sbatch"))
    job.write_text(job.read_text().replace(sys.executable, str(fake)))
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    with subprocess.Popen(["bash", str(job)], env=os.environ | {"PATH": path, "SLURM_JOB_ID": "7"}) as shell:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        if requeued:
            shell.send_signal(signal.SIGUSR1)
        assert shell.wait(timeout=30) == code
    assert (tmp_path / "saved").exists() == (tmp_path / "requeued").exists() == requeued
