"""The figure of a training run."""

from pathlib import Path

import numpy as np

from sparse_autoencoder.files import whole_file
from sparse_autoencoder.metrics import ALMOST_DEAD


def draw_training(rows: list[dict[str, float]], density: np.ndarray, path: Path) -> None:
    """Draws a run's curves and its feature-density histogram.

    Args:
        rows: rows of the log, each with its `step`.
        density: the fraction of the training items for which each latent is active (F), from 0 to 1.
        path: a .png, .pdf or .svg file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3).flatten()

    def curves(axis: int, title: str, names: dict[str, str], log_scale: bool = False) -> None:
        for name, label in names.items():
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                marker = "." if len(points) < 30 else None  # a single point makes no line
                axes[axis].plot(*zip(*points, strict=True), label=label, marker=marker)
        axes[axis].set(title=title, xlabel="step")
        if log_scale and any(row[name] > 0 for row in rows for name in names if row.get(name) is not None):
            axes[axis].set_yscale("log")
        if len(names) > 1 and axes[axis].lines:
            axes[axis].legend()

    curves(0, "loss", {"loss": "training", "val_loss": "validation"}, log_scale=True)
    curves(1, "parts of the loss", {"l2_loss": "L2", "l1_loss": "sparsity", "val_l2_loss": "L2, validation"}, True)
    curves(2, "L0: active latents per item", {"l0": "training", "val_l0": "validation"})
    curves(3, "explained variance", {"explained_variance": "training", "val_explained_variance": "validation"})
    axes[3].set_ylim(top=1)
    curves(4, "latents", {"dead": "dead", "almost_dead": "almost dead"})

    alive = density[density > 0]
    lowest = min(np.log10(ALMOST_DEAD), np.log10(alive.min())) if len(alive) else np.log10(ALMOST_DEAD)
    axes[5].hist(np.log10(alive), bins=np.linspace(lowest, 0, 60))
    title = f"feature density, {len(density) - len(alive)} dead of {len(density)}"
    axes[5].set(title=title, xlabel="log10 of the fraction of items it is active for", ylabel="latents")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png", dpi=120)
