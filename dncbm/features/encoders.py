"""From an encoder's name to its image tower, text tower, tokenizer and preprocessing, all through open_clip."""

import difflib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dncbm.features.hub import HUB, quiet_hub, why_not_loaded, why_unreadable
from dncbm.runs.errors import UserError, first_line
from dncbm.runs.manifests import file_hash, manifest_path, read_manifest
from dncbm.runs.settings import LOCAL_DIR, EncoderEntry, Settings
from sparse_autoencoder import DEFAULT_SEED

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
RANDOM = "random"
"""The pretrained tag of an encoder that is to have random weights, the same in every run."""
CONFIG = "open_clip_config.json"
CHECKPOINTS = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
)  # fmt: skip
"""Weights that are looked for in a `local-dir:`, the best first, as in open_clip; else any with such a suffix."""
SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".spm", ".codes", ".bpe", ".vocab", ".tiktoken")
"""Suffixes of configs, and of what Hugging Face's tokenizers may read from a `local-dir:`."""
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
        is_pinned = self.device.type == "cuda" and images.is_pinned()
        images = images.to(self.device, memory_format=torch.channels_last, non_blocking=is_pinned)
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


# ---------------------------------------------------------------------------------------------------------- loading


def load_encoder(settings: Settings, name: str, device: torch.device, precision: str | None = None) -> Encoder:
    """Build an encoder and load its weights.

    `name` is a name in the config's table of encoders, `openclip:MODEL/PRETRAINED` or `local-dir:FOLDER`; `precision` is one
    of PRECISIONS, by default fp16 on a GPU, else fp32. An encoder that `check_encoder` has loaded is not loaded again.

    Raises UserError if the name is unknown, open_clip has no such model, or its weights are missing or do not fit.
    """
    entry = _entry(settings, name)
    kept = _KEPT.pop(entry, None)
    if kept is not None and kept[0] == _state(settings, name):
        encoder = kept[1]
    else:
        model, preprocess = _load(settings, name)
        encoder = Encoder(name, model.eval().requires_grad_(False), preprocess, _LazyTokenizer(entry), torch.device("cpu"))
    precision = precision or ("fp16" if device.type == "cuda" else "fp32")
    moved = encoder.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return replace(encoder, name=name, model=moved, device=device, precision=precision)


def check_encoder(settings: Settings, name: str) -> None:
    """Load an encoder and encode one image and one word, so that whatever it lacks is known before hours of work.

    The next `load_encoder` takes the weights that were loaded here.

    Raises UserError as `load_encoder`, and if the tokenizer is missing, or the image tower and the text tower do not work,
    give NaN, or differ in width.
    """
    encoder = load_encoder(settings, name, torch.device("cpu"), "fp32")
    widths = {}
    picture = Image.new("RGB", (64, 48), (200, 100, 50))
    for tower, encode in (
        ("image", lambda: encoder.encode_images(encoder.preprocess(picture)[None])),
        ("text", lambda: encoder.encode_texts(["dog"])),
    ):
        try:
            features = encode()
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"the {tower} tower of the encoder {name!r} does not work: {why_unreadable(error)}") from error
        if not features.isfinite().all():
            raise UserError(
                f"the {tower} tower of the encoder {name!r} gives NaN or infinite numbers: its weights are damaged"
            )
        widths[tower] = int(features.shape[1])
    if widths["image"] != widths["text"]:
        raise UserError(
            f"the image tower of the encoder {name!r} gives {widths['image']} features and its text tower {widths['text']}: "
            "latents can be named only if both give the same number"
        )
    _KEPT.clear()
    _KEPT[_entry(settings, name)] = (_state(settings, name), encoder)


_KEPT: dict[EncoderEntry, tuple[list[tuple[int, int]], Encoder]] = {}
"""The encoder that was checked last, with the state of its files, for the stage that loads it next."""


def _state(settings: Settings, name: str) -> list[tuple[int, int]]:
    """What tells whether an encoder's files have changed since they were loaded."""
    return [(stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for file in _files(settings, name).values())]


def _load(settings: Settings, name: str) -> tuple[torch.nn.Module, Callable[[Image.Image], torch.Tensor]]:
    """The model, on the CPU, and its evaluation preprocessing."""
    import open_clip

    entry = _entry(settings, name)
    checkpoint = _checkpoint(settings, name)
    tag = _pretrained_tag(settings, name) if _is_published(entry, checkpoint) else {}
    _check_model(settings, name)
    published = _is_published(entry, checkpoint)
    uses_hub = published or entry.model.startswith(HUB) or _is_on_hub(_text_config(entry).get("hf_model_name"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else every worker process prints a warning
    try:
        with quiet_hub(uses_hub), torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(DEFAULT_SEED)  # random weights are the same in every run
            openai = _openai_weights(checkpoint)
            model, _, preprocess = open_clip.create_model_and_transforms(
                entry.model,
                pretrained=entry.pretrained if tag else None,
                load_weights=published,
                require_pretrained=published,  # open_clip would only warn of random weights
                pretrained_text=False,
                # Without it, open_clip only warns that OpenAI's weights need another activation function.
                force_quick_gelu=bool(openai or tag.get("quick_gelu", False)),
            )
            if openai:
                model.load_state_dict(openai)
            elif checkpoint is not None:
                open_clip.load_checkpoint(model, str(checkpoint))
    except Exception as error:
        do = "give it other weights"
        if uses_hub:
            do = (
                "open_clip downloads weights on first use: load it once with internet access and HF_HOME on a shared disk, or "
                "name a checkpoint file"
            )
        raise UserError(
            f"cannot load the encoder {name!r} ({entry.model}, {checkpoint or entry.pretrained}): "
            f"{why_not_loaded(error, uses_hub)}; {do} in `encoders` of {settings.path}"
        ) from error
    return model, preprocess


@dataclass
class _LazyTokenizer:
    """An encoder's tokenizer, loaded with the first text: some tokenizers are downloaded, and images need none.

    Not a closure, because an encoder may be pickled, for worker processes.
    """

    entry: EncoderEntry
    loaded: Tokenizer | None = None

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        self.loaded = self.loaded or _load_tokenizer(self.entry)
        return self.loaded(texts)


def _load_tokenizer(entry: EncoderEntry) -> Tokenizer:
    import open_clip

    is_local = entry.model.startswith(LOCAL_DIR)
    uses_hub = not is_local and (entry.model.startswith(HUB) or bool(_text_config(entry).get("hf_tokenizer_name")))
    try:
        with quiet_hub(uses_hub):
            found: Tokenizer = open_clip.get_tokenizer(entry.model)
    except Exception as error:
        do = (
            "its files must lie in the same folder"
            if is_local
            else "it is downloaded on first use: load it once with internet access and HF_HOME on a shared disk"
        )
        raise UserError(f"cannot load the tokenizer of {entry.model}: {why_not_loaded(error, uses_hub)}; {do}") from error
    return found


def _text_config(entry: EncoderEntry) -> Mapping[str, Any]:
    """open_clip's config of the text tower, without asking a hub."""
    import open_clip

    config = {} if entry.model.startswith(HUB) else open_clip.get_model_config(entry.model) or {}
    text: Mapping[str, Any] = config.get("text_cfg", {})
    return text


# --------------------------------------------------------------------------------------------- the files of an encoder


def describe_encoder(settings: Settings, name: str, made: Iterable[Path] | None = None) -> dict[str, Any]:
    """The identity of an encoder, found without loading it: model, pretrained tag, and hashes of all files it is loaded from.

    Weights of a hub are known by their tag and, if they are in the hub's cache, by their hash there.

    Args:
        settings: the config.
        name: as for `load_encoder`.
        made: the artifacts that are to be made with it; if none is finished, weights are downloaded to know them. What their
            manifests say counts if the weights are no longer in the cache. Without it, the tag alone counts.

    Raises UserError if there is no such encoder, or it has no weights.
    """
    entry, written = _entry(settings, name), settings.encoder(name)
    described: dict[str, Any] = {"encoder": name, "model": written.model, "pretrained": written.pretrained}
    checkpoint = _checkpoint(settings, name)
    files = _files(settings, name)
    if entry.model.startswith(LOCAL_DIR):
        described["model"] = LOCAL_DIR
    elif checkpoint is not None:
        described["pretrained"] = "file"
    if _is_published(entry, checkpoint):
        tag = _pretrained_tag(settings, name)
        weights = None if made is None else _published_weights(settings, name, tag, made)
    else:
        weights = {label: file_hash(file) for label, file in files.items()}
    return described | ({"weights": weights} if weights else {})


def check_same_encoder(first: Path, second: Path | Mapping[str, Any]) -> None:
    """Check that two artifacts come from one encoder, as far as their manifests and those of their inputs tell.

    Args:
        first: an artifact.
        second: another, or the encoder as it is now (`describe_encoder`).

    Raises UserError if the encoder's weights were changed between them.
    """
    one, other = encoder_behind(first), encoder_behind(second) if isinstance(second, Path) else second
    pair = f"{first} and {second if isinstance(second, Path) else 'the encoder as it is now'}"
    if differing := sorted(key for key in one.keys() & other.keys() if _differ(one[key], other[key])):
        raise UserError(
            f"{pair} come from different encoders (its {', '.join(differing)} changed in between): run the stage of the older "
            "one again, with --overwrite"
        )


def are_of_same_encoder(first: Path, second: Path) -> bool:
    """Whether two artifacts are known to come from the same weights, whatever names they go by."""
    one, other = encoder_behind(first), encoder_behind(second)
    weights = [
        {digest for file, digest in found.items() if not file.endswith(SMALL_FILES)} if isinstance(found, dict) else {found}
        for found in (made.get("weights") for made in (one, other))
        if found
    ]
    if len(weights) == 2 and all(weights):
        return bool(weights[0] & weights[1])
    return bool(one) and all(one.get(key) == other.get(key) for key in ("model", "pretrained"))


def _differ(one: Any, other: Any) -> bool:
    """Whether a part of two recipes differs. Older ones name fewer of the files that an encoder is loaded from."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return bool(one != other)
    checkpoints = [{file for file in files if not file.endswith(SMALL_FILES)} for files in (one, other)]
    return any(one[file] != other[file] for file in one.keys() & other.keys()) or (
        all(checkpoints) and not checkpoints[0] & checkpoints[1]
    )


def encoder_behind(artifact: Path) -> dict[str, Any]:
    """What identifies the encoder that an artifact was made with: model, pretrained tag and hashes, as far as known."""
    if not manifest_path(artifact).is_file():
        return {}
    manifest = read_manifest(artifact)
    known = {key: manifest["settings"][key] for key in ("model", "pretrained", "weights") if key in manifest["settings"]}
    sources = manifest.get("sources", {}).values()
    behind = (encoder_behind(Path(os.path.normpath(manifest_path(artifact).parent / source))) for source in sources)
    return known or next((found for found in behind if found), {})


def _entry(settings: Settings, name: str) -> EncoderEntry:
    """The entry of an encoder. Raises UserError if the name is unknown, or names no weights: they would be random."""
    entry = settings.encoder(name)
    if not entry.pretrained and not entry.model.startswith((LOCAL_DIR, HUB)):
        raise UserError(
            f"the encoder {name!r} has no weights: encoders[{name!r}] in {settings.path} names the model {entry.model} alone; "
            f'name a pretrained tag or a checkpoint file too, or "{RANDOM}" for random weights'
        )
    return entry if ":" in entry.model else replace(entry, model=entry.model.replace("/", "-"))  # as open_clip does


def _is_published(entry: EncoderEntry, checkpoint: Path | None) -> bool:
    """Whether open_clip fetches the weights."""
    return checkpoint is None and entry.pretrained != RANDOM


def _checkpoint(settings: Settings, name: str) -> Path | None:
    """The file of the weights, if it is not open_clip that fetches it. Raises UserError if a `local-dir:` lacks it."""
    entry = _entry(settings, name)
    if not entry.model.startswith(LOCAL_DIR):
        return Path(entry.pretrained) if entry.pretrained and Path(entry.pretrained).is_file() else None
    folder = Path(entry.model.removeprefix(LOCAL_DIR))
    config = folder / CONFIG
    if not config.is_file():
        raise UserError(f"no encoder in {folder}: {name!r} in {settings.path} names it; it must hold {config.name}")
    files = [file for suffix in ("safetensors", "bin", "pth") for file in sorted(folder.glob(f"*.{suffix}"))]
    if not files:
        raise UserError(
            f"the encoder {name!r} has no weights: put them into {folder} as {CHECKPOINTS[0]} (or {CHECKPOINTS[2]})"
        )
    by_name = {file.name: file for file in files}
    return next((by_name[known] for known in CHECKPOINTS if known in by_name), files[0])


def _files(settings: Settings, name: str) -> dict[str, Path]:
    """The user's own files that an encoder is loaded from: weights, configs and tokenizer."""
    entry, checkpoint = _entry(settings, name), _checkpoint(settings, name)
    if checkpoint is None or not entry.model.startswith(LOCAL_DIR):
        return {checkpoint.name: checkpoint} if checkpoint else {}
    config = checkpoint.parent / CONFIG
    files = [config, checkpoint]
    try:
        text = json.loads(config.read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]
        tower, has_tokenizer = text.get("hf_model_name"), bool(text.get("hf_tokenizer_name"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{config} is not a config of open_clip ({type(error).__name__}: {first_line(error)}): it must have "
            "`model_cfg` with `embed_dim`, `vision_cfg` and `text_cfg`"
        ) from error
    if has_tokenizer:
        files += [file for suffix in SMALL_FILES for file in sorted(config.parent.glob(f"*{suffix}")) if file not in files]
    found = {file.name: file for file in files}
    if tower and (Path(tower) / "config.json").is_file():  # the architecture of a Hugging Face text tower
        found["text tower's config.json"] = Path(tower) / "config.json"
    return found


def _is_on_hub(model: str | None) -> bool:
    return bool(model) and not Path(str(model)).is_dir()


# ------------------------------------------------------------------------------------------------ published weights


def _check_model(settings: Settings, name: str) -> None:
    """Raises UserError, which names the nearest, if open_clip has no such model."""
    import open_clip

    model, models = _entry(settings, name).model, open_clip.list_models()
    if not model.startswith((LOCAL_DIR, HUB)) and model not in models:
        raise UserError(f"encoder {name!r} in {settings.path}: open_clip has no model {model!r}; {_nearest(model, models)}")


def _pretrained_tag(settings: Settings, name: str) -> Mapping[str, Any]:
    """open_clip's entry of a pretrained tag. Raises UserError, which names the nearest, if there is none."""
    import open_clip

    entry = _entry(settings, name)
    if entry.model.startswith(HUB):
        return {}
    _check_model(settings, name)
    found: Mapping[str, Any] = open_clip.get_pretrained_cfg(entry.model, entry.pretrained)
    if not found:
        tags = open_clip.list_pretrained_tags_by_model(entry.model)
        near = _nearest(str(entry.pretrained), tags) if tags else "open_clip has none for this model"
        raise UserError(
            f"encoder {name!r} in {settings.path}: {entry.pretrained!r} is neither a file nor pretrained weights of "
            f"{entry.model}; {near}"
        )
    return found


def _nearest(name: str, known: Sequence[str]) -> str:
    by_lower = {one.lower(): one for one in known}
    near = [by_lower[one] for one in difflib.get_close_matches(name.lower(), by_lower, n=3)]
    return f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join([*known[:5], '...'][: len(known)])}"


def _published_weights(settings: Settings, name: str, tag: Mapping[str, Any], made: Iterable[Path]) -> dict[str, str] | None:
    """File -> hash of the weights that open_clip fetches, as far as they are known."""
    finished = [manifest for artifact in made if (manifest := _manifest_of(artifact))]
    cached = _cached_weights(settings.encoder(name), tag)
    if finished:
        recorded: dict[str, str] | None = finished[0]["settings"].get("weights")
        return recorded and (cached or recorded)  # older manifests do not say
    if cached is None:
        _download(settings, name, tag)
        cached = _cached_weights(settings.encoder(name), tag)
    return cached


def _manifest_of(artifact: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(artifact)
    except UserError:  # missing, or damaged: `making` says so
        return None


def _hub_files(entry: EncoderEntry, tag: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The hub's repository of published weights, and the files that open_clip looks for in it, in this order."""
    repository, _, file = (entry.model.removeprefix(HUB) + "/" if not tag else str(tag.get("hf_hub", ""))).rpartition("/")
    file = file or "open_clip_pytorch_model.bin"
    safe = "open_clip_model.safetensors" if file == "open_clip_pytorch_model.bin" else Path(file).stem + ".safetensors"
    return repository, [safe, file]


def _cached_weights(entry: EncoderEntry, tag: Mapping[str, Any]) -> dict[str, str] | None:
    """The hash of published weights, and of their config, if they are in the hub's cache, which names files by it."""
    from huggingface_hub import try_to_load_from_cache

    repository, names = _hub_files(entry, tag)
    paths = {name: try_to_load_from_cache(repository, name) for name in [*names, *([] if tag else [CONFIG])] if repository}
    found = {name: Path(path).resolve() for name, path in paths.items() if isinstance(path, str)}
    if not (loaded := [name for name in names if name in found][:1]):
        return None
    return {
        name: f"{file.name} {file.stat().st_size}" if file.parent.name == "blobs" else file_hash(file)
        for name, file in found.items()
        if name in (*loaded, CONFIG)
    }


def _download(settings: Settings, name: str, tag: Mapping[str, Any]) -> None:
    """Fetch published weights into the cache, if there is a connection; if not, loading them says so."""
    from open_clip.pretrained import download_pretrained, download_pretrained_from_hf

    with quiet_hub(uses_hub=True):
        try:
            if tag:
                download_pretrained(tag)
            else:
                download_pretrained_from_hf(settings.encoder(name).model.removeprefix(HUB))
        except Exception:
            return


def _openai_weights(checkpoint: Path | None) -> dict[str, torch.Tensor] | None:
    """The weights in a file of OpenAI's own format, which open_clip does not read from a path; None for other formats.

    OpenAI ships TorchScript archives. Their state dicts, also when saved alone, hold three entries that are not weights.
    """
    if checkpoint is None or checkpoint.suffix in (".safetensors", ".npz", ".npy") or not zipfile.is_zipfile(checkpoint):
        return None
    with zipfile.ZipFile(checkpoint) as archive:
        is_torchscript = any("/code/" in name for name in archive.namelist())
    extras = ("input_resolution", "context_length", "vocab_size")
    if is_torchscript:
        weights = torch.jit.load(str(checkpoint), map_location="cpu").state_dict()
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
