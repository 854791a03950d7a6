"""Accuracy against the number of effective concepts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from dncbm.manifests import whole_file

STYLES = {
    "concepts": ("SAE concepts", "#1b6ca8", "o-"),
    "features": ("raw features", "#c8553d", "s--"),
    "random": ("random directions", "#777777", "^:"),
}


def nec_curve(necs: Sequence[int], curves: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Draw a curve for each kind of input and save it as PNG.

    Args:
        necs: numbers of effective concepts.
        curves: one of STYLES -> accuracy (a fraction) at each.
        title: above it.
        path: the PNG.
    """
    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    axes = figure.subplots()
    for kind, accuracies in curves.items():
        label, colour, style = STYLES[kind]
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
