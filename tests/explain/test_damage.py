"""Damaged dumps: every file of every kind, damaged in several ways and read by every stage that reads it.

Each is refused in one line that names the file, or made again with --overwrite; none is used as if it were whole.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dncbm.explain.dumps import global_explanations, local_explanations, meta_clusters, task_agnosticity
from dncbm.explain.dumps.dump import Dump
from dncbm.explain.plotting import global_explanations as draw_global
from dncbm.explain.plotting import local_explanations as draw_local
from dncbm.explain.plotting import meta_clusters as draw_clusters
from dncbm.explain.plotting import task_agnosticity as draw_latents
from dncbm.explain.plotting.canvas import Canvas
from dncbm.runs.declarations import Clusters, Drawing, Explained, ProbeDataset, Ranking
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import file_hash, manifest_path

pytestmark = pytest.mark.slow

KINDS = {
    local_explanations: draw_local, global_explanations: draw_global, meta_clusters: draw_clusters,
    task_agnosticity: draw_latents,
}  # fmt: skip
KIND = pytest.mark.parametrize("module", KINDS, ids=lambda module: module.KIND.name)
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[: len(content) // 2],
    "reversed": lambda content: content[::-1],
    "zeros": lambda content: bytes(len(content)),
    "an HTML page": lambda content: b"<!DOCTYPE html><title>Not found</title>",
    "another JSON": lambda content: b'{"a": [1]}',
    "a list": lambda content: b"[3]",
    "deep": lambda content: b"[" * 100_000,
}


@pytest.fixture(autouse=True)
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are read, but nothing is painted, and no file waits for the disk."""
    monkeypatch.setattr(Canvas, "save", lambda *_: None)
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def plot(world) -> Callable[[Any], None]:
    """plot(module) draws everything that was chosen."""
    given = (world.run, world.probe, ProbeDataset("places365"), Explained("val"), Clusters(4), Drawing(workers=1), Ranking())

    def draw(module: Any) -> None:
        of = {type(one): one for one in given}
        stage = KINDS[module].PLOT
        stage.function(world.settings, *(of.get(cls) or cls() for cls in stage.takes))

    return draw


def refused(read: Callable[[], object], *parts: object) -> None:
    """It raises one line for the user, which has these parts."""
    with pytest.raises(UserError) as caught:
        read()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert str(part) in str(caught.value)


@KIND
def test_damaged_files(module: Any, dumped, plot) -> None:
    """Of any size: the recorded one too, where only the content tells."""
    files = dumped(module, limit=1).files
    thumbnail = next(files.dump.rglob("*.jpg"))
    for path in (files.numbers, files.about, files.chosen, manifest_path(files.dump), thumbnail):
        for name, damage in DAMAGES.items():
            whole = path.read_bytes()
            damaged = damage(whole)
            for content in {damaged, damaged[: len(whole)].ljust(len(whole))}:
                path.write_bytes(content)
                refused(lambda: plot(module), path)
                if path != thumbnail:  # which only the plot reads
                    refused(lambda: dumped(module, limit=1), path, "--overwrite")
            dumped(module, limit=1, overwrite=True)
            assert path.stat().st_size > len(whole) / 2, name
        plot(module)
        path.unlink()
        if path not in (manifest_path(files.dump), files.chosen):
            refused(lambda: plot(module), path.name)
        dumped(module, limit=1)
        plot(module)


def changes(numbers: dict[str, np.ndarray]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Numbers that are no numbers of a dump, each with what is wrong."""
    for name, array in numbers.items():
        yield f"no {name}", {key: value for key, value in numbers.items() if key != name}
        yield f"{name} is short", numbers | {name: array[:-1]}
        yield f"{name} is a column", numbers | {name: array[..., None]}
        yield f"{name} is text", numbers | {name: array.astype(str)}
        if array.dtype.kind == "i":
            yield f"{name} has fractions", numbers | {name: array.astype(float)}
            yield f"{name} is negative", numbers | {name: np.full_like(array, -2)}
        else:
            for bad in (np.nan, np.inf):
                changed = array.copy()
                changed.flat[-1] = bad
                yield f"{name} has {bad}", numbers | {name: changed}
        if name in ("concepts", "strength_concepts", "class_number", "true_class", "predicted_class", "order"):
            yield f"{name} is out of range", numbers | {name: np.where(array == array.max(), 14, array)}
        if name.startswith("ends_"):
            yield f"{name} falls", numbers | {name: array[::-1].copy()}
            yield f"{name} is out of range", numbers | {name: array + 1}


@KIND
def test_numbers_that_do_not_fit(module: Any, dumped, plot) -> None:
    """A foreign dump, whole by its manifest."""
    files = dumped(module, limit=2).files
    with np.load(files.numbers) as file:
        numbers = dict(file)
    n = 0
    for what, changed in changes(numbers):
        np.savez(files.numbers, **changed)
        record(files.dump, files.numbers)
        if module is task_agnosticity and what in ("order is short", "top_mine is short"):
            continue  # of any length, as far as the other arrays allow
        refused(lambda: plot(module), files.numbers)
        refused(lambda: dumped(module, limit=2), files.numbers, "--overwrite")
        n += 1
    assert n > 20
    dumped(module, limit=2, overwrite=True)
    plot(module)
    np.testing.assert_equal(Dump(files).numbers, numbers)


def record(folder: Path, path: Path) -> None:
    """Let the manifest know a file as it is now."""
    manifest = json.loads(manifest_path(folder).read_text())
    manifest["outputs"][path.name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    manifest_path(folder).write_text(json.dumps(manifest))


@KIND
def test_texts_that_do_not_fit(module: Any, dumped, plot) -> None:
    files = dumped(module, limit=2).files
    about = json.loads(files.about.read_text())
    for key in ("labels", "names", "split", "encoder", "sae", *module.KIND.texts):
        value = about[key]
        others = [None, 3, {}] + ([value[:-1], [*value[:-1], 3]] if isinstance(value, list) else [["a"]])
        for other in ["elsewhere", *others] if key in ("split", "labels") else others:
            files.about.write_text(json.dumps(about | {key: other}))
            record(files.dump, files.about)
            if key == "datasets" and isinstance(other, list) and other[-1] != 3:
                continue
            refused(lambda: plot(module), files.dump)
            refused(lambda: dumped(module, limit=2), files.dump, "--overwrite")
    dumped(module, limit=2, overwrite=True)
    plot(module)


@KIND
def test_choices_that_do_not_fit(module: Any, dumped, plot) -> None:
    files = dumped(module, limit=2).files
    for items in ([999], [-1], [True], ["3"], [0.0], 3, None):
        files.chosen.write_text(json.dumps({"items": items, "images": {}}))
        refused(lambda: plot(module), files.chosen, "--overwrite")
        refused(lambda: dumped(module, limit=2), files.chosen, "--overwrite")
    dumped(module, limit=2, overwrite=True)
    plot(module)


def test_damaged_clusterings(dumped, world) -> None:
    """Of the labels and of the state of an interrupted clustering."""
    expected = dumped(meta_clusters).numbers
    files = world.artifacts.meta_clusters(world.run, "places365", "val", 4)
    labels = np.load(files.cluster_labels)
    state = {"centres": np.zeros((4, 14), np.float32), "labels": labels, "iterations": np.array(3), "inertia": np.array(1.0)}
    bad_labels = [labels[:-1], labels + 4, labels - 1, labels.astype(float), labels[:, None]]
    bad_states = [
        state | {"centres": state["centres"][:3]}, state | {"centres": state["centres"] * np.nan},
        state | {"labels": labels - 1}, state | {"iterations": np.array(10**6)}, {"centres": state["centres"]},
        state | {"inertia": np.array("a")},
    ]  # fmt: skip
    kept = files.cluster_labels.read_bytes()

    def check(path: Path) -> None:
        files.numbers.unlink()
        refused(lambda: dumped(meta_clusters), path, "--overwrite")
        again = dumped(meta_clusters, overwrite=True)
        np.testing.assert_equal(again.numbers, expected)
        assert not files.cluster_state.exists()

    for damage in DAMAGES.values():
        for content in (damage(kept), damage(kept)[: len(kept)].ljust(len(kept))):
            files.cluster_labels.write_bytes(content)
            check(files.cluster_labels)
    for array in bad_labels:
        np.save(files.cluster_labels, array)
        record(files.clustering, files.cluster_labels)
        check(files.cluster_labels)

    def interrupt() -> None:
        (files.clustering / "manifest.json").rename(files.clustering / "manifest.unfinished")
        files.cluster_labels.unlink()

    for damage in DAMAGES.values():
        interrupt()
        files.cluster_state.write_bytes(damage(kept))
        check(files.cluster_state)
    for arrays in bad_states:
        interrupt()
        np.savez(files.cluster_state, **arrays)
        check(files.cluster_state)


def test_a_state_beside_a_finished_clustering_goes(dumped, world) -> None:
    """A process was killed between its manifest and the removal of its state."""
    files = dumped(meta_clusters).files
    files.cluster_state.write_bytes(b"")
    dumped(meta_clusters)
    assert not files.cluster_state.exists()
