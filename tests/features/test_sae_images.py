"""The images of an SAE: webdataset shards, whole, damaged and odd, and folders of images."""

import bz2
import gzip
import io
import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from braceexpand import braceexpand
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from dncbm.features.datasets import ImageShards, file_states, open_image, reason_of, to_rgb
from dncbm.features.datasets.patterns import expand_braces, matching_files
from dncbm.features.datasets.sae import MAX_KEY, WebdatasetShards, sae_images
from dncbm.runs.declarations import SPLITS
from dncbm.runs.settings import load_settings
from tests.features.test_images import at_most


def read(shards: ImageShards) -> tuple[dict[str, np.ndarray], Counter[str]]:
    """The pixels of the images that can be decoded, by key, and the reasons for those that cannot."""
    bad: Counter[str] = Counter()
    images = {}
    seen = set()
    for shard in range(len(shards)):
        for key, load in shards.read(shard, lambda reason: bad.update([reason])):
            assert key not in seen
            seen.add(key)
            try:
                images[key] = np.asarray(to_rgb(open_image(load()))[0])
            except Exception as error:
                bad[reason_of(error)] += 1
    return images, bad


def of(path: Path, count: int | None = None) -> WebdatasetShards:
    """A tar, with img2dataset's number of images if there is one."""
    if count is not None:
        path.with_name(path.stem + "_stats.json").write_text(json.dumps({"successes": count}))
    return WebdatasetShards((path,))


def cut(path: Path, name: str, into_the_member: int) -> None:
    """Cut a tar off some bytes after the header or the content of a member begins."""
    with tarfile.open(path) as tar:
        member = tar.getmember(name)
    path.write_bytes(path.read_bytes()[: (member.offset_data if into_the_member else member.offset) + into_the_member])


# --------------------------------------------------------------------------------------------------- webdataset shards


def test_images_come_with_their_keys_in_order(tmp_path: Path, write_tar, random_image, encoded) -> None:
    """Under a folder with `#` and `?`, which webdataset takes for parts of a URL."""
    suffixes = {3: "jpg", 1: "jpeg", 2: "png", 4: "gif", 5: "WEBP"}
    samples = {f"{i:09d}": {"txt": b"a caption", suffix: encoded(random_image(i))} for i, suffix in suffixes.items()}
    images, bad = read(of(write_tar(tmp_path / "a #b?c" / "0.tar", samples)))
    assert list(images) == ["000000003", "000000001", "000000002", "000000005"]
    assert bad == {"no image in the sample": 1}  # files called .gif are not read
    for key, image in images.items():
        np.testing.assert_array_equal(image, np.asarray(random_image(int(key))))


def test_broken_images_and_samples_without_one_are_bad_images(tmp_path: Path, write_tar, members) -> None:
    samples = members(6)
    samples["000000001"]["jpg"] = b"\xff\xd8\xff not a picture"
    samples["000000002"]["jpg"] = samples["000000002"]["jpg"][:100]
    del samples["000000004"]["jpg"]
    images, bad = read(of(write_tar(tmp_path / "0.tar", samples)))
    assert [int(key) for key in images] == [0, 3, 5]
    assert bad.total() == 3
    assert bad["UnidentifiedImageError"] == bad["no image in the sample"] == 1


@pytest.mark.parametrize("content", [b"", b"not a tar at all"])
def test_a_file_that_is_no_tar_gives_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    assert read(of(tmp_path / "0.tar")) == ({}, {"cut off or damaged tar": 1})


@pytest.mark.parametrize("order", [("jpg", "json", "txt"), ("json", "jpg", "txt"), ("txt", "json", "jpg")])
@pytest.mark.parametrize("count", [None, 4])
def test_a_cut_inside_an_image_counts_once(
    tmp_path: Path, write_tar, members, order: tuple[str, ...], count: int | None
) -> None:
    samples = {key: {suffix: parts[suffix] for suffix in order} for key, parts in members(4).items()}
    path = write_tar(tmp_path / "0.tar", samples)
    cut(path, "000000003.jpg", 30)
    images, bad = read(of(path, count))
    assert [int(key) for key in images] == [0, 1, 2]
    assert bad == {"cut off or damaged tar": 1}


@pytest.mark.parametrize(("count", "lost"), [(None, 1), (4, 2), (6, 4)])
def test_a_cut_between_two_members_is_noticed(tmp_path: Path, write_tar, members, count: int | None, lost: int) -> None:
    path = write_tar(tmp_path / "0.tar", members(4))
    cut(path, "000000002.jpg", 0)
    images, bad = read(of(path, count))
    assert [int(key) for key in images] == [0, 1]
    assert bad == {"cut off or damaged tar": lost}


def test_a_member_that_ends_where_it_begins_is_damage(tmp_path: Path) -> None:
    """A sparse member of negative size, after which tarfile reads the same header again."""
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = tarfile.itn(-512, 12, tarfile.GNU_FORMAT)
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:495] = bytes(97) + tarfile.itn(0, 12, tarfile.GNU_FORMAT)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "0.tar").write_bytes(bytes(header) + bytes(1024))

    bad: list[str] = []

    def on_bad(reason: str) -> None:
        bad.append(reason)
        assert len(bad) < 5

    assert not list(of(tmp_path / "0.tar").read(0, on_bad))
    assert bad == ["cut off or damaged tar"]


@pytest.mark.parametrize(("count", "missing"), [(3, 0), (4, 0), (6, 2)])
def test_images_that_img2dataset_counted_and_the_tar_lacks_are_missing(
    tmp_path: Path, write_tar, members, count: int, missing: int
) -> None:
    images, bad = read(of(write_tar(tmp_path / "0.tar", members(4)), count))
    assert len(images) == 4
    assert bad == ({"missing from the shard": missing} if missing else {})


def test_keys_are_unique_and_captions_may_lie_elsewhere(tmp_path: Path, random_image, encoded) -> None:
    path = tmp_path / "0.tar"
    image = encoded(random_image(1))
    names = ["b/1.jpg", "b/1.json", "a/1.jpg", "b/1.jpg", "a/1.png", "c/1.txt", "a/1.seg.png", "._1.jpg", "c/1.jpg", "x"]
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(image)
            tar.addfile(member, io.BytesIO(image))
    bad: list[str] = []
    assert [key for key, _ in of(path).read(0, bad.append)] == ["b/1", "a/1", "c/1"]
    assert bad == ["duplicate key"]


@pytest.fixture
def named_tar(tmp_path: Path, random_image, encoded) -> Callable[..., WebdatasetShards]:
    """Writes a tar whose members have these names, and the same image each."""

    def write(*names: str) -> WebdatasetShards:
        image = encoded(random_image(1))
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = len(image)
                tar.addfile(member, io.BytesIO(image))
        return of(tmp_path / "0.tar")

    return write


@pytest.mark.parametrize(
    ("names", "keys", "bad"),
    [
        (["a.input.jpg", "a.txt", "b.input.JPG"], ["a", "b"], {}),
        (["a.depth.png", "a.jpg", "a.mask.png", "b.depth.png", "b.jpg"], ["a", "b"], {}),  # a.jpg and b.jpg
        (["mr.smith.jpg", "a.jpg", "b.jpg"], ["mr", "a", "b"], {}),
        (["./v.1/a.jpg", "v.1/b.c/0.png"], ["./v.1/a", "v.1/b.c/0"], {}),
        (["__MACOSX/a.jpg", ".cache/b.jpg", "x/.c.jpg", "x/._d.png", "e.jpg"], ["e"], {}),
        (["a.left.jpg", "a.right.jpg", "b.left.jpg", "b.right.jpg"], ["a", "b"], {}),
        (
            [f"2024.01-{i}.jpg" for i in range(9)], ["2024"],
            {"image with the key of another (keys end at the first dot of a name)": 8},
        ),
        (["a.gif", "a.txt", "b.gif"], [], {"no image in the sample, only 2 .gif, 1 .txt": 2}),
    ],
)  # fmt: skip
def test_the_last_part_of_a_name_tells_an_image(named_tar, names: list[str], keys: list[str], bad: dict[str, int]) -> None:
    images, found = read(named_tar(*names))
    assert (list(images), found) == (keys, bad)


def test_the_image_without_a_further_dot_is_taken(tmp_path: Path, write_tar, random_image, encoded) -> None:
    images = {suffix: encoded(random_image(seed)) for seed, suffix in enumerate(("depth.png", "png", "mask.png"))}
    found, _ = read(of(write_tar(tmp_path / "0.tar", {"a": images})))
    np.testing.assert_array_equal(found["a"], np.asarray(random_image(1)))


def test_a_key_of_many_characters_takes_no_memory(named_tar) -> None:
    """Saved beside a thousand others, it would take as much for each."""
    shards = named_tar("k" * 200_000 + ".jpg", "d/" + "k" * (MAX_KEY - 2) + ".png", "k" * (MAX_KEY + 1) + ".png", "b.jpg")
    with at_most(8 << 20):
        images, bad = read(shards)
    assert [len(key) for key in images] == [MAX_KEY, 1]
    assert bad == {f"key of more than {MAX_KEY} characters": 2}


def test_a_name_of_gigabytes_is_damage(tmp_path: Path) -> None:
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 3 << 30
    with (tmp_path / "0.tar").open("wb") as file:
        file.write(name.tobuf(tarfile.GNU_FORMAT))
        file.truncate(4 << 30)
    with at_most(8 << 20):
        assert read(of(tmp_path / "0.tar")) == ({}, {"cut off or damaged tar": 1})


def sparse_header(real_size: int) -> bytes:
    """An old GNU header of a file of this size of which nothing but zeros is left."""
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[483:495] = tarfile.itn(real_size, 12, tarfile.GNU_FORMAT)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    ("is_sparse", "in_pax", "reason"),
    [
        (True, False, "sparse file in a tar"),
        (False, True, "sparse file in a tar"),
        (False, False, "file of more than 256 MiB"),
    ],
)
def test_a_member_of_gigabytes_takes_no_memory(
    tmp_path: Path, random_image, encoded, is_sparse: bool, in_pax: bool, reason: str
) -> None:
    image, huge = encoded(random_image(1)), 3 << 30
    member = tarfile.TarInfo("a.jpg")
    member.size = 0 if in_pax else huge
    if in_pax:
        member.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(100 << 20), "GNU.sparse.numblocks": "1"}
    last = tarfile.TarInfo("b.png")
    last.size = len(image)
    with (tmp_path / "0.tar").open("wb") as file:
        file.write(sparse_header(huge) if is_sparse else member.tobuf(tarfile.PAX_FORMAT if in_pax else tarfile.GNU_FORMAT))
        file.seek(0 if is_sparse or in_pax else huge, os.SEEK_CUR)
        file.write(last.tobuf() + image + bytes(-len(image) % 512 + 1024))
    with at_most(8 << 20):
        images, bad = read(of(tmp_path / "0.tar"))
    assert list(images) == ["b"]
    assert bad == {reason: 1}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_are_not_utf8_are_keys_too(tmp_path: Path, random_image, encoded, format: int) -> None:
    image = encoded(random_image(1))
    names = [b"caf\xe9".decode("utf-8", "surrogateescape"), "日本", "a b?#"]
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for content, ending in ((image, ""), (b"no image", " bad")):
            for name in names:
                member = tarfile.TarInfo(f"{name}{ending}.jpg")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    images, bad = read(of(path))
    assert list(images) == names
    assert bad == {"UnidentifiedImageError": 3}


def test_counts_come_from_img2dataset(tmp_path: Path) -> None:
    shards = WebdatasetShards((tmp_path / "00000.tar", tmp_path / "00001.tar", tmp_path / "00002.tar"))
    (tmp_path / "00000_stats.json").write_text('{"count": 10, "successes": 7}')
    (tmp_path / "00001_stats.json").write_text("{")
    assert [shards.count(i) for i in range(3)] == [7, None, None]


def test_a_fingerprint_follows_names_and_sizes(tmp_path: Path, write_tar, members) -> None:
    a = write_tar(tmp_path / "a.tar", members(1))
    b = write_tar(tmp_path / "b.tar", members(1))
    fingerprints = [WebdatasetShards(paths).fingerprint() for paths in ((a,), (b,), (a, b), (b, a))]
    assert len(set(fingerprints)) == 4
    moved = write_tar(tmp_path / "elsewhere" / "a.tar", members(1))
    assert of(moved).fingerprint() == fingerprints[0]
    write_tar(a, members(50))
    assert of(a).fingerprint() != fingerprints[0]


def test_features_of_earlier_versions_stay_valid(make_settings, tmp_path: Path, write_tar) -> None:
    """What was recorded of these shards before an entry could hold several patterns."""
    for shard in range(2):
        content = [bytes((k * 7 + j * (shard + 1)) % 256 for j in range(1500)) for k in range(20)]
        write_tar(tmp_path / f"{shard}.tar", {str(k): {"jpg": content[k]} for k in range(20)})
    for train in ("{0..1}.tar", "?.tar", ["0.tar", "[1-9].tar"]):
        config = make_settings(sae_datasets={"mine": {"train": train, "train_val": "0.tar", "val": "0.tar"}})
        shards = sae_images(config, "mine")["train"]
        assert shards.fingerprint() == "4375ed18e989f52ff8994bdcb5e364511ca60753ec890ab8485e0d2e1735d7b0"
        assert shards.state(1, []) == "1.tar 51200 072d3465fe5381a9"


def test_other_images_of_the_same_size_are_noticed(tmp_path: Path, write_tar) -> None:
    contents = [np.random.default_rng(seed).bytes(20_000) for seed in range(2)]
    prints = [
        of(write_tar(tmp_path / "0.tar", {f"{i}": {"jpg": content} for i in range(50)})).fingerprint() for content in contents
    ]
    assert prints[0] != prints[1]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "empty"), (gzip.compress(bytes(9999)), "compressed with gzip"), (bz2.compress(b"x"), "compressed with bzip2"),
        (b"\n<!DOCTYPE html><html>", "a web page"), (b"x" * 10_000, "not a tar"),
    ],
    ids=["empty", "gzip", "bzip2", "a web page", "not a tar"],
)  # fmt: skip
def test_a_shard_that_is_no_tar_is_named_before_work_starts(
    make_settings, tmp_path: Path, write_tar, members, refusal, content: bytes, what: str
) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", members(2))
    settings = make_settings(sae_datasets={"mine": {"train": "{0..2}.tar", "train_val": "0.tar", "val": "0.tar"}})
    sae_images(settings, "mine")
    (tmp_path / "1.tar").write_bytes(content)
    with refusal("1 of 3 shards", tmp_path / "1.tar", f"it is {what}", "sae_datasets['mine']['train']", settings.path):
        sae_images(settings, "mine")


def test_an_empty_tar_is_a_tar(make_settings, tmp_path: Path, write_tar, members) -> None:
    write_tar(tmp_path / "0.tar", members(2))
    write_tar(tmp_path / "1.tar", {})
    settings = make_settings(sae_datasets={"mine": {"train": "{0..1}.tar", "train_val": "0.tar", "val": "0.tar"}})
    assert read(sae_images(settings, "mine")["train"])[1] == {}


# ------------------------------------------------------------------------------------------------------------ patterns


PIECES = st.sampled_from(
    [
        "{",
        "}",
        ",",
        "a",
        "b",
        "{1..3}",
        "{07..10}",
        "{3..-2}",
        "{0..9..4}",
        "{a..e..2}",
        "{c..A}",
        "{x,y}",
        "{q}",
        "\\{",
        "\\,",
        "..",
    ]
)


@settings(max_examples=400)
@given(pattern=st.lists(PIECES, max_size=7).map("".join))
def test_braces_stand_for_what_braceexpand_says(pattern: str) -> None:
    opened = 0
    for char in re.sub(r"\\.", "", pattern):
        opened += {"{": 1, "}": -1}.get(char, 0)
        if opened < 0:
            break  # which braceexpand takes for text at times
    if opened:
        with pytest.raises(ValueError, match="not balanced"):
            list(expand_braces(pattern))
    else:
        first, expected = (list(itertools.islice(expand(pattern), 300)) for expand in (expand_braces, braceexpand))
        assert first == expected


@pytest.mark.parametrize(
    "pattern", ["{0..99999999}", "{0..99999}{0..99999}", "{a{0..99999}{0..99999},b}", "{{0..9},{0..99999999}}"]
)
def test_patterns_of_millions_are_expanded_one_by_one(pattern: str) -> None:
    with at_most(1 << 20):
        assert len(list(itertools.islice(expand_braces(pattern), 50))) == 50


def test_a_pattern_of_millions_that_are_missing_is_refused(make_settings, refusal) -> None:
    pattern = "{0..99999999}.tar"
    settings = make_settings(sae_datasets={"mine": {"train": pattern, "train_val": "0.tar", "val": "0.tar"}})
    with at_most(4 << 20), refusal("1000 or more shards are missing, first", "/0.tar", pattern):
        sae_images(settings, "mine")


@pytest.mark.parametrize("pattern", ["{0..3.tar", "0}.tar", "{{a,b}.tar", "{" * 5000, "{" * 5000 + "}" * 5000])
def test_braces_that_are_not_balanced_are_one_line(make_settings, refusal, pattern: str) -> None:
    settings = make_settings(sae_datasets={"mine": {"train": pattern, "train_val": "0.tar", "val": "0.tar"}})
    with refusal("braces are not balanced", "sae_datasets['mine']['train']", settings.path):
        sae_images(settings, "mine")


@pytest.fixture(scope="module")
def folder_of_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files to be matched, among them hidden ones; `folder` matches what its files do, and is none."""
    top = tmp_path_factory.mktemp("globs")
    (top / "folder").mkdir()
    for name in ("a1.tar", "a2.tar", "a10.tar", "b1.tar", "b2.tar", "aa", "ab", "1", ".a1.tar", "[a]1", "a\nb"):
        (top / name).touch()
        (top / "folder" / name).touch()
    return top


IN_GLOBS = ["*", "?", "[ab]", "[!a]", "[0-9]", "{a,b}", "{1..2}", "folder/", "a", "1", ".tar", "\\*", "\\[", ".a"]


@settings(max_examples=100)
@given(pattern=st.lists(st.sampled_from(IN_GLOBS), min_size=1, max_size=5).map("".join))
def test_globs_stand_for_what_bash_says(folder_of_files: Path, pattern: str) -> None:
    assume(not pattern.endswith("/") and "//" not in pattern)
    script = f'shopt -s failglob; for name in {pattern}; do [ -d "$name" ] || printf "%s\\0" "$name"; done'
    said = subprocess.run(["bash", "-c", script], cwd=folder_of_files, capture_output=True, text=True, check=False)
    if said.returncode or not said.stdout:
        with pytest.raises(ValueError, match="no file matches"):
            list(matching_files(pattern, str(folder_of_files)))
    else:
        found = matching_files(pattern, str(folder_of_files))
        assert sorted(map(str, found)) == sorted(str(folder_of_files / name) for name in said.stdout.split("\0")[:-1])


@pytest.mark.parametrize(
    ("pattern", "shards"),
    [
        ("*.tar", ["1.tar", "2.tar", "10.tar", "[1].tar", "a1.tar", "a*.tar"]),
        ("{2,1?}.tar", ["2.tar", "10.tar"]),
        ("a*.tar", ["a*.tar"]),  # of that name
        ("[1].tar", ["[1].tar"]),
        ("[12].tar", ["1.tar", "2.tar"]),
        ("\\[1\\].tar", ["[1].tar"]),
        ("*/*.tar", ["more/3.tar"]),
        (["more/*", "{10,2}.tar"], ["more/3.tar", "10.tar", "2.tar"]),
    ],
)
def test_globs_are_sorted_and_names_are_preferred(
    make_settings, tmp_path: Path, write_tar, members, pattern: str | list[str], shards: list[str]
) -> None:
    for name in ("10", "2", "1", "[1]", "a*", "a1", "more/3"):
        write_tar(tmp_path / f"{name}.tar", members(1))
    (tmp_path / "more" / "folder").mkdir()
    found = sae_images(make_settings(sae_datasets={"mine": dict.fromkeys(SPLITS, pattern)}), "mine")
    assert found["train"].paths == tuple(tmp_path / name for name in shards)


def test_a_link_that_leads_nowhere_is_a_missing_shard(make_settings, tmp_path: Path, write_tar, members, refusal) -> None:
    write_tar(tmp_path / "0.tar", members(1))
    (tmp_path / "1.tar").symlink_to("none")
    with refusal("1 of 2 shards are missing, first", tmp_path / "1.tar"):
        sae_images(make_settings(sae_datasets={"mine": dict.fromkeys(SPLITS, "*.tar")}), "mine")


def test_braces_in_the_folder_of_the_config_are_part_of_its_name(tmp_path: Path, write_tar, members, monkeypatch) -> None:
    folder = tmp_path / "a{b,c}{1..2}[x]*"
    for shard in range(2):
        write_tar(folder / f"{shard}.tar", members(1))
    sources = {"mine": {"train": "{0..1}.tar", "train_val": str(folder / "0.tar"), "val": "[0].tar"}}
    keys = {"data_dir": "d", "sae_dir": "s", "probe_dir": "p", "vocab_dir": "v", "analysis_dir": "a", "vocabulary": "w"}
    lines = [
        f"{key} = {value!r}" for key, value in (keys | {"sae_datasets": sources, "probe_datasets": {}, "encoders": {}}).items()
    ]
    (folder / "config.py").write_text("\n".join(lines))
    found = sae_images(load_settings(folder / "config.py"), "mine")
    assert found["train"].paths == (folder / "0.tar", folder / "1.tar")
    assert found["train_val"].paths == (folder / "0.tar",)
    assert found["val"].paths == (folder / "0.tar",)


def test_shards_follow_the_pattern_of_the_config(make_settings, tmp_path: Path, write_tar, members, refusal) -> None:
    """Names as those of pixparse/cc3m-wds, without img2dataset's counts."""
    for split, shard, n in (("train", 0, 3), ("train", 1, 2), ("train", 2, 4), ("validation", 0, 5)):
        write_tar(tmp_path / f"wds/cc3m-{split}-{shard:04d}.tar", members(n))
    pattern = "wds/cc3m-train-{0000..0001}.tar"
    patterns = {"train": pattern, "train_val": "wds/cc3m-train-0002.tar", "val": "wds/cc3m-validation-0000.tar"}
    settings = make_settings(sae_datasets={"cc3m": patterns})
    found = sae_images(settings, "cc3m")
    assert {split: [path.name for path in shards.paths] for split, shards in found.items()} == {
        "train": ["cc3m-train-0000.tar", "cc3m-train-0001.tar"],
        "train_val": ["cc3m-train-0002.tar"],
        "val": ["cc3m-validation-0000.tar"],
    }
    sizes = {split: [len(list(one.read(i, pytest.fail))) for i in range(len(one))] for split, one in found.items()}
    assert sizes == {"train": [3, 2], "train_val": [4], "val": [5]}
    assert all(shards.count(0) is None for shards in found.values())

    (missing := tmp_path / "wds" / "cc3m-train-0001.tar").unlink()
    with refusal("1 of 2 shards are missing", missing, "sae_datasets['cc3m']['train']", settings.path, pattern):
        sae_images(settings, "cc3m")
    with refusal("'cc12m'"):
        sae_images(settings, "cc12m")


@pytest.fixture(scope="module")
def whole_tar(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[int]]:
    """A tar of six images, as bytes, and where its members begin."""
    path = tmp_path_factory.mktemp("whole") / "0.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(6):
            file = io.BytesIO()
            pixels = np.random.default_rng(i).integers(0, 256, (9, 9, 3), dtype=np.uint8)
            suffix = ("jpg", "png", "webp")[i % 3]
            Image.fromarray(pixels).save(file, suffix.replace("jpg", "jpeg"))
            for end, content in ((suffix, file.getvalue()), ("txt", b"caption"), ("json", b"{}")):
                member = tarfile.TarInfo(f"{i:03d}.{end}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with tarfile.open(path) as tar:
        starts = [member.offset for member in tar]
    return path.read_bytes(), starts


@settings(max_examples=300)
@given(data=st.data())
def test_mutated_tars_lose_images_and_nothing_else(
    tmp_path_factory, whole_tar: tuple[bytes, list[int]], data: st.DataObject
) -> None:
    """Bytes flipped, members dropped, the end cut off: no crash, no key twice, and every image accounted for."""
    content, starts = bytearray(whole_tar[0]), whole_tar[1]
    ends = [*starts[1:], starts[-1] + 1024]
    dropped = data.draw(st.sets(st.integers(0, len(starts) - 1), max_size=4), label="members dropped")
    for first, last in sorted(((starts[i], ends[i]) for i in dropped), reverse=True):
        del content[first:last]
    in_a_header = st.tuples(st.sampled_from(starts), st.integers(0, 511)).map(sum)
    anywhere = st.integers(0, len(content) - 1)
    flip = st.tuples(st.one_of(in_a_header, anywhere), st.integers(1, 255))
    flips = data.draw(st.lists(flip, max_size=8).filter(lambda some: all(i < len(content) for i, _ in some)), label="flips")
    for position, bits in flips:
        content[position] ^= bits
    if data.draw(st.booleans(), label="is cut"):
        del content[data.draw(st.integers(0, len(content)), label="cut") :]
    count = data.draw(st.sampled_from([None, 6]), label="count")
    folder: Path = tmp_path_factory.mktemp("mutated")
    (folder / "0.tar").write_bytes(bytes(content))
    images, bad = read(of(folder / "0.tar", count))
    if count:
        assert len(images) + bad.total() >= count
        if not flips:
            assert len(images) + bad.total() == count
    if not flips:
        assert {int(key) for key in images} <= {i for i in range(6) if 3 * i not in dropped}
    shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------------------- folders of images


@pytest.fixture
def fill(random_image) -> Callable[..., dict[str, np.ndarray]]:
    """Writes images of noise into a folder."""

    def save(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
        images = {name: random_image(seed) for seed, name in enumerate(names)}
        for name, image in images.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / name, "png")
        return {name: np.asarray(image) for name, image in images.items()}

    return save


def keys_of(found: dict[str, ImageShards]) -> dict[str, list[str]]:
    return {split: list(read(shards)[0]) for split, shards in found.items()}


def test_a_folder_without_splits_is_divided_at_random(make_settings, tmp_path: Path, fill, monkeypatch) -> None:
    monkeypatch.setattr("dncbm.features.datasets.SHARD_SIZE", 7)
    names = [f"{'abc'[i % 3]}/deeper/{i:03d}.{('jpg', 'PNG', 'jpeg', 'webp')[i % 4]}" for i in range(60)]
    images = fill(tmp_path / "photos", names)
    for other in ("notes.txt", "a/.hidden.jpg", ".cache/x.jpg"):
        (tmp_path / "photos" / other).parent.mkdir(exist_ok=True)
        (tmp_path / "photos" / other).write_bytes(b"?")
    settings = make_settings(sae_datasets={"mine": "photos"})
    found = sae_images(settings, "mine")
    assert list(found) == ["train", "train_val", "val"]
    assert [shards.count(0) for shards in found.values()] == [7, 3, 3]
    assert found["train"].name(7) == f"images 49 to 53 of {tmp_path / 'photos'}"
    keys = keys_of(found)
    assert {split: len(some) for split, some in keys.items()} == {"train": 54, "train_val": 3, "val": 3}
    assert sorted(key for some in keys.values() for key in some) == sorted(names)
    assert all(some == sorted(some) for some in keys.values())
    for key, pixels in read(found["val"])[0].items():
        np.testing.assert_array_equal(pixels, images[key])
    assert keys == keys_of(sae_images(settings, "mine"))
    fingerprints = {shards.fingerprint() for shards in found.values()}
    assert len(fingerprints) == 3
    fill(tmp_path / "photos", ["one more.jpg"])
    assert not fingerprints & {shards.fingerprint() for shards in sae_images(settings, "mine").values()}


def test_folders_named_as_splits_are_the_splits(make_settings, tmp_path: Path, fill) -> None:
    wanted = {"train": ["a.png", "b/c.png"], "train_val": ["d.png"], "val": ["e.png", "f.png"]}
    for split, names in wanted.items():
        fill(tmp_path / "photos" / split, names)
    assert keys_of(sae_images(make_settings(sae_datasets={"mine": "photos"}), "mine")) == wanted


def test_without_train_val_some_of_train_is_held_out(make_settings, tmp_path: Path, fill) -> None:
    names = [f"{i:02d}.png" for i in range(40)]
    fill(tmp_path / "photos/train", names)
    fill(tmp_path / "photos/val", ["x.png"])
    found = keys_of(sae_images(make_settings(sae_datasets={"mine": "photos"}), "mine"))
    assert len(found["train_val"]) == 2
    assert sorted(found["train"] + found["train_val"]) == names
    assert found["val"] == ["x.png"]


def test_a_folder_that_cannot_be_divided_is_refused(make_settings, tmp_path: Path, fill, refusal) -> None:
    settings = make_settings(sae_datasets={"mine": "photos"})
    with refusal(tmp_path / "photos", "is missing", "sae_datasets['mine']", settings.path):
        sae_images(settings, "mine")
    fill(tmp_path / "photos", ["1.png", "2.png"])
    with refusal("no images for", "which has 2 images", "at least 11"):
        sae_images(settings, "mine")
    (tmp_path / "photos/train").mkdir()
    (tmp_path / "photos/val").mkdir()
    with refusal("no images for train", settings.path):
        sae_images(settings, "mine")
    (tmp_path / "photos/val").rmdir()
    with refusal("has the folder train but not both train and val", settings.path):
        sae_images(settings, "mine")


def test_file_states_see_a_replaced_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert file_states([path]) == ["missing"]
    path.write_bytes(b"one")
    before = file_states([path])
    os.utime(path, ns=(1, 1))
    assert file_states([path]) != before


def test_links_put_no_image_into_two_splits(make_settings, tmp_path: Path, fill) -> None:
    wanted = {"train": [f"{i:02d}.png" for i in range(20)], "train_val": ["a.png"], "val": ["b.png"]}
    for split, names in wanted.items():
        fill(tmp_path / "photos" / split, names)
    for link, target in (("train/held out", "val"), ("train/all", "."), ("val/train", "train"), ("val/self", "val")):
        (tmp_path / "photos" / link).symlink_to(tmp_path / "photos" / target)
    assert keys_of(sae_images(make_settings(sae_datasets={"mine": "photos"}), "mine")) == wanted


def test_an_image_of_another_size_changes_its_split_and_its_shard(make_settings, tmp_path: Path, fill, monkeypatch) -> None:
    monkeypatch.setattr("dncbm.features.datasets.SHARD_SIZE", 2)
    for split in ("train", "train_val", "val"):
        fill(tmp_path / "photos" / split, [f"{i}.png" for i in range(4)])
    settings = make_settings(sae_datasets={"mine": "photos"})
    before = sae_images(settings, "mine")
    states = {split: [shards.state(i, []) for i in range(2)] for split, shards in before.items()}
    (tmp_path / "photos/val/3.png").write_bytes(b"another")
    after = sae_images(settings, "mine")
    assert [split for split in before if before[split].fingerprint() != after[split].fingerprint()] == ["val"]
    assert [i for i in range(2) if after["val"].state(i, []) != states["val"][i]] == [1]


def test_files_that_are_passed_over_are_said(make_settings, tmp_path: Path, fill, caplog, refusal) -> None:
    settings = make_settings(sae_datasets={"mine": "photos"})
    fill(tmp_path / "photos", [f"{i:02d}.bmp" for i in range(20)])
    with caplog.at_level(logging.WARNING):
        sae_images(settings, "mine")
    assert not caplog.messages
    for name in ("a.svg", "b/c.SVG", "notes.txt"):
        (tmp_path / "photos" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "photos" / name).write_text("?")
    with caplog.at_level(logging.WARNING):
        sae_images(settings, "mine")
    (said,) = caplog.messages
    assert "passed over: 2 .svg, 1 .txt" in said
    for image in (tmp_path / "photos").glob("*.bmp"):
        image.unlink()
    with refusal("which has 0 images", "passed over: 2 .svg, 1 .txt"):
        sae_images(settings, "mine")
