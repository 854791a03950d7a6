"""Task agnosticity: one latent's images in several data sets, which the SAE was not trained for."""

from dncbm.dumps.task_agnosticity import N_SHOWN, Page
from dncbm.plotting.canvas import COLUMN, FAINT, TEXT, Canvas, fitted, fitted_label, text_width

MARGIN, GAP, BETWEEN, HEAD, TITLE = 0.06, 0.03, 0.1, 0.2, 0.2
WIDE = 4.8
"""Inches for several data sets, the width of a page of text; a single one fits a column."""


def draw(page: Page, *, use_latex: bool = False) -> Canvas:
    """A row for each latent, a column for each data set, in each cell the latent's top images."""
    n = len(page.datasets)
    width = COLUMN if n == 1 else WIDE
    across = N_SHOWN if n < 3 else N_SHOWN // 2  # images of a cell: in a row, or in two
    cell = (width - 2 * MARGIN - (n - 1) * BETWEEN) / n
    side = (cell - (across - 1) * GAP) / across
    cell_height = N_SHOWN // across * (side + GAP) - GAP
    block = TITLE + cell_height + 0.06
    canvas = Canvas(width, HEAD + block * len(page.latents) + MARGIN, use_latex=use_latex)
    for column, dataset in enumerate(page.datasets):
        x = MARGIN + column * (cell + BETWEEN)
        canvas.text(x + cell / 2, HEAD / 2, fitted(f"{dataset} ({page.split})", cell)[0], align="center", colour=FAINT)
    for row, latent in enumerate(page.latents):
        top = HEAD + row * block
        canvas.line(MARGIN, top, width - MARGIN, top, "#d0d0d0")
        about = f"latent {latent.index}, similarity {latent.similarity:.2f}"
        canvas.text(width - MARGIN, top + TITLE / 2 + 0.01, about, align="right", colour=FAINT)
        room = width - 2 * MARGIN - text_width(about, TEXT) - 0.1
        canvas.text(MARGIN, top + TITLE / 2 + 0.01, fitted_label(latent.label, room, 8, bold=True), size=8, bold=True)
        for column, images in enumerate(latent.images):
            x = MARGIN + column * (cell + BETWEEN)
            for place, image in enumerate(images):
                left, upper = place % across * (side + GAP), place // across * (side + GAP)
                canvas.image(image, x + left, top + TITLE + upper, side)
            if not images:
                canvas.text(x + cell / 2, top + TITLE + cell_height / 2, "no image", align="center", colour=FAINT)
    return canvas
