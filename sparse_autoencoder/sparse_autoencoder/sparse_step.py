"""The exact optimiser step that touches only the active entries (CPU).

Only the encoder's product is dense. It is computed for a few items at a time, so that pre-activations stay in the cache.
Decoding, the derivatives at the active latents and all gradients then cost work in proportion to the active entries, and
gradients never reach memory. The tied bias b is folded into the encoder's (c = b_e - W_e b), and its own gradient follows
from sums computed anyway: sum_i dL/dx_hat_i - (dL/db_e) W_e.
"""

import queue
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparse_autoencoder import kernels
from sparse_autoencoder.kernels import NO_ENTRIES, ItemMajor, LatentMajor, Trained
from sparse_autoencoder.losses import CodeLosses
from sparse_autoencoder.model import SparseAutoencoder
from sparse_autoencoder.optimizer import Adam, adam_rates
from sparse_autoencoder.steps import StepResult
from sparse_autoencoder.workers import Workers

PRE_ACTIVATIONS = 2**22  # the most that a thread holds at once (16 MB): more would leave the cache
FEWEST_ITEMS = 32  # the fewest per piece: below this, reading the encoder would take longer than the product
LATENTS = 128  # latents that a thread updates at once
LARGE = 2**20  # Numbers in an encoder's weight; smaller ones keep torch.mm, and with it the bits of earlier versions.


def _by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T by oneDNN, through the operator that torch.compile uses."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


def _has_onednn() -> bool:
    """Whether this torch has that operator, which is not part of its public interface."""
    x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    try:
        return torch.equal(_by_onednn(x, weight), x @ weight.t())
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False


HAS_ONEDNN = _has_onednn()


def encoder_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T (n x F) of x (n x D) and W (F x D), summed in float32.

    oneDNN computes large ones, if torch has it: on an AMD EPYC with AVX-512 it takes half as long as MKL, which torch.mm
    calls.
    """
    return _by_onednn(x, weight) if HAS_ONEDNN and weight.numel() >= LARGE else torch.mm(x, weight.t())


class _Scratch:
    """Working memory of one thread that selects the entries of a piece."""

    def __init__(self, n_items: int, n_latents: int) -> None:
        self.latent = np.empty((n_items, n_latents), np.int32)
        self.value = np.empty((n_items, n_latents), np.float32)
        self.row_start = np.empty(n_items + 1, np.int64)


@dataclass
class _Piece:
    """Consecutive items of a batch, encoded and then decoded."""

    first: int
    entries: ItemMajor
    revived: ItemMajor
    objective: float = 0.0  # sum of squared errors of all prefixes, plus AuxK's times its coefficient
    error: float = 0.0  # sum of squared errors of the whole reconstruction
    penalty: float = 0.0  # sum of sparsity terms


class SparseStep:
    """Makes steps of one model and its optimiser, and keeps the threads and working memory.

    A step changes the parameters of `model` and the moments of `adam` in place; other code may change them between steps.
    """

    def __init__(self, model: SparseAutoencoder, adam: Adam) -> None:
        self.model, self.adam = model, adam
        self.ends = np.array(model.sparsity.prefix_ends(model.n_latents), np.int64)
        self.n_threads = torch.get_num_threads()
        self.workers = Workers(self.n_threads)
        self._most_items = max(FEWEST_ITEMS, PRE_ACTIVATIONS // model.n_latents)
        self._scratch: queue.SimpleQueue[_Scratch] = queue.SimpleQueue()
        for _ in range(self.n_threads):
            self._scratch.put(_Scratch(self._most_items, model.n_latents))
        self._residual = self._left = torch.empty(0)

    def close(self) -> None:
        """Ends the threads."""
        self.workers.close()

    def _piece_size(self, n: int) -> int:
        """Items per piece of a batch of n: as many as a thread can hold, but few enough to give each thread two pieces."""
        return min(self._most_items, max(FEWEST_ITEMS, -(-n // (2 * self.n_threads))))

    @torch.no_grad()
    def __call__(self, x: Tensor, dead: Tensor | None = None) -> StepResult:
        """The step that `dense_step` makes on transformed inputs x (B x D, float32) and the mask `dead` (F, bool)."""
        model, adam, code = self.model, self.adam, self.model.sparsity.code
        x = x.contiguous()
        n, width = x.shape
        f = model.n_latents
        revivable = None if dead is None else dead.nonzero().flatten()
        n_aux = 0 if revivable is None else code.n_auxiliary(width, len(revivable))
        threshold = self._threshold()
        tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        trained = {
            name: Trained(tensor.numpy(), adam.moments[f"{name}.mean"].numpy(), adam.moments[f"{name}.variance"].numpy())
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
        encode = self._encoder(x, tensors, threshold, revivable if n_aux else None, n_aux)

        def decode(piece: _Piece) -> _Piece:
            rows = slice(piece.first, piece.first + len(piece.entries.row_start) - 1)
            error = np.empty(rows.stop - rows.start, np.float32)
            piece.objective = kernels.decode(
                inputs[rows], tied_bias, decoder, piece.entries, self.ends, scale, residual[:, rows], error
            )
            piece.error = float(error.sum(dtype=np.float64))
            piece.penalty = float(code.penalties(piece.entries).sum(dtype=np.float64))
            torch.sum(self._residual[0, rows], dim=0, out=column_sum[piece.first // items])
            code.add_slopes(piece.entries, n)
            if n_aux:
                piece.objective += code.aux_coeff * kernels.decode_left_over(
                    decoder, piece.revived, scale, np.float32(code.aux_coeff), residual[-1, rows], left[rows]
                )
            return piece

        firsts, limit = range(0, n, items), code.batch_limit(n)
        if limit is None:
            pieces = self.workers.map(lambda first: decode(encode(first, 0.0)), firsts)
        else:  # which entries are kept is known only when all items are encoded
            pieces = self.workers.map(decode, self._largest_of_batch(encode, firsts, limit, code.level(threshold)))

        entries = self._by_latent([piece.entries for piece in pieces])
        revived = self._by_latent([piece.revived for piece in pieces] if n_aux else [])
        fired = np.diff(entries.start)
        gradients = {"encoder_bias": np.empty(f, np.float32), **code.gradients(entries, threshold, n, fired)}
        code.after_batch(model, torch.from_numpy(entries.z))

        rates = adam_rates(adam)
        back = torch.empty(-(-f // LATENTS), width)
        shared = (
            *(entries, revived, inputs, tied_bias, self.ends, residual, left if n_aux else inputs),
            *(trained["encoder_weight"], trained["decoder_weight"], rates, gradients["encoder_bias"]),
        )

        def update(first: int) -> None:
            kernels.update_latents(first, min(first + LATENTS, f), *shared, back[first // LATENTS].numpy())

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
        """The losses that `code_losses` computes of transformed inputs x (B x D, float32)."""
        code, threshold = self.model.sparsity.code, self._threshold()
        x = x.contiguous()
        tensors = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        encode = self._encoder(x, tensors, threshold, None, 0)
        items = self._piece_size(len(x))
        level = code.level(threshold)
        tied_bias, decoder = tensors["tied_bias"].numpy(), tensors["decoder_weight"].numpy()
        error, penalty = np.empty(len(x), np.float32), np.empty(len(x), np.float32)

        def decode(first: int) -> np.ndarray:
            entries = encode(first, level).entries
            rows = slice(first, first + items)
            part = x[rows].numpy()
            residual = np.empty((len(self.ends), *part.shape), np.float32)
            kernels.decode(part, tied_bias, decoder, entries, self.ends, np.float32(1), residual, error[rows])
            penalty[rows] = code.penalties(entries)
            return entries.latent[entries.z != 0]

        active = np.concatenate(self.workers.map(decode, range(0, len(x), items)))
        fired = np.bincount(active, minlength=self.model.n_latents)
        return CodeLosses(torch.from_numpy(error / np.float32(x.shape[1])), torch.from_numpy(penalty), torch.from_numpy(fired))

    def _threshold(self) -> np.ndarray | None:
        threshold = self.model.sparsity.code.threshold(self.model)
        return None if threshold is None else threshold.numpy()

    def _encoder(
        self, x: Tensor, tensors: dict[str, Tensor], threshold: np.ndarray | None, dead: Tensor | None, n_aux: int
    ) -> Callable[[int, float], _Piece]:
        """A function that encodes the piece starting at an item, and keeps its entries above a level."""
        code = self.model.sparsity.code
        items = self._piece_size(len(x))
        weight = tensors["encoder_weight"]
        bias = self._folded_bias(tensors)

        def encode(first: int, level: float) -> _Piece:
            part = x[first : first + items]
            scratch = self._scratch.get()
            try:
                pre = encoder_product(part, weight)
                row_start = scratch.row_start[: len(part) + 1]
                out = (scratch.latent, scratch.value, row_start)
                entries = code.select(pre.numpy(), bias.numpy(), threshold, level, out)
                revived = NO_ENTRIES
                if dead is not None:
                    kernels.select_largest(pre[:, dead].numpy(), bias[dead].numpy(), n_aux, *out)
                    revived = kernels.packed(*out)
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
        self, encode: Callable[[int, float], _Piece], firsts: range, k: int, estimate: float
    ) -> list[_Piece]:
        """The pieces with the k largest positive entries of the whole batch; `estimate` guesses the smallest of these."""
        # Starting a little below the estimate leaves few entries to sort. If it was too high, all are encoded again.
        for level in (0.8 * estimate, 0.0):
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
                piece.entries = ItemMajor(before[entries.row_start], *(column[kept] for column in entries[1:]))
        return pieces

    def _by_latent(self, pieces: list[ItemMajor]) -> LatentMajor:
        """All entries in latent-major order, by a counting sort in which each piece writes to its own places."""
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
