"""Planning and running: what `scripts/reproduce.py` calls."""

import io
import shlex
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from typing import Any

from dncbm.explain.plotting.trade_offs import COMPARE_RUNS
from dncbm.features.datasets import counted
from dncbm.flags import run_stage
from dncbm.reproduce.estimates import Estimate, estimate, how_measured
from dncbm.reproduce.plan import Plan, Step, plan_of, words_of
from dncbm.reproduce.record import duration, estimated_seconds, record_estimates, record_seconds, said_and_took, size
from dncbm.reproduce.report import write_report
from dncbm.reproduce.slurm import write_jobs
from dncbm.reproduce.state import EXPLAINS, State, blocked, not_needed, state_of, what_is_missing
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Comparison, Grid
from dncbm.runs.errors import UserError, first_line
from dncbm.runs.manifests import Outcome, verifying
from dncbm.runs.settings import ROOT, Settings
from dncbm.stages import STAGES
from sparse_autoencoder import CheckpointError, NonFiniteError
from sparse_autoencoder.declare import values

FAILURES = (UserError, CheckpointError, NonFiniteError, OSError, MemoryError, RuntimeError)
"""What may go wrong with one step and not with others. Anything else is a fault of this program."""

NOT_ASKED = (commands.SAE_FEATURES.name, commands.PROBE_FEATURES.name, commands.INTERVENE.name)
"""Stages that would look at all images, or load an encoder, to find that there is nothing to do."""


def reproduce(
    settings: Settings,
    grid: Grid | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    passed_on: Mapping[str, Any] | None = None,
) -> Outcome:
    """Plan every stage for encoders x settings x seeds x probe data sets, and run what is not done; write the tables.

    What is missing is known before anything starts. Each step is a stage's own function, so a plan that was interrupted
    resumes, and plans share what they have in common. A step is skipped if its outputs are whole, have the step's settings,
    and nothing that they were made from has changed; images are not looked at again.

    Args:
        settings: the config.
        grid: what is combined, and which parts are made; by default the paper's experiment.
        device: where the steps run.
        overwrite: replace outputs that were made from other inputs or settings.
        passed_on: flag -> value of flags of the stages.

    Returns:
        STOPPED if a stage was asked to stop, else RAN.

    Raises UserError if a flag is wrong; if steps cannot run and `keep_going` is off; and at the end if steps have failed.
    """
    grid = grid or Grid()
    plan = plan_of(settings, grid, passed_on)
    found = {step.name: state_of(settings, step) for step in plan.steps}
    states = {name: state for name, (state, _) in found.items()}
    unneeded = not_needed(plan.steps, states)
    to_run = [step for step in plan.steps if states[step.name] is not State.DONE and step.name not in unneeded]
    lacking = what_is_missing(settings, to_run)
    if not overwrite:
        stale = {step.name: found[step.name][1] for step in to_run if states[step.name] is State.STALE}
        lacking |= {name: f"{why}; pass --overwrite to make it again" for name, why in stale.items()}
    cannot = blocked(to_run, lacking)
    if grid.dry_run:
        _print_plan(settings, plan, states, to_run, lacking, cannot, device, overwrite)
        return Outcome.RAN
    for reason in dict.fromkeys(lacking.values()):
        names = [step.name for step in to_run if lacking.get(step.name) == reason]
        print(f"missing for `{names[0]}`" + (f" and {len(names) - 1} more steps" if names[1:] else "") + f": {reason}")
    if cannot and not grid.keep_going:
        others = ", or pass --keep_going to run the others" if len(cannot) < len(to_run) else ""
        raise UserError(
            f"{len(cannot)} of {len(plan.steps)} steps cannot run, as listed above; name fewer encoders or data sets{others}"
        )
    if grid.slurm:
        _write_jobs(settings, [step for step in to_run if step.name not in cannot], grid, device, overwrite, passed_on)
        return Outcome.RAN
    failed = dict(cannot)
    outcome = _run(settings, plan, unneeded, failed, device, overwrite, grid.keep_going)
    for name, why in failed.items():
        print(f"failed: {name}: {why}")
    if outcome is Outcome.STOPPED:
        print("stopped: run the same command again to resume")
        return outcome
    try:
        _report(settings, grid, plan)
    except UserError as error:  # after failures, there may be nothing to show
        if not failed:
            raise
        print(f"no tables: {error}")
    if failed:
        raise UserError(
            f"{len(failed)} of {len(plan.steps)} steps have failed, as listed above; fix that and run the same command again"
        )
    return Outcome.RAN


# ------------------------------------------------------------------------------------------------------- the plan


def _print_plan(
    settings: Settings, plan: Plan, states: Mapping[str, State], needed: Sequence[Step], lacking: Mapping[str, str],
    cannot: Mapping[str, str], device: str, overwrite: bool,
) -> None:  # fmt: skip
    """Print a plan as lines that a shell can run: commands of what is to do, comments for the rest."""
    path = Artifacts(settings).reproduction_record()
    to_run = [step for step in needed if step.name not in cannot]
    names_needed, names_to_run = {step.name for step in needed}, {step.name for step in to_run}
    estimates = estimate(settings, to_run, device) if to_run else {}
    with suppress(OSError):  # where nothing can be written, the plan is still printed
        record_estimates(path, to_run, estimates)
    more = _more(device, overwrite)
    print(f"cd {shlex.quote(str(ROOT))}\nexport DNCBM_CONFIG={shlex.quote(str(settings.path))}")
    if estimates:
        print(f"# estimates: {how_measured(device)}")
    for number, step in enumerate(plan.steps, start=1):
        state = states[step.name]
        if step.name in cannot:
            state = State.STALE if state is State.STALE else State.MISSING
        word = state.value if state is State.DONE or step.name in names_needed else "not needed"
        about = [word, *_estimated(estimates.get(step.name)), cannot.get(step.name, "")]
        print(f"# {number}. {step.name}: {', '.join(filter(None, about))}")
        print(("" if step.name in names_to_run else "# ") + step.command(*more))
    n_done = len(plan.steps) - len(needed)
    print(f"# {counted(len(plan.steps), 'step')}: {n_done} done, {len(to_run)} to run, {len(cannot)} that cannot run")
    if known := [found for found in estimates.values() if found.seconds is not None]:
        seconds, n_bytes = (sum(filter(None, column)) for column in zip(*((e.seconds, e.bytes) for e in known), strict=True))
        unknown = len(to_run) - len(known)
        free = shutil.disk_usage(next(one for one in (settings.data_dir, settings.data_dir.parent) if one.is_dir())).free
        print(
            f"# to run: {_about(seconds)}{f' and {unknown} steps without an estimate' if unknown else ''}, "
            f"{size(n_bytes)} of disk space ({size(free)} are free at {settings.data_dir})"
        )
    for reason in dict.fromkeys(lacking.values()):
        print(f"# missing: {reason}")


def _about(seconds: float) -> str:
    text = duration(seconds)
    return text if text.startswith("under") else f"about {text}"


def _estimated(found: Estimate | None) -> list[str]:
    if found is None:
        return []
    time = ["no estimate of the time"] if found.seconds is None else [_about(found.seconds)]
    return time + ([] if found.bytes is None else [size(found.bytes)])


def _more(device: str, overwrite: bool) -> list[str]:
    flags = {"--overwrite": overwrite, "--verify": verifying()}
    return [*([] if device == "auto" else ["--device", device]), *(flag for flag, is_given in flags.items() if is_given)]


def _write_jobs(
    settings: Settings, steps: Sequence[Step], grid: Grid, device: str, overwrite: bool, passed_on: Mapping[str, Any] | None
) -> None:
    own = {name: value for name, value in values(grid).items() if name != "slurm" and value not in ((), False)}
    tables = ["scripts/reproduce.py", *words_of(commands.REPRODUCE.name, own | dict(passed_on or {})), *_more(device, False)]
    more = _more(device, overwrite)
    folder = Artifacts(settings).reproduction_jobs()
    submit = write_jobs(settings, folder, steps, tables, more, after_failures=grid.keep_going)
    print(f"{counted(len(steps), 'job')}, and one that writes the tables; submit them with: bash {shlex.quote(str(submit))}")


# ------------------------------------------------------------------------------------------------------ running it


def _run(
    settings: Settings, plan: Plan, unneeded: Collection[str], failed: dict[str, str], device: str, overwrite: bool,
    keep_going: bool,
) -> Outcome:  # fmt: skip
    """Run what is not done and is needed. Adds the steps that fail, and those that need them, to `failed`.

    A state is asked for when its step's turn comes: an input may have been made again since. Stages are also asked for what
    seems to be done, silently: they compare more settings.
    """
    path = Artifacts(settings).reproduction_record()
    estimates = estimated_seconds(path, plan.steps)
    for number, step in enumerate(plan.steps, start=1):
        title = f"== {number}/{len(plan.steps)} {step.name}"
        if step.name in unneeded:
            print(f"{title}: not needed")
            continue
        was_done = step.name not in failed and state_of(settings, step)[0] is State.DONE
        is_done = was_done and step.stage not in EXPLAINS
        if was_done and (step.stage in NOT_ASKED or any(name in failed or name in unneeded for name in step.after)):
            print(f"{title}: done")
            continue
        if step.name not in failed and (needed := next((name for name in step.after if name in failed), None)):
            failed[step.name] = f"it needs `{needed}`"
        if step.name in failed:
            print(f"{title}: {failed[step.name]}")
            continue
        if not is_done:
            left = sum(estimates.get(one.name, 0.0) for one in plan.steps[number - 1 :])
            own = estimates.get(step.name)
            said = "" if own is None else f" (estimated: {duration(own)}; all that is left: {duration(left)})"
            print(title + said, flush=True)  # before the progress bar
        begun, quiet = time.monotonic(), io.StringIO()
        try:
            with redirect_stdout(quiet) if is_done else nullcontext():
                outcome = run_stage(settings, STAGES[step.stage], step.given, device=device, overwrite=overwrite)
        except FAILURES as error:
            if not keep_going:
                raise
            failed[step.name] = str(error) if isinstance(error, UserError) else first_line(error)
            print(f"{title} failed: {failed[step.name]}")
            continue
        finally:
            if not was_done:
                record_seconds(path, step, time.monotonic() - begun)
        if is_done:
            print(f"{title}: done" if outcome is not Outcome.RAN else f"{title}\n{quiet.getvalue().rstrip()}")
        if outcome is Outcome.STOPPED:
            return outcome
    return Outcome.RAN


def _report(settings: Settings, grid: Grid, plan: Plan) -> None:
    """Print and write the tables; of a sweep, all SAEs beside one another; and what was estimated beside what it took."""
    print("== tables")
    write_report(settings, plan.saes, plan.probes, plan.baselines, plan.edited_by)
    if grid.sweep:
        print("== the SAEs")
        STAGES[COMPARE_RUNS.name].function(settings, Comparison())
    if table := said_and_took(Artifacts(settings).reproduction_record(), plan.steps):
        print("== time and disk space", table, sep="\n")


REPRODUCE = commands.REPRODUCE.stage(function=reproduce)
