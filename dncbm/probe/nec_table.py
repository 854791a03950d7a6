"""The tables of stage 10: accuracies with few weights per class (NEC) and few concepts per decision (NCC), with intervals.

Tables of older versions, which have three kinds of inputs, NEC alone and no intervals, are read as well.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from dncbm.probe.bands import Comparison, Samples, percentiles, resampled
from dncbm.runs.declarations import SAERun
from dncbm.runs.results import NECS, Row, result_row, write_csv

INPUTS = ("concepts", "named", "features", "random", "untrained", "shuffled")
"""Kinds of inputs of the probe, in the order in which they are measured and shown."""
MAJORITY = "majority"
"""The kind of the classifier that always says the commonest class of train."""
MEASURES = ("nec", "ncc")
ALWAYS = ("concepts", "features", "random")
"""The kinds that every table has."""
OF_TABLE = ("probe_dataset", "method", "encoder", "hook", "sae_dataset", "sae", "seed")
"""Columns of the results that all rows of a table share, and no other rows."""


@dataclass(frozen=True)
class Point:
    """A probe with few weights per class, or few contributing concepts per decision; None is what does not apply.

    Inputs count as concepts here, whatever they are. Accuracies are fractions.
    """

    on: str
    """One of INPUTS, or MAJORITY."""
    measure: str = ""
    """nec or ncc; empty for MAJORITY."""
    target: int | None = None
    """The number asked for; None is the mean over all numbers."""
    nonzero: float | None = None
    """NEC: mean number of non-zero weights per class. For the measure nec, below `target` if the path ended or the refit left
    fewer."""
    ncc: float | None = None
    """NCC on val: mean number of contributing concepts per image."""
    effective: float | None = None
    """Mean participation ratio of the contributions to the predicted class of val's images."""
    in_use: int | None = None
    """Number of concepts that have a weight other than 0."""
    firing: int | None = None
    """Number of concepts that are not 0 on every image of train; None in a table of an older version."""
    cea: float | None = None
    """CEA on val, with the concepts in use."""
    cea_all: float | None = None
    """CEA on val, with all concepts."""
    path_lambda: float | None = None
    """Lambda of the path's solution, for inputs divided by their root mean square; for nec, of the one that was truncated."""
    path_nonzero: float | None = None
    """NEC of that solution."""
    train_val_ncc: float | None = None
    """NCC on train_val, by which the measure ncc chooses."""
    train_val_top1: float | None = None
    val_top1: float = 0.0
    val_low: float | None = None
    val_high: float | None = None
    """The 95 % interval of `val_top1` over draws of val's images."""


@dataclass(frozen=True, eq=False)
class Curve:
    """The accuracies on one kind of inputs."""

    points: tuple[Point, ...]
    """NEC at each of NECS, then NCC."""
    correct: torch.Tensor
    """bool, points x images of val: what is classified correctly."""


def with_bands(curves: Mapping[str, Curve], seed: int) -> tuple[list[Point], dict[tuple[str, str], Samples]]:
    """Every point with its interval, and the means of each measure, in the order of the table.

    Also the accuracies for each draw of images, by kind and point, for example (concepts, nec_5). All are of the same draws.
    """
    points, samples = list[Point](), dict[tuple[str, str], Samples]()
    for on, curve in curves.items():
        drawn = resampled(curve.correct, seed)
        for measure in MEASURES if on != MAJORITY else ("",):
            places = [place for place, point in enumerate(curve.points) if point.measure == measure]
            for place in places:
                point = curve.points[place]
                points.append(_banded(point, drawn[:, place]))
                samples[on, f"{measure}_{point.target}"] = drawn[:, place]
            if measure:
                known = [curve.points[place] for place in places]
                train_val = _mean([point.train_val_top1 or 0.0 for point in known])
                average = Point(on, measure, train_val_top1=train_val, val_top1=_mean([point.val_top1 for point in known]))
                points.append(_banded(average, drawn[:, places].mean(axis=1)))
    return points, samples


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _banded(point: Point, samples: Samples) -> Point:
    low, high = percentiles(samples)
    return replace(point, val_low=low, val_high=high)


def mean_of(points: Iterable[Point], on: str, measure: str) -> Point:
    """The mean accuracy of a kind of inputs, which is there, over all numbers."""
    return next(one for one in points if (one.on, one.measure, one.target) == (on, measure, None))


def curves_of(points: Iterable[Point], measure: str) -> dict[str, list[Point]]:
    """The points of a measure for each kind of inputs, without their mean."""
    found: dict[str, list[Point]] = {}
    for point in points:
        if point.measure == measure and point.target is not None:
            found.setdefault(point.on, []).append(point)
    return found


def result_rows(run: SAERun, dataset: str, points: Sequence[Point]) -> Iterator[Row]:
    """The rows of the results, one for each kind of inputs."""
    majority = next(point.val_top1 for point in points if point.on == MAJORITY)
    described = {"probe_dataset": dataset, "method": "nec", "encoder": run.encoder, "hook": run.hook}
    described |= {"sae_dataset": run.dataset, "sae": run.config_name, "sae_type": run.sparsity.kind}
    described |= {"solver": "prox", "seed": str(run.training.seed)}
    of_measure = {measure: curves_of(points, measure) for measure in MEASURES}
    for on, of_nec in of_measure["nec"].items():
        last = of_nec[-1]
        metrics = {"val_majority": majority, "val_cea": last.cea, "val_cea_all": last.cea_all, "val_effective": last.effective}
        for measure, curves in of_measure.items():
            metrics |= {f"val_{measure}_{point.target}": point.val_top1 for point in curves[on]}
            metrics |= {
                f"val_a{measure}_5": curves[on][0].val_top1,
                f"val_a{measure}_avg": mean_of(points, on, measure).val_top1,
            }
        yield result_row(described | {"on": on}, {name: value for name, value in metrics.items() if value is not None})


# --------------------------------------------------------------------------------------------------------- as files

COLUMNS = tuple(field.name for field in fields(Point))
AVERAGE = "avg"
"""How the target None of a measure is written."""


def write_points(path: Path, points: Iterable[Point]) -> None:
    """Write the table, whole or not at all."""
    rows = ({**asdict(point), **({"target": AVERAGE} if point.measure and point.target is None else {})} for point in points)
    write_csv(path, COLUMNS, (row.values() for row in rows))


def points_in(path: Path) -> list[Point]:
    """The points of a table. Raises OSError, ValueError, KeyError, TypeError or csv.Error, which say what is wrong."""
    with path.open(newline="", encoding="utf-8") as file:
        points = [_point(row) for row in csv.DictReader(file)]
    for measure in MEASURES:
        curves = curves_of(points, measure)
        if any(tuple(point.target for point in curve) != NECS for curve in curves.values()) or not (
            set(ALWAYS) <= curves.keys() or (measure == "ncc" and not curves)
        ):
            raise ValueError("it does not hold an accuracy for each input and number")
    for point in points:
        accuracies = (point.train_val_top1, point.val_top1, point.val_low, point.val_high)
        if point.on not in (*INPUTS, MAJORITY) or not all(value is None or 0 <= value <= 1 for value in accuracies):
            raise ValueError("it holds what is no accuracy on a known input")
    if not any(point.target is None for point in points):
        points += [_average(curve) for curve in curves_of(points, "nec").values()]
    return points


def _average(curve: Sequence[Point]) -> Point:
    """The mean of a curve of an older version, which did not write it."""
    return Point(curve[0].on, curve[0].measure, val_top1=_mean([point.val_top1 for point in curve]))


def _point(row: Mapping[str, str]) -> Point:
    if "nec" in row:  # of an older version
        row = {"measure": "nec", "target": row["nec"], **{key: value for key, value in row.items() if key != "nec"}}
    values: dict[str, str | int | float] = {"on": row["on"], "measure": row["measure"]}
    for name in COLUMNS[2:]:
        text = row.get(name)
        if text and text != AVERAGE:
            values[name] = int(text) if name in ("target", "in_use", "firing") else float(text)
    if "val_top1" not in values:
        raise ValueError("a row lacks its accuracy")
    return Point(**values)  # type: ignore[arg-type]


COMPARED = tuple(field.name for field in fields(Comparison))


def write_comparisons(path: Path, comparisons: Iterable[Comparison]) -> None:
    """Write the concepts beside their controls, whole or not at all."""
    write_csv(path, COMPARED, (asdict(one).values() for one in comparisons))


def comparisons_in(path: Path) -> list[Comparison]:
    """What `write_comparisons` wrote. Raises OSError, ValueError, KeyError, TypeError or csv.Error: what is wrong."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [Comparison(row["figure"], row["against"], *(float(row[name]) for name in COMPARED[2:])) for row in rows]
