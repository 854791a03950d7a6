"""Fitting a probe: Adam against a training written out, prox against Adam, both interrupted anywhere."""

import csv
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import dncbm.probe.fit
import dncbm.probe.state
from dncbm.probe.fit import Keep, fit_probe, fit_prox, initial_weight
from dncbm.probe.model import ProbeData, evaluate_probe, linear, probe_loss, zero_counts
from dncbm.probe.state import StateFile
from dncbm.runs.declarations import ProbeRun, ProbeSchedule

CPU = torch.device("cpu")
N_CLASSES = 4
Split = tuple[ProbeData, ProbeData]


@pytest.fixture
def splits(strengths, sparse) -> Split:
    """Train and validation: concepts of which three point to each class."""
    found = []
    for n, seed in ((103, 1), (40, 2)):
        values = strengths(n, 12, seed)
        noise = np.random.default_rng(seed).random((n, 4))
        found.append(sparse(values, (values.reshape(n, N_CLASSES, 3).sum(axis=2) + noise).argmax(axis=1)))
    return found[0], found[1]


ADAM = ProbeRun("mine", lr=0.05, batch_size=32, epochs=6)
PROX = ProbeRun("mine", epochs=300, sparsity_lambda=2.0, solver="prox")
SHORT_PROX = replace(PROX, epochs=12)


def fit(splits: Split, run: ProbeRun, state: Path, **keep) -> torch.Tensor:
    keep.setdefault("schedule", ProbeSchedule(val_freq=1, coverage_freq=0 if run.solver == "prox" else 1))
    solver = fit_probe if run.solver == "adam" else fit_prox
    return solver(*splits, N_CLASSES, run, CPU, Keep(StateFile(state), **keep))


def test_the_initial_weight_is_distributed_as_linears() -> None:
    torch.manual_seed(0)
    reference = torch.nn.Linear(400, 300, bias=False).weight.detach()
    weight = initial_weight(400, 300, seed=49)
    assert weight.shape == (400, 300)
    bound = 1 / 400**0.5
    for found in (reference, weight):
        assert bound * 0.999 < float(found.abs().max()) <= bound
        assert float(found.mean()) == pytest.approx(0, abs=bound * 0.01)
        assert float(found.std()) == pytest.approx(bound / 3**0.5, rel=0.01)
    torch.testing.assert_close(weight, initial_weight(400, 300, seed=49), rtol=0, atol=0)
    assert not torch.equal(weight, initial_weight(400, 300, seed=50))


def by_hand(values: np.ndarray, labels: torch.Tensor, run: ProbeRun) -> torch.Tensor:
    """The training written out with a dense nn.Linear and torch's Adam, C x F."""
    layer = torch.nn.Linear(values.shape[1], N_CLASSES, bias=False)
    with torch.no_grad():
        layer.weight.copy_(initial_weight(values.shape[1], N_CLASSES, run.seed).T)
    adam = torch.optim.Adam(layer.parameters(), lr=run.lr)
    for epoch in range(run.epochs):
        order = np.random.default_rng([run.seed, epoch]).permutation(len(values))
        for start in range(0, len(values), run.batch_size):
            rows = order[start : start + run.batch_size]
            loss = torch.nn.functional.cross_entropy(layer(torch.from_numpy(values[rows])), labels[rows])
            loss = loss + run.sparsity_lambda * layer.weight.abs().sum() / layer.weight.numel()
            adam.zero_grad()
            loss.backward()
            adam.step()
    return layer.weight.detach()


@pytest.mark.parametrize("seed", [49, 7])
def test_training_is_that_of_a_dense_layer_written_out(splits: Split, tmp_path: Path, make_store, seed: int) -> None:
    run = ProbeRun("mine", lr=0.01, batch_size=16, epochs=15, sparsity_lambda=0.5, seed=seed)
    train, validation = splits
    values = train.inputs.toarray()
    expected = by_hand(values, train.labels, run)
    weight = fit(splits, run, tmp_path / "state.safetensors")
    assert float((weight - initial_weight(12, N_CLASSES, seed)).abs().max()) > 0.1, "it has moved"
    torch.testing.assert_close(weight.T, expected, rtol=1e-3, atol=1e-5)

    store = make_store(tmp_path / "store", [values[:50], values[50:]])
    on_features = fit((ProbeData(store, train.labels), validation), run, tmp_path / "state2.safetensors")
    torch.testing.assert_close(on_features.T, expected, rtol=1e-3, atol=1e-5)
    assert evaluate_probe(weight, validation, 0.5)["top1"] > 0.6


def test_lambda_changes_the_probe(splits: Split, tmp_path: Path) -> None:
    runs = [ProbeRun("mine", 0.01, 16, 5, penalty) for penalty in (0.1, 50.0)]
    weak, strong = (fit(splits, run, tmp_path / f"{i}.safetensors") for i, run in enumerate(runs))
    assert float(strong.abs().mean()) < 0.5 * float(weak.abs().mean())


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    ("run", "at"),
    [(ADAM, 1), (ADAM, 4), (ADAM, 6), (SHORT_PROX, 1), (SHORT_PROX, 30), (SHORT_PROX, "last")],
    ids=lambda value: getattr(value, "solver", value),
)
def test_an_interrupted_training_ends_with_the_same_bits(
    splits: Split, tmp_path: Path, monkeypatch, run: ProbeRun, at: int | str
) -> None:
    monkeypatch.setattr(dncbm.probe.state, "STATE_EVERY_S", -1.0)
    done: list[int] = []
    state = tmp_path / "state.safetensors"
    whole = fit(splits, run, tmp_path / "a.safetensors", log=lambda _, n: done.append(n), log_path=tmp_path / "whole.csv")
    stop = done[-1] if at == "last" else at

    def die(_: dict[str, float], n: int) -> None:
        if n == stop:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit(splits, run, state, log=die)
    again: list[int] = []
    resumed = fit(splits, run, state, log=lambda _, n: again.append(n), log_path=tmp_path / "resumed.csv")
    assert torch.equal(resumed, whole)
    assert again == done[len(done) - len(again) :]
    assert len(again) <= len(done) - stop + 2, "it does not begin at the start"
    assert (tmp_path / "resumed.csv").read_text() == (tmp_path / "whole.csv").read_text()
    after_the_end = fit(splits, run, state)  # killed between the last epoch and the saving of the probe
    assert torch.equal(after_the_end, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize(("run", "at"), [(ADAM, 4), (SHORT_PROX, 30)], ids=lambda value: getattr(value, "solver", ""))
def test_ctrl_c_and_sigterm_save_the_state(
    splits: Split, tmp_path: Path, run: ProbeRun, at: int, number: signal.Signals
) -> None:
    done: list[int] = []
    whole = fit(splits, run, tmp_path / "a.safetensors", log=lambda _, n: done.append(n))

    def interrupt(_: dict[str, float], n: int) -> None:
        if n == at:
            os.kill(os.getpid(), number)

    state = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(splits, run, state, log=interrupt)
    again: list[int] = []
    resumed = fit(splits, run, state, log=lambda _, n: again.append(n))
    assert torch.equal(resumed, whole)
    assert again[0] == at, "the epoch that was interrupted is the first"
    assert again == done[done.index(at) :]


@pytest.mark.parametrize("run", [ADAM, PROX], ids=lambda run: run.solver)
def test_the_bar_knows_how_much_there_is_to_do(splits: Split, tmp_path: Path, monkeypatch, run: ProbeRun) -> None:
    """For prox at most: a lambda may need fewer passes."""
    bars: list[tqdm] = []

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            bars.append(self)

    monkeypatch.setattr(dncbm.probe.fit, "tqdm", Bar)
    totals: list[tuple[float, float]] = []
    fit(splits, run, tmp_path / "a.safetensors", log=lambda *_: totals.append((bars[0].n, bars[0].total)))
    assert all(n <= total for n, total in totals)
    assert totals[0][1] == run.epochs if run.solver == "adam" else totals[0][1] % 30 == run.epochs % 30
    assert totals[-1][0] == totals[-1][1] == bars[0].n


@pytest.mark.parametrize("run", [ADAM, PROX], ids=lambda run: run.solver)
def test_the_state_is_saved_only_now_and_then(splits: Split, tmp_path: Path, run: ProbeRun) -> None:
    state = tmp_path / "state.safetensors"
    seen: list[bool] = []
    fit(splits, run, state, log=lambda *_: seen.append(state.exists()))
    assert not any(seen)
    assert state.exists(), "at the end"


def test_the_schedule_says_what_is_reported_and_not_what_is_learned(splits: Split, tmp_path: Path) -> None:
    run = ProbeRun("mine", lr=0.05, batch_size=32, epochs=7)
    rows: list[tuple[int, dict[str, float]]] = []
    weight = fit(
        splits,
        run,
        tmp_path / "a.safetensors",
        schedule=ProbeSchedule(val_freq=2, coverage_freq=4, ckpt_freq=3),
        log=lambda row, epoch: rows.append((epoch, row)),
        checkpoint=lambda epoch: tmp_path / f"epoch{epoch}.safetensors",
    )
    assert torch.equal(weight, fit(splits, run, tmp_path / "b.safetensors"))
    assert [epoch for epoch, _ in rows] == [row["epoch"] for _, row in rows] == [2, 4, 6, 7]
    assert [epoch for epoch, row in rows if "coverage_positive_90%" in row] == [4, 7]
    assert sorted(path.name for path in tmp_path.glob("epoch*")) == ["epoch3.safetensors", "epoch6.safetensors"]
    after_three = fit(splits, ProbeRun("mine", lr=0.05, batch_size=32, epochs=3), tmp_path / "c.safetensors")
    assert torch.equal(load_file(tmp_path / "epoch3.safetensors")["weight"], after_three.T)
    expected = evaluate_probe(weight, splits[1], run.sparsity_lambda, coverage=True)
    assert {key: rows[-1][1][key] for key in expected} == expected


def test_no_coverage_until_the_end(splits: Split, tmp_path: Path) -> None:
    rows: list[dict[str, float]] = []
    schedule = ProbeSchedule(coverage_freq=0)
    fit(splits, ADAM, tmp_path / "a.safetensors", schedule=schedule, log=lambda row, _: rows.append(row))
    assert [row["epoch"] for row in rows if "coverage_absolute_99%" in row] == [6]


def test_the_training_loss_is_the_mean_over_items(splits: Split, tmp_path: Path) -> None:
    rows: list[dict[str, float]] = []
    run = ProbeRun("mine", lr=1e-12, batch_size=100, epochs=1)  # a batch of 100 and one of 3, and weights that stay
    weight = fit(splits, run, tmp_path / "state.safetensors", log=lambda row, _: rows.append(row))
    every_row = splits[0].batch(np.arange(103), CPU)[0]
    whole = float(probe_loss(linear(every_row, weight), splits[0].labels, weight, run.sparsity_lambda))
    assert rows[0]["train_loss"] == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(("run", "where"), [(ADAM, ("epoch 0", "--probe_lr (0.05)")), (PROX, ("pass 1",))])
def test_a_loss_that_is_not_a_number_stops_the_training(
    splits: Split, sparse: Callable[..., ProbeData], tmp_path: Path, refusal, run: ProbeRun, where: tuple[str, ...]
) -> None:
    train, validation = splits
    values = train.inputs.toarray()
    values[3, 2] = np.nan
    with refusal("NaN or infinite", *where):
        fit((sparse(values, train.labels.numpy()), validation), run, tmp_path / "s.safetensors")
    assert not (tmp_path / "s.safetensors").exists()


# ----------------------------------------------------------------------------------------------------------------- prox


def test_prox_ends_below_adam_and_at_zeros(splits: Split, tmp_path: Path) -> None:
    by_prox = fit(splits, PROX, tmp_path / "a.safetensors")
    run = ProbeRun("mine", lr=0.01, batch_size=103, epochs=600, sparsity_lambda=2.0)
    by_adam = fit(splits, run, tmp_path / "b.safetensors", schedule=ProbeSchedule(val_freq=600))
    prox, adam = (evaluate_probe(weight, splits[0], 2.0)["loss"] for weight in (by_prox, by_adam))
    assert prox == pytest.approx(adam, rel=2e-3)
    assert prox < adam + 1e-5
    assert zero_counts(by_adam)["zeros_0"] == 0
    assert 10 < zero_counts(by_prox)["zeros_0"] < by_prox.numel()
    assert ((by_prox == 0) == (by_adam.abs() < 0.02)).float().mean() > 0.9


@pytest.mark.parametrize("penalty", [0, 1e4])
def test_prox_without_penalty_and_with_too_much(splits: Split, tmp_path: Path, penalty: float) -> None:
    run = ProbeRun("mine", epochs=20, sparsity_lambda=penalty, solver="prox")
    weight = fit(splits, run, tmp_path / "a.safetensors")
    assert zero_counts(weight)["zeros_0"] == (weight.numel() if penalty else 0)


def test_prox_passes_are_bounded_and_logged(splits: Split, tmp_path: Path) -> None:
    """At most `epochs` passes for each lambda, each of which is at least half the previous one."""
    rows: list[dict[str, float]] = []

    def log(row: dict[str, float], n: int) -> None:
        rows.append(row | {"n": n})

    run = replace(PROX, epochs=3)
    weight = fit(splits, run, tmp_path / "a.safetensors", log=log, log_path=tmp_path / "log.csv")
    assert rows[-1]["nonzero"] == int((weight != 0).sum())
    with (tmp_path / "log.csv").open(newline="") as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == list(range(1, len(rows))), "the last one once"
    assert [row["n"] for row in rows] == [row["epoch"] for row in rows] == [*range(1, len(rows)), len(rows) - 1]
    lambdas = [row["lambda"] for row in rows[:-1]]
    steps = list(dict.fromkeys(lambdas))
    assert all(lambdas.count(step) == 3 for step in steps)
    assert all(0.5 <= after / before < 1 for before, after in pairwise(steps))
    assert steps[-1] == rows[-1]["lambda"] == 2.0
