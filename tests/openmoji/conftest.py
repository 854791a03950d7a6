"""The example's modules, imported by path, and one small build that the tests share."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "openmoji"
MODULES = (
    "emoji_data", "images", "backgrounds", "nouns", "small_clip", "build", "summarise", "emoji_words", "name_truth",
    "judge_sheet",
)  # fmt: skip


def _run_build(output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run build.py as a user does."""
    command = [sys.executable, str(EXAMPLE / "build.py"), "--output", str(output), *more]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="session")
def example() -> Iterator[SimpleNamespace]:
    """The modules of examples/openmoji, which import each other as scripts of one folder do."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(EXAMPLE))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES}, folder=EXAMPLE)
    finally:
        sys.path.remove(str(EXAMPLE))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def run_build() -> Callable[..., subprocess.CompletedProcess[str]]:
    """run_build(output, *flags) runs build.py and captures what it prints."""
    return _run_build


@pytest.fixture(scope="session")
def built(small_build: Path) -> SimpleNamespace:
    """A small build: its folder and what the command printed."""
    return SimpleNamespace(output=small_build, text=(small_build / "build.txt").read_text())
