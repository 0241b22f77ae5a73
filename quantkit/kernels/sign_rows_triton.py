"""Triton kernel for one row times packed signs, with integers beside them, from what `ready_kernel` makes of the row.

A tensor core counts the ones that 16 rows of signs and 8 planes of the row have in common. Rows have one scale, so
counts are added up over 1024 columns, which share the unit of their 16-bit integers.
"""

# ruff: noqa: RUF005 - tuples are built by addition: Triton does not unpack
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.kernels.bit_products_triton import count_common
from quantkit.kernels.byte_products_triton import byte_dot, field_mask, field_unit, four, pairs_of, stacked
from quantkit.kernels.gemv_triton import row_factor
from quantkit.kernels.ready_row_triton import PLANES, WORDS


@triton.jit
def _load_signs(words, row, n_words, block, q, ROWS: tl.constexpr):
    """Of ROWS rows from ``row`` on: eight of the block's 32 words, [threads, 4] twice."""
    loaded = ()
    for index in tl.static_range(ROWS):
        start = words + (row + index).to(tl.int64)[:, None] * n_words
        for half in tl.static_range(2):
            place = block * WORDS + half * 16 + q * 4
            source = start + place[:, None] + tl.arange(0, 4)[None, :]
            there = (place < n_words)[:, None]
            loaded = loaded + (tl.load(source, mask=there, other=0, eviction_policy="evict_first"),)
    return loaded


@triton.jit
def _load_planes(ready, n_words, block, g, q):
    """Planes g and g + 8 at the words of `_load_signs`: 2 x 8 words."""
    planes = ()
    for high in tl.static_range(2):
        for half in tl.static_range(2):
            place = block * WORDS + half * 16 + q * 4
            source = ready + ((g + 8 * high) * n_words + place)[:, None] + tl.arange(0, 4)[None, :]
            planes = planes + four(tl.load(source, mask=(place < n_words)[:, None], other=0))
    return planes


@triton.jit
def _counted(totals, loaded, planes, unit, q, TILES: tl.constexpr, ASM: tl.constexpr):
    """totals of a lane's rows plus its share of a block: that of planes 2q, 2q + 1, 2q + 8 and 2q + 9."""
    nothing = tl.zeros_like(q)
    results = ()
    for tile in tl.static_range(TILES):
        low = (nothing, nothing, nothing, nothing)
        high = (nothing, nothing, nothing, nothing)
        for half in tl.static_range(2):
            first = four(loaded[4 * tile + half])
            second = four(loaded[4 * tile + 2 + half])
            for a in tl.static_range(0, 4, 2):
                low = count_common(
                    first[a], second[a], first[a + 1], second[a + 1], planes[4 * half + a], planes[4 * half + a + 1],
                    low, ASM,
                )  # fmt: skip
                high = count_common(
                    first[a], second[a], first[a + 1], second[a + 1], planes[8 + 4 * half + a],
                    planes[8 + 4 * half + a + 1], high, ASM,
                )  # fmt: skip
        for row in tl.static_range(2):
            last = tl.where(q == 3, -2, 2) * high[2 * row + 1]  # the top bit of two's complement
            number = (low[2 * row] + 2 * low[2 * row + 1] + (high[2 * row] + last) * 256) << (2 * q)
            results = results + (totals[2 * tile + row] + number.to(tl.float32) * unit,)
    return results


@triton.jit
def _sign_shares(
    signs, ready, numbers, loaded, row, n_words, n_blocks, block, g, q, ONCE: tl.constexpr, TILES: tl.constexpr,
    WARPS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A lane's shares of its rows' products with what is ready, the first block's words loaded already."""
    totals = ()
    for _ in tl.static_range(2 * TILES):
        totals = totals + (tl.zeros((32 * WARPS,), tl.float32),)
    for _ in range(0, 1 if ONCE else n_blocks, WARPS):
        now = loaded
        planes = _load_planes(ready, n_words, block, g, q)
        unit = tl.load(numbers + block, mask=block < n_blocks, other=0.0)
        block += WARPS
        if not ONCE:
            loaded = _load_signs(signs, row, n_words, block, q, 2 * TILES)
        totals = _counted(totals, now, planes, unit, q, TILES, ASM)
    return totals


@triton.jit
def _load_integers(
    words, scales, zeros, row, stride16, stride4, lane, valid, BITS: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each thread's four words of its ROWS rows, and scales and zeros of each pair, four rows to a number."""
    loaded = ()
    for number in tl.static_range(ROWS):
        place = (row + number).to(tl.int64) * (stride16 * 8) + lane * 4
        source = words + place[:, None] + tl.arange(0, 4)[None, :]
        loaded = loaded + (tl.load(source, mask=valid[:, None], other=0, eviction_policy="evict_first"),)
    factors = ()
    offsets = ()
    for pair in tl.static_range(pairs_of(BITS)):
        group = (lane // (WIDTH // 8) * (2 * pairs_of(BITS)) + 2 * pair) * WIDTH // GROUP
        for quad in tl.static_range(ROWS // 4):
            place = group * stride4 + row // 4 + quad
            factors = factors + (tl.load(scales + place, mask=valid, other=0),)
            if ZERO is None:
                offsets = offsets + (tl.load(zeros + place, mask=valid, other=0),)
    return loaded, factors, offsets


@triton.jit
def _multiplied(
    totals, loaded, scales, zeros, slices, units, sums, n, lane, BITS: tl.constexpr, ZERO: tl.constexpr,
    ROWS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """totals of each row plus its sum of scale * (code - zero) * x over a thread's columns."""
    valid = lane < n
    place = slices + (lane * 4)[:, None] + tl.arange(0, 4)[None, :]
    unit = tl.load(units + lane, mask=valid, other=0.0)
    results = ()
    for _ in tl.static_range(ROWS):
        results = results + (tl.zeros_like(unit),)
    for pair in tl.static_range(pairs_of(BITS)):
        high = tl.load(place + pair * 8 * n, mask=valid[:, None], other=0)
        low = tl.load(place + (pair * 8 + 4) * n, mask=valid[:, None], other=0)
        whole = tl.load(sums + pair * n + lane, mask=valid, other=0.0)
        following = ()
        for row in tl.static_range(ROWS):
            product = byte_dot(loaded[row], high, low, field_mask(BITS, pair), ASM).to(tl.float32)
            factor = row_factor(scales[pair * (ROWS // 4) + row // 4], row % 4)
            zero = ZERO
            if ZERO is None:
                zero = row_factor(zeros[pair * (ROWS // 4) + row // 4], row % 4)
            term = (product * field_unit(BITS, pair) - whole * zero) * factor
            following = following + (results[row] + term,)
        results = following
    sum_now = ()
    for row in tl.static_range(ROWS):
        sum_now = sum_now + (totals[row] + results[row] * unit,)
    return sum_now


@triton.jit(
    do_not_specialize=[
        "second", "third", "n_ready", "n_numbers", "n_rows", "stride4", "n_words8",
        "n_blocks", "n_threads", "stride16", "chunks",
    ]
)  # fmt: skip
def sign_rows_kernel(
    ready, numbers, signs, sign_scales, sign_means, words, scales, zeros, bias, y, second, third, n_ready,
    n_numbers, n_rows, stride4, n_words8, n_blocks, n_threads, stride16, chunks,
    HAS_MEANS: tl.constexpr, BLOCKS: tl.constexpr, ONCE: tl.constexpr, BITS: tl.constexpr,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr,
    TILES: tl.constexpr, LANES: tl.constexpr, WARPS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """y [n_rows] = (sign_scales * signs + sign_means) x + (integers) x + bias. Grid (n_rows / (16 * TILES),).

    The warps of a program share the columns of the signs, block by block; each has rows of the integers of its own.

    Args:
        ready, numbers: of `ready_kernel`, per copy n_ready and n_numbers.
        signs: planar-16 words of one bit, n_words8 * 8 of 32 bits in a row, ``n_blocks`` blocks; a scale (and a mean)
            of any float dtype for each row. BLOCKS: a power of two, not less. ONCE: there is one block for each warp.
        words, scales, zeros: planar-16 integers; scales and zeros of four rows are one number (int64 or int32).
        second, third: first rows that take the second and the third copy.
        stride4: a quarter of the rows of ``scales``.
        n_threads, stride16, chunks: threads of a row of integers, its words / 16, and how often LANES threads go
            through it. WHOLE: once. BITS 0: there are none.
    """
    if PDL:
        gdc_launch_dependents()
    THREADS: tl.constexpr = 32 * WARPS
    ROWS: tl.constexpr = 16 * TILES
    thread = tl.arange(0, THREADS)
    g = thread % 32 // 4
    q = thread % 4
    first_row = tl.program_id(0) * ROWS
    copy = (first_row >= second).to(tl.int32) + (first_row >= third).to(tl.int32)
    n_words = n_words8 * 8
    ready += copy * (n_ready // 4) * 4
    numbers += copy * n_numbers
    block = thread // 32
    row = first_row + g * (2 * TILES)
    loaded = _load_signs(signs, row, n_words, block, q, 2 * TILES)
    if BITS > 0:
        OWN: tl.constexpr = ROWS * LANES // THREADS
        lane = thread % LANES
        own_row = first_row + thread // LANES * OWN
        codes, factors, offsets = _load_integers(
            words, scales, zeros, own_row, stride16, stride4, lane, lane < n_threads, BITS, WIDTH, GROUP, ZERO, OWN
        )
    rows = first_row + tl.arange(0, ROWS)
    factor = tl.load(sign_scales + rows, mask=rows < n_rows, other=0.0)
    means = tl.zeros((ROWS,), tl.float32)
    if HAS_MEANS:
        means = tl.load(sign_means + rows, mask=rows < n_rows, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if HAS_BIAS:
        total = tl.load(bias + rows, mask=rows < n_rows, other=0.0).to(tl.float32)
    if PDL:  # weights are on their way; what is made ready may not be there yet
        gdc_wait()
    if BITS > 0:
        slices = ready + n_words * PLANES
        units = numbers + 2 * n_blocks
        sums = ()
        for _ in tl.static_range(OWN):
            sums = sums + (tl.zeros((THREADS,), tl.float32),)
        for _ in range(1 if WHOLE else chunks):
            now_codes = codes
            now_factors = factors
            now_offsets = offsets
            here = lane
            lane += LANES
            if not WHOLE:
                codes, factors, offsets = _load_integers(
                    words, scales, zeros, own_row, stride16, stride4, lane, lane < n_threads, BITS, WIDTH, GROUP, ZERO,
                    OWN,
                )  # fmt: skip
            sums = _multiplied(
                sums, now_codes, now_factors, now_offsets, slices, units, units + n_threads, n_threads, here, BITS,
                ZERO, OWN, ASM,
            )  # fmt: skip
    shares = _sign_shares(signs, ready, numbers, loaded, row, n_words, n_blocks, block, g, q, ONCE, TILES, WARPS, ASM)
    places = tl.arange(0, BLOCKS)
    whole = tl.sum(tl.load(numbers + n_blocks + places, mask=places < n_blocks, other=0.0), 0)
    counted = tl.reshape(stacked(shares, 2 * TILES), (WARPS, 8, 4, 2 * TILES))
    # of signs: twice what their bits give, without all
    total += (2 * tl.reshape(tl.sum(tl.sum(counted, 2), 0), (ROWS,)) - whole) * factor.to(tl.float32)
    total += whole * means
    if BITS > 0:
        added = tl.sum(tl.reshape(stacked(sums, OWN), (THREADS // LANES, LANES, OWN)), 1)
        total += tl.reshape(added, (ROWS,))
    tl.store(y + rows, total.to(y.dtype.element_ty), mask=rows < n_rows)
