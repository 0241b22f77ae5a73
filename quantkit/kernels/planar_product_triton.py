"""Triton kernels for few rows of x on planar-16 words (planar.py): ``y = x W^T`` through the tensor core.

Weights are the *first* operand, so a tile of weight rows meets 8 columns of x and nothing is padded to 64 tokens. A
field is an operand after one AND (grouped_int_triton.py). Products are exact and summed in float32; the power of two
that comes with the operand goes into the group scale.

`prepare_kernel` brings x into that form, once per call: float16 times a power of two per token, in the order of the
planar columns, with zeros where blocks are padded; and its sums over groups or parts of them, for the zeros:

    y[m, o] = factors[m] * ( sum_g scales[o, g] * sum_{i in g} codes[o, i] x[m, i]
                           - sum_g scales[o, g] * zeros[o, g] * sums[g, m] )

bfloat16 has fewer bits of mantissa, so what is within 2**-28 of the token's largest stays exact. Scales, zeros and sums
are loaded one block ahead of the words that they belong to. Several programs may share a row tile, each with a range of
the blocks of every segment; the last to arrive adds the partial sums in a fixed order, so the result does not depend on
scheduling, and resets its counter.

`ASM=False` replaces the inline PTX by Triton operations with the same result, for the interpreter.
"""

# ruff: noqa: RUF005 - tuples are built by addition: Triton does not unpack
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.kernels.grouped_int_triton import plane_operand, rescaled


@triton.jit(do_not_specialize=["n_tokens"])
def prepare_kernel(
    x, order, prepared, sums, factors, stride, n_columns, n_prepared, n_tokens, segments, GROUP: tl.constexpr,
    CHAIN: tl.constexpr, CHAINS: tl.constexpr, COLUMNS: tl.constexpr, ORDERED: tl.constexpr, PADDING: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """prepared [tokens, n_prepared], sums [n_prepared / CHAIN, tokens], factors [tokens].

    Grid (tokens, parts of CHAINS chains); every program looks at the whole row for its largest number.

    Args:
        segments: per segment (first chain, what its chains move on by, padded columns, where they start).
        COLUMNS, PADDING: powers of two, not below n_columns and the padded columns (or 0).
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0)
    part = tl.program_id(1)
    x += token.to(tl.int64) * stride
    prepared += token.to(tl.int64) * n_prepared
    sums += token
    column = tl.arange(0, COLUMNS)
    row = tl.load(x + column, mask=column < n_columns, other=0.0)
    largest = tl.max(tl.abs(row.to(tl.float32)), 0)
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF, 15)
    scale = ((268 - exponent) << 23).to(tl.float32, bitcast=True)  # 2**14 <= the largest < 2**15
    chain = part * CHAINS + tl.arange(0, CHAINS)
    inside = chain < n_columns // CHAIN
    source = chain * CHAIN
    if ORDERED:
        group = tl.load(order + source // GROUP, mask=inside, other=0).to(tl.int32)
        source = group * GROUP + source % GROUP
    inner = tl.arange(0, CHAIN)[None, :]
    values = tl.load(x + tl.multiple_of(source, CHAIN)[:, None] + inner, mask=inside[:, None], other=0.0)
    half = (values.to(tl.float32) * scale).to(tl.float16)
    target = chain
    for index in tl.static_range(len(PADDING)):
        first_chain, moved, padded, start = segments[index]
        target = tl.where(chain >= first_chain, chain + moved, target)
        if PADDING[index] > 0:  # noqa: SIM102 - decided when compiling
            if part == 0:
                place = tl.arange(0, PADDING[index])
                zeros = tl.zeros_like(place).to(tl.float32)
                tl.store(prepared + start + place, zeros.to(tl.float16), mask=place < padded)
                tl.store(sums + (start // CHAIN + place) * n_tokens, zeros, mask=place < padded // CHAIN)
    tl.store(prepared + tl.multiple_of(target * CHAIN, CHAIN)[:, None] + inner, half, mask=inside[:, None])
    tl.store(sums + target * n_tokens, tl.sum(half.to(tl.float32), 1), mask=inside)
    if part == 0:
        tl.store(factors + token, ((exponent - 14) << 23).to(tl.float32, bitcast=True))


@triton.constexpr_function
def _span(group, width):
    """Planes of one chain of products: they share a group and a bit position."""
    return 2 if group % (2 * width) == 0 else 1


@triton.jit
def _chain_numbers(
    scales, zeros, sums, tokens, n_tokens, block, last_block, first_group, scale_stride, BITS: tl.constexpr,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, CHAIN: tl.constexpr, IN_LOOP: tl.constexpr,
):  # fmt: skip
    """Of each chain of a block: scales of the rows, and where zeros are IN_LOOP, zeros of the rows and sums of x.

    ``scales``, ``zeros`` at the rows of group 0; ``sums`` at the segment's first chain. Masked, or the compiler would
    move the loads to where their results are needed.
    """
    SPAN: tl.constexpr = _span(GROUP, WIDTH)
    PLANES: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    rows_valid = tl.zeros(scales.shape, tl.int32) + block < last_block
    tokens_valid = (tl.zeros(tokens.shape, tl.int32) + block < last_block) & (tokens < n_tokens)
    loaded = ()
    offsets = ()
    totals = ()
    for chain in tl.static_range(PLANES // SPAN):
        column = (block * PLANES + chain * SPAN) * WIDTH
        place = (first_group + column // GROUP) * scale_stride
        loaded = loaded + (tl.load(scales + place, mask=rows_valid, other=0.0),)
        if IN_LOOP and ZERO is None:
            offsets = offsets + (tl.load(zeros + place, mask=rows_valid, other=0),)
        if IN_LOOP:
            total = tl.zeros(tokens.shape, tl.float32)
            for part in tl.static_range(SPAN * WIDTH // CHAIN):
                rows = sums + (column // CHAIN + part) * n_tokens + tokens
                total += tl.load(rows, mask=tokens_valid, other=0.0)
            totals = totals + (total,)
    return loaded, offsets, totals


@triton.jit
def _zero_sums(
    acc, tokens, n_tokens, scales, zeros, sums, first_chain, last_chain, first_group, scale_stride,
    GROUP: tl.constexpr, ZERO: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """acc minus the sum over chains of scales * zeros * sums, as a product."""
    STEP: tl.constexpr = 16
    for start in range(first_chain, last_chain, STEP):
        chain = start + tl.arange(0, STEP)
        valid = chain < last_chain
        place = scale_stride * (first_group + chain * CHAIN // GROUP)[None, :]
        factor = tl.load(scales[:, None] + place, mask=valid[None, :], other=0.0).to(tl.float32)
        if ZERO is None:
            factor *= -tl.load(zeros[:, None] + place, mask=valid[None, :], other=0).to(tl.float32)
        else:
            factor *= -ZERO
        inside = valid[:, None] & (tokens < n_tokens)[None, :]
        x = tl.load(sums + chain[:, None] * n_tokens + tokens[None, :], mask=inside, other=0.0)
        acc = tl.dot(factor, x, acc, input_precision="tf32x3", out_dtype=tl.float32)
    return acc


@triton.jit
def _segment_sum(
    acc, x, tokens, n_tokens, words, scales, zeros, sums, first_block, last_block, first_group, scale_stride,
    BITS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, CHAIN: tl.constexpr,
    IN_LOOP: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc [ROWS, TOKENS] plus scales * (codes - zeros) @ x of blocks first_block .. last_block - 1 of one segment.

    ``x`` points at the WIDTH first prepared columns of each token, ``words`` at the first words of the segment's rows.
    """
    SPAN: tl.constexpr = _span(GROUP, WIDTH)
    PLANES: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    PARTS: tl.constexpr = 3 if BITS == 3 else 1
    if not IN_LOOP:
        COLUMNS: tl.constexpr = PLANES * WIDTH // CHAIN
        acc = _zero_sums(
            acc, tokens, n_tokens, scales, zeros, sums, first_block * COLUMNS, last_block * COLUMNS, first_group,
            scale_stride, GROUP, ZERO, CHAIN,
        )  # fmt: skip
    ahead = _chain_numbers(
        scales, zeros, sums, tokens, n_tokens, first_block, last_block, first_group, scale_stride, BITS,
        WIDTH, GROUP, ZERO, CHAIN, IN_LOOP,
    )  # fmt: skip
    for block in range(first_block, last_block):
        here = words + block * (PARTS * WIDTH)
        first = tl.load(here, eviction_policy="evict_first")
        second = first
        third = first
        if PARTS == 3:
            second = tl.load(here + WIDTH, eviction_policy="evict_first")
            third = tl.load(here + 2 * WIDTH, eviction_policy="evict_first")
        now = ahead
        ahead = _chain_numbers(
            scales, zeros, sums, tokens, n_tokens, block + 1, last_block, first_group, scale_stride, BITS,
            WIDTH, GROUP, ZERO, CHAIN, IN_LOOP,
        )  # fmt: skip
        for chain in tl.static_range(PLANES // SPAN):
            product = tl.zeros(acc.shape, tl.float32)
            if IN_LOOP and ZERO is not None:
                product += (now[2][chain] * (-ZERO / rescaled(BITS, chain * SPAN)))[None, :]
            for member in tl.static_range(SPAN):
                columns = x + (block * PLANES + chain * SPAN + member) * WIDTH
                loaded = tl.load(columns, mask=(tokens < n_tokens)[None, :], other=0.0)
                operand = plane_operand(first, second, third, chain * SPAN + member, BITS, ASM)
                product = tl.dot(operand, loaded, product, out_dtype=tl.float32)
            scale = now[0][chain].to(tl.float32)
            acc += (scale * rescaled(BITS, chain * SPAN))[:, None] * product
            if IN_LOOP and ZERO is None:
                acc -= (scale * now[1][chain].to(tl.float32))[:, None] * now[2][chain][None, :]
    return acc


PREFETCHED = tl.constexpr(2)  # blocks of words that are asked for before x is waited for


@triton.jit
def _prefetch(pointers):
    """Ask for what lies there to be brought into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0,0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["n_tokens"])
def product_kernel(
    x, words, scales, zeros, sums, factors, bias, y, partial, counters, n_tokens, n_rows, n_prepared, scale_stride,
    bias_stride, segments, BITS: tl.constexpr, WIDTHS: tl.constexpr, CONSTANT_ZEROS: tl.constexpr, GROUP: tl.constexpr,
    CHAIN: tl.constexpr, HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    IN_LOOP: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """y [n_tokens, n_rows] of what `prepare_kernel` made of x. Grid (row tiles, SPLITS, token tiles).

    Args:
        segments: per segment (word offset / 16, words per row / 16, blocks, blocks per split, first group, first
            prepared column / 16). The division shows the compiler that loads are aligned, without one compilation per
            value.
        bias_stride: 0, or n_rows where each token has its own.
        partial: float32 [token tiles, SPLITS, TOKENS, n_rows], any content; counters: zeros before and after.
        BITS, WIDTHS, CONSTANT_ZEROS: one entry per segment.
        IN_LOOP: whether zeros are subtracted chain by chain (few tokens) or by a product before (many).
    """
    if PDL:
        gdc_launch_dependents()
    row_tile = tl.program_id(0)
    split = tl.program_id(1)
    token_tile = tl.program_id(2)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    if ASM:
        for index in tl.static_range(len(BITS)):
            offset16, stride16, n_blocks, per_split, first_group, column16 = segments[index]
            columns = WIDTHS[index] * (16 if BITS[index] == 3 else 16 // BITS[index])
            step = WIDTHS[index] * (3 if BITS[index] == 3 else 1)
            starts = words + offset16.to(tl.int64) * 16 + rows.to(tl.int64) * (stride16 * 16)
            for line in tl.static_range(PREFETCHED):
                _prefetch(starts + tl.minimum(split * per_split + line, n_blocks - 1) * step)
            group = (split * per_split * columns) // GROUP + tl.arange(0, 64)
            last = tl.minimum((split + 1) * per_split, n_blocks) * columns - 1
            _prefetch(scales + (first_group + tl.minimum(group, last // GROUP)) * scale_stride + row_tile * ROWS)
    if PDL:
        gdc_wait()
    tokens = token_tile * TOKENS + tl.arange(0, TOKENS)
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for index in tl.static_range(len(BITS)):
        offset16, stride16, n_blocks, per_split, first_group, column16 = segments[index]
        inner = tl.arange(0, WIDTHS[index])
        acc = _segment_sum(
            acc, x + tokens.to(tl.int64)[None, :] * n_prepared + column16 * 16 + inner[:, None], tokens, n_tokens,
            words + offset16.to(tl.int64) * 16 + rows.to(tl.int64)[:, None] * (stride16 * 16) + inner[None, :],
            scales + rows, zeros + rows, sums + (column16 * 16 // CHAIN) * n_tokens,
            tl.minimum(split * per_split, n_blocks), tl.minimum((split + 1) * per_split, n_blocks), first_group,
            scale_stride, BITS[index], WIDTHS[index], GROUP, CONSTANT_ZEROS[index], CHAIN, IN_LOOP, ASM,
        )  # fmt: skip
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
        acc *= tl.load(factors + tokens, mask=tokens < n_tokens, other=0.0)[None, :]
        if HAS_BIAS:
            acc += tl.load(bias + tokens[None, :] * bias_stride + rows[:, None], mask=inside, other=0.0).to(tl.float32)
        out = y + tokens.to(tl.int64)[None, :] * n_rows + rows[:, None]
        tl.store(out, acc.to(y.dtype.element_ty), mask=inside)
