"""States of unfinished work: resumed from where they belong, refused in one line elsewhere, saved by interruptions."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dncbm.probe.state
from dncbm.probe.state import Latest, StateFile

CPU = torch.device("cpu")
TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "step": torch.tensor([4.0])}
SHAPES = {"weight": (2, 3), "step": (1,)}
ABOUT = {"epoch": 3, "log": [{"loss": 0.5}]}


def test_a_state_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "state.safetensors", "this work")
    assert file.load(CPU, SHAPES, ABOUT) is None
    file.save(TENSORS, ABOUT)
    tensors, about = file.load(CPU, SHAPES, ABOUT)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {k: v.tolist() for k, v in TENSORS.items()}
    assert about == ABOUT | {"of": "this work"}


def rewritten(**changes: object) -> Callable[[Path], None]:
    """A state with other tensors or values."""

    def damage(path: Path) -> None:
        tensors = TENSORS | {name: value for name, value in changes.items() if isinstance(value, torch.Tensor)}
        values = ABOUT | {k: v for k, v in changes.items() if not isinstance(v, torch.Tensor)}
        of = str(values.pop("of", "this work"))
        StateFile(path, of).save(tensors, {name: value for name, value in values.items() if value is not None})

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "cut by one byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "reversed": lambda path: path.write_bytes(path.read_bytes()[::-1]),
    "a bit flipped": lambda path: path.write_bytes(
        path.read_bytes()[:-3] + bytes([path.read_bytes()[-3] ^ 8]) + path.read_bytes()[-2:]
    ),
    "a number changed": lambda path: path.write_bytes(path.read_bytes().replace(b'"epoch":"3"', b'"epoch":"2"')),
    "text": lambda path: path.write_text("a,b\n1,2\n"),
    "NaN": rewritten(weight=torch.full((2, 3), torch.nan)),
    "another shape": rewritten(weight=torch.zeros(3, 2)),
    "more tensors": rewritten(more=torch.zeros(1)),
    "a value missing": rewritten(log=None),
    "other work": rewritten(of="that work"),
    "no JSON": lambda path: save_file(TENSORS, path, {"of": "x", "epoch": "{", "log": ""}),
    "a probe": lambda path: save_file({"weight": TENSORS["weight"]}, path),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_or_of_other_work_is_refused_or_with_overwrite_counts_as_absent(
    tmp_path: Path, refusal, damage: Callable[[Path], object]
) -> None:
    path = tmp_path / "state.safetensors"
    StateFile(path, "this work").save(TENSORS, ABOUT)
    damage(path)
    with refusal(path, "delete it", "--overwrite"):
        StateFile(path, "this work").load(CPU, SHAPES, ABOUT)
    assert StateFile(path, "this work", overwrite=True).load(CPU, SHAPES, ABOUT) is None


# -------------------------------------------------------------------------------------------------------- interruptions


def interrupted(latest: Latest, how: Callable[[], None]) -> None:
    with latest.saved_if_interrupted():
        for epoch in range(5):
            latest.keep(TENSORS, {"epoch": epoch})
            if epoch == 2:
                how()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interruption_saves_the_latest_state(tmp_path: Path, number: signal.Signals) -> None:
    file = StateFile(tmp_path / "state.safetensors")
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        interrupted(Latest(file), lambda: os.kill(os.getpid(), number))
    _, about = file.load(CPU, SHAPES, ("epoch",))
    assert about["epoch"] == 2
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_interruption_ends_at_once_and_leaves_the_state_before(tmp_path: Path, monkeypatch) -> None:
    file = StateFile(tmp_path / "state.safetensors")
    file.save(TENSORS, {"epoch": 0})

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            interrupted(Latest(file), lambda: os.kill(os.getpid(), signal.SIGINT))
    assert file.load(CPU, SHAPES, ("epoch",))[1]["epoch"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_an_error_saves_nothing(tmp_path: Path) -> None:
    """The state may be what is wrong."""
    with pytest.raises(ZeroDivisionError):
        interrupted(Latest(StateFile(tmp_path / "state.safetensors")), lambda: 1 // 0)
    assert not list(tmp_path.iterdir())


def test_states_are_kept_in_a_thread_too(tmp_path: Path, monkeypatch) -> None:
    """Only the main thread can ask for signals."""
    monkeypatch.setattr(dncbm.probe.state, "STATE_EVERY_S", -1.0)
    file = StateFile(tmp_path / "state.safetensors")
    thread = threading.Thread(target=interrupted, args=(Latest(file), lambda: None))
    thread.start()
    thread.join()
    assert file.load(CPU, SHAPES, ("epoch",))[1]["epoch"] == 4
