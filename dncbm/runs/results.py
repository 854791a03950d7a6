"""`probe_results.csv`: one row per evaluation of any kind, with its settings and its metrics."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock

from dncbm.runs.declarations import SPLITS
from dncbm.runs.errors import UserError
from sparse_autoencoder.files import whole_file

ZERO_TOLERANCES = (0.0, 1e-9, 1e-6, 1e-3, 1e-1)
COVERAGES = (0.90, 0.95, 0.99)
NECS = (5, 10, 15, 20, 25, 30)
"""Numbers of effective concepts, i.e. mean numbers of non-zero weights per class, at which accuracy is reported."""
SETTINGS = (
    "time", "probe_dataset", "method", "on", "encoder", "hook", "sae_dataset", "sae", "probe", "solver", "probe_lr",
    "probe_batch_size", "probe_epochs", "probe_lambda", "seed",
)  # fmt: skip
"""`method` is `probe`, `nec` or `zero_shot`; `on` is its input: `concepts`, `features` or `random` directions."""
METRICS = (
    *(f"zeros_{tolerance:g}" for tolerance in ZERO_TOLERANCES),
    *(f"{split}_{metric}" for split in SPLITS for metric in ("loss", "ce", "top1", "top5")),
    *(f"val_coverage_{kind}_{share:.0%}" for kind in ("positive", "absolute") for share in COVERAGES),
    *(f"val_{which}_{kind}_top1" for kind in ("class", "group") for which in ("mean", "worst")),
    *(f"val_nec_{nec}" for nec in NECS),
    "val_anec_5",
    "val_anec_avg",
)
"""Accuracies are fractions. Columns that do not apply to a method are blank."""


def result_row(settings: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, Any]:
    """A row with every column, from values of some of SETTINGS (the time is added) and of METRICS.

    Raises KeyError if there is no such column.
    """
    row: dict[str, Any] = dict.fromkeys((*SETTINGS, *METRICS), "")
    given = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), **settings}
    given |= {key: f"{value:.6g}" for key, value in metrics.items()}
    if unknown := given.keys() - row.keys():
        raise KeyError(f"no column of the results: {sorted(unknown)}")
    return row | given


def append_result(path: Path, *rows: dict[str, Any]) -> None:
    """Append rows with the same columns to a CSV, under a lock, so that jobs of a cluster can share the file.

    If the file was written by an older version and lacks some of the columns, they are added, blank.

    Raises UserError if the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(rows[0])
    with FileLock(f"{path}.lock"):
        is_new = not path.is_file()
        if not is_new:
            header, old = _read(path)
            if set(header) < set(columns):
                write_csv(path, columns, ([row.get(column, "") for column in columns] for row in old))
            elif header != columns:
                raise UserError(f"the columns of {path} are not those of this version: move it away and run again")
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(
                [*([columns] if is_new else []), *([row[column] for column in columns] for row in rows)]
            )


def read_results(path: Path) -> list[dict[str, str]]:
    """Every row of the results. Raises UserError if there are none."""
    if not path.is_file():
        raise UserError(f"no results {path}: scripts 07, 08 and 10 append to it")
    return _read(path)[1]


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        return list(reader.fieldnames or ()), rows


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV with a header, whole or not at all."""
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
