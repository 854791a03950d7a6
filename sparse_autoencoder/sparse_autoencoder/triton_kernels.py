# mypy: allow-untyped-defs
# (Triton reads annotations, and knows none for a pointer.)
"""Triton kernels of the sparse step on a GPU: all of it except the encoder's product. `gpu_step` launches them in order.

B items, D inputs and F latents; a batch has n <= B items. An *entry* is an active (item, latent) pair. Which pairs are entries
is kept as two bitmaps: by item (B x ceil(F / 32) words, a bit per latent) and by latent (ceil(B / 32) x F words, a bit per
item). Their popcounts say where each entry belongs in the item-major and the latent-major order, so that neither a sort nor an
atomic counter is needed and every sum is made in a fixed order: the same step gives the same bits.

No program reads what another program of the same launch wrote. All indices fit 32 bits (`GpuStep` checks the sizes). A
pointer that a variant does not need is None, which Triton compiles away. A size that is 1 arrives as a constant, not as a
tensor, so sizes are used in comparisons and arithmetic only.
"""

import triton
import triton.language as tl


@triton.jit
def _popcount(words):
    """The number of set bits of each word (uint32)."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    words = words + (words >> 8)
    words = words + (words >> 16)
    return (words & 0x3F).to(tl.int32)


@triton.jit
def _words(pointer, mask):
    """Words of a bitmap as unsigned numbers, so that shifts bring in zeros."""
    return tl.load(pointer, mask=mask, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def rates_kernel(rates, lr, beta_1, rest_1, beta_2, rest_2, inverse_root, epsilon, decay):
    """One program. rates (8) = Adam's coefficients, which travel by value: no copy from the host that it would wait for."""
    tl.store(rates + 0, lr)
    tl.store(rates + 1, beta_1)
    tl.store(rates + 2, rest_1)
    tl.store(rates + 3, beta_2)
    tl.store(rates + 4, rest_2)
    tl.store(rates + 5, inverse_root)
    tl.store(rates + 6, epsilon)
    tl.store(rates + 7, decay)


@triton.jit
def bits_kernel(values, threshold, half_window, by_item, by_latent, n, F: tl.constexpr, LATENTS: tl.constexpr):
    """Grid (ceil(n / 32), ceil(F / LATENTS)). Both bitmaps of the entries of `values` (n x F, float32 or bfloat16).

    Entries are positive; with thresholds (F), they are above them or in the window around them. NaN is an entry too, so that
    it reaches the loss. Each word lies within one tile, so that plain stores suffice.
    """
    LATENT_WORDS: tl.constexpr = (F + 31) // 32
    word = tl.program_id(0)
    item = word * 32 + tl.arange(0, 32)
    latent = tl.program_id(1) * LATENTS + tl.arange(0, LATENTS)
    inside = (item < n)[:, None] & (latent < F)[None, :]
    v = tl.load(values + item[:, None] * F + latent[None, :], mask=inside, other=0.0).to(tl.float32)
    if threshold is None:
        active = (v > 0) | (v != v)
    else:
        t = tl.load(threshold + latent, mask=latent < F, other=0.0)[None, :]
        active = ((v > t) | (tl.abs(v - t) < half_window) | (v != v)) & inside
    one = active.to(tl.uint32)
    bit = tl.arange(0, 32).to(tl.uint32)
    of_latents = tl.sum(one << bit[:, None], axis=0).to(tl.uint32)
    tl.store(by_latent + word * F + latent, of_latents.to(tl.int32, bitcast=True), mask=latent < F)
    of_items = tl.sum(tl.reshape(one, [32, LATENTS // 32, 32]) << bit[None, None, :], axis=2).to(tl.uint32)
    column = tl.program_id(1) * (LATENTS // 32) + tl.arange(0, LATENTS // 32)
    inside = (item < n)[:, None] & (column < LATENT_WORDS)[None, :]
    tl.store(by_item + item[:, None] * LATENT_WORDS + column[None, :], of_items.to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def count_items_kernel(by_item, item_count, n, F: tl.constexpr, ITEMS: tl.constexpr, WORDS: tl.constexpr):
    """Grid (ceil(n / ITEMS)). item_count (n) = entries of each item."""
    LATENT_WORDS: tl.constexpr = (F + 31) // 32
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    total = tl.full([ITEMS], 0, tl.int32)
    for first in range(0, LATENT_WORDS, WORDS):
        column = first + tl.arange(0, WORDS)
        inside = (item < n)[:, None] & (column < LATENT_WORDS)[None, :]
        total += tl.sum(_popcount(_words(by_item + item[:, None] * LATENT_WORDS + column[None, :], inside)), axis=1)
    tl.store(item_count + item, total, mask=item < n)


@triton.jit
def count_latents_kernel(
    by_latent, before, latent_count, n_words, F: tl.constexpr, WORDS: tl.constexpr, LATENTS: tl.constexpr
):  # fmt: skip
    """Grid (ceil(F / LATENTS)). latent_count (F) = entries of each latent; before (n_words x F) = those in earlier words."""
    latent = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    total = tl.full([LATENTS], 0, tl.int32)
    for first in range(0, n_words, WORDS):
        word = first + tl.arange(0, WORDS)
        inside = (word < n_words)[:, None] & (latent < F)[None, :]
        place = word[:, None] * F + latent[None, :]
        count = _popcount(_words(by_latent + place, inside))
        tl.store(before + place, total[None, :] + tl.cumsum(count, axis=0) - count, mask=inside)
        total += tl.sum(count, axis=0)
    tl.store(latent_count + latent, total, mask=latent < F)


@triton.jit
def scan_kernel(
    item_count, item_start, latent_count, latent_start, slot_start, n,
    F: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program. item_start (n + 1) and latent_start (F + 1) = where entries start in either order; slot_start (F + 1) =
    where the chunks of each latent with more than CHUNK entries start."""
    offset = tl.arange(0, BLOCK)
    total = tl.full((), 0, tl.int32)
    for first in range(0, n, BLOCK):
        item = first + offset
        count = tl.load(item_count + item, mask=item < n, other=0)
        tl.store(item_start + item, total + tl.cumsum(count, axis=0) - count, mask=item < n)
        total += tl.sum(count, axis=0)
    tl.store(item_start + n, total)
    total = tl.full((), 0, tl.int32)
    slots = tl.full((), 0, tl.int32)
    for first in range(0, F, BLOCK):
        latent = first + offset
        count = tl.load(latent_count + latent, mask=latent < F, other=0)
        tl.store(latent_start + latent, total + tl.cumsum(count, axis=0) - count, mask=latent < F)
        total += tl.sum(count, axis=0)
        chunks = tl.where(count > CHUNK, (count + CHUNK - 1) // CHUNK, 0)
        tl.store(slot_start + latent, slots + tl.cumsum(chunks, axis=0) - chunks, mask=latent < F)
        slots += tl.sum(chunks, axis=0)
    tl.store(latent_start + F, total)
    tl.store(slot_start + F, slots)


@triton.jit
def fill_kernel(by_item, item_start, values, threshold, entry_latent, entry_z, F: tl.constexpr, LATENTS: tl.constexpr):
    """Grid (n). The item-major entries: latents, ascending, and z. In the window below its threshold, z is 0."""
    LATENT_WORDS: tl.constexpr = (F + 31) // 32
    item = tl.program_id(0)
    start = tl.load(item_start + item)
    bit = tl.arange(0, 32).to(tl.uint32)
    for first in range(0, F, LATENTS):
        column = first // 32 + tl.arange(0, LATENTS // 32)
        words = _words(by_item + item * LATENT_WORDS + column, column < LATENT_WORDS)
        one = tl.reshape(((words[:, None] >> bit[None, :]) & 1).to(tl.int32), [LATENTS])
        active = one != 0
        latent = first + tl.arange(0, LATENTS)
        z = tl.load(values + item * F + latent, mask=active, other=0.0).to(tl.float32)
        if threshold is not None:
            z = tl.where(z <= tl.load(threshold + latent, mask=active, other=0.0), 0.0, z)
        place = start + tl.cumsum(one, axis=0) - one
        tl.store(entry_latent + place, latent, mask=active)
        tl.store(entry_z + place, z, mask=active)
        start += tl.sum(one, axis=0)


@triton.jit
def _pass_on(
    rows, r, entry, used, item, entry_latent, entry_z, latent_start, before, by_latent,
    item_of, z_of, slope_of, scale, l1_slope, F: tl.constexpr,
):  # fmt: skip
    """Writes entries of an item to their latent-major places: item, z, and the slope, the derivative of the loss by z.
    An entry's place is its latent's start, plus the latent's entries in earlier words, plus those below its own bit."""
    slope = scale * tl.sum(rows.to(tl.float32) * r[None, :], axis=1) + l1_slope
    latent = tl.load(entry_latent + entry, mask=used, other=0)
    word = (item // 32) * F + latent
    lower = (tl.full((), 1, tl.uint32) << (item % 32).to(tl.uint32)) - 1
    rank = tl.load(before + word, mask=used, other=0) + _popcount(_words(by_latent + word, used) & lower)
    place = tl.load(latent_start + latent, mask=used, other=0) + rank
    tl.store(item_of + place, item, mask=used)
    tl.store(z_of + place, tl.load(entry_z + entry, mask=used, other=0.0), mask=used)
    tl.store(slope_of + place, slope, mask=used)


@triton.jit
def row_kernel(
    x, tied_bias, decoder, item_start, entry_latent, entry_z, latent_start, before, by_latent,
    residual, item_of, z_of, slope_of, error, penalty, scale, l1_slope, l1, l0,
    F: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (n). An item's residual x_hat - x (D), its squared error and penalty, and its entries in latent-major order.

    The decoder's rows are read ROWS at a time with D across the threads, so that each thread sums over entries on its own. The
    last rows are still in registers when the residual is known; the others are read again, last first, while in cache.
    """
    item = tl.program_id(0)
    d = tl.arange(0, WIDTH)
    in_d = d < D
    offset = tl.arange(0, ROWS)
    start = tl.load(item_start + item)
    stop = tl.load(item_start + item + 1)
    r = tl.load(tied_bias + d, mask=in_d, other=0.0) - tl.load(x + item * D + d, mask=in_d, other=0.0)
    rows = tl.full([ROWS, WIDTH], 0.0, decoder.dtype.element_ty)
    z_sum = tl.full([ROWS], 0.0, tl.float32)
    n_active = tl.full([ROWS], 0.0, tl.float32)
    for first in range(start, stop, ROWS):
        entry = first + offset
        used = entry < stop
        latent = tl.load(entry_latent + entry, mask=used, other=0)
        z = tl.load(entry_z + entry, mask=used, other=0.0)
        rows = tl.load(decoder + latent[:, None] * D + d[None, :], mask=used[:, None] & in_d[None, :], other=0.0)
        r += tl.sum(rows.to(tl.float32) * z[:, None], axis=0)
        z_sum += z
        n_active += (z != 0).to(tl.float32)
    tl.store(residual + item * D + d, r.to(residual.dtype.element_ty), mask=in_d)
    tl.store(error + item, tl.sum(r * r, axis=0))
    tl.store(penalty + item, l1 * tl.sum(z_sum, axis=0) + l0 * tl.sum(n_active, axis=0))
    n_tiles = (stop - start + ROWS - 1) // ROWS
    entry = start + (n_tiles - 1) * ROWS + offset
    _pass_on(
        rows, r, entry, (entry >= start) & (entry < stop), item, entry_latent, entry_z, latent_start, before, by_latent,
        item_of, z_of, slope_of, scale, l1_slope, F,
    )  # fmt: skip
    for tile in range(1, n_tiles):
        entry = start + (n_tiles - 1 - tile) * ROWS + offset
        latent = tl.load(entry_latent + entry)
        rows = tl.load(decoder + latent[:, None] * D + d[None, :], mask=in_d[None, :], other=0.0)
        _pass_on(
            rows, r, entry, entry < stop, item, entry_latent, entry_z, latent_start, before, by_latent,
            item_of, z_of, slope_of, scale, l1_slope, F,
        )  # fmt: skip


@triton.jit
def _gather(
    latent, first, last, x, residual, item_of, z_of, slope_of, threshold, half_window, l0_slope,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums over entries first..last - 1, of one latent: slope * x and z * residual (both WIDTH), slopes; entries below
    its threshold, and what the threshold learns from those in its window (`kernels.learn_thresholds`)."""
    d = tl.arange(0, WIDTH)
    in_d = d < D
    by_encoder = tl.full([WIDTH], 0.0, tl.float32)
    by_decoder = tl.full([WIDTH], 0.0, tl.float32)
    slopes = tl.full([ROWS], 0.0, tl.float32)
    below = tl.full([ROWS], 0, tl.int32)
    learned = tl.full([ROWS], 0.0, tl.float32)
    if threshold is not None:
        own = tl.load(threshold + latent)
    for start in range(first, last, ROWS):
        entry = start + tl.arange(0, ROWS)
        used = entry < last
        item = tl.load(item_of + entry, mask=used, other=0)
        z = tl.load(z_of + entry, mask=used, other=0.0)
        slope = tl.load(slope_of + entry, mask=used, other=0.0)
        if threshold is not None:
            in_window = used & ((z == 0) | (tl.abs(z - own) < half_window))
            learned += tl.where(in_window, own * slope + l0_slope, 0.0)
            below += (used & (z == 0)).to(tl.int32)
            slope = tl.where(z == 0, 0.0, slope)  # such an entry moves the threshold alone
        place = item[:, None] * D + d[None, :]
        inside = used[:, None] & in_d[None, :]
        by_encoder += tl.sum(tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * slope[:, None], axis=0)
        by_decoder += tl.sum(tl.load(residual + place, mask=inside, other=0.0).to(tl.float32) * z[:, None], axis=0)
        slopes += slope
    return by_encoder, by_decoder, tl.sum(slopes, axis=0), tl.sum(below, axis=0), tl.sum(learned, axis=0)


@triton.jit
def chunk_kernel(
    x, residual, item_of, z_of, slope_of, latent_start, slot_start, threshold, half_window, l0_slope,
    chunk_rows, chunk_slope, chunk_below, chunk_learned,
    F: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Grid (SLOTS). The sums of one chunk of a latent with many entries, which one program alone would take long to gather:
    chunk_rows (SLOTS x 2 x D), chunk_slope, chunk_below and chunk_learned (SLOTS)."""
    slot = tl.program_id(0)
    if slot < tl.load(slot_start + F):
        latent = tl.full((), 0, tl.int32)
        end = tl.full((), F, tl.int32)
        while end - latent > 1:  # slot_start[latent] <= slot < slot_start[end]
            middle = (latent + end) // 2
            is_right = tl.load(slot_start + middle) <= slot
            latent = tl.where(is_right, middle, latent)
            end = tl.where(is_right, end, middle)
        if tl.load(slot_start + latent + 1) <= SLOTS:
            first = tl.load(latent_start + latent) + (slot - tl.load(slot_start + latent)) * CHUNK
            last = tl.minimum(first + CHUNK, tl.load(latent_start + latent + 1))
            by_encoder, by_decoder, slope, below, learned = _gather(
                latent, first, last, x, residual, item_of, z_of, slope_of, threshold, half_window, l0_slope, D, WIDTH, ROWS
            )
            d = tl.arange(0, WIDTH)
            tl.store(chunk_rows + slot * 2 * D + d, by_encoder, mask=d < D)
            tl.store(chunk_rows + (slot * 2 + 1) * D + d, by_decoder, mask=d < D)
            tl.store(chunk_slope + slot, slope)
            if threshold is not None:
                tl.store(chunk_below + slot, below)
                tl.store(chunk_learned + slot, learned)


@triton.jit
def _adam(p, gradient, mean, variance, mask, rates):
    """The parameters p after a step of Adam, as torch computes it; the moments are updated in place.
    Moments pass through the cache only once, and should not drive the items' rows out of it."""
    gradient += tl.load(rates + 7) * p
    m = tl.load(mean, mask=mask, other=0.0, eviction_policy="evict_first")
    v = tl.load(variance, mask=mask, other=0.0, eviction_policy="evict_first")
    m = tl.load(rates + 1) * m + tl.load(rates + 2) * gradient
    v = tl.load(rates + 3) * v + tl.load(rates + 4) * gradient * gradient
    tl.store(mean, m, mask=mask, eviction_policy="evict_first")
    tl.store(variance, v, mask=mask, eviction_policy="evict_first")
    return p - tl.load(rates) * m / (tl.sqrt_rn(v) * tl.load(rates + 5) + tl.load(rates + 6))


@triton.jit
def latent_kernel(
    x, residual, item_of, z_of, slope_of, latent_start, slot_start, threshold, half_window, l0_slope,
    chunk_rows, chunk_slope, chunk_below, chunk_learned, tied_bias, rates,
    encoder, encoder_mean, encoder_variance, decoder, decoder_mean, decoder_variance,
    bias_gradient, threshold_gradient, fired, back, scale,
    F: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, LATENTS: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(F / LATENTS)). Learns the encoder and decoder rows of LATENTS latents, one after the other: gradients,
    projection, Adam and unit norm in registers.

    Also writes fired (F), the gradients of the encoder's bias and of the thresholds' logarithms (F), and back (grid x D): the
    sum of bias gradient times encoder row, from before the update.
    """
    program = tl.program_id(0)
    d = tl.arange(0, WIDTH)
    in_d = d < D
    tied = tl.load(tied_bias + d, mask=in_d, other=0.0)
    through = tl.full([WIDTH], 0.0, tl.float32)
    for latent in range(program * LATENTS, tl.minimum((program + 1) * LATENTS, F)):
        start = tl.load(latent_start + latent)
        end = tl.load(latent_start + latent + 1)
        slot = tl.load(slot_start + latent)
        last_slot = tl.load(slot_start + latent + 1)
        last_slot = tl.where(last_slot <= SLOTS, last_slot, slot)  # without room for its chunks, it gathers all itself
        last = tl.where(last_slot > slot, start, end)
        by_encoder, by_decoder, slope, below, learned = _gather(
            latent, start, last, x, residual, item_of, z_of, slope_of, threshold, half_window, l0_slope, D, WIDTH, ROWS
        )
        for chunk in range(slot, last_slot):
            by_encoder += tl.load(chunk_rows + chunk * 2 * D + d, mask=in_d, other=0.0)
            by_decoder += tl.load(chunk_rows + (chunk * 2 + 1) * D + d, mask=in_d, other=0.0)
            slope += tl.load(chunk_slope + chunk)
            if threshold is not None:
                below += tl.load(chunk_below + chunk)
                learned += tl.load(chunk_learned + chunk)
        by_encoder -= slope * tied
        by_decoder *= scale
        tl.store(fired + latent, (end - start - below).to(tl.int64))
        tl.store(bias_gradient + latent, slope)
        if threshold is not None:
            tl.store(threshold_gradient + latent, -learned * tl.load(threshold + latent) / (2 * half_window))
        at = latent * D + d

        row = tl.load(encoder + at, mask=in_d, other=0.0)
        through += slope * row
        row = _adam(row, by_encoder, encoder_mean + at, encoder_variance + at, in_d, rates)
        tl.store(encoder + at, row, mask=in_d)

        row = tl.load(decoder + at, mask=in_d, other=0.0)
        by_decoder -= tl.sum(by_decoder * row, axis=0) * row
        row = _adam(row, by_decoder, decoder_mean + at, decoder_variance + at, in_d, rates)
        row = tl.where(in_d, row, 0.0)  # beyond D, it is 0 / epsilon, which may be 0 / 0
        row *= 1.0 / tl.maximum(tl.sqrt_rn(tl.sum(row * row, axis=0)), 1e-12)
        tl.store(decoder + at, row, mask=in_d)
    tl.store(back + program * D + d, through, mask=in_d)


@triton.jit
def column_sum_kernel(rows, sums, n, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Grid (ceil(n / ROWS), ceil(D / COLUMNS)). sums (ceil(n / ROWS) x D) = the sums of ROWS rows (n x D) each."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < n)[:, None] & (d < D)[None, :]
    part = tl.load(rows + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(sums + tl.program_id(0) * D + d, tl.sum(part, axis=0), mask=d < D)


@triton.jit
def finish_kernel(
    residual_sums, n_residual_sums, back_sums, n_back_sums, error, penalty, n, scale, per_item, gradient, losses,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(D / COLUMNS)). The tied bias's gradient (D); program 0 also writes losses (3): loss, l2, penalty."""
    program = tl.program_id(0)
    offset = tl.arange(0, ROWS)
    d = program * COLUMNS + tl.arange(0, COLUMNS)
    of_residual = tl.full([COLUMNS], 0.0, tl.float32)
    for first in range(0, n_residual_sums, ROWS):
        row = first + offset
        inside = (row < n_residual_sums)[:, None] & (d < D)[None, :]
        of_residual += tl.sum(tl.load(residual_sums + row[:, None] * D + d[None, :], mask=inside, other=0.0), axis=0)
    of_back = tl.full([COLUMNS], 0.0, tl.float32)
    for first in range(0, n_back_sums, ROWS):
        row = first + offset
        inside = (row < n_back_sums)[:, None] & (d < D)[None, :]
        of_back += tl.sum(tl.load(back_sums + row[:, None] * D + d[None, :], mask=inside, other=0.0), axis=0)
    tl.store(gradient + d, scale * of_residual - of_back, mask=d < D)
    if program == 0:
        errors = tl.full([ITEMS], 0.0, tl.float32)
        penalties = tl.full([ITEMS], 0.0, tl.float32)
        for first in range(0, n, ITEMS):
            item = first + tl.arange(0, ITEMS)
            errors += tl.load(error + item, mask=item < n, other=0.0)
            penalties += tl.load(penalty + item, mask=item < n, other=0.0)
        l2 = tl.sum(errors, axis=0) * (scale / 2)
        mean_penalty = tl.sum(penalties, axis=0) * per_item
        tl.store(losses + 0, l2 + mean_penalty)
        tl.store(losses + 1, l2)
        tl.store(losses + 2, mean_penalty)


@triton.jit
def vector_kernel(vector, gradient, mean, variance, rates, n, BLOCK: tl.constexpr):
    """Grid (ceil(n / BLOCK)). A step of Adam on a vector (n)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    p = tl.load(vector + at, mask=inside, other=0.0)
    g = tl.load(gradient + at, mask=inside, other=0.0)
    tl.store(vector + at, _adam(p, g, mean + at, variance + at, inside, rates), mask=inside)
