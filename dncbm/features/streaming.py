"""Features of images in memory or in any files: decoded in threads, encoded in batches, not written anywhere."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from dncbm.features.datasets import FORMATS, Encoded, open_image, read_file, to_rgb
from dncbm.features.encoders import Encoder
from dncbm.features.encoding import default_batch_size
from dncbm.runs.devices import default_cores
from dncbm.runs.errors import UserError, first_line

Picture = Image.Image | str | Path
"""An image, or the path of its file."""


def encode_pictures(encoder: Encoder, pictures: Iterable[Picture], background: str = "none") -> Iterator[torch.Tensor]:
    """Features of pictures in order, in batches of B x D on the encoder's device, preprocessed as in the extraction.

    Threads decode the next batch while one is encoded, so that two batches of pixels are in memory, however many pictures
    there are.

    Raises UserError if a picture cannot be read.
    """
    size = default_batch_size(encoder.device)
    numbered = enumerate(pictures)
    waiting: deque[tuple[Picture, Future[torch.Tensor]]] = deque()
    by_id: dict[int, Future[torch.Tensor]] = {}  # two threads must not decode one image
    with ThreadPoolExecutor(default_cores()) as pool:
        try:
            while True:
                for number, picture in islice(numbered, 2 * size - len(waiting)):
                    if id(picture) not in by_id:
                        by_id[id(picture)] = pool.submit(_pixels, encoder, number, picture, background)
                    waiting.append((picture, by_id[id(picture)]))
                if not waiting:
                    return
                pixels = []
                for _ in range(min(size, len(waiting))):
                    picture, decoded = waiting.popleft()
                    pixels.append(decoded.result())
                    by_id.pop(id(picture), None)
                yield encode_pixels(encoder, torch.stack(pixels))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # otherwise leaving the block waits for what nobody wants
            raise


def encode_pixels(encoder: Encoder, pixels: torch.Tensor) -> torch.Tensor:
    """Features (B x D, on the encoder's device) of at most a batch of preprocessed images, B x 3 x H x W of any float type."""
    pixels = pixels.float()
    pinned = pixels.pin_memory() if encoder.device.type == "cuda" and pixels.device.type == "cpu" else pixels
    return encoder.encode_images(pinned)  # the extraction pads small batches, which makes one image as slow as sixteen


def picture_of(picture: Picture, background: str = "none", called: str = "the image") -> Image.Image:
    """A picture in RGB. A PIL image that is given is not changed.

    Raises UserError if it cannot be read, which names a file by its path and another picture as it is `called`.
    """
    try:
        if not isinstance(picture, Image.Image):
            called = f"the image {picture}"
            content: Encoded = read_file(picture)
        else:  # `to_rgb` removes the entry
            content = picture.copy() if "transparency" in picture.info else picture
        return to_rgb(open_image(content), background)[0]
    except Exception as error:  # decoders raise anything
        raise UserError(f"cannot read {called}: {_reason(error)}") from error


def _pixels(encoder: Encoder, number: int, picture: Picture, background: str) -> torch.Tensor:
    if not isinstance(picture, Image.Image | str | Path):
        raise UserError(
            f"image {number} is neither a PIL image nor a path, but {type(picture).__name__}: PIL.Image.fromarray makes an "
            "image of pixels; preprocessed images and features are one tensor or array, strengths a sparse matrix"
        )
    return encoder.preprocess(picture_of(picture, background, f"image {number}"))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}, or damaged"
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
