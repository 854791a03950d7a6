"""The rules for what an image is: formats, colours, transparency, sizes, and which files of a folder count."""

import io
import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from dncbm.features.datasets import FORMATS, BadImage, find_images, least_to_divide, open_image, read_file, suffix_of, to_rgb


@contextmanager
def at_most(n_bytes: int) -> Iterator[None]:
    """The block allocates at most this much at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < n_bytes
    finally:
        tracemalloc.stop()


def saved(image: Image.Image, format: str = "png", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


RNG = np.random.default_rng(5)
RGB = Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8))
RGBA = Image.fromarray(RNG.integers(0, 256, (20, 30, 4), dtype=np.uint8))
SIXTEEN = np.arange(600, dtype=np.uint16).reshape(20, 30) * 109
IMAGES = {
    "rgb": saved(RGB),
    "grey": saved(RGB.convert("L")),
    "black and white": saved(RGB.convert("1")),
    "cmyk": saved(RGB.convert("CMYK"), "jpeg"),
    "palette": saved(RGB.quantize(16)),
    "palette, a transparent colour": saved(RGB.quantize(16), transparency=3),
    "palette, transparent colours": saved(RGB.quantize(16), transparency=bytes([0, 128, 255, 255])),
    "rgba": saved(RGBA),
    "opaque rgba": saved(RGB.convert("RGBA")),
    "grey and alpha": saved(RGBA.convert("LA")),
    "a transparent colour": saved(RGB, transparency=RGB.getpixel((0, 0))),
    "transparent webp": saved(RGBA, "webp", lossless=True, exact=True),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("content", IMAGES.values(), ids=IMAGES)
def test_images_become_rgb_as_torchvision_makes_them_and_transparency_is_seen(content: bytes) -> None:
    image, is_transparent = to_rgb(open_image(content))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
    alpha = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))[..., 3]
    assert is_transparent == (alpha.min() < 255)


@pytest.mark.parametrize(("background", "value"), [("white", 255), ("black", 0)])
@pytest.mark.parametrize("content", IMAGES.values(), ids=IMAGES)
def test_a_background_lies_behind_what_is_transparent(content: bytes, background: str, value: int) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA")).astype(float)
    alpha = pixels[..., 3:] / 255
    expected = alpha * pixels[..., :3] + (1 - alpha) * value
    image, is_transparent = to_rgb(open_image(content), background)
    np.testing.assert_allclose(np.asarray(image), expected, atol=1)
    assert is_transparent == (alpha.min() < 1)


@pytest.mark.parametrize("format", ["png", "tiff"])
def test_of_sixteen_bits_the_upper_eight_are_kept(format: str) -> None:
    image, _ = to_rgb(open_image(saved(Image.fromarray(SIXTEEN), format)))
    np.testing.assert_array_equal(np.asarray(image), np.repeat((SIXTEEN // 256)[..., None], 3, axis=2))


def test_suffixes_belong_to_their_formats() -> None:
    Image.init()
    known = Image.registered_extensions()
    assert {suffix: known[f".{suffix}"] for suffixes in FORMATS.values() for suffix in suffixes} == {
        suffix: format for format, suffixes in FORMATS.items() for suffix in suffixes
    }


@pytest.mark.parametrize("format", FORMATS)
def test_formats_are_told_by_content(format: str) -> None:
    assert open_image(saved(RGB, format)).size == RGB.size


@pytest.mark.parametrize("format", ["EPS", "PCX", "TGA", "ICO", "PDF"])
def test_other_formats_stay_closed(format: str) -> None:
    """An EPS would start Ghostscript."""
    with pytest.raises(UnidentifiedImageError):
        open_image(saved(RGB, format))


@pytest.mark.parametrize(("size", "opens"), [((1, 1), True), ((1, 200), True), ((201, 1), False), ((1, 65_000), False)])
def test_an_image_far_longer_than_wide_is_not_scaled_up(size: tuple[int, int], opens: bool) -> None:
    content = saved(Image.new("RGB", size))
    if opens:
        assert to_rgb(open_image(content))[0].size == size
        return
    with pytest.raises(BadImage, match="more than 200 times longer than wide"):
        open_image(content)


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.tif").open("wb") as file:
        file.truncate(3 << 30)
    with at_most(1 << 20), pytest.raises(BadImage, match="more than 256 MiB"):
        read_file(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a.JPG", "jpg"), ("s1.input.jpg", "jpg"), ("jpg", ""), (".jpg", ""), ("a.", ""), ("2024.01.05-1.PNG", "png")],
)
def test_the_last_part_of_a_name_is_its_suffix(name: str, suffix: str) -> None:
    assert suffix_of(name) == suffix


@pytest.fixture
def touch() -> Callable[..., None]:
    """Makes files of as many bytes as their names have letters."""

    def make(*paths: Path) -> None:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x" * len(path.name))

    return make


def test_the_images_of_a_folder(tmp_path: Path, touch) -> None:
    images = ("a.jpg", "b/c/d.PNG", "b/e.f.tiff", "x.jpg/in a folder.bmp")
    others = ("t.svg", "b/u.svg", "notes.txt", "jpg")
    hidden = (".a.jpg", "._a.jpg", ".cache/a.jpg", "b/__MACOSX/a.jpg")
    touch(*(tmp_path / name for name in (*images, *others, *hidden)))
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    found = find_images(tmp_path, set())
    expected = {name: len(Path(name).name) for name in images} | {"gone.png": -1, "self.png": -1}
    assert dict(zip(map(os.fsdecode, found.names), found.sizes, strict=True)) == expected
    assert found.others == {"svg": 2, "txt": 1, "": 1, "jpg": 1}


def test_no_folder_is_entered_twice_through_links(tmp_path: Path, touch) -> None:
    top = tmp_path / "photos"
    touch(*(top / name for name in ("a/1.png", "a/b/2.png", "c/3.png")), tmp_path / "elsewhere/4.png")
    for link, target in (("a/up", top), ("A", top / "a"), ("c/again", top / "c"), ("new", "elsewhere"), ("new2", "elsewhere")):
        (top / link).symlink_to(tmp_path / target)
    found = find_images(top, set())
    assert sorted(found.names) == [b"a/1.png", b"a/b/2.png", b"c/3.png", b"new/4.png"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch, refusal) -> None:
    def deny(path: bytes) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("os.scandir", deny)
    with refusal(f"cannot read the folder {tmp_path}", "Permission denied"):
        find_images(tmp_path, set())


@pytest.mark.parametrize(("shares", "n"), [((0.05,), 11), ((0.1,), 6), ((0.1, 0.1), 7)])
def test_the_fewest_images_that_can_be_divided(shares: tuple[float, ...], n: int) -> None:
    assert least_to_divide(*shares) == n
