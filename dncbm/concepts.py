"""Concept strengths: the SAE's latents for every image of a probe dataset, sparse on disk and in memory."""

import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from dncbm.artifacts import Artifacts, SAERun
from dncbm.devices import resolve_device
from dncbm.errors import UserError
from dncbm.features import FeatureStore, open_features
from dncbm.manifests import Outcome, Recipe, begin, fingerprint, finish, manifest_path, whole_file
from dncbm.sae import load_sae, sae_path
from dncbm.settings import Settings
from sparse_autoencoder import SparseAutoencoder

PARTS = "[0-9]*.npz"
"""The files of a split; hidden ones are what a killed process was writing."""


@dataclass(frozen=True)
class ConceptStrengths:
    """Concept strengths of a split."""

    matrix: scipy.sparse.csr_matrix
    """Images x F, float32, non-negative."""
    keys: NDArray[np.int64]
    """Index of each image in the dataset's own split."""


def save_concept_strengths(
    settings: Settings,
    run: SAERun,
    dataset: str,
    splits: tuple[str, ...],
    *,
    device: str = "auto",
    batch_size: int = 4096,
    overwrite: bool = False,
) -> Outcome:
    """Stage 6: concept strengths (METHOD section 4) of some splits of a probe dataset, one CSR part per feature shard.

    Parts are scipy's .npz format with the images' keys added. An interrupted run goes on at the next part.

    Raises:
        UserError: no SAE or features, or they are of different widths.
        StaleArtifact: there are strengths from another SAE or other features.
    """
    outcome = Outcome.ALREADY_DONE
    sae: SparseAutoencoder | None = None
    for split in splits:
        store = open_features(settings, dataset, run.encoder, run.hook, split)
        folder = Artifacts(settings).strengths(run, dataset, split)
        inputs = {"SAE": fingerprint(sae_path(settings, run)), f"{split} features": fingerprint(store.folder)}
        recipe = Recipe("strengths", {}, inputs)
        if begin(folder, recipe, overwrite=overwrite) is Outcome.ALREADY_DONE:
            continue
        outcome = Outcome.RAN
        sae = sae or load_sae(settings, run, resolve_device(device))
        if sae.n_inputs != store.width:
            raise UserError(
                f"the SAE takes {sae.n_inputs} features and {store.folder} has {store.width}: they are of two encoders"
            )
        details = encode_store(sae, store, folder, batch_size, f"{dataset} {split}")
        finish(folder, recipe, folder.glob(PARTS), details)
        print(f"concept strengths of {details['images']} images, L0 {details['l0']:.2f}: {folder}")
    return outcome


@torch.inference_mode()
def encode_store(
    sae: SparseAutoencoder, store: FeatureStore, folder: Path, batch_size: int, title: str
) -> dict[str, Any]:
    """Encode a feature store into CSR parts in `folder`. Memory is a dense batch and a sparse shard.

    Returns:
        `images` and `l0`, the mean number of active latents.
    """
    device = sae.encoder_weight.device
    with tqdm(desc=title, total=len(store), unit="image") as bar:
        for shard, path in enumerate(store.paths):
            part = folder / f"{path.stem}.npz"
            n_rows = len(np.load(path, mmap_mode="r"))
            if not part.is_file():
                batches = [_to_csr(sae.encode(x.to(device))) for x in store.shard_batches(shard, batch_size)]
                _write_part(part, scipy.sparse.vstack(batches, format="csr"), np.load(path.with_suffix(".keys.npy")))
            bar.update(n_rows)
    n_active = sum(len(map_part(part)["indices"]) for part in folder.glob(PARTS))
    return {"images": len(store), "l0": n_active / len(store)}


@torch.inference_mode()
def encode_in_memory(sae: SparseAutoencoder, store: FeatureStore, batch_size: int = 4096) -> scipy.sparse.csr_matrix:
    """The latents of a feature store as one CSR matrix, for a code that is not kept."""
    device = sae.encoder_weight.device
    parts = [_to_csr(sae.encode(x.to(device))) for x in store.batches(batch_size)]
    return scipy.sparse.vstack(parts, format="csr")


def _to_csr(latents: torch.Tensor) -> scipy.sparse.csr_matrix:
    rows, columns = latents.nonzero(as_tuple=True)  # in row order; on the device, so that only active entries leave it
    indptr = np.zeros(len(latents) + 1, dtype=np.int32)
    np.cumsum(torch.bincount(rows, minlength=len(latents)).cpu().numpy(), out=indptr[1:])
    values = latents[rows, columns].float().cpu().numpy()
    return scipy.sparse.csr_matrix((values, columns.int().cpu().numpy(), indptr), shape=tuple(latents.shape))


def _write_part(path: Path, matrix: scipy.sparse.csr_matrix, keys: NDArray[Any]) -> None:
    """scipy's .npz format, not compressed, so that it can be mapped; with the keys."""
    with whole_file(path) as temporary:
        np.savez(
            temporary,
            format=np.array(b"csr"),
            shape=np.array(matrix.shape),
            data=matrix.data,
            indices=matrix.indices,
            indptr=matrix.indptr,
            keys=keys,
        )


def map_part(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a part as memory maps: an .npz that is not compressed holds each as a whole .npy.

    Raises:
        UserError: the file is damaged, or not one of ours.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            return {
                member.filename.removesuffix(".npy"): _map_member(path, file, member) for member in archive.filelist
            }
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"cannot read {path}: {error}; run scripts/06_save_concept_strengths.py with --overwrite"
        ) from error


def _map_member(path: Path, file: BinaryIO, member: zipfile.ZipInfo) -> NDArray[Any]:
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{member.filename} is compressed")
    # The central directory does not say how long the fields before the data are; the member's own header does.
    file.seek(member.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    file.seek(name_length + extra_length, os.SEEK_CUR)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if 0 in shape:  # nothing can be mapped
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", offset=file.tell(), shape=shape)


def finished_strengths(settings: Settings, run: SAERun, dataset: str, split: str) -> Path:
    """The folder of a split's concept strengths. Raises UserError if they are not there or not finished."""
    folder = Artifacts(settings).strengths(run, dataset, split)
    if not manifest_path(folder).is_file():
        state = "are not finished" if folder.is_dir() else "are not there"
        raise UserError(
            f"the concept strengths {folder} {state}: make them with `python scripts/06_save_concept_strengths.py "
            f"--probe_dataset {dataset} --probe_split {split}` and the SAE's flags"
        )
    return folder


def strengths_width(folder: Path) -> int:
    """F of finished strengths, by their first part alone. Raises UserError if it is damaged."""
    return int(map_part(min(folder.glob(PARTS)))["shape"][1])


def load_concept_strengths(settings: Settings, run: SAERun, dataset: str, split: str) -> ConceptStrengths:
    """The concept strengths of a split.

    Raises:
        UserError: they are not there, not finished or damaged.
    """
    folder = finished_strengths(settings, run, dataset, split)
    parts = [map_part(path) for path in sorted(folder.glob(PARTS))]
    try:
        return merge_parts(parts)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the parts in {folder} do not fit together: {error}; run scripts/06_save_concept_strengths.py with --overwrite"
        ) from error


def merge_parts(parts: list[dict[str, NDArray[Any]]]) -> ConceptStrengths:
    """One matrix of all parts. Each is copied to its place from its memory map, so that nothing is held twice."""
    n_rows = sum(len(part["indptr"]) - 1 for part in parts)
    n_entries = sum(len(part["data"]) for part in parts)
    data = np.empty(n_entries, dtype=np.float32)
    # scipy wants both index arrays of one type, and int64 once entries are too many to count with int32
    indices = np.empty(n_entries, dtype=np.int32 if n_entries <= np.iinfo(np.int32).max else np.int64)
    indptr = np.zeros(n_rows + 1, dtype=indices.dtype)
    row = entry = 0
    for part in parts:
        rows, entries = len(part["indptr"]) - 1, len(part["data"])
        data[entry : entry + entries] = part["data"]
        indices[entry : entry + entries] = part["indices"]
        indptr[row + 1 : row + rows + 1] = part["indptr"][1:]
        indptr[row + 1 : row + rows + 1] += entry
        row, entry = row + rows, entry + entries
    shape = (n_rows, int(parts[0]["shape"][1]))
    keys = np.concatenate([part["keys"] for part in parts])
    return ConceptStrengths(scipy.sparse.csr_matrix((data, indices, indptr), shape=shape), keys)
