"""Stages 1, 5 and 6 in two processes, as torchrun starts them."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dncbm.cli import main, parse
from dncbm.concepts.sae import SAE
from dncbm.concepts.strengths import STRENGTHS, save_concept_strengths
from dncbm.features.stage import PROBE_FEATURES, SAE_FEATURES, save_probe_features, save_sae_features
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Extraction, ProbeDataset, ProbeFeatures, SAEFeatures, SAERun, Splits
from dncbm.runs.devices import default_cores, default_workers
from dncbm.runs.ranks import ALONE, Ranks, device_name, joined, own_gpu
from dncbm.runs.settings import load_settings
from dncbm.runs.stage import Stage
from dncbm.stages import STAGES
from sparse_autoencoder import SparseAutoencoder, save_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TINY = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 500, "width": 16, "heads": 2, "layers": 1},
}
CONFIG = """
data_dir = sae_dir = probe_dir = vocab_dir = analysis_dir = "out"
vocabulary = "words"
sae_datasets = {
    "mine": {"train": "tars/{0..4}.tar", "train_val": "tars/5.tar", "val": "tars/6.tar"},
    "spoilt": {"train": "tars/{6..7}.tar", "train_val": "tars/5.tar", "val": "tars/6.tar"},
}
probe_datasets = {"classes": "classes"}
encoders = {"tiny": "local-dir:clip"}
defaults = {"img_enc_name": "tiny", "sae_dataset": "mine", "probe_dataset": "classes"}
"""


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "jpeg")
    return file.getvalue()


@pytest.fixture(scope="module")
def made_by_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small data sets, a tiny encoder and a config, and in `out` the outputs of one process."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "config.py").write_text(CONFIG)
    (folder / "tars").mkdir()
    for shard in range(8):
        with tarfile.open(folder / f"tars/{shard}.tar", "w") as tar:
            for number in range(20 + 7 * shard):
                content = jpeg(100 * shard + number) if shard < 7 else b"no image"
                member = tarfile.TarInfo(f"{number:05d}.jpg")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for split in ("train", "val"):
        for number in range(30):
            path = folder / f"classes/{split}/{'ab'[number % 2]}/{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(number))
    (folder / "clip").mkdir()
    (folder / "clip/open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder / 'clip'}", load_weights=False)
    save_file(model.state_dict(), folder / "clip/open_clip_model.safetensors")

    settings = load_settings(folder / "config.py")
    alone = Extraction(num_workers=0)
    save_sae_features(settings, SAEFeatures("tiny", "out", "mine"), alone, device="cpu")
    save_probe_features(settings, ProbeFeatures("classes", "tiny", "out"), Splits(), alone, device="cpu")
    return folder


@pytest.fixture
def fresh(made_by_one: Path, tmp_path: Path) -> Path:
    """The same folder without outputs."""
    folder = tmp_path / "fresh"
    shutil.copytree(made_by_one, folder, ignore=shutil.ignore_patterns("out"))
    return folder


def torchrun(script: str, *flags: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in two processes, as a user does."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"{ROOT}/scripts/{script}"]
    return subprocess.run(
        [sys.executable, *command, "--device", "cpu", *flags],
        env=os.environ | {"DNCBM_CONFIG": str(folder / "config.py")},
        capture_output=True,
        text=True,
        timeout=300,
    )


TwoProcesses = Callable[..., tuple[list[int], str]]


@pytest.fixture(scope="module")
def in_two_processes() -> Iterator[TwoProcesses]:
    """Runs a stage in two processes without the slow start of torchrun; returns exit codes and what both wrote to stderr."""
    command = [sys.executable, str(Path(__file__).with_name("two_processes.py"))]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as torchrun sets it
    with subprocess.Popen(command, env=one_thread, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run(stage: str, *flags: str, folder: Path, second: str = "") -> tuple[list[int], str]:
            request = {"stage": stage, "flags": flags, "folder": str(folder), "second": second}
            print(json.dumps(request), file=server.stdin, flush=True)
            codes = json.loads(server.stdout.readline())
            return codes, "".join((folder / f"stderr{rank}").read_text() for rank in range(2))

        yield run
        server.stdin.close()


def errors(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if "error: " in line.lower()[:12]]


def features(folder: Path, pattern: str = "*.npy") -> dict[str, bytes]:
    """Every array a stage wrote."""
    out = folder / "out"
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob(pattern))}


def of(dataset: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if f"/{dataset}/" in name}


def manifests(folder: Path) -> dict[str, dict[str, dict[str, object]]]:
    return {
        str(path.relative_to(folder)): {key: json.loads(path.read_text())[key] for key in ("settings", "inputs", "outputs")}
        for path in sorted((folder / "out").rglob("*manifest.json"))
    }


def test_two_processes_make_what_one_makes(made_by_one: Path, fresh: Path, in_two_processes: TwoProcesses) -> None:
    done = torchrun("01_save_cc3m_features.py", "--num_workers", "1", folder=fresh)
    assert done.returncode == 0, done.stderr
    codes, said = in_two_processes("probe_features", "--num_workers", "1", folder=fresh)
    assert codes == [0, 0], said
    assert features(fresh) == features(made_by_one)
    assert manifests(fresh) == manifests(made_by_one)
    assert not list(fresh.rglob("*.unfinished"))


def test_the_shards_of_a_process_that_died_are_made_by_the_next_run(
    made_by_one: Path, fresh: Path, in_two_processes: TwoProcesses
) -> None:
    codes, said = in_two_processes("sae_features", "--num_workers", "0", folder=fresh, second="dies")
    assert codes == [1, -signal.SIGKILL], said
    left = features(fresh)
    assert "activations_img/mine/tiny/out/train/00001.npy" in left
    assert "activations_img/mine/tiny/out/train/00003.npy" not in left
    assert not list(fresh.rglob("manifest.json"))
    codes, said = in_two_processes("sae_features", "--num_workers", "0", folder=fresh)
    assert codes == [0, 0], said
    assert of("mine", features(fresh)) == of("mine", features(made_by_one))
    assert left.items() <= features(fresh).items()


def test_the_failure_of_one_process_ends_all_with_one_line(fresh: Path, in_two_processes: TwoProcesses) -> None:
    codes, said = in_two_processes("sae_features", "--num_workers", "0", folder=fresh, second="fails")
    assert codes == [1, 1]
    assert errors(said) == ["error: the second failed"]
    assert "Traceback" not in said


def test_too_many_bad_images_are_reported_once(fresh: Path, in_two_processes: TwoProcesses) -> None:
    codes, said = in_two_processes("sae_features", "--num_workers", "0", "--sae_dataset", "spoilt", folder=fresh)
    assert codes == [1, 1]
    (line,) = errors(said)
    assert "69 of 131 images are unreadable" in line
    assert str(fresh / "tars/7.tar") in line
    assert "Traceback" not in said


# ------------------------------------------------------------------------------------------------------------ the SAE

SAE_FLAGS = ("--num_epochs", "4", "--train_sae_bs", "8", "--resample_freq", "1", "--log_every", "3")


def with_features(folder: Path, make_store) -> Artifacts:
    """Writes a config, and features to train an SAE on, in several shards."""
    (folder / "config.py").write_text(CONFIG)
    artifacts = Artifacts(load_settings(folder / "config.py"))
    rng = np.random.default_rng(0)
    for split, sizes in (("train", (13, 4, 20)), ("train_val", (9,)), ("val", (9,))):
        shards = [rng.normal(size=(rows, 12)).astype(np.float32) for rows in sizes]
        make_store(artifacts.features("mine", "tiny", "out", split), shards)
    return artifacts


def sae_of(folder: Path) -> dict[str, torch.Tensor]:
    (checkpoint,) = (folder / "out").rglob("sparse_autoencoder_final.safetensors")
    return load_file(checkpoint)


def test_two_processes_train_the_sae_that_one_trains(
    tmp_path_factory: pytest.TempPathFactory, make_store, monkeypatch, in_two_processes: TwoProcesses
) -> None:
    by_one, by_two, after_death = (tmp_path_factory.mktemp(name) for name in ("one", "two", "death"))
    for folder in (by_one, by_two, after_death):
        with_features(folder, make_store)
    monkeypatch.setenv("DNCBM_CONFIG", str(by_one / "config.py"))
    main("sae", ["--device", "cpu", *SAE_FLAGS])
    done = torchrun("02_train_sae_img.py", *SAE_FLAGS, folder=by_two)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training makes only") == 1, done.stderr
    alone, together = sae_of(by_one), sae_of(by_two)
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=1e-3, msg=name)
    one, two = ({path: made["settings"] for path, made in manifests(folder).items()} for folder in (by_one, by_two))
    assert one == two

    codes, said = in_two_processes("sae", *SAE_FLAGS, folder=after_death, second="dies")
    assert codes == [1, -signal.SIGKILL], said
    assert "Traceback" not in said
    codes, said = in_two_processes("sae", *SAE_FLAGS, folder=after_death)
    assert codes == [0, 0], said
    assert all(torch.equal(tensor, together[name]) for name, tensor in sae_of(after_death).items())
    codes, said = in_two_processes("sae", *SAE_FLAGS, folder=after_death)
    assert codes == [0, 0], said


# ------------------------------------------------------------------------------------------------- concept strengths


@dataclass(frozen=True)
class Strengths:
    """Features of the probe data set in five shards, and an SAE; and what one process makes of them."""

    folder: Path
    parts: dict[str, bytes]
    manifests: dict[str, dict[str, dict[str, object]]]


@pytest.fixture
def strengths(tmp_path: Path, make_store) -> Strengths:
    (tmp_path / "config.py").write_text(CONFIG)
    settings = load_settings(tmp_path / "config.py")
    artifacts, run = Artifacts(settings), SAERun("tiny", "out", "mine")
    rng = np.random.default_rng(0)
    for split in Splits().names:
        shards = [rng.normal(size=(rows, 12)).astype(np.float32) for rows in (9, 4, 17, 1, 8)]
        make_store(artifacts.features("classes", "tiny", "out", split), shards)
    save_checkpoint(SparseAutoencoder(12, 96, seed=0), artifacts.sae(run))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as torchrun gives a process: for so few images, it decides the last bits
    save_concept_strengths(settings, run, ProbeDataset("classes"), Splits(), device="cpu")
    torch.set_num_threads(n_threads)
    alone = Strengths(tmp_path, features(tmp_path, "*.npz"), manifests(tmp_path))
    assert len(alone.parts) == 15
    for split in Splits().names:
        shutil.rmtree(artifacts.strengths(run, "classes", split))
    return alone


def test_two_processes_make_the_strengths_that_one_makes(strengths: Strengths) -> None:
    done = torchrun("06_save_concept_strengths.py", "--probe_split", "train", folder=strengths.folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("100%") == 1, done.stderr
    done = torchrun("06_save_concept_strengths.py", folder=strengths.folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("already done") == 1
    assert features(strengths.folder, "*.npz") == strengths.parts
    assert manifests(strengths.folder) == strengths.manifests
    assert not list(strengths.folder.rglob("*.unfinished"))


def test_the_strengths_of_a_process_that_died_are_made_by_the_next_run(
    strengths: Strengths, in_two_processes: TwoProcesses
) -> None:
    codes, said = in_two_processes("strengths", folder=strengths.folder, second="dies")
    assert codes == [1, -signal.SIGKILL], said
    left = {name.rpartition("/train/")[2]: name for name in features(strengths.folder, "*.npz")}
    assert sorted(left) == [f"all_concepts/0000{shard}.npz" for shard in (0, 1, 2, 4)]
    assert len(manifests(strengths.folder)) == 3  # of the features
    times = {name: (strengths.folder / "out" / name).stat().st_mtime_ns for name in left.values()}
    codes, said = in_two_processes("strengths", folder=strengths.folder)
    assert codes == [0, 0], said
    assert features(strengths.folder, "*.npz") == strengths.parts
    assert {name: (strengths.folder / "out" / name).stat().st_mtime_ns for name in times} == times


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("no features", "are missing"),
        ("no manifest", "unfinished"),
        ("other width", "the SAE takes 11 features"),
        ("fails", "the second failed"),
    ],
)
def test_what_the_processes_cannot_use_is_said_once(
    strengths: Strengths, in_two_processes: TwoProcesses, harm: str, message: str
) -> None:
    artifacts = Artifacts(load_settings(strengths.folder / "config.py"))
    store = artifacts.features("classes", "tiny", "out", "train")
    if harm == "no features":
        shutil.rmtree(store)
    if harm == "no manifest":
        (store / "manifest.json").unlink()
    if harm == "other width":
        save_checkpoint(SparseAutoencoder(11, 96, seed=0), artifacts.sae(SAERun("tiny", "out", "mine")))
    codes, said = in_two_processes("strengths", folder=strengths.folder, second="fails" if harm == "fails" else "")
    assert codes == [1, 1]
    (line,) = errors(said)
    assert message in line
    assert "Traceback" not in said


# -------------------------------------------------------------------------------------------------------- processes


def test_without_torchrun_a_process_is_alone(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with joined() as ranks:
        assert ranks == ALONE
    monkeypatch.setenv("WORLD_SIZE", "4")  # some schedulers set it for every job
    with joined() as ranks:
        assert ranks == ALONE
        assert ranks.first_makes(lambda: 5) == 5
        ranks.wait()


SEVERAL = (SAE_FEATURES, SAE, PROBE_FEATURES, STRENGTHS)


@pytest.mark.parametrize("stage", [stage for stage in STAGES.values() if stage not in SEVERAL])
def test_other_stages_do_not_start_in_several_processes(monkeypatch, refusal, write_config, stage: Stage) -> None:
    monkeypatch.setenv("DNCBM_CONFIG", str(write_config()))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refusal("torchrun", "1, 2, 5 and 6"):
        parse(stage, [f"{name} of images" for name, flag in stage.flags().items() if flag.setting.positional])
    for several in SEVERAL:
        parse(several, [])


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_disjoint_and_even(size: int) -> None:
    shares = [Ranks(rank, size).share_of(list(range(11))) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == list(range(11))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_each_process_has_a_gpu_of_its_own(monkeypatch, refusal) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)

    def named(name: str, local: int) -> str:
        monkeypatch.setenv("LOCAL_RANK", str(local))
        return device_name(name, Ranks(local + 4, 8))

    assert [named("auto", local) for local in range(4)] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert named("cuda", 2) == "cuda:2"
    assert named("cpu", 2) == "cpu"
    assert device_name("auto", ALONE) == "auto"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert own_gpu("auto", Ranks(5, 8)) == device_name("auto", Ranks(5, 8))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    with refusal("5 processes that train together need a GPU each, and this machine has 4"):
        own_gpu("auto", Ranks(5, 8))
    assert own_gpu("cpu", Ranks(5, 8)) == "cpu"


@pytest.mark.parametrize(
    ("cores", "processes", "on_gpu", "on_cpu"),
    [(12, "", 12, 6), (12, "2", 6, 3), (12, "3", 4, 2), (12, "8", 1, 1), (64, "1", 16, 16), (2, "", 2, 1)],
)
def test_the_processes_of_a_machine_share_its_cores(monkeypatch, cores: int, processes: str, on_gpu: int, on_cpu: int) -> None:
    """All of them decode images if a GPU encodes."""
    monkeypatch.setattr("dncbm.runs.devices.default_cores", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert (default_workers(True), default_workers(False)) == (on_gpu, on_cpu)
    assert default_cores() >= 1
