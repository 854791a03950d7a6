"""Draw latents with their top images of every probe data set, as vis_task_agnosticity_dump.py computed them."""

from dncbm import arguments
from dncbm.artifacts import Artifacts
from dncbm.dumps import task_agnosticity
from dncbm.plotting.pages import plot
from dncbm.plotting.task_agnosticity import draw


def main() -> None:
    settings, args = arguments.parse(
        __doc__, arguments.explained_latents, arguments.selection("latents", "concepts"), arguments.drawing
    )
    wanted = Artifacts(settings).task_agnosticity(arguments.sae_from(args), args.probe_split)
    folder = arguments.computed(settings, wanted, "vis_task_agnosticity_dump.py")
    plot(settings, folder, task_agnosticity, draw, arguments.selection_from(args), arguments.drawing_from(args))


if __name__ == "__main__":
    arguments.run(main)
