"""Stage 5: labels, split and features of the images that the probe classifies."""

from dncbm import arguments, features


def main() -> None:
    settings, args = arguments.parse(
        __doc__, arguments.images, arguments.hook, arguments.probe_data, arguments.probe_splits
    )
    features.save_probe_features(
        settings,
        args.probe_dataset,
        args.img_enc_name,
        args.hook_points,
        arguments.splits_from(args),
        arguments.extraction(args),
    )


if __name__ == "__main__":
    arguments.run(main)
