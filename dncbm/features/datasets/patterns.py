"""What a shard pattern stands for: braces as in bash, and globs among the files that exist."""

import glob
import os
import re
import string
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

MAX_DEPTH = 20
"""How deeply the braces of a pattern may be nested."""
_BRACES = re.compile(r"\\.|[{},]", re.DOTALL)
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?|([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?", re.ASCII)
_LETTERS = string.ascii_uppercase + string.ascii_lowercase


def matching_files(pattern: str, folder: str) -> Iterator[Path]:
    """The files that a pattern with braces and globs (`*`, `?`, `[a-c]`, `[!a-c]`) stands for, relative to a folder.

    Braces come first, as in bash, and keep their order; the files of a glob follow in the order of their numbers (`2.tar`
    before `10.tar`). A file of exactly that name is preferred to a glob, and a backslash escapes a character.
    A file that is missing is returned, too: one that is named without a glob, or a link that leads nowhere.

    Raises ValueError if braces are not balanced, or no file matches a glob.
    """
    for place in _places(pattern):
        path = Path(folder, unescaped(place))
        if not _MAGIC.search(re.sub(r"\\.", "", place, flags=re.DOTALL)) or os.path.isfile(path):
            yield path
            continue
        as_glob = re.sub(r"\\(.)", lambda escaped: glob.escape(escaped[1]), place, flags=re.DOTALL)
        found = [Path(folder, match) for match in glob.glob(as_glob, root_dir=folder)]
        if not (files := sorted((match for match in found if not os.path.isdir(match)), key=_in_numeric_order)):
            raise ValueError(f"no file matches {path}")
        yield from files


_MAGIC = re.compile(r"[*?[]")


def _in_numeric_order(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", str(path), flags=re.ASCII)  # texts and numbers take turns
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], str(path)


def unescaped(place: str, characters: str = "") -> str:
    """A place without the backslashes before these characters, by default before any."""
    return re.sub(rf"\\([{re.escape(characters)}])" if characters else r"\\(.)", r"\1", place, flags=re.DOTALL)


def expand_braces(pattern: str, escapable: str = "") -> Iterator[str]:
    """What a pattern with braces stands for, as in bash, one after another: `{00..12}.tar`, `{a,b}.tar`, `{0..9..3}.tar`.

    A backslash escapes a brace or comma, and is removed before the `escapable` characters, by default before
    any. (The package braceexpand holds all alternatives in memory at once.)

    Raises ValueError if braces are not balanced, or nested more than MAX_DEPTH deep.
    """
    return (unescaped(place, escapable) for place in _places(pattern))


def _places(pattern: str) -> Iterator[str]:
    """What a pattern with braces stands for, with its backslashes."""
    depth = 0
    for match in _BRACES.finditer(pattern):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if not 0 <= depth <= MAX_DEPTH:
            break
    if depth:
        raise ValueError(
            f"its braces are not balanced, or more than {MAX_DEPTH} deep; write a backslash before those that belong to a name"
        )
    return _expanded(pattern)


def _expanded(pattern: str) -> Iterator[str]:
    depth, opening = 0, 0
    for match in _BRACES.finditer(pattern):
        if match[0] == "{":
            opening = match.start() if depth == 0 else opening
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if depth == 0:
                break
    else:
        yield pattern
        return
    head, inner, tail = pattern[:opening], pattern[opening + 1 : match.start()], pattern[match.end() :]
    for middle in _alternatives(inner):
        for end in _expanded(tail):
            yield head + middle + end


def _alternatives(inner: str) -> Iterator[str]:
    """What stands for a pair of braces and what is between them."""
    if found := _RANGE.fullmatch(inner):
        first, last, by, first_letter, last_letter, letters_by = found.groups()
        if first_letter:
            return (_LETTERS[i] for i in _steps(_LETTERS.index(first_letter), _LETTERS.index(last_letter), letters_by))
        padded = any(text.lstrip("-").startswith("0") and text.lstrip("-") != "0" for text in (first, last))
        width = max(len(first), len(last)) if padded else 0
        return (f"{number:0{width}d}" for number in _steps(int(first), int(last), by))
    parts, depth, start = [], 0, 0
    for match in _BRACES.finditer(inner):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if match[0] == "," and depth == 0:
            parts.append(inner[start : match.start()])
            start = match.end()
    if parts:
        return chain.from_iterable(map(_expanded, [*parts, inner[start:]]))
    return (f"{{{text}}}" for text in _expanded(inner))


def _steps(first: int, last: int, by: str | None) -> range:
    step = int(by or 1) or 1
    return range(first, last + 1, step) if first < last else range(first, last - 1, -step)
