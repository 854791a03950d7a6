"""Draw latents with their top images of every probe data set."""

from dncbm.cli import main

if __name__ == "__main__":
    main("task_agnosticity_plot")
