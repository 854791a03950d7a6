"""Chunks of numbers that pages read image by image: names and labels, concept strengths, the probe's weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.sparse
from tqdm import tqdm

from dncbm.browser.pack import write_chunk
from dncbm.browser.shown import IMAGES_PER_CHUNK, Kept, ShownRun, weight_rows


def write_images(kept: Kept, names: Sequence[str], data: Path, dataset: int) -> None:
    """Write the chunk `images_<d>`: names, classes, keys, labels and groups of the kept images of data set d.

    `names` are those of the image files, or empty if they are unknown; then images are called `image 12`.
    """
    groups = np.zeros(0) if kept.groups is None else kept.groups
    content = {
        "names": list(names) or [f"image {key}" for key in kept.keys.tolist()], "classes": list(kept.classes),
        "key": kept.keys.astype(np.int32), "label": kept.labels.astype(np.int32), "group": groups.astype(np.int32),
    }  # fmt: skip
    write_chunk(data, f"images_{dataset}", content)


def write_strengths(shown: ShownRun, kept: list[Kept], data: Path, number: int) -> None:
    """Write the chunks `<r>/strengths_<d>_<k>`: the concept strengths of IMAGES_PER_CHUNK images each, as CSR."""
    index = np.uint16 if shown.n_latents <= np.iinfo(np.uint16).max else np.uint32
    found = [(d, matrix) for d, matrix in enumerate(shown.strengths) if matrix is not None]
    chunks = [(d, matrix, start) for d, matrix in found for start in range(0, len(kept[d].keys), IMAGES_PER_CHUNK)]
    for d, matrix, start in tqdm(chunks, desc="strengths", unit="chunk"):
        part: scipy.sparse.csr_matrix = matrix[start : start + IMAGES_PER_CHUNK]
        content = {
            "indptr": part.indptr.astype(np.uint32), "indices": part.indices.astype(index),
            "values": part.data.astype(np.float32),
        }  # fmt: skip
        write_chunk(data, f"{number}/strengths_{d}_{start // IMAGES_PER_CHUNK}", content)


def write_weights(shown: ShownRun, data: Path, number: int) -> None:
    """Write the chunks `<r>/weights_<k>`: the probe's weights of `weight_rows` concepts each; none without a probe."""
    if shown.weight is None:
        return
    weight = shown.weight.numpy()
    rows = weight_rows(*weight.shape)
    for k, start in enumerate(range(0, len(weight), rows)):
        write_chunk(data, f"{number}/weights_{k}", {"weight": weight[start : start + rows]})
