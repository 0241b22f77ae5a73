"""Triton kernel for one row times packed signs, with integers beside them, from what `ready_kernel` makes of the row.

A tensor core counts the ones that 16 rows of signs and 8 planes of the row have in common. Rows have one scale, so
counts are added up over 1024 columns, which share the unit of their 16-bit integers. Integers are multiplied as bytes,
by the tensor core as well (byte_columns_triton.py).
"""

# ruff: noqa: RUF005 - tuples are built by addition: Triton does not unpack
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.kernels.bit_products_triton import count_common, two_to
from quantkit.kernels.byte_columns_triton import byte_product as byte_sums
from quantkit.kernels.byte_products_triton import field_mask, four, pairs_of, stacked
from quantkit.kernels.ready_row_triton import CHUNK, PLANES, WORDS


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
    signs, ready, numbers, loaded, row, n_words, n_blocks, block, q, g, ONCE: tl.constexpr, TILES: tl.constexpr,
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


@triton.constexpr_function
def _halves(width):
    """Parts of a chunk of four threads whose columns may be of different groups."""
    return 2 if width == 16 else 1


@triton.constexpr_function
def _slots(bits, width, steps):
    """Sums over one group's part of a chunk, in all chunks of a warp."""
    return _halves(width) * pairs_of(bits) * steps


@triton.jit
def _load_codes(words, row, n_words, first, step, n_threads, q, STEPS: tl.constexpr):
    """Of two rows from ``row`` on: four words of the lane's thread of each chunk, and whether it is there."""
    loaded = ()
    for index in tl.static_range(STEPS):
        thread = (first + index * step) * CHUNK + q
        for member in tl.static_range(2):
            place = words + ((row + member).to(tl.int64) * n_words + thread * 4)[:, None] + tl.arange(0, 4)[None, :]
            valid = (thread < n_threads)[:, None]
            loaded = loaded + (tl.load(place, mask=valid, other=0, eviction_policy="evict_first"),)
    return loaded


@triton.jit
def _slot_of(first, step, number, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """Chunk, pair and half of a slot, which depends on the lane."""
    each: tl.constexpr = _halves(WIDTH) * pairs_of(BITS)
    return first + number // each * step, number // _halves(WIDTH) % pairs_of(BITS), number % _halves(WIDTH)


@triton.jit
def _load_numbers(
    numbers, row, stride, first, step, n_threads, q, BITS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Scales (or zeros) of two rows, one number, for the slots that lane q gets the sums of."""
    loaded = ()
    for index in tl.static_range(0, _slots(BITS, WIDTH, STEPS), 4):
        chunk, pair, half = _slot_of(first, step, index + q, BITS, WIDTH)
        thread = chunk * CHUNK + half * 2
        group = (thread // (WIDTH // 8) * (2 * pairs_of(BITS)) + 2 * pair) * WIDTH // GROUP
        valid = (thread < n_threads) & (index + q < _slots(BITS, WIDTH, STEPS))
        loaded = loaded + (tl.load(numbers + group * stride + row // 2, mask=valid, other=0),)
    return loaded


@triton.jit
def _load_integers(
    words, scales, zeros, row, stride16, stride2, first, step, n_threads, q, BITS: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    codes = _load_codes(words, row, stride16 * 8, first, step, n_threads, q, STEPS)
    factors = _load_numbers(scales, row, stride2, first, step, n_threads, q, BITS, WIDTH, GROUP, STEPS)
    offsets = factors
    if ZERO is None:
        offsets = _load_numbers(zeros, row, stride2, first, step, n_threads, q, BITS, WIDTH, GROUP, STEPS)
    return codes, factors, offsets


@triton.jit
def _numbers_of_two(packed, HALF: tl.constexpr):
    """Two float16 in an int32, or two bytes in an int16."""
    if HALF:
        first = packed.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return first, (packed >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        wide = packed.to(tl.int32)
        return (wide & 0xFF).to(tl.float32), ((wide >> 8) & 0xFF).to(tl.float32)


@triton.jit
def _integer_sums(
    loaded, slices, units, sums, first, step, n, g, q, BITS: tl.constexpr, WIDTH: tl.constexpr, ZERO: tl.constexpr,
    HALF: tl.constexpr, STEPS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The lane's share of scale * (code - zero) * x of its two rows.

    The tensor core multiplies masked words of 16 rows by 8 columns: 2i are the high slices of slot i of four, 2i + 1
    the low ones, the other columns are zeros meanwhile. So lane q has the sums of slot q, whose group it scales.
    """
    codes, factors, offsets = loaded
    SLOTS: tl.constexpr = _slots(BITS, WIDTH, STEPS)
    HALVES: tl.constexpr = _halves(WIDTH)
    EACH: tl.constexpr = HALVES * pairs_of(BITS)
    n_chunks = (n + CHUNK - 1) // CHUNK
    nothing = tl.zeros_like(q)
    columns = ()
    for slot in tl.static_range(SLOTS):
        thread = (first + slot // EACH * step) * CHUNK + q
        place = (slot // HALVES % pairs_of(BITS) * 2 + g % 2) * n + thread
        taken = (thread < n) & (g // 2 == slot % 4) & (q * HALVES // 4 == slot % HALVES)
        source = slices + (place * 4)[:, None] + tl.arange(0, 4)[None, :]
        columns = columns + (tl.load(source, mask=taken[:, None], other=0),)
    results = (nothing.to(tl.float32), nothing.to(tl.float32))
    for index in tl.static_range(0, SLOTS, 4):
        chunk, pair, half = _slot_of(first, step, index + q, BITS, WIDTH)
        valid = (chunk < n_chunks) & (index + q < SLOTS)
        unit = tl.load(units + chunk, mask=valid, other=0.0)
        place = sums + pair * (2 * n_chunks) + chunk * 2 + half
        whole = tl.load(place, mask=valid, other=0.0)
        if HALVES == 1:
            whole += tl.load(place + 1, mask=valid, other=0.0)
        products = (nothing, nothing, nothing, nothing)
        for slot in tl.static_range(index, SLOTS if index + 4 > SLOTS else index + 4):
            products = byte_sums(
                codes[slot // EACH * 2], codes[slot // EACH * 2 + 1], four(columns[slot]), products,
                field_mask(BITS, slot // HALVES % pairs_of(BITS)), ASM,
            )  # fmt: skip
        field = two_to(-BITS * pair)  # codes are multiplied where they are in their bytes
        scale = _numbers_of_two(factors[index // 4], True)
        zero = (ZERO, ZERO)
        if ZERO is None:
            zero = _numbers_of_two(offsets[index // 4], HALF)
        following = ()
        for row in tl.static_range(2):
            product = (products[2 * row] * 256 + products[2 * row + 1]).to(tl.float32) * field
            following = following + (results[row] + (product - whole * zero[row]) * (scale[row] * unit),)
        results = following
    return results


@triton.jit(
    do_not_specialize=[
        "second", "third", "n_ready", "n_numbers", "n_rows", "stride2", "n_words8", "n_blocks", "n_threads", "stride16",
    ]
)  # fmt: skip
def sign_rows_kernel(
    ready, numbers, signs, sign_scales, sign_means, words, scales, zeros, bias, y, second, third, n_ready, n_numbers,
    n_rows, stride2, n_words8, n_blocks, n_threads, stride16, HAS_MEANS: tl.constexpr, BLOCKS: tl.constexpr,
    ONCE: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    HALF: tl.constexpr, STEPS: tl.constexpr, HAS_BIAS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """y [n_rows] = (sign_scales * signs + sign_means) x + (integers) x + bias. Grid (n_rows / (16 * TILES),).

    The warps of a program share the columns of the signs, block by block. TILES neighbouring warps each have 16 rows
    of the integers; there are WARPS / TILES such sets of warps, which share the columns, four threads' at a time.

    Args:
        ready, numbers: of `ready_kernel`, per copy n_ready and n_numbers.
        signs: planar-16 words of one bit, n_words8 * 8 of 32 bits in a row, ``n_blocks`` blocks; a scale (and a mean)
            of any float dtype for each row. BLOCKS: a power of two, not less. ONCE: there is one block for each warp.
        words, scales, zeros: planar-16 integers; scales are read as int32, two at a time; zeros as int16, or, if they
            are float16 (HALF), as int32.
        second, third: first rows that take the second and the third copy.
        stride2: half of the rows of ``scales``.
        n_threads, stride16: threads of a row of integers (four words each), and its words / 16.
        STEPS: how often the sets of warps take four threads each. BITS 0: there are no integers.
    """
    if PDL:
        gdc_launch_dependents()
    THREADS: tl.constexpr = 32 * WARPS
    ROWS: tl.constexpr = 16 * TILES
    N: tl.constexpr = 2 * TILES
    thread = tl.arange(0, THREADS)
    g = thread % 32 // 4
    q = thread % 4
    first_row = tl.program_id(0) * ROWS
    copy = (first_row >= second).to(tl.int32) + (first_row >= third).to(tl.int32)
    n_words = n_words8 * 8
    ready += copy * (n_ready // 4) * 4
    numbers += copy * n_numbers
    block = thread // 32
    row = first_row + g * N
    loaded = _load_signs(signs, row, n_words, block, q, N)
    if BITS > 0:
        own = block % TILES
        chunk = block // TILES
        integers = _load_integers(
            words, scales, zeros, row + own * 2, stride16, stride2, chunk, WARPS // TILES, n_threads, q, BITS, WIDTH,
            GROUP, ZERO, STEPS,
        )  # fmt: skip
    factors = ()
    for index in tl.static_range(N):
        factor = tl.load(sign_scales + row + index, mask=row + index < n_rows, other=0.0)
        factors = factors + (factor.to(tl.float32),)
    rows = first_row + tl.arange(0, ROWS)
    # of signs: twice what their bits give, without all
    each = -tl.load(sign_scales + rows, mask=rows < n_rows, other=0.0).to(tl.float32)
    if HAS_MEANS:
        each += tl.load(sign_means + rows, mask=rows < n_rows, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if HAS_BIAS:
        total = tl.load(bias + rows, mask=rows < n_rows, other=0.0).to(tl.float32)
    if PDL:  # weights are on their way; what is made ready may not be there yet
        gdc_wait()
    sums = (0, 0)
    if BITS > 0:
        units = numbers + 2 * n_blocks
        sums = _integer_sums(
            integers, ready + n_words * PLANES, units, units + (n_threads + CHUNK - 1) // CHUNK, chunk, WARPS // TILES,
            n_threads, g, q, BITS, WIDTH, ZERO, HALF, STEPS, ASM,
        )  # fmt: skip
    counted = _sign_shares(signs, ready, numbers, loaded, row, n_words, n_blocks, block, q, g, ONCE, TILES, WARPS, ASM)
    shares = ()
    for index in tl.static_range(N):
        share = 2 * counted[index] * factors[index]
        if BITS > 0:
            share += tl.where(own == index // 2, sums[index % 2], 0.0)
        shares = shares + (share,)
    places = tl.arange(0, BLOCKS)
    whole = tl.sum(tl.load(numbers + n_blocks + places, mask=places < n_blocks, other=0.0), 0)
    lanes = tl.reshape(stacked(shares, N), (WARPS, 8, 4, N))
    total += tl.reshape(tl.sum(tl.sum(lanes, 2), 0), (ROWS,)) + whole * each
    tl.store(y + rows, total.to(y.dtype.element_ty), mask=rows < n_rows)
