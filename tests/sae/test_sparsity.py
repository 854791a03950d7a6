"""The variants' dense codes and losses against their formulas, written out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sparse_autoencoder import (
    BatchTopK,
    JumpReLU,
    Matryoshka,
    ReLU,
    SparseAutoencoder,
    Sparsity,
    TopK,
    load_checkpoint,
    save_checkpoint,
)
from sparse_autoencoder.losses import item_losses
from sparse_autoencoder.sparsity import n_auxiliary, prefix_ends, sparsity_from_json, sparsity_to_json

ALL = [
    ReLU(0.1),
    TopK(3, aux_k=2),
    BatchTopK(4, aux_coeff=0.5, dead_after=7),
    JumpReLU(0.2, 0.3, 0.4),
    Matryoshka(TopK(2), (0.25, 1.0)),
    Matryoshka(BatchTopK(2)),
]


@pytest.fixture
def pre() -> Tensor:
    return torch.randn(6, 9, generator=torch.Generator().manual_seed(5))


def randomised(sparsity: Sparsity, n_inputs: int = 5, n_latents: int = 12) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(2)
    model = SparseAutoencoder(n_inputs, n_latents, sparsity=sparsity)
    with torch.no_grad():
        for name in ("encoder_weight", "encoder_bias", "tied_bias"):
            getattr(model, name).normal_(generator=generator)
    return model


def test_topk(pre: Tensor) -> None:
    got = TopK(3).activate(pre).numpy()
    for row, z in zip(pre.numpy(), got, strict=True):
        largest = sorted(row, reverse=True)[:3]
        assert z.tolist() == [v if v in largest and v > 0 else 0 for v in row]
    assert torch.equal(TopK(50).activate(pre), pre.relu())


def test_batchtopk_training(pre: Tensor) -> None:
    got = BatchTopK(2).activate(pre, training=True)
    largest = sorted(pre.flatten().tolist(), reverse=True)[:12]
    assert got.flatten().tolist() == [v if v in largest and v > 0 else 0 for v in pre.flatten().tolist()]
    assert torch.equal(BatchTopK(50).activate(pre, training=True), pre.relu())


def test_batchtopk_outside_training_does_not_depend_on_the_batch(pre: Tensor) -> None:
    code, threshold = BatchTopK(2), torch.tensor(0.5)
    together = code.activate(pre, threshold)
    assert torch.equal(together, torch.where(pre > 0.5, pre, 0))
    assert torch.equal(together[:1], code.activate(pre[:1], threshold))


def test_batchtopk_threshold_is_a_running_mean() -> None:
    code, threshold = BatchTopK(2), torch.zeros(())
    code.update_threshold(threshold, torch.tensor(torch.inf))  # nothing was active
    assert threshold == 0
    code.update_threshold(threshold, torch.tensor(2.0))
    assert threshold == 2
    code.update_threshold(threshold, torch.tensor(4.0))
    assert_close(threshold, torch.tensor(0.99 * 2 + 0.01 * 4))


def test_jumprelu_pseudo_derivatives(pre: Tensor) -> None:
    """Equations 11 and 12 of the paper, entry by entry, with a rectangle for the kernel."""
    code = JumpReLU(l0_coeff=0.7, bandwidth=0.8)
    threshold = torch.linspace(0.1, 1.2, 9).requires_grad_()
    inputs = pre.clone().requires_grad_()
    weight = torch.randn(pre.shape, generator=torch.Generator().manual_seed(1))
    latents = code.activate(inputs, threshold)
    penalty = code.penalty(inputs, latents, threshold)
    ((latents * weight).sum() + penalty.sum()).backward()
    by_pre, by_threshold = np.zeros(pre.shape), np.zeros(9)
    for i in range(6):
        for f in range(9):
            p, t, w = float(pre[i, f]), float(threshold[f].detach()), float(weight[i, f])
            assert float(latents[i, f].detach()) == (p if p > t else 0)
            by_pre[i, f] = w if p > t else 0
            if abs(p - t) / 0.8 < 0.5:
                by_threshold[f] += w * (-t / 0.8) + 0.7 * (-1 / 0.8)
    assert_close(penalty, 0.7 * (pre > threshold.detach()).sum(dim=1).float())
    assert_close(inputs.grad, torch.tensor(by_pre, dtype=torch.float32))
    assert_close(threshold.grad, torch.tensor(by_threshold, dtype=torch.float32))


@pytest.mark.parametrize("code", [TopK(3), BatchTopK(3)])
def test_matryoshka_sums_over_prefixes(code: TopK | BatchTopK) -> None:
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    model = randomised(Matryoshka(code, (0.25, 0.5, 1.0)))
    losses = item_losses(model, x, training=True)
    z = code.activate(model.pre_activations(x), training=True)
    expected = torch.zeros(7)
    for end in (3, 6, 12):
        expected += ((z[:, :end] @ model.decoder_weight[:end] + model.tied_bias - x) ** 2).mean(dim=1)
    assert_close(losses.objective, expected)
    assert_close(losses.l2, ((z @ model.decoder_weight + model.tied_bias - x) ** 2).mean(dim=1))


def test_auxiliary_loss() -> None:
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    model = randomised(TopK(2, aux_coeff=0.25, aux_k=2))
    dead = torch.tensor([1, 4, 7, 9])
    losses = item_losses(model, x, training=True, dead=dead)
    pre = ((x - model.tied_bias) @ model.encoder_weight.t() + model.encoder_bias).detach()
    reconstruction = model.sparsity.activate(pre) @ model.decoder_weight + model.tied_bias
    for i in range(7):
        best = sorted(dead.tolist(), key=lambda f: -float(pre[i, f]))[:2]
        left = sum(max(float(pre[i, f]), 0) * model.decoder_weight[f] for f in best)
        auxiliary = ((left - (x[i] - reconstruction[i])) ** 2).mean()
        assert_close(losses.objective[i], losses.l2[i] + 0.25 * auxiliary)
    assert torch.equal(item_losses(model, x, dead=dead).objective, losses.l2)  # in training only


def test_auxiliary_loss_leaves_the_code_alone() -> None:
    """What the code left over is a fixed target: only dead latents learn from the auxiliary loss."""
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    gradients = []
    for dead in (torch.tensor([3, 4]), torch.tensor([], dtype=torch.int64)):
        model = randomised(TopK(2))
        with torch.no_grad():
            model.encoder_bias[3:5] = -1
        item_losses(model, x, training=True, dead=dead).objective.sum().backward()
        gradients.append(model.decoder_weight.grad)
    alive = torch.tensor([f not in (3, 4) for f in range(12)])
    assert torch.equal(gradients[0][alive], gradients[1][alive])
    assert not torch.equal(gradients[0][~alive], gradients[1][~alive])


def test_sizes() -> None:
    assert prefix_ends(ReLU(), 10) == (10,)
    assert prefix_ends(Matryoshka(TopK(1), (0.001, 0.002, 0.5, 1.0)), 10) == (1, 5, 10)
    assert n_auxiliary(ReLU(), 8, 5) == n_auxiliary(TopK(1, aux_coeff=0), 8, 5) == 0
    assert [n_auxiliary(TopK(1), 8, dead) for dead in (0, 3, 50)] == [0, 3, 4]
    assert n_auxiliary(Matryoshka(BatchTopK(1, aux_k=9)), 8, 50) == 9


@pytest.mark.parametrize("sparsity", ALL, ids=str)
def test_json_and_checkpoint(tmp_path: Path, sparsity: Sparsity) -> None:
    assert sparsity_from_json(sparsity_to_json(sparsity)) == sparsity
    model = randomised(sparsity)
    for name, tensor in model.state_dict().items():
        if name.endswith("threshold"):
            tensor.fill_(0.3)
    save_checkpoint(model, tmp_path / "sae.safetensors")
    again = load_checkpoint(tmp_path / "sae.safetensors")
    assert again.sparsity == sparsity
    x = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.encode(x), model.encode(x))


@pytest.mark.parametrize("sparsity", ALL, ids=str)
def test_start(sparsity: Sparsity) -> None:
    """ReLU starts as DN-CBM does, the others from an encoder equal to the decoder."""
    model = SparseAutoencoder(5, 12, sparsity=sparsity)
    assert torch.equal(model.encoder_weight, model.decoder_weight) == (not isinstance(sparsity, ReLU))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: ReLU(-1.0), "l1_coeff"),
        (lambda: ReLU(float("nan")), "l1_coeff"),
        (lambda: TopK(0), "TopK: k"),
        (lambda: BatchTopK(2.5), "BatchTopK: k"),
        (lambda: TopK(1, aux_k=0), "aux_k"),
        (lambda: TopK(1, dead_after=0), "dead_after"),
        (lambda: JumpReLU(bandwidth=0), "bandwidth"),
        (lambda: Matryoshka(ReLU()), "TopK or a BatchTopK"),
        (lambda: Matryoshka(TopK(1), (0.5, 0.25, 1.0)), "rise"),
        (lambda: Matryoshka(TopK(1), (0.5,)), "rise"),
        (lambda: Matryoshka(TopK(1), ()), "rise"),
    ],
)
def test_wrong_parameters(wrong, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
