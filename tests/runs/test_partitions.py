"""Stages 1, 5 and 6 divided among workers that need not know of each other: `--partition`."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dncbm.cli import main
from dncbm.concepts.strengths import save_concept_strengths, to_csr
from dncbm.features.datasets.sae import WebdatasetShards
from dncbm.features.encoding import encode_part
from dncbm.features.stage import save_probe_features, save_sae_features
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, Extraction, Partition, ProbeDataset, ProbeFeatures, SAEFeatures, SAERun, Splits
from dncbm.runs.errors import StaleArtifact, UserError
from dncbm.runs.locks import lock_path, turn_path
from dncbm.runs.manifests import Outcome, check_chain, making, manifest_path, read_manifest, verifying_hashes
from dncbm.runs.partitions import Part, part_of
from dncbm.runs.ranks import Ranks
from dncbm.runs.settings import Settings
from dncbm.stages import PIPELINE
from sparse_autoencoder import SparseAutoencoder, save_checkpoint
from sparse_autoencoder.files import whole_file

EXTRACTION = Extraction(batch_size=None, num_workers=0, max_bad_fraction=0.2)
TARS = {"train": range(7), "train_val": range(7, 10), "val": range(10, 11)}


class Means(torch.nn.Module):
    """Averages channels, with an error, unless it is interrupted. Counts what it encodes."""

    def __init__(self) -> None:
        super().__init__()
        self.n_encoded, self.interrupted_at, self.error = 0, -1, 0.0

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        if self.n_encoded == self.interrupted_at:
            raise KeyboardInterrupt
        self.n_encoded += 1
        return images.mean(dim=(2, 3)) + self.error


@pytest.fixture
def tower(monkeypatch, make_encoder) -> Means:
    """The stages encode with it, and have small shards."""
    tower = Means()
    monkeypatch.setattr("dncbm.features.stage.load_encoder", lambda *_: make_encoder(tower))
    monkeypatch.setattr("dncbm.features.stage.describe_encoder", lambda *_: {"encoder": "means"})
    monkeypatch.setattr("dncbm.features.datasets.SHARD_SIZE", 3)
    return tower


@pytest.fixture
def settings(make_settings, tmp_path: Path, write_tar, random_image, encoded) -> Settings:
    """Images for an SAE in 7, 3 and 1 tars, one with a broken image; and 20 and 10 images of two classes."""
    for number in range(11):
        samples = {f"{10 * number + i:09d}": {"png": encoded(random_image(10 * number + i))} for i in range(3 + number % 3)}
        if number == 2:
            samples["000000020"]["png"] = b"no image"
        write_tar(tmp_path / f"tars/{number}.tar", samples)
    for split, n in (("train", 20), ("val", 10)):
        for number in range(n):
            path = tmp_path / f"classes/{split}/{'ab'[number % 2]}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(random_image(number)))
    mine = {split: [f"tars/{number}.tar" for number in numbers] for split, numbers in TARS.items()}
    return make_settings(
        sae_datasets={"mine": mine}, probe_datasets={"classes": "classes"}, encoders={"enc": ("RN50", None)},
        defaults={"img_enc_name": "enc", "sae_dataset": "mine", "probe_dataset": "classes", "max_bad_fraction": 0.2},
    )  # fmt: skip


@dataclass(frozen=True)
class Divided:
    """A stage whose work is divided."""

    run: Callable[..., Outcome]
    """Part (or None) -> what the worker did."""
    root: Path
    """Folder of everything that it makes."""
    suffix: str
    """Of the file with which a shard is finished."""

    def files(self) -> dict[str, bytes]:
        """What was made, without the manifests: features, keys and records, or strengths."""
        found = (path for path in self.root.rglob("[0-9]*.*") if path.is_file())
        return {str(path.relative_to(self.root)): path.read_bytes() for path in found}

    def manifests(self) -> dict[str, dict[str, Any]]:
        """All manifests, without times."""
        made = {}
        for path in self.root.rglob("manifest.json"):
            made[str(path)] = json.loads(path.read_text())
            del made[str(path)]["made"], made[str(path)]["details"]["seconds"]
        return made

    def shards(self) -> list[Path]:
        """The files with which shards are finished."""
        return sorted(path for path in self.root.rglob(f"[0-9]*{self.suffix}") if ".keys" not in path.name)


@pytest.fixture(params=["sae_features", "probe_features", "strengths"])
def divided(request, settings: Settings, tower: Means, make_store, monkeypatch) -> Divided:
    artifacts = Artifacts(settings)

    def sae_features(part: str | None, **options: Any) -> Outcome:
        return save_sae_features(
            settings, SAEFeatures("enc", "out", "mine"), EXTRACTION, Partition(part), device="cpu", **options
        )

    def probe_features(part: str | None, **options: Any) -> Outcome:
        features = ProbeFeatures("classes", "enc", "out")
        return save_probe_features(settings, features, Splits(), EXTRACTION, Partition(part), device="cpu", **options)

    def strengths(part: str | None, **options: Any) -> Outcome:
        run = SAERun("enc", "out", "mine")
        return save_concept_strengths(
            settings, run, ProbeDataset("classes"), Splits(), Partition(part), device="cpu", **options
        )

    if request.param == "sae_features":
        return Divided(sae_features, artifacts.features("mine", "enc", "out", "train").parent, ".npy")
    if request.param == "probe_features":
        return Divided(probe_features, artifacts.features("classes", "enc", "out", "train").parent, ".npy")
    monkeypatch.setattr("dncbm.concepts.strengths.to_csr", lambda latents: to_csr(latents * (1 + tower.error)))
    rng = np.random.default_rng(0)
    for split, sizes in zip(SPLITS, ((9, 4, 17, 1, 8, 3), (5, 2), (7,)), strict=True):
        shards = [rng.normal(size=(rows, 12)).astype(np.float32) for rows in sizes]
        make_store(artifacts.features("classes", "enc", "out", split), shards)
    save_checkpoint(SparseAutoencoder(12, 96, seed=0), artifacts.sae(SAERun("enc", "out", "mine")))
    return Divided(strengths, artifacts.strengths(SAERun("enc", "out", "mine"), "classes", "train").parents[1], ".npz")


# -------------------------------------------------------------------------------------------------- in one process


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_workers_in_any_order_make_what_one_process_makes(divided: Divided, tower: Means, monkeypatch, locks: bool) -> None:
    """Numbers of workers change midway; workers are repeated, and interrupted; shards are lost; merges come early."""
    if not locks:
        monkeypatch.setattr("dncbm.runs.locks._flock", lambda *_, **__: None)
    assert divided.run(None) is Outcome.RAN
    files, manifests = divided.files(), divided.manifests()
    n_shards = len(divided.shards())
    assert n_shards >= 8
    assert len(manifests) == 3
    for seed in range(3 if locks else 1):
        chance = random.Random(seed)
        shutil.rmtree(divided.root)
        outcome = Outcome.PART
        for _ in range(40):
            event = chance.random()
            n = chance.randint(1, 9)
            done, before = {path: path.stat().st_ino for path in divided.shards()}, tower.n_encoded
            if event < 0.15:
                with suppress(UserError):
                    outcome = divided.run("merge")
                assert tower.n_encoded == before
                assert divided.shards() == list(done)
            elif event < 0.25:
                tower.interrupted_at = before + 1
                with suppress(KeyboardInterrupt):
                    outcome = divided.run(f"{chance.randint(1, n)}/{n}")
                tower.interrupted_at = -1
            elif event < 0.4 and done and not divided.manifests():
                lost = chance.choice(sorted(done))
                lost.unlink()
                del done[lost]
            else:
                outcome = divided.run(f"{chance.randint(1, n)}/{n}")
            assert {path: path.stat().st_ino for path in done} == done, "a finished shard was made again"
            if outcome is not Outcome.PART:
                break
        while outcome is Outcome.PART:
            outcome = divided.run("1/1")
        assert divided.files() == files
        assert divided.manifests() == manifests
        assert not list(divided.root.rglob(".*"))
        assert divided.run("2/7") is Outcome.ALREADY_DONE
        assert divided.run("merge") is Outcome.ALREADY_DONE
    assert "partition" not in json.dumps(manifests)


def test_the_last_worker_finishes_and_the_others_say_what_is_missing(divided: Divided, capsys, refusal) -> None:
    for number in (3, 1):
        assert divided.run(f"{number}/3") is Outcome.PART
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("part 3/3 done: ")
    assert "still missing" in first
    with refusal("--partition merge: shards are missing, ", " train (the first: ", "without --partition"):
        divided.run("merge")
    assert divided.run("2/3") is Outcome.RAN
    assert len(divided.manifests()) == 3
    assert "still missing" not in capsys.readouterr().out


def test_counts_of_what_is_missing(settings: Settings, tower: Means, capsys, refusal, monkeypatch) -> None:
    """On the command line: 7, 3 and 1 shards; the second of four workers does the shards 1 and 5, and 1."""
    monkeypatch.setenv("DNCBM_CONFIG", str(settings.path))
    flags = ["--device", "cpu", "--num_workers", "0"]
    main("sae_features", [*flags, "--partition", "2/4"])
    said = capsys.readouterr()
    assert [line for line in said.out.splitlines() if line.startswith("part ")] == [
        "part 2/4 done: 2 of 7 shards of mine train; 5 are still missing",
        "part 2/4 done: 1 of 3 shards of mine train_val; 2 are still missing",
        "part 2/4 done: 0 of 1 shards of mine val; 1 is still missing",
    ]
    assert "mine train (part 2 of 4)" in said.err
    folder = Artifacts(settings).features("mine", "enc", "out", "train")
    assert sorted(path.name for path in folder.glob("?????.npy")) == ["00001.npy", "00005.npy"]
    with pytest.raises(SystemExit) as refused:
        main("sae_features", [*flags, "--partition", "merge"])
    tar = settings.path.parent / "tars"
    assert f"shards are missing, 5 of 7 of mine train (the first: {tar / '0.tar'}); 2 of 3 of mine train_val" in str(
        refused.value
    )
    assert "\n" not in str(refused.value)
    main("pipeline", [*flags, "--to", "sae", "--partition", "1/4"])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["sae_features", "part", "done"]


def test_a_worker_leaves_alone_what_another_has_finished_meanwhile(divided: Divided, tower: Means, monkeypatch) -> None:
    """The other has the same part and other hardware, with other last bits, and its hashes are in the manifest. It finishes
    just before this worker writes a shard."""
    meanwhile: dict[str, bytes] = {}

    def write_after_another(path: Path, **options: Any) -> AbstractContextManager[Path]:
        if not meanwhile and path.suffix == divided.suffix and ".keys" not in path.name and not tower.error:
            tower.error = 1e-3
            assert divided.run("1/1") is Outcome.RAN
            meanwhile.update(divided.files())
            tower.error = 0.0
        return whole_file(path, **options)

    for module in ("dncbm.features.encoding", "dncbm.concepts.strengths"):
        monkeypatch.setattr(f"{module}.whole_file", write_after_another)
    assert divided.run("1/1") is Outcome.RAN
    assert divided.files() == meanwhile
    with verifying_hashes():
        for path in divided.root.rglob("manifest.json"):
            check_chain(path.parent)
    shutil.rmtree(divided.root)
    divided.run("1/1")
    assert divided.files() != meanwhile


def test_a_merge_removes_nothing(settings: Settings, tower: Means) -> None:
    features = SAEFeatures("enc", "out", "mine")
    save_sae_features(settings, features, EXTRACTION, device="cpu")
    whole = sorted(Artifacts(settings).features("mine", "enc", "out", "train").iterdir())
    other = Extraction(num_workers=0, max_bad_fraction=0.2, background="white")
    with pytest.raises(StaleArtifact):
        save_sae_features(settings, features, other, Partition("merge"), device="no such device", overwrite=True)
    assert sorted(whole[0].parent.iterdir()) == whole


def test_the_last_worker_counts_the_bad_images_of_all(settings: Settings, tower: Means, refusal) -> None:
    strict = Extraction(num_workers=0, max_bad_fraction=0.01)
    features = SAEFeatures("enc", "out", "mine")
    assert save_sae_features(settings, features, strict, Partition("1/2"), device="cpu") is Outcome.PART
    with refusal("1 of 27 images is unreadable"):
        save_sae_features(settings, features, strict, Partition("2/2"), device="cpu")


def test_workers_of_two_precisions_do_not_mix(settings: Settings, tower: Means, refusal, make_encoder, monkeypatch) -> None:
    """All begin before another has written a shard."""
    features = SAEFeatures("enc", "out", "mine")

    class OnGPU(Means):
        def encode_image(self, images: torch.Tensor) -> torch.Tensor:
            if not tower.n_encoded:
                assert save_sae_features(settings, features, EXTRACTION, Partition("1/2"), device="cpu") is Outcome.PART
            return super().encode_image(images)

    encoders = [make_encoder(tower), replace(make_encoder(OnGPU()), precision="fp16")]
    monkeypatch.setattr("dncbm.features.stage.load_encoder", lambda *_: encoders.pop())
    with refusal(" holds features of fp16 and fp32", "--precision", "--overwrite"):
        save_sae_features(settings, features, EXTRACTION, Partition("2/2"), device="cpu")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_processes_of_torchrun_share_the_part_of_their_worker(
    tmp_path: Path, make_encoder, write_tar, random_image, encoded, number: int
) -> None:
    class Alone(Ranks):
        """One of two processes, without the other."""

        def first_makes(self, make: Callable[[], Any]) -> Any:
            return list(range(7)) if self.rank else make()

        def wait(self) -> None:
            pass

    image = {"0": {"png": encoded(random_image(0))}}
    shards = WebdatasetShards(tuple(write_tar(tmp_path / f"{shard}.tar", image) for shard in range(7)))
    made = []
    for rank in range(2):
        folder = tmp_path / f"rank{rank}"
        encode_part(shards, make_encoder(), folder, EXTRACTION, "images", Alone(rank, 2), Part(number, 3, is_shared=True))
        made.append({int(path.stem) for path in folder.glob("?????.npy")})
    assert made[0] | made[1] == set(range(number - 1, 7, 3))
    assert not made[0] & made[1]


# ------------------------------------------------------------------------------------------------ several processes


@pytest.fixture(scope="module")
def workers() -> Iterator[Callable[..., list[int]]]:
    command = [sys.executable, str(Path(__file__).with_name("partition_workers.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run(folder: Path, *parts: str, dies: int = -1) -> list[int]:
            print(json.dumps({"folder": str(folder), "parts": parts, "dies": dies}), file=server.stdin, flush=True)
            codes: list[int] = json.loads(server.stdout.readline())
            return codes

        yield run
        server.stdin.close()


@pytest.mark.slow
def test_three_workers_of_which_one_is_killed_and_started_again(
    settings: Settings, tower: Means, workers, capfd, tmp_path: Path
) -> None:
    """Two copies of a part run at once, too, first of one that is not the last to end, then of the last."""
    made = Divided(lambda _: Outcome.RAN, Artifacts(settings).features("mine", "enc", "out", "train").parent, ".npy")
    save_sae_features(settings, SAEFeatures("enc", "out", "mine"), EXTRACTION, device="cpu")
    files, manifests = made.files(), made.manifests()
    for about in manifests.values():
        about["run"] |= {"batch_size": None}
    shutil.rmtree(made.root)

    def said() -> str:
        return "".join(path.read_text() for path in sorted(tmp_path.glob("said*")))

    assert workers(tmp_path, "1/3", "2/3", "3/3", "1/3", dies=1) == [0, -signal.SIGKILL, 0, 0], said()
    assert [path.name for path in made.root.rglob("manifest.json")] == ["manifest.json"]  # of val, which has one shard
    assert workers(tmp_path, "2/3", "2/3") == [0, 0], said()
    assert "Traceback" not in said()
    assert made.files() == files
    assert made.manifests() == manifests
    assert not [path for path in made.root.rglob(".*")]


# ------------------------------------------------------------------------------------------------------------ locks

RECIPE = ("a stage", {"lr": 1}, {"features": "abc"})
OTHER = ("a stage", {"lr": 2}, {"features": "abc"})


@pytest.fixture
def begun(tmp_path: Path) -> Iterator[Callable[..., Callable[..., None]]]:
    """Begins to make `made`; returns the function that writes a part, finishes if asked to, and ends."""
    folder = tmp_path / "made"
    with ExitStack() as held:

        def begin(recipe: Any = RECIPE, overwrite: bool = False, **options: Any) -> Callable[..., None]:
            stack = held.enter_context(ExitStack())
            work = stack.enter_context(making(folder, *recipe, overwrite=overwrite, **options))
            folder.mkdir(exist_ok=True)

            def end(*parts: str, finish: bool = False) -> None:
                for part in parts:
                    (folder / part).write_text(part)
                if finish:
                    work.done(folder.glob("*.npy"), "made")
                stack.close()

            return end

        yield begin


def test_workers_share_and_refuse_others(begun, tmp_path: Path, refusal) -> None:
    first, second = begun(shared=True), begun(shared=True)
    for _ in range(2):
        with refusal("workers of --partition are making", "join them with --partition"):
            begun()
        first("00000.npy")  # the lock of the other remains
    second("00001.npy", finish=True)
    assert sorted(read_manifest(tmp_path / "made")["outputs"]) == ["00000.npy", "00001.npy"]
    assert not list(tmp_path.glob(".*"))


def test_workers_are_refused_while_another_process_makes_all(begun, tmp_path: Path, refusal) -> None:
    alone = begun()
    with refusal(f"process {os.getpid()} on ", "wait until it ends, or stop it"):
        begun(shared=True)
    alone("00000.npy")
    begun(shared=True)()
    assert not list(tmp_path.glob(".*"))


def test_of_two_workers_that_overwrite_neither_removes_the_new_parts_of_the_other(begun, tmp_path: Path) -> None:
    begun()("00000.npy", "00001.npy", finish=True)
    first = begun(OTHER, overwrite=True, shared=True)
    assert not list((tmp_path / "made").glob("*.npy"))
    (tmp_path / "made/00000.npy").write_text("new")
    second = begun(OTHER, overwrite=True, shared=True)
    assert (tmp_path / "made/00000.npy").read_text() == "new"
    second("00001.npy", finish=True)
    first(finish=True)
    assert read_manifest(tmp_path / "made")["settings"] == {"lr": 2}


def test_a_worker_with_other_settings_waits_for_those_that_are_at_work(begun, tmp_path: Path, refusal) -> None:
    first = begun(shared=True)
    (tmp_path / "made/00000.npy").write_text("first")
    for _ in range(2):
        with refusal("other workers of --partition", "other inputs or settings"):
            begun(OTHER, overwrite=True, shared=True)
    assert (tmp_path / "made/00000.npy").is_file()
    first()
    begun(OTHER, overwrite=True, shared=True)("00001.npy", finish=True)
    assert list(read_manifest(tmp_path / "made")["outputs"]) == ["00001.npy"]


def test_without_locks_a_worker_does_not_finish_what_others_have_begun_again(
    begun, tmp_path: Path, monkeypatch, refusal
) -> None:
    monkeypatch.setattr("dncbm.runs.locks._flock", lambda *_, **__: None)
    first = begun(shared=True)
    second = begun(OTHER, overwrite=True, shared=True)
    with refusal("begun again from other inputs or settings"):
        first("00000.npy", finish=True)
    second("00000.npy", finish=True)
    assert read_manifest(tmp_path / "made")["settings"] == {"lr": 2}


def test_two_that_find_all_parts_there_finish_once(begun, tmp_path: Path, capsys) -> None:
    first, second = begun(shared=True), begun(shared=True)
    first("00000.npy", finish=True)
    written = manifest_path(tmp_path / "made").stat().st_ino
    second(finish=True)
    assert manifest_path(tmp_path / "made").stat().st_ino == written
    assert capsys.readouterr().out.splitlines() == [
        f"made: {tmp_path / 'made'}", f"another worker has finished it: {tmp_path / 'made'}",
    ]  # fmt: skip


def test_a_part_that_vanishes_while_it_is_hashed_is_an_error_of_one_line(begun, tmp_path: Path, refusal, monkeypatch) -> None:
    end = begun(shared=True)

    def vanishes(path: Path) -> str:
        path.unlink()
        return path.read_text()

    monkeypatch.setattr("dncbm.runs.manifests.file_hash", vanishes)
    with refusal("00000.npy was removed", "run the same command again"):
        end("00000.npy", finish=True)


def test_who_waits_for_an_artifact_finds_it_done(begun, tmp_path: Path) -> None:
    first, outcomes = begun(), []

    def wait() -> None:
        with making(tmp_path / "made", *RECIPE, overwrite=False, waits=True) as work:
            outcomes.append(work.outcome)

    waiting = threading.Thread(target=wait)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    first("00000.npy", finish=True)
    waiting.join(30)
    assert outcomes == [Outcome.ALREADY_DONE]


def test_the_lock_files_of_killed_workers_are_removed(begun, tmp_path: Path) -> None:
    begun(shared=True)("00000.npy", finish=True)
    for path in (lock_path(tmp_path / "made"), turn_path(tmp_path / "made")):
        path.write_text("process 1 on elsewhere")
    begun(shared=True)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_does_not_replace_leaves_the_one_that_is_there(tmp_path: Path, monkeypatch, links: bool) -> None:
    """Where there are no hard links, the last one wins, as a whole."""
    if not links:
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(PermissionError("no links here")))
    for text in ("first", "second"):
        with whole_file(tmp_path / "x", replaces=False) as temporary:
            temporary.write_text(text)
    assert (tmp_path / "x").read_text() == ("first" if links else "second")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


# ------------------------------------------------------------------------------------------------------------- flag


@pytest.mark.parametrize("text", ["4/3", "2/1", "100/99"])
def test_there_is_no_part_beyond_the_last(refusal, text: str) -> None:
    of = text.partition("/")[2]
    with refusal(f"--partition {text}", f"1/{of} to {of}/{of}"):
        Partition(text)


def array(task: int, least: int, most: int, count: int, step: int) -> dict[str, str]:
    numbers = {"ID": task, "MIN": least, "MAX": most, "COUNT": count, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in numbers.items()}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (array(1, 1, 8, 8, 1), (1, 8)),  # --array=1-8
        (array(8, 1, 8, 8, 1), (8, 8)),
        (array(0, 0, 3, 4, 1), (1, 4)),  # --array=0-3%2
        (array(9, 1, 9, 3, 4), (3, 3)),  # --array=1-10:4
        (array(7, 3, 7, 2, 4), (2, 2)),  # --array=3,7
        (array(5, 5, 5, 1, 0), (1, 1)),  # --array=5
        (array(7, 3, 9, 3, 2), "--array=3,7,9"),  # the step may be that of the last two
        (array(9, 3, 9, 3, 1), "submit --array=1-3"),
        (array(4, 1, 9, 3, 4), "do not rise by one step"),
        (array(1, 1, 8, 8, 0), "do not rise by one step"),
        ({}, "SLURM_ARRAY_TASK_ID is not set"),
        (array(1, 1, 8, 8, 1) | {"SLURM_ARRAY_TASK_MAX": ""}, "SLURM_ARRAY_TASK_MAX is not set"),
        (array(1, 1, 8, 8, 1) | {"SLURM_ARRAY_TASK_COUNT": "x"}, "SLURM_ARRAY_TASK_COUNT is 'x'"),
    ],
)
def test_the_part_of_a_task_of_a_job_array(monkeypatch, refusal, variables: dict[str, str], expected: Any) -> None:
    for name in array(0, 0, 0, 0, 0):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with refusal("--partition slurm", expected, "or pass --partition i/n"):
            part_of(Partition("slurm"))
    else:
        assert part_of(Partition("slurm")) == Part(*expected, is_shared=True)


@pytest.mark.parametrize(("n", "shards"), [(1, 5), (3, 5), (8, 5), (2, 0), (7, 40)])
def test_the_parts_are_all_shards_once(n: int, shards: int) -> None:
    shares = [part_of(Partition(f"{number}/{n}")).share_of(range(shards)) for number in range(1, n + 1)]
    assert sorted(shard for share in shares for shard in share) == list(range(shards))
    assert shares[0] == list(range(0, shards, n))
    assert part_of(Partition()).share_of(range(shards)) == list(range(shards))
    assert part_of(Partition("merge")).share_of(range(shards)) == []
    assert Partition in PIPELINE.takes
