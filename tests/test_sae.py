"""The SAE stage: what it refuses, and that every kind of SAE goes through training, checkpoint, names and strengths."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dncbm.artifacts import Artifacts, SAERun
from dncbm.manifests import Outcome, read_manifest
from dncbm.sae import load_sae, train_sae
from dncbm.settings import Settings
from sparse_autoencoder import BatchTopK, JumpReLU, Matryoshka, ReLU, TopK, TrainingSettings

TRAINING = TrainingSettings(epochs=3, batch_size=16, lr=1e-3)
KINDS = [ReLU(1e-3), TopK(2), BatchTopK(2), JumpReLU(1e-3), Matryoshka(BatchTopK(2))]


@pytest.fixture
def settings(make_settings, make_store) -> Settings:
    """Features of 4 dimensions, 40 to train on."""
    settings = make_settings()
    rng = np.random.default_rng(0)
    for split, n in (("train", 40), ("train_val", 8)):
        folder = Artifacts(settings).features("cc3m", "clip_RN50", "out", split)
        make_store(folder, [rng.normal(size=(n, 4)).astype(np.float32)])
    return settings


@pytest.mark.parametrize("sparsity", KINDS, ids=lambda kind: type(kind).__name__)
def test_every_kind_is_trained_and_read_back(settings: Settings, sparsity) -> None:
    run = SAERun(sparsity=sparsity, expansion_factor=2, training=TRAINING)
    assert train_sae(settings, run, device="cpu") is Outcome.RAN
    model = load_sae(settings, run)
    assert model.sparsity == sparsity
    assert model.encode(torch.randn(5, 4)).shape == (5, 8)
    folder = Artifacts(settings).sae(run).parent
    assert {"training_log.csv", "training.png"} <= {path.name for path in folder.iterdir()}
    metrics = read_manifest(Artifacts(settings).sae(run))["details"]["metrics"]
    assert 0 <= metrics["l0"] <= 8
    assert train_sae(settings, run, device="cpu") is Outcome.ALREADY_DONE


def test_kinds_never_share_a_path() -> None:
    names = {SAERun(sparsity=sparsity).config_name for sparsity in [*KINDS, TopK(3), JumpReLU(2e-3), ReLU(2e-3)]}
    assert len(names) == len(KINDS) + 3


@pytest.mark.parametrize("sparsity", [TopK(9), BatchTopK(9), Matryoshka(TopK(9))])
def test_more_active_latents_than_there_are(settings: Settings, refusal, sparsity) -> None:
    run = SAERun(sparsity=sparsity, expansion_factor=2, training=TRAINING)
    with refusal("--k 9", "4 features x --expansion_factor 2 = 8"):
        train_sae(settings, run, device="cpu")
    assert not Path(Artifacts(settings).sae(run)).parent.exists(), "nothing is left to overwrite"
