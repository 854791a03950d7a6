"""Bundles: what is written, what is refused, and the stage that exports them."""

import csv
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from huggingface_hub import ModelCard
from huggingface_hub import constants as hub_constants
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file

from dncbm import ConceptBottleneckModel
from dncbm.bottleneck.bundle import write_bundle
from dncbm.bottleneck.contents import Contents
from dncbm.cli import main
from dncbm.concepts.naming import ConceptName
from dncbm.runs.settings import LOCAL_DIR, load_settings
from sparse_autoencoder import SparseAutoencoder, save_checkpoint
from tests.bottleneck.conftest import CLIP, PREPROCESS, SmallRun

load = ConceptBottleneckModel.from_pretrained
HASHED = ("sae.safetensors", "probe.safetensors", "concepts.csv", "classes.json", "fingerprint.npz")
FILES = ("config.json", *HASHED, "README.md")
WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture(autouse=True)
def _no_internet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def model(small_run: SmallRun) -> ConceptBottleneckModel:
    return ConceptBottleneckModel.from_run(small_run.settings, device="cpu")


@pytest.fixture(scope="module")
def home(small_run: SmallRun, model: ConceptBottleneckModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder, `clip`, and a bundle of it, `saved`."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(small_run.root / "clip", home / "clip")
    settings = replace(
        small_run.settings, encoders={"tiny": replace(small_run.settings.encoder("tiny"), model=f"{LOCAL_DIR}{home / 'clip'}")}
    )
    encoder = replace(model.contents.encoder, settings=settings)
    replace(model, contents=replace(model.contents, encoder=encoder)).save_pretrained(home / "saved", license="cc-by-4.0")
    return home


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Path:
    """A copy of the bundle beside a copy of its encoder."""
    shutil.copytree(home, tmp_path / "home")
    return tmp_path / "home" / "saved"


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rehash(folder: Path, **changes: Any) -> None:
    """Let config.json list the files as they are, and have these values: `encoder__name` is that of `name` in `encoder`."""
    config = json.loads((folder / "config.json").read_text())
    for name in HASHED:
        content = (folder / name).read_bytes()
        config["files"][name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    for key, value in changes.items():
        *parents, last = key.split("__")
        within = config
        for parent in parents:
            within = within[parent]
        if value is ...:
            del within[last]
        else:
            within[last] = value
    (folder / "config.json").write_text(json.dumps(config))


# --------------------------------------------------------------------------------------------------- what is written


def test_a_loaded_bundle_is_the_model_that_was_saved(small_run, model, home: Path) -> None:
    loaded = load(home / "saved", device="cpu")
    one, other = model.contents, loaded.contents
    np.testing.assert_array_equal(loaded.decision_function(small_run.images), model.decision_function(small_run.images))
    assert (loaded.concepts(small_run.images) != model.concepts(small_run.images)).nnz == 0
    assert loaded.score(small_run.images, small_run.labels) == model.score(small_run.images, small_run.labels) > 0.5
    assert torch.equal(one.weight, other.weight)
    assert (one.names, one.classes, one.class_folders) == (other.names, other.classes, other.class_folders)
    assert one.classes == ("a cat", "dog", "zebra")
    assert one.about == other.about
    assert (one.encoder.name, one.encoder.background) == (other.encoder.name, other.encoder.background)
    for field in fields(one.statistics):
        mine, theirs = (getattr(contents.statistics, field.name) for contents in (one, other))
        if field.name == "class_strengths":
            mine, theirs = mine.toarray(), theirs.toarray()
        np.testing.assert_array_equal(mine, theirs, err_msg=field.name)


def test_the_files_are_as_documented_and_none_is_pickled(model, home: Path) -> None:
    files = contents_of(home / "saved")
    assert set(files) == set(FILES)
    assert not any(b"pickle" in content or content.startswith(b"\x80") for content in files.values())
    config, classes = (json.loads(files[name]) for name in ("config.json", "classes.json"))
    assert (config["schema"], config["library"], config["split"]) == (1, "dncbm", "val")
    assert config["encoder"]["model"] == "local-dir:../clip"
    assert config["encoder"]["preprocessing"]["mean"] == PREPROCESS["mean"]
    assert config["encoder"]["weights"][WEIGHTS] == sha256((home / "clip" / WEIGHTS).read_bytes()).hexdigest()
    assert config["datasets"] == {"sae": "photos", "probe": "pets"}
    assert config["files"] == {name: {"bytes": len(files[name]), "sha256": sha256(files[name]).hexdigest()} for name in HASHED}
    assert [(one["index"], one["name"], one["folder"], one["images"]) for one in classes] == [
        (0, "a cat", "a_cat", 7), (1, "dog", "dog", 7), (2, "zebra", "zebra", 7)
    ]  # fmt: skip
    probe = load_file(home / "saved" / "probe.safetensors")
    assert torch.equal(probe["weight"], model.contents.weight.T)
    with (home / "saved" / "concepts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == model.names
    assert list(rows[0]) == ["index", "name", "similarity", "activity", "verdict"]
    with np.load(home / "saved" / "fingerprint.npz", allow_pickle=False) as arrays:
        assert {name: arrays[name].shape for name in arrays} == {"features": (4, CLIP["embed_dim"])}


def test_saving_again_gives_the_same_bytes(home: Path, copy: Path) -> None:
    before = contents_of(home / "saved")
    load(copy).save_pretrained(copy, license="cc-by-4.0")
    assert contents_of(copy) == before


def test_a_bundle_tells_nothing_about_the_machine(home: Path, small_run: SmallRun) -> None:
    for name, content in contents_of(home / "saved").items():
        for path in (home.parent, small_run.root, Path.home(), Path.cwd()):
            assert os.fsencode(path) not in content, (name, path)


def test_a_bundle_for_the_hub_names_files_without_their_folders(small_run, model, home: Path, tmp_path: Path) -> None:
    """However far it is saved from the encoder, whose path is that of somebody's machine."""
    encoder = replace(model.contents.encoder, name=f"{LOCAL_DIR}{home / 'clip'}", location=f"{LOCAL_DIR}{home / 'clip'}")
    named = replace(model, contents=replace(model.contents, encoder=encoder))
    named.save_pretrained(tmp_path, source="me/pets")
    texts = [(tmp_path / name).read_text() for name in ("config.json", "README.md")]
    assert not any(home.parent.name in text or "../" in text for text in texts)
    assert json.loads(texts[0])["encoder"]["model"] == "local-dir:clip"
    assert 'from_pretrained("me/pets")' in texts[1].replace("'", '"')
    assert load(tmp_path, encoder=f"{LOCAL_DIR}{home / 'clip'}").encoder is not None


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", HASHED)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[:-1], "cut off, damaged or edited"),
        (lambda content: b"", "cut off, damaged or edited"),
        (lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:], "cut off, damaged or edited"),
        (None, "lacks"),
    ],
    ids=["cut", "empty", "a bit", "missing"],
)
def test_a_damaged_file_is_refused(copy: Path, refusal, name: str, damage: Callable[[bytes], bytes] | None, said: str) -> None:
    path = copy / name
    content = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(content))
    with refusal(copy, name, said, "download or save it again"):
        load(copy, load_encoder=False)


CONFIGS: dict[str, tuple[str | dict[str, Any] | None, tuple[str, ...]]] = {
    "missing": (None, ("not a bundle of dncbm", "config.json")),
    "no JSON": ("{", ("not a bundle of dncbm", "config.json")),
    "no UTF-8": ("\xff", ("not a bundle of dncbm", "config.json")),
    "a list": ("[1]", ("not a bundle of dncbm", "config.json")),
    "a transformer": ('{"model_type": "bert"}', ("not a bundle of dncbm", "library")),
    "another library": ({"library": "saelens"}, ("not a bundle of dncbm", "not written by dncbm")),
    "no schema": ({"schema": ...}, ("not a bundle of dncbm", "schema")),
    "a schema in words": ({"schema": "new"}, ("not a bundle of dncbm", "new")),
    "newer": ({"schema": 2, "dncbm": "9.1"}, ("newer dncbm", "9.1", "schema 2", "update dncbm")),
    "newer and unlike": ('{"schema": 7, "library": "dncbm"}', ("newer dncbm", "schema 7", "update dncbm")),
    "no files": ({"files": ...}, ("not saved completely",)),
    "files are a list": ({"files": []}, ("'files'",)),
    "a file less": ({"files": {}}, ("files of a bundle",)),
    "another file": ({"files__../../x": {"bytes": 1, "sha256": ""}}, ("files of a bundle",)),
    "a file without its size": ({"files__classes.json": {"sha256": "0"}}, ("files of a bundle",)),
    "no encoder": ({"encoder": ...}, ("'encoder.name'",)),
    "an encoder that is a name": ({"encoder": "clip"}, ("'encoder.name'",)),
    "an encoder without a background": ({"encoder__background": ...}, ("lacks", "'encoder.background'")),
    "a pretrained number": ({"encoder__pretrained": 3}, ("wrong value", "'encoder.pretrained'")),
    "another precision": ({"encoder__fingerprint_precision": "int4"}, ("int4",)),
    "no metrics": ({"metrics": ...}, ("'metrics.sae'",)),
    "an intervention": ({"interventions": "without dog"}, ("'interventions'",)),
    "a data set": ({"datasets__probe": None}, ("'datasets.probe'",)),
}


@pytest.mark.parametrize("case", list(CONFIGS))
def test_an_edited_config_is_refused(copy: Path, refusal, case: str) -> None:
    edit, said = CONFIGS[case]
    if isinstance(edit, dict):
        rehash(copy, **edit)
    elif edit is None:
        (copy / "config.json").unlink()
    else:
        (copy / "config.json").write_text(edit, encoding="latin-1")
    with refusal(copy, *said):
        load(copy, load_encoder=False)


def shorten_names(folder: Path) -> None:
    path = folder / "concepts.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def edit_tensors(name: str, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    return lambda folder: save_file(
        {key: tensor.contiguous() for key, tensor in edit(load_file(folder / name)).items()}, folder / name
    )


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "fewer names": (shorten_names, "24"),
    "fewer classes": (lambda folder: (folder / "classes.json").write_text("[]"), "classes"),
    "classes that are none": (lambda folder: (folder / "classes.json").write_text('[{"name": "a"}]'), "classes"),
    "a wider SAE": (lambda folder: save_checkpoint(SparseAutoencoder(12, 48), folder / "sae.safetensors"), "48"),
    "an SAE of other features": (lambda folder: save_checkpoint(SparseAutoencoder(6, 24), folder / "sae.safetensors"), "6"),
    "no SAE": (edit_tensors("sae.safetensors", lambda _: {"x": torch.ones(1)}), "sae.safetensors"),
    "a narrower probe": (edit_tensors("probe.safetensors", lambda t: t | {"weight": t["weight"][:, 1:]}), "23"),
    "a probe of other classes": (edit_tensors("probe.safetensors", lambda t: t | {"weight": t["weight"][1:]}), "2 and 3"),
    "a probe of NaN": (edit_tensors("probe.safetensors", lambda t: t | {"weight": t["weight"] * np.nan}), "weights"),
    "half a probe": (edit_tensors("probe.safetensors", lambda t: t | {"weight": t["weight"].half()}), "float32"),
    "no weight": (edit_tensors("probe.safetensors", lambda t: {k: v for k, v in t.items() if k != "weight"}), "weight"),
    "strengths of other concepts": (
        edit_tensors("probe.safetensors", lambda t: t | {"class_strengths.indices": t["class_strengths.indices"] + 24}),
        "must be < 24",
    ),
    "an empty fingerprint": (lambda folder: np.savez(folder / "fingerprint.npz"), "features"),
    "a pickled fingerprint": (
        lambda folder: np.savez(folder / "fingerprint.npz", features=np.array([{}], dtype=object)),
        "allow_pickle=False",
    ),
    "a fingerprint of other images": (
        lambda folder: np.savez(folder / "fingerprint.npz", features=np.ones((3, 12), dtype=np.float32)),
        "(3, 12)",
    ),
}


@pytest.mark.parametrize("case", list(UNFIT))
def test_parts_that_do_not_fit_together_are_refused(copy: Path, refusal, case: str) -> None:
    change, said = UNFIT[case]
    change(copy)
    rehash(copy)
    with refusal("cannot read the bundle", copy, said, "download or save it again"):
        load(copy, load_encoder=False)


def test_what_is_no_folder_of_a_bundle_is_refused(tmp_path: Path, refusal) -> None:
    (tmp_path / "empty").mkdir()
    with refusal(tmp_path / "empty", "not a bundle of dncbm"):
        load(tmp_path / "empty")


# -------------------------------------------------------------------------------------------------------- the encoder


def change_weights(edit: Callable[[str, torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    def change(clip: Path) -> None:
        state = load_file(clip / WEIGHTS)
        save_file({name: edit(name, tensor).contiguous() for name, tensor in state.items()}, clip / WEIGHTS)

    return change


def change_config(**changes: Any) -> Callable[[Path], object]:
    config = {"model_cfg": CLIP, "preprocess_cfg": PREPROCESS} | changes
    return lambda clip: (clip / "open_clip_config.json").write_text(json.dumps(config))


def widen(clip: Path) -> None:
    """The same weights, with an output of 20 numbers."""
    change_config(model_cfg=CLIP | {"embed_dim": 20})(clip)
    change_weights(lambda name, tensor: torch.ones(16, 20) if name in ("text_projection", "visual.proj") else tensor)(clip)


def random_weights(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return (
        torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) * tensor.std()
        if "visual" in name
        else tensor
    )


ENCODERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "no encoder in"),
    "without weights": (lambda clip: (clip / WEIGHTS).unlink(), "no weights"),
    "damaged": (lambda clip: (clip / WEIGHTS).write_bytes(b"x" * 100), WEIGHTS),
    "other weights": (change_weights(random_weights), "gives other features"),
    "30 % away": (
        change_weights(lambda name, tensor: tensor * 1.3 if name == "visual.proj" else tensor),
        "30.0% away from those of the bundle",
    ),
    "another mean": (change_config(preprocess_cfg={"mean": [0.5] * 3, "std": PREPROCESS["std"]}), "gives other features"),
    "another deviation": (
        change_config(preprocess_cfg={"mean": PREPROCESS["mean"], "std": [0.5] * 3}),
        "gives other features",
    ),
    "stretched images": (change_config(preprocess_cfg=PREPROCESS | {"resize_mode": "squash"}), "gives other features"),
    "another width": (widen, "20 numbers per image instead of 12"),
    "NaN": (change_weights(lambda name, tensor: tensor * np.nan if name == "visual.proj" else tensor), "gives other features"),
}


@pytest.mark.parametrize("case", list(ENCODERS))
def test_another_encoder_is_refused(copy: Path, small_run, model, refusal, case: str) -> None:
    change, said = ENCODERS[case]
    change(copy.parent / "clip")
    with refusal("clip" if "numbers" not in said else "tiny", said, 'from_pretrained(..., encoder="local-dir:FOLDER")'):
        load(copy, device="cpu")
    # what needs no encoder needs no right one
    unaided = load(copy, device="cpu", load_encoder=False)
    strengths = model.concepts(small_run.images)
    np.testing.assert_array_equal(unaided.decision_function(strengths), model.decision_function(strengths))
    with refusal("load_encoder=False"):
        unaided.predict(small_run.images)
    unaided.save_pretrained(copy.parent / "again")  # nor does saving what has a fingerprint
    with refusal(said):
        load(copy.parent / "again", device="cpu")


def test_rounded_weights_are_the_same_encoder(copy: Path) -> None:
    """Weights in bfloat16, as they may be stored, and computations in bfloat16 and float16."""
    change_weights(lambda _, tensor: tensor.bfloat16().to(tensor.dtype) if tensor.is_floating_point() else tensor)(
        copy.parent / "clip"
    )
    rehash(copy, encoder__fingerprint_precision="bf16")
    assert load(copy, device="cpu").encoder is not None


def test_an_encoder_that_was_moved_is_found_by_the_flag(copy: Path, small_run, model, tmp_path: Path, monkeypatch) -> None:
    (copy.parent / "clip").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    loaded = load(copy, device="cpu", encoder="local-dir:moved")
    np.testing.assert_array_equal(loaded.decision_function(small_run.images), model.decision_function(small_run.images))
    loaded.save_pretrained(tmp_path / "again" / "deep")
    assert json.loads((tmp_path / "again" / "deep" / "config.json").read_text())["encoder"]["model"] == "local-dir:../../moved"
    assert load(tmp_path / "again" / "deep", device="cpu").encoder is not None


# ------------------------------------------------------------------------------------------------- folders, interrupted


@pytest.mark.parametrize("is_replaced", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize(
    ("name", "time"), [("config.json", 1), *((name, 1) for name in (*HASHED, "README.md")), ("config.json", 2)]
)
def test_an_interrupted_save_leaves_no_bundle_and_is_repaired(
    home: Path, copy: Path, refusal, monkeypatch, name: str, time: int, is_replaced: bool
) -> None:
    loaded, written, move = load(copy, load_encoder=False), [], os.replace
    target = copy if is_replaced else copy.parent / "new"

    def fail(source: Path, path: Path) -> None:
        written.append(Path(path).name)
        if written.count(name) == time and written[-1] == name:
            raise OSError(28, "No space left on device")
        move(source, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            loaded.save_pretrained(target, license="mit")
    if is_replaced and len(written) == 1:
        assert contents_of(target) == contents_of(home / "saved")
    else:
        with refusal(target):
            load(target, load_encoder=False)
    loaded.save_pretrained(target, license="cc-by-4.0")
    assert contents_of(target).keys() == set(FILES)
    assert load(target, device="cpu").encoder is not None


@pytest.mark.parametrize(
    "own",
    [
        {"README.md": "# my notes"},
        {"config.json": '{"model_type": "bert"}', "model.safetensors": "x"},
        {"config.json": "[]"},
        {"sae.safetensors": "mine", "README.md": "mine"},
        {"concepts.csv": "index,name"},
    ],
    ids=lambda own: ", ".join(own),
)
def test_files_of_somebody_else_are_not_replaced(copy: Path, tmp_path: Path, refusal, own: dict[str, str]) -> None:
    (tmp_path / "own").mkdir()
    for name, text in own.items():
        (tmp_path / "own" / name).write_text(text)
    with refusal(tmp_path / "own", next(iter(own)), "name another folder"):
        load(copy, load_encoder=False).save_pretrained(tmp_path / "own")
    assert contents_of(tmp_path / "own") == {name: text.encode() for name, text in own.items()}


def test_other_files_in_the_folder_stay(copy: Path, tmp_path: Path, refusal) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine")
    model = load(copy, load_encoder=False)
    assert model.save_pretrained(tmp_path / "own") == tmp_path / "own"
    assert contents_of(tmp_path / "own").keys() == {*FILES, "notes.txt"}
    with refusal(tmp_path / "own" / "notes.txt", "is a file"):
        model.save_pretrained(tmp_path / "own" / "notes.txt")


# ------------------------------------------------------------------------------------------------------------- the card


def test_the_card_has_the_header_of_the_hub(model, home: Path) -> None:
    data = ModelCard.load(home / "saved" / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("dncbm", "image-classification", "cc-by-4.0")
    assert "concept-bottleneck" in data.tags
    (result,) = data.eval_results
    assert (result.dataset_name, result.dataset_split, result.metric_type) == ("pets", "val", "accuracy")
    assert result.metric_value == pytest.approx(model.contents.about["metrics"]["probe"]["val_top1"], abs=1e-4)


def test_the_card_of_an_edited_model_reports_no_accuracy_as_its_own(copy: Path, tmp_path: Path) -> None:
    edited = load(copy, load_encoder=False).intervene(remove=[0])
    text = (edited.save_pretrained(tmp_path / "edited") / "README.md").read_text()
    assert ModelCard(text).data.eval_results is None
    assert f"edited after training: without {edited.labels[0]}." in text
    accuracies = [line for line in text.splitlines() if line.startswith("|") and "top-1" in line]
    assert accuracies
    assert all("before the edits |" in line for line in accuracies)
    assert "before the edits" not in (copy / "README.md").read_text()


HOSTILE = [
    "a | b", "<img src=x onerror=alert(1)>", "`code", "**bold** _it_", "![x](http://x/y.png)", "[link](javascript:x)",
    "&lt;b&gt;", "\\", "\u202eevil", "\u05db\u05dc\u05d1", "\U0001f415\u200d\U0001f9ba", "~~$x$~~", "<!-- ", "</td></table>",
    "--- #", "1. ]( ",
]  # fmt: skip


def shown(name: str) -> str:
    return " ".join(name.split()).replace("\u202e", "")


def test_names_on_the_card_are_text_and_nothing_else(home: Path, tmp_path: Path) -> None:
    contents = load(home / "saved", load_encoder=False).contents
    names = [ConceptName(name.index, HOSTILE[name.index % len(HOSTILE)], name.similarity) for name in contents.names]
    classes = ("two\nlines\n\n| a | b |", HOSTILE[0], HOSTILE[1])
    about = contents.about | {"interventions": [f"without {name}" for name in HOSTILE]}
    hostile = replace(contents, names=names, classes=classes, about=about)
    write_bundle(hostile, tmp_path / "hostile")
    read = load(tmp_path / "hostile", load_encoder=False)
    assert (read.contents.names, read.contents.classes, read.contents.about) == (names, classes, about)

    text = (tmp_path / "hostile" / "README.md").read_text(encoding="utf-8")
    body = ModelCard(text).text
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    assert not [token.content for token in tokens if token.type == "html_block"]
    inline = [token.children for token in tokens if token.type == "inline"]
    kinds = {child.type for children in inline for child in children}
    assert kinds <= {"text", "text_special", "code_inline", "softbreak"}, kinds
    said = ["".join(child.content for child in children) for children in inline]
    assert all(shown(name) in said for name in classes)  # each in a cell of its own
    labels = {shown(label) for label in read.labels}
    leading = said[said.index(shown(classes[0])) + 1]
    assert {re.sub(r" \([+-]\d+\.\d\d\)$", "", one) for one in leading.split(", ")} <= labels
    edits = next(one for one in said if "edited after training" in one)
    assert "; ".join(f"without {shown(name)}" for name in HOSTILE) in edits


def with_verdicts(contents: Contents) -> Contents:
    """The same with an abstaining latent among those that lead each class, and names that are told apart as verdicts say."""
    top = {int(np.argmax(contents.weight[:, c].numpy())) for c in range(contents.weight.shape[1])}
    passed = [name.name for name in contents.names if name.index not in top]
    verdicts = [
        "abstains" if name.index in top else "named" if passed.count(name.name) == 1 else "collision"
        for name in contents.names
    ]
    return replace(contents, names=[replace(name, verdict=one) for name, one in zip(contents.names, verdicts, strict=True)])


def test_a_latent_that_abstains_is_nowhere_a_plain_word(home: Path, tmp_path: Path) -> None:
    """In the bundle, its card, explanations, classes, concepts and edits; its name is still what it can be asked by."""
    contents = with_verdicts(load(home / "saved", load_encoder=False).contents)
    write_bundle(contents, tmp_path / "tested")
    read = load(tmp_path / "tested", load_encoder=False)
    assert read.contents.names == contents.names
    with (tmp_path / "tested" / "concepts.csv").open(newline="") as file:
        assert [row["verdict"] for row in csv.DictReader(file)] == [name.verdict for name in contents.names]
    abstaining = [name for name in contents.names if name.verdict == "abstains"]
    card = (tmp_path / "tested" / "README.md").read_text(encoding="utf-8")
    strengths = np.zeros((1, len(contents.names)), dtype=np.float32)
    strengths[:, [name.index for name in abstaining]] = 1
    explained = {one.index: one.label for one in read.explain(scipy.sparse.csr_matrix(strengths)).contributions}
    assert explained
    for name in abstaining:
        label = f"latent {name.index} ({name.name}?)"
        assert read.labels[name.index] == label
        assert read.names[name.index] == name.name
        concept = read.concept(label)
        assert (concept.index, concept.label, concept.verdict) == (name.index, label, "abstains")
        assert concept.table().startswith(f"{label}: latent {name.index}, ")
        assert explained.get(name.index, label) == label
        for number in range(len(contents.classes)):
            of_class = read.class_(number).contributions
            assert {one.label for one in of_class if one.index == name.index} <= {label}
        edited = read.intervene(remove=[label])
        assert edited.contents.about["interventions"] == [f"without {label}"]
        assert edited.weight.ne(read.weight).any(dim=1).nonzero().flatten().tolist() == [name.index]
    assert f"{len(abstaining)} of 24 latents abstain, which a label such as latent {abstaining[0].index} (" in card
    assert "All others are named, which does not say that their names are right." in card
    leading = [line.split(" | ")[1].strip(" |") for line in card.splitlines() if line.startswith("| ") and "(+" in line]
    shown = {re.sub(r" \([+-]\d+\.\d\d\)$", "", one) for cell in leading for one in cell.split(", ")}
    assert shown <= set(read.labels)
    assert any(one.startswith("latent ") for one in shown)


def test_a_card_says_whether_names_were_tested(home: Path, tmp_path: Path) -> None:
    contents = load(home / "saved", load_encoder=False).contents
    every = (home / "saved" / "README.md").read_text(encoding="utf-8")  # this run was named with --names all
    assert "No latent abstains" in every
    untested = replace(contents, names=[replace(name, verdict=None) for name in contents.names])
    write_bundle(untested, tmp_path / "untested")
    assert "The names were not tested." in (tmp_path / "untested" / "README.md").read_text(encoding="utf-8")


def test_a_bundle_of_an_older_version_has_no_verdicts(copy: Path) -> None:
    with (copy / "concepts.csv").open(newline="", encoding="utf-8") as file:
        rows = [row[:4] for row in csv.reader(file)]
    assert rows[0] == ["index", "name", "similarity", "activity"]
    with (copy / "concepts.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    rehash(copy)
    read = load(copy, load_encoder=False)
    assert {name.verdict for name in read.contents.names} == {None}
    assert read.names == [row[1] for row in rows[1:]]


# ------------------------------------------------------------------------------------------------------------- stage 11


@pytest.fixture
def run(small_run: SmallRun, tmp_path: Path, monkeypatch) -> SmallRun:
    """A copy of the run, which $DNCBM_CONFIG names."""
    root = tmp_path / "run"
    shutil.copytree(small_run.root, root)
    monkeypatch.setenv("DNCBM_CONFIG", str(root / "config.py"))
    images = [root / path.relative_to(small_run.root) for path in small_run.images]
    return replace(small_run, settings=load_settings(root / "config.py"), images=images)


def test_the_stage_exports_a_bundle_and_says_how_to_load_it(run: SmallRun, capsys) -> None:
    main("export", ["--license", "cc-by-4.0"])
    *said, one, two, three = capsys.readouterr().out.splitlines()
    assert "24 concepts and 3 classes" in said[-1]
    names = {"__name__": "a notebook"}
    exec("\n".join((one, two, three.replace("image.jpg", str(run.images[0])))), names)
    assert "logit" in capsys.readouterr().out.splitlines()[-1]
    model = names["model"]
    assert isinstance(model, ConceptBottleneckModel)
    strengths = ConceptBottleneckModel.from_run(run.settings).concepts(run.images)
    assert (model.concepts(run.images) != strengths).nnz == 0

    (folder,) = run.settings.analysis_dir.rglob("sae.safetensors")
    folder = folder.parent
    before = contents_of(folder)
    assert before.keys() == {*FILES, "manifest.json"}
    assert not any(os.fsencode(run.root) in content for content in before.values())
    capsys.readouterr()
    main("export", ["--license", "cc-by-4.0"])
    assert "already done" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"license was 'cc-by-4.0', now 'mit'.*--overwrite"):
        main("export", ["--license", "mit"])
    assert contents_of(folder) == before
    main("export", ["--license", "mit", "--overwrite"])
    assert ModelCard.load(folder / "README.md").data.license == "mit"


def test_a_folder_is_exported_to_unless_it_holds_something_else(run: SmallRun, model, tmp_path: Path) -> None:
    main("export", ["--output", str(tmp_path / "here" / "there")])
    assert load(tmp_path / "here" / "there", device="cpu").encoder is not None
    for to, name in (("bundle", "README.md"), ("saelens", "cfg.json")):
        own = tmp_path / f"own {to}"
        own.mkdir()
        (own / name).write_text("mine")
        for overwrite in ([], ["--overwrite"]):
            with pytest.raises(SystemExit, match=f"own {to} holds {name}.*name another folder"):
                main("export", ["--to", to, "--output", str(own), *overwrite])
        assert contents_of(own) == {name: b"mine"}
    model.save_pretrained(tmp_path / "by hand")
    with pytest.raises(SystemExit, match=r"by hand holds a bundle that this stage did not make.*--overwrite"):
        main("export", ["--output", str(tmp_path / "by hand")])
    main("export", ["--output", str(tmp_path / "by hand"), "--overwrite"])


@pytest.mark.usefixtures("run")
def test_the_stage_exports_for_saelens(model, tmp_path: Path, capsys) -> None:
    for said in ("SAE for SAELens", "already done"):
        main("export", ["--to", "saelens", "--output", str(tmp_path / "lens")])
        assert said in (out := capsys.readouterr().out)
        assert f"SAE.load_from_disk({str(tmp_path / 'lens')!r})" in out
    assert contents_of(tmp_path / "lens").keys() == {"cfg.json", "sae_weights.safetensors", "manifest.json"}
    config = json.loads((tmp_path / "lens" / "cfg.json").read_text())
    assert (config["d_in"], config["d_sae"], config["metadata"]["model_name"]) == (12, 24, "tiny")
    weights = load_file(tmp_path / "lens" / "sae_weights.safetensors")
    scale = 12**0.5  # of unit_norm
    torch.testing.assert_close(weights["W_dec"], model.sae.dictionary.float() * scale)
