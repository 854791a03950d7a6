"""Global explanations: a class, images of it, and the concepts that lead it."""

from dncbm.explain.dumps.global_explanations import DUMP, KIND, Page, sized
from dncbm.explain.plotting.canvas import COLUMN, MARGIN, Bars, Canvas, bar_rows, grid
from dncbm.explain.plotting.colours import FAINT
from dncbm.explain.plotting.fonts import LINE, wrapped
from dncbm.explain.plotting.pages import plot_stage
from dncbm.runs import commands

GRID, ROW, HEAD = 1.4, 0.14, 0.38
SIZE = 9
"""Points of the class name."""


def draw(page: Page, *, use_latex: bool = False) -> Canvas:
    """One column wide: the class at the top, then at most nine images beside bars that sum to the mean logit."""
    by_contribution = page.rank_by == "contribution"
    title = wrapped(page.class_name, COLUMN - 2 * MARGIN, SIZE, bold=True)
    head = HEAD + (len(title) - 1) * SIZE * LINE
    rows = bar_rows(page.concepts, page.n_remaining if by_contribution else 0, page.remaining)
    total = ("mean logit", page.mean_logit) if by_contribution else None
    left = MARGIN + (GRID + 0.08 if page.images else 0)
    bars = Bars(rows, COLUMN - MARGIN - left, ROW, total)
    across, side, height = grid(len(page.images), GRID)
    canvas = Canvas(COLUMN, head + max(height, bars.height) + 2 * MARGIN, use_latex=use_latex)

    canvas.texts(MARGIN, 0.13, title, size=SIZE, bold=True)
    ranking = "mean contribution" if by_contribution else "mean-centred strength"
    canvas.text(MARGIN, head - 0.07, sized(page), colour=FAINT)
    canvas.text(COLUMN - MARGIN, head - 0.07, ranking, colour=FAINT, align="right")
    canvas.images(page.images, MARGIN, head + MARGIN, side, across)
    canvas.bars(left, head + MARGIN, bars)
    return canvas


PLOT = plot_stage(KIND, DUMP, draw, commands.GLOBAL_EXPLANATIONS.plot_summary, *commands.GLOBAL_EXPLANATIONS.options)
