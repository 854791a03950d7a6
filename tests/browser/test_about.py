"""What a site says about itself: the contract's fields, figures against formulas, commands that mean the run, the report."""

import csv
import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from dncbm.bottleneck.run import run_of_flags
from dncbm.browser.about import about_run, about_site, command_again, optional_inputs
from dncbm.browser.concepts import N_PARTS
from dncbm.browser.shown import CLASSES_PER_CHUNK, CONCEPTS_PER_CHUNK, IMAGES_PER_CHUNK, kept_images, read_run
from dncbm.cli import main, parse
from dncbm.concepts.evidence.prediction import FDR
from dncbm.explain.report.claims import STABLE
from dncbm.explain.report.probe import read_probed
from dncbm.explain.report.provenance import artifacts_made, written_time
from dncbm.explain.report.stage import CLAIMS, FILES, read_claims
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Browse, Explained, ProbeRun, SAERun
from dncbm.runs.find import find
from dncbm.runs.manifests import check_chain, making, manifest_path, read_manifest
from dncbm.runs.settings import Settings, load_settings
from dncbm.stages import COMMANDS, STAGES
from sparse_autoencoder.declare import build, values
from tests.bottleneck.conftest import SmallRun

ROOT = Path(__file__).parents[2]
TYPES = ROOT / "dncbm" / "browser" / "types.d.ts"
BASELINE = ["--probe_on_features", "--probe_solver", "adam", "--probe_epochs", "2"]
NO_PICTURES = "The folder of the images is missing."


def fields_of(interface: str) -> set[str]:
    """The fields of an interface of the contract."""
    body = TYPES.read_text(encoding="utf-8").partition(f"interface {interface} {{")[2].partition("\n}")[0]
    return set(re.findall(r"^  (\w+)[?]?:", body, flags=re.MULTILINE))


@pytest.fixture(scope="module")
def complete(small_run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A small run with stability, both baselines and a report."""
    root = tmp_path_factory.mktemp("complete")
    shutil.copytree(small_run.root, root, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DNCBM_CONFIG", str(root / "config.py"))
        for stage, *flags in (["sae", "--seed", "50"], ["probe", *BASELINE], ["zero_shot"]):
            main(stage, flags)
        for stage in ("names", "seed_stability", "report"):
            main(stage, ["--seed", "49"])
    return load_settings(root / "config.py")


@pytest.fixture
def copy(complete: Settings, tmp_path: Path) -> Settings:
    """A copy that a test may change."""
    shutil.copytree(complete.path.parent, tmp_path, dirs_exist_ok=True)
    return load_settings(tmp_path / "config.py")


def of(settings: Settings) -> tuple[SAERun, ProbeRun]:
    defaults = settings.defaults
    return build(SAERun, defaults), build(ProbeRun, defaults)


def said(settings: Settings, label: str = "tiny") -> dict[str, Any]:
    """What a site says about the run."""
    run, probe = of(settings)
    kept = kept_images(settings, run, "val", "pets")
    shown = read_run(settings, run, probe, "val", kept)
    found = about_run(settings, shown, probe, "val", kept, label, Artifacts(settings).report(run, probe))
    json.dumps(found, allow_nan=False)
    return found


def test_a_run_says_what_its_artifacts_hold(complete: Settings) -> None:
    assert run_of_flags(complete, {}) == of(complete)
    (run, probe), found = of(complete), said(complete)
    kept = kept_images(complete, run, "val", "pets")
    shown = read_run(complete, run, probe, "val", kept)
    assert found.keys() == fields_of("Run")
    z, weight, labels = shown.strengths[0].toarray(), shown.weight.numpy(), kept[0].labels
    assert (found["name"], found["label"], found["n_latents"]) == (run.config_name, "tiny", z.shape[1])
    assert (found["has_strengths"], found["has_names"], found["has_probe"]) == ([True], True, True)
    assert found["n_silent"] == (z == 0).all(axis=0).sum()
    assert sum(found["verdicts"].values()) == z.shape[1]
    figures = dict(found["figures"])
    numbers = {title: [float(number) for number in re.findall(r"[+−]?\d+\.\d+", text.replace("−", "-"))]
               for title, text in figures.items()}  # fmt: skip
    metrics = read_manifest(Artifacts(complete).sae(run))["details"]["metrics"]
    explained = [metrics[split]["explained_variance"] for split in ("train_val", "train")]
    assert numbers["Explained variance"] == pytest.approx(explained, abs=5e-4)
    top1 = 100 * ((z @ weight).argmax(axis=1) == labels).mean()
    assert numbers["Top-1 on val, probe on concepts"] == pytest.approx([top1], abs=0.051)
    on_features = numbers["Top-1 on val, probe on raw features"]
    assert numbers["Concepts less raw features, in points, with the 95 % interval"][0] == pytest.approx(
        top1 - on_features[0], abs=0.11
    )
    with Artifacts(complete).probe_results().open(newline="") as file:
        (zero_shot,) = [float(row["val_top1"]) for row in csv.DictReader(file) if row["method"] == "zero_shot"]
    assert numbers["Top-1 on val, zero-shot"] == pytest.approx([100 * zero_shot], abs=0.051)
    assert len(figures) == len(found["figures"])
    told = dict(values(run)) | values(probe)
    for title, rows in found["settings"]:
        for flag, value in rows:
            assert value == str(told[flag])
            assert ("differ" in title) == (flag in complete.defaults), (title, flag)
    sources = {title: fingerprint for title, _, fingerprint in found["provenance"]}
    made = {title: time for title, time, _ in found["provenance"]}
    assert made["SAE"] == written_time(read_manifest(Artifacts(complete).sae(run))["made"])
    assert made["probe"] == written_time(read_manifest(Artifacts(complete).probe(run, probe))["made"])
    assert {"SAE", "names", "probe", "probe on raw features", "zero-shot baseline", "stability over seeds"} <= set(sources)
    assert all(re.fullmatch("[0-9a-f]{12}", one) for one in sources.values())
    assert found["missing"] == []
    assert found["weight_rows"] == len(weight)


def test_claims_are_those_of_the_report(complete: Settings) -> None:
    run, probe = of(complete)
    reported = read_claims(Artifacts(complete).report(run, probe))
    found = said(complete)
    assert len(found["claims"]) == len(reported.claims)
    for shown, claim in zip(found["claims"], reported.claims, strict=True):
        assert shown.keys() == fields_of("ClaimText")
        assert shown == {name: getattr(claim, name) for name in shown}
    assert found["claims_made"] == reported.made.strftime("%Y-%m-%d %H:%M")


RESTS_ON = {
    "SAE", "names", "evidence from images of photos", "stability over seeds", "concept strengths of pets, val", "probe",
    "probe on raw features", "zero-shot baseline", "accuracy with few concepts",
}  # fmt: skip


def made_then(artifact: Path, time: str) -> None:
    path = manifest_path(artifact)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"made": time}))


def test_a_report_that_is_older_than_what_it_rests_on_is_left_out(copy: Settings) -> None:
    run, probe = of(copy)
    nec = Artifacts(copy).nec(run, "pets")
    with making(nec, "nec", {}, {}, overwrite=False) as work:
        (nec / "nec.csv").write_text("nothing reads more than when it was made")
        work.done([nec / "nec.csv"])
    made_then(nec, "2000-01-01T00:00:00+00:00")
    assert said(copy)["claims"] is not None
    baseline = read_probed(copy, run, probe, "cpu").baseline
    made = artifacts_made(copy, run, probe, baseline)
    assert made.keys() >= RESTS_ON
    for title in sorted(RESTS_ON | {"features of pets, train"}):
        path = made[title][0]
        before = manifest_path(path).read_text()
        made_then(path, "2100-01-01T00:00:00+00:00")
        found = said(copy)
        if title in RESTS_ON:
            assert found["claims"] is None, title
            assert found["claims_made"] == ""
            (lack,) = found["missing"]
            assert lack["what"] == f"The report is left out: it is older than {title}."
            assert "scripts/15_report.py" in lack["command"]
        else:
            assert found["claims"] is not None, title
        made_then(path, "long ago")
        assert said(copy)["claims"] is not None, "an artifact of others may not say when it was made"
        manifest_path(path).write_text(before)
    results = Artifacts(copy).probe_results()
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["time"] = "2100-01-01T00:00:00+00:00" if row["method"] == "zero_shot" else row["time"]
    with results.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    (lack,) = said(copy)["missing"]
    assert lack["what"] == "The report is left out: it is older than results of the probe and its baselines."


# Artifacts that are removed -> the scripts that make what is missing then, in the order in which a site says so.
LACKING = {
    "names": ["04_assign_names.py"],
    "tests": ["04_assign_names.py"],
    "evidence": ["04_assign_names.py"],
    "stability": ["14_seed_stability.py"],
    "strengths": ["06_save_concept_strengths.py"],
    "probe": ["07_train_linear_probe.py"],
    "results": ["07_train_linear_probe.py", "08_zero_shot.py"],
    "report": ["15_report.py"],
}


def remove(settings: Settings, what: str) -> None:
    run, probe = of(settings)
    artifacts = Artifacts(settings)
    names = artifacts.concept_names(run)
    if what == "tests":  # names alone, as the authors write them
        lines = names.read_text(encoding="utf-8").splitlines()[1:]
        names.write_text("".join(f"{','.join(line.split(',')[:2])}\n" for line in lines), encoding="utf-8")
        manifest_path(names).unlink()
        return
    path = {
        "names": names, "evidence": artifacts.name_evidence(run, "photos"), "stability": artifacts.seed_stability(run),
        "strengths": artifacts.strengths(run, "pets", "val"), "probe": artifacts.probe(run, probe),
        "results": artifacts.probe_results(), "report": artifacts.report(run, probe) / CLAIMS,
    }[what]  # fmt: skip
    manifest_path(path).unlink(missing_ok=True)
    path.unlink() if path.is_file() else shutil.rmtree(path)


@pytest.mark.parametrize("what", LACKING)
def test_what_is_missing_is_said_with_a_command_that_finds_the_run(
    copy: Settings, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    run, _ = of(copy)
    remove(copy, what)
    found = said(copy)
    words = [shlex.split(one["command"].removeprefix("DNCBM_CONFIG=/path/to/config.py ")) for one in found["missing"]]
    assert [one[1].removeprefix("scripts/") for one in words] == LACKING[what]
    assert all(one["what"].endswith(".") for one in found["missing"])
    assert bool(found["verdicts"]) == (what not in ("names", "tests"))
    monkeypatch.setenv("DNCBM_CONFIG", str(copy.path))
    by_script = {command.script: command for command in COMMANDS.values()}
    for _, script, *flags in words:
        command = by_script[script.removeprefix("scripts/")]
        _, told, given = parse(command, flags)
        if SAERun in command.takes and "--probe_on_features" not in flags:
            assert build(SAERun, find(copy, STAGES["sae"], told, given)).config_name == run.config_name
        assert told["probe_dataset" if ProbeRun in command.takes else "img_enc_name"] in ("pets", "tiny")


@pytest.mark.parametrize("what", ["evidence", "stability"])
def test_what_is_out_of_date_is_no_input_and_said(copy: Settings, what: str) -> None:
    run, probe = of(copy)
    before = optional_inputs(copy, run, probe)
    titles = {"evidence": "evidence from images of photos", "stability": "stability over seeds"}
    assert set(titles.values()) < set(before)
    path = before[titles[what]]
    assert isinstance(path, Path)
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    after = optional_inputs(copy, run, probe)
    assert before.keys() - after.keys() == {titles[what]}
    (lack,) = said(copy)["missing"]
    assert f"out of date and left out: {path.name} has changed." in lack["what"]


def test_evidence_is_out_of_date_if_that_of_no_data_set_holds(copy: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command names the data set, unless it is the SAE's own."""
    run, _ = of(copy)
    monkeypatch.setenv("DNCBM_CONFIG", str(copy.path))
    main("names", ["--evidence_dataset", "pets"])
    paths = {dataset: Artifacts(copy).name_evidence(run, dataset) for dataset in ("photos", "pets")}

    def lacks() -> list[str]:
        return [one["command"] for one in said(copy)["missing"] if "held-out images say" in one["what"]]

    paths["photos"].write_text(paths["photos"].read_text() + "\n")
    assert lacks() == []
    paths["pets"].write_text(paths["pets"].read_text() + "\n")
    (command,) = lacks()
    assert "04_assign_names.py" in command
    assert "--evidence_dataset" not in command
    manifest_path(paths["photos"]).unlink()
    (command,) = lacks()
    assert "--evidence_dataset pets" in command


def test_what_was_run_since_changes_the_inputs(copy: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run, probe = of(copy)
    before = optional_inputs(copy, run, probe)
    for source in before.values():
        if isinstance(source, Path):
            check_chain(source)
    assert optional_inputs(copy, run, probe) == before
    claims = Artifacts(copy).report(run, probe) / CLAIMS
    made = json.loads(claims.read_text())
    claims.write_text(json.dumps(made | {"made": datetime.now(timezone.utc).isoformat()}))
    newer = optional_inputs(copy, run, probe)
    assert [title for title in before if before[title] != newer[title]] == ["report"]
    monkeypatch.setenv("DNCBM_CONFIG", str(copy.path))
    main("probe", [*BASELINE, "--probe_lr", "0.1"])
    assert [title for title, source in optional_inputs(copy, run, probe).items() if source != newer[title]] == [
        "results of the probe and its baselines"
    ]


def test_damaged_claims_are_refused(copy: Settings, refusal: Callable) -> None:
    run, probe = of(copy)
    claims = Artifacts(copy).report(run, probe) / CLAIMS
    claims.write_text("{")
    with refusal(claims, "15_report.py"):
        said(copy)


# ---------------------------------------------------------------------------------------------------------- the site


def site(settings: Settings, runs: list[dict[str, Any]], thumbnails: Any = NO_PICTURES) -> dict[str, Any]:
    run, probe = of(settings)
    kept = kept_images(settings, run, "val", "pets")
    matches = [(0, 1)] if len(runs) > 1 else []
    found = about_site(settings, run, probe, Explained("val"), kept, runs, [thumbnails], matches, "command", FILES[0])
    json.dumps(found, allow_nan=False)
    assert found.keys() == fields_of("Site")
    return found


def test_a_site_says_whose_images_it_shows(copy: Settings) -> None:
    sheets = {"side": 96, "columns": 4, "per_sheet": 16, "per_folder": 256}
    assert sheets.keys() == fields_of("Thumbnails")
    (dataset,) = site(copy, [said(copy)], sheets)["datasets"]
    assert dataset.keys() == fields_of("Dataset")
    assert dataset == {"name": "pets", "n": 21, "of": 21, "thumbnails": sheets, "no_thumbnails": "", "license": None}
    copy.path.write_text(copy.path.read_text() + "probe_datasets['pets'] = {'path': 'pets', 'license': 'CC0, nobody'}\n")
    (dataset,) = site(load_settings(copy.path), [said(copy)])["datasets"]
    assert (dataset["thumbnails"], dataset["no_thumbnails"], dataset["license"]) == (None, NO_PICTURES, "CC0, nobody")


def test_a_site_says_in_one_sentence_what_it_is(complete: Settings) -> None:
    one = said(complete)
    both = site(complete, [one])
    assert both["probed"] == 0
    assert both["classes"] == ["a cat", "dog", "zebra"]
    for runs, in_it, not_in_it in (
        ([one], ["A sparse autoencoder", "tiny", "24 latents", "photos", "word nearest", "classifies the images of pets"], []),
        ([one, one], ["2 sparse autoencoders each", "into latents"], ["24"]),
        ([one, one | {"has_names": False, "has_probe": False}], ["word nearest", "classifies the images of pets"], []),
        ([one | {"has_names": False}], ["classifies the images of pets"], ["word"]),
        ([one | {"has_names": False, "has_probe": False}], ["24 latents"], ["word", "classifies", ";"]),
    ):
        lead = site(complete, runs)["lead"]
        assert all(part in lead for part in in_it), lead
        assert not any(part in lead for part in not_in_it), lead
        assert re.fullmatch(r"[A-Z0-9][^.]*\.", lead), lead
    assert site(complete, [one | {"has_probe": False}])["probed"] is None
    assert site(complete, [one | {"has_probe": False}, one])["probed"] == 0


def test_a_site_says_how_its_chunks_are_divided_and_what_counts(complete: Settings) -> None:
    (run, probe), one = of(complete), said(complete)
    found = site(complete, [one])
    sizes = {"concepts": CONCEPTS_PER_CHUNK, "classes": CLASSES_PER_CHUNK, "images": IMAGES_PER_CHUNK}
    assert found["per_chunk"] == sizes
    assert len(set(sizes.values())) == 3
    assert found["range_parts"] == N_PARTS
    assert found["criteria"] == {"cosine": STABLE, "fdr": FDR}
    kept = [replace(kept_images(complete, run, "val", "pets")[0], n_split=99)]
    (dataset,) = about_site(complete, run, probe, Explained("val"), kept, [one], [NO_PICTURES], [], "", None)["datasets"]
    assert (dataset["n"], dataset["of"]) == (21, 99)


def test_its_command_makes_it_again(complete: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run, probe = of(complete)
    browse = Browse(Path("a folder/$x"), ("seed=50", "sae_type=topk,k=2"))
    command = command_again(complete, run, probe, Explained("train_val"), browse)
    monkeypatch.setenv("DNCBM_CONFIG", str(complete.path))
    config, python, script, *flags = shlex.split(command)
    assert (config, python, script) == ("DNCBM_CONFIG=/path/to/config.py", "python", "scripts/16_browse.py")
    _, told, given = parse(COMMANDS["browse"], flags)
    found = find(complete, STAGES["probe"], told, given)
    assert (build(SAERun, found), build(ProbeRun, found)) == (run, probe)
    assert (build(Explained, told), build(Browse, told)) == (Explained("train_val"), browse)
    plain = command_again(complete, run, probe, Explained("val"), Browse())
    assert "--beside" not in plain
    assert "--browser_folder" not in plain
    elsewhere = command_again(complete, run, probe, Explained("val"), Browse(Path("/home/me/a site")))
    assert shlex.split(elsewhere)[-2:] == ["--browser_folder", "/path/to/a site"]


def test_the_commands_of_a_run_mean_this_run(complete: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run, probe = of(complete)
    monkeypatch.setenv("DNCBM_CONFIG", str(complete.path))
    found = said(complete)["commands"]
    assert found.keys() == {"names", "probe", "intervene"}
    for name, text in found.items():
        _, _, script, *flags = shlex.split(text)
        assert script == f"scripts/{COMMANDS[name].script}"
        _, told, given = parse(COMMANDS[name], flags)
        told = find(complete, STAGES["probe" if name == "intervene" else "sae"], told, given)
        assert build(SAERun, told).config_name == run.config_name
        if name != "names":
            assert build(ProbeRun, told).config_name == probe.config_name


def test_commands_name_the_config_unless_it_is_the_default_one(complete: Settings) -> None:
    run, probe = of(complete)
    for path, prefix in (
        (ROOT / "config.py", ""), (ROOT / "examples/openmoji/config.py", "DNCBM_CONFIG=examples/openmoji/config.py "),
        (Path("/home/me/my config.py"), "DNCBM_CONFIG='/path/to/my config.py' "),
    ):  # fmt: skip
        settings = replace(complete, path=path)
        command = command_again(settings, run, probe, Explained("val"), Browse())
        assert command.startswith(f"{prefix}python scripts/16_browse.py")


def test_a_latent_is_silent_if_no_image_of_any_data_set_activates_it(complete: Settings) -> None:
    """Without strengths, it is not known."""
    run, probe = of(complete)
    kept = kept_images(complete, run, "val", "pets")
    shown = read_run(complete, run, probe, "val", kept)
    other = np.zeros((2, shown.n_latents), np.float32)
    silent = (shown.strengths[0].toarray() == 0).all(axis=0)
    other[0, np.flatnonzero(silent)[:1]] = 1
    folder = Artifacts(complete).report(run, probe)
    both = replace(shown, strengths=(shown.strengths[0], scipy.sparse.csr_matrix(other)))
    two = [kept[0], replace(kept[0], dataset="b", keys=np.arange(2), labels=np.zeros(2, np.int64))]
    assert about_run(complete, both, probe, "val", two, "", folder)["n_silent"] == silent.sum() - 1
    none = replace(shown, strengths=(None,), probe=None, weight=None, probed=None)
    found = about_run(complete, none, probe, "val", kept, "", folder)
    assert (found["n_silent"], found["has_strengths"], found["has_probe"]) == (None, [False], False)
