"""Stage 1: features of the images that the SAE is trained on."""

from dncbm import arguments, features


def main() -> None:
    settings, args = arguments.parse(__doc__, arguments.images, arguments.sae_data)
    extraction = arguments.extraction(args)
    features.save_sae_features(settings, args.sae_dataset, args.img_enc_name, args.hook_points, extraction)


if __name__ == "__main__":
    arguments.run(main)
