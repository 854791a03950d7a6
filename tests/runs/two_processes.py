"""Runs stages in two processes each, with the environment of torchrun but importing the library only once.

Reads lines of JSON from stdin, {"stage": ..., "flags": [...], "folder": ..., "second": ...}, and answers each with the exit
codes of the two processes. `folder` holds config.py and gets their output, stderr0 and stderr1. `second` is "dies" or "fails"
if that is to happen when the second process writes its second shard, or reads its part of a second batch, else empty.
"""

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import open_clip.hf_model  # noqa: F401 - the stages import these late, which would cost each process seconds
import torchvision.datasets  # noqa: F401
import webdataset  # noqa: F401

import dncbm.cli
from dncbm.concepts import strengths
from dncbm.features import encoding
from dncbm.runs.errors import UserError
from sparse_autoencoder import data


def run(rank: int, port: int, stage: str, flags: list[str], folder: str, second: str) -> None:
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "DNCBM_CONFIG": f"{folder}/config.py"}
    for stream in (1, 2):
        os.dup2(os.open(f"{folder}/stderr{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if rank == 1 and second:
        encoding._write_shard = hindered(encoding._write_shard, second)
        strengths.write_part = hindered(strengths.write_part, second)
        data.OwnItems.gather_stored = hindered(data.OwnItems.gather_stored, second)
    dncbm.cli.main(stage, ["--device", "cpu", *flags])


def hindered(write: Callable[..., Any], second: str) -> Callable[..., Any]:
    written = []

    def write_or_not(*arguments: Any) -> Any:
        written.append(arguments)
        if len(written) == 2 and second == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if len(written) == 2 and second == "fails":
            raise UserError("the second failed")
        return write(*arguments)

    return write_or_not


def fork(*arguments: Any) -> int:
    """Call `run` in a process of its own. Returns its number."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        run(*arguments)
        code = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


for line in sys.stdin:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    processes = [fork(rank, port, *json.loads(line).values()) for rank in range(2)]
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]), flush=True)
