"""Bytes, operations and the least time of training steps on a GPU, counted kernel by kernel from the shapes.

    python benchmarks/gpu_model.py [--items 4096 --width 1024 --latents 8192 --active 32]

Prints tables in Markdown for the data sheet of an H100, and the fraction of active latents at which the sparse and the dense
step take equally long. Nothing here was measured on a GPU. The count assumes:

- A kernel takes the longest of three times: its operations, its bytes between memory and L2, and its bytes between L2 and the
  processors. Kernels follow one another, and launches take no time (a CUDA graph).
- Between L2 and the processors, every element that a kernel asks for moves each time. An element whose neighbours are not
  asked for moves a whole sector of 32 bytes.
- A tensor of at most half of L2 is found there. A larger one comes from memory, once per kernel that reads it, and goes there,
  once per kernel that writes it. Rows gathered again and again, of the decoder, the inputs and the residuals, therefore load
  L2; Adam's moments and a dense code load the memory.
- A product reads and writes each of its matrices once. (It reads tiles again through L2; on a real card this is part of the
  rate that is measured for the product.)
- Every item has the same number of entries, and no latent has more than a chunk's.

Operations: two per multiplication and addition of the products and gathers and 30 per weight for Adam, by formula. Other
arithmetic is left out; it is negligible.

The dense step is counted while its code runs on tensors without data: every operator reads its arguments and writes its
results.
"""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_autoencoder import SparseAutoencoder
from sparse_autoencoder.gpu_step import CHUNK, DECODER_ROWS, LATENTS, SLOTS, SUMMED_ROWS
from sparse_autoencoder.optimizer import Adam
from sparse_autoencoder.settings import MATMUL_PRECISIONS
from sparse_autoencoder.steps import dense_update

SECTOR = 32
ADAM = 30  # operations per weight
RATES = 8 * 4  # bytes of Adam's coefficients that a row's update asks for
ARITHMETIC = dict(zip(MATMUL_PRECISIONS, ("fp32", "tf32", "bf16"), strict=True))
"""--matmul_precision -> the arithmetic of products."""


class Card(NamedTuple):
    """What a card can do."""

    flops: dict[str, float]  # operations per second of each arithmetic
    memory: float  # bytes per second
    l2: float  # bytes per second
    l2_bytes: int


H100 = Card({"fp32": 66.9e12, "tf32": 494.7e12, "bf16": 989e12}, 3.35e12, 5.5e12, 50 * 2**20)
"""The data sheet of an H100 SXM. The rate of L2 is an assumption."""


class Access(NamedTuple):
    """What a kernel reads or writes of a tensor."""

    moved: float  # bytes asked for
    tensor: float  # bytes of the whole tensor
    distinct: float  # bytes asked for at least once
    element: int = 0  # bytes of an element, if each lies alone in its sector

    def of_memory(self, card: Card) -> float:
        return self._sectors(self.distinct) if self.tensor > card.l2_bytes / 2 else 0.0

    def of_l2(self) -> float:
        return self._sectors(self.moved)

    def _sectors(self, n_bytes: float) -> float:
        return n_bytes * SECTOR / self.element if self.element else n_bytes


class Work(NamedTuple):
    """What a kernel does."""

    name: str
    accesses: Sequence[Access]
    operations: float = 0.0
    arithmetic: str = "fp32"

    def times(self, card: Card) -> dict[str, float]:
        """Seconds of each of the three."""
        return {
            "operations": self.operations / card.flops[self.arithmetic],
            "memory": sum(access.of_memory(card) for access in self.accesses) / card.memory,
            "L2": sum(access.of_l2() for access in self.accesses) / card.l2,
        }

    def seconds(self, card: Card) -> float:
        return max(self.times(card).values())

    @property
    def moved(self) -> float:
        return sum(access.moved for access in self.accesses)

    @property
    def distinct(self) -> float:
        return sum(access.distinct for access in self.accesses)


Works: TypeAlias = list[Work]


def whole(n_bytes: float) -> Access:
    """All of a tensor, once."""
    return Access(n_bytes, n_bytes, n_bytes)


def again(moved: float, tensor: float) -> Access:
    """Parts of a tensor, in runs of neighbours, which may come several times."""
    return Access(moved, tensor, min(moved, tensor))


def lone(n: float, tensor: float, element: int = 4) -> Access:
    """n elements of a tensor, far from each other."""
    return Access(n * element, tensor, min(n * element, tensor), element)


# ---------------------------------------------------------------------------------------------------------- sparse step


class Shape(NamedTuple):
    """A batch of a ReLU model and its entries."""

    items: int
    width: int
    latents: int
    active: NDArray[np.int64]  # entries of each item

    @classmethod
    def even(cls, items: int, width: int, latents: int, active: float) -> "Shape":
        """The same number of entries for each item."""
        return cls(items, width, latents, np.full(items, round(active)))


def sparse(shape: Shape, precision: str) -> Works:
    """The kernels of GpuStep in their order, and torch's operators between them by what they are for."""
    n, d, f = shape.items, shape.width, shape.latents
    entries = int(shape.active.sum())
    tiles = -(-shape.active // DECODER_ROWS)
    rows_read = entries + int(np.maximum(tiles - 1, 0).sum()) * DECODER_ROWS  # all but the last tile are read twice
    rounded = precision == "medium"
    of = 2 if rounded else 4  # bytes of pre-activations, decoder rows in the row pass, residuals and inputs in the latent pass
    weights, inputs, codes = f * d, n * d, n * f  # elements
    words, item_words = -(-n // 32) * f, n * -(-f // 32)
    programs = -(-f // LATENTS)
    gathers = 4 * entries * d
    works = [Work("folded bias", [whole(4 * weights), whole(4 * d), whole(4 * f), whole(4 * f)], 2 * weights)]
    if rounded:
        works.append(Work("casts", [whole(size * n_bytes) for size in (inputs, weights, weights, f) for n_bytes in (4, 2)]))
    works += [
        Work(
            "product",
            [whole(of * inputs), whole(of * weights), whole(of * f), whole(of * codes)],
            2 * n * weights,
            ARITHMETIC[precision],
        ),
        Work("bits_kernel", [whole(of * codes), whole(4 * words), whole(4 * item_words)]),
        Work("count_items_kernel", [whole(4 * item_words), whole(4 * n)]),
        Work("count_latents_kernel", [whole(4 * words), whole(4 * words), whole(4 * f)]),
        Work("scan_kernel", [whole(4 * n), whole(4 * (n + 1)), whole(4 * f), whole(4 * (f + 1)), whole(4 * (f + 1))]),
        Work(
            "fill_kernel",
            [whole(4 * item_words), whole(4 * n), lone(entries, of * codes, of), whole(4 * entries), whole(4 * entries)],
        ),
        Work(
            "row_kernel",
            [
                again(4 * inputs, 4 * d),  # the tied bias
                whole(4 * inputs),
                whole(of * inputs),
                again(of * rows_read * d, of * weights),
                again(4 * 2 * n, 4 * (n + 1)),
                again(4 * (entries + rows_read), 4 * entries),  # entry_latent
                again(4 * 2 * entries, 4 * entries),  # entry_z
                *(lone(entries, size) for size in (4 * f, 4 * words, 4 * words)),  # where an entry goes
                *(lone(entries, 4 * entries) for _ in range(3)),
                whole(4 * n),
                whole(4 * n),
            ],
            gathers,
        ),
    ]
    if n > CHUNK:
        slots = min(SLOTS, f * -(-n // CHUNK))
        works.append(Work("chunk_kernel", [again(4 * slots, 4)]))
    works += [
        Work(
            "latent_kernel",
            [
                *(again(of * entries * d, of * inputs) for _ in range(2)),  # inputs and residuals
                *(whole(4 * entries) for _ in range(3)),
                *(again(4 * 2 * f, 4 * (f + 1)) for _ in range(2)),  # starts of entries and of chunks
                *(whole(4 * weights) for _ in range(12)),  # both weights and their moments, read and written
                again(2 * RATES * f, RATES),
                again(4 * programs * d, 4 * d),  # the tied bias
                whole(4 * programs * d),
                whole(8 * f),
                whole(4 * f),
            ],
            gathers + ADAM * 2 * weights,
        ),
        Work("column_sum_kernel", [whole(of * inputs), whole(4 * -(-n // SUMMED_ROWS) * d)]),
        Work("column_sum_kernel", [whole(4 * programs * d), whole(4 * -(-programs // SUMMED_ROWS) * d)]),
        Work(
            "finish_kernel",
            [
                *(whole(4 * -(-rows // SUMMED_ROWS) * d) for rows in (n, programs)),
                whole(4 * d),
                whole(4 * n),
                whole(4 * n),
                whole(4 * 3),
            ],
        ),
        *(
            Work("vector_kernel", [*(whole(4 * size) for _ in range(7)), again(RATES * -(-size // 256), RATES)])
            for size in (d, f)
        ),
    ]
    return works


# ----------------------------------------------------------------------------------------------------------- dense step


class Counting(TorchDispatchMode):
    """Counts the operators of torch that run inside it."""

    def __init__(self, precision: str) -> None:
        super().__init__()
        self.precision = precision
        self.works: Works = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace != "aten" or func.is_view or name.startswith(("empty", "new_empty")):
            return results
        written, read = _changed(func, args, kwargs or {})
        given = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        made = [tensor for tensor in tree_leaves(results) if isinstance(tensor, Tensor) and _storage(tensor) not in given]
        accesses = [whole(_bytes(tensor)) for tensor in (*read, *written, *made)]
        operations, arithmetic = 0.0, "fp32"
        if name in ("mm", "addmm", "mv", "addmv"):
            left, right = args[-2:]
            operations = 2 * left.numel() * right.numel() / left.shape[1]
            if name in ("mm", "addmm"):  # as the precision says; a vector's product is bound by memory in any case
                arithmetic = "bf16" if left.dtype == torch.bfloat16 else ARITHMETIC[self.precision]
        elif name == "_fused_adam_":
            operations = ADAM * sum(parameter.numel() for parameter in args[0])
        self.works.append(Work(name, accesses, operations, arithmetic))
        return results


def _changed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operator writes, and those that it reads, among its arguments."""
    written: list[Tensor] = []
    read: list[Tensor] = []
    name = func.overloadpacket.__name__
    for number, argument in enumerate(func._schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        # Adam's gradients are declared to change, but do so only with a gradient scaler.
        changes = argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"
        if changes:
            written += tensors
        if not changes or not (name in ("copy_", "fill_", "zero_") or argument.is_out):
            read += tensors
    return written, read


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor, of which an expanded one has fewer than elements."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def dense(shape: Shape, precision: str) -> Works:
    """The operators of a dense step, whatever the number of active latents."""
    with FakeTensorMode():
        model = SparseAutoencoder(shape.width, shape.latents)
        adam, x = Adam(model, lr=1e-3), torch.empty(shape.items, shape.width)
        with Counting(precision) as count:
            dense_update(model, adam, x, None, bf16=precision == "medium")
    return count.works


# --------------------------------------------------------------------------------------------------------------- tables


def total(works: Works, card: Card) -> float:
    return sum(work.seconds(card) for work in works)


def crossover(shape: Shape, precision: str, card: Card) -> float:
    """The fraction of active latents at which the sparse step takes as long as the dense one."""
    wanted = total(dense(shape, precision), card)
    least, most = 0, shape.latents
    while most - least > 1:
        middle = (least + most) // 2
        even = Shape.even(shape.items, shape.width, shape.latents, middle)
        least, most = (middle, most) if total(sparse(even, precision), card) <= wanted else (least, middle)
    return least / shape.latents


def table(works: Works, card: Card) -> str:
    """A line per name."""
    lines = ["| kernel | GFLOP | memory, MB | L2, MB | us | bound by |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(work.name for work in works):
        of = [work for work in works if work.name == name]
        us, longest = total(of, card) * 1e6, max(of, key=lambda work: work.seconds(card)).times(card)
        memory = sum(access.of_memory(card) for work in of for access in work.accesses) / 1e6
        l2 = sum(access.of_l2() for work in of for access in work.accesses) / 1e6
        operations = sum(work.operations for work in of) / 1e9
        by = max(longest, key=lambda kind: longest[kind])
        lines.append(f"| {name} | {operations:.2f} | {memory:.0f} | {l2:.0f} | {us:.1f} | {by} |")
    return "\n".join([*lines, f"| all | | | | {total(works, card) * 1e6:.0f} | |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("items", 4096), ("width", 1024), ("latents", 8192), ("active", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    shape = Shape.even(options.items, options.width, options.latents, options.active)
    for precision in MATMUL_PRECISIONS:
        for kind, count in (("sparse", sparse), ("dense", dense)):
            print(f"\n{kind} step, --matmul_precision {precision}\n\n{table(count(shape, precision), H100)}")
        print(f"\nequally long at {crossover(shape, precision, H100):.2%} active")


if __name__ == "__main__":
    main()
