"""Stage 0: fetch Conceptual Captions from its two TSVs, as webdataset shards."""

import argparse
from pathlib import Path

from dncbm import arguments
from dncbm.datasets.download import Download, download_cc3m


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("train_tsv", type=Path, help="the training TSV, as downloaded")
    parser.add_argument("val_tsv", type=Path, help="the validation TSV")
    parser.add_argument("--output_folder", type=Path, default=Path("datasets/cc3m"))
    parser.add_argument("--image_size", type=int, default=256, help="pixels")
    parser.add_argument("--processes_count", type=int, default=16)
    parser.add_argument("--thread_count", type=int, default=64, help="connections at a time")
    parser.add_argument("--number_sample_per_shard", type=int, default=10_000)
    args = parser.parse_args()
    download = Download(args.image_size, args.processes_count, args.thread_count, args.number_sample_per_shard)
    download_cc3m(args.train_tsv, args.val_tsv, args.output_folder, download)


if __name__ == "__main__":
    arguments.run(main)
