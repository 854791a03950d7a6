"""`probe_results.csv`: one row per run, written by several jobs at once, several versions, and processes that were killed."""

import csv
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import dncbm.runs.results
from dncbm.runs.results import (
    COLUMNS,
    KEY,
    METRICS,
    SETTINGS,
    check_results,
    read_results,
    result_row,
    save_results,
    text_table,
)

RUN = {"probe_dataset": "mine", "method": "probe", "on": "concepts", "encoder": "enc", "hook": "out", "sae_dataset": "cc3m"}
RUN |= {"sae": "ef8", "probe": "p", "solver": "adam", "seed": "49"}


def row(top1: float = 0.5, **settings: Any) -> dict[str, str]:
    return result_row({**RUN, **settings}, {"val_top1": top1})


def short(rows: list[dict[str, str]], *columns: str) -> list[tuple[str, ...]]:
    return [tuple(found[column] for column in columns) for found in rows]


def test_a_row_has_every_column_and_no_other() -> None:
    found = result_row({"method": "probe", "encoder": "a\nb"}, {"val_top1": 1 / 3})
    assert tuple(found) == SETTINGS + METRICS
    assert (found["method"], found["val_top1"], found["val_top5"], found["encoder"]) == ("probe", "0.333333", "", "a b")
    assert found["time"].endswith("+00:00")
    with pytest.raises(KeyError, match="vall"):
        result_row({}, {"vall_top1": 0.5})


@pytest.mark.parametrize("column", KEY)
def test_a_run_has_one_row(tmp_path: Path, column: str) -> None:
    """Also after it was killed between its row and its manifest. Another value of a column of KEY is another run."""
    path = tmp_path / "probe" / "probe_results.csv"
    save_results(path, row(0.1), row(0.2, **{column: 'other, "x"'}))
    save_results(path, row(0.3, probe_lr=7, time="later"))
    save_results(path, row(0.3, probe_lr=7, time="later"))
    found = read_results(path)
    assert short(found, "val_top1", "time") == [("0.2", found[0]["time"]), ("0.3", "later")], "the last run stands last"
    assert found[0][column] == 'other, "x"'


def test_rows_of_an_evaluation_that_it_no_longer_has_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "probe_results.csv"
    kinds = ("concepts", "named", "features")
    others = [row(0.5, method="probe"), row(0.5, method="nec", on="named", seed="50"), row(0.5, method="nec", sae="other")]
    save_results(path, *(row(0.1, method="nec", on=on) for on in kinds), *others, replaces={"method": "no such"})
    assert len(read_results(path)) == 6
    save_results(
        path, *(row(0.2, method="nec", on=on) for on in kinds[::2]), replaces={"method": "nec", "sae": "ef8", "seed": "49"}
    )
    found = read_results(path)
    assert found[:3] == others
    assert short(found[3:], "on", "val_top1") == [("concepts", "0.2"), ("features", "0.2")]


def save_many(path: Path, job: int) -> None:
    for i in range(50):
        save_results(path, row(job, probe=f"{job}, {i}"))


@pytest.mark.slow
def test_jobs_that_write_at_once_lose_no_row(tmp_path: Path) -> None:
    path = tmp_path / "probe_results.csv"
    jobs = [multiprocessing.get_context("fork").Process(target=save_many, args=(path, job)) for job in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]
    assert sorted(short(read_results(path), "probe")) == sorted((f"{job}, {i}",) for job in range(2) for i in range(50))


def test_a_lock_that_nobody_gives_back_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(dncbm.runs.results, "LOCK_S", 0.1)
    path = tmp_path / "probe_results.csv"
    with FileLock(f"{path}.lock"):
        save_results(path, row())
    assert "cannot be locked" in caplog.text
    assert len(read_results(path)) == 1


OLD = "probe_dataset,on,encoder,sae,seed,val_top1,val_anec_avg"
TORN = {
    "in a line": ["mine,concepts,enc,ef8,1,0.25,", "mine,conc"],
    "in a quoted value": ["mine,concepts,enc,ef8,1,0.25,", 'mine,"conc'],
    "in the last value": ["mine,concepts,enc,ef8,1,0.25,", "mine,concepts,enc,ef8,2,0.5,0.1"],
    "and the next row joined on": ["mine,conmine,concepts,enc,ef8,3,0.5,0.1", "mine,concepts,enc,ef8,1,0.25,", ""],
    "in a number": ["mine,concepts,enc,ef8,2,0.5mine,", "mine,concepts,enc,ef8,1,0.25,", ""],
    "in no value": ["mine,concepts,enc,ef8,1,0.25,"],
}


@pytest.mark.parametrize("lines", TORN.values(), ids=TORN)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_half_written_row_is_left_out_and_takes_no_other_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lines: list[str], end: str
) -> None:
    path = tmp_path / "probe_results.csv"
    path.write_text(end.join([OLD, *lines]), newline="")
    expected = [("mine", "probe", "adam", "1", "0.25", "")]
    columns = ("probe_dataset", "method", "solver", "seed", "val_top1", "val_anec_avg")
    assert short(read_results(path), *columns) == expected
    damaged = len(lines) > 1
    assert ("line" in caplog.text and str(path) in caplog.text) == damaged
    save_results(path, row(0.75))
    caplog.clear()
    assert short(read_results(path), *columns) == [*expected, ("mine", "probe", "adam", "49", "0.75", "")]
    assert not caplog.text, "it is gone for good"
    with path.open(newline="") as file:
        assert next(csv.reader(file)) == list(COLUMNS)


FOREIGN = {
    "the authors', without a header": "clip_RN50,out,cc3m,features,cifar10,0.01,512,200,nobias,CE,L1,1.0,199,0.3412,0.87\n",
    "other columns": "probe_dataset,on,encoder,colour\nmine,concepts,enc,red\n",
    "too few columns": "probe_dataset,on\nmine,concepts\n",
    "a column twice": f"{OLD},on\n",
    "another separator": OLD.replace(",", ";"),
    "not text": b"\xff\xfe\x00\x01",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_anything_else_is_refused_and_left_alone(tmp_path: Path, refusal, content: str | bytes) -> None:
    path = tmp_path / "probe_results.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    before = path.read_bytes()
    for ask in (check_results, read_results, lambda path: save_results(path, row())):
        with refusal(path, "move it away"):
            ask(path)
    assert path.read_bytes() == before


def test_a_folder_in_the_files_place_is_refused(tmp_path: Path, refusal) -> None:
    with refusal(tmp_path, "move it away"):
        check_results(tmp_path)


@pytest.mark.parametrize("content", ["", "\ufeff", "\r\n"])
def test_an_empty_file_is_a_new_one(tmp_path: Path, refusal, content: str) -> None:
    path = tmp_path / "probe_results.csv"
    check_results(path)
    path.write_text(content, encoding="utf-8", newline="")
    check_results(path)
    with refusal("no results in", path):
        read_results(path)
    save_results(path, row())
    assert len(read_results(path)) == 1


def test_results_that_a_spreadsheet_saved_are_read(tmp_path: Path) -> None:
    """With a byte order mark, and columns in another order."""
    path = tmp_path / "probe_results.csv"
    columns = [*COLUMNS[5:], *COLUMNS[:5]]
    path.write_text(",".join(columns) + "\n" + ",".join(row()[column] for column in columns) + "\n", encoding="utf-8-sig")
    save_results(path, row(0.75))
    assert short(read_results(path), "val_top1") == [("0.75",)]


def test_rows_of_an_older_version_are_those_of_now(tmp_path: Path) -> None:
    """It knew one method and solver, and named an SAE for raw features; a run that it wrote twice counts once."""
    path = tmp_path / "probe_results.csv"
    lines = [
        f"mine,{on},enc,{sae},49,{top1},"
        for on, sae, top1 in (("features", "a", 1), ("features", "b", 2), ("concepts", "a", 3))
    ]
    path.write_text("\n".join([OLD, *lines, ""]))
    assert short(read_results(path), "on", "method", "solver", "sae", "val_top1") == [
        ("features", "probe", "adam", "", "2"),
        ("concepts", "probe", "adam", "a", "3"),
    ]


def test_missing_results_are_named(tmp_path: Path, refusal) -> None:
    with refusal(tmp_path / "probe_results.csv", "07"):
        read_results(tmp_path / "probe_results.csv")


def test_text_tables_align() -> None:
    assert text_table(("a", "bb"), [("long", "1"), ("x", "-22")]) == "a      bb\nlong    1\nx     -22"
