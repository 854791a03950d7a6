"""The exact optimiser step that touches only the active entries, on a GPU.

The counterpart of `sparse_step`: the encoder's product is torch's, and the rest is a fixed sequence of Triton kernels
(`triton_kernels`) in which gradients never reach memory. What depends on the data, such as the number of entries, stays on the
device: shapes are fixed and the host never waits, so a step can be captured in a CUDA graph.
"""

import numpy as np
import torch
from torch import Tensor

from sparse_autoencoder import triton_kernels as kernels
from sparse_autoencoder.model import SparseAutoencoder
from sparse_autoencoder.optimizer import Adam
from sparse_autoencoder.steps import StepResult
from sparse_autoencoder.variants import BatchTopK, JumpReLU, ReLU, TopK

MOST_INPUTS = 4096  # a row must fit the registers of a program, several times over
CHUNK = 256  # Entries that a program gathers in at most a few microseconds; latents with more are divided among programs.
SLOTS = 4096  # the most chunks; their sums take 8 D bytes each, 34 MB if D = 1024
DECODER_ROWS = 8  # decoder rows that a program of the row pass holds at once
ITEM_ROWS = 4  # pairs of input and residual that a program of the latent pass reads at once
LATENTS = 4  # latents that a program updates one after the other: it leaves one row of `back`
SUMMED_ROWS = 64  # rows that a program adds at once
SUMMED_ITEMS = 1024  # items whose losses one program adds at once


def supports(model: SparseAutoencoder) -> bool:
    """Whether GpuStep can make a model's steps: a variant that it knows, a single prefix, and at most MOST_INPUTS inputs."""
    sparsity = model.sparsity
    known = sparsity.has_kernels and type(sparsity.code) in (ReLU, TopK, BatchTopK, JumpReLU)
    return known and len(sparsity.prefix_ends(model.n_latents)) == 1 and model.n_inputs <= MOST_INPUTS


class GpuStep:
    """Makes steps of one model and its optimiser, and keeps the working memory: 24 bytes per pair of an item of the largest
    batch and a latent (in a dense step, every pair may be active), and SLOTS times 8 D bytes.

    A step changes the parameters of `model` and the moments of `adam` in place; other code may change them between steps.
    `adam.steps` is the caller's to count, as the coefficients of the next update are to set (`set_rates`).

    Args:
        model: on the device where steps are made.
        adam: its optimiser.
        max_batch: the most items of a batch.
        precision: of products, as torch.set_float32_matmul_precision names them. With "medium", the operands and the result
            of the encoder's product are rounded to bfloat16, as are the decoder where items read it and the residuals that
            latents read; sums, losses and Adam stay in float32. "highest" and "high" differ in torch's product alone, by
            torch's switch, which the caller sets.

    Raises:
        ValueError: `supports` is false of the model, or an index would not fit 32 bits.
    """

    def __init__(self, model: SparseAutoencoder, adam: Adam, max_batch: int, *, precision: str = "highest") -> None:
        f, d = model.n_latents, model.n_inputs
        if not supports(model):
            raise ValueError(f"no GPU kernels make steps of {model.sparsity!r} with {d} inputs")
        if max(max_batch * f, max_batch * d, f * d) >= 2**31:
            raise ValueError(f"{max_batch} items, {d} inputs and {f} latents are too many: each product must be below 2^31")
        self.model, self.adam = model, adam
        code = model.sparsity.code
        self._l1 = code.l1_coeff if isinstance(code, ReLU) else 0.0
        self._l0 = code.l0_coeff if isinstance(code, JumpReLU) else 0.0
        self._half_window = code.bandwidth / 2 if isinstance(code, JumpReLU) else 0.0
        self._rounded = precision == "medium"
        device = model.tied_bias.device

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def integers(*shape: int) -> Tensor:
            return new(*shape, dtype=torch.int32)

        kind = torch.bfloat16 if self._rounded else torch.float32
        self._pre = new(max_batch, f, dtype=kind)
        self._folded_bias = new(f)
        self._residual = new(max_batch, d, dtype=kind)
        if self._rounded:
            self._x, self._encoder, self._decoder = (new(*shape, dtype=kind) for shape in ((max_batch, d), (f, d), (f, d)))
        n_words = _ceil(max_batch, 32)
        self._by_item = integers(max_batch, _ceil(f, 32))
        self._by_latent, self._before = integers(n_words, f), integers(n_words, f)
        self._item_count, self._item_start = integers(max_batch), integers(max_batch + 1)
        self._latent_count, self._latent_start, self._slot_start = integers(f), integers(f + 1), integers(f + 1)
        entries = max_batch * f
        self._entry_latent, self._entry_z = integers(entries), new(entries)
        self._item_of, self._z_of, self._slope_of = integers(entries), new(entries), new(entries)
        self._chunk = CHUNK
        self._slots = min(SLOTS, f * _ceil(max_batch, CHUNK))
        self._chunk_rows = new(self._slots, 2, d)
        self._chunk_slope, self._chunk_below, self._chunk_learned = new(self._slots), integers(self._slots), new(self._slots)
        self._error, self._penalty = new(max_batch), new(max_batch)
        self._back = new(_ceil(f, LATENTS), d)
        self._residual_sums, self._back_sums = (new(_ceil(n, SUMMED_ROWS), d) for n in (max_batch, len(self._back)))
        self._rates = new(8)
        self._losses, self._fired = new(3), new(f, dtype=torch.int64)
        self._gradients = {name: new(len(vector)) for name, vector in model.named_parameters() if vector.ndim == 1}

    def set_rates(self, rates: tuple[np.float32, ...]) -> None:
        """Sets the coefficients (`optimizer.adam_rates`) of the steps that follow, without waiting for those before."""
        with torch.cuda.device_of(self._rates):
            kernels.rates_kernel[(1,)](self._rates, *map(float, rates), num_warps=1)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> StepResult:
        """The step that `dense_step` makes on transformed inputs x (n x D, float32, contiguous, on the model's device).
        The next step overwrites the result's tensors."""
        threshold = self.model.sparsity.code.threshold(self.model) if self._half_window else None
        with torch.cuda.device_of(x):
            values = self._values(x)
            self._list_entries(values, threshold)
            self._decode(x)
            self._learn(x, threshold)
        loss, l2, penalty = self._losses
        return StepResult(loss, l2, penalty, self._fired)

    def _values(self, x: Tensor) -> Tensor:
        """n x F: pre-activations; for TopK and BatchTopK the latents, which hold zeros where nothing is active."""
        model, code = self.model, self.model.sparsity.code
        weight: Tensor = model.encoder_weight
        bias = torch.addmv(model.encoder_bias, weight, model.tied_bias, alpha=-1, out=self._folded_bias)
        if self._rounded:
            x, weight, bias = self._x[: len(x)].copy_(x), self._encoder.copy_(weight), bias.to(self._pre.dtype)
            self._decoder.copy_(model.decoder_weight)
        pre = torch.addmm(bias, x, weight.t(), out=self._pre[: len(x)])
        if isinstance(code, ReLU | JumpReLU):
            return pre
        latents = code.activate(pre, training=True)
        code.after_batch(model, latents)
        return latents

    def _list_entries(self, values: Tensor, threshold: Tensor | None) -> None:
        """Finds the entries and where they belong, and lists them by item."""
        n, f = values.shape
        n_words = -(-n // 32)
        block = min(128, _power_of_2(max(32, f)))
        kernels.bits_kernel[(n_words, _ceil(f, block))](
            values, threshold, self._half_window, self._by_item, self._by_latent, n, F=f, LATENTS=block
        )
        kernels.count_items_kernel[(_ceil(n, 8),)](
            self._by_item, self._item_count, n, F=f, ITEMS=8, WORDS=min(256, _power_of_2(_ceil(f, 32)))
        )
        kernels.count_latents_kernel[(_ceil(f, 32),)](
            self._by_latent, self._before, self._latent_count, n_words, F=f, WORDS=min(128, _power_of_2(n_words)), LATENTS=32
        )
        kernels.scan_kernel[(1,)](
            self._item_count, self._item_start, self._latent_count, self._latent_start, self._slot_start, n, F=f,
            CHUNK=self._chunk, BLOCK=1024, num_warps=8,
        )  # fmt: skip
        kernels.fill_kernel[(n,)](
            self._by_item, self._item_start, values, threshold, self._entry_latent, self._entry_z, F=f,
            LATENTS=min(1024, _power_of_2(max(32, f))),
        )  # fmt: skip

    def _decode(self, x: Tensor) -> None:
        """The row pass: residuals, losses, and the entries by latent."""
        model = self.model
        n, d = x.shape
        decoder = self._decoder if self._rounded else model.decoder_weight
        kernels.row_kernel[(n,)](
            x, model.tied_bias, decoder, self._item_start, self._entry_latent, self._entry_z, self._latent_start, self._before,
            self._by_latent, self._residual, self._item_of, self._z_of, self._slope_of, self._error, self._penalty,
            2 / (n * d), self._l1 / n, self._l1, self._l0, F=model.n_latents, D=d, WIDTH=_power_of_2(d),
            ROWS=DECODER_ROWS, num_warps=_warps(d),
        )  # fmt: skip

    def _learn(self, x: Tensor, threshold: Tensor | None) -> None:
        """The latent pass, the tied bias, and the vectors."""
        model, moments, gradients = self.model, self.adam.moments, self._gradients
        n, d = x.shape
        f = model.n_latents
        scale = 2 / (n * d)
        entries = (
            self._x if self._rounded else x, self._residual, self._item_of, self._z_of, self._slope_of, self._latent_start,
            self._slot_start, threshold, self._half_window, self._l0 / n,
            self._chunk_rows, self._chunk_slope, self._chunk_below, self._chunk_learned,
        )  # fmt: skip
        shape = {"F": f, "D": d, "WIDTH": _power_of_2(d), "ROWS": ITEM_ROWS, "SLOTS": self._slots, "num_warps": _warps(d)}
        if n > self._chunk:
            kernels.chunk_kernel[(self._slots,)](*entries, CHUNK=self._chunk, **shape)
        weights = (
            tensor
            for name in ("encoder_weight", "decoder_weight")
            for tensor in (model.get_parameter(name), moments[f"{name}.mean"], moments[f"{name}.variance"])
        )
        kernels.latent_kernel[(len(self._back),)](
            *entries, model.tied_bias, self._rates, *weights, gradients["encoder_bias"], gradients.get("log_threshold"),
            self._fired, self._back, scale, LATENTS=LATENTS, **shape,
        )  # fmt: skip
        for rows, n_rows, sums in ((self._residual, n, self._residual_sums), (self._back, len(self._back), self._back_sums)):
            kernels.column_sum_kernel[(_ceil(n_rows, SUMMED_ROWS), _ceil(d, 128))](
                rows, sums, n_rows, D=d, ROWS=SUMMED_ROWS, COLUMNS=128
            )
        kernels.finish_kernel[(_ceil(d, 32),)](
            self._residual_sums, _ceil(n, SUMMED_ROWS), self._back_sums, len(self._back_sums), self._error, self._penalty, n,
            scale, 1 / n, gradients["tied_bias"], self._losses, D=d, ROWS=SUMMED_ROWS, COLUMNS=32,
            ITEMS=SUMMED_ITEMS,
        )  # fmt: skip
        for name, gradient in gradients.items():
            kernels.vector_kernel[(_ceil(len(gradient), 256),)](
                model.get_parameter(name), gradient, moments[f"{name}.mean"], moments[f"{name}.variance"], self._rates,
                len(gradient), BLOCK=256,
            )  # fmt: skip


def _ceil(n: int, size: int) -> int:
    """How many blocks of a size hold n."""
    return -(-n // size)


def _power_of_2(n: int) -> int:
    """The smallest power of two that is at least n: the length of a block, which Triton wants so."""
    return 1 << (n - 1).bit_length()


def _warps(width: int) -> int:
    """Warps of a program that holds rows of this width, so that their registers suffice."""
    return max(4, _power_of_2(width) // 256)
