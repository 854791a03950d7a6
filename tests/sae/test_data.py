"""The order of an epoch, how it is read, and training in that order."""

import dataclasses
import gc
import logging
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_autoencoder import CheckpointError, NonFiniteError, ReLU, SparseAutoencoder, TrainingSettings, evaluate, train
from sparse_autoencoder.data import READ_AHEAD, TensorFeatures, epoch_order, group_size, in_batches, loaded, resident
from sparse_autoencoder.declare import identity
from sparse_autoencoder.workers import Workers

PIECE, GROUP, READ, BATCH = 10, 45, 4, 15


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 10 items, groups of at most 45, reads of at most 4."""
    monkeypatch.setattr("sparse_autoencoder.data.PIECE", PIECE)
    monkeypatch.setattr("sparse_autoencoder.data.GROUP", GROUP)
    monkeypatch.setattr("sparse_autoencoder.data.READ", READ)


class Recorded:
    """Features that are not in memory: they record each read, and raise an error at read number `fails_at`."""

    def __init__(self, x: Tensor, fails_at: int | None = None) -> None:
        self.x, self.fails_at = x, fails_at
        self.reads: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self.x)

    def gather(self, indices: np.ndarray) -> Tensor:
        return self.gather_stored(indices).float()

    def gather_stored(self, indices: np.ndarray) -> Tensor:
        self.reads.append(indices.copy())
        if len(self.reads) == self.fails_at:
            raise InterruptedError
        return self.x[torch.from_numpy(indices)]


def is_run(read: np.ndarray) -> bool:
    return bool((np.diff(read) == 1).all())


@pytest.mark.parametrize("n_items", [1, 9, 10, 44, 45, 46, 90, 203])
@pytest.mark.parametrize("group", [0, 5, 45])
def test_an_order_is_a_permutation_of_seed_and_epoch(small_pieces: None, n_items: int, group: int) -> None:
    order = epoch_order(n_items, 3, 7, group)
    np.testing.assert_array_equal(np.sort(order), np.arange(n_items))
    np.testing.assert_array_equal(order, epoch_order(n_items, 3, 7, group))
    if n_items > 10:
        assert not np.array_equal(order, epoch_order(n_items, 3, 8, group))
        assert not np.array_equal(order, epoch_order(n_items, 4, 7, group))


def test_a_group_comes_from_few_pieces(small_pieces: None) -> None:
    """Each has the items of consecutive stretches: at most 45 / 10 whole pieces, one at each end, and the short last one."""
    firsts = Counter[int]()
    for epoch in range(60):
        order = epoch_order(203, 0, epoch, GROUP)
        groups = [order[i : i + GROUP] for i in range(0, 203, GROUP)]
        assert all(len({*(group // PIECE).tolist()}) <= 4 + 2 + 1 for group in groups)
        assert not any(np.array_equal(group, np.sort(group)) for group in groups)
        pieces = [{i for i, group in enumerate(groups) if piece in group // PIECE} for piece in range(21)]
        assert all(max(found) - min(found) <= 1 for found in pieces)  # a piece lies in one group, or in two neighbours
        firsts.update(min(found) for found in pieces[:1])
    assert len(firsts) == 5  # the first piece comes to be in every group


@pytest.mark.parametrize("group", [0, 45])
def test_every_permutation_of_a_group_is_as_likely(monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    monkeypatch.setattr("sparse_autoencoder.data.PIECE", 2)
    counts = Counter(tuple(epoch_order(3, 1, epoch, group).tolist()) for epoch in range(1200))
    assert len(counts) == 6
    assert all(abs(count - 200) < 5 * (1200 * 1 / 6 * 5 / 6) ** 0.5 for count in counts.values())


@pytest.mark.parametrize("size", [1, 15, 44, 45, 46, 100])
def test_a_group_holds_whole_batches(small_pieces: None, size: int) -> None:
    assert group_size(size) % size == 0
    assert group_size(size) == size or group_size(size) <= GROUP


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("threaded", [False, True])
def test_shards_are_read_in_runs_and_once(small_pieces: None, dtype: torch.dtype, threaded: bool) -> None:
    """From any batch on, batches are those of plain indexing; never are more than two groups in memory, at the end none."""
    x = torch.randn(203, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    order = epoch_order(203, 0, 1, GROUP)
    reader = Workers(1) if threaded else None
    read_before = 0
    for first in range(-(-203 // BATCH)):
        data, before = Recorded(x), first * BATCH // GROUP * GROUP
        for i, batch in enumerate(in_batches(data, order, BATCH, first=first, group=GROUP, reader=reader), start=first):
            assert batch.dtype == torch.float32
            assert torch.equal(batch, x[torch.from_numpy(order[i * BATCH : (i + 1) * BATCH])].float())
            gathered = i if reader is None else i + READ_AHEAD + 1
            n_read = sum(map(len, data.reads))
            assert before + n_read <= (gathered * BATCH // GROUP + 2) * GROUP
            if i > first and not threaded:  # a group is read while the one before is used
                assert n_read - read_before <= BATCH + 3 * READ
            read_before = n_read
            if first in (0, 7):
                n_held = sum(type(found) is Tensor and found.shape == (GROUP, 3) for found in gc.get_objects())
                assert n_held <= (2 if i < 203 // BATCH else 0)
        assert all(len(read) <= READ and is_run(read) for read in data.reads)
        read = np.concatenate(data.reads)
        for start in range(before, 203, GROUP):  # each group in ascending order
            np.testing.assert_array_equal(read[start - before :][:GROUP], np.sort(order[start : start + GROUP]))
        assert len(read) == 203 - before
        jumps = [later[0] != earlier[-1] + 1 for earlier, later in pairwise(data.reads)]
        assert sum(jumps) < 203 / PIECE + 203 / GROUP  # never more than the pieces and those that a group's end divides
    if reader is not None:
        reader.close()


@pytest.mark.parametrize(
    ("stored", "kept"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float64, torch.float32),
    ],
)
@pytest.mark.parametrize("group", [0, GROUP])
def test_features_on_a_device_keep_their_type(
    small_pieces: None, features: Tensor, stored: torch.dtype, kept: torch.dtype, group: int
) -> None:
    """The device here is the CPU. Batches have the bits and the order that they have without it."""
    data = Recorded(features.to(stored))
    there = loaded(data, torch.device("cpu"), batch_size=70)
    assert there.x.dtype == kept
    order = epoch_order(len(features), 0, 0, group)
    pairs = zip(
        in_batches(there, order, BATCH, first=3, group=group, device="cpu"),
        in_batches(data, order, BATCH, first=3, group=group),
        strict=True,
    )
    for first, second in pairs:
        assert first.dtype == torch.float32
        assert torch.equal(first, second)


def test_what_is_loaded_is_checked_and_a_cpu_loads_nothing(features: Tensor) -> None:
    data = TensorFeatures(features.half())
    assert resident(data, torch.device("cpu"), 100) is data
    data.x[432, 1] = torch.inf
    with pytest.raises(NonFiniteError, match=r"loading, batch 4: .*item 432"):
        loaded(data, torch.device("cpu"), 100)


def test_items_of_a_group_that_are_not_finite_name_their_step(small_pieces: None, features: Tensor) -> None:
    features[432, 5] = torch.nan
    order = epoch_order(600, 49, 0, GROUP)
    step = int(np.flatnonzero(order == 432)[0]) // BATCH + 1
    settings = TrainingSettings(epochs=1, batch_size=BATCH, shuffle="shards")
    with pytest.raises(NonFiniteError, match=f"step {step}: .*item 432"):
        train(model(), Recorded(features), settings, progress=False)


def model(seed: int = 49) -> SparseAutoencoder:
    return SparseAutoencoder(12, 40, sparsity=ReLU(3e-3), seed=seed)


SETTINGS = TrainingSettings(epochs=8, batch_size=BATCH, lr=5e-3, resample_freq=2, resample_dataset_size=100, shuffle="shards")


def test_resumed_runs_on_shards_are_bit_equal(small_pieces: None, tmp_path: Path, features: Tensor) -> None:
    """They equal a run on a tensor, which is not read in groups. Only the checksum and two resamplings read single items."""
    whole = model()
    train(whole, features, SETTINGS, progress=False)
    state, cuts = tmp_path / "state.safetensors", 0
    for reads in (7, 40, 97, 150, 201, None):
        resumed, data = model(seed=1 if state.exists() else 49), Recorded(features, reads)
        try:
            train(resumed, data, SETTINGS, state_path=state, state_every=0, progress=False)
        except InterruptedError:
            cuts += 1
        assert sum(not is_run(read) for read in data.reads) <= 1 + 2
    assert cuts == 5
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_shards_train_as_well_as_exact(small_pieces: None, features: Tensor) -> None:
    losses: dict[str, list[float]] = {"exact": [], "shards": []}
    for way, found in losses.items():
        for seed in range(5):
            trained = model(seed)
            train(trained, features, dataclasses.replace(SETTINGS, seed=seed, shuffle=way), progress=False)
            found.append(evaluate(trained, features)["loss"])
    exact, shards = (np.array(found) for found in losses.values())
    assert abs(exact.mean() - shards.mean()) < 2 * exact.std()
    assert exact.std() > 0
    assert not np.array_equal(exact, shards)


def test_auto_chooses_by_size_and_says_so(
    small_pieces: None, tmp_path: Path, features: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A state of "auto" belongs to the run that it chose; what was made before the setting existed stays valid."""
    caplog.set_level(logging.INFO)
    auto = dataclasses.replace(SETTINGS, shuffle="auto")
    assert "shuffle" not in identity(auto)
    states = {way: tmp_path / f"{way}.safetensors" for way in ("exact", "shards")}
    for way, limit in (("exact", 600 * 12 * 2), ("shards", 600 * 12 * 2 - 1)):
        monkeypatch.setattr("sparse_autoencoder.settings.SHARDS_ABOVE", limit)
        train(model(), features.half(), auto, state_path=states[way], progress=False)
        assert ("shuffle: shards" in caplog.text) == (way == "shards")
    for way, other in (("exact", "shards"), ("shards", "exact")):
        named = dataclasses.replace(SETTINGS, shuffle=way)
        trained = model(seed=1)
        train(trained, features.half(), named, state_path=states[way], progress=False)
        with pytest.raises(CheckpointError, match="shuffle is"):
            train(model(), features.half(), named, state_path=states[other], progress=False)
        expected = model()
        train(expected, features.half(), named, progress=False)
        assert torch.equal(trained.encoder_weight, expected.encoder_weight)
