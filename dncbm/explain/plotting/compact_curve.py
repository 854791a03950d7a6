"""Accuracy against the number of concepts that a probe may use, chosen and random."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from dncbm.explain.plotting.colours import CONCEPTS, INK, RANDOM
from dncbm.explain.plotting.fonts import families, quiet, wrapped
from dncbm.probe.compact import DRAWS, CompactCurve, measure_compact, read_compact, write_concepts
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Compact, ProbeDataset, SAERun
from dncbm.runs.manifests import Outcome
from dncbm.runs.settings import Settings
from sparse_autoencoder.files import whole_file

WIDTH, TITLE = 4.8, 10.0
"""Inches of the figure; points of its title."""
MOST_TICKS = 8
"""Sizes below the largest that are written at the axis."""


def compact_curve(curve: CompactCurve, title: str, path: Path) -> None:
    """Draw the accuracy on `val` with chosen concepts, random ones (mean and deviation) and all; save it as a PNG."""
    sizes = [point.size for point in curve.chosen]
    means, deviations = zip(*((100 * mean, 100 * sd) for mean, sd in map(curve.random, sizes)), strict=True)
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    whole = curve.whole
    axes.axhline(100 * whole.val_top1, color=INK, linestyle="--", linewidth=1, label=f"all {whole.size}")
    axes.plot(sizes, [100 * point.val_top1 for point in curve.chosen], "o-", color=CONCEPTS, label="chosen", markersize=5)
    axes.plot(sizes, means, "^:", color=RANDOM, label=f"random (mean ± s.d. of {DRAWS})", markersize=5)
    low, high = ([mean + sign * sd for mean, sd in zip(means, deviations, strict=True)] for sign in (-1, 1))
    axes.fill_between(sizes, low, high, color=RANDOM, alpha=0.25, linewidth=0)
    axes.set_xscale("log", base=2)
    every = -(-len(sizes[:-1]) // MOST_TICKS) or 1
    ticks = [size for size in sizes[:-1:every] if size * 2**every <= sizes[-1]]  # none so near the last that they overlap
    axes.xaxis.set_major_locator(FixedLocator([*ticks, sizes[-1]]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("concepts in use (log scale)")
    axes.set_ylabel("top-1 accuracy, %")
    # Names of data sets and encoders are no formulas, and may be long or in other scripts.
    lines = "\n".join(wrapped(title, WIDTH - 0.8, TITLE, lines=3))
    axes.set_title(lines, fontsize=TITLE, family=list(families(lines)), parse_math=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    with whole_file(path) as temporary, quiet():
        figure.savefig(temporary, dpi=130, format="png")


def compact_and_figure(
    settings: Settings, run: SAERun, images: ProbeDataset, compact: Compact, *, device: str = "auto", overwrite: bool = False
) -> Outcome:
    """The accuracies with few concepts, their figure, and the list of the chosen concepts. Raises as `measure_compact`."""
    outcome = measure_compact(settings, run, images, compact, device=device, overwrite=overwrite)
    curve = None if outcome is Outcome.STOPPED else read_compact(settings, run, images.dataset)
    if curve is not None:
        path = Artifacts(settings).compact_figure(run, images.dataset)
        write_concepts(settings, run, images.dataset, curve, is_new=outcome is Outcome.RAN)
        if outcome is Outcome.RAN or not path.is_file():
            compact_curve(curve, f"{images.dataset}, {run.encoder}", path)
            print(f"figure: {path}")
    return outcome
