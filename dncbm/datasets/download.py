"""Fetching Conceptual Captions with img2dataset: from the two TSVs that Google publishes to webdataset shards."""

import json
from dataclasses import dataclass
from pathlib import Path

from dncbm.errors import UserError
from dncbm.manifests import whole_file

HEADER = "caption\turl"


@dataclass(frozen=True)
class Download:
    """How images are fetched; the defaults are the paper's."""

    image_size: int = 256
    """Pixels of the square that images are fitted into."""
    processes: int = 16
    threads: int = 64
    """Connections at a time, in all processes together."""
    shard_size: int = 10_000
    """Image addresses a shard."""


def download_cc3m(train_tsv: Path, val_tsv: Path, output: Path, download: Download) -> dict[str, str]:
    """Fetch the images of both TSVs into `output/training` and `output/validation`, and say what to put into config.py.

    Shards that are complete are not fetched again, as img2dataset does it; addresses that fail are counted by it, a file
    `NNNNN_stats.json` a shard.

    Args:
        train_tsv: the training TSV as downloaded, `caption<TAB>url` a line, with or without a header.
        val_tsv: the validation TSV.
        output: where shards go.
        download: size and parallelism.

    Returns:
        Split -> shard pattern, for `sae_datasets` of config.py.

    Raises:
        UserError: a TSV is missing or malformed, or no image arrived.
    """
    patterns = {}
    for name, tsv in (("training", train_tsv), ("validation", val_tsv)):
        listed = output / f"{name}.tsv"
        n_urls = copy_with_header(tsv, listed)
        print(f"{n_urls} addresses of {name}: {tsv}")
        folder = output / name
        _run_img2dataset(listed, folder, download)
        n_images, shards = _arrived(folder)
        if not n_images:
            raise UserError(
                f"no image of {tsv} arrived in {folder}: is there a connection? Remove the folder to try again"
            )
        print(f"{n_images} of {n_urls} images arrived ({n_images / n_urls:.1%}), {len(shards)} shards: {folder}")
        patterns[name] = shards
    training = patterns["training"]
    # The paper keeps 32 of 332 shards for validation. Of a single shard, all splits are that shard.
    n_held_out = max(1, round(len(training) * 32 / 332))
    splits = {
        "train": _pattern(training[:-n_held_out] or training),
        "train_val": _pattern(training[-n_held_out:]),
        "val": _pattern(patterns["validation"]),
    }
    print("for sae_datasets in config.py:")
    print(
        '    "cc3m": {', *(f'        "{split}": "{pattern}",' for split, pattern in splits.items()), "    },", sep="\n"
    )
    return splits


def copy_with_header(tsv: Path, target: Path) -> int:
    """Check a TSV line by line and write it, with a header, to `target`.

    Returns:
        Number of addresses.

    Raises:
        UserError: it is missing, empty, or a line is not `caption<TAB>url`.
    """
    if not tsv.is_file():
        raise UserError(f"no file {tsv}: download it from https://ai.google.com/research/ConceptualCaptions/download")
    count = 0
    with tsv.open(encoding="utf-8", errors="replace", newline="\n") as lines, whole_file(target) as temporary:
        with temporary.open("w", encoding="utf-8") as copy:
            copy.write(HEADER + "\n")
            for number, line in enumerate(lines, start=1):
                line = line.rstrip("\r\n")
                if not line or (number == 1 and line == HEADER):
                    continue
                caption, tab, url = line.partition("\t")
                if not tab or not url.startswith(("http://", "https://")):
                    raise UserError(
                        f"line {number} of {tsv} is not `caption<TAB>url`: {line[:80]!r}; is it the right file?"
                    )
                copy.write(f"{caption}\t{url}\n")
                count += 1
        if count == 0:
            raise UserError(f"{tsv} holds no address: download it again")
    return count


def _run_img2dataset(tsv: Path, folder: Path, download: Download) -> None:
    from img2dataset import download as fetch

    fetch(
        url_list=str(tsv),
        input_format="tsv",
        url_col="url",
        caption_col="caption",
        output_format="webdataset",
        output_folder=str(folder),
        image_size=download.image_size,
        processes_count=download.processes,
        thread_count=download.threads,
        number_sample_per_shard=download.shard_size,
        enable_wandb=False,
        incremental_mode="incremental",
    )


def _arrived(folder: Path) -> tuple[int, list[Path]]:
    """Number of images and the shards of a folder that img2dataset wrote."""
    shards = sorted(folder.glob("[0-9]*.tar"))
    stats = [shard.with_name(f"{shard.stem}_stats.json") for shard in shards]
    return sum(json.loads(path.read_text())["successes"] for path in stats if path.is_file()), shards


def _pattern(shards: list[Path]) -> str:
    first, last = shards[0].stem, shards[-1].stem
    if len(shards) == 1:
        return str(shards[0])
    if int(last) - int(first) + 1 != len(shards):
        raise UserError(f"shards are missing between {shards[0]} and {shards[-1]}: run the same command again")
    return str(shards[0].with_name(f"{{{first}..{last}}}.tar"))
