"""Names, families and the split of the emoji, and the vocabulary."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def records(example: SimpleNamespace) -> list:
    return example.emoji_data.load_emoji()


def test_every_emoji_has_a_name_and_a_place_of_its_own(records: list) -> None:
    assert len(records) > 1800
    assert len({record.code for record in records}) == len(records)
    assert len({record.name for record in records}) == len(records)
    assert len({record.category for record in records}) == 9
    dog = next(record for record in records if record.code == "1F436")
    assert (dog.name, dog.category, dog.file_stem) == ("dog face", "animals_and_nature", "1F436_dog_face")
    assert all(record.file_stem.isascii() and record.svg.is_file() for record in records)


@pytest.mark.parametrize(
    "names",
    [
        ("firefighter", "man firefighter", "woman firefighter"),
        ("person walking", "woman walking", "man walking facing right"),
        ("one o'clock", "twelve-thirty"),
        ("family man woman boy", "couple with heart", "men holding hands"),
        ("man", "old woman", "baby"),
        ("santa claus", "mrs. claus"),
        ("prince", "princess"),
        ("red heart", "green heart"),
        ("red square", "white small square"),
        ("keycap 1", "keycap 2"),
        ("new moon", "crescent moon"),
        ("see-no-evil monkey", "hear-no-evil monkey"),
        ("flag of chad", "flag of romania"),
        ("thumbs up",),
    ],
)
def test_variants_are_one_family(records: list, names: tuple[str, ...]) -> None:
    by_name = {record.name: record for record in records}
    assert len({by_name[name].family for name in names}) == 1


@pytest.mark.parametrize(
    "names",
    [
        ("dog face", "cat face"),
        ("moon cake", "full moon"),
        ("kiss mark", "kiss"),
        ("tangerine", "red apple"),
        ("firefighter", "teacher"),
        ("flag of france", "flag of italy"),
    ],
)
def test_different_things_are_different_families(records: list, names: tuple[str, str]) -> None:
    by_name = {record.name: record for record in records}
    assert by_name[names[0]].family != by_name[names[1]].family


def test_no_family_and_no_drawing_straddles_a_split(records: list) -> None:
    by_family, by_drawing = defaultdict(set), defaultdict(set)
    for record in records:
        by_family[record.family].add(record.split)
        by_drawing[record.svg.read_bytes()].add(record.split)
    assert all(len(splits) == 1 for splits in by_family.values())
    assert all(len(splits) == 1 for splits in by_drawing.values())


def test_long_series_are_trained_on(example: SimpleNamespace, records: list) -> None:
    families = example.emoji_data.by_family(records)
    longest = max(families.values(), key=len)
    assert len(longest) > 20
    limit = example.emoji_data.LONG_SERIES
    assert all(members[0].split == "train" for members in families.values() if len(members) >= limit)


def test_skin_tones_and_signs_do_not_make_another_family(example: SimpleNamespace) -> None:
    family_keys = example.emoji_data.family_keys
    plain = family_keys("1F44B", "waving hand", b"1")
    assert set(plain) & set(family_keys("1F44B-1F3FD", "waving hand medium skin tone", b"2"))
    runner = family_keys("1F3C3", "runner", b"3")
    assert set(runner) & set(family_keys("1F3C3-1F3FB-200D-2640", "somebody who runs", b"4"))


def test_shares_of_the_splits(records: list) -> None:
    shares = {split: sum(record.split == split for record in records) / len(records) for split in ("val", "train_val")}
    assert 0.15 < shares["val"] < 0.25
    assert 0.04 < shares["train_val"] < 0.12


@pytest.mark.parametrize("limit", [60, 200])
def test_a_limit_keeps_the_splits_and_every_category(example: SimpleNamespace, records: list, limit: int) -> None:
    kept = example.emoji_data.select_emoji(limit)
    split = {record.code: record.split for record in records}
    assert all(record.split == split[record.code] for record in kept)
    assert 0.7 * limit < len({record.family for record in kept}) < 1.3 * limit
    for held_out in (True, False):
        counts: dict[str, int] = defaultdict(int)
        for record in kept:
            counts[record.category] += (record.split == "val") == held_out
        assert len(counts) == 9
        assert min(counts.values()) >= 2
    assert any(record.split == "train_val" for record in kept)


def test_nouns_are_plain_words(example: SimpleNamespace) -> None:
    words = example.nouns.imagenet_nouns()
    assert 4000 < len(words) < 5000
    assert words == sorted(set(words))
    assert all(word.isascii() and word.isalpha() and word.islower() and len(word) >= 3 for word in words)
    assert {"dog", "clock", "bicycle", "bread"} <= set(words)
