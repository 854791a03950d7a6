"""Accuracies at NEC and NCC over SAEs that differ only in their seed."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from dncbm.concepts.evidence.seeds import runs_to_compare
from dncbm.probe.bands import over_seeds
from dncbm.probe.nec import read_points
from dncbm.probe.nec_table import MAJORITY, Point
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SAERun, Seeds
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import manifest_path, read_manifest
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
    named_seeds: tuple[int, ...] = ()
    """Those of named concepts, to which the same applies: without seeds whose names follow another rule than this SAE's.
    Empty if there are no named concepts."""


def banded_points(settings: Settings, run: SAERun, dataset: str) -> Banded:
    """What stage 10 measured, over all seeds of which there is such a table.

    Tables that are stale, or lack something that the run's own has, do not count, and neither do named concepts whose names
    follow another rule; both are said. Raises as `read_points` does.
    """
    own = read_points(settings, run, dataset)
    tables = {run.training.seed: {_key(point): point for point in own}}
    named = [run.training.seed] if any(point.on == "named" for point in own) else []
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
            continue
        seed = other.training.seed
        tables[seed] = found
        if named and (differing := _differing(_rule(settings, run), _rule(settings, other))):
            print(f"not among the seeds of named concepts: seed {seed}, whose names differ in {', '.join(differing)}")
        elif named:
            named.append(seed)
    of_kind = {on: {seed: tables[seed] for seed in (named if on == "named" else tables)} for on in {one.on for one in own}}
    return Banded(tuple(_over(point, of_kind[point.on]) for point in own), tuple(sorted(tables)), tuple(sorted(named)))


def _key(point: Point) -> tuple[str, str, int | None]:
    return point.on, point.measure, point.target


def _over(point: Point, tables: dict[int, dict[tuple[str, str, int | None], Point]]) -> Point:
    if point.on in SEEDLESS or len(tables) == 1:
        return point
    mean, low, high = over_seeds([table[_key(point)].val_top1 for table in tables.values()])
    return replace(point, val_top1=mean, val_low=max(low, 0.0), val_high=min(high, 1.0))


def _rule(settings: Settings, run: SAERun) -> dict[str, Any]:
    """The settings by which latents were named and tested; empty for names without a manifest."""
    names = Artifacts(settings).concept_names_in_use(run)
    return dict(read_manifest(names)["settings"]) if manifest_path(names).is_file() else {}


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _other_seeds(settings: Settings, run: SAERun) -> Iterable[SAERun]:
    try:
        return runs_to_compare(settings, run, Seeds()).values()
    except UserError:  # there are none
        return ()
