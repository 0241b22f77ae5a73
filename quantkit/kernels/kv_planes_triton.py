"""What attention kernels read of a page (formats/kv_page.py): operands of its planes, scales of their tokens.

An integer below 256 as float16 is the subnormal integer * 2**-24. So a byte of a packed word, cut off above a field, is
an operand of the tensor core, at most one AND away from the word; a field alone would take an AND more for each byte.

`ASM=False` replaces the inline PTX by Triton operations with the same result, for the interpreter.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def place(bits, field):
    """Of a field among those of its byte."""
    return field % (8 // bits)


@triton.constexpr_function
def step_of(bits, field):
    """What one step of the field's code adds to an operand that holds it."""
    return 2.0 ** (place(bits, field) * bits - 24)


@triton.constexpr_function
def sum_of_steps(bits, field):
    """The sum of `step_of` over the fields that the field's operand holds."""
    return sum(2.0 ** (lower * bits) for lower in range(place(bits, field) + 1)) * 2.0**-24


@triton.constexpr_function
def is_last(bits, field):
    return place(bits, field) == 8 // bits - 1


@triton.constexpr_function
def _operand_asm(bits, field):
    """PTX for a pair of words: the byte of the field, up to and with the field."""
    mask = (1 << (place(bits, field) + 1) * bits) - 1
    pair = f"0x{mask << 16 | mask:08x}"
    if field < 8 // bits:
        return f"and.b32 $0,$1,{pair};"
    if is_last(bits, field):
        return "prmt.b32 $0,$1,0,0x4341;"
    return f"{{.reg .b32 t; prmt.b32 t,$1,0,0x4341; and.b32 $0,t,{pair};}}"


@triton.jit
def plane_operand(words, FIELD: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """float16 operand of one plane: subnormals that hold the fields of a byte up to and with this one."""
    if ASM:
        TEXT: tl.constexpr = _operand_asm(BITS, FIELD)
        return tl.inline_asm_elementwise(TEXT, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    else:
        MASK: tl.constexpr = (1 << (place(BITS, FIELD) + 1) * BITS) - 1
        moved = (words.to(tl.int32) & 0xFFFF) >> (FIELD * BITS // 8 * 8)
        return (moved & MASK).to(tl.int16).to(tl.float16, bitcast=True)


@triton.constexpr_function
def _packed(fields):
    """Scales that are loaded as one integer: those of the tokens of a word, up to 8 bytes."""
    return min(fields, 4)


@triton.jit
def load_scales(pointer, FIELDS: tl.constexpr, RUN: tl.constexpr):
    """What a page has for each token, as a tuple of integers [RUN]; pointer: at the page."""
    PARTS: tl.constexpr = FIELDS // _packed(FIELDS)
    INTEGER: tl.constexpr = tl.int64 if _packed(FIELDS) == 4 else tl.int32
    first = pointer.to(tl.pointer_type(INTEGER)) + tl.arange(0, RUN) * PARTS
    held = ()
    for part in tl.static_range(PARTS):
        held = held + (tl.load(first + part),)  # noqa: RUF005 - Triton knows no unpacking
    return held


@triton.jit
def scales_of_planes(held, FIELDS: tl.constexpr, ASM: tl.constexpr):
    """float16 [RUN] of each plane."""
    planes = ()
    for part in tl.static_range(FIELDS // _packed(FIELDS)):
        if ASM and FIELDS >= 4:
            planes = planes + tl.inline_asm_elementwise(
                "mov.b64 {$0,$1,$2,$3}, $4;", "=h,=h,=h,=h,l", [held[part]],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=1,
            )  # fmt: skip
        else:
            for number in tl.static_range(_packed(FIELDS)):
                plane = (held[part] >> (16 * number)).to(tl.int16).to(tl.float16, bitcast=True)
                planes = planes + (plane,)  # noqa: RUF005
    return planes
