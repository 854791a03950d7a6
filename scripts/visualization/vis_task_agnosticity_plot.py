"""Draw latents with their top images of every probe data set, as vis_task_agnosticity_dump.py computed them."""

from dncbm.cli import main

if __name__ == "__main__":
    main("task_agnosticity_plot")
