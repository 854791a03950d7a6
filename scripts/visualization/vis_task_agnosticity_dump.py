"""Compute which images of every probe data set activate each latent most, for vis_task_agnosticity_plot.py to draw."""

from dncbm import arguments
from dncbm.dumps import task_agnosticity


def main() -> None:
    settings, args = arguments.parse(__doc__, arguments.explained_latents, arguments.selection("latents", "concepts"))
    task_agnosticity.dump(
        settings,
        arguments.explained_sae(settings, args),
        args.probe_split,
        args.shown_datasets,
        arguments.selection_from(args),
        overwrite=args.overwrite,
    )


if __name__ == "__main__":
    arguments.run(main)
