"""Task agnosticity: a latent's images in several data sets, on which the SAE was not trained."""

from dncbm.explain.dumps.task_agnosticity import DUMP, KIND, N_SHOWN, Page
from dncbm.explain.plotting.canvas import COLUMN, GAP, MARGIN, TEXT, Canvas, fitted, fitted_label, text_width
from dncbm.explain.plotting.colours import FAINT, RULE
from dncbm.explain.plotting.pages import plot_stage

BETWEEN, HEAD, TITLE = 0.1, 0.2, 0.2
WIDE = 4.8
"""Inches for several data sets, as wide as a page of text; a single one fits a column."""


def draw(page: Page, *, use_latex: bool = False) -> Canvas:
    """A row per latent and a column per data set; each cell shows the latent's top images."""
    n = len(page.datasets)
    width = COLUMN if n == 1 else WIDE
    across = N_SHOWN if n < 3 else N_SHOWN // 2  # a cell's images are in one row, or in two
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
        canvas.line(MARGIN, top, width - MARGIN, top, RULE)
        about = f"latent {latent.index}, similarity {latent.similarity:.2f}"
        canvas.text(width - MARGIN, top + TITLE / 2 + 0.01, about, align="right", colour=FAINT)
        room = width - 2 * MARGIN - text_width(about, TEXT) - 0.1
        canvas.text(MARGIN, top + TITLE / 2 + 0.01, fitted_label(latent.label, room, 8, bold=True), size=8, bold=True)
        for column, images in enumerate(latent.images):
            x = MARGIN + column * (cell + BETWEEN)
            canvas.images(images, x, top + TITLE, side, across)
            if not images:
                canvas.text(x + cell / 2, top + TITLE + cell_height / 2, "no image", align="center", colour=FAINT)
    return canvas


PLOT = plot_stage(KIND, DUMP, draw, "Draw latents with their top images of every probe data set.")
