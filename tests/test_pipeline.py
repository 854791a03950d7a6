"""The whole pipeline as a user runs it, on a small build of the embedded default.

Scripts run in this process, which has imported the libraries once; processes of their own are started where that is the point.
"""

import csv
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from playwright.sync_api import Page
from safetensors.torch import load_file

from dncbm.probe import nec
from dncbm.probe.nec_table import INPUTS
from dncbm.stages import PIPELINE_COMMANDS
from tests.browser.conftest import browser, open_page, served, settle, sites  # noqa: F401, fixtures

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "openmoji"
SMALL = ["--num_epochs", "30", "--probe_epochs", "20", "--num_workers", "1", "--batch_size", "32"]
AFTER_PROBE = ["--from", "zero_shot", "--n_clusters", "2", "--limit", "2", "--templates", "an emoji of {}"]
NAME = "lr0.001_l1coeff0.0005_ef1_rf10_hookout_bs64_epo{}_inputunit_norm"


class Done(NamedTuple):
    code: int
    stdout: str
    stderr: str


def run(script: str, *flags: str, config: Path, ok: bool = True) -> Done:
    """Run a script of the repository with a config, in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("DNCBM_CONFIG", str(config))
        patch.setattr(sys, "argv", [script, *flags])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as error:
            code = error.code
            if isinstance(code, str):
                print(code, file=err)
                code = 1
    assert (code in (0, None)) == ok, out.getvalue() + err.getvalue()
    return Done(int(code or 0), out.getvalue(), err.getvalue())  # type: ignore[call-overload]


def process(script: str, *flags: str, config: Path, **environment: str) -> "subprocess.Popen[str]":
    """Start a script in a process (and process group) of its own."""
    return subprocess.Popen(
        [sys.executable, "-u", str(ROOT / script), *flags],
        env=os.environ | {"DNCBM_CONFIG": str(config)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def built(small_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config for a small build of the embedded default."""
    folder = tmp_path_factory.mktemp("openmoji")
    shutil.copy(EXAMPLE / "config.py", folder)
    link_data(small_build, folder / "run")
    return folder / "config.py"


def link_data(build: Path, run_folder: Path) -> None:
    """Everything that a build made, as links: the encoder's folder names itself, so a copy has to be the same folder."""
    run_folder.mkdir()
    for path in build.iterdir():
        if path.name in ("webdataset", "categories", "outlines", "clip"):
            (run_folder / path.name).symlink_to(path)
    shutil.copytree(build / "vocab", run_folder / "vocab")
    shutil.copy(build / "encoder_report.json", run_folder)


@pytest.fixture(scope="module")
def finished(built: Path) -> Iterator[Path]:
    """The pipeline has run to its end. NEC, which other tests check, is solved less exactly here, to save time."""
    run("scripts/run_pipeline.py", *SMALL, config=built)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nec, "MAX_PASSES", 8)
        yield built


def files(folder: Path) -> dict[str, bytes]:
    """Contents of what the stages wrote, without the manifests (they hold times) and the results file."""
    found = {}
    for root in ("data", "SAE", "probe"):
        for path in sorted((folder / "run" / root).rglob("*")):
            if path.suffix in (".npy", ".npz", ".safetensors") or path.name == "concept_names.csv":
                found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def contents(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, since the bytes of an .npz hold the time it was written."""
    if path.suffix == ".safetensors":
        return {key: tensor.numpy() for key, tensor in load_file(path).items()}
    with np.load(path) as arrays:
        return dict(arrays)


def test_pipeline_writes_the_documented_layout(finished: Path) -> None:
    run_folder = finished.parent / "run"
    name = NAME.format(30)
    sae = run_folder / "SAE/SAEImg/openmoji/openmoji_clip/out" / name / "sae_checkpoints"
    probed = run_folder / "probe/openmoji/openmoji_clip/out" / name / "openmoji_categories"
    probe = "lr0.01_bs512_epo20_nobias_clCE_spL1_spl0.1"
    features = run_folder / "data/activations_img"
    for path in (
        features / "openmoji/openmoji_clip/out/train/00000.npy",
        features / "openmoji/openmoji_clip/out/train_val/manifest.json",
        features / "openmoji_categories/train_val_idxs.npy",
        features / "openmoji_categories/all_labels_val.npy",
        run_folder / "vocab/embeddings_openmoji_clip_openmoji_nouns.npy",
        sae / "sparse_autoencoder_final.safetensors",
        sae / "sparse_autoencoder_final.safetensors.manifest.json",
        sae / "concept_names.csv",
        probed / "val/all_concepts/00000.npz",
        probed / probe / "on_concepts_ckpts" / f"on_concepts_final_{probe}.safetensors",
        run_folder / "probe/probe_results.csv",
    ):
        assert path.is_file(), path
    assert not list(run_folder.rglob("*.unfinished")), "every artifact is finished"
    assert not list(run_folder.rglob("*state.safetensors")), "no training state is left behind"


def test_features_are_the_encoders_own(finished: Path) -> None:
    """A stored feature equals open_clip's output for that image, read from the tar by hand."""
    run_folder = finished.parent / "run"
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{run_folder / 'clip'}")
    stored = run_folder / "data/activations_img/openmoji/openmoji_clip/out/val"
    key = str(np.load(stored / "00000.keys.npy")[3])
    with tarfile.open(run_folder / "webdataset/validation/00000.tar") as tar:
        image = Image.open(io.BytesIO(tar.extractfile(f"{key}.jpg").read()))  # type: ignore[union-attr]
        with torch.inference_mode():
            expected = model.eval().encode_image(preprocess(image)[None])[0].numpy()
    np.testing.assert_allclose(np.load(stored / "00000.npy")[3], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_names_are_words_of_the_vocabulary(finished: Path) -> None:
    run_folder = finished.parent / "run"
    words = set((run_folder / "vocab/openmoji_nouns.txt").read_text().split())
    with next((run_folder / "SAE").rglob("concept_names.csv")).open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(384))
    assert {row["name"] for row in rows} <= words
    assert all(-1 <= float(row["similarity"]) <= 1 for row in rows)


def test_second_run_does_nothing(finished: Path) -> None:
    before = files(finished.parent)
    done = run("scripts/run_pipeline.py", *SMALL, config=finished)
    assert done.stdout.count("already done\n") == 7
    assert files(finished.parent) == before


def test_changed_setting_is_refused_and_named(finished: Path) -> None:
    done = run("scripts/02_train_sae_img.py", "--num_epochs", "30", "--adam_beta_1", "0.8", config=finished, ok=False)
    assert done.code == 1
    assert done.stderr.startswith("error: ")
    assert "adam_beta_1 was 0.9, now 0.8" in done.stderr
    assert "--overwrite" in done.stderr
    assert "Traceback" not in done.stderr


def test_pipeline_names_the_stale_stage(finished: Path, tmp_path: Path) -> None:
    """After new words, the names are stale: the pipeline says so, and --overwrite makes them again."""
    folder = copy_of(finished, tmp_path)
    words = folder / "run/vocab/openmoji_nouns.txt"
    words.write_text("\n".join(words.read_text().split()[:100]) + "\n")
    stale = run("scripts/run_pipeline.py", *SMALL, config=folder / "config.py", ok=False)
    assert "vocabulary      stale" in stale.stdout
    assert "words has changed" in stale.stderr
    redone = run("scripts/run_pipeline.py", *SMALL, "--overwrite", config=folder / "config.py")
    outcomes = dict(line.rsplit(maxsplit=1) for line in redone.stdout.splitlines() if line.startswith(("vocab", "names")))
    assert outcomes == {"vocabulary": "ran", "names": "ran"}
    assert "sae             already done" in redone.stdout


def test_another_seed_is_another_artifact(finished: Path) -> None:
    before = files(finished.parent)
    run("scripts/02_train_sae_img.py", "--num_epochs", "2", "--seed", "7", config=finished)
    after = files(finished.parent)
    assert before.items() <= after.items()
    assert [name for name in after if name not in before and "_seed7/" in name]


def test_probe_on_features_and_its_results_row(finished: Path) -> None:
    run("scripts/07_train_linear_probe.py", *SMALL[:4], "--probe_on_features", config=finished)
    with (finished.parent / "run/probe/probe_results.csv").open() as file:
        rows = {row["on"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"concepts", "features"}
    assert 0 <= float(rows["features"]["val_top1"]) <= float(rows["features"]["val_top5"]) <= 1


def test_summary_holds_what_it_promises(finished: Path, tmp_path: Path) -> None:
    config = copy_of(finished, tmp_path) / "config.py"
    flags = ["--num_epochs", "30", "--probe_epochs", "20"]
    run("scripts/07_train_linear_probe.py", *flags, "--probe_on_features", "--probe_lr", "1e-3", config=config)
    run("scripts/10_accuracy_at_nec.py", *flags[:2], config=config)
    done = run("examples/openmoji/summarise.py", *flags, config=config)
    summary = json.loads((config.parent / "run/analysis/summary.json").read_text())
    assert list(summary["sae"]) == ["train_val", "train"]
    assert all(set(figures) == {"l0", "explained_variance", "dead_fraction"} for figures in summary["sae"].values())
    assert set(summary["probe"]) == {"concepts_top1", "features_top1", "zero_shot_top1", "majority_top1"}
    assert set(summary["encoder"]) == {"retrieval_r1", "retrieval_r5", "retrieval_r10"}
    for measure in ("nec", "ncc"):
        assert set(summary[measure]) == set(INPUTS)
        assert all(list(top1) == ["5", "10", "15", "20", "25", "30"] for top1 in summary[measure].values())
    assert len(summary["names"]) <= 20
    assert all(set(name) == {"index", "name", "similarity", "top_images"} for name in summary["names"])
    assert set(summary["seconds"]) == {
        "sae_features", "sae", "vocabulary", "names", "probe_features", "strengths", "probe",
    }  # fmt: skip
    assert "on concepts" in done.stdout
    assert (config.parent / "run/analysis/concept_sheet.png").stat().st_size > 1000


def test_the_pipeline_runs_every_stage(finished: Path, tmp_path: Path) -> None:
    """Baselines, NEC, the table and all explanations; what is drawn needs only the dumps, and is drawn once."""
    folder = copy_of(finished, tmp_path)
    config, analysis = folder / "config.py", folder / "run/analysis"
    done = run("scripts/run_pipeline.py", *SMALL, *AFTER_PROBE, config=config)
    outcomes = outcomes_of(done)
    names = [command.name for command in PIPELINE_COMMANDS]
    assert list(outcomes) == names[names.index("zero_shot") :]
    assert set(outcomes.values()) == {"ran"}
    for line in ("### openmoji_clip", "| Zero-shot | ours |", "| DN-CBM | ours |", "ANEC-5, random directions"):
        assert line in done.stdout
    assert (analysis / "results.tex").is_file()
    pages = {"task_agnosticity": 2, "meta_clusters": 1, "local_explanations": 2, "global_explanations": 2}
    for kind, n_pages in pages.items():
        (sheet,) = (analysis / kind).rglob("index.html")
        assert len(list(sheet.parent.glob("*.pdf"))) == len(list(sheet.parent.glob("*.png"))) == n_pages
    assert next((folder / "run/probe").rglob("nec.png")).stat().st_size > 1000
    again = run("scripts/run_pipeline.py", *SMALL, *AFTER_PROBE, config=config)
    assert outcomes_of(again)["nec"] == outcomes_of(again)["zero_shot"] == "already done"
    for n_pages in pages.values():
        assert f"0 pages drawn, {n_pages} already drawn" in again.stdout


def test_the_demo_ends_with_its_browser(finished: Path, tmp_path: Path, open_page: Callable[..., Page]) -> None:  # noqa: F811
    """The last command of `make demo`, and what a double click then shows."""
    config, site = copy_of(finished, tmp_path) / "config.py", tmp_path / "browser"
    done = run("scripts/16_browse.py", "--browser_folder", str(site), config=config)
    assert done.stdout.splitlines()[-1] == f"open {site / 'index.html'}"
    page = open_page(site)
    assert page.locator("h1").text_content() == "Concepts of openmoji_clip"
    for view in ("concepts", "concepts?view=table", "concept/0", "classes", "class/0", "image/0/0?edit=0:0"):
        page.evaluate("hash => { location.hash = hash; }", f"#/{view}")
        settle(page)
        assert not re.search("cannot|no such", page.locator("h1").text_content() or "cannot", re.IGNORECASE), view


def test_flags_of_training_lead_to_the_explanations(finished: Path, tmp_path: Path) -> None:
    """A line of training flags can be pasted after any explanation script; without flags the only run is found."""
    config = copy_of(finished, tmp_path) / "config.py"
    flags = [*SMALL[:4], "--adam_beta_1", "0.9", "--probe_val_freq", "2", "--ckpt_freq", "0", "--limit", "1"]
    for kind in ("task_agnosticity", "meta_clustering", "local_explanations", "global_explanations"):
        clusters = ["--n_clusters", "2"] if kind == "meta_clustering" else []
        dumped = run(f"scripts/visualization/vis_{kind}_dump.py", *flags, *clusters, config=config)
        assert "the only one" not in dumped.stdout
        plotted = run(f"scripts/visualization/vis_{kind}_plot.py", "--num_workers", "1", config=config)
        assert "the only one that the flags allow" in plotted.stdout
        assert "1 page drawn" in plotted.stdout


def test_wandb_is_imported_only_for_those_who_ask(finished: Path, tmp_path: Path) -> None:
    """Offline, in a process of its own; without the flag a wandb that cannot be imported does no harm."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "wandb.py").write_text("raise ImportError('wandb must not be imported')\n")
    path = os.pathsep.join([str(blocked), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    flags = ["--num_epochs", "3", "--save_suffix"]
    logged = process(
        "scripts/02_train_sae_img.py", *flags, "_wandb", "--use_wandb",
        config=finished, WANDB_MODE="offline", WANDB_DIR=str(tmp_path),
    )  # fmt: skip
    silent = process("scripts/02_train_sae_img.py", *flags, "_off", config=finished, PYTHONPATH=path)
    assert silent.wait(timeout=120) == 0
    assert logged.wait(timeout=120) == 0
    assert list((tmp_path / "wandb").glob("offline-run-*")), "the run is on disk"


@pytest.mark.parametrize(
    ("until", "kept"), [("", ()), ("== sae\n", ("openmoji",)), ("== probe\n", ("openmoji", "openmoji_categories"))]
)
def test_killed_and_run_again_ends_the_same(
    small_build: Path, finished: Path, tmp_path: Path, until: str, kept: tuple[str, ...]
) -> None:
    """SIGKILL when a stage has begun; the same command then ends with what an uninterrupted run made.

    Features of the stages before (`kept`) are copies, to save time.
    """
    folder = tmp_path / "again"
    folder.mkdir()
    shutil.copy(finished, folder)
    link_data(small_build, folder / "run")
    features = Path("run/data/activations_img")
    for name in kept:
        shutil.copytree(finished.parent / features / name, folder / features / name)
    killed = process("scripts/run_pipeline.py", *SMALL, config=folder / "config.py")
    assert killed.stdout is not None
    if until:
        for line in killed.stdout:
            if until in line:
                break
    else:
        first = folder / features / "openmoji/openmoji_clip/out/train/00000.npy"
        while not first.is_file() and killed.poll() is None:
            time.sleep(0.01)
    time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "it was killed in the middle"
    run("scripts/run_pipeline.py", *SMALL, config=folder / "config.py")
    expected = {name: data for name, data in files(finished.parent).items() if "_epo30_" in name or "/data/" in name}
    expected = {name: data for name, data in expected.items() if "seed7" not in name and "on_features" not in name}
    found = files(folder)
    assert set(found) == set(expected)
    for name, data in expected.items():
        if name.endswith((".npz", ".safetensors")):
            ours, theirs = contents(folder / name), contents(finished.parent / name)
            assert all(np.array_equal(ours[key], theirs[key]) for key in theirs), name
        else:
            assert found[name] == data, name


def test_sigterm_saves_and_the_same_command_resumes(finished: Path) -> None:
    """A cluster's warning: training exits with 0 and a sentence, and ends later with the bits of an uninterrupted run."""
    flags = ["--num_epochs", "400"]
    run("scripts/02_train_sae_img.py", *flags, "--save_suffix", "_whole", config=finished)
    stopped = process("scripts/02_train_sae_img.py", *flags, "--save_suffix", "_halved", config=finished)
    checkpoints = finished.parent / "run/SAE/SAEImg/openmoji/openmoji_clip/out"
    name = NAME.format(400)
    log = checkpoints / f"{name}_halved" / "sae_checkpoints" / "training_log.csv"
    while not (log.is_file() and len(log.read_text().splitlines()) > 2):
        assert stopped.poll() is None, "it ended before it was stopped"
        time.sleep(0.01)
    stopped.terminate()
    said, _ = stopped.communicate(timeout=60)
    assert stopped.returncode == 0
    assert "the same command resumes" in said
    halved = log.with_name("sparse_autoencoder_final.safetensors")
    assert not halved.exists()
    run("scripts/02_train_sae_img.py", *flags, "--save_suffix", "_halved", config=finished)
    assert halved.read_bytes() == (checkpoints / f"{name}_whole/sae_checkpoints" / halved.name).read_bytes()


def test_published_checkpoint_is_read_as_it_is(finished: Path, tmp_path: Path) -> None:
    """The authors' .pt at the SAE's place: training leaves it alone, and the stages after it use it."""
    folder = copy_of(finished, tmp_path)
    checkpoints = next((folder / "run/SAE").rglob("*_epo30_*/sae_checkpoints"))
    trained = load_file(checkpoints / "sparse_autoencoder_final.safetensors")
    shutil.rmtree(checkpoints)
    checkpoints.mkdir()
    published = {
        "tied_bias": trained["tied_bias"],
        "pre_encoder_bias._bias_reference": trained["tied_bias"],
        "post_decoder_bias._bias_reference": trained["tied_bias"],
        "encoder._weight": trained["encoder_weight"],
        "encoder._bias": trained["encoder_bias"],
        "decoder._weight": trained["decoder_weight"],
    }
    torch.save({key: value[None] for key, value in published.items()}, checkpoints / "sparse_autoencoder_final.pt")
    done = run("scripts/run_pipeline.py", *SMALL, "--overwrite", config=folder / "config.py")
    assert "sae             provided" in done.stdout
    assert "names           ran" in done.stdout
    assert not (checkpoints / "sparse_autoencoder_final.safetensors").exists()


CONTRIBUTED = """
import sys
from pathlib import Path
from dncbm.cli import main
from dncbm.runs.settings import load_settings

settings = load_settings()
assert settings.encoder("mine").pretrained == "laion2b_s34b_b79k"
assert settings.probe_datasets["birds"].path == settings.path.parent / "datasets/birds"
main("sae", ["--num_epochs", "1", "--sae_type", "shifted", "--margin", "0.25"])
main("names", ["--num_epochs", "1", "--sae_type", "shifted", "--margin", "0.25"])
for _ in range(2):
    main("class_sizes", [])
    main("active_concepts_dump", ["--num_epochs", "30", "--indices", "3,5"])
    main("active_concepts_plot", ["--num_workers", "1"])
"""


def test_what_contributing_says_is_true(finished: Path, tmp_path: Path) -> None:
    """The code on the page, put where the page says in a copy of the tree, gives a variant, a stage and a figure that run."""
    page = (ROOT / "docs/CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.findall(r"^ *```python\n(.*?)^ *```", page, flags=re.S | re.M)
    blocks = [textwrap.dedent(block) for block in found]
    encoder, dataset, variant, path, stage, script, dump, plot = blocks
    tree = tmp_path / "tree"
    for name in ("dncbm", "sparse_autoencoder", "scripts"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))

    def insert(file: str, before: str, text: str) -> None:
        old = (tree / file).read_text(encoding="utf-8")
        assert old.count(before) >= 1, f"{file}: {before!r}"
        (tree / file).write_text(old.replace(before, text + before, 1), encoding="utf-8")

    variants = "sparse_autoencoder/sparse_autoencoder/variants"
    new = {f"{variants}/shifted.py": variant, "dncbm/features/class_sizes.py": stage, "scripts/20_class_sizes.py": script}
    new |= {"dncbm/explain/dumps/active_concepts.py": dump, "dncbm/explain/plotting/active_concepts.py": plot}
    for name, text in new.items():
        (tree / name).write_text(text, encoding="utf-8")
    insert(f"{variants}/__init__.py", "\nVARIANTS", "from sparse_autoencoder.variants.shifted import Shifted\n")
    insert(f"{variants}/__init__.py", "TopK, BatchTopK, JumpReLU", "Shifted, ")
    insert("dncbm/runs/artifacts.py", "    def labels(self", textwrap.indent(path, "    ") + "\n")
    plot_import = "from dncbm.explain.plotting.active_concepts import PLOT as ACTIVE_CONCEPTS\n"
    insert("dncbm/stages.py", "from dncbm.runs", plot_import + "from dncbm.features.class_sizes import CLASS_SIZES\n")
    insert("dncbm/stages.py", "    STRENGTHS,\n    PROBE,\n", "    CLASS_SIZES,\n")
    insert("dncbm/stages.py", "    *TASK_AGNOSTICITY.commands,\n", "    *ACTIVE_CONCEPTS.inputs,\n    ACTIVE_CONCEPTS,\n")

    config = copy_of(finished, tmp_path) / "config.py"
    with config.open("a") as file:
        file.write(f"encoders |= {{{encoder}}}\nprobe_datasets |= {{{dataset}}}\n")
    done = subprocess.run(
        [sys.executable, "-c", CONTRIBUTED],
        env=os.environ | {"DNCBM_CONFIG": str(config), "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'sparse_autoencoder'}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = config.parent / "run"
    assert next((results / "SAE").rglob("*_shifted0.25_*/sae_checkpoints/concept_names.csv"))
    sizes = json.loads(next((results / "data").rglob("class_sizes.json")).read_text())
    assert sum(sizes) == len(list((results / "categories/train").rglob("*.jpg")))
    drawn = {path.name for path in (results / "analysis/active_concepts").rglob("*.pdf")}
    assert drawn == {"image_000003.pdf", "image_000005.pdf"}
    assert "0 pages drawn, 2 already drawn" in done.stdout


def outcomes_of(done: Done) -> dict[str, str]:
    """Stage -> what it did, as the pipeline prints it at its end."""
    lines = done.stdout.split("\n==\n")[-1].splitlines()
    return {stage: outcome.strip() for stage, outcome in (line.split(maxsplit=1) for line in lines)}


def copy_of(finished: Path, tmp_path: Path) -> Path:
    """A copy of everything, to change; what the build made stays links."""
    folder = tmp_path / "copy"
    shutil.copytree(finished.parent, folder, symlinks=True)
    return folder
