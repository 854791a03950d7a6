"""Stage 7: train and evaluate the sparse linear probe on concept strengths, or with --probe_on_features the baseline."""

from dncbm import arguments, probing


def main() -> None:
    settings, args = arguments.parse(
        __doc__, arguments.sae_data, arguments.sae_run, arguments.reporting, arguments.probe_data, arguments.probe_run
    )
    probing.train_linear_probe(
        settings,
        arguments.sae_from(args),
        arguments.probe_from(args),
        schedule=arguments.schedule_from(args),
        device=args.device,
        tracking=arguments.tracking_from(args),
        overwrite=args.overwrite,
    )


if __name__ == "__main__":
    arguments.run(main)
