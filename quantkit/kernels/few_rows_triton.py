"""Triton kernel for few rows of x on planar-16 words (planar.py): byte products on the tensor core, one launch.

x is cut into two slices of eight bits (byte_products_triton.py), scaled by the largest of the neighbours that are
summed together:

    x  ~  scale * (256 * high + low),     |256 * high + low| <= 32512

`mma.m16n8k32` multiplies 16 by 32 signed bytes with 32 by 8 unsigned ones and sums in 32 bits, exactly. The 16 rows of
the first are the two slices of eight rows of x, the 8 columns of the second are rows of the weight: the four words that
a thread loads at once are, after one AND each, its share of the operands of two such products, and both slices of a sum
end in the same thread. Which column stands where in an operand is free as long as x and weight agree, so nothing is
moved between threads.

The warps of a program lie along the columns. Each prepares its part of x once and keeps it in registers; then it walks
over tiles of rows, without waiting for the others, and leaves its sums in memory (in the L2 cache). When all are done
they are added in a fixed order, where several programs share a row by the last to arrive: the result does not depend on
scheduling. Adding them tile by tile, which Triton does through shared memory, took twice the time of all else.

`ASM=False` replaces the inline PTX by Triton operations with the same result, for the interpreter.
"""

# ruff: noqa: RUF005 - tuples are built by addition: Triton does not unpack
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.kernels.byte_products_triton import (
    TINY,
    byte_slices,
    field_mask,
    field_unit,
    half_to_float,
    larger_half,
    pair_factor,
    pairs_of,
    signed_byte,
    stacked,
)


@triton.constexpr_function
def _products_asm(mask, n_words):
    """PTX: the products of n_words words with both slices. Operands: 2 results, the words, high and low slices."""
    words, high, low = 2, 2 + n_words, 2 + 2 * n_words
    lines = ["mov.b32 z,0;"]
    for word in range(n_words):
        source = words + word
        lines.append(f"mov.b32 t{word},${source};" if mask == -1 else f"and.b32 t{word},${source},0x{mask:08x};")
    for word in range(0, n_words, 2):
        a = f"{{${high + word},${low + word},${high + word + 1},${low + word + 1}}}"
        c = "{z,z,z,z}" if word == 0 else "{c0,c1,c2,c3}"
        shape = "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32"
        lines.append(f"{shape} {{c0,c1,c2,c3}},{a},{{t{word},t{word + 1}}},{c};")
    declared = ",".join(f"t{word}" for word in range(n_words))
    text = f"{{.reg .b32 z,c0,c1,c2,c3,{declared}; " + " ".join(lines)
    return text + " mad.lo.s32 $0,c0,256,c2; mad.lo.s32 $1,c1,256,c3;}"


@triton.constexpr_function
def _products_constraints(n_words):
    return "=r,=r" + ",r" * (3 * n_words)


@triton.jit
def _products(words, highs, lows, MASK: tl.constexpr, WARPS: tl.constexpr, ASM: tl.constexpr):
    """int32 [8 * WARPS, 4] each, of weight rows 2q and 2q + 1: sums over the words of all four q of bytes times x.

    ``words``, ``highs``, ``lows``: tuples of [8 * WARPS, 4]; first index: of a warp, weight row or row of x; second: q.
    """
    if ASM:
        TEXT: tl.constexpr = _products_asm(MASK, len(words))
        CONSTRAINTS: tl.constexpr = _products_constraints(len(words))
        return tl.inline_asm_elementwise(
            TEXT, CONSTRAINTS, words + highs + lows, dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        total = tl.zeros((WARPS, 8, 8, 4), tl.int32)
        for index in tl.static_range(len(words)):
            code = tl.reshape(words[index], (WARPS, 1, 8, 4))
            high = tl.reshape(highs[index], (WARPS, 8, 1, 4))
            low = tl.reshape(lows[index], (WARPS, 8, 1, 4))
            for byte in tl.static_range(4):
                value = 256 * signed_byte(high, byte) + signed_byte(low, byte)
                total += ((code >> (8 * byte)) & (MASK & 0xFF)) * value
        return tl.split(tl.reshape(tl.sum(total, 3), (8 * WARPS, 4, 2)))


@triton.jit
def _four(words):
    """[n, 16] to four of [n, 4]: each thread's first, second, third and fourth word."""
    evens, odds = tl.split(tl.reshape(words, (words.shape[0], 4, 2, 2)))
    first, third = tl.split(evens)
    second, fourth = tl.split(odds)
    return first, second, third, fourth


@triton.jit
def _sliced_x(
    x, token, valid, place, n_tokens, n_columns, n_planes, BITS: tl.constexpr, WIDTH: tl.constexpr, ZERO: tl.constexpr,
    RAGGED: tl.constexpr, BF16: tl.constexpr, LOADS: tl.constexpr, WARPS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """For each pair of planes: high and low slices of rows ``token`` of x, their unit, and their sum times it.

    ``x`` is read as int32, two values at a time; ``place``: of the first word of a warp, in a row of the weight.
    """
    PAIRS: tl.constexpr = pairs_of(BITS)
    HALF: tl.constexpr = WIDTH // 2
    plane = place // HALF * (2 * PAIRS)
    start = x + token.to(tl.int64) * (n_columns // 2) + plane * HALF + tl.multiple_of(place % HALF, 16)
    valid = valid & (token < n_tokens)
    prepared = ()
    for pair in tl.static_range(PAIRS):
        inside = valid
        if RAGGED:
            inside = valid & (plane + 2 * pair < n_planes)
        evens = ()
        odds = ()
        for load in tl.static_range(LOADS):
            words = start[:, None] + (2 * pair * HALF + 16 * load + tl.arange(0, 16))[None, :]
            evens = evens + (tl.load(words, mask=inside[:, None], other=0),)
            odds = odds + (tl.load(words + HALF, mask=inside[:, None], other=0),)
        largest = tl.zeros(evens[0].shape, tl.int32)
        for load in tl.static_range(LOADS):
            largest = larger_half(larger_half(largest, evens[load], ASM), odds[load], ASM)
        top = half_to_float(tl.max(tl.maximum(largest & 0xFFFF, largest >> 16), 1), BF16)[:, None]
        top = tl.where(top < TINY, TINY, top)  # NaN stays
        highs = ()
        lows = ()
        ones = ()
        for load in tl.static_range(LOADS):
            high, low = byte_slices(evens[load], odds[load], 32512.0 / top, BF16, ASM)
            highs = highs + _four(high)
            lows = lows + _four(low)
        one = tl.full((8 * WARPS, 4), 0x01010101, tl.int32)
        for _ in tl.static_range(4 * LOADS):
            ones = ones + (one,)
        total, _ = _products(ones, highs, lows, -1, WARPS, ASM)
        unit = top * (1.0 / 32512.0)
        offset = total.to(tl.float32) * unit
        if ZERO is not None:
            offset *= ZERO
        prepared = prepared + ((highs, lows, unit * field_unit(BITS, pair), offset),)
    return prepared


@triton.jit
def _load_tile(
    words, scales, zeros, first_row, valid, place, stride, stride2, BITS: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, LOADS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Of TILES times 8 rows: words, and scales and zeros for each pair of planes, two rows to a number."""
    PAIRS: tl.constexpr = pairs_of(BITS)
    row = (tl.arange(0, valid.shape[0]) % 8).to(tl.int64)
    quad = tl.arange(0, 4)
    loaded = ()
    for tile in tl.static_range(TILES):
        start = words + (first_row + 8 * tile + row) * stride + tl.multiple_of(place, 16)
        held = ()
        for load in tl.static_range(LOADS):
            source = start[:, None] + (16 * load + tl.arange(0, 16))[None, :]
            held = held + (tl.load(source, mask=valid[:, None], other=0, eviction_policy="evict_first"),)
        factors = ()
        offsets = ()
        for pair in tl.static_range(PAIRS):
            group = (place // (WIDTH // 2) * (2 * PAIRS) + 2 * pair) * WIDTH // GROUP
            where = (group * stride2 + first_row // 2 + 4 * tile)[:, None] + quad[None, :]
            factors = factors + (tl.load(scales + where, mask=valid[:, None], other=0),)
            if ZERO is None:
                offsets = offsets + (tl.load(zeros + where, mask=valid[:, None], other=0),)
        loaded = loaded + ((held, factors, offsets),)
    return loaded


@triton.jit
def _tile_sums(
    loaded, prepared, BITS: tl.constexpr, ZERO: tl.constexpr, LOADS: tl.constexpr, WARPS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Per tile, rows of x, and even and odd row of the weight: float32 [8 * WARPS, 4]."""
    totals = ()
    for tile in tl.static_range(len(loaded)):
        held, factors, offsets = loaded[tile]
        words = ()
        for load in tl.static_range(LOADS):
            words = words + _four(held[load])
        for part in tl.static_range(len(prepared)):
            even = tl.zeros((8 * WARPS, 4), tl.float32)
            odd = even
            for pair in tl.static_range(pairs_of(BITS)):
                highs, lows, unit, offset = prepared[part][pair]
                first, second = _products(words, highs, lows, field_mask(BITS, pair), WARPS, ASM)
                even_offset = offset
                odd_offset = offset
                if ZERO is None:
                    even_offset = offset * pair_factor(offsets[pair], 0)
                    odd_offset = offset * pair_factor(offsets[pair], 1)
                even += (first.to(tl.float32) * unit - even_offset) * pair_factor(factors[pair], 0)
                odd += (second.to(tl.float32) * unit - odd_offset) * pair_factor(factors[pair], 1)
            totals = totals + (even, odd)
    return totals


@triton.jit
def few_rows_kernel(
    x, words, scales, zeros, bias, y, partial, counters, n_tokens, n_rows, n_columns, bias_stride, stride2, stride16,
    n_units, n_planes, n_tiles, BITS: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr, ZERO: tl.constexpr,
    GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, BF16: tl.constexpr, TOKEN_TILES: tl.constexpr, LOADS: tl.constexpr,
    TILES: tl.constexpr, SPLITS: tl.constexpr, STEPS: tl.constexpr, WARPS: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """y [n_tokens, n_rows] = x [n_tokens, n_columns] @ weight^T + bias. Grid (programs, SPLITS).

    Args:
        x: read as int32, two values at a time; words: likewise.
        scales: two rows read as one int32; zeros: the same, or uint8 read as int16. ``stride2``: of a group.
        partial: float32 [programs, SPLITS, STEPS, WARPS, numbers of a tile], any content.
        counters: zeros before and after.
        bias_stride: 0, or n_rows where each row of x has its own.
        stride16: words of a row / 16.
        n_units: of a row, of LOADS times 16 int32 words each, as a warp takes one.
        n_planes: that hold columns. ZERO: of every group, or None.
        n_tiles: of TILES times 8 rows. Tile i + programs follows tile i.
        STEPS: at least the number of tiles of a program, a power of two.
    """
    if PDL:
        gdc_launch_dependents()
    tile = tl.program_id(0)
    lane = tl.arange(0, 8 * WARPS)
    shared = (n_units + SPLITS - 1) // SPLITS
    mine_units = tl.minimum(shared, n_units - tl.program_id(1) * shared)
    place = (tl.program_id(1) * shared + lane // 8) * (16 * LOADS)
    stride = stride16.to(tl.int64) * 8
    loaded = _load_tile(
        words, scales, zeros, tile * (8 * TILES), lane // 8 < mine_units, place, stride, stride2, BITS, WIDTH, GROUP,
        ZERO, LOADS, TILES,
    )  # fmt: skip
    if PDL:  # weights are on their way; x may not be there yet
        gdc_wait()
    prepared = ()
    for part in tl.static_range(TOKEN_TILES):
        prepared = prepared + (
            _sliced_x(
                x, 8 * part + lane % 8, lane // 8 < mine_units, place, n_tokens, n_columns, n_planes, BITS, WIDTH, ZERO,
                RAGGED, BF16, LOADS, WARPS, ASM,
            ),
        )  # fmt: skip
    SLOTS: tl.constexpr = 2 * TILES * TOKEN_TILES
    OUT: tl.constexpr = 32 * SLOTS  # numbers of a tile
    shares = partial + tl.program_id(0).to(tl.int64) * (SPLITS * STEPS * WARPS * OUT)
    HELD: tl.constexpr = min(SLOTS, 4)  # numbers of a tile that a thread stores at once
    offsets = lane[:, None] * (4 * HELD) + tl.arange(0, 4 * HELD)[None, :]
    mine = shares + tl.program_id(1) * (STEPS * WARPS * OUT)
    while tile < n_tiles:
        now = loaded
        tile += tl.num_programs(0)
        loaded = _load_tile(
            words, scales, zeros, tile * (8 * TILES), lane // 8 < tl.where(tile < n_tiles, mine_units, 0), place,
            stride, stride2, BITS, WIDTH, GROUP, ZERO, LOADS, TILES,
        )  # fmt: skip
        totals = _tile_sums(now, prepared, BITS, ZERO, LOADS, WARPS, ASM)
        for part in tl.static_range(SLOTS // HELD):
            some = ()
            for slot in tl.static_range(HELD):
                some = some + (totals[part * HELD + slot],)
            tl.store(mine + offsets, tl.reshape(stacked(some, HELD), (8 * WARPS, 4 * HELD)))
            mine += WARPS * 32 * HELD
    tl.debug_barrier()
    last = True
    if SPLITS > 1:
        counter = counters + tl.program_id(0)
        last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if last:
            tl.store(counter, 0)
    if last:
        index = tl.arange(0, STEPS * OUT)
        its_tile = tl.program_id(0) + index // OUT * tl.num_programs(0)
        slot = index % OUT // (32 * HELD) * HELD + index % HELD
        token = index // (4 * HELD) % 8 + slot // 2 % TOKEN_TILES * 8
        row = (its_tile * TILES + slot // (2 * TOKEN_TILES)) * 8 + index // HELD % 4 * 2 + slot % 2
        inside = (row < n_rows) & (token < n_tokens) & (its_tile < n_tiles)
        total = tl.zeros(index.shape, tl.float32)
        for share in tl.static_range(SPLITS):  # unrolled: one memory latency, not one for each warp
            for warp in tl.static_range(WARPS):
                theirs = shares + (share * STEPS * OUT + index // (32 * HELD) * (32 * HELD)) * WARPS
                theirs += warp * (32 * HELD) + index % (32 * HELD)
                total += tl.load(theirs, mask=inside, other=0.0, cache_modifier=".cg")
        if HAS_BIAS:
            total += tl.load(bias + token * bias_stride + row, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + token.to(tl.int64) * n_rows + row, total.to(y.dtype.element_ty), mask=inside)
