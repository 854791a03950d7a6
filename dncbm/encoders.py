"""From an encoder's name to its image tower, text tower, tokenizer and preprocessing, all through open_clip."""

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

from dncbm.errors import UserError
from dncbm.manifests import file_hash
from dncbm.settings import LOCAL_DIR, EncoderEntry, Settings

HOOKS = ("out",)
"""Points of the image encoder that features are taken from: `out`, the output of `encode_image`."""

PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Encoder:
    """A CLIP-like model ready to encode images and texts on one device."""

    name: str
    model: torch.nn.Module
    preprocess: Callable[[Image.Image], torch.Tensor]
    """PIL image -> 3 x H x W float32, the encoder's own evaluation preprocessing."""
    tokenizer: Callable[[Sequence[str]], torch.Tensor]
    device: torch.device
    precision: str = "fp32"
    """`fp32`, `fp16` or `bf16`: what matrix products are computed in."""

    @torch.inference_mode()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Features of preprocessed images, not normalised (METHOD section 1).

        Args:
            images: N x 3 x H x W.

        Returns:
            N x D on the device, float16 where the precision is fp16, else float32 (numpy has no bfloat16).
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
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.float16 if self.precision == "fp16" else torch.bfloat16)


def load_encoder(settings: Settings, name: str, device: torch.device, precision: str | None = None) -> Encoder:
    """Build an encoder and load its weights.

    Args:
        settings: whose encoder table names it.
        name: a name of the table, `openclip:MODEL/PRETRAINED` or `local-dir:FOLDER`.
        device: where it runs.
        precision: one of PRECISIONS; None: fp16 on a GPU, else fp32.

    Raises:
        UserError: the name is unknown, or open_clip cannot make it (weights not there, no such model).
    """
    import open_clip

    entry = settings.encoder(name)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it would warn in every worker process
    try:
        openai = _openai_weights(entry.pretrained)
        tag = open_clip.get_pretrained_cfg(entry.model, entry.pretrained) if entry.pretrained else {}
        model, _, preprocess = open_clip.create_model_and_transforms(
            entry.model,
            pretrained=None if openai else entry.pretrained,
            load_weights=not openai,
            # open_clip only warns when OpenAI's weights are asked for without their activation function.
            force_quick_gelu=bool(openai or tag.get("quick_gelu", False)),
        )
        if openai:
            model.load_state_dict(openai)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot load the encoder {name!r} ({entry.model}, {entry.pretrained}): {reason}. open_clip downloads weights "
            f"on first use; without internet, name a checkpoint file in `encoders` of {settings.path}"
        ) from error
    model = model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    precision = precision or ("fp16" if device.type == "cuda" else "fp32")
    return Encoder(name, model, preprocess, _Tokenizer(entry.model), device, precision)


@dataclass
class _Tokenizer:
    """An encoder's tokenizer, loaded when the first text comes: some are downloaded, and images need none."""

    model: str
    loaded: Callable[[Sequence[str]], torch.Tensor] | None = None

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        import open_clip

        if self.loaded is None:
            try:
                self.loaded = open_clip.get_tokenizer(self.model)
            except Exception as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(
                    f"cannot load the tokenizer of {self.model}: {reason}. It is downloaded on first use; load it once where "
                    "there is internet, with HF_HOME on a shared disk"
                ) from error
        return self.loaded(texts)


def describe_encoder(settings: Settings, name: str) -> dict[str, Any]:
    """What identifies an encoder's weights, without loading them: model, pretrained tag, hashes of local files."""
    entry = settings.encoder(name)
    files = _local_files(settings, name, entry)
    return {
        "encoder": name,
        "model": LOCAL_DIR if entry.model.startswith(LOCAL_DIR) else entry.model,
        "pretrained": "file" if files and entry.pretrained else entry.pretrained,
    } | ({"weights": {file.name: file_hash(file) for file in files}} if files else {})


def _local_files(settings: Settings, name: str, entry: EncoderEntry) -> list[Path]:
    if entry.model.startswith(LOCAL_DIR):
        folder = Path(entry.model.removeprefix(LOCAL_DIR))
        config = folder / "open_clip_config.json"
        if not config.is_file():
            raise UserError(f"no encoder in {folder}: {name!r} in {settings.path} names it; it must hold {config.name}")
        return [config, *sorted(folder.glob("open_clip_model.*"))]
    if entry.pretrained and Path(entry.pretrained).is_file():
        return [Path(entry.pretrained)]
    return []


def _openai_weights(checkpoint: str | None) -> dict[str, torch.Tensor] | None:
    """The weights of a file in OpenAI's own format, which open_clip does not read by path; None for another format.

    OpenAI ships TorchScript archives. A state dict saved from one holds three entries that are no weights.
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
    """Cut columns that are padding in every row, where the text tower masks padding (Hugging Face towers do).

    The embeddings stay the same, and words, which are short, cost a fraction of the full context length.
    """
    from open_clip.hf_model import HFTextEncoder

    text = getattr(model, "text", None)
    if not isinstance(text, HFTextEncoder):
        return tokens
    return tokens[:, : int((tokens != text.config.pad_token_id).sum(dim=1).max())]
