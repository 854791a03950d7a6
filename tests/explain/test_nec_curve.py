"""The figure of the accuracies at NEC and NCC: whatever data sets and encoders are called, it is drawn, and in silence."""

import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from dncbm.explain.plotting import compact_curve
from dncbm.explain.plotting import nec_curve as draw_nec
from dncbm.explain.plotting.fonts import quiet
from dncbm.probe.nec_seeds import Banded
from dncbm.probe.nec_table import INPUTS, MAJORITY, MEASURES, Point
from dncbm.runs.declarations import Compact, ProbeDataset, SAERun
from dncbm.runs.manifests import Outcome

NAMES = ["a$b$c^d", "back\\slash_{x}", "鳥, 狗", "\U0001f9ff", "b\udcffd", "openclip:" + "long/" * 20 + "model", "a" * 90]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_a_title(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    figures: list[Figure] = []
    real = draw_nec.Figure
    monkeypatch.setattr(draw_nec, "Figure", lambda **kwargs: figures.append(real(**kwargs)) or figures[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        points = [Point("concepts", "nec", target, val_top1=top1) for target, top1 in ((5, 0.5), (10, 0.75))]
        draw_nec.nec_curve(points, f"mine, {name}", tmp_path / "nec.png")
    (figure,) = figures
    (axes,) = figure.axes
    assert axes.get_xlabel() == "non-zero weights per class (NEC)"
    with quiet():
        box = axes.title.get_window_extent()
    with Image.open(tmp_path / "nec.png") as image:
        assert 0 <= box.x0 < box.x1 <= image.width
    assert axes.get_title().startswith("mine,")
    assert "$" not in name or "$b$" in axes.get_title()


def table(*, kinds: tuple[str, ...] = INPUTS) -> list[Point]:
    """Every kind at its own height, with a band of four points."""
    points = []
    for place, on in enumerate(kinds, start=1):
        for measure in MEASURES:
            for target in (5, 10, None):
                top1 = place / 10
                points.append(Point(on, measure, target, val_top1=top1, val_low=top1 - 0.02, val_high=top1 + 0.02))
    return [*points, Point(MAJORITY, val_top1=0.05, val_low=0.04, val_high=0.06)]


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Draws points and returns the figure."""

    def draw(points: list[Point], title: str = "mine, enc", note: str = "") -> Figure:
        figures: list[Figure] = []
        real = Figure
        monkeypatch.setattr(draw_nec, "Figure", lambda **kwargs: figures.append(real(**kwargs)) or figures[-1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw_nec.nec_curve(points, title, tmp_path / "nec.png", note)
        return figures[0]

    return draw


def test_every_kind_of_inputs_has_its_curve_and_band(drawn) -> None:
    """In each panel; no two have the same colour and dashes, and the legend tells them apart and says what bands are."""
    figure = drawn(table(), note="bands: some interval")
    assert [axes.get_xlabel() for axes in figure.axes] == list(draw_nec.AXES.values())
    for axes in figure.axes:
        *curves, majority = axes.lines
        assert [line.get_ydata()[0] for line in curves] == pytest.approx([10 * place for place in range(1, 7)])
        assert majority.get_ydata()[0] == pytest.approx(5)
        assert len({(line.get_color(), line.get_linestyle()) for line in curves}) == len(curves)
        assert len({line.get_marker() for line in curves}) == len(curves)
        for place, band in enumerate(axes.collections, start=1):
            heights = [y for path in band.get_paths() for _, y in path.vertices]
            assert (min(heights), max(heights)) == pytest.approx((10 * place - 2, 10 * place + 2))
        assert len(axes.collections) == len(INPUTS)
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == [*(draw_nec.STYLES[on][0] for on in INPUTS), "commonest class"]
    assert legend.get_title().get_text() == "bands: some interval"


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_a_title_of_both_panels(drawn, tmp_path: Path, name: str) -> None:
    figure = drawn(table(), f"mine, {name}")
    with quiet():
        width = figure._suptitle.get_window_extent().width  # it is centred
    with Image.open(tmp_path / "nec.png") as image:
        assert 0 < width < image.width
    assert figure._suptitle.get_text().startswith("mine,")
    assert "$" not in name or "$b$" in figure._suptitle.get_text()


def test_named_concepts_that_are_all_concepts_are_drawn_once(drawn) -> None:
    points = table()
    same = [replace(point, on="named") for point in points if point.on == "concepts"]
    figure = drawn([point for point in points if point.on != "named"] + same)
    assert all(len(axes.lines) == len(INPUTS) for axes in figure.axes)  # one less, and the commonest class


def test_a_table_of_an_older_version_has_one_panel_without_bands(drawn) -> None:
    kinds = ("concepts", "features", "random")
    figure = drawn([Point(on, "nec", target, val_top1=0.5) for on in kinds for target in (5, 10)])
    (axes,) = figure.axes
    assert (len(axes.lines), len(axes.collections), figure.legends) == (3, 0, [])
    assert axes.get_title() == "mine, enc"


def test_the_printed_table_says_what_its_intervals_are() -> None:
    lines = draw_nec.accuracy_table(Banded(tuple(table()), (49,)), "mine").splitlines()
    assert re.split(" {2,}", lines[0]) == ["top-1 on val of mine, %", "NEC 5", "mean of 5 to 30", "NCC 5", "mean of 5 to 30"]
    assert lines[2].split() == ["named", "concepts", *["20.0", "[18.0,", "22.0]"] * 4]
    assert lines[len(INPUTS) + 1].split() == ["commonest", "class", "5.0", "[4.0,", "6.0]"]
    assert lines[-1] == "in brackets: 95 % interval over draws of the images"
    of_seeds = {
        (): "mean over seeds 49, 50, 51; in brackets: 95 % interval of the mean (t), for raw features over",
        (49, 50, 51): "mean over seeds 49, 50, 51; in brackets: 95 % interval of the mean (t), for raw features over",
        (49, 51): "mean over seeds 49, 50, 51 (named concepts: 49, 51); in brackets: 95 % interval of the mean (t), for raw f",
        (
            50,
        ): "mean over seeds 49, 50, 51 (named concepts: 50); in brackets: 95 % interval of the mean (t), for raw features and "
        "named concepts over",
    }
    for named, expected in of_seeds.items():
        seeds = draw_nec.accuracy_table(Banded(tuple(table()), (49, 50, 51), named), "mine").splitlines()
        assert seeds[-1].startswith(expected)
        assert seeds[-1].endswith("draws of the images")
    firing = [replace(point, firing=7 if point.target and point.on == "untrained" else None) for point in table()]
    lines = draw_nec.accuracy_table(Banded(tuple(firing), (49,)), "mine").splitlines()
    assert lines[0].endswith("inputs that fire")
    assert [line.split()[-1] for line in lines if line.startswith("untrained")] == ["7"]
    old = [Point("concepts", "nec", target, val_top1=0.5) for target in (5, None)]
    assert [line.split()[-1] for line in draw_nec.accuracy_table(Banded(tuple(old), (49,)), "mine").splitlines()[1:]] == [
        "50.0"
    ]


@pytest.mark.parametrize(
    ("outcome", "of_compact", "expected"),
    [
        (Outcome.RAN, Outcome.ALREADY_DONE, Outcome.RAN),
        (Outcome.ALREADY_DONE, Outcome.RAN, Outcome.RAN),
        (Outcome.RAN, Outcome.STOPPED, Outcome.STOPPED),
        (Outcome.STOPPED, None, Outcome.STOPPED),
    ],
    ids=str,
)
def test_a_compact_bottleneck_follows_where_it_is_asked_for(
    make_settings, monkeypatch: pytest.MonkeyPatch, outcome: Outcome, of_compact: Outcome | None, expected: Outcome
) -> None:
    settings, run, images, asked = make_settings(), SAERun(encoder="enc"), ProbeDataset("mine"), list[object]()
    monkeypatch.setattr(draw_nec, "accuracy_at_nec", lambda *_, **__: outcome)
    monkeypatch.setattr(draw_nec, "draw_nec", lambda *_: None)

    def compacted(*given: object, **options: object) -> Outcome:
        asked.append((given, options))
        assert of_compact is not None, "stopped before"
        return of_compact

    monkeypatch.setattr(compact_curve, "compact_and_figure", compacted)
    compact = Compact(max_concepts=7)
    assert draw_nec.accuracy_and_figure(settings, run, images, compact, device="cpu") is expected
    if of_compact is not None:
        assert asked == [((settings, run, images, compact), {"device": "cpu", "overwrite": False})]


@pytest.mark.parametrize(("outcome", "drawn"), [(Outcome.RAN, 1), (Outcome.ALREADY_DONE, 1), (Outcome.STOPPED, 0)], ids=str)
def test_the_figure_is_drawn_of_finished_accuracies_alone(
    make_settings, monkeypatch: pytest.MonkeyPatch, outcome: Outcome, drawn: int
) -> None:
    """Also if nothing was measured: it shows all seeds, and another may have been measured since."""
    settings, run, images = make_settings(), SAERun(encoder="enc"), ProbeDataset("mine")
    calls: list[object] = []
    monkeypatch.setattr(draw_nec, "accuracy_at_nec", lambda *_, **__: outcome)
    monkeypatch.setattr(draw_nec, "draw_nec", lambda *_: calls.append(1))
    assert draw_nec.accuracy_and_figure(settings, run, images, device="cpu") is outcome
    assert len(calls) == drawn
