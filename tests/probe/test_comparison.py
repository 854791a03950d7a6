"""The comparison of SAEs: what its table says of manifests and results, what flags choose, and what it refuses."""

import csv
import json
import logging
import runpy
import shlex
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dncbm.cli import parse
from dncbm.concepts.naming import ConceptName, write_names
from dncbm.probe.comparison import as_text, compare, on_fronts, pareto_front, read_saes, write_comparison
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Comparison, SAERun
from dncbm.runs.find import find
from dncbm.runs.manifests import IMPORTED, making, manifest_path, read_manifest, write_json
from dncbm.runs.results import result_row, save_results
from dncbm.runs.settings import Settings
from dncbm.runs.tracking import NAMES as TRACKED
from dncbm.stages import STAGES
from sparse_autoencoder import BatchTopK, ReLU, Sparsity, TopK, TrainingSettings
from sparse_autoencoder.declare import build, values
from sparse_autoencoder.trainer import LOG_COLUMNS

ROOT = Path(__file__).parents[2]


def make_sae(settings: Settings, run: SAERun, l0: float = 10, variance: float | None = 0.5) -> Path:
    """What stage 2 leaves, with any bytes for the SAE."""
    path = Artifacts(settings).sae(run)
    metrics = {"l0": l0, "explained_variance": variance, "dead_fraction": 0.25}
    path.parent.mkdir(parents=True, exist_ok=True)
    with making(path, "sae", {}, {}, overwrite=False, run=values(run)) as work:
        path.write_text(run.config_name)
        work.done([path], metrics={"train_val": metrics, "train": metrics | {"l0": 1.0}})
    return path


def make_result(
    settings: Settings,
    run: SAERun,
    dataset: str,
    probe: str = "a",
    method: str = "probe",
    on: str = "concepts",
    **metrics: float,
) -> None:
    described = {"probe_dataset": dataset, "method": method, "on": on, "encoder": run.encoder, "hook": run.hook}
    described |= {"sae_dataset": run.dataset, "sae": run.config_name, "probe": probe, "seed": 49}
    save_results(Artifacts(settings).probe_results(), result_row(described, metrics))


def sae(sparsity: Sparsity | None = None, seed: int = 49, **more: Any) -> SAERun:
    return SAERun(sparsity=sparsity or ReLU(), training=TrainingSettings(seed=seed), **more)


RUNS = {
    "relu": sae(),
    "relu, large": sae(expansion_factor=16),
    "topk": sae(TopK(8)),
    "batchtopk": sae(BatchTopK(16), seed=50),
    "other": sae(TopK(8), encoder="clip_ViT-B/16"),
}
L0 = {"relu": 30.0, "relu, large": 40.0, "topk": 8.0, "batchtopk": 16.0, "other": 9.0}
VARIANCE = {"relu": 0.75, "relu, large": 0.7, "topk": 0.5, "batchtopk": 0.625, "other": 0.1}
TOP1 = {"relu": 0.5, "relu, large": 0.8, "topk": 0.7, "batchtopk": 0.8}


@pytest.fixture
def sweep(make_settings: Callable[..., Settings]) -> Settings:
    """Five SAEs, four of them with a probe on `mine`."""
    settings = make_settings(defaults={"lr": 1e-3, "expansion_factor": 16, "img_enc_name": "clip_ViT-B/16"})
    for name, run in RUNS.items():
        make_sae(settings, run, L0[name], VARIANCE[name])
    for name, top1 in TOP1.items():
        make_result(settings, RUNS[name], "mine", train_val_top1=top1, val_top1=1 - top1, train_val_ce=1)
    return settings


def names_of(rows: list[Any]) -> list[str]:
    return [next(name for name, run in RUNS.items() if run == row.run) for row in rows]


# -------------------------------------------------------------------------------------------------------- the front


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_a_point_is_on_the_front_if_no_other_dominates_it(points: list[tuple[float, float]]) -> None:
    def dominated(cost: float, gain: float) -> bool:
        return any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points)

    assert pareto_front(points) == [not dominated(*point) for point in points]


def test_a_front_is_of_saes_of_the_same_features(sweep: Settings) -> None:
    rows = read_saes(sweep)
    on = on_fronts(rows, "explained_variance")
    assert {name for name, is_on in zip(names_of(rows), on, strict=True) if is_on} == {"relu", "topk", "batchtopk", "other"}
    assert "other" not in names_of(
        [row for row, is_on in zip(rows, on_fronts(rows, "train_val_top1:mine"), strict=True) if is_on]
    )


# ------------------------------------------------------------------------------------------------------- what it reads


def test_a_row_holds_what_manifests_and_results_say(make_settings: Callable[..., Settings]) -> None:
    settings, run = make_settings(), sae(TopK(8), input_transform="centre")
    path = make_sae(settings, run, 12.5, None)
    names = Artifacts(settings).concept_names(run)
    with making(names, "names", {}, {"SAE": path}, overwrite=False) as work:
        write_names(names, [ConceptName(0, "dog", 0.5), ConceptName(1, "cat", 0.25), ConceptName(2, "dog", 0.0)])
        work.done([names], latents=8, distinct_names=4, mean_similarity=0.375)
    probes = {"a": (0.5, 0.9, 1.0), "c": (0.75, 0.8, 1.0), "b": (0.75, 0.6, 2.0), "d": (0.25, 1.0, 1.0)}
    for probe, (train_val, val, ce) in probes.items():
        make_result(settings, run, "mine", probe, train_val_top1=train_val, val_top1=val, train_val_ce=ce)
    make_result(settings, run, "mine", "", "nec", val_anec_5=0.125)
    make_result(settings, run, "theirs", "", "nec", val_anec_5=0.5)
    make_result(settings, run, "mine", "", "nec", on="random", val_anec_5=0.25)
    make_result(settings, replace(run, encoder="other"), "elsewhere", train_val_top1=1)

    (row,) = read_saes(settings)
    assert (row.path, row.run, row.datasets) == (path, run, ("mine", "theirs"))
    expected = {"sae": run.config_name, "k": 8, "l1_coeff": None, "input_transform": "centre", "lr": 5e-4, "origin": "trained"}
    expected |= {"l0": 12.5, "explained_variance": None, "dead_fraction": 0.25, "name_similarity": 0.375}
    expected |= {"distinct_name_share": 0.5, "train_val_top1:mine": 0.75, "val_top1:mine": 0.8, "val_anec_5:mine": 0.125}
    expected |= {"probe:mine": "c", "val_anec_5:theirs": 0.5, "train_val_top1:theirs": None, "probe:theirs": None}
    assert {name: row.values[name] for name in expected} == expected
    assert row.number("seconds") == read_manifest(path)["details"]["seconds"]
    with names.open("a") as file:  # edited: the file counts
        file.write("3,bird,0.25\n")
    (row,) = read_saes(settings)
    assert (row.values["name_similarity"], row.values["distinct_name_share"]) == (0.25, 0.75)
    assert row.values["abstaining_share"] is None


def test_the_share_of_latents_that_abstain(make_settings: Callable[..., Settings]) -> None:
    """As the manifest says, else as the file does; blank if names were not tested."""
    settings, run = make_settings(), sae()
    path, names = make_sae(settings, run), Artifacts(settings).concept_names(run)
    tested = [ConceptName(0, "dog", 0.5, "named"), ConceptName(1, "cat", 0.25, "abstains")]
    with making(names, "names", {}, {"SAE": path}, overwrite=False) as work:
        write_names(names, tested)
        work.done([names], latents=8, distinct_names=4, mean_similarity=0.375, named=2, collision=0, abstains=6)
    (row,) = read_saes(settings)
    assert row.values["abstaining_share"] == 0.75
    with names.open("a") as file:
        file.write("2,bird,0.25,abstains\n")
    (row,) = read_saes(settings)
    assert row.values["abstaining_share"] == pytest.approx(2 / 3)
    assert "abstaining_share" in as_text([row], "l0")


def test_an_imported_sae_has_blanks(make_settings: Callable[..., Settings]) -> None:
    settings, run = make_settings(), sae()
    path = Artifacts(settings).published_sae(run)
    path.parent.mkdir(parents=True)
    with making(path, IMPORTED, {}, {}, overwrite=False, run=values(run)) as work:
        path.write_text("theirs")
        work.done([path], imported_from=["elsewhere"], metrics={})
    Artifacts(settings).published_names(run).write_text("0,dog\n1,dog\n")
    (row,) = read_saes(settings)
    blank = ("l0", "explained_variance", "dead_fraction", "name_similarity", "abstaining_share", "seconds")
    assert [row.values[name] for name in blank] == [None] * 6
    assert (row.values["origin"], row.values["distinct_name_share"]) == ("imported", 0.5)
    make_sae(settings, sae(seed=1))
    text = as_text(compare(settings, Comparison(sort_by="seed")), "seed")
    assert [line.split()[:3] for line in text.splitlines()[2:4]] == [["1", "1", "trained"], ["2", "49", "imported"]]


def not_json(path: Path) -> None:
    manifest_path(path).write_text("{")


def other_run(path: Path, **changes: Any) -> None:
    made = json.loads(manifest_path(path).read_text())
    write_json(manifest_path(path), made | {"run": made["run"] | changes if changes else {}})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "not JSON": (not_json, "cannot read the manifest"),
    "no manifest": (lambda path: manifest_path(path).unlink(), "has no manifest"),
    "no settings": (other_run, "does not hold the settings"),
    "a value that is not allowed": (lambda path: other_run(path, lr=-1), "describes no SAE"),
    "a value of another type": (lambda path: other_run(path, sae_type=[]), "describes no SAE"),
    "moved": (lambda path: other_run(path, seed=7), "was moved"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_manifest_is_passed_over(make_settings, caplog: pytest.LogCaptureFixture, what: str) -> None:
    settings = make_settings()
    damage, said = DAMAGE[what]
    make_sae(settings, sae())
    damage(make_sae(settings, sae(TopK(8))))
    assert [row.run for row in read_saes(settings)] == [sae()]
    (record,) = [record for record in caplog.records if "passed over" in record.getMessage()]
    assert said in record.getMessage()
    assert "\n" not in record.getMessage()


def test_what_cannot_be_trusted_is_said(make_settings, caplog: pytest.LogCaptureFixture) -> None:
    """Names of another SAE are left out; accuracies from before the SAE was made, and missing results, are warnings."""
    settings, run = make_settings(), sae()
    names = Artifacts(settings).concept_names(run)
    with making(names, "names", {}, {"SAE": "a fingerprint of another"}, overwrite=False) as work:
        write_names(names, [ConceptName(0, "dog", 0.5)])
        work.done([names], latents=1, distinct_names=1, mean_similarity=0.5)
    path = make_sae(settings, run)
    (row,) = read_saes(settings)
    assert row.values["name_similarity"] is None
    assert [part in caplog.text for part in ("is out of date", "accuracies stay blank")] == [True, True]
    caplog.clear()
    make_result(settings, run, "mine", train_val_top1=0.5)
    made = json.loads(manifest_path(path).read_text())
    write_json(manifest_path(path), made | {"made": "2999-01-01T00:00:00+00:00"})
    (row,) = read_saes(settings)
    assert row.values["train_val_top1:mine"] == 0.5
    assert "were measured before it was made" in caplog.text


# ------------------------------------------------------------------------------------------------------ what is chosen


def test_conditions(sweep: Settings) -> None:
    expected: dict[tuple[str, ...], set[str]] = {
        (): {*RUNS},
        ("l0<30",): {"topk", "batchtopk", "other"},
        ("l0 <= 30", "sae_type=relu"): {"relu"},
        ("sae_type!=topk",): {"relu", "relu, large", "batchtopk"},
        ("k=8",): {"topk", "other"},
        ("k!=8",): {"relu", "relu, large", "batchtopk"},
        ("k=",): {"relu", "relu, large"},
        ("k!=",): {"topk", "batchtopk", "other"},
        ("train_val_top1>=0.7",): {"relu, large", "topk", "batchtopk"},
        ("train_val_top1:mine==0.5",): {"relu"},
        ("l1_coeff>2e-5",): {"relu", "relu, large"},
        ("img_enc_name=clip_ViT-B/16",): {"other"},
        ("seed>49",): {"batchtopk"},
    }
    found = {where: set(names_of(compare(sweep, Comparison(where=where)))) for where in expected}
    assert found == expected


def test_order(sweep: Settings) -> None:
    """Blanks come last."""
    expected = {
        "l0": [8, 9, 16, 30, 40],
        "explained_variance": [0.75, 0.7, 0.625, 0.5, 0.1],
        "k": [8, 8, 16, None, None],
        "sae_type": ["batchtopk", "relu", "relu", "topk", "topk"],
        "train_val_top1:mine": [0.8, 0.8, 0.7, 0.5, None],
    }
    found = {column: [row.values.get(column) for row in compare(sweep, Comparison(sort_by=column))] for column in expected}
    assert found == expected


def test_the_config_hides_no_run_but_flags_do(sweep: Settings) -> None:
    make_result(sweep, RUNS["relu"], "theirs", train_val_top1=0.5)
    assert len(compare(sweep, Comparison())) == 5
    assert names_of(compare(sweep, Comparison(encoders=("clip_ViT-B/16",)))) == ["other"]
    assert len(compare(sweep, Comparison(sae_datasets=("cc3m",)))) == 5
    rows = compare(sweep, Comparison(probe_datasets=("theirs",), sort_by="train_val_top1"))
    assert {row.datasets for row in rows} == {(), ("theirs",)}
    assert names_of(rows)[0] == "relu"


def test_what_is_refused(sweep: Settings, refusal) -> None:
    make_result(sweep, RUNS["relu"], "theirs", train_val_top1=0.5)
    for comparison, parts in [
        (Comparison(sort_by="explained_varianc"), ["--sort_by", "did you mean explained_variance?"]),
        (Comparison(where=("l00<5",)), ["--where 'l00<5'", "did you mean l0?"]),
        (Comparison(where=("l0",)), ["--where l0", "'l0<50'"]),
        (Comparison(where=("l0<few",)), ["l0 holds numbers", "'few'"]),
        (Comparison(where=("l0<",)), ["a value is missing"]),
        (Comparison(where=("l0<100", "l0<1")), ["--where 'l0<1'", "none of the 5 SAEs"]),
        (Comparison(best_by="lr"), ["--best_by lr", "choose by one of l0, explained_variance"]),
        (Comparison(best_by="train_val_top1"), ["of which data set?", "train_val_top1:mine or train_val_top1:theirs"]),
        (Comparison(best_by="val_anec_5:nowhere"), ["results of mine, theirs alone", "10_accuracy_at_nec.py"]),
        (Comparison(best_by="name_similarity"), ["known of none of the 5 SAEs"]),
        (Comparison(encoders=("none",)), ["--img_enc_name none", "only of clip_RN50, clip_ViT-B/16"]),
        (Comparison(probe_datasets=("none",)), ["--probe_dataset none", "only of mine, theirs"]),
    ]:
        with refusal(*parts):
            write_comparison(sweep, comparison)
    assert not Artifacts(sweep).comparison("csv").exists()


def test_a_data_set_may_be_called_anything(make_settings) -> None:
    settings = make_settings()
    make_sae(settings, sae())
    for dataset, top1 in {"a<b": 0.5, "a": 0.25, "鳥と狗": 0.75}.items():
        make_result(settings, sae(), dataset, train_val_top1=top1)
    assert compare(
        settings, Comparison(where=("train_val_top1:a<b=0.5", "train_val_top1:a=0.25", "train_val_top1:鳥と狗>0.7"))
    )


# ------------------------------------------------------------------------------------------------------- what it prints


@pytest.mark.parametrize(("by", "best"), [("train_val_top1", "batchtopk"), ("explained_variance", "relu"), ("l0", "topk")])
def test_the_flags_of_the_best_name_it(
    sweep: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, by: str, best: str
) -> None:
    """Pasted behind stage 2, they stand for the same run; behind others, its SAE is found."""
    monkeypatch.setenv("DNCBM_CONFIG", str(sweep.path))
    write_comparison(sweep, Comparison(best_by=by))
    use, train = (line.split(":", 1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  to "))
    _, read, _ = parse(STAGES["sae"], shlex.split(train))
    assert build(SAERun, read) == RUNS[best]
    _, read, given = parse(STAGES["names"], shlex.split(use))
    assert build(SAERun, find(sweep, STAGES["sae"], read, given)) == RUNS[best]
    assert ("--probe_dataset mine --probe a" in use) == (by == "train_val_top1")


@pytest.mark.parametrize(("by", "warned"), [("val_top1", True), ("train_val_top1", False)])
def test_choosing_by_val_is_a_warning(sweep: Settings, caplog: pytest.LogCaptureFixture, by: str, warned: bool) -> None:
    with caplog.at_level(logging.WARNING):
        write_comparison(sweep, Comparison(best_by=by))
    assert ("chosen by val" in caplog.text) == warned


def width(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in line)


def test_the_table_names_what_differs(sweep: Settings) -> None:
    for dataset in ("鳥と狗の長い長いデータセット", "mine" * 20):
        make_result(sweep, RUNS["relu, large"], dataset, train_val_top1=0.5)
    rows = compare(sweep, Comparison())
    title, header, datasets, *lines, note = as_text(rows, "l0").splitlines()
    assert title == "5 SAEs, sorted by l0; all with hook_points out, sae_dataset cc3m"
    differing = ["img_enc_name", "sae_type", "l1_coeff", "k", "expansion_factor", "seed"]
    measures = ["l0", "explained_variance", "dead_fraction", "seconds", "train_val_top1", "val_top1"]
    assert header.split() == ["#", *differing, *measures, "train_val_top1", "train_val_top1"]
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4", "5"]
    assert "Pareto front" in note
    of_large = lines[-1]  # its last column is filled, as the header's are
    assert width(of_large) == width(datasets.rstrip()) == width(header)
    assert [line.count("*") for line in lines] == [2, 1, 2, 1, 2], "on the fronts of explained variance and accuracies"
    alone = as_text(rows[:1], "l0").splitlines()
    assert alone[1].split()[:2] == ["#", "l0"], "of one SAE, no setting differs"


# ------------------------------------------------------------------------------------------------------------ the script


def run_script(monkeypatch: pytest.MonkeyPatch, settings: Settings, *flags: str) -> object:
    monkeypatch.setenv("DNCBM_CONFIG", str(settings.path))
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", *flags])
    try:
        runpy.run_path(str(ROOT / "scripts" / commands.COMPARE_RUNS.script), run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


def test_the_script_writes_table_and_figure(sweep: Settings, monkeypatch, capsys) -> None:
    assert run_script(monkeypatch, sweep, "--where", "l0<40", "sae_type!=relu", "--best_by", "train_val_top1") == 0
    printed = capsys.readouterr().out
    with Artifacts(sweep).comparison("csv").open(newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    rows = compare(sweep, Comparison(where=("l0<40", "sae_type!=relu")))
    assert [row["sae"] for row in written] == [row.run.config_name for row in rows]
    for number, (row, of) in enumerate(zip(written, rows, strict=True), start=1):
        assert int(row["#"]) == number
        assert row.keys() - {"#"} >= of.values.keys()
        assert float(row["l0"]) == of.values["l0"]
        assert Path(row["path"]) == of.path
        assert {name: row[name] for name in values(of.run)} == {name: str(value) for name, value in values(of.run).items()}
    with Image.open(Artifacts(sweep).comparison("png")) as image:
        assert image.width > image.height > 300
    assert f"best by train_val_top1:mine: #{names_of(rows).index('batchtopk') + 1} with 0.800" in printed
    assert str(Artifacts(sweep).comparison("png")) in printed


def test_without_an_sae_there_is_one_clear_line(make_settings, monkeypatch) -> None:
    said = run_script(monkeypatch, make_settings())
    assert isinstance(said, str), "which Python prints, and exits with 1"
    assert "there is no SAE in" in said
    assert "02_train_sae_img.py" in said
    assert len(said.splitlines()) == 1


def test_the_wandb_sweep_calls_stage_2_with_flags_that_it_has(make_settings, monkeypatch) -> None:
    """Its commands, as wandb's own agent puts them together."""
    wandb = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    monkeypatch.setenv("DNCBM_CONFIG", str(make_settings().path))
    sweep = wandb.load_sweep_config(str(ROOT / "docs" / "wandb_sweep.yaml"))
    assert ROOT / sweep["program"] == ROOT / "scripts" / commands.SAE.script
    assert sweep["metric"]["name"] in {TRACKED["sae"].get(name, name) for name in LOG_COLUMNS}
    runs = set()
    for place in range(2):
        chosen = {
            name: about.get("value", [*about.get("values", [None])][-place]) for name, about in sweep["parameters"].items()
        }
        words = wandb.create_sweep_command_args({"args": {name: {"value": value} for name, value in chosen.items()}})
        words |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [sweep["program"]]}
        command = [word for part in wandb.create_sweep_command(sweep["command"]) for word in words.get(part[2:-1], [part])]
        assert command[:3] == ["/usr/bin/env", "python", sweep["program"]]
        _, read, given = parse(commands.SAE, command[3:])
        assert given == {*sweep["parameters"], "use_wandb"}
        assert {name: read[name] for name in chosen} == chosen
        runs.add(build(SAERun, read).config_name)
    assert len(runs) == 2, "runs have folders of their own"
