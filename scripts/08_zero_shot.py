"""Evaluate the zero-shot baseline: features classified by the nearest description of a class."""

from dncbm.cli import main

if __name__ == "__main__":
    main("zero_shot")
