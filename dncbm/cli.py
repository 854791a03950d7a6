"""Command lines: flags from declarations, defaults from config.py, errors in one line. A script only calls `main`."""

import argparse
import errno
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dncbm.runs.declarations import Execution, Preset, ProbeRun, ProbeSchedule, SAERun, Tracking, paper_preset
from dncbm.runs.devices import keep_freed_memory
from dncbm.runs.errors import UserError
from dncbm.runs.find import find
from dncbm.runs.ranks import world_size
from dncbm.runs.settings import Settings, load_settings
from dncbm.runs.stage import Stage
from dncbm.stages import PIPELINE_STAGES, STAGES, Pipeline, run_pipeline
from sparse_autoencoder import CheckpointError, NonFiniteError
from sparse_autoencoder.declare import Flag, build, flags


def main(stage: str | Stage, argv: Sequence[str] | None = None) -> None:
    """Run a stage from a command line; `pipeline` is all of them in order."""
    if isinstance(stage, str):
        stage = PIPELINE if stage == PIPELINE.name else STAGES[stage]

    def run() -> None:
        settings, values, given = parse(stage, argv)
        if stage.explains is not None:
            if values.get("probe_on_features"):
                raise UserError("--probe_on_features: features have no names, so only probes on concepts are explained")
            values = find(settings, stage.explains, values, given)
        execution = build(Execution, values)
        stage.function(
            settings, *(build(cls, values) for cls in stage.takes), device=execution.device, overwrite=execution.overwrite
        )

    one_line_errors(run)


PIPELINE = Stage(
    name="pipeline",
    script="run_pipeline.py",
    summary="All stages in order. Finished stages are skipped; interrupted ones resume.",
    function=run_pipeline,
    takes=(Pipeline, *dict.fromkeys(cls for stage in PIPELINE_STAGES for cls in stage.takes)),
    trains=(SAERun, ProbeRun),
)


# ------------------------------------------------------------------------------------------------------------- flags


def parse(stage: Stage, argv: Sequence[str] | None = None) -> tuple[Settings, dict[str, Any], set[str]]:
    """Read the config and a command line.

    Returns:
        The config; flag -> value, where a flag of the command line wins over the preset, the preset over the defaults of
        config.py, and those over the declared ones; and the flags that were given.

    Raises:
        UserError: the config is wrong, its `defaults` included.
    """
    takes = [*stage.takes, *([Preset] if ProbeRun in stage.takes else []), Execution, *_pasted(stage)]
    declared = {name: flag for cls in reversed(takes) for name, flag in flags(cls).items()}
    defaults = {name: flag.default for name, flag in declared.items()}
    settings, configured, problem = None, dict[str, Any](), None
    try:
        settings = load_settings()
        configured = config_defaults(settings)
    except UserError as error:  # raised after the command line is read, since --help needs no config
        problem = error
    defaults |= {name: configured[name] for name in declared if name in configured and declared[name].setting.configurable}
    parsed = vars(_parser(stage, takes, defaults).parse_args(argv))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in parsed.items()}
    if settings is None or problem is not None:
        raise problem or UserError("the config was not read")
    if world_size() > 1 and not stage.several_processes:
        raise UserError("only stages 1 and 5 run in several processes: start this one without torchrun")
    values = defaults | given
    dataset = str(values.get("probe_dataset"))
    preset = build(Preset, values).values(dataset)
    if preset:
        print(f"--preset {values['preset']} for {dataset}: " + ", ".join(f"--{k} {given.get(k, preset[k])}" for k in preset))
    elif stage.explains is not None and not (given.keys() | configured.keys()) & (paper := paper_preset(dataset)).keys():
        preset = paper
    return settings, defaults | dict(preset) | given, set(given)


def config_defaults(settings: Settings) -> dict[str, Any]:
    """Flag -> value of the `defaults` of config.py.

    Raises UserError if one is no flag of any script, or has a value that the flag does not allow.
    """
    groups = [flags(Execution), flags(Preset), *(stage.flags() for stage in (PIPELINE, *STAGES.values()))]
    known = {name: flag for group in reversed(groups) for name, flag in group.items() if flag.setting.configurable}
    found = {}
    for name, value in settings.defaults.items():
        where = f"{settings.path}: `defaults[{name!r}]`"
        if name not in known:
            raise UserError(f"{where}: the scripts have no flag --{name}")
        if value is None and known[name].default is None:
            continue
        parts = value if known[name].is_tuple and isinstance(value, list | tuple) else [value]
        try:
            parsed = [known[name].parse(str(part)) for part in parts]
            found[name] = tuple(one for part in parsed for one in part) if known[name].is_tuple else parsed[0]
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
    return found


def _parser(stage: Stage, takes: Sequence[type], defaults: Mapping[str, Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=stage.summary, allow_abbrev=False, argument_default=argparse.SUPPRESS, usage="%(prog)s [flags]"
    )
    declared = {name: flag for cls in reversed(takes) for name, flag in flags(cls).items()}
    shown = {name for cls in takes for name, flag in flags(cls).items() if _is_shown(stage, cls, flag)}
    aliases = {flag.setting.alias: name for name, flag in declared.items() if flag.setting.alias not in shown | {""}}
    waiting = {name: flag for name, flag in declared.items() if name not in aliases}
    for cls in takes:
        group = parser.add_argument_group((cls.__doc__ or "").splitlines()[0].rstrip("."))
        for name in [name for name in flags(cls) if name in waiting]:
            flag = waiting.pop(name)
            names = [f"--{name}", *(f"--{alias}" for alias, of in aliases.items() if of == name)]
            default = None if flag.setting.positional else defaults[name]
            options: dict[str, Any] = {"help": _help(flag, default) if name in shown else argparse.SUPPRESS}
            if flag.setting.positional:
                names = [name]
            else:
                options["dest"] = name
            if flag.type is bool:
                options["action"] = "store_true"
            else:
                metavar = f"{{{','.join(flag.setting.choices)}}}" if flag.setting.choices else name.upper()
                options |= {"type": str if flag.setting.separate else _converter(flag), "metavar": metavar}
                options |= {"nargs": "+"} if flag.setting.separate else {}
            group.add_argument(*names, **options)
    return parser


def _pasted(stage: Stage) -> tuple[type, ...]:
    """Declarations whose flags an explanation accepts and ignores, so that a line of training flags can be pasted."""
    return (ProbeRun, ProbeSchedule, Tracking) if stage.explains else ()


def _is_shown(stage: Stage, declaration: type, flag: Flag) -> bool:
    """Whether help shows a flag. Of a run that the stage does not train it shows only what locates the run. The others are
    accepted all the same, so that a line of training flags can be pasted."""
    is_run = hasattr(declaration, "config_name") and declaration not in stage.trains
    return (declaration in stage.takes or declaration not in _pasted(stage)) and (
        not is_run or flag.setting.in_name is not None or bool(flag.variants)
    )


def _help(flag: Flag, default: Any) -> str:
    text = flag.setting.help + (f" ({', '.join(flag.variants)})" if flag.variants else "")
    if default not in (None, "", (), False):
        text += f" (default: {', '.join(map(str, default)) if isinstance(default, tuple) else default})"
    return text.replace("%", "%%")


def _converter(flag: Flag) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return flag.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


# ------------------------------------------------------------------------------------------------------------ errors


def one_line_errors(run: Callable[[], object]) -> None:
    """Run something; an error that the user can fix becomes one line and exit code 1."""
    keep_freed_memory()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("sparse_autoencoder").setLevel(logging.INFO)  # resampling, and which kind of step it chooses
    try:
        run()
    except (UserError, CheckpointError, NonFiniteError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(
            f"error: no space left on the disk of {error.filename or 'the output'}: finished outputs are kept; free some space"
        )
    except KeyboardInterrupt:
        sys.exit("interrupted: run the same command again to resume")
