"""Triton kernel for the first product of `sign_factors`: one row of x times a sign matrix of few rows.

The threads of a program lie along the columns, each with one 32-bit word of every row: 32 signs. Few columns per thread
mean little work on x per thread, and that work, not the signs, is what such a matrix takes.
"""

# ruff: noqa: RUF005 - tuples are built by addition: Triton does not unpack
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.kernels.byte_products_triton import TINY, field_mask, field_unit, float_slices, half_to_float, word_dot
from quantkit.kernels.gemv_triton import _stacked

PAIRS = tl.constexpr(8)  # of planes, in a word of one-bit fields


@triton.jit(do_not_specialize=["n_rows", "stride16", "n_threads", "n_planes", "span", "factor_stride"])
def latent_product_kernel(
    x, factors, words, scales, y, n_rows, stride16, n_threads, n_planes, span, factor_stride, WIDTH: tl.constexpr,
    BF16: tl.constexpr, ROWS: tl.constexpr, THREADS: tl.constexpr, CHUNKS: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """y [n_rows] = scales * (signs [n_rows, columns] @ (factors * x)), each ``span`` rows with factors of their own.

    Args:
        x: int32, two columns to a number, up to the padding of the signs.
        factors: int32, two float16 scales to a number; ``factor_stride`` numbers for each span of rows, 0 in padding.
        words: planar-16 of one bit, row stride ``16 * stride16`` words, ``n_threads`` pairs of words with columns.
        scales: float32 [n_rows]. n_rows and span are multiples of ROWS. Grid (n_rows / ROWS,).
    """
    if PDL:
        gdc_launch_dependents()
    thread = tl.arange(0, THREADS)
    first_row = tl.program_id(0) * ROWS
    factors += first_row // span * factor_stride
    HALF: tl.constexpr = WIDTH // 2  # two columns to a number
    rows = first_row + tl.arange(0, ROWS)
    scale = tl.load(scales + rows)
    loaded = ()
    for chunk in tl.static_range(CHUNKS):
        column = chunk * THREADS + thread
        for row in tl.static_range(ROWS):
            source = words + (first_row + row).to(tl.int64) * (stride16 * 8) + column
            loaded = loaded + (tl.load(source, mask=column < n_threads, other=0, eviction_policy="evict_first"),)
    totals = ()
    for _ in tl.static_range(ROWS):
        totals = totals + (tl.zeros((THREADS,), tl.float32),)
    for chunk in tl.static_range(CHUNKS):
        column = chunk * THREADS + thread
        first_plane = column // HALF * (2 * PAIRS)
        known = ()
        for plane in tl.static_range(2 * PAIRS):
            inside = (column < n_threads) & (first_plane + plane < n_planes)
            place = (first_plane + plane) * HALF + column % HALF
            known = known + (tl.load(factors + place, mask=inside, other=0),)
        if PDL and chunk == 0:  # signs and scales are on their way; x may not be there yet
            gdc_wait()
        firsts = ()
        seconds = ()
        top = tl.full((THREADS,), TINY, tl.float32)
        for plane in tl.static_range(2 * PAIRS):
            inside = (column < n_threads) & (first_plane + plane < n_planes)
            two = tl.load(x + (first_plane + plane) * HALF + column % HALF, mask=inside, other=0)
            first = half_to_float(two & 0xFFFF, BF16) * half_to_float(known[plane] & 0xFFFF, False)
            second = half_to_float((two >> 16) & 0xFFFF, BF16) * half_to_float((known[plane] >> 16) & 0xFFFF, False)
            top = tl.maximum(top, tl.maximum(tl.abs(first), tl.abs(second), tl.PropagateNan.ALL), tl.PropagateNan.ALL)
            firsts = firsts + (first,)
            seconds = seconds + (second,)
        inverse = 32512.0 / top
        highs = ()
        lows = ()
        sums = tl.zeros((THREADS,), tl.int32)
        ones = tl.full((THREADS,), 0x01010101, tl.int32)
        for pair in tl.static_range(PAIRS):
            high, low = float_slices(
                firsts[2 * pair], firsts[2 * pair + 1], seconds[2 * pair], seconds[2 * pair + 1], inverse, ASM
            )
            highs = highs + (high,)
            lows = lows + (low,)
            sums += word_dot(ones, high, low, 0x01010101, ASM)
        results = ()
        for row in tl.static_range(ROWS):
            total = -sums.to(tl.float32)  # of signs: twice what the bits give, without all
            for pair in tl.static_range(PAIRS):
                product = word_dot(loaded[chunk * ROWS + row], highs[pair], lows[pair], field_mask(1, pair), ASM)
                total += product.to(tl.float32) * (2 * field_unit(1, pair))
            results = results + (totals[row] + total * (top * (1.0 / 32512.0)),)
        totals = results
    total = tl.sum(tl.reshape(_stacked(totals, ROWS), (THREADS, ROWS)), 0) * scale
    tl.store(y + rows, total.to(y.dtype.element_ty), mask=rows < n_rows)
