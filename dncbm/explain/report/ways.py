"""The command lines that make what a run lacks, with the flags that find this run."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dncbm.explain.report.document import Code, Note
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import ProbeRun, SAERun
from dncbm.runs.manifests import manifest_path
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Command
from sparse_autoencoder.declare import flags, values

ON_FEATURES = "--probe_on_features"


@dataclass(frozen=True)
class Ways:
    """How stages are called so that they work on a run."""

    settings: Settings
    run: SAERun
    probe: ProbeRun

    def command(self, command: Command, *more: str) -> Code:
        """The command line of a stage, with the flags whose values are not the defaults of the config.

        A run that the stage reads is named where a manifest lets it be found so.
        """
        artifacts, known = Artifacts(self.settings), command.flags()
        told = {name: value for run in (self.run, self.probe) for name, value in values(run).items() if name in known}
        named: dict[str, str] = {}
        baseline = ON_FEATURES in more  # needs no SAE
        runs: dict[str, tuple[type, str, Path]] = {
            "sae": (SAERun, self.run.config_name, artifacts.sae_in_use(self.run)),
            "probe": (ProbeRun, self.probe.config_name, artifacts.probe(self.run, self.probe)),
        }
        for flag, (cls, name, path) in runs.items():
            reads = cls in command.takes and cls not in command.trains
            if baseline or (reads and manifest_path(path).is_file()):
                told = {one: value for one, value in told.items() if one not in _in_name(cls)}
                named |= {} if baseline else {flag: name}
        told = {name: value for name, value in told.items() if value != self._default(name, known)} | named
        words = [word for name, value in told.items() for word in _words(name, value)]
        return Code(command.command(*map(shlex.quote, words), *more).strip("`"))

    def not_run(self, what: str, command: Command, *more: str) -> Note:
        """What to say of a stage that was not run."""
        return Note((f"{what} To make it, run ", self.command(command, *more), "."))

    def _default(self, name: str, known: dict[str, Any]) -> Any:
        configured = self.settings.defaults.get(name)
        return known[name].default if configured is None else known[name].parse(str(configured))


def _in_name(cls: Any) -> set[str]:
    """The flags that the name of a run stands for: all but those that say where it lies."""
    return {name for name, flag in flags(cls).items() if flag.setting.in_name != ""}


def _words(flag: str, value: Any) -> list[str]:
    if value is True:
        return [f"--{flag}"]
    return [f"--{flag}={value}"] if str(value).startswith("-") else [f"--{flag}", str(value)]
