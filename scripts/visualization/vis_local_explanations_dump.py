"""Compute which concepts each prediction is made of, for vis_local_explanations_plot.py to draw."""

from dncbm.cli import main

if __name__ == "__main__":
    main("local_explanations_dump")
