"""What the accuracies of stage 10 depend on of the names: which latents do not abstain, and nothing else.

So naming the latents again makes them out of date only if that set changes, and then only those of the named concepts. Since a
set is no file, `check_chain` does not compare it: whoever reads the table does.
"""

import csv
from collections.abc import Mapping
from pathlib import Path

from dncbm.concepts.naming import ConceptName, read_names
from dncbm.probe.bands import Comparison
from dncbm.probe.controls import named_columns
from dncbm.probe.nec_table import Point, comparisons_in, points_in
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SAERun
from dncbm.runs.errors import StaleArtifact, UserError
from dncbm.runs.manifests import check_chain, fingerprint, how_made_again, read_manifest, text_hash
from dncbm.runs.settings import Settings

NAMED_SET, NAMES_FILE = "set of named latents", "names"
"""Inputs of a table: the set; or in tables of a version before, the file of names."""


def named_set(names: list[ConceptName]) -> str:
    """A hash of which latents do not abstain."""
    columns = named_columns(names, len(names))
    return text_hash(["not tested"] if columns is None else map(str, columns.tolist()))


def input_of_names(table: Path) -> str | None:
    """Which input says what names a table was made with; None if it is finished and of a version that read none."""
    try:
        inputs = read_manifest(table.parent)["inputs"] if table.is_file() else {NAMED_SET: ""}
    except UserError:  # unfinished or damaged
        return NAMED_SET
    return next((name for name in (NAMED_SET, NAMES_FILE) if name in inputs), None)


def check_named_set(settings: Settings, run: SAERun, folder: Path) -> None:
    """Raises StaleArtifact if the set is not that of a finished table; names that are missing may be the same."""
    made = read_manifest(folder)
    if NAMED_SET not in made["inputs"] or not Artifacts(settings).concept_names_in_use(run).is_file():
        return
    if made["inputs"][NAMED_SET] != named_set(read_names(settings, run)):
        changed = f"{NAMED_SET} has changed"
        raise StaleArtifact(f"{folder} is out of date: the {changed} since it was made; {how_made_again(made)}", [changed])


def unchanged_by_names(
    artifacts: Artifacts, run: SAERun, dataset: str, sources: Mapping[str, Path]
) -> tuple[list[Point], list[Comparison]] | None:
    """The points of a finished table without those of named concepts, and its comparisons.

    None if anything but the set was not as it is now: the seed, or `sources`, its inputs that are files; or if the table is
    unfinished, damaged or of an older version.
    """
    folder = artifacts.nec(run, dataset)
    try:
        made = read_manifest(folder)
        check_chain(folder)
        now = {name: fingerprint(source) for name, source in sources.items()}
        before = {name: text for name, text in made["inputs"].items() if name != NAMED_SET}
        points = [point for point in points_in(artifacts.nec_table(run, dataset)) if point.on != "named"]
        compared = comparisons_in(artifacts.nec_leakage(run, dataset))
    except (UserError, OSError, ValueError, KeyError, TypeError, csv.Error):
        return None
    is_same = before == now and made["settings"] == {"seed": run.training.seed}
    return (points, compared) if is_same and NAMED_SET in made["inputs"] else None
