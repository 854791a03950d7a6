"""Which finished run flags mean, and what is missing before a stage can start.

Manifests hold every setting; names are never parsed.
"""

import difflib
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from dncbm.runs.artifacts import Artifacts, strength_in
from dncbm.runs.commands import NAMES
from dncbm.runs.declarations import ProbeRun, SAERun
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import manifest_path, read_manifest
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from sparse_autoencoder.declare import build, flags

Run = type[SAERun] | type[ProbeRun]
RUNS: dict[str, Run] = {"sae": SAERun, "probe": ProbeRun}
"""Flag that takes the name of a run -> what it names."""
TELLING = tuple(
    name for name, flag in flags(SAERun).items() if flag.setting.identifies != "never" or flag.setting.in_name is not None
)
"""Settings that an SAE depends on, or that tell where it lies."""
LISTED = 12
"""At most this many runs are listed in an error."""

Values = dict[str, Any]


class NotMade(UserError):
    """No finished output agrees with the flags."""


def find(settings: Settings, stage: Stage, values: Mapping[str, Any], given: Collection[str]) -> Values:
    """The settings of the finished output of a stage that flags mean, which is printed.

    It is the one that all flags and defaults name, if it exists; else the only one that agrees with the flags given. With
    --sae or --probe, it is the one of that name. Data sets, the encoder, its hook point and the split are never guessed.

    Args:
        settings: the config.
        stage: whose output is meant.
        values: flag -> value, defaults included.
        given: the flags on the command line.

    Returns:
        Flag -> value of that output.

    Raises:
        NotMade: there is none; the error names the first thing in its chain that is missing.
        UserError: there are several, or a flag contradicts --sae or --probe.
    """
    path, found, only = _find(settings, stage, values, given)
    shown = path.parent if path.name == "data" else path
    print(f"{stage.name}: {shown}" + (" (the only one that the flags allow)" if only else ""))
    return found


def require_inputs(settings: Settings, stage: Stage, values: Mapping[str, Any]) -> None:
    """Raises UserError if an input of a stage is missing; it names the first thing that is, however far back."""
    if not _is_made(settings, stage, values):
        *before, _ = _to_run(settings, stage, values)
        if before:
            raise _missing(settings, before, *before[0])


# ----------------------------------------------------------------------------------------------------------- finding


def _find(settings: Settings, stage: Stage, values: Mapping[str, Any], given: Collection[str]) -> tuple[Path, Values, bool]:
    """Path and settings of an output, and whether they were guessed."""
    names = {flag: values[flag] for flag, run in RUNS.items() if values.get(flag) and run in stage.takes}
    wanted = _outputs(settings, stage, values)
    if _is_made(settings, stage, values) and _has_names(values, names):
        return wanted[0], dict(values), False
    of_stage = stage.flags()
    fixed = [name for name, flag in of_stage.items() if flag.setting.in_name == ""]
    made = _made(settings, stage)
    here = {path: run for path, run in made.items() if not _differing(run, values, fixed)}
    named = {path: run for path, run in here.items() if _has_names(run, names)}
    # How often a run was saved, for example, does not matter.
    named_by = [name for name, flag in of_stage.items() if flag.setting.identifies != "never" or flag.setting.in_name]
    asked = [name for name in named_by if name in given]
    found = {path: run for path, run in named.items() if not _differing(run, values, asked)}
    if len(found) == 1:
        ((path, run),) = found.items()
        return path, dict(values) | run, not names
    if found:
        raise UserError(f"several outputs of `{stage.name}` agree with the flags: add {_ways(stage, list(found.values()))}")
    if named and names:
        ((path, run), *_) = named.items()
        name = _differing(run, values, asked)[0]
        called = " ".join(f"--{flag} {value}" for flag, value in names.items())
        raise UserError(f"{called} contradicts --{name} {values[name]}: it has --{name} {run[name]}; leave one of them out")
    if stage.reads_run is not None:  # if that is missing, it is missing first
        _, values, _ = _find(settings, stage.reads_run, values, given)
    trained = [flag for flag in names if RUNS[flag] in stage.trains]
    if trained:
        raise _unknown(stage, names[trained[0]], RUNS[trained[0]], here, made)
    raise _missing(settings, _to_run(settings, stage, values), stage, values, list(here.values()))


def _outputs(settings: Settings, stage: Stage, values: Mapping[str, Any]) -> list[Path]:
    return list(stage.outputs(Artifacts(settings), *(build(declared, values) for declared in stage.takes)))


def _is_made(settings: Settings, stage: Stage, values: Mapping[str, Any]) -> bool:
    outputs = _outputs(settings, stage, values)
    return bool(outputs) and all(path.is_file() or manifest_path(path).is_file() for path in outputs)


def _made(settings: Settings, stage: Stage) -> dict[Path, Values]:
    """Every finished output of a stage with the settings of its run; one that cannot be read is passed over."""
    found = {}
    for path in sorted(stage.made(Artifacts(settings))):
        if not manifest_path(path).is_file():
            continue
        try:
            run: Values = read_manifest(path).get("run") or {}
            for cls in RUNS.values():
                if cls in stage.takes:
                    build(cls, run)
        except Exception as error:  # whatever a damaged manifest holds
            reason = str(error) if isinstance(error, UserError) else f"{manifest_path(path)} describes no run: {error!r}"
            logging.getLogger(__name__).warning("%s; passed over", reason)
            continue
        if run:
            found[path] = run
    return found


def _has_names(run: Mapping[str, Any], names: Mapping[str, str]) -> bool:
    return all(build(RUNS[flag], run).config_name == name for flag, name in names.items())


def _differing(run: Mapping[str, Any], values: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The flags in which a run is another than asked for; what the run does not record is not compared."""
    return [name for name in names if name in run and values.get(name) not in (None, run[name])]


# ---------------------------------------------------------------------------------------------------- what is missing


def _needed(stage: Stage, values: Mapping[str, Any]) -> list[Stage]:
    """The stages without whose outputs a stage cannot start."""
    needed = stage.inputs if stage.needs is None else stage.needs
    if ProbeRun in stage.trains and values.get("probe_on_features"):  # the baseline has no SAE
        needed = tuple(one for one in needed if SAERun not in one.takes)
    return [one for one in needed if _locates(stage, one)]


def _locates(stage: Stage, needed: Stage) -> bool:
    """Whether the flags of a stage say which output of another it reads. A list of data sets, for one, does not."""
    own = stage.flags()
    placed = [name for name, flag in needed.flags().items() if flag.setting.in_name == ""]
    return all(name in own and not own[name].is_tuple for name in placed)


def _to_run(settings: Settings, stage: Stage, values: Mapping[str, Any]) -> list[tuple[Stage, Values]]:
    """The stages that have to run so that the output of one exists, that one last, each with its flags."""
    passed = {name: values[name] for name in stage.flags() if name in values}  # what a stage is not told is all
    steps: dict[str, tuple[Stage, Values]] = {}
    for needed in _needed(stage, passed):
        if not _is_made(settings, needed, passed):
            for one in _to_run(settings, needed, passed):
                steps.setdefault(one[0].name, one)
    return [*steps.values(), (stage, passed)]


def _missing(
    settings: Settings,
    steps: Sequence[tuple[Stage, Mapping[str, Any]]],
    stage: Stage,
    values: Mapping[str, Any],
    others: Sequence[Values] = (),
) -> NotMade:
    """The error for the output of a stage that is missing, with the steps that make it; `others` are runs that exist."""
    outputs = _outputs(settings, stage, values)
    path = next((path for path in outputs if not path.is_file() and not manifest_path(path).is_file()), outputs[0])
    names = [build(cls, values).config_name for cls in RUNS.values() if cls in stage.trains]
    state = "unfinished" if path.is_dir() else "missing"
    noun = stage.makes or f"the output of `{stage.name}`"
    what = (
        f"there is no {noun} {names[0]} ({path})"
        if names
        else f"{noun} {path} {'are' if noun.endswith('s') else 'is'} {state}"
    )
    run = ", then ".join(_command(one, told) for one, told in steps)
    choose = f", or add {_ways(stage, others)}" if others else ""
    return NotMade(f"{what}: run {run} with the same flags{choose}")


def _command(stage: Stage, values: Mapping[str, Any]) -> str:
    """The command of a step. Training would not make the copy of an SAE that is fine-tuned towards its names."""
    if SAERun in stage.trains and (strength := strength_in(build(SAERun, values).suffix)):
        return f"{NAMES.command('--align_names', strength)} (without the _align{strength} of --save_suffix)"
    return stage.command()


def _unknown(stage: Stage, name: str, cls: Run, here: Mapping[Path, Values], made: Mapping[Path, Values]) -> UserError:
    """The error for a name that no run has, or only one of another encoder or data set."""
    places = flags(cast(Any, cls))
    elsewhere = [run for run in made.values() if build(cls, run).config_name == name]
    if elsewhere:
        placed = [flag for flag, about in places.items() if about.setting.in_name == "" and flag in elsewhere[0]]
        told = " ".join(f"--{flag} {elsewhere[0][flag]}" for flag in placed)
        return UserError(f"there is no {stage.makes} {name} here, but with {told}")
    names = sorted({build(cls, run).config_name for run in here.values()})
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
    known = f"; did you mean {' or '.join(near)}?" if near else f": train one with {stage.command()}"
    return UserError(f"there is no {stage.makes} {name}" + known)


def changed_flags(settings: Settings, values: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The words of a command line that give settings of an SAE, as far as they are not the defaults of config.py.

    `values` is flag -> value, of which `names` are told.
    """
    known, words = flags(SAERun), list[str]()
    for name in names:
        value, configured = values[name], settings.defaults.get(name)
        default = known[name].default if configured is None else known[name].parse(str(configured))
        if value not in (None, default):
            words += [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]
    return words


def _ways(stage: Stage, runs: Sequence[Values]) -> str:
    """The flags that tell runs apart, to be pasted: `--sae A, or --sae B`."""
    described = []
    for run in runs:
        names = {flag: build(cls, run).config_name for flag, cls in RUNS.items() if cls in stage.takes}
        beside = {name for cls in RUNS.values() if cls in stage.takes for name in flags(cast(Any, cls))}
        described.append(names | {name: run[name] for name in stage.flags() if name in run and name not in beside})
    if len(described) > 1:
        same = {name for name in described[0] if len({repr(one.get(name)) for one in described}) == 1}
        described = [{name: value for name, value in one.items() if name not in same} for one in described]
    told = [" ".join(f"--{name} {value}" for name, value in one.items()) for one in described]
    told = list(dict.fromkeys(told))
    more = [f"one of {len(told) - LISTED} more"] if len(told) > LISTED else []
    return ", or ".join(told[:LISTED] + more)
