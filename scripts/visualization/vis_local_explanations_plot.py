"""Draw images with the concepts that their predictions are made of, as vis_local_explanations_dump.py computed them."""

from dncbm import arguments
from dncbm.artifacts import Artifacts
from dncbm.dumps import local_explanations
from dncbm.plotting.local_explanations import draw
from dncbm.plotting.pages import plot


def main() -> None:
    settings, args = arguments.parse(
        __doc__, arguments.explained, arguments.selection("images", "classes", "concepts"), arguments.drawing
    )
    run, probe = arguments.sae_from(args), arguments.wanted_probe(settings, args)
    wanted = Artifacts(settings).local_explanations(run, probe, args.probe_split)
    folder = arguments.computed(settings, wanted, "vis_local_explanations_dump.py", last="probe")
    plot(settings, folder, local_explanations, draw, arguments.selection_from(args), arguments.drawing_from(args))


if __name__ == "__main__":
    arguments.run(main)
