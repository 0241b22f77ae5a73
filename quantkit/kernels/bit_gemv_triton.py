"""Triton kernel for few rows of x on one-bit planar-16 words (planar.py), with bit products (bit_products_triton.py,
bit_planes_triton.py, bit_sums_triton.py).

A warp takes 1024 columns, 32 words of each row of the weight, of which lane 4g + q has eight, and one or two rows of x.
A program does every so many-th tile of rows: x is prepared once, and the words of later tiles are on their way, to
registers, while one is multiplied. Warps are independent of each other: what they sum up stays with them until the
last tile, a number or two of a lane for each tile.
"""

# ruff: noqa: RUF005 - tuples are built by addition: Triton does not unpack
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.kernels.bit_planes_triton import prepared_x
from quantkit.kernels.bit_products_triton import of_lane_across
from quantkit.kernels.bit_sums_triton import UNIT, block_sums, group_sums, group_unit
from quantkit.kernels.byte_products_triton import four, stacked


@triton.jit
def _load_words(
    words, first_row, row_words, block, n_blocks, g, q, WIDTH: tl.constexpr, ONE_SCALE: tl.constexpr, ROWS: tl.constexpr
):
    """Of each tile of eight rows, row g: the lane's eight words, as [threads, 4] twice.

    The rows whose products a lane gets lie side by side: with one scale those that it loads, else 2q and 2q + 1 of
    each tile. ``block`` counts 1024 columns, ``n_blocks`` blocks of planes; no words are there beyond.
    """
    PARTS: tl.constexpr = 64 // WIDTH
    words += first_row.to(tl.int64) * row_words
    loaded = ()
    for tile in tl.static_range(ROWS // 8):
        row = g * (ROWS // 8) + tile if ONE_SCALE else g // 2 * (ROWS // 4) + 2 * tile + g % 2
        for half in tl.static_range(2):
            start = row * row_words + (block * 32 + half * 16 + q * 4)
            source = words + tl.multiple_of(start, 4)[:, None] + tl.arange(0, 4)[None, :]
            valid = block * PARTS + half * PARTS // 2 < n_blocks
            loaded = loaded + (tl.load(source, mask=valid[:, None], other=0, eviction_policy="evict_first"),)
    return loaded


@triton.jit
def _load_factors(
    numbers, first_row, stride4, block, n_blocks, g, q, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    ONE_SCALE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Scales (or zeros) of the lane's groups and rows, four float16 to an int64; the lane's first is the lowest."""
    PARTS: tl.constexpr = 64 // WIDTH
    numbers += first_row // 4
    loaded = ()
    for part in tl.static_range(PARTS):
        valid = block * PARTS + part < n_blocks
        column = block * 1024 + part * (16 * WIDTH)
        if ONE_SCALE and ROWS == 16:
            place = numbers + column // GROUP * stride4 + g // 2
            loaded = loaded + (tl.load(place, mask=valid, other=0) >> (g % 2 * 32).to(tl.int64),)
        elif ONE_SCALE:
            for quad in tl.static_range(ROWS // 32):
                place = numbers + column // GROUP * stride4 + g * (ROWS // 32) + quad
                loaded = loaded + (tl.load(place, mask=valid, other=0),)
        else:
            for quad in tl.static_range(ROWS // 16):
                place = numbers + (column + g // PARTS * 128) // GROUP * stride4 + q * (ROWS // 16) + quad
                loaded = loaded + (tl.load(place, mask=valid, other=0),)
    return loaded


@triton.jit
def _factor(factors, row: tl.constexpr):
    return (factors[row // 4] >> (16 * (row % 4))).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load_tile(
    words, scales, zeros, first_row, row_words, stride4, block, n_blocks, g, q, GROUP: tl.constexpr,
    ZERO: tl.constexpr, WIDTH: tl.constexpr, ONE_SCALE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    loaded = _load_words(words, first_row, row_words, block, n_blocks, g, q, WIDTH, ONE_SCALE, ROWS)
    factors = _load_factors(scales, first_row, stride4, block, n_blocks, g, q, GROUP, WIDTH, ONE_SCALE, ROWS)
    if ZERO is None:
        offsets = _load_factors(zeros, first_row, stride4, block, n_blocks, g, q, GROUP, WIDTH, ONE_SCALE, ROWS)
    else:
        offsets = factors
    return loaded, factors, offsets


@triton.jit
def _row_products(
    loaded, factors, offsets, prepared, g, q, ZERO: tl.constexpr, WIDTH: tl.constexpr, ONE_SCALE: tl.constexpr,
    X_BITS: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The lane's part of the product, for each of its rows, over `UNIT`."""
    OWN: tl.constexpr = ROWS // 8 if ONE_SCALE else ROWS // 4
    FACTORS: tl.constexpr = (OWN + 3) // 4 * 4  # of a block
    words = ()
    for index in tl.static_range(ROWS // 4):
        words = words + four(loaded[index])
    totals = ()
    for _ in tl.static_range(OWN):
        totals = totals + (tl.zeros_like(g).to(tl.float32),)
    for part in tl.static_range(64 // WIDTH):
        planes, offset, unit = prepared[part]
        if ONE_SCALE:
            sums = block_sums(words, planes[0], planes[1], q, ROWS, ASM)
            sums_unit = unit
        else:
            sums = group_sums(words, planes, g, part, WIDTH, X_BITS, ROWS, ASM)
            sums_unit = unit * group_unit(g, WIDTH)
        taken = offset * (1.0 / UNIT) * unit
        following = ()
        for row in tl.static_range(OWN):
            # spelled out, or the compiler chooses which of two products it rounds, differently from shape to shape
            if ZERO is None:
                product = tl.math.fma(-taken, _factor(offsets, part * FACTORS + row), sums[row] * sums_unit)
            else:
                product = tl.math.fma(sums[row], sums_unit, -taken * ZERO)
            following = following + (tl.math.fma(product, _factor(factors, part * FACTORS + row), totals[row]),)
        totals = following
    return totals


@triton.jit
def _shared(values, thread, LANES: tl.constexpr, ASM: tl.constexpr):
    """Sums over lanes across from each other: the first half of the values for one of them, the others for the other;
    of a single value, for both."""
    N: tl.constexpr = len(values)
    upper = (thread & LANES) != 0
    following = ()
    for index in tl.static_range((N + 1) // 2):
        kept = values[index]
        passed = values[index]
        if N > 1:
            kept = tl.where(upper, values[N // 2 + index], values[index])
            passed = tl.where(upper, values[index], values[N // 2 + index])
        passed = of_lane_across(passed.to(tl.int32, bitcast=True), LANES, ASM)
        following = following + (kept + passed.to(tl.float32, bitcast=True),)
    return following


@triton.jit
def _warp_sums(products, thread, ONE_SCALE: tl.constexpr, ASM: tl.constexpr):
    """Of a tile: sums over the lanes that share rows, those of one g with one scale, else those of one q."""
    if ONE_SCALE:
        return _shared(_shared(products, thread, 2, ASM), thread, 1, ASM)
    else:
        return _shared(_shared(_shared(products, thread, 16, ASM), thread, 8, ASM), thread, 4, ASM)


@triton.jit
def _tile_sums(
    tile, prepared, thread, ZERO: tl.constexpr, WIDTH: tl.constexpr, ONE_SCALE: tl.constexpr, X_BITS: tl.constexpr,
    ROWS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """For each row of x that the warp has prepared: the warp's part of the products, each lane with rows of its own."""
    sums = ()
    for token in tl.static_range(len(prepared)):
        products = _row_products(
            tile[0], tile[1], tile[2], prepared[token], thread % 32 // 4, thread % 4, ZERO, WIDTH, ONE_SCALE, X_BITS,
            ROWS, ASM,
        )  # fmt: skip
        sums = sums + _warp_sums(products, thread, ONE_SCALE, ASM)
    return sums


@triton.jit
def _nothing(thread, N: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(N):
        zeros = zeros + (tl.zeros_like(thread).to(tl.float32),)
    return zeros


@triton.jit
def _pushed(sums, results):
    """``sums`` in front of the results, whose last fall out."""
    following = sums
    for index in tl.static_range(len(results) - len(sums)):
        following = following + (results[index],)
    return following


@triton.jit
def _span_sums(
    queue, prepared, words, scales, zeros, first_tile, end, programs, n_tiles, row_words, stride4, block, n_blocks,
    thread, GROUP: tl.constexpr, ZERO: tl.constexpr, WIDTH: tl.constexpr, ONE_SCALE: tl.constexpr, X_BITS: tl.constexpr,
    ROWS: tl.constexpr, EACH: tl.constexpr, SLOTS: tl.constexpr, AHEAD: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """`_tile_sums` of every so many-th tile from the first to ``end``, the last in front, and the queue of later tiles.

    A turn takes as many tiles as the queue has room for, so that words stay in the registers they are loaded to: a move
    to another one would wait for them.
    """
    g = thread % 32 // 4
    q = thread % 4
    results = _nothing(thread, SLOTS * EACH * ((ROWS + 31) // 32))
    for here in range(first_tile, end, (AHEAD + 1) * programs):
        for step in tl.static_range(AHEAD + 1):
            tile = here + step * programs
            following = tile + AHEAD * programs
            there = tl.where(following < n_tiles, n_blocks, 0)
            later = _load_tile(
                words, scales, zeros, following * ROWS, row_words, stride4, block, there, g, q, GROUP, ZERO, WIDTH,
                ONE_SCALE, ROWS,
            )  # fmt: skip
            queue = queue + (later,)
            if tile < n_tiles:
                sums = _tile_sums(queue[step], prepared, thread, ZERO, WIDTH, ONE_SCALE, X_BITS, ROWS, ASM)
                results = _pushed(sums, results)
        queue = queue[AHEAD + 1 :]
    return results, queue


@triton.jit
def _last_sum(values, ROWS: tl.constexpr, N: tl.constexpr):
    if N == 1:
        return tl.reshape(values, (ROWS,))
    else:
        first, second = tl.split(tl.reshape(values, (ROWS * N // 2, 2)))
        return _last_sum(first + second, ROWS, N // 2)


@triton.jit
def _store_rows(
    y, bias, results, first_tile, programs, end, first_token, n_tokens, n_rows, HAS_BIAS: tl.constexpr,
    ONE_SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, TOKENS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """The sums over the warps of a row of x, of every so many-th tile before ``end``; the last tile comes first."""
    OWN: tl.constexpr = ROWS // 8 if ONE_SCALE else ROWS // 4
    LANES: tl.constexpr = 4 if ONE_SCALE else 8  # that shared OWN rows
    N: tl.constexpr = (OWN + LANES - 1) // LANES  # rows of a tile that a lane ends with
    warps = tl.reshape(stacked(results, len(results)), (TOKENS, BLOCKS, 32 * len(results)))
    total = UNIT * _last_sum(tl.permute(warps, (0, 2, 1)), TOKENS * 32 * len(results), BLOCKS)
    total = tl.reshape(total, (TOKENS, 32, len(results)))
    lane = tl.arange(0, 32)[None, :, None]
    owner = lane // 4 if ONE_SCALE else lane % 4
    among = lane % 4 if ONE_SCALE else lane // 4
    number = tl.arange(0, len(results))[None, None, :]
    age = number // (N * EACH)
    tile = first_tile + (tl.cdiv(end - first_tile, programs) - 1 - age) * programs
    rows = tile * ROWS + owner * OWN + among * OWN // LANES + number % N
    token = first_token + tl.arange(0, TOKENS)[:, None, None] * EACH + number // N % EACH
    there = (tile >= first_tile) & (rows < n_rows) & (token < n_tokens)
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=there, other=0.0).to(tl.float32)
    tl.store(y + (token.to(tl.int64) * n_rows + rows), total.to(y.dtype.element_ty), mask=there)


@triton.jit
def bit_gemv_kernel(
    x, words, scales, zeros, bias, y, copies, n_tokens, n_rows, n_columns, row_words16, n_blocks, stride4, n_tiles,
    GROUP: tl.constexpr, ZERO: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, COPY_ROWS: tl.constexpr,
    BF16: tl.constexpr, X_BITS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, TOKENS: tl.constexpr,
    EACH: tl.constexpr, ONE_SCALE: tl.constexpr, SLOTS: tl.constexpr, SPANS: tl.constexpr,
    AHEAD: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """y [tokens, n_rows] = x [tokens, n_columns] @ weight^T + bias. Grid (programs, parts of TOKENS times EACH tokens),
    TOKENS times BLOCKS warps, each for EACH rows of x.

    Args:
        x: read as int32, two values at a time; words: likewise.
        scales, zeros: float16, four rows read as one int64. ``stride4``: of a group, in those.
        copies: the row of x for each COPY_ROWS rows of the weight, which programs have a tile each of; COPY_ROWS is
            None: all rows of x.
        row_words16: 32-bit words of a row / 16, so that rows are known to begin on a boundary.
        ZERO: the zero of all groups; None: ``zeros`` are read.
        SLOTS: tiles that a program does before it stores what it has. ``SPANS``: some programs have more.
        AHEAD: tiles whose words are on their way while one is multiplied: 1 to 3.
    """
    if PDL:
        gdc_launch_dependents()
    thread = tl.arange(0, 32 * BLOCKS * TOKENS)
    g = thread % 32 // 4
    q = thread % 4
    block = thread // 32 % BLOCKS
    row_words = row_words16 * 16
    first_tile = tl.program_id(0)
    programs = tl.num_programs(0)
    first_token = tl.program_id(1) * (TOKENS * EACH)
    queue = (
        _load_tile(
            words, scales, zeros, first_tile * ROWS, row_words, stride4, block, n_blocks, g, q, GROUP, ZERO, WIDTH,
            ONE_SCALE, ROWS,
        ),
    )  # fmt: skip
    for number in tl.static_range(1, AHEAD if SLOTS > 1 else 1):
        tile = first_tile + number * programs
        there = tl.where(tile < n_tiles, n_blocks, 0)
        later = _load_tile(
            words, scales, zeros, tile * ROWS, row_words, stride4, block, there, g, q, GROUP, ZERO, WIDTH, ONE_SCALE,
            ROWS,
        )  # fmt: skip
        queue = queue + (later,)
    if PDL:  # weights are on their way; x may not be there yet
        gdc_wait()
    prepared = ()
    for number in tl.static_range(EACH):
        if COPY_ROWS is None:
            token = tl.minimum(first_token + thread // (32 * BLOCKS) * EACH + number, n_tokens - 1)
        else:
            token = tl.zeros_like(thread) + tl.load(copies + first_tile * ROWS // COPY_ROWS)
        ready = prepared_x(x, token, n_columns, block, thread, g, q, WIDTH, ONE_SCALE, BF16, X_BITS, ASM)
        prepared = prepared + (ready,)
    if SLOTS == 1:
        results = _tile_sums(queue[0], prepared, thread, ZERO, WIDTH, ONE_SCALE, X_BITS, ROWS, ASM)
        _store_rows(
            y, bias, results, first_tile, programs, n_tiles, first_token, n_tokens, n_rows, HAS_BIAS, ONE_SCALE, ROWS,
            BLOCKS, TOKENS, EACH,
        )  # fmt: skip
    elif not SPANS:
        results, queue = _span_sums(
            queue, prepared, words, scales, zeros, first_tile, n_tiles, programs, n_tiles, row_words, stride4, block,
            n_blocks, thread, GROUP, ZERO, WIDTH, ONE_SCALE, X_BITS, ROWS, EACH, SLOTS, AHEAD, ASM,
        )  # fmt: skip
        _store_rows(
            y, bias, results, first_tile, programs, n_tiles, first_token, n_tokens, n_rows, HAS_BIAS, ONE_SCALE, ROWS,
            BLOCKS, TOKENS, EACH,
        )  # fmt: skip
    else:
        span = SLOTS // (AHEAD + 1) * (AHEAD + 1) * programs
        for start in range(first_tile, n_tiles, span):
            end = tl.minimum(start + span, n_tiles)
            results, queue = _span_sums(
                queue, prepared, words, scales, zeros, start, end, programs, n_tiles, row_words, stride4, block,
                n_blocks, thread, GROUP, ZERO, WIDTH, ONE_SCALE, X_BITS, ROWS, EACH, SLOTS, AHEAD, ASM,
            )  # fmt: skip
            _store_rows(
                y, bias, results, start, programs, end, first_token, n_tokens, n_rows, HAS_BIAS, ONE_SCALE, ROWS,
                BLOCKS, TOKENS, EACH,
            )  # fmt: skip
