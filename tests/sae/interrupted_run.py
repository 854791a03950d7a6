"""Training runs that end themselves at a given moment.

Reads JSON lines [FOLDER] or [FOLDER, MOMENT, NUMBER] from stdin, runs each in a process of its own, and answers with its exit
code. MOMENT: "read" kills the process at that read of a batch, "rename" before that rename of a written file, "term" sends
SIGTERM at that read, "int" SIGINT. A run writes FOLDER/final.safetensors when it finishes, and what it prints to
FOLDER/said.txt.
"""

import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparse_autoencoder import ReLU, SparseAutoencoder, TrainingSettings, save_checkpoint, train


class Data:
    """300 random items."""

    def __init__(self, moment: str, number: int) -> None:
        self.x = torch.randn(300, 10, generator=torch.Generator().manual_seed(0)).relu()
        self.moment, self.number, self.reads = moment, number, 0

    def __len__(self) -> int:
        return len(self.x)

    def gather(self, indices: np.ndarray) -> Tensor:
        self.reads += 1
        if self.reads == self.number and self.moment == "read":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.reads == self.number and self.moment == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.reads == self.number and self.moment == "int":
            os.kill(os.getpid(), signal.SIGINT)
        return self.x[torch.from_numpy(indices)]


def run(folder: Path, moment: str = "", number: int = 0) -> None:
    renames, rename = 0, os.replace

    def replace(source: os.PathLike, target: os.PathLike) -> None:
        nonlocal renames
        renames += 1
        if renames == number and moment == "rename":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = replace
    model = SparseAutoencoder(10, 100, sparsity=ReLU(0.05))
    settings = TrainingSettings(epochs=7, batch_size=40, resample_freq=3, lr=3e-3)
    files = {"state_path": folder / "state.safetensors", "log_path": folder / "log.csv"}
    result = train(model, Data(moment, number), settings, state_every=0, progress=False, **files)
    if result.stopped_by is not None:
        print(f"stopped by {result.stopped_by.name} at", result.steps)
    else:
        save_checkpoint(model, folder / "final.safetensors")


def main() -> None:
    torch.set_num_threads(1)  # faster for matrices this small
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder))  # loads the compiled loops once for all; leaves no thread running
    for line in sys.stdin:
        folder, *moment = json.loads(line)
        child = os.fork()  # a fresh process would spend most of its time on importing torch
        if child == 0:
            output = os.open(Path(folder) / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = 0
            try:
                run(Path(folder), *moment)
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
