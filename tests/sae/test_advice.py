"""Advice on settings and results that make little sense: what passes, and what does not."""

import math

import pytest
from torch import Tensor

from sparse_autoencoder import (
    BatchTopK,
    JumpReLU,
    Matryoshka,
    ReLU,
    SparseAutoencoder,
    Sparsity,
    TopK,
    TrainingSettings,
    train,
)
from sparse_autoencoder.advice import advice_after, advice_before

SENSIBLE = {"epochs": 300, "batch_size": 64, "resample_freq": 10}
LATENTS = 384


def before(sparsity: Sparsity, **changed) -> list[str]:
    shape = {name: changed.pop(name, value) for name, value in (("n_items", 1462), ("n_inputs", 384), ("n_latents", LATENTS))}
    return advice_before(TrainingSettings(**SENSIBLE | changed), sparsity, validates=True, **shape)


@pytest.mark.parametrize(
    ("sparsity", "changed", "said"),
    [
        (ReLU(), {}, ()),
        (TopK(8), {}, ()),
        (Matryoshka(BatchTopK(32)), {"n_latents": 1536, "n_items": 10_000}, ()),
        (ReLU(), {"n_items": 2_800_000, "n_inputs": 1024, "n_latents": 8192, "epochs": 200, "batch_size": 4096}, ()),
        (ReLU(), {"batch_size": 1462}, ("takes all 1462", "training 300", "for example to 64", "--train_sae_bs")),
        (ReLU(), {"n_items": 4, "n_latents": 4}, ("takes all 4", "more items are needed")),
        (ReLU(), {"epochs": 40}, ("only 920 steps", "--num_epochs")),
        (ReLU(), {"n_items": 383}, ("more latents (384) than training items (383)", "--expansion_factor")),
        (ReLU(), {"epochs": 20, "batch_size": 16}, ("never resampled", "--resample_freq 10", "below 10")),
        (ReLU(), {"epochs": 21, "batch_size": 16}, ()),
        (TopK(8), {"epochs": 20, "batch_size": 16}, ()),
        (ReLU(), {"epochs": 20, "batch_size": 16, "resample_freq": 0}, ()),
        (TopK(76), {}, ()),
        (TopK(77), {}, ("--k 77", "lower --k")),
        (Matryoshka(TopK(77)), {}, ("--k 77", "lower --k")),
        (BatchTopK(384), {"n_latents": 3072, "n_items": 3072}, ("--k 384",)),
        (ReLU(), {"val_freq": 300, "ckpt_freq": 438_600}, ()),
        (ReLU(), {"val_freq": 50_000}, ("--val_freq 50000", "every 50000 epochs", "write 50000items")),
        (ReLU(), {"val_freq": "50000items"}, ()),
        (ReLU(), {"val_freq": "500000items"}, ("--val_freq 500000items means every 342 epochs",)),
        (ReLU(), {"ckpt_freq": 438_601}, ("--ckpt_freq 438601", "438600 items")),
        (ReLU(), {"ckpt_freq": "301epochs"}, ("--ckpt_freq 301epochs",)),
        (ReLU(), {"lr_warmup_steps": 6000, "lr_decay_steps": 901}, ("--lr_warmup_steps 6000", "6900 steps")),
    ],
)
def test_settings(sparsity: Sparsity, changed: dict, said: tuple[str, ...]) -> None:
    lines = before(sparsity, **changed)
    assert len(lines) == (1 if said else 0), lines
    for part in said:
        assert part in lines[0]


def metrics(l0: float = 10, explained: float = 0.6, dead: float = 0.1) -> dict[str, float]:
    return {"l0": l0, "explained_variance": explained, "dead_fraction": dead}


@pytest.mark.parametrize(
    ("sparsity", "train", "validation", "said"),
    [
        (ReLU(), metrics(5, 0.78), metrics(13, 0.5), ()),
        (ReLU(), metrics(5, 0.78), None, ()),
        (ReLU(), metrics(10), metrics(77), ("77 of 384", "20%", "validation items", "raise --l1_coeff")),
        (ReLU(), metrics(77), None, ("77 of 384", "training items")),
        (TopK(77), metrics(77), metrics(77), ("lower --k",)),
        (Matryoshka(TopK(77)), metrics(77), metrics(77), ("lower --k",)),
        (JumpReLU(), metrics(77), metrics(77), ("raise --l0_coeff",)),
        (
            ReLU(),
            metrics(dead=0.51),
            metrics(dead=0.1),
            ("51% of the latents are dead", "lower --l1_coeff", "--resample_freq"),
        ),
        (ReLU(), metrics(dead=0.5), metrics(dead=0.9), ()),
        (TopK(8), metrics(dead=0.51), metrics(), ("51%", "raise --k")),
        (ReLU(), metrics(explained=0.3), metrics(explained=0.09), ("explains 0.09", "lower --l1_coeff", "train longer")),
        (ReLU(), metrics(explained=-0.5), metrics(explained=-2), ("explains -2.00",)),
        (ReLU(), metrics(explained=0.95), metrics(explained=0.54), ("0.95", "0.54", "overfits")),
        (ReLU(), metrics(), metrics(explained=math.nan), ("undefined",)),
    ],
)
def test_results(sparsity: Sparsity, train: dict, validation: dict | None, said: tuple[str, ...]) -> None:
    lines = advice_after(sparsity, n_latents=LATENTS, train=train, validation=validation)
    assert len(lines) == (1 if said else 0), lines
    for part in said:
        assert part in lines[0]


def test_a_dense_and_useless_code_is_not_told_to_do_opposite_things() -> None:
    lines = advice_after(ReLU(), n_latents=384, train=metrics(200, 0.0), validation=metrics(200, -0.1))
    assert "raise --l1_coeff" in lines[0]
    assert not any("lower --l1_coeff" in line for line in lines)


@pytest.mark.slow
def test_training_gives_it_at_the_start_and_the_end(features: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    train(SparseAutoencoder(12, 32), features, TrainingSettings(epochs=2, batch_size=600), progress=False)
    assert "takes all 600" in caplog.messages[0]
    assert "no sparse code" in caplog.messages[-2]
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert not any("\n" in message for message in caplog.messages)
