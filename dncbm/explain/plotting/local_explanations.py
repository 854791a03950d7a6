"""Local explanations: an image, its prediction, and the concepts that the prediction is made of."""

from dncbm.explain.dumps.local_explanations import DUMP, KIND, Page
from dncbm.explain.plotting.canvas import COLUMN, MARGIN, Canvas, fitted, others, signed
from dncbm.explain.plotting.colours import FAINT, REST, RIGHT, WRONG, sign_colour
from dncbm.explain.plotting.pages import plot_stage

IMAGE, ROW, HEAD = 1.2, 0.165, 0.36


def draw(page: Page, *, use_latex: bool = False) -> Canvas:
    """One column wide: predicted and true class at the top, then the image beside bars that sum to the logit."""
    rows = [(label, value, sign_colour(value)) for label, value in page.concepts]
    if page.n_remaining:
        rows.append((others(page.n_remaining), page.remaining, REST))
    height = HEAD + 2 * MARGIN + max(IMAGE, (len(rows) + 1) * ROW + 0.03)
    canvas = Canvas(COLUMN, height, use_latex=use_latex)

    badge = canvas.badge(COLUMN - MARGIN, 0.12, *(("right", RIGHT) if page.right else ("wrong", WRONG)))
    true_logit = "" if page.right else f"logit {signed(page.true_logit, 2)}"
    for y, what, name, more, right in (
        (0.12, "predicted", page.predicted, f"{page.probability:.0%}", badge - 0.08),
        (0.28, "true", page.true, true_logit, COLUMN - MARGIN),
    ):
        canvas.text(MARGIN, y, what, colour=FAINT)
        canvas.text(right, y, more, colour=FAINT, align="right")
        room = right - MARGIN - 0.58 - (0.1 + 0.065 * len(more) if more else 0)
        canvas.text(MARGIN + 0.56, y, fitted(name, room, 8, bold=True)[0], size=8, bold=True)

    top = HEAD + MARGIN
    canvas.image(page.image, MARGIN, top, IMAGE)
    left = MARGIN + IMAGE + 0.08
    total = ("logit", page.logit)
    canvas.bars(left, top, COLUMN - MARGIN - left, rows, label_width=0.88, row_height=ROW, total=total)
    return canvas


PLOT = plot_stage(KIND, DUMP, draw, "Draw images with the concepts that their predictions are made of.")
