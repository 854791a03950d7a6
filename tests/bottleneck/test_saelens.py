"""Exports for SAELens, compared with its formulas written in numpy, and with the SAEs that sae-lens itself loads."""

import json
import os
import shutil
import subprocess
import sysconfig
import venv
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from dncbm.bottleneck.saelens import save_saelens
from sparse_autoencoder import BatchTopK, JumpReLU, Matryoshka, ReLU, SparseAutoencoder, Sparsity, TopK
from sparse_autoencoder.settings import INPUT_TRANSFORMS

D, F = 24, 60  # sqrt(24) is inexact
VARIANTS = [ReLU(), TopK(5), TopK(F + 1), BatchTopK(5), JumpReLU(), Matryoshka(BatchTopK(5)), Matryoshka(TopK(5))]
CASES = list(product(VARIANTS, INPUT_TRANSFORMS))
PROVENANCE = {"seed": 49, "encoder": "Bär/16"}


def eighths(*shape: int, seed: int) -> Tensor:
    """Random multiples of 1/8: sums of their products are exact in float32, in whatever order they are added."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 8).round() / 8


def make_sae(sparsity: Sparsity, transform: str) -> SparseAutoencoder:
    """An SAE all of whose parameters matter."""
    sae = SparseAutoencoder(D, F, sparsity=sparsity, input_transform=transform)
    with torch.no_grad():
        sae.encoder_weight.copy_(eighths(F, D, seed=1))
        sae.encoder_bias.copy_(eighths(F, seed=2))
        sae.tied_bias.copy_(eighths(D, seed=3))
        for name, value in {
            "input_centre": eighths(D, seed=4) + 1,
            "threshold": torch.tensor(2.5),
            "log_threshold": eighths(F, seed=5),
        }.items():
            if name in sae.state_dict():
                sae.state_dict()[name].copy_(value)
    return sae


def export(sae: SparseAutoencoder, folder: Path) -> None:
    save_saelens(sae, folder, model_name="clip", hook_name="out", dataset="photos", provenance=PROVENANCE)


def assert_same(got: np.ndarray, expected: np.ndarray, what: object) -> None:
    difference = np.abs(got - expected).max() / np.abs(expected).max()
    assert difference <= 1e-5, f"{what}: {difference}"


def by_formula(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latents and reconstructions, as SAELens's documentation defines them."""
    config, weights = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    ratio = np.ones((len(x), 1))
    if config["normalize_activations"] == "constant_norm_rescale":
        ratio = np.sqrt(config["d_in"]) / np.linalg.norm(x, axis=1, keepdims=True)
    centred = x * ratio - config["apply_b_dec_to_input"] * weights["b_dec"]
    pre = centred @ weights["W_enc"].astype(np.float64) + weights["b_enc"]
    z = np.maximum(pre, 0)
    if config["architecture"] == "topk":
        z[pre < np.sort(pre, axis=1)[:, -config["k"]][:, None]] = 0
    elif config["architecture"] == "jumprelu":
        z[pre <= weights["threshold"]] = 0
    return z, (z @ weights["W_dec"] + weights["b_dec"]) / ratio


@pytest.mark.parametrize(("sparsity", "transform"), CASES, ids=lambda part: getattr(part, "name_part", part))
def test_an_export_equals_the_sae_by_the_documented_formulas(sparsity: Sparsity, transform: str, tmp_path: Path) -> None:
    sae = make_sae(sparsity, transform)
    export(sae, tmp_path)
    x = torch.randn(200, D, generator=torch.Generator().manual_seed(6)) * 3
    for expected, got in zip(sae(x), by_formula(tmp_path, x.double().numpy()), strict=True):
        assert_same(got, expected.detach().numpy(), "by formula")


def test_an_unknown_variant_is_refused(tmp_path: Path, refusal: Callable[..., AbstractContextManager[None]]) -> None:
    @dataclass(frozen=True)
    class Cubed(TopK):
        kind: ClassVar[str] = "cubed"

    with refusal("'cubed'", "--sae_type relu, topk"):
        export(make_sae(Cubed(5), "none"), tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_a_failure_leaves_the_older_export(tmp_path: Path) -> None:
    (tmp_path / "cfg.json").write_text("older")
    (tmp_path / "sae_weights.safetensors").mkdir()  # no file can replace it
    with pytest.raises(OSError, match="sae_weights"):
        export(make_sae(ReLU(), "none"), tmp_path)
    assert (tmp_path / "cfg.json").read_text() == "older"


LOAD = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from sae_lens import SAE

for folder in map(Path, sys.argv[1:]):
    sae, x = SAE.load_from_disk(folder), torch.from_numpy(np.load(folder / "x.npy"))
    with torch.no_grad():
        np.savez(folder / "loaded.npz", latents=sae.encode(x), reconstruction=sae(x))
    (folder / "metadata.json").write_text(json.dumps(sae.cfg.metadata.to_dict()))
"""


def run(what: str, *command: object) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, f"{what} failed:\n{done.stderr[-3000:]}"


# What pip installs comes before the packages below it, so that a version which sae-lens needs wins.
SHARE = "import sys, sysconfig, pathlib; pathlib.Path(sysconfig.get_path('purelib'), 'below.pth').write_text(sys.argv[1])"


@pytest.fixture(scope="module")
def saelens_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The interpreter of an environment with sae-lens, which sees this one's torch and other packages."""
    folder = tmp_path_factory.mktemp("saelens")
    venv.create(folder, with_pip=True)
    python, requirements = folder / "bin" / "python", Path(__file__).with_name("saelens_requirements.txt")
    run("sharing packages", python, "-c", SHARE, sysconfig.get_path("purelib"))
    run("installing sae-lens from PyPI, which this test needs,", python, "-m", "pip", "install", "-qr", requirements)
    yield python
    shutil.rmtree(folder)  # 240 MB


@pytest.mark.slow
def test_saelens_computes_the_same(saelens_python: Path, tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(len(CASES))]
    x = torch.cat([eighths(2000, D, seed=6), torch.zeros(1, D)])
    for (sparsity, transform), folder in zip(CASES, folders, strict=True):
        export(make_sae(sparsity, transform), folder)
        # SAELens's rescaling makes NaN of zeros.
        np.save(folder / "x.npy", x[:-1] if transform == "unit_norm" else x)
    run("loading with sae-lens", saelens_python, "-c", LOAD, *folders)
    for (sparsity, transform), folder in zip(CASES, folders, strict=True):
        sae, loaded = make_sae(sparsity, transform), np.load(folder / "loaded.npz")
        expected = sae(torch.from_numpy(np.load(folder / "x.npy")))
        for name, ours in expected._asdict().items():
            assert_same(loaded[name], ours.detach().numpy(), (sparsity, transform, name))
        metadata = json.loads((folder / "metadata.json").read_text())
        assert [metadata[name] for name in ("model_name", "hook_name", "dataset_path")] == ["clip", "out", "photos"]
        assert metadata["dncbm"].items() >= PROVENANCE.items()
    # Pre-activations at the threshold, and equal ones at place k: the comparison above holds for these, too.
    pre = make_sae(ReLU(), "none").pre_activations(x)
    largest = pre.sort(dim=1, descending=True).values
    assert (pre == 2.5).any()
    assert (largest[:, 4] == largest[:, 5]).any()
