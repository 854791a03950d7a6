"""A page in inches: text that is measured, images, bars. Everything lies where it is put, so nothing overlaps by chance."""

import shutil
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from dncbm.errors import UserError
from dncbm.manifests import whole_file

# Of Okabe and Ito's palette, which people with colour-blindness tell apart.
POSITIVE, NEGATIVE, RIGHT, WRONG = "#0072B2", "#D55E00", "#009E73", "#D55E00"
REST, INK, FAINT = "#8c8c8c", "#1a1a1a", "#6b6b6b"
COLUMN = 3.35
"""Width of a paper's column in inches."""
DPI = 200
"""Pixels of an inch of the PNG, and of the images in the PDF."""
TEXT = 7.0
"""Points of ordinary text."""
LINE = 1.25 / 72
"""Inches from one line of text to the next, for a point of its size."""
FONT = "DejaVu Sans"
"""Comes with matplotlib, so pages are the same everywhere."""


class Canvas:
    """A page that is drawn on. Lengths are inches from the upper left corner, sizes of text are points."""

    def __init__(self, width: float, height: float, *, use_latex: bool = False) -> None:
        self.use_latex = use_latex
        self.figure = Figure(figsize=(width, height))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.axes.set_autoscale_on(False)
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(height, 0)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = TEXT,
        align: str = "left",
        colour: str = INK,
        bold: bool = False,
    ) -> None:
        """A line whose middle is at height y."""
        shown = text
        if self.use_latex:
            shown = rf"\textbf{{{latex_escaped(text)}}}" if bold else latex_escaped(text)
        self.axes.text(
            x,
            y,
            shown,
            size=size,
            color=colour,
            ha=align,
            va="center_baseline",
            family=FONT,
            weight="bold" if bold else "normal",
            usetex=self.use_latex,
            parse_math=False,
        )

    def rectangle(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """A filled one; a negative width reaches to the left."""
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, linewidth=0))

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: str = REST, width: float = 0.5) -> None:
        self.axes.plot([x0, x1], [y0, y1], color=colour, linewidth=width, solid_capstyle="butt")

    def image(self, path: Path, x: float, y: float, side: float) -> None:
        """A square image, of no more pixels than are printed."""
        pixels = round(side * DPI)
        try:
            with Image.open(path) as image:
                small = image.convert("RGB")
        except OSError as error:
            raise UserError(
                f"cannot read {path}: remove it, and the _dump.py of this figure makes it again with the same flags"
            ) from error
        if small.width > pixels:
            small = small.resize((pixels, pixels), Image.Resampling.LANCZOS)
        self.axes.imshow(np.asarray(small), extent=(x, x + side, y + side, y), aspect="auto")

    def badge(self, x: float, y: float, text: str, colour: str, *, size: float = 6.5) -> float:
        """White text on a colour, its middle at height y and its right end at x. Returns where it begins."""
        width = text_width(text, size, bold=True) + 0.1
        height = size * 1.5 / 72
        self.rectangle(x - width, y - height / 2, width, height, colour)
        self.text(x - width / 2, y, text, size=size, align="center", colour="white", bold=True)
        return x - width

    def save(self, pdf: Path, png: Path, description: str) -> None:
        """As PDF, then as PNG, whose `Description` lets the page be recognised."""
        with matplotlib.rc_context({"pdf.fonttype": 42, "text.usetex": self.use_latex}):
            # Interpolated pixels would be half transparent at the edges, which viewers of PDFs show as hairlines.
            self._interpolate("none")
            with whole_file(pdf) as temporary:
                self.figure.savefig(temporary, format="pdf", dpi=DPI, metadata={"CreationDate": None})
            self._interpolate("antialiased")
            with whole_file(png) as temporary:
                metadata: Mapping[str, Any] = {"Description": description, "Software": None}
                self.figure.savefig(temporary, format="png", dpi=DPI, metadata=dict(metadata))

    def _interpolate(self, how: str) -> None:
        for image in self.axes.images:
            image.set_interpolation(how)


@cache
def _font(bold: bool) -> Any:
    found = font_manager.findfont(font_manager.FontProperties(family=FONT, weight="bold" if bold else "normal"))
    return font_manager.get_font(found)


@cache
def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Width of a line in inches."""
    font = _font(bold)
    font.set_size(size, 72)
    font.set_text(text, 0)
    return float(font.get_width_height()[0]) / 64 / 72


def fitted(text: str, width: float, size: float = TEXT, *, lines: int = 1, bold: bool = False) -> list[str]:
    """A text in at most so many lines, none wider than `width` inches; what does not fit ends with an ellipsis.

    Lines break between words, or in a word that is wider than a line.
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
    """A latent's label in one line; where it is shortened, the index that tells it apart stays."""
    name, mark, index = label.rpartition(" #")
    if not mark or text_width(label, size, bold=bold) <= width:
        return fitted(label, width, size, bold=bold)[0]
    room = width - text_width(mark + index, size, bold=bold)
    return fitted(name, room, size, bold=bold)[0] + mark + index


def latex_escaped(text: str) -> str:
    """A text that LaTeX prints as it is."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "…": r"\dots{}"}
    special |= {character: "\\" + character for character in "&%$#_{}"} | {"−": "$-$"}
    special |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''"}
    return "".join(special.get(character, character) for character in text)


def need_latex() -> None:
    """Raises UserError where there is no LaTeX for --use_latex."""
    missing = [program for program in ("latex", "dvipng") if shutil.which(program) is None]
    if missing:
        raise UserError(
            f"--use_latex needs {' and '.join(missing)}, which cannot be found: install LaTeX or leave it out"
        )


def decimals(values: Iterable[float]) -> int:
    """Digits behind the point for the numbers of a figure, so that the largest has three in all."""
    largest = max((abs(value) for value in values), default=0.0)
    return min(4, max(1, 2 - int(np.floor(np.log10(largest))))) if largest else 2


def signed(value: float, digits: int) -> str:
    """`+1.23`, `−0.40`; a minus as long as the plus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def bar_rows(
    canvas: Canvas,
    x: float,
    y: float,
    width: float,
    rows: list[tuple[str, float, str]],
    *,
    label_width: float,
    row_height: float,
    total: tuple[str, float] | None = None,
) -> None:
    """Rows of a label, a bar from a common zero and its value.

    Args:
        canvas: the page.
        x: their left end.
        y: their upper end.
        width: of the whole.
        rows: label, value and colour.
        label_width: of the longest label.
        row_height: from one row to the next.
        total: label and value of a last row below a line, without a bar.
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
        canvas.text(x + label_width, middle, fitted_label(label, label_width), align="right")
        canvas.rectangle(zero, y + row_height * 0.16, value * scale, row_height * 0.68, colour)
        canvas.text(x + width, middle, signed(value, digits), align="right")
        y += row_height
    canvas.line(zero, y - row_height * len(rows), zero, y, INK, 0.6)
    if total is not None:
        canvas.line(x, y + 0.015, x + width, y + 0.015)
        middle = y + 0.03 + row_height / 2
        canvas.text(x + label_width, middle, total[0], align="right", bold=True)
        canvas.text(x + width, middle, signed(total[1], digits), align="right", bold=True)


def sign_colour(value: float) -> str:
    return POSITIVE if value >= 0 else NEGATIVE
