"""Features of images that somebody holds in hand: decoded in threads, encoded in batches, not written anywhere."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from dncbm.features.datasets import open_image, read_file, to_rgb
from dncbm.features.encoders import Encoder
from dncbm.features.encoding import default_batch_size, encode_batch
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
    waiting: deque[Future[torch.Tensor]] = deque()
    with ThreadPoolExecutor(default_cores()) as pool:
        try:
            while True:
                ahead = islice(numbered, 2 * size - len(waiting))
                waiting.extend(pool.submit(_pixels, encoder, number, picture, background) for number, picture in ahead)
                if not waiting:
                    return
                yield encode_pixels(encoder, torch.stack([waiting.popleft().result() for _ in range(min(size, len(waiting)))]))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # otherwise leaving the block waits for what nobody wants
            raise


def encode_pixels(encoder: Encoder, pixels: torch.Tensor) -> torch.Tensor:
    """Features (B x D, on the encoder's device) of at most a batch of preprocessed images, B x 3 x H x W."""
    pinned = pixels.pin_memory() if encoder.device.type == "cuda" and pixels.device.type == "cpu" else pixels
    return encode_batch(encoder, pinned, default_batch_size(encoder.device))


def picture_of(picture: Picture, background: str = "none") -> Image.Image:
    """A picture in RGB. Raises whatever a decoder raises if it cannot be read."""
    return to_rgb(open_image(picture if isinstance(picture, Image.Image) else read_file(picture)), background)[0]


def _pixels(encoder: Encoder, number: int, picture: Picture, background: str) -> torch.Tensor:
    if not isinstance(picture, Image.Image | str | Path):
        raise UserError(f"image {number} is neither a PIL image nor a path, but {type(picture).__name__}")
    try:
        return encoder.preprocess(picture_of(picture, background))
    except Exception as error:  # decoders raise anything
        raise UserError(f"cannot read {_called(number, picture)}: {first_line(error)}") from error


def _called(number: int, picture: Picture) -> str:
    return f"image {number}" if isinstance(picture, Image.Image) else f"the image {picture}"
