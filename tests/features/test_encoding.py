"""From shards of images to files of features: which images are encoded, in what batches, and how bad images are handled."""

import io
import json
import multiprocessing
import os
import re
import signal
import struct
import tarfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data._utils.pin_memory import pin_memory
from tqdm import tqdm

from dncbm.features.datasets import BadImage, open_image
from dncbm.features.datasets.probe import ProbeImages, ProbeShards
from dncbm.features.datasets.sae import WebdatasetShards
from dncbm.features.encoders import Encoder
from dncbm.features.encoding import _Buffers, _Piece, are_from, changed_shards, drop_damaged_records, encode_shards
from dncbm.runs.declarations import Extraction
from dncbm.runs.errors import UserError
from sparse_autoencoder.files import whole_file
from tests.features.conftest import N_IMAGES

pytestmark = pytest.mark.slow

ALL_MAY_BE_BAD = Extraction(batch_size=4, num_workers=0, max_bad_fraction=1.0)
MANY_WORKERS = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def arrays(folder: Path) -> tuple[list[np.ndarray], list[str]]:
    paths = sorted(path for path in folder.glob("*.npy") if ".keys" not in path.name)
    keys = [key for path in paths for key in np.load(path.with_suffix(".keys.npy"))]
    return [np.load(path) for path in paths], keys


class Listing(torch.nn.Module):
    """An image tower that lists the sizes of its batches, and is interrupted at its n-th."""

    def __init__(self, interrupted_at: int | None = None) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.interrupted_at = interrupted_at

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        if len(self.sizes) == self.interrupted_at:
            raise KeyboardInterrupt
        self.sizes.append(len(images))
        return images.mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("batch_size", "num_workers", "batches"),
    [
        (3, 0, [3, 3, 1] * 3),
        (7, 0, [7] * 3),
        (64, 0, [16] * 3),  # padded, so that the last bits do not depend on the number of threads
        (None, 0, [16] * 3),
        (2, 1, [2, 2, 2, 1] * 3),
        (3, 2, [3, 3, 1] * 3),
        (64, 2, [16] * 3),
        (3, 8, [3, 3, 1] * 3),
    ],
)
@MANY_WORKERS
def test_every_image_is_encoded_once_and_as_by_a_plain_loop(
    tmp_path: Path, shards, make_encoder, means, batch_size: int | None, num_workers: int, batches: list[int]
) -> None:
    tower = Listing()
    extraction = Extraction(batch_size=batch_size, num_workers=num_workers)
    details = encode_shards(shards, make_encoder(tower), tmp_path / "features", extraction, "images")
    expected = {
        "images": 3 * N_IMAGES, "transparent": 0, "bad": {}, "warnings": {}, "device": "cpu", "precision": "fp32",
        "batch_size": batch_size or 32,
    }  # fmt: skip
    assert details == expected
    assert sorted(tower.sizes) == sorted(batches)
    found, keys = arrays(tmp_path / "features")
    assert [len(shard) for shard in found] == [N_IMAGES] * 3
    assert keys == [f"{shard * 10 + i:09d}" for shard in range(3) for i in range(N_IMAGES)]
    np.testing.assert_allclose(np.concatenate(found), means(keys), rtol=1e-5)


@pytest.mark.parametrize("is_counted", [False, True])
def test_the_progress_bar_ends_at_the_number_of_images(
    tmp_path: Path, shards, make_encoder, corrupt, capsys, monkeypatch, is_counted: bool
) -> None:
    """Also after an interruption, with bad images, and if shards do not know how many images they hold."""
    monkeypatch.setattr("dncbm.features.encoding.tqdm", partial(tqdm, mininterval=0))
    corrupt(shards, 2, 20, 21)
    if is_counted:
        for path in shards.paths:
            path.with_name(path.stem + "_stats.json").write_text(f'{{"successes": {N_IMAGES}}}')
    extraction = Extraction(batch_size=3, num_workers=0, max_bad_fraction=0.5)
    with pytest.raises(KeyboardInterrupt):
        encode_shards(shards, make_encoder(Listing(interrupted_at=4)), tmp_path / "features", extraction, "images")
    capsys.readouterr()
    encode_shards(shards, make_encoder(), tmp_path / "features", extraction, "some title")
    bars = capsys.readouterr().err.split("\r")
    assert any(" 10/21 " in bar for bar in bars)  # the first shard was kept, three more images are encoded
    assert bars[-1].startswith("some title: 100%")
    assert " 21/21 " in bars[-1]


def test_without_counts_the_total_is_estimated_from_bytes(
    tmp_path: Path, write_tar, random_image, encoded, make_encoder, capsys, monkeypatch
) -> None:
    """From the first batch on; the second tar is four times as large."""
    monkeypatch.setattr("dncbm.features.encoding.tqdm", partial(tqdm, mininterval=0))
    image = encoded(random_image(1, (32, 32)))  # 3 kB, of which headers and blocks are a fifth
    tars = [write_tar(tmp_path / f"{n}.tar", {f"{i}": {"png": image} for i in range(n)}) for n in (10, 40)]
    encode_shards(WebdatasetShards(tuple(tars)), make_encoder(), tmp_path / "f", Extraction(batch_size=5, num_workers=0), "t")
    said = capsys.readouterr().err
    assert re.search(r" 5/\d+ ", said)
    totals = [int(total) for total in re.findall(r" \d+/(\d+) ", said)]
    assert all(40 <= total <= 60 for total in totals), totals
    assert totals[-1] == 50


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_on_a_gpu_batches_are_larger_and_never_padded(tmp_path: Path, shards, make_encoder, means) -> None:
    """The encoder only claims to be on a GPU."""
    tower = Listing()

    class OnGPU(Encoder):
        def encode_images(self, images: torch.Tensor) -> torch.Tensor:
            return tower.encode_image(images).half()

    encoder = OnGPU(**vars(make_encoder()) | {"device": torch.device("cuda:0"), "precision": "fp16"})
    details = encode_shards(shards, encoder, tmp_path / "features", Extraction(num_workers=0), "images")
    assert {key: details[key] for key in ("device", "precision", "batch_size")} == {
        "device": "cuda:0",
        "precision": "fp16",
        "batch_size": 256,
    }
    assert tower.sizes == [N_IMAGES] * 3
    found, keys = arrays(tmp_path / "features")
    assert {shard.dtype for shard in found} == {np.dtype(np.float16)}
    np.testing.assert_allclose(np.concatenate(found), means(keys), rtol=1e-3)


def test_the_number_of_threads_does_not_change_a_bit(tmp_path: Path, shards, make_encoder) -> None:
    """A shard ends with a small batch, which kernels divide among threads differently."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4096), torch.nn.Linear(4096, 8))
    layers.encode_image = layers.forward
    threads = torch.get_num_threads()
    found = []
    try:
        for n_threads in (1, 4):
            torch.set_num_threads(n_threads)
            folder = tmp_path / str(n_threads)
            encode_shards(shards, make_encoder(layers), folder, Extraction(batch_size=32, num_workers=0), "images")
            found.append(files(folder))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


@MANY_WORKERS
@pytest.mark.parametrize("num_workers", [0, 1, 2, 8])
@pytest.mark.parametrize("batches", [0, 2, 3, 5, 8])
def test_an_interrupted_extraction_resumes_to_the_same_bits(
    tmp_path: Path, shards, make_encoder, num_workers: int, batches: int
) -> None:
    alone = Extraction(batch_size=3, num_workers=0)
    details = encode_shards(shards, make_encoder(), tmp_path / "whole", alone, "images")
    tower, extraction = Listing(interrupted_at=batches), replace(alone, num_workers=num_workers)
    with pytest.raises(KeyboardInterrupt):
        encode_shards(shards, make_encoder(tower), tmp_path / "resumed", extraction, "images")
    done = files(tmp_path / "resumed")
    n_done = len([name for name in done if name.endswith("0.npy") or name.endswith("1.npy")])
    resuming = Listing()
    assert encode_shards(shards, make_encoder(resuming), tmp_path / "resumed", extraction, "images") == details
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")
    assert done.items() <= files(tmp_path / "resumed").items()
    assert sum(resuming.sizes) == (3 - n_done) * N_IMAGES


def test_features_of_two_precisions_do_not_mix(tmp_path: Path, shards, make_encoder, refusal) -> None:
    """An extraction that was interrupted on a GPU, in fp16, does not resume on a CPU, in fp32."""
    extraction, folder = Extraction(batch_size=3, num_workers=0), tmp_path / "features"
    with pytest.raises(KeyboardInterrupt):
        encode_shards(shards, replace(make_encoder(Listing(interrupted_at=4)), precision="bf16"), folder, extraction, "images")
    done = files(folder)
    assert "00000.npy" in done
    with refusal(folder, "bf16", "fp32", "remove the folder"):
        encode_shards(shards, make_encoder(), folder, extraction, "images")
    assert files(folder) == done
    encode_shards(shards, replace(make_encoder(), precision="bf16"), folder, extraction, "images")


def test_a_shard_whose_files_are_lost_is_read_again(tmp_path: Path, shards, make_encoder) -> None:
    extraction, folder = Extraction(batch_size=3, num_workers=0), tmp_path / "features"
    encode_shards(shards, make_encoder(), folder, extraction, "images")
    whole = files(folder)
    for lost in ("00001.keys.npy", "00001.json", "00002.npy"):
        (folder / lost).unlink()
        tower = Listing()
        encode_shards(shards, make_encoder(tower), folder, extraction, "images")
        assert files(folder) == whole
        assert sum(tower.sizes) == N_IMAGES


@pytest.mark.parametrize("name", ["00001.npy", "00001.keys.npy"])
@pytest.mark.parametrize(
    "damage",
    [lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:-1]),
     lambda path: path.write_bytes(path.read_bytes()[::-1]), lambda path: path.write_text("<html>"),
     lambda path: np.save(path, np.load(path)[1:])],
    ids=["empty", "cut off", "reversed", "text", "a row less"],
)  # fmt: skip
def test_a_damaged_file_of_an_unfinished_extraction_is_made_again(
    tmp_path: Path, shards, make_encoder, name: str, damage: Callable[[Path], object]
) -> None:
    extraction, folder = Extraction(batch_size=3, num_workers=0), tmp_path / "features"
    encode_shards(shards, make_encoder(), folder, extraction, "images")
    whole = files(folder)
    damage(folder / name)
    encode_shards(shards, make_encoder(), folder, extraction, "images")
    assert files(folder) == whole


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '{"images": 7}', "[" * 100_000, '{"source": 1, "shards": 3, "state": null}']
)
def test_a_damaged_record_names_its_file_and_can_be_dropped(
    tmp_path: Path, shards, make_encoder, refusal, content: str
) -> None:
    extraction, folder = Extraction(batch_size=3, num_workers=0), tmp_path / "features"
    encode_shards(shards, make_encoder(), folder, extraction, "images")
    whole = files(folder)
    (folder / "00001.json").write_text(content)
    with refusal(folder / "00001.json", "delete it", "--overwrite"):
        encode_shards(shards, make_encoder(), folder, extraction, "images")
    with refusal(folder / "00001.json"):
        are_from(shards, folder)
    drop_damaged_records(folder)
    assert set(whole) - set(files(folder)) == {"00001.json"}
    encode_shards(shards, make_encoder(), folder, extraction, "images")
    assert files(folder) == whole


def test_changed_shards_are_told_by_every_byte(tmp_path: Path, shards, make_encoder) -> None:
    folder = tmp_path / "features"
    encode_shards(shards, make_encoder(), folder, ALL_MAY_BE_BAD, "images")
    assert changed_shards(shards, folder) == []
    content = bytearray(shards.paths[2].read_bytes())
    with tarfile.open(shards.paths[2]) as tar:
        content[tar.getmembers()[5].offset_data + 60] ^= 1
    shards.paths[2].write_bytes(content)
    assert changed_shards(shards, folder) == [2]


def test_old_features_never_lie_beside_new_keys(tmp_path: Path, shards, make_encoder, corrupt, monkeypatch) -> None:
    """A shard whose images were fixed is made again, and the process dies before it has written the features."""
    corrupt(shards, 1, 12)
    extraction, folder = Extraction(batch_size=3, num_workers=0, max_bad_fraction=0.1), tmp_path / "features"
    encode_shards(shards, make_encoder(), folder, extraction, "images")
    corrupt(shards, 1)

    def dies(path: Path, **options: bool) -> AbstractContextManager[Path]:
        if path.name == "00001.npy":
            raise KeyboardInterrupt
        return whole_file(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr("dncbm.features.encoding.whole_file", dies)
        with pytest.raises(KeyboardInterrupt):
            encode_shards(shards, make_encoder(), folder, extraction, "images")
    assert np.load(folder / "00001.keys.npy")[2] == "000000012"
    assert not (folder / "00001.npy").exists()
    encode_shards(shards, make_encoder(), folder, extraction, "images")
    encode_shards(shards, make_encoder(), tmp_path / "whole", extraction, "images")
    assert files(folder) == files(tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------- bad images


@pytest.fixture
def corrupt(write_tar, random_image, encoded) -> Callable[..., None]:
    """Replaces images of a shard by bytes that are no images."""

    def write(shards: WebdatasetShards, shard: int, *bad: int) -> None:
        seeds = range(shard * 10, shard * 10 + N_IMAGES)
        samples = {f"{seed:09d}": {"png": b"?" if seed in bad else encoded(random_image(seed))} for seed in seeds}
        write_tar(shards.paths[shard], samples)

    return write


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_skipped_and_counted_by_reason(
    tmp_path: Path, shards, make_encoder, means, write_tar, random_image, encoded, corrupt, capsys, num_workers: int
) -> None:
    corrupt(shards, 1, 10, 13, 16)
    whole = encoded(random_image(20, (64, 64)))
    write_tar(shards.paths[2], {"20": {"png": whole[: len(whole) // 2]}, "21": {"txt": b""}, "22": {"png": b"none"}})
    extraction = Extraction(batch_size=2, num_workers=num_workers, max_bad_fraction=0.5)
    details = encode_shards(shards, make_encoder(), tmp_path / "features", extraction, "images")
    assert details["images"] == 11
    assert details["bad"] == {"UnidentifiedImageError": 4, "OSError": 1, "no image in the sample": 1}
    assert "skipped 6 unreadable images: 4 UnidentifiedImageError, 1 " in capsys.readouterr().out
    found, keys = arrays(tmp_path / "features")
    assert [int(key) for key in keys] == [0, 1, 2, 3, 4, 5, 6, 11, 12, 14, 15]
    np.testing.assert_allclose(np.concatenate([shard for shard in found if len(shard)]), means(keys), rtol=1e-5)
    listed = [json.loads((tmp_path / f"features/0000{i}.json").read_text())["bad_keys"] for i in range(3)]
    assert listed == [[], ["000000010", "000000013", "000000016"], ["20", "22", None]]


@pytest.mark.parametrize("into_the_member", [0, 100, 600])
def test_images_lost_at_the_end_of_a_cut_tar_are_counted(
    tmp_path: Path, shards, make_encoder, refusal, into_the_member: int
) -> None:
    path = shards.paths[1]
    path.with_name("00001_stats.json").write_text(f'{{"successes": {N_IMAGES}}}')
    with tarfile.open(path) as tar:
        cut = tar.getmembers()[3].offset + into_the_member
    path.write_bytes(path.read_bytes()[:cut])
    extraction = Extraction(batch_size=2, num_workers=0, max_bad_fraction=0.1)
    with refusal("4 of 21", "--max_bad_fraction"):
        encode_shards(shards, make_encoder(), tmp_path / "features", extraction, "images")


def test_too_many_bad_images_fail_the_stage_and_keep_what_is_extracted(
    tmp_path: Path, shards, make_encoder, corrupt, refusal
) -> None:
    corrupt(shards, 1, 10, 11, 12)
    folder, strict = tmp_path / "features", Extraction(batch_size=4, num_workers=0, max_bad_fraction=2.9 / 21)
    with refusal("3 of 21", "UnidentifiedImageError", "--max_bad_fraction", shards.paths[1], folder):
        encode_shards(shards, make_encoder(), folder, strict, "images")
    kept = files(folder)
    for path in shards.paths:  # the shards are not read again
        path.unlink()
    allowed = replace(strict, max_bad_fraction=3 / 21)  # exactly the fraction that is bad
    assert encode_shards(shards, make_encoder(), folder, allowed, "images")["images"] == 18
    assert files(folder) == kept


def test_what_a_damaged_tar_has_lost_is_estimated_from_the_others(tmp_path: Path, shards, make_encoder, refusal) -> None:
    """Without img2dataset's counts: one image of seven is left, and the damage counts as the other six."""
    path = shards.paths[1]
    with tarfile.open(path) as tar:
        cut = tar.getmembers()[1].offset + 600
    path.write_bytes(path.read_bytes()[:cut])
    with refusal("6 of 21 images", "6 cut off or damaged tar", "estimated", f"most of them in {path}"):
        encode_shards(shards, make_encoder(), tmp_path / "f", replace(ALL_MAY_BE_BAD, max_bad_fraction=5.9 / 21), "images")
    details = encode_shards(shards, make_encoder(), tmp_path / "f", replace(ALL_MAY_BE_BAD, max_bad_fraction=6 / 21), "images")
    assert (details["images"], details["bad"]) == (15, {"cut off or damaged tar": 6})


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x1f\x8b\x08" + bytes(100)])
def test_a_shard_of_which_nothing_can_be_read_fails_the_stage(
    tmp_path: Path, shards, make_encoder, refusal, content: bytes
) -> None:
    shards.paths[1].write_bytes(content)
    with refusal("no image could be read from", shards.paths[1], "leave it out"):
        encode_shards(shards, make_encoder(), tmp_path / "f", ALL_MAY_BE_BAD, "images")


def test_no_readable_image_at_all_is_an_error(tmp_path: Path, make_encoder, write_tar, refusal) -> None:
    path = write_tar(tmp_path / "0.tar", {"a": {"png": b"none"}})
    with refusal(path, "no image could be read"):
        encode_shards(WebdatasetShards((path,)), make_encoder(), tmp_path / "f", ALL_MAY_BE_BAD, "images")


def test_an_empty_split_is_an_error(tmp_path: Path, make_encoder, refusal) -> None:
    images = ProbeImages(np.zeros(0, np.int64), ("a",), Image.new, None, "hash")
    with refusal("no image could be read", "the split is empty"):
        encode_shards(ProbeShards(images, np.arange(0)), make_encoder(), tmp_path / "f", ALL_MAY_BE_BAD, "images")


class NaNFor(torch.nn.Module):
    """Gives NaN or infinity for one image."""

    def __init__(self, pixels: np.ndarray, value: float) -> None:
        super().__init__()
        self.bad, self.value = pixels.mean() / 255, value

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        features = images.mean(dim=(2, 3))
        features[(features.mean(dim=1) - self.bad).abs() < 1e-6, 1] = self.value
        return features


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_features_that_are_not_finite_are_named_and_not_written(
    tmp_path: Path, shards, make_encoder, random_image, refusal, value: float
) -> None:
    encoder = make_encoder(NaNFor(np.asarray(random_image(14)), value))
    with refusal("000000014", shards.paths[1]):
        encode_shards(shards, encoder, tmp_path / "features", ALL_MAY_BE_BAD, "images")
    assert sorted(path.name for path in (tmp_path / "features").glob("*.npy")) == ["00000.keys.npy", "00000.npy"]


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be this large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("pixels", [90_000_000, 170_000_000, 400_000_000])
def test_a_decompression_bomb_is_named(pixels: int) -> None:
    with pytest.raises(BadImage, match="decompression bomb: more than 89478485 pixels"):
        open_image(bomb(pixels // 10_000, 10_000))


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
    details = encode_shards(WebdatasetShards((path,)), make_encoder(), tmp_path / "features", ALL_MAY_BE_BAD, "images")
    assert arrays(tmp_path / "features")[1] == ["good", "good too"]
    assert details["bad"] == {
        "empty file": 1,
        "UnidentifiedImageError": 1,
        "OSError": 1,
        "decompression bomb: more than 89478485 pixels": 1,
        "no image in the sample": 1,
    }


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_transparency_and_warnings_of_pil_are_counted(
    tmp_path: Path, write_tar, make_encoder, random_image, encoded, recwarn, num_workers: int
) -> None:
    """A worker process cannot show its warnings, which would tear the progress bar."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0"  # cut off in its first entry
    plain = encoded(random_image(1), "jpeg")
    warns = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
    clear = encoded(random_image(2).convert("RGBA").rotate(10))
    samples = {"a": warns, "b": clear, "c": encoded(random_image(3).convert("RGBA")), "d": warns, "e": clear, "f": warns[:-90]}
    path = write_tar(tmp_path / "0.tar", {key: {"jpg": content} for key, content in samples.items()})

    def preprocess(image: Image.Image) -> torch.Tensor:
        warnings.warn(f"image of {image.width} pixels", UserWarning, stacklevel=2)
        warnings.warn("of code", DeprecationWarning, stacklevel=2)
        return make_encoder().preprocess(image)

    encoder = replace(make_encoder(), preprocess=preprocess)
    extraction = Extraction(batch_size=2, num_workers=num_workers, max_bad_fraction=1)
    details = encode_shards(WebdatasetShards((path,)), encoder, tmp_path / "f", extraction, "images")
    assert details["transparent"] == 2
    assert details["warnings"]["image of N pixels"] == 5
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


@pytest.mark.parametrize(("background", "value"), [("none", 0), ("white", 1), ("black", 0)])
def test_the_background_reaches_the_features(
    tmp_path: Path, write_tar, make_encoder, encoded, background: str, value: int
) -> None:
    path = write_tar(tmp_path / "0.tar", {"a": {"png": encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0)))}})
    extraction = replace(ALL_MAY_BE_BAD, background=background)
    encode_shards(WebdatasetShards((path,)), make_encoder(), tmp_path / "f", extraction, "images")
    np.testing.assert_array_equal(np.load(tmp_path / "f/00000.npy"), np.full((1, 3), value))


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
    elif kind == "animated":
        frames = [rgb.rotate(90), rgb.rotate(180)]
        rgb.save(file, "webp", save_all=True, append_images=frames, duration=40, lossless=True)
    elif kind == "turned by EXIF":
        exif = Image.Exif()
        exif[0x0112] = 6
        rgb.save(file, "jpeg", exif=exif, quality=95)
    else:
        rgb.convert({"transparent": "RGBA", "grey": "L", "black and white": "1"}[kind]).save(file, "png")
    return file.getvalue()


KINDS = ("CMYK", "16 bit", "palette", "transparent", "grey", "black and white", "animated", "turned by EXIF")


def test_the_encoders_preprocessing_gets_unusual_images_in_rgb(tmp_path: Path, write_tar) -> None:
    """As the authors' loaders make them, before they are resized; 16 bits are scaled to 8, where PIL would clip them."""
    preprocess = image_transform_v2(PreprocessCfg(size=(32, 32)), is_train=False)  # open_clip's
    tower = torch.nn.Flatten()
    tower.encode_image = tower.forward
    encoder = Encoder("pixels", tower, preprocess, open_clip.tokenize, torch.device("cpu"))
    images = {kind: unusual(kind) for kind in KINDS}
    path = write_tar(tmp_path / "0.tar", {kind: {"jpg": content} for kind, content in images.items()})
    details = encode_shards(WebdatasetShards((path,)), encoder, tmp_path / "features", ALL_MAY_BE_BAD, "images")
    assert not details["bad"]
    (found,), keys = arrays(tmp_path / "features")
    assert keys == list(KINDS)
    for row, (kind, content) in zip(found, images.items(), strict=True):
        image = Image.open(io.BytesIO(content))
        if kind == "16 bit":
            image = Image.fromarray((np.asarray(image) / 256).astype(np.uint8))
        np.testing.assert_array_equal(row, preprocess(image.convert("RGB")).flatten().numpy())


# ------------------------------------------------------------------------------------------ worker processes, memory


def test_there_are_no_more_processes_than_shards_to_read(tmp_path: Path, shards, make_encoder, monkeypatch) -> None:
    n_processes = []

    def in_this_process(reader: IterableDataset, num_workers: int, **_: object) -> DataLoader:
        n_processes.append(num_workers)
        return DataLoader(reader, batch_size=None)

    monkeypatch.setattr("dncbm.features.encoding.DataLoader", in_this_process)
    for folder, num_workers in (("a", 0), ("b", 2), ("c", 8), ("c", 8)):
        extraction = Extraction(batch_size=4, num_workers=num_workers)
        encode_shards(shards, make_encoder(), tmp_path / folder, extraction, "images")
    assert n_processes == [0, 2, 3, 0]


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_workers_that_share_a_shard_write_what_one_writes(
    tmp_path: Path, make_encoder, write_tar, random_image, encoded, num_workers: int
) -> None:
    """The later of two images is decoded first. Damage is counted in the order of the tar, and batches are the same."""
    half = encoded(random_image(9, (64, 64)))[:2000]
    clear = encoded(random_image(2).convert("RGBA").rotate(10))
    members = {f"{n}": {"png": encoded(random_image(n))} for n in range(9)}
    members |= {
        "lost": {"txt": b""},
        "clear": {"png": clear},
        "cut": {"png": half},
        "empty": {"png": b""},
        "text": {"jpg": b"?"},
    }
    members |= {f"{n}": {"png": encoded(random_image(n))} for n in range(20, 29)}
    shards = WebdatasetShards((write_tar(tmp_path / "0.tar", members),))

    def preprocess(image: Image.Image) -> torch.Tensor:
        number = np.asarray(image).sum()
        time.sleep(number % 3 / 100)
        warnings.warn("even" if number % 2 else "odd", UserWarning, stacklevel=2)
        return make_encoder().preprocess(image)

    def extract(name: str, num_workers: int) -> tuple[dict[str, bytes], list[int], dict[str, object]]:
        extraction, tower = replace(ALL_MAY_BE_BAD, num_workers=num_workers), Listing()
        encoder = replace(make_encoder(tower), preprocess=preprocess)
        details = encode_shards(shards, encoder, tmp_path / name, extraction, "images")
        return files(tmp_path / name), tower.sizes, details

    expected = extract("alone", 0)
    assert expected[2]["bad"] == {"OSError": 1, "empty file": 1, "UnidentifiedImageError": 1, "no image in the sample": 1}
    assert sum(expected[2]["warnings"].values()) == expected[2]["images"] == 19
    assert extract("shared", num_workers) == expected


@pytest.mark.parametrize(("n_shards", "num_workers"), [(1, 4), (2, 5), (3, 2), (5, 3)])
@MANY_WORKERS
def test_all_workers_decode_at_once_however_few_shards_are_left(
    tmp_path: Path, make_encoder, write_tar, encoded, n_shards: int, num_workers: int
) -> None:
    """White images, those of the last shards, wait until as many are being decoded as there are workers."""
    n_last = n_shards % num_workers or num_workers
    images = ["black"] * (n_shards - n_last) + ["white"] * n_last
    tars = [
        write_tar(tmp_path / f"{n}.tar", {f"{i}": {"png": encoded(Image.new("RGB", (8, 8), colour))} for i in range(6)})
        for n, colour in enumerate(images)
    ]
    all_here, have_met = multiprocessing.Barrier(num_workers), multiprocessing.Event()

    def preprocess(image: Image.Image) -> torch.Tensor:
        if image.getpixel((0, 0)) == (255, 255, 255) and not have_met.is_set():
            all_here.wait(timeout=30)
            have_met.set()
        return make_encoder().preprocess(image)

    encoder = replace(make_encoder(), preprocess=preprocess)
    extraction = replace(ALL_MAY_BE_BAD, num_workers=num_workers)
    details = encode_shards(WebdatasetShards(tuple(tars)), encoder, tmp_path / "features", extraction, "images")
    assert (details["images"], details["bad"]) == (6 * n_shards, {})
    assert have_met.is_set()


@pytest.mark.parametrize("num_workers", [1, 8])
@MANY_WORKERS
def test_a_worker_that_is_killed_is_an_error_of_one_line(
    tmp_path: Path, shards, make_encoder, refusal, num_workers: int
) -> None:
    def die(image: Image.Image) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    encoder = replace(make_encoder(), preprocess=die)
    with refusal("a process that decodes images was killed", "--num_workers"):
        encode_shards(shards, encoder, tmp_path / "f", Extraction(batch_size=2, num_workers=num_workers), "images")


@pytest.mark.parametrize("num_workers", [0, 1, 8])
@MANY_WORKERS
def test_a_missing_tar_is_an_error_of_one_line(tmp_path: Path, shards, make_encoder, num_workers: int) -> None:
    shards.paths[1].unlink()
    extraction = Extraction(batch_size=2, num_workers=num_workers)
    with pytest.raises(UserError) as caught:
        encode_shards(shards, make_encoder(), tmp_path / "f", extraction, "images")
    expected = f"cannot read {shards.paths[1]}: No such file or directory; run the same command once it can be read"
    assert str(caught.value) == expected


def test_a_buffer_is_used_again_when_its_images_are_encoded_and_not_before() -> None:
    buffers = _Buffers(batch_size=3)

    def batch(value: float, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        for _ in range(n):
            buffers.add(torch.full((3, 2, 2), value))
        return buffers.take()

    ones, ones_in_use = batch(1, 3)
    twos, _ = batch(2, 2)
    assert len(batch(0, 0)[0]) == 0
    assert (ones == 1).all()
    assert (twos == 2).all()
    ones_in_use.fill_(False)
    threes, _ = batch(3, 1)
    assert threes.shape == (1, 3, 2, 2)
    assert threes.data_ptr() == ones.data_ptr()
    assert (twos == 2).all()
    assert all(images.is_shared() for images in (ones, twos, threes))


def test_encoding_reuses_buffers(tmp_path: Path, shards, make_encoder) -> None:
    addresses = []

    class Watching(Encoder):
        def encode_images(self, images: torch.Tensor) -> torch.Tensor:
            addresses.append(images.data_ptr())
            return super().encode_images(images)

    encoder = Watching(**vars(make_encoder()))
    encode_shards(shards, encoder, tmp_path / "features", Extraction(batch_size=3, num_workers=0), "images")
    assert len(addresses) == 9
    assert len(set(addresses)) == 1


def test_a_pinned_batch_leaves_its_buffer(monkeypatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # needs a GPU
    buffers = _Buffers(batch_size=2)
    buffers.add(torch.ones(3, 2, 2))
    images, in_use = buffers.take()
    pinned = pin_memory(_Piece(0, images, in_use, ["a"], None))
    assert not in_use
    images.fill_(5)
    assert (pinned.images == 1).all()
    assert pinned.keys == ["a"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize("is_pinned", [False, True])
def test_the_buffers_of_a_worker_stay_mapped(tmp_path: Path, shards, make_encoder, monkeypatch, is_pinned: bool) -> None:
    """Mapping one again for each batch costs as much as copying the batch."""
    mapped: list[set[str]] = []

    class Watching(Encoder):
        def encode_images(self, images: torch.Tensor) -> torch.Tensor:
            mapped.append(set(large_shared_memory()))
            return images.mean(dim=(2, 3))

    def pinning(*arguments: object, **options: object) -> Iterator[_Piece]:
        for piece in DataLoader(*arguments, **options):
            yield pin_memory(piece) if is_pinned else piece

    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # needs a GPU
    monkeypatch.setattr("dncbm.features.encoding.DataLoader", pinning)
    encoder = Watching(**vars(make_encoder()) | {"preprocess": lambda _: torch.ones(3, 64, 64)})
    encode_shards(shards, encoder, tmp_path / "features", Extraction(batch_size=1, num_workers=1), "images")
    assert len(mapped) == 3 * N_IMAGES
    assert mapped[0]
    for before, after in pairwise(mapped):
        assert before <= after


def large_shared_memory() -> Iterator[str]:
    """The inodes of torch's shared memory in this process, of more than a page."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, last = line.split()[0].partition("-")
        if "/dev/shm/torch_" in line and int(last, 16) - int(first, 16) > 4096:
            yield line.split()[4]
