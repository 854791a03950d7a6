"""The sparse step for GPUs against autograd: on a GPU if there is one, otherwise in Triton's interpreter.

The checks run in two processes of their own, since whether Triton interprets or compiles a kernel is settled when it is
imported. `python tests/sae/test_gpu_step.py NAME ...` runs some of them alone (set TRITON_INTERPRET=1 where there is no GPU).

A seed is part of each case: no pre-activation is so close to a threshold that rounding could move it across.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_autoencoder import BatchTopK, JumpReLU, Matryoshka, ReLU, SparseAutoencoder, Sparsity, TopK
from sparse_autoencoder.optimizer import Adam, adam_rates
from sparse_autoencoder.sparse_step import SparseStep
from sparse_autoencoder.steps import StepResult, dense_step

pytestmark = pytest.mark.slow
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOSSES = ("loss", "l2", "penalty")


@dataclass(frozen=True)
class Case:
    """A model, and steps on batches of it."""

    sparsity: Sparsity
    n_inputs: int = 12
    n_latents: int = 45
    batches: tuple[int, ...] = (30,)
    shift: float = -1.0  # of the pre-activations: sets the density, from no active latent (-50) to all of them (9)
    n_heavy: int = 0  # latents that are active for nearly every item
    betas: tuple[float, float] = (0.9, 0.999)
    slots: int = 4096
    seed: int = 0

    def model(self) -> SparseAutoencoder:
        generator = torch.Generator().manual_seed(self.seed)
        model = SparseAutoencoder(self.n_inputs, self.n_latents, sparsity=self.sparsity)
        with torch.no_grad():
            model.encoder_weight.normal_(generator=generator).div_(self.n_inputs**0.5)
            model.encoder_bias.normal_(mean=self.shift, std=0.1, generator=generator)
            model.encoder_bias[: self.n_heavy] = 3
            model.tied_bias.normal_(std=0.1, generator=generator)
            if isinstance(self.sparsity, JumpReLU):
                model.log_threshold.normal_(mean=-1, generator=generator)
        return model.to(DEVICE)

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return [torch.randn(n, self.n_inputs, generator=generator).to(DEVICE) for n in self.batches]

    def adam(self, model: SparseAutoencoder) -> Adam:
        # A large epsilon keeps the update a smooth function of the gradient, so that parameters can be compared.
        return Adam(model, lr=1e-2, epsilon=1e-2, weight_decay=0.01, betas=self.betas)


USUAL = {
    "ReLU": Case(ReLU(0.03)),
    "TopK": Case(TopK(5), shift=0.0),
    "BatchTopK": Case(BatchTopK(5), shift=0.0),
    "JumpReLU": Case(JumpReLU(1e-2, bandwidth=0.5)),
}
CASES = USUAL | {
    "short batch between full ones": Case(ReLU(0.03), 21, 70, (34, 17, 34)),
    "items without entries": Case(ReLU(0.03), batches=(40,), shift=-2.5),
    "no entries": Case(ReLU(0.03), batches=(10,), shift=-50.0),
    "every entry": Case(ReLU(1e-3), batches=(20,), shift=9.0),
    "one item": Case(ReLU(0.03), batches=(1, 1)),
    "one latent": Case(ReLU(0.03), n_latents=1, batches=(40,), shift=0.0),
    "one input": Case(ReLU(0.03), n_inputs=1, n_latents=33),
    "one of each": Case(ReLU(0.03), 1, 1, (1,), 0.5),
    "many latents": Case(ReLU(0.03), n_latents=150, batches=(10,)),
    "heavy latents": Case(ReLU(0.03), batches=(40,), n_heavy=3),
    "heavy latents without slots": Case(ReLU(0.03), batches=(40,), n_heavy=3, slots=7),
    "other betas": Case(ReLU(0.03), batches=(20, 20, 20), betas=(0.8, 0.95)),
    "TopK with fewer positive": Case(TopK(8), batches=(20, 11), shift=-2.0),
    "BatchTopK, short batch": Case(BatchTopK(3), batches=(20, 9)),
    "JumpReLU, heavy latents": Case(JumpReLU(1e-2, bandwidth=0.5), batches=(40, 25), n_heavy=3),
    "JumpReLU, windows that reach below 0": Case(JumpReLU(1e-2, bandwidth=1.5), batches=(33,)),
    "Matryoshka of one prefix": Case(Matryoshka(TopK(5), (1.0,)), shift=0.0),
}


class Made:
    """A case's model, its optimiser and its GPU step."""

    def __init__(self, case: Case, **options: object) -> None:
        from sparse_autoencoder import gpu_step

        # So small that every loop has several turns, with a short last one.
        gpu_step.CHUNK, gpu_step.SUMMED_ROWS, gpu_step.SUMMED_ITEMS, gpu_step.SLOTS = 8, 4, 16, case.slots
        self.model = case.model()
        self.adam = case.adam(self.model)
        self.step = gpu_step.GpuStep(self.model, self.adam, max(case.batches), **options)  # type: ignore[arg-type]
        for memory in vars(self.step).values():
            if isinstance(memory, Tensor):  # what is not written must not be read
                memory.fill_(float("nan") if memory.dtype.is_floating_point else -(2**30))

    def __call__(self, x: Tensor) -> StepResult:
        self.step.set_rates(adam_rates(self.adam))
        result = self.step(x)
        self.adam.steps += 1
        return result

    def tensors(self) -> dict[str, Tensor]:
        return everything(self.model, self.adam)


def everything(model: SparseAutoencoder, adam: Adam) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in {**model.state_dict(), **adam.moments}.items()}


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value that is wanted."""
    gap, size = (float(tensor.detach().abs().max()) for tensor in (found.double() - wanted.double(), wanted.double()))
    return gap / max(size, 1e-30)


def dense_steps(case: Case, dtype: torch.dtype, *, bf16: bool = False) -> list[tuple[dict[str, Tensor], StepResult]]:
    """The model, the moments and the losses after each step by autograd."""
    model = case.model().to(dtype)
    adam = case.adam(model)
    after = []
    for x in case.inputs():
        result = dense_step(model, adam, x.to(dtype), bf16=bf16)
        after.append((everything(model, adam), result))
    return after


def check_steps(case: Case) -> None:
    """To 1e-5 of autograd in float64. Where cancellation makes autograd in float32 less exact than that, the sparse step may
    be three times as far off."""
    ours = Made(case)
    for x, (exact, want), (rounded, _) in zip(
        case.inputs(), dense_steps(case, torch.float64), dense_steps(case, torch.float32), strict=True
    ):
        got = ours(x)
        assert torch.equal(got.fired, want.fired), "fired"
        noise = 1e-6 * float(x.square().mean())  # of a squared error much smaller than the inputs
        for name in LOSSES:
            assert float(getattr(got, name)) == pytest.approx(float(getattr(want, name)), rel=1e-5, abs=noise), name
        for name, tensor in ours.tensors().items():
            own, autograd = error(tensor, exact[name]), error(rounded[name], exact[name])
            assert own < max(1e-5, 3 * autograd), f"{name}: {own:.1e}, autograd {autograd:.1e}"


def check_cpu(case: Case) -> None:
    """Against the CPU's sparse step."""
    ours = Made(case)
    model = case.model().cpu()
    adam = case.adam(model)
    step = SparseStep(model, adam)
    for x in case.inputs():
        got, want = ours(x), step(x.cpu())
        assert torch.equal(got.fired.cpu(), want.fired.long()), "fired"
        for name in LOSSES:
            assert float(getattr(got, name)) == pytest.approx(float(getattr(want, name)), rel=1e-5), name
    step.close()
    wanted = everything(model, adam)
    for name, tensor in ours.tensors().items():
        assert error(tensor.cpu(), wanted[name]) < 1e-5, name


def check_bits(case: Case) -> None:
    """The same steps give the same bits."""
    one, two = Made(case), Made(case)
    for x in case.inputs():
        first, second = one(x), two(x)
        assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in LOSSES)
    again = two.tensors()
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, again[name]), name


def check_nan(case: Case) -> None:
    """NaN in one latent's weight reaches the loss."""
    ours = Made(case)
    with torch.no_grad():
        ours.model.encoder_weight[11, 3] = float("nan")
    result = ours(*case.inputs())
    assert torch.isnan(result.loss), f"the loss is {float(result.loss)}"


def check_medium(case: Case) -> None:
    """Rounded to bfloat16, gradients are at most twice as far from float64's, in their norm, as autograd's under autocast.
    Equality is too much to ask: both round, and the interpreter truncates residuals, which a card rounds."""
    ours = Made(case, precision="medium")
    (x,) = case.inputs()
    ((exact, want),), ((rounded, autocast),) = dense_steps(case, torch.float64), dense_steps(case, torch.float32, bf16=True)
    got = ours(x)
    for name in LOSSES:
        own, autograd = (abs(float(getattr(result, name)) - float(getattr(want, name))) for result in (got, autocast))
        assert own <= 2 * autograd + 1e-4 * float(want.loss), f"{name}: {own:.1e}, autograd {autograd:.1e}"
    for name, tensor in ours.tensors().items():
        if name.endswith(".mean"):
            own, autograd = (float((other - exact[name]).norm() / exact[name].norm()) for other in (tensor, rounded[name]))
            assert 1e-4 < own <= 2 * autograd, f"{name}: {own:.1e}, autograd {autograd:.1e}"


def check_medium_of_short_numbers(case: Case) -> None:
    """Where bfloat16 holds every operand, every pre-activation and every residual, nothing is rounded."""
    ours, exact = Made(case, precision="medium"), case.model().double()
    generator = torch.Generator().manual_seed(case.seed)
    (x,) = case.inputs()
    signs = {name: torch.randint(-1, 2, tensor.shape, generator=generator) for name, tensor in exact.named_parameters()}
    with torch.no_grad():
        x.copy_(torch.randint(-2, 3, x.shape, generator=generator))
        for model in (ours.model, exact):
            model.tied_bias.copy_(signs["tied_bias"])
            model.encoder_weight.copy_(signs["encoder_weight"] / 4)
            model.encoder_bias.fill_(-1.125)
            model.decoder_weight.copy_(torch.eye(case.n_inputs).repeat(case.n_latents, 1)[: case.n_latents])
    adam = case.adam(exact)
    want = dense_step(exact, adam, x.double())
    got = ours(x)
    assert torch.equal(got.fired, want.fired), "fired"
    assert 0 < int(got.fired.sum()) < got.fired.numel() * len(x)
    for name, tensor in everything(exact, adam).items():
        assert error(ours.tensors()[name], tensor) < 1e-5, name


def check_refusals() -> None:
    from sparse_autoencoder.gpu_step import GpuStep, supports

    for model, max_batch, message in (
        (SparseAutoencoder(4, 8, sparsity=Matryoshka()), 5, "no GPU kernels"),
        (SparseAutoencoder(4, 2048), 2**20, "too many"),
    ):
        assert supports(model) == (message == "too many")
        with pytest.raises(ValueError, match=message):
            GpuStep(model, Adam(model, lr=1e-3), max_batch)


def check_lists() -> None:
    """The kernels that count, place and list entries, in blocks so small that each loop has several turns."""
    from sparse_autoencoder import triton_kernels as kernels

    n, f = 70, 75
    n_words = -(-n // 32)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(n, f, generator=generator)
    active = (values > 0.3).numpy()
    padded = np.zeros((32 * n_words, 96), np.uint8)
    padded[:n, :f] = active

    def words(bits: np.ndarray) -> Tensor:
        """Rows of bits, 32 to a word, the first the lowest."""
        packed = np.packbits(np.ascontiguousarray(bits), axis=1, bitorder="little")
        return torch.from_numpy(packed.view(np.int32)).to(DEVICE)

    def memory(*shape: int) -> Tensor:
        return torch.full(shape, -1, dtype=torch.int32, device=DEVICE)

    by_item, by_latent = words(padded[:n]), words(padded.T).t()[:, :f].contiguous()
    item_count, item_start, latent_count, latent_start, slot_start = map(memory, (n, n + 1, f, f + 1, f + 1))
    before, latent, z = memory(n_words, f), memory(n * f), torch.zeros(n * f, device=DEVICE)
    kernels.count_items_kernel[(-(-n // 8),)](by_item, item_count, n, F=f, ITEMS=8, WORDS=2)
    kernels.count_latents_kernel[(-(-f // 32),)](by_latent, before, latent_count, n_words, F=f, WORDS=2, LATENTS=32)
    kernels.scan_kernel[(1,)](item_count, item_start, latent_count, latent_start, slot_start, n, F=f, CHUNK=28, BLOCK=32)
    kernels.fill_kernel[(n,)](by_item, item_start, values.to(DEVICE), None, latent, z, F=f, LATENTS=32)
    per_latent, per_word = active.sum(axis=0), padded[:, :f].reshape(n_words, 32, f).sum(axis=1)
    chunks = np.where(per_latent > 28, -(-per_latent // 28), 0)
    assert 0 < np.count_nonzero(chunks) < f
    assert before.tolist() == (np.cumsum(per_word, axis=0) - per_word).tolist()
    for found, counted in ((item_start, active.sum(axis=1)), (latent_start, per_latent), (slot_start, chunks)):
        assert found.tolist() == [0, *np.cumsum(counted).tolist()]
    assert latent.tolist() == active.nonzero()[1].tolist() + [-1] * int(n * f - active.sum())
    assert torch.equal(z[: active.sum()].cpu(), values[torch.from_numpy(active)])


def checks() -> dict[str, Callable[[], None]]:
    """Name -> check."""
    short = {name: Case(sparsity, 8, 40) for name, sparsity in (("ReLU", ReLU(0.03)), ("JumpReLU", JumpReLU(bandwidth=0.5)))}
    kinds: list[tuple[str, Callable[[Case], None], dict[str, Case]]] = [
        ("steps", check_steps, CASES),
        ("as on a CPU", check_cpu, USUAL),
        ("same bits", check_bits, {"short batch": Case(ReLU(0.03), batches=(40, 17), n_heavy=3)}),
        ("NaN", check_nan, USUAL),
        ("bfloat16", check_medium, {"ReLU": Case(ReLU(0.03), 24, 60, (40,), n_heavy=2)}),
        ("bfloat16 without rounding", check_medium_of_short_numbers, short),
    ]
    of_cases = {
        f"{kind}: {name}": (lambda check=check, case=case: check(case))
        for kind, check, cases in kinds
        for name, case in cases.items()
    }
    return of_cases | {"refusals": check_refusals, "lists": check_lists}


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """What went wrong in each check."""
    # Older interpreters fail with numpy 2.4.
    pytest.importorskip("triton", minversion=None if DEVICE == "cuda" else "3.8")
    names = list(checks())
    n_processes = 1 if DEVICE == "cuda" else 2
    environment = os.environ | {"TRITON_INTERPRET": "0" if DEVICE == "cuda" else "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *names[k::n_processes]], env=environment, stdout=subprocess.PIPE, text=True
        )
        for k in range(n_processes)
    ]
    return dict(json.loads(line) for process in processes for line in process.communicate()[0].splitlines())


@pytest.mark.parametrize("name", checks())
def test_gpu_step(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]


def test_triton_is_optional() -> None:
    """There is none for macOS."""
    program = "import sys; sys.modules['triton'] = None; import sparse_autoencoder.trainer"
    subprocess.run([sys.executable, "-c", program], check=True)


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or checks():
        try:
            checks()[name]()
            failure = ""
        except Exception:
            failure = traceback.format_exc()
        print(json.dumps([name, failure]), flush=True)


if __name__ == "__main__":
    main()
