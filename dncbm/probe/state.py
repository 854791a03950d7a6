"""The state of unfinished work: saved now and then and when it is interrupted, and read again only where it belongs."""

import json
import logging
import signal
import threading
import time
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from dncbm.runs.errors import UserError, first_line
from dncbm.runs.manifests import fingerprint, text_hash
from sparse_autoencoder.files import write_safetensors

STATE_EVERY_S = 60.0
"""Seconds between saves."""

messages = logging.getLogger(__name__)


class Terminated(KeyboardInterrupt):
    """SIGTERM ended some work."""


State = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""Tensors, and values as JSON has them."""


@dataclass(frozen=True)
class StateFile:
    """The file of a state. Whoever saves the finished work removes it."""

    path: Path
    of: str = ""
    """What identifies the work: its settings and inputs."""
    overwrite: bool = False
    """Whether a state that is damaged, or of other work, counts as absent."""

    @classmethod
    def of_work(cls, path: Path, settings: Mapping[str, Any], inputs: Mapping[str, Path], overwrite: bool) -> "StateFile":
        """The state of work with these settings on these artifacts."""
        prints = {name: fingerprint(source) for name, source in inputs.items()}
        return cls(path, text_hash([json.dumps([dict(settings), prints], sort_keys=True)]), overwrite)

    def save(self, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
        """Save a state, whole or not at all."""
        copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}  # safetensors refuses shared memory
        texts = {name: json.dumps(value) for name, value in {"of": self.of, **about}.items()}
        write_safetensors(copies, self.path, texts | {"checksum": _checksum(copies, texts)})

    def load(self, device: torch.device, shapes: Mapping[str, Sequence[int]], about: Collection[str]) -> State | None:
        """The state with tensors of these shapes and values of these names; None if there is no such file.

        Raises UserError if the file is damaged or of other work, unless `overwrite` says that it counts as absent.
        """
        if not self.path.is_file():
            return None
        try:
            return self._read(device, shapes, about)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            problem = f"cannot resume from {self.path} ({first_line(error)})"
            if self.overwrite:
                messages.warning(f"{problem}: with --overwrite, the work begins again")
                return None
            raise UserError(f"{problem}: delete it, or pass --overwrite, to begin again") from error

    def _read(self, device: torch.device, shapes: Mapping[str, Sequence[int]], about: Collection[str]) -> State:
        with safe_open(self.path, framework="pt") as file:
            texts, names = file.metadata() or {}, sorted(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
        checksum = texts.pop("checksum", "")
        if names != sorted(shapes) or not {"of", *about} <= texts.keys():
            raise ValueError("it is not the state of such work")
        if checksum != _checksum(tensors, texts):
            raise ValueError("it is damaged")
        values = {name: json.loads(text) for name, text in texts.items()}
        if values["of"] != self.of:
            raise ValueError("it is the state of work on other inputs or with other settings")
        for name, tensor in tensors.items():
            if list(tensor.shape) != list(shapes[name]):
                raise ValueError(f"{name} has the shape {list(tensor.shape)}, not {list(shapes[name])}")
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name} holds NaN or infinity")
        return {name: tensor.to(device) for name, tensor in tensors.items()}, values


def _checksum(tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> str:
    """Of tensors in main memory and texts."""
    found = zlib.crc32(json.dumps(dict(texts), sort_keys=True).encode())
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].contiguous().numpy().data, found)
    return f"{found:08x}"


class Latest:
    """The latest state of some work, saved every STATE_EVERY_S, and when the work is interrupted."""

    def __init__(self, file: StateFile) -> None:
        self._file = file
        self._state: State | None = None
        self._saved_at = time.monotonic()

    def keep(self, tensors: dict[str, torch.Tensor], about: dict[str, Any], *, last: bool = False) -> None:
        """Take a state, whose tensors and values must not change any more; save it if it is the last or a save is due."""
        self._state = tensors, about
        if last or time.monotonic() - self._saved_at > STATE_EVERY_S:
            self._save()

    def _save(self) -> None:
        if self._state is not None:
            self._file.save(*self._state)
            self._state, self._saved_at = None, time.monotonic()

    @contextmanager
    def saved_if_interrupted(self) -> Iterator[None]:
        """Save the latest state if Ctrl-C (KeyboardInterrupt) or SIGTERM (Terminated) ends the block.

        A second one ends it at once.
        """
        before = None
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, _terminate)
        try:
            yield
        except KeyboardInterrupt:
            self._save()
            raise
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated
