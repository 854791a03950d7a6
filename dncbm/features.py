"""Image features: extracting them, and FeatureStore, the memory-mapped folder of .npy shards that holds them."""

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from dncbm.artifacts import DEFAULT_SEED, Artifacts
from dncbm.datasets import ImageShards, reason_of
from dncbm.datasets.cc3m import sae_images
from dncbm.datasets.probe import DATASET_SPLITS, ProbeImages, ProbeShards, probe_images, split_train
from dncbm.devices import resolve_device
from dncbm.encoders import Encoder, describe_encoder, load_encoder
from dncbm.errors import UserError
from dncbm.manifests import Outcome, Recipe, begin, finish, read_manifest, whole_file, write_json
from dncbm.ranks import ALONE, Ranks, device_name, joined
from dncbm.settings import SPLITS, Settings

ARRAYS = "[0-9]*.npy"
"""The files of a store; hidden ones are what a killed process was writing."""
SMALL_BATCH = 16
"""Images from which on features were found not to depend on the number of threads (EfficientNet, ResNet and ViT)."""


@dataclass(frozen=True)
class Extraction:
    """How features are extracted; none of it changes what they are."""

    device: str = "auto"
    batch_size: int | None = None
    """Images encoded at a time; None: 256 on a GPU, 32 elsewhere, where larger activations only leave the cache."""
    num_workers: int = 1
    max_bad_fraction: float = 0.05
    """Share of the images that may be unreadable before the stage fails."""
    overwrite: bool = False
    precision: str | None = None
    """One of encoders.PRECISIONS; None: fp16 on a GPU, else fp32."""


# ---------------------------------------------------------------------------------------------------------------- store


class FeatureStore:
    """Features on disk: a folder of `NNNNN.npy` (rows x D, float16 or float32) with `NNNNN.keys.npy` beside each.

    Nothing is read until rows are asked for; shards are memory maps.
    """

    def __init__(self, folder: Path, made_by: str) -> None:
        """Open a finished store.

        Args:
            folder: the folder.
            made_by: the command that makes it, for the error.

        Raises:
            UserError: it is not there or not finished.
        """
        if not (folder / "manifest.json").is_file():
            state = "are not finished" if folder.is_dir() else "are not there"
            raise UserError(f"the features {folder} {state}: make them with `{made_by}`")
        self.folder = folder
        paths = sorted(path for path in folder.glob(ARRAYS) if not path.name.endswith(".keys.npy"))
        maps = [np.load(path, mmap_mode="r") for path in paths]
        self.paths = [path for path, shard in zip(paths, maps, strict=True) if len(shard)]
        self._shards = [shard for shard in maps if len(shard)]
        if not self.paths:
            raise UserError(f"the features {folder} hold no row: remove the folder and run `{made_by}`")
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def width(self) -> int:
        """D, the number of features of an item."""
        return int(self._shards[0].shape[1])

    @cached_property
    def keys(self) -> NDArray[Any]:
        """Key of every row: the sample's key (webdataset) or the index in the dataset's own split (probe datasets)."""
        return np.concatenate([np.load(path.with_suffix(".keys.npy")) for path in self.paths])

    def gather(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Rows in the order asked for, n x D float32. Shards are visited once each, in order.

        Raises:
            IndexError: there is no such row.
        """
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"rows {indices.min()} to {indices.max()} of {len(self)} in {self.folder}")
        out = np.empty((len(indices), self.width), dtype=np.float32)
        order = np.argsort(indices, kind="stable")
        edges = np.searchsorted(indices[order], self._starts)
        for shard, start, first, last in zip(self._shards, self._starts, edges, edges[1:], strict=False):
            rows = order[first:last]
            if len(rows):
                out[rows] = shard[indices[rows] - start]
        return torch.from_numpy(out)

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """All rows in order, as float32 batches that never cross a shard."""
        for shard in range(len(self.paths)):
            yield from self.shard_batches(shard, batch_size)

    def shard_batches(self, shard: int, batch_size: int) -> Iterator[torch.Tensor]:
        """The rows of one shard in order, as float32 batches."""
        rows = self._shards[shard]
        for start in range(0, len(rows), batch_size):
            yield torch.from_numpy(rows[start : start + batch_size].astype(np.float32))

    def describe(self, index: int) -> str:
        """Where a row lies, for messages."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"row {index - int(self._starts[shard])} of {self.paths[shard]}"


# ----------------------------------------------------------------------------------------------------------- extraction


@dataclass(frozen=True)
class _Piece:
    """A batch of preprocessed images of one shard, on its way from a worker to the encoder."""

    shard: int
    images: torch.Tensor
    in_use: torch.Tensor
    """One boolean in shared memory: `images` still lie in the worker's buffer, which it must not write to."""
    keys: list[Any]
    record: dict[str, Any] | None
    """With the last piece: what the shard was read from, and what could not be read."""

    def pin_memory(self) -> "_Piece":
        """A copy in pinned memory. The DataLoader calls this for a GPU, in a thread of its own."""
        pinned = replace(self, images=self.images.pin_memory(), in_use=torch.zeros(1, dtype=torch.bool))
        self.in_use.fill_(False)
        return pinned


class _Buffers:
    """Shared memory for batches, used again as soon as they are encoded.

    New memory for every batch would cost the kernel, for clearing and mapping it in two processes, a tenth of the time that
    a CPU encodes. There are never more buffers than batches that the DataLoader fetches ahead.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.n = 0

    def add(self, image: torch.Tensor) -> None:
        """Put an image into the batch that is being filled."""
        if self.n == 0:
            self.filling, self.in_use = self._free_buffer((self.batch_size, *image.shape))
        self.filling[self.n] = image
        self.n += 1

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The images added since the last call, as one tensor, and the mark that keeps their buffer from being used again."""
        if self.n == 0:
            return torch.empty(0), torch.zeros(1, dtype=torch.bool)
        n, self.n = self.n, 0
        self.in_use.fill_(True)
        return self.filling[:n], self.in_use

    def _free_buffer(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        for buffer, in_use in self.buffers:
            if not in_use and buffer.shape == shape:
                return buffer, in_use
        self.buffers.append((torch.empty(shape).share_memory_(), torch.zeros(1, dtype=torch.bool).share_memory_()))
        return self.buffers[-1]


class _Reader(IterableDataset[_Piece]):
    """Decodes and preprocesses the images of some shards. A worker process reads every n-th of them."""

    def __init__(self, shards: ImageShards, pending: list[int], encoder: Encoder, batch_size: int) -> None:
        self.shards, self.pending, self.batch_size = shards, pending, batch_size
        self.preprocess = encoder.preprocess

    def __iter__(self) -> Iterator[_Piece]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        buffers = _Buffers(self.batch_size)
        for shard in self.pending[first::step]:
            yield from self._read(shard, buffers)

    def _read(self, shard: int, buffers: _Buffers) -> Iterator[_Piece]:
        keys: list[Any] = []
        bad: Counter[str] = Counter()
        bad_keys: list[Any] = []
        for key, decode in self.shards.read(shard, on_bad=lambda reason: bad.update([reason])):
            try:
                image = self.preprocess(decode())
            except Exception as error:  # whatever a broken file makes a decoder raise
                bad[reason_of(error)] += 1
                bad_keys.append(key)
                continue
            buffers.add(image)
            keys.append(key)
            if len(keys) == self.batch_size:
                yield _Piece(shard, *buffers.take(), keys, None)
                keys = []
        if bad.total() > len(bad_keys):
            bad_keys.append(None)
        record = {
            "source": self.shards.name(shard),
            "shards": len(self.shards),
            "state": self.shards.state(shard, bad_keys),
            "bad": dict(bad),
            "bad_keys": bad_keys,
        }
        yield _Piece(shard, *buffers.take(), keys, record)


@dataclass
class _Growing:
    """The features of a shard that is being encoded."""

    features: list[Callable[[], torch.Tensor]] = field(default_factory=list)
    keys: list[Any] = field(default_factory=list)


def extract(
    shards: ImageShards, encoder: Encoder, folder: Path, extraction: Extraction, title: str, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Encode every image into `folder`, one .npy for each shard. Shards that are already there are not read again.

    A batch never crosses a shard, so an interrupted extraction, and one by several processes, end with the same bits.

    Args:
        shards: the images.
        encoder: what encodes them.
        folder: where features go.
        extraction: how.
        title: of the progress bar.
        ranks: the processes that share the shards.

    Returns:
        For the manifest: `images`, `bad` (reason -> number), device and batch size.

    Raises:
        UserError: an encoder gives NaN or infinity, too many images are bad, or a shard cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    batch_size = extraction.batch_size or (256 if encoder.device.type == "cuda" else 32)
    pending = ranks.first_makes(lambda: [shard for shard in range(len(shards)) if not _is_done(shards, folder, shard)])
    mine = ranks.share_of(pending)
    loader = DataLoader(
        _Reader(shards, mine, encoder, batch_size),
        batch_size=None,
        num_workers=min(extraction.num_workers, len(mine)),
        pin_memory=encoder.device.type == "cuda",
    )
    with (
        _Progress(shards, folder, pending, title, ranks) as progress,
        ThreadPoolExecutor(1) as writer,
        _one_line_errors(),
    ):
        growing: dict[int, _Growing] = {}
        received: dict[int, torch.Tensor] = {}
        on_their_way: deque[Callable[[], torch.Tensor]] = deque()
        written: Future[None] | None = None
        for piece in loader:
            grown = growing.setdefault(piece.shard, _Growing())
            if piece.keys:
                if encoder.device.type != "cuda":  # or a worker's buffer would be mapped anew for each batch
                    received[piece.images.data_ptr()] = piece.images
                grown.features.append(_to_host(_encode(encoder, piece.images, batch_size)))
                piece.in_use.fill_(False)
                grown.keys += piece.keys
                on_their_way.append(grown.features[-1])
                if len(on_their_way) > 2:  # enough for a GPU to encode while it copies; more would fill memory
                    on_their_way.popleft()()
                progress.encoded(len(piece.keys))
            if piece.record:
                if written:
                    written.result()
                written = writer.submit(_write_shard, folder, piece.shard, growing.pop(piece.shard), piece.record)
                progress.finished(piece.record)
        if written:
            written.result()
    ranks.wait()
    details = ranks.first_makes(lambda: _account(shards, folder, extraction.max_bad_fraction))
    return {
        **details,
        "device": str(encoder.device),
        "precision": encoder.precision,
        "batch_size": batch_size,
    }


def _encode(encoder: Encoder, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Features of a batch. What is left at the end of a shard is filled up on a CPU, and the filling dropped.

    Kernels for CPUs divide a smaller batch among their threads in other ways, and the last bits would follow the number of
    threads: one in each process of torchrun, another without it.
    """
    n = len(images)
    if encoder.device.type == "cpu" and n < SMALL_BATCH <= batch_size:
        images = torch.cat([images, images.new_zeros(SMALL_BATCH - n, *images.shape[1:])])
    return encoder.encode_images(images)[:n]


def _to_host(features: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to copy features to the CPU; the function returned waits for their arrival."""
    if features.device.type != "cuda":
        on_cpu = features.cpu()
        return lambda: on_cpu
    host = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
    host.copy_(features, non_blocking=True)
    arrival = torch.cuda.Event()
    arrival.record(torch.cuda.current_stream(features.device))

    def arrived() -> torch.Tensor:
        arrival.synchronize()
        return host

    return arrived


class _Progress:
    """The progress bar of rank 0. Where shards do not say how many images they hold, the finished ones tell."""

    def __init__(self, shards: ImageShards, folder: Path, pending: list[int], title: str, ranks: Ranks) -> None:
        waiting = set(pending)
        self.of_done = [_n_images(_record(folder, shard)) for shard in range(len(shards)) if shard not in waiting]
        counts = [shards.count(shard) for shard in ranks.share_of(pending)]
        self.n_shards = len(self.of_done) + len(counts)
        self.is_known = None not in counts
        self.bar = tqdm(
            desc=title if ranks.size == 1 else f"{title} (process 1 of {ranks.size})",
            total=sum(self.of_done) + sum(count or 0 for count in counts) if self.is_known else None,
            initial=sum(self.of_done),
            unit="image",
            smoothing=0.05,
            disable=ranks.rank > 0,
        )
        self.estimate()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def encoded(self, n: int) -> None:
        self.bar.update(n)

    def finished(self, record: Mapping[str, Any]) -> None:
        self.of_done.append(_n_images(record))
        self.bar.update(sum(record["bad"].values()))
        self.estimate()

    def estimate(self) -> None:
        if not self.is_known and self.of_done:
            self.bar.total = round(sum(self.of_done) / len(self.of_done) * self.n_shards)
            self.bar.refresh()


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What a worker process raises arrives with its traceback: leave the line that is meant for people."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("dncbm.errors.UserError: ")) from error
    except RuntimeError as error:
        if not any(words in str(error) for words in ("exited unexpectedly", "killed by signal", "shared memory")):
            raise
        raise UserError(
            "a process that decodes images was killed, perhaps for lack of memory or of shared memory (/dev/shm): "
            "run again with fewer --num_workers or a smaller --batch_size; what is extracted is kept"
        ) from error


def _account(shards: ImageShards, folder: Path, max_bad_fraction: float) -> dict[str, Any]:
    """Count the images of all shards. Raises UserError if too many are bad, or none is good."""
    records = [_record(folder, shard) for shard in range(len(shards))]
    bad = sum((Counter(record["bad"]) for record in records), Counter[str]())
    images, n_bad = sum(record["images"] for record in records), bad.total()
    if images == 0:
        raise UserError(
            f"no image could be read from {shards.name(0)}{' and the other shards' if len(shards) > 1 else ''}"
        )
    if n_bad > max_bad_fraction * (images + n_bad):
        worst = max(records, key=lambda record: sum(record["bad"].values()))
        raise UserError(
            f"{n_bad} of {images + n_bad} images are unreadable ({_counts(bad)}), more than --max_bad_fraction "
            f"{max_bad_fraction}, most of them in {worst['source']}: mend the data and run again, and only the shards you "
            f"mended are read again, or run again with a larger fraction; {folder}/*.json list them"
        )
    if n_bad:
        print(f"skipped {n_bad} unreadable images: {_counts(bad)}")
    return {"images": images, "bad": dict(bad)}


def _counts(bad: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in bad.most_common())


def _shard_files(folder: Path, shard: int) -> tuple[Path, Path, Path]:
    """The record, keys and features of a shard, in the order they are written."""
    stem = folder / f"{shard:05d}"
    return stem.with_suffix(".json"), stem.with_suffix(".keys.npy"), stem.with_suffix(".npy")


def _record(folder: Path, shard: int) -> dict[str, Any]:
    path = _shard_files(folder, shard)[0]
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not there: run the same command again, and it makes what is missing") from error
    return record


def _n_images(record: Mapping[str, Any]) -> int:
    """Good and bad images of a shard."""
    return int(record.get("images", 0) + sum(record["bad"].values()))


def _is_done(shards: ImageShards, folder: Path, shard: int) -> bool:
    """Whether the features of a shard are there, and its images are still what they were made from."""
    if not all(path.is_file() for path in _shard_files(folder, shard)):
        return False
    record = _record(folder, shard)
    try:
        return bool(record.get("state") == shards.state(shard, record.get("bad_keys", ())))
    except (OSError, LookupError):
        return True  # what is not there any more has not been mended


def _are_from(shards: ImageShards, folder: Path) -> bool:
    """Whether what an unfinished extraction left is of these shards, be some of them mended since."""
    numbers = [int(path.stem) for path in folder.glob("[0-9]*.json")]
    return all(
        number < len(shards)
        and (record := _record(folder, number)).get("source") == shards.name(number)
        and record.get("shards") == len(shards)
        for number in numbers
    )


def _write_shard(folder: Path, shard: int, grown: _Growing, record: dict[str, Any]) -> None:
    arrived = [part() for part in grown.features]
    features = torch.cat(arrived).numpy() if arrived else np.empty((0, 0), dtype=np.float32)
    if not np.isfinite(features).all():
        row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
        raise UserError(
            f"the encoder gave NaN or infinity for {grown.keys[row]} in {record['source']}: the shard was not written"
        )
    record_file, keys_file, features_file = _shard_files(folder, shard)
    features_file.unlink(missing_ok=True)  # of a shard that is made again: the old features have other keys
    write_json(record_file, {**record, "images": len(grown.keys)})
    for path, array in ((keys_file, np.asarray(grown.keys)), (features_file, features)):
        with whole_file(path) as temporary:
            np.save(temporary, array)


# --------------------------------------------------------------------------------------------------------------- stages


def save_sae_features(settings: Settings, dataset: str, encoder: str, hook: str, extraction: Extraction) -> Outcome:
    """Stage 1: features of the images that the SAE is trained on, every split (METHOD section 1).

    Raises:
        UserError: no such dataset, shards or encoder; too many bad images; NaN features.
        StaleArtifact: there are features from other images or another encoder.
    """
    with joined() as ranks:
        sources = ranks.first_makes(partial(sae_images, settings, dataset))
        return _save_features(settings, "sae_features", dataset, encoder, hook, sources, extraction, ranks)


def save_probe_features(
    settings: Settings, dataset: str, encoder: str, hook: str, splits: tuple[str, ...], extraction: Extraction
) -> Outcome:
    """Stage 5: labels, split and features of a probe dataset.

    Raises:
        UserError: no such dataset or encoder; too many bad images; NaN features.
        StaleArtifact: there are labels or features from other images or another encoder.
    """
    with joined() as ranks:
        images, indices = ranks.first_makes(partial(_probe_split, settings, dataset, extraction.overwrite))
        sources: dict[str, ImageShards] = {
            split: ProbeShards(images["val" if split == "val" else "train"], indices[split]) for split in splits
        }
        return _save_features(settings, "probe_features", dataset, encoder, hook, sources, extraction, ranks)


def _probe_split(
    settings: Settings, dataset: str, overwrite: bool
) -> tuple[dict[str, ProbeImages], dict[str, NDArray[np.int64]]]:
    """The images of a probe dataset, and the indices of each of our splits; written down with the labels."""
    images = {split: probe_images(settings, dataset, split) for split in DATASET_SPLITS}
    artifacts = Artifacts(settings)
    indices = split_train(len(images["train"].labels), DEFAULT_SEED) | {"val": np.arange(len(images["val"].labels))}

    # The split does not follow --seed: runs of several seeds are compared on the same images.
    split_file = artifacts.probe_split(dataset)
    recipe = Recipe(
        "probe_split",
        {"seed": DEFAULT_SEED},
        {f"{split} images of {dataset}": images[split].content_hash for split in DATASET_SPLITS},
    )
    if begin(split_file, recipe, overwrite=overwrite) is Outcome.RAN:
        arrays = {artifacts.labels(dataset, split): images[split].labels for split in DATASET_SPLITS}
        arrays |= {artifacts.split_indices(dataset, split): indices[split] for split in ("train", "train_val")}
        for split, found in images.items():
            if found.groups is not None:
                arrays[artifacts.groups(dataset, split)] = found.groups
        for path, array in arrays.items():
            with whole_file(path) as temporary:
                np.save(temporary, array)
        about: dict[str, Any] = {"class_names": images["train"].class_names}
        if images["train"].group_names:
            about["group_names"] = images["train"].group_names
        write_json(split_file, about | {"sizes": {split: len(indices[split]) for split in SPLITS}})
        finish(split_file, recipe, [split_file, *arrays])
    return images, indices


def _save_features(
    settings: Settings,
    stage: str,
    dataset: str,
    encoder_name: str,
    hook: str,
    sources: Mapping[str, ImageShards],
    extraction: Extraction,
    ranks: Ranks,
) -> Outcome:
    description = ranks.first_makes(partial(describe_encoder, settings, encoder_name))
    outcome = Outcome.ALREADY_DONE
    encoder = None
    for split, shards in sources.items():
        folder = Artifacts(settings).features(dataset, encoder_name, hook, split)
        wanted = description | {"hook": hook, "precision": extraction.precision or "the device's"}
        recipe = Recipe(stage, wanted, {f"{split} images of {dataset}": shards.fingerprint()})
        begun = ranks.first_makes(
            partial(
                begin, folder, recipe, overwrite=extraction.overwrite, parts_hold=partial(_are_from, shards, folder)
            )
        )
        if begun is Outcome.ALREADY_DONE:
            continue
        outcome = Outcome.RAN
        if encoder is None:
            device = device_name(extraction.device, ranks)
            load = partial(_load, settings, encoder_name, device, extraction.precision)
            encoder = load() if ranks.rank == 0 else None  # downloads what is not there, or fails, for all
            ranks.wait()
            encoder = encoder or load()
        details = extract(shards, encoder, folder, extraction, f"{dataset} {split}", ranks)
        ranks.first_makes(partial(_finish, folder, recipe, details, f"{dataset} {split}"))
    return outcome


def _load(settings: Settings, name: str, device: str, precision: str | None) -> Encoder:
    return load_encoder(settings, name, resolve_device(device), precision)


def _finish(folder: Path, recipe: Recipe, details: dict[str, Any], title: str) -> None:
    finish(folder, recipe, folder.glob(ARRAYS), details)
    print(f"{details['images']} images of {title}: {folder}")


def open_features(settings: Settings, dataset: str, encoder: str, hook: str, split: str) -> FeatureStore:
    """The finished features of a split. Raises UserError, naming the command that makes them, if there are none."""
    if dataset in settings.sae_datasets:
        command = f"python scripts/01_save_cc3m_features.py --img_enc_name {encoder} --sae_dataset {dataset}"
    else:
        command = f"python scripts/05_save_probe_features.py --img_enc_name {encoder} --probe_dataset {dataset}"
    return FeatureStore(Artifacts(settings).features(dataset, encoder, hook, split), command)


def probe_labels(settings: Settings, dataset: str, split: str, keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels of the rows with these keys (indices in the dataset's own split), int64.

    Raises:
        UserError: the labels are not there.
    """
    path = Artifacts(settings).labels(dataset, "val" if split == "val" else "train")
    if not path.is_file():
        raise UserError(
            f"no labels {path}: make them with `python scripts/05_save_probe_features.py --probe_dataset {dataset}`"
        )
    labels: NDArray[np.int64] = np.load(path)[keys]
    return labels


def probe_class_names(settings: Settings, dataset: str) -> list[str]:
    """Class names of a probe dataset, in label order. Raises UserError if its split was not made."""
    path = Artifacts(settings).probe_split(dataset)
    read_manifest(path)
    names: list[str] = json.loads(path.read_text(encoding="utf-8"))["class_names"]
    return names


def default_workers() -> int:
    """Worker processes that leave the encoder cores: half of those this process may use and shares, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    return max(1, min(16, cores // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
