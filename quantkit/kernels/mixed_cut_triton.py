"""Triton kernel that cuts rows of x into byte slices, in the order in which `mixed_rows_kernel` takes them.

    x  ~  unit * (256 * high + low),     |256 * high + low| <= 32512,     high, low: signed bytes

A *chunk* is the words of four lanes, 16 bytes each; its columns of a pair of planes have a unit of their own. Planes of
16 columns make up half a chunk: then either half has one.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.kernels.byte_products_triton import TINY, byte_slices, half_to_float, larger_half, pairs_of, signed_byte


@triton.constexpr_function
def halves_of(width):
    """Blocks of planes that a chunk has words of."""
    return 2 if width == 16 else 1


@triton.constexpr_function
def sets_of(bits, width):
    """Sets of four pairs (of a half) that a chunk has."""
    return max(1, pairs_of(bits) * halves_of(width) // 4)


@triton.jit
def _cut_segment(
    x, order, slices, numbers, program, n_blocks, n_chunks, first_group, n_groups, BITS: tl.constexpr,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Two pairs of a chunk, word by word: two columns of an even plane, two of an odd."""
    PAIRS: tl.constexpr = pairs_of(BITS)
    HALVES: tl.constexpr = halves_of(WIDTH)
    PER: tl.constexpr = 4 // HALVES
    SETS: tl.constexpr = sets_of(BITS, WIDTH)
    place = tl.arange(0, 2 * HALVES)[:, None]
    index = program * 2 + place // HALVES
    chunk = index // PAIRS
    pair = index % PAIRS
    half = place % HALVES
    word = half * (16 // HALVES) + tl.arange(0, 16 // HALVES)[None, :]
    thread = chunk * 4 + word // 4
    plane = (thread // (WIDTH // 8) * PAIRS + pair) * 2
    n_planes = n_groups * (GROUP // WIDTH)
    there = thread < n_blocks * (WIDTH // 8)
    even_there = there & (plane < n_planes)
    odd_there = there & (plane + 1 < n_planes)
    group = tl.load(order + first_group + plane * WIDTH // GROUP, mask=even_there, other=0).to(tl.int32)
    source = x + (group * GROUP + plane * WIDTH % GROUP) // 2 + thread % (WIDTH // 8) * 4 + word % 4
    if PDL:
        gdc_wait()
    even = tl.load(source, mask=even_there, other=0)
    odd = tl.load(source + WIDTH // 2, mask=odd_there, other=0)
    largest = larger_half(larger_half(tl.zeros_like(even), even, ASM), odd, ASM)
    top = half_to_float(tl.max(tl.maximum(largest & 0xFFFF, largest >> 16), 1), BF16)[:, None]
    top = tl.where(top < TINY, TINY, top)  # NaN stays
    high, low = byte_slices(even, odd, 32512.0 / top + tl.zeros(even.shape, tl.float32), BF16, ASM)
    inside = chunk < n_chunks
    target = slices + index * 32 + word
    tl.store(target, high, mask=inside & (word >= 0))
    tl.store(target + 16, low, mask=inside & (word >= 0))
    total = tl.zeros_like(high)
    for byte in tl.static_range(4):
        total += 256 * signed_byte(high, byte) + signed_byte(low, byte)
    position = pair * BITS  # of the field in its byte: products have this power of two
    if BITS == 3:
        position = tl.where(pair < 6, pair % 2 * 3, 0)
    power = (1 << position).to(tl.float32)
    target = numbers + (chunk * SETS + pair // PER) * 4 + half * PER + pair % PER
    tl.store(target, tl.sum(total, 1)[:, None].to(tl.float32) * power, mask=inside)
    tl.store(target + n_chunks * (SETS * 4), top * (1.0 / 32512.0) / power, mask=inside)
    for other in tl.static_range(PAIRS, PER, PAIRS):
        tl.store(target + other, tl.zeros(top.shape, tl.float32), mask=inside)
        tl.store(target + n_chunks * (SETS * 4) + other, tl.zeros(top.shape, tl.float32), mask=inside)


@triton.jit(
    do_not_specialize=[
        "n_columns", "n_ready", "n_numbers", "blocks_0", "blocks_1", "blocks_2", "blocks_3", "blocks_4", "groups_0",
        "groups_1", "groups_2", "groups_3", "groups_4",
    ]
)  # fmt: skip
def cut_kernel(
    x, order, ready, numbers, n_columns, n_ready, n_numbers, blocks_0, blocks_1, blocks_2, blocks_3, blocks_4,
    groups_0, groups_1, groups_2, groups_3, groups_4, BITS: tl.constexpr, WIDTHS: tl.constexpr, GROUP: tl.constexpr,
    BF16: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Rows of x [tokens, n_columns] cut for `mixed_rows_kernel`. Grid (programs of all segments, tokens).

    Args:
        x: read as int32, two values at a time. order: stored to original group.
        ready: int32, n_ready per token: of each segment slices [chunks, pairs, 2, 16], high ones, then low ones.
        numbers: float32, n_numbers per token: of each segment sums [chunks, sets, 4] of what is multiplied by the
            fields where they are, then what one is worth, of the same shape.
        blocks_0, .., groups_0, ..: blocks and groups of each segment. BITS, WIDTHS: one entry per segment.
    """
    if PDL:
        gdc_launch_dependents()
    program = tl.program_id(0)
    token = tl.program_id(1)
    x += token.to(tl.int64) * (n_columns // 2)
    ready += token * n_ready
    numbers += token * n_numbers
    blocks = (blocks_0, blocks_1, blocks_2, blocks_3, blocks_4)
    groups = (groups_0, groups_1, groups_2, groups_3, groups_4)
    first_group = 0
    for index in tl.static_range(len(BITS)):
        n_chunks = tl.cdiv(blocks[index] * (WIDTHS[index] // 8), 4)
        n_programs = tl.cdiv(n_chunks * pairs_of(BITS[index]), 2)
        if (program >= 0) & (program < n_programs):
            _cut_segment(
                x, order, ready, numbers, program, blocks[index], n_chunks, first_group, groups[index], BITS[index],
                WIDTHS[index], GROUP, BF16, ASM, PDL,
            )  # fmt: skip
        program -= n_programs
        first_group += groups[index]
        ready += n_chunks * (32 * pairs_of(BITS[index]))
        numbers += n_chunks * (8 * sets_of(BITS[index], WIDTHS[index]))
