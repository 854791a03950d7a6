"""Which pages a plot draws, keeps and removes, and its contact sheet."""

import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dncbm.explain.dumps import global_explanations, local_explanations, task_agnosticity
from dncbm.explain.dumps.dump import Dump
from dncbm.explain.plotting import global_explanations as draw_global
from dncbm.explain.plotting import pages
from dncbm.explain.plotting import task_agnosticity as draw_latents
from dncbm.explain.plotting.canvas import Canvas
from dncbm.explain.plotting.local_explanations import PLOT
from dncbm.explain.plotting.local_explanations import draw as draw_local
from dncbm.runs.artifacts import ExplanationFolder
from dncbm.runs.declarations import Drawing, Explained, ProbeRun, Ranking, Selection

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
        pdf.write_bytes(b"%PDF%%EOF")
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
    for page, suffix in ((all_pages[0], "png"), (all_pages[5], "pdf")):
        path = files.page(page, suffix)
        path.write_bytes(path.read_bytes()[:-8])
    draw()
    assert drawn == [all_pages[place] for place in (0, 2, 4, 5)]
    assert "4 pages drawn, 2 already drawn" in capsys.readouterr().out
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
    tiles = re.findall(r'<a href="(.*?)"><img src="(.*?)" loading="lazy" alt="(.*?)"><span>(.*?)</span></a>', html)
    shown = local_explanations.KIND.pages(Dump(files), chosen)
    assert [tile[:2] + tile[3:] for tile in tiles] == [(f"{page.name}.pdf", f"{page.name}.png", page.title) for page in shown]
    for page, alt in zip(shown, (unescape(tile[2]) for tile in tiles), strict=True):
        verdict = "right" if page.right else f"wrong: it is {page.true}"
        assert alt.startswith(
            f"Image {page.index}, predicted {page.predicted} with probability {page.probability:.0%}, which is"
        )
        assert verdict in alt
        assert f"{page.concepts[0][0]} {page.concepts[0][1]:+.3g}" in alt
    assert html.count("<title>local explanations, clip_RN50</title>") == 1
    assert "<h1>local explanations, clip_RN50</h1>" in html
    assert f"{len(chosen)} pages" in html
    assert "<script" not in html


def test_names_are_escaped(world, dumped, drawn, draw) -> None:
    """Whatever a class is called; names that are not UTF-8 included."""
    classes = ["<b>beach</b>", 'a & "b"', "c\udcff"]
    world.save_classes("places365", classes, np.zeros(61, dtype=np.int64))
    files = dumped(local_explanations, limit=6, overwrite=True).files
    draw()
    html = files.contact_sheet.read_text(encoding="utf-8")
    assert "<b>" not in html
    assert "&lt;b&gt;beach&lt;" in html
    predicted = {page.predicted for page in local_explanations.KIND.pages(Dump(files), Dump(files).chosen)}
    assert ("a &amp; &quot;b&quot;" in html, "c\ufffd" in html) == (classes[1] in predicted, classes[2] in predicted)
    assert len(predicted) > 1


def facts(html: str) -> dict[str, str]:
    return dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", html))


@pytest.mark.usefixtures("drawn")
def test_contact_sheets_say_what_they_show_and_link_to_each_other(world, dumped, files, draw) -> None:
    plots = (local_explanations, PLOT), (global_explanations, draw_global.PLOT), (task_agnosticity, draw_latents.PLOT)
    draw()
    assert "<a href=" not in files.contact_sheet.read_text().partition("<main>")[0], "nothing to link to"
    sheets = [files.contact_sheet]
    given = {type(one): one for one in (world.run, world.probe, Explained("val"), Drawing(workers=1), Ranking())}
    for module, plot in plots[1:]:
        sheets.append(dumped(module, limit=1).files.contact_sheet)
        plot.function(world.settings, *(given.get(cls) or cls() for cls in plot.takes))
    other_sae = world.settings.analysis_dir / "local_explanations/clip_RN50/cc3m/out/another/vis/index.html"
    other_sae.parent.mkdir(parents=True)
    other_sae.write_text("<nav></nav>")
    draw()
    for sheet in sheets:
        html = sheet.read_text()
        head, _, body = html.partition("<main>")
        linked = [(sheet.parent / href).resolve() for href in re.findall('<a href="(.*?)"', head)]
        assert sorted(linked) == sorted(other for other in sheets if other != sheet)
        assert facts(html)["split"] == "val"
        assert facts(html)["encoder"] == "clip_RN50"
        assert facts(html)["SAE"] == f"{world.run.config_name}, trained on cc3m"
        assert "1 page;" in html or sheet == sheets[0]
        assert len(re.findall('alt="[^"]{20,}"', body)) == body.count("<img")
    assert facts(sheets[0].read_text())["probe"] == world.probe.config_name
    assert facts(sheets[2].read_text())["data set"] == "places365, mine"
    assert other_sae.read_text() == "<nav></nav>"


def test_pages_of_replaced_images_are_drawn_again(world, dumped, drawn, monkeypatch) -> None:
    """Although the numbers are the same, because the features were extracted again with the same bits."""
    declared = (world.run, ProbeRun("mine"), Explained("val"), Selection(), Drawing(workers=1))
    world.save_probe(world.weight, ProbeRun("mine"))
    world.save_features("mine")
    dumped(local_explanations, probe=ProbeRun("mine"), indices=(2, 7))
    PLOT.function(world.settings, *declared)
    PLOT.function(world.settings, *declared)
    assert len(drawn) == 2
    Image.new("RGB", (99, 99)).save(world.settings.path.parent / "mine/val/a/2.png")
    world.save_features("mine")
    dumped(local_explanations, probe=ProbeRun("mine"), indices=(2, 7))
    drawn.clear()
    PLOT.function(world.settings, *declared)
    assert len(drawn) == 2


def test_what_has_changed_since_is_not_drawn(world, dumped, draw, drawn, refusal) -> None:
    """Names of the same size included; and what is not on this machine is not asked for."""
    names = world.make_names(list(world.names))
    dumped(local_explanations, limit=6, overwrite=True)
    draw()
    whole = names.read_bytes()
    names.write_bytes(whole.replace(b"dog", b"cat"))
    with refusal(names, "--overwrite", f"remove {names}.manifest.json"):
        draw()
    with refusal(names, "has changed"):
        dumped(local_explanations, limit=6)
    names.write_bytes(whole)
    world.save_strengths(world.z * 2, world.keys)
    with refusal("has changed since it was made", "local_explanations_dump", "--overwrite"):
        draw()
    shutil.rmtree(world.settings.sae_dir)
    shutil.rmtree(world.settings.probe_dir)
    assert len(draw()) == 6


def test_edited_names_can_be_kept(world, dumped, draw, drawn, refusal) -> None:
    """By removing their manifest; the dump is then out of date, and shows them once it is made again."""
    names = world.make_names(list(world.names))
    dumped(local_explanations, limit=6, overwrite=True)
    names.write_text(names.read_text().replace("sand", "dune"))
    names.with_name(f"{names.name}.manifest.json").unlink()
    with refusal("names has changed", "--overwrite"):
        dumped(local_explanations, limit=6)
    assert dumped(local_explanations, limit=6, overwrite=True).about["labels"][0] == "dune"
    assert len(draw()) == 6


def test_leftovers_of_killed_runs_go(files, drawn, draw) -> None:
    draw()
    left = subprocess.run(
        [sys.executable, "-c", LEAVE, files.page("image_000001", "pdf")], capture_output=True, text=True, check=False
    ).stdout
    assert Path(left).is_file()
    draw()
    assert not Path(left).exists()


LEAVE = """
import os, sys
from pathlib import Path
from sparse_autoencoder.files import whole_file
with whole_file(Path(sys.argv[1])) as temporary:
    print(temporary, end="", flush=True)
    os._exit(9)
"""


def test_missing_glyphs_are_said_once(world, dumped, draw, caplog) -> None:
    world.save_names([f"{name} \U000f1234" for name in world.names])
    dumped(local_explanations, limit=2, overwrite=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw()
    (said,) = [record.message for record in caplog.records]
    assert "1 character " in said
    assert "\U000f1234" in said


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
