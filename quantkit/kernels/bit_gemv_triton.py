"""Triton kernel for one row of x on one-bit planar-16 words (planar.py), with bit products (bit_products_triton.py,
bit_sums_triton.py).

A warp takes 1024 columns, 32 words of each row, of which lane 4g + q has eight. Bits p, p + 8, p + 16 and p + 24 of a
word of planes of W columns are four of the 2 W columns of planes 2p and 2p + 1. Lane 4g + q prepares x at the bits
p = g of its words.

If a row has one scale for all columns of a block (W = 64), the lanes exchange what they prepared, and each has two
planes of bits of whole words: the tensor core counts for the whole block at once. Otherwise 128 columns, at C = 64 / W
neighbouring bit positions, belong to a group that may be like no other. The C lanes that share q and these positions
exchange what they prepared: lane 4g + q then has bits C s + g % C of the integers' bytes, s = 0, 1, .., 8 / C - 1, at
all C positions. It passes planes with bits there and nowhere else, so its counts are of its group alone, and it has
the group's scale. In step t it passes s = (g / C + t) % (8 / C); 8 / C steps take all sixteen bits.
"""

# ruff: noqa: RUF005 - tuples are built by addition: Triton does not unpack
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.kernels.bit_products_triton import integer_bytes, of_lane_across, transposed_bits
from quantkit.kernels.bit_sums_triton import UNIT, block_sums, group_sums
from quantkit.kernels.byte_products_triton import TINY, four, half_to_float, larger_half, stacked


@triton.jit
def _load_words(
    words, first_row, row_words, block, n_blocks, g, q, WIDTH: tl.constexpr, ONE_SCALE: tl.constexpr, ROWS: tl.constexpr
):
    """Of each tile of eight rows, row g: the lane's eight words, as [threads, 4] twice.

    The rows whose products a lane gets lie side by side: with one scale those that it loads, else 2q and 2q + 1 of
    each tile. ``block`` counts 1024 columns, ``n_blocks`` blocks of planes; no words are there beyond.
    """
    PARTS: tl.constexpr = 64 // WIDTH
    words += first_row.to(tl.int64) * row_words
    loaded = ()
    for tile in tl.static_range(ROWS // 8):
        row = g * (ROWS // 8) + tile if ONE_SCALE else g // 2 * (ROWS // 4) + 2 * tile + g % 2
        for half in tl.static_range(2):
            start = row * row_words + (block * 32 + half * 16 + q * 4)
            source = words + tl.multiple_of(start, 4)[:, None] + tl.arange(0, 4)[None, :]
            valid = block * PARTS + half * PARTS // 2 < n_blocks
            loaded = loaded + (tl.load(source, mask=valid[:, None], other=0, eviction_policy="evict_first"),)
    return loaded


@triton.jit
def _load_factors(
    numbers, first_row, stride4, block, n_blocks, g, q, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    ONE_SCALE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Scales (or zeros) of the lane's groups and rows, four float16 to an int64; the lane's first is the lowest."""
    PARTS: tl.constexpr = 64 // WIDTH
    numbers += first_row // 4
    loaded = ()
    for part in tl.static_range(PARTS):
        valid = block * PARTS + part < n_blocks
        column = block * 1024 + part * (16 * WIDTH)
        if ONE_SCALE and ROWS == 16:
            place = numbers + column // GROUP * stride4 + g // 2
            loaded = loaded + (tl.load(place, mask=valid, other=0) >> (g % 2 * 32).to(tl.int64),)
        elif ONE_SCALE:
            for quad in tl.static_range(ROWS // 32):
                place = numbers + column // GROUP * stride4 + g * (ROWS // 32) + quad
                loaded = loaded + (tl.load(place, mask=valid, other=0),)
        else:
            for quad in tl.static_range(ROWS // 16):
                place = numbers + (column + g // PARTS * 128) // GROUP * stride4 + q * (ROWS // 16) + quad
                loaded = loaded + (tl.load(place, mask=valid, other=0),)
    return loaded


@triton.jit
def _factor(factors, row: tl.constexpr):
    return (factors[row // 4] >> (16 * (row % 4))).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load_tile(
    words, scales, zeros, first_row, row_words, stride4, block, n_blocks, g, q, GROUP: tl.constexpr,
    ZERO: tl.constexpr, WIDTH: tl.constexpr, ONE_SCALE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    loaded = _load_words(words, first_row, row_words, block, n_blocks, g, q, WIDTH, ONE_SCALE, ROWS)
    factors = _load_factors(scales, first_row, stride4, block, n_blocks, g, q, GROUP, WIDTH, ONE_SCALE, ROWS)
    if ZERO is None:
        offsets = _load_factors(zeros, first_row, stride4, block, n_blocks, g, q, GROUP, WIDTH, ONE_SCALE, ROWS)
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
def _load_x(x, n_columns, block, g, q, WIDTH: tl.constexpr):
    """x at the bits g of the lane's words: columns of even planes for all words, then of odd ones; int32 pairs."""
    loaded = ()
    for part in tl.static_range(64 // WIDTH):
        for byte in tl.static_range(2):
            for piece in tl.static_range(WIDTH // 32):
                plane = block * 1024 + part * (16 * WIDTH) + g * (2 * WIDTH) + byte * WIDTH
                column = plane + piece * 32 + q * 8
                source = x + tl.multiple_of(column // 2, 4)[:, None] + tl.arange(0, 4)[None, :]
                loaded = loaded + (tl.load(source, mask=(column < n_columns)[:, None], other=0),)
    return loaded


@triton.jit
def _prepared_x(
    x, n_columns, block, thread, g, q, WIDTH: tl.constexpr, ONE_SCALE: tl.constexpr, BF16: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """For each block of planes, of the lane's words: what planes of bits are taken from, of low and of high bytes of
    the integers of x; what a zero of 1 in each row takes off, and the unit of the integers.

    With one scale these are planes g and g + 8 of bits. ``x`` is read as int32, two values at a time.
    """
    PARTS: tl.constexpr = 64 // WIDTH
    LANES: tl.constexpr = 32 if ONE_SCALE else 4 * PARTS  # that share a unit
    EXCHANGED: tl.constexpr = 8 if ONE_SCALE else PARTS
    SHARES: tl.constexpr = 4 if ONE_SCALE else PARTS  # lanes that share a row and take a part of its zero off
    PIECES: tl.constexpr = WIDTH // 16
    loaded = _load_x(x, n_columns, block, g, q, WIDTH)
    prepared = ()
    for part in tl.static_range(PARTS):
        largest = tl.zeros_like(loaded[0])
        pairs = ()
        for piece in tl.static_range(PIECES):
            largest = larger_half(largest, loaded[part * PIECES + piece], ASM)
            pairs = pairs + four(loaded[part * PIECES + piece])
        top = _of_lanes(tl.max(tl.maximum(largest & 0xFFFF, largest >> 16), 1), True, LANES, ASM)
        top = half_to_float(top, BF16)
        top = tl.where(top < TINY, TINY, top)  # NaN stays
        low, high, total = integer_bytes(pairs, 32512.0 / top, WIDTH // 8, BF16, ASM)
        offset = _of_lanes(total, False, LANES, ASM).to(tl.float32) * (1.0 / SHARES)
        low = transposed_bits(low, thread, WIDTH // 8, EXCHANGED, ASM)
        high = transposed_bits(high, thread, WIDTH // 8, EXCHANGED, ASM)
        prepared = prepared + ((low, high, offset, top * (1.0 / 32512.0)),)
    return prepared


@triton.jit
def _row_products(
    loaded, factors, offsets, prepared, g, q, ZERO: tl.constexpr, WIDTH: tl.constexpr, ONE_SCALE: tl.constexpr,
    ROWS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The lane's part of the product, for each of its rows."""
    OWN: tl.constexpr = ROWS // 8 if ONE_SCALE else ROWS // 4
    FACTORS: tl.constexpr = (OWN + 3) // 4 * 4  # of a block
    words = ()
    for index in tl.static_range(ROWS // 4):
        words = words + four(loaded[index])
    totals = ()
    for _ in tl.static_range(OWN):
        totals = totals + (tl.zeros_like(g).to(tl.float32),)
    for part in tl.static_range(64 // WIDTH):
        low, high, offset, unit = prepared[part]
        if ONE_SCALE:
            sums = block_sums(words, low, high, q, ROWS, ASM)
        else:
            sums = group_sums(words, low, high, g, part, WIDTH, ROWS, ASM)
        following = ()
        for row in tl.static_range(OWN):
            taken = offset * (_factor(offsets, part * FACTORS + row) if ZERO is None else ZERO)
            # spelled out, or the compiler chooses which of two products it rounds, differently from shape to shape
            product = tl.math.fma(sums[row], UNIT, -taken) * unit
            following = following + (tl.math.fma(product, _factor(factors, part * FACTORS + row), totals[row]),)
        totals = following
    return totals


@triton.jit
def _store_rows(
    y, bias, products, first_row, n_rows, HAS_BIAS: tl.constexpr, ONE_SCALE: tl.constexpr, ROWS: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Sum over warps and the lanes that share a row: those of one g with one scale, else those of one q."""
    OWNERS: tl.constexpr = 8 if ONE_SCALE else 4
    N: tl.constexpr = ROWS // OWNERS
    lanes = tl.reshape(stacked(products, N), (WARPS, 8, 4, N))
    if ONE_SCALE:
        lanes = tl.permute(lanes, (0, 2, 1, 3))
    total = tl.sum(tl.reshape(lanes, (WARPS * 32 // OWNERS, OWNERS, N)), 0)
    rows = first_row + tl.arange(0, OWNERS)[:, None] * N + tl.arange(0, N)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=rows < n_rows, other=0.0).to(tl.float32)
    tl.store(y + rows, total.to(y.dtype.element_ty), mask=rows < n_rows)


@triton.jit
def bit_gemv_kernel(
    x, words, scales, zeros, bias, y, copies, n_rows, n_columns, row_words16, n_blocks, stride4, n_tiles,
    GROUP: tl.constexpr, ZERO: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, COPY_ROWS: tl.constexpr,
    BF16: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, ONE_SCALE: tl.constexpr, AHEAD: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr = False,
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
    row_words = row_words16 * 16
    tile = tl.program_id(0)
    token = tl.program_id(1) if COPY_ROWS is None else tl.load(copies + tile * ROWS // COPY_ROWS)
    x += token.to(tl.int64) * (n_columns // 2)
    y += tl.program_id(1).to(tl.int64) * n_rows
    loaded, factors, offsets = _load_tile(
        words, scales, zeros, tile * ROWS, row_words, stride4, block, n_blocks, g, q, GROUP, ZERO, WIDTH, ONE_SCALE,
        ROWS,
    )  # fmt: skip
    if PDL:  # weights are on their way; x may not be there yet
        gdc_wait()
    prepared = _prepared_x(x, n_columns, block, thread, g, q, WIDTH, ONE_SCALE, BF16, ASM)
    if AHEAD > 0:
        programs = tl.num_programs(0)
        later = loaded
        later_factors = factors
        later_offsets = offsets
        if AHEAD == 2:
            there = tl.where(tile + programs < n_tiles, n_blocks, 0)
            later, later_factors, later_offsets = _load_tile(
                words, scales, zeros, (tile + programs) * ROWS, row_words, stride4, block, there, g, q, GROUP, ZERO,
                WIDTH, ONE_SCALE, ROWS,
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
            there = tl.where(following < n_tiles, n_blocks, 0)
            later, later_factors, later_offsets = _load_tile(
                words, scales, zeros, following * ROWS, row_words, stride4, block, there, g, q, GROUP, ZERO, WIDTH,
                ONE_SCALE, ROWS,
            )  # fmt: skip
            if AHEAD == 1:
                loaded = later
                factors = later_factors
                offsets = later_offsets
            products = _row_products(now, now_factors, now_offsets, prepared, g, q, ZERO, WIDTH, ONE_SCALE, ROWS, ASM)
            _store_rows(y, bias, products, here * ROWS, n_rows, HAS_BIAS, ONE_SCALE, ROWS, WARPS)
    else:
        products = _row_products(loaded, factors, offsets, prepared, g, q, ZERO, WIDTH, ONE_SCALE, ROWS, ASM)
        _store_rows(y, bias, products, tile * ROWS, n_rows, HAS_BIAS, ONE_SCALE, ROWS, WARPS)
