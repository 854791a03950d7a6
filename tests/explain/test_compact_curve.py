"""The figure of accuracies with few concepts: what it shows, whatever data sets are called, and when it is drawn."""

import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dncbm.explain.plotting import compact_curve as drawing
from dncbm.explain.plotting.fonts import quiet
from dncbm.probe.compact import DRAWS, CompactCurve, CompactPoint, sizes_up_to
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Compact, ProbeDataset, SAERun
from dncbm.runs.manifests import Outcome


def curve_of(n: int) -> CompactCurve:
    """With chosen concepts 10 % better than random ones on average, whose draws differ."""
    points = [CompactPoint("all", n + 300, 0, n, 5.0, 0.9, 0.8)]
    for size in sizes_up_to(n):
        top1 = 0.6 * size / n + 0.1
        points.append(CompactPoint("chosen", size, 0, size, 2.0, 0.5, top1))
        points += [CompactPoint("random", size, draw, size, 2.0, 0.4, top1 - 0.1 + 0.01 * draw) for draw in range(DRAWS)]
    return CompactCurve(tuple(points), tuple(range(n)))


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Draws a curve; returns the figure and the size of the PNG. A warning fails."""
    figures: list[Figure] = []
    real = drawing.Figure
    monkeypatch.setattr(drawing, "Figure", lambda **kwargs: figures.append(real(**kwargs)) or figures[-1])

    def draw(curve: CompactCurve, title: str = "mine, enc") -> tuple[Figure, tuple[int, int]]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            drawing.compact_curve(curve, title, tmp_path / "compact.png")
        with Image.open(tmp_path / "compact.png") as image:
            return figures[-1], image.size

    return draw


def test_the_curves_are_the_accuracies_on_val(draw) -> None:
    curve = curve_of(100)
    (axes,) = draw(curve)[0].axes
    whole, chosen, random = axes.get_lines()
    assert list(whole.get_ydata()) == [80, 80]
    assert whole.get_linestyle() == "--"
    sizes = [1, 2, 4, 8, 16, 32, 64, 100]
    assert list(chosen.get_xdata()) == list(random.get_xdata()) == sizes
    np.testing.assert_allclose(chosen.get_ydata(), [100 * point.val_top1 for point in curve.chosen])
    draws = np.array([[100 * p.val_top1 for p in curve.points if (p.kind, p.size) == ("random", size)] for size in sizes])
    np.testing.assert_allclose(random.get_ydata(), draws.mean(axis=1))
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    np.testing.assert_allclose(corners[:, 1].min(), (draws.mean(axis=1) - draws.std(axis=1, ddof=1)).min())
    np.testing.assert_allclose(corners[:, 1].max(), (draws.mean(axis=1) + draws.std(axis=1, ddof=1)).max())


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 364, 545, 8192, 65535, 100_000])
def test_sizes_at_the_axis_do_not_overlap_and_the_largest_is_there(draw, n: int) -> None:
    figure, (width, height) = draw(curve_of(n))
    (axes,) = figure.axes
    labels = [label for label in axes.get_xticklabels() if label.get_text()]
    assert labels[-1].get_text() == str(n)
    boxes = [label.get_window_extent() for label in labels]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    (legend,) = figure.legends
    for box in (legend.get_window_extent(), axes.title.get_window_extent()):
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height
    assert legend.get_window_extent().y1 <= axes.xaxis.label.get_window_extent().y0 + 2


@pytest.mark.parametrize("name", ["a$b$c^d", "back\\slash_{x}", "鳥, 狗", "b\udcffd", "openclip:" + "long/" * 20, "a" * 90])
def test_any_name_is_a_title(draw, name: str) -> None:
    figure, (width, _) = draw(curve_of(4), f"mine, {name}")
    (axes,) = figure.axes
    with quiet():
        box = axes.title.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= width
    assert axes.get_title().startswith("mine,")
    assert "$" not in name or "$b$" in axes.get_title()


@pytest.mark.parametrize(
    ("outcome", "exists", "drawn", "listed"),
    [
        (Outcome.RAN, True, 1, [True]),
        (Outcome.ALREADY_DONE, True, 0, [False]),
        (Outcome.ALREADY_DONE, False, 1, [False]),
        (Outcome.STOPPED, False, 0, []),
    ],
    ids=str,
)
def test_figure_and_list_are_of_finished_accuracies_alone(
    make_settings, monkeypatch: pytest.MonkeyPatch, outcome: Outcome, exists: bool, drawn: int, listed: list[bool]
) -> None:
    settings, run, images = make_settings(), SAERun(encoder="enc"), ProbeDataset("mine")
    if exists:
        figure = Artifacts(settings).compact_figure(run, "mine")
        figure.parent.mkdir(parents=True)
        figure.touch()
    calls: list[object] = []
    lists: list[bool] = []
    monkeypatch.setattr(drawing, "measure_compact", lambda *_, **__: outcome)
    monkeypatch.setattr(drawing, "read_compact", lambda *_: curve_of(4))
    monkeypatch.setattr(drawing, "compact_curve", lambda *_: calls.append(1))
    monkeypatch.setattr(drawing, "write_concepts", lambda *_, is_new: lists.append(is_new))
    assert drawing.compact_and_figure(settings, run, images, Compact(4), device="cpu") is outcome
    assert len(calls) == drawn
    assert lists == listed, "only new accuracies have another list beside one that was edited"
