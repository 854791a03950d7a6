"""The cost of an epoch of training, relative to its optimiser steps alone.

    python benchmarks/sae_training.py [--rounds 5]

Prints one JSON object. `epoch_s` is the time of an epoch of `train` on memory-mapped float16 shards in random order, with its
checks, log rows, CSV file and progress bar. `steps_s` is the time of as many bare steps on batches already in memory.
`with_validation_s` adds a validation on a tenth of the items at the end of the epoch. Each time is the minimum over the
rounds, since other programs on the machine can only add to it; `..._over_steps` are their ratios. The model is a TopK SAE with
32 of 8192 latents active, D = 1024, batches of 4096.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparse_autoencoder import SparseAutoencoder, TopK, TrainingSettings, train
from sparse_autoencoder.optimizer import Adam
from sparse_autoencoder.stepper import Stepper

D, F, B, STEPS, SHARDS = 1024, 8192, 4096, 8, 4


class Shards:
    """Memory-mapped .npy shards of equal length."""

    def __init__(self, paths: list[Path]) -> None:
        self.shards = [np.load(path, mmap_mode="r") for path in paths]
        self.length = len(self.shards[0])

    def __len__(self) -> int:
        return self.length * len(self.shards)

    def gather(self, indices: np.ndarray) -> Tensor:
        out = np.empty((len(indices), D), np.float32)
        shard, row = np.divmod(indices, self.length)
        for number, values in enumerate(self.shards):
            here = np.flatnonzero(shard == number)
            out[here] = values[row[here]]
        return torch.from_numpy(out)


def epoch_seconds(data: Shards, validation: Tensor | None, folder: Path) -> float:
    """The time of a run's second of three epochs, between the log rows at the ends of the first and the second. (That at the
    end of the last epoch follows the final evaluation.)"""
    times: list[float] = []
    settings = TrainingSettings(epochs=3, batch_size=B, log_every=STEPS)
    model = SparseAutoencoder(D, F, sparsity=TopK(32))

    def log(row: dict[str, float], step: int) -> None:
        if step % STEPS == 0:
            times.append(time.perf_counter())

    train(model, data, settings, validation=validation, log=log, log_path=folder / "log.csv", progress=True)
    return times[1] - times[0]


def step_seconds(batches: list[Tensor]) -> float:
    """The time of the same steps alone."""
    model = SparseAutoencoder(D, F, sparsity=TopK(32))
    stepper = Stepper(model, Adam(model, lr=5e-4), batch_size=B)
    for batch in batches:  # the first epoch, not measured
        stepper(batch)
    start = time.perf_counter()
    for batch in batches:
        stepper(batch)
    seconds = time.perf_counter() - start
    stepper.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [folder / f"shard_{number}.npy" for number in range(SHARDS)]
        for path in paths:
            np.save(path, generator.standard_normal((STEPS * B // SHARDS, D), np.float32).astype(np.float16))
        data = Shards(paths)
        order = generator.permutation(len(data))
        batches = [data.gather(order[start : start + B]) for start in range(0, len(data), B)]
        validation = torch.cat(batches)[: len(data) // 10]
        times: dict[str, list[float]] = {"epoch": [], "steps": [], "with_validation": []}
        for _ in range(rounds):
            times["epoch"].append(epoch_seconds(data, None, folder))
            times["steps"].append(step_seconds(batches))
            times["with_validation"].append(epoch_seconds(data, validation, folder))
    result: dict[str, float] = {f"{name}_s": min(values) for name, values in times.items()}
    for way in ("epoch", "with_validation"):
        result[f"{way}_over_steps"] = result[f"{way}_s"] / result["steps_s"]
    result["items_per_second"] = len(data) / result["epoch_s"]
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
