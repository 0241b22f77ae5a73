"""Byte products for gemv_triton.py: fields of planar words as bytes, activations as two signed bytes each.

    x  ~  scale * (256 * high + low),     |256 * high + low| <= 32512

Every product is one of bytes, summed exactly in 32 bits by `dp4a`. One AND over two packed words yields four bytes of
one group (planes 2i and 2i + 1): the codes as they are, times 2**p for a field at bit p, which goes into a factor.
`ASM=False` replaces the inline PTX by Triton operations with the same result, for the interpreter.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl

TINY = tl.constexpr(2.0**-100)  # below this x is rounded to multiples of a fixed unit, whose inverse is a float32


@triton.constexpr_function
def pairs_of(bits):
    """Pairs of planes in a block; both planes of a pair belong to one group."""
    return 8 if bits == 3 else 8 // bits


@triton.constexpr_function
def _position(bits, pair):
    """First bit of the pair's field in its byte; 3 bits: 0 once it is assembled from spare bits."""
    if bits == 3:
        return 0 if pair >= 6 else pair % 2 * 3
    return pair * bits


@triton.constexpr_function
def field_mask(bits, pair):
    """The field's bits in each of four bytes; -1 if nothing else is in them."""
    if bits == 8 or (bits == 3 and pair >= 6):
        return -1
    return ((1 << bits) - 1 << _position(bits, pair)) * 0x01010101


@triton.constexpr_function
def field_unit(bits, pair):
    """The factor that takes the field back to its code."""
    return 1.0 / (1 << _position(bits, pair))


@triton.constexpr_function
def _dot_asm(mask):
    """PTX: 256 times the dot product of 16 masked bytes with the high slices, plus that with the low slices."""
    lines = []
    for word in range(4):
        lines.append(f"mov.b32 t{word},${word + 1};" if mask == -1 else f"and.b32 t{word},${word + 1},0x{mask:08x};")
    for word in range(4):
        high, low = ("0", "0") if word == 0 else ("h", "l")
        lines.append(f"dp4a.u32.s32 h,t{word},${word + 5},{high}; dp4a.u32.s32 l,t{word},${word + 9},{low};")
    return "{.reg .b32 t0,t1,t2,t3; .reg .s32 h,l; " + " ".join(lines) + " mad.lo.s32 $0,h,256,l;}"


# 12583040 = 1.5 * 2**23 + 128: adding it leaves the rounded value + 128 in the last bits. Its second byte is the high
# slice, its first one the low slice with the sign flipped.
_TO_SLICES = tl.constexpr(
    "prmt.b32 t,a,b,0x0051; prmt.b32 s,c,d,0x0051; prmt.b32 $0,t,s,0x5410; "
    "prmt.b32 t,a,b,0x0040; prmt.b32 s,c,d,0x0040; prmt.b32 t,t,s,0x5410; xor.b32 $1,t,0x80808080;"
)


@triton.constexpr_function
def _slice_asm(bf16):
    """PTX: two words, each of two neighbouring values of x, to four high and four low bytes."""
    if bf16:
        text = "shl.b32 a,$2,16; shl.b32 b,$3,16; and.b32 c,$2,0xffff0000; and.b32 d,$3,0xffff0000; "
    else:
        text = "{.reg .b16 u,v; mov.b32 {u,v},$2; cvt.f32.f16 a,u; cvt.f32.f16 c,v; "
        text += "mov.b32 {u,v},$3; cvt.f32.f16 b,u; cvt.f32.f16 d,v;} "
    for value in "abcd":
        text += f"fma.rn.f32 {value},{value},$4,0f4B400080; "
    return "{.reg .b32 a,b,c,d,t,s; " + text + _TO_SLICES + "}"


@triton.jit
def signed_byte(word, BYTE: tl.constexpr):
    return (word << (24 - 8 * BYTE)) >> 24


@triton.jit
def four(words):
    """[threads, 4] to its four columns, without leaving registers."""
    evens, odds = tl.split(tl.reshape(words, (words.shape[0], 2, 2)))
    first, third = tl.split(evens)
    second, fourth = tl.split(odds)
    return first, second, third, fourth


@triton.jit
def stacked(values, N: tl.constexpr):
    """Tuple of [threads] to [threads, N], without leaving registers."""
    if N == 1:
        return values[0]
    else:
        halves = ()
        for row in tl.static_range(N // 2):
            halves = halves + (tl.join(values[row], values[row + N // 2]),)  # noqa: RUF005 - Triton does not unpack
        return stacked(halves, N // 2)


@triton.jit
def byte_dot(words, highs, lows, MASK: tl.constexpr, ASM: tl.constexpr):
    """int32 [threads]: four words of packed bytes times the slices of their columns, each [threads, 4]."""
    if ASM:
        w0, w1, w2, w3 = four(words)
        h0, h1, h2, h3 = four(highs)
        l0, l1, l2, l3 = four(lows)
        TEXT: tl.constexpr = _dot_asm(MASK)
        operands = [w0, w1, w2, w3, h0, h1, h2, h3, l0, l1, l2, l3]
        layout: tl.constexpr = "=r,r,r,r,r,r,r,r,r,r,r,r,r"
        return tl.inline_asm_elementwise(TEXT, layout, operands, dtype=tl.int32, is_pure=True, pack=1)
    else:
        total = tl.zeros_like(words)
        for byte in tl.static_range(4):
            code = (words >> (8 * byte)) & (MASK & 0xFF)
            total += code * (256 * signed_byte(highs, byte) + signed_byte(lows, byte))
        return tl.sum(total, 1)


@triton.jit
def half_to_float(half, BF16: tl.constexpr):
    """The low 16 bits of an int32, as the number that they are."""
    if BF16:
        return (half << 16).to(tl.float32, bitcast=True)
    else:
        return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def pair_factor(two_rows, ROW: tl.constexpr):
    """One row's number of two that were loaded as one: float16 of an int32, or a byte of an int16."""
    if two_rows.dtype == tl.int32:
        return half_to_float((two_rows >> (16 * ROW)) & 0xFFFF, False)
    else:
        return ((two_rows >> (8 * ROW)) & 0xFF).to(tl.float32)


@triton.jit
def larger_half(largest, word, ASM: tl.constexpr):
    """Both 16-bit halves: the larger of ``largest`` and the magnitude in ``word``. NaN counts as the largest."""
    if ASM:
        TEXT: tl.constexpr = "{.reg .b32 t; and.b32 t,$2,0x7fff7fff; max.u16x2 $0,$1,t;}"
        return tl.inline_asm_elementwise(TEXT, "=r,r,r", [largest, word], dtype=tl.int32, is_pure=True, pack=1)
    else:
        low = tl.maximum(largest & 0xFFFF, word & 0x7FFF)
        return low | (tl.maximum(largest >> 16, (word >> 16) & 0x7FFF) << 16)


@triton.jit
def _slices_of(a, b, c, d, inverse):
    a = (a * inverse + 12583040.0).to(tl.int32, bitcast=True)
    b = (b * inverse + 12583040.0).to(tl.int32, bitcast=True)
    c = (c * inverse + 12583040.0).to(tl.int32, bitcast=True)
    d = (d * inverse + 12583040.0).to(tl.int32, bitcast=True)
    high = ((a >> 8) & 0xFF) | (b & 0xFF00) | ((c & 0xFF00) << 8) | ((d & 0xFF00) << 16)
    low = (a & 0xFF) | ((b & 0xFF) << 8) | ((c & 0xFF) << 16) | ((d & 0xFF) << 24)
    return high, low ^ -2139062144  # 0x80808080


@triton.jit
def byte_slices(even, odd, inverse, BF16: tl.constexpr, ASM: tl.constexpr):
    """Words of x at two neighbouring columns of an even and an odd plane to high and low slices, byte by byte."""
    if ASM:
        TEXT: tl.constexpr = _slice_asm(BF16)
        return tl.inline_asm_elementwise(
            TEXT, "=r,=r,r,r,r", [even, odd, inverse], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        a = half_to_float(even & 0xFFFF, BF16)
        b = half_to_float(odd & 0xFFFF, BF16)
        c = half_to_float((even >> 16) & 0xFFFF, BF16)
        d = half_to_float((odd >> 16) & 0xFFFF, BF16)
        return _slices_of(a, b, c, d, inverse)
