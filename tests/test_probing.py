import csv
import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from sklearn.metrics import log_loss, top_k_accuracy_score

import dncbm.probing
from dncbm.artifacts import Artifacts, ProbeRun, SAERun
from dncbm.encoders import Encoder
from dncbm.errors import StaleArtifact
from dncbm.manifests import Outcome, Recipe, begin, finish, write_json
from dncbm.probe_step import SparseAdamStep, take_rows
from dncbm.probing import (
    COVERAGES,
    ProbeData,
    ProbeSchedule,
    append_result,
    coverage_counts,
    evaluate_probe,
    fit_probe,
    fit_prox,
    initial_weight,
    linear,
    load_probe,
    majority_accuracy,
    probe_loss,
    train_linear_probe,
    zero_counts,
    zero_shot_weight,
)
from dncbm.results import METRICS, SETTINGS, result_row
from dncbm.settings import Settings

CPU = torch.device("cpu")
EVERY_EPOCH = ProbeSchedule(val_freq=1, coverage_freq=1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only get in each other's way on matrices this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def strengths(n_rows: int, n_concepts: int, seed: int, density: float = 0.3) -> np.ndarray:
    """Non-negative and mostly zero."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(0.1, 2, (n_rows, n_concepts)) * (rng.random((n_rows, n_concepts)) < density)
    return values.astype(np.float32)


def sparse(values: np.ndarray, labels: np.ndarray | None = None) -> ProbeData:
    labels = np.zeros(len(values), dtype=np.int64) if labels is None else labels
    return ProbeData(scipy.sparse.csr_matrix(values), torch.from_numpy(labels))


def every_row(data: ProbeData):
    return data.batch(np.arange(len(data)), CPU)[0]


# ------------------------------------------------------------------------------------------------------------- formulas

SHAPES = {"n_rows": st.integers(1, 6), "n_concepts": st.integers(1, 8), "n_classes": st.integers(1, 5)}


@given(**SHAPES, density=st.sampled_from([0.0, 0.2, 1.0]), seed=st.integers(0, 99))
def test_a_sparse_product_and_its_gradient_are_the_dense_ones(
    n_rows: int, n_concepts: int, n_classes: int, density: float, seed: int
) -> None:
    values = strengths(n_rows, n_concepts, seed, density)
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, n_classes, n_rows))
    layer = torch.nn.Linear(n_concepts, n_classes, bias=False)
    torch.nn.functional.cross_entropy(layer(torch.from_numpy(values)), labels).backward()
    for data in (every_row(sparse(values)), torch.from_numpy(values)):
        weight = layer.weight.detach().T.contiguous().requires_grad_()
        logits = linear(data, weight)
        torch.testing.assert_close(logits, layer(torch.from_numpy(values)))
        torch.nn.functional.cross_entropy(logits, labels).backward()
        torch.testing.assert_close(weight.grad.T, layer.weight.grad)


def test_batches_are_rows_in_the_order_asked_for(tmp_path: Path, make_store) -> None:
    values = strengths(9, 5, 0)
    labels = np.arange(9)
    weight = torch.eye(5)
    store = make_store(tmp_path / "store", [values[:4], values[4:]])
    for data in (sparse(values, labels), ProbeData(store, torch.from_numpy(labels))):
        assert (len(data), data.width) == (9, 5)
        rows = np.array([7, 0, 7, 3])
        batch, found = data.batch(rows, CPU)
        np.testing.assert_array_equal(linear(batch, weight).numpy(), values[rows])
        np.testing.assert_array_equal(found.numpy(), rows)
        batches = [(linear(batch, weight), found) for batch, found in data.batches(4, CPU)]
        assert [len(found) for _, found in batches] == [4, 4, 1]
        np.testing.assert_array_equal(torch.cat([rows for rows, _ in batches]).numpy(), values)


def test_the_loss_is_cross_entropy_and_the_mean_of_all_absolute_weights() -> None:
    rng = np.random.default_rng(1)
    logits, labels, weight = rng.normal(size=(6, 3)), rng.integers(0, 3, 6), rng.normal(size=(8, 3))
    found = probe_loss(torch.from_numpy(logits), torch.from_numpy(labels), torch.from_numpy(weight), 0.7)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = log_loss(labels, probabilities, labels=[0, 1, 2]) + 0.7 * np.abs(weight).sum() / 24
    assert float(found) == pytest.approx(expected)


def test_zero_counts_at_every_tolerance() -> None:
    weight = torch.tensor([[0.0, -0.0, 1e-10, -1e-9], [1e-7, -1e-5, 1e-2, 0.5], [-0.05, 0.11, -0.11, 1.0]])
    assert zero_counts(weight) == {
        "zeros_0": 2, "zeros_1e-09": 4, "zeros_1e-06": 5, "zeros_0.001": 6, "zeros_0.1": 8
    }  # fmt: skip


def coverage_by_hand(values: np.ndarray, weight: np.ndarray, absolute: bool) -> list[list[int]]:
    """Take concepts one at a time, the largest contribution to the predicted class first, until a share is reached."""
    counts = []
    for z in values.astype(np.float64):
        predicted = max(range(weight.shape[1]), key=lambda c: sum(z * weight[:, c]))
        contributions = [abs(c) if absolute else max(c, 0.0) for c in z * weight[:, predicted]]
        row = []
        for share in COVERAGES:
            taken, count = 0.0, 0
            for contribution in sorted(contributions, reverse=True):
                if taken >= share * sum(contributions) - 1e-9:
                    break
                taken, count = taken + contribution, count + 1
            row.append(count)
        counts.append(row)
    return counts


@given(**SHAPES, density=st.sampled_from([0.0, 0.3, 1.0]), absolute=st.booleans(), seed=st.integers(0, 199))
def test_coverage_counts_concepts_taken_greedily(
    n_rows: int, n_concepts: int, n_classes: int, density: float, absolute: bool, seed: int
) -> None:
    values = strengths(n_rows, n_concepts, seed, density)
    values[seed % n_rows] = 0
    weight = np.random.default_rng(seed).normal(size=(n_concepts, n_classes)).astype(np.float32)
    expected = coverage_by_hand(values, weight, absolute)
    for batch in (every_row(sparse(values)), torch.from_numpy(values)):
        assert coverage_counts(batch, torch.from_numpy(weight), absolute=absolute).tolist() == expected


def test_coverage_of_rows_that_are_easy_to_count() -> None:
    values = np.array([[4, 0, 0, 0], [1, 1, 1, 1], [97, 1, 1, 1], [0, 0, 0, 0], [10, 1, 0, 0]], dtype=np.float32)
    weight = torch.tensor([[1.0], [1.0], [1.0], [-1.0]])
    batch = every_row(sparse(values))
    assert coverage_counts(batch, weight, absolute=False).tolist() == [[1] * 3, [3] * 3, [1, 1, 3], [0] * 3, [1, 2, 2]]
    assert coverage_counts(batch, weight, absolute=True).tolist() == [[1] * 3, [4] * 3, [1, 1, 3], [0] * 3, [1, 2, 2]]


# ------------------------------------------------------------------------------------------------------------- evaluate


@pytest.mark.parametrize("n_classes", [2, 4, 12])
@pytest.mark.parametrize("batch_size", [7, 4096])
def test_accuracies_and_losses_are_those_of_scikit_learn(n_classes: int, batch_size: int) -> None:
    rng = np.random.default_rng(n_classes)
    values, labels = strengths(60, 9, 3), rng.integers(0, n_classes, 60)
    values[:, 0] += 0.1  # a row of zeros would leave the ranking to chance
    weight = rng.normal(size=(9, n_classes)).astype(np.float32)
    found = evaluate_probe(torch.from_numpy(weight), sparse(values, labels), 0.3, coverage=True, batch_size=batch_size)
    logits = values.astype(np.float64) @ weight
    classes = list(range(n_classes))
    scores = logits[:, 1] - logits[:, 0] if n_classes == 2 else logits
    top5 = 1.0 if n_classes <= 5 else top_k_accuracy_score(labels, scores, k=5, labels=classes)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ce = log_loss(labels, probabilities, labels=classes)
    assert found["top1"] == pytest.approx(np.mean(logits.argmax(axis=1) == labels))
    assert found["top5"] == pytest.approx(top5)
    assert found["ce"] == pytest.approx(ce, rel=1e-5)
    assert found["loss"] == pytest.approx(ce + 0.3 * np.abs(weight).mean(), rel=1e-5)
    for kind, absolute in (("positive", False), ("absolute", True)):
        mean_counts = np.mean(coverage_by_hand(values, weight, absolute), axis=0)
        assert [found[f"coverage_{kind}_{share}%"] for share in (90, 95, 99)] == pytest.approx(list(mean_counts))


# ------------------------------------------------------------------------------------------------------------------ fit


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


N_CLASSES = 4


@pytest.fixture
def splits() -> tuple[ProbeData, ProbeData]:
    """Train and validation: concepts of which three point to each class."""
    found = []
    for n, seed in ((103, 1), (40, 2)):
        values = strengths(n, 12, seed)
        labels = (values.reshape(n, N_CLASSES, 3).sum(axis=2) + np.random.default_rng(seed).random((n, 4))).argmax(
            axis=1
        )
        found.append(sparse(values, labels))
    return found[0], found[1]


def fit(splits: tuple[ProbeData, ProbeData], run: ProbeRun, state: Path, **options) -> torch.Tensor:
    schedule = options.pop("schedule", EVERY_EPOCH)
    return fit_probe(*splits, N_CLASSES, run, schedule=schedule, device=CPU, state_path=state, **options)


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


def test_training_is_that_of_a_dense_layer_written_out(splits, tmp_path: Path, make_store) -> None:
    run = ProbeRun("mine", lr=0.01, batch_size=16, epochs=15, sparsity_lambda=0.5)
    train, validation = splits
    values = train.inputs.toarray()
    expected = by_hand(values, train.labels, run)
    weight = fit(splits, run, tmp_path / "state.safetensors")
    assert float((weight.T - initial_weight(12, N_CLASSES, 49).T).abs().max()) > 0.1  # it has gone somewhere
    torch.testing.assert_close(weight.T, expected, rtol=1e-3, atol=1e-5)

    store = make_store(tmp_path / "store", [values[:50], values[50:]])
    on_features = fit((ProbeData(store, train.labels), validation), run, tmp_path / "state2.safetensors")
    torch.testing.assert_close(on_features.T, expected, rtol=1e-3, atol=1e-5)
    assert evaluate_probe(weight, validation, 0.5)["top1"] > 0.6


@given(
    n_rows=st.integers(1, 9),
    n_concepts=st.integers(1, 30),
    n_classes=st.integers(1, 5),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    penalty=st.sampled_from([0.0, 0.5, 20.0]),
    seed=st.integers(0, 99),
)
def test_every_compiled_step_is_torchs(
    n_rows: int, n_concepts: int, n_classes: int, density: float, penalty: float, seed: int
) -> None:
    values = strengths(n_rows, n_concepts, seed, density)
    matrix = scipy.sparse.csr_matrix(values)
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, n_classes, n_rows))
    layer = torch.nn.Linear(n_concepts, n_classes, bias=False)
    with torch.no_grad():
        layer.weight[0, 0] = 0  # where |w| has no derivative, torch's is 0
    weight = layer.weight.detach().T.clone().contiguous().requires_grad_()
    adams = [torch.optim.Adam([parameter], lr=0.01) for parameter in (layer.weight, weight)]
    step = SparseAdamStep(weight, adams[1], penalty)
    for number in range(4):
        rows = rng.permutation(n_rows)[: 1 + number]
        loss = torch.nn.functional.cross_entropy(layer(torch.from_numpy(values[rows])), labels[rows])
        loss = loss + penalty * layer.weight.abs().mean()
        adams[0].zero_grad()
        loss.backward()
        adams[0].step()
        assert step(matrix, rows, labels[rows]) == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
        theirs, ours = adams[0].state[layer.weight], adams[1].state[weight]
        assert theirs["step"] == ours["step"]
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours[moment].T, theirs[moment], rtol=1e-4, atol=1e-7)
        with torch.no_grad():  # a gradient that is rounding alone sets Adam's direction: go on from the same weights
            assert float((weight.T - layer.weight).abs().max()) <= 0.021
            moved = theirs["exp_avg"].abs() > 1e-5
            torch.testing.assert_close(weight.T[moved], layer.weight[moved], rtol=1e-4, atol=1e-5)
            weight.copy_(layer.weight.T)
    step.close()


@pytest.mark.parametrize("n_threads", [1, 3])
def test_compiled_steps_do_not_depend_on_threads_or_on_who_began(splits, n_threads: int) -> None:
    """Bits for any number of threads; and a torch.optim.Adam goes on where compiled steps stopped."""
    train, rows = splits[0], np.arange(64)
    found = []
    for threads in (1, n_threads):
        torch.set_num_threads(threads)
        weight = initial_weight(12, N_CLASSES, 49).requires_grad_()
        adam = torch.optim.Adam([weight], lr=0.01)
        step = SparseAdamStep(weight, adam, 0.5)
        for _ in range(3):
            step(train.inputs, rows, train.labels[:64])
        step.close()
        found.append(weight.detach().clone())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    reference = initial_weight(12, N_CLASSES, 49).requires_grad_()
    torchs = torch.optim.Adam([reference], lr=0.01)
    for parameter, optimizer, n_steps in ((reference, torchs, 4), (weight, adam, 1)):
        for _ in range(n_steps):
            optimizer.zero_grad()
            batch, labels = train.batch(rows, CPU)
            probe_loss(linear(batch, parameter), labels, parameter, 0.5).backward()
            optimizer.step()
    torch.testing.assert_close(weight, reference, rtol=1e-3, atol=1e-6)


def test_rows_are_taken_as_scipy_takes_them() -> None:
    matrix = scipy.sparse.csr_matrix(strengths(20, 7, 5))
    rows = np.array([19, 0, 3, 3, 11])
    start, indices, data = take_rows(matrix, rows)
    expected = matrix[rows]
    np.testing.assert_array_equal(start, expected.indptr)
    np.testing.assert_array_equal(indices, expected.indices)
    np.testing.assert_array_equal(data, expected.data)
    assert [len(part) for part in take_rows(matrix, np.array([], dtype=np.int64))] == [1, 0, 0]


def test_seed_and_lambda_change_the_probe(splits, tmp_path: Path) -> None:
    runs = [ProbeRun("mine", 0.01, 16, 5, penalty, seed=seed) for penalty, seed in ((0.1, 49), (50.0, 49), (0.1, 50))]
    weak, strong, other = (fit(splits, run, tmp_path / f"{i}.safetensors") for i, run in enumerate(runs))
    assert float(strong.abs().mean()) < 0.5 * float(weak.abs().mean())
    assert not torch.equal(weak, other)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("at", [1, 2, 4, 6])
def test_an_interrupted_training_goes_on_to_the_same_bits(splits, tmp_path: Path, monkeypatch, at: int) -> None:
    monkeypatch.setattr(dncbm.probing, "STATE_EVERY_S", -1.0)
    run = ProbeRun("mine", lr=0.05, batch_size=32, epochs=6)
    whole = fit(splits, run, tmp_path / "whole.safetensors", log_path=tmp_path / "whole.csv")

    def die(_: dict[str, float], epoch: int) -> None:
        if epoch == at:
            raise Interrupted

    epochs: list[int] = []
    with pytest.raises(Interrupted):
        fit(splits, run, tmp_path / "state.safetensors", log=die)
    resumed = fit(
        splits,
        run,
        tmp_path / "state.safetensors",
        log=lambda _, epoch: epochs.append(epoch),
        log_path=tmp_path / "resumed.csv",
    )
    assert torch.equal(resumed, whole)
    assert epochs == list(range(at, 7))
    assert (tmp_path / "resumed.csv").read_text() == (tmp_path / "whole.csv").read_text()
    again = fit(
        splits, run, tmp_path / "state.safetensors"
    )  # killed between the last epoch and the saving of the probe
    assert torch.equal(again, whole)


def test_the_schedule_says_what_is_reported_and_not_what_is_learned(splits, tmp_path: Path) -> None:
    run = ProbeRun("mine", lr=0.05, batch_size=32, epochs=7)
    rows: list[tuple[int, dict[str, float]]] = []
    sparse_schedule = ProbeSchedule(val_freq=2, coverage_freq=4, ckpt_freq=3)
    weight = fit(
        splits,
        run,
        tmp_path / "a.safetensors",
        schedule=sparse_schedule,
        log=lambda row, epoch: rows.append((epoch, row)),
        checkpoint_path=lambda epoch: tmp_path / f"epoch{epoch}.safetensors",
    )
    assert torch.equal(weight, fit(splits, run, tmp_path / "b.safetensors"))
    assert [epoch for epoch, _ in rows] == [2, 4, 6, 7]
    assert [epoch for epoch, row in rows if "coverage_positive_90%" in row] == [4, 7]
    assert sorted(path.name for path in tmp_path.glob("epoch*")) == ["epoch3.safetensors", "epoch6.safetensors"]
    assert rows[-1][1]["top1"] == evaluate_probe(weight, splits[1], run.sparsity_lambda)["top1"]


def test_the_training_loss_is_the_mean_over_items(splits, tmp_path: Path) -> None:
    rows: list[dict[str, float]] = []
    run = ProbeRun("mine", lr=1e-12, batch_size=100, epochs=1)  # a batch of 100 and one of 3, and weights that stay
    weight = fit(splits, run, tmp_path / "state.safetensors", log=lambda row, _: rows.append(row))
    whole = float(probe_loss(linear(every_row(splits[0]), weight), splits[0].labels, weight, run.sparsity_lambda))
    assert rows[0]["train_loss"] == pytest.approx(whole, rel=1e-5)


def test_a_loss_that_is_not_a_number_stops_the_training(splits, tmp_path: Path, refusal) -> None:
    train, validation = splits
    values = train.inputs.toarray()
    values[3, 2] = np.nan
    with refusal("epoch 0", "--probe_lr"):
        fit((sparse(values, train.labels.numpy()), validation), ProbeRun("mine", epochs=2), tmp_path / "s.safetensors")
    assert not (tmp_path / "s.safetensors").exists()


# ----------------------------------------------------------------------------------------------------------------- prox

PROX = ProbeRun("mine", epochs=300, sparsity_lambda=2.0, solver="prox")


def fit_by_prox(splits: tuple[ProbeData, ProbeData], state: Path, run: ProbeRun = PROX, **options) -> torch.Tensor:
    return fit_prox(
        *splits, N_CLASSES, run, schedule=ProbeSchedule(coverage_freq=0), device=CPU, state_path=state, **options
    )


def test_prox_ends_below_adam_and_at_zeros(splits, tmp_path: Path) -> None:
    by_prox = fit_by_prox(splits, tmp_path / "a.safetensors")
    run = ProbeRun("mine", lr=0.01, batch_size=103, epochs=600, sparsity_lambda=2.0)
    by_adam = fit(splits, run, tmp_path / "b.safetensors", schedule=ProbeSchedule(val_freq=600))
    prox, adam = (evaluate_probe(weight, splits[0], 2.0)["loss"] for weight in (by_prox, by_adam))
    assert prox == pytest.approx(adam, rel=2e-3)
    assert prox < adam + 1e-5
    assert zero_counts(by_adam)["zeros_0"] == 0
    assert 10 < zero_counts(by_prox)["zeros_0"] < by_prox.numel()
    assert ((by_prox == 0) == (by_adam.abs() < 0.02)).float().mean() > 0.9


def test_prox_without_penalty_and_with_too_much(splits, tmp_path: Path) -> None:
    free = fit_by_prox(
        splits, tmp_path / "a.safetensors", ProbeRun("mine", epochs=20, sparsity_lambda=0, solver="prox")
    )
    assert zero_counts(free)["zeros_0"] == 0
    none = fit_by_prox(splits, tmp_path / "b.safetensors", ProbeRun("mine", sparsity_lambda=1e4, solver="prox"))
    assert zero_counts(none)["zeros_0"] == none.numel()


@pytest.mark.parametrize("at", [1, 40, "last"])
def test_an_interrupted_prox_goes_on_to_the_same_bits(splits, tmp_path: Path, monkeypatch, at: int | str) -> None:
    monkeypatch.setattr(dncbm.probing, "STATE_EVERY_S", -1.0)
    passes: list[int] = []
    whole = fit_by_prox(
        splits, tmp_path / "a.safetensors", log=lambda _, n: passes.append(n), log_path=tmp_path / "whole.csv"
    )
    last = passes[-1] if at == "last" else at

    def die(_: dict[str, float], n: int) -> None:
        if n == last:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit_by_prox(splits, tmp_path / "b.safetensors", log=die)
    resumed = fit_by_prox(splits, tmp_path / "b.safetensors", log_path=tmp_path / "resumed.csv")
    assert torch.equal(whole, resumed)
    assert (tmp_path / "resumed.csv").read_text() == (tmp_path / "whole.csv").read_text()
    assert torch.equal(whole, fit_by_prox(splits, tmp_path / "b.safetensors"))


def test_prox_stops_at_what_is_not_a_number(splits, tmp_path: Path, refusal) -> None:
    values = splits[0].inputs.toarray()
    values[3, 2] = np.nan
    with refusal("NaN"):
        fit_by_prox((sparse(values, splits[0].labels.numpy()), splits[1]), tmp_path / "s.safetensors")


# -------------------------------------------------------------------------------------------------------------- results


def append_many(path: Path, job: int) -> None:
    for i in range(25):
        append_result(path, {"job": job, "row": i, "text": f'comma, "quote" {job}'})


def test_jobs_that_append_at_once_lose_no_row(tmp_path: Path, monkeypatch) -> None:
    write_header = csv.DictWriter.writeheader

    def slowly(writer: csv.DictWriter) -> None:
        time.sleep(0.1)  # long enough for every job to find no file, were there no lock
        write_header(writer)

    monkeypatch.setattr(csv.DictWriter, "writeheader", slowly)
    path = tmp_path / "probe" / "probe_results.csv"
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=append_many, args=(path, job)) for job in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0] * 4
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted((int(row["job"]), int(row["row"])) for row in rows) == [(j, i) for j in range(4) for i in range(25)]
    assert all(row["text"] == f'comma, "quote" {row["job"]}' for row in rows)


def test_results_of_other_columns_are_refused(tmp_path: Path, refusal) -> None:
    path = tmp_path / "probe_results.csv"
    append_result(path, {"a": 1, "b": 2})
    before = path.read_text()
    with refusal(path):
        append_result(path, {"a": 1, "c": 2})
    with refusal(path):
        append_result(path, {"b": 1, "a": 2})
    assert path.read_text() == before


def test_results_of_an_older_version_get_the_new_columns(tmp_path: Path) -> None:
    path = tmp_path / "probe_results.csv"
    append_result(path, {"a": 1, "c": "x, y"})
    append_result(path, {"a": 2, "b": 3, "c": 4})
    append_result(path, {"a": 5, "b": 6, "c": 7})
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"a": "1", "b": "", "c": "x, y"},
        {"a": "2", "b": "3", "c": "4"},
        {"a": "5", "b": "6", "c": "7"},
    ]


def test_a_row_has_every_column_and_no_other() -> None:
    row = result_row({"method": "probe"}, {"val_top1": 0.5})
    assert tuple(row) == SETTINGS + METRICS
    assert (row["method"], row["val_top1"], row["val_top5"]) == ("probe", "0.5", "")
    with pytest.raises(KeyError, match="vall"):
        result_row({}, {"vall_top1": 0.5})


# ---------------------------------------------------------------------------------------------------------------- stage

RUN = SAERun(encoder="enc")
KEYS = {"train": np.arange(2, 120), "train_val": np.arange(121, 150), "val": np.arange(0, 40, 2)}
PROBE = ProbeRun("mine", lr=0.02, batch_size=32, epochs=4)


@pytest.fixture
def settings(make_settings: Callable[..., Settings], make_store) -> Settings:
    """Labels of 150 train and 40 val images, features of all but a few of them, and strengths that equal the features."""
    settings = make_settings(probe_datasets={"mine": "images"})
    artifacts = Artifacts(settings)
    for number, (split, keys) in enumerate(KEYS.items()):
        values = strengths(len(keys), 12, number)
        make_store(artifacts.features("mine", "enc", "out", split), [values], [keys])
        folder, recipe = artifacts.strengths(RUN, "mine", split), Recipe("strengths")
        begin(folder, recipe, overwrite=True)
        dncbm.concepts._write_part(folder / "00000.npz", scipy.sparse.csr_matrix(values), keys)
        finish(folder, recipe, folder.glob("*.npz"))
    recipe = Recipe("probe_split")
    begin(artifacts.probe_split("mine"), recipe, overwrite=True)
    write_json(artifacts.probe_split("mine"), {"class_names": ["a", "b", "c", "d"]})
    for split, n in (("train", 150), ("val", 40)):
        np.save(artifacts.labels("mine", split), labels_of(split, np.arange(n)))
    finish(artifacts.probe_split("mine"), recipe, [artifacts.probe_split("mine")])
    return settings


def labels_of(split: str, keys: np.ndarray) -> np.ndarray:
    return np.random.default_rng(7 if split == "val" else 8).integers(0, 4, 150)[keys]


def results(settings: Settings) -> list[dict[str, str]]:
    with Artifacts(settings).probe_results().open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("on_features", [False, True])
def test_the_stage_fits_evaluates_saves_and_reports(settings: Settings, on_features: bool) -> None:
    probe = ProbeRun("mine", 0.02, 32, 4, on_features=on_features)
    assert train_linear_probe(settings, RUN, probe, device="cpu") is Outcome.RAN
    saved = load_file(Artifacts(settings).probe(RUN, probe))["weight"]
    assert saved.shape == (4, 12)  # as nn.Linear keeps it
    torch.testing.assert_close(load_probe(settings, RUN, probe), saved.T)
    expected = by_hand(strengths(118, 12, 0), torch.from_numpy(labels_of("train", np.arange(2, 120))), probe)
    torch.testing.assert_close(saved, expected, rtol=1e-3, atol=1e-5)

    (row,) = results(settings)
    assert (row["probe_dataset"], row["on"], row["encoder"]) == (
        "mine",
        "features" if on_features else "concepts",
        "enc",
    )
    for split, number, keys in (
        ("train", 0, np.arange(2, 120)),
        ("train_val", 1, np.arange(121, 150)),
        ("val", 2, np.arange(0, 40, 2)),
    ):
        logits = strengths(len(keys), 12, number) @ saved.numpy().T
        assert float(row[f"{split}_top1"]) == pytest.approx(
            np.mean(logits.argmax(axis=1) == labels_of(split, keys)), rel=1e-5
        )
        assert float(row[f"{split}_top5"]) == 1
        assert float(row[f"{split}_loss"]) > float(row[f"{split}_ce"]) > 0
    assert int(row["zeros_0.1"]) == int((saved.abs() <= 0.1).sum())
    assert float(row["val_coverage_positive_90%"]) > 0


def test_accuracies_of_classes_and_groups(settings: Settings) -> None:
    artifacts = Artifacts(settings)
    groups = np.arange(40) // 10 % 3  # of the 20 images of val: 10 in group 0, 5 in 1, 5 in 2
    np.save(artifacts.groups("mine", "val"), groups)
    train_linear_probe(settings, RUN, PROBE, device="cpu")
    keys = KEYS["val"]
    predicted = (strengths(20, 12, 2) @ load_probe(settings, RUN, PROBE).numpy()).argmax(axis=1)
    labels = labels_of("val", keys)
    with artifacts.probe_accuracies(RUN, PROBE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = []
    for kind, members, names in (("class", labels, "abcd"), ("group", groups[keys], "012")):
        for index, name in enumerate(names):
            chosen = members == index
            top1 = (predicted == labels)[chosen].mean() if chosen.any() else None
            expected.append((kind, index, name, chosen.sum(), top1))
    assert [(row["kind"], int(row["index"]), row["name"], int(row["images"])) for row in rows] == [
        row[:4] for row in expected
    ]
    for row, (*_, top1) in zip(rows, expected, strict=True):
        assert (float(row["top1"]) if row["top1"] else None) == pytest.approx(top1, rel=1e-5)
    (result,) = results(settings)
    for kind in ("class", "group"):
        shares = [top1 for found, *_, top1 in expected if found == kind and top1 is not None]
        assert float(result[f"val_mean_{kind}_top1"]) == pytest.approx(np.mean(shares), rel=1e-5)
        assert float(result[f"val_worst_{kind}_top1"]) == pytest.approx(min(shares), rel=1e-5)


def test_groups_without_groups_are_blank(settings: Settings) -> None:
    train_linear_probe(settings, RUN, PROBE, device="cpu")
    (result,) = results(settings)
    assert result["val_worst_group_top1"] == ""
    assert float(result["val_worst_class_top1"]) <= float(result["val_mean_class_top1"])


def test_a_stage_with_another_solver_is_another_artifact(settings: Settings) -> None:
    train_linear_probe(settings, RUN, PROBE, device="cpu")
    prox = ProbeRun("mine", epochs=50, sparsity_lambda=2.0, solver="prox")
    assert train_linear_probe(settings, RUN, prox, device="cpu") is Outcome.RAN
    assert train_linear_probe(settings, RUN, prox, device="cpu") is Outcome.ALREADY_DONE
    target = Artifacts(settings).probe(RUN, prox)
    assert target.name == "on_concepts_final_prox_epo50_nobias_clCE_spL1_spl2.0.safetensors"
    adam, found = results(settings)
    assert (adam["solver"], found["solver"]) == ("adam", "prox")
    assert (adam["probe_lr"], found["probe_lr"], found["probe_lambda"]) == ("0.02", "", "2.0")
    assert int(found["zeros_0"]) > int(adam["zeros_0"]) == 0
    assert (load_probe(settings, RUN, prox) == 0).sum() == int(found["zeros_0"])


def test_done_is_not_done_again_and_other_inputs_are_stale(settings: Settings) -> None:
    train_linear_probe(settings, RUN, PROBE, device="cpu")
    assert train_linear_probe(settings, RUN, PROBE, device="cpu") is Outcome.ALREADY_DONE
    assert len(results(settings)) == 1
    folder, recipe = Artifacts(settings).strengths(RUN, "mine", "val"), Recipe("strengths", {"other": True})
    begin(folder, recipe, overwrite=True)
    values = scipy.sparse.csr_matrix(strengths(20, 12, 9))
    dncbm.concepts._write_part(folder / "00000.npz", values, np.arange(0, 40, 2))
    finish(folder, recipe, folder.glob("*.npz"))
    with pytest.raises(StaleArtifact, match="val concepts has changed"):
        train_linear_probe(settings, RUN, PROBE, device="cpu")
    assert train_linear_probe(settings, RUN, PROBE, device="cpu", overwrite=True) is Outcome.RAN
    assert len(results(settings)) == 2


def test_an_interrupted_stage_goes_on_to_the_same_probe(settings: Settings, monkeypatch) -> None:
    monkeypatch.setattr(dncbm.probing, "STATE_EVERY_S", -1.0)
    train_linear_probe(settings, RUN, PROBE, device="cpu")
    artifacts = Artifacts(settings)
    target = artifacts.probe(RUN, PROBE)
    whole = target.read_bytes()
    for path in target.parent.iterdir():
        path.unlink()

    evaluate, calls = dncbm.probing.evaluate_probe, []

    def die_at_the_third(*args, **options) -> dict[str, float]:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    monkeypatch.setattr(dncbm.probing, "evaluate_probe", die_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        train_linear_probe(settings, RUN, PROBE, device="cpu")
    assert artifacts.probe_state(RUN, PROBE).exists()
    assert not target.exists()
    assert train_linear_probe(settings, RUN, PROBE, device="cpu") is Outcome.RAN
    assert target.read_bytes() == whole
    assert not artifacts.probe_state(RUN, PROBE).exists()


def test_a_result_that_could_not_be_appended_is_appended_by_the_next_run(settings: Settings, refusal) -> None:
    path = Artifacts(settings).probe_results()
    append_result(path, {"other": "columns"})
    with refusal(path):
        train_linear_probe(settings, RUN, PROBE, device="cpu")
    path.unlink()
    assert train_linear_probe(settings, RUN, PROBE, device="cpu") is Outcome.RAN
    assert len(results(settings)) == 1


def test_what_is_missing_is_named_with_its_command(settings: Settings, refusal) -> None:
    with refusal("06_save_concept_strengths.py", "--probe_dataset mine"):
        train_linear_probe(settings, SAERun(encoder="other"), PROBE, device="cpu")
    with refusal("05_save_probe_features.py", "--img_enc_name other"):
        train_linear_probe(settings, SAERun(encoder="other"), ProbeRun("mine", on_features=True), device="cpu")
    with refusal("07_train_linear_probe.py", Artifacts(settings).probe(RUN, PROBE)):
        load_probe(settings, RUN, PROBE)
    assert not Artifacts(settings).probe_results().exists()


def test_a_damaged_probe_is_named(settings: Settings, refusal) -> None:
    train_linear_probe(settings, RUN, PROBE, device="cpu")
    path = Artifacts(settings).probe(RUN, PROBE)
    path.write_bytes(path.read_bytes()[:20])
    with refusal(path):
        load_probe(settings, RUN, PROBE)


# ------------------------------------------------------------------------------------------------------------ baselines


def test_the_majority_class_is_the_one_of_the_training_labels() -> None:
    assert majority_accuracy(torch.tensor([2, 2, 0, 1]), torch.tensor([2, 0, 0, 2, 2])) == pytest.approx(0.6)


def test_zero_shot_weights_are_mean_descriptions() -> None:
    class Texts(torch.nn.Module):
        def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(tokens, 4).sum(dim=1).float()

    tokens = {"a cat": [0, 1], "the cat": [0, 2], "a dog": [3, 1], "the dog": [3, 2]}
    encoder = Encoder(
        "texts", Texts(), lambda image: image, lambda texts: torch.tensor([tokens[text] for text in texts]), CPU
    )
    weight = zero_shot_weight(encoder, ["cat", "dog"], ("a {}", "the {}"))
    expected = torch.tensor([[2.0, 1, 1, 0], [0, 1, 1, 2]])
    torch.testing.assert_close(weight.T, expected / 6**0.5)
