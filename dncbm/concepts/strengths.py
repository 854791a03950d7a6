"""Concept strengths: the SAE's latents for every image of a probe data set, sparse on disk and in memory."""

import os
import struct
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from dncbm.concepts.sae import SAE, load_sae, sae_path
from dncbm.features.datasets import counted
from dncbm.features.encoders import check_same_encoder
from dncbm.features.stage import PROBE_FEATURES, open_features
from dncbm.features.store import FeatureStore
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts, shard_keys, strengths_part
from dncbm.runs.declarations import Partition, ProbeDataset, SAERun, Splits
from dncbm.runs.devices import resolve_device
from dncbm.runs.errors import StaleArtifact, UserError, first_line
from dncbm.runs.manifests import Outcome, check_chain, fingerprint, how_made_again, making, manifest_path, read_manifest
from dncbm.runs.partitions import UNDIVIDED, WHOLE, Part, Tally, part_of
from dncbm.runs.ranks import ALONE, Ranks, device_name, joined
from dncbm.runs.settings import Settings
from sparse_autoencoder import SparseAutoencoder
from sparse_autoencoder.declare import values
from sparse_autoencoder.files import whole_file

PARTS = "[0-9]*.npz"
"""The files of a split. Hidden files are the unfinished ones of a killed process."""
BATCH = 4096
"""Images encoded at a time."""


@dataclass(frozen=True)
class ConceptStrengths:
    """Concept strengths of a split."""

    matrix: scipy.sparse.csr_matrix
    """Images x F, float32, non-negative."""
    keys: NDArray[np.int64]
    """Index of each image in the data set's own split."""


def save_concept_strengths(
    settings: Settings, run: SAERun, images: ProbeDataset, splits: Splits, partition: Partition = UNDIVIDED,
    *, device: str = "auto", overwrite: bool = False,
) -> Outcome:  # fmt: skip
    """Stage 6: concept strengths (METHOD section 4) of some splits of a probe data set, one CSR part per feature shard.

    Parts are in scipy's .npz format, with the images' keys added. An interrupted run resumes at the next part. The processes
    that torchrun starts divide the parts, and so do the workers of a partition: whichever finds all there writes the manifest,
    for the others the outcome is PART.

    Raises UserError if the SAE or the features are missing, or differ in width, or parts to merge are missing; StaleArtifact
    if strengths from another SAE or other features exist.
    """
    artifacts, dataset = Artifacts(settings), images.dataset
    sae: SparseAutoencoder | None = None

    def open_inputs(split: str) -> tuple[FeatureStore, Path]:
        store, sae_file = open_features(settings, dataset, run.encoder, run.hook, split), sae_path(settings, run)
        check_same_encoder(sae_file, store.folder)
        return store, sae_file

    with joined() as ranks:
        part = ranks.first_makes(partial(part_of, partition))
        overwrite = overwrite and not part.merges  # which makes nothing, and so must not remove anything
        tally = Tally(part)
        get_device = partial(resolve_device, "cpu" if part.merges else device_name(device, ranks))
        for split in splits.names:
            store, sae_file = ranks.after_first(partial(open_inputs, split))
            folder = artifacts.strengths(run, dataset, split)
            inputs = {"SAE": sae_file, f"{split} features": store.folder}
            shown = values(run) | values(images) | values(Splits(split))
            make = partial(
                making, folder, STRENGTHS.name, {}, inputs, overwrite=overwrite, run=shown, before=get_device,
                shared=part.is_shared,
            )  # fmt: skip
            with ranks.first(make) as work:
                if not work.needed:
                    continue
                tally.made()
                sae = sae or ranks.after_first(lambda: load_sae(settings, run, get_device()))
                ranks.first_makes(partial(_check_width, sae, store))
                title = f"{dataset} {split}"
                if not part.merges:
                    encode_part(sae, store, folder, title, BATCH, ranks, part)
                if part.is_shared and (missing := ranks.first_makes(partial(missing_parts, store, folder, sae.n_latents))):
                    tally.missing(title, len(store.paths), [path.name for path in missing], says=ranks.rank == 0)
                    continue
                details = ranks.first_makes(partial(encoded, store, folder, sae.n_latents))
                said = f"concept strengths of {counted(details['images'], 'image')}, L0 {details['l0']:.2f}"
                work.done(folder.glob(PARTS), said, **details)
        return ranks.first_makes(tally.end)


def _check_width(sae: SparseAutoencoder, store: FeatureStore) -> None:
    if sae.n_inputs != store.width:
        raise UserError(
            f"the SAE takes {sae.n_inputs} features, but {store.folder} has {store.width}: they come from different encoders"
        )


def encode_store(
    sae: SparseAutoencoder, store: FeatureStore, folder: Path, title: str, batch_size: int, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Encode a feature store into CSR parts in `folder`, with a dense batch and a sparse shard in memory.

    `ranks` are the processes that divide the shards. Returns details for the manifest, as `encoded`.
    """
    encode_part(sae, store, folder, title, batch_size, ranks)
    return ranks.first_makes(lambda: encoded(store, folder, sae.n_latents))


@torch.inference_mode()
def encode_part(
    sae: SparseAutoencoder, store: FeatureStore, folder: Path, title: str, batch_size: int, ranks: Ranks = ALONE,
    part: Part = WHOLE,
) -> None:  # fmt: skip
    """`encode_store` for the shards of a part, which `ranks` share. Others may encode other parts, or the same, meanwhile."""
    share = part.share_of(range(len(store.paths)))
    sizes = {shard: _n_rows(store.paths[shard]) for shard in share}
    paths = {shard: strengths_part(folder, store.paths[shard]) for shard in share}
    pending = ranks.first_makes(lambda: [i for i in share if not _is_whole(paths[i], sae.n_latents, sizes[i])])
    mine = ranks.share_of(pending)
    n_done = sum(sizes.values()) - sum(sizes[shard] for shard in pending)
    total = n_done + sum(sizes[shard] for shard in mine)
    with tqdm(desc=ranks.titled(part.titled(title)), total=total, initial=n_done, unit="image", disable=ranks.rank > 0) as bar:
        for shard, codes in groupby(_codes(sae, store, mine, batch_size), key=itemgetter(0)):
            batches = [code for _, code in codes]
            # Another worker with the same part may have written it, perhaps on other hardware, and the manifest its hash.
            if not _is_whole(paths[shard], sae.n_latents, sizes[shard]):
                paths[shard].unlink(missing_ok=True)
                keys = np.load(shard_keys(store.paths[shard]))
                write_part(paths[shard], scipy.sparse.vstack(batches, format="csr"), keys, False)
            bar.update(sizes[shard])
    ranks.wait()


def missing_parts(store: FeatureStore, folder: Path, n_latents: int) -> list[Path]:
    """The shards of features that have no whole part yet. The parts are read only if all are there."""
    parts = {path: strengths_part(folder, path) for path in store.paths}
    if missing := [path for path, part in parts.items() if not part.is_file()]:
        return missing
    return [path for path, part in parts.items() if not _is_whole(part, n_latents, _n_rows(path))]


def _n_rows(path: Path) -> int:
    return len(np.load(path, mmap_mode="r"))


def encoded(store: FeatureStore, folder: Path, n_latents: int) -> dict[str, Any]:
    """Details of finished strengths: `images`, their number, `latents`, F, and `l0`, the mean number of active latents."""
    n_active = sum(len(map_part(strengths_part(folder, path))["indices"]) for path in store.paths)
    return {"images": len(store), "latents": n_latents, "l0": n_active / len(store)}


def _codes(
    sae: SparseAutoencoder, store: FeatureStore, shards: Iterable[int], batch_size: int
) -> Iterator[tuple[int, scipy.sparse.csr_matrix]]:
    """The latents of some shards in batches, each with its shard. A thread reads the next batch while one is encoded."""
    device = sae.encoder_weight.device
    on_gpu = device.type == "cuda"
    batches = ((shard, x.pin_memory() if on_gpu else x) for shard in shards for x in store.shard_batches(shard, batch_size))
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, batches, None)
        while (read := coming.result()) is not None:
            coming = reader.submit(next, batches, None)
            shard, x = read
            yield shard, to_csr(sae.encode(x.to(device, non_blocking=on_gpu)))


def _is_whole(path: Path, n_latents: int, n_images: int) -> bool:
    """Whether an interrupted run has left a part that can be kept."""
    if not path.is_file():
        return False
    try:
        part = map_part(path)
        check_part(part)
    except (UserError, ValueError):
        return False
    return part["shape"].tolist() == [n_images, n_latents]


@torch.inference_mode()
def encode_in_memory(sae: SparseAutoencoder, store: FeatureStore) -> scipy.sparse.csr_matrix:
    """The latents of a feature store as one CSR matrix, for a code that is not saved."""
    codes = [code for _, code in _codes(sae, store, range(len(store.paths)), BATCH)]
    return scipy.sparse.vstack(codes, format="csr")


def to_csr(latents: torch.Tensor) -> scipy.sparse.csr_matrix:
    """Latents of a batch (B x F, on any device) as a CSR matrix."""
    rows, columns = latents.nonzero(as_tuple=True)  # in row order, on the device: only active entries are copied
    indptr = np.zeros(len(latents) + 1, dtype=np.int32)
    np.cumsum(torch.bincount(rows, minlength=len(latents)).cpu().numpy(), out=indptr[1:])
    data = latents[rows, columns].float().cpu().numpy()
    return scipy.sparse.csr_matrix((data, columns.int().cpu().numpy(), indptr), shape=tuple(latents.shape))


def write_part(path: Path, matrix: scipy.sparse.csr_matrix, keys: NDArray[Any], replaces: bool = True) -> None:
    """Scipy's .npz format with the keys added; uncompressed, so that it can be memory-mapped. Unless it `replaces` a part that
    exists, that one stays."""
    arrays = {"data": matrix.data, "indices": matrix.indices, "indptr": matrix.indptr, "keys": keys}
    with whole_file(path, replaces=replaces) as temporary:
        np.savez(temporary, format=np.array(b"csr"), shape=np.array(matrix.shape), **arrays)


def map_part(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a part as memory maps: an uncompressed .npz holds each array as a whole .npy file.

    Raises UserError if the file is damaged or was not written by `write_part`. What the arrays hold is not looked at.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            part = {one.filename.removesuffix(".npy"): _map_member(path, file, one) for one in archive.filelist}
        for name, kinds in (("data", "f"), ("indices", "i"), ("indptr", "i"), ("keys", "i"), ("shape", "iu")):
            if part[name].ndim != 1 or part[name].dtype.kind not in kinds:
                raise ValueError(f"{name} are {part[name].dtype} of the shape {part[name].shape}")
        if len(part["shape"]) != 2 or part["shape"].min() < 0:
            raise ValueError(f"the shape of the matrix is {part['shape'].tolist()}")
        return part
    except Exception as error:  # a damaged file can raise anything
        what = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"cannot read the concept strengths {path}: {what}; run {_AGAIN}") from error


def check_part(part: dict[str, NDArray[Any]]) -> None:
    """Check that the arrays of a part are a CSR matrix of concept strengths with one key per row.

    Compiled code reads them without looking. Raises ValueError, which says what is wrong.
    """
    data, indices, indptr, keys = (part[name] for name in ("data", "indices", "indptr", "keys"))
    rows, columns = part["shape"].tolist()
    if len(indptr) != rows + 1 or len(keys) != rows or len(data) != len(indices):
        raise ValueError(
            f"{rows} rows have {len(indptr)} row pointers and {len(keys)} keys; there are {len(data)} values and "
            f"{len(indices)} columns"
        )
    if indptr[0] != 0 or indptr[-1] != len(data) or (indptr[1:] < indptr[:-1]).any():
        raise ValueError(f"the row pointers do not rise from 0 to the number of entries, {len(data)}")
    if len(indices) and not 0 <= indices.min() <= indices.max() < columns:
        raise ValueError(f"there are {columns} latents, and entries of the latents {indices.min()} to {indices.max()}")
    if len(data) and not 0 <= data.min() <= data.max() < np.inf:  # false of NaN too
        raise ValueError(f"strengths are finite and not negative, but these lie from {data.min()} to {data.max()}")
    if len(keys) and keys.min() < 0:
        raise ValueError(f"the key {keys.min()} is no index of an image")


def _map_member(path: Path, file: BinaryIO, member: zipfile.ZipInfo) -> NDArray[Any]:
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{member.filename} is compressed")
    # The offset of the data follows from the member's own header alone, not from the central directory.
    file.seek(member.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    file.seek(name_length + extra_length, os.SEEK_CUR)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds objects")
    if 0 in shape:  # nothing can be mapped
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", offset=file.tell(), shape=shape)


def finished_strengths(settings: Settings, run: SAERun, dataset: str, split: str) -> Path:
    """The folder of a split's concept strengths.

    Raises UserError if they are missing or unfinished; StaleArtifact if the SAE or the features have changed since.
    """
    folder = Artifacts(settings).strengths(run, dataset, split)
    if not manifest_path(folder).is_file():
        raise STRENGTHS.missing(
            "the concept strengths", folder, "--probe_dataset", dataset, "--probe_split", split, beside="with the SAE's flags"
        )
    check_chain(folder)
    check_is_of_sae(settings, run, folder)
    return folder


def check_is_of_sae(settings: Settings, run: SAERun, artifact: Path) -> None:
    """Check that names or strengths are of the SAE in use: a published one and one trained here may lie side by side.

    Raises StaleArtifact if they are of the other.
    """
    sae = Artifacts(settings).sae_in_use(run)
    if not manifest_path(artifact).is_file() or not sae.is_file():
        return
    made = read_manifest(artifact)
    if made["inputs"].get("SAE", "") not in ("", fingerprint(sae)):
        raise StaleArtifact(
            f"{artifact} is out of date: it was not made from the SAE in use, {sae}; {how_made_again(made)}",
            ["SAE has changed"],
        )


def strengths_width(folder: Path) -> int:
    """F of finished strengths, read from their first part. Raises UserError if it is damaged."""
    return int(map_part(_parts(folder)[0])["shape"][1])


def _parts(folder: Path) -> list[Path]:
    """The parts of finished strengths in order. Raises UserError if there are none."""
    parts = sorted(folder.glob(PARTS))
    if not parts:
        raise UserError(f"the concept strengths {folder} have no parts: run {_AGAIN}")
    return parts


def load_concept_strengths(settings: Settings, run: SAERun, dataset: str, split: str) -> ConceptStrengths:
    """The concept strengths of a split. Raises as `finished_strengths`, and UserError if a part is damaged."""
    folder = finished_strengths(settings, run, dataset, split)
    parts = {path: map_part(path) for path in _parts(folder)}
    details = read_manifest(folder)["details"]
    width = details.get("latents", next(iter(parts.values()))["shape"][1])
    for path, part in parts.items():
        try:
            check_part(part)
            if part["shape"][1] != width:
                raise ValueError(f"it has {part['shape'][1]} latents instead of {width}")
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}; run {_AGAIN}") from error
    return merge_parts(list(parts.values()))


def merge_parts(parts: list[dict[str, NDArray[Any]]]) -> ConceptStrengths:
    """One matrix of all parts. Each is copied from its memory map to its place, so that nothing is in memory twice."""
    n_rows = sum(len(part["indptr"]) - 1 for part in parts)
    n_entries = sum(len(part["data"]) for part in parts)
    data = np.empty(n_entries, dtype=np.float32)
    # scipy needs both index arrays to have one type: int64 once there are too many entries for int32
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


STRENGTHS = commands.STRENGTHS.stage(
    function=save_concept_strengths,
    inputs=(SAE, PROBE_FEATURES),
    outputs=lambda artifacts, run, images, splits, *_: [
        artifacts.strengths(run, images.dataset, split) for split in splits.names
    ],
    makes="the concept strengths",
)
_AGAIN = STRENGTHS.command("--overwrite --verify", beside="with the SAE's flags")
"""How damaged strengths are made again: their sizes may be right, and are all that is compared without --verify."""
