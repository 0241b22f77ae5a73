"""Triton kernel for one or two rows of x times planar-16 words of several widths (planar.py), by byte products of the
tensor core (byte_columns_triton.py).

Segments of few columns have few words in a row: threads that lie along a row, as in gemv_triton.py, would mostly have
none. Here the four lanes 4g, .., 4g + 3 of a warp walk along OWN rows, through all segments, so a sum is finished once
and in one place; the warps of a program share the columns. x comes in byte slices from the launch before
(mixed_cut_triton.py).

The tensor core multiplies 16 rows of masked words by 8 columns: column 2i is the high slices of the i-th pair of planes
of a set, 2i + 1 the low ones, and the other columns are zeros while the fields of that pair are multiplied. So four
pairs end up side by side, and lane q has the sums of the q-th for its rows: it scales those and no others. With planes
of 16 columns a set is two pairs of either half of a chunk.
"""

# ruff: noqa: RUF005 - tuples are built by addition: Triton does not unpack
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.kernels.byte_columns_triton import byte_product
from quantkit.kernels.byte_products_triton import field_mask, four, pairs_of, stacked
from quantkit.kernels.gemv_triton import row_words
from quantkit.kernels.mixed_cut_triton import halves_of, sets_of


@triton.constexpr_function
def _parts(bits):
    return 3 if bits == 3 else 1


@triton.jit
def _load_numbers(
    numbers, row, stride, first_group, n_blocks, chunk, q, BITS: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Scales (or zeros) of the groups that lane q has the sums of, a set after the other; of OWN neighbouring rows."""
    PAIRS: tl.constexpr = pairs_of(BITS)
    PER: tl.constexpr = 4 // halves_of(WIDTH)
    thread = chunk * 4 + q // PER * 2
    loaded = ()
    for index in tl.static_range(sets_of(BITS, WIDTH)):
        pair = index * PER + q % PER % PAIRS
        group = first_group + (thread // (WIDTH // 8) * PAIRS + pair) * (2 * WIDTH) // GROUP
        place = numbers + group * stride + row // OWN
        loaded = loaded + (tl.load(place, mask=thread < n_blocks * (WIDTH // 8), other=0),)
    return loaded


@triton.jit
def _load_codes(
    words, scales, zeros, row, stride, first_group, n_blocks, chunk, q, BITS: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Each lane's four words of its OWN rows (3 bits: of each of the three parts), and their scales and zeros.

    Masked, or the compiler would move the loads to where their results are needed.
    """
    PARTS: tl.constexpr = _parts(BITS)
    thread = chunk * 4 + q
    valid = thread < n_blocks * (WIDTH // 8)
    place = thread // (WIDTH // 8) * (PARTS * (WIDTH // 2)) + thread % (WIDTH // 8) * 4
    if PARTS == 1:
        place = thread * 4
    loaded = ()
    for number in tl.static_range(OWN):
        start = words + ((row + number).to(tl.int64) * (n_blocks * (PARTS * (WIDTH // 2))) + place)[:, None]
        for part in tl.static_range(PARTS):
            source = start + part * (WIDTH // 2) + tl.arange(0, 4)[None, :]
            loaded = loaded + (tl.load(source, mask=valid[:, None], other=0, eviction_policy="evict_first"),)
    factors = _load_numbers(scales, row, stride, first_group, n_blocks, chunk, q, BITS, WIDTH, GROUP, OWN)
    offsets = factors
    if ZERO is None:
        offsets = _load_numbers(zeros, row, stride, first_group, n_blocks, chunk, q, BITS, WIDTH, GROUP, OWN)
    return loaded, factors, offsets


@triton.jit
def _load_chunks(
    words, scales, zeros, row, stride, first_group, n_blocks, chunk, q, BITS: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, OWN: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """`_load_codes` of the first STEPS chunks of each warp, at least one."""
    loaded = ()
    for step in tl.static_range(STEPS if STEPS > 0 else 1):
        loaded = loaded + (
            _load_codes(
                words, scales, zeros, row, stride, first_group, n_blocks, chunk + step * WARPS, q, BITS, WIDTH, GROUP,
                ZERO, OWN,
            ),
        )  # fmt: skip
    return loaded


@triton.jit
def _unpacked(packed, COUNT: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """The numbers of COUNT rows that were loaded as one: float16, or bytes."""
    if HALF and COUNT == 4 and ASM:
        return tl.inline_asm_elementwise(
            "{.reg .b32 u,v; .reg .b16 a,b,c,d; mov.b64 {u,v},$4; mov.b32 {a,b},u; mov.b32 {c,d},v; "
            "cvt.f32.f16 $0,a; cvt.f32.f16 $1,b; cvt.f32.f16 $2,c; cvt.f32.f16 $3,d;}",
            "=f,=f,=f,=f,l", [packed], dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        numbers = ()
        for row in tl.static_range(COUNT):
            if HALF:
                numbers = numbers + ((packed >> (16 * row)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),)
            else:
                numbers = numbers + (((packed >> (8 * row)) & 0xFF).to(tl.float32),)
        return numbers


@triton.jit
def _joined(high, low):
    return (high * 256 + low).to(tl.float32)


@triton.jit
def _multiplied(
    totals, codes, slices, numbers, n_chunks, chunk, g, q, BITS: tl.constexpr, WIDTH: tl.constexpr, ZERO: tl.constexpr,
    HALF: tl.constexpr, OWN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """totals of each row plus the lane's share of scale * (code - zero) * x over a chunk, for one row of x."""
    PAIRS: tl.constexpr = pairs_of(BITS)
    PER: tl.constexpr = 4 // halves_of(WIDTH)
    SETS: tl.constexpr = sets_of(BITS, WIDTH)
    loaded, scales, zeros = codes
    chunk = tl.minimum(chunk, n_chunks - 1)  # scales beyond are zeros
    own = g // 2 % PER
    nothing = tl.zeros_like(q)
    for index in tl.static_range(SETS):
        pair = chunk * PAIRS + index * PER + own % PAIRS
        column = slices + (pair * 32 + g % 2 * 16 + q * 4)[:, None] + tl.arange(0, 4)[None, :]
        if WIDTH == 16:
            column = four(tl.load(column, mask=(g // 2 // PER == q // 2)[:, None], other=0))
        else:
            column = four(tl.load(column))
        sums = ()
        for _ in tl.static_range(OWN // 2):
            sums = sums + ((nothing, nothing, nothing, nothing),)
        for member in tl.static_range(PER if PER < PAIRS else PAIRS):
            mine = own == member
            columns = ()
            for word in tl.static_range(4):
                columns = columns + (tl.where(mine, column[word], 0),)
            following = ()
            for couple in tl.static_range(OWN // 2):
                following = following + (
                    byte_product(
                        row_words(loaded, 2 * couple, index * PER + member, BITS),
                        row_words(loaded, 2 * couple + 1, index * PER + member, BITS), columns, sums[couple],
                        field_mask(BITS, index * PER + member), ASM,
                    ),
                )  # fmt: skip
            sums = following
        place = numbers + (chunk * SETS + index) * 4 + q
        whole = tl.load(place)
        unit = tl.load(place + n_chunks * (SETS * 4))
        factors = _unpacked(scales[index], OWN, True, ASM)
        offsets = factors
        if ZERO is None:
            offsets = _unpacked(zeros[index], OWN, HALF, ASM)
        sum_now = ()
        for row in tl.static_range(OWN):
            product = _joined(sums[row // 2][row % 2 * 2], sums[row // 2][row % 2 * 2 + 1])
            taken = whole * (offsets[row] if ZERO is None else ZERO)
            sum_now = sum_now + (totals[row] + (product - taken) * (unit * factors[row]),)
        totals = sum_now
    return totals


@triton.jit
def _multiplied_by_all(
    totals, codes, ready, numbers, n_ready, n_numbers, n_chunks, chunk, g, q, BITS: tl.constexpr, WIDTH: tl.constexpr,
    ZERO: tl.constexpr, HALF: tl.constexpr, OWN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """`_multiplied` for every row of x."""
    following = ()
    for token in tl.static_range(len(totals)):
        following = following + (
            _multiplied(
                totals[token], codes, ready + token * n_ready, numbers + token * n_numbers, n_chunks, chunk, g, q, BITS,
                WIDTH, ZERO, HALF, OWN, ASM,
            ),
        )  # fmt: skip
    return following


@triton.jit
def _member(items, INDEX: tl.constexpr):
    return items[INDEX]


@triton.jit(
    do_not_specialize=[
        "n_rows", "n_padded", "stride", "n_ready", "n_numbers", "blocks_0", "blocks_1", "blocks_2", "blocks_3",
        "blocks_4", "groups_0", "groups_1", "groups_2", "groups_3", "groups_4",
    ]
)  # fmt: skip
def mixed_rows_kernel(
    ready, numbers, words, scales, zeros, bias, y, n_rows, n_padded, stride, n_ready, n_numbers, blocks_0, blocks_1,
    blocks_2, blocks_3, blocks_4, groups_0, groups_1, groups_2, groups_3, groups_4, BITS: tl.constexpr,
    WIDTHS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, HALF: tl.constexpr, STEPS: tl.constexpr,
    HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr, OWN: tl.constexpr, WARPS: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """y [TOKENS, n_rows] = (packed weight) x + bias. Grid (n_rows / (8 * OWN),).

    Args:
        ready, numbers, n_ready, n_numbers, blocks_0, .., groups_0, ..: of `cut_kernel`.
        words: read as int32; rows of the segments one after the other, ``n_padded`` of each.
        scales: OWN rows read as one number; zeros: the same, of float16 (HALF) or uint8. ``stride``: of a group.
        BITS, WIDTHS, ZEROS, STEPS: one entry per segment: the zero of every group, or None; chunks of a warp if all
            are asked for before x is waited for, else 0.
    """
    if PDL:
        gdc_launch_dependents()
    ROWS: tl.constexpr = 8 * OWN
    thread = tl.arange(0, 32 * WARPS)
    warp = thread // 32
    g = thread % 32 // 4
    q = thread % 4
    first_row = tl.program_id(0) * ROWS
    row = first_row + g * OWN
    n_ready = n_ready // 4 * 4  # loads are of four neighbours
    blocks = (blocks_0, blocks_1, blocks_2, blocks_3, blocks_4)
    groups = (groups_0, groups_1, groups_2, groups_3, groups_4)
    firsts = ()
    starts = ()
    first_group = 0
    for index in tl.static_range(len(BITS)):
        starts = starts + (words,)
        firsts = firsts + (
            _load_chunks(
                words, scales, zeros, row, stride, first_group, blocks[index], warp, q, BITS[index], WIDTHS[index],
                GROUP, ZEROS[index], OWN, WARPS, STEPS[index],
            ),
        )  # fmt: skip
        words += n_padded.to(tl.int64) * (blocks[index] * (_parts(BITS[index]) * (WIDTHS[index] // 2)))
        first_group += groups[index]
    rows = first_row + tl.arange(0, ROWS)
    added = tl.zeros((ROWS,), tl.float32)
    if HAS_BIAS:
        added += tl.load(bias + rows, mask=rows < n_rows, other=0.0).to(tl.float32)
    if PDL:  # weights are on their way; what is made ready may not be there yet
        gdc_wait()
    zeros_of_rows = ()
    for _ in tl.static_range(OWN):
        zeros_of_rows = zeros_of_rows + (tl.zeros((32 * WARPS,), tl.float32),)
    totals = ()
    for _ in tl.static_range(TOKENS):
        totals = totals + (zeros_of_rows,)
    first_group = 0
    for index in tl.static_range(len(BITS)):
        n_chunks = tl.cdiv(blocks[index] * (WIDTHS[index] // 8), 4)
        if STEPS[index] > 0:
            for step in tl.static_range(len(firsts[index])):
                totals = _multiplied_by_all(
                    totals, firsts[index][step], ready, numbers, n_ready, n_numbers, n_chunks, warp + step * WARPS, g,
                    q, BITS[index], WIDTHS[index], ZEROS[index], HALF, OWN, ASM,
                )  # fmt: skip
        else:
            chunk = warp
            codes = _member(firsts[index], 0)
            for _ in range(0, n_chunks, WARPS):
                now = codes
                codes = _load_codes(
                    starts[index], scales, zeros, row, stride, first_group, blocks[index], chunk + WARPS, q,
                    BITS[index], WIDTHS[index], GROUP, ZEROS[index], OWN,
                )  # fmt: skip
                totals = _multiplied_by_all(
                    totals, now, ready, numbers, n_ready, n_numbers, n_chunks, chunk, g, q, BITS[index], WIDTHS[index],
                    ZEROS[index], HALF, OWN, ASM,
                )  # fmt: skip
                chunk += WARPS
        first_group += groups[index]
        ready += n_chunks * (32 * pairs_of(BITS[index]))
        numbers += n_chunks * (8 * sets_of(BITS[index], WIDTHS[index]))
    for token in tl.static_range(TOKENS):
        shares = tl.reshape(stacked(totals[token], OWN), (WARPS, 8, 4, OWN))
        total = tl.reshape(tl.sum(tl.sum(shares, 2), 0), (ROWS,)) + added
        tl.store(y + token * n_rows + rows, total.to(y.dtype.element_ty), mask=rows < n_rows)
