"""Fine-tuning an SAE towards its names: the loss, what it changes and what not, interruptions, the command."""

import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dncbm.concepts.alignment
from dncbm.cli import main
from dncbm.concepts.alignment import align_names, names_loss, training_of
from dncbm.concepts.evidence.images import evidence_datasets
from dncbm.concepts.evidence.seeds import runs_to_compare
from dncbm.concepts.naming import ABSTAINS, assign_names, read_names
from dncbm.concepts.sae import firing_rates, load_sae, sae_metrics, train_sae
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Alignment, SAERun, Seeds
from dncbm.runs.errors import StaleArtifact
from dncbm.runs.manifests import manifest_path, read_manifest
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
    train,
)

N_TRAIN, D, WORDS = 60, 6, [f"word {i}" for i in range(20)]
FEATURES = {
    split: np.random.default_rng(n).normal(size=(n, D)).astype(np.float32)
    for split, n in (("train", N_TRAIN), ("train_val", 30))
}
EMBEDDINGS = np.random.default_rng(5).normal(size=(len(WORDS), D)).astype(np.float32)
RUN = SAERun(
    encoder="enc", expansion_factor=2, sparsity=ReLU(1e-3), training=TrainingSettings(epochs=40, batch_size=16, lr=1e-2)
)
SOME = Alignment(0.1)


@pytest.fixture
def settings(make_settings, make_store, monkeypatch) -> Settings:
    """Features and words, but no SAE yet. No figure is drawn."""
    monkeypatch.setattr(Artifacts, "sae_figure", lambda *_: None)
    settings = make_settings(
        sae_datasets={"cc3m": "images"}, encoders={"enc": "local-dir:enc"}, defaults={"img_enc_name": "enc", "device": "cpu"}
    )
    monkeypatch.setenv("DNCBM_CONFIG", str(settings.path))
    artifacts = Artifacts(settings)
    for split, x in FEATURES.items():
        make_store(artifacts.features("cc3m", "enc", "out", split), [x])
    artifacts.words().parent.mkdir()
    artifacts.words().write_text("\n".join(WORDS))
    torch.save(torch.from_numpy(EMBEDDINGS), artifacts.published_embeddings("enc"))
    return settings


@pytest.fixture
def trained(settings: Settings) -> Settings:
    """The same, with RUN's SAE and its names."""
    train_sae(settings, RUN, device="cpu")
    assign_names(settings, RUN)
    return settings


def align(settings: Settings, run: SAERun = RUN, alignment: Alignment = SOME, **options) -> SAERun:
    return align_names(settings, run, alignment, **{"device": "cpu"} | options)


def targets_of(settings: Settings, run: SAERun = RUN) -> np.ndarray:
    """The unit embedding of each latent's name."""
    found = EMBEDDINGS[[WORDS.index(name.name) for name in read_names(settings, run)]].astype(np.float64)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def mean_cosine(sae: SparseAutoencoder, targets: np.ndarray) -> float:
    decoder = sae.decoder_weight.detach().double().numpy()
    return float(np.mean((decoder * targets).sum(axis=1) / np.linalg.norm(decoder, axis=1)))


def files_of(settings: Settings, run: SAERun) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Artifacts(settings).sae(run).parent.iterdir()}


# ---------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("strength", [0.5, 1e-3])
def test_one_step_is_the_descent_of_the_published_loss(settings: Settings, strength: float) -> None:
    """All items are one batch and the fine-tuning is one epoch. The gradient is that of finite differences in float64."""
    epsilon, lr, l1 = 1e-2, 1e-2, 1e-3
    training = TrainingSettings(epochs=4, batch_size=N_TRAIN, lr=lr, adam_epsilon=epsilon)
    run = replace(RUN, training=training)
    train_sae(settings, run, device="cpu")
    assign_names(settings, run)
    targets, x, sae = targets_of(settings, run), FEATURES["train"].astype(np.float64), load_sae(settings, run)
    parts = {name: p.detach().double().numpy() for name, p in sae.named_parameters()}

    def objective(p: dict[str, np.ndarray]) -> float:
        z = np.maximum((x - p["tied_bias"]) @ p["encoder_weight"].T + p["encoder_bias"], 0)
        of_sae = ((z @ p["decoder_weight"] + p["tied_bias"] - x) ** 2).mean(axis=1) + l1 * z.sum(axis=1)
        cosine = [float(d @ t) / float(np.sqrt(d @ d)) for d, t in zip(p["decoder_weight"], targets, strict=True)]
        of_names = [sum(c * value for c, value in zip(cosine, item, strict=True)) / np.sqrt(item @ item) for item in z]
        return float(np.mean(of_sae - strength * np.array(of_names)))

    z = np.maximum((x - parts["tied_bias"]) @ parts["encoder_weight"].T + parts["encoder_bias"], 0)
    assert (z.max(axis=1) > 0).all()  # or the loss above is undefined
    wanted = {}
    for name, value in parts.items():
        gradient = np.zeros_like(value)
        for place in np.ndindex(value.shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = value.copy()
                moved[place] += step
                ends.append(objective(parts | {name: moved}))
            gradient[place] = (ends[0] - ends[1]) / 2e-6
        if name == "decoder_weight":
            gradient -= (gradient * value).sum(axis=1, keepdims=True) * value
        wanted[name] = value - lr * gradient / (np.abs(gradient) + epsilon)  # Adam's first step
    wanted["decoder_weight"] /= np.linalg.norm(wanted["decoder_weight"], axis=1, keepdims=True)
    aligned = load_sae(settings, align(settings, run, Alignment(strength)))
    for name, value in aligned.named_parameters():
        np.testing.assert_allclose(value.detach().numpy(), wanted[name], atol=3e-6, err_msg=name)


def test_an_item_without_active_latents_adds_nothing() -> None:
    model = SparseAutoencoder(2, 3, seed=0)
    loss = names_loss(torch.eye(3, 2), 1.0)
    latents = torch.tensor([[0.0, 0.0, 0.0], [0.0, 3.0, 4.0]], requires_grad=True)
    found = loss(model, latents)
    found.sum().backward()
    assert found[0] == 0
    cosine = torch.nn.functional.cosine_similarity(model.decoder_weight, torch.eye(3, 2), dim=1)
    assert found[1].item() == pytest.approx(-(0.6 * cosine[1] + 0.8 * cosine[2]).item())
    assert latents.grad is not None
    assert torch.equal(latents.grad[0], torch.zeros(3))
    assert latents.grad[1].abs().max() > 0


# -------------------------------------------------------------------------------------------------- what it changes

VARIANTS = [
    *((sparsity, "none") for sparsity in (ReLU(1e-3), TopK(2), BatchTopK(2), JumpReLU(1e-3), Matryoshka(BatchTopK(2)))),
    (ReLU(1e-3), "centre"), (ReLU(1e-3), "unit_norm"), (TopK(2), "centre"), (JumpReLU(1e-3), "unit_norm"),
]  # fmt: skip


@pytest.mark.parametrize(("sparsity", "transform"), VARIANTS, ids=lambda part: part if isinstance(part, str) else part.kind)
def test_the_copy_is_nearer_to_its_names(settings: Settings, capsys, sparsity, transform: str) -> None:
    """At a small cost; and the SAE and its names stay what they were, byte for byte."""
    run = replace(RUN, sparsity=sparsity, input_transform=transform)
    train_sae(settings, run, device="cpu")
    assign_names(settings, run)
    untouched, before = files_of(settings, run), sae_metrics(settings, run)
    base, targets = load_sae(settings, run), targets_of(settings, run)
    alignment = Alignment(1.0 if isinstance(sparsity, Matryoshka) else 0.1)  # whose losses are five
    aligned = align(settings, run, alignment)
    assert aligned == replace(run, suffix=f"_align{alignment.strength:g}")
    assert files_of(settings, run) == untouched
    sae, details = load_sae(settings, aligned), read_manifest(Artifacts(settings).sae(aligned))["details"]
    assert (sae.sparsity, sae.input_transform) == (sparsity, transform)
    was, now = mean_cosine(base, targets), mean_cosine(sae, targets)
    assert now > was + 0.02
    assert details["mean_cosine"] == pytest.approx({"before": was, "after": now}, abs=1e-5)
    assert details["before"] == before
    after = sae_metrics(settings, aligned)
    assert after["train"]["explained_variance"] > before["train"]["explained_variance"] - 0.15
    for split, x in FEATURES.items():
        assert after[split] == pytest.approx(evaluate(sae, torch.from_numpy(x)), rel=1e-5)
    rates = firing_rates(settings, aligned)
    assert rates is not None
    assert rates.sum() == pytest.approx(after["train"]["l0"])
    if transform == "centre":
        assert torch.equal(sae.input_centre, base.input_centre)
    said = capsys.readouterr().out
    changed = [
        f"{before['train_val'][key]:.{n}f} -> {after['train_val'][key]:.{n}f}"
        for key, n in (("explained_variance", 3), ("l0", 2))
    ]
    assert f"aligned SAE: mean cosine of all 12 latents and their names {was:.3f} -> {now:.3f}, on train_val: " in said
    assert f"explained variance {changed[0]}, L0 {changed[1]}; {details['names_kept']:.1%} of latents keep" in said
    assert f"--save_suffix {aligned.suffix}, or with --sae {aligned.config_name}; it was trained to" in said


def test_a_tiny_strength_is_plain_training(trained: Settings) -> None:
    """Continued as the run was trained, without resampling."""
    aligned = load_sae(trained, align(trained, alignment=Alignment(1e-12)))
    by_hand = load_sae(trained, RUN).requires_grad_(True)
    train(by_hand, torch.from_numpy(FEATURES["train"]), replace(RUN.training, epochs=6, resample_freq=0), progress=False)
    for (name, found), wanted in zip(aligned.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4, msg=name, check_stride=False)


def test_a_great_strength_is_warned_of(settings: Settings, caplog) -> None:
    """The names' loss is smallest for a code that is not sparse."""
    sparse = replace(RUN, sparsity=ReLU(0.1))
    train_sae(settings, sparse, device="cpu")
    assign_names(settings, sparse)
    caplog.clear()
    aligned = align(settings, sparse, Alignment(1e-6))
    assert not caplog.text
    aligned = align(settings, sparse, Alignment(100.0))
    assert "--align_names 100 outweighs the reconstruction" in caplog.text
    assert "--num_epochs" not in caplog.text
    assert sae_metrics(settings, aligned)["train"]["l0"] > 1.4 * sae_metrics(settings, sparse)["train"]["l0"]


@pytest.mark.parametrize(("epochs", "fine"), [(200, 30), (1, 1), (6, 1), (7, 2)])
def test_it_takes_the_published_share_of_the_epochs(epochs: int, fine: int) -> None:
    run = replace(RUN, training=replace(RUN.training, epochs=epochs, resample_freq=3))
    assert training_of(run) == replace(run.training, epochs=fine, resample_freq=0)


def test_a_published_sae_is_aligned_with_the_loss_of_the_flags(settings: Settings) -> None:
    """Its file does not record the L1 weight, and no training recorded its metrics."""
    train_sae(settings, RUN, device="cpu")
    sae, artifacts = load_sae(settings, RUN), Artifacts(settings)
    names = {"tied_bias": "tied_bias", "encoder._weight": "encoder_weight", "encoder._bias": "encoder_bias"}
    state = sae.state_dict()
    tensors = {theirs: state[ours][None] for theirs, ours in names.items()}
    tensors["decoder._weight"] = state["decoder_weight"].T[None]
    for path in list(artifacts.sae_files(RUN)):
        path.unlink()
    torch.save(tensors, artifacts.published_sae(RUN))
    heavy = replace(RUN, sparsity=ReLU(0.3))
    artifacts.sae(heavy).parent.mkdir(parents=True)
    artifacts.published_sae(heavy).write_bytes(artifacts.published_sae(RUN).read_bytes())
    for run in (RUN, heavy):
        assign_names(settings, run)
    light = load_sae(settings, align(settings, RUN))
    assert light.sparsity == RUN.sparsity
    sparser = load_sae(settings, align(settings, heavy))
    x = torch.from_numpy(FEATURES["train"])
    assert evaluate(sparser, x)["l0"] < evaluate(light, x)["l0"] - 0.5


def test_it_is_made_once(trained: Settings, capsys, refusal: Callable) -> None:
    aligned = align(trained)
    made = files_of(trained, aligned)
    capsys.readouterr()
    assert align(trained) == aligned
    assert capsys.readouterr().out.startswith("already done: ")
    assert files_of(trained, aligned) == made
    assert align(trained, alignment=Alignment(0.5)).suffix == "_align0.5"
    # Another name of a latent is another target; how names are tested is not.
    path = Artifacts(trained).concept_names(RUN)
    path.with_name(path.name + ".manifest.json").unlink()
    text = path.read_text()
    path.write_text(text.replace(",", ",", 1) + "\n")
    align(trained)
    assert files_of(trained, aligned) == made
    first = read_names(trained, RUN)[0].name
    path.write_text(text.replace(f"\n0,{first},", "\n0,word 19," if first != "word 19" else "\n0,word 3,"))
    with refusal("was made from other inputs", "names has changed", "--overwrite"):
        align(trained)
    assert files_of(trained, aligned) == made
    align(trained, overwrite=True)
    assert files_of(trained, aligned) != made


# ---------------------------------------------------------------------------------------------------- interruptions

MIDDLE = 10
"""A step of the fine-tuning, of 24."""


@pytest.fixture
def whole(trained: Settings) -> dict[str, bytes]:
    """Checkpoint and firing rates of an uninterrupted run, which is removed."""
    aligned = align(trained)
    files = files_of(trained, aligned)
    shutil.rmtree(Artifacts(trained).sae(aligned).parents[1])
    return {name: files[name] for name in ("sparse_autoencoder_final.safetensors", "firing_rates.npy")}


def at_step(number: int, act: Callable[[], object]) -> Callable:
    """`names_loss` that also does something at a step."""
    steps = itertools.count(1)

    def wrapped(*of: Any) -> Callable:
        loss = names_loss(*of)
        return lambda *about: [act() if next(steps) == number else None, loss(*about)][1]

    return wrapped


def fail() -> None:
    raise RuntimeError("in the middle")


@pytest.mark.parametrize(
    ("act", "raised", "saves"),
    [
        (fail, RuntimeError, False),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), KeyboardInterrupt, True),
        (lambda: os.kill(os.getpid(), signal.SIGINT), KeyboardInterrupt, True),
    ],
    ids=["error", "SIGTERM", "Ctrl-C"],
)
def test_an_interrupted_run_is_finished_by_the_same_command(
    trained: Settings, whole: dict[str, bytes], monkeypatch, capsys, refusal: Callable, act, raised, saves: bool
) -> None:
    """With the bytes of an uninterrupted one; meanwhile there is no SAE that a stage could read."""
    artifacts, aligned = Artifacts(trained), replace(RUN, suffix="_align0.1")
    with monkeypatch.context() as patched:
        patched.setattr(dncbm.concepts.alignment, "names_loss", at_step(MIDDLE, act))
        with pytest.raises(raised):
            align(trained)
    assert not artifacts.sae(aligned).exists()
    assert artifacts.sae_state(aligned).exists() == saves
    assert (f"stopped after {MIDDLE} steps: the same command resumes" in capsys.readouterr().out) == saves
    with refusal("is missing"):
        load_sae(trained, aligned)
    steps: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(dncbm.concepts.alignment, "names_loss", lambda *of: counted(names_loss(*of), steps))
        align(trained)
    assert len(steps) == (24 - MIDDLE if saves else 24)
    made = files_of(trained, aligned)
    assert {name: made[name] for name in whole} == whole
    assert not artifacts.sae_state(aligned).exists()
    assert not [name for name in made if "unfinished" in name or name.endswith((".tmp", ".lock"))]


def counted(loss: Callable, steps: list[int]) -> Callable:
    return lambda *about: [steps.append(1), loss(*about)][1]


def test_a_killed_run_leaves_no_half_artifact(trained: Settings, whole: dict[str, bytes]) -> None:
    """SIGKILL, in the middle of the fine-tuning and while the checkpoint is written."""
    code = textwrap.dedent(f"""
        import os, signal, sys
        sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parent)]!r}
        import dncbm.concepts.alignment as alignment
        import test_alignment as tests
        from dncbm.runs.settings import load_settings

        die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[1] == "step":
            alignment.names_loss = tests.at_step(tests.MIDDLE, die)
        else:
            move = os.replace
            os.replace = lambda source, target: die() if "final.safetensors" in str(target) else move(source, target)
        tests.align(load_settings())
    """)
    aligned = replace(RUN, suffix="_align0.1")
    for moment in ("step", "write"):
        done = subprocess.run([sys.executable, "-c", code, moment], capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not Artifacts(trained).sae(aligned).exists()
        assert not manifest_path(Artifacts(trained).sae(aligned)).exists()
    align(trained)
    made = files_of(trained, aligned)
    assert {name: made[name] for name in whole} == whole
    assert set(made) == {*whole, "training_log.csv", "sparse_autoencoder_final.safetensors.manifest.json"}


def test_a_damaged_state_does_not_survive_overwrite(trained: Settings, whole: dict[str, bytes], monkeypatch, caplog) -> None:
    aligned = replace(RUN, suffix="_align0.1")
    with monkeypatch.context() as patched:
        act = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        patched.setattr(dncbm.concepts.alignment, "names_loss", at_step(MIDDLE, act))
        with pytest.raises(KeyboardInterrupt):
            align(trained)
    state = Artifacts(trained).sae_state(aligned)
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(CheckpointError):
        align(trained)
    assert state.is_file()
    align(trained, overwrite=True)
    assert "--overwrite starts from scratch" in caplog.text
    made = files_of(trained, aligned)
    assert {name: made[name] for name in whole} == whole
    assert not state.exists()


# ------------------------------------------------------------------------------------------------------- the command

FLAGS = shlex.split("--expansion_factor 2 --num_epochs 40 --train_sae_bs 16 --lr 1e-2 --l1_coeff 1e-3")


def test_the_script_aligns_and_names_the_copy(settings: Settings, capsys) -> None:
    """The names of the SAE are made first. Later stages find the copy in both of the ways that are printed."""
    train_sae(settings, RUN, device="cpu")
    flags = FLAGS
    main("names", [*flags, "--align_names", "0.1"])
    said = capsys.readouterr().out
    artifacts, aligned = Artifacts(settings), replace(RUN, suffix="_align0.1")
    assert artifacts.concept_names(RUN).is_file()
    assert len(read_names(settings, aligned)) == 12
    ways = re.search(r"later stages use it with (--save_suffix \S+), or with (--sae \S+);", said)
    assert ways
    for way in ([*flags, *shlex.split(ways[1])], shlex.split(ways[2])):
        main("names", way)
        assert f"already done: {artifacts.concept_names(aligned)}" in capsys.readouterr().out


def test_the_script_names_the_sae_as_it_was_told_and_asks_its_images(settings: Settings, make_store, capsys) -> None:
    train_sae(settings, RUN, device="cpu")
    make_store(Artifacts(settings).features("cc3m", "enc", "out", "val"), [FEATURES["train"]])
    main("names", [*FLAGS, "--names", "all", "--align_names", "0.1"])
    capsys.readouterr()
    for run, suffix in ((RUN, ""), (replace(RUN, suffix="_align0.1"), "_align0.1")):
        assert ABSTAINS not in {name.verdict for name in read_names(settings, run)}
        assert evidence_datasets(settings, run) == ["cc3m"]
        main("names", [*FLAGS, "--names", "all", "--save_suffix", suffix])
        assert capsys.readouterr().out.count("already done: ") == 2


def test_the_script_keeps_names_that_were_edited(trained: Settings) -> None:
    names = Artifacts(trained).concept_names(RUN)
    manifest_path(names).unlink()
    first = read_names(trained, RUN)[0].name
    names.write_text(names.read_text().replace(f"\n0,{first},", "\n0,word 19," if first != "word 19" else "\n0,word 3,"))
    edited = names.read_bytes()
    for overwrite in ([], ["--overwrite"]):
        main("names", [*FLAGS, "--align_names", "0.1", *overwrite])
        assert names.read_bytes() == edited
        assert not manifest_path(names).exists()
    assert Artifacts(trained).sae(replace(RUN, suffix="_align0.1")).is_file()


def test_of_other_words_one_command_makes_names_and_copy_again(trained: Settings) -> None:
    """The command that the error names, too."""
    align(trained)
    Artifacts(trained).words().write_text("\n".join(f"{word}s" for word in WORDS))
    with pytest.raises(SystemExit, match=r"words has changed.*--overwrite"):
        main("names", [*FLAGS, "--align_names", "0.1"])
    main("names", [*FLAGS, "--align_names", "0.1", "--overwrite"])
    for suffix in ("", "_align0.1"):
        assert all(name.name.endswith("s") for name in read_names(trained, replace(RUN, suffix=suffix)))
    Artifacts(trained).words().write_text("\n".join(f"{word}x" for word in WORDS))
    torch.save(torch.from_numpy(EMBEDDINGS[::-1].copy()), Artifacts(trained).published_embeddings("enc"))
    with pytest.raises(StaleArtifact) as caught:
        load_sae(trained, replace(RUN, suffix="_align0.1"))
    command = re.search(r"`python scripts/04_assign_names.py (.*)`", str(caught.value))
    assert command
    main("names", shlex.split(command[1]))
    assert read_names(trained, replace(RUN, suffix="_align0.1"))[0].name.endswith("x")


def test_a_strength_of_any_size_has_a_folder(trained: Settings, refusal) -> None:
    """`+`, which 1e+06 has, is not allowed in a suffix."""
    main("names", [*FLAGS, "--align_names", "1e6"])
    huge = replace(RUN, suffix="_align1e06")
    assert len(read_names(trained, huge)) == 12
    with refusal("--lr 0.01 --seed 50 --align_names 1000000.0`"):  # and no suffix
        runs_to_compare(trained, huge, Seeds())


def test_a_copy_is_not_an_sae_of_another_seed(trained: Settings, refusal: Callable) -> None:
    other = replace(RUN, training=replace(RUN.training, seed=50))
    train_sae(trained, other, device="cpu")
    assign_names(trained, other)
    aligned = [align(trained, run) for run in (RUN, other)]
    assert runs_to_compare(trained, RUN, Seeds()) == {50: other}
    assert runs_to_compare(trained, aligned[0], Seeds()) == {50: aligned[1]}


def test_a_copy_of_what_has_changed_is_made_again_by_the_command_that_the_error_names(
    trained: Settings, make_store, capsys
) -> None:
    aligned = align(trained)
    before = load_sae(trained, aligned)
    make_store(Artifacts(trained).features("cc3m", "enc", "out", "train"), [FEATURES["train"] + 1])
    for remade in (train_sae, assign_names):
        remade(trained, RUN, device="cpu", overwrite=True)
    with pytest.raises(StaleArtifact) as caught:
        load_sae(trained, aligned)
    command = re.search(r"`python scripts/(\S+) (.*)`", str(caught.value))
    assert command
    assert command[1] == "04_assign_names.py"
    main("names", shlex.split(command[2]))
    assert not torch.equal(load_sae(trained, aligned).decoder_weight, before.decoder_weight)


@pytest.mark.parametrize("strength", ["0", "-1", "nan", "inf", "much"])
def test_a_strength_is_above_zero(settings: Settings, capsys, strength: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main("names", [f"--align_names={strength}"])
    assert caught.value.code == 2
    assert "--align_names" in capsys.readouterr().err


def test_what_is_missing_is_named(settings: Settings, make_store, refusal: Callable) -> None:
    assert align(settings, alignment=Alignment()) == RUN
    artifacts = Artifacts(settings)
    with refusal("is missing", "02_train_sae_img.py"):
        align(settings)
    train_sae(settings, RUN, device="cpu")
    assign_names(settings, RUN)
    untouched = files_of(settings, RUN)
    names = artifacts.concept_names(RUN)
    manifest_path(names).unlink()
    names.write_text(names.read_text().replace("\n3,word ", "\n3,unknown "))
    with refusal(names, "unknown", "not in the vocabulary"):
        align(settings)
    for name, content in untouched.items():
        names.with_name(name).write_bytes(content)
    for path in artifacts.features("cc3m", "enc", "out", "train").iterdir():
        path.unlink()
    with refusal("features", "01_save_cc3m_features.py"):
        align(settings)
    assert files_of(settings, RUN) == untouched
