import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dncbm.features.store import FeatureStore
from dncbm.runs.errors import StaleArtifact, UserError
from dncbm.runs.manifests import making


@given(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any), half=st.booleans(), data=st.data())
def test_gather_is_plain_indexing(tmp_path_factory, make_store, sizes: list[int], half: bool, data: st.DataObject) -> None:
    dtype = np.float16 if half else np.float32
    rows = np.random.default_rng(sum(sizes)).normal(size=(sum(sizes), 3)).astype(dtype)
    shards = np.split(rows, np.cumsum(sizes)[:-1])
    store = make_store(tmp_path_factory.mktemp("store"), shards)
    row = st.integers(0, len(rows) - 1)
    run = st.tuples(row, row).map(lambda ends: list(range(min(ends), max(ends) + 1)))
    indices = np.array(data.draw(st.lists(row, max_size=20) | run), dtype=np.int64)
    gathered = store.gather(indices)
    assert gathered.dtype == torch.float32
    np.testing.assert_array_equal(gathered.numpy(), rows[indices].astype(np.float32))
    np.testing.assert_array_equal(store.gather_stored(indices).numpy(), rows[indices], strict=True)


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
    mixed = make_store(tmp_path / "mixed", [rows[:3], rows[3:].astype(np.float32)])
    assert mixed.gather_stored(np.arange(8)).dtype == torch.float32
    np.testing.assert_array_equal(mixed.gather_stored(np.arange(8)).numpy(), rows)
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
    make_store(folder, [np.ones((2, 2), np.float32)])
    (folder / "manifest.json").unlink()
    with refusal(folder, "are unfinished", "run the command"):
        FeatureStore(folder, "the command")
    with refusal(tmp_path / "empty", "no rows", "run a command"):
        make_store(tmp_path / "empty", [np.empty((0, 0), np.float32)])


def test_the_unfinished_file_of_a_killed_process_is_not_a_shard(tmp_path: Path, make_store) -> None:
    store = make_store(tmp_path / "store", [np.ones((3, 2), np.float32)])
    np.save(store.folder / ".00000-x1y2z3.npy", np.zeros((3, 2), np.float32))
    assert len(FeatureStore(store.folder, "a command")) == 3


def test_shards_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Six digits sort before five."""
    with making(tmp_path / "store", "features by hand", {}, {}, overwrite=True) as work:
        for number in (99_999, 100_000):
            np.save(tmp_path / f"store/{number}.npy", np.full((1, 2), number, np.float32))
            np.save(tmp_path / f"store/{number}.keys.npy", np.array([number]))
        work.done((tmp_path / "store").glob("*.npy"))
    assert FeatureStore(tmp_path / "store", "a command").keys.tolist() == [99_999, 100_000]


def array(path: Path, content: object, **options: object) -> None:
    np.save(path, content, **options)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "cut off in the header": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "reversed": lambda path: path.write_bytes(path.read_bytes()[::-1]),
    "text": lambda path: path.write_text("<html>"),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "another type": lambda path: array(path, np.ones((4, 3))),
    "one dimension": lambda path: array(path, np.ones(12, np.float32)),
    "no dimension": lambda path: array(path, np.float32(1)),
    "another width": lambda path: array(path, np.ones((4, 2), np.float32)),
    "fewer rows": lambda path: array(path, np.ones((3, 3), np.float32)),
    "pickled": lambda path: array(path, np.array([{}, {}, {}, {}], dtype=object), allow_pickle=True),
    "an archive": lambda path: np.savez(path.open("wb"), a=np.ones(3)),
    "a header that claims too much": lambda path: path.write_bytes(path.read_bytes().replace(b"(4,", b"(9,", 1)),
}


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("name", ["00001.npy", "00001.keys.npy"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_one_line(
    tmp_path: Path, make_store, damage: Callable[[Path], object], name: str, is_known: bool
) -> None:
    """Whether or not its size agrees with the manifest."""
    rows = np.ones((4, 3), np.float32)
    folder = make_store(tmp_path / "store", [rows, rows]).folder
    path = folder / name
    damage(path)
    if is_known and path.is_file():
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["outputs"][name]["bytes"] = path.stat().st_size
        (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as caught:
        FeatureStore(folder, "a command")
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder / "00001.") in message
    assert "overwrite" in message


def test_a_foreign_or_deleted_shard_is_not_read(tmp_path: Path, make_store) -> None:
    rows = np.ones((4, 3), np.float32)
    folder = make_store(tmp_path / "store", [rows, rows, rows]).folder
    for suffix in (".npy", ".keys.npy"):
        (folder / f"00003{suffix}").write_bytes((folder / f"00002{suffix}").read_bytes())
    with pytest.raises(StaleArtifact, match=r"00003.*\.npy has changed"):
        FeatureStore(folder, "a command")
    for number in (2, 3):
        for suffix in (".npy", ".keys.npy"):
            (folder / f"0000{number}{suffix}").unlink()
    with pytest.raises(UserError, match=r"00002.*\.npy is missing"):
        FeatureStore(folder, "a command")
