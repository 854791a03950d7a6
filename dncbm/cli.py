"""Command lines: flags from declarations, defaults from config.py, errors in one line. A script only calls `main`."""

# ruff: noqa: E402
import signal
import threading

# Ctrl-C while the modules below are imported ends the process without a traceback; later, `one_line_errors` answers it.
_is_program = threading.current_thread() is threading.main_thread()
_is_program = _is_program and signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _is_program:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import errno
import logging
import os
import select
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NoReturn

from dncbm.flags import all_flags, complete, config_defaults, defaults_of, did_you_mean, flags_of, resolved, takes_of
from dncbm.runs.declarations import Execution, NamedProbe, NamedSAE, Preset, Unused
from dncbm.runs.devices import keep_freed_memory
from dncbm.runs.errors import UserError, first_line
from dncbm.runs.manifests import verifying_hashes
from dncbm.runs.ranks import joined, world_size
from dncbm.runs.settings import Settings, load_settings
from dncbm.runs.stage import Command
from dncbm.stages import COMMANDS, PIPELINE, STAGES
from sparse_autoencoder import CheckpointError, NonFiniteError
from sparse_autoencoder.declare import Flag, build, flags

if _is_program:
    signal.signal(signal.SIGINT, signal.default_int_handler)

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
WRONG_USAGE = 2


def main(stage: str | Command, argv: Sequence[str] | None = None) -> None:
    """Run a stage from a command line; `pipeline` is all of them in order."""
    one_line_errors(partial(_run, stage, argv))


def _run(command: str | Command, argv: Sequence[str] | None) -> None:
    if isinstance(command, str):
        command = PIPELINE if command == PIPELINE.name else COMMANDS[command]
    settings, values, given = parse(command, argv)
    stage = STAGES[command.name] if command.name in STAGES else command.load()
    execution = build(Execution, values)
    with verifying_hashes() if execution.verify else nullcontext(), joined() as ranks:
        passed_on = {"passed_on": passed_on_by(stage, values)} if stage.passes_on else {}
        values = ranks.first_makes(partial(complete, settings, stage, values, given))
        declared: list[Any] = [build(cls, values) for cls in stage.takes]
        stage.function(settings, *declared, device=execution.device, overwrite=execution.overwrite, **passed_on)


# ------------------------------------------------------------------------------------------------------------- flags


def parse(stage: Command, argv: Sequence[str] | None = None) -> tuple[Settings, dict[str, Any], set[str]]:
    """Read the config and a command line. Flags of other stages are accepted, and ignored unless they are passed on.

    Returns:
        The config; flag -> value, where a flag of the command line wins over the preset, the preset over the defaults of
        config.py, and those over the declared ones; and the flags that were given.

    Raises:
        UserError: the config is wrong, its `defaults` included.
        SystemExit: the command line is wrong, or asks for help.
    """
    settings, configured, problem = None, dict[str, Any](), None
    try:
        settings = load_settings()
        configured = config_defaults(settings)
    except UserError as error:  # raised after the command line is read, since --help needs no config
        problem = error
    given = _given(stage, defaults_of(stage, configured), argv)
    if settings is None or problem is not None:
        raise problem or UserError("the config was not read")
    if world_size() > 1 and not stage.several_processes:
        *first, last = [str(int(one.script[:2])) for one in COMMANDS.values() if one.several_processes]
        raise UserError(f"only stages {', '.join(first)} and {last} run in several processes: start this one without torchrun")
    declared = flags_of(stage)
    others = {name: value for name, value in given.items() if name not in declared}
    ignored = [] if stage.passes_on else list(others)
    if ignored:
        print("flags of other stages, not used here: " + ", ".join(f"--{name}" for name in ignored))
    _warn_of_unused(settings, given)
    given = {name: value for name, value in given.items() if name in declared}
    values = resolved(stage, given, configured)
    return settings, others | values if stage.passes_on else values, set(given)


def passed_on_by(stage: Command, values: Mapping[str, Any]) -> dict[str, Any]:
    """Of the values of a command line, flag -> value of the flags of other stages."""
    own = flags_of(stage)
    return {name: value for name, value in values.items() if name not in own}


def _warn_of_unused(settings: Settings, given: Mapping[str, Any]) -> None:
    """Flags of the paper's code that something else decides here."""
    decided = {"vocab_type": settings.vocabulary, "probe_save_dir": str(settings.probe_dir)}
    for name, value in decided.items():
        if given.get(name) not in (None, "", value):
            text = f"--{name} {given[name]} is ignored: {flags(Unused)[name].setting.help}, {value}"
            logging.getLogger(__name__).warning(text)


def _given(stage: Command, defaults: Mapping[str, Any], argv: Sequence[str] | None) -> dict[str, Any]:
    """Flag -> value of a command line."""
    parser = _parser(stage, defaults)
    known = {action.dest for action in parser._actions}
    _accept_flags_of_others(parser)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = next((text for text in unknown if text.startswith("-")), "")
        own = [name for name in known if name != argparse.SUPPRESS]
        near = did_you_mean(flag.lstrip("-").partition("=")[0], own, all_flags()) if flag else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items()}


class _Parser(argparse.ArgumentParser):
    """One whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_USAGE, f"error: {message} (--help lists the flags)\n")


def _parser(stage: Command, defaults: Mapping[str, Any]) -> argparse.ArgumentParser:
    parser = _Parser(
        description=stage.summary, allow_abbrev=False, argument_default=argparse.SUPPRESS, usage="%(prog)s [flags]"
    )
    takes, declared = takes_of(stage), flags_of(stage)
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
                options |= {"nargs": "+", "action": "extend"} if flag.setting.separate else {}
            group.add_argument(*names, **options)
    return parser


def _accept_flags_of_others(parser: argparse.ArgumentParser) -> None:
    """Let a parser accept the flags of all stages, so that one line of flags serves them all. Their values are not checked."""
    taken = {text for action in parser._actions for text in action.option_strings}
    for name, flag in all_flags().items():
        if f"--{name}" in taken or flag.setting.positional:
            continue
        options: dict[str, Any] = {"action": "store_true"} if flag.type is bool else {"type": str}
        options |= {"nargs": "+", "action": "extend"} if flag.setting.separate else {}
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS, **options)


def _is_shown(stage: Command, declaration: type, flag: Flag) -> bool:
    """Whether help shows a flag. Of a run that the stage does not train it shows only what locates the run. The others are
    accepted all the same, so that a line of training flags can be pasted."""
    is_run = hasattr(declaration, "config_name") and declaration not in stage.trains
    is_read = declaration in (*stage.takes, Execution, Preset, NamedSAE, NamedProbe)
    return is_read and (not is_run or flag.setting.in_name is not None or bool(flag.variants))


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


_ADVICE = {
    errno.ENOSPC: "the disk is full; finished outputs are kept: free some space and run the same command again",
    errno.EDQUOT: "your disk quota is used up; finished outputs are kept: free some space and run the same command again",
    errno.EFBIG: "the file is larger than the file system or `ulimit -f` allows",
    errno.EROFS: "the file system is read-only: name another folder",
    errno.EACCES: "permission denied: change the permissions, or name another folder",
    errno.EPERM: "permission denied: change the permissions, or name another folder",
    errno.EIO: "the disk reports an error: check it, then run the same command again",
    errno.ESTALE: "the network file system lost the file: run the same command again",
    errno.ENAMETOOLONG: "the name is too long for the file system: shorten --save_suffix or the name in config.py",
    errno.EMFILE: "too many open files: raise the limit with `ulimit -n 4096`, or lower --num_workers",
    errno.ENFILE: "this machine has too many open files: close programs, or lower --num_workers",
    errno.ENOMEM: "not enough memory: lower the batch size or --num_workers",
    errno.ENOTDIR: "a file is where a folder should be: move it away",
    errno.EEXIST: "a file is where a folder should be: move it away",
    errno.EISDIR: "a folder is where a file should be: move it away",
}
"""Errors of the system that are not faults of this program, and what to do."""
_NO_MEMORY = (
    "can't allocate memory", "cannot allocate memory", "out of memory", "bad alloc", "failed to map segment",
    "can't start new thread", "unable to allocate",
)  # fmt: skip


def one_line_errors(run: Callable[[], object]) -> None:
    """Run something; an error that the user can fix becomes one line and exit code 1, Ctrl-C exit code 130.

    What is printed appears on any terminal: characters that its encoding lacks are escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    keep_freed_memory()
    _log_to_stderr()
    try:
        run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted: run the same command again to resume", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not _stdout_is_open():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
            sys.exit(1)
        line = _one_line(error)
        if line is None:
            raise
        sys.exit(f"error: {line}")


def _one_line(error: Exception) -> str | None:
    """What to tell the user about an error; None if it is a fault of this program, which needs its traceback."""
    if isinstance(error, UserError | CheckpointError | NonFiniteError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _ADVICE:
        return f"{error.filename}: {_ADVICE[error.errno]}" if error.filename else _ADVICE[error.errno]
    text = str(error).lower()
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | ImportError | OSError) and any(phrase in text for phrase in _NO_MEMORY)
    ):
        detail = f" ({first_line(error)})" if str(error) else ""
        return f"not enough memory{detail}: lower the batch size or --num_workers, or use a machine that has more"
    return None


def _stdout_is_open() -> bool:
    """Whether somebody reads the output. Flushing tells only if something was left to write."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return False
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


class _Format(logging.Formatter):
    """Messages as they are, with `warning:` before what is one."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Format())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # its cache folder, fonts it looked for
    logging.getLogger("sparse_autoencoder").setLevel(logging.INFO)  # resampling, and which kind of step it chooses
