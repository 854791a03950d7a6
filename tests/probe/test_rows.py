"""Batches that are gathered where the strengths are, against the rows of the dense matrix; and a split that a GPU keeps."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import dncbm.probe.model
import dncbm.probe.rows
from dncbm.probe.model import ProbeData, accuracy_of_groups, evaluate_probe, linear, probe_loss
from dncbm.probe.rows import ResidentRows, SparseRows, packed
from dncbm.probe.solvers import root_mean_square
from sparse_autoencoder.data import loaded

CPU = torch.device("cpu")


def dense(batch: SparseRows, n_columns: int) -> np.ndarray:
    """The rows of a batch, entry by entry."""
    rows = np.zeros((len(batch.offsets), n_columns), dtype=np.float32)
    bounds = [*batch.offsets.tolist(), len(batch.indices)]
    for row, (start, end) in enumerate(pairwise(bounds)):
        for column, value in zip(batch.indices[start:end].tolist(), batch.values[start:end].tolist(), strict=True):
            rows[row, column] += value
    return rows


@given(
    n_rows=st.integers(0, 23),
    density=st.sampled_from([0.0, 0.1, 1.0]),
    batch_size=st.integers(1, 9),
    at_once=st.sampled_from([1, 6, 100]),
    is_shuffled=st.booleans(),
    seed=st.integers(0, 99),
)
def test_resident_batches_are_the_rows_in_the_order_asked_for(
    strengths, n_rows: int, density: float, batch_size: int, at_once: int, is_shuffled: bool, seed: int
) -> None:
    values = strengths(n_rows, 5, seed, density)
    order = np.random.default_rng(seed).permutation(n_rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dncbm.probe.rows, "GATHERED", at_once)
        rows = ResidentRows(scipy.sparse.csr_matrix(values), CPU)
        batches = list(rows.batches(batch_size, order if is_shuffled else None))
    assert [len(batch.offsets) for batch in batches] == [
        min(batch_size, n_rows - first) for first in range(0, n_rows, batch_size)
    ]
    found = np.concatenate([np.zeros((0, 5), dtype=np.float32), *(dense(batch, 5) for batch in batches)])
    np.testing.assert_array_equal(found, values[order] if is_shuffled else values)


def test_parts_are_sent_in_one_copy() -> None:
    parts = [torch.tensor([1, -2], dtype=torch.int32), torch.empty(0), torch.tensor([0.5, float("inf"), -1e-40])]
    found = packed(parts, CPU)
    assert [part.dtype for part in found] == [part.dtype for part in parts]
    assert all(torch.equal(one, other) for one, other in zip(found, parts, strict=True))
    assert len({part.untyped_storage().data_ptr() for part in found}) == 1


@pytest.fixture(params=["strengths", "features"])
def splits(request, strengths, make_store, tmp_path, monkeypatch: pytest.MonkeyPatch) -> tuple[ProbeData, ProbeData]:
    """A split, and the same one as a GPU keeps it."""
    values = strengths(70, 12, 3)
    values[:, 0] += 0.1  # a row of zeros would leave the ranking to chance
    labels = torch.from_numpy(np.random.default_rng(3).integers(0, 4, 70))
    inputs = scipy.sparse.csr_matrix(values)
    if request.param == "features":
        inputs = make_store(tmp_path / "store", [values[:30], values[30:]])
    monkeypatch.setattr(dncbm.probe.rows, "GATHERED", 20)
    found = ProbeData(inputs, labels), ProbeData(inputs, labels)
    with monkeypatch.context() as patch:
        patch.setattr(dncbm.probe.model, "fits", lambda n_bytes, device: True)
        patch.setattr(dncbm.probe.model, "resident", loaded)
        evaluate_probe(torch.zeros(12, 4), found[1], 0.0)  # in inference mode: what it keeps must be fit for training, too
    return found


def test_what_a_gpu_keeps_gives_the_same_numbers(splits: tuple[ProbeData, ProbeData], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    order = np.random.default_rng(0).permutation(70)
    found = []
    for data in splits:
        metrics = evaluate_probe(weight, data, 0.5, coverage=True, batch_size=9)
        right = accuracy_of_groups(weight, data, data.labels, 4, batch_size=9)
        trained = weight.clone().requires_grad_()
        for batch, labels in data.batches(16, CPU, order):
            probe_loss(linear(batch, trained), labels, trained, 0.5).backward()
        found.append([trained.grad, root_mean_square(data, CPU), *right, torch.tensor(list(metrics.values()))])
    for (_, expected), (_, labels) in zip(*(data.batches(16, CPU, order) for data in splits), strict=True):
        assert torch.equal(labels, expected)
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("keeps", [True, False])
def test_a_gpu_is_not_waited_for(strengths, sparse, monkeypatch: pytest.MonkeyPatch, keeps: bool) -> None:
    """Fake tensors know devices, types and shapes but no values: what needs a value, or mixes devices, raises."""
    pytest.importorskip("torch", minversion=None if torch.cuda.is_available() else "2.14")  # older ones ask for a driver
    gpu, values = torch.device("cuda", 0), strengths(70, 12, 3)
    data = sparse(values, np.arange(70) % 4)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (2 * (8 * 71 + 8 * data.inputs.nnz + 8 * 70) - (not keeps), 0)
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = torch.zeros(12, 4, device=gpu)
        losses = []
        for batch, labels in data.batches(16, gpu, np.random.default_rng(0).permutation(70)):
            assert batch.indices.dtype == batch.offsets.dtype == torch.int32
            losses.append(probe_loss(linear(batch, weight), labels, weight, 0.5))
        assert len(losses) == 5
        assert torch.stack(losses).device == gpu
