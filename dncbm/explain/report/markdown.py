"""A document as Markdown, with its pictures as files beside it."""

import re
from collections.abc import Sequence

from dncbm.explain.report.document import (
    Block,
    Cards,
    Cell,
    Code,
    Document,
    Figure,
    Heading,
    Link,
    Name,
    Note,
    Paragraph,
    Part,
    Section,
    Small,
    Status,
    Table,
    parts_of,
    picture_name,
    safe,
)

PICTURES = "figures"
"""Folder of the pictures, beside the file."""
_SPECIAL = re.compile(r"[\\`*_{}\[\]<>|#~&!$]|(?<=www)\.|:(?=//)")
"""What Markdown would read as more than text: its marks, those of HTML and of formulas, and addresses that become links."""


def as_markdown(document: Document, footer: str = "") -> str:
    """The document as Markdown (GitHub's, for tables). Every text is escaped."""
    parts = [f"# {_text(document.title)}", _parts(document.lead), *map(_section, document.sections), _text(footer)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section) -> str:
    heading = f'<a id="{section.id}"></a>\n\n## {_text(section.title)}'
    return "\n\n".join([heading, *map(_block, section.blocks)])


def _block(block: Block) -> str:
    match block:
        case Paragraph(parts):
            return _parts(parts)
        case Note(parts):
            return f"> {_parts(parts)}"
        case Heading(text):
            return f"### {_text(text)}"
        case Table():
            sides = [":---", *(("---:",) if block.numbers else (":---",)) * (len(block.header) - 1)]
            lines = [[*map(_text, block.header)], sides, *([*map(_cell, row)] for row in block.rows)]
            return f"**{_text(block.caption)}**\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        case Figure():
            return f"{_picture(block.alt, picture_name(block))}\n\n*{_text(block.caption)}*"
        case Cards(_, cards):
            table = ["| latent | facts | images |", "| :--- | :--- | :--- |"]
            for card in cards:
                picture = _picture(card.alt, picture_name(card)) if card.jpeg else ""
                table.append(f"| **{_text(card.title.text)}** | {'<br>'.join(map(_text, card.facts))} | {picture} |")
            return "\n".join(table)


def _picture(alt: str, name: str) -> str:
    return f"![{_text(alt)}]({PICTURES}/{name})"


def _cell(cell: Cell) -> str:
    return "".join(_part(part, in_table=True) for part in parts_of(cell))


def _parts(parts: Sequence[Part]) -> str:
    return "".join(_part(part) for part in parts)


def _part(part: Part, in_table: bool = False) -> str:
    match part:
        case str():
            return _SPECIAL.sub(r"\\\g<0>", safe(part))
        case Code(text):
            return _code(safe(text), in_table)
        case Name(text):
            return _text(text)
        case Small(text):
            return f"<br>{_text(text)}"
        case Link(text, section):
            return f"[{_text(text)}](#{section})"
        case Status(text):
            return f"**{_text(text)}**"


def _code(text: str, in_table: bool) -> str:
    """A span of code, fenced by more backticks than any run in it."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    edge = " " if text.startswith("`") or text.endswith("`") else ""
    inner = text.replace("|", "\\|") if in_table else text
    return f"{fence}{edge}{inner}{edge}{fence}"


def _text(text: str) -> str:
    return _SPECIAL.sub(r"\\\g<0>", safe(text))
