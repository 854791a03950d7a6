"""Downloading Conceptual Captions with img2dataset: from Google's two TSV files to webdataset shards."""

import json
import signal
from pathlib import Path

from dncbm.runs import commands
from dncbm.runs.declarations import Download
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import Outcome
from dncbm.runs.settings import Settings
from sparse_autoencoder.files import whole_file

HEADER = "caption\turl"


def download_cc3m(settings: Settings, download: Download, *, device: str = "auto", overwrite: bool = False) -> Outcome:
    """Stage 0: download the images of both TSVs into `output/training` and `output/validation`.

    Prints the entry for `sae_datasets` of config.py. Complete shards are not downloaded again; img2dataset counts the
    addresses that fail in a file `NNNNN_stats.json` per shard.

    Raises UserError if a TSV is missing or malformed, or no image arrived.
    """
    arrived = {}
    for name, tsv in (("training", download.train_tsv), ("validation", download.val_tsv)):
        listed, folder = download.output / f"{name}.tsv", download.output / name
        n_urls = copy_with_header(tsv, listed)
        print(f"{n_urls} addresses of {name}: {tsv}")
        _run_img2dataset(listed, folder, download)
        shards = sorted(folder.glob("[0-9]*.tar"))
        stats = [shard.with_name(f"{shard.stem}_stats.json") for shard in shards]
        n_images = sum(json.loads(path.read_text())["successes"] for path in stats if path.is_file())
        if not n_images:
            raise UserError(
                f"no image of {tsv} arrived in {folder}: check the connection, then remove the folder and try again"
            )
        print(f"{n_images} of {n_urls} images arrived ({n_images / n_urls:.1%}), {len(shards)} shards: {folder}")
        arrived[name] = shards
    training = arrived["training"]
    # The paper keeps 32 of 332 shards for validation. A single shard serves as both splits.
    n_held_out = max(1, round(len(training) * 32 / 332))
    splits = {"train": training[:-n_held_out] or training, "train_val": training[-n_held_out:], "val": arrived["validation"]}
    print("for sae_datasets in config.py:\n", '    "cc3m": {', sep="")
    print(*(f'        "{split}": "{_pattern(shards)}",' for split, shards in splits.items()), "    },", sep="\n")
    return Outcome.RAN


def copy_with_header(tsv: Path, target: Path) -> int:
    """Check a TSV line by line and write it to `target` with a header. Returns the number of addresses.

    Raises UserError if the file is missing or empty, or a line is not `caption<TAB>url`.
    """
    if not tsv.is_file():
        raise UserError(
            f"the file {tsv} is missing: download it from https://ai.google.com/research/ConceptualCaptions/download"
        )
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
                    raise UserError(f"line {number} of {tsv} is not `caption<TAB>url`: {line[:80]!r}; is it the right file?")
                copy.write(f"{caption}\t{url}\n")
                count += 1
        if count == 0:
            raise UserError(f"{tsv} holds no address: download it again")
    return count


def _run_img2dataset(tsv: Path, folder: Path, download: Download) -> None:
    from img2dataset import download as fetch

    before = signal.getsignal(signal.SIGINT)
    try:
        fetch(
            url_list=str(tsv), input_format="tsv", url_col="url", caption_col="caption",
            output_format="webdataset", output_folder=str(folder), image_size=download.image_size,
            processes_count=download.processes, thread_count=download.threads,
            number_sample_per_shard=download.shard_size, enable_wandb=False, incremental_mode="incremental",
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)  # img2dataset leaves a handler that ends the process with exit code 0


def _pattern(shards: list[Path]) -> str:
    first, last = shards[0].stem, shards[-1].stem
    if len(shards) == 1:
        return str(shards[0])
    if int(last) - int(first) + 1 != len(shards):
        raise UserError(f"shards are missing between {shards[0]} and {shards[-1]}: run the same command again")
    return str(shards[0].with_name(f"{{{first}..{last}}}.tar"))


DOWNLOAD = commands.DOWNLOAD.stage(function=download_cc3m)
