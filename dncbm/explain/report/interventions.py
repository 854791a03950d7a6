"""Interventions on the probe of a run: accuracies before and after edits, beside random edits."""

import csv
from collections.abc import Sequence
from pathlib import Path

from dncbm.explain.report.document import Block, Section, Table, percent, said
from dncbm.explain.report.findings import Edit
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.commands import INTERVENE
from dncbm.runs.declarations import ProbeRun, SAERun
from dncbm.runs.errors import StaleArtifact, UserError, first_line
from dncbm.runs.manifests import check_chain, manifest_path
from dncbm.runs.settings import Settings

OVERALL, WORST = "overall", ("worst_group", "worst_class")


def read_edits(settings: Settings, run: SAERun, probe: ProbeRun) -> tuple[list[Edit], list[str]]:
    """Every finished intervention on a probe; and the names of those that are out of date, which count for nothing.

    Raises UserError if a table is damaged.
    """
    edits, outdated = list[Edit](), list[str]()
    for path in sorted(Artifacts(settings).interventions(run, probe)):
        if not manifest_path(path).is_file():
            continue
        try:
            check_chain(path)
        except StaleArtifact:  # nobody asked for this edit, so it must not stand in the way of the others
            outdated.append(path.stem)
            continue
        edits.append(_read(path))
    return edits, outdated


def _read(path: Path) -> Edit:
    found: dict[str, dict[str, tuple[float, float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["kind"] in (OVERALL, *WORST) and row["top1"]:
                    value = float(row["top1"]), float(row["deviation"] or 0)
                    found.setdefault(row["kind"], {})[row["row"]] = value
        worst = next((kind for kind in WORST if kind in found), WORST[-1])
        return Edit(path.stem, found[OVERALL], found.get(worst, {}), worst.removeprefix("worst_"))
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(
            f"{path} is damaged ({first_line(error)}): run {INTERVENE.command('--overwrite')} with the same flags"
        ) from error


def interventions_section(edits: Sequence[Edit], absent: Sequence[Block]) -> Section:
    """A table of top-1 per edit. `absent` are notes on what is missing."""
    about: list[Block] = [
        said(
            "An edit removes or scales concepts. Random edits take away as much strength, of concepts drawn at random; their "
            "standard deviation stands behind \u00b1. Rows that are refitted are solved again after the edit."
        )
    ]
    return Section("interventions", "Interventions", (*(about if edits else []), *map(_table, edits), *absent))


def _table(edit: Edit) -> Table:
    rows = tuple((kind, _shown(edit.overall[kind]), _shown(edit.worst.get(kind))) for kind in edit.overall)
    return Table(f"Top-1 on val, edit {edit.name}", ("probe", "overall", f"worst {edit.worst_of}"), rows)


def _shown(value: tuple[float, float] | None) -> str:
    if value is None:
        return ""
    return percent(value[0]) + (f" \u00b1 {100 * value[1]:.1f}" if value[1] else "")
