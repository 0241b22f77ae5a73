"""Bit products: a tensor core counts the ones that packed bits and bit planes of x have in common.

x is taken as 16-bit integers relative to the largest of its neighbours. Bit b of those integers is a plane of
bits, and a row of one-bit codes times x is

    sum over b of 2**b * ones(codes & plane b),     the top bit negative (two's complement)

`mma.m16n8k256` with `.and.popc` counts for 16 planes and 8 rows of the weight at once. ``ASM=False`` replaces inline
PTX by Triton operations with the same result, for the interpreter. Tensors have one element for each thread, [threads],
unless said otherwise; a warp is 32 of them.
"""

# ruff: noqa: RUF005 - tuples are built by addition: Triton does not unpack
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.byte_products_triton import half_to_float

MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves a rounded number in the low 16 bits


@triton.constexpr_function
def _count_asm():
    shape = "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
    return shape + " {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"


@triton.constexpr_function
def _swap_asm(lanes):
    return f"shfl.sync.bfly.b32 $0,$1,{lanes},31,0xffffffff;"


@triton.constexpr_function
def _exchange_asm(lanes):
    text = f"shfl.sync.bfly.b32 t,$1,{lanes},31,0xffffffff; shf.l.wrap.b32 t,t,t,$2; "
    return "{.reg .b32 t; " + text + "lop3.b32 $0,$1,t,$3,0xe4;}"  # bitwise: of $3, $1 or t


@triton.constexpr_function
def _integers_asm(bf16):
    if bf16:
        text = "shl.b32 a,$1,16; and.b32 b,$1,0xffff0000; "
    else:
        text = "{.reg .b16 u,v; mov.b32 {u,v},$1; cvt.f32.f16 a,u; cvt.f32.f16 b,v;} "
    text += "fma.rn.f32 a,a,$2,0f4B400000; fma.rn.f32 b,b,$2,0f4B400000; prmt.b32 $0,a,b,0x5410;"
    return "{.reg .b32 a,b; " + text + "}"


@triton.jit
def _ones(word):
    """Number of ones in each int32."""
    word = word.to(tl.uint32, bitcast=True)
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _counts(planes, words):
    """What `mma` counts: lane 4g + q has plane g and row g of operands, planes g and rows 2q, 2q + 1 of the result."""
    WARPS: tl.constexpr = planes.shape[0] // 32
    both = tl.reshape(planes, (WARPS, 8, 1, 4)) & tl.reshape(words, (WARPS, 1, 8, 4))
    even, odd = tl.split(tl.reshape(tl.sum(_ones(both), 3), (WARPS, 8, 4, 2)))
    return tl.reshape(even, (WARPS * 32,)), tl.reshape(odd, (WARPS * 32,))


@triton.jit
def count_common(low, high, next_low, next_high, word, next_word, counts, ASM: tl.constexpr):
    """``counts`` plus the ones that 16 planes of bits have in common with 8 rows of words.

    Lane 4g + q passes two words of two planes (``low``, ``next_low`` of one, ``high``, ``next_high`` of another) and
    the two words of row g of the weight that lie over them; the four lanes with the same g together hold a row.

    Returns:
        Of the planes that the lane passed: low for rows 2q and 2q + 1, then high for both.
    """
    if ASM:
        TEXT: tl.constexpr = _count_asm()
        operands = [low, high, next_low, next_high, word, next_word, counts[0], counts[1], counts[2], counts[3]]
        layout: tl.constexpr = "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r"
        return tl.inline_asm_elementwise(
            TEXT, layout, operands, dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        even, odd = _counts(low, word)
        next_even, next_odd = _counts(next_low, next_word)
        high_even, high_odd = _counts(high, word)
        last_even, last_odd = _counts(next_high, next_word)
        return (
            counts[0] + even + next_even,
            counts[1] + odd + next_odd,
            counts[2] + high_even + last_even,
            counts[3] + high_odd + last_odd,
        )


@triton.jit
def of_lane_across(value, LANES: tl.constexpr, ASM: tl.constexpr):
    """int32: the value that lane ^ LANES has."""
    if ASM:
        TEXT: tl.constexpr = _swap_asm(LANES)
        return tl.inline_asm_elementwise(TEXT, "=r,r", [value], dtype=tl.int32, is_pure=True, pack=1)
    else:
        pairs = tl.reshape(value, (value.shape[0] // (2 * LANES), 2, LANES))
        first, second = tl.split(tl.permute(pairs, (0, 2, 1)))
        return tl.reshape(tl.permute(tl.join(second, first), (0, 2, 1)), (value.shape[0],))


@triton.jit
def _integers(pair, inverse, BF16: tl.constexpr, ASM: tl.constexpr):
    """Two neighbouring values of x, times ``inverse``, to two 16-bit integers."""
    if ASM:
        TEXT: tl.constexpr = _integers_asm(BF16)
        return tl.inline_asm_elementwise(TEXT, "=r,r,r", [pair, inverse], dtype=tl.int32, is_pure=True, pack=1)
    else:
        first = tl.math.fma(half_to_float(pair & 0xFFFF, BF16), inverse, MAGIC).to(tl.int32, bitcast=True)
        second = tl.math.fma(half_to_float((pair >> 16) & 0xFFFF, BF16), inverse, MAGIC).to(tl.int32, bitcast=True)
        return (first & 0xFFFF) | (second << 16)


@triton.jit
def _added(pair, total, ASM: tl.constexpr):
    """``total`` plus both 16-bit integers."""
    if ASM:
        TEXT: tl.constexpr = "dp2a.lo.s32.u32 $0,$1,0x0101,$2;"
        return tl.inline_asm_elementwise(TEXT, "=r,r,r", [pair, total], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return total + ((pair << 16) >> 16) + (pair >> 16)


@triton.jit
def _bytes(first, second, ODD: tl.constexpr, ASM: tl.constexpr):
    """The even (or odd) bytes of both words, in turns: 0 of the first, 0 of the second, 2 of the first, 2 of ..."""
    if ASM:
        TEXT: tl.constexpr = "prmt.b32 $0,$1,$2,0x7351;" if ODD else "prmt.b32 $0,$1,$2,0x6240;"
        return tl.inline_asm_elementwise(TEXT, "=r,r,r", [first, second], dtype=tl.int32, is_pure=True, pack=1)
    elif ODD:
        return ((first >> 8) & 0x00FF00FF) | (second & -16711936)  # 0xFF00FF00
    else:
        return (first & 0x00FF00FF) | ((second << 8) & -16711936)


@triton.jit
def integer_bytes(pairs, inverse, N: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    """x at the columns of one bit position of N words, as 16-bit integers cut into bytes.

    Args:
        pairs: 2 x N words of two neighbouring values: for the low bytes of the packed words, then for the high ones.
        inverse: what takes x to integers.

    Returns:
        N words of low bytes, N of high bytes, each byte where its column's byte is in the packed word; and the sum of
        the integers.
    """
    integers = ()
    total = tl.zeros_like(pairs[0])
    for index in tl.static_range(2 * N):
        integers = integers + (_integers(pairs[index], inverse, BF16, ASM),)
        total = _added(integers[index], total, ASM)
    low = ()
    high = ()
    for index in tl.static_range(N):
        low = low + (_bytes(integers[index], integers[N + index], False, ASM),)
        high = high + (_bytes(integers[index], integers[N + index], True, ASM),)
    return low, high, total


@triton.jit
def plane_bits(bytes4, turn, mask, ASM: tl.constexpr):
    """Bits of each of four bytes, brought to the lane's position: rotated left by ``turn`` (0 to 31), masked."""
    if ASM:
        TEXT: tl.constexpr = "{.reg .b32 t; shf.l.wrap.b32 t,$1,$1,$2; and.b32 $0,t,$3;}"
        operands = [bytes4, turn, mask]
        return tl.inline_asm_elementwise(TEXT, "=r,r,r,r", operands, dtype=tl.int32, is_pure=True, pack=1)
    else:
        word = bytes4.to(tl.uint32, bitcast=True)
        count = turn.to(tl.uint32, bitcast=True)
        return ((word << count) | (word >> ((32 - count) & 31))).to(tl.int32, bitcast=True) & mask


@triton.jit
def _exchanged(word, turn, keep, LANES: tl.constexpr, ASM: tl.constexpr):
    """The word's bits where ``keep`` has ones, elsewhere those of lane ^ LANES, rotated left by ``turn``."""
    if ASM:
        TEXT: tl.constexpr = _exchange_asm(LANES)
        return tl.inline_asm_elementwise(TEXT, "=r,r,r,r", [word, turn, keep], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return (word & keep) | plane_bits(of_lane_across(word, LANES, ASM), turn, ~keep, ASM)


@triton.jit
def _exchange_stage(
    words, thread, N: tl.constexpr, LANES: tl.constexpr, BITS: tl.constexpr, LOW: tl.constexpr, ASM: tl.constexpr
):
    """Of each byte: a bit of the lane's number changes places with a bit of the bit's number."""
    upper = (thread & LANES) != 0
    turn = tl.where(upper, 32 - BITS, BITS)
    keep = tl.where(upper, ~LOW, LOW)
    following = ()
    for index in tl.static_range(N):
        following = following + (_exchanged(words[index], turn, keep, LANES, ASM),)
    return following


@triton.jit
def transposed_bits(words, thread, N: tl.constexpr, LANES: tl.constexpr, ASM: tl.constexpr):
    """Of N words: the last bits of p in lane 4p + q and of b in bit b of each byte change places.

    With 8 lanes, bit b of lane 4p + q becomes bit p of lane 4b + q; with 2, only the last bit of p and b does so; with
    1 nothing moves.
    """
    if LANES >= 2:
        words = _exchange_stage(words, thread, N, 4, 1, 0x55555555, ASM)
    if LANES == 8:
        words = _exchange_stage(words, thread, N, 8, 2, 0x33333333, ASM)
        words = _exchange_stage(words, thread, N, 16, 4, 0x0F0F0F0F, ASM)
    return words


@triton.jit
def two_to(exponent):
    """float32 from an int32 exponent, -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def split_integers(integers, N: tl.constexpr, ASM: tl.constexpr):
    """2 x N words of two 16-bit integers (as `integer_bytes` takes its pairs) to N words of low bytes, N of high ones.

    Returns also the sum of the integers of the first N / 2 words, and that of the others.
    """
    first = tl.zeros_like(integers[0])
    second = tl.zeros_like(integers[0])
    low = ()
    high = ()
    for index in tl.static_range(N):
        low = low + (_bytes(integers[index], integers[N + index], False, ASM),)
        high = high + (_bytes(integers[index], integers[N + index], True, ASM),)
        if index < N // 2:
            first = _added(integers[N + index], _added(integers[index], first, ASM), ASM)
        else:
            second = _added(integers[N + index], _added(integers[index], second, ASM), ASM)
    return low, high, first, second
