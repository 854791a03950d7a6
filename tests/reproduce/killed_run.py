"""A reproduction in a process of its own, for tests that kill it. Such processes are forked from one that has imported all."""

import os
import sys
from pathlib import Path

from dncbm.cli import main
from dncbm.probe import nec
from dncbm.reproduce import run  # noqa: F401 - imported once, before processes are forked


def run_in_file(config: str, flags: list[str], output: str) -> None:
    """Run scripts/reproduce.py; what it prints goes to a file."""
    nec.MAX_PASSES = 8
    os.environ["DNCBM_CONFIG"] = config
    sys.stdout = sys.stderr = Path(output).open("w", buffering=1)  # noqa: SIM115 - the message of an exit comes later
    main("reproduce", flags)
