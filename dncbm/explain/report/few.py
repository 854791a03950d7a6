"""Accuracy with few concepts: per class (NEC), per decision (NCC), on controls, and of a compact bottleneck."""

import math
from collections.abc import Iterator, Mapping, Sequence

from dncbm.explain.plotting.nec_curve import STYLES, what_bands_are
from dncbm.explain.report.document import Block, Figure, Heading, Section, Table, percent, points, said
from dncbm.explain.report.figures import Line, curves
from dncbm.explain.report.findings import Advantage, Curves, Few, Interval, Point
from dncbm.probe.compact import CompactCurve
from dncbm.probe.nec import read_leakage, read_points
from dncbm.probe.nec_seeds import banded_points
from dncbm.probe.nec_table import MAJORITY, curves_of
from dncbm.probe.results_table import marker, published_figures
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SAERun
from dncbm.runs.manifests import manifest_path
from dncbm.runs.settings import Settings

MEASURES = {"nec": "NEC, non-zero weights per class", "ncc": "NCC, contributing concepts per decision"}
DETAILS = {
    "firing": "inputs that fire",
    "in_use": "in use",
    "ncc": "NCC",
    "effective": "effective number of concepts",
    "cea": "CEA",
}
FIGURES = {"anec_5": "ANEC-5", "anec_avg": "ANEC-avg"}


def read_few(settings: Settings, run: SAERun, dataset: str) -> Few | None:
    """The accuracies of stage 10; None if it was not run. Raises as `read_points`."""
    if not manifest_path(Artifacts(settings).nec(run, dataset)).is_file():
        return None
    banded = banded_points(settings, run, dataset)
    of: dict[str, dict[str, dict[int, Point]]] = {measure: {} for measure in MEASURES}
    averages, details, majority = dict[tuple[str, str], Point](), dict[str, dict[str, float]](), None
    reached = dict[str, float]()
    for one in banded.points:
        shown = Point(one.val_top1, _number(one.val_low), _number(one.val_high))
        if one.on == MAJORITY:
            majority = one.val_top1
        elif one.target is None:
            averages[one.on, one.measure] = shown
        else:
            of[one.measure].setdefault(one.on, {})[one.target] = shown
            if one.measure == "nec":  # the last one is that of the largest NEC
                details[one.on] = {name: _number(getattr(one, name)) for name in DETAILS}
            else:
                reached[one.on] = _number(one.ncc)
    advantages = [
        Advantage(one.figure, one.against, Interval(one.advantage, one.low, one.high))
        for one in read_leakage(settings, run, dataset)
    ]
    of_run = curves_of(read_points(settings, run, dataset), "nec").items()
    own = {kind: sum(point.val_top1 for point in curve) / len(curve) for kind, curve in of_run}
    return Few(of["nec"], of["ncc"], averages, advantages, details, majority, what_bands_are(banded), own, reached)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def few_section(found: Few, compact: CompactCurve | None, dataset: str, absent: Sequence[Block]) -> Section:
    """Curves and tables, beside what is published of the data set. `absent` are notes on what was not run."""
    blocks: list[Block] = [
        said(
            "A wide linear probe classifies well even on random directions, so accuracy counts for concepts only if few of "
            "them decide. All inputs below are measured in the same way. Shuffled latents say nothing about an image: they "
            "can do no better than the commonest class, and without an intercept do worse. NCC is our reading of M-CBM's "
            "definition, whose formula we could not read (METHOD section 4)."
        )
    ]
    for measure, values in (("nec", found.nec), ("ncc", found.ncc)):
        if values:
            blocks += _curves(found, measure, values, dataset)
    if found.advantages:
        rows = tuple(
            (f"{FIGURES[one.figure]} above {_label(one.against)}", points(one.difference.mean),
             f"{points(one.difference.low)} to {points(one.difference.high)}")
            for one in found.advantages
        )  # fmt: skip
        caption = "Concepts of this SAE above controls, in points, on the same images"
        blocks.append(Table(caption, ("figure", "difference", "95 % interval"), rows))
    known = [name for name in DETAILS if any(not math.isnan(of[name]) for of in found.details.values())]
    if known:
        largest = max(next(iter(found.nec.values())))
        blocks += [
            said(
                "All of this SAE. ", "Inputs that fire do so on some training image. " if "firing" in known else "",
                "Those in use have a weight; NCC is how many decide about an image, the effective number the participation "
                "ratio of their contributions; CEA is an accuracy that the number in use lowers, by an exponent that we infer "
                "from published figures (METHOD section 4).",
            ),
            Table(
                f"What accuracy costs at NEC {largest}", ("inputs", *(DETAILS[name] for name in known)),
                tuple((_label(kind), *(_detail(name, of[name]) for name in known)) for kind, of in found.details.items()),
            ),
        ]  # fmt: skip
    if compact is not None:
        blocks += _compact(compact)
    return Section("few", "Accuracy with few concepts", (*blocks, *absent))


def _curves(found: Few, measure: str, values: Curves, dataset: str) -> Iterator[Block]:
    name = measure.upper()
    targets = list(next(iter(values.values())))
    lines = {_label(kind): _line(curve) for kind, curve in values.items()}
    styles = {_label(kind): (STYLES[kind][1], STYLES[kind][2]) for kind in values if kind in STYLES}
    summary = "; ".join(
        f"{label} {percent(line.y[0] / 100)} at {targets[0]}, {percent(line.y[-1] / 100)} at {targets[-1]}"
        for label, line in lines.items()
    )
    yield Heading(MEASURES[measure])
    yield Figure(
        measure, curves(lines, MEASURES[measure], "top-1 on val, %", styles=styles, ticks=targets),
        f"Curves of top-1 accuracy over {name}: {summary}.",
        f"Top-1 on val by {name}. {found.bands[:1].upper()}{found.bands[1:]}{'.' if found.bands else ''}".strip(),
    )  # fmt: skip
    rows = [
        (_label(kind), *(f"{100 * point.top1:.1f}" for point in curve.values()), _average(found.average(kind, measure)))
        for kind, curve in values.items()
    ]
    if found.majority is not None:
        rows.append(("commonest class", *[f"{100 * found.majority:.1f}"] * (len(targets) + 1)))
    header = ("inputs", *map(str, targets), "average")
    if measure == "ncc" and found.reached:
        header += ("NCC reached",)
        shown = (found.reached.get(kind, math.nan) for kind in values)
        reached = ["" if math.isnan(ncc) else f"{ncc:.1f}" for ncc in shown]
        rows = [(*row, last) for row, last in zip(rows, [*reached, *[""] * (len(rows) - len(reached))], strict=True)]
        yield said(
            "An NCC is a limit: a probe whose path ends below it has the same accuracy at every larger one. The last column "
            f"is the NCC on val that this SAE's probe reached at {targets[-1]}."
        )
    sources = dict[str, str]()
    if measure == "ncc" and (published := _published(dataset)):
        (first, source), (mean, _) = published
        blank = [""] * (len(header) - len(targets) - 2)
        rows.append((f"DN-CBM, published [{marker(source)}]", first, *[""] * (len(targets) - 1), mean, *blank))
        sources[marker(source)] = published_figures()["sources"][marker(source)]
    yield Table(f"Top-1 on val, %, at {name}", header, tuple(rows))
    if sources:
        yield said("Sources: ", "; ".join(f"[{key}] {text}" for key, text in sources.items()), ".")


def _published(dataset: str) -> list[tuple[str, str]]:
    """The published accuracies of DN-CBM at NCC 5 and on average, each with its source; empty if there are none."""
    found = [of_figure.get(dataset) for of_figure in published_figures()["at_ncc"].values()]
    return [(str(value[0]), value[1]) for value in found if value is not None] if all(found) else []


def _line(curve: Mapping[int, Point]) -> Line:
    x, y = list(curve), [100 * point.top1 for point in curve.values()]
    if any(math.isnan(point.low) for point in curve.values()):
        return Line(x, y)
    return Line(x, y, [100 * point.low for point in curve.values()], [100 * point.high for point in curve.values()])


def _average(point: Point) -> str:
    band = "" if math.isnan(point.low) else f" ({100 * point.low:.1f} to {100 * point.high:.1f})"
    return f"{100 * point.top1:.1f}{band}"


def _label(kind: str) -> str:
    return STYLES[kind][0] if kind in STYLES else kind


def _detail(name: str, value: float) -> str:
    if math.isnan(value):
        return ""
    return percent(value) if name == "cea" else f"{value:.{0 if name in ('firing', 'in_use') else 1}f}"


def _compact(found: CompactCurve) -> Iterator[Block]:
    sizes = [point.size for point in found.chosen]
    random = [found.random(size) for size in sizes]
    chosen = [100 * point.val_top1 for point in found.chosen]
    mean = [100 * one for one, _ in random]
    low, high = ([100 * (one + side * deviation) for one, deviation in random] for side in (-1, 1))
    whole = f"all {found.whole.size} concepts: {percent(found.whole.val_top1)}"
    yield Heading("A compact bottleneck")
    yield said(
        f"A probe that may use only the concepts it needs most, refitted, beside random concepts in the same number; {whole}."
    )
    yield Figure(
        "compact",
        curves({"chosen concepts": Line(sizes, chosen), "random concepts": Line(sizes, mean, low, high)}, "concepts in use",
               "top-1 on val, %", log=True, ticks=sizes),
        f"Curves of top-1 over the number of concepts in use: chosen ones from {chosen[0]:.1f} % with {sizes[0]} to "
        f"{chosen[-1]:.1f} % with {sizes[-1]}, random ones from {mean[0]:.1f} % to {mean[-1]:.1f} %.",
        "Top-1 on val by the number of concepts in use. The band is one standard deviation of the random subsets.",
    )  # fmt: skip
    rows = tuple(
        (str(size), f"{one:.1f}", f"{100 * of[0]:.1f} \u00b1 {100 * of[1]:.1f}")
        for size, one, of in zip(sizes, chosen, random, strict=True)
    )
    yield Table("Top-1 on val, %, by the number of concepts", ("concepts", "chosen", "random"), rows)
