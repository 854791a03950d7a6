"""Published files: a folder written here as the authors' code writes it, and what the stages make of it once imported."""

import csv
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dncbm import ConceptBottleneckModel
from dncbm.cli import main
from dncbm.concepts.naming import read_names
from dncbm.concepts.sae import load_sae
from dncbm.concepts.strengths import load_concept_strengths, write_part
from dncbm.concepts.vocabulary import load_vocabulary
from dncbm.features.stage import open_features, probe_class_names, probe_labels, save_probe_features
from dncbm.probe.stage import load_probe
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Extraction, ProbeFeatures, ProbeRun, SAERun, Splits
from dncbm.runs.manifests import manifest_path
from dncbm.runs.settings import Settings, load_settings

FIXTURES = Path(__file__).parents[1] / "fixtures"
SAE_NAME = "lr0.0005_l1coeff3e-05_ef4_rf10_hookout_bs4096_epo200"
PROBE_NAME = "lr0.01_bs512_epo200_nobias_clCE_spL1_spl0.1"
RUN = SAERun(dataset="photos", encoder="clip_tiny/1", expansion_factor=4)
PROBE = ProbeRun("mine")
D, F, C = 16, 64, 3
SIZES = {"train": 36, "train_val": 4, "val": 12}
CLASSES = ["ant", "bee", "cow"]
WORDS = ["sand", "sea", "salt, coarse", "dog", '"quoted"']
RUN_FLAGS = ["--img_enc_name", "clip_tiny/1", "--sae_dataset", "photos"]
ALL_FLAGS = [*RUN_FLAGS, "--expansion_factor", "4", "--probe_dataset", "mine"]


@dataclass(frozen=True)
class Theirs:
    """The authors' folder, and the tensors in it."""

    folder: Path
    state: dict[str, torch.Tensor]
    x: dict[str, torch.Tensor]
    """Features by split, in the order of the files, float16."""
    z: dict[str, torch.Tensor]
    """Concept strengths, by the authors' formula."""
    labels: dict[str, torch.Tensor]
    indices: dict[str, torch.Tensor]
    weight: torch.Tensor
    """Of the probe, C x F."""

    @property
    def probed(self) -> Path:
        return self.folder / "data/activations_img/mine"

    @property
    def sae(self) -> Path:
        return self.folder / f"SAE/SAEImg/photos/clip_tiny1/out/{SAE_NAME}/sae_checkpoints/sparse_autoencoder_final.pt"

    @property
    def names(self) -> Path:
        return self.sae.parents[1] / "concept_names.csv"

    @property
    def probes(self) -> Path:
        return self.folder / f"probe/photos/clip_tiny1/out/{SAE_NAME}/mine"

    @property
    def probe(self) -> Path:
        return self.probes / PROBE_NAME / f"on_concepts_ckpts/on_concepts_final_{PROBE_NAME}.pt"

    def features(self, split: str) -> Path:
        """Of the probe's images."""
        return self.probed / f"clip_tiny1/out/{split}.pth"

    def accuracy(self, split: str, weight: torch.Tensor) -> float:
        """Of a probe with these weights, C x F."""
        return float(((self.z[split].double() @ weight.double().T).argmax(dim=1) == self.labels[split]).double().mean())


def save(value: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)


def checkpoint(weight: torch.Tensor, accuracy: float) -> dict[str, object]:
    """What the authors' train_linear_probe.py saves."""
    coverage = {share: {"positive": 2.0, "absolute": 3.0} for share in (0.9, 0.95, 0.99)}
    return {"model": torch.nn.modules.module.OrderedDict(weight=weight), "epoch": 200, "test_acc_top1": torch.tensor(accuracy),
            "test_coverage_energy_wise": coverage, "zero_count_dict": {0: 1, 1e-9: 2}, "train_loss": 0.5}  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path, make_settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    found = make_settings(
        vocabulary="words", sae_datasets={"photos": "photos"}, probe_datasets={"mine": "mine", "other": "other"},
        encoders={"clip_tiny/1": ("tiny", "none"), "clip_RN50": ("RN50", "openai")},
    )  # fmt: skip
    monkeypatch.setenv("DNCBM_CONFIG", str(found.path))
    (tmp_path / "vocab_dir").mkdir()
    (tmp_path / "vocab_dir/words.txt").write_text("\n".join(WORDS) + "\n")
    return found


@pytest.fixture
def theirs(tmp_path: Path) -> Theirs:
    folder, generator = tmp_path / "theirs", torch.Generator().manual_seed(5)
    state = torch.load(FIXTURES / "published_format_sparse_autoencoder_final.pt", weights_only=True)
    own = torch.randn(SIZES["train"] + SIZES["train_val"], D, generator=generator).half()
    own_labels = torch.arange(len(own)) % C
    order = torch.randperm(len(own), generator=generator)
    indices = {"train": order[: SIZES["train"]], "train_val": order[SIZES["train"] :]}
    x = {split: own[rows] for split, rows in indices.items()} | {
        "val": torch.randn(SIZES["val"], D, generator=generator).half()
    }
    labels = {split: own_labels[rows] for split, rows in indices.items()} | {"val": torch.arange(SIZES["val"]) // 4}
    z = {
        split: torch.relu((rows - state["tied_bias"][0]) @ state["encoder._weight"][0].T + state["encoder._bias"][0])
        for split, rows in x.items()
    }
    weight = torch.randn(C, F, generator=generator)
    found = Theirs(folder, state, x, z, labels, indices, weight)

    found.sae.parent.mkdir(parents=True)
    shutil.copyfile(FIXTURES / "published_format_sparse_autoencoder_final.pt", found.sae)
    found.names.write_text("".join(f"{i},{WORDS[i % len(WORDS)]}\n" for i in range(F)))
    save(torch.randn(len(WORDS), D, generator=generator).half(), folder / "vocab/embeddings_clip_tiny1_words.pth")
    for split in SIZES:
        save(x[split] + 1, folder / f"data/activations_img/photos/clip_tiny1/out/{split}")  # without a suffix
        save(x[split], found.probed / f"clip_tiny1/out/{split}.pth")
        save(labels[split], found.probed / f"all_labels_{split}.pth")
        save(z[split], found.probes / split / "all_concepts.pth")
    for split, rows in indices.items():
        save(rows, found.probed / f"{split}_idxs.pth")
    save(checkpoint(weight, found.accuracy("val", weight)), found.probe)
    save(
        checkpoint(weight[:, :D].clone(), 0.4),
        folder
        / f"probe/photos/clip_tiny1/out/on_features/mine/{PROBE_NAME}/on_features_ckpts/on_features_final_{PROBE_NAME}.pt",
    )
    (folder / "README.txt").write_text("something else")
    return found


@pytest.fixture
def images(tmp_path: Path, theirs: Theirs) -> Path:
    """A folder of images in the order of the authors' labels, which is that of the classes; the labels are made to fit."""
    top = tmp_path / "mine"
    for split, n in (("train", 40), ("val", 12)):
        for label, name in enumerate(CLASSES):
            for number in range(n // C + (label < n % C)):
                path = top / split / name / f"{number:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (number, 40 * label, 0)).save(path)
    own = torch.tensor([0] * 14 + [1] * 13 + [2] * 13)
    for split, rows in theirs.indices.items():
        theirs.labels[split] = own[rows]
        save(theirs.labels[split], theirs.probed / f"all_labels_{split}.pth")
    return top


def import_all(folder: Path, *flags: str) -> None:
    main("import_published", [str(folder), *flags])


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Imports a folder, of which something must be refused with a line that holds these parts; what was printed."""

    def run(folder: Path, *parts: object, flags: tuple[str, ...] = ()) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            import_all(folder, *flags)
        assert "could not be imported" in str(ended.value)
        out = capsys.readouterr().out
        assert refusal_of(out, *parts), out
        return out

    return run


def refusal_of(out: str, *parts: object) -> bool:
    """Whether an entry of the report refuses something with these parts in it."""
    entries = re.findall(r"^refused +(.*\n.*)$", out, flags=re.M)
    return any(all(str(part) in entry for part in parts) for entry in entries)


def statuses(out: str) -> list[str]:
    """The first column of the report."""
    return re.findall(r"^(imported|already done|in place|refused|missing)  ", out, flags=re.M)


class TestEverything:
    def test_is_what_the_authors_tensors_hold(self, settings: Settings, theirs: Theirs, capsys) -> None:
        import_all(theirs.folder)
        expected = load_file(FIXTURES / "published_format_outputs.safetensors")
        sae = load_sae(settings, RUN)
        torch.testing.assert_close(sae.encode(expected["x"]), expected["latents"])
        assert [name.name for name in read_names(settings, RUN)] == [WORDS[i % len(WORDS)] for i in range(F)]
        embeddings = torch.load(theirs.folder / "vocab/embeddings_clip_tiny1_words.pth", weights_only=True).double()
        wanted = embeddings / embeddings.norm(dim=1, keepdim=True)
        torch.testing.assert_close(load_vocabulary(settings, "clip_tiny/1").embeddings.double(), wanted, atol=1e-6, rtol=0)
        for split, n in SIZES.items():
            of_sae = open_features(settings, "photos", "clip_tiny/1", "out", split)
            torch.testing.assert_close(of_sae.gather(np.arange(n)), (theirs.x[split] + 1).float(), atol=0, rtol=0)
            store = open_features(settings, "mine", "clip_tiny/1", "out", split)
            keys = theirs.indices[split].numpy() if split in theirs.indices else np.arange(n)
            np.testing.assert_array_equal(store.keys, keys)
            torch.testing.assert_close(store.gather(np.arange(n)), theirs.x[split].float(), atol=0, rtol=0)
            strengths = load_concept_strengths(settings, RUN, "mine", split)
            np.testing.assert_array_equal(strengths.matrix.toarray(), theirs.z[split].numpy())
            np.testing.assert_array_equal(strengths.keys, keys)
            np.testing.assert_array_equal(probe_labels(settings, "mine", split, keys), theirs.labels[split].numpy())
        torch.testing.assert_close(load_probe(settings, RUN, PROBE), theirs.weight.T, atol=0, rtol=0)
        on_features = ProbeRun("mine", on_features=True)
        torch.testing.assert_close(load_probe(settings, RUN, on_features), theirs.weight[:, :D].T, atol=0, rtol=0)
        out = capsys.readouterr().out
        # 3 features of each, 3 strengths, 2 probes, SAE, names, embeddings; the five files of labels and indices are one
        assert statuses(out) == ["imported"] * 15 + ["missing"]
        assert f"stage 5 and thumbnails need them: {settings.probe_datasets['mine'].path}" in out
        assert "1 file of other names was not opened" in out
        assert "class 0" in probe_class_names(settings, "mine")

    def test_it_is_one_object(self, settings: Settings, theirs: Theirs, tmp_path: Path) -> None:
        import_all(theirs.folder)
        flags = {"img_enc_name": "clip_tiny/1", "sae_dataset": "photos", "expansion_factor": 4, "probe_dataset": "mine"}
        model = ConceptBottleneckModel.from_run(settings, device="cpu", load_encoder=False, **flags)
        wanted = theirs.z["val"].double() @ theirs.weight.double().T
        assert model.decision_function(theirs.x["val"].float()) == pytest.approx(wanted.numpy(), abs=1e-4)
        assert model.score(theirs.x["val"].float(), theirs.labels["val"]) == theirs.accuracy("val", theirs.weight)
        embeddings = torch.load(theirs.folder / "vocab/embeddings_clip_tiny1_words.pth", weights_only=True).double()
        directions = theirs.state["decoder._weight"][0].double().T
        cosines = torch.nn.functional.cosine_similarity(directions, embeddings[torch.arange(F) % len(WORDS)])
        assert [name.similarity for name in model.contents.names] == pytest.approx(cosines.tolist(), abs=1e-5)

    def test_a_probe_gets_its_row_of_the_results(self, settings: Settings, theirs: Theirs) -> None:
        import_all(theirs.folder)
        with Artifacts(settings).probe_results().open() as file:
            rows = {row["on"]: row for row in csv.DictReader(file)}
        for split in SIZES:
            assert float(rows["concepts"][f"{split}_top1"]) == pytest.approx(theirs.accuracy(split, theirs.weight), abs=1e-5)
        assert rows["concepts"]["probe"] == PROBE_NAME
        assert rows["concepts"]["sae"] == SAE_NAME
        assert rows["features"].keys() == rows["concepts"].keys()

    def test_a_probe_is_imported_although_its_row_cannot_be_written(self, settings: Settings, theirs: Theirs, capsys) -> None:
        results = Artifacts(settings).probe_results()
        results.parent.mkdir(parents=True)
        results.write_text("my notes")
        import_all(theirs.folder)
        assert capsys.readouterr().out.count("not evaluated: " + str(results)) == 2
        torch.testing.assert_close(load_probe(settings, RUN, PROBE), theirs.weight.T)
        assert results.read_text() == "my notes"

    def test_every_stage_takes_it(self, settings: Settings, theirs: Theirs, capsys) -> None:
        import_all(theirs.folder)
        for stage, said in {
            "sae": "using the published checkpoint", "vocabulary": "using the published embeddings",
            "names": "using the published names", "strengths": "using what was imported", "probe": "using what was imported",
        }.items():  # fmt: skip
            capsys.readouterr()
            main(stage, ALL_FLAGS)
            assert said in capsys.readouterr().out
        main("probe", [*ALL_FLAGS, "--probe_epochs", "3", "--device", "cpu"])
        trained = load_probe(settings, RUN, ProbeRun("mine", epochs=3)).T
        with Artifacts(settings).probe_results().open() as file:
            row = next(row for row in csv.DictReader(file) if row["probe_epochs"] == "3")
        assert float(row["val_top1"]) == pytest.approx(theirs.accuracy("val", trained), abs=1e-5)

    def test_runs_are_found_by_their_names(self, settings: Settings, theirs: Theirs, capsys) -> None:
        import_all(theirs.folder)
        main(
            "probe",
            [*RUN_FLAGS, "--sae", SAE_NAME, "--probe_dataset", "mine", "--probe_solver", "prox", "--probe_epochs", "5"],
        )
        assert load_probe(settings, RUN, ProbeRun("mine", solver="prox", epochs=5)).shape == (F, C)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:  # which gets as far as the images
            main("local_explanations_dump", [*RUN_FLAGS, "--sae", SAE_NAME, "--probe", PROBE_NAME, "--probe_dataset", "mine"])
        assert str(settings.probe_datasets["mine"].path) in str(ended.value)

    def test_again_it_is_done(self, theirs: Theirs, settings: Settings, capsys) -> None:
        import_all(theirs.folder)
        before = {path: path.stat().st_mtime_ns for path in settings.path.parent.rglob("*") if path.is_file()}
        capsys.readouterr()
        import_all(theirs.folder)
        assert set(statuses(capsys.readouterr().out)) == {"already done", "missing"}
        assert {path: path.stat().st_mtime_ns for path in settings.path.parent.rglob("*") if path.is_file()} == before

    def test_what_comes_later_does_not_make_the_rest_stale(self, settings: Settings, theirs: Theirs, capsys) -> None:
        """Strengths come before the features, and val before the split."""
        later = [*theirs.probed.iterdir(), theirs.probes / "train", theirs.probes / "train_val"]
        for path in later:
            path.rename(theirs.folder.parent / path.name)
        import_all(theirs.folder)
        assert "-> " + str(Artifacts(settings).strengths(RUN, "mine", "val")) in capsys.readouterr().out
        for path in later:
            (theirs.folder.parent / path.name).rename(path)
        import_all(theirs.folder)
        assert statuses(capsys.readouterr().out).count("imported") == 6  # the split, 3 features, train, train_val

    def test_another_file_replaces_only_with_overwrite(self, settings: Settings, theirs: Theirs, refused) -> None:
        import_all(theirs.folder)
        other = theirs.weight.flip(0)
        save(checkpoint(other, 0.5), theirs.probe)
        refused(theirs.folder, "on_concepts_final", "--overwrite")
        torch.testing.assert_close(load_probe(settings, RUN, PROBE), theirs.weight.T)
        import_all(theirs.folder, "--overwrite")
        torch.testing.assert_close(load_probe(settings, RUN, PROBE), other.T)

    def test_a_stage_replaces_it_only_with_overwrite(self, settings: Settings, theirs: Theirs) -> None:
        import_all(theirs.folder)
        manifest = manifest_path(Artifacts(settings).strengths(RUN, "mine", "val"))
        main("strengths", ALL_FLAGS)
        assert '"stage": "import_published"' in manifest.read_text()
        main("strengths", [*ALL_FLAGS, "--overwrite", "--device", "cpu"])
        assert '"stage": "strengths"' in manifest.read_text()
        found = load_concept_strengths(settings, RUN, "mine", "val").matrix.toarray()
        np.testing.assert_allclose(found, theirs.z["val"].numpy(), atol=1e-5)

    def test_an_interrupted_import_resumes(self, settings: Settings, theirs: Theirs, monkeypatch) -> None:
        monkeypatch.setattr("dncbm.bottleneck.published_files.SHARD_SIZE", 7)

        def write_one(path: Path, *arrays: object) -> None:
            if path.stem != "00000":
                raise KeyboardInterrupt
            write_part(path, *arrays)

        with monkeypatch.context() as patched:
            patched.setattr("dncbm.bottleneck.published_files.write_part", write_one)
            with pytest.raises(SystemExit) as ended:
                import_all(theirs.folder)
        assert ended.value.code == 130
        import_all(theirs.folder)
        for split in SIZES:
            found = load_concept_strengths(settings, RUN, "mine", split).matrix.toarray()
            np.testing.assert_array_equal(found, theirs.z[split].numpy())

    def test_shards_and_parts_of_a_larger_split(self, settings: Settings, theirs: Theirs, monkeypatch) -> None:
        monkeypatch.setattr("dncbm.bottleneck.published_files.SHARD_SIZE", 7)
        monkeypatch.setattr("dncbm.bottleneck.published_files.BATCH", 3)
        import_all(theirs.folder)
        strengths = load_concept_strengths(settings, RUN, "mine", "train")
        np.testing.assert_array_equal(strengths.matrix.toarray(), theirs.z["train"].numpy())
        np.testing.assert_array_equal(strengths.keys, theirs.indices["train"].numpy())
        store = open_features(settings, "mine", "clip_tiny/1", "out", "train")
        assert len(store.paths) == 6
        torch.testing.assert_close(store.gather(np.arange(36)), theirs.x["train"].float(), atol=0, rtol=0)


class TestImages:
    """With the images, labels are compared with theirs and classes have names."""

    def test_name_the_classes(self, settings: Settings, theirs: Theirs, images: Path, capsys) -> None:
        import_all(theirs.folder)
        assert probe_class_names(settings, "mine") == CLASSES
        assert "missing" not in statuses(capsys.readouterr().out)
        main("local_explanations_dump", [*ALL_FLAGS, "--probe_split", "train_val"])

    def test_give_the_labels_that_the_authors_script_writes_over(
        self, settings: Settings, theirs: Theirs, images: Path
    ) -> None:
        os.replace(theirs.probed / "all_labels_train_val.pth", theirs.probed / "all_labels_train.pth")
        import_all(theirs.folder)
        keys = theirs.indices["train"].numpy()
        np.testing.assert_array_equal(probe_labels(settings, "mine", "train", keys), theirs.labels["train"].numpy())

    def test_in_another_order_are_refused(self, settings: Settings, theirs: Theirs, images: Path, refused) -> None:
        save(theirs.labels["val"].flip(0), theirs.probed / "all_labels_val.pth")
        refused(theirs.folder, "all_labels_val.pth has other labels than", images)
        assert not Artifacts(settings).probe_split("mine").exists()

    def test_what_stage_5_adds_goes_with_what_was_imported(
        self, settings: Settings, theirs: Theirs, images: Path, monkeypatch, make_encoder, capsys, refusal
    ) -> None:
        (theirs.features("train_val")).unlink()
        import_all(theirs.folder)
        monkeypatch.setattr("dncbm.features.stage.describe_encoder", lambda *_: {"encoder": "channel means"})
        monkeypatch.setattr("dncbm.features.stage.load_encoder", lambda *_: make_encoder())
        capsys.readouterr()
        extract = partial(
            save_probe_features, settings, ProbeFeatures("mine", RUN.encoder), Splits(), Extraction(num_workers=0)
        )
        extract()
        assert capsys.readouterr().out.count("using what was imported") == 3  # the split, train and val
        store = open_features(settings, "mine", RUN.encoder, "out", "train_val")
        assert sorted(store.keys) == sorted(theirs.indices["train_val"].tolist())
        for row, key in enumerate(store.keys):
            label = int(probe_labels(settings, "mine", "train_val", np.array([key]))[0])
            assert round(float(store.gather(np.array([row]))[0, 1]) * 255) == 40 * label  # the green of the class
        shutil.move(images / "train/ant/000.png", images / "train/bee/1000.png")
        with refusal("have other labels than", "all_labels_train.npy", "--overwrite"):
            extract()


def in_an_old_format(theirs: Theirs) -> None:
    for path in (
        theirs.probes / "val/all_concepts.pth",
        theirs.probed / "train_idxs.pth",
        theirs.features("val"),
        theirs.probe,
    ):
        torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)


def of_other_types(theirs: Theirs) -> None:
    """An axis of components, float64, int32, and a parameter."""
    save(theirs.x["val"].double(), theirs.features("val"))
    save(theirs.z["val"].double()[:, None], theirs.probes / "val/all_concepts.pth")
    save(theirs.labels["val"].int(), theirs.probed / "all_labels_val.pth")
    save(checkpoint(torch.nn.Parameter(theirs.weight), 0.3), theirs.probe)


@pytest.mark.parametrize("change", [in_an_old_format, of_other_types])
def test_other_forms_hold_the_same(settings: Settings, theirs: Theirs, change: Callable[[Theirs], None]) -> None:
    change(theirs)
    import_all(theirs.folder)
    store = open_features(settings, "mine", RUN.encoder, "out", "val")
    torch.testing.assert_close(store.gather(np.arange(12)), theirs.x["val"].float(), atol=0, rtol=0)
    np.testing.assert_array_equal(
        load_concept_strengths(settings, RUN, "mine", "val").matrix.toarray(), theirs.z["val"].numpy()
    )
    np.testing.assert_array_equal(probe_labels(settings, "mine", "val", np.arange(12)), theirs.labels["val"].numpy())
    torch.testing.assert_close(load_probe(settings, RUN, PROBE), theirs.weight.T, atol=0, rtol=0)


def test_a_probe_without_a_sparsity_loss_has_lambda_0(settings: Settings, theirs: Theirs) -> None:
    theirs.probe.parents[1].rename(theirs.probes / "lr0.01_bs512_epo200_nobias")
    import_all(theirs.folder)
    torch.testing.assert_close(load_probe(settings, RUN, ProbeRun("mine", sparsity_lambda=0.0)), theirs.weight.T)


REFUSALS: dict[str, tuple[Callable[[Theirs], object], tuple[str, ...]]] = {
    "NaN features": (
        lambda t: save(t.x["val"].index_fill(0, torch.tensor([5]), float("nan")), t.features("val")),
        ("val.pth", "holds NaN or infinity, first in row 5"),
    ),
    "features of another width": (
        lambda t: save(t.x["val"][:, :10].clone(), t.features("val")), ("val.pth", "it has 10 features", "clip_tiny/1 has 16"),
    ),
    "a row too few": (
        lambda t: save(t.x["train"][1:], t.features("train")), ("train.pth", "has 35 rows", "36 labels"),
    ),
    "a foreign pickle": (lambda t: save({"model": Path("/")}, t.probe), (PROBE_NAME, "nothing in it was run")),
    "a damaged file": (lambda t: t.probe.write_bytes(t.probe.read_bytes()[:900]), (PROBE_NAME, "damaged")),
    "text": (lambda t: (t.features("val")).write_text("version https://git-lfs"), ("val.pth is damaged",)),
    "a probe with a bias": (
        lambda t: save({"model": {"weight": t.weight, "bias": t.weight[:, 0]}}, t.probe), ("is no probe of the authors",),
    ),
    "a probe of other classes": (lambda t: save(checkpoint(t.weight[:2], 0.5), t.probe), ("has 2 classes, but mine has 3",)),
    "a probe of another SAE": (lambda t: save(checkpoint(t.weight[:, :5], 0.5), t.probe), ("5 concepts, but the SAE has 64",)),
    "NaN in a probe": (lambda t: save(checkpoint(t.weight * float("nan"), 0.5), t.probe), ("NaN",)),
    "negative strengths": (lambda t: save(t.z["val"] - 1, t.probes / "val/all_concepts.pth"), ("negative strength -1",)),
    "strengths in another order": (
        lambda t: save(t.z["val"].flip(0), t.probes / "val/all_concepts.pth"), ("rows are in another order",),
    ),
    "strengths of other latents": (
        lambda t: save(t.z["val"][:, 1:], t.probes / "val/all_concepts.pth"), ("63 concepts, but the SAE", "has 64"),
    ),
    "names of fewer latents": (lambda t: t.names.write_text("0,sand\n1,sea\n"), ("names 2 latents, but the SAE has 64",)),
    "names without numbers": (lambda t: t.names.write_text("sand\nsea\n"), ("concept_names.csv", "is no list of index,name")),
    "embeddings of other words": (
        lambda t: save(torch.ones(4, D), t.folder / "vocab/embeddings_clip_tiny1_words.pth"), ("has 4 rows", "5 words"),
    ),
    "embeddings of an unknown encoder": (
        lambda t: (t.folder / "vocab/embeddings_clip_tiny1_words.pth").rename(t.folder / "vocab/embeddings_x_words.pth"),
        ("embeddings_x_words.pth", "--img_enc_name"),
    ),
    "another vocabulary": (
        lambda t: save(torch.ones(5, D), t.folder / "vocab/embeddings_clip_tiny1_lvis.pth"), ("does not end with _words.pth",),
    ),
    "indices that overlap": (
        lambda t: save(t.indices["train"][:4], t.probed / "train_val_idxs.pth"), ("do not divide one set of images",),
    ),
    "labels written over": (
        lambda t: shutil.copyfile(t.probed / "all_labels_train_val.pth", t.probed / "all_labels_train.pth"),
        ("4 labels for 36 images of train", "save_probe_features.py", "put the images where"),
    ),
    "labels that are missing": (lambda t: (t.probed / "all_labels_val.pth").unlink(), ("there is no all_labels_val.pth",)),
    "indices that are missing": (
        lambda t: (t.probed / "train_idxs.pth").unlink(), ("clip_tiny1/out/train.pth", "order of train_idxs.pth"),
    ),
    "no SAE": (lambda t: t.sae.unlink(), ("all_concepts.pth", "belongs to the SAE", SAE_NAME, "is missing")),
    "an SAE of another factor": (
        lambda t: t.sae.parents[1].rename(str(t.sae.parents[1]).replace("_ef4_", "_ef8_")), ("64 latents", "expansion factor"),
    ),
    "an SAE of fewer latents than features": (
        lambda t: save({name: value[:, :8] if "encoder._" in name and "pre" not in name else
                        value[..., :8] if name == "decoder._weight" else value for name, value in t.state.items()}, t.sae),
        ("8 latents of 16 features", "no whole expansion factor"),
    ),
    "an SAE of an unknown data set": (
        lambda t: t.folder.joinpath("SAE/SAEImg/photos").rename(t.folder / "SAE/SAEImg/laion"), ("--sae_dataset", "cc3m"),
    ),
    "an SAE that is none": (lambda t: save({"weight": torch.ones(2)}, t.sae), ("not a published DN-CBM checkpoint",)),
    "a probe of an unknown data set": (
        lambda t: t.probes.rename(t.probes.with_name("cub")), ("on_concepts_final", "--probe_dataset"),
    ),
}  # fmt: skip


TOGETHER = (
    ("NaN features", "negative strengths", "NaN in a probe", "names of fewer latents", "embeddings of other words"),
    ("features of another width", "strengths of other latents", "a probe of other classes", "names without numbers",
     "embeddings of an unknown encoder"),
    ("a row too few", "strengths in another order", "a foreign pickle", "another vocabulary"),
    ("text", "a damaged file", "indices that overlap"),
    ("a probe with a bias", "labels written over"),
    ("a probe of another SAE", "labels that are missing"),
)  # fmt: skip
"""Refusals that do not depend on each other: one import has them all."""
ALONE = [(what,) for what in REFUSALS if not any(what in group for group in TOGETHER)]


@pytest.mark.parametrize("group", [*TOGETHER, *ALONE], ids=", ".join)
def test_what_cannot_be_used_is_refused_and_the_rest_is_imported(
    settings: Settings, theirs: Theirs, refused, group: tuple[str, ...]
) -> None:
    for what in group:
        REFUSALS[what][0](theirs)
    out = refused(theirs.folder, *REFUSALS[group[0]][1])
    for what in group:
        assert refusal_of(out, *REFUSALS[what][1]), what
    assert "imported" in statuses(out)
    assert not list(settings.path.parent.rglob("*.unfinished"))


def test_what_was_refused_costs_nothing_that_was_there(settings: Settings, theirs: Theirs, refused) -> None:
    """Not even with --overwrite."""
    import_all(theirs.folder)
    for change in (
        "NaN features",
        "NaN in a probe",
        "negative strengths",
        "names of fewer latents",
        "labels that are missing",
    ):
        REFUSALS[change][0](theirs)
    assert statuses(refused(theirs.folder, "NaN", flags=("--overwrite",))).count("refused") == 5
    assert len(read_names(settings, RUN)) == F
    torch.testing.assert_close(load_probe(settings, RUN, PROBE), theirs.weight.T)
    np.testing.assert_array_equal(
        load_concept_strengths(settings, RUN, "mine", "val").matrix.toarray(), theirs.z["val"].numpy()
    )


class TestMissing:
    def test_what_the_stages_need_is_named_with_its_command(self, settings: Settings, theirs: Theirs, capsys) -> None:
        """As the authors publish it: SAEs and names."""
        for gone in ("data", "probe", "vocab"):
            shutil.rmtree(theirs.folder / gone)
        (settings.vocab_dir / "words.txt").unlink()
        import_all(theirs.folder)
        out = capsys.readouterr().out
        assert statuses(out) == ["imported", "imported", "missing", "missing"]
        assert f"one word per line: {settings.vocab_dir / 'words.txt'}" in out
        assert "run `python scripts/03_save_vocab_embeddings.py --img_enc_name clip_tiny/1`" in out

    def test_of_a_probe_alone(self, settings: Settings, theirs: Theirs, capsys) -> None:
        shutil.rmtree(theirs.folder / "data")
        for split in SIZES:
            shutil.rmtree(theirs.probes / split)
        import_all(theirs.folder)
        out = capsys.readouterr().out
        assert "not evaluated: the concept strengths" in out
        assert out.count("\n          run `python scripts/05_save_probe_features.py") == 3
        command = (
            "06_save_concept_strengths.py --img_enc_name clip_tiny/1 --sae_dataset photos --expansion_factor 4 --probe_dataset"
        )
        assert f"{command} mine --probe_split val`" in out
        torch.testing.assert_close(load_probe_file(settings), theirs.weight)

    def test_a_probe_is_evaluated_once_its_inputs_come(self, settings: Settings, theirs: Theirs, capsys) -> None:
        train = theirs.probes / "train"
        train.rename(theirs.folder.parent / "elsewhere")
        import_all(theirs.folder)
        assert "train/all_concepts are missing" in capsys.readouterr().out
        (theirs.folder.parent / "elsewhere").rename(train)
        import_all(theirs.folder)
        assert f"top-1 {theirs.accuracy('val', theirs.weight):.1%} on val" in capsys.readouterr().out


def load_probe_file(settings: Settings) -> torch.Tensor:
    return load_file(Artifacts(settings).probe(RUN, PROBE))["weight"]


class TestPlaces:
    def test_flags_say_what_loose_files_are(self, settings: Settings, theirs: Theirs, tmp_path: Path, capsys) -> None:
        loose = tmp_path / "loose"
        loose.mkdir()
        for path in (theirs.sae, theirs.names, theirs.probe):
            shutil.copyfile(path, loose / path.name)
        import_all(loose, *RUN_FLAGS, "--probe_dataset", "mine")
        assert len(read_names(settings, RUN)) == F
        torch.testing.assert_close(load_probe_file(settings), theirs.weight)

    @pytest.mark.parametrize("folder", ["clip_tiny1", "Tiny-1", "tiny_1_out"])
    def test_folders_may_call_the_encoder_by_similar_names(self, settings: Settings, theirs: Theirs, tmp_path, folder) -> None:
        shutil.copytree(theirs.sae.parents[1], tmp_path / f"some/{folder}/{SAE_NAME}")
        import_all(tmp_path / "some", "--sae_dataset", "photos")
        assert len(read_names(settings, RUN)) == F

    def test_flags_win(self, settings: Settings, theirs: Theirs) -> None:
        name = f"{SAE_NAME}_theirs"
        import_all(theirs.folder, "--sae", name)
        run = SAERun(dataset="photos", encoder="clip_tiny/1", expansion_factor=4, suffix="_theirs")
        assert len(read_names(settings, run)) == F
        assert not Artifacts(settings).published_sae(RUN).exists()

    @pytest.mark.parametrize(("name", "said"), [("mine", "'mine' is no name"), (SAE_NAME.replace("ef4", "ef0"), "at least 1")])
    def test_names_of_runs_that_say_nothing(self, settings: Settings, theirs: Theirs, refused, name: str, said: str) -> None:
        refused(theirs.folder, "sparse_autoencoder_final.pt", name, said, flags=("--sae", name))

    def test_an_encoder_of_another_width_is_noticed(self, theirs: Theirs, settings: Settings, refused) -> None:
        refused(theirs.folder, "it has 16 features", "clip_RN50 has 1024", flags=("--img_enc_name", "clip_RN50"))

    def test_an_sae_trained_here_is_not_hidden(self, settings: Settings, theirs: Theirs, refused) -> None:
        ours = Artifacts(settings).sae(RUN)
        ours.parent.mkdir(parents=True)
        ours.write_bytes(b"ours")
        refused(theirs.folder, "was trained here", f"--sae {SAE_NAME}_published")
        assert not Artifacts(settings).published_sae(RUN).exists()
        assert not Artifacts(settings).published_names(RUN).exists()

    def test_files_that_lie_where_they_belong_stay(self, settings: Settings, theirs: Theirs, capsys) -> None:
        shutil.copytree(theirs.folder / "SAE", settings.sae_dir, dirs_exist_ok=True)
        import_all(settings.sae_dir)
        assert capsys.readouterr().out.count("in place") == 2
        assert len(read_names(settings, RUN)) == F

    def test_features_where_our_folder_must_be_are_refused(self, settings: Settings, theirs: Theirs, refused) -> None:
        shutil.copytree(theirs.folder / "data", settings.data_dir, dirs_exist_ok=True)
        refused(settings.data_dir, "photos/clip_tiny1/out/train is a file where a folder must go")

    def test_two_files_of_one_run(self, theirs: Theirs, settings: Settings, refused) -> None:
        shutil.copytree(theirs.names.parent, theirs.folder / f"copies/{SAE_NAME}")
        flags = tuple(RUN_FLAGS)
        import_all(theirs.folder, *flags)  # the same file twice does not matter
        (theirs.folder / f"copies/{SAE_NAME}/concept_names.csv").write_text("".join(f"{i},other\n" for i in range(F)))
        refused(theirs.folder, "was taken for", "--sae", flags=flags)

    def test_links_that_lead_in_circles_end(self, theirs: Theirs, settings: Settings, capsys) -> None:
        (theirs.folder / "data/again").symlink_to(theirs.folder)
        (theirs.folder / "SAE/nowhere.pt").symlink_to("nothing")
        os.mkfifo(theirs.folder / "all_concepts.pth")
        import_all(theirs.folder)
        assert statuses(capsys.readouterr().out).count("imported") == 15

    def test_a_folder_without_any_is_one_line(self, theirs: Theirs, settings: Settings, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty/model.pt").touch()
        for folder, said in (
            (tmp_path / "empty", "no file with a name of the authors' files"),
            (tmp_path / "gone", "no folder"),
        ):
            with pytest.raises(SystemExit) as ended:
                import_all(folder)
            assert said in str(ended.value)
            assert "\n" not in str(ended.value)


def test_an_imported_artifact_is_refused_once_it_has_changed(settings: Settings, theirs: Theirs, refusal) -> None:
    import_all(theirs.folder)
    shutil.copyfile(theirs.sae, path := Artifacts(settings).published_sae(RUN))
    load_sae(settings, RUN)
    save({name: value * 2 for name, value in theirs.state.items()}, path)
    with refusal(path, "12_import_published.py FOLDER --overwrite"):
        load_concept_strengths(load_settings(settings.path), RUN, "mine", "val")
    assert manifest_path(path).is_file()
