from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dncbm.features.store import FeatureStore


@given(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any), half=st.booleans(), data=st.data())
def test_gather_is_plain_indexing(tmp_path_factory, make_store, sizes: list[int], half: bool, data: st.DataObject) -> None:
    dtype = np.float16 if half else np.float32
    rows = np.random.default_rng(sum(sizes)).normal(size=(sum(sizes), 3)).astype(dtype)
    shards = np.split(rows, np.cumsum(sizes)[:-1])
    store = make_store(tmp_path_factory.mktemp("store"), shards)
    indices = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=20)), dtype=np.int64)
    gathered = store.gather(indices)
    assert gathered.dtype == torch.float32
    np.testing.assert_array_equal(gathered.numpy(), rows[indices].astype(np.float32))


def test_a_store_is_its_shards_in_order(tmp_path: Path, make_store) -> None:
    rows = np.arange(24, dtype=np.float16).reshape(8, 3)
    shards = [rows[:3], np.empty((0, 0), np.float32), rows[3:4], rows[4:]]
    keys = [np.array(["a", "b", "c"]), np.array([]), np.array(["longer"]), np.array(["e", "f", "g", "h"])]
    store = make_store(tmp_path / "store", shards, keys)
    assert len(store) == 8
    assert store.width == 3
    assert list(store.keys) == ["a", "b", "c", "longer", "e", "f", "g", "h"]
    for batch_size, expected in ((2, [2, 1, 1, 2, 2]), (3, [3, 1, 3, 1]), (100, [3, 1, 4])):
        batches = list(store.batches(batch_size))
        assert [len(batch) for batch in batches] == expected
        assert all(batch.dtype == torch.float32 for batch in batches)
        np.testing.assert_array_equal(torch.cat(batches).numpy(), rows.astype(np.float32))
    np.testing.assert_array_equal(torch.cat(list(store.shard_batches(2, 3))).numpy(), rows[4:].astype(np.float32))
    assert store.describe(4) == f"row 0 of {tmp_path / 'store' / '00003.npy'}"
    assert store.describe(2) == f"row 2 of {tmp_path / 'store' / '00000.npy'}"


def test_rows_that_do_not_exist_are_refused(tmp_path: Path, make_store) -> None:
    store = make_store(tmp_path / "store", [np.ones((3, 2), np.float32)])
    for index in (3, -1):
        with pytest.raises(IndexError):
            store.gather(np.array([0, index]))


def test_a_store_that_is_missing_unfinished_or_empty_is_refused(tmp_path: Path, make_store, refusal) -> None:
    folder = tmp_path / "store"
    with refusal(folder, "are missing", "run the command"):
        FeatureStore(folder, "the command")
    make_store(folder, [np.ones((2, 2))])
    (folder / "manifest.json").unlink()
    with refusal(folder, "are unfinished", "run the command"):
        FeatureStore(folder, "the command")
    with refusal(tmp_path / "empty", "no rows", "run a command"):
        make_store(tmp_path / "empty", [np.empty((0, 0))])


def test_the_unfinished_file_of_a_killed_process_is_not_a_shard(tmp_path: Path, make_store) -> None:
    store = make_store(tmp_path / "store", [np.ones((3, 2), np.float32)])
    np.save(store.folder / ".00000-x1y2z3.npy", np.zeros((3, 2), np.float32))
    assert len(FeatureStore(store.folder, "a command")) == 3
