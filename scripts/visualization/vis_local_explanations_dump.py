"""Compute which concepts each prediction is made of."""

from dncbm.cli import main

if __name__ == "__main__":
    main("local_explanations_dump")
