"""The figure of the accuracies at NEC: whatever data sets and encoders are called, it is drawn, whole and without a word."""

import warnings
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from dncbm.explain.plotting import nec_curve as draw_nec
from dncbm.explain.plotting.fonts import quiet
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import ProbeDataset, SAERun
from dncbm.runs.manifests import Outcome

NAMES = ["a$b$c^d", "back\\slash_{x}", "鳥, 狗", "\U0001f9ff", "b\udcffd", "openclip:" + "long/" * 20 + "model", "a" * 90]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_a_title(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    figures: list[Figure] = []
    real = draw_nec.Figure
    monkeypatch.setattr(draw_nec, "Figure", lambda **kwargs: figures.append(real(**kwargs)) or figures[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_nec.nec_curve([5, 10], {"concepts": [0.5, 0.75]}, f"mine, {name}", tmp_path / "nec.png")
    (figure,) = figures
    (axes,) = figure.axes
    assert axes.get_xlabel() == "non-zero weights per class (NEC)"
    with quiet():
        box = axes.title.get_window_extent()
    with Image.open(tmp_path / "nec.png") as image:
        assert 0 <= box.x0 < box.x1 <= image.width
    assert axes.get_title().startswith("mine,")
    assert "$" not in name or "$b$" in axes.get_title()


@pytest.mark.parametrize(
    ("outcome", "exists", "drawn"),
    [(Outcome.RAN, True, 1), (Outcome.ALREADY_DONE, True, 0), (Outcome.ALREADY_DONE, False, 1), (Outcome.STOPPED, False, 0)],
    ids=str,
)
def test_the_figure_is_drawn_of_finished_accuracies_alone(
    make_settings, monkeypatch: pytest.MonkeyPatch, outcome: Outcome, exists: bool, drawn: int
) -> None:
    settings, run, images = make_settings(), SAERun(encoder="enc"), ProbeDataset("mine")
    if exists:
        figure = Artifacts(settings).nec_figure(run, "mine")
        figure.parent.mkdir(parents=True)
        figure.touch()
    calls: list[object] = []
    monkeypatch.setattr(draw_nec, "accuracy_at_nec", lambda *_, **__: outcome)
    monkeypatch.setattr(draw_nec, "draw_nec", lambda *_: calls.append(1))
    assert draw_nec.accuracy_and_figure(settings, run, images, device="cpu") is outcome
    assert len(calls) == drawn
