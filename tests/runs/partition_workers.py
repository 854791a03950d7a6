"""Runs workers of stage 1 as processes of their own, importing the library only once.

Reads lines of JSON from stdin, {"folder": ..., "parts": [...], "dies": ...}, starts a worker for each part at the same time,
and answers with their exit codes. `folder` holds config.py, and gets their output. The worker of this number kills itself
when it is to write its second shard.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
from typing import Any

import numpy as np
import torch
import torchvision.datasets  # noqa: F401 - the stage imports these late, which would cost each process seconds
import webdataset  # noqa: F401
from PIL import Image

import dncbm.cli
from dncbm.features import encoding, stage
from dncbm.features.encoders import Encoder


class ChannelMeans(torch.nn.Module):
    """The tower of `make_encoder`."""

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)


def run(number: int, folder: str, part: str, dies: int, together: Any) -> None:
    os.environ["DNCBM_CONFIG"] = f"{folder}/config.py"
    for stream in (1, 2):
        os.dup2(os.open(f"{folder}/said{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    write, written = encoding._write_shard, []

    def write_or_die(*arguments: Any) -> None:
        written.append(arguments)
        if len(written) == 1:
            together.wait(60)
        if len(written) == 2 and number == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*arguments)

    encoding._write_shard = write_or_die
    means = Encoder("channel means", ChannelMeans(), to_tensor, torch.nn.Identity(), torch.device("cpu"))
    stage.load_encoder = lambda *_: means
    stage.describe_encoder = lambda *_: {"encoder": "means"}
    dncbm.cli.main("sae_features", ["--device", "cpu", "--num_workers", "0", "--partition", part])


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert threading.active_count() == 1
    fork = multiprocessing.get_context("fork")
    for line in sys.stdin:
        asked = json.loads(line)
        together = fork.Barrier(len(asked["parts"]))
        workers = [
            fork.Process(target=run, args=(number, asked["folder"], part, asked["dies"], together))
            for number, part in enumerate(asked["parts"])
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        print(json.dumps([worker.exitcode for worker in workers]), flush=True)
