"""A training run that ends itself at a given moment: python interrupted_run.py FOLDER [MOMENT NUMBER].

MOMENT: "read" kills at that read of a batch, "rename" before that rename of a written file, "term" sends SIGTERM at that
read. The result is FOLDER/final.safetensors.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparse_autoencoder import ReLU, SparseAutoencoder, TrainingSettings, save_checkpoint, train

folder = Path(sys.argv[1])
moment, number = (sys.argv[2], int(sys.argv[3])) if len(sys.argv) > 2 else ("", 0)
rename = os.replace


class Data:
    """500 random items."""

    def __init__(self) -> None:
        self.x = torch.randn(500, 10, generator=torch.Generator().manual_seed(0)).relu()
        self.reads = 0

    def __len__(self) -> int:
        return len(self.x)

    def gather(self, indices: np.ndarray) -> Tensor:
        self.reads += 1
        if self.reads == number and moment == "read":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.reads == number and moment == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        return self.x[torch.from_numpy(indices)]


def replace(source: os.PathLike, target: os.PathLike) -> None:
    global number
    number -= 1
    if number == 0 and moment == "rename":
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)


os.replace = replace if moment == "rename" else rename
model = SparseAutoencoder(10, 200, sparsity=ReLU(0.05))
settings = TrainingSettings(epochs=12, batch_size=64, resample_freq=3, lr=3e-3)
result = train(
    model, Data(), settings, state_path=folder / "state.safetensors", state_every=0, log_path=folder / "log.csv"
)
if result.stopped_early:
    print("stopped early at", result.steps)
else:
    save_checkpoint(model, folder / "final.safetensors")
