"""`probe_results.csv`: rows appended by several jobs at once, and by several versions."""

import csv
import multiprocessing
import time
from pathlib import Path
from typing import Any, TextIO

import pytest

from dncbm.runs.results import METRICS, SETTINGS, append_result, read_results, result_row


def append_many(path: Path, job: int) -> None:
    for i in range(25):
        append_result(path, {"job": job, "row": i, "text": f'comma, "quote" {job}'})


def test_jobs_that_append_at_once_lose_no_row(tmp_path: Path, monkeypatch) -> None:
    writer = csv.writer

    def slowly(file: TextIO) -> Any:
        if file.tell() == 0:
            time.sleep(0.3)  # without a lock, every job would meanwhile find no header
        return writer(file)

    monkeypatch.setattr(csv, "writer", slowly)
    path = tmp_path / "probe" / "probe_results.csv"
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=append_many, args=(path, job)) for job in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0] * 4
    rows = read_results(path)
    assert sorted((int(row["job"]), int(row["row"])) for row in rows) == [(j, i) for j in range(4) for i in range(25)]
    assert all(row["text"] == f'comma, "quote" {row["job"]}' for row in rows)


def test_results_of_other_columns_are_refused(tmp_path: Path, refusal) -> None:
    path = tmp_path / "probe_results.csv"
    append_result(path, {"a": 1, "b": 2})
    before = path.read_text()
    for row in ({"a": 1, "c": 2}, {"b": 1, "a": 2}):
        with refusal(path, "move it away"):
            append_result(path, row)
    assert path.read_text() == before


def test_results_of_an_older_version_get_the_new_columns(tmp_path: Path) -> None:
    path = tmp_path / "probe_results.csv"
    append_result(path, {"a": 1, "c": "x, y"})
    append_result(path, {"a": 2, "b": 3, "c": 4})
    append_result(path, {"a": 5, "b": 6, "c": 7}, {"a": 8, "b": 9, "c": 10})
    assert read_results(path) == [
        {"a": "1", "b": "", "c": "x, y"},
        {"a": "2", "b": "3", "c": "4"},
        {"a": "5", "b": "6", "c": "7"},
        {"a": "8", "b": "9", "c": "10"},
    ]


def test_an_empty_file_gets_a_header(tmp_path: Path) -> None:
    path = tmp_path / "probe_results.csv"
    path.touch()
    append_result(path, {"a": 1})
    assert read_results(path) == [{"a": "1"}]


def test_a_row_has_every_column_and_no_other() -> None:
    row = result_row({"method": "probe"}, {"val_top1": 1 / 3})
    assert tuple(row) == SETTINGS + METRICS
    assert (row["method"], row["val_top1"], row["val_top5"]) == ("probe", "0.333333", "")
    assert row["time"].endswith("+00:00")
    with pytest.raises(KeyError, match="vall"):
        result_row({}, {"vall_top1": 0.5})


def test_missing_results_are_named(tmp_path: Path, refusal) -> None:
    with refusal(tmp_path / "probe_results.csv", "07"):
        read_results(tmp_path / "probe_results.csv")
