"""Meta clusters: groups of images with similar concepts, and the concepts that set each apart."""

from dncbm.explain.dumps.dump import counted
from dncbm.explain.dumps.meta_clusters import DUMP, KIND, Cluster, Page
from dncbm.explain.plotting.canvas import COLUMN, MARGIN, Bars, Canvas, bar_rows, grid
from dncbm.explain.plotting.colours import FAINT, RULE
from dncbm.explain.plotting.fonts import LINE, TEXT, wrapped
from dncbm.explain.plotting.pages import plot_stage
from dncbm.runs import commands

GRID, ROW, HEAD, BETWEEN = 1.26, 0.19, 0.4, 0.08
LEFT = MARGIN + GRID + 0.08


def draw(page: Page, *, use_latex: bool = False) -> Canvas:
    """One column wide: the clusters below each other, each with three by three images beside its concepts."""
    blocks = [(cluster, _about(cluster), _bars(cluster)) for cluster in page.clusters]
    heights = []
    for cluster, about, bars in blocks:
        head = HEAD + (len(about) - 1) * TEXT * LINE
        heights.append(head + max(grid(len(cluster.images), GRID)[2], bars.height) + BETWEEN)
    canvas = Canvas(COLUMN, sum(heights) + MARGIN, use_latex=use_latex)
    top = 0.0
    for (cluster, about, bars), height in zip(blocks, heights, strict=True):
        if top:
            canvas.line(MARGIN, top + 0.02, COLUMN - MARGIN, top + 0.02, RULE)
        canvas.text(MARGIN, top + 0.14, f"cluster {cluster.number}", size=8, bold=True)
        canvas.text(COLUMN - MARGIN, top + 0.14, "mean-centred strength", colour=FAINT, align="right")
        canvas.texts(MARGIN, top + 0.29, about, colour=FAINT)
        body = top + HEAD + (len(about) - 1) * TEXT * LINE
        across, side, _ = grid(len(cluster.images), GRID)
        canvas.images(cluster.images, MARGIN, body, side, across)
        canvas.bars(LEFT, body, bars)
        top += height
    return canvas


def _about(cluster: Cluster) -> list[str]:
    about = f"{counted(cluster.size, 'images')}, {cluster.class_share:.0%} of them {cluster.class_name}"
    return wrapped(about, COLUMN - 2 * MARGIN)


def _bars(cluster: Cluster) -> Bars:
    return Bars(bar_rows(cluster.concepts), COLUMN - MARGIN - LEFT, ROW)


PLOT = plot_stage(KIND, DUMP, draw, commands.META_CLUSTERS.plot_summary)
