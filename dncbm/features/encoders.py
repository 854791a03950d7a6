"""From an encoder's name to its image tower, text tower, tokenizer and preprocessing, all through open_clip."""

import functools
import logging
import os
import zipfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dncbm.runs.errors import UserError
from dncbm.runs.manifests import file_hash
from dncbm.runs.settings import LOCAL_DIR, Settings

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
Tokenizer = Callable[[Sequence[str]], torch.Tensor]


@dataclass(frozen=True)
class Encoder:
    """A CLIP-like model ready to encode images and texts on one device."""

    name: str
    model: torch.nn.Module
    preprocess: Callable[[Image.Image], torch.Tensor]
    """PIL image -> 3 x H x W float32, the encoder's own evaluation preprocessing."""
    tokenizer: Tokenizer
    device: torch.device
    precision: str = "fp32"
    """`fp32`, `fp16` or `bf16`: the precision of matrix products."""

    @torch.inference_mode()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Features of preprocessed images (N x 3 x H x W), not normalised (METHOD section 1).

        Returns N x D on the device: float16 if the precision is fp16, else float32 (numpy has no bfloat16).
        """
        images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        with self._autocast():
            features: torch.Tensor = self.model.encode_image(images)  # type: ignore[operator]
        return features.to(torch.float16 if self.precision == "fp16" else torch.float32)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """L2-normalised text embeddings, N x D float32 on the CPU."""
        tokens = _without_padding(self.model, self.tokenizer(list(texts))).to(self.device)
        with self._autocast():
            embeddings: torch.Tensor = self.model.encode_text(tokens)  # type: ignore[operator]
        return torch.nn.functional.normalize(embeddings.float(), dim=-1).cpu()

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = DTYPES.get(self.precision)
        return torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext()


def load_encoder(settings: Settings, name: str, device: torch.device, precision: str | None = None) -> Encoder:
    """Build an encoder and load its weights.

    `name` is a name in the config's table of encoders, `openclip:MODEL/PRETRAINED` or `local-dir:FOLDER`; `precision` is one
    of PRECISIONS, by default fp16 on a GPU, else fp32.

    Raises UserError if the name is unknown, or open_clip has no such model or cannot load its weights.
    """
    import open_clip

    entry = settings.encoder(name)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else every worker process prints a warning
    try:
        openai = _openai_weights(entry.pretrained)
        tag = open_clip.get_pretrained_cfg(entry.model, entry.pretrained) if entry.pretrained else {}
        model, _, preprocess = open_clip.create_model_and_transforms(
            entry.model,
            pretrained=None if openai else entry.pretrained,
            load_weights=not openai,
            # Without it, open_clip only warns that OpenAI's weights need another activation function.
            force_quick_gelu=bool(openai or tag.get("quick_gelu", False)),
        )
        if openai:
            model.load_state_dict(openai)
    except Exception as error:
        raise UserError(
            f"cannot load the encoder {name!r} ({entry.model}, {entry.pretrained}): {_reason(error)}; open_clip downloads "
            f"weights on first use; without internet, name a checkpoint file in `encoders` of {settings.path}"
        ) from error
    model = model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    precision = precision or ("fp16" if device.type == "cuda" else "fp32")
    return Encoder(name, model, preprocess, _tokenizer(entry.model), device, precision)


def _tokenizer(model: str) -> Tokenizer:
    """An encoder's tokenizer, loaded with the first text: some tokenizers are downloaded, and images need none."""

    @functools.cache
    def load() -> Tokenizer:
        import open_clip

        try:
            return open_clip.get_tokenizer(model)
        except Exception as error:
            raise UserError(
                f"cannot load the tokenizer of {model}: {_reason(error)}; it is downloaded on first use: load it once with "
                "internet access and with HF_HOME on a shared disk"
            ) from error

    return lambda texts: load()(texts)


def _reason(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def describe_encoder(settings: Settings, name: str) -> dict[str, Any]:
    """The identity of an encoder's weights, found without loading them: model, pretrained tag, hashes of local files."""
    entry = settings.encoder(name)
    described: dict[str, Any] = {"encoder": name, "model": entry.model, "pretrained": entry.pretrained}
    files = []
    if entry.model.startswith(LOCAL_DIR):
        folder = Path(entry.model.removeprefix(LOCAL_DIR))
        config = folder / "open_clip_config.json"
        if not config.is_file():
            raise UserError(f"no encoder in {folder}: {name!r} in {settings.path} names it; it must hold {config.name}")
        described["model"], files = LOCAL_DIR, [config, *sorted(folder.glob("open_clip_model.*"))]
    elif entry.pretrained and Path(entry.pretrained).is_file():
        described["pretrained"], files = "file", [Path(entry.pretrained)]
    return described | ({"weights": {file.name: file_hash(file) for file in files}} if files else {})


def _openai_weights(checkpoint: str | None) -> dict[str, torch.Tensor] | None:
    """The weights in a file of OpenAI's own format, which open_clip does not read from a path; None for other formats.

    OpenAI ships TorchScript archives. Their state dicts, also when saved alone, hold three entries that are not weights.
    """
    if checkpoint is None or not zipfile.is_zipfile(checkpoint):
        return None
    with zipfile.ZipFile(checkpoint) as archive:
        is_torchscript = any("/code/" in name for name in archive.namelist())
    extras = ("input_resolution", "context_length", "vocab_size")
    if is_torchscript:
        weights = torch.jit.load(checkpoint, map_location="cpu").state_dict()
    else:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(weights, dict) or extras[0] not in weights:
            return None
    return {name: weight for name, weight in weights.items() if name not in extras}


def _without_padding(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Drop columns that are padding in every row, if the text tower masks padding (Hugging Face towers do).

    The embeddings stay the same, and short texts cost a fraction of the full context length.
    """
    from open_clip.hf_model import HFTextEncoder

    text = getattr(model, "text", None)
    if not isinstance(text, HFTextEncoder):
        return tokens
    return tokens[:, : int((tokens != text.config.pad_token_id).sum(dim=1).max())]
