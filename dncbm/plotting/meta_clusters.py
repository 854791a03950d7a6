"""Meta clusters: groups of images with similar concepts, and the concepts that set each apart."""

from dncbm.dumps.meta_clusters import PER_FIGURE, Page
from dncbm.plotting.canvas import COLUMN, FAINT, Canvas, bar_rows, fitted, sign_colour, text_width

MARGIN, GRID, GAP, ROW, HEAD = 0.06, 1.26, 0.03, 0.19, 0.26
BLOCK = HEAD + GRID + 0.1


def draw(page: Page, *, use_latex: bool = False) -> Canvas:
    """A column wide; under each other, each cluster's three by three images beside its concepts."""
    canvas = Canvas(COLUMN, BLOCK * min(PER_FIGURE, len(page.clusters)) + MARGIN, use_latex=use_latex)
    side = (GRID - 2 * GAP) / 3
    left = MARGIN + GRID + 0.08
    for place, cluster in enumerate(page.clusters):
        top = place * BLOCK
        title = f"cluster {cluster.number}"
        canvas.text(MARGIN, top + 0.15, title, size=8, bold=True)
        x = MARGIN + text_width(title, 8, bold=True) + 0.1
        about = f"{cluster.size} images, {cluster.class_share:.0%} {cluster.class_name}"
        canvas.text(x, top + 0.15, fitted(about, COLUMN - MARGIN - x)[0], colour=FAINT)
        for number, image in enumerate(cluster.images):
            canvas.image(image, MARGIN + number % 3 * (side + GAP), top + HEAD + number // 3 * (side + GAP), side)
        rows = [(label, value, sign_colour(value)) for label, value in cluster.concepts]
        bar_rows(canvas, left, top + HEAD, COLUMN - MARGIN - left, rows, label_width=0.95, row_height=ROW)
        if place:
            canvas.line(MARGIN, top + 0.02, COLUMN - MARGIN, top + 0.02, "#d0d0d0")
    return canvas
