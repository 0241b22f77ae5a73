"""Triton kernel for one row of x on planar-16 words (planar.py): byte products on the tensor core.

x is cut into two slices of eight bits, as in byte_products_triton.py, scaled by the largest of 128 neighbours. A warp
takes 512 columns of 16 rows of the weight. `mma.m16n8k32` has rows of the weight on one side, masked words as they were
loaded, and eight columns on the other: the two slices for each of four groups of 128 columns of x. What a product sums
over lies in one group at a time, so of its results two columns are wanted, those of the group's slices; for group q
they end in lanes 4g + q. After the four groups every lane therefore has one group's sums of two rows, and scales, zeros
and slices are put together once for 16 rows times 512 columns.

Lane 4g + q loads rows 2g and 2g + 1, a quarter of the words each. The words of the next tile are asked for before those
of this one are summed over warps; several programs at a time hide what they wait for.
"""

# ruff: noqa: RUF005 - tuples are built by addition: Triton does not unpack
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.kernels.bit_products_triton import of_lane_across, two_to
from quantkit.kernels.byte_columns_triton import byte_product
from quantkit.kernels.byte_products_triton import (
    TINY,
    byte_dot,
    byte_slices,
    four,
    half_to_float,
    larger_half,
    pair_factor,
    stacked,
)

COLUMNS = tl.constexpr(512)  # of a warp at a time: four groups of 128


@triton.constexpr_function
def _blocks(bits):
    """Blocks of planes in 512 columns, of 32 words."""
    return bits // 2


@triton.constexpr_function
def _mask(bits, group):
    """The fields of a group in each of four bytes."""
    if bits == 8:
        return -1
    return (((1 << bits) - 1) << group % (8 // bits) * bits) * 0x01010101


@triton.constexpr_function
def _from_asm():
    return "shfl.sync.idx.b32 $0,$1,$2,31,0xffffffff;"


@triton.jit
def _of_group(value, q, ASM: tl.constexpr):
    """What lanes 8i .. 8i + 7 hold for group i, in the lanes 4g + i."""
    if ASM:
        TEXT: tl.constexpr = _from_asm()
        return tl.inline_asm_elementwise(
            TEXT, "=r,r,r", [value.to(tl.int32, bitcast=True), 8 * q], dtype=tl.int32, is_pure=True, pack=1
        ).to(tl.float32, bitcast=True)
    else:
        WARPS: tl.constexpr = value.shape[0] // 32
        first = (tl.arange(0, 8) == 0)[None, None, :]
        groups = tl.sum(tl.where(first, tl.reshape(value, (WARPS, 4, 8)), 0.0), 2)
        return tl.reshape(tl.broadcast_to(groups[:, None, :], (WARPS, 8, 4)), (32 * WARPS,))


@triton.jit
def _sliced_x(
    x, n_columns, quad, g, q, BITS: tl.constexpr, ZERO: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """Group g // 2's slice g % 2 at the columns of the lane's eight words; of group q: unit, and what a zero takes off.

    ``x`` is read as int32, two values at a time.
    """
    group = quad * 4 + g // 2
    inside = (group * 128 < n_columns)[:, None]
    start = group * 64 + q * 8
    largest = tl.zeros((quad.shape[0], 4), tl.int32)
    evens = ()
    odds = ()
    for part in tl.static_range(2):
        place = x + tl.multiple_of(start + part * 4, 4)[:, None] + tl.arange(0, 4)[None, :]
        even = tl.load(place, mask=inside, other=0)
        odd = tl.load(place + 32, mask=inside, other=0)
        largest = larger_half(larger_half(largest, even, ASM), odd, ASM)
        evens = evens + (even,)
        odds = odds + (odd,)
    top = tl.max(tl.maximum(largest & 0xFFFF, largest >> 16), 1)
    for exponent in tl.static_range(2):
        top = tl.maximum(top, of_lane_across(top, 2**exponent, ASM))
    top = half_to_float(top, BF16)
    top = tl.where(top < TINY, TINY, top)  # NaN stays
    inverse = (32512.0 / top)[:, None]
    ones = tl.full(largest.shape, 0x01010101, tl.int32)
    slices = ()
    total = tl.zeros_like(quad)
    for part in tl.static_range(2):
        high, low = byte_slices(evens[part], odds[part], inverse, BF16, ASM)
        slices = slices + (four(tl.where((g % 2 == 0)[:, None], high, low)),)
        total += byte_dot(ones, high, low, -1, ASM)
    for exponent in tl.static_range(2):
        total += of_lane_across(total, 2**exponent, ASM)
    unit = _of_group(top * (1.0 / 32512.0), q, ASM)
    offset = _of_group(total.to(tl.float32), q, ASM) * unit
    position = q % (8 // BITS) * BITS
    if ZERO is not None:
        offset *= ZERO
    return slices, unit * two_to(-position), offset


@triton.jit
def _load_words(words, first_row, row_words, n_columns, quad, g, q, BITS: tl.constexpr):
    """Words of rows 2g and 2g + 1 of 16, block by block, row by row, [threads, 4] each."""
    BLOCKS: tl.constexpr = _blocks(BITS)
    start = words + (first_row + 2 * g).to(tl.int64) * row_words
    held = ()
    for block in tl.static_range(BLOCKS):
        inside = quad * COLUMNS + block * (COLUMNS // BLOCKS) < n_columns
        for row in tl.static_range(2):
            for piece in tl.static_range(2):
                place = (quad * BLOCKS + block) * 32 + q * 8 + 4 * piece
                source = (start + row * row_words + tl.multiple_of(place, 4))[:, None] + tl.arange(0, 4)[None, :]
                held = held + (tl.load(source, mask=inside[:, None], other=0, eviction_policy="evict_first"),)
    return held


@triton.jit
def _load_tile(
    words, scales, zeros, tile, n_tiles, row_words, stride2, n_columns, warp, g, q, BITS: tl.constexpr,
    ZERO: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """For each chunk and 16 rows: words, and group q's scales (and zeros) of both rows of the lane."""
    first_row = tile * ROWS
    n_columns = tl.where(tile < n_tiles, n_columns, 0)
    loaded = ()
    for chunk in tl.static_range(CHUNKS):
        quad = chunk * WARPS + warp
        column = quad * COLUMNS + q * 128
        for part in tl.static_range(ROWS // 16):
            held = _load_words(words, first_row + 16 * part, row_words, n_columns, quad, g, q, BITS)
            where = column // GROUP * stride2 + first_row // 2 + 8 * part + g
            factor = tl.load(scales + where, mask=column < n_columns, other=0)
            offset = factor
            if ZERO is None:
                offset = tl.load(zeros + where, mask=column < n_columns, other=0)
            loaded = loaded + ((held, factor, offset),)
    return loaded


@triton.jit
def _both_rows(held, block: tl.constexpr, piece: tl.constexpr):
    """Four words of each of the lane's rows in a block."""
    return held[4 * block + piece], held[4 * block + 2 + piece]


@triton.jit
def _part_sums(held, slices, q, BITS: tl.constexpr, ASM: tl.constexpr):
    """int32 of rows 2g and 2g + 1: codes times slices, over the columns of group q."""
    even = tl.zeros_like(q)
    odd = even
    for group in tl.static_range(4):
        sums = (tl.zeros_like(q), tl.zeros_like(q), tl.zeros_like(q), tl.zeros_like(q))
        for piece in tl.static_range(2):
            first, second = _both_rows(held, group * _blocks(BITS) // 4, piece)
            sums = byte_product(first, second, slices[piece], sums, _mask(BITS, group), ASM)
        even = tl.where(q == group, 256 * sums[0] + sums[1], even)
        odd = tl.where(q == group, 256 * sums[2] + sums[3], odd)
    return even, odd


@triton.jit
def _tile_sums(loaded, prepared, q, BITS: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr):
    """For each of the lane's rows: scale * (code - zero) * x over its groups; float32 [threads]."""
    PARTS: tl.constexpr = ROWS // 16
    sums = ()
    for part in tl.static_range(PARTS):
        first = tl.zeros_like(q).to(tl.float32)
        second = first
        for chunk in tl.static_range(len(prepared)):
            slices, unit, offset = prepared[chunk]
            held, factor, zero = loaded[chunk * PARTS + part]
            even, odd = _part_sums(held, slices, q, BITS, ASM)
            even_taken = offset
            odd_taken = offset
            if ZERO is None:
                even_taken = offset * pair_factor(zero, 0)
                odd_taken = offset * pair_factor(zero, 1)
            # spelled out, or the compiler chooses which of two products it rounds, differently from shape to shape
            even_sum = tl.math.fma(even.to(tl.float32), unit, -even_taken)
            odd_sum = tl.math.fma(odd.to(tl.float32), unit, -odd_taken)
            first = tl.math.fma(even_sum, pair_factor(factor, 0), first)
            second = tl.math.fma(odd_sum, pair_factor(factor, 1), second)
        sums = sums + (first, second)
    return sums


@triton.jit
def _store_rows(y, bias, sums, first_row, n_rows, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Sum over warps and the four lanes of a row."""
    N: tl.constexpr = ROWS // 8
    lanes = tl.permute(tl.reshape(stacked(sums, N), (WARPS, 8, 4, N)), (0, 2, 1, 3))
    total = tl.sum(tl.reshape(lanes, (WARPS * 4, 8, N)), 0)
    slot = tl.arange(0, N)[None, :]
    rows = first_row + slot // 2 * 16 + tl.arange(0, 8)[:, None] * 2 + slot % 2
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=rows < n_rows, other=0.0).to(tl.float32)
    tl.store(y + rows, total.to(y.dtype.element_ty), mask=rows < n_rows)


@triton.jit
def mma_gemv_kernel(
    x, words, scales, zeros, bias, y, n_rows, n_columns, row_words16, stride2, n_tiles, BITS: tl.constexpr,
    ZERO: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, BF16: tl.constexpr, ROWS: tl.constexpr,
    WARPS: tl.constexpr, CHUNKS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """y [tokens, n_rows] = x [tokens, n_columns] @ weight^T + bias. Grid (programs, tokens), WARPS warps each.

    Tile i + programs follows tile i.

    Args:
        x: read as int32, two values at a time; words: likewise.
        scales: two rows read as one int32; zeros: the same, or uint8 read as int16. ``stride2``: of a group.
        row_words16: 32-bit words of a row / 16.
        n_tiles: of ROWS rows, 16 or 32.
        ZERO: of every group, or None.
        GROUP: a multiple of 128. CHUNKS: times 512 columns for each warp.
    """
    if PDL:
        gdc_launch_dependents()
    thread = tl.arange(0, 32 * WARPS)
    warp = thread // 32
    g = thread % 32 // 4
    q = thread % 4
    row_words = row_words16 * 16
    x += tl.program_id(1).to(tl.int64) * (n_columns // 2)
    y += tl.program_id(1).to(tl.int64) * n_rows
    programs = tl.num_programs(0)
    tile = tl.program_id(0)
    loaded = _load_tile(
        words, scales, zeros, tile, n_tiles, row_words, stride2, n_columns, warp, g, q, BITS, ZERO, GROUP, ROWS, WARPS,
        CHUNKS,
    )  # fmt: skip
    if PDL:  # weights are on their way; x may not be there yet
        gdc_wait()
    prepared = ()
    for chunk in tl.static_range(CHUNKS):
        prepared = prepared + (_sliced_x(x, n_columns, chunk * WARPS + warp, g, q, BITS, ZERO, BF16, ASM),)
    for here in range(tile, n_tiles, programs):
        sums = _tile_sums(loaded, prepared, q, BITS, ZERO, ROWS, ASM)
        loaded = _load_tile(
            words, scales, zeros, here + programs, n_tiles, row_words, stride2, n_columns, warp, g, q, BITS, ZERO,
            GROUP, ROWS, WARPS, CHUNKS,
        )  # fmt: skip
        _store_rows(y, bias, sums, here * ROWS, n_rows, HAS_BIAS, ROWS, WARPS)
