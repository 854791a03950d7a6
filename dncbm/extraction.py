"""Extracting features: images are decoded in worker processes, encoded in batches, and written shard by shard."""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from dncbm.datasets import ImageShards, reason_of
from dncbm.encoders import Encoder
from dncbm.errors import UserError
from dncbm.manifests import whole_file, write_json
from dncbm.ranks import ALONE, Ranks

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


def are_from(shards: ImageShards, folder: Path) -> bool:
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
