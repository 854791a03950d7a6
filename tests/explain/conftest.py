"""A small world with everything that is explained: images, strengths, names and a probe, at the places of the paper's run."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from PIL import Image

from dncbm.cli import main
from dncbm.concepts import strengths as concepts
from dncbm.concepts.naming import ConceptName, write_names
from dncbm.explain.dumps.dump import Dump, Kind
from dncbm.features.datasets.probe import ProbeShards, probe_images
from dncbm.probe.fit import save_probe
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Clusters, Explained, ProbeDataset, ProbeRun, SAERun, ShownDatasets
from dncbm.runs.manifests import making, manifest_path, write_json
from dncbm.runs.settings import Settings, load_settings
from sparse_autoencoder import SparseAutoencoder, save_checkpoint
from sparse_autoencoder.declare import values

RUN, PROBE = SAERun(), ProbeRun("places365")
CLASSES = ["/b/beach", "/c/coast", "/a/apartment_building/outdoor"]
MINE = ["a", "b", "without images"]
NAMES = ["sand", "dog", "sea", "dog", "a word that is much longer than any column can hold", "50%_of_$1 & more", "sky"]
NAMES += [f"word{i}" for i in range(7, 14)]
F, N = len(NAMES), 60
DEAD, RARE = 9, 6
"""A latent that no image activates, and one that two images activate."""
CONFIG = {
    **{name: name for name in ("data_dir", "sae_dir", "probe_dir", "vocab_dir", "analysis_dir")},
    "vocabulary": "words",
    "sae_datasets": {"cc3m": "photos"},
    "probe_datasets": {"places365": "places", "mine": "mine", "imagenet": "nowhere"},
    "encoders": {"clip_RN50": ("RN50-quickgelu", "openai")},
    "defaults": {},
}


def colour_of(images: str, index: int) -> tuple[int, int, int]:
    """The colour of an image of `places365`, `mine val` or `mine train`; no other image has it."""
    if images == "places365":
        return 4 * index, 255 - 4 * index, 128
    return (220 - 20 * index, 20, 20 * index) if images == "mine val" else (20 * index, 20 * index, 0)


def make(
    artifact: Path, write: Callable[[], object], run: Mapping[str, Any] | None = None, inputs: Mapping[str, str] | None = None
) -> None:
    """Make an artifact with its manifest, as a stage would; an earlier one is replaced."""
    manifest_path(artifact).unlink(missing_ok=True)
    if artifact.is_dir():
        shutil.rmtree(artifact)
    artifact.unlink(missing_ok=True)
    with making(artifact, "tests", {}, inputs or {}, overwrite=True, run=run) as work:
        write()
        work.done([artifact] if artifact.is_file() else artifact.glob("*.npz"))


@dataclass(frozen=True)
class World:
    """The contents of the files, dense, for formulas."""

    settings: Settings
    z: np.ndarray
    """images x F of val."""
    keys: np.ndarray
    """Index of each image in the data set; one was unreadable, so rows and indices differ."""
    labels: np.ndarray
    """True class of each row."""
    weight: np.ndarray
    """F x C."""
    similarity: np.ndarray
    """F."""
    run: SAERun = RUN
    probe: ProbeRun = PROBE
    names: tuple[str, ...] = tuple(NAMES)
    dead: int = DEAD
    rare: int = RARE

    @property
    def artifacts(self) -> Artifacts:
        return Artifacts(self.settings)

    @property
    def logits(self) -> np.ndarray:
        return self.z.astype(np.float64) @ self.weight

    def save_sae(self, run: SAERun) -> None:
        """An SAE, its names, and its strengths of places365."""
        path = self.artifacts.sae(run)
        make(path, lambda: save_checkpoint(SparseAutoencoder(7, F, seed=1), path), values(run))
        self.save_names(NAMES, run)
        self.save_strengths(self.z, self.keys, run=run)

    def save_names(self, names: list[str], run: SAERun = RUN) -> None:
        path = self.artifacts.concept_names(run)
        write_names(path, [ConceptName(i, name, self.similarity[i]) for i, name in enumerate(names)])

    def make_names(self, names: list[str]) -> Path:
        """The same with a manifest, as stage 4 makes them."""
        path = self.artifacts.concept_names(self.run)
        make(path, lambda: self.save_names(names))
        return path

    def save_strengths(
        self, z: np.ndarray, keys: np.ndarray, dataset: str = "places365", split: str = "val", run: SAERun = RUN
    ) -> None:
        folder, half = self.artifacts.strengths(run, dataset, split), len(z) // 2

        def write() -> None:
            for number, rows in enumerate((slice(None, half), slice(half, None))):
                concepts.write_part(folder / f"{number:05d}.npz", scipy.sparse.csr_matrix(z[rows]), keys[rows])

        make(folder, write)

    def save_classes(self, dataset: str, classes: list[str], labels: np.ndarray) -> None:
        path = self.artifacts.probe_split(dataset)
        make(path, lambda: write_json(path, {"class_names": classes}))
        np.save(self.artifacts.labels(dataset, "val"), labels)

    def save_features(self, dataset: str) -> None:
        """Features of val, as if they had just been extracted; nothing reads more than the manifest."""
        images = probe_images(self.settings, dataset, "val")
        fingerprint = ProbeShards(images, np.arange(len(images.labels))).fingerprint()
        folder = self.artifacts.features(dataset, RUN.encoder, RUN.hook, "val")
        make(folder, lambda: write_part(folder / "0.npz"), inputs={f"val images of {dataset}": fingerprint})

    def save_probe(self, weight: np.ndarray, probe: ProbeRun = PROBE, run: SAERun = RUN) -> None:
        path = self.artifacts.probe(run, probe)
        make(path, lambda: save_probe(torch.from_numpy(weight), path), values(run) | values(probe))


def write_part(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def strengths(seed: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    z = (rng.exponential(size=(n, F)) * (rng.random((n, F)) < 0.5)).astype(np.float32)
    z[:, [DEAD, RARE]] = 0
    z[[2, 5], RARE] = [1, 2]
    return z


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Places365 with three classes and 61 images of val, and a folder of two classes with five images each."""
    root = tmp_path_factory.mktemp("world")
    (root / "config.py").write_text("".join(f"{key} = {value!r}\n" for key, value in CONFIG.items()))
    n_images, places = N + 1, root / "places"
    labels = np.random.default_rng(0).integers(0, len(CLASSES), n_images)
    (places / "val_256").mkdir(parents=True)
    (places / "categories_places365.txt").write_text("".join(f"{name} {i}\n" for i, name in enumerate(CLASSES)))
    (places / "places365_train_standard.txt").write_text("/b/beach/1.jpg 0\n")
    (places / "places365_val.txt").write_text("".join(f"{i:04d}.jpg {label}\n" for i, label in enumerate(labels)))
    for i in range(n_images):  # wider than high
        Image.new("RGB", (40, 30), colour_of("places365", i)).save(places / "val_256" / f"{i:04d}.jpg", quality=95)
    for index in range(10):
        for split in ("train", "val"):
            path = root / "mine" / split / "ab"[index // 5] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), colour_of(f"mine {split}", index)).save(path)

    keys = np.delete(np.arange(n_images), 3)
    weight = np.random.default_rng(4).normal(size=(F, len(CLASSES))).astype(np.float32)
    similarity = np.round(np.random.default_rng(1).random(F), 6)
    world = World(load_settings(root / "config.py"), strengths(2, N), keys, labels[keys], weight, similarity)
    world.save_classes("places365", CLASSES, labels)
    world.save_classes("mine", MINE, np.repeat([0, 1], 5))
    world.save_sae(RUN)
    world.save_strengths(strengths(3, 10), np.arange(10), "mine")
    world.save_probe(weight)
    return world


@pytest.fixture
def world(template: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A copy of the world for one test."""
    # torchvision knows the checksums of the real lists
    monkeypatch.setattr("torchvision.datasets.places365.check_integrity", lambda file, md5: Path(file).is_file())
    shutil.copytree(template.settings.path.parent, tmp_path, dirs_exist_ok=True)
    return replace(template, settings=load_settings(tmp_path / "config.py"))


# ------------------------------------------------------------------------------------------------------------ stages


@pytest.fixture
def image_colour() -> Callable[[str, int], tuple[int, int, int]]:
    return colour_of


@pytest.fixture
def script(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """script(stage, flags) runs a stage in this process, as its script would."""

    def run(stage: str, flags: str = "") -> None:
        monkeypatch.setenv("DNCBM_CONFIG", str(world.settings.path))
        main(stage, flags.split())

    return run


@pytest.fixture
def dumped(world: World) -> Callable[..., Dump]:
    """dumped(module, ...) makes the dump of a kind of explanation: keywords are of the selection, or named below."""

    def dump(
        module: Any, *, k: int | None = 4, datasets: tuple[str, ...] = (), split: str = "val", probe: ProbeRun = PROBE,
        run: SAERun = RUN, overwrite: bool = False, **selection: Any,
    ) -> Dump:  # fmt: skip
        kind: Kind = module.KIND
        given = {type(one): one for one in (run, probe, ProbeDataset(probe.dataset), Explained(split))}
        given |= {Clusters: Clusters(k), ShownDatasets: ShownDatasets(datasets)}
        declared = [given[cls] for cls in (*kind.takes, *kind.dump_takes)]
        module.DUMP.function(world.settings, *declared, kind.selects(**selection), overwrite=overwrite)
        return Dump(kind.files(world.artifacts, *declared), kind)

    return dump
