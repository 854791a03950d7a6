"""The probe stage: what it makes, from what, and when it refuses or has nothing to do."""

import csv
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dncbm.probe.fit
import dncbm.probe.stage
import dncbm.probe.state
import dncbm.runs.manifests
from dncbm.cli import main
from dncbm.probe.fit import Keep, fit_probe
from dncbm.probe.nec import accuracy_at_nec
from dncbm.probe.results_table import our_cells
from dncbm.probe.stage import load_probe, load_probe_data, train_linear_probe
from dncbm.probe.state import StateFile
from dncbm.probe.zero_shot import evaluate_zero_shot
from dncbm.runs.declarations import SPLITS, ProbeDataset, ProbeFeatures, ProbeRun, ProbeSchedule, SAERun, Tracking
from dncbm.runs.errors import StaleArtifact
from dncbm.runs.manifests import Outcome, file_hash, read_manifest
from dncbm.runs.results import read_results
from sparse_autoencoder import JumpReLU, ReLU, TopK, TrainingSettings

CPU = torch.device("cpu")
PROBE = ProbeRun("mine", lr=0.02, batch_size=32, epochs=4)
PROX = ProbeRun("mine", epochs=50, sparsity_lambda=2.0, solver="prox")
BASELINE = replace(PROBE, on_features=True)


def train(mine, probe: ProbeRun = PROBE, run: SAERun | None = None, **options) -> Outcome:
    return train_linear_probe(mine.settings, run or mine.run, probe, **{"device": "cpu"} | options)


def results(mine) -> list[dict[str, str]]:
    return read_results(mine.artifacts.probe_results())


@pytest.mark.parametrize("probe", [PROBE, BASELINE], ids=lambda probe: probe.inputs)
def test_the_stage_fits_evaluates_saves_and_reports(mine, sparse, coverage_by_hand, tmp_path, probe: ProbeRun) -> None:
    assert train(mine, probe) is Outcome.RAN
    saved = load_file(mine.artifacts.probe(mine.run, probe))["weight"]
    assert saved.shape == (4, 12), "as nn.Linear keeps it"
    torch.testing.assert_close(load_probe(mine.settings, mine.run, probe), saved.T)
    splits = [sparse(mine.values[split], mine.labels[split]) for split in ("train", "train_val")]
    expected = fit_probe(*splits, 4, probe, CPU, Keep(StateFile(tmp_path / "state.safetensors")))
    torch.testing.assert_close(saved.T, expected, rtol=1e-3, atol=1e-5)

    (row,) = results(mine)
    described = [row[key] for key in ("probe_dataset", "method", "on", "encoder", "hook", "solver", "seed")]
    assert described == ["mine", "probe", probe.inputs, "enc", "out", "adam", "49"]
    assert [row[f"probe_{key}"] for key in ("lr", "batch_size", "epochs", "lambda")] == ["0.02", "32", "4", "0.1"]
    for split in SPLITS:
        logits = mine.values[split] @ saved.numpy().T
        right = logits.argmax(axis=1) == mine.labels[split]
        assert float(row[f"{split}_top1"]) == pytest.approx(right.mean(), rel=1e-5)
        assert float(row[f"{split}_top5"]) == 1
        penalty = 0.1 * float(saved.abs().mean())
        assert float(row[f"{split}_loss"]) == pytest.approx(float(row[f"{split}_ce"]) + penalty, rel=1e-4)
    for tolerance in (0, 1e-9, 1e-6, 1e-3, 0.1):
        assert int(row[f"zeros_{tolerance:g}"]) == int((saved.abs() <= tolerance).sum())
    for kind, absolute in (("positive", False), ("absolute", True)):
        counts = np.mean(coverage_by_hand(mine.values["val"], saved.numpy().T, absolute), axis=0)
        assert [float(row[f"val_coverage_{kind}_{s}%"]) for s in (90, 95, 99)] == pytest.approx(list(counts), rel=1e-5)
    metrics = read_manifest(mine.artifacts.probe(mine.run, probe))["details"]["metrics"]
    assert {key: f"{value:.6g}" for key, value in metrics.items()}.items() <= row.items()


def test_the_log_holds_every_epoch_and_checkpoints_follow_the_schedule(mine) -> None:
    train(mine, schedule=ProbeSchedule(val_freq=2, ckpt_freq=3))
    with mine.artifacts.probe_log(mine.run, PROBE).open(newline="") as file:
        logged = list(csv.DictReader(file))
    assert [row["epoch"] for row in logged] == ["2", "4"]
    (result,) = results(mine)
    assert float(logged[-1]["top1"]) == pytest.approx(float(result["train_val_top1"]), rel=1e-5)
    assert result["train_val_top1"] != result["val_top1"]
    folder = mine.artifacts.probe(mine.run, PROBE).parent
    assert [path.name.split("_")[2] for path in folder.glob("*epoch*")] == ["epoch3"]


def test_accuracies_of_classes_and_groups(mine, write_labels) -> None:
    """A class and a group without an image have no accuracy, and do not count in the mean or the worst."""
    own = {split: np.load(mine.artifacts.labels("mine", split)) for split in ("train", "val")}
    groups = np.arange(40) // 10 % 3  # of the 20 images of val: 10 in group 0, 5 in 1, 5 in 2
    names = {"class_names": list("abcde"), "group_names": ["sea", "land", "air", "space"]}
    write_labels(mine.settings, names, own, groups)
    train(mine)
    keys, labels = mine.keys["val"], mine.labels["val"]
    predicted = (mine.values["val"] @ load_probe(mine.settings, mine.run, PROBE).numpy()).argmax(axis=1)
    with mine.artifacts.probe_accuracies(mine.run, PROBE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = []
    for kind, members in (("class", labels), ("group", groups[keys])):
        for index, name in enumerate(names[f"{kind}_names"]):
            chosen = members == index
            top1 = (predicted == labels)[chosen].mean() if chosen.any() else None
            expected.append((kind, index, name, chosen.sum(), top1))
    found = [(row["kind"], int(row["index"]), row["name"], int(row["images"])) for row in rows]
    assert found == [row[:4] for row in expected]
    for row, (*_, top1) in zip(rows, expected, strict=True):
        assert row["top1"] == "" if top1 is None else float(row["top1"]) == pytest.approx(top1, rel=1e-5)
    (result,) = results(mine)
    for kind in ("class", "group"):
        shares = [top1 for found, *_, top1 in expected if found == kind and top1 is not None]
        assert min(shares) > 0, "an empty one counted as 0 would be the worst"
        assert float(result[f"val_mean_{kind}_top1"]) == pytest.approx(np.mean(shares), rel=1e-5)
        assert float(result[f"val_worst_{kind}_top1"]) == pytest.approx(min(shares), rel=1e-5)


def test_without_groups_their_accuracies_are_blank_and_without_names_they_are_numbered(mine) -> None:
    train(mine)
    (result,) = results(mine)
    assert result["val_worst_group_top1"] == ""
    assert float(result["val_worst_class_top1"]) <= float(result["val_mean_class_top1"])
    np.save(mine.artifacts.groups("mine", "val"), np.arange(40) % 3)
    train(mine, BASELINE)
    with mine.artifacts.probe_accuracies(mine.run, BASELINE).open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file) if row["kind"] == "group"] == ["0", "1", "2"]


def test_another_solver_makes_another_artifact(mine) -> None:
    train(mine)
    assert train(mine, PROX) is Outcome.RAN
    assert train(mine, PROX) is Outcome.ALREADY_DONE
    target = mine.artifacts.probe(mine.run, PROX)
    assert target.name == "on_concepts_final_prox_epo50_nobias_clCE_spL1_spl2.0.safetensors"
    adam, found = results(mine)
    assert (adam["solver"], found["solver"]) == ("adam", "prox")
    assert (found["probe_lr"], found["probe_batch_size"], found["probe_lambda"]) == ("", "", "2.0")
    assert int(found["zeros_0"]) > int(adam["zeros_0"]) == 0
    assert (load_probe(mine.settings, mine.run, PROX) == 0).sum() == int(found["zeros_0"])


# --------------------------------------------------------------------------------------------------- what identifies it


def test_what_only_adam_reads_identifies_only_its_probe(mine) -> None:
    for probe, outcome in ((PROBE, Outcome.RAN), (PROX, Outcome.ALREADY_DONE)):
        train(mine, probe)
        for change in ({"lr": 0.5}, {"batch_size": 7}, {"seed": 1}):
            assert train(mine, replace(probe, **change)) is outcome
    assert len(results(mine)) == 5


@pytest.mark.parametrize("probe", [PROBE, BASELINE, PROX], ids=lambda probe: f"{probe.solver} on {probe.inputs}")
def test_nothing_is_loaded_if_there_is_nothing_to_do(mine, monkeypatch, probe: ProbeRun) -> None:
    train(mine, probe)

    def fail(*_: object) -> None:
        raise AssertionError("loaded")

    with monkeypatch.context() as patched:
        patched.setattr("dncbm.concepts.strengths.map_part", fail)
        patched.setattr("dncbm.features.store.FeatureStore.keys", property(fail))
        patched.setattr("dncbm.probe.stage.probe_labels", fail)
        assert train(mine, probe, device="no such device") is Outcome.ALREADY_DONE
        with pytest.raises(AssertionError, match="loaded"):
            train(mine, replace(probe, epochs=2))
    assert len(results(mine)) == 1


OTHER_SAES = [
    SAERun(encoder="enc", sparsity=TopK(4)),
    SAERun(encoder="enc", dataset="other", training=TrainingSettings(seed=7)),
]


def test_the_baseline_is_trained_once_whatever_the_sae(mine, refusal) -> None:
    """It lies in one place per encoder and data set, needs no SAE, and its row of the results names none."""
    assert train(mine, BASELINE, OTHER_SAES[0]) is Outcome.RAN
    for run in (mine.run, *OTHER_SAES):
        assert train(mine, BASELINE, run) is Outcome.ALREADY_DONE
        assert load_probe(mine.settings, run, BASELINE).shape == (12, 4)
    parts = mine.artifacts.probe(mine.run, BASELINE).relative_to(mine.settings.probe_dir).parts
    assert parts[:4] == ("on_features", "mine", "enc", "out")
    (row,) = results(mine)
    assert (row["sae"], row["sae_dataset"], row["probe"]) == ("", "", BASELINE.config_name)
    run = read_manifest(mine.artifacts.probe(mine.run, BASELINE))["run"]
    assert (run["img_enc_name"], run["hook_points"], run["probe_on_features"]) == ("enc", "out", True)
    assert not {"sae_type", "sae_dataset"} & run.keys()
    (cell,) = our_cells([row], "enc")
    assert (cell.method, cell.source) == ("Linear probe", f"out, {BASELINE.config_name}")
    with refusal("06_save_concept_strengths.py"):
        train(mine, PROBE, OTHER_SAES[0])


def test_a_probe_on_concepts_names_its_sae(mine) -> None:
    train(mine)
    (row,) = results(mine)
    assert (row["sae"], row["sae_dataset"]) == (mine.run.config_name, "cc3m")
    run = read_manifest(mine.artifacts.probe(mine.run, PROBE))["run"]
    assert (run["sae_type"], run["probe_lr"], run["expansion_factor"]) == ("relu", 0.02, 8)


def test_other_labels_are_stale(mine, write_labels) -> None:
    train(mine)
    write_labels(mine.settings, {"class_names": list("dcba")}, {})
    with pytest.raises(StaleArtifact, match="split has changed"):
        train(mine)


# ----------------------------------------------------------------------------------------------------------- the chain


@pytest.mark.parametrize("probe", [PROBE, PROX], ids=lambda probe: probe.solver)
def test_after_the_sae_is_replaced_nothing_reads_what_the_old_one_made(mine, refusal, probe: ProbeRun) -> None:
    train(mine, probe)
    before = load_probe(mine.settings, mine.run, probe)
    mine.replace_sae()
    for stage in (train, lambda mine, _: load_probe_data(mine.settings, mine.run, PROBE, "val")):
        with refusal("strengths", "SAE", "has changed", "--overwrite"):
            stage(mine, probe)
    with refusal("SAE", "has changed", "--overwrite"):
        load_probe(mine.settings, mine.run, probe)
    mine.save_strengths(overwrite=True)
    with refusal(mine.artifacts.probe(mine.run, probe), "train concepts", "has changed", "--overwrite"):
        load_probe(mine.settings, mine.run, probe)
    with refusal("val concepts has changed", "--overwrite"):
        train(mine, probe)
    assert len(results(mine)) == 1
    assert train(mine, probe, overwrite=True) is Outcome.RAN
    assert not torch.equal(load_probe(mine.settings, mine.run, probe), before)


def test_replaced_features_make_the_baseline_stale(mine, make_store, refusal) -> None:
    train(mine, BASELINE)
    folder = mine.artifacts.features("mine", "enc", "out", "val")
    make_store(folder, [mine.values["val"] + 1], [mine.keys["val"]])
    with refusal("val features has changed"):
        train(mine, BASELINE)
    with refusal("val features", "has changed"):
        load_probe(mine.settings, mine.run, BASELINE)


# ------------------------------------------------------------------------------------------------------- interruptions


def test_an_interrupted_stage_ends_with_the_same_probe(mine, monkeypatch) -> None:
    monkeypatch.setattr(dncbm.probe.state, "STATE_EVERY_S", -1.0)
    train(mine)
    target = mine.artifacts.probe(mine.run, PROBE)
    whole = target.read_bytes()
    for path in target.parent.iterdir():
        path.unlink()

    evaluate, calls = dncbm.probe.fit.evaluate_probe, []

    def die_at_the_third(*args, **options) -> dict[str, float]:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(dncbm.probe.fit, "evaluate_probe", die_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            train(mine)
    assert mine.artifacts.probe_state(mine.run, PROBE).exists()
    assert not target.exists()
    with monkeypatch.context() as patched:
        patched.setattr(dncbm.probe.fit, "initial_weight", lambda *_: torch.zeros(12, 4))  # it does not begin at the start
        assert train(mine) is Outcome.RAN
    assert target.read_bytes() == whole
    assert not mine.artifacts.probe_state(mine.run, PROBE).exists()


def test_sigterm_stops_the_stage_which_the_same_command_resumes(mine, monkeypatch) -> None:
    fit = dncbm.probe.stage.fit_probe

    def terminated(*args, **options) -> torch.Tensor:
        with monkeypatch.context() as patched:
            patched.setattr(dncbm.probe.fit, "evaluate_probe", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
            return fit(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(dncbm.probe.stage, "fit_probe", terminated)
        assert train(mine) is Outcome.STOPPED
    assert not mine.artifacts.probe_results().exists()
    assert train(mine) is Outcome.RAN


def test_a_state_is_resumed_only_on_its_own_data(mine, monkeypatch, refusal, caplog) -> None:
    """One that was copied from elsewhere would continue with the moments of other inputs."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    other = replace(mine.run, suffix="_other")
    mine.replace_sae(2.0, other)
    mine.save_strengths(other)
    with monkeypatch.context() as patched:
        patched.setattr(dncbm.probe.stage, "save_accuracies", die)
        for run in (mine.run, other):
            with pytest.raises(KeyboardInterrupt):
                train(mine, run=run)
    state = mine.artifacts.probe_state(mine.run, PROBE)
    state.write_bytes(mine.artifacts.probe_state(other, PROBE).read_bytes())
    with refusal(state, "other inputs", "delete it", "--overwrite"):
        train(mine)
    assert train(mine, overwrite=True) is Outcome.RAN
    assert str(state) in caplog.text
    assert not state.exists()


# ----------------------------------------------------------------------------------------------------------- its row


def test_a_kill_between_the_row_and_the_manifest_leaves_one_row(mine, monkeypatch) -> None:
    """As does making the probe again."""

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(dncbm.runs.manifests.Work, "done", die)
        with pytest.raises(KeyboardInterrupt):
            train(mine)
    assert len(results(mine)) == 1
    assert train(mine) is Outcome.RAN
    (first,) = results(mine)
    mine.artifacts.probe(mine.run, PROBE).unlink()
    assert train(mine, overwrite=True) is Outcome.RAN
    (second,) = results(mine)
    assert {**first, "time": ""} == {**second, "time": ""}


def test_results_that_cannot_take_the_row_are_refused_before_anything_is_trained_or_lost(mine, monkeypatch, refusal) -> None:
    train(mine)
    path, target = mine.artifacts.probe_results(), mine.artifacts.probe(mine.run, PROBE)
    before = target.read_bytes()
    path.write_text("clip_RN50,out,cc3m,places365,0.01\n")
    mine.replace_sae()
    mine.save_strengths(overwrite=True)
    for stage in (
        lambda: train(mine, overwrite=True),
        lambda: accuracy_at_nec(mine.settings, mine.run, ProbeDataset("mine"), device="cpu"),
        lambda: evaluate_zero_shot(mine.settings, ProbeFeatures("mine", "enc"), device="cpu"),
    ):
        with refusal(path, "move it away"):
            stage()
    assert target.read_bytes() == before
    path.unlink()
    assert train(mine, overwrite=True) is Outcome.RAN
    assert len(results(mine)) == 1


# ------------------------------------------------------------------------------------------------------------ what it says


@pytest.mark.parametrize(
    ("sparsity", "change"), [(ReLU(), "a larger --l1_coeff"), (TopK(4), "a smaller --k"), (JumpReLU(), "a larger --l0_coeff")]
)
def test_an_sae_that_is_not_sparse_is_said_with_what_to_change(mine, caplog, sparsity, change: str) -> None:
    """About 4 of 12 latents are active here; of features nothing of the kind is said."""
    run = replace(mine.run, sparsity=sparsity)
    mine.replace_sae(1.0, run)
    mine.save_strengths(run)
    train(mine, run=run)
    train(mine, BASELINE)
    (said,) = [record.getMessage() for record in caplog.records if "concepts on average" in record.getMessage()]
    assert "4 of the 12" in said
    assert change in said


def test_a_batch_of_all_images_is_said(mine, caplog) -> None:
    train(mine, replace(PROBE, batch_size=118))
    assert not [record for record in caplog.records if "batch" in record.getMessage()]
    train(mine, replace(PROBE, batch_size=119, epochs=1))
    assert "a batch of 119 holds all 118 training images, so that the probe makes only 1 step:" in caplog.text


# --------------------------------------------------------------------------------------------------------- what it takes


def test_metrics_go_to_wandb_with_their_epochs(mine, monkeypatch) -> None:
    said: list[tuple] = []
    name = "validate/statistics/accuracy top1"
    run = SimpleNamespace(log=lambda values, step: said.append((step, values[name])), finish=lambda: said.append("finished"))
    wandb = SimpleNamespace(init=lambda **about: said.append(about) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train(mine, tracking=Tracking(True, "a team"))
    about, *logged, last = said
    assert (about["project"], about["entity"], about["job_type"]) == ("dncbm", "a team", "probe")
    assert (about["name"], about["group"]) == (f"mine {PROBE.config_name} on concepts", "mine enc out")
    wanted = {"probe_lr": 0.02, "expansion_factor": 8, "classes": 4, "inputs": 12, "train_images": 118}
    assert wanted.items() <= about["config"].items()
    assert [step for step, _ in logged] == [1, 2, 3, 4]
    assert last == "finished"


def test_every_flag_reaches_the_probe(mine) -> None:
    """A command line makes the probe that the same declarations make."""
    flags = ["--probe_lr", "0.03", "--probe_train_bs", "16", "--probe_epochs", "3", "--probe_sparsity_loss_lambda", "0.7"]
    flags += ["--seed", "5", "--probe_val_freq", "2", "--ckpt_freq", "2", "--device", "cpu"]
    run, probe = SAERun(encoder="enc", training=TrainingSettings(seed=5)), ProbeRun("mine", 0.03, 16, 3, 0.7, seed=5)
    object.__setattr__(mine, "run", run)
    mine.replace_sae(1.0)
    mine.save_strengths()
    main("probe", ["--img_enc_name", "enc", "--probe_dataset", "mine", *flags])
    assert train(mine, probe) is Outcome.ALREADY_DONE
    with mine.artifacts.probe_log(run, probe).open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["2", "3"]
    assert mine.artifacts.probe_intermediate(run, probe, 2).is_file()


def test_what_is_missing_is_named_with_its_command(mine, refusal) -> None:
    other = SAERun(encoder="other")
    with refusal("06_save_concept_strengths.py", "--probe_dataset mine"):
        train(mine, PROBE, other)
    with refusal("05_save_probe_features.py", "--img_enc_name other"):
        train(mine, BASELINE, other)
    with refusal("07_train_linear_probe.py", mine.artifacts.probe(mine.run, PROBE)):
        load_probe(mine.settings, mine.run, PROBE)
    with refusal("--device nonsense"):
        train(mine, device="nonsense")
    assert not mine.artifacts.probe_results().exists()


# ----------------------------------------------------------------------------------------------------------------- damage


def damaged(path: Path, how: Callable[[Path], object], *, in_the_manifest: bool = False) -> None:
    """Damage an output; with `in_the_manifest`, as if it had been made so."""
    how(path)
    manifest = path.with_name(path.name + ".manifest.json")
    if in_the_manifest:
        made = json.loads(manifest.read_text())
        made["outputs"][path.name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        manifest.write_text(json.dumps(made))


def holding(**tensors: torch.Tensor) -> Callable[[Path], object]:
    return lambda path: save_file(tensors, path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "empty": lambda path: path.write_bytes(b""),
    "reversed": lambda path: path.write_bytes(path.read_bytes()[::-1]),
    "text": lambda path: path.write_text("index,name\n"),
    "another tensor": holding(bias=torch.zeros(4, 12)),
    "other classes": holding(weight=torch.zeros(5, 12)),
    "other inputs": holding(weight=torch.zeros(4, 11)),
    "one axis": holding(weight=torch.zeros(48)),
    "no axis": holding(weight=torch.tensor(1.0)),
    "NaN": holding(weight=torch.full((4, 12), torch.nan)),
    "integers": holding(weight=torch.zeros(4, 12, dtype=torch.int64)),
}


@pytest.mark.parametrize("probe", [PROBE, BASELINE], ids=lambda probe: probe.inputs)
def test_a_damaged_probe_is_named_with_the_stage_that_makes_it(mine, refusal, probe: ProbeRun) -> None:
    train(mine, probe)
    path = mine.artifacts.probe(mine.run, probe)
    manifest = path.with_name(path.name + ".manifest.json")
    files = {file: file.read_bytes() for file in (path, manifest)}
    for how in DAMAGES.values():
        for in_the_manifest in (False, True):
            damaged(path, how, in_the_manifest=in_the_manifest)
            with refusal(path, "--overwrite"):
                load_probe(mine.settings, mine.run, probe)
            for file, content in files.items():
                file.write_bytes(content)
    assert load_probe(mine.settings, mine.run, probe).shape == (12, 4)


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"\x93NUMPY", np.full(40, -1), np.zeros(3, np.int64), np.zeros((40, 2), np.int64), np.zeros(40)],
    ids=["empty", "text", "truncated", "negative", "few", "two axes", "fractions"],
)  # fmt: skip
def test_damaged_groups_are_named(mine, write_labels, refusal, content: bytes | np.ndarray) -> None:
    own = {split: np.load(mine.artifacts.labels("mine", split)) for split in ("train", "val")}
    write_labels(mine.settings, {"class_names": list("abcd")}, own, np.zeros(40, np.int64))
    path = mine.artifacts.groups("mine", "val")
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with refusal(path, "05_save_probe_features.py", "--overwrite"):
        train(mine, BASELINE)


@pytest.mark.parametrize("names", [["one"], "sea, land", [1, 2, 3], {"a": 1}])
def test_group_names_that_do_not_fit_are_named(mine, write_labels, refusal, names: object) -> None:
    own = {split: np.load(mine.artifacts.labels("mine", split)) for split in ("train", "val")}
    write_labels(mine.settings, {"class_names": list("abcd"), "group_names": names}, own, np.arange(40) % 3)
    with refusal(mine.artifacts.probe_split("mine"), "groups", "--overwrite"):
        train(mine, BASELINE)
