"""The variants' dense codes and losses compared with their formulas, and a variant defined outside the package."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sparse_autoencoder import (
    VARIANTS,
    BatchTopK,
    JumpReLU,
    Matryoshka,
    ReLU,
    SparseAutoencoder,
    Sparsity,
    TopK,
    TrainingSettings,
    evaluate,
    load_checkpoint,
    save_checkpoint,
    train,
)
from sparse_autoencoder.data import epoch_order
from sparse_autoencoder.declare import build, choice, flags, setting, values
from sparse_autoencoder.losses import item_losses
from sparse_autoencoder.optimizer import Adam
from sparse_autoencoder.stepper import SPARSE_BELOW
from sparse_autoencoder.steps import dense_step
from sparse_autoencoder.variants import sparsity_from_json, sparsity_to_json

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
    code = BatchTopK(2)
    model = SparseAutoencoder(2, 4, sparsity=code)
    for latents, expected in [
        (torch.zeros(3, 4), 0),  # nothing was active
        (torch.empty(0), 0),
        (torch.tensor([[0.0, 2, 5]]), 2),
        (torch.tensor([4.0, 7]), 0.99 * 2 + 0.01 * 4),
    ]:
        code.after_batch(model, latents)
        assert_close(model.threshold, torch.tensor(float(expected)))


def test_jumprelu_pseudo_derivatives(pre: Tensor) -> None:
    """Compares with equations 11 and 12 of the paper, entry by entry, with a rectangular kernel."""
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
    dead = torch.zeros(12, dtype=torch.bool)
    dead[[1, 4, 7, 9]] = True
    losses = item_losses(model, x, training=True, dead=dead)
    pre = ((x - model.tied_bias) @ model.encoder_weight.t() + model.encoder_bias).detach()
    reconstruction = model.sparsity.activate(pre) @ model.decoder_weight + model.tied_bias
    for i in range(7):
        best = sorted(dead.nonzero().flatten().tolist(), key=lambda f: -float(pre[i, f]))[:2]
        left = sum(max(float(pre[i, f]), 0) * model.decoder_weight[f] for f in best)
        auxiliary = ((left - (x[i] - reconstruction[i])) ** 2).mean()
        assert_close(losses.objective[i], losses.l2[i] + 0.25 * auxiliary)
    assert torch.equal(item_losses(model, x, dead=dead).objective, losses.l2)  # AuxK's loss is for training only


def test_auxiliary_loss_leaves_the_code_alone() -> None:
    """The residual is a fixed target, so only dead latents learn from the auxiliary loss."""
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    gradients = []
    alive = torch.tensor([f not in (3, 4) for f in range(12)])
    for dead in (~alive, torch.zeros(12, dtype=torch.bool)):
        model = randomised(TopK(2))
        with torch.no_grad():
            model.encoder_bias[3:5] = -1
        item_losses(model, x, training=True, dead=dead).objective.sum().backward()
        gradients.append(model.decoder_weight.grad)
    assert torch.equal(gradients[0][alive], gradients[1][alive])
    assert not torch.equal(gradients[0][~alive], gradients[1][~alive])


@pytest.mark.parametrize(
    ("fractions", "n_latents", "ends"),
    [
        ((0.001, 0.002, 0.5, 1.0), 10, (1, 5, 10)),  # at least one latent, no prefix twice
        ((0.17, 0.24, 1.0), 10, (2, 10)),  # to the nearest
        ((1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0), 60, (4, 8, 15, 30, 60)),
    ],
)
def test_prefixes(fractions: tuple[float, ...], n_latents: int, ends: tuple[int, ...]) -> None:
    assert Matryoshka(TopK(1), fractions).prefix_ends(n_latents) == ends
    assert TopK(1).prefix_ends(n_latents) == (n_latents,)


@pytest.mark.parametrize(
    ("sparsity", "dead", "expected"),
    [
        (ReLU(), 5, 0),
        (TopK(1, aux_coeff=0), 5, 0),
        (TopK(1), 0, 0),
        (TopK(1), 3, 3),
        (TopK(1), 50, 4),  # half the inputs
        (Matryoshka(BatchTopK(1, aux_k=9)), 50, 9),
    ],
    ids=str,
)
def test_size_of_the_auxiliary_code(sparsity: Sparsity, dead: int, expected: int) -> None:
    assert sparsity.code.n_auxiliary(8, dead) == expected


def test_auxiliary_loss_with_one_input_uses_one_latent() -> None:
    assert TopK(1).n_auxiliary(1, 5) == 1


@pytest.mark.parametrize("code", [TopK(3, dead_after=500), BatchTopK(3, dead_after=500)])
def test_latents_are_dead_once_inactive_for_dead_after_items(code: TopK | BatchTopK) -> None:
    assert code.dead(torch.tensor([0, 499, 500, 501]), 501).tolist() == [False, False, True, True]
    assert code.dead(torch.tensor([0, 499, 400, 301]), 499) is None  # known without a look at the latents
    assert ReLU().dead(torch.tensor([0, 10**9]), 10**9) is None


@pytest.mark.parametrize("sparsity", [TopK(13), BatchTopK(13), Matryoshka(BatchTopK(13))], ids=str)
def test_k_must_not_exceed_the_number_of_latents(sparsity: Sparsity) -> None:
    with pytest.raises(ValueError, match="--k 13 asks for more active latents than the SAE has: 12"):
        sparsity.check_latents(12)
    sparsity.check_latents(13)
    ReLU().check_latents(1)


@pytest.mark.parametrize(
    ("sparsity", "name", "json"),
    [
        (ReLU(3e-5), "l1coeff3e-05", '{"kind": "relu", "l1_coeff": 3e-05}'),
        (TopK(5), "topk5", '{"kind": "topk", "k": 5, "aux_coeff": 0.03125, "aux_k": null, "dead_after": 10000000}'),
        (BatchTopK(5, aux_k=2), "batchtopk5", '{"kind": "batchtopk", "k": 5, "aux_coeff": 0.03125, "aux_k": 2, '),
        (
            JumpReLU(0.5),
            "jumprelu0.5",
            '{"kind": "jumprelu", "l0_coeff": 0.5, "bandwidth": 0.001, "initial_threshold": 0.001}',
        ),
        (Matryoshka(TopK(5), (0.5, 1.0)), "matryoshka_topk5", '{"kind": "matryoshka", "code": {"kind": "topk", "k": 5, '),
    ],
    ids=str,
)
def test_names_and_json_match_those_of_old_runs(sparsity: Sparsity, name: str, json: str) -> None:
    assert sparsity.name_part == name
    assert sparsity_to_json(sparsity).startswith(json)


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
    """Only ReLU uses DN-CBM's initialisation; the other encoders start equal to the decoder."""
    model = SparseAutoencoder(5, 12, sparsity=sparsity)
    assert torch.equal(model.encoder_weight, model.decoder_weight) == (not isinstance(sparsity, ReLU))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: ReLU(-1.0), "l1_coeff"),
        (lambda: ReLU(float("nan")), "l1_coeff"),
        (lambda: TopK(0), "TopK: k"),
        (lambda: TopK(1, aux_coeff=-1), "aux_coeff"),
        (lambda: JumpReLU(-1), "l0_coeff"),
        (lambda: JumpReLU(initial_threshold=0), "initial_threshold"),
        (lambda: Matryoshka(TopK(1), (0.0, 1.0)), "rise"),
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


@dataclass(frozen=True)
class SquaredReLU(ReLU):
    """A sixth variant: ReLU with an L2 penalty on the latents. ReLU's kernels would compute an L1 penalty."""

    kind: ClassVar[str] = "squared"
    l2_coeff: float = setting(0.1, "weight of the L2 loss on latents", least=0)

    def penalty(self, pre: Tensor, latents: Tensor, threshold: Tensor | None = None) -> Tensor:
        return self.l2_coeff * latents.square().sum(dim=1)


@pytest.fixture
def sixth(monkeypatch: pytest.MonkeyPatch) -> SquaredReLU:
    monkeypatch.setitem(VARIANTS, "squared", SquaredReLU)
    return SquaredReLU(l2_coeff=0.5)


def test_a_variant_without_kernels_takes_dense_steps(sixth: SquaredReLU, features: Tensor) -> None:
    """It does so even when the code is sparse, and evaluation uses its own penalty."""
    settings = TrainingSettings(epochs=10, batch_size=100, lr=1e-2, resample_freq=0, log_every=1)
    model = SparseAutoencoder(12, 40, sparsity=sixth)
    with torch.no_grad():
        model.encoder_bias.sub_(0.1)
    by_hand = copy.deepcopy(model)
    adam = Adam(by_hand, lr=settings.lr)
    rows: list[dict[str, float]] = []
    result = train(model, features, settings, log=lambda row, _: rows.append(row), progress=False)
    steps = []
    for epoch in range(settings.epochs):
        order = torch.from_numpy(epoch_order(len(features), settings.seed, epoch))
        steps += [dense_step(by_hand, adam, features[indices]) for indices in order.split(settings.batch_size)]
    assert [row["loss"] for row in rows] == [float(step.loss) for step in steps]
    assert [row["l1_loss"] for row in rows] == [float(step.penalty) for step in steps]
    assert {row["sparse_step"] for row in rows} == {0}
    assert 0 < rows[-1]["l0"] / 40 < SPARSE_BELOW
    for name, tensor in by_hand.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert result.metrics == evaluate(by_hand, features, batch_size=settings.batch_size)
    penalty = 0.5 * by_hand.encode(features).detach().square().sum(dim=1).mean()
    assert result.metrics["l1_loss"] == pytest.approx(float(penalty), rel=1e-5)
    assert result.metrics["l1_loss"] > 0


def test_a_variant_has_flags_and_checkpoints_of_its_own(tmp_path: Path, sixth: SquaredReLU) -> None:
    @dataclass(frozen=True)
    class Run:
        sparsity: Sparsity = choice(VARIANTS, "relu", "how the code is kept sparse", flag="sae_type")

    assert flags(Run)["sae_type"].setting.choices == ("relu", "topk", "batchtopk", "jumprelu", "matryoshka", "squared")
    assert flags(Run)["l2_coeff"].variants == ("squared",)
    assert flags(Run)["k"].variants == ("topk", "batchtopk", "matryoshka")
    run = build(Run, {"sae_type": "squared", "l2_coeff": 0.5})
    assert run.sparsity == sixth
    assert build(Run, values(run)) == run
    assert build(Run, {"sae_type": "matryoshka", "k": 5}).sparsity == Matryoshka(BatchTopK(5))
    save_checkpoint(SparseAutoencoder(3, 5, sparsity=sixth), tmp_path / "sae.safetensors")
    assert load_checkpoint(tmp_path / "sae.safetensors").sparsity == sixth
