"""A page measured in inches: text of known width, images, bars. Everything has a fixed place, so nothing overlaps."""

import io
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from dncbm.explain.plotting.colours import FAINT, INK, ON_BADGE, REST, RULE, sign_colour
from dncbm.explain.plotting.fonts import LINE, TEXT, families, printable, quiet, text_width, wrapped
from dncbm.features.datasets import BadImage, open_image, read_file
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
LEAST_BARS = 0.45
"""Inches that labels leave to the bars."""
LEAST_BAR = 0.02
"""Inches of a bar whose value is not 0, however small that is."""


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
        text = shown = printable(text)
        if self.use_latex:
            shown = rf"\textbf{{{latex_escaped(text)}}}" if bold else latex_escaped(text)
        style: dict[str, Any] = {"size": size, "color": colour, "weight": "bold" if bold else "normal"}
        style["family"] = list(families(text, bold=bold))
        style |= {"ha": align, "va": "center_baseline", "usetex": self.use_latex, "parse_math": False}
        self.axes.text(x, y, shown, **style)

    def texts(self, x: float, y: float, lines: Sequence[str], *, size: float = TEXT, **style: Any) -> None:
        """Lines of text below each other, the middle of the first at height y."""
        for number, line in enumerate(lines):
            self.text(x, y + number * size * LINE, line, size=size, **style)

    def rectangle(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """A filled rectangle; a negative width extends to the left."""
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, linewidth=0))

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: str = REST, width: float = 0.5) -> None:
        self.axes.plot([x0, x1], [y0, y1], color=colour, linewidth=width, solid_capstyle="butt")

    def image(self, image: Path | Image.Image | None, x: float, y: float, side: float) -> None:
        """A square image, with no more pixels than are printed; an empty square if there is none.

        Raises UserError if its file cannot be read.
        """
        if image is None:
            self.rectangle(x, y, side, side, RULE)
            return
        pixels = round(side * DPI)
        try:
            small = open_image(read_file(image) if isinstance(image, Path) else image).convert("RGB")
        except (OSError, ValueError, SyntaxError, BadImage) as error:
            raise UserError(
                f"cannot read {image}: remove it, and run the _dump.py of this figure again with the same flags"
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

    def bars(self, x: float, y: float, bars: "Bars") -> None:
        """Labels, bars from a common zero and values, from the upper left corner (x, y) down."""
        zero, top = x + bars.zero, y
        for (_, value, colour), lines, height in zip(bars.rows, bars.lines, bars.heights, strict=True):
            middle = y + height / 2
            self.texts(x + bars.label_width, middle - (len(lines) - 1) / 2 * TEXT * LINE, lines, align="right")
            thick = bars.row_height * 0.68
            self.rectangle(zero, middle - thick / 2, bars.length(value), thick, colour)
            self.text(x + bars.width, middle, signed(value, bars.digits), align="right")
            y += height
        if bars.rows:
            self.line(zero, top, zero, y, INK, 0.6)
        else:
            self.text(x + bars.width, y + bars.row_height / 2, "no concept", align="right", colour=FAINT)
            y += bars.row_height
        if bars.total is not None:
            self.line(x, y + 0.015, x + bars.width, y + 0.015)
            middle = y + 0.03 + bars.row_height / 2
            self.text(x + bars.label_width, middle, bars.total[0], align="right", bold=True)
            self.text(x + bars.width, middle, signed(bars.total[1], bars.digits), align="right", bold=True)

    def save(self, pdf: Path, png: Path, description: str) -> None:
        """Write the PDF, then the PNG with a `Description`, by which the page is recognised later."""
        with matplotlib.rc_context({"pdf.fonttype": 42, "text.usetex": self.use_latex}), quiet():
            # Interpolation makes the edges of images half transparent, which PDF viewers show as hairlines.
            self._interpolate("none")
            with whole_file(pdf) as temporary:
                self.figure.savefig(temporary, format="pdf", dpi=DPI, metadata={"CreationDate": None})
            self._interpolate("antialiased")
            with whole_file(png) as temporary:
                metadata: dict[str, Any] = {"Description": description, "Software": None}
                self.figure.savefig(temporary, format="png", dpi=DPI, metadata=metadata)

    def png(self) -> bytes:
        """The page as a PNG, for a notebook."""
        self._interpolate("antialiased")
        buffer = io.BytesIO()
        with quiet():
            self.figure.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()

    def _interpolate(self, how: str) -> None:
        for image in self.axes.images:
            image.set_interpolation(how)


@dataclass(frozen=True)
class Bars:
    """How rows of a label, a bar and its value share a width. All lengths are in inches from the upper left corner."""

    rows: Sequence[tuple[str, float, str]]
    """Label, value and colour of each."""
    width: float
    row_height: float
    """Of a row whose label takes one line."""
    total: tuple[str, float] | None = None
    """Label and value of a last row without a bar, below a line."""

    @cached_property
    def digits(self) -> int:
        """Decimal places of the values."""
        return decimals([*(value for _, value, _ in self.rows), self.total[1] if self.total else 0.0])

    @cached_property
    def _value_width(self) -> float:
        shown = [(signed(value, self.digits), False) for _, value, _ in self.rows]
        shown += [(signed(self.total[1], self.digits), True)] if self.total else []
        return max([0.34, *(text_width(text, TEXT, bold=bold) for text, bold in shown)]) + 0.04

    @cached_property
    def label_width(self) -> float:
        """The widest label, unless the bars would be too short."""
        labels = [text_width(printable(label[:200]), TEXT) for label, _, _ in self.rows]
        labels += [text_width(self.total[0], TEXT, bold=True)] if self.total else []
        return min(max([0.3, *labels]) + 0.01, max(0.5, self.width - self._value_width - 0.12 - LEAST_BARS))

    @cached_property
    def lines(self) -> list[list[str]]:
        """The lines of each label."""
        return [wrapped(label, self.label_width) for label, _, _ in self.rows]

    @cached_property
    def heights(self) -> list[float]:
        """The height of each row."""
        return [self.row_height + (len(lines) - 1) * TEXT * LINE + (0.03 if len(lines) > 1 else 0) for lines in self.lines]

    @property
    def height(self) -> float:
        """Of everything."""
        return (sum(self.heights) or self.row_height) + (self.row_height + 0.03 if self.total else 0)

    @property
    def zero(self) -> float:
        """Where all bars begin."""
        return self.label_width + 0.06 + LEAST_BAR + self._scaled(max([0.0, *(-value for _, value, _ in self.rows)]))

    def length(self, value: float) -> float:
        """The length of a bar, negative to the left."""
        scaled = self._scaled(value)
        return scaled if not value or abs(scaled) >= LEAST_BAR else float(np.copysign(LEAST_BAR, value))

    def _scaled(self, value: float) -> float:
        values = [0.0, *(value for _, value, _ in self.rows)]
        room = self.width - self.label_width - self._value_width - 0.12 - 2 * LEAST_BAR
        return room * (value / ((max(values) - min(values)) or 1))


def grid(n: int, width: float) -> tuple[int, float, float]:
    """How n images fill a width, as large as nine are at least: the number in a row, their side, the height of all."""
    across = 1 if n < 2 else 2 if n < 5 else 3
    side = (width - (across - 1) * GAP) / across
    return across, side, max(0.0, -(-n // across) * (side + GAP) - GAP)


def bar_rows(
    concepts: Iterable[tuple[str, float]], n_remaining: int = 0, remaining: float = 0.0
) -> list[tuple[str, float, str]]:
    """The rows of some concepts, and of the sum of the others if there are any."""
    rows = [(label, value, sign_colour(value)) for label, value in concepts]
    return [*rows, (others(n_remaining), remaining, REST)] if n_remaining else rows


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
    """`+1.23` or `−0.40`, with a minus sign as wide as the plus sign; `+3e−05` for what would be rounded to 0 or is huge."""
    tiny = value != 0 and abs(value) < 0.5 * 10**-digits
    text = f"{value:+.0e}" if tiny else f"{value:+.2e}" if abs(value) >= 1e6 else f"{value:+.{digits}f}"
    return text.replace("-", "−")


def others(n: int) -> str:
    """The label of the bar for all remaining concepts."""
    return f"{n} other{'' if n == 1 else 's'}"
