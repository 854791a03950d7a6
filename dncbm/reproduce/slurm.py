"""A plan as jobs of a SLURM cluster: a file per step, and one that submits them in order."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dncbm.reproduce.plan import Step
from dncbm.runs.settings import ROOT, Settings
from sparse_autoencoder.files import whole_file

JOB = """\
#!/bin/bash
# {name}
#SBATCH --job-name={job}
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G{gpus}
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={log}

# Two minutes before the time limit, SLURM sends SIGUSR1. The stage gets SIGTERM, on which training saves its state; then
# the job returns to the queue, and the same command resumes.
stopped="" child=""
stop() {{ stopped=1; [ -z "$child" ] || kill -TERM "$child"; }}
trap stop USR1
cd {root} || exit 1
export DNCBM_CONFIG={config}
{command} &
child=$!
[ -z "$stopped" ] || kill -TERM "$child"
wait "$child"; code=$?
if [ -n "$stopped" ]; then
    wait "$child"; code=$?
    if [ "$code" = 0 ] || [ "$code" = 143 ]; then  # its state is saved, or it has ended between two shards
        scontrol requeue "$SLURM_JOB_ID"
        exit
    fi
fi
exit "$code"
"""
SUBMIT = """\
#!/bin/bash
# Submits the jobs of this folder; each waits until those whose outputs it reads have succeeded. Arguments are passed on to
# sbatch and override what the files say: bash submit.sh --partition=gpu --account=mine --time=08:00:00
set -eu
cd "$(dirname "$0")"
"""


def write_jobs(
    settings: Settings,
    folder: Path,
    steps: Sequence[Step],
    tables: Sequence[str],
    more: Sequence[str],
    *,
    after_failures: bool,
) -> Path:
    """Write a job for each step, one that writes the tables at the end, and the script that submits them.

    Args:
        settings: the config.
        folder: where the files are written; the jobs of an earlier plan are removed.
        steps: those that are not done, in order.
        tables: words of the command that writes the tables.
        more: flags added to each command.
        after_failures: write the tables even if jobs have failed.

    Returns:
        The path of the script that submits.
    """
    for old in folder.glob("[0-9]*.sbatch"):
        old.unlink()
    submit, ids = SUBMIT, dict[str, str]()
    for number, step in enumerate(steps, start=1):
        command = step.command(*more).replace("python", shlex.quote(sys.executable), 1)
        job = f"{number:03d}_{re.sub(r'[^A-Za-z0-9]+', '_', step.name)[:80]}"
        _write_job(settings, folder, job, step.name, command, needs_gpu=not step.stage.endswith("_plot"))
        waits = [ids[name] for name in step.after if name in ids]
        ids[step.name] = f"job_{number:03d}"
        submit += _submitted(ids[step.name], job, "afterok", waits)
    command = " ".join(map(shlex.quote, (sys.executable, *tables)))
    _write_job(settings, folder, last := f"{len(steps) + 1:03d}_tables", "the tables", command, needs_gpu=False)
    read = {name for step in steps for name in step.after}
    leaves = [ids[step.name] for step in steps if step.name not in read]
    submit += _submitted("tables", last, "afterany" if after_failures else "afterok", leaves)
    path = folder / "submit.sh"
    with whole_file(path) as temporary:
        temporary.write_text(submit, encoding="utf-8")
    return path


def _write_job(settings: Settings, folder: Path, job: str, name: str, command: str, *, needs_gpu: bool) -> None:
    text = JOB.format(
        name=name, job=f"dncbm-{job[:60]}", gpus="\n#SBATCH --gpus=1" if needs_gpu else "", command=command,
        log=shlex.quote(str(folder / f"{job}.log")), root=shlex.quote(str(ROOT)), config=shlex.quote(str(settings.path)),
    )  # fmt: skip
    with whole_file(folder / f"{job}.sbatch") as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def _submitted(variable: str, job: str, kind: str, after: Sequence[str]) -> str:
    dependency = f" --dependency={kind}:" + ":".join(f"${{{one}}}" for one in after) if after else ""
    submit = f'{variable}=$(sbatch --parsable --kill-on-invalid-dep=yes{dependency} "$@" {job}.sbatch)'
    # Where clusters are joined, `--parsable` adds the cluster's name after a semicolon.
    return f"{submit}; {variable}=${{{variable}%%;*}}\n"
