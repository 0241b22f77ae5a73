"""Triton operations on planar-16 words (planar.py), and the kernel that decodes them.

Imported on first use: `import quantkit` does not need Triton. A field at bit p < 8 of a word, with the exponent bits
masked to zero, *is* the float16 subnormal  code * 2**(p - 24): one AND (for planes in the high byte after a shift that
they share) turns a pair of packed fields into a pair of float16 numbers, exactly.

`ASM=False` replaces the inline PTX by Triton operations with the same result, for the interpreter.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def _position(bits, field):
    """First bit of a field in its byte; 3 bits: 0 once it is assembled from spare bits."""
    if bits == 3:
        return 0 if field >= 12 else field // 2 % 2 * 3
    return field // 2 * bits


@triton.constexpr_function
def rescaled(bits, field):
    """What takes a sum of operands back to one of codes."""
    return 2.0 ** (24 - _position(bits, field))


@triton.constexpr_function
def _mask(bits, field):
    return (1 << bits) - 1 << _position(bits, field)


@triton.constexpr_function
def _field_asm(shift, mask):
    """PTX for a pair of words; the mask drops what the other word's bits lent."""
    if shift == 0:
        return f"and.b32 $0,$1,0x{mask << 16 | mask:08x};"
    return f"{{.reg .b32 t; shr.u32 t,$1,{shift}; and.b32 $0,t,0x{mask << 16 | mask:08x};}}"


@triton.jit
def half_field(word, SHIFT: tl.constexpr, MASK: tl.constexpr, ASM: tl.constexpr):
    """int16 words to float16: the bits of MASK, which are below the exponent, after a shift to the right."""
    if ASM:
        TEXT: tl.constexpr = _field_asm(SHIFT, MASK)
        return tl.inline_asm_elementwise(TEXT, "=r,r", [word], dtype=tl.float16, is_pure=True, pack=2)
    else:
        moved = (word.to(tl.int32) & 0xFFFF) >> SHIFT
        return (moved & MASK).to(tl.int16).to(tl.float16, bitcast=True)


@triton.constexpr_function
def _spare_asm(low, high):
    """PTX for a 3-bit field: two low bits from bit ``low`` of one word on, the third at bit ``high`` of another."""
    text = f"{{.reg .b32 t,u; shr.u32 t,$1,{low}; shr.u32 u,$2,{high - 2}; and.b32 t,t,0x00030003; "
    return text + "lop3.b32 $0,u,0x00040004,t,0xea;}"


@triton.jit
def _spare(low, high, LOW: tl.constexpr, HIGH: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        TEXT: tl.constexpr = _spare_asm(LOW, HIGH)
        return tl.inline_asm_elementwise(TEXT, "=r,r,r", [low, high], dtype=tl.float16, is_pure=True, pack=2)
    else:
        code = ((low.to(tl.int32) >> LOW) & 3) | ((high.to(tl.int32) >> (HIGH - 2)) & 4)
        return code.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def plane_operand(first, second, third, FIELD: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Words to operands of one plane, code * 2**(p - 24). ``first`` .. ``third``: the word parts, of 3 bits."""
    if BITS == 3 and FIELD >= 12:
        BYTE: tl.constexpr = FIELD % 2 * 8
        if FIELD < 14:
            return _spare(first, second, BYTE + 6, BYTE + 6, ASM)
        else:
            return _spare(third, second, BYTE + 6, BYTE + 7, ASM)
    else:
        word = first
        if BITS == 3 and FIELD >= 8:
            word = third
        elif BITS == 3 and FIELD >= 4:
            word = second
        return half_field(word, FIELD % 2 * 8, _mask(BITS, FIELD), ASM)


@triton.jit(do_not_specialize=["first_row", "n_rows", "stride16", "first_group", "n_planes"])
def dequantize_kernel(
    words, scales, zeros, order, out, first_row, n_rows, n_columns, scale_stride, stride16, first_group, n_planes,
    BITS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ORDERED: tl.constexpr,
    ROWS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """out [n_rows, n_columns]: rows first_row .. of one segment's columns, original order. Grid (blocks, row tiles).

    Programs next to each other write next to each other.
    """
    PLANES: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    PARTS: tl.constexpr = 3 if BITS == 3 else 1
    RATIO: tl.constexpr = GROUP // WIDTH
    local = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(0)
    inner = tl.arange(0, WIDTH)
    inside = local < n_rows
    rows = tl.minimum(local, n_rows - 1) + first_row
    source = words + rows.to(tl.int64)[:, None] * (stride16 * 16) + block * (PARTS * WIDTH) + inner[None, :]
    first = tl.load(source)
    second = first
    third = first
    if PARTS == 3:
        second = tl.load(source + WIDTH)
        third = tl.load(source + 2 * WIDTH)
    target = out + local.to(tl.int64)[:, None] * n_columns + inner[None, :]
    for field in tl.static_range(PLANES):
        plane = block * PLANES + field
        if plane < n_planes:
            group = first_group + plane // RATIO
            if ORDERED:
                column = tl.load(order + group).to(tl.int32) * GROUP + (plane % RATIO) * WIDTH
            else:
                column = first_group * GROUP + plane * WIDTH
            operand = plane_operand(first, second, third, field, BITS, ASM).to(tl.float32)
            code = operand * rescaled(BITS, field)
            scale = tl.load(scales + group * scale_stride + rows).to(tl.float32)
            if ZERO is None:
                code -= tl.load(zeros + group * scale_stride + rows).to(tl.float32)[:, None]
            else:
                code -= ZERO
            tl.store(target + column, (scale[:, None] * code).to(out.dtype.element_ty), mask=inside[:, None])
