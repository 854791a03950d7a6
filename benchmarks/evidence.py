"""What images say about latents and names, against the usual ways of computing it.

    python benchmarks/evidence.py [--quick] [--full]

Prints one JSON object. For each of `prediction`, `soft_wpmi` and `monoscore`: `<what>_s`, the seconds of this library;
`<what>_cpu_s`, those of its threads together, which depend less on what else runs; `<what>_speedup`, the latter of the usual
way over those of this library; `<what>_difference`, the largest difference of the results; `<what>_peak_rss_mib` and
`<what>_usual_peak_rss_mib`, by how much a process grew that did nothing else. Times are the least of three rounds. All sizes
are in the output. An image has 32 active latents, and where soft-WPMI is measured, a latent has more than 100 active images.

The usual ways are: ranks of one word at a time, and a dense product with all latents; soft-WPMI as in its official code, with
all probabilities in memory and one logarithm for each image, latent and word; MonoScore as in its official code, over all
pairs of images. Each way has a process of its own, and all have the same number of threads.

`--full` adds this library alone for 8192 latents, 20,000 words and 100,000 images, whose features are 512 numbers in float16.
"""

import argparse
import json
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse
import scipy.stats
import torch
from numpy.typing import NDArray

from dncbm.concepts.evidence.dissect import dissect
from dncbm.concepts.evidence.monosemanticity import monosemanticity
from dncbm.concepts.evidence.prediction import DRAWS, predict
from dncbm.features.store import FeatureStore
from dncbm.runs.manifests import making
from sparse_autoencoder import DEFAULT_SEED

D, ACTIVE, SHARD = 512, 32, 16_384
CPU = torch.device("cpu")
Floats = NDArray[np.float64]
Sizes = dict[str, int]


class Measured(NamedTuple):
    """What a way takes: the least of several rounds, since other programs only add to it."""

    seconds: float
    cpu: float
    growth: float
    found: Floats


def write_features(folder: Path, n_images: int) -> None:
    rng = np.random.default_rng(0)
    with making(folder, "benchmark", {}, {}, overwrite=True) as work:
        for shard, start in enumerate(range(0, n_images, SHARD)):
            n = min(SHARD, n_images - start)
            np.save(folder / f"{shard:05d}.npy", rng.standard_normal((n, D), dtype=np.float32).astype(np.float16))
            np.save(folder / f"{shard:05d}.keys.npy", np.arange(start, start + n))
        work.done(folder.glob("*.npy"))


def random_codes(sizes: Sizes) -> scipy.sparse.csc_matrix:
    """ACTIVE latents per image; some are active ten times as often as others, as in an SAE."""
    rng, n_images = np.random.default_rng(1), sizes["images"]
    latents = (sizes["latents"] * rng.random((n_images, ACTIVE)) ** 1.5).astype(np.int32)
    codes = scipy.sparse.csr_matrix(
        (rng.exponential(size=latents.size).astype(np.float32), latents.ravel(), np.arange(0, latents.size + 1, ACTIVE)),
        shape=(n_images, sizes["latents"]),
    )
    codes.sum_duplicates()
    return codes.tocsc()


def random_words(sizes: Sizes) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """Unit embeddings, and the word of each latent."""
    words = torch.nn.functional.normalize(torch.randn(sizes["words"], D, generator=torch.Generator().manual_seed(2)), dim=1)
    return words, np.random.default_rng(3).integers(0, sizes["words"], sizes["latents"])


def unit_features(store: FeatureStore) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.cat(list(store.batches(SHARD))), dim=1)


def ours(what: str, store: FeatureStore, sizes: Sizes) -> Floats:
    codes, (words, names) = random_codes(sizes), random_words(sizes)
    if what == "prediction":
        found = predict(codes, store, words, names, device=CPU)
        return np.stack([found.auc, found.p])
    if what == "soft_wpmi":
        return dissect(codes, store, words, device=CPU).score
    return monosemanticity(codes, store, device=CPU).by_weights


def usual(what: str, store: FeatureStore, sizes: Sizes) -> Floats:
    codes, (words, names), x = random_codes(sizes), random_words(sizes), unit_features(store)
    return {"prediction": usual_prediction, "soft_wpmi": usual_soft_wpmi, "monoscore": usual_monoscore}[what](
        codes.toarray(), x, words, names
    )


def usual_prediction(codes: np.ndarray, x: torch.Tensor, words: torch.Tensor, names: NDArray[np.int64]) -> Floats:
    active = (codes > 0).astype(np.float64)
    n_with = active.sum(axis=0)
    drawn = np.random.default_rng(DEFAULT_SEED).choice(len(words), min(DRAWS, len(words)), replace=False)

    def aucs(chosen: NDArray[np.int64]) -> Floats:
        cosines = (words[torch.from_numpy(chosen)] @ x.T).numpy()
        ranks = np.stack([scipy.stats.rankdata(word) for word in cosines])
        pairs: Floats = (ranks @ active - n_with * (n_with + 1) / 2) / (n_with * (len(x) - n_with))
        return pairs

    own_words, place = np.unique(names, return_inverse=True)
    own = aucs(own_words)[place, np.arange(len(names))]
    return np.stack([own, (1 + (aucs(drawn) >= own).sum(axis=0)) / (1 + len(drawn))])


def usual_soft_wpmi(codes: np.ndarray, x: torch.Tensor, words: torch.Tensor, names: NDArray[np.int64]) -> Floats:
    probability = (10 * x @ words.T).softmax(dim=1)
    top = torch.from_numpy(codes).topk(100, dim=0).indices
    p = (0.998 - torch.arange(100) / 100 * (0.998 - 0.97))[:, None]
    found = torch.empty(codes.shape[1], len(words))
    for latent in range(len(found)):
        found[latent] = (1 + p * (probability[top[:, latent]] - 1) + 1e-7).log().sum(dim=0)
    found = found - (found.logsumexp(dim=0) - np.log(len(found)))
    return found.max(dim=1).values.double().numpy()


def usual_monoscore(codes: np.ndarray, x: torch.Tensor, words: torch.Tensor, names: NDArray[np.int64]) -> Floats:
    a = torch.from_numpy(codes / codes.max(axis=0))
    similarity, weight = torch.zeros(a.shape[1]), torch.zeros(a.shape[1])
    for i in range(len(x) - 1):
        weights = a[i] * a[i + 1 :]
        similarity += (x[i + 1 :] @ x[i]) @ weights
        weight += weights.sum(dim=0)
    return (similarity / weight).double().numpy()


def measured(way: Callable[..., Floats], what: str, folder: Path, sizes: Sizes, rounds: int) -> Measured:
    store = FeatureStore(folder, "")
    torch.ones(64, 64) @ torch.ones(64, 64)  # allocates what torch always needs
    before, seconds, cpu = peak_rss_mib(), [], []
    for _ in range(rounds):
        start, start_cpu = time.perf_counter(), time.process_time()
        found = way(what, store, sizes)
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    return Measured(min(seconds), min(cpu), peak_rss_mib() - before, found)


def peak_rss_mib() -> float:
    """The most memory that this process has had. (`ru_maxrss` of a spawned process begins at the peak of its parent.)"""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def apart(way: Callable[..., Floats], what: str, folder: Path, sizes: Sizes, rounds: int = 1) -> Measured:
    """What a way takes in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(measured, way, what, folder, sizes, rounds).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the latents")
    parser.add_argument("--full", action="store_true", help="also 8192 latents, 20,000 words and 100,000 images: minutes")
    arguments = parser.parse_args()
    share = 4 if arguments.quick else 1
    common = {"latents": 4096 // share, "words": 4000}
    all_sizes: dict[str, Sizes] = {
        "prediction": common | {"images": 8000},
        "soft_wpmi": {"latents": 2048 // share, "words": 4000, "images": 16_000},
        "monoscore": common | {"images": 1000},
    }
    result: dict[str, object] = {"threads": torch.get_num_threads(), "cpus": os.cpu_count(), "features": D}
    with tempfile.TemporaryDirectory() as temporary:
        for what, sizes in all_sizes.items():
            folder = Path(temporary) / what
            write_features(folder, sizes["images"])
            here, there = (apart(way, what, folder, sizes, 1 if arguments.quick else 3) for way in (ours, usual))
            result |= {
                f"{what}_sizes": sizes,
                f"{what}_s": here.seconds,
                f"{what}_cpu_s": here.cpu,
                f"{what}_speedup": there.cpu / here.cpu,
                f"{what}_difference": float(np.nanmax(np.abs(here.found - there.found))),
                f"{what}_peak_rss_mib": here.growth,
                f"{what}_usual_peak_rss_mib": there.growth,
            }
        if arguments.full:
            sizes = {"latents": 8192, "words": 20_000, "images": 100_000}
            write_features(Path(temporary) / "full", sizes["images"])
            result["full_sizes"] = sizes
            for what in all_sizes:
                here = apart(ours, what, Path(temporary) / "full", sizes)
                result |= {
                    f"full_{what}_s": here.seconds,
                    f"full_{what}_cpu_s": here.cpu,
                    f"full_{what}_peak_rss_mib": here.growth,
                }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
