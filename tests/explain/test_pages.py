"""Which pages a plot draws, keeps and removes, and its contact sheet."""

import json
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dncbm.explain.dumps import local_explanations
from dncbm.explain.dumps.dump import Dump
from dncbm.explain.plotting import pages
from dncbm.explain.plotting.canvas import Canvas
from dncbm.explain.plotting.local_explanations import PLOT
from dncbm.explain.plotting.local_explanations import draw as draw_local
from dncbm.runs.artifacts import ExplanationFolder
from dncbm.runs.declarations import Drawing, Explained, Selection

pytestmark = pytest.mark.slow


@pytest.fixture
def dump(dumped) -> Dump:
    """Of six images."""
    return dumped(local_explanations, limit=6)


@pytest.fixture
def files(dump: Dump) -> ExplanationFolder:
    return dump.files


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the pages as they are drawn, each as two tiny files, since drawing is tested elsewhere."""
    names: list[str] = []

    def save(self: Canvas, pdf: Path, png: Path, description: str) -> None:
        about = PngInfo()
        about.add_text("Description", description)
        pdf.parent.mkdir(exist_ok=True)
        pdf.write_bytes(b"%PDF")
        Image.new("RGB", (8, 8)).save(png, pnginfo=about)
        names.append(png.stem)

    monkeypatch.setattr(Canvas, "save", save)
    return names


@pytest.fixture
def draw(world, dump: Dump) -> Callable[..., list[str]]:
    """draw(selection, overwrite=..., ...) draws, and returns the names of all pages in the folder."""

    def draw(selection: Selection | None = None, *, overwrite: bool = False, **drawing) -> list[str]:
        how = Drawing(**{"workers": 1} | drawing)
        declared = (world.run, world.probe, Explained("val"), selection or Selection(), how)
        PLOT.function(world.settings, *declared, overwrite=overwrite)
        pdfs = sorted(path.stem for path in dump.files.figures.glob("image*.pdf"))
        assert pdfs == sorted(path.stem for path in dump.files.figures.glob("image*.png"))
        return pdfs

    return draw


def names(images: list[int]) -> list[str]:
    return [f"image_{image:06d}" for image in images]


def test_everything_chosen_is_drawn(dump: Dump, drawn, draw) -> None:
    assert draw() == names(sorted(dump.chosen))
    assert drawn == names(dump.chosen)
    suffixes = {path.suffix for path in dump.files.figures.iterdir()}
    assert suffixes == {".pdf", ".png", ".html"}


def test_a_page_is_drawn_once(files, drawn, draw, capsys) -> None:
    all_pages = draw()
    assert f"6 pages drawn: {files.figures}" in capsys.readouterr().out
    drawn.clear()
    draw()
    assert drawn == []
    assert "0 pages drawn, 6 already drawn" in capsys.readouterr().out
    files.page(all_pages[2], "pdf").unlink()
    files.page(all_pages[4], "png").write_bytes(b"damaged")
    draw()
    assert drawn == [all_pages[2], all_pages[4]]
    assert "2 pages drawn, 4 already drawn" in capsys.readouterr().out
    drawn.clear()
    draw(Selection(limit=1), overwrite=True)
    assert drawn == all_pages[:1]
    assert f"1 page drawn: {files.figures}" in capsys.readouterr().out


def test_a_page_is_drawn_again_when_it_would_change(drawn, draw, monkeypatch) -> None:
    draw()
    drawn.clear()
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/latex")
    draw(use_latex=True)
    assert len(drawn) == 6
    draw(use_latex=True)
    assert len(drawn) == 6
    monkeypatch.setattr(pages, "STYLE", 99)
    draw(use_latex=True)
    assert len(drawn) == 12


def test_a_page_is_drawn_again_when_it_shows_something_else(world, drawn, draw) -> None:
    draw()
    kind = local_explanations.KIND
    other = replace(kind, page=lambda *args: replace(kind.page(*args), predicted="another"))
    stage = pages.plot_stage(other, local_explanations.DUMP, draw_local, "a summary")
    stage.function(world.settings, world.run, world.probe, Explained("val"), Selection(limit=2), Drawing(workers=1))
    assert len(drawn) == 6 + 2


def test_processes_draw_the_same(world, dumped, draw, files, monkeypatch) -> None:
    """Whatever draws a page, its bytes are the same."""
    for image in files.dump.glob("images/*/*"):
        image.unlink()
    files.chosen.unlink()
    chosen = dumped(local_explanations, indices=(8, 2)).chosen
    assert draw() == names(sorted(chosen))
    one = {path: path.read_bytes() for path in files.figures.iterdir()}
    assert len(one) == 5
    monkeypatch.setattr(pages, "FEW", 1)
    draw(workers=2, overwrite=True)
    assert {path: path.read_bytes() for path in files.figures.iterdir()} == one
    with Image.open(files.page("image_000002", "png")) as image:
        assert image.width == 670


def test_only_the_dump_is_read(world, drawn, draw) -> None:
    for root in ("sae_dir", "probe_dir", "data_dir", "places", "vocab_dir"):
        shutil.rmtree(world.settings.path.parent / root, ignore_errors=True)
    assert len(draw()) == 6


@pytest.mark.parametrize(("limit", "places"), [(2, [0, 3]), (7, [0, 1, 2, 3, 4, 5])])
def test_a_limit_draws_some_of_what_was_chosen(dump: Dump, drawn, draw, limit: int, places: list[int]) -> None:
    draw(Selection(limit=limit))
    assert drawn == names([dump.chosen[place] for place in places])


def test_a_selection_draws_what_it_names(dump: Dump, dumped, drawn, draw, refusal) -> None:
    chosen = dump.chosen
    draw(Selection(indices=(chosen[4], chosen[1])))
    assert drawn == names([chosen[4], chosen[1]])
    other = next(int(key) for key in dump.numbers["image"] if key not in chosen)
    with refusal("1 of the 2", "images", other, "local_explanations_dump.py", "--indices"):
        draw(Selection(indices=(chosen[0], other)))
    for selection in ({"classes": ("coast",), "limit": 3}, {"concepts": ("dog",), "limit": 3}):
        wanted = Selection(**selection)
        with refusal("_dump.py", "--classes or --concepts"):
            draw(wanted)
        dumped(local_explanations, **selection)
        drawn.clear()
        draw(wanted, overwrite=True)
        assert drawn == names(local_explanations.KIND.items(dump, wanted))


def test_pages_of_an_earlier_dump_go(world, dump: Dump, dumped, drawn, draw, capsys) -> None:
    old = draw()
    world.save_strengths(world.z[::-1].copy(), world.keys)
    dumped(local_explanations, indices=(8,), overwrite=True)
    (dump.files.figures / "mine.png").write_bytes(b"not one of ours")
    assert draw() == ["image_000008"]
    assert "removed 6 pages of an earlier dump" in capsys.readouterr().out
    assert "image_000008" not in old
    assert (dump.files.figures / "mine.png").exists()


def test_damage_is_named(dump: Dump, files, draw, refusal) -> None:
    thumbnail = files.image("places365", dump.chosen[0])
    thumbnail.write_bytes(b"no image")
    with refusal(thumbnail, "_dump.py"):
        draw()
    thumbnail.unlink()
    with refusal(thumbnail):
        draw()
    for path in (files.numbers, files.about, files.chosen):
        whole = path.read_bytes()
        path.write_bytes(b"damaged")
        with refusal(path, "--overwrite"):
            draw()
        path.write_bytes(whole)
    files.about.unlink()
    with refusal(files.about, "--overwrite"):
        draw()


@pytest.mark.parametrize("said", ["[1]", "{}", "no JSON", None])
def test_pictures_of_others_are_left_alone(files, drawn, draw, said: str | None) -> None:
    about = PngInfo()
    if said is not None:
        about.add_text("Description", said)
    draw()
    Image.new("RGB", (8, 8)).save(files.figures / "mine.png", pnginfo=about)
    (files.figures / "mine.pdf").write_bytes(b"mine")
    before = (files.figures / "mine.png").read_bytes()
    draw()
    assert (files.figures / "mine.png").read_bytes() == before
    assert "mine" not in files.contact_sheet.read_text()


def test_a_process_that_dies_is_one_line(draw, monkeypatch, refusal) -> None:
    def dead(*_: object) -> Future[None]:
        future: Future[None] = Future()
        future.set_exception(BrokenProcessPool("killed"))
        return future

    monkeypatch.setattr(pages, "FEW", 5)
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor.submit", dead)
    with refusal("killed", "--num_workers"):
        draw(workers=2)


def test_a_page_that_fails_ends_the_drawing(drawn, draw, monkeypatch) -> None:
    """Threads stand in for the processes."""

    class Threads(ThreadPoolExecutor):
        def __init__(self, workers: int, context: object, initializer: object) -> None:
            assert workers == 2
            super().__init__(1)

    quick, draw_page = Canvas.save, pages._draw_page

    def fails_at_the_second(self: Canvas, *args: object) -> None:
        time.sleep(0.05)
        if len(drawn) == 1:
            raise OSError("no space left")
        quick(self, *args)

    monkeypatch.setattr(pages, "FEW", 1)
    monkeypatch.setattr(pages, "ProcessPoolExecutor", Threads)
    monkeypatch.setattr(Canvas, "save", fails_at_the_second)
    calls = []
    monkeypatch.setattr(pages, "_draw_page", lambda *args: (calls.append(args), draw_page(*args)))
    with pytest.raises(OSError, match="no space left"):
        draw(workers=2)
    assert len(calls) < 6


def test_few_pages_start_no_process(drawn, draw, monkeypatch) -> None:
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor.submit", lambda *_: pytest.fail("started one"))
    draw(workers=2)
    monkeypatch.setattr(pages, "FEW", 1)
    draw(workers=1, overwrite=True)
    assert len(drawn) == 12


def test_an_interruption_leaves_whole_pages(drawn, draw, monkeypatch) -> None:
    quick = Canvas.save

    def dies_at_the_third(self: Canvas, *args: object) -> None:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        quick(self, *args)

    monkeypatch.setattr(Canvas, "save", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        draw()
    monkeypatch.setattr(Canvas, "save", quick)
    assert len(draw()) == 6
    assert len(drawn) == len(set(drawn)) == 6


def test_the_contact_sheet_shows_all_in_order_and_links(dumped, files, drawn, draw) -> None:
    chosen = dumped(local_explanations, indices=(60, 2)).chosen
    assert chosen != sorted(chosen)
    draw()
    draw(Selection(limit=1))  # which does not shorten it
    html = files.contact_sheet.read_text()
    tiles = re.findall(r'<a href="(.*?)"><img src="(.*?)" loading="lazy" alt=""><span>(.*?)</span></a>', html)
    shown = local_explanations.KIND.pages(Dump(files), chosen)
    assert tiles == [(f"{page.name}.pdf", f"{page.name}.png", page.title) for page in shown]
    assert html.count("<title>local explanations, clip_RN50</title>") == 1
    assert "<h1>local explanations, clip_RN50</h1>" in html
    assert f"{len(chosen)} pages" in html
    assert "<script" not in html


def test_titles_are_escaped(files, drawn, draw) -> None:
    texts = json.loads(files.about.read_text())
    files.about.write_text(json.dumps(texts | {"classes": ["<b>beach</b>", "a & b", "c"], "encoder": "<i>"}))
    draw()
    html = files.contact_sheet.read_text()
    assert "<b>" not in html
    assert "<i>" not in html
    assert "&lt;b&gt;beach" in html
    assert "a &amp; b" in html


def test_a_dump_without_images_is_refused(files, draw, refusal) -> None:
    files.chosen.unlink()
    with refusal("no images", files.dump, "vis_local_explanations_dump.py"):
        draw()


@pytest.mark.parametrize("state", ["unfinished", "missing"])
def test_an_unfinished_dump_is_refused(files, draw, refusal, state: str) -> None:
    (files.dump / "manifest.json").unlink()
    if state == "missing":
        shutil.rmtree(files.dump)
    with refusal(f"the dump {files.dump} is {state}", "vis_local_explanations_dump.py", "the same flags"):
        draw()


def test_missing_latex_is_named(draw, monkeypatch, refusal) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with refusal("--use_latex", "dvipng"):
        draw(use_latex=True)


def test_latex_that_fails_is_one_line(draw, monkeypatch, refusal) -> None:
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/latex")

    def fails(*_: object) -> None:
        raise RuntimeError("latex was not able to process\n! Undefined control sequence.\nmore")

    monkeypatch.setattr(Canvas, "save", fails)
    with refusal("image_", "! Undefined control sequence.", "--use_latex"):
        draw(use_latex=True)
    with pytest.raises(RuntimeError):
        draw()


def test_the_page_shows_the_image_it_is_named_after(dump: Dump, files, draw, image_colour) -> None:
    image = dump.chosen[3]
    draw(Selection(indices=(image,)))
    with Image.open(files.page(f"image_{image:06d}", "png")) as page:
        middle = np.asarray(page.convert("RGB"))[round((0.36 + 0.06 + 0.6) * 200), round((0.06 + 0.6) * 200)].astype(int)
    assert np.abs(middle - image_colour("places365", image)).max() < 12
