"""Meta clusters: groups of images with similar concepts, and the concepts that set each apart."""

from dncbm.explain.dumps.meta_clusters import DUMP, KIND, Page
from dncbm.explain.plotting.canvas import COLUMN, GAP, MARGIN, Canvas, fitted, text_width
from dncbm.explain.plotting.colours import FAINT, RULE, sign_colour
from dncbm.explain.plotting.pages import plot_stage

GRID, ROW, HEAD = 1.26, 0.19, 0.26
BLOCK = HEAD + GRID + 0.1
"""Height of a cluster."""


def draw(page: Page, *, use_latex: bool = False) -> Canvas:
    """One column wide: the clusters below each other, each with three by three images beside its concepts."""
    canvas = Canvas(COLUMN, BLOCK * len(page.clusters) + MARGIN, use_latex=use_latex)
    left = MARGIN + GRID + 0.08
    for place, cluster in enumerate(page.clusters):
        top = place * BLOCK
        title = f"cluster {cluster.number}"
        canvas.text(MARGIN, top + 0.15, title, size=8, bold=True)
        x = MARGIN + text_width(title, 8, bold=True) + 0.1
        about = f"{cluster.size} images, {cluster.class_share:.0%} {cluster.class_name}"
        canvas.text(x, top + 0.15, fitted(about, COLUMN - MARGIN - x)[0], colour=FAINT)
        canvas.images(cluster.images, MARGIN, top + HEAD, (GRID - 2 * GAP) / 3, across=3)
        rows = [(label, value, sign_colour(value)) for label, value in cluster.concepts]
        canvas.bars(left, top + HEAD, COLUMN - MARGIN - left, rows, label_width=0.95, row_height=ROW)
        if place:
            canvas.line(MARGIN, top + 0.02, COLUMN - MARGIN, top + 0.02, RULE)
    return canvas


PLOT = plot_stage(KIND, DUMP, draw, "Draw meta clusters with their images and concepts.")
