"""Concepts and classes as people name them, alone and in lists."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dncbm.concepts.lists import concepts_named, lines_of, list_of, read_concepts, read_factors
from dncbm.concepts.lookup import classes_of, concept_of, concepts_of, spellings_of
from dncbm.concepts.naming import VERDICTS, ConceptName

WORDS = ("sea", "dog", "salt, pepper", "dog", "#1", "2020", "\\o/", "dog")
NAMES = [ConceptName(index, word, 0.5) for index, word in enumerate(WORDS)]


@pytest.mark.parametrize(
    ("wanted", "indices"),
    [
        (["sea"], [0]),
        (["dog"], [1, 3, 7]),
        (["dog #3", 3, "sea"], [0, 3]),
        ([7, 0, 7], [0, 7]),
        (["salt, pepper", "2020"], [2, 5]),
        ([], []),
    ],
)
def test_concepts_are_found_by_name_label_and_index(wanted: list, indices: list[int]) -> None:
    assert concepts_of(NAMES, wanted) == indices
    assert [concept_of(NAMES, index) for index in indices] == indices
    spellings = spellings_of(NAMES)
    assert sorted(set().union(*(spellings.get(one, {one}) for one in wanted))) == indices


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("dig", "did you mean 'dog'"),
        ("cathedral", "no concept named 'cathedral'"),
        (8, "from 0 to 7"),
        (-1, "from 0 to 7"),
        (True, "a name or a number"),
        (None, "a name or a number"),
    ],
)
def test_unknown_concepts_are_refused(wanted: object, said: str, refusal) -> None:
    for find in (concept_of, lambda names, one: concepts_of(names, ["sea", one])):
        with refusal(said):
            find(NAMES, wanted)


def test_of_a_name_that_several_latents_share_the_labels_are_listed(refusal) -> None:
    with refusal("3 concepts", "dog #1, dog #3, dog #7"):
        concept_of(NAMES, "dog")
    many = [ConceptName(index, "dog", 0.5) for index in range(40)]
    with refusal("dog #11, ..."):
        concept_of(many, "dog")


def test_classes_are_found_by_number_and_either_name(refusal) -> None:
    names, folders = ["pub indoor", "cat", "cat"], ["/p/pub/indoor", "cat", "Cat"]
    assert classes_of(names, folders, ["pub indoor", "/p/pub/indoor", "Cat", 1]) == [0, 0, 2, 1]
    for wanted, said in (("cat", "1, 2"), ("pub indor", "'pub indoor'"), (3, "from 0 to 2")):
        with refusal("class", said):
            classes_of(names, folders, [0, wanted])


ABSTAINING = [
    ConceptName(index, name, 0.5, verdict)
    for index, (name, verdict) in enumerate(
        [("melon", "named"), ("melon", "abstains"), ("dog", "collision"), ("dog", "collision"), ("dog", "abstains"),
         ("salt, pepper", "abstains"), ("sea", "abstains"), ("sea", "abstains")]
    )
]  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "indices"),
    [
        ("melon", [0]), ("latent 1 (melon?)", [1]), ("dog", [2, 3]), ("dog #3", [3]), ("latent 4 (dog?)", [4]),
        ("salt, pepper", [5]), ("latent 5 (salt, pepper?)", [5]), ("sea", [6, 7]), ("latent 7 (sea?)", [7]), (1, [1]),
    ],
)  # fmt: skip
def test_latents_that_abstain_are_found_by_their_labels_and_where_no_other_has_the_name(
    tmp_path: Path, wanted: str | int, indices: list[int]
) -> None:
    assert concepts_of(ABSTAINING, [wanted]) == indices
    path = tmp_path / "list.txt"
    path.write_text(f"{wanted}\n{wanted}\n")
    assert read_concepts(path, ABSTAINING) == indices
    path.write_text(f"{wanted},0.5\n")
    assert read_factors(path, ABSTAINING) == dict.fromkeys(indices, 0.5)
    for index in indices:  # a label means its latent alone, in lists that stages write too
        path.write_text(list_of([index], ABSTAINING, "one"))
        assert read_concepts(path, ABSTAINING) == [index]


def test_several_that_abstain_are_told_apart_by_their_labels(refusal) -> None:
    with refusal("2 concepts have the name 'sea'", "latent 6 (sea?), latent 7 (sea?)"):
        concept_of(ABSTAINING, "sea")
    with refusal("did you mean 'latent 7 (sea?)'"):
        concept_of(ABSTAINING, "latent 7 (sea)")


# --------------------------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize(
    ("text", "indices"),
    [
        ("sea\ndog\n", [0, 1, 3, 7]),
        ("\ufeffsea\r\n\r\n# a comment\n  #another\n dog #3 \n6", [0, 3, 6]),
        ("salt, pepper\n\\#1\n\\2020\n\\\\o/", [2, 4, 5, 6]),
        ("0\n0\nsea", [0]),
    ],
)
def test_a_list_is_read(tmp_path: Path, text: str, indices: list[int]) -> None:
    path = tmp_path / "list.txt"
    path.write_text(text, encoding="utf-8", newline="")
    assert read_concepts(path, NAMES) == indices
    if "#" not in text:
        assert concepts_named(text.split("\n"), NAMES) == indices if "\r" not in text and text[-1] != "\n" else True
    path.write_text(list_of(indices, NAMES, "what a\nstage wrote"), encoding="utf-8")
    assert read_concepts(path, NAMES) == indices
    assert path.read_text().startswith("# what a stage wrote\n")


def test_a_list_of_factors_is_read(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("sea,0.5\n# dog,9\nsalt, pepper, 2\ndog #3\t0\n\\#1\t1e1\n\\2020,0.25\n7, 3\ndog #3,0.0\n")
    assert read_factors(path, NAMES) == {0: 0.5, 2: 2, 3: 0, 4: 10, 5: 0.25, 7: 3}


PIECES = ("sea", "dog", " #1", "#", "\\", ",", "0.5", "0", "1", "²", "\t", "\n", "\r", "\x1c", "\x85", "\u3000", "\ufeff",
          "\udc80", " ", "latent 0 (", "?)")  # fmt: skip
HOSTILE = st.one_of(st.lists(st.sampled_from(PIECES), max_size=3).map("".join), st.text(st.characters(), max_size=4))


@given(
    named=st.lists(st.tuples(HOSTILE, st.sampled_from([*VERDICTS, None])), min_size=1, max_size=6), mark=st.sampled_from(",\t")
)
@example(named=[("sea ", None), ("0", None), ("00", None)], mark=",")  # neither the label nor the index of the first works
@example(named=[("dog", None), ("dog", None), ("dog #0", None)], mark=",")  # a label that is a name, too
def test_every_concept_can_be_written_in_both_kinds_of_lists(
    tmp_path_factory: pytest.TempPathFactory, named: list[tuple[str, str | None]], mark: str
) -> None:
    names = [ConceptName(index, name, 0.5, verdict) for index, (name, verdict) in enumerate(named)]
    path, lines = tmp_path_factory.getbasetemp() / "list.txt", lines_of(names)
    for index, line in enumerate(lines):
        path.write_text(line, encoding="utf-8", newline="")
        assert read_concepts(path, names) == [index]
    every = list(range(len(names)))
    path.write_text("".join(f"{lines[index]}{mark}{index / 4}\n" for index in every), encoding="utf-8", newline="")
    assert read_factors(path, names) == {index: index / 4 for index in every}
    path.write_text(list_of(every, names, "all"), encoding="utf-8")
    assert read_concepts(path, names) == every


def test_a_list_writes_labels_wherever_it_can() -> None:
    assert lines_of(NAMES) == ["sea", "dog #1", "salt, pepper", "dog #3", "\\#1", "\\2020", "\\\\o/", "dog #7"]
    odd = ["sea ", "0", "00", " dog", "", "a\tb", "a\rb", "\ud800", "²", "\ufeffcat"]
    lines = lines_of([ConceptName(index, name, 0.5) for index, name in enumerate(odd)])
    assert lines == ["000", "\\0", "\\00", "\\ dog", "latent 4", "5", "6", "7", "\\²", "\\\ufeffcat"]


@pytest.mark.parametrize(
    ("read", "content", "line", "said"),
    [
        (read_concepts, b"sea\n\n#\nseal\n", 4, "did you mean 'sea'"),
        (read_concepts, b"sea\n\xff\xfe\n", 2, "not UTF-8"),
        (read_concepts, b"8", 1, "from 0 to 7"),
        (read_concepts, b"9" * 5000, 1, "no concept named"),
        (read_concepts, b"sea\n2020", 2, "an index and a name: write \\2020"),
        (read_concepts, b"# nothing\n\n", None, "names no concept"),
        (read_concepts, b"", None, "names no concept"),
        (read_concepts, None, None, "No such file"),
        (read_factors, b"dog\n", 1, "a factor of at least 0, not 'dog'"),
        (read_factors, b"sea,0.5\ndog,much", 2, "'dog,much'"),
        (read_factors, b"dog,-1", 1, "at least 0"),
        (read_factors, b"dog,nan", 1, "at least 0"),
        (read_factors, b"dog,inf", 1, "at least 0"),
        (read_factors, b"dgo,1", 1, "did you mean 'dog'"),
        (read_factors, b",1", 1, "no concept named ''"),
        (read_factors, b"dog,1\n\ndog #3,0.5", 3, "dog #3 has the factor 0.5, and 1 above"),
        (read_factors, b"#\n", None, "names no concept"),
    ],
)
def test_what_is_wrong_with_a_list_is_said_with_its_line(
    tmp_path: Path, refusal, read, content: bytes | None, line: int | None, said: str
) -> None:
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    with refusal(f"{path}, line {line}: " if line else path, said):
        read(path, NAMES)
