"""The trade-offs of all SAEs: explained variance and accuracy against L0, with the Pareto fronts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from dncbm.concepts.naming import NAMES
from dncbm.concepts.sae import SAE
from dncbm.explain.plotting.canvas import others
from dncbm.explain.plotting.colours import FAINT, INK, REST, SERIES
from dncbm.explain.plotting.fonts import families, quiet, wrapped
from dncbm.probe.comparison import PLACES, TRADED, ComparedSAE, datasets_of, on_fronts, write_comparison
from dncbm.probe.nec import NEC
from dncbm.probe.stage import PROBE
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Comparison
from dncbm.runs.manifests import Outcome
from dncbm.runs.settings import Settings
from sparse_autoencoder import VARIANTS
from sparse_autoencoder.files import whole_file

WIDTH, HEIGHT, BELOW = 9.0, 3.8, 0.45
"""Inches of the figure without its legends, which begin so far below the panels."""
SMALL = 8.0
"""Points of the smaller texts."""
ENTRY = 1.8
"""Inches of a text in the legend."""
MARKERS, OTHER = dict(zip(VARIANTS, "os^Dv", strict=False)), "P"
"""Kind of SAE -> marker; that of one that is not listed."""
CLOSE = 0.07, 0.06
"""Shares of a panel's width and height within which only one of two points is numbered."""
LEAST_RANGE = 3.0
"""Ratio of the ends of the axis of L0, so that it has a tick."""


class _Point(NamedTuple):
    """An SAE in a panel."""

    number: int
    """In the table."""
    l0: float
    gain: float
    series: str
    """What is compared: SAEs of the same features, and accuracies on the same data set."""
    kind: str
    on_front: bool


def trade_offs(rows: Sequence[ComparedSAE], path: Path) -> None:
    """Draw explained variance and top-1 on train_val against L0, and save the figure as a PNG.

    Points on the Pareto front of their series are filled and joined by a line. An L0 of 0 and a negative explained variance
    are not drawn: nothing is worse.
    """
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    variance, accuracy = figure.subplots(1, 2)
    of_variance, of_accuracy = TRADED
    legends = [_panel(variance, _points(rows, {"": of_variance}), "explained variance on train_val")]
    columns = {dataset: f"{of_accuracy}:{dataset}" for dataset in datasets_of(rows)}
    legends.append(_panel(accuracy, _points(rows, columns, 100), "top-1 on train_val, %"))
    figure.set_figheight(HEIGHT + max(legends))
    with whole_file(path) as temporary, quiet():
        figure.savefig(temporary, dpi=130, format="png")


def _points(rows: Sequence[ComparedSAE], columns: dict[str, str], factor: float = 1) -> list[_Point]:
    """The points of columns: data set -> column."""
    places = [name for name in PLACES if len({row.values[name] for row in rows}) > 1]
    found = []
    for dataset, column in columns.items():
        for number, (row, on_front) in enumerate(zip(rows, on_fronts(rows, column), strict=True), start=1):
            parts = ([dataset] if len(columns) > 1 else []) + [str(row.values[name]) for name in places]
            l0, gain = row.number("l0"), row.number(column)
            if l0 and gain is not None and gain >= 0:
                found.append(_Point(number, l0, factor * gain, ", ".join(parts), row.run.sparsity.kind, on_front))
    return found


def _panel(axes: Axes, points: Sequence[_Point], gain: str) -> float:
    """Draw a panel. Returns the height of its legend in inches."""
    _draw_axes(axes, gain)
    if not points:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=FAINT)
        return 0.0
    series = list(dict.fromkeys(point.series for point in points))
    kinds = sorted({point.kind for point in points}, key=[*MARKERS, *(point.kind for point in points)].index)
    by_series = len(series) > 1
    colours = {name: SERIES[i] if i < len(SERIES) else REST for i, name in enumerate(series if by_series else MARKERS)}
    groups: dict[tuple[str, str, bool], list[_Point]] = {}
    for point in points:
        colour = colours.get(point.series if by_series else point.kind, REST)
        groups.setdefault((point.kind, colour, point.on_front), []).append(point)
    size = 6.5 if len(points) <= 40 else 4.5
    for (kind, colour, on_front), group in groups.items():
        style: dict[str, Any] = {"markersize": size, "linestyle": "", "zorder": 3 if on_front else 2}
        style |= {"marker": MARKERS.get(kind, OTHER), "markerfacecolor": colour if on_front else "none"}
        axes.plot([point.l0 for point in group], [point.gain for point in group], color=colour, **style)
    front = sorted((point for point in points if point.on_front), key=lambda point: point.l0)
    for name in series:
        corners = [point for point in front if point.series == name]
        colour = colours[name] if by_series else FAINT
        axes.plot([point.l0 for point in corners], [point.gain for point in corners], color=colour, linewidth=1, zorder=1)
    _set_limits(axes, [point.l0 for point in points])
    _number(axes, front)
    shown = {"Pareto front": Line2D([], [], color=FAINT, marker=MARKERS.get(kinds[0], OTHER) if len(kinds) == 1 else "o")}
    for name in series[: len(SERIES)] if by_series else ():
        shown[name] = Line2D([], [], color=colours[name], linewidth=4)
    if len(series) > len(SERIES):
        shown[others(len(series) - len(SERIES))] = Line2D([], [], color=REST, linewidth=4)
    for kind in kinds if len(kinds) > 1 else ():
        style = {"marker": MARKERS.get(kind, OTHER), "markerfacecolor": "none", "linestyle": ""}
        shown[f"{kind} SAE"] = Line2D([], [], color=INK if by_series else colours.get(kind, REST), **style)
    return _draw_legend(axes, shown)


def _number(axes: Axes, front: Sequence[_Point]) -> None:
    """The numbers of the points on the fronts, above them to the left, where no other of the front is; not too close."""
    taken: list[tuple[float, float]] = []
    for point in front:
        x, y = axes.transAxes.inverted().transform(axes.transData.transform((point.l0, point.gain)))
        if all(abs(x - other_x) > CLOSE[0] or abs(y - other_y) > CLOSE[1] for other_x, other_y in taken):
            taken.append((x, y))
            style: dict[str, Any] = {"xytext": (-3, 3), "textcoords": "offset points", "ha": "right", "fontsize": SMALL - 1}
            style["path_effects"] = [withStroke(linewidth=1.5, foreground="white")]
            axes.annotate(f"#{point.number}", (point.l0, point.gain), color=INK, zorder=4, **style)


def _draw_axes(axes: Axes, gain: str) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("L0 on train_val (log scale)")
    axes.set_ylabel(gain)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _set_limits(axes: Axes, l0: Sequence[float]) -> None:
    """All points, with room for their numbers."""
    low, high = min(l0) / 1.15, max(l0) * 1.15
    wider = max(1.0, (LEAST_RANGE * low / high) ** 0.5)
    axes.set_xlim(low / wider, high * wider)
    axes.margins(y=0.12)


def _draw_legend(axes: Axes, shown: Mapping[str, Line2D]) -> float:
    """Draw a legend below a panel. Returns its height in inches."""
    texts = ["\n".join(wrapped(name, ENTRY, SMALL, lines=2)) for name in shown]
    columns = 2 if max(map(len, texts)) > 14 else 3
    figure = axes.figure
    below = axes.transAxes + ScaledTranslation(0, -BELOW, figure.dpi_scale_trans)
    # Texts are set afterwards: of one that begins with an underscore, matplotlib makes no entry.
    legend = axes.legend(
        list(shown.values()), [str(number) for number in range(len(shown))], loc="upper center", bbox_to_anchor=(0.5, 0),
        bbox_transform=below, ncols=columns, frameon=False, fontsize=SMALL,
    )  # fmt: skip
    for entry, text in zip(legend.get_texts(), texts, strict=True):
        entry.set(text=text, family=list(families(text)), parse_math=False)
    return -(-len(texts) // columns) * (1 + max(text.count("\n") for text in texts)) * SMALL * 1.5 / 72


def compare_runs(
    settings: Settings, comparison: Comparison | None = None, *, device: str = "auto", overwrite: bool = False
) -> Outcome:
    """Print a table of all SAEs, and write it as CSV and as a figure of the trade-offs.

    They are written every time, since only manifests and results are read; `device` and `overwrite` are ignored.

    Raises UserError if there is no SAE, or none that is asked for, or a column is unknown, or a best SAE is asked for and no
    SAE has a value in that column.
    """
    rows = write_comparison(settings, comparison or Comparison())
    path = Artifacts(settings).comparison("png")
    trade_offs(rows, path)
    print(f"figure: {path}")
    return Outcome.RAN


COMPARE_RUNS = commands.COMPARE_RUNS.stage(
    function=compare_runs,
    inputs=(SAE, NAMES, PROBE, NEC),
    outputs=lambda artifacts, *_: [artifacts.comparison(suffix) for suffix in ("csv", "png")],
    needs=(),
    makes="the comparison",
)
