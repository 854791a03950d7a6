"""The stage that writes a site: its chunks hold what the artifacts hold, and the folder is safe."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.optimize import linear_sum_assignment

from dncbm.browser import images, shown, stage, thumbnails
from dncbm.browser.images import write_strengths
from dncbm.browser.shown import Kept, ShownRun
from dncbm.cli import parse
from dncbm.concepts.naming import ConceptName, write_names
from dncbm.concepts.sae import load_sae
from dncbm.explain.report.stage import write_report
from dncbm.features.datasets.probe import display_name
from dncbm.runs.declarations import Browse, Explained, ProbeRun, Report
from dncbm.runs.errors import UserError
from dncbm.runs.locks import locked
from dncbm.runs.manifests import Outcome, manifest_path, read_manifest, write_json
from dncbm.runs.settings import load_settings
from dncbm.stages import COMMANDS
from sparse_autoencoder import SparseAutoencoder, save_checkpoint
from sparse_autoencoder.declare import build, values
from tests.browser.test_pack import read_chunk
from tests.explain import conftest as explained
from tests.explain.conftest import CLASSES, MINE, NAMES, F, N, World, strengths

template, world, script = explained.template, explained.world, explained.script
DATASETS = ["places365", "mine"]
SEVEN = replace(explained.RUN, training=replace(explained.RUN.training, seed=7))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "site"


@pytest.fixture
def browse(world: World, folder: Path) -> Callable[..., Outcome]:
    """Runs the stage."""

    def run(
        beside: tuple[str, ...] = (), split: str = "val", probe: ProbeRun = world.probe, overwrite: bool = False
    ) -> Outcome:  # fmt: skip
        declared = world.run, probe, Explained(split), Browse(folder, beside)
        return stage.write_browser(world.settings, *declared, device="cpu", overwrite=overwrite)

    return run


def chunk(folder: Path, name: str) -> Any:
    called, content = read_chunk(folder / "data" / f"{name}.js")
    assert called == name
    return content


def chunks(folder: Path) -> set[str]:
    data = folder / "data"
    return {path.relative_to(data).with_suffix("").as_posix() for path in data.rglob("*.js")}


def stored(folder: Path, number: int, dataset: int, per_chunk: int, n_latents: int = F) -> np.ndarray:
    """The strengths in the chunks of a data set, dense."""
    rows = []
    for k in range(sum(name.startswith(f"{number}/strengths_{dataset}_") for name in chunks(folder))):
        part = chunk(folder, f"{number}/strengths_{dataset}_{k}")
        assert (part["values"] > 0).all()
        for start, end in zip(part["indptr"][:-1], part["indptr"][1:], strict=True):
            assert (np.diff(part["indices"][start:end].astype(int)) > 0).all()
        shape = (len(part["indptr"]) - 1, n_latents)
        rows.append(scipy.sparse.csr_matrix((part["values"], part["indices"], part["indptr"]), shape).toarray())
    assert {len(part) for part in rows[:-1]} <= {per_chunk}
    return np.concatenate(rows)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_chunks_hold_what_the_artifacts_hold(
    world: World, browse: Callable[..., Outcome], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "IMAGES_PER_CHUNK", 16)
    monkeypatch.setattr(shown, "WEIGHTS_PER_CHUNK", 13)
    assert browse() is Outcome.RAN
    site = chunk(folder, "site")
    assert [(one["name"], one["n"], one["of"]) for one in site["datasets"]] == [("places365", N, N), ("mine", 10, 10)]
    assert site["probed"] == 0
    assert site["classes"] == [display_name(name) for name in CLASSES]

    found = chunk(folder, "images_0")
    np.testing.assert_array_equal(found["key"], world.keys)
    np.testing.assert_array_equal(found["label"], world.labels)
    assert found["names"] == [f"{key:04d}.jpg" for key in world.keys]
    assert len(found["group"]) == 0
    assert chunk(folder, "images_1")["classes"] == MINE
    np.testing.assert_array_equal(stored(folder, 0, 0, 16), world.z)
    np.testing.assert_array_equal(stored(folder, 0, 1, 16), strengths(3, 10))
    rows = site["runs"][0]["weight_rows"]
    assert rows == 4
    weights = [chunk(folder, f"0/weights_{k}")["weight"] for k in range(-(-F // rows))]
    assert {len(part) for part in weights[:-1]} == {rows}
    np.testing.assert_array_equal(np.concatenate(weights), world.weight)
    np.testing.assert_array_equal(chunk(folder, "0/predictions")["predicted"], world.logits.argmax(1))
    expected = {"site", "images_0", "images_1", "0/concepts", "0/tops_0", "0/tops_1", "0/concept_0", "0/classes", "0/class_0"}
    expected |= {"0/predictions", *(f"0/strengths_0_{k}" for k in range(4)), "0/strengths_1_0"}
    assert chunks(folder) == expected | {f"0/weights_{k}" for k in range(4)}
    assert {path.name for path in stage.SITE.iterdir()} <= {path.name for path in folder.iterdir()}
    assert read_manifest(folder)["outputs"].keys() == {*tree(folder)} - {"manifest.json"}


def test_of_many_images_a_sample_is_kept(
    world: World, browse: Callable[..., Outcome], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shown, "MOST_IMAGES", 7)
    browse()
    rows = [0, 8, 17, 25, 34, 42, 51]
    assert [(one["n"], one["of"]) for one in chunk(folder, "site")["datasets"]] == [(7, N), (7, 10)]
    np.testing.assert_array_equal(chunk(folder, "images_0")["key"], world.keys[rows])
    np.testing.assert_array_equal(chunk(folder, "images_0")["label"], world.labels[rows])
    np.testing.assert_array_equal(stored(folder, 0, 0, 512), world.z[rows])
    np.testing.assert_array_equal(chunk(folder, "0/predictions")["predicted"], world.logits[rows].argmax(1))


@pytest.mark.parametrize(("n_latents", "dtype"), [(65_535, np.uint16), (65_536, np.uint32), (65_537, np.uint32)])
def test_strengths_name_the_last_of_many_latents(folder: Path, n_latents: int, dtype: type) -> None:
    z = scipy.sparse.csr_matrix(([1.0, 2.0], ([0, 1], [0, n_latents - 1])), (2, n_latents), dtype=np.float32)
    kept = Kept("a", np.arange(2), 2, np.zeros(2, np.int64), ("x",), None, ())
    run = ShownRun(explained.RUN, torch.zeros(n_latents, 1), None, None, (z,), None, None, None)
    write_strengths(run, [kept], folder / "data", 0)
    assert chunk(folder, "0/strengths_0_0")["indices"].dtype == dtype
    np.testing.assert_array_equal(stored(folder, 0, 0, 2, n_latents), z.toarray())


def test_groups_and_their_names(world: World, browse: Callable[..., Outcome], folder: Path) -> None:
    split, groups = world.artifacts.probe_split("places365"), np.arange(N + 1) % 3
    np.save(world.artifacts.groups("places365", "val"), groups)
    names = {"class_names": CLASSES, "group_names": ["on land", "on water", "in air"]}
    explained.make(split, lambda: write_json(split, names))
    browse()
    assert chunk(folder, "site")["groups"] == ["on land", "on water", "in air"]
    np.testing.assert_array_equal(chunk(folder, "images_0")["group"], groups[world.keys])


def test_images_that_could_not_be_read_are_tried_again_on_request(
    browse: Callable[..., Outcome], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(source: Any) -> Any:
        raise PermissionError("it may not be read")

    def grey() -> list[int]:
        found: list[int] = json.loads((folder / "thumbnails/0/made.json").read_text())["grey"]
        return found

    with monkeypatch.context() as patched:
        patched.setattr(thumbnails, "open_image", fails)
        browse()
    assert grey()
    assert browse() is Outcome.ALREADY_DONE
    assert browse(overwrite=True) is Outcome.RAN
    assert grey() == []
    assert browse(overwrite=True) is Outcome.ALREADY_DONE


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError, UserError])
def test_an_earlier_site_with_grey_images_stays_until_they_are_tried_again(
    failure: type[BaseException], browse: Callable[..., Outcome], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def fail(*_: Any, **__: Any) -> None:
        raise failure("no space left")

    def cannot_read(_: Any) -> None:
        raise PermissionError("it may not be read")

    with monkeypatch.context() as patch:
        patch.setattr(thumbnails, "open_image", cannot_read)
        browse()
    first = tree(folder)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "write_concepts", fail)
        with pytest.raises(failure):
            browse(overwrite=True)
    assert tree(folder) == first
    assert browse() is Outcome.ALREADY_DONE
    assert browse(overwrite=True) is Outcome.RAN


@pytest.mark.parametrize("refused", ["by a lock", "for its device", "for stale names"])
def test_a_refused_attempt_at_grey_images_leaves_the_site_as_it_was(
    world: World, browse: Callable[..., Outcome], folder: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    def cannot_read(_: Any) -> None:
        raise PermissionError("it may not be read")

    def no_device(_: Any) -> None:
        raise UserError("there is no such device")

    names = world.make_names(NAMES)
    with monkeypatch.context() as patch:
        patch.setattr(thumbnails, "open_image", cannot_read)
        browse()
    first = tree(folder)
    if refused == "for its device":
        monkeypatch.setattr(stage, "resolve_device", no_device)
    elif refused == "for stale names":
        names.write_text(names.read_text().replace("sand", "gravel"))
    with pytest.raises(UserError), locked(folder) if refused == "by a lock" else nullcontext():
        browse(overwrite=True)
    assert tree(folder) == first


@pytest.mark.parametrize("edited", ["labels", "groups"])
def test_a_site_does_not_outlive_the_labels_and_groups_it_shows(
    world: World, browse: Callable[..., Outcome], folder: Path, refusal: Callable[..., Any], edited: str
) -> None:
    groups = np.arange(N + 1) % 3
    np.save(world.artifacts.groups("places365", "val"), groups)
    browse()
    path = getattr(world.artifacts, edited)("places365", "val")
    np.save(path, np.roll(np.load(path), 1))
    with refusal(folder, f"places365 val {edited}", "--overwrite"):
        browse()
    assert browse(overwrite=True) is Outcome.RAN
    shown_now = chunk(folder, "images_0")["label" if edited == "labels" else "group"]
    np.testing.assert_array_equal(shown_now, np.load(path)[world.keys])


def fewer_images(world: World, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stage, "MOST_IMAGES", 7)


def another_license(world: World, patch: pytest.MonkeyPatch) -> None:
    path = world.settings.path
    path.write_text(path.read_text() + "probe_datasets['mine'] = {'path': 'mine', 'license': 'CC0, nobody'}\n")
    patch.setitem(world.settings.probe_datasets, "mine", load_settings(path).probe_datasets["mine"])


def other_pages(world: World, patch: pytest.MonkeyPatch) -> None:
    pages = world.settings.path.parent / "pages"
    shutil.copytree(stage.SITE, pages)
    (pages / "style.css").write_text("")
    patch.setattr(stage, "SITE", pages)


def other_classes(world: World, patch: pytest.MonkeyPatch) -> None:
    path = world.artifacts.probe_split("mine")
    explained.make(path, lambda: write_json(path, {"class_names": [*MINE[::-1]]}))


def other_probe(world: World, patch: pytest.MonkeyPatch) -> None:
    world.save_probe(world.weight * 2)


def new_report(world: World, patch: pytest.MonkeyPatch) -> None:
    write_report(world.settings, world.run, world.probe, device="cpu")


def other_names_beside(world: World, patch: pytest.MonkeyPatch) -> None:
    world.save_names([*NAMES[:-1], "renamed"], SEVEN)


def other_strengths_beside(world: World, patch: pytest.MonkeyPatch) -> None:
    world.save_strengths(world.z * 2, world.keys, run=SEVEN)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (fewer_images, "most_images was"), (another_license, "licenses of mine changed"),
        (other_pages, "code of the pages has changed"), (other_classes, "mine split has changed"),
        (other_probe, "probe has changed"), (new_report, "report is new"),
        (other_names_beside, "names of seed 7 has changed"),
        (other_strengths_beside, "places365 val strengths of seed 7 has changed"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_a_site_does_not_outlive_what_it_shows(
    change: Callable[..., None], said: str, world: World, browse: Callable[..., Outcome], folder: Path,
    refusal: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    world.save_sae(SEVEN)
    browse(("seed=7",))
    first = tree(folder)
    change(world, monkeypatch)
    with refusal(folder, said, "--overwrite"):
        browse(("seed=7",))
    assert tree(folder) == first


def lose_probe(world: World) -> None:
    world.artifacts.probe(world.run, world.probe).unlink()
    manifest_path(world.artifacts.probe(world.run, world.probe)).unlink()


def lose_names(world: World) -> None:
    world.artifacts.concept_names(world.run).unlink()


def lose_strengths(world: World, *datasets: str) -> None:
    for dataset in datasets or DATASETS:
        shutil.rmtree(world.artifacts.strengths(world.run, dataset, "val"))


def lose_images(world: World) -> None:
    for folder in ("places", "mine"):
        shutil.rmtree(world.settings.path.parent / folder)


@pytest.mark.parametrize("lose", [lose_probe, lose_names, lose_strengths, lose_images])
def test_what_is_missing_is_left_out(
    lose: Callable[[World], None], world: World, browse: Callable[..., Outcome], folder: Path
) -> None:
    lose(world)
    assert browse() is Outcome.RAN
    site, found = chunk(folder, "site"), chunks(folder)
    run = site["runs"][0]
    has_strengths, has_names = lose is not lose_strengths, lose is not lose_names
    has_probe, has_images = has_strengths and lose is not lose_probe, has_strengths and lose is not lose_images
    assert [one["name"] for one in site["datasets"]] == (DATASETS if has_strengths else [])
    assert run["has_strengths"] == [True] * len(site["datasets"])
    assert (run["has_probe"], run["has_names"]) == (has_probe, has_names)
    assert {"0/classes", "0/predictions", "0/weights_0", "0/class_0"} & found == (
        {"0/classes", "0/predictions", "0/weights_0", "0/class_0"} if has_probe else set()
    )
    assert all((one["thumbnails"] is not None) == has_images for one in site["datasets"])
    assert all(bool(one["no_thumbnails"]) != has_images for one in site["datasets"])
    if not has_images and has_strengths:
        assert chunk(folder, "images_0")["names"][3] == "image 4"
    concepts = chunk(folder, "0/concepts")
    assert concepts["labels"][0] == ("sand" if has_names else "latent 0")
    assert concepts["activity"].size == F * len(site["datasets"])


EXPORT = '{"stage": "export", "settings": {}, "inputs": {}, "outputs": {"a": {"bytes": 1, "sha256": ""}}}'


@pytest.mark.parametrize("text", [EXPORT, '{"name": "a web app"}'])
@pytest.mark.parametrize("held", ["index.html", "data/notes.txt", "thumbnails/1.webp", "style.css", "manifest.json", ""])
def test_a_folder_of_something_else_is_refused(
    held: str, text: str, browse: Callable[..., Outcome], folder: Path
) -> None:  # fmt: skip
    path = folder / held
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    for overwrite in (False, True):
        with pytest.raises(UserError, match=re.escape(str(folder))) as caught:
            browse(overwrite=overwrite)
        assert "--browser_folder" in str(caught.value)
        assert "--overwrite" not in str(caught.value)
    assert [one for one in (folder, *folder.rglob("*")) if one.is_file()] == [path]
    assert path.read_text() == text


def test_a_link_to_nothing_is_refused(browse: Callable[..., Outcome], folder: Path, refusal: Callable[..., Any]) -> None:
    folder.symlink_to("nowhere")
    with refusal("--browser_folder", folder, "link"):
        browse()


@pytest.mark.parametrize("to", ["nowhere", "elsewhere"])
def test_a_link_where_a_new_site_would_be_made_is_refused(
    browse: Callable[..., Outcome], folder: Path, refusal: Callable[..., Any], to: str
) -> None:  # fmt: skip
    elsewhere = folder.with_name("elsewhere")
    (elsewhere / "data").mkdir(parents=True)
    (elsewhere / "data" / "notes.txt").write_text("mine")
    for has_site in (False, True):
        if has_site:
            browse()
        folder.mkdir(exist_ok=True)
        (folder / ".new_site").symlink_to(folder.with_name(to))
        first = tree(folder)
        for overwrite in (False, True):
            with refusal(folder / ".new_site", "link"):
                browse(overwrite=overwrite)
        assert tree(folder) == first
        (folder / ".new_site").unlink()
    assert tree(elsewhere) == {"data/notes.txt": b"mine"}


def test_files_of_others_stay(
    world: World, browse: Callable[..., Outcome], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    browse()
    write_report(world.settings, world.run, world.probe, Report(folder), device="cpu")
    report = {name: content for name, content in tree(folder).items() if name.startswith(("report", "figures", "claims"))}
    assert {"report.html", "report.md"} < report.keys()
    others = ("notes.txt", "data/mine.js", "data/0/notes.js", "thumbnails/7/x/1.webp", "thumbnails/1/0/mine.webp")
    for name in others:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    assert browse() is Outcome.ALREADY_DONE
    lose_strengths(world, "mine")
    browse(overwrite=True)
    assert tree(folder).items() >= (report | dict.fromkeys(others, b"mine")).items()
    assert {path.parts[1] for path in map(Path, read_manifest(folder)["outputs"]) if path.parts[0] == "thumbnails"} == {"0"}


def test_a_dropped_run_leaves_nothing(world: World, browse: Callable[..., Outcome], folder: Path) -> None:
    world.save_sae(replace(world.run, training=replace(world.run.training, seed=7)))
    browse(("seed=7",))
    lose_strengths(world, "mine")
    browse(overwrite=True)
    folders = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_dir()}
    assert folders == {"data", "data/0", "thumbnails", "thumbnails/0", "thumbnails/0/0"}


def test_a_site_is_made_again_only_on_request(
    world: World, browse: Callable[..., Outcome], folder: Path, refusal: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    browse()
    first = tree(folder)
    assert browse() is Outcome.ALREADY_DONE
    lose_images(world)  # a site keeps the images that it has
    assert browse() is Outcome.ALREADY_DONE
    assert tree(folder) == first
    assert capsys.readouterr().out.splitlines()[-1] == f"open {folder}/index.html"

    (folder / "notes.txt").write_text("mine")
    (folder / "data" / "notes.txt").write_text("mine")
    lose_strengths(world, "mine")
    world.make_names([*NAMES[:-1], "renamed"])
    with refusal(folder, "names", "strengths", "--overwrite"):
        browse()
    assert tree(folder) == first | dict.fromkeys(("notes.txt", "data/notes.txt"), b"mine")
    assert browse(overwrite=True) is Outcome.RAN
    assert chunk(folder, "0/concepts")["names"][-1] == "renamed"
    assert not {"images_1", "0/tops_1", "0/strengths_1_0"} & chunks(folder)
    assert {path.parts[0] for path in map(Path, tree(folder / "thumbnails"))} == {"0"}
    assert (folder / "notes.txt").read_text() == (folder / "data" / "notes.txt").read_text() == "mine"


def lose_folder(world: World) -> Path:
    return world.settings.path.parent / "mine"


def lose_files(world: World) -> Path:
    """The lists of places365 stay."""
    return world.settings.path.parent / "places" / "val_256"


@pytest.mark.parametrize(("lose", "dataset", "name"), [(lose_folder, 1, "0.png"), (lose_files, 0, "0000.jpg")])
@pytest.mark.parametrize("has_features", [False, True])
def test_images_that_come_back_are_shown(
    lose: Callable[[World], Path], dataset: int, name: str, has_features: bool, world: World,
    browse: Callable[..., Outcome], folder: Path, refusal: Callable[..., Any], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """What they were in an earlier site matters only as long as it has their thumbnails."""
    if has_features:
        world.save_features(DATASETS[dataset])
    images = lose(world)
    away = images.with_name("away")

    def holds() -> tuple[bool, str]:
        about = chunk(folder, "site")["datasets"][dataset]
        assert (about["thumbnails"] is None) == bool(about["no_thumbnails"])
        return about["thumbnails"] is not None, chunk(folder, f"images_{dataset}")["names"][0]

    def again() -> None:
        away.rename(images)
        with refusal("images", "--overwrite"):
            browse()
        browse(overwrite=True)
        assert holds() == (True, name)

    images.rename(away)
    images.mkdir()
    browse()
    assert holds() == (False, "image 0")
    assert len(caplog.records) == 1
    assert browse() is Outcome.ALREADY_DONE
    assert len(caplog.records) == 1
    images.rmdir()
    again()
    images.rename(away)  # made again without them, it keeps what it has
    world.make_names([*NAMES[:-1], "renamed"])
    browse(overwrite=True)
    assert holds() == (True, name)
    away.rename(images)
    assert browse() is Outcome.ALREADY_DONE
    images.rename(away)  # thumbnails of other images do not help
    keys = world.keys if dataset == 0 else np.arange(10)
    world.save_strengths(np.ones((len(keys) - 1, F), np.float32), np.delete(keys, 1), DATASETS[dataset])
    browse(overwrite=True)
    assert holds() == (False, "image 0")
    again()


def test_images_are_listed_once_and_only_for_work(
    world: World, browse: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, real = list[str](), thumbnails.probe_images
    monkeypatch.setattr(thumbnails, "probe_images", lambda *args: (listed.append(args[1]), real(*args))[1])
    browse()
    assert listed == DATASETS
    assert browse() is Outcome.ALREADY_DONE
    world.make_names([*NAMES[:-1], "renamed"])
    assert browse(overwrite=True) is Outcome.RAN
    assert listed == DATASETS


def test_another_probed_data_set_or_order_is_another_site(
    world: World, browse: Callable[..., Outcome], folder: Path, refusal: Callable[..., Any]
) -> None:
    for seed in (7, 8):
        world.save_sae(replace(world.run, training=replace(world.run.training, seed=seed)))
    browse(("seed=7", "seed=8"))
    with refusal("runs was", "seed 8", "--overwrite"):
        browse(("seed=8", "seed=7"))
    with refusal("probe_dataset was 'places365', now 'imagenet'"):
        browse(("seed=7", "seed=8"), probe=ProbeRun("imagenet"))
    with refusal("probe was"):
        browse(("seed=7", "seed=8"), probe=replace(world.probe, seed=50))
    browse(("seed=8", "seed=7"), overwrite=True)
    assert [run["label"] for run in chunk(folder, "site")["runs"]] == ["seed 49", "seed 8", "seed 7"]


def test_the_data_set_of_the_probe_comes_first_or_is_missed_aloud(
    browse: Callable[..., Outcome], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    browse(probe=ProbeRun("mine"))
    assert [one["name"] for one in chunk(folder, "site")["datasets"]] == ["mine", "places365"]
    assert not caplog.records
    browse(probe=ProbeRun("imagenet"), overwrite=True)
    (record,) = caplog.records
    assert "imagenet has no concept strengths of its val split" in record.getMessage()


@pytest.mark.parametrize("val", ["missing", "damaged", "of other images"])
def test_a_site_of_train_needs_no_strengths_of_val(
    val: str, world: World, browse: Callable[..., Outcome], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for dataset in DATASETS:
        np.save(world.artifacts.labels(dataset, "train"), np.zeros(10, np.int64))
    world.save_strengths(strengths(3, 10), np.arange(10), "places365", "train")
    of_val = world.artifacts.strengths(world.run, "places365", "val")
    if val == "missing":
        shutil.rmtree(of_val)
    elif val == "damaged":
        next(of_val.glob("*.npz")).write_bytes(b"x")
    else:
        world.save_strengths(world.z[:5], 1000 + np.arange(5))
    assert browse(split="train") is Outcome.RAN
    run = chunk(folder, "site")["runs"][0]
    assert run["has_probe"]
    assert run["figures"] == []
    assert [one["what"] for one in run["missing"] if "on val is left out" in one["what"]]
    assert [record for record in caplog.records if "on val is left out" in record.getMessage()]


def test_strengths_of_no_images_are_not_called_missing(
    world: World, browse: Callable[..., Outcome], folder: Path
) -> None:  # fmt: skip
    world.save_strengths(np.zeros((0, F), np.float32), np.arange(0), "mine")
    browse()
    said = [one["what"] for one in chunk(folder, "site")["runs"][0]["missing"]]
    assert "The concept strengths of mine are of no images." in said
    assert not any(what.startswith("There are no concept strengths") for what in said)


def test_a_site_does_not_say_where_it_was_made(world: World, browse: Callable[..., Outcome], folder: Path) -> None:
    world.save_sae(replace(world.run, training=replace(world.run.training, seed=7)))
    lose_images(world)
    browse(("seed=7",))
    for name in chunks(folder):
        assert str(folder.parent) not in str(chunk(folder, name)), name
    assert not [name for name, content in tree(folder).items() if str(folder.parent).encode() in content]
    assert "--browser_folder /path/to/site" in chunk(folder, "site")["command"]


def test_a_damaged_site_is_made_again(browse: Callable[..., Outcome], folder: Path, refusal: Callable[..., Any]) -> None:
    browse()
    first = tree(folder)
    (folder / "data" / "site.js").write_text("x")
    with refusal("site.js", "--overwrite"):
        browse()
    assert browse(overwrite=True) is Outcome.RAN
    (folder / "data" / "images_0.js").unlink()
    assert browse() is Outcome.RAN
    assert tree(folder).keys() == first.keys()


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError, UserError])
@pytest.mark.parametrize("where", ["write_images", "write_concepts", "write_thumbnails"])
def test_an_earlier_site_stays_until_a_new_one_is_whole(
    where: str, failure: type[BaseException], world: World, browse: Callable[..., Outcome], folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    browse()
    first = tree(folder)
    world.make_names([*NAMES[:-1], "renamed"])

    def fail(*_: Any, **__: Any) -> None:
        raise failure("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(stage, where, fail)
        with pytest.raises(failure):
            browse(overwrite=True)
    assert tree(folder) == first
    browse(overwrite=True)
    assert tree(folder).keys() == first.keys()
    assert chunk(folder, "0/concepts")["names"][-1] == "renamed"


@pytest.mark.parametrize("done", [0, 3])
def test_half_a_site_does_not_open(
    done: int, world: World, browse: Callable[..., Outcome], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Interrupted while chunks are replaced, or when some pages are there."""
    browse()
    lose_probe(world)
    pages, copy = list[Path](), shutil.copyfile

    def interrupt(source: Path, to: Path) -> None:
        pages.append(source)
        if len(pages) > done:
            raise KeyboardInterrupt
        copy(source, to)

    with monkeypatch.context() as patch:
        patch.setattr("dncbm.browser.folder.shutil.copyfile", interrupt)
        with pytest.raises(KeyboardInterrupt):
            browse(overwrite=True)
    assert not (folder / "index.html").exists()
    assert browse() is Outcome.RAN
    assert not {"0/weights_0", "0/class_0", "0/classes", "0/predictions"} & chunks(folder)
    assert read_manifest(folder)["outputs"].keys() == {*tree(folder)} - {"manifest.json"}


def test_an_interrupted_run_resumes(
    world: World, browse: Callable[..., Outcome], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> list[Path]:
        write(*args)
        raise KeyboardInterrupt

    write = stage.write_thumbnails
    with monkeypatch.context() as patch:
        patch.setattr(stage, "write_thumbnails", interrupt)
        with pytest.raises(KeyboardInterrupt):
            browse()
    assert not (folder / "index.html").exists()
    begun = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.webp")}
    assert len(begun) == -(-N // thumbnails.PER_SHEET)
    world.make_names([*NAMES[:-1], "renamed"])  # nothing of the unfinished site is lost, so that no flag is needed
    assert browse() is Outcome.RAN
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "thumbnails/0").rglob("*.webp")} == begun
    assert chunk(folder, "0/concepts")["names"][-1] == "renamed"


KILLED = """
import os, signal
from dncbm.browser import stage
from dncbm.cli import main
from sparse_autoencoder.files import whole_file

def killed(data, name, content):
    if name == "site":
        with whole_file(data / "site.js") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    return write(data, name, content)

write, stage.write_chunk = stage.write_chunk, killed
main("browse")
"""


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_wrong(world: World, browse: Callable[..., Outcome], folder: Path) -> None:
    flags = ["--browser_folder", str(folder), "--device", "cpu", "--probe_dataset", world.probe.dataset]
    environment = os.environ | {"DNCBM_CONFIG": str(world.settings.path)}
    done = subprocess.run([sys.executable, "-c", KILLED, *flags], env=environment, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert not (folder / "index.html").exists()
    assert [path for path in folder.rglob(".*") if path.is_file()]
    assert browse() is Outcome.RAN
    assert not [path for path in folder.rglob(".*") if path.is_file()]
    assert read_manifest(folder)["outputs"].keys() == {*tree(folder)} - {"manifest.json"}


def test_parts_that_do_not_belong_together_are_refused(
    world: World, browse: Callable[..., Outcome], folder: Path, refusal: Callable[..., Any]
) -> None:
    names = world.artifacts.concept_names(world.run)
    write_names(names, [ConceptName(i, "word", 0.5) for i in range(F + 1)])
    with refusal(names, F + 1, F, "04_assign_names.py"):
        browse()
    write_names(names, [ConceptName(i, "word", 0.5) for i in range(F)])
    lose_probe(world)
    world.save_strengths(np.ones((10, F + 1), np.float32), np.arange(10), "mine")
    with refusal(world.artifacts.strengths(world.run, "mine", "val"), F + 1, F, "06_save_concept_strengths.py"):
        browse()
    assert not (folder / "index.html").exists()


def test_runs_side_by_side_show_the_same_images(
    world: World, browse: Callable[..., Outcome], folder: Path, refusal: Callable[..., Any]
) -> None:
    other = replace(world.run, training=replace(world.run.training, seed=7))
    world.save_sae(other)
    world.save_strengths(world.z[::-1] * 2, world.keys[::-1], run=other)  # in another order
    browse(("seed=7",))
    site = chunk(folder, "site")
    assert [run["has_strengths"] for run in site["runs"]] == [[True, True], [True, False]]
    assert [run["has_probe"] for run in site["runs"]] == [True, False]
    np.testing.assert_array_equal(stored(folder, 1, 0, 512), world.z * 2)
    assert "1/strengths_1_0" not in chunks(folder)
    assert site["matches"] == [[0, 1]]
    commands = [one["command"] for one in site["runs"][1]["missing"] if "strengths of mine" in one["what"]]
    assert ["--probe_dataset mine" in command for command in commands] == [True]
    assert "match_0_1" in chunks(folder)

    before = tree(folder)
    world.save_strengths(world.z[2:], world.keys[2:], run=other)
    with refusal("lack 2 of the images", other.config_name):
        browse(("seed=7",), overwrite=True)
    assert tree(folder) == before


def test_matches_lead_from_a_run_to_the_one_beside_it(world: World, browse: Callable[..., Outcome], folder: Path) -> None:
    world.save_sae(SEVEN)
    path = world.artifacts.sae(SEVEN)
    explained.make(path, lambda: save_checkpoint(SparseAutoencoder(7, F, seed=2), path), values(SEVEN))
    browse(("seed=7",))
    units = []
    for run in (world.run, SEVEN):
        decoder = load_sae(world.settings, run).dictionary.detach().numpy()
        apart = decoder - decoder.mean(axis=0)
        units.append(apart / np.linalg.norm(apart, axis=1, keepdims=True))
    _, partner = linear_sum_assignment(units[0] @ units[1].T, maximize=True)
    assert (partner[partner] != np.arange(F)).any(), "the other way round is another permutation"
    np.testing.assert_array_equal(chunk(folder, "match_0_1")["partner"], partner)


def test_contact_sheets_link_to_the_browser(script: Callable[..., None], world: World) -> None:
    for name in ("task_agnosticity_dump", "task_agnosticity_plot", "browse"):
        script(name, "--num_workers 0" if name.endswith("plot") else "--device cpu --probe_dataset places365")
    sheet = world.artifacts.task_agnosticity(world.run, "val").contact_sheet
    page = world.artifacts.browser(world.run, world.probe, "val") / "index.html"

    def linked() -> list[Path]:
        navigation = sheet.read_text().partition("<nav>")[2].partition("</nav>")[0]
        return [Path(os.path.normpath(sheet.parent / unquote(link))) for link in re.findall('href="([^"]*)"', navigation)]

    assert linked() == [page]
    script("task_agnosticity_plot", "--num_workers 0 --overwrite")
    assert linked() == [page]


def test_the_demo_writes_its_browser_where_contact_sheets_look_for_it() -> None:
    recipe = (Path(stage.__file__).parents[2] / "Makefile").read_text()
    (flags,) = re.findall(r"scripts/16_browse\.py (.*)", recipe)
    assert build(Browse, parse(COMMANDS["browse"], flags.split())[1]) == Browse(None, ("seed=50",))


def test_a_site_holds_a_copy_of_its_report(world: World, browse: Callable[..., Outcome], folder: Path) -> None:
    write_report(world.settings, world.run, world.probe, device="cpu")
    browse()
    report = chunk(folder, "site")["report"]
    assert report in read_manifest(folder)["outputs"]
    original = world.artifacts.report(world.run, world.probe) / "report.html"
    assert (folder / report).read_bytes() == original.read_bytes()
    assert str(folder.parent) not in original.read_text()


def test_a_site_holds_no_report_that_is_out_of_date(
    world: World, browse: Callable[..., Outcome], folder: Path
) -> None:  # fmt: skip
    write_report(world.settings, world.run, world.probe, device="cpu")
    browse()
    manifest = manifest_path(world.make_names([*NAMES[:-1], "renamed"]))
    write_json(manifest, json.loads(manifest.read_text()) | {"made": "2100-01-01T00:00:00+00:00"})
    browse(overwrite=True)
    assert chunk(folder, "site")["report"] is None
    assert not (folder / "data" / "report.html").exists()


def test_the_command_line(script: Callable[..., None], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("browse", f"--browser_folder {folder} --device cpu --probe_dataset places365")
    *_, size, opens = capsys.readouterr().out.splitlines()
    assert f"{F} concepts" in size
    assert f"{N + 10} images" in size
    assert " MB" in size
    assert opens == f"open {folder}/index.html"
    assert "dncbm browser" in (folder / "index.html").read_text()


def test_a_probe_on_features_is_refused(world: World, folder: Path, refusal: Callable[..., Any]) -> None:
    probe = replace(world.probe, on_features=True)
    with refusal("--probe_on_features"):
        stage.write_browser(world.settings, world.run, probe, Explained("val"), Browse(folder))


def test_thumbnails_are_not_decoded_again(
    browse: Callable[..., Outcome], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    browse()
    (folder / "data" / "site.js").unlink()
    monkeypatch.setattr(thumbnails, "open_image", lambda *_: pytest.fail("an image is decoded again"))
    assert browse() is Outcome.RAN
