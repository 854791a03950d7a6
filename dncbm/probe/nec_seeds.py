"""Accuracies at NEC and NCC over SAEs that differ only in their seed."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from dncbm.concepts.evidence.seeds import runs_to_compare
from dncbm.probe.bands import over_seeds
from dncbm.probe.nec import read_points
from dncbm.probe.nec_table import MAJORITY, Point
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SAERun, Seeds
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import manifest_path
from dncbm.runs.settings import Settings

SEEDLESS = ("features", MAJORITY)
"""Kinds of inputs that are the same for every seed: their intervals are always over draws of images."""


@dataclass(frozen=True)
class Banded:
    """Accuracies, with intervals."""

    points: tuple[Point, ...]
    seeds: tuple[int, ...]
    """With several, accuracies are means over them, and intervals t-intervals of the mean, except for SEEDLESS. With one,
    intervals are over draws of the images of val. Every other figure is that of the SAE asked for."""


def banded_points(settings: Settings, run: SAERun, dataset: str) -> Banded:
    """What stage 10 measured, over all seeds of which there is such a table.

    Tables that are stale, or lack something that the run's own has, do not count, which is said. Raises as `read_points` does.
    """
    own = read_points(settings, run, dataset)
    tables = {run.training.seed: {_key(point): point for point in own}}
    for other in _other_seeds(settings, run):
        if not manifest_path(Artifacts(settings).nec(other, dataset)).is_file():
            continue
        try:
            found = {_key(point): point for point in read_points(settings, other, dataset)}
        except UserError as error:
            print(f"not among the seeds: {error}")
            continue
        if missing := [point.on for point in own if _key(point) not in found]:
            print(f"not among the seeds: seed {other.training.seed}, whose table lacks {', '.join(dict.fromkeys(missing))}")
        else:
            tables[other.training.seed] = found
    if len(tables) == 1:
        return Banded(tuple(own), tuple(tables))
    return Banded(tuple(_over(point, tables) for point in own), tuple(sorted(tables)))


def _key(point: Point) -> tuple[str, str, int | None]:
    return point.on, point.measure, point.target


def _over(point: Point, tables: dict[int, dict[tuple[str, str, int | None], Point]]) -> Point:
    if point.on in SEEDLESS:
        return point
    mean, low, high = over_seeds([table[_key(point)].val_top1 for table in tables.values()])
    return replace(point, val_top1=mean, val_low=max(low, 0.0), val_high=min(high, 1.0))


def _other_seeds(settings: Settings, run: SAERun) -> Iterable[SAERun]:
    try:
        return runs_to_compare(settings, run, Seeds()).values()
    except UserError:  # there are none
        return ()
