"""Every sparsity variant trained on the same features, as a table in Markdown.

    python benchmarks/sae_variants.py [FOLDER] [--expansion_factor 4] [--epochs 100] [--k 8]

FOLDER holds .npy shards (n x D). Without it, the features are 20,000 synthetic items of 64 numbers, each a sum of a few of 256
directions. The first rows compare training that uses the sparse step where it is faster with training by autograd throughout.
Only rounding makes the two differ; resampling amplifies the difference, since it restarts a latent that never fires but not
one that fires once.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparse_autoencoder import (
    BatchTopK,
    JumpReLU,
    Matryoshka,
    ReLU,
    SparseAutoencoder,
    Sparsity,
    TopK,
    TrainingSettings,
    stepper,
    train,
)


def synthetic() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(256, 64, generator=generator), dim=1)
    strengths = torch.rand(20_000, 256, generator=generator) * (torch.rand(20_000, 256, generator=generator) < 0.02)
    return strengths @ directions


def load(folder: Path) -> Tensor:
    paths = sorted(path for path in folder.glob("*.npy") if not path.name.endswith(".keys.npy"))
    if not paths:
        raise SystemExit(f"{folder}: no .npy shards")
    return torch.from_numpy(np.concatenate([np.load(path) for path in paths]).astype(np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--expansion_factor", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--l1_coeff", type=float, default=5e-4)
    parser.add_argument("--l0_coeff", type=float, default=2e-5)
    parser.add_argument("--k", type=int, default=8)
    options = parser.parse_args()
    x = load(options.folder) if options.folder else synthetic()
    settings = TrainingSettings(epochs=options.epochs, batch_size=options.batch_size, lr=options.lr)
    no_resampling = dataclasses.replace(settings, resample_freq=0)
    dead_after = 10 * len(x)
    relu, sparse, dense = ReLU(options.l1_coeff), stepper.SPARSE_BELOW, -1.0
    runs: list[tuple[str, Sparsity, TrainingSettings, float]] = [
        ("ReLU", relu, settings, sparse),
        ("ReLU, dense steps only", relu, settings, dense),
        ("ReLU without resampling", relu, no_resampling, sparse),
        ("the same, dense steps only", relu, no_resampling, dense),
        ("TopK", TopK(options.k, dead_after=dead_after), settings, sparse),
        ("BatchTopK", BatchTopK(options.k, dead_after=dead_after), settings, sparse),
        ("JumpReLU", JumpReLU(options.l0_coeff, bandwidth=0.02, initial_threshold=0.1), settings, sparse),
        ("Matryoshka", Matryoshka(BatchTopK(options.k, dead_after=dead_after)), settings, sparse),
    ]
    n_latents = x.shape[1] * options.expansion_factor
    print(f"{len(x)} items, D = {x.shape[1]}, F = {n_latents}, {options.epochs} epochs\n")
    print("| variant | loss | L2 loss | explained variance | L0 | dead | seconds |\n|---|---|---|---|---|---|---|")
    for name, sparsity, schedule, below in runs:
        stepper.SPARSE_BELOW = below
        model = SparseAutoencoder(x.shape[1], n_latents, sparsity=sparsity, input_transform="unit_norm")
        start = time.perf_counter()
        m = train(model, x, schedule, progress=False).metrics
        print(
            f"| {name} | {m['loss']:.4g} | {m['l2_loss']:.4g} | {m['explained_variance']:.4f} | {m['l0']:.2f}"
            f" | {m['dead_fraction']:.1%} | {time.perf_counter() - start:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
