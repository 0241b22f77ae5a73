"""What a program makes of a row of x before it multiplies packed signs (sign_product_triton.py): planes of bits.

A lane has eight words of a row of signs, and there one bit of each byte: 32 columns, which it reads as pairs of 16-bit
numbers, scales, and cuts into bits; then lanes exchange these (bit_products_triton.py).
"""

# ruff: noqa: RUF005 - tuples are built by addition: Triton does not unpack
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.bit_products_triton import MAGIC, of_lane_across, split_integers, transposed_bits
from quantkit.kernels.byte_products_triton import TINY, four, half_to_float, stacked


@triton.jit
def _column(word, g, ODD: tl.constexpr, WIDTH: tl.constexpr):
    """The first of eight neighbouring columns: at bits g, of even or of odd planes, of four words from ``word`` on."""
    return word // (WIDTH // 2) * (16 * WIDTH) + (2 * g + ODD) * WIDTH + word % (WIDTH // 2) * 2


@triton.jit
def load_columns(numbers, word, g, n_columns, WIDTH: tl.constexpr):
    """16-bit numbers at bits g of the lane's words, in pairs: of even planes for its eight words, then of odd ones."""
    loaded = ()
    for odd in tl.static_range(2):
        for half in tl.static_range(2):
            column = _column(word + half * 16, g, odd, WIDTH)
            source = numbers + tl.multiple_of(column // 2, 4)[:, None] + tl.arange(0, 4)[None, :]
            loaded = loaded + four(tl.load(source, mask=(column < n_columns)[:, None], other=0))
    return loaded


@triton.jit
def _floats(pairs, BF16: tl.constexpr):
    """Words of two 16-bit numbers each to twice as many float32."""
    values = ()
    for index in tl.static_range(16):
        first = half_to_float(pairs[index] & 0xFFFF, BF16)
        if BF16:
            values = values + (first, (pairs[index] & -65536).to(tl.float32, bitcast=True))  # 0xFFFF0000
        else:
            values = values + (first, half_to_float((pairs[index] >> 16) & 0xFFFF, BF16))
    return values


@triton.jit
def _rounded(value, BF16: tl.constexpr):
    return value.to(tl.bfloat16 if BF16 else tl.float16).to(tl.float32)


@triton.jit
def _bits(value, BF16: tl.constexpr):
    return value.to(tl.bfloat16 if BF16 else tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _store_columns(target, values, word, g, n_columns, WIDTH: tl.constexpr, BF16: tl.constexpr):
    """The inverse of `load_columns`."""
    for odd in tl.static_range(2):
        for half in tl.static_range(2):
            column = _column(word + half * 16, g, odd, WIDTH)
            pairs = ()
            for index in tl.static_range(4):
                even = _bits(values[16 * odd + 8 * half + 2 * index], BF16)
                pairs = pairs + (even | (_bits(values[16 * odd + 8 * half + 2 * index + 1], BF16) << 16),)
            place = target + (column // 2)[:, None] + tl.arange(0, 4)[None, :]
            tl.store(place, tl.reshape(stacked(pairs, 4), (word.shape[0], 4)), mask=(column < n_columns)[:, None])


@triton.jit
def _normed(x, update, weights, residual, word, g, eps, n, HAS_UPDATE: tl.constexpr, WIDTH: tl.constexpr,
            BF16: tl.constexpr):  # fmt: skip
    """Weight * RMS norm of x + update, by way of 16 bits as `add_norm_kernel` has them; the first program also stores
    the sum. The program's threads have all columns."""
    values = _floats(load_columns(x, word, g, n, WIDTH), BF16)
    if HAS_UPDATE:
        more = _floats(load_columns(update, word, g, n, WIDTH), BF16)
        sums = ()
        for index in tl.static_range(32):
            sums = sums + (_rounded(values[index] + more[index], BF16),)
        values = sums
        if tl.program_id(0) == 0:
            _store_columns(residual, values, word, g, n, WIDTH, BF16)
    squares = values[0] * values[0]
    for index in tl.static_range(1, 32):
        squares += values[index] * values[index]
    factor = tl.rsqrt(tl.sum(squares, 0) / n + eps)
    results = ()
    for index in tl.static_range(32):
        results = results + (_rounded(_rounded(values[index] * factor, BF16) * weights[index], BF16),)
    return results


@triton.jit
def _gated(x, word, g, n, WIDTH: tl.constexpr, BF16: tl.constexpr):
    """silu(first half of x) * second half, rounded to 16 bits as `gated_kernel` does."""
    gate = _floats(load_columns(x, word, g, n, WIDTH), BF16)
    up = _floats(load_columns(x + n // 2, word, g, n, WIDTH), BF16)
    results = ()
    for index in tl.static_range(32):
        results = results + (_rounded(gate[index] / (1.0 + tl.exp(-gate[index])) * up[index], BF16),)
    return results


@triton.jit
def _integer_pair(first, second, inverse, ASM: tl.constexpr):
    """Both values times ``inverse``, rounded to 16-bit integers, in one word."""
    if ASM:
        TEXT: tl.constexpr = (
            "{.reg .b32 a,b; fma.rn.f32 a,$1,$3,0f4B400000; fma.rn.f32 b,$2,$3,0f4B400000; prmt.b32 $0,a,b,0x5410;}"
        )
        operands = [first, second, inverse]
        return tl.inline_asm_elementwise(TEXT, "=r,r,r,r", operands, dtype=tl.int32, is_pure=True, pack=1)
    else:
        low = tl.math.fma(first, inverse, MAGIC).to(tl.int32, bitcast=True)
        high = tl.math.fma(second, inverse, MAGIC).to(tl.int32, bitcast=True)
        return (low & 0xFFFF) | (high << 16)


@triton.jit
def over_lanes(value, LARGEST: tl.constexpr, FIRST: tl.constexpr, ASM: tl.constexpr):
    """int32: the largest (or sum) of lanes that differ in bits from FIRST on of their number."""
    for exponent in tl.static_range(FIRST, 5):
        other = of_lane_across(value, 2**exponent, ASM)
        value = tl.maximum(value, other) if LARGEST else value + other
    return value


@triton.jit
def bit_planes(values, thread, ASM: tl.constexpr):
    """Planes g and g + 8 of bits of the lane's words; the sum of the lane's integers, those of its first four words
    and those of the others; their unit, NaN where a value is no number."""
    largest = tl.abs(values[0])
    for index in tl.static_range(1, 32):
        largest = tl.maximum(largest, tl.abs(values[index]), propagate_nan=tl.PropagateNan.ALL)
    # the bits of what is not negative are in its order, NaN last
    top = over_lanes(largest.to(tl.int32, bitcast=True) & 0x7FFFFFFF, True, 0, ASM).to(tl.float32, bitcast=True)
    top = tl.where(top < TINY, TINY, top)
    inverse = 32512.0 / top
    unit = tl.where(top < float("inf"), top * (1.0 / 32512.0), float("nan"))
    integers = ()
    for index in tl.static_range(16):
        integers = integers + (_integer_pair(values[2 * index], values[2 * index + 1], inverse, ASM),)
    low, high, first, second = split_integers(integers, 8, ASM)
    return transposed_bits(low, thread, 8, 8, ASM), transposed_bits(high, thread, 8, 8, ASM), (first, second), unit


@triton.jit
def row_of(
    x, update, weights, residual, word, g, eps, n_columns, SOURCE: tl.constexpr, HAS_UPDATE: tl.constexpr,
    WIDTH: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """The row at the bits of the lane's words, float32."""
    if SOURCE == "norm":
        return _normed(x, update, _floats(weights, BF16), residual, word, g, eps, n_columns, HAS_UPDATE, WIDTH, BF16)
    elif SOURCE == "gated":
        return _gated(x, word, g, n_columns, WIDTH, BF16)
    else:
        return _floats(load_columns(x, word, g, n_columns, WIDTH), BF16)


@triton.jit
def scaled_by(values, by_column):
    factors = _floats(by_column, False)
    scaled = ()
    for index in tl.static_range(32):
        scaled = scaled + (values[index] * factors[index],)
    return scaled
