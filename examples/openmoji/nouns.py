"""The vocabulary: everyday nouns from ImageNet-21k's class names."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import wordfreq

MIN_ZIPF = 2.7  # on wordfreq's scale, log10 of uses per billion words; rarer words are mostly Latin names
LEMMAS_PER_CLASS = 2  # later lemmas are remote synonyms
# Slurs and vulgar words among the lemmas: no picture should be named by one.
LEFT_OUT = re.compile(
    "ass|bastard|bitch|cock|cuckold|dildo|faggot|fucker|homo|hooker|jezebel|pervert|pimp|redneck|shit|slut|tit"
)


def imagenet_nouns(min_zipf: float = MIN_ZIPF) -> list[str]:
    """Single lower-case words, in alphabetical order, from the lemmas of ImageNet-21k that timm contains."""
    table = (files("timm.data") / "_info" / "imagenet_synset_to_lemma.txt").read_text(encoding="utf-8")
    words = set()
    for line in table.splitlines():
        _synset, lemmas = line.split("\t")
        words.update(lemmas.split(", ")[:LEMMAS_PER_CLASS])
    plain = (word for word in words if re.fullmatch(r"[a-z]{3,}", word) and not LEFT_OUT.fullmatch(word))
    return sorted(word for word in plain if wordfreq.zipf_frequency(word, "en") >= min_zipf)


def write_nouns(path: Path) -> int:
    """Write the vocabulary, one word per line. Returns the number of words."""
    words = imagenet_nouns()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(words) + "\n", encoding="utf-8")
    return len(words)
