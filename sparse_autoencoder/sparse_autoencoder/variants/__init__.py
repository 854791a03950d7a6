"""The sparsity variants. To add one, write its file and list its class in VARIANTS."""

import json
from dataclasses import fields
from typing import Any

from sparse_autoencoder.variants.base import Sparsity
from sparse_autoencoder.variants.batchtopk import BatchTopK
from sparse_autoencoder.variants.jumprelu import JumpReLU
from sparse_autoencoder.variants.matryoshka import Matryoshka
from sparse_autoencoder.variants.relu import ReLU
from sparse_autoencoder.variants.topk import TopK

VARIANTS: dict[str, type[Sparsity]] = {variant.kind: variant for variant in (ReLU, TopK, BatchTopK, JumpReLU, Matryoshka)}

__all__ = ["VARIANTS", "BatchTopK", "JumpReLU", "Matryoshka", "ReLU", "Sparsity", "TopK"]


def sparsity_to_json(sparsity: Sparsity) -> str:
    """A variant and its parameters, as checkpoints store them."""
    return json.dumps(_to_dict(sparsity))


def _to_dict(sparsity: Sparsity) -> dict[str, Any]:
    parameters = {one.name: getattr(sparsity, one.name) for one in fields(sparsity)}
    nested = {name: _to_dict(value) for name, value in parameters.items() if isinstance(value, Sparsity)}
    return {"kind": sparsity.kind, **parameters, **nested}


def sparsity_from_json(text: str) -> Sparsity:
    """The variant that `sparsity_to_json` wrote.
    Raises ValueError if the text names no variant of VARIANTS, or its parameters are wrong."""
    try:
        return _from_dict(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"unknown sparsity {text[:200]!r} ({str(error)[:200]})") from error


def _from_dict(parameters: dict[str, Any]) -> Sparsity:
    nested = {name: _from_dict(value) for name, value in parameters.items() if isinstance(value, dict)}
    return VARIANTS[parameters["kind"]](**{**{k: v for k, v in parameters.items() if k != "kind"}, **nested})
