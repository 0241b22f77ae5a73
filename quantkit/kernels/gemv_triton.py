"""Triton kernels for one row of x on planar-16 words (planar.py), with four-byte integer products.

A tensor core wants eight columns of x and has one; here the threads of a program lie along the columns instead, and
walk over rows. x is cut into two slices of eight bits for each thread's columns,

    x  ~  scale * (256 * high + low),     |256 * high + low| <= 32512,     high, low: signed bytes

whose products with packed fields are exact in 32 bits (byte_products_triton.py). The scale is the largest of some 64
neighbouring values, hence the slices keep what bfloat16 holds and nearly all that float16 does. All loads of a row tile
are issued before the first is used: time goes to latency and instructions, not to bandwidth, in a matrix of few
megabytes.

Several rows of x are several programs for each tile; from about three on the tensor core is faster.
"""

# ruff: noqa: RUF005 - tuples are built by addition: Triton does not unpack
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.kernels.byte_products_triton import (
    TINY,
    byte_dot,
    byte_slices,
    field_mask,
    field_unit,
    half_to_float,
    larger_half,
    pairs_of,
    stacked,
)


@triton.jit
def _sliced_x(
    x, order, thread, valid, n_planes, BITS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    RAGGED: tl.constexpr, ORDERED: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """x at the columns of each thread's four words: (highs, lows, sums of the slices) per pair, and the scale.

    ``x`` is read as int32, two values at a time.
    """
    PAIRS: tl.constexpr = pairs_of(BITS)
    block = thread // (WIDTH // 8)
    inner = (thread % (WIDTH // 8))[:, None] * 4 + tl.arange(0, 4)[None, :]
    largest = tl.zeros((thread.shape[0], 4), tl.int32)
    evens = ()
    odds = ()
    for pair in tl.static_range(PAIRS):
        plane = block * (2 * PAIRS) + 2 * pair
        inside = valid
        if RAGGED:
            inside = valid & (plane < n_planes)
        if ORDERED:
            column = (
                tl.load(order + plane * WIDTH // GROUP, mask=inside, other=0).to(tl.int32) * GROUP
                + plane * WIDTH % GROUP
            )
        else:
            column = plane * WIDTH
        words = x + tl.multiple_of(column // 2, 8)[:, None] + inner
        even = tl.load(words, mask=inside[:, None], other=0)
        odd = tl.load(words + WIDTH // 2, mask=inside[:, None], other=0)
        largest = larger_half(larger_half(largest, even, ASM), odd, ASM)
        evens = evens + (even,)
        odds = odds + (odd,)
    top = half_to_float(tl.max(tl.maximum(largest & 0xFFFF, largest >> 16), 1), BF16)
    top = tl.where(top < TINY, TINY, top)  # NaN stays
    inverse = (32512.0 / top)[:, None]
    ones = tl.full((thread.shape[0], 4), 0x01010101, tl.int32)
    highs = ()
    lows = ()
    sums = ()
    for pair in tl.static_range(PAIRS):
        high, low = byte_slices(evens[pair], odds[pair], inverse, BF16, ASM)
        highs = highs + (high,)
        lows = lows + (low,)
        sums = sums + (byte_dot(ones, high, low, -1, ASM).to(tl.float32),)
    return highs, lows, sums, top * (1.0 / 32512.0)


@triton.jit
def _load_words(words, first_row, stride, thread, valid, BITS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Each thread's four words of each row, [threads, 4] (3 bits: of each of the three parts)."""
    PARTS: tl.constexpr = 3 if BITS == 3 else 1
    block = thread // (WIDTH // 8)
    place = block * (PARTS * (WIDTH // 2)) + thread % (WIDTH // 8) * 4
    if PARTS == 1:
        place = thread * 4
    loaded = ()
    for row in tl.static_range(ROWS):
        start = words + (first_row + row).to(tl.int64) * stride
        for part in tl.static_range(PARTS):
            source = start + (tl.multiple_of(place, 4) + part * (WIDTH // 2))[:, None] + tl.arange(0, 4)[None, :]
            loaded = loaded + (tl.load(source, mask=valid[:, None], other=0, eviction_policy="evict_first"),)
    return loaded


@triton.jit
def _load_factors(
    numbers, first_row, stride4, thread, valid, BITS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Scales (or zeros) of each pair's group, four rows to a number, [threads]."""
    loaded = ()
    for pair in tl.static_range(pairs_of(BITS)):
        group = (thread // (WIDTH // 8) * (2 * pairs_of(BITS)) + 2 * pair) * WIDTH // GROUP
        for quad in tl.static_range(ROWS // 4):
            loaded = loaded + (tl.load(numbers + group * stride4 + first_row // 4 + quad, mask=valid, other=0),)
    return loaded


@triton.jit
def _load_chunk(
    words, scales, zeros, first_row, stride, stride4, thread, valid, BITS: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Words, scales and zeros of a tile at some columns. Where ZERO is their constant no zeros are loaded."""
    held = _load_words(words, first_row, stride, thread, valid, BITS, WIDTH, ROWS)
    factors = _load_factors(scales, first_row, stride4, thread, valid, BITS, WIDTH, GROUP, ROWS)
    offsets = factors
    if ZERO is None:
        offsets = _load_factors(zeros, first_row, stride4, thread, valid, BITS, WIDTH, GROUP, ROWS)
    return held, factors, offsets


@triton.jit
def _load_tile(
    words, scales, zeros, first_row, stride, stride4, n_threads, BITS: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, ZERO: tl.constexpr, THREADS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """`_load_chunk` for every chunk of THREADS threads."""
    loaded = ()
    for chunk in tl.static_range(CHUNKS):
        thread = chunk * THREADS + tl.arange(0, THREADS)
        valid = thread < n_threads
        loaded = loaded + (
            _load_chunk(
                words, scales, zeros, first_row, stride, stride4, thread, valid, BITS, WIDTH, GROUP, ROWS, ZERO
            ),
        )
    return loaded


@triton.jit
def row_factor(four_rows, ROW: tl.constexpr):
    """One row's number of four that were loaded as one: float16 of an int64, or a byte of an int32."""
    if four_rows.dtype == tl.int64:
        return (four_rows >> (16 * ROW)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return ((four_rows >> (8 * ROW)) & 0xFF).to(tl.float32)


@triton.jit
def row_words(loaded, row: tl.constexpr, pair: tl.constexpr, BITS: tl.constexpr):
    """The words that hold a pair's fields; 3 bits: the field itself where it is in spare bits."""
    if BITS != 3:
        return loaded[row]
    elif pair < 6:
        return loaded[3 * row + pair // 2]
    elif pair == 6:
        return ((loaded[3 * row] >> 6) & 0x03030303) | ((loaded[3 * row + 1] >> 4) & 0x04040404)
    else:
        return ((loaded[3 * row + 2] >> 6) & 0x03030303) | ((loaded[3 * row + 1] >> 5) & 0x04040404)


@triton.jit
def _row_sums(
    loaded, scales, zeros, highs, lows, sums, BITS: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Per row, float32 [threads]: sums of scale * (code - zero) * x over a thread's columns, x in its slices' unit."""
    QUADS: tl.constexpr = ROWS // 4
    totals = ()
    for row in tl.static_range(ROWS):
        total = tl.zeros_like(sums[0])
        for pair in tl.static_range(pairs_of(BITS)):
            product = byte_dot(row_words(loaded, row, pair, BITS), highs[pair], lows[pair], field_mask(BITS, pair), ASM)
            scale = row_factor(scales[pair * QUADS + row // 4], row % 4)
            if ZERO is None:
                offset = sums[pair] * row_factor(zeros[pair * QUADS + row // 4], row % 4)
            else:
                offset = sums[pair] * ZERO
            total += (product.to(tl.float32) * field_unit(BITS, pair) - offset) * scale
        totals = totals + (total,)
    return totals


@triton.jit
def _tile_sums(loaded, sliced, BITS: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr):
    """Per row, float32 [threads]: the sums over a thread's columns of all chunks."""
    before = ()
    for chunk in tl.static_range(len(loaded)):
        held, factors, offsets = loaded[chunk]
        highs, lows, sums, x_scale = sliced[chunk]
        added = _row_sums(held, factors, offsets, highs, lows, sums, BITS, ZERO, ROWS, ASM)
        totals = ()
        for row in tl.static_range(ROWS):
            here = added[row] * x_scale
            if chunk > 0:
                here += before[row]
            totals = totals + (here,)
        before = totals
    return before


@triton.jit
def _store_rows(y, bias, totals, first_row, n_rows, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr):
    total = tl.sum(tl.reshape(stacked(totals, ROWS), (totals[0].shape[0], ROWS)), 0)
    rows = first_row + tl.arange(0, ROWS)
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=rows < n_rows, other=0.0).to(tl.float32)
    tl.store(y + rows, total.to(y.dtype.element_ty), mask=rows < n_rows)


@triton.jit
def _token(copies, first_row, COPY_ROWS: tl.constexpr):
    """The row of x that a program takes: its own by grid, or that of its rows of the weight."""
    if COPY_ROWS is None:
        return tl.program_id(1)
    else:
        return tl.load(copies + first_row // COPY_ROWS)


@triton.jit
def gemv_kernel(
    x, words, scales, zeros, order, bias, y, copies, n_rows, n_columns, stride4, stride16, n_threads, n_planes,
    BITS: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr,
    ORDERED: tl.constexpr, HAS_BIAS: tl.constexpr, COPY_ROWS: tl.constexpr, BF16: tl.constexpr, ROWS: tl.constexpr,
    THREADS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """y [tokens, n_rows] = x [tokens, n_columns] @ weight^T + bias. Grid (row tiles, tokens).

    Args:
        x: read as int32, two values at a time; words: likewise.
        copies: the row of x for each COPY_ROWS rows of the weight; COPY_ROWS is None: a program for every row of x.
        scales: four rows read as one int64; zeros: the same, or uint8 read as int32. ``stride4``: of a group.
        stride16: words of a row / 16.
        n_threads: that a row takes; a program of fewer walks along it.
        n_planes: that hold columns. ZERO: of every group, or None.
    """
    if PDL:
        gdc_launch_dependents()
    first_row = tl.program_id(0) * ROWS
    x += _token(copies, first_row, COPY_ROWS).to(tl.int64) * (n_columns // 2)
    y += tl.program_id(1).to(tl.int64) * n_rows
    totals = ()
    for _ in tl.static_range(ROWS):
        totals = totals + (tl.zeros((THREADS,), tl.float32),)
    for start in range(0, n_threads, THREADS):
        here = start + tl.arange(0, THREADS)
        valid = here < n_threads
        held, factors, offsets = _load_chunk(
            words, scales, zeros, first_row, stride16 * 8, stride4, here, valid, BITS, WIDTH, GROUP, ROWS, ZERO
        )
        if PDL:  # weights are on their way; x may not be there yet
            gdc_wait()
        highs, lows, sums, x_scale = _sliced_x(
            x, order, here, valid, n_planes, BITS, WIDTH, GROUP, RAGGED, ORDERED, BF16, ASM
        )
        added = _row_sums(held, factors, offsets, highs, lows, sums, BITS, ZERO, ROWS, ASM)
        sum_now = ()
        for row in tl.static_range(ROWS):
            sum_now = sum_now + (totals[row] + added[row] * x_scale,)
        totals = sum_now
    _store_rows(y, bias, totals, first_row, n_rows, HAS_BIAS, ROWS)


@triton.jit
def resident_gemv_kernel(
    x, words, scales, zeros, order, bias, y, n_rows, n_columns, stride4, stride16, n_threads, n_planes, n_tiles,
    BITS: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr,
    ORDERED: tl.constexpr, HAS_BIAS: tl.constexpr, BF16: tl.constexpr, ROWS: tl.constexpr, THREADS: tl.constexpr,
    CHUNKS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """`gemv_kernel` for rows that a program spans in CHUNKS steps: x is sliced once for all its tiles.

    Programs that run at the same time read tiles that lie side by side. The words of a tile are loaded while the one
    before is multiplied. Grid (programs, tokens); tile i + programs follows tile i.
    """
    if PDL:
        gdc_launch_dependents()
    x += tl.program_id(1).to(tl.int64) * (n_columns // 2)
    y += tl.program_id(1).to(tl.int64) * n_rows
    stride = stride16 * 8
    tile = tl.program_id(0)
    first_row = tile * ROWS
    loaded = _load_tile(
        words, scales, zeros, first_row, stride, stride4, n_threads, BITS, WIDTH, GROUP, ROWS, ZERO, THREADS, CHUNKS
    )
    if PDL:
        gdc_wait()
    sliced = ()
    for chunk in tl.static_range(CHUNKS):
        thread = chunk * THREADS + tl.arange(0, THREADS)
        sliced = sliced + (
            _sliced_x(x, order, thread, thread < n_threads, n_planes, BITS, WIDTH, GROUP, RAGGED, ORDERED, BF16, ASM),
        )
    while tile < n_tiles:
        now = loaded
        tile += tl.num_programs(0)
        loaded = _load_tile(
            words, scales, zeros, tile * ROWS, stride, stride4, tl.where(tile < n_tiles, n_threads, 0), BITS, WIDTH,
            GROUP, ROWS, ZERO, THREADS, CHUNKS,
        )  # fmt: skip
        totals = _tile_sums(now, sliced, BITS, ZERO, ROWS, ASM)
        _store_rows(y, bias, totals, first_row, n_rows, HAS_BIAS, ROWS)
        first_row = tile * ROWS
