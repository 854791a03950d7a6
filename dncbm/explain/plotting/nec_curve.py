"""Accuracy against the number of effective and of contributing concepts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dncbm.explain.plotting.colours import CONCEPTS, FAINT, FEATURES, NAMED, RANDOM, SHUFFLED, UNTRAINED
from dncbm.explain.plotting.fonts import families, quiet, wrapped
from dncbm.probe.nec import NEC, accuracy_at_nec
from dncbm.probe.nec_seeds import Banded, banded_points
from dncbm.probe.nec_table import INPUTS, MAJORITY, MEASURES, Point, curves_of, mean_of
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Compact, ProbeDataset, SAERun
from dncbm.runs.manifests import Outcome
from dncbm.runs.results import text_table
from dncbm.runs.settings import Settings
from sparse_autoencoder.files import whole_file

STYLES = {
    "concepts": ("SAE concepts", CONCEPTS, "o-"),
    "named": ("named concepts", NAMED, "D-"),
    "features": ("raw features", FEATURES, "s--"),
    "random": ("random directions", RANDOM, "^:"),
    "untrained": ("untrained SAE", UNTRAINED, "v-."),
    "shuffled": ("shuffled concepts", SHUFFLED, "x:"),
}
"""Inputs of the probe -> label, colour and style of the curve."""
AXES = {"nec": "non-zero weights per class (NEC)", "ncc": "concepts per decision (NCC)"}
"""Measure -> what its axis says."""
WIDTH, HEIGHT, TITLE = 4.8, 3.4, 10.0
"""Inches of a panel; points of the title."""


def nec_curve(points: Sequence[Point], title: str, path: Path, note: str = "") -> None:
    """Draw a panel for each measure with a curve and a band for each kind of inputs, and save the figure as a PNG.

    `note` says what the bands are. Named concepts that are all concepts have no curve of their own.
    """
    panels = {measure: curves for measure in MEASURES if (curves := curves_of(points, measure))}
    width, majority = WIDTH * len(panels), next((point.val_top1 for point in points if point.on == MAJORITY), None)
    figure = Figure(figsize=(width, HEIGHT + 0.5 * (len(panels) > 1)), layout="constrained")
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (measure, curves) in zip(row, panels.items(), strict=True):
        _draw_curves(axes, curves)
        if majority is not None:
            axes.axhline(100 * majority, color=FAINT, linewidth=0.8, label="commonest class")
        axes.set_xlabel(AXES[measure])
    row[0].set_ylabel("top-1 accuracy, %")
    # Names of data sets and encoders are no formulas, and may be long or in other scripts.
    lines = "\n".join(wrapped(title, width - 0.8, TITLE, lines=3))
    if len(panels) == 1:
        row[0].set_title(lines, fontsize=TITLE, family=list(families(lines)), parse_math=False)
        row[0].legend(frameon=False, fontsize=9, title=note, title_fontsize=8)
    else:
        figure.suptitle(lines, fontsize=TITLE, family=list(families(lines)), parse_math=False)
        handles, labels = row[0].get_legend_handles_labels()
        about = {"title": note, "title_fontsize": 8, "fontsize": 9, "frameon": False}
        figure.legend(handles, labels, loc="outside lower center", ncols=4, **about)
    with whole_file(path) as temporary, quiet():
        figure.savefig(temporary, dpi=130, format="png")


def _draw_curves(axes: Axes, curves: Mapping[str, Sequence[Point]]) -> None:
    for inputs, curve in curves.items():
        if inputs == "named" and _accuracies(curve) == _accuracies(curves["concepts"]):
            continue
        label, colour, style = STYLES[inputs]
        x = [point.target or 0 for point in curve]
        axes.plot(x, _accuracies(curve), style, color=colour, label=label, markersize=5)
        low = [100 * point.val_low for point in curve if point.val_low is not None]
        high = [100 * point.val_high for point in curve if point.val_high is not None]
        if len(low) == len(high) == len(curve):
            axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    axes.set_xticks([point.target or 0 for point in curves["concepts"]])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _accuracies(curve: Sequence[Point]) -> list[float]:
    return [100 * point.val_top1 for point in curve]


def draw_nec(settings: Settings, run: SAERun, images: ProbeDataset) -> None:
    """Draw the accuracies that stage 10 measured, and print them: of all SAEs that differ from this one only in their seed."""
    path = Artifacts(settings).nec_figure(run, images.dataset)
    found = banded_points(settings, run, images.dataset)
    print(accuracy_table(found, images.dataset))
    nec_curve(found.points, f"{images.dataset}, {run.encoder}", path, what_bands_are(found))
    print(f"figure: {path}")


def what_bands_are(found: Banded) -> str:
    """What accuracies are means over, and what their intervals are of; blank for a single SAE without intervals."""
    if len(found.seeds) > 1:
        fewer = f" (named concepts: {_listed(found.named_seeds)})" if 0 < len(found.named_seeds) < len(found.seeds) else ""
        single = "raw features and named concepts" if len(found.named_seeds) == 1 else "raw features"
        means = f"mean over seeds {_listed(found.seeds)}{fewer}; bands: 95 % interval of the mean (t)"
        return f"{means}, for {single} over draws of the images"
    return "bands: 95 % interval over draws of the images" if any(point.val_low is not None for point in found.points) else ""


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def accuracy_table(found: Banded, dataset: str) -> str:
    """The summaries of every kind of inputs, as text, and how many of its inputs fire on train, where that is known."""
    rows = []
    for inputs in INPUTS:
        cells = []
        for measure in MEASURES:
            curves = curves_of(found.points, measure)
            if inputs in curves:
                firing = curves[inputs][0].firing
                cells += [_cell(curves[inputs][0]), _cell(mean_of(found.points, inputs, measure))]
        if cells:
            rows.append([STYLES[inputs][0], *cells, *[""] * (4 - len(cells)), "" if firing is None else str(firing)])
    for point in found.points:
        if point.on == MAJORITY:
            rows.append(["commonest class", _cell(point), *[""] * 4])
    header = [f"top-1 on val of {dataset}, %", "NEC 5", "mean of 5 to 30", "NCC 5", "mean of 5 to 30", "inputs that fire"]
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return "\n".join(filter(None, [text_table(header, rows), what_bands_are(found).replace("bands:", "in brackets:")]))


def _cell(point: Point) -> str:
    if point.val_low is None or point.val_high is None:
        return f"{100 * point.val_top1:.1f}"
    return f"{100 * point.val_top1:.1f} [{100 * point.val_low:.1f}, {100 * point.val_high:.1f}]"


def accuracy_and_figure(
    settings: Settings,
    run: SAERun,
    images: ProbeDataset,
    compact: Compact = Compact(),  # noqa: B008 - frozen
    *,
    device: str = "auto",
    overwrite: bool = False,
) -> Outcome:
    """Stage 10 and its figure; with `compact.max_concepts`, also the accuracies of a compact bottleneck and theirs."""
    outcome = accuracy_at_nec(settings, run, images, device=device, overwrite=overwrite)
    if outcome is not Outcome.STOPPED:  # even if nothing was measured: another seed may have been measured since
        draw_nec(settings, run, images)
    if compact.max_concepts is None or outcome is Outcome.STOPPED:
        return outcome
    from dncbm.explain.plotting.compact_curve import compact_and_figure

    of_compact = compact_and_figure(settings, run, images, compact, device=device, overwrite=overwrite)
    return of_compact if outcome is Outcome.ALREADY_DONE or of_compact is Outcome.STOPPED else outcome


NEC_AND_FIGURE = replace(NEC, function=accuracy_and_figure)
