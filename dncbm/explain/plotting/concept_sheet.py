"""A sheet of concepts: each latent's name above the images that activate it most."""

import textwrap
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from sparse_autoencoder.files import whole_file


def concept_sheet(titles: list[str], images: list[list[Image.Image]], path: Path, columns: int = 4) -> None:
    """Draw one tile per concept.

    Args:
        titles: one line per concept.
        images: each concept's images, the strongest first.
        path: where to save the PNG.
        columns: tiles per row.
    """
    rows, per_tile = -(-len(titles) // columns), max(len(members) for members in images)
    figure = Figure(figsize=(columns * 2.6, rows * (2.6 / per_tile + 0.42)), layout="constrained")
    tiles = figure.subfigures(rows, columns, squeeze=False, wspace=0.06).flat
    for tile, title, members in zip(tiles, titles, images, strict=False):
        tile.suptitle(textwrap.shorten(title, 34, placeholder="…"), fontsize=9)
        axes = tile.subplots(1, per_tile, squeeze=False)[0]
        for ax in axes:
            ax.axis("off")
        for ax, image in zip(axes, members, strict=False):
            ax.imshow(image)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
