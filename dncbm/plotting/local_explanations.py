"""Local explanations: an image, its prediction, and the concepts that the prediction is made of."""

from dncbm.dumps.local_explanations import Page
from dncbm.plotting.canvas import COLUMN, FAINT, REST, RIGHT, WRONG, Canvas, bar_rows, fitted, sign_colour, signed

MARGIN, IMAGE, ROW, HEAD = 0.06, 1.2, 0.165, 0.36


def draw(page: Page, *, use_latex: bool = False) -> Canvas:
    """A column wide: predicted and true class above; the image; bars that sum to the logit."""
    rows = [(label, value, sign_colour(value)) for label, value in page.concepts]
    if page.n_remaining:
        rows.append((others(page.n_remaining), page.remaining, REST))
    height = HEAD + 2 * MARGIN + max(IMAGE, (len(rows) + 1) * ROW + 0.03)
    canvas = Canvas(COLUMN, height, use_latex=use_latex)

    badge = canvas.badge(COLUMN - MARGIN, 0.12, *(("right", RIGHT) if page.right else ("wrong", WRONG)))
    share = f"{page.probability:.0%}"
    for y, what, name, more in (
        (0.12, "predicted", page.predicted, share),
        (0.28, "true", page.true, "" if page.right else f"logit {signed(page.true_logit, 2)}"),
    ):
        right = badge - 0.08 if what == "predicted" else COLUMN - MARGIN
        canvas.text(MARGIN, y, what, colour=FAINT)
        canvas.text(right, y, more, colour=FAINT, align="right")
        room = right - MARGIN - 0.58 - (0.1 + 0.065 * len(more) if more else 0)
        canvas.text(MARGIN + 0.56, y, fitted(name, room, 8, bold=True)[0], size=8, bold=True)

    top = HEAD + MARGIN
    canvas.image(page.image, MARGIN, top, IMAGE)
    left = MARGIN + IMAGE + 0.08
    width = COLUMN - MARGIN - left
    bar_rows(canvas, left, top, width, rows, label_width=0.88, row_height=ROW, total=("logit", page.logit))
    return canvas


def others(n: int) -> str:
    """What the bar of the remaining concepts is called."""
    return f"{n} other{'' if n == 1 else 's'}"
