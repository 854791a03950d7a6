"""The paper's table: which rows of the results it shows, and how."""

import csv
import statistics
from collections.abc import Callable

import pytest

from dncbm.probe.results_table import (
    Cell,
    as_csv,
    latex,
    markdown,
    our_cells,
    published_cells,
    published_figures,
    write_results_table,
)
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.manifests import Outcome
from dncbm.runs.results import append_result, result_row
from dncbm.runs.settings import Settings


def row(dataset: str = "cifar10", method: str = "probe", on: str = "concepts", solver: str = "adam", **more) -> dict:
    """A row of the results as it is read: text."""
    settings = {"probe_dataset": dataset, "method": method, "on": on, "encoder": "clip_RN50", "hook": "out"}
    settings |= {"solver": solver, "seed": 49, "sae": "sae_a", "probe": "probe_a"}
    metrics = {key: more.pop(key) for key in list(more) if key.startswith(("val", "train_val"))}
    return {key: str(value) for key, value in result_row(settings | more, metrics).items()}


def test_published_figures_keep_their_provenance_and_blanks() -> None:
    figures = published_figures()
    values = [
        value for methods in figures["accuracy"].values() for by_dataset in methods.values() for value in by_dataset.values()
    ]
    assert None in values
    for value in values:
        if value is not None:
            number, source = value
            assert 30 < number < 95
            assert source.split(":")[0] in figures["sources"]
    cells = published_cells(figures, "clip_RN50")
    assert all(cell.source for cell in cells)
    assert not [cell for cell in cells if (cell.method, cell.dataset) == ("LaBo", "places365")]
    (ours,) = [cell for cell in cells if (cell.method, cell.dataset) == ("DN-CBM", "imagenet")]
    assert (ours.top1, ours.source, ours.ours) == (72.9, "S1", False)
    assert published_cells(figures, "unheard_of") == []


def test_seeds_are_a_mean_and_a_deviation() -> None:
    rows = [
        row(val_top1=0.1, train_val_top1=0.5),  # run again below
        row(val_top1=0.80, train_val_top1=0.5),
        row(val_top1=0.84, train_val_top1=0.5, seed=1, sae="sae_a_seed1", probe="probe_a_seed1"),
        row(val_top1=0.81, train_val_top1=0.5, seed=2, sae="sae_a_seed2", probe="probe_a_seed2"),
    ]
    (cell,) = our_cells(rows, "clip_RN50")
    assert (cell.method, cell.dataset, cell.seeds, cell.ours) == ("DN-CBM", "cifar10", 3, True)
    assert cell.top1 == pytest.approx(statistics.mean([80, 84, 81]))
    assert cell.deviation == pytest.approx(statistics.stdev([80, 84, 81]))
    assert our_cells(rows, "clip_ViT-B/16") == []


def test_settings_are_chosen_by_train_val() -> None:
    rows = [
        row(val_top1=0.7, train_val_top1=0.9, probe="good"),
        row(val_top1=0.8, train_val_top1=0.6, probe="lucky"),
        row(val_top1=0.6, train_val_top1=0.8, probe="last"),
    ]
    (cell,) = our_cells(rows, "clip_RN50")
    assert (cell.top1, cell.deviation, cell.source) == (pytest.approx(70), None, "out, sae_a, good")


def test_of_settings_that_train_val_does_not_tell_apart_the_last_run_counts() -> None:
    nec = {"method": "nec", "solver": "prox", "val_anec_avg": 0.5}
    rows = [row(**nec, sae=sae, val_anec_5=top1) for sae, top1 in (("a", 0.1), ("b", 0.3), ("a", 0.2))]
    assert [cell.top1 for cell in our_cells(rows, "clip_RN50")] == pytest.approx([20, 50])


def test_every_kind_of_row_has_its_line() -> None:
    rows = [
        row(method="zero_shot", on="features", solver="", val_top1=0.1),
        row(on="features", val_top1=0.2),
        row(on="features", solver="prox", val_top1=0.25),
        row(val_top1=0.3),
        row(solver="prox", val_top1=0.4),
        row(method="nec", solver="prox", val_anec_5=0.5, val_anec_avg=0.6),
        row(method="nec", on="random", solver="prox", val_anec_5=0.05, val_anec_avg=0.06),
    ]
    found = {cell.method: round(cell.top1, 6) for cell in our_cells(rows, "clip_RN50")}
    assert found == {
        "Zero-shot": 10, "Linear probe": 20, "Linear probe, exact zeros": 25, "DN-CBM": 30, "DN-CBM, exact zeros": 40,
        "ANEC-5, concepts": 50, "ANEC-5, random directions": 5, "ANEC-avg, concepts": 60, "ANEC-avg, random directions": 6,
    }  # fmt: skip
    old = {key: value for key, value in row(val_top1=0.3).items() if key not in ("method", "solver")}
    assert [cell.method for cell in our_cells([old], "clip_RN50")] == ["DN-CBM"]


def test_the_baseline_is_one_cell_whether_or_not_its_row_names_an_sae() -> None:
    """Rows of before name the SAE whose flags were given, on which the baseline does not depend; the last run counts."""
    probe = {"on": "features", "probe": "p", "train_val_top1": 0.5}
    old = [row(**probe, sae_dataset="cc3m", sae=sae, val_top1=top1) for sae, top1 in (("sae_a", 0.1), ("sae_b", 0.2))]
    new = row(**probe, sae_dataset="", sae="", val_top1=0.7)
    for rows, top1 in (([new], 70), ([*old, new], 70), ([new, *old], 20), (old, 20)):
        (cell,) = our_cells(rows, "clip_RN50")
        assert (cell.method, cell.top1, cell.seeds) == ("Linear probe", pytest.approx(top1), 1)
        assert cell.source == "out, p"
    seeds = [*old, new, row(**probe | {"probe": "p_seed1"}, sae_dataset="", sae="", val_top1=0.5, seed=1)]
    (cell,) = our_cells(seeds, "clip_RN50")
    assert (cell.top1, cell.seeds) == (pytest.approx(60), 2)


CELLS = [
    Cell("e", "DN-CBM", "cifar10", False, 87.6, source="S1"),
    Cell("e", "DN-CBM", "my_set", False, 50.04, source="S4: on a tenth"),
    Cell("e", "DN-CBM", "cifar10", True, 86.94, 0.31, 3, "out, a"),
    Cell("e", "ANEC-5, concepts", "cifar10", True, 60.0),
    Cell("e", "Zero-shot", "my_set", True, 40.0),
]


def test_markdown() -> None:
    lines = markdown("e", CELLS, {"S1": "a table", "S4": "a reproduction"}).splitlines()
    assert lines[2:] == [
        "| method | | cifar10 | my_set |",
        "| --- | --- | --- | --- |",
        "| Zero-shot | ours |  | 40.0 |",
        "| DN-CBM | published | 87.6 [S1] | 50.0 [S4] |",
        "| DN-CBM | ours | 86.9 ± 0.3 |  |",
        "| ANEC-5, concepts | ours | 60.0 |  |",
        "",
        "[S1] a table.  ",
        "[S4] a reproduction; DN-CBM on my_set on a tenth.",
    ]


def test_csv_and_latex() -> None:
    lines = list(csv.DictReader(as_csv(CELLS).splitlines()))
    assert [line["top1_percent"] for line in lines] == ["87.6", "50.04", "86.94", "60", "40"]
    assert [line["by"] for line in lines] == ["published", "published", "ours", "ours", "ours"]
    assert (lines[2]["deviation"], lines[2]["seeds"], lines[1]["source"]) == ("0.31", "3", "S4: on a tenth")
    text = latex("e", CELLS).splitlines()
    assert text[1] == r"\begin{tabular}{llrr}"
    assert r"method &  & cifar10 & my\_set \\" in text
    assert r"DN-CBM & ours & 86.9 $\pm$ 0.3 &  \\" in text
    assert r"DN-CBM & published & 87.6 & 50.0 \\" in text


def test_the_table_is_printed_and_written(make_settings: Callable[..., Settings], refusal, capsys) -> None:
    settings = make_settings()
    artifacts = Artifacts(settings)
    with refusal(artifacts.probe_results()):
        write_results_table(settings)
    append_result(artifacts.probe_results(), row(val_top1=0.875), row(dataset="mine", val_top1=0.5))
    assert write_results_table(settings, device="cpu", overwrite=False) is Outcome.RAN
    text = artifacts.results_table("md").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert text in printed
    assert all(str(artifacts.results_table(suffix)) in printed for suffix in ("md", "csv", "tex"))
    assert "### clip_RN50" in text
    assert "| DN-CBM | published | 72.9 [S1] | 53.5 [S1] | 87.6 [S1] | 67.5 [S1] |  |" in text
    assert "| DN-CBM | ours |  |  | 87.5 |  | 50.0 |" in text
    assert "| LaBo | published | 68.9 [S1] |  | 87.9 [S1] | 69.1 [S1] |  |" in text
    assert "ViT" not in text
    assert artifacts.results_table("csv").read_text().startswith("encoder,method,by,dataset")
    assert artifacts.results_table("tex").read_text().count("\\end{tabular}") == 1
    append_result(artifacts.probe_results(), row(val_top1=0.9, encoder="clip_ViT-B/16"))
    assert write_results_table(settings) is Outcome.RAN
    text = artifacts.results_table("md").read_text(encoding="utf-8")
    assert text.index("### clip_RN50") < text.index("### clip_ViT-B/16")
