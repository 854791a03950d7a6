"""Lists of concepts that people write: one name, label or index per line, or with a factor each.

Blank lines and lines that begin with # are skipped. A line of digits alone is an index. After a backslash at its beginning, a
line is a name or label whatever it looks like: `\\#1`, `\\2020`.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from dncbm.concepts.lookup import Named, concepts_of, find, spellings_of
from dncbm.concepts.naming import ConceptName, concept_labels
from dncbm.runs.errors import UserError

COMMENT, ESCAPE = "#", "\\"
SPECIAL = (COMMENT, ESCAPE, "\ufeff")
DIGITS = 18
"""An index has at most this many."""


def read_concepts(path: Path, names: Sequence[ConceptName]) -> list[int]:
    """The concepts that a list names, in ascending order.

    Raises UserError, naming the file and the line, if the file cannot be read or names no concept, or a concept is unknown.
    """
    known, found = spellings_of(names), set[int]()
    for number, line in _lines(path):
        with _at(path, number):
            found |= find(_meant(line, known), known, len(names))
    return sorted(found)


def read_factors(path: Path, names: Sequence[ConceptName]) -> dict[int, float]:
    """Index -> factor of the concepts in a list of `name,factor`, or `name` and factor with a tab between them.

    A name may hold commas: the last one counts. Raises UserError as `read_concepts`, and if a line has no factor that is
    finite and at least 0, or a concept has two.
    """
    known, found = spellings_of(names), dict[int, float]()
    for number, line in _lines(path):
        name, separator, text = line.rpartition("\t" if "\t" in line else ",")
        with _at(path, number):
            try:
                factor = float(text) if separator else math.nan
            except ValueError:
                factor = math.nan
            if not 0 <= factor < math.inf:
                raise UserError(f"write a name, a comma and a factor of at least 0, not {line[:100]!r}")
            for index in find(_meant(name.strip(), known), known, len(names)):
                if found.setdefault(index, factor) != factor:
                    raise UserError(f"{concept_labels(names)[index]} has the factor {factor:g}, and {found[index]:g} above")
    return found


def concepts_named(texts: Iterable[str], names: Sequence[ConceptName]) -> list[int]:
    """The concepts that words of a command line name, written as lines of a list are, in ascending order.

    Raises UserError if a concept is unknown.
    """
    known = spellings_of(names)
    return concepts_of(names, [_meant(text, known) for text in texts])


def _meant(text: str, known: Collection[str]) -> Named:
    """The name, label or index that a text stands for. Raises UserError if it is an index and also the name of a concept."""
    if text.startswith(ESCAPE):
        return text.removeprefix(ESCAPE)
    if not re.fullmatch(rf"[0-9]{{1,{DIGITS}}}", text):
        return text
    if text in known:
        raise UserError(f"{text} is an index and a name: write {ESCAPE}{text} for the name, or a label for the index")
    return int(text)


def list_of(concepts: Sequence[int], names: Sequence[ConceptName], about: str) -> str:
    """The text of a list that `read_concepts` reads: concepts as `lines_of` writes them, below a comment."""
    lines = lines_of(names)
    return "\n".join([f"{COMMENT} {' '.join(about.split())}", *(lines[index] for index in concepts), ""])


def lines_of(names: Sequence[ConceptName]) -> list[str]:
    """How a list writes each concept, alone for `read_concepts` or before a comma or tab and a factor for `read_factors`.

    That is its label, after a backslash where it would be read as something else. It is the index where the label cannot stand
    in a list or means other concepts too: with zeros before it where a concept has these digits as its name.
    """
    known = spellings_of(names)
    return [_line(index, label, known) for index, label in enumerate(concept_labels(names))]


def _line(index: int, label: str, known: Mapping[str, set[int]]) -> str:
    # A line loses the spaces at its ends, and a file what is no UTF-8 and the mark at its beginning.
    is_whole = label == label.rstrip() and not set(label) & set("\t\n\r") and not re.search("[\ud800-\udfff]", label)
    if not is_whole or known[label] != {index}:
        return next((digits for n in range(1, DIGITS + 1) if (digits := f"{index:0{n}d}") not in known), f"{index}")
    return ESCAPE + label if label.isdigit() or label[0].isspace() or label[0] in SPECIAL else label


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The number and the text of every line that is no comment. Raises UserError if there is none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: this is not UTF-8: save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read the list of concepts {path}: {error.strerror or error}") from error
    found = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    found = [(number, line) for number, line in found if line and not line.startswith(COMMENT)]
    if not found:
        raise UserError(f"{path} names no concept: write one name, label or index per line")
    yield from found


@contextmanager
def _at(path: Path, line: int) -> Iterator[None]:
    """A UserError in this block names the line of the file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}, line {line}: {error}") from error
