"""How steps on a GPU are chosen, checked and given up, with stand-ins for graphs and kernels: the logic needs no GPU."""

import copy
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sparse_autoencoder import SparseAutoencoder
from sparse_autoencoder.cuda_stepper import DENSE_ONLY, CudaStepper
from sparse_autoencoder.optimizer import Adam
from sparse_autoencoder.sparse_step import SparseStep
from sparse_autoencoder.steps import StepResult, dense_step
from sparse_autoencoder.variants import BatchTopK, JumpReLU, Matryoshka, ReLU, Sparsity, TopK

BATCH = 20


class Graph:
    """Stands in for GraphedStep: steps on buffers of its own, as a replay does."""

    made = 0

    def __init__(self, step: Callable, x: Tensor, dead: Tensor | None, changed: object) -> None:
        Graph.made += 1
        self.step, self.x, self.dead = step, x.clone(), None if dead is None else dead.clone()
        self.result: StepResult | None = None

    def __call__(self, x: Tensor, dead: Tensor | None) -> StepResult:
        self.x.copy_(x)
        if self.dead is not None and dead is not None:
            self.dead.copy_(dead)
        found = self.step(self.x, self.dead)
        if self.result is None:
            self.result = found
        for name in vars(found):
            getattr(self.result, name).copy_(getattr(found, name))
        return self.result


class NoGraph:
    """A graph that cannot be captured."""

    def __init__(self, *_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")


class Kernels:
    """Stands in for GpuStep, by the CPU's sparse step; `fault` spoils it."""

    fault = ""

    def __init__(self, model: SparseAutoencoder, adam: Adam, max_batch: int, *, precision: str) -> None:
        if self.fault == "no compiler":
            raise ImportError("No module named 'triton'")
        self.adam, self.step = adam, SparseStep(model, adam)

    def set_rates(self, rates: tuple) -> None:
        self.rates = rates

    def __call__(self, x: Tensor) -> StepResult:
        steps, lr = self.adam.steps, self.adam.lr
        if self.fault == "raises":
            raise RuntimeError("out of resource: shared memory")
        if self.fault == "wrong rate":
            self.adam.lr *= 2
        result = self.step(x * 1.01 if self.fault == "wrong input" else x)
        self.adam.steps, self.adam.lr = steps, lr  # the stepper counts
        return result


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    Graph.made = 0
    monkeypatch.setattr("sparse_autoencoder.cuda_stepper.GraphedStep", Graph)
    monkeypatch.setattr(Kernels, "fault", "")
    stand_in = SimpleNamespace(GpuStep=Kernels, supports=lambda model: not isinstance(model.sparsity, Matryoshka))
    monkeypatch.setitem(sys.modules, "sparse_autoencoder.gpu_step", stand_in)


def model_of(sparsity: Sparsity) -> SparseAutoencoder:
    model = SparseAutoencoder(12, 60, sparsity=sparsity)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.encoder_weight.normal_(generator=generator).div_(12**0.5)
        model.encoder_bias.fill_(-0.8)
    return model


def stepper_of(model: SparseAutoencoder, adam: Adam, **options: object) -> CudaStepper:
    return CudaStepper(model, adam, **{"batch_size": BATCH, "precision": "highest", **options})


BATCHES = torch.randn(4, BATCH, 12, generator=torch.Generator().manual_seed(1))
ROWS = (BATCH, BATCH, 7, BATCH)  # the third batch is short


def trained(sparsity: Sparsity, *, sparse: bool) -> tuple[dict[str, Tensor], list[float], list[bool]]:
    """Parameters and moments after four steps, the loss of each, and which were sparse."""
    model = model_of(sparsity)
    adam = Adam(model, lr=1e-2)
    stepper = stepper_of(model, adam)
    made = []
    for n, batch in zip(ROWS, BATCHES, strict=True):
        adam.lr /= 1.5  # a schedule
        result, was_sparse = stepper(batch[:n], None, sparse=sparse and stepper.can_be_sparse)
        made.append((result, was_sparse))
    assert adam.steps == 4
    return {**model.state_dict(), **adam.moments}, [float(r.loss) for r, _ in made], [w for _, w in made]


def by_dense_steps(sparsity: Sparsity) -> tuple[dict[str, Tensor], list[float]]:
    model = model_of(sparsity)
    adam = Adam(model, lr=1e-2)
    losses = []
    for n, batch in zip(ROWS, BATCHES, strict=True):
        adam.lr /= 1.5
        losses.append(float(dense_step(model, adam, batch[:n]).loss))
    return {**model.state_dict(), **adam.moments}, losses


@pytest.mark.parametrize("sparsity", [ReLU(0.01), TopK(4), BatchTopK(4), JumpReLU(1e-3, bandwidth=0.3)], ids=lambda s: s.kind)
@pytest.mark.parametrize("sparse", [False, True])
def test_steps_are_those_of_autograd(sparsity: Sparsity, sparse: bool, caplog: pytest.LogCaptureFixture) -> None:
    found, losses, was_sparse = trained(sparsity, sparse=sparse)
    wanted, wanted_losses = by_dense_steps(sparsity)
    assert was_sparse == [sparse] * 4
    assert losses == pytest.approx(wanted_losses, rel=1e-5)  # each step's own, though a replay overwrites the last one's
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5 * float(tensor.abs().max()), msg=name)
    assert Graph.made == 1
    assert not caplog.records


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no compiler", "No module named 'triton'"),
        ("raises", "out of resource: shared memory"),
        ("wrong rate", "differs from a dense step's"),
        ("wrong input", "differs from a dense step's"),
    ],
)
def test_faulty_kernels_cost_nothing(
    fault: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Kernels, "fault", fault)
    found, losses, was_sparse = trained(ReLU(0.01), sparse=True)
    wanted, wanted_losses = by_dense_steps(ReLU(0.01))
    assert was_sparse == [False] * 4
    assert losses == wanted_losses
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    (record,) = caplog.records
    assert said in record.message
    assert "stay dense" in record.message


def test_without_graphs_steps_are_launched_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sparse_autoencoder.cuda_stepper.GraphedStep", NoGraph)
    found, losses, _ = trained(ReLU(0.01), sparse=False)
    wanted, wanted_losses = by_dense_steps(ReLU(0.01))
    assert losses == wanted_losses
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    (record,) = caplog.records
    assert record.message.endswith("a CUDA graph failed: operation not permitted when stream is capturing")


@pytest.mark.parametrize("sparse", [False, True])
def test_a_resumed_run_keeps_its_number_of_steps(sparse: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Adam's bias correction depends on it, and the device keeps its own."""
    model = model_of(ReLU(0.01))
    adam = Adam(model, lr=1e-2)
    adam.steps = 300
    stepper = stepper_of(model, adam)
    for batch in BATCHES:
        stepper(batch, None, sparse=sparse)
    stepper(BATCHES[0], None, sparse=False)
    assert adam.steps == 305
    assert {int(count) for count in adam.counts.values()} == {305}
    assert not caplog.records


class SecondGraphFails(Graph):
    """Fails halfway through a step, as a capture may that runs out of memory."""

    def __init__(self, step: Callable, x: Tensor, dead: Tensor | None, changed: object) -> None:
        if Graph.made == 1:
            for parameter in step.__self__.model.parameters():  # type: ignore[attr-defined]
                parameter.grad = torch.ones_like(parameter)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        super().__init__(step, x, dead, changed)


def test_a_step_that_failed_halfway_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sparse_autoencoder.cuda_stepper.GraphedStep", SecondGraphFails)
    model = model_of(TopK(4, aux_k=3))
    twin = copy.deepcopy(model)
    adam, twins = Adam(model, lr=1e-2), Adam(twin, lr=1e-2)
    stepper = stepper_of(model, adam)
    for batch, dead in zip(BATCHES, (None, torch.arange(60) < 5) * 2, strict=True):
        stepper(batch, dead, sparse=False)
        dense_step(twin, twins, batch, dead)
    assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert [record.message.split(",")[0] for record in caplog.records] == ["dense steps are launched one by one"]


def test_without_memory_for_the_comparison_steps_are_dense(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class NoMemory:
        def __init__(self, _: object) -> None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("sparse_autoencoder.cuda_stepper.restored", NoMemory)
    found, losses, was_sparse = trained(ReLU(0.01), sparse=True)
    wanted, wanted_losses = by_dense_steps(ReLU(0.01))
    assert (losses, was_sparse) == (wanted_losses, [False] * 4)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert len(caplog.records) == 2


def test_dead_latents_are_revived_by_dense_steps() -> None:
    model = model_of(TopK(4, aux_k=3))
    twin = copy.deepcopy(model)
    adam, twins = Adam(model, lr=1e-2), Adam(twin, lr=1e-2)
    stepper = stepper_of(model, adam)
    for batch, n_dead in zip(BATCHES, (0, 2, 9, 0), strict=True):
        dead = torch.arange(60) < n_dead
        stepper(batch, dead, sparse=False)
        dense_step(twin, twins, batch, dead)
    assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_which_models_are_never_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    def can_be_sparse(sparsity: Sparsity) -> bool:
        model = model_of(sparsity)
        return stepper_of(model, Adam(model, lr=1e-2)).can_be_sparse

    assert can_be_sparse(ReLU())
    assert not can_be_sparse(Matryoshka(TopK(4)))
    monkeypatch.setenv(DENSE_ONLY, "1")
    assert not can_be_sparse(ReLU())
    monkeypatch.delenv(DENSE_ONLY)
    monkeypatch.setitem(sys.modules, "sparse_autoencoder.gpu_step", None)  # no Triton
    assert not can_be_sparse(ReLU())
