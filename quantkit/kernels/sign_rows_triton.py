"""Triton kernels for one row of x times packed signs, with integers beside them: two launches.

    ready_kernel      x in order and scale of the packed columns: planes of bits for the signs (bit_products_triton.py),
                      byte slices for the integers (byte_products_triton.py)
    sign_rows_kernel  the product of both parts with what is ready

A tensor core counts the ones that 16 rows of signs and 8 planes of x have in common. Rows have one scale, so counts are
added up over 1024 columns, which share the unit of their 16-bit integers.
"""

# ruff: noqa: RUF005 - tuples are built by addition: Triton does not unpack
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.kernels.bit_products_triton import count_common, four
from quantkit.kernels.byte_products_triton import TINY, byte_dot, field_mask, field_unit, pairs_of
from quantkit.kernels.gemv_triton import _factor, _stacked

PLANES = tl.constexpr(16)
WORDS = tl.constexpr(32)  # of a block: 1024 columns


@triton.jit
def _normed(x, update, weight, residual, place, eps, n, HAS_UPDATE: tl.constexpr, BLOCK: tl.constexpr):
    """Some columns of the RMS norm of x + update, by way of 16 bits as `add_norm_kernel` has them; all of the sum."""
    columns = tl.arange(0, BLOCK)
    row = tl.load(x + columns, mask=columns < n, other=0.0)
    value = tl.load(x + place, mask=place >= 0, other=0.0)
    if HAS_UPDATE:
        row = (row.to(tl.float32) + tl.load(update + columns, mask=columns < n, other=0.0).to(tl.float32)).to(row.dtype)
        more = tl.load(update + place, mask=place >= 0, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(row.dtype)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(residual + columns, row, mask=columns < n)
    wide = row.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / n + eps)
    normal = (value.to(tl.float32) * factor).to(row.dtype).to(tl.float32)
    return (normal * weight.to(tl.float32)).to(row.dtype).to(tl.float32)


@triton.jit
def _taken(
    x, update, weight, residual, places, factors, cell, there, eps, n, SOURCE: tl.constexpr, HAS_UPDATE: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Columns of the source times their scales; 0 where there is none."""
    place = tl.load(places + cell, mask=there, other=-1).to(tl.int32)
    factor = tl.load(factors + cell, mask=there, other=0.0).to(tl.float32)
    weights = factor
    if SOURCE == "norm":
        weights = tl.load(weight + place, mask=place >= 0, other=0.0)
    if PDL:
        gdc_wait()
    if SOURCE == "norm":
        value = _normed(x, update, weights, residual, place, eps, n, HAS_UPDATE, BLOCK)
    elif SOURCE == "gated":
        gate = tl.load(x + place, mask=place >= 0, other=0.0).to(tl.float32)
        up = tl.load(x + n + place, mask=place >= 0, other=0.0).to(tl.float32)
        value = (gate / (1.0 + tl.exp(-gate)) * up).to(x.dtype.element_ty).to(tl.float32)
    else:
        value = tl.load(x + place, mask=place >= 0, other=0.0).to(tl.float32)
    return tl.where(place >= 0, value, 0.0) * factor


@triton.jit
def _unit(magnitude):
    """The unit of 16-bit integers whose largest is ``magnitude``, and its inverse; NaN for what is no number."""
    top = tl.where(magnitude < TINY, TINY, magnitude)
    return tl.where(top == float("inf"), float("nan"), top * (1.0 / 32512.0)), 32512.0 / top


@triton.jit
def _magnitude(value):
    return tl.where(value == value, tl.abs(value), float("inf"))


@triton.jit
def _plane_part(
    x, update, weight, residual, places, factors, eps, n, planes, units, sums, block, first, n_words,
    SOURCE: tl.constexpr, HAS_UPDATE: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """COUNT planes from ``first`` on of a block's 1024 columns; the program of the first also its unit and sum."""
    word = tl.arange(0, WORDS)[:, None]
    bit = tl.arange(0, 32)[None, :]
    value = _taken(
        x, update, weight, residual, places, factors, (block * WORDS + word) * 32 + bit, block * WORDS + word < n_words,
        eps, n, SOURCE, HAS_UPDATE, BLOCK, PDL,
    )  # fmt: skip
    unit, inverse = _unit(tl.max(tl.max(_magnitude(value), 1), 0))
    number = (value * inverse + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000  # 1.5 * 2**23: rounds
    words = block * WORDS + tl.arange(0, WORDS)
    for index in tl.static_range(COUNT):
        plane = tl.sum(((number >> (first + index)) & 1) << bit, 1)
        tl.store(planes + (first + index) * n_words + words, plane, mask=words < n_words)
    if first == 0:
        tl.store(units + block, unit)
        tl.store(sums + block, tl.sum(tl.sum(number, 1), 0).to(tl.float32) * unit)


@triton.jit
def _slice_part(
    x, update, weight, residual, places, factors, eps, n_columns, slices, units, sums, first, n, SOURCE: tl.constexpr,
    HAS_UPDATE: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr, COUNT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Slices for COUNT threads of the product, of n in all; each takes PAIRS * 16 columns."""
    COLUMNS: tl.constexpr = PAIRS * 16
    thread = (first + tl.arange(0, COUNT))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    value = _taken(
        x, update, weight, residual, places, factors, thread * COLUMNS + column, (thread < n) & (column >= 0), eps,
        n_columns, SOURCE, HAS_UPDATE, BLOCK, PDL,
    )  # fmt: skip
    unit, inverse = _unit(tl.max(_magnitude(value), 1)[:, None])
    # 1.5 * 2**23 + 128 leaves the rounded value + 128 in the last bits: its second byte is the high slice
    moved = (value * inverse + 12583040.0).to(tl.int32, bitcast=True)
    number = moved - 0x4B400080
    shift = column % 4 * 8
    high = tl.sum(tl.reshape(((moved >> 8) & 0xFF) << shift, (COUNT, PAIRS * 4, 4)), 2)
    low = tl.sum(tl.reshape((number & 0xFF) << shift, (COUNT, PAIRS * 4, 4)), 2)
    word = tl.arange(0, PAIRS * 4)[None, :]
    target = slices + word // 4 * (8 * n) + thread * 4 + word % 4
    tl.store(target, high, mask=(thread < n) & (word >= 0))
    tl.store(target + 4 * n, low, mask=(thread < n) & (word >= 0))
    pair = tl.arange(0, PAIRS)[None, :]
    total = tl.sum(tl.reshape(number, (COUNT, PAIRS, 16)), 2).to(tl.float32)
    tl.store(units + thread, unit, mask=thread < n)
    tl.store(sums + pair * n + thread, total, mask=(thread < n) & (pair >= 0))


@triton.jit(do_not_specialize=["n_columns", "n_words8", "n_blocks", "n_threads", "n_cells", "n_ready", "n_numbers"])
def ready_kernel(
    x, update, weight, residual, places, factors, ready, numbers, eps, n_columns, n_words8, n_blocks, n_threads,
    n_cells, n_ready, n_numbers, SOURCE: tl.constexpr, HAS_UPDATE: tl.constexpr, BLOCK: tl.constexpr,
    PAIRS: tl.constexpr, COUNT: tl.constexpr, PLANES_EACH: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One row made ready for its copies. Grid (programs of the signs and of the integers, copies).

    Args:
        SOURCE: what the row is. "row": x itself. "gated": silu(gate) * up of x [2 * n_columns]. "norm": weight * RMS
            norm of x + update [n_columns], where the sum goes to ``residual``, another tensor than x. BLOCK: a power
            of two, not less than n_columns.
        places, factors: per copy n_cells: the column of x (-1: zero) and its scale, for each bit of the words of signs
            and for each byte that a thread reads of the integers.
        ready: int32, per copy n_ready: planes [16, n_words]; slices [pairs, 2, threads, 4], high ones, then low ones.
        numbers: float32, per copy n_numbers: units and sums of the blocks of 1024 columns; units of the threads'
            slices, and their sums in these units [pairs, threads].
        n_words8, n_blocks: words / 8 of a row of signs, and its blocks.
        n_threads, PAIRS: of a row of integers; PAIRS 0: there are none.
    """
    if PDL:
        gdc_launch_dependents()
    program = tl.program_id(0)
    copy = tl.program_id(1)
    n_words = n_words8 * 8
    places += copy * n_cells
    factors += copy * n_cells
    ready += copy * n_ready
    numbers += copy * n_numbers
    EACH: tl.constexpr = PLANES // PLANES_EACH
    if program < n_blocks * EACH:
        _plane_part(
            x, update, weight, residual, places, factors, eps, n_columns, ready, numbers, numbers + n_blocks,
            program // EACH, program % EACH * PLANES_EACH, n_words, SOURCE, HAS_UPDATE, BLOCK, PLANES_EACH, PDL,
        )  # fmt: skip
    elif PAIRS > 0:
        skip = n_words * 32
        numbers += 2 * n_blocks
        _slice_part(
            x, update, weight, residual, places + skip, factors + skip, eps, n_columns, ready + n_words * PLANES,
            numbers, numbers + n_threads, (program - n_blocks * EACH) * COUNT, n_threads, SOURCE, HAS_UPDATE, BLOCK,
            PAIRS, COUNT, PDL,
        )  # fmt: skip


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
def _path_shares(
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
            factor = _factor(scales[pair * (ROWS // 4) + row // 4], row % 4)
            zero = ZERO
            if ZERO is None:
                zero = _factor(zeros[pair * (ROWS // 4) + row // 4], row % 4)
            term = (product * field_unit(BITS, pair) - whole * zero) * factor
            following = following + (results[row] + term,)
        results = following
    sum_now = ()
    for row in tl.static_range(ROWS):
        sum_now = sum_now + (totals[row] + results[row] * unit,)
    return sum_now


@triton.jit(
    do_not_specialize=[
        "span", "second", "third", "n_ready", "n_numbers", "n_rows", "scale_stride", "stride4", "n_words8",
        "n_blocks", "n_threads", "stride16", "chunks",
    ]
)  # fmt: skip
def sign_rows_kernel(
    ready, numbers, signs, sign_scales, sign_means, words, scales, zeros, bias, y, span, second, third, n_ready,
    n_numbers, n_rows, scale_stride, stride4, n_words8, n_blocks, n_threads, stride16, chunks,
    HAS_MEANS: tl.constexpr, PATHS: tl.constexpr, BLOCKS: tl.constexpr, ONCE: tl.constexpr, BITS: tl.constexpr,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr,
    TILES: tl.constexpr, LANES: tl.constexpr, WARPS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """y [n_rows] = (sign_scales * signs + sign_means) x + (integers) x + bias. Grid (n_rows / (16 * TILES),).

    The warps of a program share the columns of the signs, block by block; each has rows of the integers of its own.

    Args:
        ready, numbers: of `ready_kernel`, per copy n_ready and n_numbers; PATHS neighbours are multiplied by the same
            rows, each with scales of its own (without integers), ``scale_stride`` apart.
        signs: planar-16 words of one bit, n_words8 * 8 of 32 bits in a row, ``n_blocks`` blocks; a scale (and a mean)
            of any float dtype for each row. BLOCKS: a power of two, not less. ONCE: there is one block for each warp.
        words, scales, zeros: planar-16 integers; scales and zeros of four rows are one number (int64 or int32).
        span: rows that share a copy; or second, third: first rows that take the second and the third copy.
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
    copy = first_row // span + (first_row >= second).to(tl.int32) + (first_row >= third).to(tl.int32)
    n_words = n_words8 * 8
    n_ready4 = n_ready // 4
    ready += copy * (PATHS * n_ready4) * 4
    numbers += copy * PATHS * n_numbers
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
    factor = ()
    for path in tl.static_range(PATHS):
        factor = factor + (tl.load(sign_scales + path * scale_stride + rows, mask=rows < n_rows, other=0.0),)
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
    for path in tl.static_range(PATHS):
        if path > 0 and not ONCE:
            loaded = _load_signs(signs, row, n_words, block, q, 2 * TILES)
        shares = _path_shares(
            signs, ready + path * n_ready4 * 4, numbers + path * n_numbers, loaded, row, n_words, n_blocks, block, g, q,
            ONCE, TILES, WARPS, ASM,
        )  # fmt: skip
        places = tl.arange(0, BLOCKS)
        sums_of_blocks = tl.load(numbers + path * n_numbers + n_blocks + places, mask=places < n_blocks, other=0.0)
        whole = tl.sum(sums_of_blocks, 0)
        counted = tl.reshape(_stacked(shares, 2 * TILES), (WARPS, 8, 4, 2 * TILES))
        # of signs: twice what their bits give, without all
        total += (2 * tl.reshape(tl.sum(tl.sum(counted, 2), 0), (ROWS,)) - whole) * factor[path].to(tl.float32)
        total += whole * means
    if BITS > 0:
        added = tl.sum(tl.reshape(_stacked(sums, OWN), (THREADS // LANES, LANES, OWN)), 1)
        total += tl.reshape(added, (ROWS,))
    tl.store(y + rows, total.to(y.dtype.element_ty), mask=rows < n_rows)
