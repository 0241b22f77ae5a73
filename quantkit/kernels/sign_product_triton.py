"""Triton kernel for one row of x times packed signs, x made ready inside: one launch.

A warp takes 1024 columns, 32 words of each row, of which lane 4g + q has eight (as in bit_gemv_triton.py). It takes
their columns of x times the columns' scales, cuts them into 16 planes of bits relative to the largest of the 1024,
and a tensor core counts what these have in common with 16 rows. Columns may belong to several *paths*, side by side,
for each of which rows have a scale of their own: then the planes are taken once for each path, zero elsewhere.

The row may be the norm or the gated product of what is given: then two launches of a decoding step are one.
"""

# ruff: noqa: RUF005 - tuples are built by addition: Triton does not unpack
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.kernels.bit_sums_triton import UNIT, block_sums
from quantkit.kernels.byte_products_triton import four, stacked
from quantkit.kernels.row_planes_triton import bit_planes, load_columns, over_lanes, row_of, scaled_by


@triton.jit
def _load_rows(words, row, n_words, word, ROWS: tl.constexpr):
    """Of ROWS rows from ``row`` on: words ``word`` to word + 3 and word + 16 to word + 19."""
    loaded = ()
    for index in tl.static_range(ROWS):
        start = (row + index).to(tl.int64) * n_words
        for half in tl.static_range(2):
            place = word + half * 16
            source = words + (start + place)[:, None] + tl.arange(0, 4)[None, :]
            loaded = loaded + four(
                tl.load(source, mask=(place < n_words)[:, None], other=0, eviction_policy="evict_first")
            )
    return loaded


@triton.jit
def _path_bits(word, first, last, WIDTH: tl.constexpr):
    """Of each byte of the words from ``word`` on: ones where columns are from ``first`` on and before ``last``."""
    start = word // (WIDTH // 2) * (16 * WIDTH)
    begin = tl.minimum(tl.maximum((first - start) // (2 * WIDTH), 0), 8)
    end = tl.minimum(tl.maximum((last - start) // (2 * WIDTH), 0), 8)
    one = tl.zeros_like(word) + 1
    return ((one << end) - (one << begin)) * 0x01010101


@triton.jit
def _masked(planes, first_mask, second_mask):
    masked = ()
    for index in tl.static_range(8):
        masked = masked + (planes[index] & (first_mask if index < 4 else second_mask),)
    return masked


@triton.jit
def _shares(
    loaded, factors, planes, word, g, q, span, PATHS: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """What four planes of bits give for the lane's N rows."""
    low, high, totals, unit = planes
    shares = ()
    for _ in tl.static_range(N):
        shares = shares + (tl.zeros_like(unit),)
    for path in tl.static_range(PATHS):
        own_low = low
        own_high = high
        total = totals[0] + totals[1]
        if PATHS > 1:
            first_mask = _path_bits(word, path * span, (path + 1) * span, WIDTH)
            second_mask = _path_bits(word + 16, path * span, (path + 1) * span, WIDTH)
            own_low = _masked(low, first_mask, second_mask)
            own_high = _masked(high, first_mask, second_mask)
            total = ((first_mask >> g) & 1) * totals[0] + ((second_mask >> g) & 1) * totals[1]
        # of all lanes with this q, who has a quarter of the planes: the sum over q is that over all columns
        total = over_lanes(total, False, 2, ASM).to(tl.float32)
        sums = block_sums(loaded, own_low, own_high, q, 8 * N, ASM)
        following = ()
        for index in tl.static_range(N):
            signed = tl.math.fma(sums[index], 2.0 * UNIT, -total) * unit  # twice those where bits are 1, less all
            following = following + (tl.math.fma(signed, factors[path * N + index], shares[index]),)
        shares = following
    return shares


@triton.jit
def _load_factors(scales, row, n_rows, scale_stride, PATHS: tl.constexpr, N: tl.constexpr):
    """Scales of the lane's N rows from ``row`` on, path by path."""
    factors = ()
    for path in tl.static_range(PATHS):
        for index in tl.static_range(N):
            place = scales + path * scale_stride + row + index
            factors = factors + (tl.load(place, mask=row + index < n_rows, other=0.0).to(tl.float32),)
    return factors


@triton.jit(
    do_not_specialize=[
        "n_columns8", "n_scales16", "n_words8", "n_rows", "span", "each", "second", "third", "scale_stride", "stride4",
    ]
)  # fmt: skip
def sign_product_kernel(
    x, update, weight, residual, columns, words, scales, bias, y, eps, n_columns8, n_scales16, n_words8, n_rows, span,
    each, second, third, scale_stride, stride4, SOURCE: tl.constexpr, HAS_UPDATE: tl.constexpr, SCALED: tl.constexpr,
    PATHS: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, BF16: tl.constexpr, TILES: tl.constexpr,
    WARPS: tl.constexpr, PASSES: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """y [n_rows] = sum over paths of scales * (signs (columns * row)) + bias, for each token.
    Grid (n_rows / (16 * TILES), tokens).

    Args:
        SOURCE: what the row is, of n_columns8 * 8 columns. "row": x itself. "gated": silu(gate) * up of x, two such
            rows. "norm": weight * RMS norm of x + update, where the sum goes to ``residual``, another tensor than x.
            All are read as int32, two values at a time, stride4 * 4 of these for a token.
        columns: if SCALED, float16 scales of columns, n_scales16 * 16 for each ``each`` rows; as int32.
        second, third: otherwise, first rows that take the second and the third of the rows that x is of a token.
        words: planar-16 words of one bit, n_words8 * 8 of 32 bits in a row, at most 32 * WARPS * PASSES; planes of
            WIDTH columns.
        scales: of rows, any float dtype; those of the paths ``scale_stride`` apart, each of ``span`` columns, a
            multiple of 2 * WIDTH.
    """
    if PDL:
        gdc_launch_dependents()
    thread = tl.arange(0, 32 * WARPS)
    g = thread % 32 // 4
    q = thread % 4
    N: tl.constexpr = 2 * TILES
    first_row = tl.program_id(0) * (8 * N)
    n_words = n_words8 * 8
    n_columns = n_columns8 * 8
    token = tl.program_id(1)
    x += token * (stride4 * 4)
    if SOURCE == "norm":
        update += token * (stride4 * 4)
        residual += token * (stride4 * 4)
    if SCALED:
        columns += first_row // each * (n_scales16 * 8)
    else:
        x += ((first_row >= second).to(tl.int32) + (first_row >= third).to(tl.int32)) * (n_columns8 * 4)
    word = thread // 32 * 32 + q * 4
    row = first_row + g * N
    loaded = _load_rows(words, row, n_words, word, N)
    by_column = (0,)
    if SCALED:
        by_column = load_columns(columns, word, g, n_scales16 * 16, WIDTH)
    weights = (0,)
    if SOURCE == "norm":
        weights = load_columns(weight, word, g, n_columns, WIDTH)
    factors = _load_factors(scales, row, n_rows, scale_stride, PATHS, N)
    if PDL:  # weights are on their way; x may not be there yet
        gdc_wait()
    values = row_of(x, update, weights, residual, word, g, eps, n_columns, SOURCE, HAS_UPDATE, WIDTH, BF16)
    if SCALED:
        values = scaled_by(values, by_column)
    shares = _shares(loaded, factors, bit_planes(values, thread, ASM), word, g, q, span, PATHS, WIDTH, N, ASM)
    for _ in tl.static_range(1, PASSES):
        word += 32 * WARPS
        loaded = _load_rows(words, row, n_words, word, N)
        values = row_of(x, update, weights, residual, word, g, eps, n_columns, SOURCE, HAS_UPDATE, WIDTH, BF16)
        if SCALED:
            values = scaled_by(values, load_columns(columns, word, g, n_scales16 * 16, WIDTH))
        more = _shares(loaded, factors, bit_planes(values, thread, ASM), word, g, q, span, PATHS, WIDTH, N, ASM)
        total = ()
        for index in tl.static_range(N):
            total = total + (shares[index] + more[index],)
        shares = total
    lanes = tl.reshape(stacked(shares, N), (WARPS, 8, 4, N))
    result = tl.reshape(tl.sum(tl.sum(lanes, 2), 0), (8 * N,))
    rows = first_row + tl.arange(0, 8 * N)
    if HAS_BIAS:
        result += tl.load(bias + rows, mask=rows < n_rows, other=0.0).to(tl.float32)
    tl.store(y + token * n_rows + rows, result.to(y.dtype.element_ty), mask=rows < n_rows)
