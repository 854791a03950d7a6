"""Compiled loops over the active entries of a code: all of a training step except the encoder's product.

Each call runs on one thread, without Python's lock, and sums in a fixed order. The compiler may reorder sums and fuse
products (once, when it compiles), but NaN and infinity keep their meaning.
"""

import math
from typing import NamedTuple, TypeAlias

import numpy as np
from numba import njit

from sparse_autoencoder.compiled import compiled

Array: TypeAlias = np.ndarray
Rates: TypeAlias = tuple[np.float32, ...]
Selection: TypeAlias = tuple[Array, Array, Array]  # memory to select in: latents, values (both n x F), row starts (n + 1)


class ItemMajor(NamedTuple):
    """The active entries of n items, ordered by item, then by latent."""

    row_start: Array  # where each item's entries start (n + 1, int64)
    latent: Array  # each entry's latent (int32)
    z: Array  # its value (float32)
    slope: Array  # the derivative of the loss by the value (float32), filled in by `decode`


NO_ENTRIES = ItemMajor(np.zeros(1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.float32))


class LatentMajor(NamedTuple):
    """The same entries, ordered by latent, then by item."""

    start: Array  # where each latent's entries start (F + 1, int64)
    item: Array  # each entry's item (int32)
    z: Array
    slope: Array


class Trained(NamedTuple):
    """A parameter and Adam's two moments of it."""

    value: Array
    mean: Array
    variance: Array


FASTMATH = {"reassoc", "contract", "nsz", "arcp"}
BLOCK = 32  # Pre-activations tested at once. Most blocks hold no active latent and cost only a few vector instructions.


@njit(inline="always", fastmath=FASTMATH)
def _scan(pre: Array, bias: Array, offset: Array, level: float, latent: Array, value: Array) -> int:
    """Collects, in ascending order, the latents f of one row with pre[f] + offset[f] > level and their values pre[f] +
    bias[f]. NaN is collected too, so that it reaches the loss. Returns the number of latents."""
    n = pre.shape[0]
    count = 0
    for start in range(0, n, BLOCK):
        # Slices, because numba cannot vectorise a loop from `start`, which might be negative.
        pre_block, offset_block = pre[start : start + BLOCK], offset[start : start + BLOCK]
        hits = np.int32(0)
        for f in range(pre_block.shape[0]):
            hits += np.int32(not (pre_block[f] + offset_block[f] <= level))
        if hits > 0:
            for f in range(pre_block.shape[0]):
                if not (pre_block[f] + offset_block[f] <= level):
                    latent[count] = start + f
                    value[count] = pre_block[f] + bias[start + f]
                    count += 1
    return count


@njit(inline="always", fastmath=FASTMATH)
def _add_rows(total: Array, table: Array, index: Array, weight: Array, start: int, stop: int) -> None:
    """total (D) += sum over entries p of weight[p] * table[index[p]]."""
    width = total.shape[0]
    p = start
    while p + 4 <= stop:  # four at a time: `total` is read and written a quarter as often
        a, b, c, e = table[index[p]], table[index[p + 1]], table[index[p + 2]], table[index[p + 3]]
        wa, wb, wc, we = weight[p], weight[p + 1], weight[p + 2], weight[p + 3]
        for d in range(width):
            total[d] += (wa * a[d] + wb * b[d]) + (wc * c[d] + we * e[d])
        p += 4
    while p < stop:
        a, wa = table[index[p]], weight[p]
        for d in range(width):
            total[d] += wa * a[d]
        p += 1


@njit(inline="always", fastmath=FASTMATH)
def _dot(a: Array, b: Array) -> np.float32:
    """The scalar product of two rows."""
    total = np.float32(0)
    for d in range(a.shape[0]):
        total += a[d] * b[d]
    return total


@compiled(fastmath=FASTMATH)
def select_above(pre: Array, bias: Array, offset: Array, level: float, latent: Array, value: Array, row_start: Array) -> None:
    """`_scan` of each row of pre (n x F) into the rows of latent and value (n x F); row_start (n + 1) sums the counts."""
    row_start[0] = 0
    for i in range(pre.shape[0]):
        row_start[i + 1] = row_start[i] + _scan(pre[i], bias, offset, level, latent[i], value[i])


@njit(inline="always")
def _kth_largest(values: Array, n: int, k: int) -> np.float32:
    """The k-th largest of the first n values (none NaN), by quickselect. Reorders the values."""
    low, high, want = 0, n - 1, k - 1
    while low < high:
        pivot = values[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if want <= j:
            high = j
        elif want >= i:
            low = i
        else:
            break
    return values[want]


@compiled(fastmath=FASTMATH)
def select_largest(pre: Array, bias: Array, k: int, latent: Array, value: Array, row_start: Array) -> None:
    """Like `select_above`, for the k largest positive values of each row. Of equal values at the edge, the first win.

    The latents are dealt into at least 4 k classes. The k-th largest of the classes' maxima is a close lower bound on the
    k-th largest value, since k classes have a member that reaches it: few more than k values remain to be sorted.
    """
    n, width = pre.shape
    n_classes = min(width, max(4 * k, 128))
    maxima = np.empty(n_classes, np.float32)
    candidates = np.empty(width, np.float32)
    row_start[0] = 0
    for i in range(n):
        row = pre[i]
        level = np.float32(0)
        if k < n_classes:
            maxima[:] = 0
            for start in range(0, width, n_classes):
                row_block, bias_block = row[start : start + n_classes], bias[start : start + n_classes]
                for j in range(row_block.shape[0]):
                    v = row_block[j] + bias_block[j]
                    maxima[j] = v if v > maxima[j] else maxima[j]
            bound = _kth_largest(maxima, n_classes, k)
            level = np.float32(bound * np.float32(0.999999))  # `_scan` excludes values equal to the level
            if level >= bound:
                level = np.float32(0)
        count = _scan(row, bias, bias, level, latent[i], value[i])
        if count > k:
            for j in range(count):
                v = value[i, j]
                candidates[j] = v if v == v else np.inf
            edge = _kth_largest(candidates, count, k)
            equals = k
            for j in range(count):
                equals -= not (value[i, j] <= edge)
            kept = 0
            for j in range(count):
                v = value[i, j]
                if not (v <= edge) or (v == edge and equals > 0):
                    equals -= v == edge
                    latent[i, kept] = latent[i, j]
                    value[i, kept] = v
                    kept += 1
            count = kept
        row_start[i + 1] = row_start[i] + count


@compiled()
def packed(latent: Array, value: Array, row_start: Array) -> ItemMajor:
    """The entries that a selection left in working memory (latent and value: n x F), copied to arrays of their own."""
    total = row_start[-1]
    packed_latent, packed_value = np.empty(total, np.int32), np.empty(total, np.float32)
    for i in range(row_start.shape[0] - 1):
        start = row_start[i]
        for j in range(row_start[i + 1] - start):
            packed_latent[start + j] = latent[i, j]
            packed_value[start + j] = value[i, j]
    return ItemMajor(row_start.copy(), packed_latent, packed_value, np.empty(total, np.float32))


@compiled(fastmath=FASTMATH)
def decode(
    x: Array, tied_bias: Array, decoder: Array, entries: ItemMajor, ends: Array, scale: float, residual: Array, error: Array
) -> float:
    """Computes the residuals of n items, and from them the slopes while the decoder's rows are in cache.

    `ends` (G) holds the sizes of the prefixes of the latents that must reconstruct alone; a plain SAE has one, F.
    `residual` (G x n x D) becomes, for each prefix, `scale` times the sum of x_hat - x over this and all longer prefixes:
    the gradient of the reconstruction by which the latents that the prefix adds learn.
    `error` (n) becomes the squared error of each item's whole reconstruction. Returns the squared errors of all prefixes,
    summed over the items.
    """
    n, width = x.shape
    n_prefixes = ends.shape[0]
    total = np.empty(width, np.float32)
    objective = 0.0
    for i in range(n):
        for d in range(width):
            total[d] = tied_bias[d] - x[i, d]
        p = entries.row_start[i]
        for g in range(n_prefixes):
            start = p
            while p < entries.row_start[i + 1] and entries.latent[p] < ends[g]:
                p += 1
            _add_rows(total, decoder, entries.latent, entries.z, start, p)
            error[i] = _dot(total, total)
            objective += error[i]
            r = residual[g, i]
            for d in range(width):
                r[d] = scale * total[d]
        for g in range(n_prefixes - 2, -1, -1):
            r, longer = residual[g, i], residual[g + 1, i]
            for d in range(width):
                r[d] += longer[d]
        g = 0
        for p in range(entries.row_start[i], entries.row_start[i + 1]):
            while entries.latent[p] >= ends[g]:
                g += 1
            entries.slope[p] = _dot(residual[g, i], decoder[entries.latent[p]])
    return objective


@compiled(fastmath=FASTMATH)
def decode_left_over(decoder: Array, entries: ItemMajor, scale: float, coeff: float, residual: Array, left: Array) -> float:
    """AuxK: the entries of dead latents reconstruct x - x_hat, a fixed target equal to -residual / scale (n x D).

    `left` (n x D) becomes the gradient of that reconstruction: coeff * scale times its error. Fills in the slopes and
    returns the sum of squared errors.
    """
    n, width = residual.shape
    error = 0.0
    inverse = np.float32(1 / scale)
    for i in range(n):
        r = left[i]
        for d in range(width):
            r[d] = residual[i, d] * inverse
        _add_rows(r, decoder, entries.latent, entries.z, entries.row_start[i], entries.row_start[i + 1])
        error += _dot(r, r)
        for d in range(width):
            r[d] *= coeff * scale
        for p in range(entries.row_start[i], entries.row_start[i + 1]):
            entries.slope[p] = _dot(r, decoder[entries.latent[p]])
    return error


@compiled()
def item_sums(entries: ItemMajor) -> tuple[Array, Array]:
    """For each item, the sum of its entries' values and the number of non-zero ones (both n, float32)."""
    n = entries.row_start.shape[0] - 1
    total, active = np.zeros(n, np.float32), np.zeros(n, np.float32)
    for i in range(n):
        for p in range(entries.row_start[i], entries.row_start[i + 1]):
            total[i] += entries.z[p]
            active[i] += entries.z[p] != 0
    return total, active


@compiled()
def histogram(latent: Array, count: Array) -> None:
    """count[f] (F) becomes the number of entries of latent f."""
    count[:] = 0
    for p in range(latent.shape[0]):
        count[latent[p]] += 1


@compiled()
def scatter(entries: ItemMajor, first_item: int, place: Array, sorted_entries: LatentMajor) -> None:
    """Copies entries to their latent-major places; place (F) points to the place of each latent's next entry."""
    for i in range(entries.row_start.shape[0] - 1):
        for p in range(entries.row_start[i], entries.row_start[i + 1]):
            q = place[entries.latent[p]]
            place[entries.latent[p]] = q + 1
            sorted_entries.item[q] = first_item + i
            sorted_entries.z[q] = entries.z[p]
            sorted_entries.slope[q] = entries.slope[p]


@compiled()
def learn_thresholds(
    entries: LatentMajor, threshold: Array, bandwidth: float, l0_slope: float, gradient: Array, active: Array
) -> None:
    """JumpReLU's gradient by the logarithm of each threshold (F), by the paper's pseudo-derivatives.

    Entries in the window below the threshold have z = 0. They contribute here and are then disabled (slope 0). `active` (F)
    becomes the number of entries above the threshold.
    """
    for f in range(threshold.shape[0]):
        total = 0.0
        above = 0
        for p in range(entries.start[f], entries.start[f + 1]):
            if entries.z[p] == 0 or abs(entries.z[p] - threshold[f]) < bandwidth / 2:
                total += threshold[f] * entries.slope[p] + l0_slope
            if entries.z[p] == 0:
                entries.slope[p] = 0
            else:
                above += 1
        gradient[f] = -total / bandwidth * threshold[f]
        active[f] = above


@njit(inline="always", fastmath=FASTMATH)
def _adam(p: Array, g: Array, mean: Array, variance: Array, rates: Rates) -> None:
    """Adam (Kingma & Ba 2015), as torch computes it, in place on rows p, mean and variance, given the gradient g.

    Callers compile with error_model="numpy": a check for division by zero would keep the loop from being vectorised.
    """
    lr, beta_1, rest_1, beta_2, rest_2, inverse_root, epsilon, decay = rates
    for d in range(p.shape[0]):
        gradient = g[d] + decay * p[d]
        m = beta_1 * mean[d] + rest_1 * gradient
        v = beta_2 * variance[d] + rest_2 * gradient * gradient
        mean[d] = m
        variance[d] = v
        p[d] -= lr * m / (math.sqrt(v) * inverse_root + epsilon)


@compiled(fastmath=FASTMATH, error_model="numpy")
def update_vector(vector: Trained, gradient: Array, rates: Rates) -> None:
    """One step of Adam on a vector."""
    _adam(vector.value, gradient, vector.mean, vector.variance, rates)


@njit(inline="always", fastmath=FASTMATH)
def _add_entries(entries: LatentMajor, f: int, x: Array, residual: Array, by_encoder: Array, by_decoder: Array) -> np.float32:
    """Adds the gradients (D) of latent f's encoder and decoder rows from its entries. Returns the sum of the slopes."""
    start, stop = entries.start[f], entries.start[f + 1]
    slope_sum = np.float32(0)
    for p in range(start, stop):
        slope_sum += entries.slope[p]
    _add_rows(by_encoder, x, entries.item, entries.slope, start, stop)
    _add_rows(by_decoder, residual, entries.item, entries.z, start, stop)
    return slope_sum


@compiled(fastmath=FASTMATH, error_model="numpy")
def update_latents(
    first: int,
    last: int,
    entries: LatentMajor,
    revived: LatentMajor,
    x: Array,
    tied_bias: Array,
    ends: Array,
    residual: Array,
    left: Array,
    encoder: Trained,
    decoder: Trained,
    rates: Rates,
    bias_gradient: Array,
    back: Array,
) -> None:
    """Updates the encoder and decoder rows of latents first..last - 1: gradients from the code's entries and from AuxK's
    (`revived`), the decoder's projection, Adam and unit norm. Only one latent's gradients exist at a time.

    Writes the encoder bias's gradient (F), and into `back` (D) the sum over these latents of it times the encoder row.
    """
    width = x.shape[1]
    by_encoder = np.empty(width, np.float32)
    by_decoder = np.empty(width, np.float32)
    back[:] = 0
    g = 0
    for f in range(first, last):
        while f >= ends[g]:
            g += 1
        by_encoder[:] = 0
        by_decoder[:] = 0
        slope_sum = _add_entries(entries, f, x, residual[g], by_encoder, by_decoder)
        slope_sum += _add_entries(revived, f, x, left, by_encoder, by_decoder)
        bias_gradient[f] = slope_sum
        encoder_row, decoder_row = encoder.value[f], decoder.value[f]
        along = _dot(by_decoder, decoder_row)
        for d in range(width):
            by_encoder[d] -= slope_sum * tied_bias[d]
            back[d] += slope_sum * encoder_row[d]
            by_decoder[d] -= along * decoder_row[d]
        _adam(encoder_row, by_encoder, encoder.mean[f], encoder.variance[f], rates)
        _adam(decoder_row, by_decoder, decoder.mean[f], decoder.variance[f], rates)
        inverse = np.float32(1) / max(np.float32(math.sqrt(_dot(decoder_row, decoder_row))), np.float32(1e-12))
        for d in range(width):
            decoder_row[d] *= inverse
