"""Triton kernels of the sign formats. Imported on first use: `import quantkit` does not need Triton.

Sign matrices are one-bit weights on planar-16 words (planar.py); their products are those of `grouped_int`'s kernels.
What is new here is small: activations brought into the order and the scale of the packed columns, latents between two
sign matrices, and a binary and an integer segment in one launch.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.grouped_int_triton import _segment_sum


@triton.jit(do_not_specialize=["n_tokens"])
def prepare_kernel(
    x, order, scales, out, n_tokens, n_columns, n_out, ORDERED: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """out [paths * n_tokens, n_out]: x [n_tokens, n_columns] in another column order, times a scale per path.

    ``scales`` is 0 for columns of out that are padding. Grid (paths * n_tokens, column tiles).
    """
    row = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < n_out
    source = columns
    if ORDERED:
        source = tl.load(order + columns, mask=inside, other=0).to(tl.int32)
    token = row % n_tokens
    path = row // n_tokens
    value = tl.load(x + token.to(tl.int64) * n_columns + source, mask=inside & (source < n_columns), other=0.0)
    scale = tl.load(scales + path * n_out + columns, mask=inside, other=0.0)
    scaled = (value.to(tl.float32) * scale.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + row.to(tl.int64) * n_out + columns, scaled, mask=inside)


@triton.jit(do_not_specialize=["n_tokens"])
def latent_kernel(z, scales, out, n_tokens, n_latents, span, COLUMNS: tl.constexpr):
    """out [n_tokens, n_latents]: of each latent, the product with the activations of its path, times its scale.

    z is [paths * n_tokens, n_latents]: all latents for the activations of all paths. Path p owns latents
    p * span .. (p + 1) * span - 1. Grid (n_tokens, column tiles).
    """
    token = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < n_latents
    row = token + columns // span * n_tokens
    value = tl.load(z + row.to(tl.int64) * n_latents + columns, mask=inside, other=0.0)
    scaled = value * tl.load(scales + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token.to(tl.int64) * n_latents + columns, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_tokens", "sign_part", "salient_part"])
def sign_salient_kernel(
    x, sign_words, sign_scales, sign_zeros, words, scales, zeros, bias, y, partial, counters, n_tokens, n_rows,
    n_columns, first_salient, scale_stride, sign_part, salient_part, SIGN_WIDTH: tl.constexpr,
    SIGN_RAGGED: tl.constexpr, SIGN_GROUP: tl.constexpr, SIGN_ZERO: tl.constexpr, HAS_SALIENT: tl.constexpr,
    BITS: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y [n_tokens, n_rows] = x [n_tokens, n_columns] @ [signs | codes]^T + bias. Grid (row tiles, SPLITS, token tiles).

    Args:
        x: as `prepare_kernel` leaves it: columns with signs, then from ``first_salient`` on the salient ones.
        sign_part, salient_part: (words per row / 16, blocks, blocks per split, splits, planes) of either segment.
        partial: float32 [token tiles, SPLITS, TOKENS, n_rows], any content; counters: zeros before and after.
    """
    row_tile = tl.program_id(0)
    split = tl.program_id(1)
    token_tile = tl.program_id(2)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    tokens = token_tile * TOKENS + tl.arange(0, TOKENS)
    BF16: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    x_rows = x + tokens.to(tl.int64)[None, :] * n_columns
    stride16, n_blocks, per_split, n_splits, n_planes = sign_part
    first_block = tl.minimum(split, n_splits) * per_split  # beyond the splits of this segment: no block is visited
    last_block = tl.minimum(tl.minimum(split + 1, n_splits) * per_split, n_blocks)
    inner = tl.arange(0, SIGN_WIDTH)
    acc = _segment_sum(
        acc, x_rows + inner[:, None], tokens, n_tokens,
        sign_words + rows.to(tl.int64)[:, None] * (stride16 * 16) + inner[None, :],
        sign_scales + rows, sign_zeros + rows, sign_words, first_block, last_block, 0, n_planes, scale_stride,
        1, SIGN_WIDTH, SIGN_RAGGED, SIGN_GROUP, SIGN_ZERO, False, BF16, ASM,
    )  # fmt: skip
    if HAS_SALIENT:
        local = split - n_splits
        stride16, n_blocks, per_split, n_splits, n_planes = salient_part
        first_block = tl.maximum(local, 0) * per_split
        last_block = tl.minimum(tl.minimum(tl.maximum(local + 1, 0), n_splits) * per_split, n_blocks)
        inner = tl.arange(0, WIDTH)
        acc = _segment_sum(
            acc, x_rows + first_salient + inner[:, None], tokens, n_tokens,
            words + rows.to(tl.int64)[:, None] * (stride16 * 16) + inner[None, :],
            scales + rows, zeros + rows, words, first_block, last_block, 0, n_planes, scale_stride,
            BITS, WIDTH, RAGGED, GROUP, ZERO, False, BF16, ASM,
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
        if HAS_BIAS:
            acc += tl.load(bias + rows, mask=rows < n_rows, other=0.0).to(tl.float32)[:, None]
        out = y + tokens.to(tl.int64)[None, :] * n_rows + rows[:, None]
        tl.store(out, acc.to(y.dtype.element_ty), mask=inside)
