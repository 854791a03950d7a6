"""The exact optimiser step that touches the active entries alone (CPU).

Only the encoder's product is dense. It is made a few hundred items at a time, so that pre-activations never leave the
cache; decoding, the derivatives at the active latents and all gradients then cost work in proportion to the active
entries, and gradients never reach memory. The tied bias b is folded into the encoder's (c = b_e - W_e b), and its own
gradient follows from sums that are there anyway: sum_i dL/dx_hat_i - (dL/db_e) W_e.
"""

import math
import queue
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparse_autoencoder import kernels
from sparse_autoencoder.kernels import ItemMajor, LatentMajor, Trained
from sparse_autoencoder.losses import CodeLosses
from sparse_autoencoder.model import SparseAutoencoder
from sparse_autoencoder.optimizer import Adam
from sparse_autoencoder.sparsity import BatchTopK, Code, JumpReLU, ReLU, TopK, code_of, n_auxiliary, prefix_ends
from sparse_autoencoder.steps import StepResult
from sparse_autoencoder.workers import Workers

ITEMS = 1024
"""Items whose pre-activations a thread holds at once, at most: more would leave the cache."""
FEWEST_ITEMS = 32
"""And at least: with fewer, reading the encoder would take longer than the product."""
LATENTS = 128
"""Latents that a thread updates at once."""


def adam_rates(adam: Adam) -> tuple[np.float32, ...]:
    """What the kernels need for the update that comes next, each rounded once from float64."""
    step = adam.steps + 1
    beta_1, beta_2 = adam.betas
    lr = adam.lr / (1 - beta_1**step)
    inverse_root = 1 / math.sqrt(1 - beta_2**step)
    rates = (lr, beta_1, 1 - beta_1, beta_2, 1 - beta_2, inverse_root, adam.epsilon, adam.weight_decay)
    return tuple(np.float32(rate) for rate in rates)


class _Scratch:
    """What one thread needs to encode a piece."""

    def __init__(self, n_items: int, n_latents: int) -> None:
        self.pre = torch.empty(n_items, n_latents)
        self.latent = np.empty((n_items, n_latents), np.int32)
        self.value = np.empty((n_items, n_latents), np.float32)
        self.row_start = np.empty(n_items + 1, np.int64)


@dataclass
class _Piece:
    """What becomes of consecutive items."""

    first: int
    entries: ItemMajor
    revived: ItemMajor
    objective: float = 0.0
    """Squared errors summed, of all prefixes, AuxK's included with its coefficient."""
    error: float = 0.0
    """Squared errors summed, of the whole reconstruction."""
    penalty: float = 0.0
    """Sparsity terms summed."""


class SparseStep:
    """Makes steps of one model and its optimiser, keeping their threads and working memory.

    The parameters and Adam's moments are those of `model` and `adam`, changed in place; other code may change them
    between steps.
    """

    def __init__(self, model: SparseAutoencoder, adam: Adam) -> None:
        self.model = model
        self.adam = adam
        self.ends = np.array(prefix_ends(model.sparsity, model.n_latents), np.int64)
        self.n_threads = torch.get_num_threads()
        self.workers = Workers(self.n_threads)
        self._scratch: queue.SimpleQueue[_Scratch] = queue.SimpleQueue()
        for _ in range(self.n_threads):
            self._scratch.put(_Scratch(ITEMS, model.n_latents))
        self._residual = torch.empty(0)
        self._left = torch.empty(0)

    def close(self) -> None:
        """Ends the threads."""
        self.workers.close()

    def _piece_size(self, n: int) -> int:
        """How many of n items make a piece: up to ITEMS, and few enough to give each thread two."""
        return min(ITEMS, max(FEWEST_ITEMS, -(-n // (2 * self.n_threads))))

    @torch.no_grad()
    def __call__(self, x: Tensor, dead: Tensor | None = None) -> StepResult:
        """A step on transformed inputs x (B x D, float32), as `dense_step` makes it."""
        model, adam = self.model, self.adam
        code = code_of(model.sparsity)
        x = x.contiguous()
        n, width = x.shape
        f = model.n_latents
        n_aux = n_auxiliary(model.sparsity, width, len(dead)) if dead is not None else 0
        tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        trained = {
            name: Trained(
                tensor.numpy(), adam.moments[f"{name}.mean"].numpy(), adam.moments[f"{name}.variance"].numpy()
            )
            for name, tensor in tensors.items()
        }
        tied_bias, decoder = trained["tied_bias"].value, trained["decoder_weight"].value
        if self._residual.shape != (len(self.ends), n, width):
            self._residual = torch.empty(len(self.ends), n, width)
        if n_aux and self._left.shape != x.shape:
            self._left = torch.empty_like(x)
        inputs, residual, left = x.numpy(), self._residual.numpy(), self._left.numpy()
        scale = np.float32(2 / x.numel())
        items = self._piece_size(n)
        column_sum = torch.empty(-(-n // items), width)
        encode = self._encoder(x, tensors, dead if n_aux else None, n_aux)

        def decode(piece: _Piece) -> _Piece:
            rows = slice(piece.first, piece.first + len(piece.entries.row_start) - 1)
            error = np.empty(rows.stop - rows.start, np.float32)
            piece.objective = kernels.decode(
                inputs[rows], tied_bias, decoder, piece.entries, self.ends, scale, residual[:, rows], error
            )
            piece.error = float(error.sum(dtype=np.float64))
            piece.penalty = float(_penalties(code, piece.entries).sum(dtype=np.float64))
            torch.sum(self._residual[0, rows], dim=0, out=column_sum[piece.first // items])
            if isinstance(code, ReLU):
                np.add(piece.entries.slope, np.float32(code.l1_coeff / n), out=piece.entries.slope)
            if n_aux:
                assert isinstance(code, TopK | BatchTopK)
                piece.objective += code.aux_coeff * kernels.decode_left_over(
                    decoder, piece.revived, scale, np.float32(code.aux_coeff), residual[-1, rows], left[rows]
                )
            return piece

        firsts = range(0, n, items)
        if isinstance(code, BatchTopK):
            # The batch's smallest active value is known only when all items are encoded.
            pieces, smallest = self._largest_of_batch(encode, firsts, code.k * n)
            code.update_threshold(model.threshold, torch.tensor(smallest))
            pieces = self.workers.map(decode, pieces)
        else:
            pieces = self.workers.map(lambda first: decode(encode(first, 0.0)), firsts)

        entries = self._by_latent([piece.entries for piece in pieces])
        revived = self._by_latent([piece.revived for piece in pieces] if n_aux else [])
        gradients = {"encoder_bias": np.empty(f, np.float32)}
        fired = np.diff(entries.start)
        if isinstance(code, JumpReLU):
            threshold = tensors["log_threshold"].exp().numpy()
            gradients["log_threshold"] = np.empty(f, np.float32)
            kernels.learn_thresholds(
                entries, threshold, code.bandwidth, code.l0_coeff / n, gradients["log_threshold"], fired
            )

        rates = adam_rates(adam)
        back = torch.empty(-(-f // LATENTS), width)

        def update(first: int) -> None:
            kernels.update_latents(
                first,
                min(first + LATENTS, f),
                entries,
                revived,
                inputs,
                tied_bias,
                self.ends,
                residual,
                left if n_aux else inputs,
                trained["encoder_weight"],
                trained["decoder_weight"],
                rates,
                gradients["encoder_bias"],
                back[first // LATENTS].numpy(),
            )

        self.workers.map(update, range(0, f, LATENTS))
        gradients["tied_bias"] = (column_sum.sum(dim=0) - back.sum(dim=0)).numpy()
        for name, gradient in gradients.items():
            kernels.update_vector(trained[name], gradient, rates)
        adam.steps += 1

        l2 = sum(piece.error for piece in pieces) / x.numel()
        penalty = sum(piece.penalty for piece in pieces) / n
        loss = sum(piece.objective for piece in pieces) / x.numel() + penalty
        return StepResult(torch.tensor(loss), torch.tensor(l2), torch.tensor(penalty), torch.from_numpy(fired))

    @torch.no_grad()
    def losses(self, x: Tensor) -> CodeLosses:
        """What `code_losses` computes of transformed inputs x (B x D, float32)."""
        code = code_of(self.model.sparsity)
        x = x.contiguous()
        tensors = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        encode = self._encoder(x, tensors, None, 0)
        items = self._piece_size(len(x))
        level = float(self.model.threshold) if isinstance(code, BatchTopK) else 0.0
        tied_bias, decoder = tensors["tied_bias"].numpy(), tensors["decoder_weight"].numpy()
        error, penalty = np.empty(len(x), np.float32), np.empty(len(x), np.float32)

        def decode(first: int) -> np.ndarray:
            entries = encode(first, level).entries
            rows = slice(first, first + items)
            part = x[rows].numpy()
            residual = np.empty((len(self.ends), *part.shape), np.float32)
            kernels.decode(part, tied_bias, decoder, entries, self.ends, np.float32(1), residual, error[rows])
            penalty[rows] = _penalties(code, entries)
            return entries.latent[entries.z != 0]

        active = np.concatenate(self.workers.map(decode, range(0, len(x), items)))
        fired = np.bincount(active, minlength=self.model.n_latents)
        return CodeLosses(
            torch.from_numpy(error / np.float32(x.shape[1])), torch.from_numpy(penalty), torch.from_numpy(fired)
        )

    def _encoder(
        self, x: Tensor, tensors: dict[str, Tensor], dead: Tensor | None, n_aux: int
    ) -> Callable[[int, float], _Piece]:
        """A function from the first item of a piece to its entries; for BatchTopK, to those above a level."""
        code = code_of(self.model.sparsity)
        items = self._piece_size(len(x))
        weight = tensors["encoder_weight"].t()
        folded = self._folded_bias(tensors)
        bias = offset = folded.numpy()
        threshold = np.empty(0, np.float32)
        if isinstance(code, JumpReLU):
            threshold = tensors["log_threshold"].exp().numpy()
            offset = bias - threshold + np.float32(code.bandwidth / 2)  # the window below the threshold learns too

        def encode(first: int, level: float) -> _Piece:
            part = x[first : first + items]
            scratch = self._scratch.get()
            try:
                pre = torch.mm(part, weight, out=scratch.pre[: len(part)])
                row_start = scratch.row_start[: len(part) + 1]
                out = (scratch.latent, scratch.value, row_start)
                if isinstance(code, TopK):
                    kernels.select_largest(pre.numpy(), bias, code.k, *out)
                else:
                    kernels.select_above(pre.numpy(), bias, offset, np.float32(level), *out)
                entries = _packed(*out)
                if isinstance(code, JumpReLU):
                    entries.z[entries.z <= threshold[entries.latent]] = 0
                revived = NO_ENTRIES
                if dead is not None:
                    kernels.select_largest(pre[:, dead].numpy(), folded[dead].numpy(), n_aux, *out)
                    revived = _packed(*out)
                    revived = revived._replace(latent=dead.numpy().astype(np.int32)[revived.latent])
            finally:
                self._scratch.put(scratch)
            return _Piece(first, entries, revived)

        return encode

    def _folded_bias(self, tensors: dict[str, Tensor]) -> Tensor:
        """b_e - W_e b (F)."""
        weight, own, tied = (tensors[name] for name in ("encoder_weight", "encoder_bias", "tied_bias"))
        bias = torch.empty_like(own)

        def rows(first: int) -> None:
            part = slice(first, first + LATENTS)
            torch.addmv(own[part], weight[part], tied, alpha=-1, out=bias[part])

        self.workers.map(rows, range(0, len(own), LATENTS))
        return bias

    def _largest_of_batch(
        self, encode: Callable[[int, float], _Piece], firsts: range, k: int
    ) -> tuple[list[_Piece], float]:
        """The pieces with the k largest positive entries of the whole batch, and the smallest of them."""
        # Few lie between what this level lets through and what is kept. Where it was set too high, all are taken.
        for level in (0.8 * float(self.model.threshold), 0.0):
            pieces = self.workers.map(lambda first, level=level: encode(first, level), firsts)  # type: ignore[misc]
            values = np.concatenate([piece.entries.z for piece in pieces])
            if len(values) >= k:
                break
        if len(values) > k:
            edge = np.partition(np.nan_to_num(values, nan=np.inf), len(values) - k)[len(values) - k]
            equals = k - int(np.count_nonzero(~(values <= edge)))
            for piece in pieces:
                entries = piece.entries
                at_edge = entries.z == edge
                kept = ~(entries.z <= edge) | (at_edge & (np.cumsum(at_edge) <= equals))
                equals -= int(np.count_nonzero(at_edge & kept))
                before = np.concatenate([[0], np.cumsum(kept)])
                piece.entries = ItemMajor(
                    before[entries.row_start], entries.latent[kept], entries.z[kept], entries.slope[kept]
                )
            values = values[~(values < edge)]
        return pieces, float(values.min()) if len(values) else math.inf

    def _by_latent(self, pieces: list[ItemMajor]) -> LatentMajor:
        """All entries in latent-major order: a counting sort, each piece's entries to their own places."""
        f = self.model.n_latents
        start = np.zeros(f + 1, np.int64)
        per_piece = np.zeros((len(pieces), f), np.int64)
        self.workers.map(lambda i: kernels.histogram(pieces[i].latent, per_piece[i]), range(len(pieces)))
        np.cumsum(per_piece.sum(axis=0), out=start[1:])
        places = start[:-1] + np.cumsum(per_piece, axis=0) - per_piece
        total = int(start[-1])
        out = LatentMajor(start, np.empty(total, np.int32), np.empty(total, np.float32), np.empty(total, np.float32))
        firsts = np.cumsum([0, *(len(piece.row_start) - 1 for piece in pieces)])
        self.workers.map(lambda i: kernels.scatter(pieces[i], firsts[i], places[i], out), range(len(pieces)))
        return out


def _penalties(code: Code, entries: ItemMajor) -> np.ndarray:
    """The sparsity term of each item (n, float32), from its entries."""
    n = len(entries.row_start) - 1
    total, active = np.empty(n, np.float32), np.empty(n, np.float32)
    kernels.sum_items(entries.row_start, entries.z, total, active)
    if isinstance(code, ReLU):
        return np.float32(code.l1_coeff) * total
    return np.float32(code.l0_coeff if isinstance(code, JumpReLU) else 0) * active


def _packed(latent: np.ndarray, value: np.ndarray, row_start: np.ndarray) -> ItemMajor:
    """The entries that a selection left in scratch memory, in arrays of their own."""
    total = int(row_start[-1])
    entries = ItemMajor(
        row_start.copy(), np.empty(total, np.int32), np.empty(total, np.float32), np.empty(total, np.float32)
    )
    kernels.pack(latent, value, row_start, entries.latent, entries.z)
    return entries


NO_ENTRIES = ItemMajor(np.zeros(1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.float32))
