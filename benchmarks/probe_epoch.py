"""An epoch of the probe's training on concept strengths, against nn.Linear on the same strengths as dense tensors.

    python benchmarks/probe_epoch.py [--quick]

Prints one JSON object, for F = 8192 concepts, C = 365 classes, 32 active concepts per image and batches of 512. `dense_step_s`
is the time of a step with nn.Linear, autograd on cross-entropy + lambda * mean |W| and torch's Adam, on batches that are dense
in memory; `fused_dense_step_s` is the same with Adam(fused=True); `sparse_step_s` is a step of this library from the CSR
matrix. The ways take turns of several steps, so that each finds its caches as it does within an epoch. For the ratios named
`alternating`, they take turns of one step, so that each finds what the others left. Ratios are medians over the rounds.
`max_weight_difference` is measured after all steps, relative to the largest weight.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray

from dncbm.probe.fit import initial_weight
from dncbm.probe.model import probe_loss
from dncbm.probe.step import SparseAdamStep

F, C, ACTIVE, BATCH, LR, LAMBDA = 8192, 365, 32, 512, 1e-3, 0.1
IN_TURN = 5
"""Steps per turn."""


def strengths(n_rows: int) -> scipy.sparse.csr_matrix:
    """Random concept strengths with ACTIVE entries per row."""
    rng = np.random.default_rng(0)
    indices = np.concatenate([np.sort(rng.choice(F, ACTIVE, replace=False)) for _ in range(n_rows)]).astype(np.int32)
    indptr = np.arange(n_rows + 1, dtype=np.int32) * ACTIVE
    values = rng.exponential(size=n_rows * ACTIVE).astype(np.float32)
    return scipy.sparse.csr_matrix((values, indices, indptr), shape=(n_rows, F))


def dense_way(fused: bool) -> tuple[torch.nn.Linear, Callable[[torch.Tensor, torch.Tensor], None]]:
    """A layer, and a training step as one would usually write it."""
    layer = torch.nn.Linear(F, C, bias=False)
    with torch.no_grad():
        layer.weight.copy_(initial_weight(F, C, 0).T)
    adam = torch.optim.Adam(layer.parameters(), lr=LR, fused=fused)

    def step(x: torch.Tensor, labels: torch.Tensor) -> None:
        adam.zero_grad()
        probe_loss(layer(x), labels, layer.weight, LAMBDA).backward()
        adam.step()

    return layer, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 20")
    n_rounds = 5 if parser.parse_args().quick else 20
    matrix = strengths(BATCH * IN_TURN * (n_rounds + 1))
    labels = torch.from_numpy(np.random.default_rng(1).integers(0, C, matrix.shape[0]))
    order = np.random.default_rng(2).permutation(matrix.shape[0])
    weight = initial_weight(F, C, 0).requires_grad_()
    sparse_step = SparseAdamStep(weight, torch.optim.Adam([weight], lr=LR), LAMBDA)
    layer, dense_step = dense_way(fused=False)
    _, fused_dense_step = dense_way(fused=True)

    def times(in_turn: int, rows: NDArray[np.int64]) -> dict[str, list[float]]:
        """Seconds per step of each way, of each round, with this many steps per turn; the first round only warms up."""
        found: dict[str, list[float]] = {"dense_step": [], "fused_dense_step": [], "sparse_step": []}
        for of_round in rows.reshape(-1, in_turn, BATCH):
            batches = [(of, torch.from_numpy(matrix[of].toarray()), labels[torch.from_numpy(of)]) for of in of_round]
            ways: dict[str, Callable[[NDArray[np.int64], torch.Tensor, torch.Tensor], object]] = {
                "dense_step": lambda _, dense, wanted: dense_step(dense, wanted),
                "fused_dense_step": lambda _, dense, wanted: fused_dense_step(dense, wanted),
                "sparse_step": lambda batch, _, wanted: sparse_step(matrix, batch, wanted),
            }
            for name, way in ways.items():
                start = time.perf_counter()
                for batch, dense, wanted in batches:
                    way(batch, dense, wanted)
                found[name].append((time.perf_counter() - start) / in_turn)
        return {name: seconds[1:] for name, seconds in found.items()}

    consecutive = times(IN_TURN, order)
    alternating = times(1, order[: BATCH * IN_TURN * (n_rounds // 2 + 1)])
    sparse_step.close()

    def ratio(seconds: dict[str, list[float]], name: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds["sparse_step"], strict=True))

    difference = (weight.detach().T - layer.weight.detach()).abs().max() / layer.weight.detach().abs().max()
    result = {
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "steps": (n_rounds + n_rounds // 2) * IN_TURN,
        **{f"{name}_s": statistics.median(seconds) for name, seconds in consecutive.items()},
        "epoch_of_places365_s": statistics.median(consecutive["sparse_step"]) * -(-1_623_114 // BATCH),
        "speedup_over_dense": ratio(consecutive, "dense_step"),
        "speedup_over_fused_dense": ratio(consecutive, "fused_dense_step"),
        "alternating_speedup_over_dense": ratio(alternating, "dense_step"),
        "alternating_speedup_over_fused_dense": ratio(alternating, "fused_dense_step"),
        "max_weight_difference": float(difference),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
