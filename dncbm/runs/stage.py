"""A stage: one function that reads artifacts and writes artifacts, and everything that others need to know about it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from dncbm.runs.artifacts import Artifacts
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import Outcome, manifest_path
from sparse_autoencoder.declare import flags


@dataclass(frozen=True, kw_only=True)
class Command:
    """The command line of a stage: everything about it that needs no function."""

    name: str
    script: str
    """Path of its script, below scripts/."""
    summary: str
    """One sentence: what the stage does."""
    takes: tuple[type, ...]
    """The declarations whose settings the stage reads, in the order in which the function takes them."""
    trains: tuple[type, ...] = ()
    """The declarations of the runs that this stage trains."""
    passes_on: bool = False
    """Whether it passes the flags of other stages on to them. Its function takes them, flag -> value, as `passed_on`."""
    several_processes: bool = False
    """Whether torchrun may divide its work."""
    place: str = ""
    """`module:NAME` of the stage itself."""

    def command(self, *flags: str, beside: str = "") -> str:
        """The command line that runs it, and in words what to add."""
        return " ".join(["`python", f"scripts/{self.script}", *flags]) + "`" + (beside and f" {beside}")

    def flags(self) -> dict[str, Any]:
        """Every flag of the stage, by name; where two declarations share one, the first counts."""
        return {name: flag for cls in reversed(self.takes) for name, flag in flags(cls).items()}

    def stage(self, **about: Any) -> "Stage":
        """The stage: this and the other fields of Stage."""
        return Stage(**{one.name: getattr(self, one.name) for one in fields(Command)}, **about)

    def load(self) -> "Stage":
        """The stage, from its place. Importing that takes seconds: it computes with torch."""
        if isinstance(self, Stage):
            return self
        module, _, name = self.place.partition(":")
        stage: Stage = getattr(import_module(module), name)
        return stage


@dataclass(frozen=True, kw_only=True)
class Stage(Command):
    """A stage, declared beside its function. `stages.STAGES` lists all of them in order."""

    function: Callable[..., Outcome]
    """Takes the config, what `takes` lists, and `device` and `overwrite` as keywords."""
    inputs: tuple["Stage", ...] = ()
    """The stages whose outputs it reads."""
    needs: "tuple[Stage, ...] | None" = None
    """Those of them without whose outputs it cannot start; by default all."""
    makes: str = ""
    """What its outputs are called in messages."""
    outputs: Callable[..., Iterable[Path]] = lambda *_: ()
    """Artifacts and what `takes` lists -> the paths of the artifacts that the stage makes."""
    made: Callable[[Artifacts], Iterable[Path]] = lambda _: ()
    """Artifacts -> everything of this kind that was ever made."""
    explains: "Stage | None" = None
    """The stage whose finished output is meant, if the flags leave open which."""
    else_explains: "Stage | None" = None
    """The one that is meant if there is no such output and no flag asks for one in particular."""

    def missing(self, what: str, path: Path, *flags: str, beside: str = "") -> UserError:
        """The error for an output that is missing or unfinished, with the command that makes it."""
        state = "unfinished" if path.is_dir() and not manifest_path(path).is_file() else "missing"
        command = self.command(*flags, beside=beside)
        return UserError(f"{what} {path} {'are' if what.endswith('s') else 'is'} {state}: run {command}")

    @property
    def reads_run(self) -> "Stage | None":
        """The stage whose finished run it reads: it takes that run's settings, but does not train it."""
        if self.explains is not None:
            return self.explains
        for stage in self.inputs:
            read = stage if stage.trains else stage.reads_run
            if read is not None and set(read.trains) <= set(self.takes):
                return read
        return None
