"""The SAE stage: what it trains, what it refuses, and what identifies the result."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dncbm.concepts.sae
from dncbm.cli import main
from dncbm.concepts.sae import load_sae, train_sae
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SAERun, Tracking
from dncbm.runs.manifests import Outcome, read_manifest
from dncbm.runs.settings import Settings
from sparse_autoencoder import (
    BatchTopK,
    JumpReLU,
    Matryoshka,
    ReLU,
    SparseAutoencoder,
    TopK,
    TrainingSettings,
    load_checkpoint,
    train,
)

TRAINING = TrainingSettings(epochs=3, batch_size=16, lr=1e-3)
RUN = SAERun(expansion_factor=2, training=TRAINING)
KINDS = [ReLU(1e-3), TopK(2), BatchTopK(2), JumpReLU(1e-3), Matryoshka(BatchTopK(2))]
FEATURES = {
    split: np.random.default_rng(n).normal(size=(n, 4)).astype(np.float32) for split, n in (("train", 40), ("train_val", 8))
}
FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def settings(make_settings, make_store, monkeypatch) -> Settings:
    """No figure is drawn."""
    monkeypatch.setattr(Artifacts, "sae_figure", lambda *_: None)
    settings = make_settings(sae_datasets={"cc3m": "images"})
    monkeypatch.setenv("DNCBM_CONFIG", str(settings.path))
    for split, x in FEATURES.items():
        make_store(Artifacts(settings).features("cc3m", "clip_RN50", "out", split), [x])
    return settings


def fit(settings: Settings, run: SAERun = RUN, **options) -> Outcome:
    return train_sae(settings, run, **{"device": "cpu"} | options)


@pytest.mark.parametrize("sparsity", KINDS, ids=lambda kind: type(kind).__name__)
def test_every_kind_is_trained_and_read_back(settings: Settings, sparsity) -> None:
    run = replace(RUN, sparsity=sparsity)
    assert fit(settings, run) is Outcome.RAN
    model = load_sae(settings, run)
    assert model.sparsity == sparsity
    assert model.encode(torch.randn(5, 4)).shape == (5, 8)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    folder = Artifacts(settings).sae(run).parent
    assert {path.name for path in folder.iterdir()} == {
        "training_log.csv", "sparse_autoencoder_final.safetensors", "sparse_autoencoder_final.safetensors.manifest.json",
    }  # fmt: skip
    metrics = read_manifest(Artifacts(settings).sae(run))["details"]["metrics"]
    assert 0 <= metrics["l0"] <= 8
    assert fit(settings, run) is Outcome.ALREADY_DONE


def test_the_figure_is_drawn(settings: Settings, monkeypatch) -> None:
    monkeypatch.undo()
    fit(settings)
    assert Artifacts(settings).sae_figure(RUN).read_bytes().startswith(b"\x89PNG")


CHANGES = [
    {},
    {"training": replace(TRAINING, lr_decay_steps=2)},
    {"training": replace(TRAINING, lr_warmup_steps=5)},
    {"training": replace(TRAINING, adam_beta_1=0.5)},
    {"training": replace(TRAINING, adam_weight_decay=0.5)},
    {"training": replace(TRAINING, seed=3)},
    {"sparsity": ReLU(0.1)},
    {"input_transform": "unit_norm"},
    {"expansion_factor": 3},
]


def by_the_library(run: SAERun, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model = SparseAutoencoder(
        4, 4 * run.expansion_factor, sparsity=run.sparsity, input_transform=run.input_transform, seed=run.training.seed
    )
    train(model, x, run.training, progress=False)
    return model.state_dict()


@pytest.fixture(scope="module")
def unchanged() -> dict[str, torch.Tensor]:
    return by_the_library(RUN, torch.from_numpy(FEATURES["train"]))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: "".join(change) or "as it is")
def test_it_is_trained_as_declared(settings: Settings, unchanged: dict[str, torch.Tensor], change: dict) -> None:
    """Bit by bit the SAE that the library trains on the same features; every setting makes a difference."""
    run = replace(RUN, **change)
    fit(settings, run)
    found = load_checkpoint(Artifacts(settings).sae(run)).state_dict()
    expected = by_the_library(run, torch.from_numpy(FEATURES["train"])) if change else unchanged
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert all(torch.equal(found[name], unchanged[name]) for name in found) == (not change)


def test_a_command_line_trains_what_it_says(settings: Settings) -> None:
    flags = ["--num_epochs", "3", "--train_sae_bs", "16", "--lr", "1e-3", "--expansion_factor", "2", "--device", "cpu"]
    flags += ["--lr_decay_steps", "2", "--ckpt_freq", "40"]
    main("sae", flags)
    run = replace(RUN, training=replace(TRAINING, lr_decay_steps=2))
    assert fit(settings, run) is Outcome.ALREADY_DONE
    assert Artifacts(settings).sae_intermediate(run, 40).is_file()
    shown = read_manifest(Artifacts(settings).sae(run))["run"]
    assert (shown["lr_decay_steps"], shown["sae_type"], shown["l1_coeff"]) == (2, "relu", 3e-5)


def test_the_log_has_losses_on_train_val(settings: Settings) -> None:
    fit(settings, replace(RUN, training=replace(TRAINING, val_freq=1)))
    header, *rows = Artifacts(settings).sae_log(RUN).read_text().splitlines()
    column = next(i for i, name in enumerate(header.split(",")) if name.startswith("val"))
    assert len([row for row in rows if row.split(",")[column]]) == 3


# -------------------------------------------------------------------------------------------------- what identifies it


def test_kinds_never_share_a_path() -> None:
    names = {SAERun(sparsity=sparsity).config_name for sparsity in [*KINDS, TopK(3), JumpReLU(2e-3), ReLU(2e-3)]}
    assert len(names) == len(KINDS) + 3


@pytest.mark.parametrize(
    ("run", "other", "named"),
    [
        (replace(RUN, sparsity=TopK(2)), replace(RUN, sparsity=TopK(2, aux_coeff=0.5)), "sparsity was 'TopK(k=2"),
        (RUN, replace(RUN, training=replace(TRAINING, lr_decay_steps=9)), "lr_decay_steps was 0, now 9"),
        (replace(RUN, suffix="_seed3"), replace(RUN, training=replace(TRAINING, seed=3)), "seed was 49, now 3"),
    ],
)
def test_runs_at_one_path_are_told_apart(settings: Settings, refusal, run: SAERun, other: SAERun, named: str) -> None:
    target = Artifacts(settings).sae(run)
    assert target == Artifacts(settings).sae(other)
    fit(settings, run)
    before = target.read_bytes()
    with refusal(target, named, "--overwrite"):
        fit(settings, other)
    assert target.read_bytes() == before
    assert fit(settings, other, overwrite=True) is Outcome.RAN
    assert target.read_bytes() != before


def test_other_features_are_stale_and_everything_of_the_old_run_goes(settings: Settings, make_store, refusal) -> None:
    fit(settings)
    beside = Artifacts(settings).concept_names(RUN)
    beside.write_text("0,dog\n")
    folder = Artifacts(settings).features("cc3m", "clip_RN50", "out", "train_val")
    make_store(folder, [np.ones((8, 4), dtype=np.float32)])
    with refusal("train_val features has changed"):
        fit(settings)
    assert beside.exists()
    assert fit(settings, overwrite=True) is Outcome.RAN
    assert not beside.exists()


def test_nothing_is_trained_twice(settings: Settings, monkeypatch) -> None:
    fit(settings)
    monkeypatch.setattr(dncbm.concepts.sae, "train", lambda *_, **__: pytest.fail("trained"))
    assert fit(settings, device="nonsense") is Outcome.ALREADY_DONE


def test_a_published_checkpoint_is_used(settings: Settings) -> None:
    published = Artifacts(settings).published_sae(RUN)
    published.parent.mkdir(parents=True)
    published.write_bytes((FIXTURES / "published_format_sparse_autoencoder_final.pt").read_bytes())
    assert fit(settings) is Outcome.PROVIDED
    assert load_sae(settings, RUN).n_latents == load_checkpoint(published).n_latents
    assert not Artifacts(settings).sae(RUN).exists()


# ------------------------------------------------------------------------------------------------------- what it takes


def test_metrics_go_to_wandb_with_their_steps(settings: Settings, monkeypatch) -> None:
    said: list = []
    run = SimpleNamespace(log=lambda values, step: said.append((step, values["l0"])), finish=lambda: said.append("end"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **about: said.append(about) or run))
    fit(settings, replace(RUN, training=replace(TRAINING, log_every=2)), tracking=Tracking(True, "a team"))
    about, *logged, last = said
    assert about == {"project": "dncbm", "entity": "a team", "job_type": "sae", "name": RUN.config_name}
    assert [step for step, _ in logged] == [2, 3, 4, 6, 8, 9], "every second step, and the end of each epoch"
    assert last == "end"


def test_a_stopped_training_is_resumed_to_the_same_bits(settings: Settings, monkeypatch, capsys) -> None:
    """A signal after four of nine steps, as the library sees it: `train` returns early and leaves its state."""
    fit(settings)
    target, state = Artifacts(settings).sae(RUN), Artifacts(settings).sae_state(RUN)
    whole = target.read_bytes()
    for path in target.parent.iterdir():
        path.unlink()

    def stopped(*args, **options):
        state.write_text("state")
        return SimpleNamespace(stopped_early=True, steps=4, metrics={})

    with monkeypatch.context() as patched:
        patched.setattr(dncbm.concepts.sae, "train", stopped)
        assert fit(settings) is Outcome.STOPPED
    assert "stopped after 4 steps" in capsys.readouterr().out
    assert state.exists()
    assert not target.exists()
    state.unlink()
    assert fit(settings) is Outcome.RAN
    assert target.read_bytes() == whole
    assert not state.exists()


@pytest.mark.parametrize("sparsity", [TopK(9), BatchTopK(9), Matryoshka(TopK(9))])
def test_more_active_latents_than_there_are(settings: Settings, refusal, sparsity) -> None:
    run = replace(RUN, sparsity=sparsity)
    with refusal("--k 9", "8 (4 features x --expansion_factor 2)"):
        fit(settings, run)
    assert not Artifacts(settings).sae(run).parent.exists(), "nothing is left to overwrite"


def test_what_is_missing_is_named(settings: Settings, refusal) -> None:
    with refusal("01_save_cc3m_features.py", "--img_enc_name other"):
        fit(settings, SAERun(encoder="other"))
    with refusal("--device nonsense"):
        fit(settings, device="nonsense")
    fit(settings)
    with refusal("02_train_sae_img.py", RUN.config_name):
        load_sae(settings, replace(RUN, expansion_factor=3))
