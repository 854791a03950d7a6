"""Sparse autoencoders on feature vectors: exact, fast, resumable."""

from sparse_autoencoder.checkpoint import load_checkpoint, save_checkpoint
from sparse_autoencoder.data import Features
from sparse_autoencoder.errors import CheckpointError, NonFiniteError
from sparse_autoencoder.metrics import evaluate
from sparse_autoencoder.model import DEFAULT_SEED, SAEOutput, SparseAutoencoder
from sparse_autoencoder.trainer import TrainingResult, TrainingSettings, train
from sparse_autoencoder.variants import VARIANTS, BatchTopK, JumpReLU, Matryoshka, ReLU, Sparsity, TopK

__all__ = ["DEFAULT_SEED", "SAEOutput", "SparseAutoencoder", "load_checkpoint", "save_checkpoint"]
__all__ += ["VARIANTS", "BatchTopK", "JumpReLU", "Matryoshka", "ReLU", "Sparsity", "TopK"]
__all__ += ["CheckpointError", "Features", "NonFiniteError", "TrainingResult", "TrainingSettings", "evaluate", "train"]
