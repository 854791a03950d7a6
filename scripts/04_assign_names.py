"""Stage 4: name each latent of the sparse autoencoder by its nearest word."""

from dncbm import arguments, naming


def main() -> None:
    settings, args = arguments.parse(__doc__, arguments.sae_data, arguments.sae_run)
    naming.assign_names(settings, arguments.sae_from(args), device=args.device, overwrite=args.overwrite)


if __name__ == "__main__":
    arguments.run(main)
