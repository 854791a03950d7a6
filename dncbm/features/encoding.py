"""Encoding images: worker processes decode them, batches are encoded, and features are written shard by shard."""

import hashlib
import json
import re
import threading
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from dncbm.features.datasets import DAMAGED, BadImage, Encoded, ImageShards, counted, open_image, reason_of, to_rgb
from dncbm.features.encoders import Encoder
from dncbm.runs.artifacts import shard_files
from dncbm.runs.declarations import Extraction
from dncbm.runs.devices import default_cores, default_workers
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import write_json
from dncbm.runs.partitions import WHOLE, Part
from dncbm.runs.ranks import ALONE, Ranks
from sparse_autoencoder.files import whole_file

SMALL_BATCH = 16
"""The smallest batch whose features do not depend on the number of threads (measured on EfficientNet, ResNet and ViT)."""


@dataclass(frozen=True)
class _Piece:
    """A batch of preprocessed images of one shard, on its way from a worker to the encoder."""

    shard: int
    images: torch.Tensor
    in_use: torch.Tensor
    """One boolean in shared memory; while it is set, the worker must not overwrite the buffer that holds `images`."""
    keys: list[Any]
    record: dict[str, Any] | None
    """With the last piece of a shard: the contents of its JSON file, except how the images were encoded."""
    n_bytes: int = 0
    """Bytes of the images in the tar or folder, with what a tar adds to each."""
    came_in: torch.Tensor | None = None
    """Of a pinned copy: the worker's buffer."""

    def pin_memory(self) -> "_Piece":
        """A copy in pinned memory. The DataLoader calls this in a thread of its own if there is a GPU."""
        in_use = torch.zeros(1, dtype=torch.bool)
        pinned = replace(self, images=self.images.pin_memory(), in_use=in_use, came_in=self.images)
        self.in_use.fill_(False)
        return pinned


class _Buffers:
    """Shared memory for batches, reused as soon as they are encoded.

    Fresh memory for every batch would have to be cleared and mapped in two processes, which takes a tenth of the time that
    a CPU needs for encoding. There are never more buffers than batches that the DataLoader fetches ahead.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.n = 0

    def add(self, image: torch.Tensor) -> None:
        """Append an image to the current batch."""
        if self.n == 0:
            self.filling, self.in_use = self._free_buffer((self.batch_size, *image.shape))
        self.filling[self.n] = image
        self.n += 1

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The images added since the last call, as one tensor, and the flag to clear when they have been encoded."""
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


@dataclass(frozen=True)
class _Decoded:
    """What became of an image of a shard."""

    key: Any
    """None for what the shard holds instead of an image."""
    n_bytes: int
    pixels: torch.Tensor | None
    """Preprocessed; None if the image is bad."""
    is_transparent: bool
    reason: str
    """Why it is bad."""
    warnings: tuple[str, ...]
    """The kinds of PIL's warnings."""


class _Reader(IterableDataset[_Piece]):
    """Decodes and preprocesses the images of some shards.

    With n processes, each reads every n-th shard. There are never more processes than shards; if there are fewer than workers,
    processes decode with several threads, so that all workers share even a single shard. Python's own part of the work, about
    a quarter, runs in one thread of a process at a time.
    """

    def __init__(
        self, shards: ImageShards, pending: list[int], encoder: Encoder, batch_size: int, background: str, n_workers: int
    ) -> None:
        self.shards, self.pending, self.batch_size, self.background = shards, pending, batch_size, background
        self.preprocess, self.n_workers = encoder.preprocess, n_workers

    def __iter__(self) -> Iterator[_Piece]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        buffers = _Buffers(self.batch_size)
        for n_before in range(0, len(self.pending) - first, step):
            n_reading = min(step, len(self.pending) - n_before)  # processes; some have no shard left in the last round
            n_threads = len(range(first, self.n_workers, n_reading))
            yield from self._pieces(self.pending[n_before + first], buffers, n_threads)

    def _pieces(self, shard: int, buffers: _Buffers, n_threads: int) -> Iterator[_Piece]:
        keys: list[Any] = []
        n_images = n_bytes = n_transparent = 0
        bad: Counter[str] = Counter()
        bad_keys: list[Any] = []
        warned: Counter[str] = Counter()
        content = _Content()
        for image in self._decoded(self._read(shard, content), n_threads):
            warned.update(image.warnings)
            n_bytes += image.n_bytes
            if image.pixels is None:
                bad[image.reason] += 1
                bad_keys += [] if image.key is None else [image.key]
                continue
            buffers.add(image.pixels)
            keys.append(image.key)
            n_images += 1
            n_transparent += image.is_transparent
            if len(keys) == self.batch_size:
                yield _Piece(shard, *buffers.take(), keys, None, n_bytes)
                keys, n_bytes = [], 0
        if bad.total() > len(bad_keys):
            bad_keys.append(None)
        record = {
            "source": self.shards.name(shard), "shards": len(self.shards), "state": self.shards.state(shard, bad_keys),
            "content": content.hash(), "images": n_images, "transparent": n_transparent, "bad": dict(bad),
            "bad_keys": bad_keys, "warnings": dict(warned),
        }  # fmt: skip
        yield _Piece(shard, *buffers.take(), keys, record, n_bytes)

    def _read(self, shard: int, content: "_Content") -> Iterator[tuple[Any, Encoded | Exception]]:
        """The images of a shard in order, or why one cannot be read; without a key for what the shard holds instead of one."""
        lost: list[str] = []
        for key, load in self.shards.read(shard, on_bad=lost.append):
            yield from ((None, BadImage(reason)) for reason in lost)
            lost.clear()
            try:
                encoded: Encoded | Exception = content.add(key, load)
            except Exception as error:  # counts as bad
                encoded = error
            yield key, encoded
        yield from ((None, BadImage(reason)) for reason in lost)

    def _decoded(self, images: Iterator[tuple[Any, Encoded | Exception]], n_threads: int) -> Iterator[_Decoded]:
        """The images, in order; several threads decode some of them ahead."""
        if n_threads <= 1:
            for image in images:
                with _noting_warnings():
                    decoded = self._decode(*image)
                yield decoded
            return
        coming: deque[Future[_Decoded]] = deque()
        pool = ThreadPoolExecutor(n_threads)
        with _noting_warnings():
            try:
                for image in images:
                    coming.append(pool.submit(self._decode, *image))
                    if len(coming) > 2 * n_threads:
                        yield coming.popleft().result()
                while coming:
                    yield coming.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _decode(self, key: Any, encoded: Encoded | Exception) -> _Decoded:
        warned: dict[str, None] = {}
        _noted.kinds = warned
        pixels, is_transparent, reason = None, False, ""
        n_bytes = 0 if isinstance(encoded, Exception) else _size_in_tar(encoded)
        try:
            if isinstance(encoded, Exception):
                raise encoded
            image, is_transparent = to_rgb(open_image(encoded), self.background)
            pixels = self.preprocess(image)
        except Exception as error:  # a broken file can make a decoder raise anything
            reason = reason_of(error)
        return _Decoded(key, n_bytes, pixels, is_transparent, reason, tuple(warned))


WARNINGS = (UserWarning, RuntimeWarning)
"""What warns of an image. Others warn of code."""
_noted = threading.local()
"""`kinds`: the kinds of warnings of the image that a thread decodes."""


@contextmanager
def _noting_warnings() -> Iterator[None]:
    """Note the warnings of every thread instead of showing them: PIL's would tear the progress bar."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = _note_warning
        yield


def _note_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: object = None, line: str | None = None
) -> None:
    """In place of `warnings.showwarning`."""
    if issubclass(category, WARNINGS) and hasattr(_noted, "kinds"):
        _noted.kinds[_kind(message)] = None


def _kind(message: Warning | str) -> str:
    """A warning without its numbers, which differ from image to image."""
    return re.sub(r"\d+", "N", " ".join(str(message).split()))[:100]


def _size_in_tar(encoded: Encoded) -> int:
    return len(encoded) + 1024 if isinstance(encoded, bytes) else 0  # a header, and on average half a block twice


class _Content:
    """Hash of the encoded images of a shard."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def add(self, key: Any, load: Callable[[], Encoded]) -> Encoded:
        """What `load` returns; raises what it raises. Pixels that were never encoded are part of the fingerprint already."""
        self.digest.update(ascii(key).encode())
        encoded = load()
        if isinstance(encoded, bytes):
            self.digest.update(f" {len(encoded)} ".encode())
            self.digest.update(encoded)
        return encoded

    def hash(self) -> str:
        return self.digest.hexdigest()


def encode_shards(
    shards: ImageShards, encoder: Encoder, folder: Path, extraction: Extraction, title: str, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Encode every image into `folder`, one .npy file per shard. Finished shards are not read again.

    A batch never crosses a shard, so the bits do not depend on interruptions or on the number of processes. `title` labels
    the progress bar; `ranks` are the processes that share the shards. Returns details for the manifest, as `extracted`.

    Raises UserError if the encoder gives NaN or infinity, too many images are bad, or a shard cannot be read.
    """
    encode_part(shards, encoder, folder, extraction, title, ranks)
    return ranks.first_makes(lambda: extracted(shards, folder, extraction.max_bad_fraction))


def encode_part(
    shards: ImageShards, encoder: Encoder, folder: Path, extraction: Extraction, title: str, ranks: Ranks = ALONE,
    part: Part = WHOLE,
) -> None:  # fmt: skip
    """`encode_shards` for the shards of a part, which `ranks` share. Others may encode other parts, or the same, meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    on_gpu = encoder.device.type == "cuda"
    batch_size = extraction.batch_size or default_batch_size(encoder.device)
    unfinished = set(ranks.first_makes(lambda: _unfinished(shards, folder, encoder.precision)))
    pending = [shard for shard in part.share_of(range(len(shards))) if shard in unfinished]
    mine = ranks.share_of(pending)
    made_by: dict[str, Any] = {"precision": encoder.precision, "device": str(encoder.device), "batch_size": batch_size}
    n_workers = default_workers(on_gpu) if extraction.num_workers is None else extraction.num_workers
    reader = _Reader(shards, mine, encoder, batch_size, extraction.background, n_workers)
    loader = DataLoader(reader, batch_size=None, num_workers=min(n_workers, len(mine)), pin_memory=on_gpu)
    progress = _Progress(shards, folder, pending, title, ranks, part)
    with closing(progress), ThreadPoolExecutor(1) as writer, _one_line_errors():
        features: dict[int, list[Callable[[], torch.Tensor]]] = defaultdict(list)
        keys: dict[int, list[Any]] = defaultdict(list)
        received: dict[int, torch.Tensor] = {}
        in_flight: deque[Callable[[], torch.Tensor]] = deque()
        written: Future[None] | None = None
        for piece in loader:
            if piece.keys:
                buffer = piece.images if piece.came_in is None else piece.came_in
                received[buffer.data_ptr()] = buffer  # keeps it mapped; else it would be mapped again for each batch
                in_flight.append(_to_host(encode_batch(encoder, piece.images, batch_size)))
                piece.in_use.fill_(False)
                features[piece.shard].append(in_flight[-1])
                keys[piece.shard] += piece.keys
                if len(in_flight) > 2:  # enough for a GPU to encode while it copies; more would fill memory
                    in_flight.popleft()()
                progress.read(piece)
            if piece.record:
                if written:
                    written.result()
                record = piece.record | made_by
                shard = piece.shard, features.pop(piece.shard, []), keys.pop(piece.shard, []), record
                written = writer.submit(_write_shard, shards, folder, *shard)
                progress.finished(piece.shard, piece.record)
        if written:
            written.result()
    ranks.wait()


def default_batch_size(device: torch.device) -> int:
    """Images encoded at a time, where nothing else is asked for."""
    return 256 if device.type == "cuda" else 32


def encode_batch(encoder: Encoder, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Features of a batch. On a CPU, the small batch at the end of a shard is padded.

    CPU kernels divide small batches among threads in other ways, so that the last bits would depend on the number of
    threads, which is one per process under torchrun.
    """
    n = len(images)
    if encoder.device.type == "cpu" and n < SMALL_BATCH <= batch_size:
        images = torch.cat([images, images.new_zeros(SMALL_BATCH - n, *images.shape[1:])])
    return encoder.encode_images(images)[:n]


def _to_host(features: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start copying features to the CPU. The function returned waits for the copy and returns it."""
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
    """The progress bar of rank 0. Where shards do not know their sizes, the total is estimated from the bytes read so far."""

    def __init__(self, shards: ImageShards, folder: Path, pending: list[int], title: str, ranks: Ranks, part: Part) -> None:
        self.shards, waiting = shards, set(pending)
        share = part.share_of(range(len(shards)))
        done = {shard: _size(_record(folder, shard)) for shard in share if shard not in waiting}
        mine = ranks.share_of(pending)
        counts = [shards.count(shard) for shard in mine]
        self.is_known = None not in counts
        self.n_done = sum(done.values())
        self.size_done = 0 if self.is_known else sum(map(shards.size, done))
        self.size = 0 if self.is_known else self.size_done + sum(map(shards.size, mine))
        self.n_read = self.n_bytes = 0
        self.bar = tqdm(
            desc=ranks.titled(part.titled(title)),
            total=self.n_done + sum(count or 0 for count in counts) if self.is_known else None,
            initial=self.n_done,
            unit="image",
            smoothing=0.05,
            disable=ranks.rank > 0,
        )
        self.close = self.bar.close
        self._estimate()

    def read(self, piece: _Piece) -> None:
        """Count the images of a piece."""
        self.n_read += len(piece.keys)
        self.n_bytes += piece.n_bytes
        if not self.n_done:
            self._estimate()
        self.bar.update(len(piece.keys))

    def finished(self, shard: int, record: Mapping[str, Any]) -> None:
        """Count the bad images of a shard, and update the estimated total."""
        self.n_done += _size(record)
        self.size_done += 0 if self.is_known else self.shards.size(shard)
        self._estimate()
        self.bar.update(sum(record["bad"].values()))

    def _estimate(self) -> None:
        n, size = (self.n_done, self.size_done) if self.n_done else (self.n_read, self.n_bytes)
        if not self.is_known and size:
            self.bar.total = max(round(n * self.size / size), self.n_read)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Reduce the errors of worker processes, which arrive with their traceback, to the line meant for the user."""
    try:
        yield
    except UserError as error:
        line = str(error).strip().splitlines()[-1]
        raise UserError(line.removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")) from error
    except RuntimeError as error:
        if not any(words in str(error) for words in ("exited unexpectedly", "killed by signal", "shared memory")):
            raise
        raise UserError(
            "a process that decodes images was killed, perhaps because memory or shared memory (/dev/shm) ran out: run the "
            "same command again with fewer --num_workers or a smaller --batch_size; finished shards are kept"
        ) from error


def missing_shards(shards: ImageShards, folder: Path, part: Part = WHOLE) -> list[int]:
    """The shards of a part that have no features yet, or whose images have changed since."""
    return [shard for shard in part.share_of(range(len(shards))) if _done(shards, folder, shard) is None]


def extracted(shards: ImageShards, folder: Path, max_bad_fraction: float) -> dict[str, Any]:
    """Details of finished features for their manifest: `images`, the number encoded, `transparent`, how many of them have
    transparent pixels, `bad` (reason -> number), `warnings` (kind -> number of images that PIL warned of), device, precision,
    batch size.

    Raises UserError if too many images are bad, all of them, or all of a shard of unknown size, or precisions differ.
    """
    records = [_record(folder, shard) for shard in range(len(shards))]
    is_damaged = [DAMAGED in record["bad"] and shards.count(shard) is None for shard, record in enumerate(records)]
    lost = _estimated_losses(records, is_damaged)
    bad_in = [Counter(record["bad"]) + Counter({DAMAGED: n}) for record, n in zip(records, lost, strict=True)]
    bad = sum(bad_in, Counter[str]())
    images, n_bad = sum(record["images"] for record in records), bad.total()
    reasons = ", ".join(f"{count} {reason}" for reason, count in bad.most_common())
    if any(lost):
        reasons += " (estimated from the other shards)"
    if images == 0:
        others = " and the other shards" if len(shards) > 1 else ""
        raise UserError(f"no image could be read from {shards.name(0)}{others}: {reasons or 'the split is empty'}")
    for shard, (record, damaged) in enumerate(zip(records, is_damaged, strict=True)):
        if damaged and not record["images"]:
            shard_files(folder, shard)[-1].unlink(missing_ok=True)  # it is read again even if its state looks the same
            raise UserError(
                f"no image could be read from {record['source']}: it is a {DAMAGED}; fetch it again and run the same command, "
                "which keeps the other shards, or leave it out of the list of shards"
            )
    if n_bad > max_bad_fraction * (images + n_bad):
        worst = max(range(len(records)), key=lambda shard: bad_in[shard].total())
        of = f"{n_bad} of {counted(images + n_bad, 'image')} {'is' if n_bad == 1 else 'are'} unreadable ({reasons})"
        raise UserError(
            f"{of}, more than --max_bad_fraction {max_bad_fraction}, most of them in {shards.name(worst)}; {folder}/*.json "
            "list them: fix the data and run the same command again, which reads only the shards that changed, or allow a "
            "larger fraction"
        )
    if n_bad:
        print(f"skipped {counted(n_bad, 'unreadable image')}: {reasons}")
    warned = sum((Counter(record["warnings"]) for record in records), Counter[str]())
    transparent = sum(record["transparent"] for record in records)
    made_by = {key: _all_in(records, key) for key in ("device", "precision", "batch_size")}
    if len(precisions := made_by["precision"]) > 1:
        raise UserError(
            f"{folder} holds features of {' and '.join(precisions)}, since its workers had devices of different kinds: pass "
            "--precision to all of them, and --overwrite to begin again"
        )
    return {
        "images": images, "transparent": transparent, "bad": dict(bad), "warnings": dict(warned),
        **{key: found[0] if len(found) == 1 else found for key, found in made_by.items() if found},
    }  # fmt: skip


def _all_in(records: list[dict[str, Any]], key: str) -> list[Any]:
    """The different values of a key; records of earlier versions may lack it."""
    return sorted({record[key] for record in records if key in record})


def _estimated_losses(records: list[dict[str, Any]], is_damaged: list[bool]) -> list[int]:
    """How many images each shard has lost beyond those that it counts: what a damaged one lacks to the mean of the others."""
    sizes = [_size(record) for record in records]
    whole = [size for size, damaged in zip(sizes, is_damaged, strict=True) if not damaged]
    typical = round(sum(whole) / len(whole)) if whole else max(sizes, default=0)
    return [max(0, typical - size) if damaged else 0 for size, damaged in zip(sizes, is_damaged, strict=True)]


_RECORD = {
    "source": str, "shards": int, "state": str, "content": str, "images": int, "transparent": int, "bad": dict,
    "bad_keys": list, "warnings": dict,
}  # fmt: skip
"""The keys of a shard's record, and their types."""


def _record(folder: Path, shard: int) -> dict[str, Any]:
    path = shard_files(folder, shard)[0]
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        is_whole = isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in _RECORD.items())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(_damaged_record(path)) from error
    if not is_whole or not all(isinstance(n, int) for part in ("bad", "warnings") for n in record[part].values()):
        raise UserError(_damaged_record(path))
    return record


def _damaged_record(path: Path) -> str:
    return f"{path} is missing or damaged: delete it, or pass --overwrite, and run the same command again"


def drop_damaged_records(folder: Path) -> None:
    """Delete the records of an unfinished extraction that cannot be read, so that their shards are read again."""
    for path in folder.glob("[0-9]*.json"):
        try:
            _record(folder, int(path.stem))
        except (UserError, ValueError):
            path.unlink(missing_ok=True)


def _size(record: Mapping[str, Any]) -> int:
    """Number of images of a shard, good and bad."""
    return int(record["images"] + sum(record["bad"].values()))


def _unfinished(shards: ImageShards, folder: Path, precision: str) -> list[int]:
    """The shards that have no features yet. Raises UserError if the features of others have another precision."""
    records = [_done(shards, folder, shard) for shard in range(len(shards))]
    for record in records:
        if record is not None and (other := record.get("precision", precision)) != precision:
            raise UserError(
                f"{folder} holds {other} features of an interrupted run, to which this one would add {precision}: resume on "
                "the same kind of device, or remove the folder"
            )
    return [shard for shard, record in enumerate(records) if record is None]


def _done(shards: ImageShards, folder: Path, shard: int) -> dict[str, Any] | None:
    """The record of a shard whose features exist, if its images are still those they were made from."""
    record_file, keys_file, features_file = files = shard_files(folder, shard)
    if not all(path.is_file() for path in files):
        return None
    try:
        record = _record(folder, shard)
    except UserError:
        if not record_file.is_file():  # removed meanwhile
            return None
        raise
    try:
        if any(len(np.load(path, mmap_mode="r")) != record["images"] for path in (keys_file, features_file)):
            return None
    except Exception:  # cut off, or another file, whose header can make numpy raise anything
        return None
    try:
        return record if record["state"] == shards.state(shard, record["bad_keys"]) else None
    except (OSError, LookupError, TypeError):
        return record  # images that no longer exist have not been fixed


def are_from(shards: ImageShards, folder: Path) -> bool:
    """Whether the files of an unfinished extraction belong to these shards, even if some images have been fixed since."""
    return all(
        number < len(shards)
        and (record := _record(folder, number))["source"] == shards.name(number)
        and record["shards"] == len(shards)
        for number in (int(path.stem) for path in folder.glob("[0-9]*.json"))
    )


def changed_shards(shards: ImageShards, folder: Path) -> list[int]:
    """The shards whose images are not those that finished features were made from, down to the last byte.

    Reads all images, but decodes none.
    """

    def has_changed(shard: int) -> bool:
        content = _Content()
        for key, load in shards.read(shard, on_bad=lambda _: None):
            with suppress(Exception):  # counts as bad, as it did before
                content.add(key, load)
        return content.hash() != _record(folder, shard)["content"]

    numbers = [number for number in range(len(shards)) if shard_files(folder, number)[0].is_file()]
    with ThreadPoolExecutor(default_cores()) as pool:
        changed = tqdm(pool.map(has_changed, numbers), desc="comparing images", total=len(numbers), unit="shard")
        return [number for number, other in zip(numbers, changed, strict=True) if other]


def _write_shard(
    shards: ImageShards, folder: Path, shard: int, parts: list[Callable[[], torch.Tensor]], keys: list[Any],
    record: dict[str, Any],
) -> None:  # fmt: skip
    features = torch.cat([part() for part in parts]).numpy() if parts else np.empty((0, 0), dtype=np.float32)
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise UserError(
            f"the encoder gave NaN or infinity for {keys[int(np.argmin(finite))]} in {record['source']}: the shard was not "
            "written; try --precision fp32, or another encoder"
        )
    record_file, keys_file, features_file = shard_files(folder, shard)
    if _done(shards, folder, shard) is not None:
        return  # by another worker with the same part, perhaps on other hardware, and the manifest may have its hash
    features_file.unlink(missing_ok=True)  # of a shard that is made again: the old features have other keys
    write_json(record_file, record)
    with whole_file(keys_file) as temporary:
        np.save(temporary, np.asarray(keys))
    with whole_file(features_file, replaces=False) as temporary:
        np.save(temporary, features)
