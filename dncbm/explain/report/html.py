"""A document as one HTML file that needs nothing else: styles are inline, pictures are data URIs, and there is no script."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape

from dncbm.explain.plotting.colours import FAINT, INK, NEGATIVE, POSITIVE, REST, RIGHT, RULE, SHEET
from dncbm.explain.report.document import (
    NOT_SUPPORTED,
    NOT_TESTED,
    SUPPORTED,
    Block,
    Card,
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
    safe,
)

MARKS = {SUPPORTED: ("\u2713", "yes", RIGHT), NOT_SUPPORTED: ("\u2717", "no", NEGATIVE), NOT_TESTED: ("\u2013", "open", REST)}
"""Status -> mark, class and colour. The word stands beside the mark, so that nothing depends on colour."""
GENERATOR = '<meta name="generator" content="dncbm report">'
"""By which a report of ours is known."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What the browser may load: nothing from elsewhere, whatever a name holds."""
STYLE = f"""
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; }}
body {{ margin: 0; background: #fff; color: {INK}; overflow-wrap: break-word;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
main, header, footer {{ max-width: 62rem; margin: 0 auto; padding: 0 1rem; }}
header {{ padding-top: 2rem; }}
h1 {{ font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; }}
h2 {{ font-size: 1.3rem; line-height: 1.3; margin: 3rem 0 .75rem; padding-top: .75rem; border-top: 1px solid {RULE}; }}
h3 {{ font-size: 1.05rem; margin: 1.75rem 0 .5rem; }}
p {{ margin: .5rem 0 .9rem; max-width: 46rem; }}
.lead {{ font-size: 1.1rem; }}
a {{ color: {POSITIVE}; }}
a:focus-visible, .scroll:focus-visible {{ outline: 2px solid {SHEET["focus"]}; outline-offset: 2px; }}
code {{ font: .86em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: {SHEET["paper"]}; padding: .1em .3em;
  border-radius: 3px; overflow-wrap: anywhere; }}
small {{ display: block; color: {FAINT}; font-size: .84rem; line-height: 1.4; margin-top: .15rem; }}
nav ol {{ margin: .5rem 0 0; padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .15rem 1.1rem;
  font-size: .95rem; }}
.note {{ border-left: 3px solid {RULE}; background: {SHEET["paper"]}; padding: .5rem .8rem; max-width: 46rem; }}
.scroll {{ overflow-x: auto; margin: .75rem 0 1.5rem; }}
table {{ border-collapse: collapse; font-size: .92rem; }}
caption {{ text-align: left; font-weight: 600; padding: 0 0 .4rem; }}
th, td {{ padding: .35rem 1.1rem .35rem 0; border-bottom: 1px solid {RULE}; text-align: left; vertical-align: top; }}
thead th {{ border-bottom: 2px solid {REST}; vertical-align: bottom; font-weight: 600; }}
tbody th {{ font-weight: 400; }}
.numbers td, .numbers thead th:not(:first-child) {{ text-align: right; font-variant-numeric: tabular-nums; }}
.numbers td {{ white-space: nowrap; }}
.numbers tbody th {{ min-width: 8rem; }}
td {{ min-width: 3.5rem; }}
.stacks {{ width: 100%; }}
.stacks tbody th {{ width: 46%; }}
.status {{ display: inline-block; white-space: nowrap; border-left: 4px solid; padding-left: .45rem; font-weight: 600; }}
{"".join(f".{name} {{ border-color: {colour}; }} " for _, name, colour in MARKS.values())}
figure {{ margin: 1rem 0 1.5rem; max-width: 34rem; }}
figure img {{ display: block; width: 100%; height: auto; }}
figcaption {{ color: {FAINT}; font-size: .88rem; line-height: 1.4; margin-top: .3rem; }}
.cards {{ list-style: none; margin: .5rem 0 1.5rem; padding: 0; display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); }}
.cards li {{ border: 1px solid {SHEET["border"]}; border-radius: 4px; padding: .6rem .7rem; background: {SHEET["tile"]};
  break-inside: avoid; font-size: .88rem; line-height: 1.4; }}
.cards strong {{ display: block; font-size: 1rem; }}
.cards img {{ display: block; max-width: 100%; height: auto; margin-top: .4rem; }}
footer {{ color: {FAINT}; font-size: .85rem; margin-top: 3rem; padding-bottom: 2rem; }}
@media (min-width: 601px) {{ caption {{ white-space: nowrap; }} }}
@media (max-width: 600px) {{
  .stacks, .stacks thead, .stacks tbody, .stacks tr, .stacks th, .stacks td, .stacks caption {{ display: block; width: 100%; }}
  .stacks thead {{ position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }}
  .stacks tr {{ border-bottom: 1px solid {RULE}; padding: .6rem 0; }}
  .stacks tbody th, .stacks td {{ width: 100%; border: 0; padding: .1rem 0; }}
}}
@media print {{
  @page {{ margin: 16mm 15mm; }}
  html {{ font-size: 10pt; }}
  body {{ font-size: 1rem; }}
  main, header, footer {{ max-width: none; padding: 0; }}
  nav {{ display: none; }}
  h1, h2, h3, caption {{ break-after: avoid; }}
  h2 {{ margin-top: 1.6rem; }}
  a {{ color: inherit; text-decoration: none; }}
  .scroll {{ overflow: visible; }}
  .scroll:not(:has(.stacks)) {{ break-inside: avoid; }}
  table {{ max-width: 100%; font-size: .85rem; }}
  .numbers td, .numbers thead th:not(:first-child) {{ white-space: normal; }}
  th, td {{ padding-right: .6rem; }}
  thead {{ display: table-header-group; }}
  tr, figure, .note, .cards li {{ break-inside: avoid; }}
  figure {{ max-width: 9.5cm; }}
  .cards {{ grid-template-columns: 1fr 1fr; gap: .4rem; }}
}}
"""


def as_html(document: Document, footer: str = "") -> str:
    """The document as a page. Every text is escaped."""
    contents = "".join(f'<li><a href="#{section.id}">{_text(section.title)}</a></li>' for section in document.sections)
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
            GENERATOR,
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(document.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<header>\n<h1>{_text(document.title)}</h1>",
            f'<p class="lead">{_parts(document.lead)}</p>',
            f'<nav aria-label="Contents"><ol>{contents}</ol></nav>\n</header>\n<main>',
            *(_section(section) for section in document.sections),
            f"</main>\n<footer><p>{_text(footer)}</p></footer>\n</body>\n</html>\n",
        ]
    )


def _section(section: Section) -> str:
    blocks = "\n".join(_block(block) for block in section.blocks)
    return f'<section aria-labelledby="{section.id}">\n<h2 id="{section.id}">{_text(section.title)}</h2>\n{blocks}\n</section>'


def _block(block: Block) -> str:
    match block:
        case Paragraph(parts):
            return f"<p>{_parts(parts)}</p>"
        case Note(parts):
            return f'<p class="note">{_parts(parts)}</p>'
        case Heading(text):
            return f"<h3>{_text(text)}</h3>"
        case Table():
            return _table(block)
        case Figure():
            picture = f'<img src="{_data("image/svg+xml", block.svg)}" alt="{_text(block.alt)}">'
            return f"<figure>{picture}<figcaption>{_text(block.caption)}</figcaption></figure>"
        case Cards(label, cards):
            return f'<ul class="cards" aria-label="{_text(label)}">\n' + "\n".join(map(_card, cards)) + "\n</ul>"


def _table(table: Table) -> str:
    classes = " ".join(name for name, on in (("numbers", table.numbers), ("stacks", table.stacks)) if on)
    roles = {tag: f' role="{role}"' if table.stacks else "" for tag, role in _ROLES.items()}  # blocks have no roles of a table
    head = "".join(f'<th scope="col"{roles["thead th"]}>{_text(name)}</th>' for name in table.header)
    lines = [
        f'<tr{roles["tr"]}><th scope="row"{roles["th"]}>{_cell(first)}</th>'
        + "".join(f"<td{roles['td']}>{_cell(cell)}</td>" for cell in cells)
        + "</tr>"
        for first, *cells in table.rows
    ]
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(table.caption)}">'
        f'<table class="{classes}"{roles["table"]}><caption>{_text(table.caption)}</caption>\n'
        f"<thead{roles['group']}><tr{roles['tr']}>{head}</tr></thead>\n<tbody{roles['group']}>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


_ROLES = {
    "table": "table", "group": "rowgroup", "tr": "row", "thead th": "columnheader", "th": "rowheader", "td": "cell",
}  # fmt: skip


def _card(card: Card) -> str:
    picture = f'<img src="{_data("image/jpeg", card.jpeg)}" alt="{_text(card.alt)}">' if card.jpeg else ""
    return f"<li><strong>{_part(card.title)}</strong>{'<br>'.join(map(_text, card.facts))}{picture}</li>"


def _cell(cell: Cell) -> str:
    return _parts(parts_of(cell))


def _parts(parts: Sequence[Part]) -> str:
    return "".join(map(_part, parts))


def _part(part: Part) -> str:
    match part:
        case str():
            return escape(safe(part))
        case Code(text):
            return f"<code>{_text(text)}</code>"
        case Name(text):
            return f"<bdi>{_text(text)}</bdi>"
        case Small(text):
            return f"<small>{_text(text)}</small>"
        case Link(text, section):
            return f'<a href="#{escape(section)}">{_text(text)}</a>'
        case Status(text):
            mark, name, _ = MARKS[text]
            return f'<span class="status {name}"><span aria-hidden="true">{mark} </span>{_text(text)}</span>'


def _text(text: str) -> str:
    return escape(safe(text))


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{b64encode(content).decode()}"
