"""Compute which concepts lead each class, for vis_global_explanations_plot.py to draw."""

from dncbm.cli import main

if __name__ == "__main__":
    main("global_explanations_dump")
