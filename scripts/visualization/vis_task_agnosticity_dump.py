"""Compute which images of every probe data set activate each latent most, for vis_task_agnosticity_plot.py to draw."""

from dncbm.cli import main

if __name__ == "__main__":
    main("task_agnosticity_dump")
