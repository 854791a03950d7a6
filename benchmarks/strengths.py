"""Concept strengths on disk and in memory, against dense float32.

    python benchmarks/strengths.py [--quick]

Prints one JSON object, for F = 8192 latents of which about 32 are active per image. `bytes_over_dense` is the size of the
files of a split, divided by the size of the dense matrix (images x F x 4 bytes). `peak_rss_over_dense` is the most that a
process grew, divided by the same, while it encoded features into parts and loaded them as one CSR matrix;
`dense_way_peak_rss_over_dense` is the growth of a process that encodes into one dense array, saves it and loads it. One batch
of dense latents is part of that growth, whatever the number of images, so the ratio falls as the number grows.
`places365_bytes` is the size of the files for the 1,623,114 images of Places365.
"""

import argparse
import json
import math
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from dncbm.concepts.strengths import encode_store, map_part, merge_parts
from dncbm.features.store import FeatureStore
from dncbm.runs.manifests import making
from sparse_autoencoder import SparseAutoencoder

D, F, ACTIVE, BATCH, SHARD, PLACES365 = 256, 8192, 32, 1024, 8192, 1_623_114


def calibrated() -> SparseAutoencoder:
    """A random SAE whose bias leaves about ACTIVE latents per item active."""
    model = SparseAutoencoder(D, F)
    with torch.no_grad():
        model.encoder_weight.normal_(generator=torch.Generator().manual_seed(1)).div_(math.sqrt(D))
        sample = torch.randn(256, D, generator=torch.Generator().manual_seed(2))
        pre = (sample @ model.encoder_weight.t()).flatten()
        model.encoder_bias.fill_(-float(pre.kthvalue(int(pre.numel() * (1 - ACTIVE / F))).values))
    return model.requires_grad_(False)


def write_features(folder: Path, n_images: int) -> None:
    rng = np.random.default_rng(0)
    with making(folder, "benchmark", {}, {}, overwrite=True) as work:
        for shard, start in enumerate(range(0, n_images, SHARD)):
            n = min(SHARD, n_images - start)
            np.save(folder / f"{shard:05d}.npy", rng.standard_normal((n, D), dtype=np.float32))
            np.save(folder / f"{shard:05d}.keys.npy", np.arange(start, start + n))
        work.done(folder.glob("*.npy"))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def sparse_way(store: FeatureStore, sae: SparseAutoencoder, folder: Path) -> float:
    folder.mkdir()
    details = encode_store(sae, store, folder, "sparse", BATCH)
    merged = merge_parts([map_part(path) for path in sorted(folder.glob("*.npz"))])
    assert merged.matrix.shape == (len(store), F)
    return float(details["l0"])


def dense_way(store: FeatureStore, sae: SparseAutoencoder, folder: Path) -> float:
    folder.mkdir()
    dense = np.concatenate([sae.encode(x).numpy() for x in store.batches(BATCH)])
    np.save(folder / "dense.npy", dense)
    del dense
    return float((np.load(folder / "dense.npy") > 0).sum(axis=1).mean())


def measured(way: str, features: Path, folder: Path, results: "multiprocessing.Queue[dict[str, float]]") -> None:
    store, sae = FeatureStore(features, ""), calibrated()
    sae.encode(next(store.batches(8)))  # allocates what torch always needs
    before, start = peak_bytes(), time.perf_counter()
    l0 = (sparse_way if way == "sparse" else dense_way)(store, sae, folder)
    growth, seconds = peak_bytes() - before, time.perf_counter() - start
    n_bytes = sum(path.stat().st_size for path in folder.iterdir())
    results.put({"l0": l0, "growth": growth, "seconds": seconds, "bytes": n_bytes})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16,384 images instead of 65,536")
    n_images = 16_384 if parser.parse_args().quick else 65_536
    dense = n_images * F * 4
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        features = Path(temporary) / "features"
        write_features(features, n_images)
        # Fewer images for the dense way, whose growth is proportional to them.
        write_features(Path(temporary) / "few", SHARD)
        for way, of in (("sparse", features), ("dense", Path(temporary) / "few")):
            context = multiprocessing.get_context("spawn")
            results: multiprocessing.Queue[dict[str, float]] = context.Queue()
            process = context.Process(target=measured, args=(way, of, Path(temporary) / way, results))
            process.start()
            found[way] = results.get()
            process.join()
    result = {
        "images": n_images,
        "l0": found["sparse"]["l0"],
        "bytes_over_dense": found["sparse"]["bytes"] / dense,
        "peak_rss_over_dense": found["sparse"]["growth"] / dense,
        "dense_way_peak_rss_over_dense": found["dense"]["growth"] / (SHARD * F * 4),
        "peak_rss_mib": found["sparse"]["growth"] / 2**20,
        "images_per_s": n_images / found["sparse"]["seconds"],
        "places365_bytes": found["sparse"]["bytes"] / n_images * PLACES365,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
