"""The chunks of a run's classes against dense formulas in float64, one class at a time."""

import base64
import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

from dncbm.browser.classes import write_classes
from dncbm.browser.shown import CLASSES_PER_CHUNK, Kept, ShownRun
from dncbm.runs.declarations import ProbeRun, SAERun

N, F = 900, 60
EMPTY = 2
"""A class without images, where there are more than two."""


def made_up(n_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Strengths N x F, weights F x C with many zeros, and labels."""
    rng = np.random.default_rng(n_classes)
    z = (rng.exponential(size=(N, F)) * (rng.random((N, F)) < 0.2)).astype(np.float32)
    z[:, 5] = 0
    weight = (rng.normal(size=(F, n_classes)) * (rng.random((F, n_classes)) < 0.6)).astype(np.float32)
    labels = rng.integers(0, n_classes, N)
    if n_classes > EMPTY:
        labels[labels == EMPTY] = 0
    return z, weight, labels


def shown(z: np.ndarray, weight: np.ndarray | None, run: SAERun | None = None) -> ShownRun:
    probe = None if weight is None else ProbeRun("b")
    strengths = (None, scipy.sparse.csr_matrix(z))
    probed = None if weight is None else 1
    of = None if weight is None else torch.from_numpy(weight)
    return ShownRun(run or SAERun(), torch.zeros(F, 4), None, None, strengths, probe, of, probed)


def kept(labels: np.ndarray, n_classes: int) -> list[Kept]:
    classes = tuple(f"class {c}" for c in range(n_classes))
    return [
        Kept("a", np.arange(3), 3, np.zeros(3, np.int64), ("x",), None, ()),
        Kept("b", np.arange(N), N, labels, classes, None, ()),
    ]


def read(path: Path) -> dict[str, Any]:
    raw = gzip.decompress(base64.b64decode(path.read_text().split('"')[3]))
    end = 4 + int.from_bytes(raw[:4], "little")
    start = -(-end // 4) * 4

    def array(value: dict[str, Any]) -> Any:
        if "$" not in value:
            return value
        dtype, offset, count, width = value["$"]
        found = np.frombuffer(raw, dtype, count, start + offset)
        return found if width is None else found.reshape(-1, width)

    found: dict[str, Any] = json.loads(raw[4:end], object_hook=array)
    return found


def of_classes(data: Path, n_classes: int) -> dict[str, np.ndarray]:
    parts = [read(data / "3" / f"class_{k}.js") for k in range(-(-n_classes // CLASSES_PER_CHUNK))]
    assert not (data / "3" / f"class_{len(parts)}.js").exists()
    assert {len(part["images"]) for part in parts[:-1]} <= {CLASSES_PER_CHUNK}
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def largest(values: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The n largest positive values and their places, filled with -1 and 0."""
    order = [int(f) for f in np.argsort(-values, kind="stable") if values[f] > 0][:n]
    fill = n - len(order)
    return np.array([*order, *[-1] * fill]), np.array([*values[order], *[0.0] * fill])


@pytest.mark.parametrize("n_classes", [1, 2, 5, 16, 20])
def test_classes_are_those_of_dense_formulas(tmp_path: Path, n_classes: int) -> None:
    z, weight, labels = made_up(n_classes)
    n_leading = write_classes(shown(z, weight), kept(labels, n_classes), tmp_path, 3)
    assert n_leading is not None
    assert n_leading.dtype == np.int32
    details, classes, predictions = (
        of_classes(tmp_path, n_classes), read(tmp_path / "3/classes.js"), read(tmp_path / "3/predictions.js"),
    )  # fmt: skip
    z, weight = z.astype(np.float64), weight.astype(np.float64)
    logits = z @ weight
    predicted = logits.argmax(axis=1)
    np.testing.assert_array_equal(predictions["predicted"], predicted)
    used = np.zeros(F, int)
    for c in range(n_classes):
        rows = np.flatnonzero(labels == c)
        assert classes["size"][c] == len(rows)
        assert classes["right"][c] == (predicted[rows] == c).sum()
        mean = (z[rows] * weight[:, c]).mean(axis=0) if len(rows) else np.zeros(F)
        most, values = largest(mean, 20)
        least, negative = largest(-mean, 8)
        np.testing.assert_array_equal(details["concepts"][c], most)
        np.testing.assert_allclose(details["contributions"][c], values, rtol=1e-5)
        np.testing.assert_allclose(details["weights"][c], np.where(most >= 0, weight[most, c], 0))
        np.testing.assert_array_equal(details["against"][c], least)
        np.testing.assert_allclose(details["against_contributions"][c], -negative, rtol=1e-5)
        np.testing.assert_allclose(details["against_weights"][c], np.where(least >= 0, weight[least, c], 0))
        others = np.setdiff1d(np.arange(F), [*most, *least])
        np.testing.assert_allclose(details["remaining"][c], mean[others].sum(), atol=1e-5)
        assert details["n_remaining"][c] == np.count_nonzero(mean[others])
        if len(rows):
            np.testing.assert_allclose(classes["mean_logit"][c], logits[rows, c].mean(), rtol=1e-5)
        else:
            assert np.isnan(classes["mean_logit"][c])
        used[most[:10][most[:10] >= 0]] += 1
        check_drawn(details["images"][c], rows, 24)
        check_confusions({key: value[c] for key, value in details.items()}, c, z, weight, labels, predicted)
    np.testing.assert_array_equal(n_leading, used)


def check_drawn(images: np.ndarray, rows: np.ndarray, n: int) -> None:
    """Images are n of some rows, or all, ascending, and then -1."""
    assert len(images) == n
    found = images[: min(n, len(rows))]
    assert set(found) <= set(rows)
    assert (np.diff(found) > 0).all()
    assert (images[len(found) :] == -1).all()


def check_confusions(
    details: dict[str, np.ndarray], a: int, z: np.ndarray, weight: np.ndarray, labels: np.ndarray, predicted: np.ndarray
) -> None:
    counts = Counter(predicted[(labels == a) & (predicted != a)].tolist())
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:6]
    fill = 6 - len(most)
    assert details["confused"].tolist() == [b for b, _ in most] + [-1] * fill
    assert details["confused_count"].tolist() == [n for _, n in most] + [0] * fill
    parts = [details[f"confused_{what}"].reshape(6, 6) for what in ("concepts", "values", "images")]
    for place, (concepts, values, images) in enumerate(zip(*parts, strict=True)):
        rows = np.flatnonzero((labels == a) & (predicted == most[place][0])) if place < len(most) else np.array([], int)
        speaks = (z[rows] * (weight[:, most[place][0]] - weight[:, a])).mean(axis=0) if len(rows) else np.zeros(F)
        behind, expected = largest(speaks, 6)
        np.testing.assert_array_equal(concepts, behind)
        np.testing.assert_allclose(values, expected, rtol=1e-4)
        check_drawn(images, rows, 6)


def test_images_are_drawn_by_the_runs_seed(tmp_path: Path) -> None:
    z, weight, labels = made_up(5)
    drawn = []
    for number, seed in enumerate((49, 49, 50)):
        run = SAERun(training=replace(SAERun().training, seed=seed))
        write_classes(shown(z, weight, run), kept(labels, 5), tmp_path / str(number), 3)
        drawn.append(of_classes(tmp_path / str(number), 5))
    for key in ("images", "confused_images"):
        np.testing.assert_array_equal(drawn[0][key], drawn[1][key])
        assert (drawn[0][key] != drawn[2][key]).any()
    assert drawn[0]["images"][0].tolist() != np.flatnonzero(labels == 0)[:24].tolist()


def test_without_a_probe_there_are_no_classes(tmp_path: Path) -> None:
    z, _, labels = made_up(5)
    assert write_classes(shown(z, None), kept(labels, 5), tmp_path, 3) is None
    assert not list(tmp_path.iterdir())
