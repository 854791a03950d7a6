"""How fast features are read in the order of an epoch, and what the order does to the loss.

    python benchmarks/shuffle.py [--quick] [--folder FOLDER] [--gigabytes 4]

Prints one JSON object. `reading` holds rows per second of batches of 4096 rows of 1024 float16 numbers, from the shards of a
FeatureStore, with `--shuffle exact` and `--shuffle shards`; `sequential` reads the same files from beginning to end without
making batches, which bounds both. Files are read `cold`, after the system was asked to drop them from its cache (Linux does
so without root), or `warm`. Each rate is the best of the rounds. A cold reading stops after 10 seconds, and `share_read` tells
how much of the files it had read: the more, the more of its rows were in the cache, as those of features larger than memory
would not be. `--folder` is where the files are written: name one on the disk that you mean.

`loss` holds the mean and the standard deviation, over seeds, of the final loss of trainings that differ only in seed and
shuffle: ReLU, D = 64, F = 256, 20,480 items in batches of 128. A group has 512 items from 16 pieces, so it is as large a part
of the data as if there were 5 million items. `random` items are in random order, as features of web images are; `sorted`
ones by the strongest of the directions that they are sums of, which no shuffling within groups can undo.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dncbm.features.store import FeatureStore
from dncbm.runs.artifacts import shard_keys
from dncbm.runs.manifests import making
from sparse_autoencoder import ReLU, SparseAutoencoder, TrainingSettings, data, evaluate, train
from sparse_autoencoder.workers import Workers

D, BATCH, SHARD_ROWS, COLD_SECONDS = 1024, 4096, 131_072, 10.0


def write_store(folder: Path, n_rows: int) -> list[Path]:
    """Shards of noise with a manifest; returns their paths."""
    generator = np.random.default_rng(0)
    paths = []
    with redirect_stdout(sys.stderr), making(folder, "features", {}, {}, overwrite=False) as work:
        folder.mkdir(parents=True, exist_ok=True)
        for first in range(0, n_rows, SHARD_ROWS):
            path = folder / f"{first // SHARD_ROWS:05d}.npy"
            rows = generator.standard_normal((min(SHARD_ROWS, n_rows - first), D), np.float32).astype(np.float16)
            np.save(path, rows)
            np.save(shard_keys(path), np.arange(len(rows)))
            paths.append(path)
        work.done([*paths, *map(shard_keys, paths)], "features")
    os.sync()
    return paths


def drop(paths: list[Path]) -> None:
    """Asks the system to drop files from its cache. It keeps what is mapped, so no store may be open."""
    gc.collect()
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sequentially(paths: list[Path]) -> Iterator[int]:
    """Reads files from beginning to end; yields the rows read at a time."""
    buffer = bytearray(2048 * 2 * D)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while n_bytes := file.readinto(buffer):
                yield n_bytes // (2 * D)


def in_order(folder: Path, epoch: int, group: int) -> Iterator[int]:
    """Reads the batches of an epoch as training does; yields the rows of each."""
    store, reader = FeatureStore(folder, ""), Workers(1)
    try:
        order = data.epoch_order(len(store), 0, epoch, group)
        for batch in data.in_batches(store, order, BATCH, reader=reader, group=group):
            yield len(batch)
    finally:
        reader.close()


def rate(rows: Iterator[int], seconds: float = float("inf")) -> tuple[float, int]:
    """Rows per second, and rows in all; what is left after some seconds is not read."""
    start, n_rows = time.perf_counter(), 0
    for n in rows:
        n_rows += n
        if time.perf_counter() - start > seconds:
            break
    return n_rows / (time.perf_counter() - start), n_rows


def reading(folder: Path, n_rows: int, rounds: int) -> dict[str, object]:
    """Rows per second of every way of reading, cold and warm."""
    paths = write_store(folder, n_rows)
    group = data.group_size(BATCH)
    found: dict[str, dict[str, float]] = {"cold": {}, "warm": {}, "share_read": {}}
    for number in range(rounds):
        ways = {
            "sequential": partial(sequentially, paths),
            "exact": partial(in_order, folder, number, 0),
            "shards": partial(in_order, folder, number, group),
        }
        for name, way in ways.items():
            drop(paths)
            cold, n_read = rate(way(), COLD_SECONDS)
            rate(sequentially(paths))
            warm, _ = rate(way())
            found["cold"][name] = max(cold, found["cold"].get(name, 0.0))
            found["warm"][name] = max(warm, found["warm"].get(name, 0.0))
            found["share_read"][name] = n_read / n_rows
    rounded = {state: {name: float(f"{value:.3g}") for name, value in rates.items()} for state, rates in found.items()}
    return {"rows": n_rows, "gigabytes": 2 * D * n_rows / 1e9, **rounded}


def items(n_items: int) -> tuple[Tensor, Tensor]:
    """Sums (n x 64) of a few of 512 directions with noise, and the strongest direction of each item (n)."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(512, 64, generator=generator), dim=1)
    strengths = torch.rand(n_items, 512, generator=generator) * (torch.rand(n_items, 512, generator=generator) < 0.01)
    return strengths @ directions + 0.02 * torch.randn(n_items, 64, generator=generator), strengths.argmax(dim=1)


def losses(n_items: int, epochs: int, n_seeds: int) -> dict[str, object]:
    """Set of items -> shuffle -> mean and standard deviation of the final loss over the seeds."""
    data.PIECE, data.GROUP = 32, 512
    torch.set_num_threads(1)  # faster for matrices this small
    x, strongest = items(n_items)
    found: dict[str, object] = {"items": n_items, "epochs": epochs, "seeds": n_seeds}
    for name, arranged in {"random": x, "sorted": x[strongest.argsort(stable=True)]}.items():
        of_set: dict[str, dict[str, float]] = {}
        for shuffle in ("exact", "shards"):
            finals = []
            for seed in range(n_seeds):
                model = SparseAutoencoder(64, 256, sparsity=ReLU(3e-3), seed=seed)
                settings = TrainingSettings(
                    epochs=epochs, batch_size=128, lr=1e-3, seed=seed, shuffle=shuffle, resample_freq=3
                )
                train(model, arranged, settings, progress=False)
                finals.append(evaluate(model, arranged)["loss"])
            of_set[shuffle] = {"mean": statistics.mean(finals), "std": statistics.stdev(finals)}
        found[name] = of_set
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small files and short trainings: about a minute")
    parser.add_argument("--folder", type=Path, help="where the files are written; by default the system's temporary folder")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the files")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rounds, gigabytes = (1, 0.5) if options.quick else (options.rounds, options.gigabytes)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        found: dict[str, object] = {"reading": reading(Path(name) / "store", int(gigabytes * 1e9 / (2 * D)), rounds)}
    found["loss"] = losses(4096, 4, 2) if options.quick else losses(20_480, 5, 5)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
