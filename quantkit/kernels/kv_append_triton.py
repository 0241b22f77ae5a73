"""Triton kernel that codes tokens into pages: transform, grid, codes and packing in one launch.

A program owns the words of one page and head, so that fields of one word are written by one program: it goes through
the planes of the page, codes the tokens that fall into each (zero elsewhere), and ORs the fields into the words. Every
token is coded on its own: the bytes do not depend on how many come together. The torch twin is algorithms/kv/coding.py;
sums in another order make a code differ where a value lies halfway between two.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.kv_attention_triton import PAGE
from quantkit.kernels.kv_rotation_triton import rotate_rows

MIN_SCALE = tl.constexpr(2.0**-14)
MAX_FLOAT16 = tl.constexpr(65504.0)


@triton.jit
def _round(x):
    """To the nearest integer, ties to even, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _nearest(x, scale, MIDDLE: tl.constexpr):
    level = _round(x / tl.maximum(scale, MIN_SCALE)[:, None] + MIDDLE)
    return tl.minimum(tl.maximum(level, 0.0), 2 * MIDDLE) - MIDDLE


@triton.jit
def _encode(x, clip, START: tl.constexpr, BITS: tl.constexpr, OFFSETS: tl.constexpr):
    """(codes [n, D] int32, scales [n], offsets [n]) of float32 x [n, D], a grid per row; coding.py says how."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    MIDDLE: tl.constexpr = LEVELS / 2
    if OFFSETS:
        low = tl.min(x, 1)
        high = tl.max(x, 1)
        reach = (high - low) * (clip / 2)
        offset = ((low + high) / 2 - reach).to(tl.float16)
        scale = tl.maximum(2 * reach / LEVELS, MIN_SCALE).to(tl.float16)
        code = _round((x - offset.to(tl.float32)[:, None]) / scale.to(tl.float32)[:, None])
        code = tl.minimum(tl.maximum(code, 0.0), LEVELS)
        return code.to(tl.int32), scale, offset
    else:
        square = tl.sum(x * x, 1)
        step = tl.sqrt(square / x.shape[1]) * START
        for _ in tl.static_range(3):
            level = _nearest(x, step, MIDDLE)
            step = tl.sum(x * level, 1) / tl.sum(level * level, 1)
        level = _nearest(x, step, MIDDLE)
        step = square / tl.maximum(tl.sum(x * level, 1), MIN_SCALE)
        scale = tl.minimum(tl.maximum(step, MIN_SCALE), MAX_FLOAT16).to(tl.float16)
        return (level + MIDDLE).to(tl.int32), scale, scale


@triton.jit(do_not_specialize=["start", "n_tokens", "word_stride", "scale_stride"])
def append_kernel(
    tokens, mean, channel_scales, words, scales, offsets, start, n_tokens, clip, token_stride, word_stride,
    scale_stride,
    D: tl.constexpr, BITS: tl.constexpr, IS_KEY: tl.constexpr, ROTATE: tl.constexpr, OFFSETS: tl.constexpr,
    MEAN: tl.constexpr, CHANNEL_SCALES: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Grid (pages from the one that holds slot `start` on, heads). tokens float16 [heads, n_tokens, D] go to slots
    start .. start + n_tokens - 1; mean and channel_scales float16 [heads, D]."""
    FIELDS: tl.constexpr = 16 // BITS
    RUN: tl.constexpr = PAGE // FIELDS
    page = start // PAGE + tl.program_id(0)
    head = tl.program_id(1)
    run = tl.arange(0, RUN)
    channel = tl.arange(0, D)
    joined = tl.zeros((RUN, D), tl.int32)
    for field in range(FIELDS):  # not unrolled: eight rotations would take a minute to compile
        slot = page * PAGE + field * RUN + run
        inside = (slot >= start) & (slot < start + n_tokens)
        row = tokens + head.to(tl.int64) * token_stride + (slot - start).to(tl.int64)[:, None] * D + channel[None, :]
        x = tl.load(row, mask=inside[:, None], other=0.0).to(tl.float32)
        if MEAN:
            x -= tl.load(mean + head * D + channel).to(tl.float32)[None, :]
        if CHANNEL_SCALES:
            x /= tl.load(channel_scales + head * D + channel).to(tl.float32)[None, :]
        if ROTATE:
            x = rotate_rows(x, D)
        code, scale, offset = _encode(x, clip, START, BITS, OFFSETS)
        joined |= tl.where(inside[:, None], code, 0) << (field * BITS)
        place = head * scale_stride + page * PAGE + run * FIELDS + field
        tl.store(scales + place, scale, mask=inside)
        if OFFSETS:
            tl.store(offsets + place, offset, mask=inside)
    base = words + head.to(tl.int64) * word_stride + page.to(tl.int64) * (RUN * D)
    if IS_KEY:
        target = base + run[:, None] * D + channel[None, :]
        held = tl.load(target)
        tl.store(target, held | joined.to(tl.int16))
    else:
        target = base + channel[:, None] * RUN + run[None, :]
        held = tl.load(target)
        tl.store(target, held | tl.trans(joined).to(tl.int16))
