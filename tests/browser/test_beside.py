"""Runs side by side: which SAEs are meant, what they are called, and their matches against brute force."""

import itertools
import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dncbm.bottleneck.run import run_of_flags
from dncbm.browser.beside import labels_of, matched, runs_beside
from dncbm.browser.shown import ShownRun
from dncbm.cli import main, parse
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SAERun
from dncbm.runs.manifests import manifest_path
from dncbm.runs.settings import Settings, load_settings
from dncbm.stages import COMMANDS
from sparse_autoencoder import TopK, TrainingSettings
from sparse_autoencoder.declare import build
from tests.bottleneck.conftest import SmallRun

OTHERS = (["--seed", "50"], ["--sae_type", "topk", "--k", "2", "--seed", "51"])


@pytest.fixture(scope="module")
def several(small_run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A small run, and beside it two SAEs, the first of them with a probe."""
    root = tmp_path_factory.mktemp("several")
    shutil.copytree(small_run.root, root, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DNCBM_CONFIG", str(root / "config.py"))
        for flags in OTHERS:
            main("sae", flags)
        for stage in ("strengths", "probe"):
            main(stage, OTHERS[0])
    return load_settings(root / "config.py")


def test_flags_and_names_mean_the_runs_of_a_command_line(several: Settings) -> None:
    run, probe = run_of_flags(several, {"seed": 49})
    with_probe = run_of_flags(several, {"seed": 50})
    assert with_probe[1].seed == 50
    topk = replace(run, sparsity=TopK(2), training=replace(run.training, seed=51))
    found = runs_beside(several, run, probe, ["seed=50", " sae_type = topk , k=2,seed=51"])
    assert found == [with_probe, (topk, replace(probe, seed=51))]
    by_name = [f"sae={one.config_name}" for one, _ in found]
    assert runs_beside(several, run, probe, by_name) == found
    assert runs_beside(several, topk, probe, [f"sae_type=relu,seed=49,l1_coeff={run.sparsity.l1_coeff}"])[0][0] == run
    assert runs_beside(several, topk, probe, ["sae_type=relu,seed=49"])[0][0] == run, "l1_coeff is a default of the config"
    assert runs_beside(several, run, probe, []) == []


def test_the_settings_are_those_that_were_recorded(several: Settings, tmp_path: Path) -> None:
    """Also those that no name shows."""
    shutil.copytree(several.path.parent, tmp_path, dirs_exist_ok=True)
    settings = load_settings(tmp_path / "config.py")
    run, probe = run_of_flags(settings, {"seed": 49})
    shutil.rmtree(Artifacts(settings).sae(replace(run, training=replace(run.training, seed=50))).parents[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DNCBM_CONFIG", str(settings.path))
        main("sae", ["--seed", "50", "--lr_warmup_steps", "3"])
    ((other, _),) = runs_beside(settings, run, probe, ["seed=50"])
    assert other == replace(run, training=replace(run.training, seed=50, lr_warmup_steps=3))


@pytest.fixture
def copy(several: Settings, tmp_path: Path) -> Settings:
    """A copy that a test may change."""
    shutil.copytree(several.path.parent, tmp_path, dirs_exist_ok=True)
    return load_settings(tmp_path / "config.py")


def test_a_manifest_that_records_another_sae_is_not_followed(copy: Settings) -> None:
    run, probe = run_of_flags(copy, {"seed": 49})
    other = replace(run, training=replace(run.training, seed=50))
    manifest = manifest_path(Artifacts(copy).sae(other))
    made = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(made | {"run": made["run"] | {"lr": 0.5}}))
    assert runs_beside(copy, run, probe, ["seed=50"]) == [(other, replace(probe, seed=50))]


def test_an_sae_on_another_encoder_is_refused(copy: Settings, refusal: Callable) -> None:
    run, probe = run_of_flags(copy, {"seed": 49})
    manifest = manifest_path(Artifacts(copy).sae(replace(run, training=replace(run.training, seed=50))))
    made = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(made | {"settings": made["settings"] | {"model": "another"}}))
    with refusal("--beside seed=50", "come from different encoders"):
        runs_beside(copy, run, probe, ["seed=50"])


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        (["seed"], ["--beside seed", "seed=50"]),
        ([""], ["write FLAG=VALUE"]),
        (["sed=50"], ["'sed'", "did you mean seed?"]),
        (["val_freq=3"], ["'val_freq'"]),
        (["seed=x"], ["seed must be a whole number"]),
        (["k=0"], ["k must be at least 1"]),
        (["sae_type=tanh"], ["relu or topk"]),
        (["seed=50,seed=51"], ["seed is given twice"]),
        (["sae="], ["be the name of a folder"]),
        (["sae=x,seed=50"], ["leave the others out"]),
        (["sae=nothing"], ["there is no SAE nothing", "did you mean"]),
        (["img_enc_name=clip_RN50"], ["img_enc_name differs", "the same images and features"]),
        (["sae_dataset=cc3m,seed=50"], ["sae_dataset differs", "the same images and features"]),
        (["lr_warmup_steps=3"], ["--lr_warmup_steps 0"]),
        (["seed=49"], ["is the SAE itself"]),
        (["seed=50", "seed=50,sae_type=relu"], ["--beside seed=50,sae_type=relu", "that of --beside seed=50"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_cannot_be_meant_is_refused(several: Settings, refusal: Callable, beside: list[str], said: list[str]) -> None:
    run, probe = run_of_flags(several, {"seed": 49})
    with refusal(*said):
        runs_beside(several, run, probe, beside)


@pytest.mark.parametrize(
    ("text", "stage", "settings"),
    [
        ("seed=77", "sae", {"seed": 77}),
        ("sae_type=batchtopk,k=5,save_suffix=_new", "sae", {"sae_type": "batchtopk", "k": 5, "save_suffix": "_new"}),
        ("save_suffix=_align0.5,seed=50", "names", {"seed": 50, "align_names": 0.5, "save_suffix": ""}),
    ],
)
def test_an_sae_that_is_missing_is_made_by_the_command(
    several: Settings, monkeypatch: pytest.MonkeyPatch, text: str, stage: str, settings: dict[str, Any]
) -> None:
    run, probe = run_of_flags(several, {"seed": 49})
    with pytest.raises(Exception, match="there is no such SAE") as caught:
        runs_beside(several, run, probe, [text])
    command, *words = shlex.split(re.findall(r"`python (.*?)`", str(caught.value))[0])
    assert command == f"scripts/{COMMANDS[stage].script}"
    monkeypatch.setenv("DNCBM_CONFIG", str(several.path))
    _, values, given = parse(COMMANDS[stage], words)
    if "sae" in given:
        values |= {"seed": 50}
        assert values["sae"] == replace(run, training=replace(run.training, seed=50)).config_name
    assert {name: values[name] for name in settings} == settings
    if stage == "sae":
        assert build(SAERun, values).config_name in str(caught.value)


RELU, SEEDED = SAERun(), SAERun(training=TrainingSettings(seed=50))


@pytest.mark.parametrize(
    ("runs", "labels"),
    [
        ([RELU], ["clip_RN50"]),
        ([RELU, SEEDED], ["seed 49", "seed 50"]),
        ([RELU, SAERun(sparsity=TopK(8))], ["relu, L1 coefficient 3e-05", "topk, k 8"]),
        ([SAERun(sparsity=TopK(k)) for k in (8, 16)], ["k 8", "k 16"]),
        ([RELU, replace(SEEDED, suffix="_x")], ["no suffix, seed 49", "suffix _x, seed 50"]),
    ],
)
def test_labels_say_what_differs(runs: list[SAERun], labels: list[str]) -> None:
    assert labels_of(runs) == labels


# ---------------------------------------------------------------------------------------------------------- matches


def shown(decoder: np.ndarray, seed: int) -> ShownRun:
    run = replace(RELU, training=TrainingSettings(seed=seed))
    return ShownRun(run, torch.from_numpy(decoder.astype(np.float32)), None, None, (), None, None, None)


def brute_force(first: np.ndarray, second: np.ndarray) -> float:
    """The largest possible sum of cosines of one-to-one matches, all of which are tried."""
    if len(first) > len(second):
        return brute_force(second, first)
    cosines = first @ second.T
    ways = itertools.permutations(range(len(second)), len(first))
    return max((float(cosines[range(len(first)), way].sum()) for way in ways), default=0.0)


def centred(decoder: np.ndarray) -> np.ndarray:
    apart = decoder - decoder.mean(axis=0)
    return apart / np.linalg.norm(apart, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("sizes", "dead"),
    [
        ((6, 6), ([], [])),
        ((7, 5), ([1], None)),
        ((4, 7), (None, [0, 6])),
        ((5, 5), ([0, 1, 2, 3, 4], [])),
        ((3, 5), ([], [1])),
    ],
)
def test_matches_are_the_best_of_all(
    sizes: tuple[int, int], dead: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    rng = np.random.default_rng(sizes)
    decoders = [rng.normal(size=(n, 4)) + 2 for n in sizes]
    decoders = [one / np.linalg.norm(one, axis=1, keepdims=True) for one in decoders]
    rates = [None if gone is None else 0.1 * ~np.isin(np.arange(n), gone) for n, gone in zip(sizes, dead, strict=True)]
    monkeypatch.setattr("dncbm.browser.beside.firing_rates", lambda _, run: rates[run.training.seed])
    found = matched(None, *(shown(one, seed) for seed, one in enumerate(decoders)))  # type: ignore[arg-type]

    live = [np.setdiff1d(np.arange(n), [] if gone is None else gone) for n, gone in zip(sizes, dead, strict=True)]
    partner, cosine = found["partner"], found["cosine"]
    assert (partner.dtype, cosine.dtype) == (np.int32, np.float32)
    assert partner.shape == cosine.shape == (sizes[0],)
    rows = np.flatnonzero(partner >= 0)
    assert np.array_equal(np.isnan(cosine), partner < 0)
    assert len(rows) == min(map(len, live)) == len(set(partner[rows]))
    assert set(rows) <= set(live[0])
    assert set(partner[rows]) <= set(live[1])
    if not len(rows):
        return
    unit = [np.zeros_like(one) for one in decoders]
    for one, of, index in zip(unit, decoders, live, strict=True):
        one[index] = centred(of[index])
    assert cosine[rows] == pytest.approx((unit[0][rows] * unit[1][partner[rows]]).sum(axis=1), abs=1e-5)
    assert cosine[rows].sum() == pytest.approx(brute_force(unit[0][live[0]], unit[1][live[1]]), abs=1e-5)


def test_dead_latents_of_a_real_run_have_no_partner(several: Settings) -> None:
    runs = [run_of_flags(several, {"seed": seed})[0] for seed in (49, 50)]
    rates = [np.load(Artifacts(several).firing_rates(run)) for run in runs]
    decoders = [np.random.default_rng(seed).normal(size=(len(of), 8)) for seed, of in enumerate(rates)]
    found = matched(several, *(replace(shown(one, 0), run=run) for one, run in zip(decoders, runs, strict=True)))
    n_live = [int((of > 0).sum()) for of in rates]
    assert n_live[0] < len(rates[0]), "some are dead"
    assert (found["partner"] >= 0).sum() == min(n_live)
    assert not (found["partner"][rates[0] == 0] >= 0).any()
