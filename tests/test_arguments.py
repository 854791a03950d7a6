import argparse
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import dncbm.arguments
import dncbm.features
import dncbm.naming
import dncbm.nec
import dncbm.pipeline
import dncbm.probing
import dncbm.results_table
import dncbm.sae
import dncbm.zero_shot
from dncbm.artifacts import ProbeRun, SAERun
from dncbm.devices import resolve_device
from dncbm.errors import UserError
from dncbm.extraction import Extraction
from dncbm.probing import ProbeSchedule
from dncbm.settings import SPLITS
from dncbm.tracking import Tracking
from sparse_autoencoder import (
    BatchTopK,
    CheckpointError,
    JumpReLU,
    Matryoshka,
    NonFiniteError,
    ReLU,
    Sparsity,
    TopK,
    TrainingSettings,
)

SCRIPTS = Path(__file__).parent.parent / "scripts"
NUMBERED = {
    "save_cc3m_features": "01_save_cc3m_features",
    "train_sae_img": "02_train_sae_img",
    "save_vocab_embeddings": "03_save_vocab_embeddings",
    "assign_names": "04_assign_names",
    "save_probe_features": "05_save_probe_features",
    "save_concept_strengths": "06_save_concept_strengths",
    "train_linear_probe": "07_train_linear_probe",
    "zero_shot": "08_zero_shot",
    "results_table": "09_results_table",
    "accuracy_at_nec": "10_accuracy_at_nec",
}

# The paper's commands.
SAE_FLAGS = (
    "--lr 5e-4 --l1_coeff 3e-5 --expansion_factor 8 --img_enc_name clip_RN50 --num_epochs 200 --resample_freq 10"
    " --train_sae_bs 4096"
)
SAVE_FEATURES = "save_cc3m_features.py --img_enc_name clip_RN50"
TRAIN_SAE = (
    "train_sae_img.py --lr 5e-4 --l1_coeff 3e-5 --expansion_factor 8 --img_enc_name clip_RN50 --num_epochs 200"
    " --resample_freq 10 --ckpt_freq 0 --val_freq 1 --train_sae_bs 4096"
)
ASSIGN_NAMES = f"assign_names.py {SAE_FLAGS}"
SAVE_PROBE_FEATURES = "save_probe_features.py --img_enc_name clip_RN50 --probe_dataset places365"
SAVE_STRENGTHS = f"save_concept_strengths.py {SAE_FLAGS} --probe_dataset places365 --probe_split train"
TRAIN_PROBE = (
    "train_linear_probe.py --lr 5e-4 --l1_coeff 3e-5 --expansion_factor 8 --img_enc_name clip_RN50 --resample_freq 10"
    " --train_sae_bs 4096 --num_epochs 200 --ckpt_freq 0 --val_freq 1 --probe_lr 1e-2 --probe_sparsity_loss_lambda 0.1"
    " --probe_classification_loss 'CE' --probe_epochs 200 --probe_sparsity_loss L1 --probe_eval_coverage_freq 50"
    " --probe_dataset places365"
)

PAPER = SAERun(
    dataset="cc3m",
    encoder="clip_RN50",
    hook="out",
    sparsity=ReLU(l1_coeff=3e-5),
    expansion_factor=8,
    training=TrainingSettings(
        epochs=200, batch_size=4096, lr=5e-4, resample_freq=10, val_freq=1, ckpt_freq=0, seed=49,
        adam_beta_1=0.9, adam_beta_2=0.999, adam_epsilon=1e-8, adam_weight_decay=0.0, resample_dataset_size=819_200,
    ),
)  # fmt: skip
PAPER_PROBE = ProbeRun(
    "places365", lr=1e-2, batch_size=512, epochs=200, sparsity_lambda=0.1, on_features=False, seed=49
)


@pytest.fixture
def stage(monkeypatch, write_config: Callable[..., Path]) -> Callable[..., tuple[tuple, dict[str, Any]]]:
    """Runs a command line in this process and returns what its script passed to the stage, without the settings."""
    functions = {
        "save_cc3m_features": (dncbm.features, "save_sae_features"),
        "train_sae_img": (dncbm.sae, "train_sae"),
        "save_vocab_embeddings": (dncbm.vocabulary, "save_vocabulary_embeddings"),
        "assign_names": (dncbm.naming, "assign_names"),
        "save_probe_features": (dncbm.features, "save_probe_features"),
        "save_concept_strengths": (dncbm.concepts, "save_concept_strengths"),
        "train_linear_probe": (dncbm.probing, "train_linear_probe"),
        "run_pipeline": (dncbm.pipeline, "run_pipeline"),
        "zero_shot": (dncbm.zero_shot, "evaluate_zero_shot"),
        "results_table": (dncbm.results_table, "results_table"),
        "accuracy_at_nec": (dncbm.nec, "accuracy_at_nec"),
    }

    def run(command: str, **config: Any) -> tuple[tuple, dict[str, Any]]:
        monkeypatch.setenv("DNCBM_CONFIG", str(write_config(**config)))
        script, *flags = shlex.split(command)
        calls: list[tuple[tuple, dict[str, Any]]] = []
        module, name = functions[script.removesuffix(".py")]
        monkeypatch.setattr(module, name, lambda settings, *args, **options: calls.append((args, options)))
        monkeypatch.setattr(sys, "argv", [script, *flags])
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        (call,) = calls
        return call

    return run


class TestThePapersCommands:
    def test_save_cc3m_features(self, stage) -> None:
        (dataset, encoder, hook, extraction), _ = stage(SAVE_FEATURES)
        assert (dataset, encoder, hook) == ("cc3m", "clip_RN50", "out")
        assert extraction == Extraction("auto", None, dncbm.features.default_workers(), 0.05, False)

    def test_train_sae_img(self, stage) -> None:
        (run,), options = stage(TRAIN_SAE)
        assert run == PAPER
        assert options == {"device": "auto", "tracking": Tracking(False, None), "overwrite": False}

    def test_assign_names(self, stage) -> None:
        (run,), options = stage(ASSIGN_NAMES)
        assert run == PAPER
        assert options == {"device": "auto", "overwrite": False}

    def test_save_probe_features(self, stage) -> None:
        (dataset, encoder, hook, splits, _), _ = stage(SAVE_PROBE_FEATURES)
        assert (dataset, encoder, hook, splits) == ("places365", "clip_RN50", "out", SPLITS)

    def test_save_concept_strengths(self, stage) -> None:
        (run, dataset, splits), _ = stage(SAVE_STRENGTHS)
        assert (run, dataset, splits) == (PAPER, "places365", ("train",))
        (run, dataset, splits), _ = stage(SAVE_STRENGTHS.removesuffix(" --probe_split train"))
        assert (run, dataset, splits) == (PAPER, "places365", SPLITS)

    def test_train_linear_probe(self, stage) -> None:
        (run, probe), options = stage(TRAIN_PROBE)
        assert run.config_name == PAPER.config_name
        assert probe == PAPER_PROBE
        assert options["schedule"] == ProbeSchedule(val_freq=1, coverage_freq=50, ckpt_freq=0)

    def test_save_vocab_embeddings(self, stage) -> None:
        (encoder,), options = stage("save_vocab_embeddings.py --img_enc_name clip_ViT-B/16 --device cpu --overwrite")
        assert encoder == "clip_ViT-B/16"
        assert options == {"device": "cpu", "overwrite": True}

    def test_the_same_by_the_pipeline(self, stage) -> None:
        flags = TRAIN_PROBE.removeprefix("train_linear_probe.py")
        (plan, first, last), _ = stage(f"run_pipeline.py {flags} --from sae --to names")
        assert plan.sae == PAPER
        assert plan.probe == PAPER_PROBE
        assert (first, last) == ("sae", "names")

    def test_the_defaults_are_the_papers(self, stage) -> None:
        (run, probe), _ = stage("train_linear_probe.py")
        assert run.config_name == PAPER.config_name
        assert probe == PAPER_PROBE
        assert stage("train_sae_img.py")[0] == (PAPER,)


def test_the_papers_names_are_links_to_the_numbered_scripts() -> None:
    for name, numbered in NUMBERED.items():
        assert (SCRIPTS / f"{name}.py").resolve() == SCRIPTS / f"{numbered}.py"


def test_every_flag_has_its_meaning(stage) -> None:
    (run,), options = stage(
        "train_sae_img.py --sae_dataset mine --img_enc_name openclip:A/b --hook_points out --lr 0.1 --l1_coeff 0.2"
        " --expansion_factor 3 --num_epochs 4 --resample_freq 5 --train_sae_bs 6 --input_transform centre"
        " --save_suffix _x --seed 7 --resample_dataset_size 8 --adam_beta_1 0.5 --adam_beta_2 0.6 --adam_epsilon 1e-3"
        " --adam_weight_decay 0.01 --val_freq 9 --ckpt_freq 10 --use_wandb --wandb_entity me --device cpu --overwrite"
    )
    t = run.training
    assert (run.dataset, run.encoder, run.hook, run.sparsity) == ("mine", "openclip:A/b", "out", ReLU(l1_coeff=0.2))
    assert (run.expansion_factor, run.input_transform, run.suffix) == (3, "centre", "_x")
    assert (t.lr, t.epochs, t.resample_freq, t.batch_size, t.seed, t.resample_dataset_size) == (0.1, 4, 5, 6, 7, 8)
    assert (t.adam_beta_1, t.adam_beta_2, t.adam_epsilon, t.adam_weight_decay) == (0.5, 0.6, 1e-3, 0.01)
    assert (t.val_freq, t.ckpt_freq) == (9, 10)
    assert options == {"device": "cpu", "tracking": Tracking(True, "me"), "overwrite": True}

    (_, probe), options = stage(
        "train_linear_probe.py --probe_dataset mine --probe_lr 0.3 --probe_train_bs 4 --probe_epochs 5"
        " --probe_sparsity_loss_lambda 6 --probe_on_features --seed 7 --probe_val_freq 8 --probe_eval_coverage_freq 9"
        " --ckpt_freq 10"
    )
    assert probe == ProbeRun("mine", 0.3, 4, 5, 6.0, True, 7)
    assert options["schedule"] == ProbeSchedule(8, 9, 10)

    args, _ = stage(
        "save_probe_features.py --batch_size 2 --num_workers 0 --max_bad_fraction 0.5 --device cpu --probe_split val"
    )
    assert args[3:] == (("val",), Extraction("cpu", 2, 0, 0.5, False))


@pytest.mark.parametrize(
    ("flags", "sparsity"),
    [
        ("--sae_type relu --l1_coeff 0.1", ReLU(l1_coeff=0.1)),
        ("--sae_type topk --k 5", TopK(5)),
        ("--sae_type batchtopk --k 5", BatchTopK(5)),
        ("--sae_type jumprelu --l0_coeff 0.1", JumpReLU(l0_coeff=0.1)),
        ("--sae_type matryoshka --k 5", Matryoshka(BatchTopK(5))),
    ],
)
def test_kinds_of_sae(stage, flags: str, sparsity: Sparsity) -> None:
    (run,), _ = stage(f"train_sae_img.py {flags}")
    assert run.sparsity == sparsity


def test_what_is_evaluated_besides_the_probe(stage) -> None:
    args, options = stage("zero_shot.py --img_enc_name enc --probe_dataset mine --templates 'a {}' '{} b' --device cpu")
    assert args == ("enc", "out", "mine")
    assert options == {"templates": ["a {}", "{} b"], "device": "cpu", "overwrite": False}
    (run, dataset), options = stage(f"accuracy_at_nec.py {SAE_FLAGS} --probe_dataset mine --overwrite")
    assert (run, dataset) == (PAPER, "mine")
    assert options == {"device": "auto", "overwrite": True}
    assert stage("results_table.py") == ((), {})
    (_, probe), _ = stage("train_linear_probe.py --probe_solver prox")
    assert probe.solver == "prox"


@pytest.mark.parametrize(
    ("dataset", "lr", "sparsity_lambda"),
    [
        ("imagenet", 1e-3, 1),
        ("cifar10", 1e-3, 1),
        ("cifar100", 1e-2, 1),
        ("places365", 1e-2, 0.1),
        ("waterbirds100", 0.1, 10),
    ],
)
def test_the_papers_preset(stage, capsys, dataset: str, lr: float, sparsity_lambda: float) -> None:
    """Against what config says, but not against a flag; it says what it picked."""
    config = {"defaults": {"probe_lr": 7.0, "probe_epochs": 3, "probe_train_bs": 8}}
    (_, probe), _ = stage(f"train_linear_probe.py --preset paper --probe_dataset {dataset}", **config)
    assert probe == ProbeRun(dataset, lr=lr, batch_size=512, epochs=200, sparsity_lambda=sparsity_lambda)
    printed = capsys.readouterr().out
    assert f"--probe_lr {lr}" in printed
    assert f"--probe_sparsity_loss_lambda {float(sparsity_lambda)}" in printed
    (_, probe), _ = stage(f"train_linear_probe.py --preset paper --probe_dataset {dataset} --probe_lr 0.5", **config)
    assert (probe.lr, probe.sparsity_lambda) == (0.5, sparsity_lambda)
    (_, probe), _ = stage(f"train_linear_probe.py --probe_dataset {dataset}", **config)
    assert (probe.lr, probe.epochs) == (7.0, 3)


def test_the_paper_has_no_preset_for_other_data(stage, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        stage("train_linear_probe.py --preset paper --probe_dataset mine")
    assert "--probe_dataset mine" in str(caught.value)
    assert "places365" in str(caught.value)


def test_flags_name_all_that_identifies_a_run() -> None:
    """A field that no flag sets would be the same in every run."""
    assert {field.name for field in fields(ProbeRun)} == {
        "dataset", "lr", "batch_size", "epochs", "sparsity_lambda", "on_features", "seed", "solver"
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- what is wrong


def rejected(stage, command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the script says to a command line that argparse refuses."""
    with pytest.raises(SystemExit) as caught:
        stage(command)
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "command",
    [
        "save_cc3m_features.py --probe_dataset places365",
        "save_cc3m_features.py --lr 1",
        "assign_names.py --num_epoch 200",
        "train_sae_img.py --probe_lr 1",
        "save_probe_features.py --no_such_flag 1",
        "save_vocab_embeddings.py extra",
    ],
)
def test_unknown_flags_are_rejected(stage, capsys, command: str) -> None:
    assert "unrecognized arguments: " + command.split(maxsplit=1)[1] in rejected(stage, command, capsys)


BAD_VALUES = {
    "train_sae_img.py": {
        ("0", "-1", "nan", "inf", "x"): ("lr", "adam_epsilon"),
        ("0", "-3", "1.5", "x"): (
            "expansion_factor", "num_epochs", "resample_freq", "train_sae_bs", "val_freq", "resample_dataset_size", "k"
        ),
        ("-1", "nan"): ("l1_coeff", "l0_coeff", "ckpt_freq", "seed", "adam_weight_decay"),
        ("-0.1", "1", "2", "nan"): ("adam_beta_1", "adam_beta_2"),
        ("whiten",): ("input_transform", "sae_type"),
    },
    "train_linear_probe.py": {
        ("0", "-1"): ("probe_lr", "probe_epochs", "probe_train_bs", "probe_val_freq"),
        ("-1",): ("probe_sparsity_loss_lambda", "probe_eval_coverage_freq"),
        ("L2",): ("probe_classification_loss", "probe_sparsity_loss"),
    },
    "save_cc3m_features.py": {
        ("0", "-1"): ("batch_size",),
        ("-1",): ("num_workers", "max_bad_fraction"),
        ("layer4",): ("hook_points",),
    },
    "assign_names.py": {("../elsewhere", "a,b"): ("save_suffix",)},
    "save_concept_strengths.py": {("test",): ("probe_split",)},
    "run_pipeline.py": {("nowhere",): ("from", "to")},
}  # fmt: skip


@pytest.mark.parametrize(
    ("script", "flag", "value"),
    [
        (script, f"--{flag}", value)
        for script, flags_of in BAD_VALUES.items()
        for values, flags in flags_of.items()
        for flag in flags
        for value in values
    ],
)
def test_values_out_of_range_are_rejected(stage, capsys, script: str, flag: str, value: str) -> None:
    assert flag in rejected(stage, f"{script} {flag}={value}", capsys)


def test_a_device_that_is_not_there_is_refused(refusal) -> None:
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("gpu", "cuda:99", ""):
        with refusal(f"--device {name}"):
            resolve_device(name)


class TestDefaultsOfTheConfig:
    def test_they_replace_the_defaults_of_flags(self, stage) -> None:
        defaults = {"lr": 1e-3, "expansion_factor": 2, "img_enc_name": "mine", "probe_on_features": True, "probe_lr": 1}
        (run, probe), _ = stage("train_linear_probe.py", defaults=defaults)
        assert (run.training.lr, run.expansion_factor, run.encoder) == (1e-3, 2, "mine")
        assert (probe.on_features, probe.lr) == (True, 1.0)
        assert run.config_name.startswith("lr0.001_")
        assert probe.config_name.startswith("lr1.0_")

    def test_a_flag_of_the_command_line_wins(self, stage) -> None:
        (run,), _ = stage("train_sae_img.py --lr 0.5", defaults={"lr": 1e-3, "num_epochs": 3})
        assert (run.training.lr, run.training.epochs) == (0.5, 3)

    def test_none_says_that_there_is_none(self, stage) -> None:
        _, options = stage("train_sae_img.py --use_wandb", defaults={"wandb_entity": None})
        assert options["tracking"] == Tracking(True, None)
        (*_, splits), _ = stage("save_concept_strengths.py", defaults={"probe_split": None})
        assert splits == SPLITS

    def test_those_of_other_scripts_do_not_matter(self, stage) -> None:
        (encoder,), _ = stage("save_vocab_embeddings.py", defaults={"probe_epochs": 3, "img_enc_name": "mine"})
        assert encoder == "mine"

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("learning_rate", 0.1),
            ("--lr", 0.1),
            ("lr", "fast"),
            ("lr", None),
            ("lr", -1),
            ("num_epochs", 0),
            ("num_epochs", 2.5),
            ("input_transform", "whiten"),
            ("probe_on_features", "yes"),
            ("probe_epochs", -3),
        ],
    )
    def test_unknown_or_bad_ones_are_refused(self, write_config, monkeypatch, refusal, name: str, value: Any) -> None:
        path = write_config(defaults={name: value})
        monkeypatch.setenv("DNCBM_CONFIG", str(path))
        monkeypatch.setattr(sys, "argv", ["script"])
        with refusal(path, "defaults", name):
            dncbm.arguments.parse(None, dncbm.arguments.sae_run)


# ------------------------------------------------------------------------------------------------------------ run(main)


@pytest.mark.parametrize(
    "error", [UserError("what is wrong"), CheckpointError("cut off"), NonFiniteError("step 3: NaN")]
)
def test_what_the_user_can_put_right_is_one_line(error: Exception) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        dncbm.arguments.run(main)
    assert caught.value.code == f"error: {error}"


def test_a_full_disk_is_one_line_and_other_failures_of_the_system_are_not_hidden() -> None:
    def main(number: int) -> None:
        raise OSError(number, os.strerror(number), "/data/00001.npy")

    with pytest.raises(SystemExit, match=r"no space left on the disk of /data/00001\.npy"):
        dncbm.arguments.run(lambda: main(28))
    with pytest.raises(PermissionError):
        dncbm.arguments.run(lambda: main(13))


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        dncbm.arguments.run(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("save_cc3m_features.py --sae_dataset none", "'none'"),
        ("assign_names.py", "02_train_sae_img.py"),
        ("run_pipeline.py --from sae --to sae", "01_save_cc3m_features.py"),
    ],
)
def test_a_script_without_its_data_prints_one_line(write_config, tmp_path: Path, command: str, words: str) -> None:
    environment = os.environ | {
        "DNCBM_CONFIG": str(write_config(sae_datasets={"cc3m": dict.fromkeys(SPLITS, "0.tar")}))
    }
    script, *flags = command.split()
    run = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *flags], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not (tmp_path / "sae_dir").exists()  # nothing was left behind


def test_help_needs_no_config(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("DNCBM_CONFIG", str(tmp_path / "none.py"))
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    with pytest.raises(SystemExit) as caught:
        dncbm.arguments.parse("What it does.", *dncbm.arguments.GROUPS[1:])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "What it does." in shown
    assert "--resample_dataset_size" in shown


def test_no_flag_is_spelled_twice() -> None:
    parser = argparse.ArgumentParser()
    for group in dncbm.arguments.GROUPS:
        group(parser)  # argparse raises when a flag is there already
    assert len(parser._actions) > 30


def test_a_value_that_is_no_number_is_named_in_words(stage, capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid number value: 'abc'" in rejected(stage, "train_linear_probe.py --probe_lr abc", capsys)
    assert "invalid whole number value: '1.5'" in rejected(stage, "train_linear_probe.py --probe_epochs 1.5", capsys)
