"""Explanations on sparse strengths against dense ones, and drawing in one process against several.

    python benchmarks/explanations.py [--quick]

Prints one JSON object, for 8192 latents of which 32 are active per image, and 365 classes. For each of `top_images`,
`contributions`, `profiles` and `kmeans` (ten iterations from the same 100 centres): `<what>_s`, the seconds of the sparse way;
`<what>_speedup`, the seconds of the dense way over those of the sparse one; and `<what>_same`, the fraction of equal results.
`peak_rss_over_dense` and `dense_way_peak_rss_over_dense`: the peak memory growth of each process, strengths included, in units
of the dense matrix (images x F x 4 bytes). `pages_per_s`: local explanations drawn per second with every core;
`pages_parallel_speedup`: that rate over the rate of one process, startup of the processes included.
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from PIL import Image

from dncbm.explain import explanations
from dncbm.explain.dumps.local_explanations import Page
from dncbm.explain.plotting.local_explanations import draw
from dncbm.explain.plotting.pages import draw_all
from dncbm.runs.artifacts import ExplanationFolder

F, C, ACTIVE, K, TOP, N_PAGES = 8192, 365, 32, 100, 500, 200


def strengths(n_images: int) -> scipy.sparse.csr_matrix:
    """Strengths of images of 200 kinds; a kind has 60 concepts, and each of its images 32 of them."""
    rng = np.random.default_rng(0)
    kinds = np.stack([rng.choice(F, 60, replace=False) for _ in range(200)])
    kind = rng.integers(0, 200, n_images)
    columns = kinds[kind[:, None], rng.random((n_images, 60)).argsort(axis=1)[:, :ACTIVE]]
    values = rng.exponential(size=n_images * ACTIVE).astype(np.float32)
    indptr = np.arange(0, n_images * ACTIVE + 1, ACTIVE)
    return scipy.sparse.csr_matrix((values, columns.ravel(), indptr), shape=(n_images, F))


def sparse_ways(z: scipy.sparse.csr_matrix, weight: torch.Tensor, labels: np.ndarray, centres: np.ndarray):  # type: ignore[no-untyped-def]
    def contributions() -> np.ndarray:
        found = explanations.contributions(z, weight, labels)
        return explanations.leading(found, 5, by_magnitude=True).values

    def profiles() -> np.ndarray:
        means = explanations.mean_strengths(z, labels, C)
        return explanations.leading(explanations.contributions(means, weight, np.arange(C)), 10).values

    def top_images() -> np.ndarray:
        return np.concatenate([top[:1] for top in explanations.top_activating(z, np.arange(F), TOP)])

    found = {"top_images": top_images, "contributions": contributions, "profiles": profiles}
    return found | {"kmeans": kmeans(z, centres)}


def dense_ways(z: np.ndarray, weight: torch.Tensor, labels: np.ndarray, centres: np.ndarray):  # type: ignore[no-untyped-def]
    def contributions() -> np.ndarray:
        found = []
        for start in range(0, len(z), 1024):  # all images at once would need as much memory as the strengths
            batch = torch.from_numpy(z[start : start + 1024]) * weight.T[labels[start : start + 1024]]
            found.append(batch.gather(1, batch.abs().topk(5).indices).numpy())
        return np.concatenate(found)

    def profiles() -> np.ndarray:
        means = np.stack([z[labels == c].mean(axis=0) for c in range(C)])
        return (torch.from_numpy(means) * weight.T).topk(10).values.numpy()

    def top_images() -> np.ndarray:
        tops = torch.from_numpy(z).topk(min(TOP, len(z)), dim=0)
        return tops.indices[0][tops.values[0] > 0].numpy()

    found = {"top_images": top_images, "contributions": contributions, "profiles": profiles}
    return found | {"kmeans": kmeans(z, centres)}


def kmeans(z: scipy.sparse.csr_matrix | np.ndarray, centres: np.ndarray) -> Callable[[], np.ndarray]:
    from sklearn.cluster import KMeans

    return lambda: KMeans(K, init=centres, n_init=1, max_iter=10, tol=0).fit(z).labels_


def measured(way: str, n_images: int, results: "multiprocessing.Queue[dict[str, object]]") -> None:
    weight = torch.randn(F, C, generator=torch.Generator().manual_seed(0))
    warm = strengths(600)
    for function in (sparse_ways if way == "sparse" else dense_ways)(
        warm if way == "sparse" else warm.toarray(), weight, np.arange(600) % C, warm[:K].toarray()
    ).values():
        function()  # memory that the libraries always need
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    z = strengths(n_images)
    labels = np.random.default_rng(1).integers(0, C, n_images)
    centres = z[:K].toarray()
    ways = sparse_ways(z, weight, labels, centres) if way == "sparse" else dense_ways(z.toarray(), weight, labels, centres)
    found: dict[str, object] = {}
    for name, function in ways.items():
        start = time.perf_counter()
        result = function()
        found[name] = (time.perf_counter() - start, result)
    found["growth"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    results.put(found)


def pages_per_s(folder: Path, workers: int) -> float:
    image = folder / "image.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    Image.fromarray(noise).save(image)
    concepts = tuple((f"concept {i}", 1.0 - i / 3) for i in range(5))
    pages = [
        Page(f"image_{i}", "", image, i, "beach", "coast", False, 0.5, 2.0, 1.0, concepts, 0.5, 27) for i in range(N_PAGES)
    ]
    start = time.perf_counter()
    files, title = ExplanationFolder.at(folder), f"{workers} processes"
    draw_all(dict.fromkeys(pages, "{}"), draw, files, use_latex=False, workers=workers, title=title)
    return N_PAGES / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8,192 images instead of 32,768")
    n_images = 8192 if parser.parse_args().quick else 32_768
    context = multiprocessing.get_context("spawn")
    found = {}
    for way in ("sparse", "dense"):
        results: multiprocessing.Queue[dict[str, object]] = context.Queue()
        process = context.Process(target=measured, args=(way, n_images, results))
        process.start()
        found[way] = results.get()
        process.join()
    result: dict[str, float] = {"images": n_images}
    for name in ("top_images", "contributions", "profiles", "kmeans"):
        (sparse_s, ours), (dense_s, theirs) = found["sparse"][name], found["dense"][name]
        same = (ours == theirs).mean() if name in ("top_images", "kmeans") else np.isclose(ours, theirs, atol=1e-5).mean()
        result |= {f"{name}_s": sparse_s, f"{name}_speedup": dense_s / sparse_s, f"{name}_same": float(same)}
    dense_bytes = n_images * F * 4
    result["peak_rss_over_dense"] = found["sparse"]["growth"] / dense_bytes
    result["dense_way_peak_rss_over_dense"] = found["dense"]["growth"] / dense_bytes
    with tempfile.TemporaryDirectory() as temporary:
        cores = len(os.sched_getaffinity(0))
        rates = {workers: pages_per_s(Path(temporary), workers) for workers in (1, cores)}
    result |= {"pages_per_s": rates[cores], "pages_processes": cores, "pages_parallel_speedup": rates[cores] / rates[1]}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
