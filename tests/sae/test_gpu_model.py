"""The count of bytes in benchmarks/gpu_model.py against what the kernels do in Triton's interpreter, and benchmarks/gpu.py.

Both run in processes of their own: whether Triton interprets or compiles a kernel is settled when it is imported.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
WITHOUT_GPU = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
CASES = {
    "an entry in seven": (45, 24, 72, 0.15, "highest"),
    "bfloat16": (45, 24, 72, 0.15, "medium"),
    "more items than a chunk": (260, 16, 32, 0.3, "high"),
}
"""Name -> items, inputs, latents, the fraction that is active, precision."""
COUNTED_AS = {"addmv": "folded bias", "addmm": "product", "copy_": "casts", "_to_copy": "casts"}
"""Operator of torch in the sparse step -> what the count calls it."""


@pytest.fixture(scope="module")
def counts() -> dict[str, Any]:
    """Case -> what `main` below finds."""
    done = subprocess.run([sys.executable, __file__], env=WITHOUT_GPU, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_move_the_bytes_that_are_counted(counts: dict[str, Any], case: str) -> None:
    kernels, operators, wanted = (counts[case][kind] for kind in ("kernels", "operators", "wanted"))
    assert wanted.keys() == kernels.keys() | operators.keys()
    for name, found in kernels.items():
        assert found["moved"] == wanted[name]["moved"], name
        # What is far apart is taken to be distinct; here, some of an item's entries share a word of the bitmap.
        assert found["distinct"] == pytest.approx(wanted[name]["distinct"], rel=0.02), name
    for name, found in operators.items():
        assert found == {kind: wanted[name][kind] for kind in ("moved", "operations")}, name


def test_the_gpu_benchmark_runs_without_a_gpu() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--quick"]
    done = subprocess.run(command, env=WITHOUT_GPU, stdout=subprocess.PIPE, check=True, text=True)
    found = json.loads(done.stdout)
    assert "error" not in done.stdout, done.stdout
    assert found.keys() == {"card", "rates", "steps", "epoch", "extraction", "strengths", "probe", "seconds"}
    assert all(rate > 0 for rate in found["rates"].values())
    (of_width,) = found["steps"].values()
    assert list(of_width) == ["highest", "high", "medium"]
    for figures in of_width.values():
        for form in ("dense_eager", "dense_graph", "sparse_eager", "sparse_graph"):
            assert figures[form]["over_floor"] == pytest.approx(figures[form]["ms"] / figures[form]["floor_ms"])
        assert figures["kernels"]["product"]["over_floor"] > 0


# -------------------------------------------------------------------------------------------------- in the other process


class Traffic:
    """Bytes that launches of one kernel ask for, and the addresses of each launch."""

    def __init__(self) -> None:
        self.moved = 0
        self.addresses: set[tuple[str, int, int]] = set()
        self.distinct = 0

    def add(self, kind: str, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        asked = np.broadcast_arrays(pointers.data, mask.data)
        asked_for = asked[0][asked[1].astype(bool)]
        self.moved += asked_for.size * size
        self.addresses |= {(kind, size, address) for address in asked_for.tolist()}

    def launched(self) -> None:
        self.distinct += sum(size for _, size, _ in self.addresses)
        self.addresses.clear()


def watch_kernels() -> dict[str, Traffic]:
    """Kernel -> what the interpreter loads and stores from now on."""
    from torch.utils._python_dispatch import _disable_current_modes
    from triton.runtime import interpreter

    found: dict[str, Traffic] = defaultdict(Traffic)
    running: list[Traffic] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        running[-1].add("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        running[-1].add("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def watched_launch(self: Any, *arguments: Any, **options: Any) -> None:
        running.append(found[self.fn.__name__])
        with _disable_current_modes():  # it copies the arguments
            launch(self, *arguments, **options)
        running.pop().launched()

    builder.create_masked_load, builder.create_masked_store, executor.__call__ = watched_load, watched_store, watched_launch
    return found


def counted(
    items: int, width: int, latents: int, active: float, precision: str, traffic: dict[str, Traffic]
) -> dict[str, Any]:
    """What a step of the kernels asks for (`kernels`, `operators`), and what the count says of it (`wanted`)."""
    import gpu_model
    import torch

    from sparse_autoencoder import ReLU, SparseAutoencoder
    from sparse_autoencoder.gpu_step import GpuStep
    from sparse_autoencoder.optimizer import Adam, adam_rates

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(items, width, generator=generator)
    model = SparseAutoencoder(width, latents, sparsity=ReLU())
    with torch.no_grad():
        model.encoder_weight.normal_(generator=generator)
        model.encoder_bias.fill_(-float((x @ model.encoder_weight.t()).quantile(1 - active)))
    dtype = torch.bfloat16 if precision == "medium" else torch.float32
    pre = torch.addmm(*(tensor.detach().to(dtype) for tensor in (model.encoder_bias, x, model.encoder_weight.t())))
    entries = (pre > 0).sum(dim=1).numpy()
    adam = Adam(model, lr=0.0)
    step = GpuStep(model, adam, items, precision=precision)
    step.set_rates(adam_rates(adam))
    traffic.clear()
    with gpu_model.Counting(precision) as operators:
        fired = step(x).fired
    assert int(fired.sum()) == entries.sum()
    assert entries.min() < 8 < entries.max()  # some items have several tiles of decoder rows, and some a single one
    return {
        "kernels": {name: {"moved": found.moved, "distinct": found.distinct} for name, found in traffic.items()},
        "operators": summed([(COUNTED_AS[work.name], work) for work in operators.works], ("moved", "operations")),
        "wanted": summed(
            [(work.name, work) for work in gpu_model.sparse(gpu_model.Shape(items, width, latents, entries), precision)],
            ("moved", "distinct", "operations"),
        ),
    }


def summed(works: list[tuple[str, Any]], kinds: tuple[str, ...]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {name: dict.fromkeys(kinds, 0.0) for name, _ in works}
    for name, work in works:
        for kind in kinds:
            found[name][kind] += float(getattr(work, kind))
    return found


def main() -> None:
    sys.path.insert(0, str(BENCHMARKS))
    traffic = watch_kernels()
    print(json.dumps({name: counted(*case, traffic) for name, case in CASES.items()}))


if __name__ == "__main__":
    main()
