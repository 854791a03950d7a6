"""The stages of explanations from the command line: the paper's commands, and flags."""

import json

import numpy as np
import pytest
from PIL import Image

from dncbm.explain.dumps import local_explanations, meta_clusters, task_agnosticity
from dncbm.explain.plotting import STAGES
from dncbm.explain.plotting.canvas import Canvas
from dncbm.runs.declarations import ProbeRun, SAERun

pytestmark = pytest.mark.slow

COMMON = "--img_enc_name clip_RN50 --probe_split val --method_name ours --sae_dataset cc3m"
PLACES = f"{COMMON} --probe_dataset places365"
PROBED = f"{PLACES} --which_ckpt final"
KINDS = ["task_agnosticity", "meta_clusters", "local_explanations", "global_explanations"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults that suit 60 images."""
    monkeypatch.setitem(meta_clusters.PAPER_CLUSTERS, "places365", 4)
    monkeypatch.setattr(local_explanations, "FIGURES", 2)
    monkeypatch.setattr(task_agnosticity, "FIGURES", 1)


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are files without a picture, since drawing is tested elsewhere."""

    def save(self: Canvas, *paths_and_description: object) -> None:
        for path in paths_and_description[:2]:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"")

    monkeypatch.setattr(Canvas, "save", save)


def pages(world, kind: str) -> list[str]:
    """Names of the pages drawn of a kind; each is a PDF and a PNG."""
    folder = world.settings.analysis_dir / kind / "clip_RN50"
    pdfs = sorted(path.stem for path in folder.rglob("vis/*.pdf"))
    assert pdfs == sorted(path.stem for path in folder.rglob("vis/*.png"))
    return pdfs


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("kind", "dump", "plot", "n_pages"),
    [
        ("task_agnosticity", f"{COMMON} --device cuda", f"{COMMON} --device cpu", 1),
        ("meta_clusters", f"{PLACES} --device cuda", f"{PLACES} --device cpu", 2),
        ("local_explanations", PROBED, f"{PROBED} --device cpu", 2),
        ("global_explanations", PROBED, f"{PROBED} --device cpu".replace(" --sae_dataset cc3m", ""), 3),
    ],
)
def test_the_papers_commands(world, script, capsys, kind: str, dump: str, plot: str, n_pages: int) -> None:
    script(f"{kind}_dump", dump)
    said = capsys.readouterr().out
    trained = world.artifacts.probe(world.run, world.probe) if "which_ckpt" in dump else world.artifacts.sae(world.run)
    assert f"{'probe' if 'which_ckpt' in dump else 'sae'}: {trained}\n" in said
    script(f"{kind}_plot", f"{plot} --num_workers 1")
    assert len(pages(world, kind)) == n_pages
    said = capsys.readouterr().out
    folder = next((world.settings.analysis_dir / kind).rglob("vis"))
    assert f"{kind}_dump: {folder.parent}\n" in said
    assert f"{n_pages} page{'s' if n_pages > 1 else ''} drawn: {folder}\n" in said
    assert f"contact sheet: {folder / 'index.html'}\n" in said
    script(f"{kind}_dump", dump)
    script(f"{kind}_plot", f"{plot} --num_workers 1")
    said = capsys.readouterr().out
    assert "already done" in said
    assert f"0 pages drawn, {n_pages} already drawn" in said


def test_figures_are_of_their_data_set(world, script, image_colour) -> None:
    """Both data sets have images of the numbers shown, each in its own colour."""
    script("task_agnosticity_dump", "--indices 6")
    script("task_agnosticity_plot", "--num_workers 1")
    (path,) = (world.settings.analysis_dir / "task_agnosticity").rglob("vis/latents_6.png")
    with Image.open(path) as image:
        shown = np.asarray(image.convert("RGB")).astype(int)
    half = shown.shape[1] // 2
    # The latent activates rows 5 and 2 most, in this order; a row of places365 is another image where one is missing.
    expected = {"places365": world.keys[[5, 2]].tolist(), "mine": [5, 2]}
    for part, (dataset, indices) in zip((shown[:, :half], shown[:, half:]), expected.items(), strict=True):
        colours = [image_colour("mine val" if dataset == "mine" else dataset, index) for index in indices]
        middles = []
        for colour in colours:
            found = np.nonzero((np.abs(part - colour).max(axis=2) < 8).sum(axis=0) > 20)[0]
            assert len(found) > 20, (dataset, colour)
            middles.append(found.mean())
        assert middles == sorted(middles), dataset


@pytest.mark.usefixtures("unpainted")
def test_flags_choose_what_is_drawn(world, script) -> None:
    script("local_explanations_dump", "--indices 8,2,8")
    script("local_explanations_plot")
    assert pages(world, "local_explanations") == ["image_000002", "image_000008"]
    script("global_explanations_dump", "--classes coast,beach")
    script("global_explanations_plot", "--classes coast")
    script("global_explanations_plot", "--classes coast --rank_by strength")
    assert pages(world, "global_explanations") == ["class_0001_coast", "class_0001_coast_by_strength"]
    script("task_agnosticity_dump", "--concepts dog,sky --probe_dataset places365")
    script("task_agnosticity_plot", "--limit 1")
    (name,) = pages(world, "task_agnosticity")
    assert sorted(name.removeprefix("latents_").split("_")) == ["1", "3", "6"]
    script("meta_clusters_dump", "--n_clusters 3 --limit 1")
    script("meta_clusters_plot")  # the only one
    assert len(pages(world, "meta_clusters")) == 1


@pytest.mark.usefixtures("unpainted")
def test_overwrite_reaches_dump_and_plot(world, script, capsys) -> None:
    script("global_explanations_dump", "--limit 1")
    script("global_explanations_plot")
    world.save_names([f"other{i}" for i in range(len(world.names))])
    with pytest.raises(SystemExit, match=r"error: .*names has changed.*--overwrite"):
        script("global_explanations_dump", "--limit 1")
    script("global_explanations_dump", "--limit 1 --overwrite")
    (about,) = world.settings.analysis_dir.rglob("about.json")
    assert json.loads(about.read_text())["labels"][0] == "other0"
    (page,) = world.settings.analysis_dir.rglob("vis/*.pdf")
    page.write_bytes(b"drawn before")
    script("global_explanations_plot", "--overwrite")
    assert page.read_bytes() == b""


@pytest.mark.usefixtures("unpainted")
def test_the_flags_of_training_name_the_runs(world, script, capsys) -> None:
    """The same flags as scripts 02 and 07, all of them in the paper's spelling."""
    other = ProbeRun("places365", lr=0.5, sparsity_lambda=2.0, epochs=7)
    world.save_probe(-world.weight, other)
    sae = "--lr 5e-4 --l1_coeff 3e-5 --expansion_factor 8 --num_epochs 200 --resample_freq 10 --train_sae_bs 4096"
    losses = "--probe_sparsity_loss_lambda 2.0 --probe_classification_loss CE --probe_sparsity_loss L1"
    probe = f"--probe_lr 0.5 --probe_epochs 7 {losses}"
    script("local_explanations_dump", f"{sae} {probe} --limit 1")
    assert f"probe: {world.artifacts.probe(world.run, other)}\n" in capsys.readouterr().out
    script("local_explanations_plot", f"{sae} {probe} --limit 1")
    (folder,) = (world.settings.analysis_dir / "local_explanations").rglob("vis")
    assert folder == world.artifacts.local_explanations(world.run, other, "val").figures


@pytest.mark.usefixtures("unpainted")
def test_the_only_trained_run_is_taken_and_named(world, script, capsys) -> None:
    """Another SAE and another probe than the paper's, and no flag."""
    other, probe = SAERun(suffix="_mine", expansion_factor=2), ProbeRun("places365", solver="prox")
    artifacts = world.artifacts
    for path in (artifacts.sae(world.run), artifacts.probe(world.run, world.probe)):
        path.rename(path.with_suffix(".away"))
        path.with_name(f"{path.name}.manifest.json").unlink()
    world.save_sae(other)
    world.save_probe(world.weight, probe, other)
    script("local_explanations_dump", "--limit 3")
    assert f"probe: {artifacts.probe(other, probe)} (the only one that the flags allow)" in capsys.readouterr().out
    script("meta_clusters_dump", "--n_clusters 3 --limit 1")
    assert f"sae: {artifacts.sae(other)} (the only one that the flags allow)" in capsys.readouterr().out
    script("local_explanations_plot")
    folder = artifacts.local_explanations(other, probe, "val").dump.parent
    assert f"local_explanations_dump: {folder} (the only one that the flags allow)" in capsys.readouterr().out
    assert len(pages(world, "local_explanations")) == 3


@pytest.mark.usefixtures("unpainted")
def test_one_of_several_has_to_be_named(world, script) -> None:
    for k in (3, 4):
        script("meta_clusters_dump", f"--n_clusters {k} --limit 1")
    with pytest.raises(SystemExit, match=r"several outputs of `meta_clusters_dump`.*--n_clusters 3.*--n_clusters 4"):
        script("meta_clusters_plot")
    script("meta_clusters_plot", "--n_clusters 4")
    (folder,) = world.settings.analysis_dir.rglob("vis")
    assert folder.parent.name == "k4"


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
class TestRefusals:
    @pytest.mark.parametrize(
        ("flags", "complaint"),
        [
            ("--method_name lf-cbm", "must be ours, not 'lf-cbm'"),
            ("--which_ckpt 50", "must be final, not '50'"),
            ("--indices 1,x", "whole numbers separated by commas"),
            ("--limit 0", "at least 1"),
        ],
    )
    def test_values_that_are_not_allowed(self, script, capsys, stage, flags: str, complaint: str) -> None:
        with pytest.raises(SystemExit) as caught:
            script(stage.name, flags)
        assert caught.value.code == 2
        assert complaint in capsys.readouterr().err.splitlines()[-1]

    def test_missing_inputs(self, script, stage) -> None:
        """One line that names what is missing first, and how it is made."""
        with pytest.raises(SystemExit) as caught:
            script(stage.name, "--img_enc_name openclip:RN50/openai")
        message = str(caught.value.code)
        assert message.startswith("error: ")
        assert "\n" not in message
        assert "python scripts/02_train_sae_img.py" in message


def test_every_kind_has_a_dump_and_a_plot() -> None:
    assert [stage.name for stage in STAGES] == [f"{kind}_{step}" for kind in KINDS for step in ("dump", "plot")]
    scripts = ("task_agnosticity", "meta_clustering", "local_explanations", "global_explanations")
    assert [stage.script for stage in STAGES] == [
        f"visualization/vis_{name}_{step}.py" for name in scripts for step in ("dump", "plot")
    ]


def test_features_are_not_explained(script) -> None:
    with pytest.raises(SystemExit, match="features have no names"):
        script("local_explanations_dump", "--probe_on_features")


def test_an_unknown_name(script) -> None:
    with pytest.raises(SystemExit, match=r"no latent has the name 'dgo'; did you mean dog.*\?"):
        script("task_agnosticity_dump", "--concepts dgo")


def test_a_data_set_without_a_probe(script) -> None:
    with pytest.raises(SystemExit, match=r"07_train_linear_probe\.py"):
        script("global_explanations_dump", "--probe_dataset mine")


@pytest.mark.usefixtures("unpainted")
def test_defaults_of_the_config_are_the_preset(world, script, capsys) -> None:
    """They name the probe as a flag would; the SAE stays the paper's."""
    with world.settings.path.open("a") as file:
        file.write("defaults = {'probe_lr': 0.5, 'probe_dataset': 'places365', 'num_workers': 1, 'n_clusters': 3}\n")
    other = ProbeRun("places365", lr=0.5)
    world.save_probe(-world.weight, other)
    script("global_explanations_dump", "--limit 1")
    assert f"probe: {world.artifacts.probe(world.run, other)}\n" in capsys.readouterr().out
    script("global_explanations_plot")
    assert other.config_name in capsys.readouterr().out
    script("meta_clusters_dump")
    assert world.artifacts.meta_clusters(world.run, "places365", "val", 3).chosen.is_file()
