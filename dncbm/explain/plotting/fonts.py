"""The fonts of a page, and text of known width in them.

Pages are set in FONT. A character of a name that FONT lacks (Chinese, emoji) comes from the first installed font that has it.
"""

import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from numpy.typing import NDArray

TEXT = 7.0
"""Points of ordinary text."""
LINE = 1.25 / 72
"""Inches from one line of text to the next, per point of its size."""
FONT = "DejaVu Sans"
"""Comes with matplotlib, so pages are the same on every machine."""
MOST_LINES = 20
"""Of a name. A longer one is cut."""
LONGEST = 2000
"""Characters of a name that are measured."""
_FINE = 1200
"""Dots per inch at which text is measured: at few, glyphs are rounded to whole ones."""
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """A text in one line, with a replacement character for each that neither files nor fonts can hold.

    Names that are not UTF-8 hold lone surrogates.
    """
    return _UNPRINTABLE.sub("\ufffd", " ".join(text.split()))


# ------------------------------------------------------------------------------------------------------------- fonts


@contextmanager
def quiet() -> Iterator[None]:
    """Without matplotlib's warning for every missing glyph and weight: `missing` says it once for all pages."""
    log = logging.getLogger("matplotlib.font_manager")
    before = log.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(before)


def families(text: str, *, bold: bool = False) -> tuple[str, ...]:
    """The fonts that a text needs, FONT first."""
    others = (_family_with(character, bold) for character in _lacking(text, bold))
    return (FONT, *dict.fromkeys(family for family in others if family is not None))


def missing(texts: Iterable[str]) -> str:
    """The characters of some texts, in order, that no installed font has."""
    characters = "".join({character for text in texts for character in printable(text)})
    return "".join(character for character in _lacking(characters, False) if _family_with(character, False) is None)


def _lacking(text: str, bold: bool) -> list[str]:
    """The characters of a text that FONT lacks."""
    if text.isascii():
        return []
    font = font_manager.get_font(_path(FONT, bold))
    return sorted({character for character in text if not font.get_char_index(ord(character))})


@cache
def _family_with(character: str, bold: bool) -> str | None:
    for family in _families():
        if (_characters(_path(family, bold)) == ord(character)).any():
            return family
    return None


@cache
def _families() -> tuple[str, ...]:
    """Other fonts, TrueType ones first, since every viewer of PDFs knows them; "Last Resort" has only placeholders."""
    fonts = sorted((not entry.fname.endswith(".ttf"), entry.name) for entry in font_manager.fontManager.ttflist)
    return tuple(dict.fromkeys(name for _, name in fonts if name != FONT and not name.startswith("Last Resort")))


@cache
def _path(family: str, bold: bool) -> str:
    with quiet():
        return str(font_manager.findfont(font_manager.FontProperties(family=family, weight="bold" if bold else "normal")))


@cache
def _characters(path: str) -> NDArray[np.int64]:
    """The characters of a font; none if matplotlib cannot draw with it."""
    try:
        font = FT2Font(path)
        return np.array(list(font.get_charmap()) if font.scalable else [], dtype=np.int64)
    except (OSError, RuntimeError, ValueError):
        return np.empty(0, dtype=np.int64)


# --------------------------------------------------------------------------------------------------- text that fits


@cache
def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Width of a line of text in inches."""
    with quiet():
        font: Any = font_manager.get_font([_path(family, bold) for family in families(text, bold=bold)])
        font.set_size(size, _FINE)
        font.set_text(text, 0)
    return float(font.get_width_height()[0]) / 64 / _FINE


def wrapped(text: str, width: float, size: float = TEXT, *, lines: int = MOST_LINES, bold: bool = False) -> list[str]:
    """A text in at most `lines` lines, none wider than `width` inches.

    Lines break between words; a word wider than a line is broken. An ellipsis replaces what does not fit, but not the index at
    the end of a label (`dog #12`), which tells apart latents of one name.
    """
    text = printable(text)
    if len(text) > LONGEST:
        name, index = _name_and_index(text)
        text = f"{name[:LONGEST]}…{index}"

    def fits(line: str) -> bool:
        return text_width(line, size, bold=bold) <= width

    broken: list[str] = []
    while text:
        if len(broken) == lines:
            broken[-1] = _shortened(f"{broken[-1]} {text}", fits)
            break
        end = _fitting(text, fits)
        if end < len(text) and (space := text.rfind(" ", 0, end + 1)) > 0:
            end = space
        broken.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return broken or [""]


def _fitting(text: str, fits: Callable[[str], bool]) -> int:
    """The number of characters that fit, at least one."""
    low, high = 1, len(text) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(text[:middle]) else (low, middle)
    while low > 1 and not fits(text[:low]):  # kerning: a longer text can be narrower
        low -= 1
    return low


def _shortened(text: str, fits: Callable[[str], bool]) -> str:
    name, index = _name_and_index(text)
    end = _fitting(name, lambda part: fits(f"{part}…{index}")) if name else 0
    return f"{name[:end].rstrip()}…{index}"


def _name_and_index(text: str) -> tuple[str, str]:
    found = re.search(r" #\d{1,9}$", text)
    return (text[: found.start()], found[0]) if found else (text, "")
