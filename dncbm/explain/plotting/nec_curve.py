"""Accuracy against the number of effective concepts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from dncbm.explain.plotting.colours import CONCEPTS, FEATURES, RANDOM
from dncbm.probe.nec import read_nec
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import ProbeDataset, SAERun
from dncbm.runs.settings import Settings
from sparse_autoencoder.files import whole_file

STYLES = {
    "concepts": ("SAE concepts", CONCEPTS, "o-"),
    "features": ("raw features", FEATURES, "s--"),
    "random": ("random directions", RANDOM, "^:"),
}
"""Inputs of the probe -> label, colour and style of the curve."""


def nec_curve(necs: Sequence[int], curves: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Draw one curve per kind of input, and save the figure as a PNG.

    `necs` are numbers of effective concepts; `curves` is a key of STYLES -> accuracy (a fraction) at each of them.
    """
    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    axes = figure.subplots()
    for inputs, accuracies in curves.items():
        label, colour, style = STYLES[inputs]
        axes.plot(necs, [100 * accuracy for accuracy in accuracies], style, color=colour, label=label, markersize=5)
    axes.set_xticks(necs)
    axes.set_xlabel("non-zero weights of a class (NEC)")
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def draw_nec(settings: Settings, run: SAERun, images: ProbeDataset) -> None:
    """Draw the accuracies that stage 10 measured."""
    path = Artifacts(settings).nec_figure(run, images.dataset)
    found = read_nec(settings, run, images.dataset)
    curves = {inputs: list(by_nec.values()) for inputs, by_nec in found.items()}
    nec_curve(list(found["concepts"]), curves, f"{images.dataset}, {run.encoder}", path)
    print(f"figure: {path}")
