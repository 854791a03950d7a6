"""A report as data: sections of paragraphs, tables, figures and cards, which `html` and `markdown` render alike."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SUPPORTED, NOT_SUPPORTED, NOT_TESTED = "supported", "not supported", "not tested"
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""Characters that no file or font can hold, and those that turn the direction of whatever follows. Letters that are written
from right to left need none of them."""


@dataclass(frozen=True)
class Code:
    """A command, a path or a value, to be copied."""

    text: str


@dataclass(frozen=True)
class Name:
    """A word from outside (a name, a class, a file), which may be written from right to left."""

    text: str


@dataclass(frozen=True)
class Small:
    """A remark on a line of its own, below what it follows."""

    text: str


@dataclass(frozen=True)
class Link:
    """A link to a section of the same document."""

    text: str
    section: str
    """Its id."""


@dataclass(frozen=True)
class Status:
    """SUPPORTED, NOT_SUPPORTED or NOT_TESTED."""

    text: str


Part = str | Code | Name | Small | Link | Status
Cell = Part | tuple[Part, ...]


@dataclass(frozen=True)
class Paragraph:
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Note:
    """A remark that stands out: something was not run, or must be read with care."""

    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str


@dataclass(frozen=True)
class Table:
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    """The first cell of a row is its header."""
    numbers: bool = True
    """Whether all columns but the first hold numbers, which stand at the right."""
    stacks: bool = False
    """Whether its rows become blocks on a narrow screen, as those of long sentences do. Other tables scroll."""


@dataclass(frozen=True)
class Figure:
    """A chart."""

    name: str
    """Name of its file beside the Markdown, without a suffix."""
    svg: bytes
    alt: str
    """What it shows, in words."""
    caption: str


@dataclass(frozen=True)
class Card:
    """A thing with facts and a picture."""

    title: Name
    facts: tuple[str, ...]
    name: str = ""
    """Name of the picture's file beside the Markdown, without a suffix."""
    jpeg: bytes = b""
    """Empty: there is no picture."""
    alt: str = ""


@dataclass(frozen=True)
class Cards:
    label: str
    """What they are, for those who do not see them; a heading says it to others."""
    cards: tuple[Card, ...]


Block = Paragraph | Note | Heading | Table | Figure | Cards


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    title: str
    lead: tuple[Part, ...]
    """One sentence on what it is about."""
    sections: tuple[Section, ...]

    def pictures(self) -> Iterator[tuple[str, bytes]]:
        """The file name and the content of every picture."""
        for section in self.sections:
            for block in section.blocks:
                if isinstance(block, Figure):
                    yield picture_name(block), block.svg
                elif isinstance(block, Cards):
                    yield from ((picture_name(card), card.jpeg) for card in block.cards if card.jpeg)


def picture_name(of: Figure | Card) -> str:
    """The file name of a picture."""
    return f"{of.name}.{'svg' if isinstance(of, Figure) else 'jpg'}"


def parts_of(cell: Cell) -> tuple[Part, ...]:
    """The parts of a cell."""
    return cell if isinstance(cell, tuple) else (cell,)


def said(*parts: Part) -> Paragraph:
    """A paragraph of these parts."""
    return Paragraph(parts)


def note(*parts: Part) -> Note:
    """A note of these parts."""
    return Note(parts)


def safe(text: str) -> str:
    """A text in one line, with a replacement character for each that cannot be shown or turns the direction of others.

    A per cent sign stays on the line of its number.
    """
    one_line = re.sub(r"\s*[\n\r\t\v\f]\s*", " ", text)
    return _UNSAFE.sub("\ufffd", re.sub(r"(?<=\d) %", "\u00a0%", one_line))


def percent(share: float, digits: int = 1) -> str:
    """A fraction as percent."""
    return f"{100 * share:.{digits}f}\u00a0%"


def points(difference: float) -> str:
    """A difference of fractions as percentage points."""
    return f"{100 * difference:+.1f}".replace("-", "\u2212")


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else "none"
