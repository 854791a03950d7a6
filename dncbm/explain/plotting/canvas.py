"""A page measured in inches: text of known width, images, bars. Everything has a fixed place, so nothing overlaps."""

import shutil
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from dncbm.explain.plotting.colours import INK, ON_BADGE, REST
from dncbm.runs.errors import UserError
from sparse_autoencoder.files import whole_file

COLUMN = 3.35
"""Width of a column of a paper in inches."""
MARGIN = 0.06
"""Inches between the edge of a page and what is drawn on it."""
GAP = 0.03
"""Inches between neighbouring images."""
DPI = 200
"""Pixels per inch, in the PNG and in the images of the PDF."""
TEXT = 7.0
"""Points of ordinary text."""
LINE = 1.25 / 72
"""Inches from one line of text to the next, per point of its size."""
FONT = "DejaVu Sans"
"""Comes with matplotlib, so pages are the same on every machine."""


class Canvas:
    """A page to draw on. Lengths are in inches from the upper left corner, text sizes in points."""

    def __init__(self, width: float, height: float, *, use_latex: bool = False) -> None:
        self.use_latex = use_latex
        self.figure = Figure(figsize=(width, height))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.axes.set_autoscale_on(False)
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(height, 0)

    def text(
        self, x: float, y: float, text: str, *, size: float = TEXT, align: str = "left", colour: str = INK,
        bold: bool = False,
    ) -> None:  # fmt: skip
        """One line of text, its middle at height y."""
        shown = text
        if self.use_latex:
            shown = rf"\textbf{{{latex_escaped(text)}}}" if bold else latex_escaped(text)
        style: dict[str, Any] = {"size": size, "color": colour, "family": FONT, "weight": "bold" if bold else "normal"}
        style |= {"ha": align, "va": "center_baseline", "usetex": self.use_latex, "parse_math": False}
        self.axes.text(x, y, shown, **style)

    def rectangle(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """A filled rectangle; a negative width extends to the left."""
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, linewidth=0))

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: str = REST, width: float = 0.5) -> None:
        self.axes.plot([x0, x1], [y0, y1], color=colour, linewidth=width, solid_capstyle="butt")

    def image(self, path: Path, x: float, y: float, side: float) -> None:
        """A square image, with no more pixels than are printed. Raises UserError if it cannot be read."""
        pixels = round(side * DPI)
        try:
            with Image.open(path) as image:
                small = image.convert("RGB")
        except OSError as error:
            raise UserError(
                f"cannot read {path}: remove it, and run the _dump.py of this figure again with the same flags"
            ) from error
        if small.width > pixels:
            small = small.resize((pixels, pixels), Image.Resampling.LANCZOS)
        self.axes.imshow(np.asarray(small), extent=(x, x + side, y + side, y), aspect="auto")

    def images(self, paths: Sequence[Path], x: float, y: float, side: float, across: int) -> None:
        """Square images in rows of `across`, GAP apart."""
        for place, path in enumerate(paths):
            self.image(path, x + place % across * (side + GAP), y + place // across * (side + GAP), side)

    def badge(self, x: float, y: float, text: str, colour: str, *, size: float = 6.5) -> float:
        """Text on a coloured box, its middle at height y and its right end at x. Returns the x of its left end."""
        width = text_width(text, size, bold=True) + 0.1
        height = size * 1.5 / 72
        self.rectangle(x - width, y - height / 2, width, height, colour)
        self.text(x - width / 2, y, text, size=size, align="center", colour=ON_BADGE, bold=True)
        return x - width

    def bars(
        self, x: float, y: float, width: float, rows: Sequence[tuple[str, float, str]], *, label_width: float,
        row_height: float, total: tuple[str, float] | None = None,
    ) -> None:  # fmt: skip
        """Rows of a label, a bar from a common zero, and its value, from the upper left corner (x, y) down.

        `rows` has label, value and colour of each; labels wider than `label_width` are shortened. `total` is label and value
        of a last row without a bar, below a line.
        """
        value_width = 0.38
        values = [0.0, *(value for _, value, _ in rows)]
        low, high = min(values), max(values)
        digits = decimals([*values, total[1] if total else 0.0])
        room = width - label_width - value_width - 0.12
        scale = room / ((high - low) or 1)
        zero = x + label_width + 0.06 - low * scale
        for label, value, colour in rows:
            middle = y + row_height / 2
            self.text(x + label_width, middle, fitted_label(label, label_width), align="right")
            self.rectangle(zero, y + row_height * 0.16, value * scale, row_height * 0.68, colour)
            self.text(x + width, middle, signed(value, digits), align="right")
            y += row_height
        self.line(zero, y - row_height * len(rows), zero, y, INK, 0.6)
        if total is not None:
            self.line(x, y + 0.015, x + width, y + 0.015)
            middle = y + 0.03 + row_height / 2
            self.text(x + label_width, middle, total[0], align="right", bold=True)
            self.text(x + width, middle, signed(total[1], digits), align="right", bold=True)

    def save(self, pdf: Path, png: Path, description: str) -> None:
        """Write the PDF, then the PNG with a `Description`, by which the page is recognised later."""
        with matplotlib.rc_context({"pdf.fonttype": 42, "text.usetex": self.use_latex}):
            # Interpolation makes the edges of images half transparent, which PDF viewers show as hairlines.
            self._interpolate("none")
            with whole_file(pdf) as temporary:
                self.figure.savefig(temporary, format="pdf", dpi=DPI, metadata={"CreationDate": None})
            self._interpolate("antialiased")
            with whole_file(png) as temporary:
                metadata: dict[str, Any] = {"Description": description, "Software": None}
                self.figure.savefig(temporary, format="png", dpi=DPI, metadata=metadata)

    def _interpolate(self, how: str) -> None:
        for image in self.axes.images:
            image.set_interpolation(how)


# --------------------------------------------------------------------------------------------------- text that fits


@cache
def _font(bold: bool) -> Any:
    found = font_manager.findfont(font_manager.FontProperties(family=FONT, weight="bold" if bold else "normal"))
    return font_manager.get_font(found)


@cache
def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Width of a line of text in inches."""
    font = _font(bold)
    font.set_size(size, 72)
    font.set_text(text, 0)
    return float(font.get_width_height()[0]) / 64 / 72


def fitted(text: str, width: float, size: float = TEXT, *, lines: int = 1, bold: bool = False) -> list[str]:
    """A text in at most `lines` lines, none wider than `width` inches; an ellipsis replaces what does not fit.

    Lines break between words; a word wider than a line is cut.
    """
    text = " ".join(text.split())

    def fits(line: str) -> bool:
        return text_width(line, size, bold=bold) <= width

    broken: list[str] = []
    while text and len(broken) < lines:
        end = len(text)
        while end > 1 and not fits(text[:end]):
            end -= 1
        if end < len(text):
            space = text.rfind(" ", 0, end + 1)
            end = space if space > 0 else end
        broken.append(text[:end].rstrip())
        text = text[end:].lstrip()
    if text:
        last = broken[-1] + (" " if not broken[-1].endswith("-") else "") + text
        while last and not fits(last + "…"):
            last = last[:-1]
        broken[-1] = last.rstrip() + "…"
    return broken or [""]


def fitted_label(label: str, width: float, size: float = TEXT, *, bold: bool = False) -> str:
    """A latent's label in one line. Shortening keeps the index, which tells apart latents of the same name."""
    name, mark, index = label.rpartition(" #")
    if not mark or text_width(label, size, bold=bold) <= width:
        return fitted(label, width, size, bold=bold)[0]
    room = width - text_width(mark + index, size, bold=bold)
    return fitted(name, room, size, bold=bold)[0] + mark + index


def latex_escaped(text: str) -> str:
    """A text in which LaTeX prints every character literally."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "…": r"\dots{}"}
    special |= {character: "\\" + character for character in "&%$#_{}"} | {"−": "$-$"}
    special |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''"}
    return "".join(special.get(character, character) for character in text)


def need_latex() -> None:
    """Raises UserError if the programs that --use_latex needs are not installed."""
    missing = [program for program in ("latex", "dvipng") if shutil.which(program) is None]
    if missing:
        raise UserError(f"--use_latex needs {' and '.join(missing)}: install LaTeX or leave out the flag")


def decimals(values: Iterable[float]) -> int:
    """Decimal places for the numbers of a figure: 1 to 4, so that the largest number has about three digits."""
    largest = max((abs(value) for value in values), default=0.0)
    return min(4, max(1, 2 - int(np.floor(np.log10(largest))))) if largest else 2


def signed(value: float, digits: int) -> str:
    """`+1.23` or `−0.40`, with a minus sign as wide as the plus sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


def others(n: int) -> str:
    """The label of the bar for all remaining concepts."""
    return f"{n} other{'' if n == 1 else 's'}"
