"""Stages 1 and 5 in two processes, as torchrun starts them."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dncbm.cli import parse
from dncbm.features.stage import PROBE_FEATURES, SAE_FEATURES, save_probe_features, save_sae_features
from dncbm.runs.declarations import Extraction, ProbeFeatures, SAEFeatures, Splits
from dncbm.runs.devices import default_cores, default_workers
from dncbm.runs.ranks import ALONE, Ranks, device_name, joined
from dncbm.runs.settings import load_settings
from dncbm.runs.stage import Stage
from dncbm.stages import STAGES

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


def features(folder: Path) -> dict[str, bytes]:
    """Every array a stage wrote."""
    out = folder / "out"
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.npy"))}


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


@pytest.mark.parametrize("stage", [stage for name, stage in STAGES.items() if name not in ("sae_features", "probe_features")])
def test_other_stages_do_not_start_in_several_processes(monkeypatch, refusal, write_config, stage: Stage) -> None:
    monkeypatch.setenv("DNCBM_CONFIG", str(write_config()))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refusal("torchrun", "1 and 5"):
        parse(stage, [f"{name} of images" for name, flag in stage.flags().items() if flag.setting.positional])
    for several in (SAE_FEATURES, PROBE_FEATURES):
        parse(several, [])


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_disjoint_and_even(size: int) -> None:
    shares = [Ranks(rank, size).share_of(list(range(11))) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == list(range(11))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_each_process_has_a_gpu_of_its_own(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)

    def named(name: str, local: int) -> str:
        monkeypatch.setenv("LOCAL_RANK", str(local))
        return device_name(name, Ranks(local + 4, 8))

    assert [named("auto", local) for local in range(4)] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert named("cuda", 2) == "cuda:2"
    assert named("cpu", 2) == "cpu"
    assert device_name("auto", ALONE) == "auto"


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
