"""The time of a sparse-autoencoder training step, in units of the encoder's matrix product alone by torch.mm.

    python benchmarks/sae_step.py [--quick]

Prints one JSON object. It holds medians of interleaved repetitions in one process, for D = 1024, F = 8192, B = 4096 and about
32 active latents per item (set by the bias): `encode_gemm_s`, the product x W_e^T alone by torch.mm; `step_product_s`, the
same product as the step computes it; `relu_step_s` and `topk_step_s`, this package's whole step (forward, backward, Adam, unit
norm); `dense_step_s`, the same step by plain autograd with torch's Adam. `over_gemm` and `over_product` mark ratios to the two
products.
`d512` holds the same for D = 512. `density` holds, by the fraction of active latents, the sparse and the dense step in units
of torch.mm, and which of them training uses. `--quick` measures only the first set.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_autoencoder import ReLU, SparseAutoencoder, Sparsity, TopK
from sparse_autoencoder.optimizer import Adam
from sparse_autoencoder.sparse_step import PRE_ACTIVATIONS, SparseStep, encoder_product
from sparse_autoencoder.stepper import SPARSE_BELOW
from sparse_autoencoder.steps import dense_step

B, F, ACTIVE = 4096, 8192, 32


def calibrated(n_inputs: int, active: float, sparsity: Sparsity, x: Tensor) -> SparseAutoencoder:
    """A random model in which about `active` latents per item have a positive pre-activation."""
    generator = torch.Generator().manual_seed(1)
    model = SparseAutoencoder(n_inputs, F, sparsity=sparsity)
    with torch.no_grad():
        model.encoder_weight.normal_(generator=generator).div_(math.sqrt(n_inputs))
        model.encoder_bias.zero_()
        sample = (x[:512] @ model.encoder_weight.t()).flatten()
        model.encoder_bias.fill_(-float(sample.kthvalue(int(sample.numel() * (1 - active / F))).values))
    return model


def plain_step(model: SparseAutoencoder) -> Callable[[Tensor], None]:
    """The step as one would write it: autograd on the formula, torch's Adam with its defaults."""
    b, we, be, wd = model.tied_bias, model.encoder_weight, model.encoder_bias, model.decoder_weight
    adam = torch.optim.Adam([b, we, be, wd], lr=1e-6)

    def step(x: Tensor) -> None:
        z = torch.relu((x - b) @ we.t() + be)
        loss = (z @ wd + b - x).square().mean() + 3e-5 * z.sum(dim=1).mean()
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            assert wd.grad is not None
            wd.grad -= (wd.grad * wd).sum(dim=1, keepdim=True) * wd
            adam.step()
            wd.div_(wd.norm(dim=1, keepdim=True))

    return step


def interleaved(ways: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """The times of each way, called in turn, without the first round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if repetition:
                times[name].append(time.perf_counter() - start)
    return times


@torch.no_grad()
def clear_items(model: SparseAutoencoder, x: Tensor) -> Tensor:
    """The items of x without a latent of which rounding decides whether it is active."""
    pre = model.pre_activations(x)
    edge = torch.zeros(len(x), 1)
    if isinstance(model.sparsity, TopK):
        edge = pre.topk(model.sparsity.k + 1).values[:, -2:].mean(dim=1, keepdim=True)
    return x[(pre - edge).abs().amin(dim=1) > 1e-5]


def gradient_error(n_inputs: int, x: Tensor) -> float:
    """The largest relative error of a gradient of the sparse step against autograd.

    From zero, Adam's first moment after a step is a tenth of the gradient.
    """
    worst = 0.0
    for sparsity in (ReLU(), TopK(ACTIVE)):
        adams = []
        for sparse in (True, False):
            model = calibrated(n_inputs, ACTIVE if isinstance(sparsity, ReLU) else F / 2, sparsity, x)
            adam = Adam(model, lr=5e-4)
            items = clear_items(model, x)
            if sparse:
                step = SparseStep(model, adam)
                step(items)
                step.close()
            else:
                dense_step(model, adam, items)
            adams.append(adam)
        for name, moment in adams[0].moments.items():
            if name.endswith(".mean"):
                other = adams[1].moments[name]
                worst = max(worst, float((moment - other).abs().max() / other.abs().max()))
    return worst


def measure(n_inputs: int, repetitions: int) -> dict[str, float]:
    x = torch.randn(B, n_inputs, generator=torch.Generator().manual_seed(0))
    error = gradient_error(n_inputs, x[:1024])
    relu = calibrated(n_inputs, ACTIVE, ReLU(), x)
    topk = calibrated(n_inputs, F / 2, TopK(ACTIVE), x)
    plain = plain_step(calibrated(n_inputs, ACTIVE, ReLU(), x))
    relu_step, topk_step = (SparseStep(model, Adam(model, lr=1e-6)) for model in (relu, topk))
    weight, out = relu.encoder_weight.detach(), torch.empty(B, F)

    def step_product() -> None:
        for part in x.split(PRE_ACTIVATIONS // F):
            encoder_product(part, weight)

    ways: dict[str, Callable[[], object]] = {
        "encode_gemm": lambda: torch.mm(x, weight.t(), out=out),
        "step_product": step_product,
        "relu_step": lambda: relu_step(x),
        "topk_step": lambda: topk_step(x),
        "dense_step": lambda: plain(x),
    }
    times = interleaved(ways, repetitions)
    for step in (relu_step, topk_step):
        step.close()
    # Ratios are taken within a round, since another program slows a whole round about equally.
    ratio = {(a, b): statistics.median(s / t for s, t in zip(times[a], times[b], strict=True)) for a in times for b in times}
    return {
        **{f"{name}_s": statistics.median(values) for name, values in times.items()},
        "relu_step_over_gemm": ratio["relu_step", "encode_gemm"],
        "topk_step_over_gemm": ratio["topk_step", "encode_gemm"],
        "relu_step_over_product": ratio["relu_step", "step_product"],
        "topk_step_over_product": ratio["topk_step", "step_product"],
        "speedup_over_dense": ratio["dense_step", "relu_step"],
        "max_relative_gradient_error": error,
    }


def measure_density(n_inputs: int, density: float, repetitions: int) -> dict[str, float | str]:
    x = torch.randn(B, n_inputs, generator=torch.Generator().manual_seed(0))
    model = calibrated(n_inputs, density * F, ReLU(), x)
    adam = Adam(model, lr=1e-9)
    step = SparseStep(model, adam)
    weight, out = model.encoder_weight.detach(), torch.empty(B, F)
    times = interleaved(
        {
            "gemm": lambda: torch.mm(x, weight.t(), out=out),
            "sparse": lambda: step(x),
            "dense": lambda: dense_step(model, adam, x),
        },
        repetitions,
    )
    step.close()
    over = {
        name: statistics.median(s / t for s, t in zip(times[name], times["gemm"], strict=True)) for name in ("sparse", "dense")
    }
    taken = "sparse" if density <= SPARSE_BELOW else "dense"
    return {
        "sparse_step_over_gemm": over["sparse"],
        "dense_step_over_gemm": over["dense"],
        "taken": taken,
        "relu_step_over_gemm": over[taken],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="measure only the first set")
    quick = parser.parse_args().quick
    result: dict[str, object] = {"threads": torch.get_num_threads(), **measure(1024, 3 if quick else 9)}
    if not quick:
        result["d512"] = measure(512, 9)
        result["switches_at_density"] = SPARSE_BELOW
        result["density"] = {
            str(density): measure_density(1024, density, 3) for density in (0.001, 0.004, 0.01, 0.05, 0.2, 0.5)
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
