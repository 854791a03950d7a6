"""The encoder of a bottleneck: a reference to it, and a fingerprint by which it is recognised."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dncbm.features.encoders import Encoder, load_encoder
from dncbm.runs.errors import UserError, first_line
from dncbm.runs.settings import LOCAL_DIR, EncoderEntry, Settings

FILE = "file:"
"""What precedes the path of a checkpoint file in a bundle; a pretrained tag has nothing before it."""
TOLERANCES = {"fp32": 5e-3, "fp16": 2e-2, "bf16": 5e-2}
"""Precision -> how far features may be from those of a fingerprint, relative to their norm. Other processors and precisions
round in other ways: bfloat16 moves the demo's features by 2.5 %. Bilinear instead of bicubic resampling moves them by 9 %,
another mean by 8 %, other weights by far more."""
IMAGES, HEIGHT, WIDTH = 4, 256, 288


@dataclass(frozen=True)
class Fingerprint:
    """The features that an encoder gives for `synthetic_images`."""

    features: NDArray[np.float32]
    """IMAGES x D."""
    precision: str
    """Of the encoder that gave them."""
    preprocessing: Mapping[str, Any]
    """Size, mean, standard deviation and resampling, for people: the features tell whether it is the same."""


@dataclass(frozen=True)
class EncoderReference:
    """Which encoder a bottleneck is made for, and where it is."""

    name: str
    """Its name in the config of the run."""
    settings: Settings
    """Where `location` is looked up."""
    location: str
    """What `load_encoder` loads."""
    about: Mapping[str, Any]
    """For `config.json`: hashes of the weights, hook point, precision and background of the features."""
    is_bundled: bool = False
    """Whether it was read from a bundle, so that somebody else may have it elsewhere."""

    @property
    def title(self) -> str:
        """The name, without the place that a `local-dir:` has on this machine."""
        return Path(self.name).name if self.name.startswith(LOCAL_DIR) else self.name

    @property
    def background(self) -> str:
        """What is put behind transparent images."""
        return str(self.about["background"])

    def load(self, device: torch.device, expected: Fingerprint | None) -> Encoder:
        """The encoder on a device, compared with a fingerprint if there is one.

        Raises UserError if it cannot be loaded, or gives other features.
        """
        try:
            encoder = load_encoder(self.settings, self.location, device)
        except UserError as error:
            if not self.is_bundled:
                raise
            raise UserError(f"{error}; or say where it is, {_WHERE}") from error
        if expected is not None:
            self._check(encoder, expected)
        return encoder

    def _check(self, encoder: Encoder, expected: Fingerprint) -> None:
        found = fingerprint_of(encoder)
        if found.features.shape != expected.features.shape:
            reason = f"{found.features.shape[1]} numbers per image instead of {expected.features.shape[1]}"
        else:
            norms = np.linalg.norm(expected.features, axis=1)
            far = float((np.linalg.norm(found.features - expected.features, axis=1) / np.maximum(norms, 1e-12)).max())
            if far <= max(TOLERANCES[found.precision], TOLERANCES[expected.precision]):
                return
            reason = f"{far:.1%} away from those of the bundle"
        raise UserError(
            f"the encoder {self.location!r} gives other features than the one that this model was made with ({reason}): use "
            f"one with the same weights and preprocessing, {_WHERE}"
        )

    def as_json(self, folder: Path | None) -> dict[str, Any]:
        """For the `config.json` of a bundle in a folder. Paths are relative to it.

        Without a folder, for a bundle that is to be read elsewhere, only the names of files and folders are written: paths
        of this machine mean nothing there, and may tell more than its owner wants to publish.
        """
        entry = self.settings.encoder(self.location)
        model, pretrained = entry.model, entry.pretrained
        if model.startswith(LOCAL_DIR):
            model = LOCAL_DIR + _place(model.removeprefix(LOCAL_DIR), folder)
        if pretrained and Path(pretrained).is_file():
            pretrained = FILE + _place(pretrained, folder)
        return {"name": self.title, "model": model, "pretrained": pretrained, **self.about}


def _place(path: str, folder: Path | None) -> str:
    return Path(path).name if folder is None else os.path.relpath(path, folder.absolute())


_WHERE = 'from_pretrained(..., encoder="local-dir:FOLDER") or encoder="openclip:MODEL/PRETRAINED"'


def bundled_encoder(config: Path, kept: Mapping[str, Any], elsewhere: str | None) -> EncoderReference:
    """The encoder that the config of a bundle names, or the one that is named instead of it."""
    name, model, pretrained = str(kept["name"]), str(kept["model"]), kept["pretrained"]
    if model.startswith(LOCAL_DIR):
        model = LOCAL_DIR + os.path.normpath(config.parent.absolute() / model.removeprefix(LOCAL_DIR))
    if pretrained and pretrained.startswith(FILE):
        pretrained = os.path.normpath(config.parent.absolute() / pretrained.removeprefix(FILE))
    roots = dict.fromkeys(("data_dir", "sae_dir", "probe_dir", "vocab_dir", "analysis_dir"), config.parent)
    settings = Settings(
        path=config, **roots, vocabulary="", sae_datasets={}, probe_datasets={}, defaults={},
        encoders={name: EncoderEntry(model, pretrained)},
    )  # fmt: skip
    apart = ("name", "model", "pretrained", "fingerprint_precision", "preprocessing")
    about = {key: value for key, value in kept.items() if key not in apart}
    return EncoderReference(name, settings, elsewhere or name, about, is_bundled=True)


def fingerprint_of(encoder: Encoder) -> Fingerprint:
    """The features of `synthetic_images`, with the encoder's precision."""
    from open_clip.model import get_model_preprocess_cfg

    try:
        pixels = torch.stack([encoder.preprocess(image) for image in synthetic_images()])
        features = encoder.encode_images(pixels).float().cpu().numpy()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the encoder {encoder.name!r} does not work: {first_line(error)}") from error
    preprocessing = {key: list(v) if isinstance(v, tuple) else v for key, v in get_model_preprocess_cfg(encoder.model).items()}
    return Fingerprint(features, encoder.precision, preprocessing)


def synthetic_images() -> list[Image.Image]:
    """Images by a formula in whole numbers, which gives the same pixels on every machine.

    Channel c of pixel (x, y) of image k is ((k + 1) x + (c + 1) y + floor(x y / 2^(k + 3))) mod 256.
    """
    y, x, c = np.meshgrid(np.arange(HEIGHT), np.arange(WIDTH), np.arange(3), indexing="ij")
    found = [((k + 1) * x + (c + 1) * y + (x * y >> (k + 3))) % 256 for k in range(IMAGES)]
    return [Image.fromarray(pixels.astype(np.uint8)) for pixels in found]
