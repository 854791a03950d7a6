"""`probe_results.csv`: one row per run and kind of evaluation, with its settings and its metrics."""

import csv
import io
import logging
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dncbm.runs.declarations import SPLITS
from dncbm.runs.errors import UserError, first_line
from sparse_autoencoder.files import remove_leftovers, whole_file

ZERO_TOLERANCES = (0.0, 1e-9, 1e-6, 1e-3, 1e-1)
COVERAGES = (0.90, 0.95, 0.99)
NECS = (5, 10, 15, 20, 25, 30)
"""Numbers at which accuracy is reported: of effective concepts, i.e. mean numbers of non-zero weights per class (NEC), and of
contributing concepts, i.e. mean numbers that decide about an image (NCC)."""
SETTINGS = (
    "time", "probe_dataset", "method", "on", "encoder", "hook", "sae_dataset", "sae", "sae_type", "probe", "solver",
    "probe_lr", "probe_batch_size", "probe_epochs", "probe_lambda", "seed", "edit",
)  # fmt: skip
"""`method` is `probe`, `nec`, `zero_shot` or `intervention`; `on` is its input: `concepts`, `features` or, for `nec`, a
control (`INPUTS` of `dncbm.probe.nec_table`). `edit` is the name of an intervention, and the kind of its row (`Row.kind` of
`dncbm.probe.interventions`)."""
KEY = ("probe_dataset", "method", "on", "encoder", "hook", "sae_dataset", "sae", "probe", "solver", "seed", "edit")
"""What a run is. It has one row, which running it again replaces; the names of its SAE and probe hold the other settings."""
METRICS = (
    *(f"zeros_{tolerance:g}" for tolerance in ZERO_TOLERANCES),
    *(f"{split}_{metric}" for split in SPLITS for metric in ("loss", "ce", "top1", "top5")),
    *(f"val_coverage_{kind}_{share:.0%}" for kind in ("positive", "absolute") for share in COVERAGES),
    *(f"val_{which}_{kind}_top1" for kind in ("class", "group") for which in ("mean", "worst")),
    *(f"val_nec_{nec}" for nec in NECS),
    "val_anec_5",
    "val_anec_avg",
    *(f"val_ncc_{ncc}" for ncc in NECS),
    "val_ancc_5",
    "val_ancc_avg",
    "val_cea",
    "val_cea_all",
    "val_effective",
    "val_majority",
)
"""Accuracies are fractions. CEA, with the concepts in use and with all, and the effective number of concepts (`val_effective`)
are those at NEC 30; `val_majority` is the accuracy of always saying the commonest class. Columns that do not apply to a method
are blank."""
COLUMNS = (*SETTINGS, *METRICS)
LEAST_COLUMNS = {"probe_dataset", "on", "encoder"}
"""Columns that every version has written."""
LOCK_S = 60.0
"""Seconds after which a lock that is still held is ignored; writing takes a fraction of one."""
messages = logging.getLogger(__name__)

Row = dict[str, str]


def result_row(settings: Mapping[str, Any], metrics: Mapping[str, float]) -> Row:
    """A row with every column, from values of some of SETTINGS (the time is added) and of METRICS.

    Raises KeyError if there is no such column.
    """
    given = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), **settings}
    texts = {key: " ".join(str(value).splitlines()) for key, value in given.items()}  # a row is a line
    texts |= {key: f"{value:.6g}" for key, value in metrics.items()}
    if unknown := texts.keys() - set(COLUMNS):
        raise KeyError(f"no column of the results: {sorted(unknown)}")
    return dict.fromkeys(COLUMNS, "") | texts


def save_results(path: Path, *rows: Row, replaces: Mapping[str, str] | None = None) -> None:
    """Add rows, each in the place of an earlier row of the same run (KEY), whole or not at all.

    The file is rewritten under a lock, so that jobs of a cluster can share it. What an older version wrote gets the columns
    that it lacks, blank; rows that are damaged are dropped with a warning. Earlier rows that have all values of `replaces`
    (column -> text, of SETTINGS) are dropped: an evaluation of several rows may have fewer than last time.

    Raises UserError if the file is not one of results.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        remove_leftovers(path.parent)
        kept = {_key(row): row for row in (_read(path) if path.is_file() else []) if not _has(row, replaces)}
        for row in rows:
            kept.pop(_key(row), None)  # so that the last row is that of the last run
            kept[_key(row)] = row
        write_csv(path, COLUMNS, ([row[column] for column in COLUMNS] for row in kept.values()))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for the lock of a file. Where the file system has none, or somebody keeps it, continue without."""
    lock = FileLock(f"{path}.lock", timeout=LOCK_S)
    try:
        lock.acquire()
    except (Timeout, NotImplementedError):
        messages.warning("%s.lock cannot be locked: if other jobs write now, rows may be missing", path)
        yield
        return
    try:
        yield
    finally:
        lock.release()


def check_results(path: Path) -> None:
    """Raises UserError if rows cannot be added to the file: for stages to ask before they work for hours."""
    if path.exists():
        _read(path, said=False)


def read_results(path: Path) -> list[Row]:
    """Every row of the results, one per run. Raises UserError if there are none, or the file is not one of results."""
    if not path.is_file():
        raise UserError(f"no results {path}: scripts 07, 08 and 10 write it")
    rows = list({_key(row): row for row in _read(path)}.values())
    if not rows:
        raise UserError(f"no results in {path}: scripts 07, 08 and 10 write them")
    return rows


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[column] for column in KEY)


def _has(row: Mapping[str, str], values: Mapping[str, str] | None) -> bool:
    return values is not None and all(row[column] == value for column, value in values.items())


def _read(path: Path, *, said: bool = True) -> list[Row]:
    """The rows of a file, with every column. Those that are damaged are left out, and unless `said` is False that is said."""
    problem = f"{path} is not a results file of this version"
    again = "move it away; the next run starts a new one"
    try:
        text = path.read_text(encoding="utf-8-sig")
        # Line by line, since no value holds a line break: a quote that a killed process left open then ends with its line.
        lines = [next(csv.reader([line]), []) for line in text.split("\n")]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{problem} ({first_line(error)}): {again}") from error
    if not text.strip():
        return []
    header = lines[0]
    if not LEAST_COLUMNS <= set(header) <= set(COLUMNS) or len(set(header)) < len(header):
        raise UserError(f"{problem} (its first line is {','.join(header)[:60]!r}, not the names of its columns): {again}")
    rows, damaged = [], list[str]()
    for number, values in enumerate(lines[1:], start=2):
        if not values:
            continue
        # Only the last line of an older version may lack its end; then its last value may be cut.
        is_cut = number == len(lines) and bool(values[-1])
        row = dict.fromkeys(COLUMNS, "") | dict(zip(header, values, strict=False))
        if len(values) != len(header) or is_cut or not all(_is_number(row[column]) for column in METRICS):
            damaged.append(str(number))
            continue
        rows.append(_as_now(row))
    if damaged and said:
        which = f"line{'s' if len(damaged) > 1 else ''} {', '.join(damaged[:5])}{', ...' if len(damaged) > 5 else ''}"
        messages.warning("%s: left out %s, only part of which was written", path, which)
    return rows


def _is_number(text: str) -> bool:
    try:
        return not text or isinstance(float(text), float)
    except ValueError:
        return False


def _as_now(row: Row) -> Row:
    """A row of an older version, as this one writes it.

    Before there were other methods and solvers, their columns were missing; and the row of a probe on raw features named the
    SAE whose flags were given, on which it does not depend.
    """
    method = row["method"] or "probe"
    row |= {"method": method, "solver": row["solver"] or ("adam" if method == "probe" else "")}
    return row | ({"sae_dataset": "", "sae": ""} if (method, row["on"]) == ("probe", "features") else {})


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV with a header, whole or not at all."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *rows])
    with whole_file(path) as temporary:
        # Names of files need not be UTF-8: what is not is written as its escape.
        temporary.write_text(text.getvalue(), encoding="utf-8", errors="backslashreplace", newline="")


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text: the first column to the left, the others to the right."""
    widths = [max(map(text_width, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(padded(cell, width, to_left=place == 0) for place, (cell, width) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in (header, *rows))
    ]
    return "\n".join(line.rstrip() for line in lines)


def text_width(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(0 if unicodedata.combining(one) else 1 + (unicodedata.east_asian_width(one) in "WF") for one in text)


def padded(text: str, width: int, *, to_left: bool) -> str:
    """A text with the spaces that fill this many columns of a terminal, after it or before it."""
    spaces = " " * (width - text_width(text))
    return text + spaces if to_left else spaces + text
