"""What the tests of the probe share: one thread, sparse data, and a data set whose concept strengths equal its features."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

from dncbm.concepts.strengths import save_concept_strengths
from dncbm.probe.model import ProbeData
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, ProbeDataset, SAERun, Splits
from dncbm.runs.manifests import making, write_json
from dncbm.runs.settings import Settings
from sparse_autoencoder import SparseAutoencoder, save_checkpoint


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only get in each other's way on matrices this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def strengths() -> Callable[..., np.ndarray]:
    """Non-negative values, most of them zero."""

    def make(n_rows: int, n_concepts: int, seed: int, density: float = 0.3) -> np.ndarray:
        rng = np.random.default_rng(seed)
        values = rng.uniform(0.1, 2, (n_rows, n_concepts)) * (rng.random((n_rows, n_concepts)) < density)
        return values.astype(np.float32)

    return make


@pytest.fixture(scope="session")
def sparse() -> Callable[..., ProbeData]:
    """Values, and labels or zeros, as a split of concept strengths."""

    def make(values: np.ndarray, labels: np.ndarray | None = None) -> ProbeData:
        labels = np.zeros(len(values), dtype=np.int64) if labels is None else labels
        return ProbeData(scipy.sparse.csr_matrix(values), torch.from_numpy(labels))

    return make


@pytest.fixture(scope="session")
def write_labels() -> Callable[..., None]:
    """Writes the class names, labels and groups of the data set `mine`, as the extraction leaves them."""

    def write(settings: Settings, about: dict, labels: dict[str, np.ndarray], groups: np.ndarray | None = None) -> None:
        artifacts = Artifacts(settings)
        split = artifacts.probe_split("mine")
        with making(split, "probe_split", about, {}, overwrite=True) as work:
            write_json(split, about)
            for name, of_split in labels.items():
                np.save(artifacts.labels("mine", name), of_split)
            if groups is not None:
                np.save(artifacts.groups("mine", "val"), groups)
            work.done([split])

    return write


@pytest.fixture(scope="session")
def coverage_by_hand() -> Callable[[np.ndarray, np.ndarray, bool], list[list[int]]]:
    """Take concepts one at a time, the largest contribution to the predicted class first, until a share is reached."""

    def count(values: np.ndarray, weight: np.ndarray, absolute: bool) -> list[list[int]]:
        counts = []
        for z in values.astype(np.float64):
            predicted = max(range(weight.shape[1]), key=lambda c: sum(z * weight[:, c]))
            contributions = [abs(c) if absolute else max(c, 0.0) for c in z * weight[:, predicted]]
            row = []
            for share in (0.90, 0.95, 0.99):
                taken, count = 0.0, 0
                for contribution in sorted(contributions, reverse=True):
                    if taken >= share * sum(contributions) - 1e-9:
                        break
                    taken, count = taken + contribution, count + 1
                row.append(count)
            counts.append(row)
        return counts

    return count


@dataclass(frozen=True)
class Mine:
    """A probe data set `mine` of 12 features and 4 classes, of which some images are left out."""

    settings: Settings
    run: SAERun
    keys: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    """Features of each split, which are its concept strengths too."""
    labels: dict[str, np.ndarray]

    @property
    def artifacts(self) -> Artifacts:
        return Artifacts(self.settings)

    def replace_sae(self, factor: float = 2.0, run: SAERun | None = None) -> None:
        """Another SAE at the path of `run`, by default at the same."""
        identity = SparseAutoencoder(12, 12)
        with torch.no_grad():
            identity.encoder_weight.copy_(factor * torch.eye(12))
            identity.encoder_bias.zero_()
            identity.tied_bias.zero_()
        save_checkpoint(identity, self.artifacts.sae(run or self.run))

    def save_strengths(self, run: SAERun | None = None, **options: bool) -> None:
        save_concept_strengths(self.settings, run or self.run, ProbeDataset("mine"), Splits(), device="cpu", **options)


@pytest.fixture
def mine(make_settings, make_store, write_labels, strengths, monkeypatch: pytest.MonkeyPatch) -> Mine:
    settings = make_settings(probe_datasets={"mine": "images"})
    monkeypatch.setenv("DNCBM_CONFIG", str(settings.path))
    Path(settings.path.parent, "images").mkdir()
    keys = {"train": np.arange(2, 120), "train_val": np.arange(121, 150), "val": np.arange(0, 40, 2)}
    values = {split: strengths(len(keys[split]), 12, number) for number, split in enumerate(SPLITS)}
    for of_split in values.values():
        of_split[~of_split.any(axis=1), 0] = 0.1  # a row of zeros would leave the ranking of classes to chance
    own = {"train": np.random.default_rng(8).integers(0, 4, 150), "val": np.random.default_rng(7).integers(0, 4, 40)}
    for split in SPLITS:  # three concepts point to each class
        noise = np.random.default_rng(9).random((len(keys[split]), 4))
        own[settings.own_split("mine", split)][keys[split]] = (values[split].reshape(-1, 4, 3).sum(axis=2) + noise).argmax(
            axis=1
        )
    labels = {split: own[settings.own_split("mine", split)][keys[split]] for split in SPLITS}
    found = Mine(settings, SAERun(encoder="enc"), keys, values, labels)
    for split in SPLITS:
        make_store(found.artifacts.features("mine", "enc", "out", split), [values[split]], [keys[split]])
    write_labels(settings, {"class_names": ["a", "b", "c", "d"]}, own)
    found.replace_sae(1.0)
    found.save_strengths()
    return found
