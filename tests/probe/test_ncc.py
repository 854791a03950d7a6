"""Contributing concepts, their effective number and CEA: against counting by hand and published figures."""

import math

import numpy as np
import pytest
import scipy.sparse
import torch

from dncbm.probe.model import ProbeData, evaluate_probe
from dncbm.probe.ncc import BETA, concept_efficient_accuracy, contributing, decisions, participation
from dncbm.runs.results import COVERAGES


def by_hand(values: np.ndarray, weight: np.ndarray) -> tuple[list[int], list[float]]:
    """Of every image: concepts in order of |contribution| to the predicted class up to 95 %; and (sum c)^2 / sum c^2."""
    counts, ratios = [], []
    for z in values.astype(np.float64):
        sizes = sorted((abs(z * weight[:, int(np.argmax(z @ weight))])).tolist(), reverse=True)
        count, total = 0, sum(sizes)
        while total > 0 and sum(sizes[:count]) < 0.95 * total:
            count += 1
        counts.append(count)
        ratios.append(total**2 / sum(one**2 for one in sizes) if total > 0 else 0.0)
    return counts, ratios


@pytest.mark.parametrize("is_sparse", [True, False])
def test_decisions_are_those_counted_by_hand(strengths, make_store, tmp_path, is_sparse: bool, coverage_by_hand) -> None:
    """Of an image without concepts, and of one whose concepts have no weight, none contributes."""
    rng = np.random.default_rng(1)
    values = strengths(90, 30, 2) if is_sparse else rng.normal(size=(90, 30)).astype(np.float32)
    values[3], values[4, 1:] = 0, 0
    weight = (rng.normal(size=(30, 4)) * (rng.random((30, 4)) < 0.6)).astype(np.float32)
    weight[0] = 0
    labels = torch.from_numpy(rng.integers(4, size=90))
    inputs = scipy.sparse.csr_matrix(values) if is_sparse else make_store(tmp_path / "store", [values[:50], values[50:]])
    data = ProbeData(inputs, labels)
    found = decisions(torch.from_numpy(weight), data, batch_size=32)
    counts, ratios = by_hand(values, weight)
    assert counts[3] == counts[4] == 0
    assert max(counts) > 4
    assert found.ncc == pytest.approx(np.mean(counts))
    assert found.effective == pytest.approx(np.mean(ratios), rel=1e-6)
    place = COVERAGES.index(0.95)  # the same count that the probe's coverage reports
    assert counts == [row[place] for row in coverage_by_hand(values, weight, True)]
    evaluated = evaluate_probe(torch.from_numpy(weight), data, 0.0)
    assert (found.top1, found.ce) == (pytest.approx(evaluated["top1"]), pytest.approx(evaluated["ce"], rel=1e-6))
    assert found.correct.tolist() == ((values @ weight).argmax(axis=1) == labels.numpy()).tolist()


@pytest.mark.parametrize(
    ("sizes", "count", "ratio"),
    [([0, 0, 0], 0, 0), ([1, 0, 0], 1, 1), ([2, 2, 2, 2], 4, 4), ([95, 5], 1, 10000 / 9050), ([94, 6], 2, 10000 / 8872),
     ([1e-38, 1e-38], 2, 2), ([1e30, 1e30, 1e30], 3, 3)],
)  # fmt: skip
def test_contributions_at_the_edges(sizes: list[float], count: int, ratio: float) -> None:
    rows = torch.tensor([sizes, sizes[::-1]], dtype=torch.float32)
    assert contributing(rows).tolist() == [count] * 2
    assert participation(rows).tolist() == pytest.approx([ratio] * 2, rel=1e-5)
    assert contributing(rows[:, :0]).tolist() == [0, 0]
    assert participation(rows[:, :0]).tolist() == [0, 0]


def test_cea_reproduces_the_published_means() -> None:
    """On PS-CBM's 11 data sets, with the same accuracy on each: DN-CBM's and PS-CBM's mean CEA."""
    classes = (100, 10, 100, 200, 47, 102, 101, 7, 1000, 45, 101)
    for accuracy, n_concepts, published in ((77.3, 8192, 53.4), (78.3, 545, 59.0)):
        found = [concept_efficient_accuracy(accuracy, n_concepts, n) for n in classes]
        assert np.mean(found) == pytest.approx(published, abs=0.3)


def test_cea_by_hand_and_where_it_is_undefined() -> None:
    """8 classes need three concepts, 9 need four; at as many concepts as that, the accuracy itself."""
    assert concept_efficient_accuracy(0.8, 3, 8) == pytest.approx(0.8)
    assert concept_efficient_accuracy(0.8, 4, 9) == pytest.approx(0.8)
    assert concept_efficient_accuracy(0.8, 81, 8) == pytest.approx(0.8 / 4**BETA)
    assert concept_efficient_accuracy(0.8, 2, 8) == pytest.approx(0.8 / (math.log(2) / math.log(3)) ** BETA)
    assert [concept_efficient_accuracy(0.8, m, c) for m, c in ((100, 2), (100, 1), (1, 8), (0, 8))] == [None] * 4
