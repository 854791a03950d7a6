"""What several test files share: a config of one's own, errors of one line, small images, an encoder without weights."""

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import sklearn
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from dncbm.features.encoders import Encoder
from dncbm.features.store import FeatureStore
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import making
from dncbm.runs.settings import Settings, load_settings

# The examples are the same on every machine, and a slow machine fails nothing.
hypothesis.settings.register_profile("dncbm", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("dncbm")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # tests in a background job: those of Ctrl-C need it
    signal.signal(signal.SIGINT, signal.default_int_handler)

EXAMPLE = Path(__file__).parents[1] / "examples" / "openmoji"
ROOTS = {name: name for name in ("data_dir", "sae_dir", "probe_dir", "vocab_dir", "analysis_dir")}
COMPLETE = ROOTS | {"vocabulary": "words", "sae_datasets": {}, "probe_datasets": {}, "encoders": {}, "defaults": {}}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A line for every program without which tests were left out (tests/browser/conftest.py)."""
    reasons = Counter(str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.items():
        if "apt-get install" in reason:
            terminalreporter.write_line(f"{count} tests were left out, {reason.removeprefix('Skipped: ')}", yellow=True)


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """Writes config.py into a folder of its own; keywords replace keys, and None leaves one out."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "config.py"
        values = COMPLETE | changes
        path.write_text("".join(f"{key} = {value!r}\n" for key, value in values.items() if value is not None))
        return path

    return write


@pytest.fixture
def make_settings(write_config: Callable[..., Path]) -> Callable[..., Settings]:
    """The settings of such a config."""
    return lambda **changes: load_settings(write_config(**changes))


@pytest.fixture
def refusal() -> Callable[..., AbstractContextManager[None]]:
    """`with refusal("a", "b")`: the block must raise one line for the user that holds a and b."""

    @contextmanager
    def expect(*parts: object) -> Iterator[None]:
        with pytest.raises(UserError) as caught:
            yield
        message = str(caught.value)
        assert "\n" not in message
        for part in parts:
            assert str(part) in message, message

    return expect


@pytest.fixture
def random_image() -> Callable[..., Image.Image]:
    """seed -> an image of noise."""

    def image(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        return Image.fromarray(pixels).convert(mode)

    return image


@pytest.fixture
def encoded() -> Callable[..., bytes]:
    """An image as the bytes of a file."""

    def encode(image: Image.Image, format: str = "png") -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format)
        return buffer.getvalue()

    return encode


@pytest.fixture
def write_tar() -> Callable[..., Path]:
    """Writes a webdataset shard: sample key -> suffix -> bytes."""

    def write(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for key, members in samples.items():
                for suffix, content in members.items():
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        return path

    return write


class ChannelMeans(torch.nn.Module):
    """An image tower whose features are the means of red, green and blue."""

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)


@pytest.fixture
def make_encoder() -> Callable[..., Encoder]:
    """An encoder around an image tower; by default the one that averages channels."""

    def make(model: torch.nn.Module | None = None) -> Encoder:
        no_tokens = torch.nn.Identity()
        return Encoder("channel means", model or ChannelMeans(), to_tensor, no_tokens, torch.device("cpu"))

    return make


@pytest.fixture(scope="session")
def make_store() -> Callable[..., FeatureStore]:
    """Writes shards of features as the extraction leaves them, and opens them."""

    def make(folder: Path, shards: list[np.ndarray], keys: list[np.ndarray] | None = None) -> FeatureStore:
        shutil.rmtree(folder, ignore_errors=True)
        with making(folder, "features by hand", {}, {}, overwrite=True) as work:
            first = 0
            for number, shard in enumerate(shards):
                np.save(folder / f"{number:05d}.npy", shard)
                shard_keys = np.arange(first, first + len(shard)) if keys is None else keys[number]
                np.save(folder / f"{number:05d}.keys.npy", shard_keys)
                first += len(shard)
            work.done(folder.glob("*.npy"))
        return FeatureStore(folder, "a command")

    return make


@pytest.fixture(scope="session")
def saga() -> Callable[..., np.ndarray]:
    """scikit-learn's weights (C x inputs) that minimise strength * sum of cross-entropies + sum of |W|, without a bias.

    With `of_images`, the cross-entropies count by these weights.
    """
    new = tuple(int(part) for part in sklearn.__version__.split(".")[:2]) >= (1, 8)
    l1: dict[str, Any] = {"l1_ratio": 1.0} if new else {"penalty": "l1"}

    def solve(
        x: np.ndarray, labels: np.ndarray, strength: float, tolerance: float, of_images: np.ndarray | None = None
    ) -> np.ndarray:
        model = LogisticRegression(solver="saga", C=strength, fit_intercept=False, tol=tolerance, max_iter=20_000, **l1)
        return model.fit(x.astype(np.float64), labels, sample_weight=of_images).coef_

    return solve


@pytest.fixture(scope="session")
def small_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a small build of the embedded default; what it printed is in build.txt."""
    output = tmp_path_factory.mktemp("build") / "run"
    command = [sys.executable, str(EXAMPLE / "build.py"), "--limit", "60", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False)
    assert done.returncode == 0, done.stderr
    (output / "build.txt").write_text(done.stdout)
    return output
