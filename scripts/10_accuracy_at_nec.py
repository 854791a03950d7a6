"""Measure the accuracy at 5 to 30 non-zero weights per class, on concepts, raw features and random directions."""

from dncbm.cli import main

if __name__ == "__main__":
    main("nec")
