"""What `--matmul_precision` costs in accuracy, emulated on the CPU.

    python benchmarks/matmul_precision.py [--config examples/openmoji/config.py] [--seeds 49 50 51]

Trains the SAE of a config's `defaults` by dense steps, several times with the same seed and order, and prints a table in
Markdown. Every matrix product, forward and backward, first rounds its operands and then runs in float32: "high" keeps TF32's
10 bits of mantissa, "medium" bfloat16's 7. In "medium, results too" the results are rounded to
bfloat16 as well, as autocast does. "highest, sparse steps" computes what "highest" does in another order: what only this
changes is due to the last bit of float32, amplified by training.

All models are measured in float32 on the SAE's own validation images. "Names that differ" is the share of latents that stage 4
names otherwise than in the run with "highest" and the same seed. "Words that differ" compares the sets of names, whatever the
latents' order: the share of the words of both that only one has. The last row is between the seeds of "highest".
"""

import argparse
import logging
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dncbm.concepts.naming import nearest_words
from dncbm.concepts.vocabulary import Vocabulary, load_vocabulary
from dncbm.features.stage import open_features
from dncbm.flags import config_defaults
from dncbm.runs.declarations import SAERun
from dncbm.runs.settings import load_settings
from sparse_autoencoder import SparseAutoencoder, evaluate, stepper, train
from sparse_autoencoder.declare import build

CONFIG = Path(__file__).parent.parent / "examples" / "openmoji" / "config.py"
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
TF32, BF16 = 10, 7


def rounded(x: Tensor, bits: int) -> Tensor:
    """float32 numbers with this many bits of mantissa, to the nearest, halves to even."""
    below = 23 - bits
    word = x.view(torch.int32)
    odd = (word >> below) & 1
    return ((word + ((1 << (below - 1)) - 1) + odd) >> below << below).view(torch.float32)


class Rounding(TorchDispatchMode):
    """Rounds what matrix products read and, if asked to, what they give."""

    def __init__(self, bits: int, results: bool = False) -> None:
        super().__init__()
        self.bits, self.results = bits, results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in PRODUCTS:
            return func(*args, **(kwargs or {}))
        operands = (rounded(operand.contiguous(), self.bits) for operand in args[-2:])
        result = func(*args[:-2], *operands, **(kwargs or {}))
        return rounded(result, self.bits) if self.results else result


class Trained(NamedTuple):
    """A model's metrics and the names of its latents."""

    metrics: dict[str, float]
    names: list[str]


HIGHEST, SPARSE = "highest", "highest, sparse steps"
WAYS: dict[str, Callable[[], Any]] = {
    HIGHEST: nullcontext,
    SPARSE: nullcontext,
    "high": lambda: Rounding(TF32),
    "medium": lambda: Rounding(BF16),
    "medium, results too": lambda: Rounding(BF16, results=True),
}
COLUMNS = {"loss": ".3e", "explained_variance": ".4f", "l0": ".2f", "dead_fraction": ".1%"}
SPARSE_BELOW = stepper.SPARSE_BELOW


def trained(features: Tensor, run: SAERun, vocabulary: Vocabulary, validation: Tensor, way: str) -> Trained:
    n_latents = features.shape[1] * run.expansion_factor
    model = SparseAutoencoder(
        features.shape[1], n_latents, sparsity=run.sparsity, input_transform=run.input_transform, seed=run.training.seed
    )
    stepper.SPARSE_BELOW = SPARSE_BELOW if way == SPARSE else -1.0
    with WAYS[way]():
        train(model, features, run.training, progress=False)
    names = [concept.name for concept in nearest_words(model.dictionary, vocabulary)]
    return Trained(evaluate(model, validation), names)


def differing_names(a: Trained, b: Trained) -> float:
    return statistics.mean(x != y for x, y in zip(a.names, b.names, strict=True))


def differing_words(a: Trained, b: Trained) -> float:
    return len(set(a.names) ^ set(b.names)) / len(set(a.names) | set(b.names))


def spread(values: list[float], form: str) -> str:
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--seeds", type=int, nargs="+", default=[49, 50, 51])
    parser.add_argument("--epochs", type=int, help="instead of the config's")
    options = parser.parse_args()
    logging.getLogger("sparse_autoencoder").setLevel(logging.ERROR)  # no advice on settings
    settings = load_settings(options.config)
    flags = config_defaults(settings) | ({"num_epochs": options.epochs} if options.epochs else {})
    runs = [build(SAERun, flags | {"seed": seed}) for seed in options.seeds]
    train_set, held_out = (
        torch.cat([*open_features(settings, runs[0].dataset, runs[0].encoder, runs[0].hook, split).batches(4096)])
        for split in ("train", "train_val")
    )
    vocabulary = load_vocabulary(settings, runs[0].encoder)
    found: dict[str, list[Trained]] = {}
    print(f"| products | {' | '.join(COLUMNS)} | names that differ | words that differ |\n|{'---|' * (len(COLUMNS) + 3)}")
    for way in WAYS:
        found[way] = [trained(train_set, run, vocabulary, held_out, way) for run in runs]
        pairs = list(zip(found[way], found[HIGHEST], strict=True))
        cells = [spread([one.metrics[column] for one in found[way]], form) for column, form in COLUMNS.items()]
        cells += [spread([differ(*pair) for pair in pairs], ".1%") for differ in (differing_names, differing_words)]
        print(f"| {way} | {' | '.join(cells)} |", flush=True)
    between = [differing_words(*pair) for pair in combinations(found[HIGHEST], 2)]
    if between:
        print(f"| between seeds | {'| ' * (len(COLUMNS) + 1)}| {spread(between, '.1%')} |")


if __name__ == "__main__":
    main()
