"""Accuracy at 5 to 30 non-zero weights a class, of the SAE's concepts, raw features and random directions."""

from dncbm import arguments, nec


def main() -> None:
    settings, args = arguments.parse(__doc__, arguments.sae_data, arguments.sae_run, arguments.probe_data)
    nec.accuracy_at_nec(
        settings, arguments.sae_from(args), args.probe_dataset, device=args.device, overwrite=args.overwrite
    )


if __name__ == "__main__":
    arguments.run(main)
