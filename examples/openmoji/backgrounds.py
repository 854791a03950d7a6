"""Draws animals and food on land and on water, in the layout of Waterbirds: a data set with a spurious correlation.

In training, 95 % of the images of a class have the background of that class. Each held-out emoji has both kinds equally often.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

import resvg_py
from emoji_data import Emoji, share_of
from images import IMAGE_SIZE, JPEG_QUALITY, MAX_WORKERS
from PIL import Image, ImageDraw
from tqdm import tqdm

CLASSES = ("animal", "food")
CATEGORIES = ("animals_and_nature", "food_and_drink")  # the category that each class is taken from
PLACES = ("land", "water")  # the kind of background that goes with each class
SPLITS = ("train", "train_val", "val")  # in the order of metadata.csv's numbers

MINORITY = 20  # one training image in this many has the background of the other class
IMAGES_PER_EMOJI = 8  # in training, on average
COPIES = 4  # of each held-out emoji on each kind of background
EMOJI_SIZE = (0.5, 0.6)  # longer side of an emoji, as a share of the image
RIDGE_STEPS = 64  # line segments of a hill or wave
OUTLINE = 0.01  # width of the lines in backgrounds, as a share of the image
SCALE = 2  # backgrounds are drawn this much larger, for smooth edges

# Members of the two categories that are not an animal, or not food but a drink, a vessel or an animal.
NOT_IN_CLASS = {
    *("seedling", "evergreen tree", "deciduous tree", "palm tree", "cactus", "tulip", "cherry blossom", "rose", "hibiscus"),
    *("sunflower", "blossom", "sheaf of rice", "herb", "four leaf clover", "maple leaf", "fallen leaf", "mushroom", "bouquet"),
    *("leaf fluttering in wind", "rosette", "white flower", "wilted flower", "potted plant", "lotus", "hyacinth", "shamrock"),
    *("coral", "empty nest", "nest with eggs", "pig nose", "paw prints", "feather", "wing", "spider web", "microbe"),
    *("spiral shell", "crab", "shrimp", "squid", "lobster", "oyster", "salt", "ice", "jar", "pouring liquid"),
    *("fork and knife", "fork and knife with plate", "kitchen knife", "spoon", "chopsticks", "amphora", "teapot", "sake"),
    *(
        "teacup without handle",
        "hot beverage",
        "wine glass",
        "cocktail glass",
        "tropical drink",
        "beer mug",
        "clinking beer mugs",
    ),
    *("clinking glasses", "tumbler glass", "glass of milk", "baby bottle", "bottle with popping cork", "cup with straw"),
    *("beverage box", "mate", "bubble tea"),
}


@dataclass(frozen=True)
class Scene:
    """An emoji on a background. `number` tells apart the images of one emoji."""

    emoji: Emoji
    label: int
    place: int
    number: int

    @property
    def file_name(self) -> str:
        return f"{CLASSES[self.label]}/{self.emoji.file_stem}_on_{PLACES[self.place]}_{self.number}.jpg"


def class_of(record: Emoji) -> int | None:
    """Number of an emoji's class; None if it is in neither."""
    if record.category not in CATEGORIES or record.name in NOT_IN_CLASS:
        return None
    return CATEGORIES.index(record.category)


def plan(records: Sequence[Emoji]) -> list[Scene]:
    """Which emoji are drawn on which backgrounds, split by split. The same records give the same plan on every machine."""
    labelled = [(record, label) for record in records if (label := class_of(record)) is not None]
    scenes = []
    for split in SPLITS:
        members = [[record for record, label in labelled if (record.split, label) == (split, c)] for c in range(len(CLASSES))]
        # The same number for both classes, and one of which 5 % is a whole number.
        wanted = MINORITY * max(1, round(IMAGES_PER_EMOJI * sum(map(len, members)) / len(CLASSES) / MINORITY))
        for label, of_class in enumerate(members):
            scenes += _on_both(of_class, label) if split == "val" else _mostly_on_own(of_class, label, wanted)
    return scenes


def _on_both(records: Sequence[Emoji], label: int) -> list[Scene]:
    numbers = range(COPIES)
    return [Scene(record, label, place, number) for record in records for number in numbers for place in range(len(PLACES))]


def _mostly_on_own(records: Sequence[Emoji], label: int, wanted: int) -> list[Scene]:
    slots = [(records[i % len(records)], i // len(records)) for i in range(wanted)] if records else []
    drawn = sorted(range(len(slots)), key=lambda i: share_of(f"background {slots[i][0].code} {slots[i][1]}"))
    others = set(drawn[: len(slots) // MINORITY])
    return [Scene(record, label, 1 - label if i in others else label, number) for i, (record, number) in enumerate(slots)]


# -------------------------------------------------------------------------------------------------------------- drawing

Colour = tuple[int, int, int]


def _between(random: Random, low: Colour, high: Colour) -> Colour:
    """A colour on the line between two."""
    share = random.random()
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _ridge(random: Random, height: float, swing: float, waves: float) -> list[tuple[float, float]]:
    """Points of a wavy line from left to right, in shares of the image, at about `height` from the top."""
    first, second = random.uniform(0, math.tau), random.uniform(0, math.tau)
    points = []
    for i in range(RIDGE_STEPS + 1):
        x = i / RIDGE_STEPS
        large, small = (math.sin(math.tau * n * x + phase) for n, phase in ((waves, first), (2.3 * waves, second)))
        points.append((x, height + swing * (0.7 * large + 0.3 * small)))
    return points


class _Canvas:
    """Draws filled shapes with an outline. Coordinates are shares of the image."""

    def __init__(self, sky: Colour, outline: Colour) -> None:
        self.size = IMAGE_SIZE * SCALE
        self.image = Image.new("RGB", (self.size, self.size), sky)
        self.draw = ImageDraw.Draw(self.image)
        self.outline, self.width = outline, round(OUTLINE * self.size)

    def _pixels(self, points: Sequence[tuple[float, float]]) -> list[tuple[int, int]]:
        return [(round(x * self.size), round(y * self.size)) for x, y in points]

    def below(self, ridge: Sequence[tuple[float, float]], colour: Colour) -> None:
        """Everything under a ridge. Only the ridge is outlined."""
        self.draw.polygon(self._pixels([*ridge, (1, 1), (0, 1)]), fill=colour)
        self.draw.line(self._pixels(ridge), fill=self.outline, width=self.width, joint="curve")

    def polygon(self, points: Sequence[tuple[float, float]], colour: Colour) -> None:
        self.draw.polygon(self._pixels(points), fill=colour)
        self.draw.line(self._pixels([*points, points[0]]), fill=self.outline, width=self.width, joint="curve")

    def ellipse(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        box = self._pixels([(x - width / 2, y - height / 2), (x + width / 2, y + height / 2)])
        self.draw.ellipse([*box[0], *box[1]], fill=colour, outline=self.outline, width=self.width)


def _sky(random: Random) -> Colour:
    return _between(random, (206, 232, 246), (232, 242, 248))


def _tree(canvas: _Canvas, random: Random, x: float, foot: float) -> None:
    height = random.uniform(0.2, 0.3)
    top, leaves = foot - 0.3 * height, _between(random, (60, 130, 40), (120, 180, 50))
    canvas.polygon([(x - 0.014, top), (x + 0.014, top), (x + 0.014, foot), (x - 0.014, foot)], (106, 70, 47))
    if random.random() < 0.5:
        canvas.ellipse(x, foot - 0.65 * height, 0.66 * height, 0.8 * height, leaves)
    else:
        for up, half in ((0.62, 0.28), (0.82, 0.22), (1.0, 0.16)):
            base = foot - (up - 0.42) * height
            canvas.polygon([(x, foot - up * height), (x + half * height, base), (x - half * height, base)], leaves)


def land(random: Random) -> Image.Image:
    """Hills with trees under a pale sky."""
    canvas = _Canvas(_sky(random), outline=(38, 92, 34))
    horizon, trees = random.uniform(0.3, 0.42), 5

    def hill(below_horizon: float, swing: float, waves: float) -> list[tuple[float, float]]:
        ridge = _ridge(random, horizon + below_horizon, swing, waves * random.uniform(1, 2))
        canvas.below(ridge, _between(random, (92, 158, 49), (150, 190, 80)))
        return ridge

    hill(-0.06, 0.06, 0.8)
    ridge = hill(0.06, 0.04, 0.6)
    for i in range(trees):
        x = (i + random.uniform(0.15, 0.85)) / trees
        _tree(canvas, random, x, foot=ridge[round(x * RIDGE_STEPS)][1] + 0.03)
    hill(0.26, 0.03, 0.5)
    return canvas.image


def water(random: Random) -> Image.Image:
    """Waves under a pale sky."""
    canvas = _Canvas(_sky(random), outline=(28, 86, 164))
    horizon, rows = random.uniform(0.28, 0.38), 7
    blues = (_between(random, (138, 206, 242), (154, 216, 247)), _between(random, (87, 170, 224), (107, 186, 232)))
    for i in range(rows):
        ridge = _ridge(random, horizon + 0.66 * i / rows, 0.02 + 0.004 * i, random.uniform(2.5, 3.5))
        canvas.below(ridge, blues[i % 2])
    return canvas.image


BACKGROUNDS: tuple[Callable[[Random], Image.Image], ...] = (land, water)  # in the order of PLACES


def cut_out(svg: str) -> Image.Image:
    """An SVG text's drawing on a transparent canvas, without the empty margin."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=IMAGE_SIZE, height=IMAGE_SIZE, skip_system_fonts=True)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return drawing.crop(drawing.getbbox())


def compose(drawing: Image.Image, scene: Scene) -> bytes:
    """A scene as a JPEG. Images of an emoji with equal numbers differ only in the background."""
    seed = f"{scene.emoji.code} {scene.number}"
    image = BACKGROUNDS[scene.place](Random(f"{PLACES[scene.place]} {seed}")).reduce(SCALE)
    random = Random(f"emoji {seed}")
    scale = random.uniform(*EMOJI_SIZE) * IMAGE_SIZE / max(drawing.size)
    emoji = drawing.resize((round(drawing.width * scale), round(drawing.height * scale)), Image.Resampling.LANCZOS)
    x = round(random.uniform(0.08, 0.92) * (IMAGE_SIZE - emoji.width))
    y = round(random.uniform(0.55, 0.92) * (IMAGE_SIZE - emoji.height))
    image.paste(emoji, (x, y), emoji)
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def _compose_all(scenes: Sequence[Scene]) -> list[bytes]:
    """All images of one emoji, which is rendered once."""
    drawing = cut_out(scenes[0].emoji.svg.read_text(encoding="utf-8"))
    return [compose(drawing, scene) for scene in scenes]


def write_backgrounds(records: Sequence[Emoji], folder: Path) -> list[Scene]:
    """Write the images, and a `metadata.csv` with Waterbirds' columns and the names of classes and places."""
    scenes = plan(records)
    of_emoji: dict[str, list[Scene]] = defaultdict(list)
    for scene in scenes:
        of_emoji[scene.emoji.code].append(scene)
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1)) as pool:
        drawn = pool.map(_compose_all, of_emoji.values(), chunksize=4)
        shown = tqdm(drawn, desc="backgrounds", unit="emoji", total=len(of_emoji))
        for mine, jpegs in zip(of_emoji.values(), shown, strict=True):
            for scene, jpeg in zip(mine, jpegs, strict=True):
                (folder / scene.file_name).write_bytes(jpeg)
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("img_id", "img_filename", "y", "split", "place", "y_name", "place_name"))
        for number, scene in enumerate(scenes, 1):
            split = SPLITS.index(scene.emoji.split)
            names = (CLASSES[scene.label], PLACES[scene.place])
            table.writerow((number, scene.file_name, scene.label, split, scene.place, *names))
    return scenes
