"""Batches of features, in an order that a seed fixes."""

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from sparse_autoencoder.errors import NonFiniteError


@runtime_checkable
class Features(Protocol):
    """N items of D numbers. A `describe(index) -> str` that names the shard an item lies in is used where there is
    one."""

    def __len__(self) -> int:
        """N."""
        ...

    def gather(self, indices: np.ndarray) -> Tensor:
        """The items (n x D, float32, on the CPU) of int64 indices (n), in that order."""
        ...


class TensorFeatures:
    """A tensor (N x D) as Features."""

    def __init__(self, x: Tensor) -> None:
        if x.ndim != 2:
            raise ValueError(f"features must be N x D, not {' x '.join(map(str, x.shape)) or 'a number'}")
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def gather(self, indices: np.ndarray) -> Tensor:
        return self.x[torch.from_numpy(indices).to(self.x.device)].float()


def as_features(data: Features | Tensor) -> Features:
    """`data` itself, or a tensor wrapped.

    Raises:
        ValueError: there are no items, or a tensor is not N x D.
    """
    features = TensorFeatures(data) if isinstance(data, Tensor) else data
    if len(features) == 0:
        raise ValueError("there are no features: the data has 0 items")
    return features


def check_finite(x: Tensor, features: Features, indices: np.ndarray, when: str) -> None:
    """Raises NonFiniteError, naming `when` and the first bad item's shard, if x (n x D) holds NaN or infinity."""
    if torch.isfinite(x.sum()):  # one number can only be finite if all are; the reverse is settled below
        return
    bad = (~torch.isfinite(x)).any(dim=1).nonzero()
    if len(bad) == 0:
        return
    index = int(indices[int(bad[0])])
    describe = getattr(features, "describe", None)
    where = f", in {describe(index)}" if describe is not None else ""
    raise NonFiniteError(f"{when}: features hold NaN or infinity (item {index}{where})")


def epoch_order(n_items: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, a permutation of the n_items indices (int64): a function of seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(n_items)


def in_batches(
    features: Features, order: np.ndarray, batch_size: int, *, first: int = 0, name: Callable[[int], str] | None = None
) -> Iterator[Tensor]:
    """The items of `order` in batches (n x D, float32, CPU), from batch `first` on; the last batch may be short.

    `name` says what an error calls a batch; "batch 3" without it.

    Raises:
        NonFiniteError: a batch holds NaN or infinity.
    """
    for batch in range(first, -(-len(order) // batch_size)):
        indices = order[batch * batch_size : (batch + 1) * batch_size]
        x = features.gather(indices)
        check_finite(x, features, indices, name(batch) if name is not None else f"batch {batch}")
        yield x


def geometric_median(x: Tensor, *, tolerance: float = 1e-6, max_iterations: int = 200) -> Tensor:
    """The point (D) with the least summed distance to the rows of x (N x D), by Weiszfeld's iteration, in float64.

    Stops once a step moves the point by less than `tolerance` times the mean distance.
    """
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
