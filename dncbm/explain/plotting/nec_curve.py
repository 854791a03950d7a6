"""Accuracy against the number of effective concepts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from dncbm.explain.plotting.colours import CONCEPTS, FEATURES, RANDOM
from dncbm.explain.plotting.fonts import families, quiet, wrapped
from dncbm.probe.nec import NEC, accuracy_at_nec, read_nec
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import ProbeDataset, SAERun
from dncbm.runs.manifests import Outcome
from dncbm.runs.settings import Settings
from sparse_autoencoder.files import whole_file

STYLES = {
    "concepts": ("SAE concepts", CONCEPTS, "o-"),
    "features": ("raw features", FEATURES, "s--"),
    "random": ("random directions", RANDOM, "^:"),
}
"""Inputs of the probe -> label, colour and style of the curve."""
WIDTH, TITLE = 4.8, 10.0
"""Inches of the figure; points of its title."""


def nec_curve(necs: Sequence[int], curves: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Draw one curve per kind of input, and save the figure as a PNG.

    `necs` are numbers of effective concepts; `curves` is a key of STYLES -> accuracy (a fraction) at each of them.
    """
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    for inputs, accuracies in curves.items():
        label, colour, style = STYLES[inputs]
        axes.plot(necs, [100 * accuracy for accuracy in accuracies], style, color=colour, label=label, markersize=5)
    axes.set_xticks(necs)
    axes.set_xlabel("non-zero weights per class (NEC)")
    axes.set_ylabel("top-1 accuracy, %")
    # Names of data sets and encoders are no formulas, and may be long or in other scripts.
    lines = "\n".join(wrapped(title, WIDTH - 0.8, TITLE, lines=3))
    axes.set_title(lines, fontsize=TITLE, family=list(families(lines)), parse_math=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    with whole_file(path) as temporary, quiet():
        figure.savefig(temporary, dpi=130, format="png")


def draw_nec(settings: Settings, run: SAERun, images: ProbeDataset) -> None:
    """Draw the accuracies that stage 10 measured."""
    path = Artifacts(settings).nec_figure(run, images.dataset)
    found = read_nec(settings, run, images.dataset)
    curves = {inputs: list(by_nec.values()) for inputs, by_nec in found.items()}
    nec_curve(list(found["concepts"]), curves, f"{images.dataset}, {run.encoder}", path)
    print(f"figure: {path}")


def accuracy_and_figure(
    settings: Settings, run: SAERun, images: ProbeDataset, *, device: str = "auto", overwrite: bool = False
) -> Outcome:
    """Stage 10 and its figure."""
    outcome = accuracy_at_nec(settings, run, images, device=device, overwrite=overwrite)
    drawn = Artifacts(settings).nec_figure(run, images.dataset).is_file()
    if outcome is Outcome.RAN or (outcome is Outcome.ALREADY_DONE and not drawn):
        draw_nec(settings, run, images)
    return outcome


NEC_AND_FIGURE = replace(NEC, function=accuracy_and_figure)
