"""Stage 8: the zero-shot baseline, features classified by the nearest description of a class."""

import argparse

from dncbm import arguments, zero_shot


def prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--templates",
        nargs="+",
        default=None,
        help="descriptions with {} for the class; by default open_clip's 80 for imagenet, else 'a photo of a {}.'",
    )


def main() -> None:
    settings, args = arguments.parse(__doc__, arguments.hook, arguments.probe_data, prompts)
    zero_shot.evaluate_zero_shot(
        settings,
        args.img_enc_name,
        args.hook_points,
        args.probe_dataset,
        templates=args.templates,
        device=args.device,
        overwrite=args.overwrite,
    )


if __name__ == "__main__":
    arguments.run(main)
