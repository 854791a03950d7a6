"""How a code is kept sparse: one small frozen dataclass a variant, holding that variant's own parameters.

A variant knows three things: which latents of a batch are active and with what value (`activate`), what the loss adds
for them (`penalty`), and whether the dead are resampled (DN-CBM) or left to the variant's own remedy.
"""

import json
from dataclasses import asdict, dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReLU:
    """Non-negative latents under an L1 penalty: the SAE of DN-CBM (Rao et al., ECCV 2024, arXiv 2407.14499).

    After Bricken et al., "Towards Monosemanticity" (2023): z = max(pre, 0), and the loss of an item adds
    `l1_coeff` times the sum of its latents.
    """

    l1_coeff: float = 3e-5
    resamples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.l1_coeff >= 0:
            raise ValueError(f"ReLU: l1_coeff must be at least 0, not {self.l1_coeff}")

    def activate(self, pre: Tensor) -> Tensor:
        """Latents (B x F) of pre-activations (B x F)."""
        return torch.relu(pre)

    def penalty(self, latents: Tensor) -> Tensor:
        """The sparsity term of each item's loss (B), from latents (B x F)."""
        return self.l1_coeff * latents.abs().sum(dim=1)


Sparsity: TypeAlias = ReLU

_KINDS: dict[str, type[Sparsity]] = {"relu": ReLU}


def sparsity_to_json(sparsity: Sparsity) -> str:
    """A variant and its parameters, as checkpoints hold them."""
    (kind,) = [name for name, variant in _KINDS.items() if type(sparsity) is variant]
    return json.dumps({"kind": kind, **asdict(sparsity)})


def sparsity_from_json(text: str) -> Sparsity:
    """The variant that `sparsity_to_json` wrote.

    Raises:
        ValueError: it is not one, or its parameters are wrong.
    """
    try:
        parameters = json.loads(text)
        return _KINDS[parameters.pop("kind")](**parameters)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"unknown sparsity {text!r} ({error})") from error
