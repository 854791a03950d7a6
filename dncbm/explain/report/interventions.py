"""Interventions on the probe of a run: accuracies before and after edits, beside random edits."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from dncbm.explain.report.document import Block, Cell, Name, Section, Small, Table, percent, said
from dncbm.explain.report.findings import Edit
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.commands import INTERVENE
from dncbm.runs.declarations import ProbeRun, SAERun
from dncbm.runs.errors import StaleArtifact, UserError, first_line
from dncbm.runs.manifests import check_chain, manifest_path, read_manifest
from dncbm.runs.settings import Settings

OVERALL, WORST = "overall", ("worst_group", "worst_class")
MOST_SHARED = 0.5
"""Share of their concepts from which random edits have in common with an edit that they are not others."""
ROWS = ("unedited", "edited", "random")
"""Rows of an edit that are shown."""
SHOWN = 5
"""Names of concepts that are shown of an edit."""


def read_edits(settings: Settings, run: SAERun, probe: ProbeRun, labels: Sequence[str]) -> tuple[list[Edit], list[str]]:
    """Every finished intervention on a probe; and the names of those that are out of date, which count for nothing.

    `labels` are those of the latents, as they are shown.

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
        edits.append(_read(path, labels))
    return edits, outdated


def _read(path: Path, labels: Sequence[str]) -> Edit:
    found: dict[str, dict[str, tuple[float, float]]] = {}
    after = dict[str, list[tuple[float, int]]]()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                value = float(row["top1"] or "nan"), float(row["deviation"] or 0)
                if row["kind"] in (OVERALL, *WORST) and row["top1"]:
                    found.setdefault(row["kind"], {})[row["row"]] = value
                if row["row"] == "edited" and row["images"] and row["top1"]:
                    after.setdefault(row["kind"], []).append((value[0], int(row["images"])))
        worst = next((kind for kind in WORST if kind in found), WORST[-1])
        of = worst.removeprefix("worst_")
        images, worst_images = (min(after.get(kind, [(0.0, 0)]))[1] for kind in (OVERALL, of))
        what, concepts = _edited(path, labels)
        why = _incomparable(path, found[OVERALL])
        return Edit(what, concepts, found[OVERALL], found.get(worst, {}), of, images, worst_images, why)
    except (OSError, ValueError, KeyError, IndexError, TypeError, csv.Error) as error:
        raise UserError(
            f"{path} is damaged ({first_line(error)}): run {INTERVENE.command('--overwrite')} with the same flags"
        ) from error


def _incomparable(path: Path, overall: Mapping[str, tuple[float, float]]) -> str:
    """Why the random edits say nothing about an edit; blank: they do."""
    asked, random = (read_manifest(path)[part] for part in ("settings", "details"))
    about = random.get("rows", {}).get("random", {})
    if "random" not in overall:
        return "it has no random edits"
    if not asked["concepts"] or about.get("concepts") == 0:
        return "it changes nothing"
    if about.get("shared", 0) > MOST_SHARED:
        return f"random edits share {percent(about['shared'], 0)} of its concepts"
    return "" if overall["random"][1] else "all random edits do the same"


def _edited(path: Path, labels: Sequence[str]) -> tuple[str, list[str]]:
    """What an edit does, and the concepts that it names: those that it keeps, or else those that it changes."""
    asked = read_manifest(path)["settings"]
    factors = dict(zip(asked["concepts"], asked["factors"], strict=True))
    if path.stem.startswith("keep"):
        return "keep", [label for index, label in enumerate(labels) if factors.get(index) != 0]
    kinds = {"remove": 0 in factors.values(), "scale": any(factors.values())}
    return " and ".join(kind for kind, is_so in kinds.items() if is_so), [labels[index] for index in factors]


def interventions_section(edits: Sequence[Edit], absent: Sequence[Block]) -> Section:
    """A row of top-1 per edit. `absent` are notes on what is missing."""
    if not edits:
        return Section("interventions", "Interventions", tuple(absent))
    about = said(
        "An edit removes, keeps or scales concepts. Random edits take away as much strength, of concepts drawn at random; "
        "their standard deviation stands behind \u00b1. The file of an edit also holds every class, and probes that are "
        "solved again after it."
    )
    worst = f"worst {edits[0].worst_of}"
    header = ("edit", *ROWS, *(f"{worst}, {row}" for row in ROWS))
    rows = tuple((_about(edit), *(_shown(of.get(row)) for of in (edit.overall, edit.worst) for row in ROWS)) for edit in edits)
    return Section("interventions", "Interventions", (about, Table("Top-1 on val after edits", header, rows), *absent))


def _about(edit: Edit) -> Cell:
    more = len(edit.concepts) - SHOWN
    names = (part for label in edit.concepts[:SHOWN] for part in (Name(label), ", "))
    why = [Small(f"not comparable: {edit.incomparable}")] if edit.incomparable else []
    return (f"{edit.what} ", *[*names][:-1], *([Small(f"and {more} more")] if more > 0 else []), *why)


def _shown(value: tuple[float, float] | None) -> str:
    if value is None:
        return ""
    return percent(value[0]) + (f" \u00b1 {100 * value[1]:.1f}" if value[1] else "")
