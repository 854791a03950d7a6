import os
import signal
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

import dncbm.datasets.probe
import dncbm.features
from dncbm.artifacts import Artifacts
from dncbm.datasets.cc3m import WebdatasetShards
from dncbm.datasets.probe import split_train
from dncbm.encoders import Encoder
from dncbm.errors import StaleArtifact, UserError
from dncbm.extraction import Extraction, _Buffers, _Piece, extract
from dncbm.features import (
    FeatureStore,
    open_features,
    probe_class_names,
    probe_labels,
    save_probe_features,
    save_sae_features,
)
from dncbm.manifests import Outcome, read_manifest
from dncbm.settings import SPLITS, Settings

# ---------------------------------------------------------------------------------------------------------------- store


@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any),
    half=st.booleans(),
    data=st.data(),
)
def test_gather_is_plain_indexing(
    tmp_path_factory, make_store, sizes: list[int], half: bool, data: st.DataObject
) -> None:
    dtype = np.float16 if half else np.float32
    rows = np.random.default_rng(sum(sizes)).normal(size=(sum(sizes), 3)).astype(dtype)
    shards = np.split(rows, np.cumsum(sizes)[:-1])
    store = make_store(tmp_path_factory.mktemp("store"), shards)
    indices = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=20)), dtype=np.int64)
    gathered = store.gather(indices)
    assert gathered.dtype == torch.float32
    np.testing.assert_array_equal(gathered.numpy(), rows[indices].astype(np.float32))


def test_a_store_is_its_shards_in_order(tmp_path: Path, make_store) -> None:
    rows = np.arange(24, dtype=np.float16).reshape(8, 3)
    shards = [rows[:3], np.empty((0, 0), np.float32), rows[3:4], rows[4:]]
    keys = [np.array(["a", "b", "c"]), np.array([]), np.array(["longer"]), np.array(["e", "f", "g", "h"])]
    store = make_store(tmp_path / "store", shards, keys)
    assert len(store) == 8
    assert store.width == 3
    assert list(store.keys) == ["a", "b", "c", "longer", "e", "f", "g", "h"]
    for batch_size, expected in ((2, [2, 1, 1, 2, 2]), (3, [3, 1, 3, 1]), (100, [3, 1, 4])):
        batches = list(store.batches(batch_size))
        assert [len(batch) for batch in batches] == expected
        assert all(batch.dtype == torch.float32 for batch in batches)
        np.testing.assert_array_equal(torch.cat(batches).numpy(), rows.astype(np.float32))
    np.testing.assert_array_equal(torch.cat(list(store.shard_batches(2, 3))).numpy(), rows[4:].astype(np.float32))
    assert store.describe(4) == f"row 0 of {tmp_path / 'store' / '00003.npy'}"
    assert store.describe(2) == f"row 2 of {tmp_path / 'store' / '00000.npy'}"


def test_rows_that_are_not_there_are_refused(tmp_path: Path, make_store) -> None:
    store = make_store(tmp_path / "store", [np.ones((3, 2), np.float32)])
    for index in (3, -1):
        with pytest.raises(IndexError):
            store.gather(np.array([0, index]))


def test_a_store_that_is_missing_unfinished_or_empty_is_refused(tmp_path: Path, make_store, refusal) -> None:
    folder = tmp_path / "store"
    with refusal(folder, "not there", "the command"):
        FeatureStore(folder, "the command")
    make_store(folder, [np.ones((2, 2))])
    (folder / "manifest.json").unlink()
    with refusal(folder, "not finished", "the command"):
        FeatureStore(folder, "the command")
    with refusal(tmp_path / "empty", "a command"):
        make_store(tmp_path / "empty", [np.empty((0, 0))])


def test_what_a_killed_process_left_is_not_a_shard(tmp_path: Path, make_store) -> None:
    store = make_store(tmp_path / "store", [np.ones((3, 2), np.float32)])
    np.save(store.folder / ".00000-x1y2z3.npy", np.zeros((3, 2), np.float32))
    assert len(FeatureStore(store.folder, "a command")) == 3


# ----------------------------------------------------------------------------------------------------------- extraction

N_IMAGES = 7


@pytest.fixture
def shards(tmp_path: Path, write_tar, random_image, encoded) -> WebdatasetShards:
    """Three shards of seven images; the seed of an image is its key."""
    return WebdatasetShards(
        tuple(
            write_tar(
                tmp_path / f"tars/{shard:05d}.tar",
                {
                    f"{seed:09d}": {"png": encoded(random_image(seed))}
                    for seed in range(shard * 10, shard * 10 + N_IMAGES)
                },
            )
            for shard in range(3)
        )
    )


@pytest.fixture
def means(random_image) -> Callable[[list[str]], np.ndarray]:
    """The features of images, by a plain loop."""

    def loop(keys: list[str]) -> np.ndarray:
        return np.array([np.asarray(random_image(int(key))).mean(axis=(0, 1)) / 255 for key in keys])

    return loop


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def arrays(folder: Path) -> tuple[list[np.ndarray], list[str]]:
    paths = sorted(path for path in folder.glob("*.npy") if ".keys" not in path.name)
    keys = [key for path in paths for key in np.load(path.with_suffix(".keys.npy"))]
    return [np.load(path) for path in paths], keys


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [3, 7, 64])
def test_features_are_those_of_a_plain_loop(
    tmp_path: Path, shards, make_encoder, means, num_workers: int, batch_size: int
) -> None:
    folder = tmp_path / "features"
    details = extract(shards, make_encoder(), folder, Extraction("cpu", batch_size, num_workers), "images")
    found, keys = arrays(folder)
    assert details == {
        "images": 3 * N_IMAGES,
        "bad": {},
        "device": "cpu",
        "precision": "fp32",
        "batch_size": batch_size,
    }
    assert [len(shard) for shard in found] == [N_IMAGES] * 3
    assert keys == [f"{shard * 10 + i:09d}" for shard in range(3) for i in range(N_IMAGES)]
    np.testing.assert_allclose(np.concatenate(found), means(keys), rtol=1e-5)


class Counts(torch.nn.Module):
    """An image tower that counts the images it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.images = 0

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        self.images += len(images)
        return images.mean(dim=(2, 3))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_every_image_is_encoded_once(tmp_path: Path, shards, make_encoder, num_workers: int) -> None:
    counts = Counts()
    extract(shards, make_encoder(counts), tmp_path / "features", Extraction("cpu", 2, num_workers), "images")
    assert counts.images == 3 * N_IMAGES


def corrupt(shards: WebdatasetShards, write_tar, random_image, encoded, shard: int, seeds: tuple[int, ...]) -> None:
    """Replace images of a shard by bytes that are none."""
    first = shard * 10
    samples = {
        f"{seed:09d}": {"png": b"no image" if seed in seeds else encoded(random_image(seed))}
        for seed in range(first, first + N_IMAGES)
    }
    write_tar(shards.paths[shard], samples)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_skipped_and_counted_by_reason(
    tmp_path: Path, shards, make_encoder, means, write_tar, random_image, encoded, num_workers: int
) -> None:
    corrupt(shards, write_tar, random_image, encoded, 1, (10, 13, 16))
    whole = encoded(random_image(20, (64, 64)))
    write_tar(shards.paths[2], {"20": {"png": whole[: len(whole) // 2]}, "21": {"txt": b""}, "22": {"png": b"none"}})
    extraction = Extraction("cpu", 2, num_workers, max_bad_fraction=0.5)
    details = extract(shards, make_encoder(), tmp_path / "features", extraction, "images")
    assert details["images"] == 11
    assert details["bad"] == {"UnidentifiedImageError": 4, "OSError": 1, "no image in the sample": 1}
    found, keys = arrays(tmp_path / "features")
    assert [int(key) for key in keys] == [0, 1, 2, 3, 4, 5, 6, 11, 12, 14, 15]
    np.testing.assert_allclose(np.concatenate([shard for shard in found if len(shard)]), means(keys), rtol=1e-5)


@pytest.mark.parametrize("into_the_member", [0, 100, 600])
def test_images_that_a_cut_off_tar_lost_are_counted(
    tmp_path: Path, shards, make_encoder, refusal, into_the_member: int
) -> None:
    path = shards.paths[1]
    path.with_name("00001_stats.json").write_text(f'{{"successes": {N_IMAGES}}}')
    with tarfile.open(path) as tar:
        cut = tar.getmembers()[3].offset + into_the_member
    path.write_bytes(path.read_bytes()[:cut])
    with refusal("4 of 21", "--max_bad_fraction"):
        extract(shards, make_encoder(), tmp_path / "features", Extraction("cpu", 2, 0, max_bad_fraction=0.1), "images")


def test_too_many_bad_images_fail_the_stage_and_keep_what_is_extracted(
    tmp_path: Path, shards, make_encoder, write_tar, random_image, encoded, refusal
) -> None:
    corrupt(shards, write_tar, random_image, encoded, 1, (10, 11, 12))
    folder = tmp_path / "features"
    with refusal("3 of 21", "UnidentifiedImageError", "--max_bad_fraction", "0.1"):
        extract(shards, make_encoder(), folder, Extraction("cpu", 4, 0, max_bad_fraction=0.1), "images")
    kept = files(folder)
    for path in shards.paths:  # nothing is read again
        path.unlink()
    details = extract(shards, make_encoder(), folder, Extraction("cpu", 4, 0, max_bad_fraction=0.15), "images")
    assert details["images"] == 18
    assert files(folder) == kept


def test_exactly_the_fraction_is_allowed(
    tmp_path: Path, shards, make_encoder, write_tar, random_image, encoded, refusal
) -> None:
    corrupt(shards, write_tar, random_image, encoded, 1, (10, 11, 12))
    extract(shards, make_encoder(), tmp_path / "a", Extraction("cpu", 4, 0, max_bad_fraction=3 / 21), "images")
    with refusal("3 of 21"):
        extract(shards, make_encoder(), tmp_path / "b", Extraction("cpu", 4, 0, max_bad_fraction=2.9 / 21), "images")


def test_no_readable_image_at_all_is_an_error(tmp_path: Path, make_encoder, write_tar, refusal) -> None:
    path = write_tar(tmp_path / "0.tar", {"a": {"png": b"none"}})
    with refusal(path):
        extract(WebdatasetShards((path,)), make_encoder(), tmp_path / "f", Extraction("cpu", 4, 0, 1.0), "images")


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
def test_features_that_are_not_numbers_are_named_and_not_written(
    tmp_path: Path, shards, make_encoder, random_image, refusal, value: float
) -> None:
    encoder = make_encoder(NaNFor(np.asarray(random_image(14)), value))
    with refusal("000000014", shards.paths[1]):
        extract(shards, encoder, tmp_path / "features", Extraction("cpu", 4, 0), "images")
    assert sorted(path.name for path in (tmp_path / "features").glob("*.npy")) == ["00000.keys.npy", "00000.npy"]


def test_a_decoding_process_that_is_killed_is_an_error_of_one_line(
    tmp_path: Path, shards, make_encoder, refusal
) -> None:
    def die(image: Image.Image) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    with refusal("a process that decodes images was killed", "--num_workers"):
        extract(shards, replace(make_encoder(), preprocess=die), tmp_path / "f", Extraction("cpu", 2, 1), "images")


def test_a_tar_that_is_gone_is_an_error_of_one_line(tmp_path: Path, shards, make_encoder, refusal) -> None:
    shards.paths[1].unlink()
    for num_workers in (0, 1):
        with refusal(f"cannot read {shards.paths[1]}", "No such file"):
            extract(shards, make_encoder(), tmp_path / "f", Extraction("cpu", 2, num_workers), "images")


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


class DiesAfter(torch.nn.Module):
    """An image tower that is interrupted at its n-th batch."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.left = batches

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return images.mean(dim=(2, 3))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("batches", [0, 2, 3, 5, 8])
def test_an_interrupted_extraction_goes_on_to_the_same_bits(
    tmp_path: Path, shards, make_encoder, num_workers: int, batches: int
) -> None:
    extraction = Extraction("cpu", 3, num_workers)
    details = extract(shards, make_encoder(), tmp_path / "whole", extraction, "images")
    with pytest.raises(KeyboardInterrupt):
        extract(shards, make_encoder(DiesAfter(batches)), tmp_path / "resumed", extraction, "images")
    done = files(tmp_path / "resumed")
    assert extract(shards, make_encoder(), tmp_path / "resumed", extraction, "images") == details
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")
    assert done.items() <= files(tmp_path / "resumed").items()


def test_a_shard_whose_keys_are_lost_is_read_again(tmp_path: Path, shards, make_encoder) -> None:
    extract(shards, make_encoder(), tmp_path / "features", Extraction("cpu", 3, 0), "images")
    whole = files(tmp_path / "features")
    for lost in ("00001.keys.npy", "00001.json", "00002.npy"):
        (tmp_path / "features" / lost).unlink()
    extract(shards, make_encoder(), tmp_path / "features", Extraction("cpu", 3, 0), "images")
    assert files(tmp_path / "features") == whole


# --------------------------------------------------------------------------------------------------------------- stages


@pytest.fixture
def stage_encoder(monkeypatch, make_encoder) -> Iterator[list[Encoder]]:
    """The stages load this encoder, whatever its name; what was loaded is listed."""
    loaded: list[Encoder] = []

    def load(*_: object) -> Encoder:
        loaded.append(make_encoder())
        return loaded[-1]

    monkeypatch.setattr(dncbm.features, "load_encoder", load)
    monkeypatch.setattr(dncbm.features, "describe_encoder", lambda _, name: {"encoder": name})
    return loaded


EXTRACTION = Extraction("cpu", 4, 0, max_bad_fraction=0.2)


class TestStageOfTheSAE:
    @pytest.fixture
    def settings(self, make_settings: Callable[..., Settings], shards: WebdatasetShards, stage_encoder) -> Settings:
        patterns = dict(zip(SPLITS, ("tars/00000.tar", "tars/00001.tar", "tars/00002.tar"), strict=True))
        return make_settings(sae_datasets={"mine": patterns})

    def test_every_split_is_a_finished_store(self, settings: Settings, means) -> None:
        assert save_sae_features(settings, "mine", "enc", "out", EXTRACTION) is Outcome.RAN
        for number, split in enumerate(SPLITS):
            store = open_features(settings, "mine", "enc", "out", split)
            assert list(store.keys) == [f"{number * 10 + i:09d}" for i in range(N_IMAGES)]
            np.testing.assert_allclose(store.gather(np.arange(N_IMAGES)).numpy(), means(store.keys), rtol=1e-5)
            manifest = read_manifest(store.folder)
            assert manifest["settings"] == {"encoder": "enc", "hook": "out", "precision": "the device's"}
            assert manifest["details"]["images"] == N_IMAGES

    def test_done_is_not_done_again(self, settings: Settings, stage_encoder: list[Encoder]) -> None:
        save_sae_features(settings, "mine", "enc", "out", EXTRACTION)
        assert save_sae_features(settings, "mine", "enc", "out", EXTRACTION) is Outcome.ALREADY_DONE
        assert len(stage_encoder) == 1

    def test_a_damaged_shard_is_named_and_made_again_when_asked(self, settings: Settings) -> None:
        save_sae_features(settings, "mine", "enc", "out", EXTRACTION)
        folder = open_features(settings, "mine", "enc", "out", "train").folder
        whole = (folder / "00000.npy").read_bytes()
        (folder / "00000.npy").write_bytes(whole[:-10])
        with pytest.raises(StaleArtifact, match="has changed since it was made"):
            save_sae_features(settings, "mine", "enc", "out", EXTRACTION)
        overwriting = Extraction("cpu", 4, 0, overwrite=True)
        assert save_sae_features(settings, "mine", "enc", "out", overwriting) is Outcome.RAN
        assert (folder / "00000.npy").read_bytes() == whole

    def test_other_shards_are_refused_until_overwritten(
        self, settings: Settings, shards: WebdatasetShards, write_tar, random_image, encoded
    ) -> None:
        save_sae_features(settings, "mine", "enc", "out", EXTRACTION)
        more = {f"{seed:09d}": {"png": encoded(random_image(seed, (64, 64)))} for seed in range(30)}
        write_tar(shards.paths[0], more)
        with pytest.raises(StaleArtifact, match="train images of mine has changed"):
            save_sae_features(settings, "mine", "enc", "out", EXTRACTION)
        assert len(open_features(settings, "mine", "enc", "out", "train")) == N_IMAGES
        overwriting = Extraction("cpu", 4, 0, overwrite=True)
        assert save_sae_features(settings, "mine", "enc", "out", overwriting) is Outcome.RAN
        assert len(open_features(settings, "mine", "enc", "out", "train")) == 30

    def test_an_encoder_that_could_not_be_loaded_leaves_nothing_to_overwrite(
        self, settings: Settings, monkeypatch
    ) -> None:
        def fail(*_: object) -> None:
            raise UserError("no weights")

        with monkeypatch.context() as patched:
            patched.setattr(dncbm.features, "load_encoder", fail)
            with pytest.raises(UserError, match="no weights"):
                save_sae_features(settings, "mine", "enc", "out", EXTRACTION)
        monkeypatch.setattr(dncbm.features, "describe_encoder", lambda _, name: {"encoder": name, "weights": "others"})
        assert save_sae_features(settings, "mine", "enc", "out", EXTRACTION) is Outcome.RAN

    def test_what_a_killed_run_left_is_not_taken_for_features(self, settings: Settings) -> None:
        folder = Artifacts(settings).features("mine", "enc", "out", "train")
        folder.mkdir(parents=True)
        (folder / ".00000-k1ll3d.npy").write_bytes(b"half a sha")
        save_sae_features(settings, "mine", "enc", "out", EXTRACTION)
        assert len(open_features(settings, "mine", "enc", "out", "train")) == N_IMAGES
        assert set(read_manifest(folder)["outputs"]) == {"00000.npy", "00000.keys.npy"}

    def test_missing_features_name_their_command(self, settings: Settings, refusal) -> None:
        with refusal("01_save_cc3m_features.py", "--img_enc_name enc", "--sae_dataset mine"):
            open_features(settings, "mine", "enc", "out", "train")


class TestStageOfTheProbe:
    @pytest.fixture
    def settings(self, make_settings: Callable[..., Settings], tmp_path: Path, random_image, stage_encoder) -> Settings:
        """Two classes; the seed of an image is in its name, and one image of each split is corrupt."""
        for split, class_name, seeds in (
            ("train", "a", range(30)), ("train", "b", range(30, 50)),
            ("val", "a", range(50, 55)), ("val", "b", range(55, 61)),
        ):  # fmt: skip
            folder = tmp_path / "images" / split / class_name
            folder.mkdir(parents=True)
            for seed in seeds:
                random_image(seed).save(folder / f"{seed:03d}.png")
        for corrupt_one in ("train/a/007.png", "train/b/033.png", "val/a/051.png"):
            (tmp_path / "images" / corrupt_one).write_bytes(b"no image")
        return make_settings(probe_datasets={"mine": "images"})

    @pytest.fixture(autouse=True)
    def _small_shards(self, monkeypatch) -> None:
        monkeypatch.setattr(dncbm.datasets.probe, "SHARD_SIZE", 16)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_labels_stay_with_their_features(self, settings: Settings, means, num_workers: int) -> None:
        extraction = Extraction("cpu", 4, num_workers, max_bad_fraction=0.2)
        assert save_probe_features(settings, "mine", "enc", "out", SPLITS, extraction) is Outcome.RAN
        assert probe_class_names(settings, "mine") == ["a", "b"]
        seeds_seen = []
        for split in SPLITS:
            store = open_features(settings, "mine", "enc", "out", split)
            seeds = [key + 50 if split == "val" else key for key in store.keys]
            seeds_seen += seeds
            np.testing.assert_allclose(store.gather(np.arange(len(store))).numpy(), means(seeds), rtol=1e-5)
            labels = probe_labels(settings, "mine", split, store.keys)
            assert labels.dtype == np.int64
            np.testing.assert_array_equal(labels, [0 if seed < 30 or 50 <= seed < 55 else 1 for seed in seeds])
        assert sorted(seeds_seen) == sorted(set(range(61)) - {7, 33, 51})

    def test_the_split_is_ninety_to_ten_and_on_disk(self, settings: Settings) -> None:
        save_probe_features(settings, "mine", "enc", "out", ("val",), EXTRACTION)
        artifacts = Artifacts(settings)
        train, held_out = (np.load(artifacts.split_indices("mine", split)) for split in ("train", "train_val"))
        assert (len(train), len(held_out)) == (45, 5)
        assert sorted([*train, *held_out]) == list(range(50))
        np.testing.assert_array_equal(train, split_train(50, seed=49)["train"])
        assert len(np.load(artifacts.labels("mine", "train"))) == 50
        assert len(np.load(artifacts.labels("mine", "val"))) == 11
        assert not artifacts.features("mine", "enc", "out", "train").exists()

    def test_one_split_after_another_is_all_at_once(self, settings: Settings) -> None:
        for split in SPLITS:
            save_probe_features(settings, "mine", "enc", "out", (split,), EXTRACTION)
        assert save_probe_features(settings, "mine", "enc", "out", SPLITS, EXTRACTION) is Outcome.ALREADY_DONE

    def test_an_image_more_makes_it_stale(self, settings: Settings, tmp_path: Path, random_image: Callable) -> None:
        save_probe_features(settings, "mine", "enc", "out", SPLITS, EXTRACTION)
        image: Image.Image = random_image(99)
        image.save(tmp_path / "images/train/a/099.png")
        with pytest.raises(StaleArtifact, match="train images of mine has changed"):
            save_probe_features(settings, "mine", "enc", "out", SPLITS, EXTRACTION)

    def test_missing_files_name_their_command(self, settings: Settings, refusal) -> None:
        with refusal("05_save_probe_features.py", "--img_enc_name enc", "--probe_dataset mine"):
            open_features(settings, "mine", "enc", "out", "train")
        with refusal("05_save_probe_features.py", "--probe_dataset mine"):
            probe_labels(settings, "mine", "train", np.array([0]))
