"""Triton kernel for one row of x on one-bit planar-16 words (planar.py), with bit products (bit_products_triton.py).

A warp takes a block: 1024 columns, 32 words of each row, of which lane 4g + q has eight. Bits p, p + 8, p + 16 and
p + 24 of a word of planes of 64 columns are four of the 128 columns of planes 2p and 2p + 1. Lane 4g + q prepares x
at the bits p = g of its words.

If a row has one scale for all columns of the block, the lanes exchange what they prepared, and each has two planes of
bits of whole words: the tensor core counts for the whole block at once. Otherwise position g is of a group that may be
like no other, and lane 4g + q passes planes with bits at that position alone: its counts are of its group, and it has
the group's scale. In step s it passes bit (g + s) % 8 of the integers' bytes; eight steps take all sixteen.

Counts are taken as the float32 numbers that their bits are: subnormals, n * 2**-149. A multiplication by a power of two
makes them ordinary, and is one with the addition.
"""

# ruff: noqa: RUF005 - tuples are built by addition: Triton does not unpack
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.kernels.bit_products_triton import (
    count_common,
    four,
    integer_bytes,
    of_lane_across,
    plane_bits,
    transposed_bits,
    two_to,
)
from quantkit.kernels.byte_products_triton import TINY, half_to_float, larger_half

_UNIT = tl.constexpr(2.0**37)  # counts times `_weights` are in 2**-37


@triton.jit
def _load_words(words, first_row, row_words, block, valid, g, q, ONE_SCALE: tl.constexpr, ROWS: tl.constexpr):
    """Of each tile of eight rows, row g: eight words of the block, as [threads, 4] twice.

    The rows whose products a lane gets lie side by side: with one scale those that it loads, else 2q and 2q + 1 of
    each tile.
    """
    words += first_row.to(tl.int64) * row_words
    loaded = ()
    for tile in tl.static_range(ROWS // 8):
        row = g * (ROWS // 8) + tile if ONE_SCALE else g // 2 * (ROWS // 4) + 2 * tile + g % 2
        for half in tl.static_range(2):
            start = row * row_words + (block * 32 + half * 16 + q * 4)
            source = words + tl.multiple_of(start, 4)[:, None] + tl.arange(0, 4)[None, :]
            loaded = loaded + (tl.load(source, mask=valid[:, None], other=0, eviction_policy="evict_first"),)
    return loaded


@triton.jit
def _load_factors(
    numbers, first_row, stride4, block, valid, g, q, GROUP: tl.constexpr, ONE_SCALE: tl.constexpr, ROWS: tl.constexpr
):
    """Scales (or zeros) of the lane's group and rows, four float16 to an int64; the lane's first is the lowest."""
    group = (block * 1024 + (0 if ONE_SCALE else g * 128)) // GROUP
    numbers += group * stride4 + first_row // 4
    loaded = ()
    if ONE_SCALE and ROWS == 16:
        loaded = (tl.load(numbers + g // 2, mask=valid, other=0) >> (g % 2 * 32).to(tl.int64),)
    elif ONE_SCALE:
        for quad in tl.static_range(ROWS // 32):
            loaded = loaded + (tl.load(numbers + g * (ROWS // 32) + quad, mask=valid, other=0),)
    else:
        for quad in tl.static_range(ROWS // 16):
            loaded = loaded + (tl.load(numbers + q * (ROWS // 16) + quad, mask=valid, other=0),)
    return loaded


@triton.jit
def _factor(factors, row: tl.constexpr):
    return (factors[row // 4] >> (16 * (row % 4))).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load_tile(
    words, scales, zeros, first_row, row_words, stride4, block, valid, g, q, GROUP: tl.constexpr, ZERO: tl.constexpr,
    ONE_SCALE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    loaded = _load_words(words, first_row, row_words, block, valid, g, q, ONE_SCALE, ROWS)
    factors = _load_factors(scales, first_row, stride4, block, valid, g, q, GROUP, ONE_SCALE, ROWS)
    if ZERO is None:
        offsets = _load_factors(zeros, first_row, stride4, block, valid, g, q, GROUP, ONE_SCALE, ROWS)
    else:
        offsets = factors
    return loaded, factors, offsets


@triton.jit
def _of_lanes(value, LARGEST: tl.constexpr, LANES: tl.constexpr, ASM: tl.constexpr):
    """Largest (or sum) of the values of LANES neighbouring lanes."""
    for exponent in tl.static_range(5):
        if 2**exponent < LANES:
            other = of_lane_across(value, 2**exponent, ASM)
            value = tl.maximum(value, other) if LARGEST else value + other
    return value


@triton.jit
def _prepared_x(
    x, n_columns, block, valid, thread, g, q, ONE_SCALE: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr
):
    """Of the lane's eight words: what the tensor core counts with, for low and for high bytes of the integers of x;
    what a zero of 1 in each row takes off, and the unit of the integers.

    With one scale these are planes g and g + 8 of bits, else the integers' bytes at position g. ``x`` is read as int32,
    two values at a time.
    """
    LANES: tl.constexpr = 32 if ONE_SCALE else 4
    first = block * 1024 + g * 128 + q * 8
    largest = tl.zeros((block.shape[0], 4), tl.int32)
    pairs = ()
    for part in tl.static_range(4):
        column = first + 32 * part
        source = x + tl.multiple_of(column // 2, 4)[:, None] + tl.arange(0, 4)[None, :]
        loaded = tl.load(source, mask=(valid & (column < n_columns))[:, None], other=0)
        largest = larger_half(largest, loaded, ASM)
        pairs = pairs + four(loaded)
    top = half_to_float(_of_lanes(tl.max(tl.maximum(largest & 0xFFFF, largest >> 16), 1), True, LANES, ASM), BF16)
    top = tl.where(top < TINY, TINY, top)  # NaN stays
    low, high, total = integer_bytes(pairs, 32512.0 / top, 8, BF16, ASM)
    offset = _of_lanes(total, False, LANES, ASM).to(tl.float32)
    if ONE_SCALE:
        low = transposed_bits(low, thread, 8, ASM)
        high = transposed_bits(high, thread, 8, ASM)
        offset *= 0.25  # each of the four lanes that share a row takes its part off
    return low, high, offset, top * (1.0 / 32512.0)


@triton.jit
def _weights(bit):
    """2**bit and 2**(bit + 8), times 2**112; that of bit 15 is negative."""
    return two_to(bit + 112), tl.where(bit == 7, -1.0, 1.0) * two_to(bit + 120)


@triton.jit
def _block_sums(loaded, low, high, q, ROWS: tl.constexpr, ASM: tl.constexpr):
    """Of each row that the lane loads: the integers of x where codes are 1, as far as four planes of bits hold them."""
    low_weight, high_weight = _weights(2 * q)
    next_low_weight, next_high_weight = _weights(2 * q + 1)
    nothing = tl.zeros_like(q)
    sums = ()
    for tile in tl.static_range(ROWS // 16):
        lows = (nothing, nothing, nothing, nothing)
        highs = (nothing, nothing, nothing, nothing)
        for half in tl.static_range(2):
            one = four(loaded[4 * tile + half])
            other = four(loaded[4 * tile + 2 + half])
            for pair in tl.static_range(2):
                lows = count_common(
                    one[2 * pair], other[2 * pair], one[2 * pair + 1], other[2 * pair + 1],
                    low[4 * half + 2 * pair], low[4 * half + 2 * pair + 1], lows, ASM,
                )  # fmt: skip
                highs = count_common(
                    one[2 * pair], other[2 * pair], one[2 * pair + 1], other[2 * pair + 1],
                    high[4 * half + 2 * pair], high[4 * half + 2 * pair + 1], highs, ASM,
                )  # fmt: skip
        for row in tl.static_range(2):
            total = lows[2 * row].to(tl.float32, bitcast=True) * low_weight
            total = tl.math.fma(lows[2 * row + 1].to(tl.float32, bitcast=True), next_low_weight, total)
            total = tl.math.fma(highs[2 * row].to(tl.float32, bitcast=True), high_weight, total)
            sums = sums + (tl.math.fma(highs[2 * row + 1].to(tl.float32, bitcast=True), next_high_weight, total),)
    return sums


@triton.jit
def _group_sums(loaded, low, high, g, ROWS: tl.constexpr, ASM: tl.constexpr):
    """Of rows 2q and 2q + 1 of each tile: the integers of x where codes of the lane's group are 1."""
    words = ()
    for index in tl.static_range(ROWS // 4):
        words = words + (four(loaded[index]),)
    nothing = tl.zeros_like(g)
    mask = (nothing + 0x01010101) << g
    sums = ()
    for _ in tl.static_range(ROWS // 4):
        sums = sums + (nothing.to(tl.float32),)
    for step in tl.static_range(8):
        turn = tl.where(g + step < 8, 32, 8) - step
        low_weight, high_weight = _weights((g + step) % 8)
        planes = ()
        for index in tl.static_range(8):
            if step == 0:
                planes = planes + (low[index] & mask, high[index] & mask)
            else:
                planes = planes + (plane_bits(low[index], turn, mask, ASM), plane_bits(high[index], turn, mask, ASM))
        following = ()
        for tile in tl.static_range(ROWS // 8):
            counts = (nothing, nothing, nothing, nothing)
            for pair in tl.static_range(4):
                counts = count_common(
                    planes[4 * pair], planes[4 * pair + 1], planes[4 * pair + 2], planes[4 * pair + 3],
                    words[2 * tile + pair // 2][pair % 2 * 2], words[2 * tile + pair // 2][pair % 2 * 2 + 1],
                    counts, ASM,
                )  # fmt: skip
            for row in tl.static_range(2):
                total = tl.math.fma(counts[row].to(tl.float32, bitcast=True), low_weight, sums[2 * tile + row])
                total = tl.math.fma(counts[2 + row].to(tl.float32, bitcast=True), high_weight, total)
                following = following + (total,)
        sums = following
    return sums


@triton.jit
def _row_products(
    loaded, factors, offsets, low, high, offset, unit, g, q, ZERO: tl.constexpr, ONE_SCALE: tl.constexpr,
    ROWS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The lane's part of the product, for each of its rows."""
    if ONE_SCALE:  # noqa: SIM108
        sums = _block_sums(loaded, low, high, q, ROWS, ASM)
    else:
        sums = _group_sums(loaded, low, high, g, ROWS, ASM)
    products = ()
    for row in tl.static_range(ROWS // 8 if ONE_SCALE else ROWS // 4):
        taken = offset * (_factor(offsets, row) if ZERO is None else ZERO)
        products = products + ((sums[row] * _UNIT - taken) * unit * _factor(factors, row),)
    return products


@triton.jit
def _stacked(values, N: tl.constexpr):
    """Tuple of [threads] to [threads, N], without leaving registers."""
    if N == 1:
        return values[0]
    else:
        halves = ()
        for row in tl.static_range(N // 2):
            halves = halves + (tl.join(values[row], values[row + N // 2]),)
        return _stacked(halves, N // 2)


@triton.jit
def _store_rows(
    y, bias, products, first_row, n_rows, HAS_BIAS: tl.constexpr, ONE_SCALE: tl.constexpr, ROWS: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Sum over warps and the lanes that share a row: those of one g with one scale, else those of one q."""
    OWNERS: tl.constexpr = 8 if ONE_SCALE else 4
    N: tl.constexpr = ROWS // OWNERS
    stacked = tl.reshape(_stacked(products, N), (WARPS, 8, 4, N))
    if ONE_SCALE:
        stacked = tl.permute(stacked, (0, 2, 1, 3))
    total = tl.sum(tl.reshape(stacked, (WARPS * 32 // OWNERS, OWNERS, N)), 0)
    rows = first_row + tl.arange(0, OWNERS)[:, None] * N + tl.arange(0, N)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=rows < n_rows, other=0.0).to(tl.float32)
    tl.store(y + rows, total.to(y.dtype.element_ty), mask=rows < n_rows)


@triton.jit
def bit_gemv_kernel(
    x, words, scales, zeros, bias, y, copies, n_rows, n_columns, row_words16, n_blocks, stride4, n_tiles,
    GROUP: tl.constexpr, ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, COPY_ROWS: tl.constexpr, BF16: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, ONE_SCALE: tl.constexpr, AHEAD: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """y [tokens, n_rows] = x [tokens, n_columns] @ weight^T + bias. Grid (programs, tokens), WARPS warps each.

    A program does one tile of ROWS rows if AHEAD is 0. Else it does every so many-th tile, with x prepared once and the
    words of the next AHEAD tiles on their way while one is multiplied.

    Args:
        x: read as int32, two values at a time; words: likewise.
        scales, zeros: float16, four rows read as one int64. ``stride4``: of a group, in those.
        copies: the row of x for each COPY_ROWS rows of the weight; COPY_ROWS is None: a program for every row of x.
        row_words16: 32-bit words of a row / 16, so that rows are known to begin on a boundary.
        ZERO: the zero of all groups; None: ``zeros`` are read.
    """
    if PDL:
        gdc_launch_dependents()
    thread = tl.arange(0, 32 * WARPS)
    g = thread % 32 // 4
    q = thread % 4
    block = thread // 32
    valid = block < n_blocks
    row_words = row_words16 * 16
    tile = tl.program_id(0)
    token = tl.program_id(1) if COPY_ROWS is None else tl.load(copies + tile * ROWS // COPY_ROWS)
    x += token.to(tl.int64) * (n_columns // 2)
    y += tl.program_id(1).to(tl.int64) * n_rows
    loaded, factors, offsets = _load_tile(
        words, scales, zeros, tile * ROWS, row_words, stride4, block, valid, g, q, GROUP, ZERO, ONE_SCALE, ROWS
    )
    if PDL:  # weights are on their way; x may not be there yet
        gdc_wait()
    low, high, offset, unit = _prepared_x(x, n_columns, block, valid, thread, g, q, ONE_SCALE, BF16, ASM)
    if AHEAD > 0:
        programs = tl.num_programs(0)
        later = loaded
        later_factors = factors
        later_offsets = offsets
        if AHEAD == 2:
            later, later_factors, later_offsets = _load_tile(
                words, scales, zeros, (tile + programs) * ROWS, row_words, stride4, block,
                valid & (block * 0 + tile + programs < n_tiles), g, q, GROUP, ZERO, ONE_SCALE, ROWS,
            )  # fmt: skip
        for here in range(tile, n_tiles, programs):
            now = loaded
            now_factors = factors
            now_offsets = offsets
            if AHEAD == 2:
                loaded = later
                factors = later_factors
                offsets = later_offsets
            following = here + AHEAD * programs
            later, later_factors, later_offsets = _load_tile(
                words, scales, zeros, following * ROWS, row_words, stride4, block,
                valid & (block * 0 + following < n_tiles), g, q, GROUP, ZERO, ONE_SCALE, ROWS,
            )  # fmt: skip
            if AHEAD == 1:
                loaded = later
                factors = later_factors
                offsets = later_offsets
            products = _row_products(
                now, now_factors, now_offsets, low, high, offset, unit, g, q, ZERO, ONE_SCALE, ROWS, ASM
            )
            _store_rows(y, bias, products, here * ROWS, n_rows, HAS_BIAS, ONE_SCALE, ROWS, WARPS)
    else:
        products = _row_products(loaded, factors, offsets, low, high, offset, unit, g, q, ZERO, ONE_SCALE, ROWS, ASM)
        _store_rows(y, bias, products, tile * ROWS, n_rows, HAS_BIAS, ONE_SCALE, ROWS, WARPS)
