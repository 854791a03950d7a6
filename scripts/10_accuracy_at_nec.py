"""Measure the accuracy with few concepts per class and per decision, on concepts and on controls."""

from dncbm.cli import main

if __name__ == "__main__":
    main("nec")
