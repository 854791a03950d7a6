"""Checkpoints of the model: safetensors files, and the PyTorch files that DN-CBM's authors publish."""

import pickle
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparse_autoencoder.errors import CheckpointError
from sparse_autoencoder.files import write_safetensors
from sparse_autoencoder.model import SparseAutoencoder
from sparse_autoencoder.settings import INPUT_TRANSFORMS
from sparse_autoencoder.variants import ReLU, Sparsity, sparsity_from_json, sparsity_to_json

SCHEMA_VERSION = "1"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RESERVED = ("format", "schema_version", "sparsity", "input_transform")

PUBLISHED_NAMES = {
    "tied_bias": "tied_bias",
    "encoder._weight": "encoder_weight",
    "encoder._bias": "encoder_bias",
    "decoder._weight": "decoder_weight",
}
PUBLISHED_ALIASES = ("pre_encoder_bias._bias_reference", "post_decoder_bias._bias_reference")
"""Other names of the tied bias in the published files."""


def save_checkpoint(model: SparseAutoencoder, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes the model to a .safetensors file, whole or not at all.

    Tensors: `tied_bias` (D), `encoder_weight` (F x D), `encoder_bias` (F), `decoder_weight` (D x F), and those that the
    sparsity and the input transform add. The header's metadata holds the schema version, the sparsity with its
    parameters, the input transform, and `metadata`.

    Raises ValueError if `metadata` uses a name that the format reserves.
    """
    reserved = sorted(set(metadata or {}) & set(RESERVED))
    if reserved:
        raise ValueError(f"metadata may not use the names {', '.join(reserved)}: the checkpoint format reserves them")
    tensors = {**model.state_dict(), "decoder_weight": model.decoder_weight.t()}
    header = {
        **(metadata or {}),
        "format": "sparse_autoencoder",
        "schema_version": SCHEMA_VERSION,
        "sparsity": sparsity_to_json(model.sparsity),
        "input_transform": model.input_transform,
    }
    write_safetensors(tensors, Path(path), header)


def load_checkpoint(path: Path, *, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """The model of a checkpoint: a .safetensors file of `save_checkpoint`, or a .pt file of DN-CBM's authors.

    The authors' files are state dicts whose tensors have a leading axis of size 1. They are read with
    `weights_only=True`, which unpickles only tensors. They do not record the L1 coefficient, so the default is set.

    Raises CheckpointError if the file is missing, truncated, of another format or version, or its tensors do not match.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint" if not path.exists() else f"{path}: not a file")
    if path.suffix == ".pt":
        return _build(path, _read_published(path), ReLU(), "none").to(device)
    tensors, header = read_safetensors(path)
    if header.get("format") != "sparse_autoencoder" or "schema_version" not in header:
        raise CheckpointError(f"{path}: not a sparse_autoencoder checkpoint (its header has no schema version)")
    if (version := header["schema_version"]) != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}: schema version {version}, but this version of sparse_autoencoder reads {SCHEMA_VERSION}"
        )
    try:
        sparsity = sparsity_from_json(header.get("sparsity", ""))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    transform = header.get("input_transform", "")
    if transform not in INPUT_TRANSFORMS:
        raise CheckpointError(f"{path}: unknown input transform {transform!r}")
    return _build(path, tensors, sparsity, transform).to(device)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header metadata of a safetensors file. Raises CheckpointError if the file is not readable."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, MemoryError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({_one_line(error)})") from error


def _read_published(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            is_legacy = not file.read(4).startswith(b"PK")
        with warnings.catch_warnings():  # torch warns of what it then refuses
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({_one_line(error)})") from error
    except pickle.UnpicklingError as error:
        # torch's own message advises to load the file all the same, which runs any code that is in it.
        holds = "damaged, or not a PyTorch file" if is_legacy else "damaged, or it holds more than tensors"
        raise CheckpointError(f"{path}: not a published DN-CBM checkpoint ({holds}); nothing in it was run") from error
    except Exception as error:  # torch raises anything from EOFError to RuntimeError for a damaged file
        raise CheckpointError(f"{path}: not a published DN-CBM checkpoint (damaged, or not a PyTorch file)") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: not a state dict of tensors")
    missing = [name for name in PUBLISHED_NAMES if name not in state]
    unknown = sorted(str(name) for name in state if name not in (*PUBLISHED_NAMES, *PUBLISHED_ALIASES))
    if missing or unknown:
        raise CheckpointError(f"{path}: not a published DN-CBM checkpoint ({_unlike(missing, unknown)})")
    for name, tensor in state.items():
        if tensor.ndim < 2 or tensor.shape[0] != 1:
            raise CheckpointError(f"{path}: {name} has shape {_shape(tensor)}, without the leading 1 of the format")
    for alias in PUBLISHED_ALIASES:
        if alias in state and not torch.equal(state[alias], state["tied_bias"]):
            raise CheckpointError(f"{path}: {alias} differs from tied_bias")
    return {ours: state[name].squeeze(0) for name, ours in PUBLISHED_NAMES.items()}


def _build(path: Path, tensors: dict[str, Tensor], sparsity: Sparsity, transform: str) -> SparseAutoencoder:
    weight = tensors.get("encoder_weight")
    if weight is None or weight.ndim != 2 or 0 in weight.shape:
        shape = "is missing" if weight is None else f"has shape {_shape(weight)}"
        raise CheckpointError(f"{path}: encoder_weight {shape}; it must be F x D")
    n_latents, n_inputs = weight.shape
    try:
        model = SparseAutoencoder(n_inputs, n_latents, sparsity=sparsity, input_transform=transform)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    state = model.state_dict()
    missing, unknown = sorted(set(state) - set(tensors)), sorted(set(tensors) - set(state))
    if missing or unknown:
        raise CheckpointError(f"{path}: not the tensors of this sparsity ({_unlike(missing, unknown)})")
    for name, own in state.items():
        tensor = tensors[name]
        want = own.t() if name == "decoder_weight" else own
        if tensor.shape != want.shape:
            raise CheckpointError(f"{path}: {name} has shape {_shape(tensor)}; it must be {_shape(want)}")
        if tensor.dtype not in FLOATS or not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {name} must be finite floating-point numbers")
        own.copy_(tensor.t() if name == "decoder_weight" else tensor)
    return model


def _unlike(missing: list[str], unknown: list[str], most: int = 8) -> str:
    """Which tensors a file lacks and which do not belong there; of many, the first."""
    said = []
    for what, names in (("missing", missing), ("unknown", unknown)):
        if names:
            more = f" and {len(names) - most} more" if len(names) > most else ""
            said.append(f"{what}: {', '.join(ascii(name)[1:-1][:60] for name in names[:most])}{more}")
    return "; ".join(said)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "()"


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
