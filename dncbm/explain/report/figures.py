"""The charts of a report, as SVG. Their texts are ours: names and data sets stand in the page, not in a chart."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from dncbm.explain.plotting.colours import FAINT, INK, RANDOM, REST, RULE, SERIES
from dncbm.explain.plotting.fonts import quiet

WIDTH, HEIGHT = 4.6, 2.7
"""Inches. Shown at this size on a narrow phone, its text can still be read."""
STYLE: Any = {
    "svg.fonttype": "path", "svg.hashsalt": "report", "font.size": 9.5, "axes.edgecolor": REST, "axes.labelcolor": INK,
    "xtick.color": FAINT, "ytick.color": FAINT, "text.color": INK, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
"""Text becomes paths, so that the page needs no font; with the salt, the same chart is the same bytes."""
BINS = 40
MARKERS = "osD^vPX"

Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Line:
    """A curve, and perhaps its band."""

    x: Sequence[float] | Numbers
    y: Sequence[float] | Numbers
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def _drawn(draw: Callable[[Axes], object], height: float = HEIGHT) -> bytes:
    """The SVG of what a function draws into axes."""
    with rc_context(STYLE), quiet():
        drawing = Drawing(figsize=(WIDTH, height), layout="constrained")
        draw(drawing.subplots())
        file = io.BytesIO()
        drawing.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def histogram(groups: Mapping[str, Numbers], xlabel: str, *, log: bool = False) -> bytes:
    """A histogram of the values of latents in groups, which stand on one another.

    `log` puts the values on a logarithmic axis; they must then be positive.
    """
    values = {label: np.asarray(found, dtype=np.float64) for label, found in groups.items() if len(found)}
    every = np.concatenate([*values.values()]) if values else np.array([1.0, 2.0])
    low, high = float(every.min()), float(every.max())
    if log:
        high = max(high, low * 1.01)
        edges = np.geomspace(low, high, BINS + 1).tolist()
    else:
        high = max(high, low + 1e-6)
        edges = np.linspace(low, high, BINS + 1).tolist()

    def draw(axes: Axes) -> None:
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        if values:
            axes.hist(list(values.values()), edges, stacked=True, color=SERIES[: len(values)], label=list(values))
        axes.set_xlabel(xlabel)
        axes.set_ylabel("latents")
        if len(values) > 1:
            _legend(axes)

    return _drawn(draw)


def shares(counts: Mapping[str, Numbers], edges: Numbers, xlabel: str, of: str) -> bytes:
    """Histograms beside one another, in percent of each: label -> counts of the bins. Empty ones are left out."""
    middles = (edges[:-1] + edges[1:]) / 2
    lines = {label: Line(middles, 100 * found / found.sum()) for label, found in counts.items() if found.sum()}
    return curves(lines, xlabel, f"share of {of}, %", step=True)


def curves(
    lines: Mapping[str, Line],
    xlabel: str,
    ylabel: str,
    *,
    styles: Mapping[str, tuple[str, str]] | None = None,
    ticks: Sequence[float] | None = None,
    log: bool = False,
    step: bool = False,
    marks: Mapping[str, float] | None = None,
) -> bytes:
    """Curves with their labels.

    Args:
        lines: label -> curve.
        xlabel: of the axis.
        ylabel: of the axis.
        styles: label -> colour and matplotlib's format of the line; others take the next colour.
        ticks: places of the ticks of x.
        log: whether x is logarithmic.
        step: whether the curves have steps and no markers.
        marks: vertical lines with labels.
    """

    def draw(axes: Axes) -> None:
        for number, (label, line) in enumerate(lines.items()):
            colour, form = (styles or {}).get(label, (SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)] + "-"))
            if step:
                axes.step(line.x, line.y, color=colour, lw=1.6, label=label, where="mid")
            else:
                axes.plot(line.x, line.y, form, color=colour, ms=4, lw=1.4, label=label)
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, lw=0)
        for label, at in (marks or {}).items():
            axes.axvline(at, color=RANDOM, lw=1, ls=":", label=label)
        if log:
            axes.set_xscale("log")
        if ticks is not None:
            axes.set_xticks(list(ticks), [f"{tick:g}" for tick in ticks], minor=False)
            axes.minorticks_off()
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(color=RULE, lw=0.6, alpha=0.6)
        axes.set_axisbelow(True)
        _legend(axes)

    return _drawn(draw, HEIGHT + 0.4 + 0.18 * (len(lines) // 2))


def _legend(axes: Axes) -> None:
    """A legend above the axes, where it covers nothing."""
    n = len(axes.get_legend_handles_labels()[1])
    axes.legend(frameon=False, fontsize=8.5, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3 if n <= 3 else 2,
                borderaxespad=0.2, columnspacing=1.2, handlelength=2.2)  # fmt: skip
