"""Artifacts that are made once, from what their manifests say; and the chain of manifests behind each."""

import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from dncbm.runs import manifests
from dncbm.runs.errors import StaleArtifact, UserError
from dncbm.runs.locks import lock_path, locked
from dncbm.runs.manifests import (
    Outcome,
    check_chain,
    file_hash,
    fingerprint,
    making,
    manifest_path,
    read_manifest,
    unfinished_path,
    verifying_hashes,
    write_json,
)
from sparse_autoencoder.files import whole_file


class Recipe(NamedTuple):
    stage: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, Path | str]


RECIPE = Recipe("stage", {"lr": 0.1, "sizes": (1, 2)}, {"features": "abc"})
OTHER = Recipe("stage", {"lr": 0.2, "sizes": (1, 2)}, {"features": "abd"})


@pytest.fixture(params=["file", "folder"])
def artifact(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / ("names.csv" if request.param == "file" else "features")


def contents(artifact: Path) -> Path:
    """The file an artifact consists of."""
    return artifact if artifact.suffix else artifact / "00000.npy"


def make(artifact: Path, recipe: Recipe, text: str = "made", **options: Any) -> Outcome:
    """Make an artifact unless it exists."""
    with making(artifact, *recipe, **{"overwrite": False} | options) as work:
        if work.needed:
            contents(artifact).parent.mkdir(parents=True, exist_ok=True)
            contents(artifact).write_text(text)
            work.done([contents(artifact)], "made it", images=3)
    return work.outcome


def begin(artifact: Path, recipe: Recipe, **options: Any) -> Outcome:
    """Begin to make an artifact, and be interrupted."""
    with making(artifact, *recipe, **{"overwrite": False} | options) as work:
        return work.outcome


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    write_json(path, {"name": "Börse", "list": [1, 2]})
    assert json.loads(path.read_text()) == {"name": "Börse", "list": [1, 2]}
    with pytest.raises(TypeError):
        write_json(path, {"name": object()})
    assert json.loads(path.read_text())["list"] == [1, 2]
    assert list(path.parent.iterdir()) == [path]


def test_made_once_and_then_already_done(artifact: Path, capsys) -> None:
    make(artifact, RECIPE)
    assert not unfinished_path(artifact).exists()
    capsys.readouterr()
    manifest = manifest_path(artifact).read_text()
    with making(artifact, *RECIPE, overwrite=False) as work:
        work.done([], "made it again")  # whatever a block does: there was no work
    assert capsys.readouterr().out == f"already done: {artifact}\n"
    with making(artifact, *RECIPE, overwrite=False) as work:
        work.done([contents(artifact)], "made it again", images=7)
    assert capsys.readouterr().out == f"already done: {artifact}\n"
    assert manifest_path(artifact).read_text() == manifest
    assert begin(artifact, RECIPE) is Outcome.ALREADY_DONE
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
        begin(artifact, OTHER)
    with pytest.raises(StaleArtifact) as caught:
        begin(artifact, OTHER)
    assert len(caught.value.differences) == 2
    assert begin(artifact, RECIPE) is Outcome.ALREADY_DONE  # a refusal changes nothing


def test_a_setting_more_or_less_is_a_difference(artifact: Path, refusal) -> None:
    make(artifact, RECIPE)
    with refusal("momentum was the default, now 0.9"):
        begin(artifact, RECIPE._replace(settings={**RECIPE.settings, "momentum": 0.9}))
    with refusal("sizes was [1, 2], now the default"):
        begin(artifact, RECIPE._replace(settings={"lr": 0.1}))


@pytest.mark.parametrize(("recorded", "is_kept"), [(False, True), (True, False)])
def test_a_setting_that_no_longer_exists_changes_nothing_at_its_old_default(
    artifact: Path, refusal, recorded: bool, is_kept: bool
) -> None:
    assert make(artifact, RECIPE._replace(settings={**RECIPE.settings, "bf16": recorded})) is Outcome.RAN
    if is_kept:
        assert make(artifact, RECIPE) is Outcome.ALREADY_DONE
    else:
        with refusal("matmul_precision was 'medium', now the default"):
            make(artifact, RECIPE)


def test_overwrite_removes_what_another_recipe_made(artifact: Path) -> None:
    make(artifact, RECIPE)
    assert begin(artifact, OTHER, overwrite=True) is Outcome.RAN
    assert not contents(artifact).exists()
    make(artifact, OTHER, "made again")
    assert begin(artifact, OTHER) is Outcome.ALREADY_DONE


def test_overwrite_removes_every_file_that_making_leaves(artifact: Path, tmp_path: Path) -> None:
    make(artifact, RECIPE)
    state, other = tmp_path / "state.safetensors", tmp_path / "other.csv"
    state.touch()
    other.touch()
    begin(artifact, OTHER, overwrite=True, files=lambda: [contents(artifact), state])
    assert not contents(artifact).exists()
    assert not state.exists()
    assert other.exists()


def test_an_overwriting_that_was_killed_leaves_no_parts_that_pass_for_new_ones(artifact: Path, monkeypatch) -> None:
    unlink = Path.unlink

    def killed(path: Path, *options: Any, **more: Any) -> None:
        if path == contents(artifact):
            raise KeyboardInterrupt
        unlink(path, *options, **more)

    make(artifact, RECIPE)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            begin(artifact, OTHER, overwrite=True)
    assert contents(artifact).exists()
    with pytest.raises(StaleArtifact):
        begin(artifact, OTHER)
    begin(artifact, OTHER, overwrite=True)
    assert not contents(artifact).exists()


def test_an_unfinished_artifact_goes_on_with_its_parts(artifact: Path) -> None:
    begin(artifact, RECIPE)
    contents(artifact).write_text("a part")
    assert begin(artifact, RECIPE) is Outcome.RAN
    assert contents(artifact).read_text() == "a part"


def test_an_unfinished_artifact_of_another_recipe_is_refused(artifact: Path, refusal) -> None:
    begin(artifact, RECIPE)
    contents(artifact).write_text("a part")
    with refusal(artifact, "lr was 0.1, now 0.2"):
        begin(artifact, OTHER)
    assert begin(artifact, OTHER, overwrite=True) is Outcome.RAN
    assert not contents(artifact).exists()


def test_a_run_that_failed_before_it_made_anything_stands_in_nobodys_way(artifact: Path) -> None:
    begin(artifact, RECIPE)
    make(artifact, OTHER)
    assert begin(artifact, OTHER) is Outcome.ALREADY_DONE


def test_an_unfinished_training_keeps_its_state_elsewhere_and_is_refused(artifact: Path, tmp_path: Path) -> None:
    begin(artifact, RECIPE)
    begin(artifact, OTHER, files=lambda: [tmp_path / "state"])
    (tmp_path / "state").touch()
    with pytest.raises(StaleArtifact):
        begin(artifact, RECIPE, files=lambda: [tmp_path / "state"])


def test_a_file_put_there_by_hand_is_used(tmp_path: Path) -> None:
    path = tmp_path / "concept_names.csv"
    path.write_text("0,dog\n")
    assert begin(path, RECIPE) is Outcome.PROVIDED
    assert path.read_text() == "0,dog\n"
    assert begin(path, RECIPE, overwrite=True) is Outcome.RAN


def test_an_output_that_is_gone_is_made_again(artifact: Path) -> None:
    make(artifact, RECIPE)
    contents(artifact).unlink()
    assert begin(artifact, RECIPE) is Outcome.RAN
    assert not manifest_path(artifact).exists()
    make(artifact, RECIPE)
    assert begin(artifact, RECIPE) is Outcome.ALREADY_DONE


def test_an_output_that_was_edited_or_cut_off_is_not_replaced_without_being_asked(artifact: Path, refusal) -> None:
    make(artifact, RECIPE)
    contents(artifact).write_text("ma")
    with refusal(contents(artifact), "has changed since it was made", "pass --overwrite"):
        begin(artifact, RECIPE)
    assert contents(artifact).read_text() == "ma"
    assert begin(artifact, RECIPE, overwrite=True) is Outcome.RAN
    assert not contents(artifact).exists()  # what is damaged must not pass for a finished part


def test_sound_outputs_beside_a_damaged_one_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "features"
    with making(folder, *RECIPE, overwrite=False) as work:
        for name in ("a.npy", "b.npy"):
            (folder / name).write_text("made")
        work.done(folder.glob("*.npy"))
    (folder / "a.npy").write_text("ma")
    assert begin(folder, RECIPE, overwrite=True) is Outcome.RAN
    assert [path.name for path in folder.glob("*.npy")] == ["b.npy"]


def test_a_block_that_raises_leaves_its_parts_unfinished(artifact: Path, capsys) -> None:
    def interrupted() -> None:
        with making(artifact, *RECIPE, overwrite=False) as work:
            contents(artifact).parent.mkdir(parents=True, exist_ok=True)
            contents(artifact).write_text("a part")
            work.done([contents(artifact)], "made it")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert contents(artifact).read_text() == "a part"
    assert unfinished_path(artifact).is_file()
    assert not manifest_path(artifact).is_file()
    assert capsys.readouterr().out == ""
    assert make(artifact, RECIPE) is Outcome.RAN
    assert capsys.readouterr().out == f"made it: {artifact}\n"


def test_parts_hold_where_they_say_so(artifact: Path) -> None:
    """Only for other inputs: other settings make other parts."""
    changed = RECIPE._replace(inputs={"features": "abd"})
    begin(artifact, RECIPE)
    contents(artifact).parent.mkdir(parents=True, exist_ok=True)
    contents(artifact).write_text("a part")
    with pytest.raises(StaleArtifact):
        begin(artifact, changed)
    assert begin(artifact, changed, parts_hold=lambda: True) is Outcome.RAN
    assert contents(artifact).read_text() == "a part"
    assert begin(artifact, changed) is Outcome.RAN  # from now on, they are of these inputs
    with pytest.raises(StaleArtifact):
        begin(artifact, OTHER, parts_hold=lambda: True)


SOUND = {"stage": "s", "settings": {}, "inputs": {}, "sources": {}, "outputs": {"x": {"bytes": 1, "sha256": ""}}}
DAMAGED = {
    "empty": "",
    "cut off": '{"stage": "s", "settings": {',
    "another kind of file": "\x00\x01\x02",
    "a list": "[1, 2]",
    "without outputs": json.dumps({**SOUND, "outputs": {}}),
    "outputs of another type": json.dumps({**SOUND, "outputs": {"x": 3}}),
    "outputs elsewhere": json.dumps({**SOUND, "outputs": {"../x": {"bytes": 1, "sha256": ""}}}),
    "sources that are no inputs": json.dumps({**SOUND, "sources": {"words": "words.txt"}}),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_manifest_is_an_error_of_one_line(artifact: Path, refusal, text: str) -> None:
    make(artifact, RECIPE)
    manifest_path(artifact).write_text(text)
    for read in (read_manifest, check_chain, fingerprint):
        with refusal(manifest_path(artifact)):
            read(artifact)
    with refusal(manifest_path(artifact), "--overwrite", "delete"):
        begin(artifact, RECIPE)
    assert contents(artifact).exists()
    assert make(artifact, RECIPE, overwrite=True) is Outcome.RAN
    check_chain(artifact)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_overwrite_leaves_a_damaged_recipe_of_unfinished_work_behind(artifact: Path, refusal, text: str) -> None:
    begin(artifact, RECIPE)
    contents(artifact).write_text("a part")
    unfinished_path(artifact).write_text(text)
    with refusal(unfinished_path(artifact), "--overwrite", "delete"):
        begin(artifact, RECIPE)
    assert begin(artifact, RECIPE, overwrite=True) is Outcome.RAN
    assert not contents(artifact).exists()
    assert begin(artifact, RECIPE) is Outcome.RAN


# ----------------------------------------------------------------------------------------- processes, kills, leftovers


def test_two_processes_do_not_make_the_same_artifact(artifact: Path, refusal) -> None:
    with making(artifact, *RECIPE, overwrite=False) as work:
        assert work.needed
        with refusal(artifact, f"process {os.getpid()} on {socket.gethostname()}"):
            begin(artifact, RECIPE)
    assert not [path for path in artifact.parent.rglob(".*")]
    assert make(artifact, RECIPE) is Outcome.RAN


def test_the_lock_of_a_killed_process_holds_nobody_up(artifact: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from dncbm.runs.locks import locked\n"
        "with locked(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, artifact], check=False)
    assert lock_path(artifact).is_file()
    assert make(artifact, RECIPE) is Outcome.RAN
    assert not lock_path(artifact).exists()


def test_a_lock_removed_by_its_owner_is_not_taken(artifact: Path) -> None:
    """Between opening the file and locking it, the owner may remove it: two processes would hold two locks."""
    opened = os.open

    def removed_meanwhile(path: Any, *rest: Any, **more: Any) -> int:
        handle = opened(path, *rest, **more)
        if not removed:
            removed.append(path)
            os.unlink(path)
        return handle

    removed: list[Path] = []
    with mock.patch("os.open", removed_meanwhile), locked(artifact):
        assert lock_path(artifact).is_file()
        with pytest.raises(UserError), locked(artifact):
            pass
    assert removed


def test_what_is_done_needs_no_right_to_write(artifact: Path) -> None:
    make(artifact, RECIPE)
    before = sorted(artifact.parent.rglob("*"))
    with mock.patch("os.open", side_effect=PermissionError(errno.EROFS, "Read-only file system")):
        assert begin(artifact, RECIPE) is Outcome.ALREADY_DONE
        check_chain(artifact)
    assert sorted(artifact.parent.rglob("*")) == before


def test_the_next_run_removes_what_a_killed_one_left(artifact: Path, tmp_path: Path) -> None:
    begin(artifact, RECIPE)
    folder = contents(artifact).parent
    code = (
        "import os, sys; from pathlib import Path; from sparse_autoencoder.files import whole_file\n"
        "with whole_file(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, folder / "00001.npy"], check=False)
    assert list(folder.glob(".00001-*"))
    with whole_file(folder / "00002.npy") as in_use:  # of a process that is alive
        in_use.touch()
        begin(artifact, RECIPE)
        assert in_use.exists()
    assert not list(folder.glob(".*"))


def test_state_is_removed_when_the_artifact_is_finished(artifact: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.touch()
    begin(artifact, RECIPE, scratch=[state])
    assert state.exists()
    make(artifact, RECIPE, scratch=[state])
    assert not state.exists()
    state.touch()  # the process was killed just after it had written the manifest
    write_json(unfinished_path(artifact), {})
    lock_path(artifact).touch()
    assert begin(artifact, RECIPE, scratch=[state]) is Outcome.ALREADY_DONE
    assert not state.exists()
    assert not unfinished_path(artifact).exists()
    assert not lock_path(artifact).exists()


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
        with making(tmp_path / folder, *RECIPE, overwrite=False) as work:
            for number, text in enumerate(texts):
                (tmp_path / folder / f"{number}.npy").write_text(text)
            work.done((tmp_path / folder).glob("*.npy"))
        found.add(fingerprint(tmp_path / folder))
    assert len(found) == 4


def test_an_input_that_is_missing_is_one_line_and_nothing_is_begun(tmp_path: Path, refusal) -> None:
    for source in (tmp_path / "words.txt", tmp_path / "split.json", tmp_path / "features"):
        with refusal("missing", source):
            begin(tmp_path / "names.csv", Recipe("names", {}, {"input": source}))
    assert not list(tmp_path.iterdir())


def test_words_are_known_by_their_content(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("dog\n")
    assert fingerprint(tmp_path / "a.txt") == fingerprint(tmp_path / "b.txt") == file_hash(tmp_path / "a.txt")


def test_a_file_hash_is_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 20_000  # more than one piece
    (tmp_path / "file").write_bytes(content)
    assert file_hash(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_manifests_are_json_a_person_can_read(artifact: Path) -> None:
    make(artifact, RECIPE)
    text = manifest_path(artifact).read_text()
    assert json.loads(text) == read_manifest(artifact)
    assert len(text.splitlines()) > 10


# ------------------------------------------------------------------------------------------------- the chain of inputs


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """words.txt -> embeddings -> names -> a folder of explanations; in folders of their own, as the roots are."""
    words = tmp_path / "vocab" / "words.txt"
    words.parent.mkdir()
    words.write_text("dog")
    paths = [words, tmp_path / "vocab" / "embeddings.npy", tmp_path / "sae" / "names.csv", tmp_path / "analysis" / "data"]
    remake(paths)
    return paths


def remake(paths: list[Path], **options: Any) -> None:
    for source, made in pairwise(paths):
        make(
            made,
            Recipe(made.stem, {}, {source.stem: source}),
            f"from {source.read_text() if source.is_file() else ''}",
            **options,
        )


class TestChain:
    def test_nothing_is_said_while_nothing_has_changed(self, chain: list[Path]) -> None:
        for path in chain:
            check_chain(path)
        os.utime(chain[0])  # the time is not the content
        check_chain(chain[-1])

    def test_a_change_is_seen_however_far_back(self, chain: list[Path], refusal) -> None:
        chain[0].write_text("cat")
        for path in chain[1:]:
            with refusal(chain[1], "words", chain[0], "has changed", "--from embeddings", "--overwrite"):
                check_chain(path)
        remake(chain[:2], overwrite=True)
        check_chain(chain[1])
        with refusal(chain[2], "embeddings", "has changed", "--from names"):
            check_chain(chain[3])
        remake(chain, overwrite=True)
        check_chain(chain[3])

    def test_nothing_is_made_from_what_is_out_of_date(self, chain: list[Path], tmp_path: Path) -> None:
        chain[0].write_text("cat")
        for overwrite in (False, True):
            with pytest.raises(StaleArtifact) as caught:
                make(tmp_path / "new.csv", Recipe("new", {}, {"data": chain[-1]}), overwrite=overwrite)
            assert caught.value.differences == ["words has changed"]
        assert not (tmp_path / "new.csv").exists()

    def test_what_was_moved_away_is_not_compared(self, chain: list[Path]) -> None:
        chain[0].rename(chain[0].with_name("elsewhere.txt"))
        check_chain(chain[-1])

    def test_a_tree_that_moves_as_a_whole_stays_whole(self, chain: list[Path], tmp_path: Path, refusal) -> None:
        new = tmp_path / "moved"
        new.mkdir()
        for root in ("vocab", "sae", "analysis"):
            (tmp_path / root).rename(new / root)
        check_chain(new / "analysis" / "data")
        (new / "vocab" / "words.txt").write_text("cat")
        with refusal("words"):
            check_chain(new / "analysis" / "data")

    @pytest.mark.parametrize("step", [1, 2, 3])
    def test_an_artifact_that_was_edited_is_refused_wherever_it_is_read(self, chain: list[Path], step: int, refusal) -> None:
        path = contents(chain[step])
        path.write_text(path.read_text() + "!")
        for artifact in chain[step:]:
            with refusal(path, "has changed since it was made"):
                check_chain(artifact)
        for artifact in chain[:step]:
            check_chain(artifact)

    def test_an_edit_of_the_same_size_is_seen_if_hashes_are_compared(self, chain: list[Path], refusal, monkeypatch) -> None:
        path = contents(chain[2])
        path.write_text(path.read_text().swapcase())
        with refusal(path, "has changed"):  # it is small
            check_chain(chain[3])
        monkeypatch.setattr(manifests, "ALWAYS_HASHED", 0)
        check_chain(chain[3])
        with verifying_hashes():
            check_chain(chain[1])
            with refusal(path, "has changed"):
                check_chain(chain[3])
            with refusal(path, "has changed"):
                remake(chain)
        check_chain(chain[3])

    def test_a_file_that_is_missing_is_named_where_it_would_be_read(self, chain: list[Path], refusal) -> None:
        contents(chain[2]).unlink()
        with refusal(chain[2], "is missing", "--from names"):
            check_chain(chain[2])
        check_chain(chain[3])  # an input that was moved away

    def test_a_part_that_nobody_made_is_refused(self, chain: list[Path], refusal) -> None:
        foreign = chain[3] / "00007.npy"
        foreign.touch()
        with refusal(foreign):
            check_chain(chain[3])
        with refusal(foreign):
            remake(chain)
        remake(chain, overwrite=True)
        assert not foreign.exists()
        check_chain(chain[3])


def test_a_manifest_holds_every_setting_of_the_run(artifact: Path) -> None:
    make(artifact, RECIPE, run={"lr": 0.1, "log_every": 3})
    assert read_manifest(artifact)["run"] == {"lr": 0.1, "log_every": 3}
    assert begin(artifact, RECIPE, run={"lr": 0.1, "log_every": 4}) is Outcome.ALREADY_DONE
