"""Stage 2: train the sparse autoencoder."""

from dncbm import arguments, sae


def main() -> None:
    settings, args = arguments.parse(
        __doc__, arguments.sae_data, arguments.sae_run, arguments.sae_training, arguments.reporting
    )
    run, tracking = arguments.sae_from(args), arguments.tracking_from(args)
    sae.train_sae(settings, run, device=args.device, tracking=tracking, overwrite=args.overwrite)


if __name__ == "__main__":
    arguments.run(main)
