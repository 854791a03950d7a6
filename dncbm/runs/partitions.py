"""Shards divided among workers that need not know of each other: job arrays, or any number of commands started by hand."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from dncbm.runs.declarations import Partition
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import Outcome

T = TypeVar("T")
UNDIVIDED = Partition()
_ARRAY = "SLURM_ARRAY_TASK_"


@dataclass(frozen=True)
class Part:
    """One of `of` equal parts of the work; `number` counts from 1. The default is all of it."""

    number: int = 1
    of: int = 1
    is_shared: bool = False
    """Whether others may make the same artifact meanwhile."""
    merges: bool = False
    """Whether it makes nothing and only finishes what others have made."""

    def share_of(self, items: Sequence[T]) -> list[T]:
        """Every `of`-th item, wherever others are: shares do not depend on what is done."""
        return [] if self.merges else list(items[self.number - 1 :: self.of])

    def titled(self, title: str) -> str:
        """The title of a progress bar."""
        return f"{title} (part {self.number} of {self.of})" if self.is_shared else title


WHOLE = Part()


def part_of(partition: Partition) -> Part:
    """The part that a flag stands for. Raises UserError if SLURM's variables are missing or do not describe equal parts."""
    if partition.part is None:
        return WHOLE
    if partition.part == "merge":
        return Part(is_shared=True, merges=True)
    if partition.part == "slurm":
        return _part_of_array()
    number, _, of = partition.part.partition("/")
    return Part(int(number), int(of), is_shared=True)


def _part_of_array() -> Part:
    """The part of this task of a SLURM job array, whose numbers must rise by one step."""
    task, least, most, count = (_of_array(name) for name in ("ID", "MIN", "MAX", "COUNT"))
    step = _of_array("STEP") if count > 1 else 1
    if step < 1 or count < 1 or most != least + (count - 1) * step or not least <= task <= most or (task - least) % step:
        raise UserError(
            f"--partition slurm: the {count} tasks of this job array, from {least} to {most}, do not rise by one step, as in "
            f"--array=3,7,9: submit --array=1-{max(count, 1)}, or pass --partition i/n"
        )
    return Part((task - least) // step + 1, count, is_shared=True)


def _of_array(name: str) -> int:
    text = os.environ.get(_ARRAY + name, "")
    if not text.isdecimal():
        found = f"{_ARRAY}{name} is {text!r}" if text else f"{_ARRAY}{name} is not set"
        raise UserError(
            f"--partition slurm: {found}: submit the command as a job array, for example with sbatch --array=1-8, or pass "
            "--partition i/n"
        )
    return int(text)


@dataclass
class Tally:
    """What became of the artifacts of a command, and what they lack."""

    part: Part
    outcome: Outcome = Outcome.ALREADY_DONE
    lacks: list[str] = field(default_factory=list)

    def made(self) -> None:
        """Count an artifact that was finished, or that needed work."""
        if self.outcome is Outcome.ALREADY_DONE:
            self.outcome = Outcome.RAN

    def missing(self, title: str, n_shards: int, missing: Sequence[str], *, says: bool) -> None:
        """Count an artifact that lacks shards of these names, and say so if `says`."""
        self.outcome = Outcome.PART
        if self.part.merges:
            self.lacks.append(f"{len(missing)} of {n_shards} of {title} (the first: {missing[0]})")
        elif says:
            n_own = len(self.part.share_of(range(n_shards)))
            is_ = "is" if len(missing) == 1 else "are"
            print(
                f"part {self.part.number}/{self.part.of} done: {n_own} of {n_shards} shards of {title}; {len(missing)} {is_} "
                "still missing"
            )

    def end(self) -> Outcome:
        """The outcome of the command. Raises UserError if what was to be merged is not all there."""
        if self.lacks:
            raise UserError(
                f"--partition merge: shards are missing, {'; '.join(self.lacks)}: run the workers again that did not end, "
                "or the same command without --partition, which makes these shards"
            )
        return self.outcome
