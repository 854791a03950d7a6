"""Flag -> value: what flags mean together with presets, the defaults of config.py and the runs that exist.

A command line and `ConceptBottleneckModel.from_run` read their flags in the same way.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from dncbm.runs.declarations import Execution, NamedProbe, NamedSAE, Preset, ProbeRun, SAERun, Unused, paper_preset
from dncbm.runs.errors import UserError
from dncbm.runs.find import RUNS, NotMade, find, require_inputs
from dncbm.runs.manifests import Outcome
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Command, Stage
from dncbm.stages import COMMANDS, PIPELINE, PIPELINE_COMMANDS, Pipeline, stages_of
from sparse_autoencoder.declare import Flag, build, flags


def flags_of(stage: Command) -> dict[str, Flag]:
    """Every flag that a stage reads, by name."""
    return {name: flag for cls in reversed(takes_of(stage)) for name, flag in flags(cls).items()}


def takes_of(stage: Command) -> list[type]:
    """The declarations whose flags a stage reads; where two have a flag of one name, the first counts."""
    takes = [*stage.takes, *([Preset] if ProbeRun in stage.takes else []), Execution]
    read = {SAERun: NamedSAE, ProbeRun: NamedProbe}
    takes += [
        named for cls, named in read.items() if cls in stage.takes and (cls not in stage.trains or stage.name == PIPELINE.name)
    ]
    return [*takes, Unused]


def all_flags() -> dict[str, Flag]:
    """Every flag of every stage."""
    takes = [cls for command in (PIPELINE, *COMMANDS.values()) for cls in takes_of(command)]
    return {name: flag for cls in dict.fromkeys(takes) for name, flag in flags(cls).items()}


def defaults_of(stage: Command, configured: Mapping[str, Any]) -> dict[str, Any]:
    """Flag -> default: that of config.py (`config_defaults`) where it has one, else the declared one."""
    declared = flags_of(stage)
    defaults = {name: flag.default for name, flag in declared.items()}
    return defaults | {
        name: configured[name] for name in declared if name in configured and declared[name].setting.configurable
    }


def resolved(stage: Command, given: Mapping[str, Any], configured: Mapping[str, Any]) -> dict[str, Any]:
    """Flag -> value of every flag that a stage reads.

    A flag that is given wins over the preset, the preset over the defaults of config.py, and those over the declared ones.
    Where a probe is read, not trained, it is by default the paper's for the data set.
    """
    defaults = defaults_of(stage, configured)
    values = defaults | dict(given)
    dataset = str(values.get("probe_dataset"))
    preset = build(Preset, values).values(dataset)
    if preset:
        print(f"--preset {values['preset']} for {dataset}: " + ", ".join(f"--{k} {given.get(k, preset[k])}" for k in preset))
    elif ProbeRun in set(stage.takes) - set(stage.trains) and not given.keys() & (paper := paper_preset(dataset)).keys():
        preset = {} if configured.keys() & paper.keys() else paper
    return defaults | dict(preset) | dict(given)


def config_defaults(settings: Settings) -> dict[str, Any]:
    """Flag -> value of the `defaults` of config.py.

    Raises UserError if one is no flag of any script, or has a value that the flag does not allow.
    """
    groups = [*map(flags, (Execution, Preset, Unused)), *(command.flags() for command in (PIPELINE, *COMMANDS.values()))]
    known = {name: flag for group in reversed(groups) for name, flag in group.items() if flag.setting.configurable}
    found = {}
    for name, value in settings.defaults.items():
        where = f"{settings.path}: `defaults[{name!r}]`"
        if name not in known:
            raise UserError(f"{where}: {unknown_flag(str(name), known)}")
        if value is None and known[name].default is None:
            continue
        try:
            found[name] = parsed(known[name], value)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
    return found


def parsed(flag: Flag, value: Any) -> Any:
    """The value of a flag that Python code gives. Raises ValueError, which says what it must be, if it is not allowed."""
    parts = value if flag.is_tuple and isinstance(value, list | tuple) else [value]
    found = [flag.parse(str(part)) for part in parts]
    return tuple(one for part in found for one in part) if flag.is_tuple else found[0]


def unknown_flag(name: str, known: Iterable[str]) -> str:
    """What to say of a flag that no script has."""
    return f"the scripts have no flag --{name}{did_you_mean(name, known)}"


def complete(settings: Settings, stage: Stage, values: Mapping[str, Any], given: Iterable[str]) -> dict[str, Any]:
    """Flag -> value of a command line, with the settings of the finished run that the stage reads.

    Raises UserError if an input of the stage is missing, or the flags do not say which run is meant.
    """
    found, given = dict(values), set(given)
    if stage.name == PIPELINE.name:
        return _complete_pipeline(settings, found, given)
    if ProbeRun in stage.takes and found["probe_on_features"]:
        if stage.explains is not None:
            raise UserError("--probe_on_features: features have no names, so only probes on concepts are explained")
    elif stage.reads_run is not None:
        try:
            found = find(settings, stage.reads_run, found, given)
        except NotMade:
            if stage.else_explains is None or given & _only_of(stage.reads_run, stage.else_explains):
                raise
            found = find(settings, stage.else_explains, found, given)
    require_inputs(settings, stage, found)
    return found


def _only_of(stage: Stage, other: Stage) -> set[str]:
    """The flags that tell the outputs of a stage apart, and are not those of the other's or of where both lie."""
    own, others = stage.flags(), other.flags()
    return {name for name, flag in own.items() if name not in others and flag.setting.in_name != ""} | {
        name for name, cls in RUNS.items() if cls in stage.trains
    }


def run_stage(settings: Settings, stage: Stage, given: Mapping[str, Any], *, device: str, overwrite: bool) -> Outcome:
    """Run a stage as a command line with the flags that are given does: flag -> value.

    Raises as `complete` and as the stage does.
    """
    found = resolved(stage, given, config_defaults(settings))
    found = complete(settings, stage, found, given)
    return stage.function(settings, *(build(cls, found) for cls in stage.takes), device=device, overwrite=overwrite)


def _complete_pipeline(settings: Settings, values: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """The values, with the settings of the finished run that the stages of a pipeline read but do not train."""
    stages = stages_of(build(Pipeline, values))
    trained = {cls for stage in stages for cls in stage.trains}
    for flag, cls in RUNS.items():
        if values[flag] and cls in trained:
            raise UserError(f"--{flag} names a finished run, but this pipeline trains one: start it --from a later stage")
    baseline = values["probe_on_features"]  # needs no SAE
    read = {cls for stage in stages for cls in stage.takes if not (baseline and ProbeRun in stage.trains)} - trained
    for cls in (ProbeRun, SAERun):  # a probe comes with its SAE
        if cls in read:
            trains = next(command.load() for command in PIPELINE_COMMANDS if cls in command.trains)
            return find(settings, trains, values, given)
    return values


def did_you_mean(name: str, *known: Iterable[str]) -> str:
    """The nearest of the known names, those of the first list first."""
    for names in known:
        if near := difflib.get_close_matches(name, names, n=1):
            return f"; did you mean --{near[0]}?"
    return ""
