"""The figure of a training run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sparse_autoencoder.files import whole_file

# One colour per quantity (Okabe and Ito's, which colour-blind readers tell apart).
COLOURS = {
    "loss": "#000000",
    "l2_loss": "#0072B2",
    "l1_loss": "#D55E00",
    "l0": "#009E73",
    "explained_variance": "#CC79A7",
    "dead": "#000000",
    "almost_dead": "#999999",
}
RESAMPLING = "#E69F00"
SMOOTH_OVER = 30  # curves with fewer points get markers: a single point makes no line


def draw_training(rows: list[dict[str, float]], density: np.ndarray, path: Path, resamplings: Sequence[int] = ()) -> None:
    """Draws a run's curves and its feature-density histogram.

    Args:
        rows: rows of the log, each with its `step`.
        density: the fraction of the training items for which each latent is active (F), from 0 to 1.
        path: a .png, .pdf or .svg file.
        resamplings: the steps after which dead latents are resampled.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    drawn: set[str] = set()

    def curves(axis: int, title: str, labels: dict[str, str], log_scale: bool = False) -> None:
        """Draws quantities, by name with their labels: in training solid, in validation dashed."""
        ax, positive = axes[axis], False
        for name, label in labels.items():
            for row_name, style in ((name, "-"), (f"val_{name}", "--")):
                points = [(row["step"], row[row_name]) for row in rows if row_name in row and np.isfinite(row[row_name])]
                if points:
                    drawn.add(style)
                    positive = positive or any(value > 0 for _, value in points)
                    marker = None if len(points) >= SMOOTH_OVER else "." if style == "-" else "x"
                    # A curve has a label once, for its training.
                    legend = label if style == "-" else None
                    ax.plot(*zip(*points, strict=True), style, color=COLOURS[name], label=legend, marker=marker, linewidth=1.2)
        ax.set(title=title, xlabel="step")
        for step in resamplings:
            ax.axvline(step, color=RESAMPLING, linewidth=0.8, alpha=0.5, zorder=0)
        if log_scale and positive:
            ax.set_yscale("log")
        if len(labels) > 1 and ax.lines:
            ax.legend()

    curves(0, "loss", {"loss": "loss"}, log_scale=True)
    curves(1, "parts of the loss", {"l2_loss": "L2", "l1_loss": "sparsity"}, log_scale=True)
    curves(2, "L0: active latents per item", {"l0": "L0"})
    curves(3, "explained variance", {"explained_variance": "explained variance"})
    curves(4, "latents", {"dead": "dead", "almost_dead": "almost dead"})
    shown = [row[name] for row in rows for name in ("explained_variance", "val_explained_variance") if name in row]
    axes[3].set_ylim(bottom=max(-1, min([-0.05, *filter(np.isfinite, shown)])), top=1)  # the first steps may be far below

    alive = density[density > 0]
    if len(alive):
        axes[5].hist(alive, bins=np.geomspace(alive.min() / 1.1, alive.max() * 1.1, 50), color=COLOURS["l0"])
        axes[5].set_xscale("log")
        axes[5].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[5].xaxis.set_major_formatter("{x:g}")
        axes[5].xaxis.set_minor_formatter(NullFormatter())
    title = f"latents by activity ({len(density) - len(alive)} of {len(density)} dead)"
    axes[5].set(title=title, xlabel="share of the training items", ylabel="latents")

    keys = []
    if "-" in drawn:
        keys.append(Line2D([], [], color="black", linestyle="-", label="training (the batch of the step)"))
    if "--" in drawn:
        keys.append(Line2D([], [], color="black", linestyle="--", label="validation"))
    if resamplings:
        keys.append(Line2D([], [], color=RESAMPLING, label="resampling of dead latents"))
    if keys:
        figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png", dpi=120)
