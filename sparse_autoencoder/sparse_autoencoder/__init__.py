"""Sparse autoencoders on feature vectors: exact, fast, resumable."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparse_autoencoder.errors import CheckpointError, NonFiniteError
from sparse_autoencoder.parallel import Processes
from sparse_autoencoder.settings import DEFAULT_SEED, TrainingSettings
from sparse_autoencoder.variants import VARIANTS, BatchTopK, JumpReLU, Matryoshka, ReLU, Sparsity, TopK

if TYPE_CHECKING:
    from sparse_autoencoder.checkpoint import load_checkpoint, save_checkpoint
    from sparse_autoencoder.data import Features
    from sparse_autoencoder.metrics import evaluate
    from sparse_autoencoder.model import SAEOutput, SparseAutoencoder
    from sparse_autoencoder.trainer import TrainingResult, train

__all__ = ["DEFAULT_SEED", "SAEOutput", "SparseAutoencoder", "load_checkpoint", "save_checkpoint"]
__all__ += ["VARIANTS", "BatchTopK", "JumpReLU", "Matryoshka", "ReLU", "Sparsity", "TopK"]
__all__ += ["CheckpointError", "Features", "NonFiniteError", "Processes", "TrainingResult", "TrainingSettings"]
__all__ += ["evaluate", "train"]

# What needs torch, which takes two seconds to import, is imported when it is used: `--help` needs only the settings.
_MODULES = {
    **dict.fromkeys(("load_checkpoint", "save_checkpoint"), "checkpoint"),
    **dict.fromkeys(("SAEOutput", "SparseAutoencoder"), "model"),
    **dict.fromkeys(("TrainingResult", "train"), "trainer"),
    **{"Features": "data", "evaluate": "metrics"},
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
