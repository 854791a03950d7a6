"""How a code is kept sparse: one small frozen dataclass a variant, holding that variant's own parameters.

A variant says which latents of a batch are active and with what value (`activate`) and what the loss adds for them
(`penalty`). All but ReLU start from an encoder equal to the decoder, as their papers do, and leave dead latents to their
own remedy; ReLU has DN-CBM's start and DN-CBM's resampling.
"""

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReLU:
    """Non-negative latents under an L1 penalty: the SAE of DN-CBM (Rao et al., ECCV 2024, arXiv 2407.14499).

    After Bricken et al., "Towards Monosemanticity" (2023): z = max(pre, 0), and the loss of an item adds
    `l1_coeff` times the sum of its latents.
    """

    l1_coeff: float = 3e-5

    def __post_init__(self) -> None:
        if not self.l1_coeff >= 0:
            raise ValueError(f"ReLU: l1_coeff must be at least 0, not {self.l1_coeff}")

    def activate(self, pre: Tensor, threshold: Tensor | None = None, training: bool = False) -> Tensor:
        """Latents (B x F) of pre-activations (B x F)."""
        return torch.relu(pre)

    def penalty(self, pre: Tensor, latents: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The sparsity term of each item's loss (B)."""
        return self.l1_coeff * latents.abs().sum(dim=1)


@dataclass(frozen=True)
class _LargestK:
    """What TopK and BatchTopK share: k, and the auxiliary loss that revives dead latents.

    AuxK (Gao et al. 2024, section 2.4): the `aux_k` largest pre-activations among the latents that were not active in
    the last `dead_after` training items reconstruct what the code left over, and `aux_coeff` times the mean squared error
    of that is added to the loss. `aux_k` None: half the number of inputs, as in the paper.
    """

    k: int
    aux_coeff: float = 1 / 32
    aux_k: int | None = None
    dead_after: int = 10_000_000

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"{name}: k must be a whole number of at least 1, not {self.k}")
        if not self.aux_coeff >= 0 or self.dead_after < 1 or (self.aux_k is not None and self.aux_k < 1):
            raise ValueError(
                f"{name}: aux_coeff must be at least 0, aux_k and dead_after at least 1, not {self.aux_coeff},"
                f" {self.aux_k} and {self.dead_after}"
            )

    def penalty(self, pre: Tensor, latents: Tensor, threshold: Tensor | None = None) -> Tensor:
        """Nothing is added for sparsity, which k sets (B zeros)."""
        return latents.new_zeros(len(latents))


@dataclass(frozen=True)
class TopK(_LargestK):
    """The k largest positive pre-activations of each item: Gao et al., "Scaling and evaluating sparse autoencoders"
    (2024, arXiv 2406.04093). Fewer are active where fewer are positive."""

    def activate(self, pre: Tensor, threshold: Tensor | None = None, training: bool = False) -> Tensor:
        """Latents (B x F) of pre-activations (B x F)."""
        values, indices = pre.topk(min(self.k, pre.shape[1]), dim=1, sorted=False)
        return torch.zeros_like(pre).scatter(1, indices, torch.relu(values))


@dataclass(frozen=True)
class BatchTopK(_LargestK):
    """The k B largest positive pre-activations of a batch of B: Bussmann et al., "BatchTopK sparse autoencoders" (2024,
    arXiv 2412.06410).

    Outside training, an item's latents are those above a threshold, so that they do not depend on the batch: the running
    mean of the smallest active value of the training batches.
    """

    threshold_decay: ClassVar[float] = 0.99

    def activate(self, pre: Tensor, threshold: Tensor | None = None, training: bool = False) -> Tensor:
        """Latents (B x F) of pre-activations (B x F)."""
        if not training:
            return torch.where(pre > (0 if threshold is None else threshold), pre, 0).clamp_min(0)
        values, indices = pre.flatten().topk(min(self.k * len(pre), pre.numel()), sorted=False)
        return torch.zeros_like(pre).flatten().scatter(0, indices, torch.relu(values)).view_as(pre)

    @torch.no_grad()
    def update_threshold(self, threshold: Tensor, smallest: Tensor) -> None:
        """Takes a batch's smallest active value (a scalar, infinite if none is) into the running mean, in place."""
        smallest = smallest.to(threshold.dtype)
        mean = torch.where(threshold > 0, torch.lerp(smallest, threshold, self.threshold_decay), smallest)
        threshold.copy_(torch.where(torch.isfinite(smallest), mean, threshold))


def _in_window(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype)


class _Jump(torch.autograd.Function):
    """pre * H(pre - threshold), and the pseudo-derivative -threshold/bandwidth in the window around the threshold."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre > threshold, pre, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        window = _in_window(pre, threshold, ctx.bandwidth)
        by_threshold = -(gradients[0] * window).sum(dim=0) * threshold / ctx.bandwidth
        return torch.where(pre > threshold, gradients[0], 0), by_threshold, None


class _Step(torch.autograd.Function):
    """H(pre - threshold), and the pseudo-derivative -1/bandwidth by the threshold in the window around it."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        return None, -(gradients[0] * _in_window(pre, threshold, ctx.bandwidth)).sum(dim=0) / ctx.bandwidth, None


@dataclass(frozen=True)
class JumpReLU:
    """Pre-activations above a threshold that each latent learns, under an L0 penalty: Rajamanoharan et al., "Jumping
    ahead" (2024, arXiv 2407.14435).

    z = pre where pre > threshold, else 0; the loss of an item adds `l0_coeff` times its active latents. The threshold
    learns through the paper's pseudo-derivatives, in a window of `bandwidth` around it; it is stored as its logarithm.
    The paper's inputs have a mean squared norm of 1 and its error is summed over the inputs, ours averaged: the
    coefficient here is the paper's divided by D.
    """

    l0_coeff: float = 1e-5
    bandwidth: float = 1e-3
    initial_threshold: float = 1e-3

    def __post_init__(self) -> None:
        if not self.l0_coeff >= 0 or not self.bandwidth > 0 or not self.initial_threshold > 0:
            raise ValueError(
                "JumpReLU: l0_coeff must be at least 0, bandwidth and initial_threshold above 0, not"
                f" {self.l0_coeff}, {self.bandwidth} and {self.initial_threshold}"
            )

    def activate(self, pre: Tensor, threshold: Tensor | None = None, training: bool = False) -> Tensor:
        """Latents (B x F) of pre-activations (B x F) and thresholds (F)."""
        return _Jump.apply(pre, threshold, self.bandwidth)

    def penalty(self, pre: Tensor, latents: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The sparsity term of each item's loss (B)."""
        return self.l0_coeff * _Step.apply(pre, threshold, self.bandwidth).sum(dim=1)


@dataclass(frozen=True)
class Matryoshka:
    """Nested dictionaries: Bussmann et al., "Learning multi-level features with Matryoshka SAEs" (2025, arXiv 2503.17547).

    The code is that of `code` (BatchTopK in the paper, or TopK). Each of the first `fractions` of the latents must
    reconstruct the input without the rest: the loss sums the squared error over these prefixes.
    """

    code: TopK | BatchTopK
    fractions: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)

    def __post_init__(self) -> None:
        if not isinstance(self.code, TopK | BatchTopK):
            raise ValueError(f"Matryoshka: code must be a TopK or a BatchTopK, not {self.code!r}")
        object.__setattr__(self, "fractions", tuple(self.fractions))
        rising = [0.0, *self.fractions]
        if rising[-1] != 1 or any(a >= b for a, b in pairwise(rising)):
            raise ValueError(f"Matryoshka: fractions must rise from above 0 to 1, not {self.fractions}")


Sparsity: TypeAlias = ReLU | TopK | BatchTopK | JumpReLU | Matryoshka
Code: TypeAlias = ReLU | TopK | BatchTopK | JumpReLU

_KINDS: dict[str, type[Sparsity]] = {
    "relu": ReLU,
    "topk": TopK,
    "batchtopk": BatchTopK,
    "jumprelu": JumpReLU,
    "matryoshka": Matryoshka,
}


def code_of(sparsity: Sparsity) -> Code:
    """The variant that makes the code: what Matryoshka is laid over, else the variant itself."""
    return sparsity.code if isinstance(sparsity, Matryoshka) else sparsity


def prefix_ends(sparsity: Sparsity, n_latents: int) -> tuple[int, ...]:
    """How many latents each prefix that must reconstruct alone has, rising; (n_latents,) but for Matryoshka."""
    if not isinstance(sparsity, Matryoshka):
        return (n_latents,)
    return tuple(sorted({max(1, round(fraction * n_latents)) for fraction in sparsity.fractions}))


def n_auxiliary(sparsity: Sparsity, n_inputs: int, n_dead: int) -> int:
    """How many dead latents of an item the auxiliary loss uses."""
    code = code_of(sparsity)
    if not isinstance(code, _LargestK) or code.aux_coeff == 0:
        return 0
    return min(code.aux_k if code.aux_k is not None else max(1, n_inputs // 2), n_dead)


def sparsity_to_json(sparsity: Sparsity) -> str:
    """A variant and its parameters, as checkpoints hold them."""
    return json.dumps(_to_dict(sparsity))


def _to_dict(sparsity: Sparsity) -> dict[str, Any]:
    (kind,) = [name for name, variant in _KINDS.items() if type(sparsity) is variant]
    parameters = asdict(sparsity)
    if isinstance(sparsity, Matryoshka):
        parameters["code"] = _to_dict(sparsity.code)
    return {"kind": kind, **parameters}


def sparsity_from_json(text: str) -> Sparsity:
    """The variant that `sparsity_to_json` wrote.

    Raises:
        ValueError: it is not one, or its parameters are wrong.
    """
    try:
        return _from_dict(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"unknown sparsity {text!r} ({error})") from error


def _from_dict(parameters: dict[str, Any]) -> Sparsity:
    kind = parameters.pop("kind")
    if kind == "matryoshka":
        parameters["code"] = _from_dict(parameters["code"])
    return _KINDS[kind](**parameters)
