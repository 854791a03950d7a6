"""Trains SAEs in one of several processes, as the environment variables of torchrun describe it.

    python parallel_run.py FOLDER CASE[:FATE:READ] ...

Each case is trained, or resumed, with its files in FOLDER. Process 1 meets its FATE, a signal's name, at its READ-th read.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, distributed

from sparse_autoencoder import BatchTopK, JumpReLU, Matryoshka, ReLU, SparseAutoencoder, TopK, TrainingSettings, data, train
from sparse_autoencoder.data import TensorFeatures
from sparse_autoencoder.parallel import ALONE, Processes

# A large epsilon keeps updates smooth functions of the gradients, so that rounding stays small.
COMMON = {"epochs": 6, "batch_size": 64, "lr": 1e-2, "adam_epsilon": 1e-3, "log_every": 5}
CASES = {
    "relu": (ReLU(1e-3), {"resample_freq": 2, "resample_dataset_size": 150}),
    "topk": (TopK(3, aux_k=4, dead_after=300), {}),
    "batchtopk": (BatchTopK(3), {}),
    "jumprelu": (JumpReLU(1e-3, bandwidth=0.3), {"matmul_precision": "highest"}),
    "matryoshka": (Matryoshka(BatchTopK(3)), {"lr_warmup_steps": 5}),
    "shards": (TopK(3), {"shuffle": "shards"}),
    "centre": (ReLU(1e-3), {"resample_freq": 0}),
}


def items() -> Tensor:
    """330 items of 12 numbers: six batches, the last one short."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(330, 4, generator=generator) @ torch.randn(4, 12, generator=generator)


class Fateful(TensorFeatures):
    """Items whose READ-th read sends this process a signal."""

    def __init__(self, x: Tensor, fate: str, read: int) -> None:
        super().__init__(x)
        self.fate, self.left = fate, read

    def gather_stored(self, indices: np.ndarray) -> Tensor:
        self.left -= 1
        if self.fate and self.left == 0:
            os.kill(os.getpid(), signal.Signals[self.fate])
        return super().gather_stored(indices)


def trained(name: str, folder: Path, across: Processes = ALONE, fate: str = "", read: int = 0) -> dict[str, Tensor]:
    """Parameters of a case after training, and its metrics on all items and on the first 50."""
    sparsity, changed = CASES[name]
    data.PIECE, data.GROUP = 16, 128  # several groups
    torch.set_num_threads(1)
    model = SparseAutoencoder(12, 40, sparsity=sparsity, input_transform="centre" if name == "centre" else "none")
    with torch.no_grad():
        # All start from the first process's model.
        model.encoder_weight.normal_(generator=torch.Generator().manual_seed(1 + across.rank)).div_(12**0.5)
        model.encoder_bias[:6] = -20  # dead from the start
    result = train(
        model, Fateful(items(), fate, read), TrainingSettings(**COMMON | changed), validation=items()[:50], progress=False,
        state_path=folder / f"{name}.state", state_every=0, log_path=folder / f"{name}.csv", across=across,
    )  # fmt: skip
    metrics: dict[str, object] = {**result.metrics, **{f"val_{k}": v for k, v in (result.validation or {}).items()}}
    if not result.stopped_early:
        assert result.firing_rates is not None
        metrics["rates"] = result.firing_rates
    return {**model.state_dict(), **{f"metric.{k}": torch.tensor(v) for k, v in metrics.items()}}


def main() -> None:
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    across = Processes(distributed.get_rank(), distributed.get_world_size())
    for case in sys.argv[2:]:
        name, fate, read = [*case.split(":"), "", "0"][:3]
        found = trained(name, folder, across, fate if across.rank == 1 else "", int(read))
        save_file(found, folder / f"{name}.{across.rank}.safetensors")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
