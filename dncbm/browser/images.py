"""Chunks of numbers that pages read image by image: names and labels, concept strengths, the probe's weights."""

from pathlib import Path

import numpy as np
import scipy.sparse
from tqdm import tqdm

from dncbm.browser.pack import write_chunk
from dncbm.browser.shown import IMAGES_PER_CHUNK, Kept, ShownRun, weight_rows
from dncbm.features.datasets.probe import ProbeImages, probe_images
from dncbm.features.stage import are_extracted
from dncbm.runs.declarations import SAERun
from dncbm.runs.errors import UserError
from dncbm.runs.settings import Settings


def images_of(settings: Settings, run: SAERun, kept: Kept, split: str) -> ProbeImages | None:
    """The images of the data set's own split; None if they are missing, or have changed since features were extracted."""
    try:
        images = probe_images(settings, kept.dataset, settings.own_split(kept.dataset, split))
    except UserError:
        return None
    is_theirs = are_extracted(settings, images, kept.dataset, run.encoder, run.hook, split)
    return images if is_theirs and int(kept.keys.max()) < len(images.labels) else None


def write_images(kept: Kept, images: ProbeImages | None, data: Path, dataset: int) -> None:
    """Write the chunk `images_<d>`: names, classes, keys, labels and groups of the kept images of data set d.

    Names are of files, without folders; `image 12` where images are missing.
    """
    keys, groups = kept.keys.tolist(), np.zeros(0) if kept.groups is None else kept.groups
    names = [images.image_name(key).rpartition("/")[2] if images else f"image {key}" for key in keys]
    content = {
        "names": names, "classes": list(kept.classes), "key": kept.keys.astype(np.int32),
        "label": kept.labels.astype(np.int32), "group": groups.astype(np.int32),
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
