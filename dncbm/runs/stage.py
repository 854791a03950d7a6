"""A stage: one function that reads artifacts and writes artifacts, and everything that others need to know about it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dncbm.runs.artifacts import Artifacts
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import Outcome, manifest_path
from sparse_autoencoder.declare import flags


@dataclass(frozen=True)
class Stage:
    """A stage, declared beside its function. `stages.STAGES` lists all of them in order."""

    name: str
    script: str
    """Path of its script, below scripts/."""
    summary: str
    """One sentence: what the stage does."""
    function: Callable[..., Outcome]
    """Takes the config, what `takes` lists, and the fields of Execution as keywords."""
    takes: tuple[type, ...]
    """The declarations whose settings the stage reads, in the order in which the function takes them."""
    trains: tuple[type, ...] = ()
    """The declarations of the runs that this stage trains."""
    inputs: tuple["Stage", ...] = ()
    """The stages whose outputs it reads."""
    outputs: Callable[..., Iterable[Path]] = lambda *_: ()
    """Artifacts and what `takes` lists -> the paths of the artifacts that the stage makes."""
    made: Callable[[Artifacts], Iterable[Path]] = lambda _: ()
    """Artifacts -> everything of this kind that was ever made."""
    explains: "Stage | None" = None
    """The stage whose finished output is meant, if the flags leave open which."""
    several_processes: bool = False
    """Whether torchrun may divide its work."""

    def command(self, *flags: str) -> str:
        """The command line that runs it."""
        return " ".join(["`python", f"scripts/{self.script}", *flags]) + "`"

    def missing(self, what: str, path: Path, *flags: str) -> UserError:
        """The error for an output that is missing or unfinished, with the command that makes it."""
        state = "unfinished" if path.is_dir() and not manifest_path(path).is_file() else "missing"
        return UserError(f"{what} {path} {'are' if what.endswith('s') else 'is'} {state}: run {self.command(*flags)}")

    def flags(self) -> dict[str, Any]:
        """Every flag of the stage, by name; where two declarations share one, the first counts."""
        return {name: flag for cls in reversed(self.takes) for name, flag in flags(cls).items()}
