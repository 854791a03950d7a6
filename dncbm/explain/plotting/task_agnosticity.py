"""Task agnosticity: a latent's images in several data sets, on which the SAE was not trained."""

from dncbm.explain.dumps.task_agnosticity import DUMP, KIND, N_SHOWN, Page
from dncbm.explain.plotting.canvas import COLUMN, GAP, MARGIN, Canvas
from dncbm.explain.plotting.colours import FAINT, RULE
from dncbm.explain.plotting.fonts import LINE, TEXT, text_width, wrapped
from dncbm.explain.plotting.pages import plot_stage
from dncbm.runs import commands

BETWEEN, HEAD, TITLE, BELOW, NONE = 0.1, 0.2, 0.2, 0.06, 0.2
SIZE = 8
"""Points of the names of latents."""
WIDE = 4.8
"""Inches for several data sets, as wide as a page of text; a single one fits a column."""


def draw(page: Page, *, use_latex: bool = False) -> Canvas:
    """A row per latent and a column per data set; each cell shows the latent's top images."""
    n = len(page.datasets)
    width = COLUMN if n == 1 else WIDE
    across = N_SHOWN if n < 3 else N_SHOWN // 2  # a cell's images are in one row, or in two
    cell = (width - 2 * MARGIN - (n - 1) * BETWEEN) / n
    side = (cell - (across - 1) * GAP) / across
    datasets = [wrapped(f"{dataset} ({page.split})", cell) for dataset in page.datasets]
    head = HEAD + (max(map(len, datasets)) - 1) * TEXT * LINE
    blocks = []
    for latent in page.latents:
        about = f"latent {latent.index}, similarity {latent.similarity:.2f}"
        label = wrapped(latent.label, width - 2 * MARGIN - text_width(about, TEXT) - 0.1, SIZE, bold=True)
        most = max(map(len, latent.images))
        cell_height = -(-most // across) * (side + GAP) - GAP if most else NONE
        blocks.append((latent, about, label, TITLE + (len(label) - 1) * SIZE * LINE, cell_height))
    height = head + sum(title + cell_height + BELOW for *_, title, cell_height in blocks) + MARGIN
    canvas = Canvas(width, height, use_latex=use_latex)

    columns = [MARGIN + column * (cell + BETWEEN) for column in range(n)]
    for x, lines in zip(columns, datasets, strict=True):
        canvas.texts(x + cell / 2, HEAD / 2, lines, align="center", colour=FAINT)
    top = head
    for latent, about, label, title, cell_height in blocks:
        canvas.line(MARGIN, top, width - MARGIN, top, RULE)
        canvas.text(width - MARGIN, top + TITLE / 2 + 0.01, about, align="right", colour=FAINT)
        canvas.texts(MARGIN, top + TITLE / 2 + 0.01, label, size=SIZE, bold=True)
        for x, images in zip(columns, latent.images, strict=True):
            canvas.images(images, x, top + title, side, across)
            if not images:
                canvas.text(x + cell / 2, top + title + cell_height / 2, "no image", align="center", colour=FAINT)
        top += title + cell_height + BELOW
    return canvas


PLOT = plot_stage(KIND, DUMP, draw, commands.TASK_AGNOSTICITY.plot_summary)
