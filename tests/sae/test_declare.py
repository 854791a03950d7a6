"""Flags, values, names, identities and checks that follow from the declarations of a small example."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from sparse_autoencoder.declare import build, check, choice, flags, identity, in_unit, run_name, setting, values


@dataclass(frozen=True)
class Round:
    radius: float = setting(1.0, "radius", above=0)
    count: int = setting(3, "how many", least=1)

    @property
    def name_part(self) -> str:
        return f"round{self.radius}"


@dataclass(frozen=True)
class Square:
    side: float = setting(2.0, "side", least=0)
    count: int = setting(3, "how many", least=1)
    note: str = "not a setting"


@dataclass(frozen=True)
class Colour:
    hue: float = setting(0.5, "hue", flag="colour_hue", least=0, below=1, in_name="_hue{}", place=3)
    names: tuple[str, ...] = setting((), "names")
    sizes: tuple[int, ...] = setting((1, 2), "sizes", least=1)
    words: tuple[str, ...] = setting((), "words", separate=True)
    quiet: bool = setting(False, "say less", identifies="never")
    every: int | str = setting(2, "how often", units=("days", "hours"), least=0, most=99, identifies="never")


@dataclass(frozen=True)
class Drawing:
    shape: Round | Square = choice({"round": Round, "square": Square}, "round", "shape", in_name="_{}", place=2)
    mode: str = setting("fast", "mode", choices=("fast", "slow"), in_name="{}", place=4, identifies="changed")
    passes: int = setting(1, "passes", when=("mode", "slow"), in_name="_p{}", place=1)
    seed: int = setting(7, "seed", in_name="_s{}", place=5, name_default=False)
    title: str | None = setting(None, "title", pattern=r"\w+")
    word: str = setting("a", "word", pattern=r"[a-z]+", called="be a word")
    rows: int = setting(1, "rows", least=1, most=9)
    cores: int = setting(None, "cores", factory=lambda: 8, identifies="never")
    colour: Colour = field(default_factory=Colour)

    def __post_init__(self) -> None:
        check(self)


def test_flags() -> None:
    found = flags(Drawing)
    assert list(found) == [
        *("shape", "radius", "count", "side", "mode", "passes", "seed", "title", "word", "rows", "cores"),
        *("colour_hue", "names", "sizes", "words", "quiet", "every"),
    ]
    assert {name: found[name].default for name in ("shape", "radius", "title", "cores", "sizes")} == {
        **{"shape": "round", "radius": 1.0, "title": None, "cores": 8, "sizes": (1, 2)}
    }
    assert [found[name].type for name in ("shape", "title", "sizes", "quiet")] == [str, str, tuple[int, ...], bool]
    assert [found[name].variants for name in ("radius", "count", "side", "mode")] == [
        *(("round",), ("round", "square"), ("square",), ())
    ]
    assert [found[name].is_tuple for name in ("names", "title")] == [True, False]
    assert found["colour_hue"].field == "hue"


@pytest.mark.parametrize(
    ("flag", "text", "expected"),
    [
        ("seed", "12", 12),
        ("radius", "2", 2.0),
        ("title", "abc", "abc"),
        ("quiet", "True", True),
        ("quiet", "False", False),
        ("sizes", "3, 1,3,", (3, 1)),
        ("names", "a,b", ("a", "b")),
        ("words", "a,b", ("a,b",)),
        ("mode", "slow", "slow"),
        ("seed", "1.5", "must be a whole number, not '1.5'"),
        ("radius", "x", "must be a number, not 'x'"),
        ("sizes", "1,x", "must be whole numbers separated by commas, not '1,x'"),
        ("sizes", "1,0", "must be at least 1, not 0"),
        ("quiet", "yes", "must be True or False, not 'yes'"),
        ("mode", "best", "must be fast or slow, not 'best'"),
        ("title", "a b", r"must match \w+, not 'a b'"),
        ("word", "a b", "must be a word, not 'a b'"),
        ("word", "", "must be a word, not ''"),
        ("rows", "10", "must be at least 1 and at most 9, not 10"),
        ("rows", "9", 9),
        ("seed", str(2**63 - 1), 2**63 - 1),
        ("seed", str(2**63), f"must be at most {2**63 - 1}, not {2**63}"),
        ("seed", str(-(2**63)), f"must be at least {1 - 2**63}, not {-(2**63)}"),
        ("seed", "9" * 5000, f"must be a whole number, not '{'9' * 59}... (5002 characters)"),
        ("radius", "1e400", "must be finite, not inf"),
        ("radius", "0", "must be above 0, not 0.0"),
        ("radius", "inf", "must be finite, not inf"),
        ("radius", "nan", "must be finite, not nan"),
        ("colour_hue", "1", "must be at least 0 and below 1, not 1.0"),
        ("every", "3", 3),
        ("every", "3days", 3),
        ("every", "3 hours", "3hours"),
        ("every", "100hours", "must be at least 0 and at most 99, not 100"),
        ("every", "3weeks", "must be a whole number, alone or followed by days or hours, not '3weeks'"),
        ("every", "1.5", "must be a whole number, alone or followed by days or hours, not '1.5'"),
    ],
)
def test_parsing(flag: str, text: str, expected: Any) -> None:
    if isinstance(expected, str) and expected.startswith("must"):
        with pytest.raises(ValueError, match="must") as caught:
            flags(Drawing)[flag].parse(text)
        assert str(caught.value) == expected
    else:
        assert flags(Drawing)[flag].parse(text) == expected


DRAWINGS = [
    # values of flags, the drawing they stand for, its name, and its identity without shape, seed, title and colour
    ({}, Drawing(), "round1.0_hue0.5fast", {}),
    ({"shape": "square", "side": 5.0, "radius": 9.0}, Drawing(Square(5.0)), None, {}),
    ({"radius": 3.0, "seed": 7}, Drawing(Round(3.0)), "round3.0_hue0.5fast", {}),
    (
        {"mode": "slow", "passes": 4, "seed": 8, "unknown": 1},
        Drawing(mode="slow", passes=4, seed=8),
        "p4_round1.0_hue0.5slow_s8",
        {"mode": "slow", "passes": 4},
    ),
    ({"passes": 4, "title": None}, Drawing(passes=4), "round1.0_hue0.5fast", {}),
    (
        {"colour_hue": 0.25, "sizes": 5, "names": ("x", "y"), "quiet": True, "cores": 2},
        Drawing(cores=2, colour=Colour(0.25, ("x", "y"), (5,), quiet=True)),
        "round1.0_hue0.25fast",
        {},
    ),
]


@pytest.mark.parametrize(("given", "expected", "name", "beside"), DRAWINGS)
def test_building_naming_and_identity(given: dict, expected: Drawing, name: str | None, beside: dict) -> None:
    drawing = build(Drawing, given)
    assert drawing == expected
    assert build(Drawing, values(drawing)) == drawing
    if name is not None:
        assert run_name(drawing) == name
    always = {"shape": repr(drawing.shape), "seed": drawing.seed, "title": None, "word": "a", "rows": 1}
    colour = {"hue": drawing.colour.hue, "names": drawing.colour.names, "sizes": drawing.colour.sizes, "words": ()}
    assert identity(drawing) == always | beside | colour


def test_values() -> None:
    assert values(Drawing(Square(5.0), seed=3))["shape"] == "square"
    assert {name: values(Drawing(Square(5.0)))[name] for name in ("side", "count", "seed", "colour_hue")} == {
        **{"side": 5.0, "count": 3, "seed": 7, "colour_hue": 0.5}
    }
    assert "radius" not in values(Drawing(Square()))
    assert "note" not in values(Drawing(Square()))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "best"}, "Drawing: mode must be fast or slow, not 'best'"),
        ({"title": "a b"}, "Drawing: title must match"),
        ({"word": 5}, "Drawing: word must be a word, not 5"),
        ({"seed": 1.5}, "Drawing: seed must be a whole number, not 1.5"),
        ({"seed": "1"}, "Drawing: seed must be a whole number, not '1'"),
    ],
)
def test_checks(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Drawing(**wrong)


@pytest.mark.parametrize(
    ("every", "message"),
    [
        (1.5, "every must be a whole number, alone or followed by days or hours, not 1.5"),
        (True, "every must be a whole number, alone or followed by days or hours, not True"),
        ("3 weeks", "every must be a whole number, alone or followed by days or hours, not '3 weeks'"),
        ("100hours", "every must be at least 0 and at most 99, not 100"),
        (-1, "every must be at least 0 and at most 99, not -1"),
    ],
)
def test_checks_of_numbers_with_a_unit(every: Any, message: str) -> None:
    @dataclass(frozen=True)
    class Rate:
        every: int | str = setting(2, "how often", units=("days", "hours"), least=0, most=99)

    for fine in (2, "3hours", "2 days", "2"):
        check(Rate(fine))
    assert [in_unit(value, ("days", "hours")) for value in (2, "2days", "3hours")] == [(2, "days"), (2, "days"), (3, "hours")]
    with pytest.raises(ValueError, match="must") as caught:
        check(Rate(every))
    assert str(caught.value) == f"Rate: {message}"
