"""Draw classes with the concepts that lead them, as vis_global_explanations_dump.py computed them."""

import argparse

from dncbm import arguments
from dncbm.artifacts import Artifacts
from dncbm.dumps import global_explanations
from dncbm.plotting.global_explanations import draw
from dncbm.plotting.pages import plot


def ranking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rank_by",
        choices=("contribution", "strength"),
        default="contribution",
        help="mean contribution; or mean-centred strength, the authors' ranking, which ignores the probe's weights",
    )


def main() -> None:
    settings, args = arguments.parse(
        __doc__, arguments.explained, arguments.selection("classes", "classes", "concepts"), arguments.drawing, ranking
    )
    run, probe = arguments.sae_from(args), arguments.wanted_probe(settings, args)
    wanted = Artifacts(settings).global_explanations(run, probe, args.probe_split)
    folder = arguments.computed(settings, wanted, "vis_global_explanations_dump.py", last="probe")
    plot(
        settings,
        folder,
        global_explanations,
        draw,
        arguments.selection_from(args),
        arguments.drawing_from(args),
        rank_by=args.rank_by,
    )


if __name__ == "__main__":
    arguments.run(main)
