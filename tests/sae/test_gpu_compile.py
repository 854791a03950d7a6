"""The kernels of the GPU step, compiled ahead of time for cards that are not here: nothing spills, and shared memory suffices.

`python tests/sae/test_gpu_compile.py` prints what each kernel needs, as JSON. Compilation runs in processes of its own, since
elsewhere Triton may be told to interpret kernels.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_autoencoder import JumpReLU, ReLU, SparseAutoencoder
from sparse_autoencoder.optimizer import Adam

pytestmark = pytest.mark.slow
SHARED_MEMORY = 48 * 1024  # bytes that a program gets on every card
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}


@dataclass(frozen=True)
class Case:
    """Sizes and kinds of a step, and the compute capability it is compiled for."""

    capability: int
    n_inputs: int
    precision: str = "highest"
    jump: bool = False
    n_latents: int = 8192
    n_items: int = 4096


CAPABILITIES = (80, 90, 100)
CASES = {
    **{
        f"sm_{capability}, {width} inputs, {precision}{', JumpReLU' if jump else ''}": Case(capability, width, precision, jump)
        for capability, width, precision, jump in product(CAPABILITIES, (512, 768, 1024), ("highest", "medium"), (False, True))
    },
    **{f"sm_{capability}, the most inputs": Case(capability, 4096) for capability in CAPABILITIES},
    # What is 1 arrives as a constant, and what 16 divides is known to be.
    "one of each": Case(90, 1, n_latents=1, n_items=1),
    "one item": Case(90, 512, "medium", True, n_latents=97, n_items=1),
    "odd sizes": Case(90, 45, "medium", n_latents=97, n_items=321),
}


@dataclass(frozen=True)
class Needs:
    """What a compiled kernel needs."""

    kernel: str
    warps: int
    registers: int
    stack: int  # bytes: registers are spilled to it
    local: int
    shared: int


def launches(case: Case) -> list[tuple[Any, tuple, dict[str, Any]]]:
    """What GpuStep launches: the kernel, its arguments and options. Tensors have shapes and types alone."""
    import triton

    from sparse_autoencoder.gpu_step import GpuStep

    found: list[tuple[Any, tuple, dict[str, Any]]] = []

    def run(kernel: Any, *arguments: Any, grid: tuple, warmup: bool, **options: Any) -> None:
        found.append((kernel, arguments, options))

    triton.runtime.JITFunction.run = run
    model = SparseAutoencoder(1, 1, sparsity=JumpReLU() if case.jump else ReLU())
    model.n_inputs, model.n_latents = d, f = case.n_inputs, case.n_latents
    for name, parameter in list(model.named_parameters()):
        shape = (f, d) if parameter.ndim == 2 else (d,) if name == "tied_bias" else (f,)
        setattr(model, name, torch.nn.Parameter(torch.empty(shape, device="meta")))
    step = GpuStep(model, Adam(model, lr=1e-3), case.n_items, precision=case.precision)
    step.set_rates((0.5,) * 8)  # type: ignore[arg-type]
    step(torch.empty(case.n_items, d, device="meta"))
    return found


def compiled(capability: int, kernel: Any, arguments: tuple, options: dict[str, Any]) -> Needs:
    """Compiles a kernel for its arguments, as a launch on that card would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = dict(options)
    warps = options.pop("num_warps", 4)
    signature, constants, facts = {}, {}, {}
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    for k, name in enumerate(kernel.arg_names):
        value = given[name]
        if isinstance(value, torch.Tensor):
            signature[name], known = TYPES[value.dtype], True  # torch aligns what it allocates
        elif isinstance(value, float):
            signature[name], known = "fp32", False
        elif value is None or value == 1 or name.isupper():
            signature[name], constants[name], known = "constexpr", value, False
        else:
            signature[name], known = "i32", value % 16 == 0
        if known:
            facts[(k,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=facts)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    of = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Needs(kernel.__name__, warps, of["REG"], of["STACK"], of["LOCAL"], made.metadata.shared)


def main() -> None:
    """Prints, for each case that is named (or all), the kernels that no case before it had."""
    seen = set()
    for name in sys.argv[1:] or CASES:
        case = CASES[name]
        for kernel, arguments, options in launches(case):
            described = [
                value.dtype if isinstance(value, torch.Tensor) else value for value in (*arguments, *options.values())
            ]
            if (key := (case.capability, kernel.__name__, *described)) not in seen:
                seen.add(key)
                print(json.dumps([name, asdict(compiled(case.capability, kernel, arguments, options))]), flush=True)


@pytest.fixture(scope="module")
def needs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Needs]]:
    """Case -> its kernels, but for those that an earlier case of its process has."""
    # Older compilers spill a few registers, and before 3.3 are called otherwise.
    pytest.importorskip("triton", minversion="3.8")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))  # nothing is taken from earlier runs
    names = list(CASES)
    processes = [
        subprocess.Popen([sys.executable, __file__, *names[k::2]], env=environment, stdout=subprocess.PIPE, text=True)
        for k in range(2)
    ]
    found: dict[str, list[Needs]] = {name: [] for name in names}
    for process in processes:
        for line in process.communicate()[0].splitlines():
            name, about = json.loads(line)
            found[name].append(Needs(**about))
    assert not any(process.returncode for process in processes)
    return found


@pytest.mark.parametrize("name", CASES)
def test_kernels_fit(needs: dict[str, list[Needs]], name: str) -> None:
    assert needs[name]
    for kernel in needs[name]:
        assert kernel.stack == kernel.local == 0, kernel
        assert kernel.shared <= SHARED_MEMORY, kernel


def test_every_kernel_was_compiled(needs: dict[str, list[Needs]]) -> None:
    source = Path(sys.modules[SparseAutoencoder.__module__].__file__ or "").with_name("triton_kernels.py").read_text()
    kernels = set(re.findall(r"def (\w+_kernel)\(", source))
    assert {kernel.kernel for name in CASES for kernel in needs[name]} == kernels
    assert len(kernels) == 12


if __name__ == "__main__":
    main()
