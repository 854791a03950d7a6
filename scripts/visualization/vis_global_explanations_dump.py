"""Compute which concepts lead each class."""

from dncbm.cli import main

if __name__ == "__main__":
    main("global_explanations_dump")
