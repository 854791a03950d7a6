"""Downloading Conceptual Captions with img2dataset: from Google's two TSV files to webdataset shards."""

import json
import re
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dncbm.runs import commands
from dncbm.runs.declarations import Download
from dncbm.runs.errors import UserError, first_line
from dncbm.runs.locks import locked
from dncbm.runs.manifests import Outcome
from dncbm.runs.settings import Settings
from sparse_autoencoder.files import whole_file

HEADER = "caption\turl"
PAPER_IMAGES = 2_900_000
"""About how many training images the paper's authors got, in 332 shards."""
STATS = "_stats.json"
"""The end of the name of the file that img2dataset writes when a shard is complete."""
SHOWN_TEXTS, SHOWN_LENGTH = 5, 100
"""Messages of no known kind that are shown, and their characters."""
AGAIN = "; --retry_failed tries these again"


class Failure(Enum):
    """Why an image did not arrive."""

    GONE = "the address, the host or the image no longer exists"
    REFUSED = "the server or the owner forbids the download"
    PASSING = "timeouts, dropped connections, servers that are busy or down"
    UNKNOWN = "other messages"


RETRIED = (Failure.PASSING, Failure.UNKNOWN)
"""What a retry tries again. It includes messages without a kind, since trying costs little."""
FAILURES: tuple[tuple[Failure, str], ...] = (
    # Answers and addresses come first: the text after a status is the server's own, and some messages quote the address.
    (Failure.PASSING, r"^HTTP Error (408|425|429|5\d\d)\b"),
    (Failure.GONE, r"^HTTP Error (3\d\d|400|404|410|414)\b"),  # 3xx: redirections in circles, or to what is no page
    (Failure.REFUSED, r"^HTTP Error (4\d\d|999)\b|X-Robots-Tag"),
    (Failure.GONE, r"unknown url type|no host given|nonnumeric port|control characters|codec can't encode|\bidna\b"),
    (Failure.PASSING, r"timed out|timeout|did not properly respond"),
    (Failure.PASSING, r"\[Errno -3\]|temporary failure"),  # of name resolution
    (Failure.PASSING, r"reset by peer|closed connection|forcibly closed|connection abort|broken pipe|IncompleteRead"),
    (Failure.PASSING, r"EOF occurred|UNEXPECTED_EOF"),
    (Failure.PASSING, r"connection refused|actively refused|unreachable|no route to host|host is down"),
    # These are faults of this machine, which its user may fix.
    (Failure.PASSING, r"unable to get (local )?issuer certificate"),
    (Failure.PASSING, r"too many open files|cannot allocate memory|can't start new thread|insufficient memory"),
    (Failure.PASSING, r"cannot assign requested address|no buffer space|resource temporarily unavailable"),
    (Failure.GONE, r"\[Errno -[25]\]|name or service not known|nodename nor servname|getaddrinfo failed"),
    (Failure.GONE, r"certificate|\[SSL|_ssl\.c"),
    (Failure.GONE, r"image decoding error|OpenCV"),
)
"""The kind of each message of img2dataset, which are those of urllib, the system and OpenCV. The first match counts."""


@lru_cache(maxsize=10_000)
def kind_of(message: str) -> Failure:
    """The kind of failure that a message of img2dataset tells of."""
    found = (kind for kind, pattern in FAILURES if re.search(pattern, message, re.IGNORECASE))
    return next(found, Failure.UNKNOWN)


def download_cc3m(settings: Settings, download: Download, *, device: str = "auto", overwrite: bool = False) -> Outcome:
    """Stage 0: download the images of both TSVs into `output/training` and `output/validation`.

    Prints the entry for `sae_datasets` of config.py, and how many images are missing for which kind of failure. Complete
    shards are not downloaded again.

    With `retry_failed`, what failed for a passing reason is tried again, in shards of their own: retry number k reads
    `output/training_retry_k.parquet` and writes `output/training/retry_k`. An interrupted retry is resumed. Memory holds the
    addresses of one shard at a time.

    Raises UserError if a TSV is missing or malformed, no image arrived, shards are missing, or there is no complete download
    to retry.
    """
    tsvs = {"training": download.train_tsv, "validation": download.val_tsv}
    folders = {name: download.output / name for name in tsvs}
    for folder in folders.values():
        if download.retry_failed and not any(folder.glob(f"[0-9]*{STATS}")):
            raise UserError(f"no download to retry is in {folder}: run the same command without --retry_failed first")
    with locked(folders["training"]):
        passes: dict[str, list[_Pass]] = {}
        for name, tsv in tsvs.items():
            listed = download.output / f"{name}.tsv"
            first = _Pass(listed, copy_with_header(tsv, listed), folders[name])
            if download.retry_failed and not first.is_complete:
                raise UserError(f"the download in {first.folder} is not complete: run it without --retry_failed first")
            if not download.retry_failed:
                print(f"{first.n} addresses of {name}: {tsv}")
                first.run(download)
            if not first.n_images:
                raise UserError(
                    f"no image of {tsv} arrived in {first.folder}: check the connection, then remove the folder and try again"
                )
            first.check(download)
            passes[name] = [first, *_retries(first)]
        if download.retry_failed and not _retry(passes, download):
            print(f"nothing is left to retry in {' and '.join(map(str, folders.values()))}")
            return Outcome.ALREADY_DONE
        for name, of_split in passes.items():
            _report(name, of_split)
    _print_entry(passes)
    return Outcome.RAN


def copy_with_header(tsv: Path, target: Path) -> int:
    """Check a TSV line by line and write it to `target` with a header. Returns the number of addresses.

    Raises UserError if the file is missing or empty, or a line is not `caption<TAB>url`.
    """
    if not tsv.is_file():
        raise UserError(
            f"the file {tsv} is missing: download it from https://ai.google.com/research/ConceptualCaptions/download"
        )
    n = 0
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
                if caption.startswith('"'):  # img2dataset would read on to the next quote, into other lines
                    caption = '"' + caption.replace('"', '""') + '"'
                copy.write(f"{caption}\t{url}\n")
                n += 1
        if n == 0:
            raise UserError(f"{tsv} holds no address: download it again")
    return n


# ------------------------------------------------------------------------------------------------------------- passes


@dataclass(frozen=True)
class _Pass:
    """Addresses that img2dataset goes through: one of the TSVs, or what a retry tries again."""

    listed: Path
    """The addresses: a TSV, or a parquet file with the columns url and caption."""
    n: int
    """Number of addresses."""
    folder: Path
    """Where the shards are, with `NNNNN_stats.json` and `NNNNN.parquet` beside each complete one."""

    def stats(self) -> dict[Path, Mapping[str, Any]]:
        """Complete shard -> what img2dataset counted there, in the order of their numbers."""
        found = {}
        for path in sorted(self.folder.glob(f"[0-9]*{STATS}")):
            try:
                found[path.with_name(path.name.removesuffix(STATS) + ".tar")] = json.loads(path.read_text())
            except ValueError:  # killed while it wrote this
                continue
        return found

    @property
    def is_complete(self) -> bool:
        """Whether every address was tried."""
        return sum(stats["count"] for stats in self.stats().values()) == self.n

    @property
    def n_images(self) -> int:
        """Number of images that arrived."""
        return sum(stats["successes"] for stats in self.stats().values())

    def failures(self) -> Iterator[tuple[str, int]]:
        """Message and number, shard by shard."""
        for stats in self.stats().values():
            yield from ((message, n) for message, n in stats["status_dict"].items() if message != "success")

    def run(self, download: Download) -> None:
        """Download the shards that are missing. Raises UserError if those that are there hold other numbers of addresses."""
        if self.is_complete:
            return
        size, complete = download.shard_size, self.stats()
        for shard, stats in complete.items():
            wanted = min(size, self.n - int(shard.stem) * size)
            if stats["count"] != wanted:
                raise UserError(
                    f"{shard} holds {stats['count']} addresses, not {wanted}: give the TSV and --number_sample_per_shard that "
                    "it was made with, or another --output_folder"
                )
        for path in self.folder.glob("[0-9]*"):
            # img2dataset would take a shard with damaged counts for complete, and workers of a killed run may still write.
            part = re.fullmatch(rf"(\d+)(\.tar|\.parquet|{STATS})", path.name)
            if part and self.folder / f"{part[1]}.tar" not in complete:
                path.unlink(missing_ok=True)
        _run_img2dataset(self.listed, self.folder, download)

    def check(self, download: Download) -> None:
        """Raises UserError unless every address was tried."""
        if not self.is_complete:
            last = self.folder / f"{(self.n - 1) // download.shard_size:05d}.tar"
            raise UserError(f"shards are missing between {self.folder / '00000.tar'} and {last}: run the same command again")


def _retries(first: _Pass) -> Iterator[_Pass]:
    """The retries that have begun after a first pass."""
    from pyarrow.parquet import ParquetFile

    for number in count(1):
        listed = _retry_list(first, number)
        if not listed.is_file():
            return
        with ParquetFile(listed) as file:
            yield _Pass(listed, file.metadata.num_rows, first.folder / f"retry_{number}")


def _retry_list(first: _Pass, number: int) -> Path:
    return first.listed.with_name(f"{first.listed.stem}_retry_{number}.parquet")


def _retry(passes: Mapping[str, list[_Pass]], download: Download) -> bool:
    """Finish the retry that was interrupted, or else begin one, which is added to `passes`. Returns whether there was one.

    Both splits have the same retries, so that a list is written for each, even an empty one, before anything is downloaded.
    """
    number = max(map(len, passes.values())) - 1
    if all(len(of_split) == number + 1 and of_split[-1].is_complete for of_split in passes.values()):
        failures = (message for of_split in passes.values() for message, _ in of_split[-1].failures())
        if not any(kind_of(message) in RETRIED for message in failures):
            return False
        number += 1
    for of_split in passes.values():
        if len(of_split) == number:
            listed = _retry_list(of_split[0], number)
            n = _list_again(of_split[-1], listed)
            of_split.append(_Pass(listed, n, of_split[0].folder / f"retry_{number}"))
    for name, (*_, retry) in passes.items():
        if not retry.is_complete:
            print(f"retry {number} of {name}: {retry.n} addresses")
        retry.run(download)
        retry.check(download)
    return True


def _list_again(last: _Pass, target: Path) -> int:
    """Write what a pass failed to get, if a retry may get it, to a parquet file. Returns the number of addresses.

    Raises UserError if a parquet file of the pass is missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    n, schema = 0, pa.schema([("url", pa.string()), ("caption", pa.string())])
    with whole_file(target) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for shard in tqdm(last.stats(), desc=target.stem, unit="shard"):
            path = shard.with_suffix(".parquet")
            try:
                table = pq.read_table(path, columns=[*schema.names, "status", "error_message"])
            except (OSError, pa.ArrowException) as error:
                raise UserError(
                    f"cannot read {path}, where img2dataset noted what failed ({first_line(error)}): put it back, or remove "
                    f"{shard.stem}{STATS} beside it, so that the shard is downloaded again"
                ) from error
            messages = pc.fill_null(table["error_message"], "").combine_chunks().dictionary_encode()
            of_message = [kind_of(message) in RETRIED for message in messages.dictionary.to_pylist()]
            failed = pc.not_equal(table["status"], "success")
            again = pc.and_(failed, pa.array(of_message, pa.bool_()).take(messages.indices))
            chosen = table.select(schema.names).filter(again).cast(schema)
            writer.write_table(chosen)
            n += len(chosen)
    return n


# ------------------------------------------------------------------------------------------------------------- report


def _report(name: str, passes: Sequence[_Pass]) -> None:
    """Print how many of the listed images there are, and why the others are missing."""
    done = [one for one in passes if one.is_complete]
    n, n_images, n_shards = passes[0].n, sum(one.n_images for one in done), sum(len(one.stats()) for one in done)
    print(f"{n_images} of {n} images arrived ({n_images / n:.1%}), {n_shards} shards: {passes[0].folder}")
    if name == "training" and n >= PAPER_IMAGES:
        print(f"{n_images / PAPER_IMAGES:.0%} of the number that the paper had, about {PAPER_IMAGES / 1e6:.1f} million")
    if n_images == n:
        return
    kinds: Counter[Failure] = Counter()
    texts: Counter[str] = Counter()
    for one in done:
        for message, times in one.failures():
            kind = kind_of(message)
            if kind not in RETRIED or one is done[-1]:  # those of earlier passes were tried again
                kinds[kind] += times
                if kind is Failure.UNKNOWN:
                    texts[re.sub(r"\d+", "N", message)[:SHOWN_LENGTH]] += times  # numbers tell many apart that are alike
    print(f"{n - n_images} images of {name} are missing:")
    rows = [(kinds[kind], f"{kind.name.lower()}: {kind.value}{AGAIN if kind in RETRIED else ''}") for kind in Failure]
    rows += [(times, f"  of the unknown: {text!r}") for text, times in texts.most_common(SHOWN_TEXTS)]
    rows.append((n - n_images - kinds.total(), "without a record"))
    for times, text in rows:
        if times:
            print(f"{times:>{len(str(n))}} {text}")
    if len(done) < len(passes):
        print(f"the retry in {passes[-1].folder} was interrupted: --retry_failed resumes it")


def _print_entry(passes: Mapping[str, Sequence[_Pass]]) -> None:
    """Print the entry for `sae_datasets` of config.py. What retries added to the training images is `train`, never
    `train_val`."""
    training, *retried = _shards(passes["training"])
    # The paper keeps 32 of 332 shards for validation. A single shard serves as both splits.
    n_held_out = max(1, round(len(training) * 32 / 332))
    splits = {
        "train": [training[:-n_held_out] or training, *retried],
        "train_val": [training[-n_held_out:]],
        "val": _shards(passes["validation"]),
    }
    print("for sae_datasets in config.py:\n", '    "cc3m": {', sep="")
    for split, groups in splits.items():
        patterns = [_pattern(shards) for shards in groups]
        print(f'        "{split}": {json.dumps(patterns if len(patterns) > 1 else patterns[0], ensure_ascii=False)},')
    print("    },")


def _shards(passes: Sequence[_Pass]) -> list[list[Path]]:
    """The shards of each complete pass that brought images."""
    return [list(one.stats()) for one in passes if one.is_complete and one.n_images]


def _pattern(shards: Sequence[Path]) -> str:
    first, last = shards[0], shards[-1]
    return str(first if first == last else first.with_name(f"{{{first.stem}..{last.stem}}}.tar"))


def _run_img2dataset(listed: Path, folder: Path, download: Download) -> None:
    from img2dataset import download as fetch

    before = signal.getsignal(signal.SIGINT)
    try:
        fetch(
            url_list=str(listed), input_format=listed.suffix[1:], url_col="url", caption_col="caption",
            output_format="webdataset", output_folder=str(folder), image_size=download.image_size,
            processes_count=download.processes, thread_count=download.threads,
            number_sample_per_shard=download.shard_size, enable_wandb=False, incremental_mode="incremental",
        )  # fmt: skip
    except SystemExit:  # img2dataset's answer to Ctrl-C, with exit code 0
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


DOWNLOAD = commands.DOWNLOAD.stage(function=download_cc3m)
