"""Compute which concepts lead each class, for vis_global_explanations_plot.py to draw."""

from dncbm import arguments
from dncbm.dumps import global_explanations


def main() -> None:
    settings, args = arguments.parse(
        __doc__, arguments.explained, arguments.selection("classes", "classes", "concepts")
    )
    run = arguments.explained_sae(settings, args)
    global_explanations.dump(
        settings,
        run,
        arguments.explained_probe(settings, args, run),
        args.probe_split,
        arguments.selection_from(args),
        overwrite=args.overwrite,
    )


if __name__ == "__main__":
    arguments.run(main)
