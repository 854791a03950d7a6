import hashlib
import json
from pathlib import Path

import pytest

from dncbm.errors import StaleArtifact
from dncbm.manifests import (
    Outcome,
    Recipe,
    begin,
    file_hash,
    fingerprint,
    finish,
    manifest_path,
    read_manifest,
    whole_file,
)

RECIPE = Recipe("stage", {"lr": 0.1, "sizes": (1, 2)}, {"features": "abc"})
OTHER = Recipe("stage", {"lr": 0.2, "sizes": (1, 2)}, {"features": "abd"})


@pytest.fixture(params=["file", "folder"])
def artifact(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / ("names.csv" if request.param == "file" else "features")


def contents(artifact: Path) -> Path:
    """The file an artifact consists of."""
    return artifact if artifact.suffix else artifact / "00000.npy"


def make(artifact: Path, recipe: Recipe, text: str = "made") -> None:
    assert begin(artifact, recipe, overwrite=False) is Outcome.RAN
    contents(artifact).write_text(text)
    finish(artifact, recipe, [contents(artifact)], {"images": 3})


# ------------------------------------------------------------------------------------------------------- whole files


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.npy"
    with whole_file(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename across disks would not be atomic
        assert temporary.suffix == ".npy"
        written = temporary.stat().st_ino
    assert path.read_text() == "whole"
    assert path.stat().st_ino == written  # renamed, not copied
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")

    def write_half() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_can_be_read_by_those_the_umask_allows(tmp_path: Path) -> None:
    plain, whole = tmp_path / "plain", tmp_path / "whole"
    plain.touch()
    with whole_file(whole):
        pass
    assert whole.stat().st_mode == plain.stat().st_mode


# ------------------------------------------------------------------------------------------------------ begin, finish


def test_made_once_and_then_already_done(artifact: Path) -> None:
    make(artifact, RECIPE)
    assert begin(artifact, RECIPE, overwrite=False) is Outcome.ALREADY_DONE
    assert begin(artifact, RECIPE, overwrite=True) is Outcome.ALREADY_DONE
    assert contents(artifact).read_text() == "made"


def test_the_manifest_says_where_it_came_from(artifact: Path) -> None:
    make(artifact, RECIPE)
    manifest = read_manifest(artifact)
    assert manifest["stage"] == "stage"
    assert manifest["settings"] == {"lr": 0.1, "sizes": [1, 2]}
    assert manifest["inputs"] == {"features": "abc"}
    assert manifest["details"]["images"] == 3
    assert set(manifest["versions"]) >= {"python", "torch", "open_clip_torch", "numpy"}
    assert manifest["made"].endswith("+00:00")
    sha256 = hashlib.sha256(b"made").hexdigest()
    assert manifest["outputs"] == {contents(artifact).name: {"bytes": 4, "sha256": sha256}}


def test_where_manifests_lie(tmp_path: Path) -> None:
    assert manifest_path(tmp_path / "a.safetensors") == tmp_path / "a.safetensors.manifest.json"
    assert manifest_path(tmp_path / "lr0.1_bs3" / "train") == tmp_path / "lr0.1_bs3" / "train" / "manifest.json"


def test_another_recipe_is_refused_and_the_difference_named(artifact: Path, refusal) -> None:
    make(artifact, RECIPE)
    with refusal(artifact, "lr was 0.1, now 0.2", "features has changed", "--overwrite"):
        begin(artifact, OTHER, overwrite=False)
    with pytest.raises(StaleArtifact) as caught:
        begin(artifact, OTHER, overwrite=False)
    assert len(caught.value.differences) == 2
    assert begin(artifact, RECIPE, overwrite=False) is Outcome.ALREADY_DONE  # a refusal changes nothing


def test_a_setting_more_or_less_is_a_difference(artifact: Path, refusal) -> None:
    make(artifact, RECIPE)
    with refusal("momentum was None, now 0.9"):
        begin(artifact, Recipe("stage", {**RECIPE.settings, "momentum": 0.9}, RECIPE.inputs), overwrite=False)
    with refusal("sizes was [1, 2], now None"):
        begin(artifact, Recipe("stage", {"lr": 0.1}, RECIPE.inputs), overwrite=False)


def test_overwrite_removes_what_another_recipe_made(artifact: Path) -> None:
    make(artifact, RECIPE)
    assert begin(artifact, OTHER, overwrite=True) is Outcome.RAN
    assert not contents(artifact).exists()
    make(artifact, OTHER, "made anew")
    assert begin(artifact, OTHER, overwrite=False) is Outcome.ALREADY_DONE


def test_overwrite_removes_in_the_way_it_is_told(artifact: Path) -> None:
    make(artifact, RECIPE)
    removed = []
    begin(artifact, OTHER, overwrite=True, remove=lambda: removed.append(artifact))
    assert removed == [artifact]
    assert contents(artifact).exists()


def test_an_unfinished_artifact_goes_on_with_its_parts(artifact: Path) -> None:
    begin(artifact, RECIPE, overwrite=False)
    contents(artifact).write_text("a part")
    assert begin(artifact, RECIPE, overwrite=False) is Outcome.RAN
    assert contents(artifact).read_text() == "a part"


def test_an_unfinished_artifact_of_another_recipe_is_refused(artifact: Path, refusal) -> None:
    begin(artifact, RECIPE, overwrite=False)
    contents(artifact).write_text("a part")
    with refusal(artifact, "lr was 0.1, now 0.2"):
        begin(artifact, OTHER, overwrite=False)
    assert begin(artifact, OTHER, overwrite=True) is Outcome.RAN
    assert not contents(artifact).exists()


def test_a_run_that_failed_before_it_made_anything_stands_in_nobodys_way(artifact: Path) -> None:
    begin(artifact, RECIPE, overwrite=False)
    make(artifact, OTHER)
    assert begin(artifact, OTHER, overwrite=False) is Outcome.ALREADY_DONE


def test_an_unfinished_training_keeps_its_state_elsewhere_and_is_refused(artifact: Path) -> None:
    begin(artifact, RECIPE, overwrite=False)
    with pytest.raises(StaleArtifact):
        begin(artifact, OTHER, overwrite=False, remove=lambda: None)


def test_a_file_put_there_by_hand_is_used(tmp_path: Path) -> None:
    path = tmp_path / "concept_names.csv"
    path.write_text("0,dog\n")
    assert begin(path, RECIPE, overwrite=False) is Outcome.PROVIDED
    assert path.read_text() == "0,dog\n"
    assert begin(path, RECIPE, overwrite=True) is Outcome.RAN


def test_an_output_that_is_gone_is_made_again(artifact: Path) -> None:
    make(artifact, RECIPE)
    contents(artifact).unlink()
    assert begin(artifact, RECIPE, overwrite=False) is Outcome.RAN
    assert not manifest_path(artifact).exists()
    make(artifact, RECIPE)
    assert begin(artifact, RECIPE, overwrite=False) is Outcome.ALREADY_DONE


def test_an_output_that_was_edited_or_cut_off_is_not_replaced_without_being_asked(artifact: Path, refusal) -> None:
    make(artifact, RECIPE)
    contents(artifact).write_text("ma")
    with refusal(contents(artifact), "has changed since it was made", "--overwrite", manifest_path(artifact)):
        begin(artifact, RECIPE, overwrite=False)
    assert contents(artifact).read_text() == "ma"
    assert begin(artifact, RECIPE, overwrite=True) is Outcome.RAN
    assert not contents(artifact).exists()  # what is damaged must not pass for a finished part


def test_sound_outputs_beside_a_damaged_one_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "features"
    begin(folder, RECIPE, overwrite=False)
    for name in ("a.npy", "b.npy"):
        (folder / name).write_text("made")
    finish(folder, RECIPE, folder.glob("*.npy"))
    (folder / "a.npy").write_text("ma")
    assert begin(folder, RECIPE, overwrite=True) is Outcome.RAN
    assert [path.name for path in folder.glob("*.npy")] == ["b.npy"]


def test_a_damaged_manifest_is_an_error_of_one_line(artifact: Path, refusal) -> None:
    make(artifact, RECIPE)
    manifest_path(artifact).write_text("{")
    with refusal(manifest_path(artifact)):
        read_manifest(artifact)
    with refusal(manifest_path(artifact)):
        begin(artifact, RECIPE, overwrite=False)


# ------------------------------------------------------------------------------------------------------- fingerprints


def test_a_fingerprint_follows_the_contents_alone(tmp_path: Path) -> None:
    for folder, recipe, text in (("a", RECIPE, "same"), ("b", OTHER, "same"), ("c", RECIPE, "other")):
        make(tmp_path / folder / "names.csv", recipe, text)
    a, b, c = (fingerprint(tmp_path / folder / "names.csv") for folder in "abc")
    assert a == b
    assert a != c
    assert a == fingerprint(tmp_path / "a" / "names.csv")


def test_a_fingerprint_of_a_file_without_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / "published.pt"
    path.write_bytes(b"1")
    first = fingerprint(path)
    path.touch()
    assert fingerprint(path) == first
    path.write_bytes(b"2")
    assert fingerprint(path) != first


def test_a_fingerprint_of_a_folder_sees_every_file(tmp_path: Path) -> None:
    found = set()
    for folder, texts in (("a", "xy"), ("b", "xz"), ("c", "yx"), ("d", "x")):
        begin(tmp_path / folder, RECIPE, overwrite=False)
        for number, text in enumerate(texts):
            (tmp_path / folder / f"{number}.npy").write_text(text)
        finish(tmp_path / folder, RECIPE, (tmp_path / folder).glob("*.npy"))
        found.add(fingerprint(tmp_path / folder))
    assert len(found) == 4


def test_a_file_hash_is_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 20_000  # more than one piece
    (tmp_path / "file").write_bytes(content)
    assert file_hash(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_manifests_are_json_a_person_can_read(artifact: Path) -> None:
    make(artifact, RECIPE)
    text = manifest_path(artifact).read_text()
    assert json.loads(text) == read_manifest(artifact)
    assert len(text.splitlines()) > 10
