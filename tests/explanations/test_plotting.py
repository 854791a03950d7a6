"""Figures: their texts, that nothing overlaps, and which pages are drawn."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle
from PIL import Image
from pypdf import PdfReader

from dncbm.dumps import Selection, global_explanations, local_explanations, meta_clusters, open_dump, task_agnosticity
from dncbm.plotting import global_explanations as draw_global
from dncbm.plotting import local_explanations as draw_local
from dncbm.plotting import meta_clusters as draw_clusters
from dncbm.plotting import task_agnosticity as draw_latents
from dncbm.plotting.canvas import Canvas, bar_rows, decimals, fitted, fitted_label, latex_escaped, signed, text_width
from dncbm.plotting.pages import Drawing, plot

LONG = "an extraordinarily long name of a class that fits no column of any paper whatsoever"
WORD = "Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.jpg"
    Image.new("RGB", (32, 32), "teal").save(path)
    return path


def local_page(picture: Path, **changes) -> local_explanations.Page:
    page = local_explanations.Page(
        name="image_000007",
        title="7",
        image=picture,
        index=7,
        predicted="beach",
        true="coast",
        right=False,
        probability=0.874,
        logit=2.25,
        true_logit=-1.5,
        concepts=(("dog #1", 1.5), ("dog #3", 1.25), ("sea", -0.75), ("sand", 0.5), ("50%_of_$1 & more", 0.25)),
        remaining=-0.5,
        n_remaining=9,
    )
    return replace(page, **changes)


def global_page(picture: Path, **changes) -> global_explanations.Page:
    page = global_explanations.Page(
        name="class_0001_coast",
        title="coast",
        class_name="coast",
        size=42,
        recall=0.5,
        rank_by="contribution",
        concepts=tuple((f"name{i}", 1 - i / 20) for i in range(10)),
        remaining=0.125,
        n_remaining=99,
        mean_logit=7.875,
        images=(picture,) * 9,
    )
    return replace(page, **changes)


def cluster_page(picture: Path, n: int = 3, label: str = "{}{}") -> meta_clusters.Page:
    members = tuple(
        meta_clusters.Cluster(
            number, 40 + number, "coast", 0.25, tuple((label.format("abc"[number], i), 0.5 - i / 20) for i in range(6)),
            (picture,) * 9,
        )
        for number in range(n)
    )  # fmt: skip
    return meta_clusters.Page("clusters_0_1_2", "title", members)


def latent_page(picture: Path, n_datasets: int, label: str = "latent{}") -> task_agnosticity.Page:
    names = ("cifar10", "cifar100", "imagenet", "places365", "waterbirds100")[:n_datasets]
    members = [
        task_agnosticity.LatentImages(i, label.format(i), 0.5, ((picture,) * (4 - i),) * n_datasets) for i in (1, 2, 3)
    ]
    members.append(task_agnosticity.LatentImages(9000, "last", 0.25, ((),) * n_datasets))
    return task_agnosticity.Page("latents_1_2_3_9000", "title", names, "val", tuple(members))


def texts(canvas: Canvas) -> list[str]:
    return [text.get_text() for text in canvas.axes.texts]


class TestTexts:
    def test_a_local_explanation_says_all(self, picture: Path) -> None:
        found = texts(draw_local.draw(local_page(picture)))
        for expected in (
            "predicted", "beach", "87%", "wrong", "true", "coast", "logit −1.50", "dog #1", "+1.50", "dog #3", "+1.25",
            "sea", "−0.75", "9 others", "−0.50", "logit", "+2.25",
        ):  # fmt: skip
            assert expected in found, expected
        assert "right" not in found
        right = texts(draw_local.draw(local_page(picture, right=True, true="beach")))
        assert "right" in right
        assert "wrong" not in right
        assert right.count("beach") == 2
        assert "1 other" in texts(draw_local.draw(local_page(picture, n_remaining=1)))
        none = texts(draw_local.draw(local_page(picture, n_remaining=0, remaining=0.0)))
        assert not any("other" in text for text in none)

    def test_what_is_shown_adds_up(self, picture: Path) -> None:
        found = texts(draw_local.draw(local_page(picture)))
        numbers = [float(text.replace("−", "-")) for text in found if re.fullmatch(r"[+−][\d.]+", text)]
        assert sum(numbers[:-1]) == pytest.approx(numbers[-1])

    def test_a_class_shows_ten_concepts_and_its_mean_logit(self, picture: Path) -> None:
        found = texts(draw_global.draw(global_page(picture)))
        for expected in (
            "coast",
            "42 images, 50% predicted right",
            "mean contribution",
            "99 others",
            "mean logit",
            "+7.88",
        ):
            assert expected in found, expected
        assert all(f"name{i}" in found for i in range(10))

    def test_a_long_class_name_is_wrapped(self, picture: Path) -> None:
        long = "a museum of natural history with an unusually long name"
        canvas = draw_global.draw(global_page(picture, class_name=long))
        lines = [text.get_text() for text in canvas.axes.texts if text.get_size() == draw_global.SIZE]
        assert len(lines) == 2
        assert " ".join(lines) == long

    def test_the_authors_ranking_is_named_and_sums_to_nothing(self, picture: Path) -> None:
        found = texts(draw_global.draw(global_page(picture, rank_by="strength")))
        assert "strength above the mean" in found
        assert "mean logit" not in found
        assert "99 others" not in found

    def test_each_cluster_has_its_own_names(self, picture: Path) -> None:
        canvas = draw_clusters.draw(cluster_page(picture))
        places = {text.get_text(): text.get_position()[1] for text in canvas.axes.texts}
        block = draw_clusters.BLOCK
        for number in range(3):
            assert block * number < places[f"cluster {number}"] < block * (number + 1)
            for i in range(6):
                assert block * number < places[f"{'abc'[number]}{i}"] < block * (number + 1)

    @pytest.mark.parametrize("n_datasets", [1, 2, 4])
    def test_latents_and_datasets(self, picture: Path, n_datasets: int) -> None:
        page = latent_page(picture, n_datasets)
        canvas = draw_latents.draw(page)
        found = texts(canvas)
        assert all(f"{dataset} (val)" in found for dataset in page.datasets)
        assert {"latent1", "latent 1, similarity 0.50", "last", "latent 9000, similarity 0.25"} <= set(found)
        assert found.count("no image") == n_datasets
        assert len(canvas.axes.images) == n_datasets * (3 + 2 + 1), "and images that are there"

    def test_the_pdf_has_the_texts_as_text(self, picture: Path, tmp_path: Path) -> None:
        draw_local.draw(local_page(picture)).save(tmp_path / "a.pdf", tmp_path / "a.png", "{}")
        reader = PdfReader(tmp_path / "a.pdf")
        assert len(reader.pages) == 1
        found = reader.pages[0].extract_text()
        for expected in ("predicted", "beach", "wrong", "dog #1", "dog #3", "+1.25", "9 others", "logit", "50%_of_$1"):
            assert expected in found, expected
        fonts = reader.pages[0]["/Resources"]["/Font"]
        assert {fonts[name]["/Subtype"] for name in fonts} <= {"/Type0", "/TrueType"}, "no Type 3, which venues refuse"
        assert float(reader.pages[0].mediabox.width) / 72 == pytest.approx(3.35)


def test_images_of_the_pdf_are_whole_and_opaque(tmp_path: Path) -> None:
    """Half transparent edges, which interpolation gives, are hairlines in viewers."""
    large = tmp_path / "large.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(large)
    canvas = draw_global.draw(global_page(large))
    canvas.save(tmp_path / "a.pdf", tmp_path / "a.png", "{}")
    objects = PdfReader(tmp_path / "a.pdf").pages[0]["/Resources"]["/XObject"]
    images = [objects[name] for name in objects if objects[name]["/Subtype"] == "/Image"]
    assert len(images) == 9
    sides = {(image["/Width"], image["/Height"]) for image in images}
    assert len(sides) == 1
    width, height = sides.pop()
    assert width == height == round(200 * (draw_global.GRID - 2 * draw_global.GAP) / 3)
    assert not any("/SMask" in image for image in images)


def hard_pages(picture: Path) -> list[Canvas]:
    """With names that do not fit, numbers of every size, and nothing at all."""
    hard = ((LONG, 120.0), (WORD, -3e-5), (f"{LONG} #12345", -77.0), ("a", 9.0), ("", 0.5))
    ten = tuple((f"{LONG} {i}", 1e-4 * (5 - i)) for i in range(10))
    return [
        draw_local.draw(local_page(picture)),
        draw_local.draw(local_page(picture, predicted=LONG, true=WORD, concepts=hard, logit=-1234.5, true_logit=-9999)),
        draw_local.draw(local_page(picture, right=True, predicted=WORD, true=WORD, probability=1.0)),
        draw_local.draw(local_page(picture, concepts=(), remaining=0.0, n_remaining=0, logit=0.0)),
        draw_local.draw(local_page(picture, concepts=(("only", -2.0),), remaining=0.0, n_remaining=0, logit=-2.0)),
        draw_global.draw(global_page(picture)),
        draw_global.draw(global_page(picture, class_name=LONG, concepts=ten, size=123456, remaining=-88.0)),
        draw_global.draw(global_page(picture, class_name=LONG, concepts=ten, size=123456, rank_by="strength")),
        draw_global.draw(global_page(picture, concepts=(), images=(picture,), rank_by="strength")),
        draw_clusters.draw(cluster_page(picture)),
        draw_clusters.draw(cluster_page(picture, 1, LONG + " {}{} #7777")),
        *(draw_latents.draw(latent_page(picture, n)) for n in (1, 2, 3, 4, 5)),
        *(draw_latents.draw(latent_page(picture, n, LONG + " #{}")) for n in (1, 4)),
    ]


def test_nothing_overlaps_and_nothing_leaves_the_page(picture: Path) -> None:
    for number, canvas in enumerate(hard_pages(picture)):
        FigureCanvasAgg(canvas.figure).draw()
        renderer = canvas.figure.canvas.get_renderer()
        page = canvas.figure.bbox
        shown = [text for text in canvas.axes.texts if text.get_text()]
        boxes = {text: text.get_window_extent(renderer) for text in shown}
        boxes |= {image: image.get_window_extent(renderer) for image in canvas.axes.images}
        bars = {bar: bar.get_window_extent(renderer) for bar in canvas.axes.patches if isinstance(bar, Rectangle)}
        for artist, box in (boxes | bars).items():
            assert page.x0 <= box.x0 <= box.x1 <= page.x1, (number, artist)
            assert page.y0 <= box.y0 <= box.y1 <= page.y1, (number, artist)
        for (a, box), (b, other) in combinations(boxes.items(), 2):
            assert not overlap(box, other), (number, a, b)
        for text in shown:  # a badge is text on a bar
            for bar, box in bars.items():
                inside = box.width > 0 and box.x0 <= boxes[text].x0 and boxes[text].x1 <= box.x1
                assert inside or not overlap(boxes[text], box), (number, text, bar)


def overlap(a, b) -> bool:
    """By more than a pixel, which rounding gives."""
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1


def test_image_grids_are_aligned(picture: Path) -> None:
    extents = [image.get_extent() for image in draw_global.draw(global_page(picture)).axes.images]
    columns, rows = {round(e[0], 6) for e in extents}, {round(e[2], 6) for e in extents}
    assert (len(extents), len(columns), len(rows)) == (9, 3, 3)
    assert len({(round(e[1] - e[0], 6), round(e[2] - e[3], 6)) for e in extents}) == 1


def test_bars_are_as_long_as_their_values() -> None:
    canvas = Canvas(3, 1)
    values = (2.0, -1.0, 0.5)
    bar_rows(canvas, 0, 0, 3, [("a", value, "red") for value in values], label_width=1, row_height=0.2)
    lengths = [bar.get_width() for bar in canvas.axes.patches]
    assert [length / lengths[0] for length in lengths] == pytest.approx([value / 2 for value in values])
    assert len({bar.get_x() for bar in canvas.axes.patches}) == 1, "all begin at zero"


class TestFitting:
    @given(
        text=st.text(st.characters(codec="latin-1", categories=("L", "N", "P", "Zs")), max_size=80),
        width=st.floats(0.3, 3),
        lines=st.integers(1, 3),
    )
    def test_lines_fit(self, text: str, width: float, lines: int) -> None:
        found = fitted(text, width, lines=lines)
        assert 1 <= len(found) <= lines
        assert all(text_width(line, 7) <= width or len(line) <= 1 for line in found)
        if "…" not in found[-1]:
            assert "".join(found).replace(" ", "") == "".join(text.split())

    def test_lines_break_between_words(self) -> None:
        assert fitted("apartment building outdoor", 0.8, lines=3) == ["apartment", "building", "outdoor"]
        assert fitted("apartment building outdoor", 0.8, lines=1)[0].startswith("apartment")
        assert fitted("short", 2) == ["short"]

    def test_a_shortened_label_keeps_its_index(self) -> None:
        assert fitted_label("dog #12", 2) == "dog #12"
        shortened = fitted_label(f"{LONG} #12345", 0.9)
        assert shortened.endswith("… #12345")
        assert text_width(shortened, 7) <= 0.9

    def test_numbers(self) -> None:
        assert signed(1.234, 2) == "+1.23"
        assert signed(-0.5, 2) == "−0.50"
        for values, digits in (
            ((12.0, -3), 1),
            ((1.4,), 2),
            ((0.07,), 4),
            ((0.7,), 3),
            ((0.004,), 4),
            ((0.0,), 2),
            ((), 2),
        ):
            assert decimals(values) == digits, values

    def test_latex_prints_it_as_it_is(self) -> None:
        assert latex_escaped("50%_of_$1 & #2") == r"50\%\_of\_\$1 \& \#2"
        assert latex_escaped("<a>|") == r"\textless{}a\textgreater{}\textbar{}"
        assert latex_escaped("a\\b~^{}") == r"a\textbackslash{}b\textasciitilde{}\textasciicircum{}\{\}"


# --------------------------------------------------------------------------------------------------------------- pages


class TestPages:
    @pytest.fixture
    def folder(self, world) -> Path:
        """With a dump of six images."""
        return local_explanations.dump(world.settings, world.run, world.probe, "val", Selection(limit=6)).parent

    @pytest.fixture
    def draw(self, world, folder: Path) -> Callable[..., list[Path]]:
        def draw(selection: Selection | None = None, **drawing) -> list[Path]:
            return plot(
                world.settings,
                folder,
                local_explanations,
                draw_local.draw,
                selection or Selection(),
                Drawing(**drawing),
            )

        return draw

    def test_what_was_chosen_is_drawn(self, folder: Path, draw) -> None:
        pages = draw()
        chosen = open_dump(folder / "data").chosen
        assert [page.name for page in pages] == [f"image_{key:06d}.pdf" for key in chosen]
        assert sorted(path.name for path in (folder / "vis").iterdir()) == sorted(
            ["index.html", *(page.name for page in pages), *(page.with_suffix(".png").name for page in pages)]
        )
        with Image.open(pages[0].with_suffix(".png")) as image:
            assert image.width == 670

    def test_a_page_is_drawn_once(self, draw, capsys) -> None:
        pages = draw()
        times = [page.stat().st_mtime_ns for page in pages]
        draw()
        assert [page.stat().st_mtime_ns for page in pages] == times
        assert "0 pages drawn, 6 were there" in capsys.readouterr().out
        pages[2].unlink()
        draw()
        assert [page.stat().st_mtime_ns == time for page, time in zip(pages, times, strict=True)] == [
            True,
            True,
            False,
        ] + [True] * 3
        draw(overwrite=True)
        assert all(page.stat().st_mtime_ns != time for page, time in zip(pages, times, strict=True))

    def test_the_same_page_has_the_same_bytes(self, draw) -> None:
        pages = [page.with_suffix(suffix) for page in draw() for suffix in (".pdf", ".png")]
        before = [page.read_bytes() for page in pages]
        draw(overwrite=True)
        assert [page.read_bytes() for page in pages] == before

    def test_only_the_dump_is_read(self, world, folder: Path, draw) -> None:
        import shutil

        for root in ("SAE", "sae_dir", "probe_dir", "data_dir", "places", "vocab_dir"):
            shutil.rmtree(world.settings.path.parent / root, ignore_errors=True)
        assert len(draw()) == 6

    def test_some_of_it(self, world, folder: Path, draw, refusal) -> None:
        chosen = open_dump(folder / "data").chosen
        assert [page.stem for page in draw(Selection(limit=2))] == [f"image_{chosen[i]:06d}" for i in (0, 3)]
        assert [page.stem for page in draw(Selection(indices=(chosen[4],)))] == [f"image_{chosen[4]:06d}"]
        other = next(int(key) for key in world.keys if key not in chosen)
        with refusal(other, "_dump.py", "--indices"):
            draw(Selection(indices=(other,)))

    def test_pages_of_an_earlier_dump_go(self, world, folder: Path, draw, capsys) -> None:
        old = draw()
        world.save_strengths(world.z[::-1].copy())
        local_explanations.dump(world.settings, world.run, world.probe, "val", Selection(indices=(8,)), overwrite=True)
        (folder / "vis" / "mine.png").write_bytes(b"not one of ours")
        pages = draw()
        assert "removed 6 pages of an earlier dump" in capsys.readouterr().out
        assert [page.stem for page in pages] == ["image_000008"]
        assert not any(page.exists() for page in old if page.stem != "image_000008")
        assert (folder / "vis" / "mine.png").exists()

    def test_processes_draw_the_same(self, world, draw, folder: Path) -> None:
        local_explanations.dump(world.settings, world.run, world.probe, "val", Selection(limit=20))
        one = {page: page.read_bytes() for page in draw()}
        assert len(one) >= 20
        draw(workers=2, overwrite=True)
        assert {page: page.read_bytes() for page in one} == one

    def test_what_is_damaged_is_named(self, draw, folder: Path, refusal) -> None:
        chosen = open_dump(folder / "data").chosen
        thumbnail = folder / "data" / "images" / "places365" / f"{chosen[2]}.jpg"
        thumbnail.write_bytes(b"no image")
        with refusal(thumbnail, "_dump.py"):
            draw()
        thumbnail.unlink()
        with refusal(thumbnail):
            draw()
        numbers = (folder / "data" / "numbers.npz").read_bytes()
        (folder / "data" / "numbers.npz").write_bytes(b"no numbers")
        with refusal(folder / "data" / "numbers.npz", "--overwrite"):
            draw()
        (folder / "data" / "numbers.npz").write_bytes(numbers)
        (folder / "data" / "about.json").unlink()
        with refusal(folder / "data" / "about.json", "--overwrite"):
            draw()

    def test_pictures_of_others_are_left_alone(self, draw, folder: Path) -> None:
        from PIL.PngImagePlugin import PngInfo

        about = PngInfo()
        about.add_text("Description", "[1]")
        draw()
        Image.new("RGB", (8, 8)).save(folder / "vis" / "mine.png", pnginfo=about)
        draw()
        assert "mine" not in (folder / "vis" / "index.html").read_text()

    def test_a_process_that_dies_is_one_line(self, world, draw, monkeypatch, refusal) -> None:
        from concurrent.futures import Future
        from concurrent.futures.process import BrokenProcessPool

        local_explanations.dump(world.settings, world.run, world.probe, "val", Selection(limit=20))

        def dead(*_: object) -> Future[None]:
            future: Future[None] = Future()
            future.set_exception(BrokenProcessPool("killed"))
            return future

        monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor.submit", dead)
        with refusal("killed", "--num_workers"):
            draw(workers=2)

    def test_an_interruption_leaves_whole_pages(self, draw, folder: Path, monkeypatch) -> None:
        real, drawn = Canvas.save, []

        def dies_at_the_third(self, *args) -> None:
            drawn.append(args)
            if len(drawn) == 3:
                raise KeyboardInterrupt
            real(self, *args)

        monkeypatch.setattr(Canvas, "save", dies_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            draw()
        drawn.clear()
        monkeypatch.setattr(Canvas, "save", lambda self, *args: (drawn.append(args), real(self, *args)))
        assert len(draw()) == 6
        assert len(drawn) == 4

    def test_the_contact_sheet_shows_all_and_links(self, draw, folder: Path) -> None:
        pages = draw()
        draw(Selection(limit=1))  # which does not shorten it
        html = (folder / "vis" / "index.html").read_text()
        assert re.findall(r'<a href="(.*?)"><img src="(.*?)"', html) == [
            (page.name, page.with_suffix(".png").name) for page in pages
        ]
        assert "6 pages" in html
        assert "<script" not in html

    def test_titles_are_escaped(self, world, draw, folder: Path) -> None:
        about = folder / "data" / "about.json"
        texts = json.loads(about.read_text())
        texts["classes"] = ["<b>beach</b>", "a & b", "c"]
        about.write_text(json.dumps(texts))
        draw()
        html = (folder / "vis" / "index.html").read_text()
        assert "<b>" not in html
        assert "&lt;b&gt;beach" in html or "a &amp; b" in html

    def test_latex_that_is_missing_is_named(self, draw, monkeypatch, refusal) -> None:
        monkeypatch.setattr("shutil.which", lambda _: None)
        with refusal("--use_latex", "dvipng"):
            draw(use_latex=True)

    def test_a_dump_without_images_is_refused(self, draw, folder: Path, refusal) -> None:
        (folder / "data" / "chosen.json").unlink()
        with refusal("no images", folder / "data", "_dump.py"):
            draw()

    def test_latex_that_fails_is_one_line(self, draw, monkeypatch, refusal) -> None:
        monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/latex")

        def fails(*_: object) -> None:
            raise RuntimeError("latex was not able to process\n! Undefined control sequence.\nmore")

        monkeypatch.setattr(Canvas, "save", fails)
        with refusal("image_", "! Undefined control sequence.", "--use_latex"):
            draw(use_latex=True)
