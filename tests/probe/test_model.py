"""The formulas of the probe: products, losses, accuracies, coverage, zero counts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, top_k_accuracy_score

from dncbm.probe.model import (
    Batch,
    ProbeData,
    accuracy_of_groups,
    contributions,
    coverage_counts,
    evaluate_probe,
    linear,
    probe_loss,
    true_class_ranks,
    zero_counts,
)
from dncbm.probe.zero_shot import majority_accuracy

CPU = torch.device("cpu")
SHAPES = {"n_rows": st.integers(1, 6), "n_concepts": st.integers(1, 8), "n_classes": st.integers(1, 5)}


def every_row(data: ProbeData) -> Batch:
    return data.batch(np.arange(len(data)), CPU)[0]


@given(**SHAPES, density=st.sampled_from([0.0, 0.2, 1.0]), seed=st.integers(0, 99))
def test_a_sparse_product_and_its_gradient_are_the_dense_ones(
    strengths, sparse, n_rows: int, n_concepts: int, n_classes: int, density: float, seed: int
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


def test_batches_are_rows_in_the_order_asked_for(strengths, sparse, tmp_path: Path, make_store) -> None:
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


@given(**SHAPES, density=st.sampled_from([0.0, 0.3, 1.0]), absolute=st.booleans(), seed=st.integers(0, 199))
def test_coverage_counts_concepts_taken_greedily(
    strengths, sparse, coverage_by_hand, n_rows, n_concepts, n_classes, density: float, absolute: bool, seed: int
) -> None:
    values = strengths(n_rows, n_concepts, seed, density)
    values[seed % n_rows] = 0
    weight = np.random.default_rng(seed).normal(size=(n_concepts, n_classes)).astype(np.float32)
    expected = coverage_by_hand(values, weight, absolute)
    for batch in (every_row(sparse(values)), torch.from_numpy(values)):
        assert coverage_counts(batch, torch.from_numpy(weight), absolute=absolute).tolist() == expected


def test_coverage_of_rows_that_are_easy_to_count(sparse) -> None:
    values = np.array([[4, 0, 0, 0], [1, 1, 1, 1], [97, 1, 1, 1], [0, 0, 0, 0], [10, 1, 0, 0]], dtype=np.float32)
    weight = torch.tensor([[1.0], [1.0], [1.0], [-1.0]])
    batch = every_row(sparse(values))
    assert coverage_counts(batch, weight, absolute=False).tolist() == [[1] * 3, [3] * 3, [1, 1, 3], [0] * 3, [1, 2, 2]]
    assert coverage_counts(batch, weight, absolute=True).tolist() == [[1] * 3, [4] * 3, [1, 1, 3], [0] * 3, [1, 2, 2]]


def test_a_contribution_is_strength_times_weight(strengths, sparse) -> None:
    values, weight = strengths(7, 5, 4, 0.5), np.random.default_rng(4).normal(size=(5, 3)).astype(np.float32)
    classes = np.array([0, 2, 1, 1, 0, 2, 2])
    expected = np.array([[values[i, f] * weight[f, c] for f in range(5)] for i, c in enumerate(classes)])
    for batch in (every_row(sparse(values)), torch.from_numpy(values)):
        found = contributions(batch, torch.from_numpy(weight), torch.from_numpy(classes)).numpy()
        np.testing.assert_array_equal(found, expected if found.ndim == 2 else expected[values > 0])


@pytest.mark.parametrize("n_classes", [2, 4, 12])
@pytest.mark.parametrize("batch_size", [7, 4096])
def test_accuracies_and_losses_are_those_of_scikit_learn(
    strengths, sparse, coverage_by_hand, n_classes: int, batch_size: int
) -> None:
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


@pytest.mark.parametrize("batch_size", [7, 4096])
def test_images_and_correct_ones_are_counted_per_group(strengths, sparse, batch_size: int) -> None:
    rng = np.random.default_rng(5)
    values, labels, groups = strengths(60, 9, 3), rng.integers(0, 3, 60), rng.integers(0, 3, 60)
    weight = rng.normal(size=(9, 3)).astype(np.float32)
    right = (values @ weight).argmax(axis=1) == labels
    data = sparse(values, labels)
    found = accuracy_of_groups(torch.from_numpy(weight), data, torch.from_numpy(groups), 4, batch_size)
    expected = [[(groups == group).sum() for group in range(4)], [right[groups == group].sum() for group in range(4)]]
    assert [counts.tolist() for counts in found] == expected
    assert expected[0][3] == 0, "the last group is empty"


@given(n_rows=st.integers(1, 30), n_classes=st.integers(1, 9), levels=st.integers(1, 4), seed=st.integers(0, 999))
def test_of_equal_logits_the_class_with_the_lower_number_comes_first(
    n_rows: int, n_classes: int, levels: int, seed: int
) -> None:
    """One rule: ranks are places in a stable sort, and the first place is argmax's."""
    rng = np.random.default_rng(seed)
    logits = (
        rng.choice([-np.inf, 0.0, 1.0, np.inf], (n_rows, n_classes))
        if levels == 4
        else rng.integers(0, levels, (n_rows, n_classes))
    )
    labels = rng.integers(0, n_classes, n_rows)
    found = true_class_ranks(torch.from_numpy(logits).float(), torch.from_numpy(labels))
    places = np.argsort(-logits.astype(np.float32), axis=1, kind="stable")
    assert found.tolist() == (places == labels[:, None]).argmax(axis=1).tolist()
    assert (found == 0).tolist() == (logits.argmax(axis=1) == labels).tolist()


@pytest.mark.parametrize("n_classes", [2, 4, 5, 9])
def test_a_probe_without_weights_predicts_the_first_class(strengths, sparse, n_classes: int) -> None:
    """Every accuracy says the same of it: those of the probe, of its classes, of its predictions, of a constant one."""
    labels = np.random.default_rng(1).integers(0, n_classes, 50)
    data, weight = sparse(strengths(50, 6, 2), labels), torch.zeros(6, n_classes)
    found = evaluate_probe(weight, data, 0.0, batch_size=7)
    assert found["top1"] == pytest.approx(np.mean(labels == 0))
    assert found["top5"] == pytest.approx(np.mean(labels < 5))
    images, right = accuracy_of_groups(weight, data, data.labels, n_classes)
    assert right.tolist() == [int((labels == 0).sum()), *[0] * (n_classes - 1)]
    assert int(right.sum()) / int(images.sum()) == pytest.approx(found["top1"])
    assert found["top1"] == pytest.approx(majority_accuracy(torch.zeros(3, dtype=torch.int64), data.labels))


def test_a_logit_that_is_no_number_is_never_right() -> None:
    logits = torch.tensor([[np.nan, 0.0, 1.0], [np.nan, 0.0, 1.0], [np.nan] * 3])
    assert (true_class_ranks(logits, torch.tensor([0, 2, 1])) > 0).all()
