"""Batches of features, in an order that depends only on a seed."""

import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from sparse_autoencoder.errors import NonFiniteError
from sparse_autoencoder.workers import Workers

READ_AHEAD = 2  # batches gathered ahead of the one in use


@runtime_checkable
class Features(Protocol):
    """N items of D numbers. An optional method `describe(index) -> str` names an item's shard in error messages."""

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
        return self.x[torch.from_numpy(indices).to(self.x.device)].float()


def as_features(data: Features | Tensor) -> Features:
    """`data` as Features. Raises ValueError if the data has no items, or a tensor is not N x D."""
    features = TensorFeatures(data) if isinstance(data, Tensor) else data
    if len(features) == 0:
        raise ValueError("there are no features: the data has 0 items")
    return features


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


def epoch_order(n_items: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation (n_items, int64) that depends only on the seed and the epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n_items)


def in_batches(
    features: Features,
    order: np.ndarray,
    batch_size: int,
    *,
    first: int = 0,
    name: Callable[[int], str] | None = None,
    reader: Workers | None = None,
) -> Iterator[Tensor]:
    """Yields the items at the indices `order` in batches (n x D, float32), from batch `first` on; the last may be short.

    `name` names a batch in errors, by default "batch 3". If there is a `reader`, its thread gathers the next batches while
    the caller works on this one.

    Raises NonFiniteError if a batch holds NaN or infinity.
    """

    def gather(batch: int) -> Tensor:
        indices = order[batch * batch_size : (batch + 1) * batch_size]
        x = features.gather(indices).float()
        check_finite(x, features, indices, name(batch) if name is not None else f"batch {batch}")
        return x

    batches = range(first, -(-len(order) // batch_size))
    if reader is None:
        yield from map(gather, batches)
        return
    ahead: deque[Future[Tensor]] = deque()
    for batch in batches:
        ahead.append(reader.submit(lambda batch=batch: gather(batch)))  # type: ignore[misc]
        if len(ahead) > READ_AHEAD:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def resident(features: Features, device: torch.device, batch_size: int) -> Features:
    """The features, moved to a CUDA device if they take at most half of its free memory.
    Raises NonFiniteError if they hold NaN or infinity."""
    if device.type != "cuda":
        return features
    width = features.gather(np.zeros(1, np.int64)).shape[1]
    # Older versions of torch want the number of the device.
    free, _ = torch.cuda.mem_get_info(torch.cuda.current_device() if device.index is None else device.index)
    if 4 * width * len(features) > free / 2:
        return features
    batches = in_batches(features, np.arange(len(features)), batch_size, name=lambda i: f"loading, batch {i}")
    x = torch.empty(len(features), width, device=device)
    for i, batch in enumerate(batches):
        x[i * batch_size : i * batch_size + len(batch)] = batch
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
