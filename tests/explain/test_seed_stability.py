"""Stability over seeds from the command line, and its figure."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.nn.functional import normalize

from dncbm.cli import main
from dncbm.concepts.evidence.stability import BINS, read_stability
from dncbm.explain.plotting import seed_stability as drawing
from dncbm.explain.plotting.fonts import quiet
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SAERun
from dncbm.runs.manifests import making
from dncbm.runs.settings import Settings, load_settings
from sparse_autoencoder import SparseAutoencoder, save_checkpoint
from sparse_autoencoder.declare import identity, values

RUN = SAERun(encoder="enc", dataset="mine")
NAMES = ["a$b$c^d", "back\\slash_{x}", "鳥, 狗", "b\udcffd", "openclip:" + "long/" * 20 + "model"]


def save(settings: Settings, seed: int, shared: int) -> None:
    """An SAE of 40 latents, of which all seeds share some in an order of their own."""
    run = replace(RUN, training=replace(RUN.training, seed=seed))
    model = SparseAutoencoder(16, 40, seed=seed)
    with torch.no_grad():
        model.decoder_weight[:shared] = normalize(torch.eye(16)[:shared], dim=1)
        model.decoder_weight.copy_(model.decoder_weight[np.random.default_rng(seed).permutation(40)])
    path = Artifacts(settings).sae(run)
    with making(path, "sae", identity(run), {}, overwrite=False, run=values(run)) as work:
        save_checkpoint(model, path)
        work.done([path])


@pytest.fixture
def settings(write_config, monkeypatch: pytest.MonkeyPatch) -> Settings:
    path = write_config(defaults={"img_enc_name": "enc", "sae_dataset": "mine"})
    monkeypatch.setenv("DNCBM_CONFIG", str(path))
    return load_settings()


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn."""
    found: list[Figure] = []
    monkeypatch.setattr(drawing, "Figure", lambda **kwargs: found.append(Figure(**kwargs)) or found[-1])
    return found


def test_the_script_compares_seeds_and_draws_the_cosines(settings: Settings, figures, capsys) -> None:
    for seed in (49, 50, 51):
        save(settings, seed, shared=10)
    main("seed_stability", ["--device", "cpu"])
    printed = capsys.readouterr().out
    assert "stability of seed 49 over 50, 51: median cosine" in printed
    found, path = read_stability(settings, RUN), Artifacts(settings).seed_stability_figure(RUN)
    assert found is not None
    assert f"figure: {path}" in printed
    (axes,) = figures[0].axes
    assert axes.get_title() == "mine, enc: seed 49 against 50, 51"
    assert axes.get_xlabel() == "cosine of a latent and its match in another seed"
    assert axes.get_ylabel() == "share of latents, %"
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == [
        f"SAEs, median {found.centred.trained.median:.2f}",
        f"random directions, median {found.centred.random.median:.2f}",
    ]
    drawn = [patch.get_data() for patch in axes.patches]
    cosines = np.concatenate([matches.cosine for matches in found.matches.values()])
    for data, counts in ((drawn[0], np.histogram(cosines, BINS)[0]), (drawn[2], found.random_counts)):
        assert data.edges == pytest.approx(BINS)
        assert data.values == pytest.approx(100 * counts / 80)
    with Image.open(path) as image:
        assert image.width > 500

    first = path.read_bytes()
    main("seed_stability", ["--device", "cpu"])
    assert len(figures) == 1  # neither measured nor drawn again
    path.unlink()
    main("seed_stability", ["--device", "cpu"])
    assert len(figures) == 2
    assert path.read_bytes() == first


def test_other_seeds_replace_a_result_only_if_that_is_asked_for(settings: Settings, figures, capsys) -> None:
    for seed in (49, 50, 51):
        save(settings, seed, shared=10)
    main("seed_stability", ["--seeds", "49,50,51", "--device", "cpu"])
    with pytest.raises(SystemExit) as refused:
        main("seed_stability", ["--seeds", "49,50", "--device", "cpu"])
    assert str(refused.value).startswith("error: ")
    assert "--overwrite" in str(refused.value)
    main("seed_stability", ["--seeds", "50", "--overwrite", "--device", "cpu"])
    assert figures[-1].axes[0].get_title() == "mine, enc: seed 49 against 50"
    main("seed_stability", ["--seed", "50", "--device", "cpu"])  # of another SAE
    assert figures[-1].axes[0].get_title() == "mine, enc: seed 50 against 49, 51"
    assert "already done" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seeds", "49,52"], "the SAE of seed 52 is missing: run `python scripts/02_train_sae_img.py --seed 52`"),
        (["--seed", "53"], "there is no SAE"),
        (["--device", "cuda:99"], "--device cuda:99"),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_line(settings: Settings, flags: list[str], said: str) -> None:
    for seed in (49, 50):
        save(settings, seed, shared=10)
    with pytest.raises(SystemExit) as refused:
        main("seed_stability", flags)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not Artifacts(settings).seed_stability(RUN).exists()


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_a_title(tmp_path: Path, figures, name: str) -> None:
    counts = np.ones(len(BINS) - 1, dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing.stability_histogram(counts, 0 * counts, (0.5, 0.25), f"mine, {name}: seed 49", tmp_path / "figure.png")
    (axes,) = figures[0].axes
    with quiet():
        box = axes.title.get_window_extent()
    with Image.open(tmp_path / "figure.png") as image:
        assert 0 <= box.x0 < box.x1 <= image.width
    assert axes.get_title().startswith("mine,")
