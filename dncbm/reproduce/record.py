"""What steps were said to take, and what they took: a JSON file that grows over the runs of a plan."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dncbm.reproduce.estimates import Estimate
from dncbm.reproduce.plan import Step
from dncbm.runs.manifests import manifest_path, read_manifest, write_json
from dncbm.runs.results import text_table

Record = dict[str, dict[str, Any]]
"""Command of a step -> `stage`; `estimated_seconds` and `estimated_bytes`; `seconds`, summed over interruptions; `bytes`."""


def read_record(path: Path) -> Record:
    """The record; empty if there is none, or it is damaged: it holds nothing that cannot be measured again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and all(isinstance(about, dict) for about in found.values()) else {}


def record_estimates(path: Path, steps: Sequence[Step], estimates: Mapping[str, Estimate]) -> None:
    """Add the estimates of steps, by their names."""
    record = read_record(path)
    for step in steps:
        if (found := estimates.get(step.name)) is not None:
            about = {"estimated_seconds": found.seconds, "estimated_bytes": found.bytes}
            record.setdefault(step.command(), {"stage": step.stage}).update(about)
    write_json(path, record)


def record_seconds(path: Path, step: Step, seconds: float) -> None:
    """Add the time that a step has taken, and how large its outputs are."""
    record = read_record(path)
    about = record.setdefault(step.command(), {"stage": step.stage})
    about["seconds"] = round(about.get("seconds", 0.0) + seconds, 2)
    about["bytes"] = sum(map(bytes_of, step.outputs)) or None  # figures and edits have no manifest that is known beforehand
    write_json(path, record)


def estimated_seconds(path: Path, steps: Sequence[Step]) -> dict[str, float]:
    """Name of a step -> its estimate, where there is one."""
    record = read_record(path)
    found = {step.name: record.get(step.command(), {}).get("estimated_seconds") for step in steps}
    return {name: seconds for name, seconds in found.items() if seconds is not None}


def bytes_of(artifact: Path) -> int:
    """Bytes of the files of a finished artifact; 0 if it is none."""
    if not manifest_path(artifact).is_file():
        return 0
    return sum(output["bytes"] for output in read_manifest(artifact)["outputs"].values())


def said_and_took(path: Path, steps: Sequence[Step]) -> str:
    """A table of what steps took beside what a dry run said, by stage and in all; empty if no step was timed."""
    record = read_record(path)
    known = [record[step.command()] for step in steps if step.command() in record]
    known = [about for about in known if "seconds" in about]
    if not known:
        return ""
    stages = dict.fromkeys(about["stage"] for about in known)
    rows = [_row(stage, [about for about in known if about["stage"] == stage]) for stage in stages]
    said = [about for about in known if about.get("estimated_seconds") is not None]
    ends = [_row("all", known), *([_row("all that was estimated", said)] if 0 < len(said) < len(known) else [])]
    return text_table(("stage", "steps", "estimated", "took", "estimated", "wrote"), [*rows, *ends])


def _row(title: str, several: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    def total(key: str, shown: Callable[[float], str], *, whole: bool = True) -> str:
        """A sum; `-` if a part is not known, or unless `whole` no part is."""
        found = [about[key] for about in several if about.get(key) is not None]
        return shown(sum(found)) if found and (len(found) == len(several) or not whole) else "-"

    said, took = total("estimated_seconds", duration), total("seconds", duration)
    return (title, str(len(several)), said, took, total("estimated_bytes", size), total("bytes", size, whole=False))


def duration(seconds: float) -> str:
    """`under 1 s`, `45 s`, `3 min`, `2.5 h`, `4.1 days`."""
    if seconds < 0.95:
        return "under 1 s"
    for most, one, unit in ((99.5, 1, "s"), (5970, 60, "min"), (2 * 86400, 3600, "h")):
        if seconds < most:
            return f"{seconds / one:.{1 if unit == 'h' or seconds / one < 9.95 else 0}f} {unit}"
    return f"{seconds / 86400:.1f} days"


def size(n_bytes: float) -> str:
    """`under 1 kB`, `12 kB`, `3.4 MB`, `1.25 GB`."""
    if n_bytes < 500:
        return "under 1 kB"
    for most, one, unit, digits in ((1e6, 1e3, "kB", 0), (1e9, 1e6, "MB", 1)):
        if n_bytes < most:
            return f"{n_bytes / one:.{digits}f} {unit}"
    return f"{n_bytes / 1e9:.2f} GB"
