"""The figure of the trade-offs: what is filled and what is not, and that any names and any number of SAEs fit."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dncbm.explain.plotting import trade_offs as drawing
from dncbm.explain.plotting.fonts import quiet
from dncbm.probe.comparison import ComparedSAE, Value
from dncbm.runs.declarations import SAERun
from sparse_autoencoder import BatchTopK, ReLU, TopK
from sparse_autoencoder.declare import values

NAMES = ["cifar10", "a$b$c^d", "_under", "鳥, 狗", "b\udcffd", "openclip:" + "long/" * 20 + "model", "a" * 90]
SPARSITIES = [ReLU(), TopK(8), BatchTopK(8)]


def rows(n: int, encoders: list[str], datasets: list[str], **fixed: Value) -> list[ComparedSAE]:
    """Made-up SAEs."""
    rng = np.random.default_rng(n)
    found = []
    for number in range(n):
        run = SAERun(encoder=encoders[number % len(encoders)], sparsity=SPARSITIES[number % 3])
        l0 = float(10 ** rng.uniform(0, 2.5))
        row: dict[str, Value] = {**values(run), "l0": l0, "explained_variance": float(rng.uniform(0.2, 1))}
        row |= {f"train_val_top1:{dataset}": float(rng.uniform(0, 1)) for dataset in datasets}
        found.append(ComparedSAE(Path(str(number)), run, row | fixed, tuple(datasets)))
    return found


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[ComparedSAE]], Figure]:
    """Draws a figure without a warning, and checks that the whole of its legends is in the file."""

    def drawn(compared: list[ComparedSAE]) -> Figure:
        figures: list[Figure] = []
        monkeypatch.setattr(drawing, "Figure", lambda **kwargs: figures.append(Figure(**kwargs)) or figures[-1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            drawing.trade_offs(compared, tmp_path / "figure.png")
        (figure,) = figures
        with Image.open(tmp_path / "figure.png") as image, quiet():
            for legend in [axes.get_legend() for axes in figure.axes if axes.get_legend()]:
                box = legend.get_window_extent()
                assert 0 <= box.x0 < box.x1 <= image.width
                assert 0 <= box.y0 < box.y1 <= image.height
        return figure

    return drawn


def points(figure: Figure, panel: int) -> dict[tuple[float, float], bool]:
    """Position of each marker -> whether it is filled."""
    found = {}
    for line in figure.axes[panel].lines:
        if line.get_linestyle() == "None":
            for x, y in zip(*line.get_data(), strict=True):
                found[round(float(x), 6), round(float(y), 6)] = line.get_markerfacecolor() != "none"
    return found


@pytest.mark.parametrize("n", [1, 6, 200])
def test_the_front_is_filled(draw, n: int) -> None:
    compared = rows(n, ["enc"], ["mine"])
    figure = draw(compared)
    for panel, (column, factor) in enumerate([("explained_variance", 1), ("train_val_top1:mine", 100)]):
        at = [(round(row.number("l0"), 6), round(factor * row.number(column), 6)) for row in compared]
        expected = {(x, y): not any(a <= x and b >= y and (a, b) != (x, y) for a, b in at) for x, y in at}
        assert points(figure, panel) == expected
        (line,) = [line for line in figure.axes[panel].lines if line.get_linestyle() == "-"]
        corners = [(round(float(x), 6), round(float(y), 6)) for x, y in zip(*line.get_data(), strict=True)]
        assert corners == sorted(point for point, filled in expected.items() if filled)


def test_what_cannot_be_drawn_is_left_out(draw) -> None:
    """An L0 of 0 has no place on the axis; blanks have none either."""
    for fixed in ({"l0": 0.0}, {"l0": None}, {"explained_variance": None}, {"explained_variance": -2.0}):
        figure = draw(rows(3, ["enc"], [], **fixed))
        assert points(figure, 0) == points(figure, 1) == {}
        assert [axes.texts[0].get_text() for axes in figure.axes] == ["not measured"] * 2


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_in_the_legend(draw, name: str) -> None:
    figure = draw(rows(8, [name, "enc"], [name, "other"]))
    shown = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert len(shown) == len([text for text in shown if text]) == 1 + 4 + 3, "the front, the series, the kinds"
    assert sum(text.startswith(name[:5].replace("\udcff", "\ufffd")) for text in shown) == 2
    assert all(not text.get_parse_math() for text in figure.axes[1].get_legend().get_texts())


def test_many_series_share_a_grey(draw) -> None:
    figure = draw(rows(30, [f"enc{number}" for number in range(5)], ["a", "b"]))
    shown = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert len(shown) == 1 + 6 + 1 + 3
    assert "4 others" in shown
    heights = [one.axes[1].get_window_extent().height for one in (figure, draw(rows(3, ["enc"], ["a"])))]
    assert heights[0] > 0.9 * heights[1], "the legend takes its room from below the panel"
