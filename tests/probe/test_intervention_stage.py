"""The intervention stage: what it writes and prints, what it refuses, and what it suggests."""

import csv
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import dncbm.probe.intervention_stage
from dncbm.concepts.lists import read_concepts
from dncbm.concepts.naming import ConceptName, concept_labels, read_names, write_names
from dncbm.concepts.sae import load_sae
from dncbm.features.encoders import Encoder
from dncbm.probe.intervention_stage import factors_asked, measure_intervention, nearest_concepts, table
from dncbm.probe.interventions import Row
from dncbm.probe.results_table import our_cells, published_figures
from dncbm.probe.stage import load_probe, train_linear_probe
from dncbm.runs.declarations import Intervention, ProbeRun
from dncbm.runs.errors import StaleArtifact
from dncbm.runs.manifests import Outcome, read_manifest
from dncbm.runs.results import read_results

SCRIPT = Path(__file__).parents[2] / "scripts" / "13_intervene.py"
PROBE = ProbeRun("mine", lr=0.05, batch_size=32, epochs=10, sparsity_lambda=0.5)
WORDS = ("sea", "dog", "dog", "sand", "#1", "7", "tree", "a, b", "sky", "cat", "red", "blue")
NAMES = [ConceptName(index, word, 0.5) for index, word in enumerate(WORDS)]
KINDS = ["unedited", "unedited, refit", "edited", "refit", "random"]


@pytest.fixture
def probed(mine, write_labels):
    """`mine` with names, groups and a probe."""
    own = {split: np.load(mine.artifacts.labels("mine", split)) for split in ("train", "val")}
    about = {"class_names": ["a", "b", "c", "d"], "group_names": ["north", "south"]}
    write_labels(mine.settings, about, own, np.arange(40) // 2 % 2)
    write_names(mine.artifacts.concept_names(mine.run), NAMES)
    train_linear_probe(mine.settings, mine.run, PROBE, device="cpu")
    return mine


@pytest.fixture
def script(probed, monkeypatch, tmp_path: Path):
    """Runs the script on `mine`, in the folder of the lists."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str) -> None:
        monkeypatch.setattr(
            sys, "argv", ["13_intervene.py", "--img_enc_name", "enc", "--probe_dataset", "mine", "--device", "cpu", *flags]
        )
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return run


def measure(mine, edit: Intervention, **options) -> Outcome:
    return measure_intervention(mine.settings, mine.run, PROBE, edit, **{"device": "cpu"} | options)


def artifact(mine, stem: str) -> Path:
    (found,) = mine.artifacts.intervention(mine.run, PROBE, "x").parent.glob(f"{stem}_*.csv")
    return found


def results(mine) -> list[dict[str, str]]:
    return [row for row in read_results(mine.artifacts.probe_results()) if row["method"] == "intervention"]


@pytest.mark.parametrize(
    ("flags", "lists", "stem", "factors"),
    [
        (["--remove", "list"], {"list": "dog\n4\nsky\n"}, "remove4", {1: 0, 2: 0, 4: 0, 8: 0}),
        (["--concepts", "dog #2,11", "--scale", "list"], {"list": "a, b,0.5\nsea\t2\n"}, "remove2_scale2",
         {2: 0, 11: 0, 7: 0.5, 0: 2}),
        (["--keep", "list", "--scale", "factors"], {"list": "sea\ncat\n\\7\n", "factors": "red,0.25"}, "keep4_scale1",
         dict.fromkeys((1, 2, 3, 4, 6, 7, 8, 11), 0) | {10: 0.25}),
    ],
    ids=["remove", "concepts and scale", "keep and scale"],
)  # fmt: skip
def test_the_script_writes_every_accuracy(
    probed, script, tmp_path: Path, capsys, flags: list[str], lists: dict[str, str], stem: str, factors: dict[int, float]
) -> None:
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
    before = our_cells(read_results(probed.artifacts.probe_results()), "enc")
    script(*flags)
    path = artifact(probed, stem)
    printed = capsys.readouterr().out
    assert str(path) in printed
    title = next(line for line in printed.splitlines() if line.startswith("top-1 on val"))
    assert title.split()[-5:] == ["overall", "north", "south", "worst", "group"]

    by_hand = np.ones(12)
    by_hand[list(factors)] = list(factors.values())
    weight, z, labels = load_probe(probed.settings, probed.run, PROBE).numpy(), probed.values["val"], probed.labels["val"]
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(dict.fromkeys(line["row"] for line in lines)) == KINDS
    north = probed.keys["val"] // 2 % 2 == 0
    for kind, of_kind in (("unedited", np.ones(12)), ("edited", by_hand)):
        right = (z * of_kind @ weight).argmax(axis=1) == labels
        of_groups = [right[north].mean(), right[~north].mean()]
        found = {(line["kind"], line["index"]): line for line in lines if line["row"] == kind}
        expected = {("overall", ""): right.mean(), ("worst_group", ""): min(of_groups)}
        expected |= {("group", str(index)): share for index, share in enumerate(of_groups)}
        expected |= {("class", str(c)): right[labels == c].mean() for c in range(4) if (labels == c).any()}
        for key, share in expected.items():
            assert float(found[key]["top1"]) == pytest.approx(share, rel=1e-5), key
        assert [found["group", index]["name"] for index in "01"] == ["north", "south"]
        row = next(row for row in results(probed) if row["edit"] == f"{path.stem}: {kind}")
        assert float(row["val_top1"]) == pytest.approx(right.mean(), rel=1e-5)
        assert float(row["val_worst_group_top1"]) == pytest.approx(min(of_groups), rel=1e-5)
    assert {line["deviation"] != "" for line in lines if line["row"] == "random" and line["top1"]} == {True}
    made = read_manifest(path)
    assert dict(zip(made["settings"]["concepts"], made["settings"]["factors"], strict=True)) == factors
    assert made["inputs"].keys() == {"probe", "names", "split", "train concepts", "val concepts"}

    rows = read_results(probed.artifacts.probe_results())
    assert [row["edit"] for row in results(probed)] == [f"{path.stem}: {kind}" for kind in KINDS]
    assert our_cells(rows, "enc") == before, "an edited probe is none of the paper's methods"
    script(*flags)
    assert "already done" in capsys.readouterr().out
    assert len(read_results(probed.artifacts.probe_results())) == len(rows)


def test_edits_are_kept_apart_and_stale_ones_are_replaced(probed, refusal) -> None:
    edit = Intervention(concepts=("sea",))
    for one in (edit, Intervention(concepts=("sand",)), replace(edit, reweight=True)):
        assert measure(probed, one) is Outcome.RAN
        assert measure(probed, one, device="nonsense") is Outcome.ALREADY_DONE
    assert len(results(probed)) == 2 * 5 + 6
    (path,) = probed.artifacts.intervention(probed.run, PROBE, "x").parent.glob("remove1_*_reweighted.csv")
    assert 0 < read_manifest(path)["details"]["rows"]["refit, reweighted"]["effective"] <= 1
    write_names(probed.artifacts.concept_names(probed.run), [*NAMES[:11], ConceptName(11, "green", 0.5)])
    with pytest.raises(StaleArtifact, match="names has changed"):
        measure(probed, edit)
    assert measure(probed, edit, overwrite=True) is Outcome.RAN
    with refusal("--device nonsense"):
        measure(probed, Intervention(concepts=("sky",)), device="nonsense")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "say which concepts to edit"),
        (["--concepts", "dgo"], "did you mean 'dog'"),
        (["--concepts", "7"], "an index and a name"),
        (["--remove", "no_file"], "cannot read the list of concepts no_file"),
        (["--keep", "list"], "list, line 2: there is no concept named 'seal'"),
        (["--scale", "list"], "list, line 1: write a name, a comma and a factor"),
        (["--concepts", "sea", "--scale", "scale"], "0, sea, is removed, and also kept or scaled"),
        (["--concepts", "sea", "--probe_on_features"], "features have no names"),
        (["--concepts", "sea", "--probe_lr", "3"], "there is no probe"),
    ],
)
def test_what_cannot_be_edited_is_refused_in_one_line(script, tmp_path: Path, flags: list[str], said: str) -> None:
    (tmp_path / "list").write_text("sea\nseal\n")
    (tmp_path / "scale").write_text("sea,2\n")
    with pytest.raises(SystemExit) as caught:
        script(*flags)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_of_another_sae_are_refused(probed, refusal) -> None:
    write_names(probed.artifacts.concept_names(probed.run), NAMES[:5])
    with refusal("names 5 latents, but the probe has 12"):
        measure(probed, Intervention(concepts=("sea",)))


def test_published_figures_stand_below_ours() -> None:
    groups = ["landbird on land", "landbird on water", "waterbird on land", "waterbird on water"]
    shares = np.array([[0.9, 0.75, 0.5, 0.875]])
    once = Row("edited", np.array([0.75]), np.array([[0.8, 0.7]]), shares)
    draws = Row("random", np.array([0.5, 0.7]), np.ones((2, 2)), np.vstack([shares, shares - 0.1]), about={"concepts": 0.0})
    title, ours, random, *theirs = table([once, draws], groups, published_figures()["waterbirds100_clip_RN50"]).splitlines()
    assert title.split("  ")[-1].strip() == "worst group"
    assert ours.split() == ["edited", "75.0", "90.0", "75.0", "50.0", "87.5", "50.0"]
    assert random.split()[:6] == ["2", "random", "edits", "60.0", "±", "14.1"]
    assert [line.split()[2:] for line in theirs[:3]] == [
        ["unedited", "84.2", "76.3", "58.3"],
        ["keep", "bird", "concepts", "88.1", "82.7"],
        ["remove", "bird", "concepts", "59.5", "15.8"],
    ]
    for line, figure, column in zip(theirs, ("58.3", "82.7", "15.8"), ["waterbird on land"] * 3, strict=False):
        assert line.index(figure) + len(figure) == title.index(column) + len(column)


# -------------------------------------------------------------------------------------------------------- suggestions


def test_concepts_are_ranked_by_cosine() -> None:
    dictionary = torch.tensor([[0.0, 2.0], [5.0, 0.0], [0.1, 0.1], [-1.0, 0.0], [3.0, 0.0]])
    ranked = nearest_concepts(dictionary, torch.tensor([4.0, 0.0]))
    assert [index for index, _ in ranked] == [1, 4, 2, 0, 3]
    assert [cosine for _, cosine in ranked] == pytest.approx([1, 1, 0.5**0.5, 0, -1], abs=1e-6)


@pytest.mark.parametrize("all_abstain", [False, True])
def test_latents_that_abstain_are_edited_and_suggested_by_their_labels(
    probed, script, monkeypatch, capsys, tmp_path: Path, all_abstain: bool
) -> None:
    """Both dogs are edited by their name only if both abstain; else it means the one that does not."""
    verdicts = ["abstains" if all_abstain or index % 2 else "named" for index in range(len(WORDS))]
    names = [replace(name, verdict=verdict) for name, verdict in zip(NAMES, verdicts, strict=True)]
    write_names(probed.artifacts.concept_names(probed.run), names)
    listed = tmp_path / "list.txt"
    listed.write_text("latent 7 (a, b?)\nlatent 1 (dog?)\n")
    assert factors_asked(Intervention(remove=listed), names).tolist() == [float(i not in (1, 7)) for i in range(12)]
    listed.write_text("dog\n")
    removed = [1, 2] if all_abstain else [2]
    assert (factors_asked(Intervention(remove=listed), names) == 0).nonzero().flatten().tolist() == removed
    script("--concepts", "latent 3 (sand?)")
    (target,) = {Path(line.rpartition(": ")[2]) for line in capsys.readouterr().out.splitlines() if "concepts edited" in line}
    assert read_manifest(target)["settings"]["concepts"] == [3]

    class Texts(Encoder):
        def __init__(self) -> None:
            pass

        def encode_texts(self, texts) -> torch.Tensor:
            return torch.ones(1, 12)

    monkeypatch.setattr(dncbm.probe.intervention_stage, "load_encoder", lambda *_: Texts())
    monkeypatch.setattr(dncbm.probe.intervention_stage, "describe_encoder", lambda *_: {})
    script("--suggest", "a bird", "--suggest_n", "12")
    path = probed.artifacts.suggested_concepts(probed.run, "a bird")
    assert read_concepts(path, names) == list(range(12))
    shown = [line for line in path.read_text().splitlines() if not line.startswith("# ")]
    assert sorted(shown) == sorted(("\\" if label in ("#1", "7") else "") + label for label in concept_labels(names))
    assert "latent 3 (sand?)" in capsys.readouterr().out


def test_a_suggestion_is_a_list_that_can_be_kept_or_removed(probed, script, monkeypatch, capsys) -> None:
    embedding = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    asked: list[object] = []

    class Texts(Encoder):
        def __init__(self) -> None:
            pass

        def encode_texts(self, texts) -> torch.Tensor:
            asked.extend(texts)
            return embedding

    def load(settings, name: str, device: torch.device, precision: str) -> Texts:
        asked.extend([name, precision])
        return Texts()

    monkeypatch.setattr(dncbm.probe.intervention_stage, "load_encoder", load)
    monkeypatch.setattr(dncbm.probe.intervention_stage, "describe_encoder", lambda *_: {})
    script("--suggest", "a photo of a\nbird", "--suggest_n", "5")
    assert asked == ["enc", "fp32", "a photo of a\nbird"]
    d = load_sae(probed.settings, probed.run).dictionary.numpy()
    cosines = d @ embedding[0].numpy() / np.linalg.norm(d, axis=1) / float(embedding.norm())
    nearest = np.argsort(-cosines)[:5]
    printed = capsys.readouterr().out.splitlines()
    lines = [line.rsplit(maxsplit=2) for line in printed[printed.index("concept  index  similarity") + 1 : -1]]
    labels = concept_labels(NAMES)
    assert [(int(index), label) for label, index, _ in lines] == [(index, labels[index]) for index in nearest]
    assert [float(cosine) for *_, cosine in lines] == pytest.approx(cosines[nearest].tolist(), abs=1e-3)
    path = probed.artifacts.suggested_concepts(probed.run, "a photo of a\nbird")
    assert printed[-1].endswith(str(path))
    assert read_concepts(path, read_names(probed.settings, probed.run)) == sorted(nearest)
    script("--suggest", "a photo of a\nbird", "--suggest_n", "5")

    edited = path.read_text() + "sea\n"
    path.write_text(edited)
    with pytest.raises(SystemExit, match="perhaps edited by you"):
        script("--suggest", "a photo of a\nbird", "--suggest_n", "5")
    assert path.read_text() == edited
    embedding = embedding[:, :3]
    with pytest.raises(SystemExit, match="12 dimensions and the text 3"):
        script("--suggest", "a photo of a\nbird", "--overwrite")
    assert path.read_text() == edited
    assert not results(probed)
