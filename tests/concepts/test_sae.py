"""The SAE stage: what it trains, what it refuses, and what identifies the result."""

import csv
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dncbm.concepts.sae
from dncbm.cli import main
from dncbm.concepts.sae import firing_rates, load_sae, sae_metrics, train_sae
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SAERun, Tracking
from dncbm.runs.errors import StaleArtifact, UserError
from dncbm.runs.manifests import Outcome, making, manifest_path, read_manifest, verifying_hashes
from dncbm.runs.settings import Settings
from sparse_autoencoder import (
    BatchTopK,
    CheckpointError,
    JumpReLU,
    Matryoshka,
    ReLU,
    SparseAutoencoder,
    TopK,
    TrainingSettings,
    evaluate,
    load_checkpoint,
    save_checkpoint,
    train,
)
from sparse_autoencoder.declare import values

TRAINING = TrainingSettings(epochs=3, batch_size=16, lr=1e-3)
RUN = SAERun(expansion_factor=2, training=TRAINING)
KINDS = [ReLU(1e-3), TopK(2), BatchTopK(2), JumpReLU(1e-3), Matryoshka(BatchTopK(2))]
FEATURES = {
    split: np.random.default_rng(n).normal(size=(n, 4)).astype(np.float32)
    for split, n in (("train", 40), ("train_val", 8), ("val", 5))
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
        "training_log.csv", "firing_rates.npy", "sparse_autoencoder_final.safetensors",
        "sparse_autoencoder_final.safetensors.manifest.json",
    }  # fmt: skip
    assert read_manifest(Artifacts(settings).sae(run))["details"]["device"] == "cpu"
    assert fit(settings, run) is Outcome.ALREADY_DONE


@pytest.mark.parametrize("val_freq", [0, 1, 2])
def test_it_is_measured_on_both_splits(settings: Settings, capsys, val_freq: int) -> None:
    """By the library, at the end, whatever --val_freq says: in the manifest, the log and the line that is printed."""
    run = replace(RUN, training=replace(TRAINING, val_freq=val_freq))
    fit(settings, run, device="auto")
    model = load_sae(settings, run)
    wanted = {split: evaluate(model, torch.from_numpy(FEATURES[split])) for split in ("train_val", "train")}
    found = sae_metrics(settings, run)
    assert list(found) == list(wanted)
    assert all(found[split] == pytest.approx(wanted[split], rel=1e-5) for split in wanted)
    with Artifacts(settings).sae_log(run).open(newline="") as file:
        *_, last = csv.DictReader(file)
    for split, name in (("train_val", "val"), ("train", "train")):
        logged = {key: float(last[f"{name}_{key}"]) for key in wanted[split]}
        assert logged == pytest.approx(wanted[split], rel=1e-5)
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("SAE "))
    assert said.startswith(f"SAE on train_val: L0 {wanted['train_val']['l0']:.2f}, explained variance ")
    assert f"; on train: L0 {wanted['train']['l0']:.2f}, " in said


def test_what_is_undefined_is_said(settings: Settings, make_store, capsys, caplog) -> None:
    """One image does not vary."""
    make_store(Artifacts(settings).features("cc3m", "clip_RN50", "out", "train_val"), [np.ones((1, 4), dtype=np.float32)])
    fit(settings)
    assert sae_metrics(settings, RUN)["train_val"]["explained_variance"] is None
    assert "explained variance undefined" in capsys.readouterr().out
    assert "undefined" in caplog.text


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


def test_what_counts_is_how_an_epoch_was_shuffled(settings: Settings, refusal) -> None:
    """`auto` is recorded as what it chose, and `exact` like runs from before there was a choice."""
    exact, shards = (replace(RUN, training=replace(TRAINING, shuffle=way)) for way in ("exact", "shards"))
    fit(settings)
    manifest = read_manifest(Artifacts(settings).sae(RUN))
    assert (manifest["settings"].get("shuffle"), manifest["run"]["shuffle"]) == (None, "exact")
    assert fit(settings, exact) is Outcome.ALREADY_DONE
    with refusal("shuffle was the default, now 'shards'"):
        fit(settings, shards)
    assert fit(settings, shards, overwrite=True) is Outcome.RAN
    with refusal("shuffle was 'shards', now the default"):
        fit(settings)


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


def test_firing_rates_are_those_of_the_final_model_on_train(settings: Settings, make_store, refusal) -> None:
    fit(settings)
    artifacts = Artifacts(settings)
    fired = load_sae(settings, RUN).encode(torch.from_numpy(FEATURES["train"])).numpy() > 0
    rates = firing_rates(settings, RUN)
    np.testing.assert_allclose(rates, fired.mean(axis=0), rtol=1e-12)
    assert rates.dtype == np.float64
    assert set(read_manifest(artifacts.sae(RUN))["outputs"]) == {artifacts.sae(RUN).name, artifacts.firing_rates(RUN).name}
    content = artifacts.firing_rates(RUN).read_bytes()
    artifacts.firing_rates(RUN).unlink()
    with refusal(artifacts.firing_rates(RUN), "is missing"):
        load_sae(settings, RUN)
    assert fit(settings) is Outcome.RAN  # with the same command
    assert artifacts.firing_rates(RUN).read_bytes() == content
    np.save(artifacts.firing_rates(RUN), rates + 1)
    with pytest.raises(StaleArtifact, match=r"firing_rates\.npy has changed"):
        firing_rates(settings, RUN)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: np.save(path, np.ones(3)), "shape (3,), and the SAE has 8"),
        (lambda path: np.save(path, np.ones(8, dtype=np.float32)), "float32"),
        (lambda path: np.save(path, np.full(8, np.nan)), "between 0 and 1"),
        (lambda path: path.write_bytes(b""), "No data"),
        (lambda path: path.write_bytes(b"no numbers"), "pickled"),
    ],
    ids=["length", "type", "nan", "empty", "text"],
)
def test_firing_rates_of_another_sae_are_refused(settings: Settings, refusal, damage, said: str) -> None:
    target, rates = Artifacts(settings).sae(RUN), Artifacts(settings).firing_rates(RUN)
    with making(target, "sae", {}, {}, overwrite=False) as work:
        save_checkpoint(SparseAutoencoder(4, 8, seed=1), target)
        damage(rates)
        work.done([target, rates])
    with refusal(rates, said, "02_train_sae_img.py --overwrite"):
        firing_rates(settings, RUN)


def test_firing_rates_that_no_manifest_tells_of_are_not_used(settings: Settings) -> None:
    """Nobody knows whether they are those of an SAE that was put in the place of the one that was trained."""
    fit(settings)
    artifacts = Artifacts(settings)
    assert firing_rates(settings, RUN) is not None
    save_checkpoint(SparseAutoencoder(4, 8, seed=1), artifacts.sae(RUN))
    manifest_path(artifacts.sae(RUN)).unlink()
    assert artifacts.firing_rates(RUN).is_file()
    assert firing_rates(settings, RUN) is None
    with making(artifacts.sae(RUN), "sae", {}, {}, overwrite=True) as work:  # of an older version
        save_checkpoint(SparseAutoencoder(4, 8, seed=1), artifacts.sae(RUN))
        work.done([artifacts.sae(RUN)])
    np.save(artifacts.firing_rates(RUN), np.zeros(8))
    assert firing_rates(settings, RUN) is None


def test_nothing_is_trained_twice(settings: Settings, monkeypatch) -> None:
    fit(settings)
    monkeypatch.setattr(dncbm.concepts.sae, "train", lambda *_, **__: pytest.fail("trained"))
    assert fit(settings, device="nonsense") is Outcome.ALREADY_DONE


def test_a_published_checkpoint_is_used(settings: Settings) -> None:
    """The fixture has 64 latents of 16 features."""
    run = SAERun(encoder="published", expansion_factor=4)
    published = put_published(settings, run)
    assert fit(settings, run) is Outcome.PROVIDED, "even before there are features"
    assert load_sae(settings, run).n_latents == 64
    assert not Artifacts(settings).sae(run).exists()
    assert published.is_file()


def put_published(settings: Settings, run: SAERun) -> Path:
    path = Artifacts(settings).published_sae(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((FIXTURES / "published_format_sparse_autoencoder_final.pt").read_bytes())
    return path


class Malicious:
    """Leaves a file when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (lambda path: torch.save({"tied_bias": Malicious()}, path), "it holds more than tensors"),
        (lambda path: path.write_bytes(pickle.dumps(Malicious())), "not a PyTorch file"),
        (lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path), "missing: tied_bias"),
        (lambda path: path.write_bytes(path.read_bytes()[:900]), "not a PyTorch file"),
        (lambda path: path.write_bytes(b""), "not a PyTorch file"),
        (lambda path: path.write_bytes(path.read_bytes()[::-1]), "not a PyTorch file"),
        (lambda path: path.write_text("<html>not found</html>"), "not a PyTorch file"),
    ],
)
def test_a_foreign_checkpoint_is_refused_at_once(settings: Settings, refusal, monkeypatch, tmp_path, content, named) -> None:
    monkeypatch.chdir(tmp_path)
    run = SAERun(encoder="published", expansion_factor=4)
    published = put_published(settings, run)
    content(published)
    for read in (fit, load_sae):
        with refusal(published, named, "put the published file there again, or remove it"):
            read(settings, run)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError) as caught:
        fit(settings, run)
    assert "weights_only" not in str(caught.value)


def test_a_checkpoint_of_other_features_is_refused(settings: Settings, refusal) -> None:
    put_published(settings, SAERun(expansion_factor=4))
    with refusal("64 latents of 16 features", "clip_RN50 are 4 numbers"):
        fit(settings, SAERun(expansion_factor=4))
    put_published(settings, SAERun(encoder="published", expansion_factor=8))
    with refusal("64 latents of 16 features", "not --expansion_factor 8"):
        fit(settings, SAERun(encoder="published", expansion_factor=8))


# ------------------------------------------------------------------------------------------------------- what it takes


def test_metrics_go_to_wandb_with_their_steps(settings: Settings, monkeypatch) -> None:
    said: list = []
    run = SimpleNamespace(log=lambda values, step: said.append((step, values)), finish=lambda: said.append("end"))
    histogram = lambda np_histogram: ("histogram", int(np_histogram[0].sum()))  # noqa: E731
    fake = SimpleNamespace(init=lambda **about: said.append(about) or run, Histogram=histogram)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracked = replace(RUN, training=replace(TRAINING, log_every=2))
    fit(settings, tracked, tracking=Tracking(True, "a team"))
    about, *logged, last = said
    config = about.pop("config")
    named = {"project": "dncbm", "entity": "a team", "job_type": "sae", "name": RUN.config_name}
    assert about == named | {"group": "cc3m clip_RN50 out"}
    assert config == values(tracked) | {"n_inputs": 4, "n_latents": 8, "train_items": 40}
    assert [step for step, _ in logged] == [2, 3, 4, 6, 8, 9], "every second step, and the end of each epoch"
    theirs = {"train/loss/total_loss", "train/loss/l2_reconstruction_loss", "train/loss/learned_activations_l1_loss_penalty"}
    theirs |= {"train/learned_activations_l0_norm", "train/feature_density"}
    assert all(theirs <= row.keys() for _, row in logged)
    assert all(row["train/feature_density"] == ("histogram", 8) for _, row in logged)
    assert "validate/loss/total_loss" in logged[-1][1]
    assert last == "end"


@pytest.mark.parametrize("reason", ["no login", "not installed"])
def test_wandb_that_does_not_start_is_one_line(settings: Settings, refusal, monkeypatch, reason: str) -> None:
    class Error(Exception):
        pass

    def init(**about: object) -> None:
        raise Error("No API key configured. Use `wandb login` to log in.\nmore")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=Error) if reason == "no login" else None)
    with refusal("--use_wandb", *(("wandb login", "WANDB_MODE=offline") if reason == "no login" else ("pip install wandb",))):
        fit(settings, tracking=Tracking(True))
    assert not Artifacts(settings).sae(RUN).exists()


@pytest.mark.slow
def test_wandb_itself_keeps_a_run(settings: Settings, monkeypatch, tmp_path) -> None:
    """Its real package, offline."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert fit(settings, tracking=Tracking(True)) is Outcome.RAN
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_stopped_training_is_resumed_to_the_same_bits(settings: Settings, monkeypatch, capsys) -> None:
    """A signal after four of nine steps, as the library sees it: `train` returns early and leaves its state."""
    fit(settings)
    target, state = Artifacts(settings).sae(RUN), Artifacts(settings).sae_state(RUN)
    whole, rates = target.read_bytes(), Artifacts(settings).firing_rates(RUN).read_bytes()
    for path in target.parent.iterdir():
        path.unlink()

    def send(number: signal.Signals):
        def training(*args, log, **options):
            def at_four(row: dict, step: int) -> None:
                if step == 4:
                    os.kill(os.getpid(), number)

            return train(*args, log=at_four, **options)

        return training

    run = replace(RUN, training=replace(TRAINING, log_every=2))
    with monkeypatch.context() as patched:
        patched.setattr(signal, "getsignal", lambda _: signal.default_int_handler)
        patched.setattr(dncbm.concepts.sae, "train", send(signal.SIGTERM))
        assert fit(settings, run) is Outcome.STOPPED
        assert f"stopped after 4 steps: the same command resumes from {state}" in capsys.readouterr().out
        assert state.exists()
        state.unlink()
        patched.setattr(dncbm.concepts.sae, "train", send(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):  # it ends the pipeline, and the process with 130
            fit(settings, run)
        assert f"stopped after 4 steps: the same command resumes from {state}" in capsys.readouterr().out
    assert state.exists()
    assert not target.exists()
    assert fit(settings, run) is Outcome.RAN
    assert (target.read_bytes(), Artifacts(settings).firing_rates(RUN).read_bytes()) == (whole, rates)
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


def test_features_that_are_all_the_same_are_refused(settings: Settings, make_store, refusal) -> None:
    folder = Artifacts(settings).features("cc3m", "clip_RN50", "out", "train")
    make_store(folder, [np.full((40, 4), 0.3, dtype=np.float32)])
    with refusal(folder, "the same for all 40 images"):
        fit(settings)


def test_more_memory_than_there_is_is_refused(settings: Settings, refusal, monkeypatch) -> None:
    monkeypatch.setattr(dncbm.concepts.sae, "train", lambda *_, **__: pytest.fail("trained"))
    huge = replace(RUN, expansion_factor=4096, training=replace(TRAINING, batch_size=2**24))
    monkeypatch.setattr(os, "sysconf", lambda _: 2000)  # pages of 2000 bytes, 2000 of them
    with refusal("4 x 16384 in batches of 16777216", "GB", "--expansion_factor"):
        fit(settings, huge)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_runs_out_is_one_line(settings: Settings, refusal, monkeypatch, error: Exception) -> None:
    def out_of_memory(*_, **__):
        raise error

    monkeypatch.setattr(dncbm.concepts.sae, "train", out_of_memory)
    with refusal("out of memory", "--train_sae_bs"):
        fit(settings)


# ------------------------------------------------------------------------------------------------- damage, and its modes


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "without its last byte": lambda content: content[:-1],
    "empty": lambda _: b"",
    "reversed": lambda content: content[::-1],
    "foreign": lambda _: b"<html>not found</html>" * 20,
    "huge header": lambda content: (2**62).to_bytes(8, "little") + content[8:],
    "a bit of a tensor": lambda content: content[:-9] + bytes([content[-9] ^ 64]) + content[-8:],
}


def interrupted(settings: Settings, monkeypatch) -> Path:
    """The state that a run leaves which ends at its second step."""

    def ends(*args, **options):
        def stop(row: dict, step: int) -> None:
            raise KeyboardInterrupt

        return train(*args, **options | {"log": stop, "state_every": 0})

    with monkeypatch.context() as patched:
        patched.setattr(dncbm.concepts.sae, "train", ends)
        with pytest.raises(KeyboardInterrupt):
            fit(settings)
    return Artifacts(settings).sae_state(RUN)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_named_and_can_be_left(settings: Settings, monkeypatch, damage: str) -> None:
    fit(settings)
    whole = Artifacts(settings).sae(RUN).read_bytes()
    for path in Artifacts(settings).sae(RUN).parent.iterdir():
        path.unlink()
    state = interrupted(settings, monkeypatch)
    state.write_bytes(DAMAGES[damage](state.read_bytes()))
    with pytest.raises(CheckpointError) as caught:
        fit(settings)
    assert str(state) in str(caught.value)
    assert "delete it to start from scratch" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert fit(settings, overwrite=True) is Outcome.RAN
    assert Artifacts(settings).sae(RUN).read_bytes() == whole


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_damaged_sae_is_named_and_made_again(settings: Settings, damage: str) -> None:
    fit(settings)
    target = Artifacts(settings).sae(RUN)
    whole = target.read_bytes()
    target.write_bytes(DAMAGES[damage](whole))
    reading = pytest.raises(UserError) if damage != "a bit of a tensor" else pytest.raises(StaleArtifact)
    with verifying_hashes(), reading as caught:
        load_sae(settings, RUN)
    assert target.name in str(caught.value)
    assert "\n" not in str(caught.value)
    with verifying_hashes():
        assert fit(settings, overwrite=True) is Outcome.RAN
    assert target.read_bytes() == whole


def test_an_sae_of_old_features_is_not_read(settings: Settings, make_store) -> None:
    fit(settings)
    make_store(Artifacts(settings).features("cc3m", "clip_RN50", "out", "train"), [np.ones((8, 4), dtype=np.float32)])
    with pytest.raises(StaleArtifact):
        load_sae(settings, RUN)


@pytest.mark.slow
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_others_can_read_what_the_umask_allows(settings: Settings, umask: int, mode: int) -> None:
    """Every file that the stage leaves, intermediate checkpoints included."""
    command = f"import os; os.umask({umask}); from dncbm.cli import main; main('sae', ['--num_epochs', '2', "
    command += "'--train_sae_bs', '16', '--ckpt_freq', '1epochs', '--expansion_factor', '2', '--device', 'cpu'])"
    subprocess.run([sys.executable, "-c", command], check=True, capture_output=True)
    run = SAERun(expansion_factor=2, training=TrainingSettings(epochs=2, batch_size=16))
    files = [path for path in Artifacts(settings).sae(run).parent.iterdir() if path.is_file()]
    assert {Artifacts(settings).sae(run), Artifacts(settings).sae_intermediate(run, 40)} <= set(files)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: oct(mode) for path in files}
