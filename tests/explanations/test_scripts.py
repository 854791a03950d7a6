"""The eight scripts of scripts/visualization, with the paper's commands and with flags."""

import json

import pytest
import torch

from dncbm.artifacts import ProbeRun, SAERun
from dncbm.dumps import meta_clusters
from dncbm.probing import save_probe

COMMON = "--img_enc_name clip_RN50 --probe_split val --method_name ours --sae_dataset cc3m"
PLACES = f"{COMMON} --probe_dataset places365"
CUDA, CPU = "--device cuda", "--device cpu"
PROBE = "--which_ckpt final"


@pytest.fixture
def few_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's 500 clusters do not suit 60 images."""
    monkeypatch.setitem(meta_clusters.PAPER_CLUSTERS, "places365", 4)


def pages(world, kind: str) -> list[str]:
    """Names of the pages drawn of a kind; each is a PDF and a PNG."""
    folder = world.settings.analysis_dir / kind / "clip_RN50"
    pdfs = sorted(path.stem for path in folder.rglob("vis/*.pdf"))
    assert pdfs == sorted(path.stem for path in folder.rglob("vis/*.png"))
    return pdfs


@pytest.mark.usefixtures("few_clusters")
@pytest.mark.parametrize(
    ("kind", "name", "dump", "plot", "n_pages"),
    [
        ("task_agnosticity", "task_agnosticity", f"{COMMON} {CUDA}", f"{COMMON} {CPU}", 4),
        ("meta_clusters", "meta_clustering", f"{PLACES} {CUDA}", f"{PLACES} {CPU}", 2),
        ("local_explanations", "local_explanations", f"{PLACES} {PROBE}", f"{PLACES} {PROBE} {CPU}", 60),
        (
            "global_explanations",
            "global_explanations",
            f"{PLACES} {PROBE}",
            f"{PLACES} {PROBE} {CPU}".replace(" --sae_dataset cc3m", ""),
            3,
        ),
    ],
)
def test_the_papers_commands(world, script, capsys, kind: str, name: str, dump: str, plot: str, n_pages: int) -> None:
    script(f"vis_{name}_dump.py", *dump.split())
    said = capsys.readouterr().out
    assert f"SAE: {SAERun().config_name} (the paper's settings)" in said
    if "which_ckpt" in dump:
        assert f"probe: {ProbeRun('places365').config_name} (the paper's settings)" in said
    script(f"vis_{name}_plot.py", *plot.split(), "--num_workers", "1")
    assert len(pages(world, kind)) == n_pages
    said = capsys.readouterr().out
    folder = next((world.settings.analysis_dir / kind).rglob("vis"))
    assert f"{n_pages} pages drawn: {folder}" in said
    assert f"contact sheet: {folder / 'index.html'}" in said
    script(f"vis_{name}_dump.py", *dump.split())
    script(f"vis_{name}_plot.py", *plot.split(), "--num_workers", "1")
    said = capsys.readouterr().out
    assert "already done" in said
    assert f"0 pages drawn, {n_pages} were there" in said


def test_flags_choose_what_is_drawn(world, script) -> None:
    script("vis_local_explanations_dump.py", "--indices", "8, 2, 8")
    script("vis_local_explanations_plot.py")
    assert pages(world, "local_explanations") == ["image_000002", "image_000008"]
    script("vis_global_explanations_dump.py", "--classes", "coast,beach")
    script("vis_global_explanations_plot.py", "--classes", "coast")
    script("vis_global_explanations_plot.py", "--classes", "coast", "--rank_by", "strength")
    assert pages(world, "global_explanations") == ["class_0001_coast", "class_0001_coast_by_strength"]
    script("vis_task_agnosticity_dump.py", "--concepts", "dog,sky", "--probe_dataset", "places365")
    script("vis_task_agnosticity_plot.py", "--limit", "1")
    (name,) = pages(world, "task_agnosticity")
    assert sorted(name.removeprefix("latents_").split("_")) == ["1", "3", "6"]
    script("vis_meta_clustering_dump.py", "--n_clusters", "3", "--limit", "1")
    script("vis_meta_clustering_plot.py")  # the only one there is
    assert len(pages(world, "meta_clusters")) == 1


def test_the_flags_of_training_name_the_runs(world, script, capsys) -> None:
    """The same flags as scripts 02 and 07, all of them in the paper's spelling."""
    other = ProbeRun("places365", lr=0.5, sparsity_lambda=2.0, epochs=7)
    save_probe(torch.from_numpy(-world.weight), world.artifacts.probe(world.run, other))
    sae = "--lr 5e-4 --l1_coeff 3e-5 --expansion_factor 8 --num_epochs 200 --resample_freq 10 --train_sae_bs 4096"
    losses = "--probe_sparsity_loss_lambda 2.0 --probe_classification_loss CE --probe_sparsity_loss L1"
    probe = f"--probe_lr 0.5 --probe_epochs 7 --probe_eval_coverage_freq 50 {losses}"
    flags = [
        *sae.split(),
        *probe.split(),
        *["--ckpt_freq", "0", "--val_freq", "1", "--adam_beta_1", "0.9", "--limit", "1"],
    ]
    script("vis_local_explanations_dump.py", *flags)
    assert "paper's" not in capsys.readouterr().out
    script("vis_local_explanations_plot.py", *flags)
    (folder,) = (world.settings.analysis_dir / "local_explanations").rglob("vis")
    assert folder.parent.name == other.config_name
    assert folder == world.artifacts.figures(world.artifacts.local_explanations(world.run, other, "val"))


def test_the_only_trained_run_is_taken_and_said(world, script, capsys) -> None:
    """Another SAE and another probe than the paper's, and no flag."""
    other, probe = SAERun(suffix="_mine", expansion_factor=2), ProbeRun("places365", solver="prox")
    artifacts = world.artifacts
    old = artifacts.probe(world.run, world.probe)
    old.parent.rename(old.parent.with_name("away"))
    save_probe(torch.from_numpy(world.weight), artifacts.probe(world.run, probe))
    moved = {artifacts.sae(world.run).parents[1]: artifacts.sae(other).parents[1]}
    moved[artifacts.strengths(world.run, "places365", "val").parents[2]] = artifacts.strengths(other, "x", "y").parents[
        2
    ]
    for found, wanted in moved.items():
        found.rename(wanted)
    script("vis_local_explanations_dump.py", "--limit", "3")
    said = capsys.readouterr().out
    assert (
        f"SAE: {other.config_name} (the only one there; the paper's settings would be {SAERun().config_name})" in said
    )
    assert f"probe: {probe.config_name} (the only one there" in said
    script("vis_local_explanations_plot.py")
    assert "the only one computed" in capsys.readouterr().out
    assert len(pages(world, "local_explanations")) == 3


@pytest.mark.parametrize("kind", ["task_agnosticity", "meta_clustering", "local_explanations", "global_explanations"])
@pytest.mark.parametrize("step", ["dump", "plot"])
class TestRefusals:
    def test_another_method(self, script, capsys, kind: str, step: str) -> None:
        with pytest.raises(SystemExit) as caught:
            script(f"vis_{kind}_{step}.py", "--method_name", "lf-cbm")
        assert caught.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert "only `ours`, DN-CBM, is here to explain; 'lf-cbm' is another method" in last

    def test_another_checkpoint(self, script, capsys, kind: str, step: str) -> None:
        with pytest.raises(SystemExit):
            script(f"vis_{kind}_{step}.py", "--which_ckpt", "50")
        assert "only the `final` probe is explained" in capsys.readouterr().err

    def test_indices_that_are_none(self, script, capsys, kind: str, step: str) -> None:
        with pytest.raises(SystemExit):
            script(f"vis_{kind}_{step}.py", "--indices", "1,x")
        assert "whole numbers separated by commas" in capsys.readouterr().err

    def test_nothing_there_yet(self, script, kind: str, step: str) -> None:
        """One line that names the script to run."""
        with pytest.raises(SystemExit) as caught:
            script(f"vis_{kind}_{step}.py", "--img_enc_name", "openclip:RN50/openai")
        expected = f"vis_{kind}_dump.py" if step == "plot" else "02_train_sae_img.py"
        assert str(caught.value.code).startswith("error: ")
        assert expected in str(caught.value.code)
        assert "\n" not in str(caught.value.code)


def test_features_are_not_explained(script) -> None:
    with pytest.raises(SystemExit, match="features have no names"):
        script("vis_local_explanations_dump.py", "--probe_on_features")


def test_a_name_that_is_none(script) -> None:
    with pytest.raises(SystemExit, match="no latent has the name 'dgo'; near it are dog"):
        script("vis_task_agnosticity_dump.py", "--concepts", "dgo")


def test_a_data_set_without_a_probe(script) -> None:
    with pytest.raises(SystemExit, match=r"07_train_linear_probe\.py"):
        script("vis_global_explanations_dump.py", "--probe_dataset", "mine")


def test_nothing_of_torch_is_pickled(world, script) -> None:
    script("vis_global_explanations_dump.py")
    folder = next((world.settings.analysis_dir / "global_explanations").rglob("data"))
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".npz", ".jpg"}
    assert json.loads((folder / "manifest.json").read_text())["stage"] == "global_explanations"


def test_defaults_of_the_config_are_the_preset(world, script, capsys) -> None:
    """They name the probe, as a flag would; the SAE is the paper's still."""
    with world.settings.path.open("a") as file:
        file.write("defaults = {'probe_lr': 0.5, 'probe_dataset': 'places365', 'num_workers': 1, 'n_clusters': 3}\n")
    other = ProbeRun("places365", lr=0.5)
    save_probe(torch.from_numpy(-world.weight), world.artifacts.probe(world.run, other))
    script("vis_global_explanations_dump.py", "--limit", "1")
    said = capsys.readouterr().out
    assert f"SAE: {SAERun().config_name} (the paper's settings)" in said
    assert f"probe: {other.config_name} (as `defaults` of config.py say)" in said
    script("vis_global_explanations_plot.py")
    assert other.config_name in capsys.readouterr().out
    script("vis_meta_clustering_dump.py")
    assert (world.artifacts.meta_clusters(world.run, "places365", "val", 3) / "data" / "chosen.json").is_file()
