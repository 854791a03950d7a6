"""Global explanations: a class, images of it, and the concepts that lead it."""

from dncbm.explain.dumps.global_explanations import DUMP, KIND, Page
from dncbm.explain.plotting.canvas import COLUMN, GAP, LINE, MARGIN, Canvas, fitted, others
from dncbm.explain.plotting.colours import FAINT, REST, sign_colour
from dncbm.explain.plotting.pages import plot_stage
from dncbm.runs.declarations import Ranking

GRID, ROW, HEAD = 1.4, 0.14, 0.38
SIZE = 9
"""Points of the class name."""


def draw(page: Page, *, use_latex: bool = False) -> Canvas:
    """One column wide: the class at the top, then three by three images beside bars that sum to the mean logit."""
    by_contribution = page.rank_by == "contribution"
    rows = [(label, value, sign_colour(value)) for label, value in page.concepts]
    if by_contribution and page.n_remaining:
        rows.append((others(page.n_remaining), page.remaining, REST))
    title = fitted(page.class_name, COLUMN - 2 * MARGIN, SIZE, lines=2, bold=True)
    head = HEAD + (len(title) - 1) * SIZE * LINE
    body = max(GRID, (len(rows) + 1) * ROW + 0.03)
    canvas = Canvas(COLUMN, head + body + 2 * MARGIN, use_latex=use_latex)

    for number, line in enumerate(title):
        canvas.text(MARGIN, 0.13 + number * SIZE * LINE, line, size=SIZE, bold=True)
    images = f"{page.size} image{'' if page.size == 1 else 's'}"
    ranking = "mean contribution" if by_contribution else "strength above the mean"
    canvas.text(MARGIN, head - 0.07, f"{images}, {page.recall:.0%} predicted right", colour=FAINT)
    canvas.text(COLUMN - MARGIN, head - 0.07, ranking, colour=FAINT, align="right")

    top = head + MARGIN
    canvas.images(page.images, MARGIN, top, (GRID - 2 * GAP) / 3, across=3)
    left = MARGIN + GRID + 0.08
    total = ("mean logit", page.mean_logit) if by_contribution else None
    canvas.bars(left, top, COLUMN - MARGIN - left, rows, label_width=0.82, row_height=ROW, total=total)
    return canvas


PLOT = plot_stage(KIND, DUMP, draw, "Draw classes with the concepts that lead them.", Ranking)
