"""Stages 1 and 5: when features are made again, labels beside features, and data sets read as config.py says."""

import io
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dncbm.features.datasets import random_split
from dncbm.features.datasets.probe import probe_images
from dncbm.features.datasets.sae import WebdatasetShards
from dncbm.features.encoders import Encoder
from dncbm.features.stage import (
    are_extracted,
    features_background,
    open_features,
    probe_class_names,
    probe_labels,
    save_probe_features,
    save_sae_features,
)
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, Extraction, ProbeFeatures, SAEFeatures, Splits
from dncbm.runs.errors import StaleArtifact, UserError
from dncbm.runs.manifests import Outcome, file_hash, manifest_path, read_manifest, verifying_hashes
from dncbm.runs.ranks import Ranks
from dncbm.runs.settings import Settings
from tests.features.conftest import N_IMAGES

LOOSE = Extraction(batch_size=4, num_workers=0, max_bad_fraction=0.2)
STRICT = replace(LOOSE, max_bad_fraction=0.01)


@dataclass
class Loaded:
    """What the stages loaded and encoded."""

    arguments: list[tuple[Any, ...]] = field(default_factory=list)
    """Name, device and precision of every encoder loaded."""
    batches: list[int] = field(default_factory=list)
    """Sizes of the batches encoded."""


@pytest.fixture
def loaded(monkeypatch, make_encoder) -> Loaded:
    """The stages load an encoder that averages channels, whatever its name."""
    loaded = Loaded()

    class Means(torch.nn.Module):
        def encode_image(self, images: torch.Tensor) -> torch.Tensor:
            loaded.batches.append(len(images))
            return images.mean(dim=(2, 3))

    def load(_: Settings, *arguments: Any) -> Encoder:
        loaded.arguments.append(arguments)
        return make_encoder(Means())

    monkeypatch.setattr("dncbm.features.stage.load_encoder", load)
    monkeypatch.setattr("dncbm.features.stage.describe_encoder", lambda _, name, *made: {"encoder": name})
    return loaded


def save_sae(settings: Settings, extraction: Extraction = LOOSE, **execution: Any) -> Outcome:
    """Stage 1 on the data set `mine`."""
    return save_sae_features(settings, SAEFeatures("enc", "out", "mine"), extraction, device="cpu", **execution)


def save_probe(
    settings: Settings, split: str | None = None, extraction: Extraction = LOOSE, dataset: str = "mine", **execution: Any
) -> Outcome:
    """Stage 5."""
    features = ProbeFeatures(dataset, "enc", "out")
    return save_probe_features(settings, features, Splits(split), extraction, device="cpu", **execution)


def array_bytes(array: np.ndarray) -> bytes:
    """An array as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def accept_files(artifact: Path) -> None:
    """Write what files hold now into a manifest, as if they had been made like this."""
    path = manifest_path(artifact)
    made = json.loads(path.read_text())
    for name, output in made["outputs"].items():
        file = path.parent / name
        output |= {"bytes": file.stat().st_size, "sha256": file_hash(file)}
    path.write_text(json.dumps(made))


class TestStageOfTheSAE:
    @pytest.fixture
    def settings(self, make_settings: Callable[..., Settings], shards: WebdatasetShards, loaded: Loaded) -> Settings:
        return make_settings(sae_datasets={"mine": {split: f"tars/0000{number}.tar" for number, split in enumerate(SPLITS)}})

    def test_every_split_is_a_finished_store(self, settings: Settings, means, capsys) -> None:
        assert save_sae(settings) is Outcome.RAN
        said = capsys.readouterr().out.splitlines()
        for number, split in enumerate(SPLITS):
            store = open_features(settings, "mine", "enc", "out", split)
            assert list(store.keys) == [f"{number * 10 + i:09d}" for i in range(N_IMAGES)]
            np.testing.assert_allclose(store.gather(np.arange(N_IMAGES)).numpy(), means(store.keys), rtol=1e-5)
            manifest = read_manifest(store.folder)
            assert manifest["settings"] == {"encoder": "enc", "hook": "out", "precision": "the device's"}
            assert manifest["details"]["images"] == N_IMAGES
            assert f"{N_IMAGES} images of mine {split}: {store.folder}" in said

    def test_finished_features_are_not_made_again(self, settings: Settings, loaded: Loaded) -> None:
        save_sae(settings)
        assert save_sae(settings) is Outcome.ALREADY_DONE
        assert len(loaded.arguments) == 1

    @pytest.mark.parametrize("precision", [None, "bf16"])
    def test_the_precision_reaches_the_encoder_and_the_manifest(
        self, settings: Settings, loaded: Loaded, precision: str | None
    ) -> None:
        save_sae(settings, replace(LOOSE, precision=precision))
        assert loaded.arguments == [("enc", torch.device("cpu"), precision)]
        manifest = read_manifest(Artifacts(settings).features("mine", "enc", "out", "val"))
        assert manifest["settings"]["precision"] == (precision or "the device's")
        assert {key: manifest["run"][key] for key in ("precision", "batch_size", "img_enc_name", "sae_dataset")} == {
            "precision": precision,
            "batch_size": 4,
            "img_enc_name": "enc",
            "sae_dataset": "mine",
        }
        with pytest.raises(StaleArtifact, match="precision was"):
            save_sae(settings, replace(LOOSE, precision="fp16"))

    def test_the_device_reaches_the_encoder(self, settings: Settings, loaded: Loaded, monkeypatch) -> None:
        monkeypatch.setattr("dncbm.features.stage.resolve_device", {"mps": torch.device("meta")}.__getitem__)
        save_sae_features(settings, SAEFeatures("enc", "out", "mine"), LOOSE, device="mps")
        assert loaded.arguments == [("enc", torch.device("meta"), None)]

    @pytest.mark.parametrize(("rank", "expected"), [(0, ["load", "wait"]), (1, ["wait", "load"])])
    def test_the_first_process_downloads_weights_for_all(
        self, settings: Settings, monkeypatch, make_encoder, rank: int, expected: list[str]
    ) -> None:
        events = []

        class Alone(Ranks):
            """One of two processes, without the other."""

            def first_makes(self, make: Callable[[], Any]) -> Any:
                return make()

            def wait(self) -> None:
                events.append("wait")

        def load(*_: object) -> Encoder:
            events.append("load")
            return make_encoder()

        monkeypatch.setattr("dncbm.features.stage.load_encoder", load)
        monkeypatch.setattr("dncbm.features.stage.joined", lambda: nullcontext(Alone(rank, 2)))
        monkeypatch.setattr("dncbm.features.stage.extracted", lambda *_: {"images": 7, "transparent": 0, "warnings": {}})
        save_sae(settings)
        assert events[:2] == expected
        assert events.count("load") == 1

    def test_a_damaged_shard_is_named_and_made_again_when_asked(self, settings: Settings) -> None:
        save_sae(settings)
        folder = open_features(settings, "mine", "enc", "out", "train").folder
        whole = (folder / "00000.npy").read_bytes()
        (folder / "00000.npy").write_bytes(whole[:-10])
        with pytest.raises(StaleArtifact, match="has changed since it was made"):
            save_sae(settings)
        assert save_sae(settings, overwrite=True) is Outcome.RAN
        assert (folder / "00000.npy").read_bytes() == whole

    def test_other_shards_are_refused_until_overwritten(
        self, settings: Settings, shards: WebdatasetShards, write_tar, random_image, encoded
    ) -> None:
        save_sae(settings)
        more = {f"{seed:09d}": {"png": encoded(random_image(seed, (64, 64)))} for seed in range(30)}
        write_tar(shards.paths[0], more)
        with pytest.raises(StaleArtifact, match="train images of mine has changed"):
            save_sae(settings)
        assert len(open_features(settings, "mine", "enc", "out", "train")) == N_IMAGES
        assert save_sae(settings, overwrite=True) is Outcome.RAN
        assert len(open_features(settings, "mine", "enc", "out", "train")) == 30

    def test_an_encoder_that_could_not_be_loaded_leaves_nothing_to_overwrite(self, settings: Settings, monkeypatch) -> None:
        def fail(*_: object) -> None:
            raise UserError("no weights")

        with monkeypatch.context() as patched:
            patched.setattr("dncbm.features.stage.load_encoder", fail)
            with pytest.raises(UserError, match="no weights"):
                save_sae(settings)
        monkeypatch.setattr("dncbm.features.stage.describe_encoder", lambda *_: {"weights": "others"})
        assert save_sae(settings) is Outcome.RAN

    def test_the_unfinished_file_of_a_killed_run_is_not_taken_for_features(self, settings: Settings) -> None:
        folder = Artifacts(settings).features("mine", "enc", "out", "train")
        folder.mkdir(parents=True)
        (folder / ".00000-k1ll3d.npy").write_bytes(b"half a sha")
        save_sae(settings)
        assert len(open_features(settings, "mine", "enc", "out", "train")) == N_IMAGES
        assert set(read_manifest(folder)["outputs"]) == {"00000.npy", "00000.keys.npy"}

    def test_missing_features_name_their_command(self, settings: Settings, refusal) -> None:
        with refusal("are missing", "01_save_cc3m_features.py", "--img_enc_name enc", "--sae_dataset mine"):
            open_features(settings, "mine", "enc", "out", "train")


@pytest.fixture
def small_shards(monkeypatch) -> None:
    monkeypatch.setattr("dncbm.features.datasets.SHARD_SIZE", 16)


@pytest.mark.usefixtures("small_shards")
class TestStageOfTheProbe:
    @pytest.fixture
    def settings(self, make_settings: Callable[..., Settings], tmp_path: Path, random_image, loaded: Loaded) -> Settings:
        """Two classes; the seed of an image is in its name, and three images are corrupt."""
        for split, class_name, seeds in (
            ("train", "a", range(30)), ("train", "b", range(30, 50)),
            ("val", "a", range(50, 55)), ("val", "b", range(55, 61)),
        ):  # fmt: skip
            folder = tmp_path / "images" / split / class_name
            folder.mkdir(parents=True)
            for seed in seeds:
                random_image(seed).save(folder / f"{seed:03d}.png")
        for corrupt in ("train/a/007.png", "train/b/033.png", "val/a/051.png"):
            (tmp_path / "images" / corrupt).write_bytes(b"no image")
        return make_settings(probe_datasets={"mine": "images"})

    def test_what_is_missing_is_named_with_its_command(self, settings: Settings, refusal) -> None:
        save_probe(settings)
        Artifacts(settings).probe_split("mine").unlink()
        Artifacts(settings).labels("mine", "train").unlink()
        with refusal("class names", "missing", "05_save_probe_features.py"):
            probe_class_names(settings, "mine")
        with refusal("labels", "missing", "05_save_probe_features.py"):
            probe_labels(settings, "mine", "train", np.array([0]))

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_labels_stay_with_their_features(self, settings: Settings, means, num_workers: int) -> None:
        assert save_probe(settings, extraction=replace(LOOSE, num_workers=num_workers)) is Outcome.RAN
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
        save_probe(settings, "val")
        artifacts = Artifacts(settings)
        train, held_out = (np.load(artifacts.split_indices("mine", split)) for split in ("train", "train_val"))
        assert (len(train), len(held_out)) == (45, 5)
        assert sorted([*train, *held_out]) == list(range(50))
        np.testing.assert_array_equal(train, random_split(50, 49, {"train_val": 0.1})["train"])
        assert len(np.load(artifacts.labels("mine", "train"))) == 50
        assert len(np.load(artifacts.labels("mine", "val"))) == 11
        assert not artifacts.features("mine", "enc", "out", "train").exists()

    def test_a_split_that_is_supplied_is_used_unless_it_is_damaged(self, settings: Settings, refusal) -> None:
        """Without its manifest, a split is the user's own."""
        artifacts = Artifacts(settings)
        save_probe(settings, "val")
        manifest_path(artifacts.probe_split("mine")).unlink()
        theirs = {"train": np.arange(40), "train_val": np.arange(40, 50)}
        for split, rows in theirs.items():
            np.save(artifacts.split_indices("mine", split), rows)
        path = artifacts.split_indices("mine", "train_val")
        for rows, said in (
            (None, "No such file"), (np.arange(2.0), "float64"), (np.array([50]), "distinct indices of the 50 images"),
            (np.array([3, 3]), "distinct indices"), (np.array([-1]), "distinct indices"),
        ):  # fmt: skip
            path.unlink() if rows is None else np.save(path, rows)
            with refusal(path, said, "--overwrite"):
                save_probe(settings, "train_val")
        np.save(path, theirs["train_val"])
        save_probe(settings, "train_val")
        keys = open_features(settings, "mine", "enc", "out", "train_val").keys
        assert sorted(keys) == theirs["train_val"].tolist()

    def test_one_split_after_another_is_all_at_once(self, settings: Settings) -> None:
        for split in SPLITS:
            save_probe(settings, split)
        assert save_probe(settings) is Outcome.ALREADY_DONE

    def test_one_more_image_makes_it_stale(self, settings: Settings, tmp_path: Path, random_image) -> None:
        save_probe(settings)
        random_image(99).save(tmp_path / "images/train/a/099.png")
        with pytest.raises(StaleArtifact, match="train images of mine has changed"):
            save_probe(settings)
        assert save_probe(settings, overwrite=True) is Outcome.RAN
        assert sum(len(open_features(settings, "mine", "enc", "out", split)) for split in SPLITS) == 59

    def test_labels_that_one_encoder_changes_are_not_read_with_anothers_features(
        self, settings: Settings, tmp_path: Path, random_image, refusal
    ) -> None:
        """A class is added in front, to train alone: all labels shift, and val's images stay what they were."""
        for encoder in ("enc", "other"):
            save_probe_features(settings, ProbeFeatures("mine", encoder, "out"), Splits(None), LOOSE, device="cpu")
        (tmp_path / "images/train/_first").mkdir()
        random_image(99).save(tmp_path / "images/train/_first/099.png")
        save_probe(settings, "train", overwrite=True)
        assert probe_class_names(settings, "mine") == ["_first", "a", "b"]
        assert len(open_features(settings, "mine", "enc", "out", "train"))
        for encoder, split in (("enc", "val"), ("other", "val"), ("other", "train"), ("other", "train_val")):
            with refusal(f"/{encoder}/", "split", "has changed", "--from probe_features", "--overwrite"):
                open_features(settings, "mine", encoder, "out", split)
            with pytest.raises(StaleArtifact):
                save_probe_features(settings, ProbeFeatures("mine", encoder, "out"), Splits(split), LOOSE, device="cpu")

    def test_an_image_that_is_replaced_keeps_its_label(self, settings: Settings, tmp_path: Path, random_image) -> None:
        save_probe(settings)
        random_image(99).save(tmp_path / "images/val/a/050.png", compress_level=0)
        save_probe(settings, "val", overwrite=True)
        for split in SPLITS:
            store = open_features(settings, "mine", "enc", "out", split)
            probe_labels(settings, "mine", split, store.keys)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda _: b"",
            lambda b: b[:-8],
            lambda b: b[::-1],
            lambda _: b"<html>",
            lambda _: array_bytes(np.zeros(50)),
            lambda _: array_bytes(np.zeros((50, 1), int)),
            lambda _: array_bytes(np.full(50, 2)),
            lambda _: array_bytes(np.full(50, -1)),
            lambda _: array_bytes(np.zeros(49, int)),
            lambda _: array_bytes(np.array(["a"] * 50)),
        ],
    )
    @pytest.mark.parametrize("is_expected", [False, True])
    def test_damaged_labels_are_named(
        self, settings: Settings, refusal, damage: Callable[[bytes], bytes], is_expected: bool
    ) -> None:
        save_probe(settings)
        path = Artifacts(settings).labels("mine", "train")
        path.write_bytes(damage(path.read_bytes()))
        if is_expected:
            accept_files(Artifacts(settings).probe_split("mine"))
        with refusal(path, "probe_features", "--overwrite"):
            probe_labels(settings, "mine", "train", np.arange(50))

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "{}", '{"class_names": 3}', '{"class_names": []}', '{"class_names": [1]}']
    )
    def test_damaged_class_names_are_named(self, settings: Settings, refusal, text: str) -> None:
        save_probe(settings)
        path = Artifacts(settings).probe_split("mine")
        path.write_text(text)
        with refusal(path, "--overwrite"):
            probe_class_names(settings, "mine")
        accept_files(path)
        with refusal(path, "05_save_probe_features.py", "--overwrite"):
            probe_class_names(settings, "mine")

    def test_missing_files_name_their_command(self, settings: Settings, refusal) -> None:
        with refusal("05_save_probe_features.py", "--img_enc_name enc", "--probe_dataset mine"):
            open_features(settings, "mine", "enc", "out", "train")
        with refusal("labels", "05_save_probe_features.py", "--probe_dataset mine"):
            probe_labels(settings, "mine", "train", np.array([0]))


# ------------------------------------------------------------------------------------------- data sets by a config line


@pytest.fixture
def with_its_own_train_val(make_settings, tmp_path: Path, put, loaded: Loaded) -> Settings:
    """30 train, 7 validation and 9 test images of the classes a, b and c; the validation images lack a."""
    for folder, first, n, classes in (("train", 0, 30, "abc"), ("dev", 30, 7, "bc"), ("test", 40, 9, "abc")):
        for i in range(n):
            put(tmp_path / f"images/{folder}/{classes[i % len(classes)]}/{first + i:02d}.png", first + i)
    splits = {"train": "train", "train_val": "dev", "val": "test"}
    return make_settings(probe_datasets={"mine": {"path": "images", "reader": "folder", "splits": splits}})


def test_a_train_val_of_ones_own_is_used_whole_and_nothing_is_held_out(with_its_own_train_val: Settings, means) -> None:
    settings, artifacts = with_its_own_train_val, Artifacts(with_its_own_train_val)
    save_probe(settings)
    sizes = {"train": 30, "train_val": 7, "val": 9}
    names = {"train": "train", "train_val": "dev", "val": "test"}
    for split, size in sizes.items():
        store = open_features(settings, "mine", "enc", "out", split)
        np.testing.assert_array_equal(store.keys, np.arange(size))
        files = sorted((settings.path.parent / "images" / names[split]).glob("*/*.png"))
        expected = means(int(file.stem) for file in files)
        np.testing.assert_allclose(store.gather(np.arange(size)).numpy(), expected, rtol=1e-5)
        labels = ["abc".index(file.parent.name) for file in files]
        np.testing.assert_array_equal(probe_labels(settings, "mine", split, store.keys), labels)
        np.testing.assert_array_equal(np.load(artifacts.labels("mine", split)), labels)
    for split in ("train", "train_val"):
        np.testing.assert_array_equal(np.load(artifacts.split_indices("mine", split)), np.arange(sizes[split]))
    manifest = read_manifest(artifacts.probe_split("mine"))
    assert set(manifest["inputs"]) == {f"{split} images of mine" for split in SPLITS}
    assert json.loads(artifacts.probe_split("mine").read_text()) == {"class_names": ["a", "b", "c"], "sizes": sizes}


def test_a_train_val_that_is_added_to_the_config_makes_the_split_stale(
    with_its_own_train_val: Settings, make_settings
) -> None:
    own = {"path": "images", "reader": "folder", "splits": {"train": "train", "val": "test"}}
    held_out = make_settings(probe_datasets={"mine": own})
    save_probe(held_out)
    assert len(open_features(held_out, "mine", "enc", "out", "train_val")) == 3
    own["splits"]["train_val"] = "dev"
    with pytest.raises(StaleArtifact, match="train_val images of mine is new"):
        save_probe(make_settings(probe_datasets={"mine": own}))
    (held_out.path.parent / "images/dev/b/30.png").unlink()
    save_probe(make_settings(probe_datasets={"mine": own}), overwrite=True)
    assert len(open_features(held_out, "mine", "enc", "out", "train_val")) == 6


WATERBIRDS = [  # file, is a waterbird, split, is on water
    ("a.jpg", 1, 0, 1),
    ("b.jpg", 0, 0, 0),
    ("c.jpg", 1, 1, 0),
    ("d.jpg", 0, 2, 1),
    ("e.jpg", 0, 1, 0),
    *((f"{name}.jpg", 0, 0, 0) for name in "fghi"),  # enough to hold a tenth out
]


@pytest.mark.parametrize("own_train_val", [False, True])
def test_waterbirds_groups_are_saved_beside_the_labels(
    make_settings, tmp_path: Path, put, loaded: Loaded, own_train_val: bool
) -> None:
    for seed, (name, *_) in enumerate(WATERBIRDS):
        put(tmp_path / "birds" / name, seed)
    rows = "".join(f"{name},{y},{split},{place}\n" for name, y, split, place in WATERBIRDS)
    (tmp_path / "birds/metadata.csv").write_text(f"img_filename,y,split,place\n{rows}")
    source: dict[str, Any] = {"path": "birds"}
    if own_train_val:
        source["splits"] = {"train": "0", "train_val": "1", "val": "2"}
    settings = make_settings(probe_datasets={"waterbirds100": source})
    save_probe(settings, "train_val" if own_train_val else "val", dataset="waterbirds100")
    artifacts = Artifacts(settings)
    names = json.loads(artifacts.probe_split("waterbirds100").read_text())["group_names"]
    expected = {"train": ["waterbird on water", *["landbird on land"] * 5], "val": ["landbird on water"]}
    if own_train_val:
        expected["train_val"] = ["waterbird on land", "landbird on land"]
        store = open_features(settings, "waterbirds100", "enc", "out", "train_val")
        np.testing.assert_array_equal(probe_labels(settings, "waterbirds100", "train_val", store.keys), [1, 0])
    for split, groups in expected.items():
        assert [names[group] for group in np.load(artifacts.groups("waterbirds100", split))] == groups
    assert artifacts.groups("waterbirds100", "train_val").exists() == own_train_val


# ----------------------------------------------------------------------------------------------- images that were fixed


@pytest.mark.parametrize("is_of_the_same_size", [False, True])
def test_fixed_tars_are_read_again_and_no_others(
    make_settings, tmp_path: Path, write_tar, members, loaded: Loaded, refusal, is_of_the_same_size: bool
) -> None:
    whole = members(4)
    bad = bytes(len(whole["000000001"]["jpg"])) if is_of_the_same_size else b"?" * 20_000
    broken = whole | {"000000001": {"jpg": bad}}
    for shard, samples in enumerate((whole, broken, whole)):
        write_tar(tmp_path / f"{shard}.tar", samples)
    settings = make_settings(sae_datasets={"mine": {"train": "{0..2}.tar", "train_val": "0.tar", "val": "0.tar"}})
    with refusal("1 of 12", "UnidentifiedImageError", tmp_path / "1.tar", "fix the data"):
        save_sae(settings, STRICT)
    loaded.batches.clear()
    with refusal("1 of 12"):  # nothing was fixed, nothing is read
        save_sae(settings, STRICT)
    assert not loaded.batches

    write_tar(tmp_path / "1.tar", whole)
    save_sae(settings, STRICT)
    assert loaded.batches == [4, 4, 4]  # the fixed tar, and the two other splits
    assert len(open_features(settings, "mine", "enc", "out", "train")) == 12
    write_tar(tmp_path / "1.tar", broken)  # a finished stage is not touched
    if not is_of_the_same_size:
        with pytest.raises(StaleArtifact, match="train images of mine has changed"):
            save_sae(settings, STRICT)


def test_another_list_of_shards_is_not_a_fixed_one(make_settings, tmp_path: Path, write_tar, members, loaded: Loaded) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", {**members(4 + shard), "bad": {"jpg": b"?"}})

    def settings_of(train: str) -> Settings:
        return make_settings(sae_datasets={"mine": {"train": train, "train_val": "0.tar", "val": "0.tar"}})

    with pytest.raises(UserError, match="unreadable"):
        save_sae(settings_of("{0..1}.tar"), STRICT)
    for train in ("{0..2}.tar", "0.tar", "{1..2}.tar"):
        with pytest.raises(StaleArtifact, match="train images of mine has changed"):
            save_sae(settings_of(train), STRICT)


def test_fixed_probe_images_are_read_again(
    make_settings, tmp_path: Path, put, random_image, loaded: Loaded, monkeypatch, refusal
) -> None:
    monkeypatch.setattr("dncbm.features.datasets.SHARD_SIZE", 8)
    for split in ("train", "val"):
        for i in range(20):
            put(tmp_path / f"images/{split}/a/{i:02d}.png", i)
    bad = tmp_path / "images/val/a/11.png"
    bad.write_bytes(b"?")
    settings = make_settings(probe_datasets={"mine": "images"})
    with refusal("1 of 20", "images 8 to 15"):
        save_probe(settings, "val", STRICT)
    loaded.batches.clear()
    random_image(3).save(bad)
    save_probe(settings, "val", STRICT)
    assert sum(loaded.batches) == 8
    assert list(open_features(settings, "mine", "enc", "out", "val").keys) == list(range(20))


def test_fixed_images_of_a_folder_are_read_again(
    make_settings, tmp_path: Path, put, random_image, loaded: Loaded, monkeypatch, refusal
) -> None:
    monkeypatch.setattr("dncbm.features.datasets.SHARD_SIZE", 2)
    for name in ("train/a.png", "train/b.png", "train/c.png", "train_val/a.png", "val/a.png"):
        put(tmp_path / "photos" / name, 0)
    bad = tmp_path / "photos/train/c.png"
    bad.write_bytes(b"?")
    settings = make_settings(sae_datasets={"mine": "photos"})
    with refusal("1 of 3", f"image 2 of {tmp_path / 'photos/train'}"):
        save_sae(settings, STRICT)
    loaded.batches.clear()
    random_image(3).save(bad)
    save_sae(settings, STRICT)
    assert loaded.batches == [1, 1, 1]  # the fixed image, and the two other splits
    assert list(open_features(settings, "mine", "enc", "out", "train").keys) == ["a.png", "b.png", "c.png"]


def test_a_stage_on_a_folder_keeps_names_that_are_not_utf8(make_settings, tmp_path: Path, put, loaded: Loaded) -> None:
    odd = os.fsdecode(b"caf\xe9.png")
    for seed, name in enumerate(("train/a.png", f"train/{odd}", "train_val/a.png", "val/a.png")):
        put(tmp_path / "photos" / name, seed)
    (tmp_path / "photos/train" / os.fsdecode(b"bad\xe9.png")).write_bytes(b"")
    settings = make_settings(sae_datasets={"mine": "photos"})
    save_sae(settings, replace(LOOSE, max_bad_fraction=1))
    store = open_features(settings, "mine", "enc", "out", "train")
    assert list(store.keys) == ["a.png", odd]
    assert read_manifest(store.folder)["details"]["bad"] == {"empty file": 1}
    assert [len(open_features(settings, "mine", "enc", "out", split)) for split in SPLITS] == [2, 1, 1]


# ------------------------------------------------------------------------------------------------ what the images are


@pytest.fixture
def photos(make_settings, tmp_path: Path, put, loaded: Loaded, monkeypatch) -> Settings:
    """A folder of images for the SAE, in shards of two; and one of a probe."""
    monkeypatch.setattr("dncbm.features.datasets.SHARD_SIZE", 2)
    for split in ("train", "train_val", "val"):
        for i in range(4):
            put(tmp_path / f"photos/{split}/{i}.png", i)
    for split in ("train", "val"):
        for i in range(10):
            put(tmp_path / f"pets/{split}/cat/{i}.png", i)
    return make_settings(sae_datasets={"mine": "photos"}, probe_datasets={"pets": "pets"})


def test_images_of_another_size_under_the_same_names_are_noticed(photos: Settings, tmp_path: Path, random_image) -> None:
    save_sae(photos)
    save_probe(photos, dataset="pets")
    for path in ("photos/train/1.png", "pets/val/cat/3.png"):
        random_image(99, (20, 20)).save(tmp_path / path)
    with pytest.raises(StaleArtifact, match="train images of mine has changed"):
        save_sae(photos)
    with pytest.raises(StaleArtifact, match="val images of pets has changed"):
        save_probe(photos, dataset="pets")


def same_size(path: Path) -> None:
    """Another pixel, in a file of the same size."""
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 10] ^= 1
    path.write_bytes(content)


def test_images_of_the_same_size_are_noticed_when_asked(photos: Settings, tmp_path: Path, loaded: Loaded, refusal) -> None:
    extraction = replace(LOOSE, max_bad_fraction=1.0)
    save_sae(photos, extraction)
    save_probe(photos, dataset="pets", extraction=extraction)
    same_size(tmp_path / "photos/train/3.png")
    same_size(tmp_path / "pets/train/cat/0.png")
    assert save_sae(photos, extraction) is Outcome.ALREADY_DONE
    loaded.batches.clear()
    with verifying_hashes():
        with refusal("images 2 to 3 of", tmp_path / "photos/train", "have changed", "--overwrite"):
            save_sae(photos, extraction)
        with refusal("images 0 to 1", "pets train", "have changed", "--overwrite"):
            save_probe(photos, dataset="pets", extraction=extraction)
        assert not loaded.batches
        assert save_sae(photos, extraction, overwrite=True) is Outcome.RAN
        assert sum(loaded.batches) <= 2  # of the shard that changed; the new image may be broken
        assert save_sae(photos, extraction) is Outcome.ALREADY_DONE


def test_a_finished_shard_of_an_unfinished_run_follows_its_images(
    photos: Settings, tmp_path: Path, random_image, loaded: Loaded, refusal
) -> None:
    """One image was bad; meanwhile a good one of the other shard was replaced as well."""
    (tmp_path / "photos/train/3.png").write_bytes(b"?")
    with refusal("1 of 4"):
        save_sae(photos, STRICT)
    for name in ("0", "3"):
        random_image(50 + int(name)).convert("L").save(tmp_path / f"photos/train/{name}.png")
    save_sae(photos, STRICT)
    rows = open_features(photos, "mine", "enc", "out", "train").gather(np.arange(4)).numpy()
    expected = [
        np.asarray(Image.open(tmp_path / f"photos/train/{i}.png").convert("RGB")).mean(axis=(0, 1)) / 255 for i in range(4)
    ]
    np.testing.assert_allclose(rows, expected, rtol=1e-5)


def test_a_background_is_part_of_the_recipe_and_none_is_not(photos: Settings) -> None:
    save_sae(photos)
    folder = Artifacts(photos).features("mine", "enc", "out", "train")
    assert "background" not in read_manifest(folder)["settings"]
    with pytest.raises(StaleArtifact, match="background was the default, now 'white'"):
        save_sae(photos, replace(LOOSE, background="white"))
    save_sae(photos, replace(LOOSE, background="white"), overwrite=True)
    assert read_manifest(folder)["settings"]["background"] == "white"
    assert features_background(photos, "mine", "enc", "out", "train") == "white"
    with pytest.raises(StaleArtifact, match="background was 'white', now the default"):
        save_sae(photos)


def test_transparent_images_are_said_once(photos: Settings, tmp_path: Path, random_image, caplog) -> None:
    for split in ("train", "val"):
        random_image(1).convert("RGBA").rotate(20).save(tmp_path / f"photos/{split}/0.png")
    save_sae(photos)
    (said,) = [message for message in caplog.messages if "transparent" in message]
    assert said.startswith("2 of 12 images of mine have transparent pixels")
    caplog.clear()
    assert save_sae(photos, replace(LOOSE, background="black"), overwrite=True) is Outcome.RAN
    assert not caplog.messages


def test_a_damaged_record_of_an_unfinished_run_is_left_by_overwriting(photos: Settings, tmp_path: Path, refusal) -> None:
    (tmp_path / "photos/train/3.png").write_bytes(b"?")
    with refusal("1 of 4"):
        save_sae(photos, STRICT)
    record = Artifacts(photos).features("mine", "enc", "out", "train") / "00000.json"
    record.write_text("{")
    with refusal(record, "delete it"):
        save_sae(photos)
    assert save_sae(photos, replace(LOOSE, max_bad_fraction=0.5), overwrite=True) is Outcome.RAN


def test_images_that_were_replaced_are_not_those_of_the_features(photos: Settings, tmp_path: Path, random_image) -> None:
    assert are_extracted(photos, probe_images(photos, "pets", "train"), "pets", "enc", "out", "train")  # nothing is known
    save_probe(photos, dataset="pets")

    def hold() -> dict[str, bool]:
        images = {split: probe_images(photos, "pets", photos.own_split("pets", split)) for split in SPLITS}
        return {split: are_extracted(photos, found, "pets", "enc", "out", split) for split, found in images.items()}

    assert hold() == dict.fromkeys(SPLITS, True)
    random_image(1).convert("L").save(tmp_path / "pets/val/cat/3.png")
    assert hold() == {"train": True, "train_val": True, "val": False}


def test_too_few_images_are_said_before_an_encoder_is_loaded(
    make_settings, tmp_path: Path, put, loaded: Loaded, refusal
) -> None:
    for split, n in (("train", 4), ("val", 2)):
        for i in range(n):
            put(tmp_path / f"pets/{split}/cat/{i}.png", i)
    with refusal("no images for train_val", "4 images", "at least 6"):
        save_probe(make_settings(probe_datasets={"pets": "pets"}), dataset="pets")
    assert not loaded.arguments


def test_notes_on_the_images_of_a_probe_are_said_once(photos: Settings, tmp_path: Path, caplog) -> None:
    (tmp_path / "pets/train/cat/a.svg").write_text("<svg/>")
    save_probe(photos, dataset="pets")
    assert len([message for message in caplog.messages if "1 .svg" in message]) == 1
    caplog.clear()
    save_probe(photos, dataset="pets")
    assert not caplog.messages
