"""Triton kernels on planar-16 words (planar.py). Imported on first use: `import quantkit` does not need Triton.

`fused_kernel` computes ``y = x W^T`` for few rows of x. Weights are the *first* operand of the tensor core, so a tile
of 32 weight rows meets 8 columns of x and nothing is padded to 64 tokens. One AND (two for some fields) turns a pair of
packed fields into a pair of matrix operands:

    float16 x    a field at bit p < 10 with the exponent bits masked to zero *is* the subnormal  code * 2**(p - 24)
    bfloat16 x   the field is ORed under the exponent of 128:                                    128 + code * 2**p

Both are exact, products are summed in float32, and the power of two goes into the group scale. The constant part
(bfloat16's 128, and the zero of a symmetric grid) is subtracted by a second product with a constant operand; a stored
zero needs the sum of x over its group, which is a product with ones. Either costs a tensor-core instruction per 256
weights, not an instruction per weight, and no pass over x before the kernel.

Several programs may share a row tile, each with a range of blocks of one segment; the last to arrive adds the partial
sums in a fixed order, so the result does not depend on scheduling, and resets its counter.

`ASM=False` replaces the inline PTX by Triton operations with the same result, for the interpreter (which also lacks
bfloat16 arithmetic: products are done in float32 there).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def _field_place(bits, field, bf16):
    """(word part, right shift, bit position after the shift) of a field; 3 bits: of planes 0 to 11.

    The position p keeps p + bits <= 10 (float16) or 7 (bfloat16). One-bit fields avoid p = 0: half of their unit, the
    symmetric zero, must be a number of the operand's type too. For 8 bits and bfloat16 this is the low half.
    """
    pair = field // 2
    part, bit = (pair // 2, field % 2 * 8 + pair % 2 * 3) if bits == 3 else (0, field % 2 * 8 + pair * bits)
    if bits == 1:
        shift = (-1, 5, 11)[bit // 6] if bf16 else -1 if bit < 9 else 6
        return 0, shift, bit - shift
    room = {2: 6, 3: 8, 4: 4, 8: 8}[bits] if bf16 else 8
    return part, bit // room * room, bit % room


@triton.constexpr_function
def _field_part(bits, field):
    return field // 4 if bits == 3 else 0


@triton.constexpr_function
def _field_shift(bits, field, bf16):
    return _field_place(bits, field, bf16)[1]


@triton.constexpr_function
def _field_position(bits, field, bf16):
    return 0 if bits == 3 and field >= 12 else _field_place(bits, field, bf16)[2]


@triton.constexpr_function
def _field_unit(bits, field, bf16):
    """What one code step adds to the operand."""
    position = _field_position(bits, field, bf16)
    return 2.0 ** (position if bf16 else position - 24)


@triton.constexpr_function
def _field_asm(shift, mask, magic):
    """PTX for a pair of words: shift, mask, set the exponent. The mask drops what the other word's bits lent."""
    pair = f"0x{mask << 16 | mask:08x}"
    move = f"shl.b32 t,$1,{-shift};" if shift < 0 else f"shr.u32 t,$1,{shift};"
    combine = f"lop3.b32 $0,t,{pair},0x{magic << 16 | magic:08x},0xea;" if magic else f"and.b32 $0,t,{pair};"
    return "{.reg .b32 t; " + move + combine + "}"


@triton.constexpr_function
def _spare_asm(low, high, magic):
    """PTX for a 3-bit field: two low bits from bit ``low`` of one word on, the third at bit ``high`` of another."""
    first = f"lop3.b32 t,t,0x00030003,0x{magic << 16 | magic:08x},0xea;"
    return f"{{.reg .b32 t,u; shr.u32 t,$1,{low}; shr.u32 u,$2,{high - 2}; {first} lop3.b32 $0,u,0x00040004,t,0xea;}}"


@triton.jit
def _field(word, SHIFT: tl.constexpr, MASK: tl.constexpr, MAGIC: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    """int16 words to operands: the masked field under the exponent bits of MAGIC."""
    if ASM:
        TEXT: tl.constexpr = _field_asm(SHIFT, MASK, MAGIC)
        if BF16:
            return tl.inline_asm_elementwise(TEXT, "=r,r", [word], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(TEXT, "=r,r", [word], dtype=tl.float16, is_pure=True, pack=2)
    else:
        wide = word.to(tl.int32) & 0xFFFF
        moved = wide << -SHIFT if SHIFT < 0 else wide >> SHIFT
        return ((moved & MASK) | MAGIC).to(tl.int16).to(tl.bfloat16 if BF16 else tl.float16, bitcast=True)


@triton.jit
def _spare_field(
    low, high, LOW: tl.constexpr, HIGH: tl.constexpr, MAGIC: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr
):
    """Planes 12 to 15 of a 3-bit block: bits LOW and LOW + 1 of one word, bit HIGH of another."""
    if ASM:
        TEXT: tl.constexpr = _spare_asm(LOW, HIGH, MAGIC)
        if BF16:
            return tl.inline_asm_elementwise(TEXT, "=r,r,r", [low, high], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(TEXT, "=r,r,r", [low, high], dtype=tl.float16, is_pure=True, pack=2)
    else:
        code = ((low.to(tl.int32) >> LOW) & 3) | ((high.to(tl.int32) >> (HIGH - 2)) & 4)
        return (code | MAGIC).to(tl.int16).to(tl.bfloat16 if BF16 else tl.float16, bitcast=True)


@triton.jit
def _plane(
    first, second, third, FIELD: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Operand of one plane: code * 2**(p - 24) as float16, 128 + code * 2**p as bfloat16 (8 bits: low half only)."""
    MAGIC: tl.constexpr = 0x4300 if BF16 else 0
    PART: tl.constexpr = _field_part(BITS, FIELD)
    if PART == 3:  # the spare bits of the three words
        BYTE: tl.constexpr = FIELD % 2 * 8
        if FIELD < 14:
            return _spare_field(first, second, BYTE + 6, BYTE + 6, MAGIC, BF16, ASM)
        else:
            return _spare_field(third, second, BYTE + 6, BYTE + 7, MAGIC, BF16, ASM)
    else:
        SHIFT: tl.constexpr = _field_shift(BITS, FIELD, BF16)
        POSITION: tl.constexpr = _field_position(BITS, FIELD, BF16)
        WIDTH: tl.constexpr = 4 if BF16 and BITS == 8 else BITS
        MASK: tl.constexpr = ((1 << WIDTH) - 1) << POSITION
        if PART == 2:
            return _field(third, SHIFT, MASK, MAGIC, BF16, ASM)
        elif PART == 1:
            return _field(second, SHIFT, MASK, MAGIC, BF16, ASM)
        else:
            return _field(first, SHIFT, MASK, MAGIC, BF16, ASM)


@triton.jit
def _multiply_add(a, b, acc, ASM: tl.constexpr):
    """acc + a @ b, summed in float32."""
    if ASM or a.dtype == tl.float16:
        return tl.dot(a, b, acc, out_dtype=tl.float32)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def _add_constant(x, acc, VALUE: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    """acc [rows, columns of x] plus, in every row, VALUE times the sum of x over its first dimension."""
    return _multiply_add(tl.full((acc.shape[0], x.shape[0]), VALUE, tl.bfloat16 if BF16 else tl.float16), x, acc, ASM)


@triton.jit
def _plane_product(
    first, second, third, x, ZERO: tl.constexpr, FIELD: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
    BF16: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """sum of (code - ZERO) * x over one plane, times the operand's unit: [ROWS, columns of x]."""
    HALVES: tl.constexpr = BF16 and BITS == 8
    OFFSET: tl.constexpr = ZERO * _field_unit(BITS, FIELD, BF16) + (128.0 if BF16 else 0.0)
    product = tl.zeros((ROWS, x.shape[1]), tl.float32)
    if HALVES:  # upper four bits under the exponent of 2048, whose last mantissa bit is worth 16; the zero is in them
        product = _add_constant(x, product, -2048.0 - ZERO, BF16, ASM)
        product = _add_constant(x, product, -128.0, BF16, ASM)
        product = _multiply_add(_field(first, FIELD * 8 + 4, 0xF, 0x4500, BF16, ASM), x, product, ASM)
    elif OFFSET != 0:
        product = _add_constant(x, product, -OFFSET, BF16, ASM)
    return _multiply_add(_plane(first, second, third, FIELD, BITS, BF16, ASM), x, product, ASM)


@triton.constexpr_function
def _ends_group(field, planes, ratio):
    """Whether the next plane of the block may be of another group (``ratio`` planes), or of another block."""
    if planes % ratio == 0:
        return (field + 1) % ratio == 0
    return field + 1 == planes or ratio % planes != 0


@triton.jit
def _segment_sum(
    acc, x_columns, tokens, n_tokens, row_words, scales, zeros, order, first_block, last_block, first_group, n_planes,
    scale_stride, BITS: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr, GROUP: tl.constexpr,
    ZERO: tl.constexpr, ORDERED: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc [ROWS, TOKENS], float32, plus what blocks first_block .. last_block - 1 of one segment add to the product.

    ``x_columns`` points at the WIDTH first columns of each token, ``row_words`` at the first words of the segment's
    rows, ``scales`` and ``zeros`` at the rows of group 0.
    """
    PLANES: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    PARTS: tl.constexpr = 3 if BITS == 3 else 1
    RATIO: tl.constexpr = GROUP // WIDTH
    for block in range(first_block, last_block):
        words = row_words + block * (PARTS * WIDTH)
        first = tl.load(words, eviction_policy="evict_first")
        second = first
        third = first
        if PARTS == 3:
            second = tl.load(words + WIDTH, eviction_policy="evict_first")
            third = tl.load(words + 2 * WIDTH, eviction_policy="evict_first")
        total = tl.zeros(acc.shape, tl.float32)  # sums of x over the group's planes so far, if zeros are stored
        for field in tl.static_range(PLANES):
            plane = block * PLANES + field
            limit = n_tokens
            if RAGGED:  # x is 0 in planes without columns; their scales exist and do not matter
                limit = tl.where(plane < n_planes, n_tokens, 0)
            if PLANES % RATIO == 0:  # the same expression for planes of one group: their scales are loaded once
                group = first_group + block * (PLANES // RATIO) + field // RATIO
            else:
                group = first_group + plane // RATIO
            if ORDERED:
                column = tl.load(order + group).to(tl.int32) * GROUP + (plane % RATIO) * WIDTH
            else:
                column = first_group * GROUP + plane * WIDTH
            x = tl.load(x_columns + column, mask=tokens[None, :] < limit, other=0.0)
            scale = tl.load(scales + group * scale_stride).to(tl.float32)
            product = _plane_product(
                first, second, third, x, 0.0 if ZERO is None else ZERO, field, BITS, acc.shape[0], BF16, ASM
            )
            acc += (scale * (1.0 / _field_unit(BITS, field, BF16)))[:, None] * product
            if ZERO is None:
                total = _add_constant(x, total, 1.0, BF16, ASM)
                if _ends_group(field, PLANES, RATIO):
                    zero = tl.load(zeros + group * scale_stride).to(tl.float32)
                    acc -= (scale * zero)[:, None] * total
                    total = tl.zeros(acc.shape, tl.float32)
    return acc


@triton.jit(do_not_specialize=["n_tokens", "segments"])
def fused_kernel(
    x, words, scales, zeros, order, bias, y, partial, counters, n_tokens, n_rows, n_columns, scale_stride,
    segments, BITS: tl.constexpr, WIDTHS: tl.constexpr, RAGGED: tl.constexpr, CONSTANT_ZEROS: tl.constexpr,
    GROUP: tl.constexpr, ORDERED: tl.constexpr, HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y [n_tokens, n_rows] = x [n_tokens, n_columns] @ weight^T + bias. Grid (row tiles, SPLITS, token tiles).

    Args:
        segments: per segment (word offset / 16, words per row / 16, blocks, blocks per split, splits, first group,
            planes). The division shows the compiler that loads are aligned, without one compilation per value.
        partial: float32 [token tiles, SPLITS, TOKENS, n_rows], any content; counters: zeros before and after.
        BITS, WIDTHS, RAGGED, CONSTANT_ZEROS: one entry per segment; RAGGED: its last block has planes without columns.
    """
    row_tile = tl.program_id(0)
    split = tl.program_id(1)
    token_tile = tl.program_id(2)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    tokens = token_tile * TOKENS + tl.arange(0, TOKENS)
    BF16: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    first_split = 0
    for index in tl.static_range(len(BITS)):
        offset16, stride16, n_blocks, per_split, n_splits, first_group, n_planes = segments[index]
        local = split - first_split  # below 0 or from n_splits on: another segment's split, no block is visited
        first_block = tl.maximum(local, 0) * per_split
        last_block = tl.minimum(tl.minimum(tl.maximum(local + 1, 0), n_splits) * per_split, n_blocks)
        inner = tl.arange(0, WIDTHS[index])
        acc = _segment_sum(
            acc,
            x + tokens.to(tl.int64)[None, :] * n_columns + inner[:, None],
            tokens, n_tokens,
            words + offset16.to(tl.int64) * 16 + rows.to(tl.int64)[:, None] * (stride16 * 16) + inner[None, :],
            scales + rows, zeros + rows, order, first_block, last_block, first_group, n_planes, scale_stride,
            BITS[index], WIDTHS[index], RAGGED[index], GROUP, CONSTANT_ZEROS[index], ORDERED, BF16, ASM,
        )  # fmt: skip
        first_split += n_splits
    inside = (rows < n_rows)[:, None] & (tokens < n_tokens)[None, :]
    last = True
    if SPLITS > 1:
        mine = partial + token_tile.to(tl.int64) * (SPLITS * TOKENS) * n_rows
        mine += tl.arange(0, TOKENS)[None, :] * n_rows + rows[:, None]
        tl.store(mine + split * TOKENS * n_rows, acc, mask=inside)
        tl.debug_barrier()
        counter = counters + token_tile * tl.num_programs(0) + row_tile
        last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if last:
            acc = tl.zeros((ROWS, TOKENS), tl.float32)
            for other in tl.static_range(SPLITS):  # unrolled: one memory latency, not SPLITS of them
                acc += tl.load(mine + other * TOKENS * n_rows, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(counter, 0)
    if last:
        if HAS_BIAS:
            acc += tl.load(bias + rows, mask=rows < n_rows, other=0.0).to(tl.float32)[:, None]
        out = y + tokens.to(tl.int64)[None, :] * n_rows + rows[:, None]
        tl.store(out, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_row", "n_rows", "stride16", "first_group", "n_planes"])
def dequantize_kernel(
    words, scales, zeros, order, out, first_row, n_rows, n_columns, scale_stride, stride16, first_group, n_planes,
    BITS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ORDERED: tl.constexpr,
    ROWS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """out [n_rows, n_columns]: rows first_row .. of one segment's columns, original order. Grid (row tiles, blocks)."""
    PLANES: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    PARTS: tl.constexpr = 3 if BITS == 3 else 1
    RATIO: tl.constexpr = GROUP // WIDTH
    local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
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
            operand = _plane(first, second, third, field, BITS, False, ASM).to(tl.float32)
            code = operand * (1.0 / _field_unit(BITS, field, False))
            scale = tl.load(scales + group * scale_stride + rows).to(tl.float32)
            if ZERO is None:
                code -= tl.load(zeros + group * scale_stride + rows).to(tl.float32)[:, None]
            else:
                code -= ZERO
            tl.store(target + column, (scale[:, None] * code).to(out.dtype.element_ty), mask=inside[:, None])
