"""Local explanations: an image, its prediction, and the concepts that the prediction is made of."""

from dncbm.explain.dumps.local_explanations import DUMP, KIND, Page
from dncbm.explain.plotting.canvas import COLUMN, MARGIN, Bars, Canvas, bar_rows, signed
from dncbm.explain.plotting.colours import FAINT, RIGHT, WRONG
from dncbm.explain.plotting.fonts import LINE, TEXT, text_width, wrapped
from dncbm.explain.plotting.pages import plot_stage
from dncbm.runs import commands

IMAGE, LEAST_IMAGE, ROW, CAPTION = 1.2, 0.7, 0.165, 0.14
NAME, SIZE = MARGIN + 0.56, 8
"""Where class names begin, and their points."""


def draw(page: Page, *, use_latex: bool = False) -> Canvas:
    """One column wide: predicted and true class at the top, then the image beside bars that sum to the logit."""
    rows, total = bar_rows(page.concepts, page.n_remaining, page.remaining), ("logit", page.logit)

    def bars_beside(side: float) -> Bars:
        return Bars(rows, COLUMN - 2 * MARGIN - side - 0.08, ROW, total)

    side = min(IMAGE, max(LEAST_IMAGE, CAPTION + bars_beside(IMAGE).height))  # few concepts leave room for few pixels only
    bars = bars_beside(side)
    verdict, colour = ("right", RIGHT) if page.right else ("wrong", WRONG)
    badge = text_width(verdict, 6.5, bold=True) + 0.18 if page.true is not None else 0.0
    said = [("predicted", page.predicted, f"probability {page.probability:.0%}", COLUMN - MARGIN - badge)]
    if page.true is not None and page.true_logit is not None:
        said.append(("true", page.true, "" if page.right else f"logit {signed(page.true_logit, 2)}", COLUMN - MARGIN))
    classes = []
    for what, name, more, right in said:
        room = right - NAME - (text_width(more, TEXT) + 0.1 if more else 0)
        classes.append((what, wrapped(name, room, SIZE, bold=True), more, right))
    head = 0.04 + sum(0.16 + (len(lines) - 1) * SIZE * LINE for _, lines, _, _ in classes)
    canvas = Canvas(COLUMN, head + max(side, CAPTION + bars.height) + 2 * MARGIN, use_latex=use_latex)

    if page.true is not None:
        canvas.badge(COLUMN - MARGIN, 0.12, verdict, colour)
    y = 0.12
    for what, lines, more, right in classes:
        canvas.text(MARGIN, y, what, colour=FAINT)
        canvas.text(right, y, more, colour=FAINT, align="right")
        canvas.texts(NAME, y, lines, size=SIZE, bold=True)
        y += 0.16 + (len(lines) - 1) * SIZE * LINE

    top, left = head + MARGIN, MARGIN + side + 0.08
    canvas.image(page.image, MARGIN, top, side)
    canvas.text(COLUMN - MARGIN, top + CAPTION / 2, "contribution to the logit", colour=FAINT, align="right")
    canvas.bars(left, top + CAPTION, bars)
    return canvas


PLOT = plot_stage(KIND, DUMP, draw, commands.LOCAL_EXPLANATIONS.plot_summary)
