"""What bit products sum up for bit_gemv_triton.py: the integers of x where codes are 1, rows by rows.

A tensor core counts for a plane of bits; its counts are weighted by the powers of two that the bits stand for. They are
taken as the float32 numbers that their own bits are: subnormals, n * 2**-149. A multiplication by a power of two makes
them ordinary, and is one with the addition. Words are a lane's eight of each tile of eight rows (bit_gemv_triton.py).
"""

# ruff: noqa: RUF005 - tuples are built by addition: Triton does not unpack
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.bit_products_triton import count_common, plane_bits, two_to

UNIT = tl.constexpr(2.0**37)  # sums are in 2**-37: 2**-149 times the 2**112 of the weights of bits


@triton.jit
def _weights(bit):
    """2**bit and 2**(bit + 8), times 2**112; that of bit 15 is negative."""
    return two_to(bit + 112), tl.where(bit == 7, -1.0, 1.0) * two_to(bit + 120)


@triton.jit
def block_sums(words, low, high, q, ROWS: tl.constexpr, ASM: tl.constexpr):
    """Of each row that the lane loads: the integers of x where codes are 1, as far as four planes of bits hold them."""
    low_weight, high_weight = _weights(2 * q)
    next_low_weight, next_high_weight = _weights(2 * q + 1)
    nothing = tl.zeros_like(q)
    sums = ()
    for tile in tl.static_range(ROWS // 16):
        lows = (nothing, nothing, nothing, nothing)
        highs = (nothing, nothing, nothing, nothing)
        for pair in tl.static_range(4):
            lows = count_common(
                words[16 * tile + 2 * pair], words[16 * tile + 8 + 2 * pair], words[16 * tile + 2 * pair + 1],
                words[16 * tile + 8 + 2 * pair + 1], low[2 * pair], low[2 * pair + 1], lows, ASM,
            )  # fmt: skip
            highs = count_common(
                words[16 * tile + 2 * pair], words[16 * tile + 8 + 2 * pair], words[16 * tile + 2 * pair + 1],
                words[16 * tile + 8 + 2 * pair + 1], high[2 * pair], high[2 * pair + 1], highs, ASM,
            )  # fmt: skip
        for row in tl.static_range(2):
            total = lows[2 * row].to(tl.float32, bitcast=True) * low_weight
            total = tl.math.fma(lows[2 * row + 1].to(tl.float32, bitcast=True), next_low_weight, total)
            total = tl.math.fma(highs[2 * row].to(tl.float32, bitcast=True), high_weight, total)
            sums = sums + (tl.math.fma(highs[2 * row + 1].to(tl.float32, bitcast=True), next_high_weight, total),)
    return sums


@triton.constexpr_function
def _group_bits(width):
    """The bits of a word that belong to its first group: 64 / width of each byte."""
    return ((1 << 64 // width) - 1) * 0x01010101


@triton.jit
def group_planes(low, high, g, WIDTH: tl.constexpr, X_BITS: tl.constexpr, ASM: tl.constexpr):
    """The planes that the lane passes in each step, two in turns, each of WIDTH / 8 words: in step s bits 2 C s + g % C
    and C more of the integers, where the bits of the lane's group are in a word."""
    SHARED: tl.constexpr = 64 // WIDTH
    home = g // SHARED * SHARED
    mask = (tl.zeros_like(g) + _group_bits(WIDTH)) << home
    planes = ()
    for step in tl.static_range(X_BITS // 2 // SHARED):
        for index in tl.static_range(WIDTH // 8):
            source = low[index] if 2 * SHARED * step < 8 else high[index]
            for number in tl.static_range(2):
                turn = (home - (2 * step + number) * SHARED % 8) & 31
                planes = planes + (plane_bits(source, turn, mask, ASM),)
    return planes


@triton.jit
def group_unit(g, WIDTH: tl.constexpr):
    """What `group_sums` are in, over `UNIT`: the power of two of the lane's bit among those of a step."""
    return two_to(g % (64 // WIDTH))


@triton.jit
def group_sums(
    words, planes, g, PART: tl.constexpr, WIDTH: tl.constexpr, X_BITS: tl.constexpr, ROWS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Of rows 2q and 2q + 1 of each tile: the integers of x where codes of the lane's group are 1, as far as the bits
    that the lane passes hold them; of one block of planes, in `group_unit` over `UNIT`."""
    SHARED: tl.constexpr = 64 // WIDTH
    N: tl.constexpr = WIDTH // 8
    STEPS: tl.constexpr = X_BITS // 2 // SHARED
    # the last bit of the last step is the sign
    last_weight = tl.where(g % SHARED == SHARED - 1, -1.0, 1.0) * 2.0 ** (112 + X_BITS - SHARED)
    nothing = tl.zeros_like(g)
    sums = ()
    for tile in tl.static_range(ROWS // 8):
        totals = (nothing.to(tl.float32), nothing.to(tl.float32))
        for step in tl.static_range(STEPS):
            counts = (nothing, nothing, nothing, nothing)
            for pair in tl.static_range(N // 2):
                counts = count_common(
                    planes[2 * N * step + 4 * pair], planes[2 * N * step + 4 * pair + 1],
                    planes[2 * N * step + 4 * pair + 2], planes[2 * N * step + 4 * pair + 3],
                    words[8 * tile + PART * N + 2 * pair], words[8 * tile + PART * N + 2 * pair + 1], counts, ASM,
                )  # fmt: skip
            following = ()
            for row in tl.static_range(2):
                lower = counts[row].to(tl.float32, bitcast=True)
                total = tl.math.fma(lower, 2.0 ** (112 + 2 * SHARED * step), totals[row])
                upper = counts[2 + row].to(tl.float32, bitcast=True)
                if step == STEPS - 1:
                    following = following + (tl.math.fma(upper, last_weight, total),)
                else:
                    following = following + (tl.math.fma(upper, 2.0 ** (112 + 2 * SHARED * step + SHARED), total),)
            totals = following
        sums = sums + totals
    return sums
