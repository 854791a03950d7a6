"""Comparison of the sparse step with autograd on the dense code, over shapes, densities and variants."""

import copy
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_autoencoder import BatchTopK, JumpReLU, Matryoshka, ReLU, SparseAutoencoder, Sparsity, TopK, kernels
from sparse_autoencoder import sparse_step as module
from sparse_autoencoder.losses import code_losses
from sparse_autoencoder.optimizer import Adam
from sparse_autoencoder.sparse_step import SparseStep
from sparse_autoencoder.steps import StepResult, dense_step
from sparse_autoencoder.workers import Workers

MARGIN = 2e-6
"""Minimum distance of a pre-activation from a threshold, because the two computations round differently."""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes pieces so small that a batch has several, with a short last one."""
    monkeypatch.setattr(module, "PRE_ACTIVATIONS", 1)
    monkeypatch.setattr(module, "FEWEST_ITEMS", 7)
    monkeypatch.setattr(module, "LARGE", 1)
    monkeypatch.setattr(module, "LATENTS", 5)


def gap(values: Tensor, k: int) -> float:
    """The smallest distance, over the rows, between the k-th largest positive value and the next."""
    ranked = torch.relu(values).sort(dim=-1, descending=True).values
    if k >= ranked.shape[-1]:
        return 1.0
    edge = ranked[..., k - 1] - ranked[..., k]
    return float(torch.where(ranked[..., k] > 0, edge, 1.0).min())


def is_clear(model: SparseAutoencoder, x: Tensor, dead: Tensor) -> bool:
    """Whether every pre-activation is at least MARGIN away from a threshold."""
    code = model.sparsity.code
    with torch.no_grad():
        pre = model.pre_activations(x)
        scale = MARGIN * max(1.0, float(pre.abs().max()))
        switches = [pre.abs().min()]
        if isinstance(code, TopK):
            switches.append(torch.tensor(gap(pre, code.k)))
        if isinstance(code, BatchTopK):
            switches.append(torch.tensor(gap(pre.flatten(), code.k * len(x))))
        if isinstance(code, TopK | BatchTopK) and dead.any():
            switches.append(torch.tensor(gap(pre[:, dead], code.aux_k or model.n_inputs // 2 or 1)))
        if isinstance(code, JumpReLU):
            distance = (pre - model.log_threshold.exp()).abs()
            switches += [distance.min(), (distance - code.bandwidth / 2).abs().min()]
    return min(float(s) for s in switches) > scale


def one_step(model: SparseAutoencoder, x: Tensor, dead: Tensor, *, sparse: bool) -> tuple[dict[str, Tensor], StepResult]:
    """A copy's parameters and Adam moments after a step. The first moment, starting at zero, is a tenth of the gradient."""
    own = copy.deepcopy(model)
    # A large epsilon keeps the update a smooth function of the gradient, so that parameters can be compared too.
    adam = Adam(own, lr=1e-2, epsilon=1e-2, weight_decay=0.01)
    if sparse:
        torch.set_num_threads(2)
        step = SparseStep(own, adam)
        result = step(x, dead)
        step.close()
        torch.set_num_threads(1)
    else:
        result = dense_step(own, adam, x, dead)
    assert adam.steps == 1
    return {**own.state_dict(), **adam.moments}, result


def assert_equal_steps(model: SparseAutoencoder, x: Tensor, dead: Tensor) -> None:
    """Checks the sparse step to 1e-5 against autograd in float64. Where cancellation makes float32 autograd less exact than
    that, the sparse step may be three times as far off."""
    got, result = one_step(model, x, dead, sparse=True)
    float32, _ = one_step(model, x, dead, sparse=False)
    float64, want = one_step(copy.deepcopy(model).double(), x.double(), dead, sparse=False)
    assert torch.equal(result.fired, want.fired)
    rounding = 1e-6 * float(x.square().mean()) + 1e-9  # of a squared error much smaller than the inputs
    for name in ("loss", "l2", "penalty"):
        assert float(getattr(result, name)) == pytest.approx(float(getattr(want, name)), rel=1e-5, abs=rounding)
    # The error of a small sum of large terms is relative to the terms in float32. Examples are the tied bias's gradient with
    # few inputs, and BatchTopK's threshold, which is a pre-activation near 0.
    floor = 0.05 * max(float(float64[name].abs().max()) for name in float64 if name.endswith(".mean"))
    for name, tensor in float64.items():
        if name.endswith(".variance"):
            continue  # the parameter depends on it, and is compared
        least = floor if name.endswith(".mean") else 1.0 if name == "threshold" else 1e-30
        scale = max(float(tensor.abs().max()), least)
        error, dense_error = (float((way[name] - tensor).abs().max()) / scale for way in (got, float32))
        assert error < max(1e-5, 3 * dense_error), name


codes = st.one_of(
    st.builds(ReLU, l1_coeff=st.sampled_from([0.0, 1e-3, 0.3])),
    st.builds(TopK, k=st.integers(1, 40), aux_k=st.sampled_from([None, 1, 3])),
    st.builds(BatchTopK, k=st.integers(1, 40), aux_k=st.sampled_from([None, 1, 3])),
    st.builds(JumpReLU, l0_coeff=st.sampled_from([0.0, 1e-2]), bandwidth=st.sampled_from([0.01, 0.5])),
)
nested = st.builds(
    Matryoshka,
    code=st.one_of(st.builds(TopK, k=st.integers(1, 20)), st.builds(BatchTopK, k=st.integers(1, 20))),
    fractions=st.sampled_from([(1.0,), (0.5, 1.0), (0.01, 0.02, 0.3, 1.0)]),
)


def random_case(
    sparsity: Sparsity, n_inputs: int, n_latents: int, n_items: int, shift: float, n_dead: int, seed: int
) -> tuple[SparseAutoencoder, Tensor, Tensor]:
    """A model, inputs and the mask of dead latents. The shift sets the density, from no active latent (-50) to all (9)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_items, n_inputs, generator=generator)
    model = SparseAutoencoder(n_inputs, n_latents, sparsity=sparsity)
    with torch.no_grad():
        model.encoder_weight.normal_(generator=generator).div_(n_inputs**0.5)
        model.encoder_bias.normal_(mean=shift, std=0.1, generator=generator)
        model.tied_bias.normal_(std=0.1, generator=generator)
        if isinstance(sparsity, JumpReLU):
            model.log_threshold.normal_(mean=-1, generator=generator)
    return model, x, torch.randperm(n_latents, generator=generator) < n_dead


@pytest.mark.parametrize("shift", [-1.0, 0.0])
@pytest.mark.parametrize(
    "sparsity",
    [
        *(ReLU(0.3), TopK(5, aux_k=3), BatchTopK(5, aux_coeff=0.5), JumpReLU(1e-2, bandwidth=0.5)),
        *(Matryoshka(TopK(5)), Matryoshka(BatchTopK(5, aux_coeff=0.5), (0.1, 0.3, 1.0))),
    ],
    ids=str,
)
def test_equal_to_autograd_in_a_usual_case(sparsity: Sparsity, shift: float) -> None:
    cases = (random_case(sparsity, 12, 60, 20, shift, 8, seed) for seed in range(100))
    assert_equal_steps(*next(case for case in cases if is_clear(*case)))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sparsity=codes | nested,
    n_inputs=st.integers(1, 40),
    n_latents=st.integers(1, 150),
    n_items=st.integers(1, 40),
    shift=st.sampled_from([-50.0, -3.0, -2.0, -1.0, 0.0, 1.0, 9.0]),
    n_dead=st.integers(0, 20),
    seed=st.integers(0, 2**16),
)
def test_equal_to_autograd(
    sparsity: Sparsity, n_inputs: int, n_latents: int, n_items: int, shift: float, n_dead: int, seed: int
) -> None:
    case = random_case(sparsity, n_inputs, n_latents, n_items, shift, n_dead, seed)
    assume(is_clear(*case))
    assert_equal_steps(*case)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sparsity=codes | nested,
    n_items=st.integers(1, 40),
    shift=st.sampled_from([-50.0, -2.0, 0.0, 2.0]),
    seed=st.integers(0, 2**16),
)
def test_losses_without_a_step(sparsity: Sparsity, n_items: int, shift: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_items, 10, generator=generator)
    model = SparseAutoencoder(10, 50, sparsity=sparsity)
    with torch.no_grad():
        model.encoder_bias.normal_(mean=shift, std=0.1, generator=generator)
        model.tied_bias.normal_(std=0.1, generator=generator)
    if isinstance(sparsity.code, BatchTopK):
        model.threshold.fill_(0.4)
        assume((model.pre_activations(x) - 0.4).abs().min() > MARGIN * 60)
    assume(is_clear(model, x, torch.zeros(model.n_latents, dtype=torch.bool)))
    step = SparseStep(model, Adam(model, lr=5e-4))
    got, want = step.losses(x), code_losses(model, x)
    step.close()
    assert torch.equal(got.fired, want.fired)
    torch.testing.assert_close(got.l2, want.l2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.penalty, want.penalty, rtol=1e-5, atol=1e-6)


def test_items_without_any_active_latent(features: Tensor) -> None:
    model = SparseAutoencoder(12, 30, sparsity=ReLU(0.01))
    with torch.no_grad():
        model.encoder_bias.fill_(-0.3)
        model.encoder_weight.mul_(10)
    x = features[:50].clone()
    x[::2] = 0
    latents = model.encode(x)
    assert (latents == 0).all(dim=1).any()
    assert (latents > 0).any()
    assert_equal_steps(model, x, torch.zeros(model.n_latents, dtype=torch.bool))


@pytest.mark.parametrize("n_threads", [2, 3])
@pytest.mark.parametrize(
    "sparsity", [ReLU(1e-3), TopK(4), BatchTopK(4), JumpReLU(1e-3, bandwidth=0.3), Matryoshka(BatchTopK(4))]
)
def test_bits_do_not_depend_on_the_number_of_threads(features: Tensor, sparsity: Sparsity, n_threads: int) -> None:
    def trained() -> dict[str, Tensor]:
        model = SparseAutoencoder(12, 60, sparsity=sparsity)
        adam = Adam(model, lr=1e-2)
        step = SparseStep(model, adam)
        for start in range(0, 600, 100):
            step(features[start : start + 100], torch.arange(3))
        step.close()
        return model.state_dict() | adam.moments

    expected = trained()
    try:
        torch.set_num_threads(n_threads)
        got = trained()
        assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(1)
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name


@pytest.mark.parametrize("has_onednn", [module.HAS_ONEDNN, False])
def test_encoder_product(has_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HAS_ONEDNN", has_onednn)
    x, weight = (torch.randn(n, 33, generator=torch.Generator().manual_seed(n)) for n in (50, 70))
    product = module.encoder_product(x[7:21], weight)
    torch.testing.assert_close(product, (x[7:21].double() @ weight.double().t()).float(), rtol=1e-5, atol=1e-5)


def test_each_worker_uses_one_core() -> None:
    """Also after torch's first operation in each thread, where torch sets the thread's number of cores itself."""
    torch.set_num_threads(2)
    try:
        workers = Workers(2)
        barrier = threading.Barrier(2)  # so that both threads take part

        def cores(_: int) -> int:
            barrier.wait(timeout=60)
            torch.ones(2**17).sum()
            return torch.get_num_threads()

        assert workers.map(cores, range(4)) == [1] * 4
        assert torch.get_num_threads() == 2
        workers.close()
    finally:
        torch.set_num_threads(1)


def test_batchtopk_when_the_threshold_is_far_too_high(features: Tensor) -> None:
    """The level below which entries are skipped is a guess; a wrong guess must not change the result."""
    model = SparseAutoencoder(12, 60, sparsity=BatchTopK(5))
    model.threshold.fill_(1e6)
    x = features[:40]
    assert is_clear(model, x, torch.zeros(model.n_latents, dtype=torch.bool))
    assert_equal_steps(model, x, torch.zeros(model.n_latents, dtype=torch.bool))


def test_batchtopk_with_equal_values_at_the_edge() -> None:
    """Two equal items hold the four largest values in pairs; three values are kept."""
    model = SparseAutoencoder(3, 6, sparsity=BatchTopK(1))
    with torch.no_grad():
        model.encoder_weight.abs_()
    x = torch.tensor([[2.0, 3, 4], [2, 3, 4], [0.1, 0, 0]])
    step = SparseStep(model, Adam(model, lr=5e-4))
    result = step(x)
    step.close()
    assert sorted(result.fired.tolist()) == [0, 0, 0, 0, 1, 2]


@pytest.mark.parametrize("sparsity", [ReLU(), TopK(3), BatchTopK(3), JumpReLU()])
def test_nan_reaches_the_loss(features: Tensor, sparsity: Sparsity) -> None:
    model = SparseAutoencoder(12, 30, sparsity=sparsity)
    with torch.no_grad():
        model.encoder_weight[11, 3] = float("nan")
    step = SparseStep(model, Adam(model, lr=5e-4))
    result = step(features[:20])
    step.close()
    assert torch.isnan(result.loss)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.lists(st.integers(-3, 9), min_size=1, max_size=300), min_size=1, max_size=4), k=st.integers(1, 60))
def test_largest_with_ties(values: list[list[int]], k: int) -> None:
    """Exactly the k largest positive values are selected; of equal ones at the edge, the first."""
    width = min(map(len, values))
    pre = np.array([row[:width] for row in values], np.float32)
    latent, value = np.empty(pre.shape, np.int32), np.empty(pre.shape, np.float32)
    row_start = np.empty(len(pre) + 1, np.int64)
    kernels.select_largest(pre, np.zeros(width, np.float32), k, latent, value, row_start)
    for i, row in enumerate(pre):
        order = [f for f in sorted(range(width), key=lambda f: (-row[f], f)) if row[f] > 0][:k]
        count = row_start[i + 1] - row_start[i]
        assert latent[i, :count].tolist() == sorted(order)
        assert value[i, :count].tolist() == [row[f] for f in sorted(order)]
