"""A small world with everything that is explained: images, strengths, names and a probe, at the places of the paper's run."""

import hashlib
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from PIL import Image

from dncbm import concepts
from dncbm.artifacts import Artifacts, ProbeRun, SAERun
from dncbm.manifests import Recipe, begin, finish, write_json
from dncbm.naming import ConceptName, write_names
from dncbm.probing import save_probe
from dncbm.settings import Settings
from sparse_autoencoder import SparseAutoencoder, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
RUN = SAERun()
CLASSES = ["/b/beach", "/c/coast", "/a/apartment_building/outdoor"]
NAMES = ["sand", "dog", "sea", "dog", "a word that is much longer than any column can hold", "50%_of_$1 & more", "sky"]
NAMES += [f"word{i}" for i in range(7, 14)]
F, N = len(NAMES), 60
DEAD, RARE = 9, 6
"""A latent that no image activates, and one that two images do."""


@dataclass(frozen=True)
class World:
    """What the files hold, dense, for formulas by hand."""

    settings: Settings
    z: np.ndarray
    """images x F of val."""
    keys: np.ndarray
    """Index of each image in the data set: one was unreadable, so that rows and indices differ."""
    labels: np.ndarray
    """Of the rows."""
    weight: np.ndarray
    """F x C."""
    similarity: np.ndarray
    run: SAERun = RUN
    probe: ProbeRun = field(default_factory=lambda: ProbeRun("places365"))
    classes: tuple[str, ...] = tuple(CLASSES)
    names: tuple[str, ...] = tuple(NAMES)
    dead: int = DEAD
    rare: int = RARE

    @property
    def artifacts(self) -> Artifacts:
        return Artifacts(self.settings)

    @property
    def logits(self) -> np.ndarray:
        return self.z.astype(np.float64) @ self.weight

    def save_strengths(self, z: np.ndarray) -> None:
        """Replace those of places365."""
        save_strengths(self.artifacts, "places365", "val", z, self.keys)


def strengths(seed: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    z = (rng.exponential(size=(n, F)) * (rng.random((n, F)) < 0.5)).astype(np.float32)
    z[:, DEAD] = 0
    z[:, RARE] = 0
    z[[2, 5], RARE] = [1, 2]
    return z


def save_strengths(artifacts: Artifacts, dataset: str, split: str, z: np.ndarray, keys: np.ndarray) -> None:
    folder = artifacts.strengths(RUN, dataset, split)
    recipe = Recipe("strengths by hand", {"hash": hashlib.sha256(z.tobytes()).hexdigest()})
    begin(folder, recipe, overwrite=True)
    half = len(z) // 2
    for number, rows in enumerate((slice(None, half), slice(half, None))):
        concepts._write_part(folder / f"{number:05d}.npz", scipy.sparse.csr_matrix(z[rows]), keys[rows])
    finish(folder, recipe, folder.glob("*.npz"))


def save_classes(artifacts: Artifacts, dataset: str, classes: list[str], labels: np.ndarray) -> None:
    recipe = Recipe("probe_split")
    target = artifacts.probe_split(dataset)
    begin(target, recipe, overwrite=True)
    write_json(target, {"class_names": classes})
    np.save(artifacts.labels(dataset, "val"), labels)
    finish(target, recipe, [target])


@pytest.fixture
def world(make_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Places365 with three classes and 61 images of val, and a folder of two classes."""
    # torchvision knows the checksums of the real lists
    monkeypatch.setattr("torchvision.datasets.places365.check_integrity", lambda file, md5: Path(file).is_file())
    settings = make_settings(
        probe_datasets={"places365": "places", "mine": "mine", "imagenet": "nowhere"},
        sae_datasets={"cc3m": "photos"},
        encoders={"clip_RN50": ("RN50-quickgelu", "openai")},
    )
    artifacts = Artifacts(settings)
    rng = np.random.default_rng(0)
    n_images = N + 1
    labels = rng.integers(0, len(CLASSES), n_images)
    places = tmp_path / "places"
    (places / "val_256").mkdir(parents=True)
    (places / "categories_places365.txt").write_text("".join(f"{name} {i}\n" for i, name in enumerate(CLASSES)))
    (places / "places365_train_standard.txt").write_text("/b/beach/1.jpg 0\n")
    (places / "places365_val.txt").write_text("".join(f"{i:04d}.jpg {label}\n" for i, label in enumerate(labels)))
    for i in range(n_images):  # wider than high, and each of its own colour
        Image.new("RGB", (40, 30), (4 * i, 255 - 4 * i, 128)).save(places / "val_256" / f"{i:04d}.jpg", quality=95)
    for split in ("train", "val"):
        for name in ("a", "b"):
            for i in range(5):
                path = tmp_path / "mine" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 16), (0, 50 * i, 250)).save(path)

    similarity = np.random.default_rng(1).random(F)
    save_checkpoint(SparseAutoencoder(7, F, seed=1), artifacts.sae(RUN))
    names = [ConceptName(i, name, similarity[i]) for i, name in enumerate(NAMES)]
    write_names(artifacts.concept_names(RUN), names)
    keys = np.delete(np.arange(n_images), 3)
    z = strengths(2, N)
    save_strengths(artifacts, "places365", "val", z, keys)
    save_strengths(artifacts, "mine", "val", strengths(3, 10), np.arange(10))
    save_classes(artifacts, "places365", CLASSES, labels)
    save_classes(artifacts, "mine", ["a", "b"], np.repeat([0, 1], 5))
    weight = np.random.default_rng(4).normal(size=(F, len(CLASSES))).astype(np.float32)
    save_probe(torch.from_numpy(weight), artifacts.probe(RUN, ProbeRun("places365")))
    return World(settings, z, keys, labels[keys], weight, np.round(similarity, 6))


@pytest.fixture
def script(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """script(name, *flags) runs a script of scripts/visualization in this process, as `python` would."""

    def run(name: str, *flags: str) -> None:
        monkeypatch.setenv("DNCBM_CONFIG", str(world.settings.path))
        monkeypatch.setattr(sys, "argv", [name, *flags])
        runpy.run_path(str(ROOT / "scripts" / "visualization" / name), run_name="__main__")

    return run
