"""The library on a GPU. Without one, the same tests run on a pretended GPU, whose tensors compute on the CPU.

As on a GPU, tensors of a pretended one do not meet those of the CPU, and what makes the host wait for the device is noted.
What only hardware has is not pretended: Triton's kernels, streams, CUDA graphs, rounding. Shapes and types at the paper's
sizes are checked in torch's FakeTensorMode, which computes nothing.

FakeTensorMode alone would prove less: in 2.14 it holds for one thread, has no fused Adam with the learning rate in a tensor,
cannot move modules, and lets copies to the CPU pass.
"""

import csv
import re
import shutil
import sys
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import scipy.sparse
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.nn import Module, functional
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from dncbm import ConceptBottleneckModel, cli
from dncbm.concepts.evidence.dissect import dissect
from dncbm.concepts.evidence.monosemanticity import monosemanticity
from dncbm.concepts.evidence.name_test import run_name_test
from dncbm.concepts.evidence.prediction import predict
from dncbm.concepts.naming import nearest_words
from dncbm.concepts.strengths import to_csr
from dncbm.concepts.vocabulary import Vocabulary
from dncbm.features.encoders import Encoder
from dncbm.features.store import FeatureStore
from dncbm.features.streaming import encode_pixels
from dncbm.probe import interventions, nec, reweighting
from dncbm.probe.compact import compact_bottleneck
from dncbm.probe.fit import Keep, fit_probe, fit_prox
from dncbm.probe.model import ProbeData, accuracy_of_groups, evaluate_probe, linear, probe_loss
from dncbm.probe.reweighting import independence_weights
from dncbm.probe.rows import SparseRows
from dncbm.probe.state import StateFile
from dncbm.probe.zero_shot import zero_shot_weight
from dncbm.runs.declarations import ProbeRun
from dncbm.runs.manifests import making
from sparse_autoencoder import (
    BatchTopK,
    JumpReLU,
    Matryoshka,
    ReLU,
    SparseAutoencoder,
    Sparsity,
    TopK,
    TrainingSettings,
    evaluate,
    train,
)
from sparse_autoencoder.losses import code_losses, item_losses
from sparse_autoencoder.optimizer import Adam, adam_rates
from sparse_autoencoder.resampler import resampled_encoder_rows, sampling_probability
from sparse_autoencoder.steps import dense_step, matmul_precision

pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available", "ignore:.*pin_memory.*")
ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "openmoji"
CPU = torch.device("cpu")
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:  # pretending takes inner parts of torch, which older versions do not have
    pytest.importorskip("torch", minversion="2.14")
aten = torch.ops.aten
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
CROSSING = {aten._to_copy, aten.copy_, *INDEXING}
"""Operations that accept tensors of both devices."""
READING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten.repeat_interleave, aten.equal}
READING |= {aten._unique2, aten.unique_dim, aten.unique_consecutive}
"""Operations after which the host knows what a GPU has computed."""


# ---------------------------------------------------------------------------------------------- a GPU, real or pretended


class RealGPU:
    """The first GPU of this machine."""

    device = torch.device("cuda", 0)

    @contextmanager
    def waits(self) -> Iterator[list[str]]:
        """A list that holds, after the block, each wait of the host for the device in it."""
        found: list[str] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found += [str(one.message) for one in caught if "synchronizing" in str(one.message)]


class There(Tensor):
    """A tensor of a pretended GPU: `inside` has its numbers."""

    inside: Tensor
    gpu: "PretendedGPU"
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inside: Tensor, gpu: "PretendedGPU") -> "There":
        layout = {"strides": inside.stride(), "storage_offset": inside.storage_offset(), "dtype": inside.dtype}
        return Tensor._make_wrapper_subclass(cls, inside.size(), device=torch.device("cuda", 0), **layout)

    def __init__(self, inside: Tensor, gpu: "PretendedGPU") -> None:
        self.inside, self.gpu = inside.detach(), gpu

    @property
    def device(self) -> torch.device:
        return self.gpu.device

    def tolist(self) -> list[Any]:
        return self.cpu().tolist()

    def __repr__(self, **_: object) -> str:
        return f"on {self.gpu.device}: {self.inside}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        gpu = next(one.gpu for one in tree_leaves((args, kwargs)) if isinstance(one, There))
        return gpu.__torch_dispatch__(func, types, args, kwargs)


class PretendedGPU(TorchDispatchMode):
    """Makes what is asked for on a GPU, which may be `cuda` or `mps`, and computes with it on the CPU."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.device, self.found, self.pinned = torch.device(kind, 0), list[str](), dict[int, Tensor]()

    @contextmanager
    def waits(self) -> Iterator[list[str]]:
        """A list of what makes the host wait in the block. Copies do, unless they are asynchronous and of pinned memory."""
        self.found = []
        yield self.found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs, tensors = dict(kwargs or {}), [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        is_there = any(isinstance(one, There) for one in tensors)
        pins, wanted = kwargs.pop("pin_memory", False), kwargs.get("device")
        to_gpu = is_there if wanted is None else wanted.type != "cpu"
        if not is_there and not to_gpu:
            made = func(*args, **kwargs)
            return self.pin(made) if pins else made
        with self:
            made = func.decompose(*args, **kwargs)  # in inference mode, operations come whole
        if made is not NotImplemented:
            return made
        self._check(func.overloadpacket, args, kwargs, tensors, leaves=is_there and not to_gpu)
        if wanted is not None:
            kwargs["device"] = CPU
        inside = tree_map_only(There, lambda one: one.inside, (args, kwargs))
        made = func(*inside[0], **inside[1])
        if not to_gpu:
            return made
        types = {one.dtype for one in tree_leaves(made) if isinstance(one, Tensor)}
        if self.device.type == "mps" and torch.float64 in types:
            raise TypeError(f"{func}: mps has no float64")
        return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, lambda one: There(one, self), made))

    def _check(self, operation: Any, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor], *, leaves: bool) -> None:
        outside = [one for one in tensors if not isinstance(one, There) and one.dim() > 0]
        if outside and operation not in CROSSING:
            raise RuntimeError(f"{operation}: tensors on {self.device} and on the CPU")
        by_mask = operation in INDEXING and any(one.dtype == torch.bool for one in tree_leaves(args[1]) if one is not None)
        asynchronous = kwargs.get("non_blocking", operation is aten.copy_ and len(args) > 2 and args[2])
        if operation in READING or by_mask or leaves or (outside and not (asynchronous and all(map(self.is_pinned, outside)))):
            own = [one for one in traceback.extract_stack() if re.search("/(dncbm|sparse_autoencoder)/", one.filename)]
            where = f"{own[-1].filename.removeprefix(f'{ROOT}/')}:{own[-1].lineno}" if own else "this file"
            self.found.append(f"{operation} at {where}")

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no other memory gets the address
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned


class Arrival:
    """Stands in for torch.cuda.Event: a pretended GPU has done all that it was asked for."""

    def record(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def wait(self, stream: object = None) -> None: ...


def backward(loss: Tensor) -> None:
    """Tensor.backward in Python. Torch's engine asks the driver about the streams of the GPU that tensors are on."""
    nodes, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting += [follower for follower, _ in node.next_functions]
    assert loss.grad_fn is not None
    gradients: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    with torch.no_grad():
        # A later operation has a larger number. Leaves, which have a variable, come last.
        for node in sorted(nodes, key=lambda one: -1 if hasattr(one, "variable") else one._sequence_nr(), reverse=True):
            found = gradients.pop(node, {})
            if hasattr(node, "variable"):
                before = node.variable.grad
                node.variable.grad = found[0] if before is None else before + found[0]
                continue
            of_outputs = [found.get(i) for i in range(len(node._input_metadata))]
            made = node.apply(*of_outputs) if isinstance(node, BackwardCFunction) else node(*of_outputs)
            # What follows the tensors are settings, which have no gradient.
            for gradient, (follower, i) in zip(made if isinstance(made, tuple) else (made,), node.next_functions):  # noqa: B905
                if gradient is not None and follower is not None:
                    gradient = gradient.sum_to_size(follower._input_metadata[i].shape).to(follower._input_metadata[i].dtype)
                    to = gradients.setdefault(follower, {})
                    to[i] = to[i] + gradient if i in to else gradient


@contextmanager
def gpu_of(kind: str = "cuda") -> Iterator[RealGPU | PretendedGPU]:
    """A GPU for the block: this machine's if it is a CUDA one, else a pretended one."""
    if kind == "cuda" and HAS_GPU:
        yield RealGPU()
        return
    gpu, run_thread = PretendedGPU(kind), threading.Thread.run

    def run(thread: threading.Thread) -> None:
        with gpu:  # a mode holds for one thread
            run_thread(thread)

    def enter_no_grad(mode: Any) -> None:  # torch refuses to make views of inference tensors that are a subclass
        mode._inference_mode_context = torch.no_grad()
        mode._inference_mode_context.__enter__()

    torch._C._ensureCUDADeviceGuardSet()
    make, math = torch.tensor, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "_lazy_init": lambda: None,  # looks for a driver
            "mem_get_info": lambda *_: (2**34, 2**34),
            "current_device": lambda: 0,
            "set_device": lambda _: None,
            "current_stream": lambda *_: None,
            "Event": Arrival,
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(Tensor, "backward", backward)
        patch.setattr(Tensor, "pin_memory", lambda tensor, *_: gpu.pin(tensor.clone()))
        patch.setattr(Tensor, "is_pinned", lambda tensor, *_: gpu.is_pinned(tensor))
        # It hides from modes that it makes its tensor on the CPU and copies it.
        patch.setattr(torch, "tensor", lambda *args, device=None, **options: make(*args, **options).to(device or CPU))
        patch.setattr(threading.Thread, "run", run)
        patch.setattr(torch.inference_mode, "__enter__", enter_no_grad)
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with torch.backends.cudnn.flags(enabled=False), math, gpu:  # without operations that only a GPU has
                yield gpu
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


# ------------------------------------------------------------------------------------------------- do the checks notice?

WRONG: dict[str, Callable[[Tensor], Any]] = {
    "an item": lambda x: x.sum().item(),
    "a condition": lambda x: 1 if x.sum() > 0 else 0,
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "a copy to the CPU": lambda x: x.cpu(),
    "a copy from pageable memory": lambda x: x + torch.ones(3).to(x.device),
    "indices on the CPU": lambda x: x[torch.arange(2)],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wait_is_noted(name: str) -> None:
    with gpu_of() as gpu:
        x = torch.ones(3).to(gpu.device)
        with gpu.waits() as found:
            WRONG[name](x)
        assert found
        with gpu.waits() as found:
            (x * 2).sum()
        assert not found


def test_devices_do_not_mix() -> None:
    with gpu_of() as gpu, pytest.raises(RuntimeError):
        torch.ones(3).to(gpu.device) + torch.ones(3)


def test_mps_has_no_float64() -> None:
    """Else nothing would show that a function needs it."""
    with gpu_of("mps") as gpu, pytest.raises(TypeError):
        items().to(gpu.device).double()


@pytest.mark.parametrize("name", ["an item", "a condition", "nonzero", "a mask"])
def test_fake_tensors_cannot_be_read(name: str) -> None:
    with FakeTensorMode(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        WRONG[name](torch.empty(3, device="cuda"))


# ------------------------------------------------------------------------------------------------------------- the steps

N, D, F, C = 48, 12, 32, 4
CODES: dict[str, Sparsity] = {
    "relu": ReLU(l1_coeff=1e-3),
    "topk": TopK(4),
    "batchtopk": BatchTopK(4),
    "jumprelu": JumpReLU(l0_coeff=1e-3),
    "matryoshka of topk": Matryoshka(TopK(4)),
    "matryoshka of batchtopk": Matryoshka(BatchTopK(4)),
}


def items(n: int = N, width: int = D, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + 0.2


def sae(code: Sparsity, device: torch.device, transform: str = "none", n_latents: int = F) -> SparseAutoencoder:
    return SparseAutoencoder(D, n_latents, sparsity=code, input_transform=transform).to(device)


def dense(device: torch.device, code: Sparsity, *, revives: bool) -> Callable[[], list[Tensor]]:
    model, x = sae(code, device), items().to(device)
    adam, dead = Adam(model, lr=1e-3), (torch.arange(F) % 3 == 0).to(device) if revives else None

    def step() -> list[Tensor]:
        result = dense_step(model, adam, x, dead)
        return [*vars(result).values(), *model.state_dict().values(), *adam.moments.values()]

    return step


def losses(device: torch.device, code: Sparsity) -> Callable[[], list[Tensor]]:
    model, x = sae(code, device), items().to(device)
    return lambda: list(code_losses(model, x))


def forward(device: torch.device, transform: str) -> Callable[[], list[Tensor]]:
    model, x = sae(ReLU(), device, transform), items().to(device)
    return lambda: [one.detach() for one in model(x)]


STEPS: dict[str, Callable[[torch.device], Callable[[], list[Tensor]]]] = {
    **{f"dense step, {name}": partial(dense, code=code, revives=False) for name, code in CODES.items()},
    **{f"dense step with AuxK, {name}": partial(dense, code=code, revives=True) for name, code in CODES.items()},
    **{f"losses, {name}": partial(losses, code=code) for name, code in CODES.items()},
    **{f"model, {transform}": partial(forward, transform=transform) for transform in ("none", "centre", "unit_norm")},
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_the_cpus_and_never_waits(name: str) -> None:
    step = STEPS[name](CPU)
    expected = [step() for _ in range(3)][-1]
    with gpu_of() as gpu:
        step = STEPS[name](gpu.device)
        step()  # memory and libraries are prepared
        with gpu.waits() as found:
            step()
            result = step()
        assert not found
        for one, other in zip(result, expected, strict=True):
            assert one.device == gpu.device
            torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-6)


def test_backward_in_python_is_torchs() -> None:
    """Else the pretended GPU would prove nothing."""
    for code in CODES.values():
        model = sae(code, CPU)
        loss = item_losses(model, items(), training=True, dead=torch.arange(F) % 3 == 0).objective.mean()
        expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        backward(loss)
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            assert torch.equal(parameter.grad, gradient)


# ----------------------------------------------------------------------------------------------------- whole functions


def trained(device: torch.device, folder: Path, data: Tensor | None = None, **options: Any) -> list[Any]:
    model = sae(device=CPU, **options)
    settings = TrainingSettings(epochs=6, batch_size=16, resample_freq=2, lr=1e-3, log_every=1000, val_freq=0)
    x = items() if data is None else data
    result = train(model, x, settings, validation=items(20, seed=1), device=device, progress=False)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    return [result.metrics, result.validation, {name: one.detach() for name, one in model.state_dict().items()}]


def strengths_of(seed: int, n: int = 60) -> ProbeData:
    rng = np.random.default_rng(seed)
    values = rng.uniform(0.1, 2, (n, F)) * (rng.random((n, F)) < 0.3)
    labels = torch.from_numpy(values.reshape(n, C, -1).sum(axis=2).argmax(axis=1))
    return ProbeData(scipy.sparse.csr_matrix(values.astype(np.float32)), labels)


def probed(device: torch.device, folder: Path, fit: Callable, epochs: int = 4, **changes: Any) -> list[Any]:
    run = ProbeRun("mine", epochs=epochs, batch_size=16, **changes)
    state = StateFile(folder / "state.safetensors")
    return [fit(strengths_of(0), strengths_of(1), C, run, device, Keep(state))]


def probe_metrics(device: torch.device, folder: Path) -> list[Any]:
    weight, data = items(F, C, seed=3).to(device), strengths_of(2)
    found = evaluate_probe(weight, data, 0.1, coverage=True, batch_size=16)
    return [found, *accuracy_of_groups(weight, data, data.labels, C, batch_size=16)]


def named(device: torch.device, folder: Path) -> list[Any]:
    words = Vocabulary([str(i) for i in range(50)], functional.normalize(items(50, seed=4), dim=1))
    found = nearest_words(sae(ReLU(), device).dictionary, words, chunk=10)
    return [[(int(one.name), one.similarity) for one in found]]


def name_tested(device: torch.device, folder: Path) -> list[Any]:
    words = functional.normalize(items(50, seed=4), dim=1)
    found = run_name_test(items(F, seed=6).to(device), words, np.arange(F) > 3, n_null=300, device=device)
    return [found.z, found.p, found.q, found.centred]


def judged_by_images(device: torch.device, folder: Path) -> list[Any]:
    """Of a device without float64, the stage takes the CPU instead."""
    device = CPU if device.type == "mps" else device
    rng = np.random.default_rng(0)
    with making(folder, "features by hand", {}, {}, overwrite=True) as work:
        np.save(folder / "00000.npy", rng.normal(size=(60, 6)).astype(np.float32))
        np.save(folder / "00000.keys.npy", np.arange(60))
        work.done(folder.glob("*.npy"))
    images, words = FeatureStore(folder, "a command"), functional.normalize(torch.from_numpy(rng.normal(size=(40, 6))).float())
    codes = scipy.sparse.csc_matrix(np.maximum(rng.normal(-0.5, 1, (60, 9)), 0).astype(np.float32))
    found = (
        predict(codes, images, words, rng.integers(0, 40, 9), device=device),
        dissect(codes, images, words, device=device),
        monosemanticity(codes, images, device=device),
    )
    return [value for one in found for value in vars(one).values()]


def compact(device: torch.device, folder: Path) -> list[Any]:
    splits = {split: strengths_of(seed) for seed, split in enumerate(("train", "train_val", "val"))}
    found = compact_bottleneck(splits, C, 4, 0, device, StateFile(folder / "state.safetensors"))
    return [found.concepts, [point.val_top1 for point in found.points]]


def clip(device: torch.device, precision: str = "fp32", tower: str = "vit") -> Encoder:
    vision = {"layers": [1, 1, 1, 1] if tower == "resnet" else 2, "width": 16, "image_size": 32}
    vision |= {"head_width": 8} if tower == "resnet" else {"head_width": 8, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        text = {"context_length": 7, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2}
        model = open_clip.model.CLIP(8, vision, text).eval().requires_grad_(False)

    def tokens(texts: Sequence[str]) -> Tensor:
        return torch.tensor([[*(62, *map(len, text.split()), *[1] * 8)[:6], 63] for text in texts])

    return Encoder("tiny", model.to(device), torch.as_tensor, tokens, device, precision)


def encoded(device: torch.device, folder: Path, precision: str, tower: str) -> list[Any]:
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    encoder = clip(device, precision if device.type == "cuda" else "fp32", tower)
    features = encode_pixels(encoder, pixels)
    assert features.device == device
    assert features.dtype == (torch.float16 if encoder.precision == "fp16" else torch.float32)
    return [features.float(), zero_shot_weight(encoder, ["a cat", "a dog ate"], ["a photo of {}.", "{}"])]


def sparse(device: torch.device, folder: Path) -> list[Any]:
    latents = (items(9, F) - 0.5).relu()
    latents[4] = 0
    return [to_csr(latents.to(device)).toarray()]


def restarted(device: torch.device, folder: Path) -> list[Any]:
    """The tensors of a resampling."""
    inputs, weight, alive = items(5).to(device), items(F).to(device), (torch.arange(F) > 7).to(device)
    return [resampled_encoder_rows(inputs, weight, alive), sampling_probability(items(9, 1)[:, 0].square())]


FUNCTIONS: dict[str, Callable[[torch.device, Path], list[Any]]] = {
    **{f"training, {name}": partial(trained, code=code) for name, code in CODES.items()},
    "training, centred": partial(trained, code=ReLU(), transform="centre"),
    "training, unit norm": partial(trained, code=ReLU(), transform="unit_norm"),
    "training, half precision": partial(trained, code=ReLU(), data=items().half()),
    "training, data on the device": lambda device, folder: trained(
        device, folder, items().to(device), code=ReLU(), transform="centre"
    ),
    # So sparse that a GPU tries Triton's kernels, which fail on a pretended one: that must not cost the training.
    "training, sparse": partial(trained, code=TopK(3), n_latents=256),
    "evaluation": lambda device, _: [evaluate(sae(TopK(4), CPU), items(), batch_size=20, device=device)],
    "resampling": restarted,
    "sparse strengths": sparse,
    "names": named,
    "test of names": name_tested,
    "evidence from images": judged_by_images,
    "compact bottleneck": compact,
    "probe": partial(probed, fit=fit_probe),
    "probe, prox": partial(probed, fit=fit_prox, sparsity_lambda=0.5, solver="prox"),
    "probe's metrics": probe_metrics,
    "weights of images": lambda device, _: [independence_weights(strengths_of(5), np.arange(3), C, 0, device)[0]],
    **{f"{tower}, {p}": partial(encoded, precision=p, tower=tower) for tower in ("vit", "resnet") for p in ("fp32", "fp16")},
}


def close(found: Any, expected: Any, tolerance: float) -> None:
    """Assert that two trees of numbers are equal, up to a difference relative to the norm of each."""
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if isinstance(one, str):
            assert one == other
            continue
        one, other = (torch.as_tensor(x).detach().cpu().double() for x in (one, other))
        assert one.shape == other.shape
        both = torch.isnan(one) & torch.isnan(other)
        one, other = one.masked_fill(both, 0), other.masked_fill(both, 0)
        assert torch.linalg.vector_norm(one - other) <= tolerance * max(1e-3, float(torch.linalg.vector_norm(other)))


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_the_cpus(name: str, kind: str, tmp_path: Path) -> None:
    for folder in ("cpu", "gpu"):
        (tmp_path / folder).mkdir()
    expected = FUNCTIONS[name](CPU, tmp_path / "cpu")
    with gpu_of(kind) as gpu:
        close(FUNCTIONS[name](gpu.device, tmp_path / "gpu"), expected, 2e-2 if "fp" in name else 2e-3)  # convolutions in TF32


# ------------------------------------------------------------------------------------------------ training as a whole


class Killed(Exception):
    """Ends a training, as a power cut would."""


def kill(row: dict[str, Any], step: int, at: int) -> None:
    """A log that ends the training when a step is logged."""
    if step == at:
        raise Killed


@pytest.mark.parametrize("code", [ReLU(l1_coeff=1e-3), TopK(4, dead_after=20), Matryoshka(BatchTopK(4, dead_after=20))])
@pytest.mark.parametrize("transform", ["none", "unit_norm"])
def test_more_steps_of_training_are_no_more_waits(code: Sparsity, transform: str) -> None:
    def waits(batch_size: int) -> list[str]:
        steps = 2 * N // batch_size
        settings = TrainingSettings(epochs=3, batch_size=batch_size, lr=1e-3, resample_freq=0, log_every=steps, val_freq=0)
        log = partial(kill, at=steps)  # before the last step, since what is measured then waits for each batch
        with gpu.waits() as found, pytest.raises(Killed):
            train(sae(code, CPU, transform), items(), settings, device=gpu.device, log=log, progress=False)
        return found

    with gpu_of() as gpu:
        few, many = waits(N // 4), waits(N // 16)
    assert not Counter(many) - Counter(few)


@pytest.mark.parametrize("on", ["strengths", "features"])
def test_more_steps_of_a_probe_are_no_more_waits(on: str, tmp_path: Path, make_store: Callable) -> None:
    def waits(batch_size: int) -> list[str]:
        run = ProbeRun("mine", epochs=3, batch_size=batch_size)
        with gpu.waits() as found:
            fit_probe(data, data, C, run, gpu.device, Keep(StateFile(tmp_path / "state.safetensors", overwrite=True)))
        (tmp_path / "state.safetensors").unlink(missing_ok=True)
        return found

    data = strengths_of(0, 64)
    if on == "features":
        data = ProbeData(make_store(tmp_path / "features", [items(64).numpy()]), data.labels)
    with gpu_of() as gpu:
        waits(32)  # moves the data to the GPU
        few, many = waits(16), waits(4)
    assert not Counter(many) - Counter(few)


@pytest.mark.slow
@pytest.mark.parametrize("code", [ReLU(l1_coeff=1e-3), BatchTopK(4, dead_after=20)])
@pytest.mark.parametrize("moments", [(1,), (4, 11), (6, 7, 17)])
def test_killed_and_resumed(code: Sparsity, moments: tuple[int, ...], tmp_path: Path) -> None:
    """Three steps per epoch, and a resampling after every second."""
    settings = TrainingSettings(epochs=6, batch_size=16, resample_freq=2, lr=1e-3, log_every=1)

    def run(device: torch.device, last: int = 0, **files: Path) -> list[Tensor]:
        model, log = sae(code, CPU), partial(kill, at=last)
        train(model, items(), settings, device=device, log=log, state_every=0, progress=False, **files)
        return [one.detach().cpu() for one in model.state_dict().values()]

    with gpu_of() as gpu:
        whole = run(gpu.device)
        for moment in moments:
            with pytest.raises(Killed):
                run(gpu.device, moment, state_path=tmp_path / "state.safetensors")
        resumed = run(gpu.device, state_path=tmp_path / "state.safetensors")
    close(resumed, whole, 0 if isinstance(gpu, PretendedGPU) else 1e-4)
    close(whole, run(CPU), 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_training_moves_to_another_device(one: str, other: str, tmp_path: Path) -> None:
    """A state is read wherever the training resumes."""
    model = sae(TopK(4), CPU)
    settings = TrainingSettings(epochs=6, batch_size=16, lr=1e-3, log_every=1)

    with gpu_of() as gpu:
        devices = {"cpu": CPU, "cuda": gpu.device}
        files = {"state_path": tmp_path / "state.safetensors", "state_every": 0.0, "progress": False}
        with pytest.raises(Killed):
            train(sae(TopK(4), CPU), items(), settings, device=devices[one], log=partial(kill, at=9), **files)
        train(model, items(), settings, device=devices[other], **files)
        found = [parameter.detach().cpu() for parameter in model.state_dict().values()]
    whole = sae(TopK(4), CPU)
    train(whole, items(), settings, progress=False)
    close(found, list(whole.state_dict().values()), 2e-3)


# ------------------------------------------------------------------------------------------ what only hardware can show

needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU; Triton's interpreter runs the kernels in tests/sae")
LARGEST_GAP = {"highest": 1e-4, "high": 2e-2, "medium": 1e-1}
"""How far three sparse steps may be from three dense ones, by precision."""


def both_steps(name: str, precision: str, device: torch.device, n: int = 200, width: int = 96, n_latents: int = 512) -> None:
    """Three sparse steps give what three dense ones do, and never wait."""
    from sparse_autoencoder.gpu_step import GpuStep

    x, made = items(n, width).to(device), list[list[Tensor]]()
    for is_sparse in (False, True):
        model = SparseAutoencoder(width, n_latents, sparsity=CODES[name]).to(device)
        adam = Adam(model, lr=1e-4)
        step = GpuStep(model, adam, n, precision=precision) if is_sparse else None
        for number in range(3):
            with RealGPU().waits() if number and HAS_GPU else nullcontext([]) as found:
                if step is None:
                    result = dense_step(model, adam, x, bf16=precision == "medium")
                else:
                    step.set_rates(adam_rates(adam))
                    result = step(x)
                    adam.steps += 1
            assert not found
        made.append([one.clone() for one in (*vars(result).values(), *model.state_dict().values(), *adam.moments.values())])
    close(made[1], made[0], LARGEST_GAP[precision])


@needs_gpu
@pytest.mark.parametrize("precision", LARGEST_GAP)
@pytest.mark.parametrize("name", ["relu", "topk", "batchtopk", "jumprelu"])
def test_a_sparse_step_is_the_dense_one(name: str, precision: str) -> None:
    with matmul_precision(precision, RealGPU.device):
        both_steps(name, precision, RealGPU.device)


@needs_gpu
@pytest.mark.parametrize("code", [TopK(4), BatchTopK(4)])
def test_training_uses_sparse_steps_and_graphs(code: Sparsity, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[dict[str, Any]] = []
    x, made = items(1024, 64), []
    for device in (CPU, RealGPU.device):
        model = SparseAutoencoder(64, 2048, sparsity=code)
        settings = TrainingSettings(epochs=8, batch_size=128, lr=1e-4, log_every=20, val_freq=0)
        train(model, x, settings, device=device, log=lambda row, _: rows.append(row), progress=False)
        made.append([one.detach().cpu() for one in model.state_dict().values()])
    assert rows[-2]["sparse_step"] == 1, "the last but one is of a step on the GPU"
    assert not [one for one in caplog.messages if "given up" in one or "one by one" in one]
    close(made[1], made[0], 1e-2)


# ------------------------------------------------------------------------------------------------------ every stage

STAGES = {
    "sae_features": ("data/activations_img/openmoji", 1e-2),
    "sae": ("SAE/**/sparse_autoencoder_final*", 1e-2),
    "vocabulary": ("vocab/embeddings_*", 1e-3),
    "names": ("SAE/**/concept_names.csv*", 1e-4),
    "probe_features": ("data/activations_img/openmoji_categories", 1e-2),
    "strengths": ("probe/**/all_concepts", 1e-3),
    "probe": ("probe/**/on_concepts_final_*", 1e-2),
    "zero_shot": ("probe/zero_shot", 1e-3),
    "nec": ("probe/**/nec", 0.3),
    "intervene": ("probe/**/interventions", 0.3),
}
"""Stage -> what it makes, and how far that may be from what the CPU makes of the same inputs. A GPU encodes images in fp16,
and one image is a twentieth of an accuracy."""


def execute(folder: Path, stage: str, *flags: str) -> None:
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        patch.setenv("DNCBM_CONFIG", str(folder / "config.py"))
        patch.setattr(sys, "argv", [stage])
        for solver in (nec, interventions, reweighting):
            patch.setattr(solver, "MAX_PASSES", 3)  # solved less exactly, to save time
        removed = ("--remove", str(folder / "removed.txt")) if stage == "intervene" else ()
        cli.main(stage, (*removed, *flags))


@pytest.fixture(scope="module")
def finished(small_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config beside a `run` that the CPU has finished."""
    folder = tmp_path_factory.mktemp("finished")
    defaults = {"num_epochs": 30, "probe_epochs": 20, "num_workers": 0, "batch_size": 32, "device": "cpu"}
    config = (EXAMPLE / "config.py").read_text(encoding="utf-8")
    (folder / "config.py").write_text(f"{config}\ndefaults |= {defaults}\n", encoding="utf-8")
    (folder / "removed.txt").write_text("0\n1\n", encoding="utf-8")
    (folder / "run").mkdir()
    for path in small_build.iterdir():
        if path.name in ("webdataset", "categories", "outlines", "clip"):
            (folder / "run" / path.name).symlink_to(path)
    (folder / "run/vocab").mkdir()
    words = (small_build / "vocab/openmoji_nouns.txt").read_text(encoding="utf-8").split()
    (folder / "run/vocab/openmoji_nouns.txt").write_text("\n".join(words[:300]), encoding="utf-8")
    execute(folder, "pipeline", "--to", "nec")
    for stage in ("intervene", "export"):
        execute(folder, stage)
    return folder


def of_csv(path: Path) -> list[float | str]:
    fields = [field for row in csv.reader(path.read_text(encoding="utf-8").splitlines()) for field in row]
    return [float(field) if re.fullmatch(r"-?[\d.]+(e-?\d+)?", field) else field for field in fields]


def of_npy(path: Path) -> Any:
    array = np.load(path)
    return array if array.dtype.kind in "fi" else array.tolist()


NUMBERS: dict[str, Callable[[Path], Any]] = {".csv": of_csv, ".npy": of_npy, ".safetensors": load_file}
NUMBERS[".npz"] = lambda path: scipy.sparse.load_npz(path).toarray()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_the_cpus(stage: str, finished: Path, tmp_path: Path) -> None:
    folder, (pattern, tolerance) = tmp_path / "copy", STAGES[stage]
    shutil.copytree(finished, folder, symlinks=True)
    for path in list((folder / "run").glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with gpu_of() as gpu:
        execute(folder, stage, "--device", str(gpu.device))
    made = [file for path in (finished / "run").glob(pattern) for file in (path, *path.rglob("*")) if file.suffix in NUMBERS]
    assert made
    for path in made:
        close(NUMBERS[path.suffix](folder / path.relative_to(finished)), NUMBERS[path.suffix](path), tolerance)


@pytest.mark.slow
def test_a_bundle_is_the_cpus(finished: Path) -> None:
    (bundle,) = {path.parent for path in (finished / "run/analysis/bundle").rglob("sae.safetensors")}
    images = sorted((finished / "run/categories/val").rglob("*.jpg"))[:5]

    def found(device: str) -> list[Any]:
        model = ConceptBottleneckModel.from_pretrained(bundle, device=device)
        return [model.predict_proba(images), model.concepts(images).toarray()]

    expected = found("cpu")
    with gpu_of() as gpu:
        close(found(str(gpu.device)), expected, 2e-2)


# ------------------------------------------------------------------------------------------- sizes of the paper, unreal


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Within the test, tensors have shapes, types and devices, but no numbers."""
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(Module, "to", lambda module, *_, **__: module)  # torch cannot move modules of fake tensors
    device = torch.device("cuda", 0)
    with FakeTensorMode(), device:
        yield device


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("name", "width"), [("RN50", 1024), ("ViT-B-16", 512), ("ViT-L-14", 768)])
def test_encoders_of_the_paper(name: str, width: int, precision: str, fake: torch.device) -> None:
    model = open_clip.create_model(name).eval()
    encoder = Encoder(
        name, model, torch.as_tensor, lambda texts: torch.ones(len(texts), 77, dtype=torch.long), fake, precision
    )
    features = encoder.encode_images(torch.empty(256, 3, 224, 224, device="cpu"))
    texts = encoder.encode_texts(["a", "b", "c"])
    assert (features.device, features.shape) == (fake, (256, width))
    assert features.dtype == (torch.float16 if precision == "fp16" else torch.float32)
    assert (texts.device, texts.dtype, texts.shape) == (CPU, torch.float32, (3, width))


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("revives", [False, True])
def test_gradients_of_an_sae_of_the_paper(code: str, revives: bool, fake: torch.device) -> None:
    model = SparseAutoencoder(1024, 8192, sparsity=CODES[code], input_transform="unit_norm")
    x, _ = model.transform(torch.empty(4096, 1024, dtype=torch.float16).float())
    dead = torch.zeros(8192, dtype=torch.bool) if revives else None
    losses = item_losses(model, x, training=True, dead=dead)
    assert all(one.dtype == torch.float32 and one.device == fake for one in losses)
    losses.objective.mean().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert (parameter.grad.shape, parameter.grad.dtype, parameter.grad.device) == (parameter.shape, torch.float32, fake)
    model.sparsity.code.after_batch(model, losses.latents.detach())
    assert code_losses(model, x).fired.dtype == torch.int64


def test_a_probe_of_the_paper(fake: torch.device) -> None:
    """Places365: 8192 concepts, of which images have 32, and 365 classes."""
    weight, n = torch.empty(8192, 365, requires_grad=True), 512
    entries = torch.zeros(32 * n, dtype=torch.int32)
    for batch in (SparseRows(entries, torch.arange(n, dtype=torch.int32) * 32, torch.empty(32 * n)), torch.empty(n, 8192)):
        loss = probe_loss(linear(batch, weight), torch.zeros(n, dtype=torch.int64), weight, 0.1)
        loss.backward()
    assert weight.grad is not None
    assert (weight.grad.shape, weight.grad.device) == (weight.shape, fake)
