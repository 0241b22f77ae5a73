"""Products of packed fields with eight columns of signed bytes on the tensor core (mixed_rows_triton.py).

Fields are masked bytes of planar words, as in byte_products_triton.py; products are exact, sums are of 32 bits.
`ASM=False` replaces the inline PTX by Triton operations with the same result, for the interpreter.
"""

# ruff: noqa: RUF005 - tuples are built by addition: Triton does not unpack
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.byte_products_triton import four, signed_byte


@triton.constexpr_function
def _byte_asm(mask):
    """PTX: two products of 16 rows of masked bytes, 32 each, with 8 columns of signed ones."""
    text = "{.reg .b32 a0,a1,a2,a3,b0,b1,b2,b3; .reg .s32 d0,d1,d2,d3; "
    for word in range(4):
        for row, name in enumerate("ab"):
            source = f"${4 + 4 * row + word}"
            taken = (
                f"mov.b32 {name}{word},{source}; " if mask == -1 else f"and.b32 {name}{word},{source},0x{mask:08x}; "
            )
            text += taken
    mma = "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
    text += mma + "{d0,d1,d2,d3},{a0,b0,a1,b1},{$12,$13},{$16,$17,$18,$19}; "
    return text + mma + "{$0,$1,$2,$3},{a2,b2,a3,b3},{$14,$15},{d0,d1,d2,d3};}"


@triton.jit
def _dots(words, columns, MASK: tl.constexpr):
    """What the tensor core sums: lane 4g + q has row g and column g of operands, columns 2q, 2q + 1 of row g."""
    WARPS: tl.constexpr = columns.shape[0] // 32
    total = tl.zeros((WARPS, 8, 8, 4), tl.int32)
    for byte in tl.static_range(4):
        code = tl.reshape((words >> (8 * byte)) & (MASK & 0xFF), (WARPS, 8, 1, 4))
        total += code * tl.reshape(signed_byte(columns, byte), (WARPS, 1, 8, 4))
    even, odd = tl.split(tl.reshape(tl.sum(total, 3), (WARPS, 8, 4, 2)))
    return tl.reshape(even, (WARPS * 32,)), tl.reshape(odd, (WARPS * 32,))


@triton.jit
def byte_product(first, second, columns, sums, MASK: tl.constexpr, ASM: tl.constexpr):
    """``sums`` plus the products of masked bytes with columns of signed ones, 64 each, summed over q.

    Lane 4g + q passes four words [threads, 4] of two rows and of column g; it gets columns 2q and 2q + 1 for its first
    row, then for its second.
    """
    a0, a1, a2, a3 = four(first)
    b0, b1, b2, b3 = four(second)
    if ASM:
        TEXT: tl.constexpr = _byte_asm(MASK)
        operands = [a0, a1, a2, a3, b0, b1, b2, b3, columns[0], columns[1], columns[2], columns[3]]
        operands = operands + [sums[0], sums[1], sums[2], sums[3]]
        layout: tl.constexpr = "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r"
        return tl.inline_asm_elementwise(
            TEXT, layout, operands, dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        first_words = (a0, a1, a2, a3)
        second_words = (b0, b1, b2, b3)
        for word in tl.static_range(4):
            even, odd = _dots(first_words[word], columns[word], MASK)
            next_even, next_odd = _dots(second_words[word], columns[word], MASK)
            sums = (sums[0] + even, sums[1] + odd, sums[2] + next_even, sums[3] + next_odd)
        return sums
