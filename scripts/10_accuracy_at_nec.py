"""Accuracy at 5 to 30 non-zero weights a class, of the SAE's concepts, raw features and random directions."""

from dncbm.cli import main

if __name__ == "__main__":
    main("nec")
