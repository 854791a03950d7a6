"""Which latents or classes people mean: names, labels or indices, as they write them."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral

from dncbm.concepts.naming import ABSTAINS, ConceptName, concept_labels
from dncbm.runs.errors import UserError

Named = str | int
"""A name, a label (`dog #17`, `latent 123 (melon?)`), or an index."""
MOST_LISTED = 12


def concepts_of(names: Sequence[ConceptName], wanted: Iterable[Named]) -> list[int]:
    """The latents that names, labels or indices stand for, in ascending order (`spellings_of`).

    Raises UserError, which suggests the nearest names, if one is unknown.
    """
    asked = list(wanted)
    known = spellings_of(names) if any(isinstance(one, str) for one in asked) else {}  # an index needs no dictionary of names
    return sorted({index for one in asked for index in find(one, known, len(names))})


def spellings_of(names: Sequence[ConceptName]) -> dict[str, set[int]]:
    """Name or label -> the latents that it stands for.

    A name stands for all latents that share it and do not abstain; if all of them abstain, for all of them.
    """
    by_name: dict[bool, dict[str, set[int]]] = {False: {}, True: {}}
    for index, name in enumerate(names):
        by_name[name.verdict == ABSTAINS].setdefault(name.name, set()).add(index)
    found = by_name[True] | by_name[False]
    for label, indices in _by_text(concept_labels(names)).items():
        found[label] = found.get(label, set()) | indices
    return found


def concept_of(names: Sequence[ConceptName], wanted: Named) -> int:
    """The latent that a name, label or index stands for.

    Raises UserError if it is unknown, or several latents share the name, whose labels are listed.
    """
    found = concepts_of(names, [wanted])
    if len(found) > 1:
        labels = concept_labels(names)
        listed = ", ".join(labels[index] for index in found[:MOST_LISTED]) + (", ..." if len(found) > MOST_LISTED else "")
        raise UserError(f"{len(found)} concepts have the name {wanted!r}: choose one of {listed}")
    return found[0]


def classes_of(classes: Sequence[str], folders: Sequence[str], wanted: Iterable[Named]) -> list[int]:
    """The class that each number, or each name as people or the data set write it, stands for.

    Raises UserError, which suggests the nearest names, if one is unknown, or several classes have the name.
    """
    known, numbers = _by_text(classes, folders), []
    for one in wanted:
        found = sorted(find(one, known, len(classes), "class"))
        if len(found) > 1:
            raise UserError(f"{len(found)} classes have the name {one!r}: choose a number, {', '.join(map(str, found))}")
        numbers += found
    return numbers


def _by_text(*spellings: Sequence[str]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for texts in spellings:
        for index, text in enumerate(texts):
            found.setdefault(text, set()).add(index)
    return found


def find(wanted: Named, known: Mapping[str, set[int]], n: int, what: str = "concept") -> set[int]:
    """Which of n things a name, label or index stands for; `known` has their spellings.

    Raises UserError, which suggests the nearest names, if it is unknown.
    """
    if isinstance(wanted, Integral) and not isinstance(wanted, bool):
        if not 0 <= int(wanted) < n:
            raise UserError(f"there is no {what} {wanted}: they are numbered from 0 to {n - 1}")
        return {int(wanted)}
    if not isinstance(wanted, str):
        raise UserError(f"a {what} is a name or a number, not {wanted!r}")
    if wanted not in known:
        near = ", ".join(map(repr, difflib.get_close_matches(wanted, known, n=3)))
        raise UserError(f"there is no {what} named {wanted[:100]!r}" + (f"; did you mean {near}?" if near else ""))
    return known[wanted]
