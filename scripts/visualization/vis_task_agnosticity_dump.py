"""Compute which images of every probe data set activate each latent most."""

from dncbm.cli import main

if __name__ == "__main__":
    main("task_agnosticity_dump")
