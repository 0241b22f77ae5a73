"""x for bit products (bit_products_triton.py): integers, their bits where the words of planar-16 have those columns.

A warp takes 1024 columns, 32 words of each row, of which lane 4g + q has eight. Bits p, p + 8, p + 16 and p + 24 of a
word of planes of W columns are four of the 2 W columns of planes 2p and 2p + 1. Lane 4g + q prepares x at the bits
p = g of its words.

If a row has one scale for all columns of a block (W = 64), the lanes exchange what they prepared, and each has two
planes of bits of whole words: the tensor core counts for the whole block at once. Otherwise 128 columns, at C = 64 / W
neighbouring bit positions, belong to a group that may be like no other. The C lanes that share q and these positions
exchange what they prepared: lane 4g + q then has bits C i + g % C of the integers, i = 0, 1, .., at all C positions. It
passes planes with bits there and nowhere else, two of them (i = 2 s and 2 s + 1) in step s. So its counts are of its
group alone, and it has the group's scale. 8 / C steps take sixteen bits, 6 / C twelve.

Twelve bits are what bfloat16 values are taken in where a group has a scale of its own: half a unit is 2**-12 of the
largest of 128 columns, which has been rounded to 2**-9 of itself.
"""

# ruff: noqa: RUF005 - tuples are built by addition: Triton does not unpack
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.bit_products_triton import integer_bytes, of_lane_across, transposed_bits
from quantkit.kernels.bit_sums_triton import group_planes
from quantkit.kernels.byte_products_triton import TINY, four, half_to_float, larger_half


@triton.jit
def _of_lanes(value, LARGEST: tl.constexpr, LANES: tl.constexpr, ASM: tl.constexpr):
    """Largest (or sum) of the values of LANES neighbouring lanes."""
    for exponent in tl.static_range(5):
        if 2**exponent < LANES:
            other = of_lane_across(value, 2**exponent, ASM)
            value = tl.maximum(value, other) if LARGEST else value + other
    return value


@triton.jit
def _load_x(x, token, n_columns, block, g, q, WIDTH: tl.constexpr):
    """x at the bits g of the lane's words: columns of even planes for all words, then of odd ones; int32 pairs."""
    start = token * (n_columns // 2)
    loaded = ()
    for part in tl.static_range(64 // WIDTH):
        for byte in tl.static_range(2):
            for piece in tl.static_range(WIDTH // 32):
                plane = block * 1024 + part * (16 * WIDTH) + g * (2 * WIDTH) + byte * WIDTH
                column = plane + piece * 32 + q * 8
                source = x + tl.multiple_of(start + column // 2, 4)[:, None] + tl.arange(0, 4)[None, :]
                loaded = loaded + (tl.load(source, mask=(column < n_columns)[:, None], other=0),)
    return loaded


@triton.jit
def prepared_x(
    x, token, n_columns, block, thread, g, q, WIDTH: tl.constexpr, ONE_SCALE: tl.constexpr, BF16: tl.constexpr,
    X_BITS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """For each block of planes, of the lane's words: what planes of bits are taken from, of low and of high bytes of
    the integers of x; what a zero of 1 in each row takes off, and the unit of the integers.

    With one scale these are planes g and g + 8 of bits. ``x`` is read as int32, two values at a time.
    """
    PARTS: tl.constexpr = 64 // WIDTH
    LANES: tl.constexpr = 32 if ONE_SCALE else 4 * PARTS  # that share a unit
    EXCHANGED: tl.constexpr = 8 if ONE_SCALE else PARTS
    SHARES: tl.constexpr = 4 if ONE_SCALE else PARTS  # lanes that share a row and take a part of its zero off
    MOST: tl.constexpr = 32512.0 if X_BITS == 16 else 2047.0
    PIECES: tl.constexpr = WIDTH // 16
    loaded = _load_x(x, token, n_columns, block, g, q, WIDTH)
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
        low, high, total = integer_bytes(pairs, MOST / top, WIDTH // 8, BF16, ASM)
        offset = _of_lanes(total, False, LANES, ASM).to(tl.float32) * (1.0 / SHARES)
        low = transposed_bits(low, thread, WIDTH // 8, EXCHANGED, ASM)
        high = transposed_bits(high, thread, WIDTH // 8, EXCHANGED, ASM)
        planes = (low, high) if ONE_SCALE else group_planes(low, high, g, WIDTH, X_BITS, ASM)
        prepared = prepared + ((planes, offset, top * (1.0 / MOST)),)
    return prepared
