"""Command lines: what the paper's commands and every single flag stand for, defaults of config.py, and refusals."""

import errno
import logging
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import dncbm.cli
from dncbm.cli import PIPELINE, main, one_line_errors, parse
from dncbm.concepts.sae import SAE
from dncbm.concepts.strengths import STRENGTHS
from dncbm.features.stage import PROBE_FEATURES
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import (
    SPLITS,
    Alignment,
    BestRuns,
    Compact,
    Evidence,
    Execution,
    Extraction,
    Grid,
    NamedEncoder,
    NamedSAE,
    Naming,
    Partition,
    ProbeDataset,
    ProbeFeatures,
    ProbeRun,
    ProbeSchedule,
    Prompts,
    SAEFeatures,
    SAERun,
    Splits,
    Tracking,
)
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import making, verifying
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from dncbm.stages import COMMANDS, STAGES, Pipeline
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
from sparse_autoencoder.declare import Flag, build, flags, values
from sparse_autoencoder.files import whole_file

SCRIPTS = Path(__file__).parents[1] / "scripts"

# The paper's commands.
SAE_FLAGS = (
    "--lr 5e-4 --l1_coeff 3e-5 --expansion_factor 8 --img_enc_name clip_RN50 --num_epochs 200 --resample_freq 10"
    " --train_sae_bs 4096"
)
PROBE_FLAGS = (
    "--probe_lr 1e-2 --probe_sparsity_loss_lambda 0.1 --probe_classification_loss 'CE' --probe_epochs 200"
    " --probe_sparsity_loss L1 --probe_eval_coverage_freq 50 --probe_dataset places365"
)
TRAIN_PROBE = f"train_linear_probe.py {SAE_FLAGS} --ckpt_freq 0 --val_freq 1 {PROBE_FLAGS}"
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
PAPER_PROBE = ProbeRun("places365", lr=1e-2, batch_size=512, epochs=200, sparsity_lambda=0.1, on_features=False, seed=49)
PLACES = ProbeFeatures("places365", "clip_RN50", "out")


@pytest.fixture
def stage(monkeypatch, write_config: Callable[..., Path]) -> Callable[..., tuple]:
    """Runs a script in this process; returns what its stage function was given, without the settings."""

    def run(command: str, **config: Any) -> tuple:
        monkeypatch.setenv("DNCBM_CONFIG", str(write_config(**config)))
        calls: list[tuple] = []

        def record(settings: Any, *declared: Any, device: str, overwrite: bool, **passed_on: Any) -> None:
            calls.append((*declared, *passed_on.values(), Execution(device, overwrite)))

        for name, found in list(STAGES.items()):
            # without inputs, so that no run is looked for
            monkeypatch.setitem(STAGES, name, replace(found, function=record, explains=None, inputs=(), needs=None))
        monkeypatch.setattr(dncbm.cli, "PIPELINE", replace(PIPELINE, function=record))
        script, *arguments = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        (call,) = calls
        return call

    return run


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("save_cc3m_features.py --img_enc_name clip_RN50", (SAEFeatures(), Extraction(), Partition())),
        (f"train_sae_img.py {SAE_FLAGS} --ckpt_freq 0 --val_freq 1", (PAPER, Tracking(False, None))),
        ("save_vocab_embeddings.py --img_enc_name clip_RN50", (NamedEncoder("clip_RN50"),)),
        (f"assign_names.py {SAE_FLAGS}", (PAPER, Naming(), Evidence(), Alignment())),
        (
            "save_probe_features.py --img_enc_name clip_RN50 --probe_dataset places365",
            (PLACES, Splits(None), Extraction(), Partition()),
        ),
        (
            f"save_concept_strengths.py {SAE_FLAGS} --probe_dataset places365 --probe_split train",
            (PAPER, ProbeDataset("places365"), Splits("train"), Partition()),
        ),
        (TRAIN_PROBE, (PAPER, PAPER_PROBE, ProbeSchedule(val_freq=1, coverage_freq=50, ckpt_freq=0), Tracking())),
        ("zero_shot.py --img_enc_name clip_RN50 --probe_dataset places365", (PLACES, Prompts())),
        (f"accuracy_at_nec.py {SAE_FLAGS} --probe_dataset places365", (PAPER, ProbeDataset("places365"), Compact())),
        ("results_table.py", (NamedSAE(), BestRuns())),
    ],
)
def test_the_papers_commands(stage, command: str, expected: tuple) -> None:
    assert stage(command) == (*expected, Execution("auto", False))


def positional(found: Stage) -> list[str]:
    """A value for each setting of a stage that is written without a flag."""
    return ["a" for flag in found.flags().values() if flag.setting.positional]


@pytest.mark.parametrize("script", [PIPELINE.script, *(found.script for found in STAGES.values())])
def test_device_and_overwrite_reach_every_stage(stage, script: str) -> None:
    found = next(one for one in (PIPELINE, *STAGES.values()) if one.script == script)
    files = "".join(f" {text}" for text in positional(found))
    assert stage(f"{script}{files}")[-1] == Execution("auto", False)
    assert stage(f"{script}{files} --device cuda:1")[-1] == Execution("cuda:1", False)
    assert stage(f"{script}{files} --overwrite")[-1] == Execution("auto", True)


def test_defaults_are_the_papers(stage) -> None:
    assert stage("train_linear_probe.py")[:2] == (PAPER, PAPER_PROBE)
    assert Splits().names == SPLITS


def test_the_pipeline_takes_the_same_flags(stage) -> None:
    given = {type(one): one for one in stage(f"run_pipeline.py {SAE_FLAGS} {PROBE_FLAGS} --from sae --to names")}
    assert (given[SAERun], given[ProbeRun]) == (PAPER, PAPER_PROBE)
    assert given[Pipeline] == Pipeline("sae", "names")


def test_a_reproduction_passes_flags_on(stage) -> None:
    """A flag that may be repeated adds up; those of the stages arrive as they were written."""
    text = "--seed 49,50 --sweep lr=1,2 k=3 --sweep l1_coeff=1 --with nec --lr 1e-3 --use_wandb --templates 'a {}' 'b {}'"
    grid, passed_on, _ = stage(f"reproduce.py {text}")
    assert grid == Grid(seeds=(49, 50), sweep=("lr=1,2", "k=3", "l1_coeff=1"), only=("nec",))
    assert passed_on == {"lr": "1e-3", "use_wandb": True, "templates": ("a {}", "b {}")}


def test_checkpoint_frequencies_have_their_own_units(stage) -> None:
    """In the pipeline, --ckpt_freq is the SAE's, in items; the probe's script takes either name, in epochs."""

    def of_pipeline(text: str) -> tuple[int, int]:
        given = {type(one): one for one in stage(f"run_pipeline.py {text}")}
        return given[SAERun].training.ckpt_freq, given[ProbeSchedule].ckpt_freq

    assert of_pipeline("--ckpt_freq 50") == (50, 0)
    assert of_pipeline("--ckpt_freq 50 --probe_ckpt_freq 3") == (50, 3)
    assert of_pipeline("--probe_ckpt_freq 3") == (0, 3)
    for flag in ("ckpt_freq", "probe_ckpt_freq"):
        run, _, schedule, *_ = stage(f"train_linear_probe.py --{flag} 7")
        assert (run.training.ckpt_freq, schedule.ckpt_freq) == (0, 7)


def other_value(flag: Flag) -> str | None:
    """A text for a flag that does not mean its default; None for a choice of one."""
    if flag.name == "device":
        return "cuda:7"
    if flag.name == "partition":
        return "2/3"
    if flag.setting.choices:
        return next((choice for choice in flag.setting.choices if choice != flag.default), None)
    if flag.type is bool:
        return ""
    return {int: "7", float: "0.03125"}.get(flag.type, "7,8" if flag.is_tuple else "other")


ALL_FLAGS = [
    (found.name, flag)
    for found in (PIPELINE, *STAGES.values())
    for flag in (found.flags() | flags(Execution)).values()
    if not flag.setting.positional
    and other_value(flag) is not None
    and (flag.name != "ckpt_freq" or not (found.explains or found.name == "probe"))  # there it is --probe_ckpt_freq
]


@pytest.mark.parametrize(("name", "flag"), ALL_FLAGS, ids=[f"{name} --{flag.name}" for name, flag in ALL_FLAGS])
def test_every_flag_of_every_script_changes_its_field_and_nothing_else(
    monkeypatch, write_config, name: str, flag: Flag
) -> None:
    """What the stage function gets differs from the defaults in the fields of this flag."""
    monkeypatch.setenv("DNCBM_CONFIG", str(write_config()))
    found = PIPELINE if name == PIPELINE.name else STAGES[name]
    text = other_value(flag)
    variant = ["--sae_type", flag.variants[0]] if flag.variants else []
    takes = (*found.takes, Execution)

    def declared(*more: str) -> list[Any]:
        _, read, _ = parse(found, [*positional(found), *variant, *more])
        return [build(cls, read) for cls in takes]

    before, after = declared(), declared(f"--{flag.name}", *([text] if text else []))
    changed = {
        key for old, new in zip(before, after, strict=True) for key in values(new) if values(old).get(key) != values(new)[key]
    }
    allowed = {flag.name, *(("l1_coeff", "k", "l0_coeff") if flag.name == "sae_type" else ())}
    assert flag.name in changed
    assert changed <= allowed


@pytest.mark.parametrize(
    ("text", "sparsity"),
    [
        ("--sae_type relu --l1_coeff 0.1", ReLU(l1_coeff=0.1)),
        ("--sae_type topk --k 5", TopK(5)),
        ("--sae_type batchtopk --k 5", BatchTopK(5)),
        ("--sae_type jumprelu --l0_coeff 0.1", JumpReLU(l0_coeff=0.1)),
        ("--sae_type matryoshka --k 5", Matryoshka(BatchTopK(5))),
    ],
)
def test_sparsity_variants(stage, text: str, sparsity: Sparsity) -> None:
    assert stage(f"train_sae_img.py {text}")[0].sparsity == sparsity


def test_templates_are_words_of_their_own(stage) -> None:
    features, prompts, _ = stage("zero_shot.py --img_enc_name enc --probe_dataset mine --templates 'a {}, b' '{} c'")
    assert features == ProbeFeatures("mine", "enc", "out")
    assert prompts == Prompts(("a {}, b", "{} c"))


# ------------------------------------------------------------------------------------------------------------ preset


@pytest.mark.parametrize(
    ("dataset", "lr", "sparsity_lambda"),
    [("imagenet", 1e-3, 1), ("cifar10", 1e-3, 1), ("cifar100", 1e-2, 1), ("places365", 1e-2, 0.1), ("waterbirds100", 0.1, 10)],
)
def test_the_papers_preset(stage, capsys, dataset: str, lr: float, sparsity_lambda: float) -> None:
    """It wins against config.py, but not against a flag; it says what it picked."""
    config = {"defaults": {"probe_lr": 7.0, "probe_epochs": 3, "probe_train_bs": 8}}
    _, probe, *_ = stage(f"train_linear_probe.py --preset paper --probe_dataset {dataset}", **config)
    assert probe == ProbeRun(dataset, lr=lr, batch_size=512, epochs=200, sparsity_lambda=sparsity_lambda)
    printed = capsys.readouterr().out
    assert f"--probe_lr {lr}" in printed
    assert f"--probe_sparsity_loss_lambda {float(sparsity_lambda)}" in printed
    _, probe, *_ = stage(f"train_linear_probe.py --preset paper --probe_dataset {dataset} --probe_lr 0.5", **config)
    assert (probe.lr, probe.sparsity_lambda) == (0.5, sparsity_lambda)
    assert "--probe_lr 0.5" in capsys.readouterr().out
    _, probe, *_ = stage(f"train_linear_probe.py --probe_dataset {dataset}", **config)
    assert (probe.lr, probe.epochs) == (7.0, 3)
    _, probe, *_ = stage(f"train_linear_probe.py --probe_dataset {dataset}", defaults={"preset": "paper"})
    assert (probe.lr, probe.sparsity_lambda) == (lr, sparsity_lambda)


def test_the_paper_has_no_preset_for_other_data(stage) -> None:
    with pytest.raises(SystemExit) as caught:
        stage("train_linear_probe.py --preset paper --probe_dataset mine")
    assert "--probe_dataset mine" in str(caught.value)
    assert "places365" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- refusals


def rejected(stage, command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that refuses a command line."""
    with pytest.raises(SystemExit) as caught:
        stage(command)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("command", "nearest"),
    [
        ("assign_names.py --num_epoch 200", "--num_epochs"),
        ("train_sae_img.py --batchsize 1", "--batch_size"),  # of another stage, since no flag of its own is near
        ("train_sae_img.py --probe-lr=1", "--probe_lr"),
        ("save_probe_features.py --no_such_thing 1", None),
        ("save_vocab_embeddings.py extra", None),
        ("train_sae_img.py -lr 1", "--lr"),
    ],
)
def test_unknown_flags_are_rejected(stage, capsys, command: str, nearest: str | None) -> None:
    said = rejected(stage, command, capsys)
    assert "unrecognized arguments: " + command.split(maxsplit=1)[1] in said
    assert (f"did you mean {nearest}?" if nearest else "did you mean") in said or nearest is None
    assert ("did you mean" in said) == (nearest is not None)


ONE_FOR_ALL = (
    f"{SAE_FLAGS} {PROBE_FLAGS} --ckpt_freq 0 --val_freq 1 --k 7 --n_clusters 5 --templates 'a {{}}' 'b {{}}' --use_wandb"
    " --num_workers 2 --precision fp32 --batch_size 64 --hook_points out --probe_on_features --probe_split val --limit 3"
    " --method_name ours --which_ckpt final --preset paper --from sae --image_size 9 --rank_by strength --use_latex"
    # the rest of the authors' parser
    " --modality img --vocab_type none --probe_nclasses 365 --probe_save_dir x --probe_val_freq 1 --wandb_entity me"
    " --resample_dataset_size 9 --adam_beta_1 0.9 --adam_beta_2 0.999 --adam_epsilon 1e-8 --adam_weight_decay 0 --seed 49"
)


@pytest.mark.parametrize("found", [PIPELINE, *STAGES.values()], ids=lambda found: found.name)
def test_one_line_of_flags_serves_every_stage(write_config, monkeypatch, capsys, found: Stage) -> None:
    monkeypatch.setenv("DNCBM_CONFIG", str(write_config()))
    _, read, given = parse(found, [*positional(found), *shlex.split(ONE_FOR_ALL)])
    own = {name: flag for cls in (*found.takes, Execution) for name, flag in flags(cls).items()}
    assert given <= read.keys()
    if "lr" in own:
        assert read["lr"] == 5e-4
    if found.name == "sae_features":
        assert "--probe_lr" in capsys.readouterr().out.splitlines()[0]  # what is not used is said


def test_flags_that_config_decides_are_ignored_with_a_warning(write_config, monkeypatch, caplog) -> None:
    monkeypatch.setenv("DNCBM_CONFIG", str(write_config(vocabulary="mine")))
    parse(STAGES["names"], ["--vocab_type", "mine", "--probe_save_dir", "", "--probe_nclasses", "10"])
    assert not caplog.messages
    parse(STAGES["names"], ["--vocab_type", "laion"])
    assert len(caplog.messages) == 1
    assert "--vocab_type laion" in caplog.text
    assert "mine" in caplog.text


BAD_VALUES = {
    "train_sae_img.py": {
        (str(2**64), "9" * 5000, "1e3"): ("seed",),
        (str(10**9),): ("train_sae_bs",),
        (str(10**7), str(2**64)): ("expansion_factor",),
        ("1e400", "-1e400"): ("lr", "l1_coeff"),
        (str(2**64),): ("log_every", "resample_freq", "k"),
        ("meta", "foo", "cuda:", "cuda:1000", "cpu:0", ""): ("device",),
        ("../../evil", "..", ".", "", " ", "a/b", "a\nb", "a\x1bb", "x" * 101): ("sae_dataset",),
        ("..", ".", "", "/", "./..", "a\nb"): ("img_enc_name",),
        ("0", "-1", "nan", "inf", "x"): ("lr", "adam_epsilon"),
        ("0", "-3", "1.5", "x"): ("expansion_factor", "num_epochs", "train_sae_bs", "resample_dataset_size", "k"),
        ("-3", "1.5", "x"): ("resample_freq", "val_freq"),
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
        ("0", "-1", str(10**9)): ("batch_size",),
        ("-1", str(10**6)): ("num_workers", "max_bad_fraction"),
        ("layer4",): ("hook_points",),
        ("0/3", "1/0", "1/", "/3", "2", "-1/3", "1/3/3", "1.0/3", "all", ""): ("partition",),
    },
    "assign_names.py": {("../elsewhere", "a,b"): ("save_suffix",)},
    "save_concept_strengths.py": {
        ("test",): ("probe_split",),
        ("../../evil", "..", "", "a\nb"): ("probe_dataset", "sae"),
    },
    "visualization/vis_meta_clustering_dump.py": {(str(10**12), "0"): ("n_clusters",), (str(-(2**70)),): ("indices",)},
    "visualization/vis_local_explanations_plot.py": {(str(10**6),): ("num_workers",), ("..",): ("probe",)},
    "visualization/vis_task_agnosticity_dump.py": {("mine,../x",): ("probe_dataset",)},
    "run_pipeline.py": {("nowhere",): ("from", "to")},
}  # fmt: skip


@pytest.mark.parametrize(
    ("script", "flag", "value"),
    [
        (script, f"--{flag}", value)
        for script, flags_of in BAD_VALUES.items()
        for values_, names in flags_of.items()
        for flag in names
        for value in values_
    ],
)
def test_values_out_of_range_are_rejected(stage, capsys, script: str, flag: str, value: str) -> None:
    said = rejected(stage, f"{script} {shlex.quote(f'{flag}={value}')}", capsys)
    assert flag in said
    assert len(said) < 450


@pytest.mark.parametrize("suffix", ["x" * 300, "ä" * 110])
def test_a_suffix_must_fit_into_a_folders_name(stage, suffix: str) -> None:
    with pytest.raises(SystemExit, match=r"--save_suffix: .* bytes, and file systems allow 255"):
        stage(f"train_sae_img.py --save_suffix {suffix}")
    assert stage(f"train_sae_img.py --save_suffix {suffix[:80]}")[0].suffix == suffix[:80]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--probe_lr abc", "--probe_lr: must be a number, not 'abc'"),
        ("--probe_epochs 1.5", "--probe_epochs: must be a whole number, not '1.5'"),
        ("--probe_epochs 0", "--probe_epochs: must be at least 1, not 0"),
        ("--probe_solver sgd", "--probe_solver: must be adam or prox, not 'sgd'"),
    ],
)
def test_a_wrong_value_is_named_in_words(stage, capsys, text: str, said: str) -> None:
    assert said in rejected(stage, f"train_linear_probe.py {text}", capsys)


# ------------------------------------------------------------------------------------------------ defaults of config.py


class TestDefaultsOfTheConfig:
    def test_they_replace_the_defaults_of_flags(self, stage) -> None:
        defaults = {"lr": 1e-3, "expansion_factor": 2, "img_enc_name": "mine", "probe_on_features": True, "probe_lr": 1}
        run, probe, *_ = stage("train_linear_probe.py", defaults=defaults)
        assert (run.training.lr, run.expansion_factor, run.encoder) == (1e-3, 2, "mine")
        assert (probe.on_features, probe.lr) == (True, 1.0)
        assert run.config_name.startswith("lr0.001_")
        assert probe.config_name.startswith("lr1.0_")

    def test_script_local_flags_have_defaults_too(self, stage) -> None:
        defaults = {"n_clusters": 3, "templates": ["a {}, b", "{}"], "rank_by": "strength", "image_size": 32, "to": "sae"}
        assert stage("visualization/vis_meta_clustering_dump.py", defaults=defaults)[3].n_clusters == 3
        assert stage("zero_shot.py", defaults=defaults)[1].templates == ("a {}, b", "{}")
        assert stage("visualization/vis_global_explanations_plot.py", defaults=defaults)[5].rank_by == "strength"
        assert stage("download_cc3m.py a b", defaults=defaults)[0].image_size == 32
        assert stage("run_pipeline.py", defaults=defaults)[0].last == "sae"

    def test_a_list_of_data_sets_to_show_is_not_one_to_classify(self, stage) -> None:
        *_, shown, _, _ = stage("visualization/vis_task_agnosticity_dump.py", defaults={"probe_dataset": "mine"})
        assert shown.datasets == ()

    def test_a_flag_of_the_command_line_wins(self, stage) -> None:
        run, *_ = stage("train_sae_img.py --lr 0.5", defaults={"lr": 1e-3, "num_epochs": 3})
        assert (run.training.lr, run.training.epochs) == (0.5, 3)

    def test_none_says_that_there_is_none(self, stage) -> None:
        assert stage("train_sae_img.py --use_wandb", defaults={"wandb_entity": None})[1] == Tracking(True, None)
        assert stage("save_concept_strengths.py", defaults={"probe_split": None})[2].names == SPLITS

    def test_those_of_other_scripts_do_not_matter(self, stage) -> None:
        assert stage("save_vocab_embeddings.py", defaults={"probe_epochs": 3, "img_enc_name": "mine"})[0].encoder == "mine"

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
        with refusal(path, "defaults", name):
            parse(STAGES["sae"], [])


# -------------------------------------------------------------------------------------------------------------- help


def shown_help(stage: Stage, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(stage, ["--help"])
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_needs_no_config(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("DNCBM_CONFIG", str(tmp_path / "none.py"))
    shown = shown_help(STAGES["sae"], capsys)
    assert STAGES["sae"].summary in shown
    assert "--resample_dataset_size" in shown


@pytest.mark.parametrize("name", [PIPELINE.name, *STAGES])
def test_help_shows_the_defaults_that_config_sets(write_config, monkeypatch, capsys, name: str) -> None:
    """Every flag that is shown has its help text; the default is the one in force."""
    found = PIPELINE if name == PIPELINE.name else STAGES[name]
    monkeypatch.setenv("DNCBM_CONFIG", str(write_config(defaults={"device": "cuda:3", "num_epochs": 17, "probe_lr": 0.625})))
    shown = shown_help(found, capsys)
    assert "(default: cuda:3)" in shown
    assert ("(default: 17)" in shown) == (SAERun in found.takes)
    assert ("(default: 0.625)" in shown) == (ProbeRun in found.takes)
    for flag in flags(Execution).values():
        assert flag.setting.help in shown


def test_help_shows_what_the_stage_trains_and_what_locates_the_rest(write_config, monkeypatch, capsys) -> None:
    monkeypatch.setenv("DNCBM_CONFIG", str(write_config()))
    training, naming = shown_help(STAGES["sae"], capsys), shown_help(STAGES["names"], capsys)
    assert "--adam_beta_1" in training
    assert "--adam_beta_1" not in naming
    assert "--sae_type" in naming
    assert "--train_sae_bs" in naming
    parse(STAGES["names"], ["--adam_beta_1", "0.5"])  # pasted from the line that trained it


# ---------------------------------------------------------------------------------------------------- one-line errors


@pytest.mark.parametrize("error", [UserError("what is wrong"), CheckpointError("cut off"), NonFiniteError("step 3: NaN")])
def test_an_error_that_the_user_can_fix_is_one_line(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        one_line_errors(fail)
    assert caught.value.code == f"error: {error}"


def message_of(error: BaseException) -> str:
    """The line that an error becomes."""

    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        one_line_errors(fail)
    line = str(caught.value.code)
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    "name",
    [
        *("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "EFBIG", "ENAMETOOLONG", "EMFILE", "ENFILE", "ENOMEM"),
        *("ENOTDIR", "EEXIST", "EISDIR", "ESTALE"),
    ],
)
def test_errors_of_the_system_are_one_line_that_names_the_file(name: str) -> None:
    number = getattr(errno, name)
    line = message_of(OSError(number, os.strerror(number), "/data/00001.npy"))
    assert line.startswith("error: /data/00001.npy: ")
    assert len(line) > 45  # it says more than the file


def test_what_libraries_raise_on_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """safetensors and numpy wrap the system's errors; `whole_file` unwraps them."""

    def by_safetensors(path: Path) -> None:
        safetensors.torch.save_file({"x": torch.zeros(10)}, path / "no" / "folder")

    def by_numpy(path: Path) -> None:
        raise OSError("1024 requested and 0 written")  # ndarray.tofile

    for write in (by_safetensors, by_numpy):
        with pytest.raises(OSError, match=str(tmp_path / "x.bin")) as caught, whole_file(tmp_path / "x.bin") as temporary:
            write(temporary)
        assert caught.value.errno
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 3. GiB for an array"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
    ],
    ids=str,
)
def test_no_memory_is_one_line(error: Exception) -> None:
    assert "not enough memory" in message_of(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), FileNotFoundError(2, "No such file", "x"), KeyError("x"), ValueError("x")]
)
def test_other_errors_are_faults_of_the_program(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        one_line_errors(fail)


def test_an_interruption_says_how_to_resume(capsys) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        one_line_errors(interrupt)
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted: run the same command again to resume\n"


def test_warnings_are_marked(capsys, monkeypatch) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])

    def log() -> None:
        logging.getLogger("dncbm.anything").warning("few %s", "images")
        logging.getLogger("sparse_autoencoder.trainer").info("step 1")
        logging.getLogger("other").info("not shown")

    one_line_errors(log)
    assert capsys.readouterr().err == "warning: few images\nstep 1\n"


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        one_line_errors(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("sae_features", ["--sae_dataset", "none"], "'none'"),
        ("names", [], "run `python scripts/01_save_cc3m_features.py`, then `python scripts/02_train_sae_img.py`"),
        ("pipeline", ["--from", "sae", "--to", "sae"], "01_save_cc3m_features.py"),
        ("pipeline", ["--from", "probe", "--to", "sae"], "--to sae comes before --from probe"),
        ("local_explanations_dump", ["--probe_on_features"], "features have no names"),
    ],
)
def test_a_stage_without_its_data_is_one_line(
    write_config, monkeypatch, tmp_path: Path, name: str, arguments: list[str], words: str
) -> None:
    monkeypatch.setenv("DNCBM_CONFIG", str(write_config(sae_datasets={"cc3m": dict.fromkeys(SPLITS, "0.tar")})))
    with pytest.raises(SystemExit) as caught:
        main(name, arguments)
    line = str(caught.value.code)
    assert line.startswith("error: ")
    assert words in line
    assert "\n" not in line
    assert not (tmp_path / "sae_dir").exists()  # nothing was left behind


@pytest.mark.slow
def test_a_script_is_a_program(write_config, tmp_path: Path) -> None:
    """As a process of its own, from another folder: one line on stderr, exit code 1."""
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "assign_names.py")],
        env=os.environ | {"DNCBM_CONFIG": str(write_config())},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", [name for name, found in STAGES.items() if not found.several_processes])
def test_other_stages_refuse_to_run_in_several_processes(write_config, monkeypatch, refusal, name: str) -> None:
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "DNCBM_CONFIG": str(write_config())}.items():
        monkeypatch.setenv(key, value)
    with refusal("without torchrun"):
        parse(STAGES[name], positional(STAGES[name]))


# ------------------------------------------------------------------------------------- the run that a stage reads


@pytest.fixture
def recorded(monkeypatch, make_settings: Callable[..., Settings]) -> Callable[..., list[Any]]:
    """Runs the command line of a stage whose function does nothing; returns what it was given."""
    settings = make_settings()
    monkeypatch.setenv("DNCBM_CONFIG", str(settings.path))
    calls: list[list[Any]] = []

    def record(settings: Settings, *declared: Any, device: str, overwrite: bool) -> None:
        calls.append([*declared, verifying()])

    def run(name: str, *arguments: str) -> list[Any]:
        monkeypatch.setitem(STAGES, name, replace(COMMANDS[name].load(), function=record))
        main(name, list(arguments))
        return calls.pop()

    return run


def put(settings: Settings, stage: Stage, *declared: Any) -> None:
    """Finish every output of a stage, empty, for what it takes."""
    given = {type(one): one for one in declared}
    run = {key: value for one in declared for key, value in values(one).items()}
    for path in stage.outputs(Artifacts(settings), *(given.get(cls) or cls() for cls in stage.takes)):
        with making(path, stage.name, {}, {}, overwrite=True, run=run) as work:
            made = path if path.suffix else path / "made"
            made.parent.mkdir(parents=True, exist_ok=True)
            made.write_text("made")
            work.done([made])


def test_partial_flags_and_names_find_the_run(recorded, make_settings, capsys) -> None:
    settings = make_settings()
    one = SAERun(sparsity=TopK(5), training=TrainingSettings(epochs=3))
    put(settings, SAE, one)
    put(settings, PROBE_FEATURES, ProbeFeatures())
    put(settings, STRENGTHS, one)
    put(settings, STAGES["names"], one)
    for name in ("names", "strengths", "nec", "probe"):
        assert recorded(name)[0] == one, name
        assert recorded(name, "--sae_type", "topk", "--val_freq", "7")[0].sparsity == TopK(5)
        assert recorded(name, "--sae", one.config_name)[0] == one
        assert one.config_name in capsys.readouterr().out
    put(settings, SAE, SAERun(suffix="_other"))
    with pytest.raises(SystemExit, match=r"--sae .*_other, or --sae .*topk5"):
        recorded("names")
    assert recorded("names", "--sae", one.config_name)[0] == one
    put(settings, SAE, PAPER)  # all defaults name it
    assert recorded("names")[0] == PAPER
    with pytest.raises(SystemExit, match="02_train_sae_img"):
        recorded("names", "--lr", "1")
    with pytest.raises(SystemExit, match="contradicts --lr 1"):
        recorded("names", "--lr", "1", "--sae", one.config_name)


def test_a_stage_that_trains_a_run_takes_no_name_for_it(recorded, capsys) -> None:
    for name, flag in (("sae", "sae"), ("probe", "probe")):
        with pytest.raises(SystemExit):  # features are missing; the flag is one of other stages
            recorded(name, f"--{flag}", "x")
        assert f"not used here: --{flag}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags_", "wanted"),
    [
        ("--from names --to names", "topk5"),
        ("--from probe_features --to probe_features", "lr0.0005_l1"),  # no SAE is needed
        ("--from strengths --sae", "topk5"),
    ],
)
def test_a_pipeline_reads_the_run_that_it_does_not_train(
    recorded, make_settings, monkeypatch, flags_: str, wanted: str
) -> None:
    one = SAERun(sparsity=TopK(5))
    put(make_settings(), SAE, one)
    runs: list[SAERun] = []

    def record(settings: Settings, *declared: Any, device: str, overwrite: bool) -> None:
        runs.extend(found for found in declared if isinstance(found, SAERun))

    monkeypatch.setattr(dncbm.cli, "PIPELINE", replace(PIPELINE, function=record))
    main("pipeline", [*flags_.split(), *([one.config_name] if flags_.endswith("--sae") else [])])
    assert runs[0].config_name.startswith("lr0.0005_" + wanted.removeprefix("lr0.0005_"))


def test_a_pipeline_that_trains_an_sae_takes_no_name(recorded, make_settings) -> None:
    with pytest.raises(SystemExit, match="--sae names a finished run"):
        main("pipeline", ["--sae", "x"])


def test_verify_compares_hashes(recorded) -> None:
    assert recorded("results_table")[-1] is False
    assert recorded("results_table", "--verify")[-1] is True
    assert verifying() is False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "shown"), [({"PYTHONIOENCODING": "ascii"}, "\\xe9"), ({"LC_ALL": "C.UTF-8"}, "é"), ({"LANG": "C"}, "")]
)
def test_any_terminal_shows_any_name(write_config, environment: dict[str, str], shown: str) -> None:
    path = write_config(defaults={"sae_dataset": "é"})
    path.write_text(path.read_text(), encoding="utf-8")
    for arguments in (["--help"], []):
        done = subprocess.run(
            [sys.executable, str(SCRIPTS / "02_train_sae_img.py"), *arguments],
            env=os.environ | environment | {"DNCBM_CONFIG": str(path)},
            capture_output=True,
            check=False,
        )
        assert b"Traceback" not in done.stderr
        assert shown in (done.stdout + done.stderr).decode(errors="surrogateescape")


@pytest.mark.slow
def test_nobody_reads_the_output(write_config) -> None:
    """As in `... | head -1`."""
    done = subprocess.run(
        ["/bin/sh", "-c", '"$0" "$1" --help | true; sleep 0.1', sys.executable, str(SCRIPTS / "run_pipeline.py")],
        env=os.environ | {"DNCBM_CONFIG": str(write_config()), "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.2, 0.5, 1.5])
def test_ctrl_c_is_no_traceback_at_any_time(write_config, seconds: float) -> None:
    """Python's own start takes less than the shortest of these; a stage imports torch for longer than that."""
    running = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "assign_names.py")],
        env=os.environ | {"DNCBM_CONFIG": str(write_config())},
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(seconds)
    running.send_signal(signal.SIGINT)
    assert "Traceback" not in running.communicate()[1]


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [300, 1000, 2500])
def test_little_memory_is_one_line(write_config, megabytes: int) -> None:
    limit = f"ulimit -v {megabytes * 1024} && exec"
    done = subprocess.run(
        ["/bin/sh", "-c", f'{limit} "$0" "$1"', sys.executable, str(SCRIPTS / "assign_names.py")],
        env=os.environ | {"DNCBM_CONFIG": str(write_config())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
