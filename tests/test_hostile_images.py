"""Images and tars as they should not be: skipped or read as the encoder's preprocessing reads them, and all accounted for."""

import io
import json
import os
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from dncbm.datasets import BadImage, file_states, open_image
from dncbm.datasets.cc3m import FolderShards, WebdatasetShards, sae_images
from dncbm.encoders import Encoder
from dncbm.errors import StaleArtifact, UserError
from dncbm.extraction import Extraction, extract
from dncbm.features import open_features, save_probe_features, save_sae_features
from dncbm.manifests import read_manifest
from dncbm.settings import SPLITS

ALL_MAY_BE_BAD = Extraction("cpu", 4, 0, max_bad_fraction=1.0)


def extracted(
    shards: Any, encoder: Encoder, folder: Path, extraction: Extraction = ALL_MAY_BE_BAD
) -> tuple[list, dict]:
    """Keys and the reasons counted. The rows are as many as the keys."""
    details = extract(shards, encoder, folder, extraction, "images")
    keys = []
    for path in sorted(folder.glob("[0-9]*.keys.npy")):
        rows = np.load(path.with_name(path.name.replace(".keys", "")))
        keys += list(np.load(path))
        assert len(rows) == len(np.load(path))
    assert details["images"] == len(keys)
    return keys, details["bad"]


# ------------------------------------------------------------------------------------------------------ single images


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes that says it is as large as this."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("pixels", [90_000_000, 170_000_000, 400_000_000])
@pytest.mark.parametrize("as_file", [False, True])
def test_a_decompression_bomb_is_named(tmp_path: Path, pixels: int, as_file: bool) -> None:
    content = bomb(pixels // 10_000, 10_000)
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(BadImage, match="decompression bomb: more than 89478485 pixels"):
        open_image(tmp_path / "bomb.png" if as_file else content)


def test_an_image_of_the_greatest_size_is_opened() -> None:
    assert open_image(bomb(89_478, 1000)).size == (89_478, 1000)


def test_every_reason_is_counted(tmp_path: Path, write_tar, make_encoder, random_image, encoded) -> None:
    good = encoded(random_image(0, (64, 64)))
    path = write_tar(
        tmp_path / "0.tar",
        {
            "good": {"png": good, "txt": b"caf\xe9 \xff\xfe", "json": b"\x80"},  # captions are not read
            "empty": {"jpg": b""},
            "text": {"jpg": b"<html>not found</html>"},
            "cut": {"png": good[: len(good) // 2]},
            "bomb": {"png": bomb(20_000, 20_000)},
            "caption only": {"txt": b"a caption"},
            "good too": {"WEBP": encoded(random_image(1, (64, 64)), "webp")},
        },
    )
    keys, bad = extracted(WebdatasetShards((path,)), make_encoder(), tmp_path / "features")
    assert keys == ["good", "good too"]
    assert bad == {
        "empty file": 1,
        "UnidentifiedImageError": 1,
        "OSError": 1,
        "decompression bomb: more than 89478485 pixels": 1,
        "no image in the sample": 1,
    }


def unusual(kind: str) -> bytes:
    """The bytes of an image in an unusual mode or format."""
    rgb = Image.fromarray(np.random.default_rng(5).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    file = io.BytesIO()
    if kind == "CMYK":
        rgb.convert("CMYK").save(file, "jpeg", quality=95)
    elif kind == "16 bit":
        sixteen = np.random.default_rng(6).integers(0, 65536, (40, 60), dtype=np.uint16)
        Image.fromarray(sixteen).save(file, "png")
    elif kind == "palette":
        rgb.quantize(16).save(file, "png", transparency=3)
    elif kind == "transparent":
        rgb.convert("RGBA").save(file, "png")
    elif kind == "grey":
        rgb.convert("L").save(file, "png")
    elif kind == "black and white":
        rgb.convert("1").save(file, "png")
    elif kind == "animated":
        rgb.save(
            file, "webp", save_all=True, append_images=[rgb.rotate(90), rgb.rotate(180)], duration=40, lossless=True
        )
    else:  # turned by EXIF
        exif = Image.Exif()
        exif[0x0112] = 6
        rgb.save(file, "jpeg", exif=exif, quality=95)
    return file.getvalue()


KINDS = ("CMYK", "16 bit", "palette", "transparent", "grey", "black and white", "animated", "turned by EXIF")


@pytest.mark.parametrize("kind", KINDS)
def test_unusual_images_are_what_the_encoders_preprocessing_makes_of_them(
    tmp_path: Path, write_tar, make_encoder, kind: str
) -> None:
    """Held against open_clip's transform, on the image as PIL opens it."""
    preprocess = image_transform_v2(PreprocessCfg(size=(32, 32)), is_train=False)
    features = torch.nn.Flatten()
    features.encode_image = lambda images: images.flatten(1)  # type: ignore[assignment]
    encoder = Encoder("pixels", features, preprocess, open_clip.tokenize, torch.device("cpu"))
    path = write_tar(tmp_path / "0.tar", {kind: {"jpg": unusual(kind)}})
    keys, bad = extracted(WebdatasetShards((path,)), encoder, tmp_path / "features")
    assert keys == [kind]
    assert not bad
    expected = preprocess(Image.open(io.BytesIO(unusual(kind)))).flatten().numpy()
    np.testing.assert_array_equal(np.load(tmp_path / "features/00000.npy")[0], expected)


# --------------------------------------------------------------------------------------------------------------- tars


@pytest.fixture
def members(random_image, encoded) -> Callable[[int], dict[str, dict[str, bytes]]]:
    """n samples as img2dataset writes them: the image, then its caption and JSON."""

    def make(n: int) -> dict[str, dict[str, bytes]]:
        return {f"{i:09d}": {"jpg": encoded(random_image(i)), "json": b"{}", "txt": b"caption"} for i in range(n)}

    return make


def with_count(path: Path, n: int) -> WebdatasetShards:
    path.with_name(path.stem + "_stats.json").write_text(json.dumps({"successes": n}))
    return WebdatasetShards((path,))


@pytest.mark.parametrize("order", [("jpg", "json", "txt"), ("json", "jpg", "txt"), ("txt", "json", "jpg")])
@pytest.mark.parametrize("is_counted", [False, True])
def test_a_cut_inside_an_image_counts_once(
    tmp_path: Path, write_tar, members, make_encoder, order: tuple[str, ...], is_counted: bool
) -> None:
    samples = {key: {suffix: parts[suffix] for suffix in order} for key, parts in members(4).items()}
    path = write_tar(tmp_path / "0.tar", samples)
    with tarfile.open(path) as tar:
        cut = tar.getmember("000000003.jpg").offset_data + 30
    path.write_bytes(path.read_bytes()[:cut])
    shards = with_count(path, 4) if is_counted else WebdatasetShards((path,))
    keys, bad = extracted(shards, make_encoder(), tmp_path / "features")
    assert [int(key) for key in keys] == [0, 1, 2]
    assert bad == {"cut off or damaged tar": 1}


def test_a_tar_that_is_cut_between_two_members_is_noticed_without_a_count(
    tmp_path: Path, write_tar, members, make_encoder
) -> None:
    path = write_tar(tmp_path / "0.tar", members(4))
    with tarfile.open(path) as tar:
        cut = tar.getmember("000000002.jpg").offset
    path.write_bytes(path.read_bytes()[:cut])
    keys, bad = extracted(WebdatasetShards((path,)), make_encoder(), tmp_path / "features")
    assert [int(key) for key in keys] == [0, 1]
    assert bad == {"cut off or damaged tar": 1}


def test_keys_are_unique_and_captions_may_lie_elsewhere(
    tmp_path: Path, write_tar, make_encoder, random_image, encoded
) -> None:
    path = tmp_path / "0.tar"
    image = encoded(random_image(1))
    names = [
        "b/1.jpg",
        "b/1.json",
        "a/1.jpg",
        "b/1.jpg",
        "a/1.png",
        "c/1.txt",
        "a/1.seg.png",
        "._1.jpg",
        "c/1.jpg",
        "x",
    ]
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(image)
            tar.addfile(member, io.BytesIO(image))
    keys, bad = extracted(WebdatasetShards((path,)), make_encoder(), tmp_path / "features")
    assert keys == ["b/1", "a/1", "c/1"]
    assert bad == {"duplicate key": 1}


def test_names_that_are_not_utf8_are_keys_too(tmp_path: Path, make_encoder, random_image, encoded) -> None:
    image = encoded(random_image(1))
    names = [b"caf\xe9".decode("utf-8", "surrogateescape"), "日本", "a b?#"]
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{format}.tar"
        with tarfile.open(path, "w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
            for content, suffix in ((image, "jpg"), (b"no image", "jpg")):
                for name in names:
                    member = tarfile.TarInfo(f"{name}{'' if content == image else ' bad'}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        keys, bad = extracted(WebdatasetShards((path,)), make_encoder(), tmp_path / f"features {format}")
        assert keys == names
        assert bad == {"UnidentifiedImageError": 3}


def test_public_shards_are_read_as_they_come(make_settings, tmp_path: Path, write_tar, members) -> None:
    """Names as those of pixparse/cc3m-wds, without img2dataset's counts."""
    for split, shard, n in (("train", 0, 3), ("train", 1, 2), ("train", 2, 4), ("validation", 0, 5)):
        write_tar(tmp_path / f"wds/cc3m-{split}-{shard:04d}.tar", members(n))
    patterns = {
        "train": "wds/cc3m-train-{0000..0001}.tar",
        "train_val": "wds/cc3m-train-0002.tar",
        "val": "wds/cc3m-validation-0000.tar",
    }
    found = sae_images(make_settings(sae_datasets={"cc3m": patterns}), "cc3m")
    sizes = {
        split: [len(list(shards.read(i, pytest.fail))) for i in range(len(shards))] for split, shards in found.items()
    }
    assert sizes == {"train": [3, 2], "train_val": [4], "val": [5]}
    assert all(shards.count(0) is None for shards in found.values())


@pytest.fixture(scope="module")
def whole_tar(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[int]]:
    """A tar of six images, as bytes, and where its members begin."""
    path = tmp_path_factory.mktemp("whole") / "0.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(6):
            file = io.BytesIO()
            pixels = np.random.default_rng(i).integers(0, 256, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, ("jpeg", "png", "webp")[i % 3])
            for suffix, content in (
                (("jpg", "png", "webp")[i % 3], file.getvalue()),
                ("txt", b"caption"),
                ("json", b"{}"),
            ):
                member = tarfile.TarInfo(f"{i:03d}.{suffix}")
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
    """Bytes flipped, members dropped, the end cut off: no crash, a key for every row, and every image accounted for."""
    content, starts = bytearray(whole_tar[0]), whole_tar[1]
    ends = [*starts[1:], starts[-1] + 1024]
    dropped = data.draw(st.sets(st.integers(0, len(starts) - 1), max_size=4), label="members dropped")
    for first, last in sorted(((starts[i], ends[i]) for i in dropped), reverse=True):
        del content[first:last]
    in_a_header = st.tuples(st.sampled_from(starts), st.integers(0, 511)).map(sum)
    anywhere = st.integers(0, len(content) - 1)
    flip = st.tuples(st.one_of(in_a_header, anywhere), st.integers(1, 255))
    flips = data.draw(
        st.lists(flip, max_size=8).filter(lambda some: all(i < len(content) for i, _ in some)), label="flips"
    )
    for position, bits in flips:
        content[position] ^= bits
    if data.draw(st.booleans(), label="is cut"):
        del content[data.draw(st.integers(0, len(content)), label="cut") :]

    def preprocess(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image.convert("RGB").resize((4, 4)), dtype=np.float32)).permute(2, 0, 1)

    model = torch.nn.Identity()
    model.encode_image = lambda images: images.mean(dim=(2, 3))  # type: ignore[assignment]
    small_encoder = Encoder("means", model, preprocess, torch.nn.Identity(), torch.device("cpu"))
    folder: Path = tmp_path_factory.mktemp("mutated")
    path = folder / "0.tar"
    path.write_bytes(bytes(content))
    shards = with_count(path, 6) if data.draw(st.booleans(), label="is counted") else WebdatasetShards((path,))
    try:
        keys, bad = extracted(shards, small_encoder, folder / "features")
    except UserError as error:
        if "no image could be read" not in str(error):
            raise
        keys, bad = [], json.loads((folder / "features/00000.json").read_text())["bad"]
    assert len(set(keys)) == len(keys)
    total = len(keys) + sum(bad.values())
    if shards.count(0) is not None:
        assert total >= 6
        if not flips:
            assert total == 6
    if not flips:
        kept = {i for i in range(6) if 3 * i not in dropped}
        assert {int(key) for key in keys} <= kept
    shutil.rmtree(folder)


# ----------------------------------------------------------------------------------------------------- images mended


@pytest.fixture
def counted(monkeypatch, make_encoder) -> list[int]:
    """The stages load an encoder that lists how many images it was given at a time."""
    seen: list[int] = []

    class Listing(torch.nn.Module):
        def encode_image(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(len(images))
            return images.mean(dim=(2, 3))

    monkeypatch.setattr("dncbm.features.load_encoder", lambda *_: make_encoder(Listing()))
    monkeypatch.setattr("dncbm.features.describe_encoder", lambda _, name: {"encoder": name})
    return seen


STRICT = Extraction("cpu", 4, 0, max_bad_fraction=0.01)


@pytest.mark.parametrize("is_of_the_same_size", [False, True])
def test_mended_tars_are_read_again_and_no_others(
    make_settings, tmp_path: Path, write_tar, members, counted: list[int], refusal, is_of_the_same_size: bool
) -> None:
    whole = members(4)
    broken = whole | {
        "000000001": {"jpg": bytes(len(whole["000000001"]["jpg"])) if is_of_the_same_size else b"?" * 20_000}
    }
    for shard, samples in enumerate((whole, broken, whole)):
        write_tar(tmp_path / f"{shard}.tar", samples)
    settings = make_settings(sae_datasets={"mine": {"train": "{0..2}.tar", "train_val": "0.tar", "val": "0.tar"}})
    with refusal("1 of 12", "UnidentifiedImageError", tmp_path / "1.tar", "mend"):
        save_sae_features(settings, "mine", "enc", "out", STRICT)
    counted.clear()
    with refusal("1 of 12"):  # nothing was mended, nothing is read
        save_sae_features(settings, "mine", "enc", "out", STRICT)
    assert not counted

    write_tar(tmp_path / "1.tar", whole)
    save_sae_features(settings, "mine", "enc", "out", STRICT)
    assert counted == [4, 4, 4]  # the mended tar, and the two other splits
    assert len(open_features(settings, "mine", "enc", "out", "train")) == 12
    write_tar(tmp_path / "1.tar", broken)  # a finished stage is not touched
    if not is_of_the_same_size:
        with pytest.raises(StaleArtifact, match="train images of mine has changed"):
            save_sae_features(settings, "mine", "enc", "out", STRICT)


def test_another_list_of_shards_is_not_a_mended_one(
    make_settings, tmp_path: Path, write_tar, members, counted: list[int]
) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", {**members(4 + shard), "bad": {"jpg": b"?"}})
    others = {"train_val": "0.tar", "val": "0.tar"}
    with pytest.raises(UserError, match="unreadable"):
        save_sae_features(
            make_settings(sae_datasets={"mine": others | {"train": "{0..1}.tar"}}), "mine", "enc", "out", STRICT
        )
    for train in ("{0..2}.tar", "0.tar", "{1..2}.tar"):
        settings = make_settings(sae_datasets={"mine": others | {"train": train}})
        with pytest.raises(StaleArtifact, match="train images of mine has changed"):
            save_sae_features(settings, "mine", "enc", "out", STRICT)


def test_mended_probe_images_are_read_again(
    make_settings, tmp_path: Path, random_image, counted: list[int], monkeypatch, refusal
) -> None:
    monkeypatch.setattr("dncbm.datasets.probe.SHARD_SIZE", 8)
    for split in ("train", "val"):
        for i in range(20):
            path = tmp_path / f"images/{split}/a/{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            random_image(i).save(path)
    bad = tmp_path / "images/val/a/11.png"
    bad.write_bytes(b"?")
    settings = make_settings(probe_datasets={"mine": "images"})
    with refusal("1 of 20", "images 8 to 15"):
        save_probe_features(settings, "mine", "enc", "out", ("val",), STRICT)
    counted.clear()
    random_image(3).save(bad)
    save_probe_features(settings, "mine", "enc", "out", ("val",), STRICT)
    assert sum(counted) == 8
    assert list(open_features(settings, "mine", "enc", "out", "val").keys) == list(range(20))


# ---------------------------------------------------------------------------------------------------- folders of images


@pytest.fixture
def fill(random_image) -> Callable[..., dict[str, Image.Image]]:
    def save(folder: Path, names: list[str]) -> dict[str, Image.Image]:
        images = {name: random_image(seed) for seed, name in enumerate(names)}
        for name, image in images.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / name, "png")
        return images

    return save


def read(shards: FolderShards) -> dict[str, np.ndarray]:
    return {
        key: np.asarray(decode()) for shard in range(len(shards)) for key, decode in shards.read(shard, pytest.fail)
    }


def test_a_folder_without_splits_is_divided_at_random(make_settings, tmp_path: Path, fill, monkeypatch) -> None:
    monkeypatch.setattr("dncbm.datasets.cc3m.SHARD_SIZE", 7)
    names = [f"{'abc'[i % 3]}/deeper/{i:03d}.{('jpg', 'PNG', 'jpeg', 'webp')[i % 4]}" for i in range(60)]
    images = fill(tmp_path / "photos", names)
    for other in ("notes.txt", "a/.hidden.jpg", ".cache/x.jpg"):
        (tmp_path / "photos" / other).parent.mkdir(exist_ok=True)
        (tmp_path / "photos" / other).write_bytes(b"?")
    settings = make_settings(sae_datasets={"mine": "photos"})
    found = sae_images(settings, "mine")
    assert [shards.count(0) for shards in found.values()] == [7, 3, 3]
    keys = {split: list(read(shards)) for split, shards in found.items()}
    assert {split: len(some) for split, some in keys.items()} == {"train": 54, "train_val": 3, "val": 3}
    assert sorted(key for some in keys.values() for key in some) == sorted(names)
    assert all(some == sorted(some) for some in keys.values())
    np.testing.assert_array_equal(read(found["val"])[keys["val"][1]], np.asarray(images[keys["val"][1]]))
    assert keys == {split: list(read(shards)) for split, shards in sae_images(settings, "mine").items()}
    fingerprints = {shards.fingerprint() for shards in found.values()}
    assert len(fingerprints) == 3
    fill(tmp_path / "photos", ["one more.jpg"])
    assert not fingerprints & {shards.fingerprint() for shards in sae_images(settings, "mine").values()}


def test_folders_named_as_splits_are_the_splits(make_settings, tmp_path: Path, fill) -> None:
    wanted = {"train": ["a.png", "b/c.png"], "train_val": ["d.png"], "val": ["e.png", "f.png"]}
    for split, names in wanted.items():
        fill(tmp_path / "photos" / split, names)
    settings = make_settings(sae_datasets={"mine": "photos"})
    assert {split: list(read(shards)) for split, shards in sae_images(settings, "mine").items()} == wanted


def test_without_train_val_some_of_train_is_held_out(make_settings, tmp_path: Path, fill) -> None:
    names = [f"{i:02d}.png" for i in range(40)]
    fill(tmp_path / "photos/train", names)
    fill(tmp_path / "photos/val", ["x.png"])
    found = {split: list(read(s)) for split, s in sae_images(make_settings(sae_datasets={"m": "photos"}), "m").items()}
    assert len(found["train_val"]) == 2
    assert sorted(found["train"] + found["train_val"]) == names
    assert found["val"] == ["x.png"]


def test_a_folder_that_cannot_be_divided_is_refused(make_settings, tmp_path: Path, fill, refusal) -> None:
    settings = make_settings(sae_datasets={"mine": "photos"})
    with refusal(tmp_path / "photos", "sae_datasets['mine']", settings.path):
        sae_images(settings, "mine")
    fill(tmp_path / "photos", ["1.png", "2.png"])
    with refusal("no images for", "20"):
        sae_images(settings, "mine")
    fill(tmp_path / "photos/train", ["1.png"])
    with refusal("train", "val", settings.path):
        sae_images(settings, "mine")


def test_a_stage_on_a_folder_keeps_names_that_are_not_utf8(
    make_settings, tmp_path: Path, fill, counted: list[int]
) -> None:
    odd = os.fsdecode(b"caf\xe9.png")
    fill(tmp_path / "photos/train", ["a.png", odd])
    (tmp_path / "photos/train" / os.fsdecode(b"bad\xe9.png")).write_bytes(b"")
    for split in ("train_val", "val"):
        fill(tmp_path / "photos" / split, ["a.png"])
    settings = make_settings(sae_datasets={"mine": "photos"})
    save_sae_features(settings, "mine", "enc", "out", ALL_MAY_BE_BAD)
    store = open_features(settings, "mine", "enc", "out", "train")
    assert list(store.keys) == ["a.png", odd]
    assert read_manifest(store.folder)["details"]["bad"] == {"empty file": 1}
    assert [len(open_features(settings, "mine", "enc", "out", split)) for split in SPLITS] == [2, 1, 1]


def test_file_states_see_a_replaced_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert file_states([path]) == ["missing"]
    path.write_bytes(b"one")
    before = file_states([path])
    os.utime(path, ns=(1, 1))
    assert file_states([path]) != before
