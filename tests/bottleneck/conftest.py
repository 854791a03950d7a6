"""A small finished run with a CLIP of random weights: three classes of patterns, 24 latents, some of which share a name."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dncbm.bottleneck.run import run_of_flags
from dncbm.cli import main
from dncbm.runs.declarations import ProbeRun, SAERun
from dncbm.runs.settings import Settings, load_settings

CLASSES = ("a_cat", "dog", "zebra")
PER_CLASS = {"train": 14, "val": 7}
WORDS = ("dog", "stripes", "water", "a traffic light", "sky", "fur", "river", "wheel")
CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
CONFIG = {
    **{name: name for name in ("data_dir", "sae_dir", "probe_dir", "vocab_dir", "analysis_dir")},
    "vocabulary": "words",
    "sae_datasets": {"photos": "photos"},
    "probe_datasets": {"pets": "pets"},
    "encoders": {"tiny": "local-dir:clip"},
    "defaults": {
        "img_enc_name": "tiny", "sae_dataset": "photos", "probe_dataset": "pets", "expansion_factor": 2, "num_epochs": 40,
        "train_sae_bs": 16, "lr": 1e-2, "l1_coeff": 2e-3, "input_transform": "unit_norm", "probe_solver": "prox",
        "probe_sparsity_loss_lambda": 0.01, "num_workers": 0, "device": "cpu", "names": "all",
    },
}  # fmt: skip
STAGES = ("sae_features", "sae", "names", "probe_features", "strengths", "probe")


@dataclass(frozen=True)
class SmallRun:
    """A finished run, and what it was made from."""

    settings: Settings
    sae: SAERun
    probe: ProbeRun
    images: list[Path]
    """The images of val, in the order of their keys."""
    labels: list[str]
    """The class of each, as its folder is called."""

    @property
    def root(self) -> Path:
        """The folder of the config and of everything that it names."""
        return self.settings.path.parent


def pattern(kind: int, seed: int) -> Image.Image:
    """Rows in shades of red, columns of green or squares of blue."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:48, :40] // rng.integers(3, 9)
    chosen = ((y, x, y + x)[kind] % 2).astype(bool)
    colours = rng.integers(0, 256, (2, 3), dtype=np.uint8)
    colours[:, kind] |= 128
    return Image.fromarray(np.where(chosen[..., None], *colours))


def write_clip(folder: Path) -> None:
    """A `local-dir:` folder of a small CLIP whose weights are random, and always the same."""
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = open_clip.CLIP(**CLIP).state_dict()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": PREPROCESS}))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors")


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """The run. Tests only read it; one that changes a file works on a copy of `root`."""
    root = tmp_path_factory.mktemp("small run")
    (root / "config.py").write_text("".join(f"{key} = {value!r}\n" for key, value in CONFIG.items()))
    (root / "vocab_dir").mkdir()
    (root / "vocab_dir" / "words.txt").write_text("\n".join(WORDS))
    write_clip(root / "clip")
    (root / "photos").mkdir()
    for split, count in PER_CLASS.items():
        for kind, name in enumerate(CLASSES):
            (root / "pets" / split / name).mkdir(parents=True)
            for number in range(count):
                image = pattern(kind, seed=len(CLASSES) * number + kind + 1000 * (split == "val"))
                image.save(root / "pets" / split / name / f"{number:02d}.png")
                image.save(root / "photos" / f"{split}_{name}_{number:02d}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DNCBM_CONFIG", str(root / "config.py"))
        for stage in STAGES:
            main(stage, [])
    settings = load_settings(root / "config.py")
    sae, probe = run_of_flags(settings, {})
    images = [path for name in CLASSES for path in sorted((root / "pets" / "val" / name).iterdir())]
    return SmallRun(settings, sae, probe, images, [path.parent.name for path in images])
