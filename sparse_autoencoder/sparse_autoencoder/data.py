"""Batches of features, in an order that depends only on a seed."""

import math
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from sparse_autoencoder.errors import NonFiniteError
from sparse_autoencoder.settings import TrainingSettings
from sparse_autoencoder.workers import Workers

READ_AHEAD = 2  # batches gathered ahead of the one in use
PIECE = 8192  # consecutive items that stay together until groups are shuffled, if `shuffle` is "shards"
GROUP = 131_072  # about this many items, of 16 pieces, are shuffled together; two groups are in memory at a time
READ = 1024  # items read in one go: larger reads pay for memory that the system hands out and takes back each time


@runtime_checkable
class Features(Protocol):
    """N items of D numbers.

    Two methods are optional. `describe(index) -> str` names an item's shard in error messages. `gather_stored(indices)` is
    `gather` in the type in which the items are stored: float16 or bfloat16 saves half the memory and the time of copies.
    """

    def __len__(self) -> int:
        """N."""
        ...

    def gather(self, indices: np.ndarray) -> Tensor:
        """The items (n x D, float32) at these indices (n, int64), in that order."""
        ...


class TensorFeatures:
    """A tensor (N x D) as Features; `checked` tells that it is known to be finite."""

    def __init__(self, x: Tensor, *, checked: bool = False) -> None:
        if x.ndim != 2:
            raise ValueError(f"features must be N x D, not {' x '.join(map(str, x.shape)) or 'a number'}")
        self.x, self.checked = x, checked

    def __len__(self) -> int:
        return len(self.x)

    def gather(self, indices: np.ndarray) -> Tensor:
        return self.gather_stored(indices).float()

    def gather_stored(self, indices: np.ndarray) -> Tensor:
        """The items (n x D) at these indices, in the tensor's type."""
        return self.x.index_select(0, torch.from_numpy(indices).to(self.x.device))


class OwnItems:
    """The items of `features` that one process reads, a range of them, as Features that count from its start."""

    def __init__(self, features: Features, own: range) -> None:
        self.features, self.start, self.n = features, own.start, len(own)

    def __len__(self) -> int:
        return self.n

    def gather(self, indices: np.ndarray) -> Tensor:
        return self.features.gather(indices + self.start)

    def gather_stored(self, indices: np.ndarray) -> Tensor:
        return gather_stored(self.features, indices + self.start)

    def describe(self, index: int) -> str:
        describe = getattr(self.features, "describe", None)
        return f"item {index + self.start} of the whole" if describe is None else str(describe(index + self.start))


def as_features(data: Features | Tensor) -> Features:
    """`data` as Features. Raises ValueError if the data has no items, or a tensor is not N x D."""
    features = TensorFeatures(data) if isinstance(data, Tensor) else data
    if not isinstance(features, Features):
        raise ValueError(f"features must be a tensor, or have __len__ and gather, not a {type(data).__name__}")
    if len(features) == 0:
        raise ValueError("there are no features: the data has 0 items")
    return features


def gather_stored(features: Features, indices: np.ndarray) -> Tensor:
    """The items (n x D) at these indices: in float16 or bfloat16 if they are stored in it, else in float32."""
    x = getattr(features, "gather_stored", features.gather)(indices)
    return x if x.dtype in (torch.float16, torch.bfloat16) else x.float()


def stored_type(features: Features) -> torch.dtype:
    """The type of `gather_stored`. Reads an item if the features have such a method."""
    return gather_stored(features, np.zeros(1, np.int64)).dtype if hasattr(features, "gather_stored") else torch.float32


def shuffle_of(features: Features, width: int, settings: TrainingSettings) -> str:
    """How an epoch of features of this width (D) is shuffled: `exact` or `shards`."""
    return settings.shuffle_of(len(features) * width * stored_type(features).itemsize)


def check_finite(x: Tensor, features: Features, indices: np.ndarray, when: str) -> None:
    """Checks a batch x (n x D) of the items at `indices` (n).
    Raises NonFiniteError if it holds NaN or infinity. The message starts with `when` and names the first bad item's shard."""
    if getattr(features, "checked", False) or torch.isfinite(x.sum()):  # a finite sum implies finite items
        return
    bad = (~torch.isfinite(x)).any(dim=1).nonzero()
    if len(bad) == 0:  # finite items whose sum overflowed
        return
    index = int(indices[int(bad[0])])
    describe = getattr(features, "describe", None)
    where = f", in {describe(index)}" if describe is not None else ""
    raise NonFiniteError(f"{when}: features hold NaN or infinity (item {index}{where})")


def is_constant(features: Features, batch_size: int = 4096) -> bool:
    """Whether all items are the same, up to the rounding of float32. Reads only as far as the first that differs.
    Raises NonFiniteError if an item read holds NaN or infinity."""
    first: Tensor | None = None
    for batch in in_batches(features, np.arange(len(features)), batch_size, name=lambda i: f"reading, batch {i}"):
        first = batch[0] if first is None else first
        if bool(((batch - first).abs() > 1e-6 * first.abs().max()).any()):
            return False
    return True


def checksum(features: Features) -> str:
    """The CRC-32 of 64 items spread over the data: enough to detect different data of the same size."""
    indices = np.linspace(0, len(features) - 1, num=min(64, len(features))).astype(np.int64)
    return f"{zlib.crc32(features.gather(indices).float().contiguous().cpu().numpy().tobytes()):08x}"


def group_size(batch_size: int) -> int:
    """Items that are held in memory and shuffled together if `shuffle` is "shards": whole batches, at least one."""
    return max(GROUP // batch_size, 1) * batch_size


def epoch_order(n_items: int, seed: int, epoch: int, group: int = 0) -> np.ndarray:
    """The order of an epoch: a permutation (n_items, int64) that depends only on the seed, the epoch and the group.

    If `group` is 0, any permutation is as likely as any other. Otherwise pieces of PIECE consecutive items are put into a
    random order, and within every `group` items of that order, items are shuffled. `in_batches` reads such an order without
    random access.
    """
    return shuffled(n_items, np.random.default_rng([seed, epoch]), group)


def shuffled(n_items: int, generator: np.random.Generator, group: int = 0) -> np.ndarray:
    """`epoch_order` with a generator of one's own."""
    if group == 0:
        return generator.permutation(n_items)
    pieces = generator.permutation(-(-n_items // PIECE))
    order = np.concatenate([np.arange(piece * PIECE, min((piece + 1) * PIECE, n_items)) for piece in pieces])
    for first in range(0, n_items, group):
        generator.shuffle(order[first : first + group])
    return order


class _Group:
    """Items of which most follow one another, read in ascending order and kept in the type in which they are stored.
    They take the place of another group's tensor `x`, if it has room for them."""

    def __init__(self, features: Features, indices: np.ndarray, x: Tensor | None) -> None:
        self.features, self.indices = features, np.sort(indices)
        bounds = [0, *(np.flatnonzero(np.diff(self.indices) != 1) + 1).tolist(), len(indices)]
        self.runs = [(i, min(i + READ, end)) for start, end in pairwise(bounds) for i in range(start, end, READ)]
        self.n_read = 0
        self.x = x if x is not None and len(x) >= len(indices) else None

    def read(self, share: float) -> None:
        """Reads on until this share of the runs of consecutive items is in memory."""
        for first, end in self.runs[self.n_read : math.ceil(share * len(self.runs))]:
            x = gather_stored(self.features, self.indices[first:end])
            if self.x is None:
                self.x = torch.empty(len(self.indices), x.shape[1], dtype=x.dtype)
            self.x[first:end] = x
            self.n_read += 1

    def take(self, indices: np.ndarray) -> Tensor:
        """The items at these indices, in that order."""
        self.read(1)
        if self.x is None:  # there are none
            return gather_stored(self.features, indices)
        return self.x.index_select(0, torch.from_numpy(np.searchsorted(self.indices, indices)))


class _Groups:
    """Takes batches from groups of an order. Holds the group in use and, in part, the next; reads a share of it per batch."""

    def __init__(self, features: Features, order: np.ndarray, bounds: np.ndarray, n_batches: int) -> None:
        """Groups of `n_batches` batches, of which batch i is order[bounds[i] : bounds[i + 1]]."""
        self.features, self.order, self.bounds, self.n_batches = features, order, bounds, n_batches
        self.groups = -(-(len(bounds) - 1) // n_batches)
        self.held: dict[int, _Group] = {}
        self.free: Tensor | None = None  # of the last group that was used up, for the one after next

    def take(self, batch: int) -> Tensor:
        """The items of a batch. Later calls must ask for later batches."""
        number, place = divmod(batch, self.n_batches)
        for group in (number, number + 1):
            if group not in self.held and group < self.groups:
                first, last = group * self.n_batches, min((group + 1) * self.n_batches, len(self.bounds) - 1)
                indices = self.order[self.bounds[first] : self.bounds[last]]
                self.held[group], self.free = _Group(self.features, indices, self.free), None
        x = self.held[number].take(self.order[self.bounds[batch] : self.bounds[batch + 1]])
        if number + 1 in self.held:
            self.held[number + 1].read((place + 1) / self.n_batches)
        if place + 1 == self.n_batches or batch + 2 == len(self.bounds):
            used = self.held.pop(number)
            self.free = used.x if number + 2 < self.groups else None
        return x


def batch_bounds(n_items: int, batch_size: int) -> np.ndarray:
    """Where the batches of an order start, and where the last one ends."""
    return np.append(np.arange(0, n_items, batch_size), n_items)


def lies_in(indices: np.ndarray, own: range) -> np.ndarray:
    """A mask of the indices (n) that lie in a range."""
    return (indices >= own.start) & (indices < own.stop)


def part_of(order: np.ndarray, batch_size: int, own: range) -> tuple[np.ndarray, np.ndarray]:
    """The indices of an order (N, int64) that lie in `own`, counted from its start, and the bounds of the batches' parts."""
    mine = lies_in(order, own)
    before = np.append(0, np.cumsum(mine))
    return order[mine] - own.start, before[batch_bounds(len(order), batch_size)]


def in_batches(
    features: Features,
    order: np.ndarray,
    batch_size: int,
    *,
    first: int = 0,
    name: Callable[[int], str] | None = None,
    reader: Workers | None = None,
    device: str | torch.device | None = None,
    group: int = 0,
    bounds: np.ndarray | None = None,
) -> Iterator[Tensor]:
    """Yields the items at the indices `order` in batches (n x D, float32), from batch `first` on; the last may be short.

    Args:
        features: where the items are.
        order: their indices (N, int64).
        batch_size: items in a batch.
        first: the first batch to yield, from 0.
        name: names a batch in errors, by default "batch 3".
        reader: a thread that gathers the next batches while the caller works on this one; for CUDA, also pins them, so that
            they are copied without waiting.
        device: where the batches are put; by default where the features are. Batches of `resident` features are gathered
            there, by the order that is copied once.
        group: the group size of an order of `epoch_order`; a multiple of the batch size. Every item is read once, in runs of
            consecutive items, and at most two groups are in memory, in the type in which the items are stored. If 0, or if
            the features are in memory, each batch is gathered by itself.
        bounds: where batches start in the order, and where the last one ends, if not at multiples of the batch size; then they
            may also be empty (`part_of`).

    Raises NonFiniteError if a batch holds NaN or infinity.
    """
    bounds = batch_bounds(len(order), batch_size) if bounds is None else bounds
    if isinstance(features, TensorFeatures) and features.checked:
        indices = torch.from_numpy(order).to(features.x.device)
        for start, end in pairwise(bounds[first:].tolist()):
            yield features.x.index_select(0, indices[start:end]).to(device).float()
        return
    to_cuda = device is not None and torch.device(device).type == "cuda"
    in_groups = group > 0 and not isinstance(features, TensorFeatures)
    groups = _Groups(features, order, bounds, group // batch_size) if in_groups else None

    def gather(batch: int) -> Tensor:
        chosen = order[bounds[batch] : bounds[batch + 1]]
        x = groups.take(batch) if groups is not None else gather_stored(features, chosen)
        full = x.float()
        check_finite(full, features, chosen, name(batch) if name is not None else f"batch {batch}")
        return x.pin_memory() if to_cuda and x.device.type == "cpu" else full

    def moved(x: Tensor) -> Tensor:
        return x.to(device, non_blocking=to_cuda).float()  # what goes to CUDA is pinned, or is there

    batches = range(first, len(bounds) - 1)
    if reader is None:
        yield from map(moved, map(gather, batches))
        return
    ahead: deque[Future[Tensor]] = deque()
    for batch in batches:
        ahead.append(reader.submit(lambda batch=batch: gather(batch)))  # type: ignore[misc]
        if len(ahead) > READ_AHEAD:
            yield moved(ahead.popleft().result())
    while ahead:
        yield moved(ahead.popleft().result())


def memory_of_gpu(device: torch.device) -> tuple[int, int]:
    """Bytes of a CUDA device's memory that are free, and all of them."""
    # Older versions of torch want the number of the device.
    return torch.cuda.mem_get_info(torch.cuda.current_device() if device.index is None else device.index)


def fits(n_bytes: int, device: torch.device) -> bool:
    """Whether data of this size is to be kept on a device: on CUDA, if it takes at most half of the free memory."""
    return device.type == "cuda" and n_bytes <= memory_of_gpu(device)[0] / 2


def resident(features: Features, device: torch.device, batch_size: int, reader: Workers | None = None) -> Features:
    """The features, moved to a CUDA device if they fit it (`fits`). Raises NonFiniteError if they hold NaN or infinity."""
    if device.type != "cuda" or len(features) == 0:
        return features
    item = gather_stored(features, np.zeros(1, np.int64))
    return loaded(features, device, batch_size, reader) if fits(item.nbytes * len(features), device) else features


def loaded(features: Features, device: torch.device, batch_size: int, reader: Workers | None = None) -> TensorFeatures:
    """The features on a device, in the type in which they are stored.
    Raises NonFiniteError if they hold NaN or infinity."""
    x: Tensor | None = None
    batches = in_batches(
        features, np.arange(len(features)), batch_size, name=lambda i: f"loading, batch {i}", reader=reader, device=device
    )
    for i, batch in enumerate(batches):
        if x is None:
            x = torch.empty(len(features), batch.shape[1], dtype=stored_type(features), device=device)
        x[i * batch_size : i * batch_size + len(batch)] = batch
    assert x is not None
    return TensorFeatures(x, checked=True)


def geometric_median(x: Tensor, *, tolerance: float = 1e-6, max_iterations: int = 200) -> Tensor:
    """The point (D) with the least total distance to the rows of x (N x D), by Weiszfeld's iteration in float64.
    Stops when a step moves the point by at most `tolerance` times the mean distance."""
    x = x.double()
    median = x.mean(dim=0)
    for _ in range(max_iterations):
        distance = torch.linalg.vector_norm(x - median, dim=1)
        weight = 1 / distance.clamp_min(1e-12 * float(distance.mean()) + 1e-300)
        moved = (weight @ x) / weight.sum()
        step = float(torch.linalg.vector_norm(moved - median))
        median = moved
        if step <= tolerance * float(distance.mean()):
            break
    return median.float()
