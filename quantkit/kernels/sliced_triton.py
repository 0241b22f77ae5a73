"""Triton kernels for one row of x on planar-16 words where x needs an order and scales of its own: `sign_salient`.

    slice_kernel           x in order and scale of the packed columns, cut into byte slices (byte_products_triton.py)
    sliced_product_kernel  the product of slices with one or two weights side by side, signs and integers

The slices lie as threads read them: what a program of the product would otherwise compute from x, each for itself, it
finds ready. A program of the product has rows of its own and walks over the columns; programs share nothing.
"""

# ruff: noqa: RUF005 - tuples are built by addition: Triton does not unpack
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.kernels.byte_products_triton import TINY, byte_dot, field_mask, field_unit, pairs_of
from quantkit.kernels.gemv_triton import _factor, _stacked


@triton.jit
def _slice_part(
    x, places, factors, slices, numbers, first, n, PAIRS: tl.constexpr, COUNT: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Slices for COUNT threads of the product, of n that a part has; each takes PAIRS * 16 columns."""
    COLUMNS: tl.constexpr = PAIRS * 16
    WORDS: tl.constexpr = PAIRS * 4
    thread = (first + tl.arange(0, COUNT))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    there = (thread < n) & (column >= 0)
    place = tl.load(places + thread * COLUMNS + column, mask=there, other=-1).to(tl.int32)
    factor = tl.load(factors + thread * COLUMNS + column, mask=there, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    value = tl.load(x + place, mask=place >= 0, other=0.0).to(tl.float32) * factor
    top = tl.max(tl.where(value == value, tl.abs(value), float("inf")), 1)[:, None]
    top = tl.where(top < TINY, TINY, top)
    # 1.5 * 2**23 + 128 leaves the rounded value + 128 in the last bits: its second byte is the high slice
    moved = (value * (32512.0 / top) + 12583040.0).to(tl.int32, bitcast=True)
    number = moved - 0x4B400080
    shift = column % 4 * 8
    high = tl.sum(tl.reshape(((moved >> 8) & 0xFF) << shift, (COUNT, WORDS, 4)), 2)
    low = tl.sum(tl.reshape((number & 0xFF) << shift, (COUNT, WORDS, 4)), 2)
    word = tl.arange(0, WORDS)[None, :]
    target = slices + word // 4 * (8 * n) + thread * 4 + word % 4
    tl.store(target, high, mask=(thread < n) & (word >= 0))
    tl.store(target + 4 * n, low, mask=(thread < n) & (word >= 0))
    pair = tl.arange(0, PAIRS)[None, :]
    sums = tl.sum(tl.reshape(number, (COUNT, PAIRS, 16)), 2).to(tl.float32)
    unit = tl.where(top == float("inf"), float("nan"), top * (1.0 / 32512.0))
    tl.store(numbers + thread, unit, mask=thread < n)
    tl.store(numbers + n + pair * n + thread, sums, mask=(thread < n) & (pair >= 0))


@triton.jit(do_not_specialize=["n0", "n1", "programs0", "n_cells", "n_slices", "n_numbers"])
def slice_kernel(
    x, places, factors, slices, numbers, n0, n1, programs0, n_cells, n_slices, n_numbers, PAIRS: tl.constexpr,
    COUNTS: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One row of x to the slices of its copies. Grid (programs of the first part and of the second, copies).

    Args:
        places, factors: per copy n_cells: the column of x (-1: zero) and its scale, for each byte that a thread reads.
        slices: int32, per copy n_slices: of each part [pairs, 2, threads, 4], high slices, then low ones.
        numbers: float32, per copy n_numbers: of each part the slices' unit [threads] and their sums [pairs, threads].
        n0, n1: threads of either part; PAIRS: theirs of a thread, one or two numbers.
    """
    if PDL:
        gdc_launch_dependents()
    program = tl.program_id(0)
    copy = tl.program_id(1)
    places += copy * n_cells
    factors += copy * n_cells
    slices += copy * n_slices
    numbers += copy * n_numbers
    if program < programs0:
        _slice_part(x, places, factors, slices, numbers, program * COUNTS[0], n0, PAIRS[0], COUNTS[0], PDL)
    elif len(PAIRS) > 1:
        cells = n0 * (16 * PAIRS[0])
        _slice_part(
            x, places + cells, factors + cells, slices + n0 * (8 * PAIRS[0]), numbers + n0 * (1 + PAIRS[0]),
            (program - programs0) * COUNTS[1], n1, PAIRS[1], COUNTS[1], PDL,
        )  # fmt: skip


@triton.jit
def _load_rows(
    words, scales, zeros, row, stride16, stride4, lane, valid, BITS: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, ONE_GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each thread's four words of its ROWS rows, and scales and zeros, four rows to a number: of each pair, or one."""
    loaded = ()
    for number in tl.static_range(ROWS):
        place = (row + number).to(tl.int64) * (stride16 * 8) + lane * 4
        source = words + place[:, None] + tl.arange(0, 4)[None, :]
        loaded = loaded + (tl.load(source, mask=valid[:, None], other=0, eviction_policy="evict_first"),)
    factors = ()
    offsets = ()
    for pair in tl.static_range(1 if ONE_GROUP else pairs_of(BITS)):
        group = (lane // (WIDTH // 8) * (2 * pairs_of(BITS)) + 2 * pair) * WIDTH // GROUP
        for quad in tl.static_range(ROWS // 4):
            place = group * stride4 + row // 4 + quad
            factors = factors + (tl.load(scales + place, mask=valid, other=0),)
            if ZERO is None:
                offsets = offsets + (tl.load(zeros + place, mask=valid, other=0),)
    return loaded, factors, offsets


@triton.jit
def _load_slices(slices, numbers, n, lane, valid, BITS: tl.constexpr):
    """(highs, lows, sums) per pair, and the unit, as `_sliced_x` of gemv_triton.py computes them."""
    PAIRS: tl.constexpr = pairs_of(BITS)
    highs = ()
    lows = ()
    sums = ()
    place = slices + (lane * 4)[:, None] + tl.arange(0, 4)[None, :]
    for pair in tl.static_range(PAIRS):
        highs = highs + (tl.load(place + pair * 8 * n, mask=valid[:, None], other=0),)
        lows = lows + (tl.load(place + (pair * 8 + 4) * n, mask=valid[:, None], other=0),)
        sums = sums + (tl.load(numbers + n + pair * n + lane, mask=valid, other=0.0),)
    return highs, lows, sums, tl.load(numbers + lane, mask=valid, other=0.0)


@triton.jit
def _added(
    totals, loaded, scales, zeros, highs, lows, sums, unit, BITS: tl.constexpr, ZERO: tl.constexpr,
    ONE_GROUP: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """totals of each row plus its sum of scale * (code - zero) * x over a thread's columns."""
    QUADS: tl.constexpr = ROWS // 4
    whole = sums[0]
    for pair in tl.static_range(1, pairs_of(BITS)):
        whole += sums[pair]
    results = ()
    for row in tl.static_range(ROWS):
        total = tl.zeros_like(unit)
        for pair in tl.static_range(pairs_of(BITS)):
            product = byte_dot(loaded[row], highs[pair], lows[pair], field_mask(BITS, pair), ASM).to(tl.float32)
            if ONE_GROUP:
                total += product * field_unit(BITS, pair)
            else:
                zero = ZERO
                if ZERO is None:
                    zero = _factor(zeros[pair * QUADS + row // 4], row % 4)
                total += (product * field_unit(BITS, pair) - sums[pair] * zero) * _factor(
                    scales[pair * QUADS + row // 4], row % 4
                )
        if ONE_GROUP:
            zero = ZERO
            if ZERO is None:
                zero = _factor(zeros[row // 4], row % 4)
            total = (total - whole * zero) * _factor(scales[row // 4], row % 4)
        results = results + (totals[row] + total * unit,)
    return results


@triton.jit
def _walk(
    totals, loaded, scales, zeros, slices, numbers, words, all_scales, all_zeros, row, stride16, stride4, lane, n,
    chunks, BITS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ONE_GROUP: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """totals plus the products of one part, its first chunk of columns loaded already, the next ones one ahead."""
    for _ in range(1 if WHOLE else chunks):
        now = loaded
        now_scales = scales
        now_zeros = zeros
        highs, lows, sums, unit = _load_slices(slices, numbers, n, lane, lane < n, BITS)
        lane += LANES
        if not WHOLE:
            loaded, scales, zeros = _load_rows(
                words, all_scales, all_zeros, row, stride16, stride4, lane, lane < n, BITS, WIDTH, GROUP, ZERO,
                ONE_GROUP, ROWS,
            )  # fmt: skip
        totals = _added(totals, now, now_scales, now_zeros, highs, lows, sums, unit, BITS, ZERO, ONE_GROUP, ROWS, ASM)
    return totals


@triton.jit(
    do_not_specialize=[
        "second", "third", "n_slices", "n_numbers", "n_rows", "stride4", "n0", "stride0", "chunks0", "n1", "stride1",
        "chunks1",
    ]
)  # fmt: skip
def sliced_product_kernel(
    slices, numbers, words0, scales0, zeros0, words1, scales1, zeros1, bias, y, second, third, n_slices, n_numbers,
    n_rows, stride4, n0, stride0, chunks0, n1, stride1, chunks1, BITS: tl.constexpr, WIDTHS: tl.constexpr,
    GROUPS: tl.constexpr, ZEROS: tl.constexpr, ONE_GROUP: tl.constexpr, WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, THREADS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """y [n_rows] = weights side by side times the slices of one row of x, + bias. Grid (row tiles,).

    Args:
        slices, numbers: of `slice_kernel`, per copy n_slices and n_numbers.
        words0 .. zeros1: planar-16, scales and zeros (int64 or int32: four rows) of either weight, the same if one.
        second, third: first rows that take the second and the third copy.
        stride4: a quarter of the rows of scales and zeros.
        n0, stride0, chunks0: threads of a row of the weight, its words / 16, and LANES that its threads fill.
        ONE_GROUP: each row has one scale. WHOLE: LANES hold a row.
    """
    if PDL:
        gdc_launch_dependents()
    thread = tl.arange(0, THREADS)
    lane = thread % LANES
    TILES: tl.constexpr = THREADS // LANES
    first_row = tl.program_id(0) * (TILES * ROWS)
    row = first_row + thread // LANES * ROWS
    copy = (first_row >= second).to(tl.int32) + (first_row >= third).to(tl.int32)
    slices += copy * (n_slices // 4 * 4)
    numbers += copy * n_numbers
    loaded0, factors0, offsets0 = _load_rows(
        words0, scales0, zeros0, row, stride0, stride4, lane, lane < n0, BITS[0], WIDTHS[0], GROUPS[0], ZEROS[0],
        ONE_GROUP[0], ROWS,
    )  # fmt: skip
    if len(BITS) > 1:
        loaded1, factors1, offsets1 = _load_rows(
            words1, scales1, zeros1, row, stride1, stride4, lane, lane < n1, BITS[1], WIDTHS[1], GROUPS[1], ZEROS[1],
            ONE_GROUP[1], ROWS,
        )  # fmt: skip
    if PDL:  # weights are on their way; the slices may not be there yet
        gdc_wait()
    totals = ()
    for _ in tl.static_range(ROWS):
        totals = totals + (tl.zeros((THREADS,), tl.float32),)
    totals = _walk(
        totals, loaded0, factors0, offsets0, slices, numbers, words0, scales0, zeros0, row, stride0, stride4, lane, n0,
        chunks0, BITS[0], WIDTHS[0], GROUPS[0], ZEROS[0], ONE_GROUP[0], WHOLE[0], ROWS, LANES, ASM,
    )  # fmt: skip
    if len(BITS) > 1:
        PAIRS: tl.constexpr = pairs_of(BITS[0])
        totals = _walk(
            totals, loaded1, factors1, offsets1, slices + n0 * (8 * PAIRS), numbers + n0 * (1 + PAIRS), words1, scales1,
            zeros1, row, stride1, stride4, lane, n1, chunks1, BITS[1], WIDTHS[1], GROUPS[1], ZEROS[1], ONE_GROUP[1],
            WHOLE[1], ROWS, LANES, ASM,
        )  # fmt: skip
    total = tl.sum(tl.reshape(_stacked(totals, ROWS), (TILES, LANES, ROWS)), 1)
    rows = first_row + tl.arange(0, TILES)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=rows < n_rows, other=0.0).to(tl.float32)
    tl.store(y + rows, total.to(y.dtype.element_ty), mask=rows < n_rows)
