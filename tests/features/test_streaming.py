"""Pictures in hand: the same features as the extraction's, in order, and never more than two batches ahead."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dncbm.features.streaming import encode_pictures, encode_pixels, picture_of


def test_features_come_in_order_and_equal_the_encoders(make_encoder, random_image, tmp_path: Path) -> None:
    encoder = make_encoder()
    pictures = [random_image(seed) for seed in range(75)]
    paths = [tmp_path / f"{number}.png" for number in range(75)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    wanted = np.array([np.asarray(picture, dtype=np.float64).mean(axis=(0, 1)) / 255 for picture in pictures])
    mixed = [path if number % 2 else str(path) if number % 3 else pictures[number] for number, path in enumerate(paths)]
    for given in (pictures, paths, mixed, iter(paths)):
        batches = list(encode_pictures(encoder, given))
        assert [len(batch) for batch in batches] == [32, 32, 11]
        assert np.allclose(torch.cat(batches).numpy(), wanted, atol=1e-6)
    assert list(encode_pictures(encoder, [])) == []
    assert torch.equal(encode_pixels(encoder, torch.ones(2, 3, 4, 4)), torch.ones(2, 3))


def test_pictures_are_decoded_at_most_two_batches_ahead(make_encoder, random_image) -> None:
    asked = []

    def pictures():
        for number in range(500):
            asked.append(number)
            yield random_image(number)

    batches = encode_pictures(make_encoder(), pictures())
    for taken in range(1, 4):
        next(batches)
        assert len(asked) <= (taken + 1) * 32
    batches.close()
    assert len(asked) < 200


def test_an_unreadable_picture_is_one_line(make_encoder, random_image, tmp_path: Path, refusal) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"x")
    cut = random_image(0)
    cut.load = lambda: (_ for _ in ()).throw(OSError("image file is truncated"))
    for parts, pictures in (
        ((f"the image {broken}", "none of JPEG, PNG"), [random_image(0), broken]),
        (("image 1:", "truncated"), [random_image(0), cut]),
        (("image 0 is neither", "None"), [None]),
    ):
        with refusal(*parts):
            list(encode_pictures(make_encoder(), pictures))


def test_threads_leave_the_filters_of_warnings_as_they_are(make_encoder, random_image, tmp_path: Path) -> None:
    random_image(0).save(tmp_path / "0.png")
    before = list(warnings.filters)
    list(encode_pictures(make_encoder(), (tmp_path / "0.png" for _ in range(6000))))
    assert list(warnings.filters) == before


def test_a_background_is_put_behind_transparent_pictures(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    picture.save(tmp_path / "clear.png")
    for given in (picture, tmp_path / "clear.png"):
        assert picture_of(given).getpixel((0, 0)) == (255, 0, 0)
        assert picture_of(given, "white").getpixel((0, 0)) == (255, 255, 255)


def test_a_picture_in_hand_stays_as_it_is_and_may_come_twice(make_encoder, random_image, tmp_path: Path) -> None:
    random_image(0, (300, 200)).save(tmp_path / "0.gif", transparency=0)
    opened = Image.open(tmp_path / "0.gif")  # threads that decode one image at a time fail, or mix its pixels
    about = dict(opened.info)
    features = torch.cat(list(encode_pictures(make_encoder(), [opened] * 70)))
    assert torch.equal(features, features[:1].expand(70, -1))
    assert opened.info.get("transparency") == about["transparency"]


def test_preprocessed_images_may_be_of_any_float_type(make_encoder) -> None:
    pixels = torch.rand(3, 3, 4, 4)
    wanted = encode_pixels(make_encoder(), pixels)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)):
        assert torch.allclose(encode_pixels(make_encoder(), pixels.to(dtype)), wanted, atol=tolerance)
