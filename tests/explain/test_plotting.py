"""Figures: their texts, colours and images, and that nothing overlaps."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from PIL import Image
from pypdf import PdfReader

from dncbm.explain.dumps import global_explanations, local_explanations, meta_clusters, task_agnosticity
from dncbm.explain.plotting import fonts
from dncbm.explain.plotting import global_explanations as draw_global
from dncbm.explain.plotting import local_explanations as draw_local
from dncbm.explain.plotting import meta_clusters as draw_clusters
from dncbm.explain.plotting import task_agnosticity as draw_latents
from dncbm.explain.plotting.canvas import LEAST_BAR, Bars, Canvas, decimals, latex_escaped, signed
from dncbm.explain.plotting.fonts import text_width, wrapped

LONG = "an extraordinarily long name of a class that fits no column of any paper whatsoever"
WORD = "Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen"
BLUE, VERMILION, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#8c8c8c"
CONCEPTS = (("dog #1", 1.5), ("dog #3", 1.25), ("sea", -0.75), ("sand", 0.5), ("50%_of_$1 &", 0.25))


def colour(number: int) -> tuple[int, int, int]:
    """The colour of a picture, which no other one has."""
    return 5 * number, 250 - 3 * number, (97 * number) % 256


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """number -> a file of a picture in its own colour."""
    folder = tmp_path_factory.mktemp("pictures")

    def make(number: int) -> Path:
        path = folder / f"{number}.png"
        if not path.is_file():
            Image.new("RGB", (32, 32), colour(number)).save(path)
        return path

    return make


@pytest.fixture
def pictures(picture: Callable[[int], Path]) -> Callable[..., tuple[Path, ...]]:
    """pictures(first, n): n of them, from a number on."""
    return lambda first, n=9: tuple(picture(number) for number in range(first, first + n))


def local_page(pictures, **changes) -> local_explanations.Page:
    page = local_explanations.Page(
        name="image_000007",
        title="7",
        image=pictures(7)[0],
        index=7,
        predicted="beach",
        true="coast",
        right=False,
        probability=0.874,
        logit=2.25,
        true_logit=-1.5,
        concepts=CONCEPTS,
        remaining=-0.5,
        n_remaining=9,
    )
    return replace(page, **changes)


def global_page(pictures, **changes) -> global_explanations.Page:
    page = global_explanations.Page(
        name="class_0001_coast",
        title="coast",
        class_name="coast",
        size=42,
        recall=0.8,
        rank_by="contribution",
        concepts=tuple((f"name{i}", 1 - i / 20) for i in range(10)),
        remaining=0.125,
        n_remaining=99,
        mean_logit=7.875,
        images=pictures(0),
    )
    return replace(page, **changes)


def cluster_page(pictures, n: int = 3, label: str = "{}{}") -> meta_clusters.Page:
    members = tuple(
        meta_clusters.Cluster(
            number, 40 + number, ("coast", "beach", "sea")[place], 0.2 + place / 10,
            tuple((label.format("abc"[place], i), 0.5 - i / 20) for i in range(6)), pictures(10 * place),
        )
        for place, number in enumerate((7, 2, 31)[:n])
    )  # fmt: skip
    return meta_clusters.Page("clusters_7_2_31", "title", members)


def latent_page(pictures, n_datasets: int, label: str = "latent{}") -> task_agnosticity.Page:
    """Latents with 3, 2, 1 and no images of each data set."""
    names = ("cifar10", "cifar100", "imagenet", "places365", "waterbirds100")[:n_datasets]
    members = [
        task_agnosticity.LatentImages(
            index, label.format(index), similarity, tuple(pictures(10 * d + 3 * place, 3 - place) for d in range(n_datasets))
        )
        for place, (index, similarity) in enumerate(((1, 0.5), (20, 0.4), (3, 0.3)))
    ]  # fmt: skip
    members.append(task_agnosticity.LatentImages(9000, "last", 0.25, ((),) * n_datasets))
    return task_agnosticity.Page("latents_1_20_3_9000", "title", names, "val", tuple(members))


def texts(canvas: Canvas) -> list[str]:
    return [text.get_text() for text in canvas.axes.texts]


def height(canvas: Canvas, text: str) -> float:
    """y of a text that stands on the page once."""
    (found,) = [artist for artist in canvas.axes.texts if artist.get_text() == text]
    return found.get_position()[1]


def bar_at(canvas: Canvas, text: str) -> Rectangle:
    """The bar or badge at the height of a text."""
    y = height(canvas, text)
    (found,) = [bar for bar in canvas.axes.patches if bar.get_y() < y < bar.get_y() + bar.get_height()]
    return found


def pixels(canvas: Canvas) -> Callable[[float, float], tuple[int, ...]]:
    """The colour of the drawn page at a place in inches."""
    canvas.figure.set_dpi(200)
    agg = FigureCanvasAgg(canvas.figure)
    agg.draw()
    shown = np.asarray(agg.buffer_rgba())
    return lambda x, y: tuple(shown[int(200 * y), int(200 * x), :3].tolist())


def shown_images(canvas: Canvas, *, below: float = 0.0, above: float = 99.0, within: tuple[float, float] = (0, 99)):
    """Colours of the drawn images in a part of the page, row by row from left to right."""
    at = pixels(canvas)
    middles = []
    for image in canvas.axes.images:
        left, right, bottom, top = image.get_extent()
        middles.append((round((top + bottom) / 2, 4), (left + right) / 2))
    return [at(x, y) for y, x in sorted(middles) if below < y < above and within[0] < x < within[1]]


class TestLocal:
    def test_every_fact_is_on_the_page(self, pictures) -> None:
        found = texts(draw_local.draw(local_page(pictures)))
        for expected in (
            "predicted", "beach", "probability 87%", "wrong", "true", "coast", "logit −1.50", "contribution to the logit",
            "dog #1", "+1.50", "dog #3", "+1.25",
            "sea", "−0.75", "9 others", "−0.50", "logit", "+2.25",
        ):  # fmt: skip
            assert expected in found, expected
        assert "right" not in found
        right = texts(draw_local.draw(local_page(pictures, right=True, true="beach")))
        assert "right" in right
        assert "wrong" not in right
        assert right.count("beach") == 2
        assert not any(text.startswith("logit ") for text in right)
        assert "1 other" in texts(draw_local.draw(local_page(pictures, n_remaining=1)))
        none = texts(draw_local.draw(local_page(pictures, n_remaining=0, remaining=0.0)))
        assert not any("other" in text for text in none)

    def test_each_fact_has_its_line(self, pictures) -> None:
        canvas = draw_local.draw(local_page(pictures))
        for line in (("predicted", "beach", "probability 87%", "wrong"), ("true", "coast", "logit −1.50"), ("logit", "+2.25")):
            assert len({height(canvas, text) for text in line}) == 1, line
        for label, value in (*CONCEPTS, ("9 others", -0.5)):
            assert height(canvas, label) == height(canvas, signed(value, 2)), label

    def test_colours(self, pictures) -> None:
        canvas = draw_local.draw(local_page(pictures))
        at = pixels(canvas)
        expected = [(label, BLUE if value > 0 else VERMILION) for label, value in CONCEPTS]
        for label, wanted in (*expected, ("9 others", GREY), ("wrong", VERMILION)):
            bar = bar_at(canvas, label)
            assert to_hex(bar.get_facecolor()) == wanted, label
            edge = bar.get_x() + 0.9 * bar.get_width()
            assert to_hex(np.array(at(edge, bar.get_y() + 0.1 * bar.get_height())) / 255) == wanted, label
        right = draw_local.draw(local_page(pictures, right=True))
        assert to_hex(bar_at(right, "right").get_facecolor()) == GREEN
        assert [text.get_color() for text in right.axes.texts if text.get_text() == "right"] == ["white"]

    def test_bars_are_as_long_as_their_values(self, pictures) -> None:
        canvas = draw_local.draw(local_page(pictures))
        bars = {label: bar_at(canvas, label) for label, _ in CONCEPTS}
        scale = bars["dog #1"].get_width() / 1.5
        assert scale > 0
        for label, value in CONCEPTS:
            assert bars[label].get_width() == pytest.approx(scale * value)
        assert len({bar.get_x() for bar in bars.values()}) == 1, "all begin at zero"

    def test_shown_values_add_up(self, pictures) -> None:
        found = texts(draw_local.draw(local_page(pictures)))
        numbers = [float(text.replace("−", "-")) for text in found if re.fullmatch(r"[+−][\d.]+", text)]
        assert sum(numbers[:-1]) == pytest.approx(numbers[-1])

    def test_the_image_is_upright(self, pictures, tmp_path: Path) -> None:
        corners = Image.new("RGB", (64, 64))
        for place, name in enumerate(("red", "lime", "blue", "yellow")):
            corners.paste(name, (place % 2 * 32, place // 2 * 32, place % 2 * 32 + 32, place // 2 * 32 + 32))
        corners.save(tmp_path / "corners.png")
        canvas = draw_local.draw(local_page(pictures, image=tmp_path / "corners.png"))
        at, (left, right, bottom, top) = pixels(canvas), canvas.axes.images[0].get_extent()
        x, y = (left + right) / 2, (top + bottom) / 2
        found = [at(x + dx, y + dy) for dy in (-0.2, 0.2) for dx in (-0.2, 0.2)]
        assert found == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
        assert shown_images(draw_local.draw(local_page(pictures))) == [colour(7)]

    def test_the_pdf_has_the_texts_as_text(self, pictures, tmp_path: Path) -> None:
        draw_local.draw(local_page(pictures)).save(tmp_path / "a.pdf", tmp_path / "a.png", "{}")
        reader = PdfReader(tmp_path / "a.pdf")
        assert len(reader.pages) == 1
        found = reader.pages[0].extract_text()
        for expected in ("predicted", "beach", "wrong", "dog #1", "dog #3", "+1.25", "9 others", "logit", "50%_of_$1"):
            assert expected in found, expected
        fonts = reader.pages[0]["/Resources"]["/Font"]
        assert {fonts[name]["/Subtype"] for name in fonts} <= {"/Type0", "/TrueType"}, "no Type 3, which venues refuse"
        assert float(reader.pages[0].mediabox.width) / 72 == pytest.approx(3.35)


class TestGlobal:
    def test_ten_concepts_and_the_mean_logit(self, pictures) -> None:
        canvas = draw_global.draw(global_page(pictures))
        found = texts(canvas)
        for expected in ("coast", "42 images, 80% predicted right", "mean contribution", "99 others", "mean logit", "+7.88"):
            assert expected in found, expected
        for i in range(10):
            assert height(canvas, f"name{i}") == height(canvas, signed(1 - i / 20, 2))
        assert height(canvas, "mean logit") == height(canvas, "+7.88")
        assert "1 image, 80% predicted right" in texts(draw_global.draw(global_page(pictures, size=1)))

    def test_colours(self, pictures) -> None:
        canvas = draw_global.draw(global_page(pictures, concepts=(("above", 2.0), ("below", -1.0))))
        for label, wanted, sign in (("above", BLUE, 1), ("below", VERMILION, -1), ("99 others", GREY, 1)):
            bar = bar_at(canvas, label)
            assert (to_hex(bar.get_facecolor()), np.sign(bar.get_width())) == (wanted, sign), label

    def test_images_are_in_order(self, pictures) -> None:
        for n in (9, 5):
            canvas = draw_global.draw(global_page(pictures, images=pictures(20, n)))
            assert shown_images(canvas) == [colour(20 + i) for i in range(n)]

    def test_a_long_class_name_is_wrapped(self, pictures) -> None:
        long = "a museum of natural history with an unusually long name"
        canvas = draw_global.draw(global_page(pictures, class_name=long))
        lines = [text.get_text() for text in canvas.axes.texts if text.get_size() == draw_global.SIZE]
        assert len(lines) == 2
        assert " ".join(lines) == long

    def test_the_authors_ranking_is_named_and_sums_to_nothing(self, pictures) -> None:
        found = texts(draw_global.draw(global_page(pictures, rank_by="strength")))
        assert "mean-centred strength" in found
        assert "mean logit" not in found
        assert "99 others" not in found
        assert "mean contribution" not in found


class TestClusters:
    def test_each_cluster_has_its_own_texts_and_images(self, pictures) -> None:
        canvas = draw_clusters.draw(cluster_page(pictures))
        tops = [height(canvas, f"cluster {number}") for number in (7, 2, 31)] + [99.0]
        assert texts(canvas).count("mean-centred strength") == 3
        for place, number in enumerate((7, 2, 31)):
            about = f"{40 + number} images, {('20% of them coast', '30% of them beach', '40% of them sea')[place]}"
            for text in (about, *(f"{'abc'[place]}{i}" for i in range(6))):
                assert tops[place] < height(canvas, text) < tops[place + 1], text
            images = shown_images(canvas, below=tops[place], above=tops[place + 1])
            assert images == [colour(10 * place + i) for i in range(9)]

    def test_colours(self, pictures) -> None:
        page = cluster_page(pictures, 1)
        mixed = replace(page.clusters[0], concepts=(("up", 0.5), ("down", -0.25)))
        canvas = draw_clusters.draw(replace(page, clusters=(mixed,)))
        assert to_hex(bar_at(canvas, "up").get_facecolor()) == BLUE
        assert to_hex(bar_at(canvas, "down").get_facecolor()) == VERMILION


class TestLatents:
    @pytest.mark.parametrize("n_datasets", [1, 2, 4])
    def test_images_are_below_their_data_set_and_beside_their_latent(self, pictures, n_datasets: int) -> None:
        page = latent_page(pictures, n_datasets)
        canvas = draw_latents.draw(page)
        found = texts(canvas)
        assert found.count("no image") == n_datasets
        tops = [height(canvas, latent.label) for latent in page.latents] + [99.0]
        middles = [text.get_position()[0] for text in canvas.axes.texts if text.get_text().endswith(" (val)")]
        assert [text for text in found if text.endswith(" (val)")] == [f"{name} (val)" for name in page.datasets]
        half = middles[0]
        for place, latent in enumerate(page.latents):
            about = f"latent {latent.index}, similarity {latent.similarity:.2f}"
            assert height(canvas, about) == height(canvas, latent.label)
            for d, middle in enumerate(middles):
                cell = {"below": tops[place], "above": tops[place + 1], "within": (middle - half, middle + half)}
                expected = [colour(10 * d + 3 * place + i) for i in range(3 - place)]
                assert shown_images(canvas, **cell) == expected, (latent.label, page.datasets[d])
        assert len(canvas.axes.images) == n_datasets * (3 + 2 + 1)


def test_images_of_the_pdf_are_whole_and_opaque(pictures, tmp_path: Path) -> None:
    """Interpolation would make edges half transparent, which viewers show as hairlines."""
    large = tmp_path / "large.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(large)
    canvas = draw_global.draw(global_page(pictures, images=(large,) * 9))
    canvas.save(tmp_path / "a.pdf", tmp_path / "a.png", '{"a": 1}')
    objects = PdfReader(tmp_path / "a.pdf").pages[0]["/Resources"]["/XObject"]
    images = [objects[name] for name in objects if objects[name]["/Subtype"] == "/Image"]
    assert len(images) == 9
    sides = {(image["/Width"], image["/Height"]) for image in images}
    assert len(sides) == 1
    width, height = sides.pop()
    assert width == height == round(200 * (draw_global.GRID - 2 * 0.03) / 3)
    assert not any("/SMask" in image for image in images)
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == 670
        assert image.info["Description"] == '{"a": 1}'


def hard_pages(pictures) -> list[Canvas]:
    """With names that do not fit, numbers of every size, and nothing at all."""
    hard = ((LONG, 120.0), (WORD, -3e-5), (f"{LONG} #12345", -77.0), ("a", 9.0), ("", 0.5))
    ten = tuple((f"{LONG} {i}", 1e-4 * (5 - i)) for i in range(10))
    return [
        draw_local.draw(local_page(pictures)),
        draw_local.draw(local_page(pictures, predicted=LONG, true=WORD, concepts=hard, logit=-1234.5, true_logit=-9999)),
        draw_local.draw(local_page(pictures, right=True, predicted=WORD, true=WORD, probability=1.0)),
        draw_local.draw(local_page(pictures, concepts=(), remaining=0.0, n_remaining=0, logit=0.0)),
        draw_local.draw(local_page(pictures, concepts=(("only", -2.0),), remaining=0.0, n_remaining=0, logit=-2.0)),
        draw_global.draw(global_page(pictures)),
        draw_global.draw(global_page(pictures, class_name=LONG, concepts=ten, size=123456, remaining=-88.0)),
        draw_global.draw(global_page(pictures, class_name=LONG, concepts=ten, size=123456, rank_by="strength")),
        draw_global.draw(global_page(pictures, concepts=(), images=pictures(0, 1), rank_by="strength")),
        draw_clusters.draw(cluster_page(pictures)),
        draw_clusters.draw(cluster_page(pictures, 1, LONG + " {}{} #7777")),
        *(draw_latents.draw(latent_page(pictures, n)) for n in (1, 2, 3, 4, 5)),
        *(draw_latents.draw(latent_page(pictures, n, LONG + " #{}")) for n in (1, 4)),
    ]


@pytest.mark.slow
def test_nothing_overlaps_and_nothing_leaves_the_page(pictures) -> None:
    for number, canvas in enumerate(hard_pages(pictures)):
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


def test_image_grids_are_aligned(pictures) -> None:
    extents = [image.get_extent() for image in draw_global.draw(global_page(pictures)).axes.images]
    columns, rows = {round(e[0], 6) for e in extents}, {round(e[2], 6) for e in extents}
    assert (len(extents), len(columns), len(rows)) == (9, 3, 3)
    assert len({(round(e[1] - e[0], 6), round(e[2] - e[3], 6)) for e in extents}) == 1


def shown_names(canvas: Canvas) -> str:
    """All texts of a page without spaces, which breaking lines removes."""
    return "".join("".join(texts(canvas)).split())


NAMES = {
    name: name
    for name in ("bookkeeper #323", LONG, WORD, f"{LONG} #12345", "x" * 200, "a\nb\tc", r"$x_1^2$ \frac{1}{0} 50% #1")
} | {"\ud83d\udcffa\x07": "\ufffd\ufffda\ufffd"}
"""Name -> what is printed of it, apart from spaces."""


@pytest.mark.slow
def test_names_are_not_cut(pictures) -> None:
    """Whatever they are: all of it is on the page, in every kind of figure."""
    for name, printed in NAMES.items():
        expected = "".join(printed.split())
        concepts = ((name, 0.5), ("b", -0.25))
        cluster = replace(cluster_page(pictures, 1).clusters[0], class_name=name, concepts=concepts)
        latents = latent_page(pictures, 2)
        for canvas, times in (
            (draw_local.draw(local_page(pictures, predicted=name, true=name, concepts=concepts)), 3),
            (draw_global.draw(global_page(pictures, class_name=name, concepts=concepts)), 2),
            (draw_clusters.draw(meta_clusters.Page("a", "a", (cluster,))), 2),
            (draw_latents.draw(replace(latents, latents=(replace(latents.latents[0], label=name),))), 1),
        ):
            assert shown_names(canvas).count(expected) == times, name


def test_bars_near_zero_are_visible() -> None:
    bars = Bars([("a", 100.0, BLUE), ("b", 1e-5, BLUE), ("c", -1e-5, BLUE), ("d", 0.0, BLUE), ("e", -1e30, BLUE)], 2.0, 0.15)
    assert [bars.length(value) for value in (1e-5, -1e-5, 0.0)] == [LEAST_BAR, -LEAST_BAR, 0.0]
    assert LEAST_BAR * 200 >= 3, "pixels"
    assert bars.label_width < bars.zero + bars.length(-1e30) < bars.zero < bars.width
    assert (signed(1e-5, 2), signed(-1e-7, 1), signed(0.0, 2), signed(1e30, 1)) == ("+1e−05", "−1e−07", "+0.00", "+1.00e+30")


def page_height(canvas: Canvas) -> float:
    return float(canvas.figure.get_size_inches()[1])


def test_pages_are_as_tall_as_what_they_show(pictures) -> None:
    """Nothing below the last text and the last image."""
    one = {"concepts": (("only", -2.0),), "n_remaining": 0, "remaining": 0.0, "logit": -2.0}
    few = latent_page(pictures, 4)
    shorter = [
        (draw_local.draw(local_page(pictures, **one)), draw_local.draw(local_page(pictures))),
        (draw_global.draw(global_page(pictures, concepts=())), draw_global.draw(global_page(pictures))),
        (draw_clusters.draw(cluster_page(pictures, 1)), draw_clusters.draw(cluster_page(pictures, 2))),
        (draw_latents.draw(replace(few, latents=few.latents[3:])), draw_latents.draw(replace(few, latents=few.latents[:1]))),
    ]
    for canvas, taller in shorter:
        assert page_height(canvas) < page_height(taller) - 0.2
        for drawn in (canvas, taller):
            bottoms = [image.get_extent()[2] for image in drawn.axes.images]
            bottoms += [text.get_position()[1] for text in drawn.axes.texts if text.get_text()]
            assert page_height(drawn) - max(bottoms) < 0.25


def test_a_class_of_one_image_shows_it_large(pictures) -> None:
    (image,) = draw_global.draw(global_page(pictures, images=pictures(3, 1))).axes.images
    left, right, *_ = image.get_extent()
    assert right - left == pytest.approx(draw_global.GRID)


class TestFonts:
    @pytest.fixture
    def other_font(self, tmp_path: Path) -> Iterator[str]:
        """An installed font that has a cat and a party popper, as boxes."""
        glyphs = {ord("猫"): "cat", ord("🎉"): "party"}
        pen = TTGlyphPen(None)
        pen.moveTo((100, 0))
        for point in ((100, 700), (900, 700), (900, 0)):
            pen.lineTo(point)
        pen.closePath()
        box = pen.glyph()
        font = FontBuilder(1000, isTTF=True)
        font.setupGlyphOrder([".notdef", *glyphs.values()])
        font.setupCharacterMap(glyphs)
        font.setupGlyf(dict.fromkeys([".notdef", *glyphs.values()], box))
        font.setupHorizontalMetrics(dict.fromkeys([".notdef", *glyphs.values()], (1000, 100)))
        font.setupHorizontalHeader(ascent=800, descent=-200)
        font.setupNameTable({"familyName": "Cats", "styleName": "Regular", "psName": "Cats-Regular"})
        font.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
        font.setupPost()
        font.save(tmp_path / "cats.ttf")
        installed = list(font_manager.fontManager.ttflist)
        font_manager.fontManager.addfont(tmp_path / "cats.ttf")
        self.forget()
        yield "Cats"
        font_manager.fontManager.ttflist[:] = installed
        self.forget()

    @staticmethod
    def forget() -> None:
        for cached in (fonts._family_with, fonts._families, fonts._path, fonts.text_width):
            cached.cache_clear()

    def test_another_font_has_what_ours_lacks(self, pictures, tmp_path: Path, other_font: str) -> None:
        canvas = draw_local.draw(local_page(pictures, predicted="a 猫", concepts=(("🎉 party", 1.0),)))
        families = {text.get_text(): text.get_fontfamily() for text in canvas.axes.texts}
        assert families["🎉 party"] == families["a 猫"] == ["DejaVu Sans", other_font]
        assert families["coast"] == ["DejaVu Sans"]
        assert fonts.missing(["a 猫🎉"]) == ""
        assert text_width("猫" * 20, 72) == pytest.approx(20, abs=1), "an em each"
        canvas.save(tmp_path / "a.pdf", tmp_path / "a.png", "{}")
        page = PdfReader(tmp_path / "a.pdf").pages[0]
        assert "猫" in page.extract_text()
        used = page["/Resources"]["/Font"]
        assert {used[name]["/Subtype"] for name in used} <= {"/Type0", "/TrueType"}

    @pytest.mark.filterwarnings("error")
    def test_missing_glyphs_are_drawn_without_a_word(self, pictures, tmp_path: Path, caplog) -> None:
        canvas = draw_local.draw(local_page(pictures, predicted="\U000f1234"))
        canvas.save(tmp_path / "a.pdf", tmp_path / "a.png", "{}")
        assert fonts.missing(["b\U000f1234a", "\U000f1233"]) == "\U000f1233\U000f1234"
        assert not caplog.records

    def test_measured_widths_are_those_drawn(self, pictures) -> None:
        canvas = Canvas(3, 1)
        for text in ("animals and nature", "illi", "WWW", "+1e−05"):
            for bold in (False, True):
                canvas.text(0, 0.5, text, bold=bold)
                canvas.figure.set_dpi(600)
                box = canvas.axes.texts[-1].get_window_extent(FigureCanvasAgg(canvas.figure).get_renderer())
                assert text_width(text, 7, bold=bold) == pytest.approx(box.width / 600, rel=0.03, abs=0.005), text


class TestFitting:
    @given(
        text=st.text(st.characters(codec="latin-1", categories=("L", "N", "P", "Zs")), max_size=80),
        width=st.floats(0.3, 3),
        lines=st.integers(1, 30),
    )
    def test_lines_fit(self, text: str, width: float, lines: int) -> None:
        found = wrapped(text, width, lines=lines)
        assert 1 <= len(found) <= lines
        assert all(text_width(line, 7) <= width or len(line) <= 1 for line in found)
        if "…" not in found[-1]:
            assert "".join(found).replace(" ", "") == "".join(text.split())
        else:
            assert len(found) == lines

    def test_lines_break_between_words(self) -> None:
        assert wrapped("apartment building outdoor", 0.6) == ["apartment", "building", "outdoor"]
        assert wrapped("bookkeeper #323", 0.6) == ["bookkeeper", "#323"]
        assert wrapped("short", 2) == ["short"]
        assert wrapped("", 2) == [""]

    def test_a_shortened_label_keeps_its_index(self) -> None:
        for text in (f"{LONG} #12345", "x" * 10**6 + " #12345"):
            shortened = wrapped(text, 0.9, lines=3)
            assert len(shortened) == 3
            assert shortened[-1].endswith("… #12345")
            assert text_width(shortened[-1], 7) <= 0.9

    @pytest.mark.parametrize(
        ("values", "digits"),
        [((12.0, -3), 1), ((3.0, -12), 1), ((1.4,), 2), ((0.07,), 4), ((0.7,), 3), ((0.004,), 4), ((0.0,), 2), ((), 2)],
    )
    def test_digits_follow_the_largest_number(self, values: tuple[float, ...], digits: int) -> None:
        assert decimals(values) == digits

    def test_signs_are_always_shown(self) -> None:
        assert signed(1.234, 2) == "+1.23"
        assert signed(-0.5, 2) == "−0.50"

    def test_latex_prints_it_as_it_is(self) -> None:
        assert latex_escaped("50%_of_$1 & #2") == r"50\%\_of\_\$1 \& \#2"
        assert latex_escaped("<a>|") == r"\textless{}a\textgreater{}\textbar{}"
        assert latex_escaped("a\\b~^{}") == r"a\textbackslash{}b\textasciitilde{}\textasciicircum{}\{\}"

    def test_latex_typesets_only_on_request(self, pictures) -> None:
        plain, latex = (draw_local.draw(local_page(pictures), use_latex=on) for on in (False, True))
        assert {text.get_usetex() for text in plain.axes.texts} == {False}
        assert {text.get_usetex() for text in latex.axes.texts} == {True}
        assert r"50\%\_of\_\$1 \&" in texts(latex)
        assert r"\textbf{beach}" in texts(latex)
