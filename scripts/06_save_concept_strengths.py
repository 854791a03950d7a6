"""Stage 6: concept strengths of the images that the probe classifies."""

from dncbm import arguments, concepts


def main() -> None:
    settings, args = arguments.parse(
        __doc__, arguments.sae_data, arguments.sae_run, arguments.probe_data, arguments.probe_splits
    )
    concepts.save_concept_strengths(
        settings,
        arguments.sae_from(args),
        args.probe_dataset,
        arguments.splits_from(args),
        device=args.device,
        overwrite=args.overwrite,
    )


if __name__ == "__main__":
    arguments.run(main)
