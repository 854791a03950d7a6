import csv
import json
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dncbm import features
from dncbm.artifacts import Artifacts
from dncbm.datasets.cc3m import WebdatasetShards, sae_images
from dncbm.datasets.probe import SHARD_SIZE, ProbeImages, ProbeShards, display_name, probe_images, split_train
from dncbm.extraction import Extraction
from dncbm.features import save_probe_features
from dncbm.manifests import Outcome


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def read(shards: WebdatasetShards, shard: int = 0) -> tuple[dict[str, Image.Image], Counter[str]]:
    """The images that can be decoded, by key, and the reasons for those that cannot."""
    bad: Counter[str] = Counter()
    images = {}
    for key, decode in shards.read(shard, lambda reason: bad.update([reason])):
        try:
            images[key] = decode().convert("RGB")
        except Exception as error:
            bad[type(error).__name__] += 1
    return images, bad


# --------------------------------------------------------------------------------------------------- webdataset shards


@pytest.fixture
def sample(random_image, encoded) -> Callable[..., dict[str, bytes]]:
    """seed -> the members that img2dataset writes for a pair."""

    def make(seed: int, suffix: str = "jpg") -> dict[str, bytes]:
        content = encoded(random_image(seed), "png")  # lossless, and recognised by its content
        return {suffix: content, "txt": b"a caption", "json": b'{"status": "success"}'}

    return make


def test_images_come_with_their_keys_in_order(tmp_path: Path, write_tar, sample, random_image) -> None:
    path = write_tar(tmp_path / "0.tar", {f"00000{i:04d}": sample(i) for i in (3, 1, 2)})
    images, bad = read(WebdatasetShards((path,)))
    assert list(images) == ["000000003", "000000001", "000000002"]
    assert not bad
    for key, image in images.items():
        np.testing.assert_array_equal(pixels(image), pixels(random_image(int(key))))


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp"])
def test_image_suffixes(tmp_path: Path, write_tar, sample, suffix: str) -> None:
    images, bad = read(WebdatasetShards((write_tar(tmp_path / "0.tar", {"a": sample(0, suffix)}),)))
    assert list(images) == ["a"]
    assert not bad


def test_a_corrupt_image_is_one_bad_image(tmp_path: Path, write_tar, sample) -> None:
    broken = {"jpg": b"\xff\xd8\xff not a picture", "txt": b"caption"}
    cut_off = {"jpg": sample(2)["jpg"][:100]}
    path = write_tar(tmp_path / "0.tar", {"a": sample(0), "b": broken, "c": cut_off, "d": sample(3)})
    images, bad = read(WebdatasetShards((path,)))
    assert list(images) == ["a", "d"]
    assert bad.total() == 2
    assert bad["UnidentifiedImageError"] == 1


def test_a_sample_without_an_image_is_one_bad_image(tmp_path: Path, write_tar, sample) -> None:
    path = write_tar(tmp_path / "0.tar", {"a": sample(0), "b": {"txt": b"caption"}, "c": sample(2)})
    images, bad = read(WebdatasetShards((path,)))
    assert list(images) == ["a", "c"]
    assert bad == {"no image in the sample": 1}


def test_a_truncated_tar_gives_what_comes_before_the_cut(tmp_path: Path, write_tar, sample) -> None:
    path = write_tar(tmp_path / "0.tar", {f"{i}": sample(i) for i in range(6)})
    with tarfile.open(path) as tar:
        cut = tar.getmember("4.jpg").offset_data + 20
    path.write_bytes(path.read_bytes()[:cut])
    images, bad = read(WebdatasetShards((path,)))
    assert [key for key in images if key != "4"] == ["0", "1", "2", "3"]
    assert bad.total() >= 1
    assert "4" not in images


@pytest.mark.parametrize("content", [b"", b"not a tar at all"])
def test_a_file_that_is_no_tar_gives_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(content)
    images, bad = read(WebdatasetShards((path,)))
    assert not images
    assert bad.total() == 1


def test_shards_follow_the_pattern_of_the_config(make_settings, tmp_path: Path, write_tar, sample, refusal) -> None:
    for i in range(4):
        write_tar(tmp_path / "cc3m" / f"{i:05d}.tar", {f"{i}": sample(i)})
    pattern = "cc3m/{00000..00002}.tar"
    settings = make_settings(sae_datasets={"cc3m": {"train": pattern, "train_val": "cc3m/00003.tar", "val": "5.tar"}})
    write_tar(tmp_path / "5.tar", {"5": sample(5)})
    shards = sae_images(settings, "cc3m")["train"]
    assert [path.name for path in shards.paths] == ["00000.tar", "00001.tar", "00002.tar"]
    assert list(read(shards, 2)[0]) == ["2"]
    assert [path.name for path in sae_images(settings, "cc3m")["train_val"].paths] == ["00003.tar"]
    (tmp_path / "cc3m" / "00001.tar").unlink()
    with refusal("1 of 3", tmp_path / "cc3m" / "00001.tar", "sae_datasets['cc3m']['train']", settings.path, pattern):
        sae_images(settings, "cc3m")
    with refusal("'cc12m'"):
        sae_images(settings, "cc12m")


def test_counts_come_from_img2dataset(tmp_path: Path) -> None:
    shards = WebdatasetShards((tmp_path / "00000.tar", tmp_path / "00001.tar", tmp_path / "00002.tar"))
    (tmp_path / "00000_stats.json").write_text('{"count": 10, "successes": 7}')
    (tmp_path / "00001_stats.json").write_text("{")
    assert [shards.count(i) for i in range(3)] == [7, None, None]


def test_a_fingerprint_follows_names_and_sizes(tmp_path: Path, write_tar, sample) -> None:
    a = write_tar(tmp_path / "a.tar", {"a": sample(0)})
    b = write_tar(tmp_path / "b.tar", {"a": sample(0)})
    fingerprints = [WebdatasetShards(paths).fingerprint() for paths in ((a,), (b,), (a, b), (b, a))]
    assert len(set(fingerprints)) == 4
    moved = write_tar(tmp_path / "elsewhere" / "a.tar", {"a": sample(0)})
    assert WebdatasetShards((moved,)).fingerprint() == fingerprints[0]
    write_tar(a, {f"{i}": sample(i) for i in range(50)})
    assert WebdatasetShards((a,)).fingerprint() != fingerprints[0]


# ------------------------------------------------------------------------------------------------------ probe datasets


def assert_holds(images: ProbeImages, expected: list[tuple[Image.Image, str]]) -> None:
    """These images, each with the name of its class."""
    assert images.labels.dtype == np.int64
    assert [images.class_names[label] for label in images.labels] == [name for _, name in expected]
    for index, (image, _) in enumerate(expected):
        np.testing.assert_array_equal(pixels(images.image(index)), pixels(image))


@pytest.fixture
def put(random_image) -> Callable[[Path, int], Image.Image]:
    def save(path: Path, seed: int) -> Image.Image:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = random_image(seed)
        image.save(path, "png")
        return image

    return save


class TestImageFolder:
    def test_train_and_val(self, make_settings, tmp_path: Path, put) -> None:
        settings = make_settings(probe_datasets={"mine": "mine"})
        cat, cat2, dog = (
            put(tmp_path / f"mine/train/{name}.png", i) for i, name in enumerate(("cat/a", "cat/b", "dog/a"))
        )
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

    def test_wordnet_folders_get_the_names_of_imagenet(self, make_settings, tmp_path: Path, put) -> None:
        ids = [f"n{i:08d}" for i in range(1000)]
        for wordnet_id in ids:
            put(tmp_path / f"imagenet/train/{wordnet_id}/1.png", 0)
        names = probe_images(make_settings(probe_datasets={"imagenet": "imagenet"}), "imagenet", "train").class_names
        assert len(names) == 1000
        assert (names[0], names[1], names[999]) == ("tench", "goldfish", "toilet paper")

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
        bedroom, airfield = (
            put(train / f"{place}/00000001.jpg", i) for i, place in enumerate(("b/bedroom", "a/airfield"))
        )
        outdoor = put(train / "a/apartment_building/outdoor/00000007.jpg", 5)
        val = [put(root / f"val_{size}" / f"Places365_val_0000000{i}.jpg", 10 + i) for i in (1, 2)]
        settings = make_settings(probe_datasets={"places365": "places"})
        found = probe_images(settings, "places365", "train")
        assert_holds(
            found, [(bedroom, "/b/bedroom"), (airfield, "/a/airfield"), (outdoor, "/a/apartment_building/outdoor")]
        )
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
        a, b, _, d = (
            put(root / name, i)
            for i, name in enumerate(
                ("001.Albatross/a.jpg", "002.Sparrow/b.jpg", "001.Albatross/c.jpg", "002.Sparrow/d.jpg")
            )
        )
        settings = make_settings(probe_datasets={"waterbirds100": "waterbirds"})
        assert_holds(probe_images(settings, "waterbirds100", "train"), [(a, "waterbird"), (b, "landbird")])
        assert_holds(probe_images(settings, "waterbirds100", "val"), [(d, "landbird")])

    def test_groups_are_birds_on_backgrounds_and_saved_beside_the_labels(
        self, make_settings, root: Path, put, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for i, name in enumerate(("001.Albatross/a.jpg", "002.Sparrow/b.jpg", "002.Sparrow/d.jpg")):
            put(root / name, i)
        settings = make_settings(probe_datasets={"waterbirds100": "waterbirds"})
        monkeypatch.setattr(features, "_save_features", lambda *_: Outcome.RAN)
        save_probe_features(settings, "waterbirds100", "enc", "out", ("val",), Extraction("cpu"))
        artifacts = Artifacts(settings)
        names = json.loads(artifacts.probe_split("waterbirds100").read_text())["group_names"]
        found = {split: np.load(artifacts.groups("waterbirds100", split)) for split in ("train", "val")}
        assert [names[group] for group in found["train"]] == ["waterbird on water", "landbird on land"]
        assert [names[group] for group in found["val"]] == ["landbird on water"]

    def test_a_table_without_its_columns_is_refused(self, make_settings, root: Path, refusal) -> None:
        settings = make_settings(probe_datasets={"waterbirds100": "waterbirds"})
        (root / "metadata.csv").write_text("file,label\na.jpg,1\n")
        with refusal("waterbirds100", root, settings.path):
            probe_images(settings, "waterbirds100", "train")
        (root / "metadata.csv").unlink()
        with refusal("metadata.csv", settings.path):
            probe_images(settings, "waterbirds100", "train")


# ----------------------------------------------------------------------------------------------------- splits, shards


def test_shards_can_be_sent_to_a_process_started_afresh(make_settings, tmp_path: Path, put, write_tar, sample) -> None:
    """Worker processes that are spawned and not forked get what they need pickled."""
    image = put(tmp_path / "mine/train/a/1.png", 4)
    images = probe_images(make_settings(probe_datasets={"mine": "mine"}), "mine", "train")
    for shards in (
        ProbeShards(images, np.array([0])),
        WebdatasetShards((write_tar(tmp_path / "0.tar", {"0": sample(4)}),)),
    ):
        found, bad = read(pickle.loads(pickle.dumps(shards)))
        np.testing.assert_array_equal(pixels(next(iter(found.values()))), pixels(image))
        assert not bad


@given(n=st.integers(0, 3000), seed=st.integers(0, 2**32))
def test_a_tenth_of_the_train_split_is_held_out(n: int, seed: int) -> None:
    split = split_train(n, seed)
    assert set(split) == {"train", "train_val"}
    assert len(split["train_val"]) == pytest.approx(n / 10, abs=0.5)
    assert sorted([*split["train"], *split["train_val"]]) == list(range(n))
    for indices in split.values():
        assert list(indices) == sorted(indices)
        np.testing.assert_array_equal(
            indices, split_train(n, seed)["train" if indices is split["train"] else "train_val"]
        )


def test_the_held_out_images_are_drawn_at_random() -> None:
    one, other = (split_train(1000, seed)["train_val"] for seed in (49, 50))
    assert 0 < len(set(one) & set(other)) < 50  # 10 are expected to coincide
    assert 300 < one.mean() < 700


def test_probe_images_are_cut_into_shards(random_image) -> None:
    labels = np.zeros(2 * SHARD_SIZE + 10, dtype=np.int64)
    images = ProbeImages(labels, ("a",), random_image, None, "hash")
    indices = np.arange(3, 2 * SHARD_SIZE + 5)
    shards = ProbeShards(images, indices)
    assert [shards.count(i) for i in range(len(shards))] == [SHARD_SIZE, SHARD_SIZE, 2]
    bad: list[str] = []
    read = [key for shard in range(3) for key, _ in shards.read(shard, bad.append)]
    np.testing.assert_array_equal(read, indices)
    _, (key, decode) = list(shards.read(2, bad.append))
    np.testing.assert_array_equal(pixels(decode()), pixels(random_image(key)))
    assert not bad
    assert len({ProbeShards(images, some).fingerprint() for some in (indices, indices[1:], indices + 1)}) == 3


@pytest.mark.parametrize(
    ("class_name", "shown"),
    [
        ("/b/bedroom", "bedroom"),
        ("/a/apartment_building/outdoor", "outdoor apartment building"),
        ("animals_and_nature", "animals and nature"),
        ("great white shark", "great white shark"),
        ("x", "x"),
    ],
)
def test_display_names(class_name: str, shown: str) -> None:
    assert display_name(class_name) == shown


def test_shards_under_a_folder_with_odd_characters_are_read(tmp_path: Path, write_tar, random_image, encoded) -> None:
    """webdataset takes `#` and `?` in a path for parts of a URL."""
    path = tmp_path / "a #b?c" / "00000.tar"
    path.parent.mkdir()
    write_tar(path, {"000000000": {"png": encoded(random_image(0, (8, 8)))}})
    assert [key for key, _ in WebdatasetShards((path,)).read(0, pytest.fail)] == ["000000000"]
