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
    published_at_ncc,
    published_cells,
    published_figures,
    write_results_table,
)
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import BestRuns, NamedSAE, ProbeRun, paper_preset
from dncbm.runs.manifests import Outcome
from dncbm.runs.results import result_row, save_results
from dncbm.runs.settings import Settings
from sparse_autoencoder.declare import build


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
    (cell,) = our_cells([row(val_top1=0.1, seed=1, sae="sae_a_seed12", probe="probe_a_seed1")], "clip_RN50")
    assert cell.source == "out, sae_a_seed12, probe_a", "an SAE of another seed than the probe's"


RELU = "lr0.0005_l1coeff3e-05_ef8_rf10"
TOPK, TOPK_EF4 = "lr0.0005_topk8_ef8_rf10", "lr0.0005_topk8_ef4_rf10"


def nec(sae: str, top1: float, on: str = "concepts", **more) -> dict:
    return row(method="nec", on=on, solver="prox", probe="", sae=sae, val_anec_5=top1, val_anec_avg=top1 / 2, **more)


def shown(rows: list[dict], best_by: str = "train_val") -> list[tuple]:
    return [(cell.title, cell.dataset, round(cell.top1, 6)) for cell in our_cells(rows, "clip_RN50", best_by)]


def test_settings_are_chosen_by_train_val_and_never_by_val() -> None:
    rows = [
        row(val_top1=0.7, train_val_top1=0.9, probe="lr1_good"),
        row(val_top1=0.8, train_val_top1=0.6, probe="lr1_lucky"),
        row(val_top1=0.6, train_val_top1=0.8, probe="lr1_last"),
        row(val_top1=0.9, probe="lr1_unknown"),
    ]
    (cell,) = our_cells(rows, "clip_RN50")
    assert (cell.top1, cell.deviation, cell.source) == (pytest.approx(70), None, "out, sae_a, lr1_good")
    assert (cell.title, cell.chosen) == ("DN-CBM", "best of 4: probe good")
    (cell,) = our_cells(rows, "clip_RN50", "last")
    assert (cell.top1, cell.chosen) == (pytest.approx(90), "last of 4: probe unknown")
    assert shown(rows, "none") == [
        ("DN-CBM (probe good)", "cifar10", 70), ("DN-CBM (probe lucky)", "cifar10", 80),
        ("DN-CBM (probe last)", "cifar10", 60), ("DN-CBM (probe unknown)", "cifar10", 90),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("cross_entropies", "expected"), [((0.5, 0.4, 0.6), 1), ((0.5, 0.4, 0.4), 2), ((None,) * 3, 2), ((None, 9.0, None), 1)]
)
def test_ties_go_to_the_lower_cross_entropy_and_then_to_the_later_run_and_are_said(cross_entropies, expected: int) -> None:
    rows = [
        row(val_top1=number / 10, train_val_top1=0.5, probe=f"p_{number}", **({} if ce is None else {"train_val_ce": ce}))
        for number, ce in enumerate(cross_entropies)
    ]
    worse = row(val_top1=0.9, train_val_top1=0.4, train_val_ce=0.1, probe="p_worse")
    (cell,) = our_cells([*rows, worse], "clip_RN50")
    assert (cell.top1, cell.chosen) == (pytest.approx(10 * expected), f"best of 4, 3 equal: probe {expected}")


def test_a_row_is_one_sae_and_one_probe() -> None:
    """Variants are named. Where the best differs by data set, rows stand apart with what differs, and NEC goes with them."""
    rows = [
        row(sae=RELU, sae_type="relu", val_top1=0.1, train_val_top1=0.9),
        row(sae=TOPK, val_top1=0.2, train_val_top1=0.5),
        row(sae=TOPK_EF4, sae_type="topk", val_top1=0.3, train_val_top1=0.6),
        row("cifar100", sae=TOPK, val_top1=0.4, train_val_top1=0.6),
        row("cifar100", sae=TOPK_EF4, sae_type="topk", val_top1=0.5, train_val_top1=0.5),
        row("cifar100", sae="lr0.0005_matryoshka_batchtopk8_ef8", val_top1=0.6, train_val_top1=0.5),
        row("cifar100", sae="lr0.0005_jumprelu1e-05_ef8", val_top1=0.7, train_val_top1=0.5),
        nec(TOPK_EF4, 0.01), nec(RELU, 0.02), nec(TOPK, 0.03), nec(TOPK, 0.04, "random"), nec(TOPK_EF4, 0.05, "random"),
    ]  # fmt: skip
    expected = [
        ("DN-CBM", "cifar10", 10),
        ("TopK SAE (ef4)", "cifar10", 30),
        ("TopK SAE (ef8)", "cifar100", 40),
        ("Matryoshka SAE", "cifar100", 60),
        ("JumpReLU SAE", "cifar100", 70),
        ("ANEC-5, concepts (TopK SAE ef4)", "cifar10", 1),
        ("ANEC-5, concepts (DN-CBM)", "cifar10", 2),
        ("ANEC-5, random directions (TopK SAE ef4)", "cifar10", 5),
    ]
    found = shown(rows)
    assert found[:5] == expected[:5]
    assert sorted(found[5:8]) == sorted(expected[5:])
    everything = [title for title, *_ in shown(rows, "none")]
    assert everything.count("TopK SAE (ef8)") == everything.count("TopK SAE (ef4)") == 2
    assert ("ANEC-5, concepts (TopK SAE ef8)", "cifar10", 3) in shown(rows, "none")


def test_the_papers_probes_are_one_row_although_they_differ_by_data_set() -> None:
    places, cifar = (
        build(ProbeRun, paper_preset(dataset) | {"probe_dataset": dataset}).config_name for dataset in ("places365", "cifar10")
    )
    assert places != cifar
    rows = [row("places365", probe=places, val_top1=0.5), row(probe=cifar, val_top1=0.6)]
    assert [title for title, *_ in shown(rows)] == ["DN-CBM", "DN-CBM"]
    with_another = shown([*rows, row("mine", probe="lr9_bs1", val_top1=0.6)])
    assert [title for title, *_ in with_another] == ["DN-CBM (probe the paper's)"] * 2 + ["DN-CBM (probe lr9 bs1)"]


def test_without_another_row_the_last_accuracy_at_nec_counts() -> None:
    rows = [nec("sae_b", 0.1), nec("sae_a", 0.2), nec("sae_b", 0.3)]
    assert shown(rows) == [("ANEC-5, concepts", "cifar10", 30), ("ANEC-avg, concepts", "cifar10", 15)]


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


def test_accuracies_at_ncc_stand_beside_the_published_whatever_the_encoder() -> None:
    """Where ours are of a data set of which one is published; controls at NCC only as far as the table has them."""
    at_ncc = {"val_anec_5": 0.5, "val_anec_avg": 0.6, "val_ancc_5": 0.4, "val_ancc_avg": 0.45}
    rows = [
        row(dataset, method="nec", on=on, solver="prox", probe="", **at_ncc)
        for dataset in ("imagenet", "mine")
        for on in ("concepts", "named", "random", "shuffled")
    ]
    ours = our_cells(rows, "clip_RN50")
    of_mine = [cell.method for cell in ours if cell.dataset == "mine"]
    kinds = ("concepts", "named concepts", "random directions", "shuffled concepts")
    shown = [(name, kinds if name.startswith("ANEC") else kinds[::2]) for name in ("ANEC-5", "ANEC-avg", "ANCC-5", "ANCC-avg")]
    assert of_mine == [f"{name}, {kind}" for name, of in shown for kind in of]
    figures = published_figures()
    theirs = published_at_ncc(figures, ours)
    assert [(cell.encoder, cell.method, cell.dataset, cell.written, cell.ours) for cell in theirs] == [
        ("clip_RN50", "ANCC-5, concepts", "imagenet", "46.71", False),
        ("clip_RN50", "ANCC-avg, concepts", "imagenet", "57.24", False),
    ]
    lines = markdown("clip_RN50", [*ours, *theirs], figures["sources"]).splitlines()
    place = lines.index("| ANCC-5, concepts | published | 46.7 [S6] |  |")
    assert lines[place + 1] == "| ANCC-5, concepts | ours | 40.0 | 40.0 |"
    assert lines[place - 1].startswith("| ANEC-avg, shuffled concepts")
    assert any(line.startswith("[S6]") and "M-CBM" in line and "second-hand" in line for line in lines)
    assert published_at_ncc(figures, our_cells([nec("sae_a", 0.2)], "clip_RN50")) == []


CELLS = [
    Cell("e", "DN-CBM", "cifar10", False, 87.6, source="S1"),
    Cell("e", "DN-CBM", "my_set", False, 50.04, source="S4: on a tenth"),
    Cell("e", "DN-CBM", "cifar10", True, 86.94, 0.31, 3, "out, a"),
    Cell("e", "ANEC-5, concepts", "cifar10", True, 60.0),
    Cell("e", "Zero-shot", "my_set", True, 40.0),
    Cell("e", "TopK SAE", "my_set", True, 45.0, settings="ef4; probe a|b", chosen="best of 3: ef4"),
]


def test_markdown() -> None:
    lines = markdown("e", CELLS, {"S1": "a table", "S4": "a reproduction"}).splitlines()
    assert lines[2:] == [
        "| method | | cifar10 | my_set |",
        "| --- | --- | --- | --- |",
        "| Zero-shot | ours |  | 40.0 |",
        "| DN-CBM | published | 87.6 [S1] | 50.0 [S4] |",
        "| DN-CBM | ours | 86.9 ± 0.3 |  |",
        "| TopK SAE (ef4; probe a\\|b) | ours |  | 45.0 |",
        "| ANEC-5, concepts | ours | 60.0 |  |",
        "",
        "[S1] a table.  ",
        "[S4] a reproduction; DN-CBM on my_set on a tenth.  ",
        "[ours] Of several settings, those with the best top-1 on train_val (of equal ones, that with the lower cross-entropy "
        "there, then the later): TopK SAE (ef4; probe a|b) on my_set (best of 3: ef4).",
    ]


def test_csv_and_latex() -> None:
    lines = list(csv.DictReader(as_csv(CELLS).splitlines()))
    assert [line["top1_percent"] for line in lines] == ["87.6", "50.04", "86.94", "60", "40", "45"]
    assert [line["by"] for line in lines] == ["published"] * 2 + ["ours"] * 4
    assert (lines[2]["deviation"], lines[2]["seeds"], lines[1]["source"]) == ("0.31", "3", "S4: on a tenth")
    assert (lines[5]["method"], lines[5]["settings"], lines[5]["chosen"]) == ("TopK SAE", "ef4; probe a|b", "best of 3: ef4")
    text = latex("e", CELLS).splitlines()
    assert text[1] == r"\begin{tabular}{llrr}"
    assert r"method &  & cifar10 & my\_set \\" in text
    assert r"DN-CBM & ours & 86.9 $\pm$ 0.3 &  \\" in text
    assert r"DN-CBM & published & 87.6 & 50.0 \\" in text
    strange = Cell("e", "m", r"a\b~{c}^$d", True, 1.0)
    assert r"method &  & a\textbackslash{}b\textasciitilde{}\{c\}\textasciicircum{}\$d \\" in latex("e", [strange])


def test_the_table_is_printed_and_written(make_settings: Callable[..., Settings], refusal, capsys) -> None:
    settings = make_settings()
    artifacts = Artifacts(settings)
    with refusal(artifacts.probe_results()):
        write_results_table(settings)
    save_results(artifacts.probe_results(), row(val_top1=0.875), row(dataset="mine", val_top1=0.5))
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
    save_results(artifacts.probe_results(), row(val_top1=0.9, encoder="clip_ViT-B/16"))
    assert write_results_table(settings) is Outcome.RAN
    text = artifacts.results_table("md").read_text(encoding="utf-8")
    assert text.index("### clip_RN50") < text.index("### clip_ViT-B/16")


def test_an_sae_is_chosen_by_its_folder_name(make_settings: Callable[..., Settings], refusal) -> None:
    settings = make_settings()
    artifacts = Artifacts(settings)
    rows = [
        row(sae=RELU, val_top1=0.1, train_val_top1=0.9),
        row(sae=TOPK, val_top1=0.2),
        row(on="features", sae="", val_top1=0.3),
    ]
    save_results(artifacts.probe_results(), *rows, nec(RELU, 0.4), nec(TOPK, 0.5))
    with refusal("--sae other", RELU, TOPK):
        write_results_table(settings, NamedSAE("other"))
    for sae, best_by, expected in (
        (RELU, "none", ["Linear probe", "DN-CBM", "ANEC-5, concepts", "ANEC-avg, concepts"]),
        (TOPK, "train_val", ["Linear probe", "TopK SAE", "ANEC-5, concepts", "ANEC-avg, concepts"]),
    ):
        write_results_table(settings, NamedSAE(sae), BestRuns(best_by))
        lines = csv.DictReader(artifacts.results_table("csv").read_text().splitlines())
        assert sorted(line["method"] for line in lines if line["by"] == "ours") == sorted(expected)


def test_strange_results_make_a_table_or_one_line(make_settings: Callable[..., Settings], refusal) -> None:
    """Names that are not UTF-8, figures that are unknown, and methods of a version to come."""
    settings = make_settings()
    path = Artifacts(settings).probe_results()
    rows = [row("b\udcff|d"), row(val_top1=float("nan")), row(method="to_come", on="x", val_top1=1), row(sae="", val_top1=0.5)]
    save_results(path, *rows)
    write_results_table(settings)
    path.write_text("clip_RN50,out,cc3m\n")
    with refusal(path, "move it away"):
        write_results_table(settings)
