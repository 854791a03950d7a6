"""All stages in order. What is done is not done again; what an interruption left goes on."""

import argparse

from dncbm import arguments, pipeline


def stages(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="first", choices=pipeline.STAGES, default=pipeline.STAGES[0])
    parser.add_argument("--to", dest="last", choices=pipeline.STAGES, default=pipeline.STAGES[-1])


def main() -> None:
    settings, args = arguments.parse(
        __doc__,
        stages,
        arguments.images,
        arguments.sae_data,
        arguments.sae_run,
        arguments.sae_training,
        arguments.reporting,
        arguments.probe_data,
        arguments.probe_run,
    )
    plan = pipeline.Plan(
        arguments.sae_from(args),
        arguments.probe_from(args),
        arguments.extraction(args),
        arguments.schedule_from(args),
        arguments.tracking_from(args),
    )
    pipeline.run_pipeline(settings, plan, args.first, args.last)


if __name__ == "__main__":
    arguments.run(main)
