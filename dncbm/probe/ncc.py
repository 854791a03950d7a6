"""Number of contributing concepts (NCC): how many concepts decide about an image, and what an accuracy costs in concepts.

NCC is a measure of M-CBM (De Santis, Tong, Brambilla and Kagal, ICLR 2026; arXiv 2603.07343) that extends NEC from weights to
decisions. It is read here as in METHOD section 4. CEA is that of PS-CBM (AAAI 2026; arXiv 2511.22170).
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from dncbm.probe.model import Batch, ProbeData, linear, true_class_ranks
from dncbm.probe.model import contributions as contributions_of
from dncbm.probe.rows import SparseRows
from dncbm.runs.devices import widest_float

TAU = 0.95
"""Share of the absolute contributions that the counted concepts reach."""
BETA = 0.23
"""CEA's exponent. PS-CBM's text was not at hand: this is inferred from its means over 11 data sets of 100, 10, 100, 200, 47,
102, 101, 7, 1000, 45 and 101 classes: accuracy 77.3 with 8192 concepts and 78.3 with 545, and CEA 53.4 and 59.0. They give
0.230 and 0.227."""


@dataclass(frozen=True, eq=False)
class Decisions:
    """What a probe decides about the images of a split."""

    correct: torch.Tensor
    """bool, one per image, on the CPU."""
    ce: float
    """Mean cross-entropy."""
    ncc: float
    """Mean over images of `contributing`."""
    effective: float
    """Mean over images of `participation`."""

    @property
    def top1(self) -> float:
        """The share of images that are classified correctly."""
        return float(self.correct.double().mean())


@torch.inference_mode()
def decisions(weight: torch.Tensor, data: ProbeData, batch_size: int = 4096) -> Decisions:
    """The decisions of a probe (inputs x C), with a batch in memory; the host waits for the device once."""
    correct, sums = list[torch.Tensor](), list[torch.Tensor]()
    for batch, labels in data.batches(batch_size, weight.device):
        logits = linear(batch, weight)
        sizes = absolute_contributions(batch, weight, logits.argmax(dim=1))
        correct.append(true_class_ranks(logits, labels) == 0)
        ce = functional.cross_entropy(logits, labels, reduction="sum")
        sums.append(torch.stack([part.to(widest_float(weight.device)) for part in (
            ce, contributing(sizes).sum(), participation(sizes).sum(),
        )]))  # fmt: skip
    ce_mean, ncc, effective = (torch.stack(sums).cpu().double().sum(dim=0) / len(data)).tolist()
    return Decisions(torch.cat(correct).cpu(), ce_mean, ncc, effective)


def absolute_contributions(batch: Batch, weight: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """|z_f W[f, c]| of every input f to the class c of each row, in any order: rows x inputs, or for sparse rows only those of
    active inputs, padded with zeros."""
    sizes = contributions_of(batch, weight, classes).abs()
    if not isinstance(batch, SparseRows):
        return sizes
    entry = torch.arange(len(sizes), dtype=batch.offsets.dtype, device=sizes.device)
    row = torch.searchsorted(batch.offsets, entry, right=True) - 1
    slot = entry - batch.offsets[row]
    padded = sizes.new_zeros(len(batch.offsets), int(slot.max()) + 1 if len(slot) else 0)
    padded[row, slot.long()] = sizes
    return padded


def contributing(sizes: torch.Tensor) -> torch.Tensor:
    """Per row of absolute contributions, the smallest number of them whose sum reaches TAU of all; int64, 0 if all are 0."""
    reached = sizes.sort(dim=1, descending=True).values.to(widest_float(sizes.device)).cumsum(dim=1)
    wanted = TAU * reached[:, -1:] if reached.shape[1] else reached.new_zeros(len(reached), 1)
    return (reached < wanted).sum(dim=1) + (wanted[:, 0] > 0)


def participation(sizes: torch.Tensor) -> torch.Tensor:
    """Per row of absolute contributions c, the participation ratio (sum c)^2 / sum c^2: k if k of them are equal and the
    others 0; 0 if all are 0."""
    wide = sizes.to(widest_float(sizes.device))
    wide = wide / wide.amax(dim=1, keepdim=True).clamp(min=1e-30) if wide.shape[1] else wide
    squares = wide.square().sum(dim=1)
    return torch.where(squares > 0, wide.sum(dim=1).square() / squares.clamp(min=1e-30), squares)


def concept_efficient_accuracy(accuracy: float, n_concepts: int, n_classes: int) -> float | None:
    """CEA = accuracy / (log_k m)^BETA, with m concepts and k = ceil(log2 of the classes), the fewest that tell them apart.

    None where the logarithm has no base (two classes) or is not positive (fewer than two concepts).
    """
    k = math.ceil(math.log2(n_classes)) if n_classes > 1 else 0
    return accuracy / math.log(n_concepts, k) ** BETA if k > 1 and n_concepts > 1 else None
