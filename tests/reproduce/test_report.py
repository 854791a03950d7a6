"""The tables that a plan ends with: which results they hold, what they are compared with, and when a difference counts."""

import csv
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dncbm.concepts.naming import ConceptName, read_names, write_names
from dncbm.probe.intervention_stage import edit_name, factors_asked
from dncbm.probe.results_table import published_figures
from dncbm.probe.stage import probe_row
from dncbm.reproduce.plan import BIRDS
from dncbm.reproduce.report import Figure, Ours, Published, Table, latex, markdown, write_report
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Intervention, ProbeRun, SAERun, paper_preset
from dncbm.runs.manifests import making
from dncbm.runs.results import result_row, save_results, write_csv
from dncbm.runs.settings import Settings
from sparse_autoencoder import VARIANTS, TrainingSettings
from sparse_autoencoder.declare import build

SEEDS = (49, 50, 51)
Line = dict[str, str]


def sae(seed: int = 49, encoder: str = "clip_RN50", **more: Any) -> SAERun:
    return SAERun(encoder=encoder, training=TrainingSettings(seed=seed), **more)


def probe(dataset: str, seed: int = 49, **more: Any) -> ProbeRun:
    return build(ProbeRun, paper_preset(dataset) | {"probe_dataset": dataset, "seed": seed} | more)


def nec_row(run: SAERun, dataset: str, on: str, anec_5: float, average: float) -> Line:
    about = {"probe_dataset": dataset, "method": "nec", "on": on, "encoder": run.encoder, "hook": run.hook, "solver": "prox"}
    about |= {"sae_dataset": run.dataset, "sae": run.config_name, "sae_type": run.sparsity.kind, "seed": run.training.seed}
    return result_row(about, {"val_anec_5": anec_5, "val_anec_avg": average})


def lines_of(settings: Settings) -> list[Line]:
    with Artifacts(settings).reproduction_table("csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def cells(lines: Sequence[Line], table: str) -> dict[tuple[str, str, str, str], Line]:
    found = {(line["encoder"], line["row"], line["column"], line["by"]): line for line in lines if line["table"] == table}
    assert len(found) == sum(line["table"] == table for line in lines), "a line per cell"
    return found


def table_lines(text: str) -> Iterator[list[str]]:
    """The lines of each table of a Markdown file."""
    for block in text.split("\n\n"):
        if block.startswith("|"):
            yield block.splitlines()


# ------------------------------------------------------------------------------------------------------------ the mark


@pytest.mark.parametrize(("n", "digits"), [(2, 6), (3, 6), (5, 6), (3, 1)])
def test_one_of_twenty_runs_of_the_same_kind_is_marked(n: int, digits: int) -> None:
    """Of a normal effect of the seed, whatever its mean and deviation; rounding must not add marks."""
    draws = np.random.default_rng(n).normal(70, 0.05 if digits == 1 else 3, (3000, n + 1))
    marks = [Ours.of(draw[1:]).differs(Published("published", f"{draw[0]:.{digits}f}", "S1")) for draw in draws.tolist()]
    share = statistics.fmean(map(bool, marks))
    assert share < 0.02 if digits == 1 else share == pytest.approx(0.05, abs=0.012)


def test_a_difference_counts_beyond_the_interval_and_half_the_last_digit() -> None:
    ours = Ours.of([80.0, 81.0, 82.0])
    reach = 4.302652729911275 * np.sqrt(4 / 3)  # Student's 97.5 % quantile for 2 degrees of freedom; the deviation is 1
    low, high = ours.interval() or (0.0, 0.0)
    assert (low, high) == pytest.approx((81 - reach, 81 + reach))
    for written, is_beyond in (
        ("85.97", False),
        ("85.98", True),
        ("86.0", False),
        ("86.1", True),
        ("76.0", False),
        ("75", True),
    ):
        assert ours.differs(Published("published", written, "S1")) is is_beyond, written
    same = Ours.of([76.3, 76.3])
    found = {written: same.differs(Published("published", written, "S1")) for written in ("76.30", "76.31", "76", "76.4")}
    assert found == {"76.30": False, "76.31": True, "76": False, "76.4": True}
    assert Ours.of([80.0]).differs(Published("published", "10.0", "S1")) is None


def test_published_figures_name_their_sources_and_keep_their_digits() -> None:
    figures = published_figures()

    def found(value: Any) -> Iterator[list[Any]]:
        if isinstance(value, dict):
            for one in value.values():
                yield from found(one)
        elif isinstance(value, list):
            yield value

    for number, source in found({key: value for key, value in figures.items() if key not in ("about", "sources")}):
        assert source.split(":")[0] in figures["sources"]
        assert number > 0
    assert str(figures["waterbirds100_clip_RN50"]["landbird_on_water"][0]) == "76.30"
    assert set(figures["names"]) <= set(figures["accuracy"])


# ---------------------------------------------------------------------------------------------------------- the tables


def test_accuracies_of_the_plan_stand_beside_the_published(make_settings: Callable[..., Settings], capsys) -> None:
    """Three seeds of one encoder and one of another; rows of other runs do not count."""
    settings, top1 = make_settings(), {49: 0.800, 50: 0.801, 51: 0.805}
    of_vit, rows = sae(49, "clip_ViT-B/16"), []
    for seed in SEEDS:
        for dataset, lower in (("cifar10", 0.0), ("cifar100", 0.25)):
            found = {"val_top1": top1[seed] - lower, "train_val_top1": 0.5}
            rows.append(probe_row(sae(seed), probe(dataset, seed), found))
            linear = {"val_top1": (0.886, 0.888, 0.887)[seed - 49], "train_val_top1": 0.5}
            rows.append(probe_row(sae(seed), replace(probe(dataset, seed), on_features=True), linear))
        rows.append(nec_row(sae(seed), "cifar10", "concepts", top1[seed] / 2, top1[seed] / 4))
        rows.append(nec_row(sae(seed), "cifar10", "random", 0.1, 0.2))
    zero_shot = {"method": "zero_shot", "on": "features", "hook": "out"}
    rows.append(result_row(zero_shot | {"probe_dataset": "cifar10", "encoder": "clip_RN50"}, {"val_top1": 0.5}))
    rows.append(probe_row(of_vit, probe("cifar10"), {"val_top1": 0.9}))
    strangers = [
        probe_row(sae(52), probe("cifar10", 52), {"val_top1": 0.01}),  # a seed
        probe_row(sae(50), probe("cifar10", 51), {"val_top1": 0.02}),  # seeds of SAE and probe that no plan pairs
        probe_row(sae(expansion_factor=4), probe("cifar10"), {"val_top1": 0.03, "train_val_top1": 0.99}),
        probe_row(sae(), probe("cifar10", probe_lr=0.5), {"val_top1": 0.04, "train_val_top1": 0.99}),
        probe_row(sae(), replace(probe("cifar10", 52), on_features=True), {"val_top1": 0.05}),
        probe_row(sae(encoder="other"), probe("cifar10"), {"val_top1": 0.06}),
        probe_row(sae(), probe("cifar10"), {"val_top1": 0.07}, method="intervention", edit="remove1: edited"),
        nec_row(sae(52), "cifar10", "concepts", 0.08, 0.08), nec_row(sae(), "places365", "concepts", 0.08, 0.08),
        result_row(zero_shot | {"probe_dataset": "imagenet", "encoder": "clip_RN50"}, {"val_top1": 0.09}),
    ]  # fmt: skip
    save_results(Artifacts(settings).probe_results(), *rows, *strangers)
    saes = [*(sae(seed) for seed in SEEDS), of_vit]
    paths = write_report(
        settings, saes, [probe(dataset, seed) for seed in SEEDS for dataset in ("cifar100", "cifar10")], [], BIRDS
    )
    assert [path.name for path in paths] == ["tables.md", "tables.csv", "tables.tex"]
    text, printed = paths[0].read_text(encoding="utf-8"), capsys.readouterr().out
    assert all(part in printed for part in (text, *map(str, paths)))

    lines = lines_of(settings)
    assert {line["table"] for line in lines} == {"accuracy"}
    found = cells(lines, "accuracy")
    assert {key[1:] for key in found if key[0] == "clip_RN50"} == {
        ("Zero-shot", "cifar10", "published"),
        *(("Linear probe", dataset, "published") for dataset in ("cifar10", "cifar100")),
        *(("DN-CBM", dataset, by) for dataset in ("cifar10", "cifar100") for by in ("published", "reproduced")),
        *((f"{which}, {on}", "cifar10", "") for which in ("ANEC-5", "ANEC-avg") for on in ("concepts", "random directions")),
    }  # fmt: skip
    values = [80.0, 80.1, 80.5]
    for by, theirs in (("published", 87.6), ("reproduced", 86.71)):
        line = found["clip_RN50", "DN-CBM", "cifar10", by]
        assert float(line["ours"]) == pytest.approx(statistics.fmean(values), abs=1e-9)
        assert float(line["deviation"]) == pytest.approx(statistics.stdev(values), abs=1e-9)
        assert float(line["difference"]) == pytest.approx(statistics.fmean(values) - theirs, abs=1e-9)
        assert float(line["interval_high"]) < theirs
        assert (line["seeds"], line["published"], line["exceeds_seeds"]) == ("3", str(theirs), "true")
    near = found["clip_RN50", "Linear probe", "cifar10", "published"]
    assert (near["published"], near["exceeds_seeds"]) == ("88.7", "false")
    single = found["clip_RN50", "Zero-shot", "cifar10", "published"]
    assert (single["seeds"], single["deviation"], single["exceeds_seeds"]) == ("1", "", "")
    assert {key[1:]: found[key]["ours"] for key in found if key[0] == "clip_ViT-B/16"} == {("DN-CBM", "cifar10", ""): "90.0"}

    first = next(table_lines(text))
    assert [part.strip() for part in first[0].split("|")] == ["", "", "", "cifar100", "cifar10", ""]
    assert [" ".join(line.replace("|", " ").split()) for line in first[2:13]] == [
        "Zero-shot ours 50.0", "published 75.6 [S1]", "difference -25.6",
        "Linear probe ours 88.7 ± 0.1 (3) 88.7 ± 0.1 (3)", "published 70.3 [S1] 88.7 [S1]", "difference +18.4 * +0.0",
        "DN-CBM ours 55.2 ± 0.3 (3) 80.2 ± 0.3 (3)", "published 67.5 [S1] 87.6 [S1]", "difference -12.3 * -7.4 *",
        "reproduced 68.51 [S4] 86.71 [S4]", "difference -13.3 * -6.5 *",
    ]  # fmt: skip
    assert "One seed says nothing" in text


def test_accuracies_at_ncc_are_compared_with_the_published(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings()
    row = nec_row(sae(), "imagenet", "concepts", 0.5, 0.6) | {"val_ancc_5": "0.45", "val_ancc_avg": "0.56"}
    save_results(Artifacts(settings).probe_results(), row)
    (path, *_) = write_report(settings, [sae()], [probe("imagenet")], [], BIRDS)
    found = cells(lines_of(settings), "accuracy")
    line = found["clip_RN50", "ANCC-5, concepts", "imagenet", "published"]
    assert (line["published"], float(line["difference"])) == ("46.71", pytest.approx(45 - 46.71))
    assert found["clip_RN50", "ANCC-avg, concepts", "imagenet", "published"]["published"] == "57.24"
    assert "M-CBM" in path.read_text(encoding="utf-8")


def test_of_a_sweep_the_best_on_train_val_is_shown(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings()
    good, lucky = ({"sparsity": VARIANTS["relu"](l1_coeff)} for l1_coeff in (1e-5, 3e-5))
    rows = []
    for seed in (49, 50):
        rows.append(probe_row(sae(seed, **good), probe("cifar10", seed), {"val_top1": 0.5, "train_val_top1": 0.9}))
        rows.append(probe_row(sae(seed, **lucky), probe("cifar10", seed), {"val_top1": 0.9, "train_val_top1": 0.8}))
    save_results(Artifacts(settings).probe_results(), *rows)
    saes = [sae(seed, **one) for one in (good, lucky) for seed in (49, 50)]
    (path, *_) = write_report(settings, saes, [probe("cifar10", seed) for seed in (49, 50)], [], BIRDS)
    assert {(line["ours"], line["seeds"]) for line in lines_of(settings)} == {("50.0", "2")}
    assert "DN-CBM on cifar10 (best of 2: l1coeff1e-05)" in path.read_text(encoding="utf-8")


EDITS = ("unedited", "keep", "remove")
GROUPS = ("landbird on land", "landbird on water", "waterbird on land", "waterbird on water")
NAMED = [ConceptName(index, word, 0.1 * index) for index, word in enumerate(("sea", "dog", "dog", "bird", "gull"))]


def write_edits(settings: Settings, run: SAERun, of: ProbeRun, groups: Sequence[str], overall: float, text: str) -> Path:
    """A list of concepts, and what the intervention stage writes of keeping and of removing them. Returns the last file."""
    artifacts = Artifacts(settings)
    write_names(artifacts.concept_names(run), NAMED)
    path = artifacts.suggested_concepts(run, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("bird\ngull\n", encoding="utf-8")
    target, names = path, read_names(settings, run)
    for edit, gain in ((Intervention(keep=path), 0.1), (Intervention(remove=path), -0.3)):
        lines: list[tuple[Any, ...]] = []
        for row, top1 in (("unedited", overall), ("refit", 0.999), ("edited", overall + gain), ("random", 0.001)):
            lines += [(row, "overall", "", "", 9, top1, ""), (row, "mean_class", "", "", "", 0.777, "")]
            lines += [(row, "class", 0, "a class", 9, 0.888, ""), (row, "worst_group", "", "", "", top1 - 0.2, "")]
            lines += [(row, "mean_group", "", "", "", top1 - 0.1, "")]
            lines += [(row, "group", i, name, 9, top1 - i / 100, "") for i, name in enumerate(groups)]
            lines += [(row, "group", len(groups), "no images", 0, "", "")]
        target = artifacts.intervention(run, of, edit_name(edit, factors_asked(edit, names)))
        with making(target, "intervene", {}, {"names": artifacts.concept_names(run)}, overwrite=True) as work:
            write_csv(target, ("row", "kind", "index", "name", "images", "top1", "deviation"), lines)
            work.done([target])
    return target


def test_edits_stand_beside_the_published(make_settings: Callable[..., Settings]) -> None:
    settings, overall = make_settings(), {49: 0.80, 50: 0.81, 51: 0.83}
    for seed in SEEDS:
        write_edits(settings, sae(seed), probe("waterbirds100", seed), GROUPS, overall[seed], BIRDS)
        write_edits(settings, sae(seed), probe("fields", seed), ("a|b", "50%_wide"), overall[seed], BIRDS)
    probes = [probe(dataset, seed) for dataset in ("waterbirds100", "fields", "without_edits") for seed in SEEDS]
    (path, *_) = write_report(settings, [sae(seed) for seed in SEEDS], probes, [], BIRDS)
    found = cells(lines_of(settings), "edits on waterbirds100")
    mean = statistics.fmean(overall.values())
    for edit, gain in (("unedited", 0.0), ("keep", 0.1), ("remove", -0.3)):
        by_column = {key[2]: line for key, line in found.items() if key[1] == edit}
        assert list(by_column) == ["overall", *GROUPS, "worst group"]
        for column, less in (("overall", 0.0), ("waterbird on land", 0.02), ("worst group", 0.2)):
            assert float(by_column[column]["ours"]) == pytest.approx(100 * (mean + gain - less))
    theirs = {key[1:3]: line["published"] for key, line in found.items() if line["by"]}
    assert theirs == {
        ("unedited", "overall"): "84.24", ("unedited", "landbird on water"): "76.30",
        ("unedited", "waterbird on land"): "58.27",
        ("keep", "overall"): "88.07", ("keep", "waterbird on land"): "82.73",
        ("remove", "overall"): "59.47", ("remove", "waterbird on land"): "15.83",
    }  # fmt: skip
    marks = {key[1:3] for key, line in found.items() if line["exceeds_seeds"] == "true"}
    assert marks == {("unedited", "waterbird on land"), ("remove", "overall"), ("remove", "waterbird on land")}
    elsewhere = cells(lines_of(settings), "edits on fields")
    assert {line["by"] for line in elsewhere.values()} == {""}
    assert [key[2] for key in elsewhere if key[1] == "keep"] == ["overall", "a|b", "50%_wide", "worst group"]
    assert "without_edits" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("groups", "text", "columns"),
    [([f"g{i}" for i in range(9)], BIRDS, ["overall", "mean group", "worst group"]), (GROUPS[:1], "a boat", None)],
    ids=["many groups", "another text"],
)
def test_edits_of_another_kind(make_settings: Callable[..., Settings], groups, text: str, columns: list[str] | None) -> None:
    settings = make_settings()
    write_edits(settings, sae(), probe("waterbirds100"), groups, 0.5, text)
    write_report(settings, [sae()], [probe("waterbirds100")], [], text)
    found = cells(lines_of(settings), "edits on waterbirds100")
    assert columns is None or [key[2] for key in found if key[1] == "keep"] == columns
    assert {key[1] for key, line in found.items() if line["by"]} == ({"unedited"} if text != BIRDS else set(EDITS))


def test_figures_of_names(make_settings: Callable[..., Settings]) -> None:
    settings, words = make_settings(), ("dog", "dog", "cat", "sea", "sea", "sea")
    topk = sae(sparsity=VARIANTS["topk"]())
    similarities = {49: 0.1, 50: 0.2}
    for run in (sae(49), sae(50), topk):
        similarity = similarities[run.training.seed]
        names = [ConceptName(index, word, similarity + 0.01 * index) for index, word in enumerate(words)]
        write_names(Artifacts(settings).concept_names(run), names[: 4 if run == topk else 6])
    write_report(settings, [sae(49), sae(50), sae(51), topk], [probe("mine")], [], BIRDS)
    found = cells(lines_of(settings), "names")
    rows = {
        row: {key[2]: line for key, line in found.items() if key[1] == row} for row in dict.fromkeys(key[1] for key in found)
    }
    ours, of_topk = rows.values()
    assert [title.split(" (")[0] for title in rows] == ["clip_RN50, DN-CBM", "clip_RN50, TopK SAE"]
    expected = {"mean cosine": 0.175, "share sharing a name": 5 / 6, "latents": 6, "distinct names": 3}
    assert {column: float(line["ours"]) for column, line in ours.items()} == pytest.approx(expected)
    assert float(ours["mean cosine"]["deviation"]) == pytest.approx(0.1 / np.sqrt(2))
    assert (ours["mean cosine"]["published"], ours["mean cosine"]["seeds"]) == ("0.146", "2")
    assert float(of_topk["share sharing a name"]["ours"]) == 0.5
    assert not of_topk["mean cosine"]["published"]


def test_the_share_that_abstains_is_of_tested_names(make_settings: Callable[..., Settings]) -> None:
    """The other figures, which stand beside the published ones, count every name."""
    settings, topk = make_settings(), sae(sparsity=VARIANTS["topk"]())
    verdicts = {49: ("collision", "collision", "abstains"), 50: ("named", "abstains", "abstains")}
    for seed, of_seed in verdicts.items():
        names = [ConceptName(index, "dog", 0.5, verdict) for index, verdict in enumerate(of_seed)]
        write_names(Artifacts(settings).concept_names(sae(seed)), names)
    write_names(Artifacts(settings).concept_names(topk), [ConceptName(0, "dog", 0.5)])
    (path, *_) = write_report(settings, [sae(49), sae(50), topk], [probe("mine")], [], BIRDS)
    found = {key[1:3]: line for key, line in cells(lines_of(settings), "names").items()}
    (tested,) = {key: line for key, line in found.items() if key[1] == "share abstaining"}.items()
    assert tested[0][0].startswith("clip_RN50, DN-CBM")
    assert float(tested[1]["ours"]) == pytest.approx(0.5)
    assert tested[1]["seeds"] == "2"
    shares = {row: float(line["ours"]) for (row, column), line in found.items() if column == "share sharing a name"}
    assert sorted(shares.values()) == [0, 1]
    assert "share abstaining" in path.read_text(encoding="utf-8")


# -------------------------------------------------------------------------------------------- what is missing, and texts


def test_what_is_missing_or_stale_is_left_out(
    make_settings: Callable[..., Settings], refusal: Callable[..., AbstractContextManager[None]]
) -> None:
    settings, run, of = make_settings(), sae(), probe("waterbirds100")
    artifacts = Artifacts(settings)
    with refusal("nothing to show", "--dry-run"):
        write_report(settings, [run], [of], [], BIRDS)
    artifacts.probe_results().parent.mkdir(parents=True)
    artifacts.probe_results().write_text("clip_RN50,out,cc3m\n")
    with refusal("nothing to show", artifacts.probe_results()):
        write_report(settings, [run], [of], [], BIRDS)
    assert not artifacts.reproduction_table("md").exists()

    removed = write_edits(settings, run, of, GROUPS, 0.5, BIRDS)
    artifacts.probe_results().write_bytes(b"")
    removed.write_text("row,kind\nunedited,over")
    (path, *_) = write_report(settings, [run], [of], [], BIRDS)
    assert {(line["table"], line["row"]) for line in lines_of(settings)} == {
        ("edits on waterbirds100", "unedited"), ("edits on waterbirds100", "keep"), ("names", "clip_RN50, DN-CBM"),
    }  # fmt: skip
    (no_results, left_out) = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("left out")]
    assert str(artifacts.probe_results()) in no_results
    assert str(removed) in left_out

    removed.unlink()
    Path(f"{removed}.manifest.json").unlink()
    save_results(artifacts.probe_results(), probe_row(run, of, {"val_top1": 0.75}))
    artifacts.concept_names(run).write_text("index,name,similarity\n0,dog,x\n")
    (path, *_) = write_report(settings, [run], [of], [], BIRDS)
    assert {line["table"] for line in lines_of(settings)} == {"accuracy"}
    assert "left out: cannot read the names" in path.read_text(encoding="utf-8")


def test_strange_names_keep_the_tables_whole() -> None:
    """Markdown has the same cells and the same width on every line; LaTeX is balanced, and nothing special is left bare."""
    columns = ("50%_a|b", "鳥と海", "#1 {x} ~^\\ $y", "Café & co")
    figures = tuple(
        Figure(
            f"r|{i}_%", column, Ours(50.0 + i, None if i else 0.5, 1 if i else 2), (Published("published", "40.0", "S1"),) * i
        )
        for i in range(2)
        for column in columns
    )
    table = Table("kind", "e", "a title of 100%", figures, columns)
    (lines,) = table_lines(markdown(table))
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(columns) + 3}
    assert len({len(line) + sum(one in "鳥と海" for one in line) for line in lines}) == 1
    text = latex(table)
    body = [line for line in text.splitlines() if line and not line.startswith("%")]
    assert [line for line in body if line.startswith("\\")] == [
        r"\begin{tabular}{llrrrr}", r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body if line.endswith(r" \\")} == {len(columns) + 1}
    bare = re.sub(r"\\[\\%&#_${}]", "", "\n".join(body))
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert not set("%#_~|") & set(bare)


def test_a_baseline_without_a_seed_of_the_plan_is_shown(make_settings: Callable[..., Settings]) -> None:
    """The optimum on raw features has no seed. A probe whose row was lost is named."""
    settings = make_settings(encoders={"clip_RN50": ("RN50", "random")})
    run, of = sae(50), probe("cifar10", 50)
    baseline = replace(probe("cifar10"), on_features=True, solver="prox")
    save_results(Artifacts(settings).probe_results(), probe_row(run, baseline, {"val_top1": 0.5}))
    lost = Artifacts(settings).probe(run, of)
    lost.parent.mkdir(parents=True)
    lost.write_bytes(b"")
    (path, *_) = write_report(settings, [run], [of], [(run, baseline)], BIRDS)
    text = path.read_text(encoding="utf-8")
    assert "Linear probe, exact zeros" in text
    assert f"no row of 1 trained probes (first: {lost})" in text
