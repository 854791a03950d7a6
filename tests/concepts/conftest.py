"""What the tests of concepts share: features of 5 dimensions in shards, and an SAE of 20 latents at RUN's path."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, SAERun
from dncbm.runs.settings import Settings
from sparse_autoencoder import SparseAutoencoder, save_checkpoint

SIZES = (7, 1, 9)
"""Rows of each shard of features."""


@dataclass(frozen=True)
class Mine:
    """Features of the probe data set `mine`, and an SAE on them of whose latents about one in six is active."""

    settings: Settings
    run: SAERun
    features: dict[str, np.ndarray]
    make_store: Callable

    @property
    def artifacts(self) -> Artifacts:
        return Artifacts(self.settings)

    def write_features(self, split: str, x: np.ndarray) -> None:
        """17 rows in three shards, whose keys are 0, 3, 6, ..."""
        parts = [np.split(rows, np.cumsum(SIZES)[:-1]) for rows in (x, np.arange(sum(SIZES)) * 3)]
        self.make_store(self.artifacts.features("mine", self.run.encoder, "out", split), *parts)

    def sae(self, seed: int = 4) -> SparseAutoencoder:
        model = SparseAutoencoder(5, 20, seed=3)
        with torch.no_grad():
            model.encoder_weight.normal_(generator=torch.Generator().manual_seed(seed))
            model.encoder_bias.fill_(-2)
            model.tied_bias.fill_(0.1)
        return model

    def replace_sae(self, seed: int = 8) -> None:
        """Another SAE at the same path."""
        save_checkpoint(self.sae(seed), self.artifacts.sae(self.run))


@pytest.fixture
def mine(make_settings, make_store) -> Mine:
    features = {split: np.random.default_rng(i).normal(size=(17, 5)).astype(np.float32) for i, split in enumerate(SPLITS)}
    found = Mine(make_settings(probe_datasets={"mine": "images"}), SAERun(encoder="enc"), features, make_store)
    for split in SPLITS:
        found.write_features(split, features[split])
    found.replace_sae(4)
    return found
