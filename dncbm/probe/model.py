"""The linear probe: its inputs in batches, its logits, its loss, and its metrics.

A batch of inputs is a `SparseRows` (concept strengths) or a dense tensor (features); `linear` multiplies either by the
weights. Weights are input-major (inputs x C), the layout that a sparse product reads.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch.nn import functional

from dncbm.features.store import FeatureStore
from dncbm.probe.rows import ResidentRows, SparseRows, sent_rows
from dncbm.runs.devices import widest_float
from dncbm.runs.results import COVERAGES, ZERO_TOLERANCES
from sparse_autoencoder.data import Features, fits, in_batches, resident

LOADED = 8192
"""Rows of features that are moved to a GPU at once."""
Inputs: TypeAlias = scipy.sparse.csr_matrix | FeatureStore
Batch: TypeAlias = SparseRows | torch.Tensor


@dataclass(frozen=True)
class ProbeData:
    """Inputs and labels of one split."""

    inputs: Inputs
    labels: torch.Tensor
    """int64, one per row."""
    groups: torch.Tensor | None = None
    """int64, the group of each row (Waterbirds: bird and background), if the data set has groups."""

    _on_gpu: "dict[torch.device, _OnGPU | None]" = field(default_factory=dict, init=False, repr=False, compare=False)

    def batch(self, rows: NDArray[np.int64], device: torch.device) -> tuple[Batch, torch.Tensor]:
        """The inputs and labels of some rows."""
        if isinstance(self.inputs, FeatureStore):
            return self.inputs.gather(rows).to(device), self.labels[torch.from_numpy(rows)].to(device)
        return sent_rows(self.inputs, rows, self.labels, device)

    def batches(
        self, batch_size: int, device: torch.device, order: NDArray[np.int64] | None = None
    ) -> Iterator[tuple[Batch, torch.Tensor]]:
        """The inputs and labels of all rows, in batches, in the given order or as they are.

        On CUDA, they are in the GPU's memory from the first call on if they take at most half of what is free there; otherwise
        batches are copied from pinned memory. Either way the host does not wait for the GPU.

        Raises IndexError if a CSR matrix is malformed; NonFiniteError, on a GPU, if features hold NaN or infinity.
        """
        on_gpu, rows = self._kept_on(device), np.arange(len(self)) if order is None else order
        if on_gpu is None:
            yield from (self.batch(rows[start : start + batch_size], device) for start in range(0, len(rows), batch_size))
            return
        found: Iterator[Batch]
        if isinstance(on_gpu.inputs, ResidentRows):
            found = on_gpu.inputs.batches(batch_size, order)
        else:
            found = in_batches(on_gpu.inputs, rows, batch_size, device=device)
        labels = on_gpu.labels if order is None else on_gpu.labels[torch.from_numpy(order).to(device)]
        yield from zip(found, labels.split(batch_size), strict=False)  # labels of no rows are one part, too

    def _kept_on(self, device: torch.device) -> "_OnGPU | None":
        device = torch.empty(0, device=device).device  # `cuda` is the same as `cuda:0`
        if device not in self._on_gpu:
            with torch.inference_mode(False):  # else training could not use what an evaluation has loaded
                self._on_gpu[device] = _loaded(self.inputs, self.labels, device)
        return self._on_gpu[device]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def width(self) -> int:
        """Number of inputs: F concepts or D features."""
        return self.inputs.width if isinstance(self.inputs, FeatureStore) else int(self.inputs.shape[1])


@dataclass(frozen=True)
class _OnGPU:
    """Inputs and labels of a split as a GPU reads them."""

    inputs: ResidentRows | Features
    """Features that do not fit into the GPU's memory are read from the disk."""
    labels: torch.Tensor


def _loaded(inputs: Inputs, labels: torch.Tensor, device: torch.device) -> _OnGPU | None:
    """None if batches are gathered on the CPU and sent."""
    found: ResidentRows | Features
    if isinstance(inputs, FeatureStore):
        found = resident(inputs, device, LOADED)
        if found is inputs and device.type == "cpu":
            return None
    elif fits(ResidentRows.n_bytes(inputs) + 8 * len(labels), device):
        found = ResidentRows(inputs, device)
    else:
        return None
    return _OnGPU(found, labels.to(device))


# ------------------------------------------------------------------------------------------------------------- formulas


def linear(batch: Batch, weight: torch.Tensor) -> torch.Tensor:
    """Logits (rows x C) of a batch, for weights of inputs x C."""
    if isinstance(batch, torch.Tensor):
        return batch @ weight
    return functional.embedding_bag(batch.indices, weight, batch.offsets, mode="sum", per_sample_weights=batch.values)


def probe_loss(logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, sparsity_lambda: float) -> torch.Tensor:
    """Cross-entropy + lambda * mean |W| over all inputs x C weights (METHOD section 4)."""
    return functional.cross_entropy(logits, labels) + sparsity_lambda * weight.abs().mean()


def zero_counts(weight: torch.Tensor) -> dict[str, int]:
    """Number of weights with |w| <= tolerance, for each tolerance."""
    return {f"zeros_{tolerance:g}": int((weight.abs() <= tolerance).sum()) for tolerance in ZERO_TOLERANCES}


def coverage_counts(batch: Batch, weight: torch.Tensor, *, absolute: bool) -> torch.Tensor:
    """Number of concepts, taken greedily by contribution, that reach each share of the predicted logit (METHOD section 4).

    The share is of the sum of the positive `contributions` to the predicted class, or with `absolute` of the sum of their
    absolute values. (The authors' code reports a zero-based index, one less than this count.)

    Returns:
        rows x len(COVERAGES), int64; 0 for a row without contributions.
    """
    predicted = linear(batch, weight).argmax(dim=1)
    found = _rows(batch, contributions(batch, weight, predicted))
    found = found.abs() if absolute else found.clamp(min=0)
    reached = found.sort(dim=1, descending=True).values.to(widest_float(found.device)).cumsum(dim=1)
    shares = torch.tensor(COVERAGES, dtype=reached.dtype, device=reached.device)
    wanted = reached[:, -1:] * shares if reached.shape[1] else reached.new_zeros(len(reached), len(shares))
    return (reached[:, :, None] < wanted[:, None]).sum(dim=1) + (wanted > 0)


def contributions(batch: Batch, weight: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Contribution of concept f to class c, z_f * W[f, c], for one class per row, int64 (METHOD section 5).

    Returns one per entry of a sparse batch; rows x inputs for a dense one.
    """
    if isinstance(batch, torch.Tensor):
        return batch * weight.T[classes]
    return batch.values * weight[batch.indices.long(), classes[_row_of_entries(batch)]]


def _row_of_entries(batch: SparseRows) -> torch.Tensor:
    entry = torch.arange(len(batch.indices), dtype=batch.offsets.dtype, device=batch.offsets.device)
    return torch.searchsorted(batch.offsets, entry, right=True) - 1


def _rows(batch: Batch, entries: torch.Tensor) -> torch.Tensor:
    """One number per entry, as rows padded with zeros to the length of the longest."""
    if isinstance(batch, torch.Tensor):
        return entries
    row = _row_of_entries(batch)
    slot = torch.arange(len(row), device=row.device) - batch.offsets[row]
    padded = entries.new_zeros(len(batch.offsets), int(slot.max()) + 1 if len(slot) else 0)
    padded[row, slot] = entries
    return padded


def true_class_ranks(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many classes come before the true one of each row, int64: 0 if the prediction is correct.

    Of equal logits the class with the lower number comes first, as for `argmax`. A logit that is NaN comes before all others,
    and makes a true class the last.
    """
    own = logits.gather(1, labels[:, None])
    first = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return (~(logits <= own) | ((logits == own) & first)).sum(dim=1)


@torch.inference_mode()
def evaluate_probe(
    weight: torch.Tensor, data: ProbeData, sparsity_lambda: float, *, coverage: bool = False, batch_size: int = 4096
) -> dict[str, float]:
    """Loss, cross-entropy, top-1 and top-5 accuracy (fractions) of a probe; with `coverage`, its mean image-wise coverage.

    With five classes or fewer, top-5 is 1: the true class is always among the first five.
    """
    sums, covered = [], torch.zeros(2, len(COVERAGES), dtype=torch.int64, device=weight.device)
    for batch, labels in data.batches(batch_size, weight.device):
        logits = linear(batch, weight)
        ranks = true_class_ranks(logits, labels)
        ce = functional.cross_entropy(logits, labels, reduction="sum")
        sums.append(torch.stack([ce, (ranks < 1).sum(), (ranks < 5).sum()]))  # on the device, which is not waited for
        if coverage:
            for i, absolute in enumerate((False, True)):
                covered[i] += coverage_counts(batch, weight, absolute=absolute).sum(dim=0)
    n = len(data)
    ce_mean, top1, top5 = (torch.stack(sums).cpu().double().sum(dim=0) / n).tolist()
    metrics = {"loss": ce_mean + sparsity_lambda * float(weight.abs().mean()), "ce": ce_mean, "top1": top1, "top5": top5}
    if coverage:
        for kind, counts in zip(("positive", "absolute"), covered.tolist(), strict=True):
            metrics |= {f"coverage_{kind}_{share:.0%}": count / n for share, count in zip(COVERAGES, counts, strict=True)}
    return metrics


@torch.inference_mode()
def accuracy_of_groups(
    weight: torch.Tensor, data: ProbeData, groups: torch.Tensor, n_groups: int, batch_size: int = 4096
) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of images in each group, and of those that a probe classifies correctly; two int64 tensors.

    `groups` has the int64 group of every image; if it is the labels, a group is a class.
    """
    batches = data.batches(batch_size, weight.device)
    right = torch.cat([true_class_ranks(linear(batch, weight), labels) == 0 for batch, labels in batches]).cpu()
    return groups.bincount(minlength=n_groups), groups[right].bincount(minlength=n_groups)
