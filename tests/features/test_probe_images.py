"""The data sets that a probe classifies, and how config.py says where and how they are stored."""

import csv
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dncbm.features.datasets import SHARD_SIZE, open_image, random_split
from dncbm.features.datasets.probe import ProbeImages, ProbeShards, display_name, probe_images
from dncbm.features.datasets.sae import WebdatasetShards


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def assert_holds(images: ProbeImages, expected: list[tuple[Image.Image, str]]) -> None:
    """These images, each with the name of its class."""
    assert images.labels.dtype == np.int64
    assert [images.class_names[label] for label in images.labels] == [name for _, name in expected]
    for index, (image, _) in enumerate(expected):
        np.testing.assert_array_equal(pixels(images.image(index)), pixels(image))


class TestImageFolder:
    def test_train_and_val(self, make_settings, tmp_path: Path, put) -> None:
        settings = make_settings(probe_datasets={"mine": "mine"})
        cat, cat2, dog = (put(tmp_path / f"mine/train/{name}.png", i) for i, name in enumerate(("cat/a", "cat/b", "dog/a")))
        held_out = put(tmp_path / "mine/val/dog/c.jpg", 9)
        put(tmp_path / "mine/val/cat/z.jpg", 10)
        train, val = (probe_images(settings, "mine", split) for split in ("train", "val"))
        assert train.class_names == val.class_names == ("cat", "dog")
        assert_holds(train, [(cat, "cat"), (cat2, "cat"), (dog, "dog")])
        assert_holds(val, [(Image.open(tmp_path / "mine/val/cat/z.jpg"), "cat"), (held_out, "dog")])
        assert train.image_name(2) == "train/dog/a.png"

    def test_without_val_the_test_folder_is_it(self, make_settings, tmp_path: Path, put) -> None:
        put(tmp_path / "mine/train/a/1.png", 0)
        image = put(tmp_path / "mine/test/a/1.png", 1)
        settings = make_settings(probe_datasets={"mine": "mine"})
        assert_holds(probe_images(settings, "mine", "val"), [(image, "a")])

    def test_labels_mean_the_same_where_val_lacks_a_class(self, make_settings, tmp_path: Path, put) -> None:
        for name in ("a", "b", "c"):
            put(tmp_path / f"mine/train/{name}/1.png", 0)
        image = put(tmp_path / "mine/val/c/1.png", 1)
        settings = make_settings(probe_datasets={"mine": "mine"})
        val = probe_images(settings, "mine", "val")
        assert val.class_names == ("a", "b", "c")
        assert_holds(val, [(image, "c")])

    def test_a_class_only_val_has_is_refused(self, make_settings, tmp_path: Path, put, refusal) -> None:
        put(tmp_path / "mine/train/a/1.png", 0)
        put(tmp_path / "mine/val/b/1.png", 1)
        settings = make_settings(probe_datasets={"mine": "mine"})
        with refusal("mine/val", "'b'", settings.path):
            probe_images(settings, "mine", "val")

    @pytest.mark.slow
    def test_imagenets_folders_get_the_names_of_imagenet_and_no_others(self, make_settings, tmp_path: Path, put) -> None:
        """timm holds the ids in the order of the classes."""
        from timm.data import ImageNetInfo

        ids = ImageNetInfo("imagenet-1k").label_names()
        assert len(ids) == 1000
        for wordnet_id in ids:
            put(tmp_path / f"imagenet/train/{wordnet_id}/1.png", 0)
            put(tmp_path / f"other/train/{wordnet_id}/1.png", 0)
        (tmp_path / "other/train" / ids[500]).rename(tmp_path / "other/train/n99999999")
        settings = make_settings(probe_datasets={"imagenet": "imagenet", "other": "other"})
        names = probe_images(settings, "imagenet", "train").class_names
        described = ImageNetInfo("imagenet-1k").label_descriptions()
        assert len(names) == 1000
        for number in (0, 1, 402, 999):
            assert names[number].lower() in described[number].lower()
        assert probe_images(settings, "other", "train").class_names == (*(i for i in ids if i != ids[500]), "n99999999")

    def test_images_come_in_the_order_of_torchvision(self, make_settings, tmp_path: Path, put) -> None:
        names = ("b/2.png", "b/10.png", "b/sub/1.png", "b/sub-a/1.JPG", "b/sub/deep/0.bmp", "a/x.png", "a b/y.webp", "B/z.tif")
        for seed, name in enumerate(names):
            for split in ("train", "val"):
                put(tmp_path / "mine" / split / name, seed)
        found = probe_images(make_settings(probe_datasets={"mine": "mine"}), "mine", "train")
        expected = torchvision.datasets.ImageFolder(str(tmp_path / "mine/train"))
        assert list(found.class_names) == expected.classes
        assert [
            (str(tmp_path / "mine" / name), label) for name, label in zip(found.image_names, found.labels, strict=True)
        ] == (expected.samples)

    def test_hidden_files_and_folders_are_left_out(self, make_settings, tmp_path: Path, put) -> None:
        for split in ("train", "val"):
            for name in ("cat/1.png", "cat/._1.png", "cat/.thumbs/1.png", ".ipynb_checkpoints/1.png", "__MACOSX/1.png"):
                put(tmp_path / "mine" / split / name, 1)
        for split in ("train", "val"):
            found = probe_images(make_settings(probe_datasets={"mine": "mine"}), "mine", split)
            assert found.class_names == ("cat",)
            assert found.image_names == (f"{split}/cat/1.png",)

    def test_no_image_gets_two_labels_or_splits_through_links(self, make_settings, tmp_path: Path, put) -> None:
        for name in ("train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "val/dog/4.png"):
            put(tmp_path / "mine" / name, 1)
        put(tmp_path / "elsewhere/5.png", 1)
        links = {
            "train/cat/all": "mine",
            "train/cat/dogs": "mine/train/dog",
            "val/dog/train": "mine/train",
            "train/car": "elsewhere",
            "train/vehicle": "elsewhere",
        }
        for link, target in links.items():
            (tmp_path / "mine" / link).symlink_to(tmp_path / target)
        settings = make_settings(probe_datasets={"mine": "mine"})
        train, val = (probe_images(settings, "mine", split) for split in ("train", "val"))
        assert train.image_names == ("train/car/5.png", "train/cat/1.png", "train/dog/2.png")
        assert val.image_names == ("val/cat/3.png", "val/dog/4.png")

    @pytest.mark.parametrize("within", ["train", ""])
    def test_without_val_a_tenth_is_held_out(self, make_settings, tmp_path: Path, put, within: str) -> None:
        """Of train/<class>, or of folders of classes."""
        names = [f"{name}/{i:02d}.png" for name in ("cat", "dog") for i in range(20)]
        for seed, name in enumerate(names):
            put(tmp_path / "mine" / within / name, seed)
        settings = make_settings(probe_datasets={"mine": "mine"})
        train, val = (probe_images(settings, "mine", split) for split in ("train", "val"))
        assert (len(train.labels), len(val.labels)) == (36, 4)
        assert sorted(train.image_names + val.image_names) == sorted(str(Path(within, name)) for name in names)
        order = np.random.default_rng(49).permutation(40)
        assert list(val.image_names) == [str(Path(within, names[i])) for i in sorted(order[:4])]
        for found in (train, val):
            assert [found.class_names[label] for label in found.labels] == [
                Path(name).parent.name for name in found.image_names
            ]

    @pytest.mark.parametrize(
        ("folders", "problem"),
        [
            (("train", "validation"), "has the folder train and validation but not val"),
            (("Training", "Test"), "has the folder Test and Training but not train"),
            (("val", "cat"), "has the folder val but not train"),
            ((), "neither train/<class>/<image> nor <class>/<image>"),
        ],
    )
    def test_splits_of_other_names_are_no_classes(
        self, make_settings, tmp_path: Path, put, refusal, folders: tuple[str, ...], problem: str
    ) -> None:
        (tmp_path / "mine").mkdir()
        for folder in folders:
            put(tmp_path / "mine" / folder / "a/1.png", 0)
        settings = make_settings(probe_datasets={"mine": "mine"})
        for split in ("train", "val"):
            with refusal(problem, settings.path):
                probe_images(settings, "mine", split)

    def test_what_is_missing_or_passed_over_is_noted(self, make_settings, tmp_path: Path, put, refusal) -> None:
        for name in ("train/cat/1.png", "train/dog/1.png", "val/cat/1.png"):
            put(tmp_path / "mine" / name, 1)
        (tmp_path / "mine/val/dog").mkdir()
        (tmp_path / "mine/train/cat/a.svg").write_text("<svg/>")
        settings = make_settings(probe_datasets={"mine": "mine"})
        train, val = (probe_images(settings, "mine", split) for split in ("train", "val"))
        assert [note.partition("passed over: ")[2] for note in train.notes] == ["1 .svg"]
        assert list(val.notes) == [f"1 of 2 classes without images in the val split of {tmp_path / 'mine'}: dog"]
        (tmp_path / "mine/val/cat/1.png").rename(tmp_path / "mine/val/cat/1.svg")
        with refusal("no images in", "passed over: 1 .svg"):
            probe_images(settings, "mine", "val")

    def test_an_image_of_another_size_is_noticed(self, make_settings, tmp_path: Path, put) -> None:
        settings = make_settings(probe_datasets={"mine": "mine"})
        for name in ("train/cat/1.png", "train/cat/2.png", "val/cat/1.png"):
            put(tmp_path / "mine" / name, 1)
        before = {split: probe_images(settings, "mine", split) for split in ("train", "val")}
        (tmp_path / "mine/train/cat/2.png").write_bytes(b"another")
        after = {split: probe_images(settings, "mine", split) for split in ("train", "val")}
        assert [before[split].content_hash == after[split].content_hash for split in before] == [False, True]
        states = [ProbeShards(images["train"], np.arange(2)).state(0, []) for images in (before, after)]
        assert states[0] != states[1]

    def test_missing_folders_are_named(self, make_settings, tmp_path: Path, refusal) -> None:
        settings = make_settings(probe_datasets={"mine": "mine", "other": "other"})
        (tmp_path / "mine").mkdir()
        with refusal("train", tmp_path / "mine", "probe_datasets['mine']", settings.path):
            probe_images(settings, "mine", "train")
        with refusal(tmp_path / "other", settings.path):
            probe_images(settings, "other", "train")


class TestCIFAR:
    """The pickled batches of Krizhevsky: rows of 3072 bytes, all red first."""

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch) -> Path:
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
        return tmp_path

    @staticmethod
    def batch(path: Path, seed: int, **labels: list[int]) -> np.ndarray:
        rows = np.random.default_rng(seed).integers(0, 256, (len(next(iter(labels.values()))), 3072), dtype=np.uint8)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps({"data": rows} | labels))
        return rows

    @staticmethod
    def expected(rows: np.ndarray, names: list[str]) -> list[tuple[Image.Image, str]]:
        return [
            (Image.merge("RGB", [Image.fromarray(c.reshape(32, 32)) for c in np.split(row, 3)]), name)
            for row, name in zip(rows, names, strict=True)
        ]

    def test_cifar10(self, make_settings, folder: Path) -> None:
        batches = folder / "c10" / "cifar-10-batches-py"
        batches.parent.mkdir()
        rows = [self.batch(batches / f"data_batch_{i}", i, labels=[i, 0]) for i in range(1, 6)]
        test_rows = self.batch(batches / "test_batch", 9, labels=[7, 7, 2])
        names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
        settings = make_settings(probe_datasets={"cifar10": "c10"})
        train, val = (probe_images(settings, "cifar10", split) for split in ("train", "val"))
        order = ["automobile", "airplane", "bird", "airplane", "cat", "airplane", "deer", "airplane", "dog", "airplane"]
        assert_holds(train, self.expected(np.concatenate(rows), order))
        assert_holds(val, self.expected(test_rows, ["horse", "horse", "bird"]))
        assert train.content_hash != val.content_hash
        assert train.image_name(3) == "000003"

    def test_cifar100_has_fine_labels(self, make_settings, folder: Path) -> None:
        batches = folder / "c100" / "cifar-100-python"
        batches.parent.mkdir()
        rows = self.batch(batches / "train", 1, fine_labels=[1, 99], coarse_labels=[0, 0])
        self.batch(batches / "test", 2, fine_labels=[0], coarse_labels=[0])
        names = [f"class {i}" for i in range(100)]
        meta = {"fine_label_names": names, "coarse_label_names": ["all"]}
        (batches / "meta").write_bytes(pickle.dumps(meta))
        settings = make_settings(probe_datasets={"cifar100": "c100"})
        assert_holds(probe_images(settings, "cifar100", "train"), self.expected(rows, ["class 1", "class 99"]))
        assert len(probe_images(settings, "cifar100", "val").labels) == 1

    def test_a_folder_without_it_is_refused(self, make_settings, tmp_path: Path, refusal) -> None:
        (tmp_path / "c10").mkdir()
        settings = make_settings(probe_datasets={"cifar10": "c10"})
        with refusal("cifar10", tmp_path / "c10", settings.path):
            probe_images(settings, "cifar10", "train")


class TestPlaces365:
    @pytest.fixture
    def root(self, tmp_path: Path, monkeypatch) -> Path:
        """The devkit's lists, for three classes and three images."""
        monkeypatch.setattr("torchvision.datasets.places365.check_integrity", lambda file, md5: Path(file).is_file())
        root = tmp_path / "places"
        root.mkdir()
        (root / "categories_places365.txt").write_text("/a/airfield 0\n/b/bedroom 1\n/a/apartment_building/outdoor 2\n")
        (root / "places365_train_standard.txt").write_text(
            "/b/bedroom/00000001.jpg 1\n/a/airfield/00000001.jpg 0\n/a/apartment_building/outdoor/00000007.jpg 2\n"
        )
        (root / "places365_val.txt").write_text("Places365_val_00000001.jpg 1\nPlaces365_val_00000002.jpg 0\n")
        return root

    @pytest.mark.parametrize("size", ["256", "large"])
    def test_train_and_val(self, make_settings, root: Path, put, size: str) -> None:
        train = root / f"data_{size}_standard"
        bedroom, airfield = (put(train / f"{place}/00000001.jpg", i) for i, place in enumerate(("b/bedroom", "a/airfield")))
        outdoor = put(train / "a/apartment_building/outdoor/00000007.jpg", 5)
        val = [put(root / f"val_{size}" / f"Places365_val_0000000{i}.jpg", 10 + i) for i in (1, 2)]
        settings = make_settings(probe_datasets={"places365": "places"})
        found = probe_images(settings, "places365", "train")
        assert_holds(found, [(bedroom, "/b/bedroom"), (airfield, "/a/airfield"), (outdoor, "/a/apartment_building/outdoor")])
        assert list(found.labels) == [1, 0, 2]
        assert_holds(probe_images(settings, "places365", "val"), [(val[0], "/b/bedroom"), (val[1], "/a/airfield")])

    def test_missing_lists_are_named(self, make_settings, root: Path, refusal) -> None:
        (root / "places365_val.txt").unlink()
        settings = make_settings(probe_datasets={"places365": "places"})
        with refusal("places365_val.txt", root, settings.path):
            probe_images(settings, "places365", "val")


class TestWaterbirds:
    COLUMNS = ("img_id", "img_filename", "y", "split", "place", "place_filename")

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        root = tmp_path / "waterbirds"
        root.mkdir()
        rows = [
            (1, "001.Albatross/a.jpg", 1, 0, 1, "/o/ocean/1.jpg"),
            (2, "002.Sparrow/b.jpg", 0, 0, 0, "/b/bamboo/1.jpg"),
            (3, "001.Albatross/c.jpg", 1, 1, 0, "/b/bamboo/2.jpg"),
            (4, "002.Sparrow/d.jpg", 0, 2, 1, "/o/ocean/2.jpg"),
        ]
        with (root / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([self.COLUMNS, *rows])
        return root

    def test_val_is_the_test_split(self, make_settings, root: Path, put) -> None:
        a, b, c, d = (
            put(root / name, i)
            for i, name in enumerate(("001.Albatross/a.jpg", "002.Sparrow/b.jpg", "001.Albatross/c.jpg", "002.Sparrow/d.jpg"))
        )
        settings = make_settings(probe_datasets={"waterbirds100": "waterbirds"})
        assert_holds(probe_images(settings, "waterbirds100", "train"), [(a, "waterbird"), (b, "landbird")])
        assert_holds(probe_images(settings, "waterbirds100", "val"), [(d, "landbird")])
        own = {"path": "waterbirds", "splits": {"train": "0", "train_val": "1", "val": "2"}}
        settings = make_settings(probe_datasets={"waterbirds100": own})
        assert_holds(probe_images(settings, "waterbirds100", "train_val"), [(c, "waterbird")])

    def test_a_table_saved_with_a_byte_order_mark_is_read(self, make_settings, root: Path, put) -> None:
        rows = "img_filename,y,split,place\r\na.jpg,1,0,1\r\n"
        (root / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + rows.encode())
        image = put(root / "a.jpg", 1)
        settings = make_settings(probe_datasets={"waterbirds100": "waterbirds"})
        assert_holds(probe_images(settings, "waterbirds100", "train"), [(image, "waterbird")])

    def test_the_table_names_its_classes_and_places(self, make_settings, root: Path, put) -> None:
        images = [put(root / f"{i}.jpg", i) for i in range(3)]
        settings = make_settings(probe_datasets={"waterbirds100": "waterbirds"})
        rows = ["0.jpg,1,0,1,food,sea", "1.jpg,0,0,0,animal,meadow", "2.jpg,1,2,0,food,meadow"]
        (root / "metadata.csv").write_text("\n".join(["img_filename,y,split,place,y_name,place_name", *rows]))
        train, val = (probe_images(settings, "waterbirds100", split) for split in ("train", "val"))
        assert train.class_names == val.class_names == ("animal", "food")
        assert_holds(val, [(images[2], "food")])
        names = ("animal on meadow", "animal on sea", "food on meadow", "food on sea")
        assert train.group_names == val.group_names == names
        assert [names[group] for group in train.groups] == ["food on sea", "animal on meadow"]
        only = "\n".join(["img_filename,y,split,place,place_name", "0.jpg,1,0,1,sea", "1.jpg,0,0,0,meadow"])
        (root / "metadata.csv").write_text(only)
        found = probe_images(settings, "waterbirds100", "train")
        assert found.class_names == ("landbird", "waterbird")
        assert found.group_names[1:3] == ("landbird on sea", "waterbird on meadow")

    @pytest.mark.parametrize(
        "rows",
        [
            ("0,animal", "1,food", "1,drink"), ("0,animal", "1,animal"), ("0,animal", "1,"), ("0,animal", "1"),
            ("0,animal", "0,animal"), ("0,animal", "1,food", "2,drink"),
        ],
    )  # fmt: skip
    def test_a_number_has_one_name(self, make_settings, root: Path, refusal, rows: tuple[str, ...]) -> None:
        """Whichever split the rows are of."""
        lines = [f"{i}.jpg,{i},0,{row}" for i, row in enumerate(rows)]
        (root / "metadata.csv").write_text("\n".join(["img_filename,split,place,y,y_name", *lines]))
        settings = make_settings(probe_datasets={"waterbirds100": "waterbirds"})
        with refusal("y_name", "one name for y 0 and another for y 1", root / "metadata.csv", settings.path):
            probe_images(settings, "waterbirds100", "train")

    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            ("caf\xe9.jpg,1,0,1", "is not UTF-8"), ("a.jpg,2,0,1", "must be 0 or 1"), ("a.jpg,1,0,", "invalid literal"),
            ("a.jpg", "waterbirds"), ("../../a.jpg,1,0,1", "lies elsewhere"), ("/etc/passwd,1,0,1", "lies elsewhere"),
            (f"{'a' * 200_000},1,0,1", "field larger"),
        ],
    )  # fmt: skip
    def test_a_damaged_table_is_one_line(self, make_settings, root: Path, refusal, row: str, problem: str) -> None:
        (root / "metadata.csv").write_bytes(f"img_filename,y,split,place\n{row}\n".encode("latin-1"))
        settings = make_settings(probe_datasets={"waterbirds100": "waterbirds"})
        with refusal(problem, root, settings.path):
            probe_images(settings, "waterbirds100", "train")

    def test_a_table_without_its_columns_is_refused(self, make_settings, root: Path, refusal) -> None:
        settings = make_settings(probe_datasets={"waterbirds100": "waterbirds"})
        (root / "metadata.csv").write_text("file,label\na.jpg,1\n")
        with refusal("waterbirds100", root, settings.path):
            probe_images(settings, "waterbirds100", "train")
        (root / "metadata.csv").unlink()
        with refusal("metadata.csv", settings.path):
            probe_images(settings, "waterbirds100", "train")


# ------------------------------------------------------------------------------------------ a data set by a config line


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch) -> Callable[[str, int], np.ndarray]:
    """Writes CIFAR10 with one image per batch into a folder; returns the test image."""
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)

    def write(folder: str, seed: int) -> np.ndarray:
        batches = tmp_path / folder / "cifar-10-batches-py"
        batches.mkdir(parents=True)
        for number, name in enumerate(("test_batch", *(f"data_batch_{i}" for i in range(1, 6)))):
            TestCIFAR.batch(batches / name, seed + number, labels=[number])
        (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
        return np.random.default_rng(seed).integers(0, 256, (1, 3072), dtype=np.uint8).reshape(3, 32, 32)

    return write


def test_two_copies_of_a_data_set_have_two_names(make_settings, cifar10, tmp_path: Path) -> None:
    expected = {"cifar10": cifar10("clean", 0), "cifar10-noisy": cifar10("noisy", 100)}
    settings = make_settings(probe_datasets={"cifar10": "clean", "cifar10-noisy": {"path": "noisy", "reader": "cifar10"}})
    for name, image in expected.items():
        found = probe_images(settings, name, "val")
        np.testing.assert_array_equal(pixels(found.image(0)), image.transpose(1, 2, 0))
        assert list(found.labels) == [0]
        assert list(probe_images(settings, name, "train").labels) == [1, 2, 3, 4, 5]
    assert len({probe_images(settings, name, "val").content_hash for name in expected}) == 2

    swapped = {"path": "clean", "reader": "cifar10", "splits": {"train": "test", "val": "train"}}
    settings = make_settings(probe_datasets={"swapped": swapped})
    sizes = {split: len(probe_images(settings, "swapped", split).labels) for split in ("train", "val")}
    assert sizes == {"train": 1, "val": 5}


def test_splits_rename_the_folders_of_a_data_set(make_settings, tmp_path: Path, put) -> None:
    """Of one that is called like a data set with a reader of its own."""
    images = {
        split: put(tmp_path / f"mine/{folder}/{name}/1.png", seed)
        for seed, (split, folder, name) in enumerate(
            [("train", "fit", "cat"), ("train", "fit", "dog"), ("train_val", "val", "dog"), ("val", "held out", "dog")]
        )
    }
    splits = {"train": "fit", "train_val": "val", "val": "held out"}
    settings = make_settings(probe_datasets={"cifar10": {"path": "mine", "reader": "folder", "splits": splits}})
    assert settings.probe_dataset("cifar10").own_splits == ("train", "train_val", "val")
    for split in ("train_val", "val"):
        found = probe_images(settings, "cifar10", split)
        assert found.class_names == ("cat", "dog")
        assert_holds(found, [(images[split], "dog")])


def test_a_train_val_that_is_missing_is_not_read_from_the_test_folder(make_settings, tmp_path: Path, put, refusal) -> None:
    put(tmp_path / "mine/train/a/1.png", 0)
    put(tmp_path / "mine/test/a/1.png", 1)
    splits = {"train": "train", "train_val": "val", "val": "test"}
    settings = make_settings(probe_datasets={"mine": {"path": "mine", "splits": splits}})
    with refusal("train_val split of mine", tmp_path / "mine" / "val", "probe_datasets['mine']", settings.path):
        probe_images(settings, "mine", "train_val")


@pytest.mark.parametrize(
    ("reader", "splits", "problem"),
    [
        ("cifar11", {}, "no reader 'cifar11'"),
        ("cifar10", {"train": "train", "val": "validation"}, "cifar10 has the splits train, test, not 'validation'"),
        ("cifar10", {"train": "test", "train_val": "held", "val": "test"}, "cifar10 has the splits train, test, not 'held'"),
        ("places365", {"train": "train-standard", "val": "test"}, "train-challenge, val, not 'test'"),
        ("waterbirds100", {"train": "0", "val": "test"}, "waterbirds100 has the splits 0, 1, 2, not 'test'"),
        ("waterbirds100", {"train": "0", "train_val": "1", "val": "2"}, "no images"),
        ("folder", {"train": "train", "val": "missing"}, "mine/missing"),
    ],
)
def test_what_a_reader_cannot_read_is_one_line(
    make_settings, tmp_path: Path, put, refusal, reader: str, splits: dict[str, str], problem: str
) -> None:
    put(tmp_path / "mine/train/a/1.png", 0)
    (tmp_path / "mine/metadata.csv").write_text("img_filename,y,split,place\ntrain/a/1.png,0,0,0\n")
    settings = make_settings(probe_datasets={"mine": {"path": "mine", "reader": reader, "splits": splits}})
    with refusal(problem, "probe_datasets['mine']", settings.path):
        probe_images(settings, "mine", "val")


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"path": "mine", "root": "x"}, "unknown key 'root'"),
        ({"reader": "cifar10"}, "must be a folder or"),
        ({"path": 5}, "must be a folder or"),
        ({"path": "mine", "reader": 5}, "reader must be a name, not 5"),
        ({"path": "mine", "splits": {"train": "train", "train_val": "dev"}}, "splits must name"),
        ({"path": "mine", "splits": {"train": "train", "val": "val", "test": "test"}}, "splits must name"),
        ({"path": "mine", "splits": {"train": "train", "val": 2}}, "splits must name"),
        ({"path": "mine", "splits": ["train", "val"]}, "splits must name"),
    ],
)
def test_a_malformed_line_of_the_config_is_refused(make_settings, tmp_path: Path, refusal, entry: Any, problem) -> None:
    with refusal(problem, "probe_datasets['mine']", tmp_path / "config.py"):
        make_settings(probe_datasets={"mine": entry})


# ----------------------------------------------------------------------------------------------------- splits, shards


def test_shards_can_be_sent_to_a_spawned_process(make_settings, tmp_path: Path, put, write_tar, random_image, encoded) -> None:
    """Workers that are spawned and not forked get their shards pickled."""
    image = put(tmp_path / "mine/train/a/1.png", 4)
    images = probe_images(make_settings(probe_datasets={"mine": "mine"}), "mine", "train")
    tar = write_tar(tmp_path / "0.tar", {"0": {"png": encoded(random_image(4))}})
    for shards in (ProbeShards(images, np.array([0])), WebdatasetShards((tar,))):
        ((_, load),) = pickle.loads(pickle.dumps(shards)).read(0, pytest.fail)
        np.testing.assert_array_equal(pixels(open_image(load())), pixels(image))


@given(n=st.integers(0, 3000), seed=st.integers(0, 2**32))
def test_shares_are_held_out_of_train(n: int, seed: int) -> None:
    split = random_split(n, seed, {"train_val": 0.1, "val": 0.05})
    assert list(split) == ["train", "train_val", "val"]
    assert len(split["train_val"]) == pytest.approx(n / 10, abs=0.5)
    assert len(split["val"]) == pytest.approx(n / 20, abs=0.5)
    assert sorted(index for indices in split.values() for index in indices) == list(range(n))
    again = random_split(n, seed, {"train_val": 0.1, "val": 0.05})
    for name, indices in split.items():
        assert list(indices) == sorted(indices)
        np.testing.assert_array_equal(indices, again[name])


def test_the_held_out_images_are_drawn_at_random() -> None:
    one, other = (random_split(1000, seed, {"train_val": 0.1})["train_val"] for seed in (49, 50))
    assert 0 < len(set(one) & set(other)) < 50  # 10 are expected to coincide
    assert 300 < one.mean() < 700
    expected = np.sort(np.random.default_rng(49).permutation(1000)[:100])  # the bits of every earlier run
    np.testing.assert_array_equal(one, expected)


def test_probe_images_are_cut_into_shards(random_image) -> None:
    labels = np.zeros(2 * SHARD_SIZE + 10, dtype=np.int64)
    images = ProbeImages(labels, ("a",), random_image, None, "hash")
    indices = np.arange(3, 2 * SHARD_SIZE + 5)
    shards = ProbeShards(images, indices)
    assert [shards.count(i) for i in range(len(shards))] == [SHARD_SIZE, SHARD_SIZE, 2]
    bad: list[str] = []
    read = [key for shard in range(3) for key, _ in shards.read(shard, bad.append)]
    np.testing.assert_array_equal(read, indices)
    _, (key, load) = list(shards.read(2, bad.append))
    np.testing.assert_array_equal(pixels(open_image(load())), pixels(random_image(key)))
    assert not bad
    assert len({ProbeShards(images, some).fingerprint() for some in (indices, indices[1:], indices + 1)}) == 3


@pytest.mark.parametrize(
    ("class_name", "shown"),
    [
        ("/b/bedroom", "bedroom"),
        ("/a/apartment_building/outdoor", "apartment building outdoor"),
        ("animals_and_nature", "animals and nature"),
        ("great white shark", "great white shark"),
        ("x", "x"),
    ],
)
def test_display_names(class_name: str, shown: str) -> None:
    assert display_name(class_name) == shown
