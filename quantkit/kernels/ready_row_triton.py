"""Triton kernel that makes one row ready for a product with packed signs and integers (sign_rows_triton.py).

It takes the row in the order and scale of the packed columns and cuts it: into planes of bits for the signs
(bit_products_triton.py), into byte slices for the integers (byte_products_triton.py). The row may be the norm or the
gated product of what is given: then two launches of a decoding step are one.
"""

# ruff: noqa: RUF005 - tuples are built by addition: Triton does not unpack
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.kernels.bit_products_triton import of_lane_across
from quantkit.kernels.byte_products_triton import TINY

PLANES = tl.constexpr(16)
WORDS = tl.constexpr(32)  # of a block: 1024 columns
CHUNK = tl.constexpr(4)  # threads of the product that share a unit of their slices


@triton.jit
def _ballot(bit, ASM: tl.constexpr):
    """int32 [threads]: the bits of the warp's 32 lanes; ``bit`` is 0 or not."""
    if ASM:
        TEXT: tl.constexpr = "{.reg .pred p; setp.ne.b32 p,$1,0; vote.sync.ballot.b32 $0,p,0xffffffff;}"
        return tl.inline_asm_elementwise(TEXT, "=r,r", [bit], dtype=tl.int32, is_pure=True, pack=1)
    else:
        lanes = tl.reshape((bit != 0).to(tl.int32), (bit.shape[0] // 32, 32)) << tl.arange(0, 32)[None, :]
        words = tl.broadcast_to(tl.sum(lanes, 1)[:, None], (bit.shape[0] // 32, 32))
        return tl.reshape(words, (bit.shape[0],))


@triton.jit
def _norm_factor(x, update, residual, eps, n, HAS_UPDATE: tl.constexpr, BLOCK: tl.constexpr):
    """1 / RMS of x + update, as `add_norm_kernel` has it; the first program also stores the sum."""
    columns = tl.arange(0, BLOCK)
    row = tl.load(x + columns, mask=columns < n, other=0.0)
    if HAS_UPDATE:
        row = (row.to(tl.float32) + tl.load(update + columns, mask=columns < n, other=0.0).to(tl.float32)).to(row.dtype)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(residual + columns, row, mask=columns < n)
    wide = row.to(tl.float32)
    return tl.rsqrt(tl.sum(wide * wide, 0) / n + eps)


@triton.jit
def _value_at(x, update, weight, place, norm, n, SOURCE: tl.constexpr, HAS_UPDATE: tl.constexpr):
    """Columns of the source, by way of 16 bits as the launches that compute nothing else have them."""
    value = tl.load(x + place, mask=place >= 0, other=0.0)
    kind: tl.constexpr = x.dtype.element_ty
    if SOURCE == "norm":
        if HAS_UPDATE:
            more = tl.load(update + place, mask=place >= 0, other=0.0)
            value = (value.to(tl.float32) + more.to(tl.float32)).to(kind)
        normal = (value.to(tl.float32) * norm).to(kind).to(tl.float32)
        return (normal * weight.to(tl.float32)).to(kind).to(tl.float32)
    elif SOURCE == "gated":
        gate = value.to(tl.float32)
        up = tl.load(x + n + place, mask=place >= 0, other=0.0).to(tl.float32)
        return (gate / (1.0 + tl.exp(-gate)) * up).to(kind).to(tl.float32)
    else:
        return value.to(tl.float32)


@triton.jit
def _taken(
    x, update, weight, residual, places, factors, cell, step, there, eps, n, COUNT: tl.constexpr,
    SOURCE: tl.constexpr, HAS_UPDATE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Columns of the source times their scales, for COUNT cells ``step`` apart; 0 where there is none."""
    asked = ()
    for index in tl.static_range(COUNT):
        place = tl.load(places + cell + index * step, mask=there, other=-1).to(tl.int32)
        factor = tl.load(factors + cell + index * step, mask=there, other=0.0).to(tl.float32)
        weights = factor
        if SOURCE == "norm":
            weights = tl.load(weight + place, mask=place >= 0, other=0.0)
        asked = asked + ((place, factor, weights),)
    if PDL:
        gdc_wait()
    norm = 0.0
    if SOURCE == "norm":
        norm = _norm_factor(x, update, residual, eps, n, HAS_UPDATE, BLOCK)
    values = ()
    for index in tl.static_range(COUNT):
        place, factor, weights = asked[index]
        value = _value_at(x, update, weights, place, norm, n, SOURCE, HAS_UPDATE)
        values = values + (tl.where(place >= 0, value, 0.0) * factor,)
    return values


@triton.jit
def _largest(values, COUNT: tl.constexpr):
    """Largest magnitude of COUNT values of each thread; what is no number counts as infinite."""
    largest = tl.where(values[0] == values[0], tl.abs(values[0]), float("inf"))
    for index in tl.static_range(1, COUNT):
        magnitude = tl.where(values[index] == values[index], tl.abs(values[index]), float("inf"))
        largest = tl.maximum(largest, magnitude)
    return largest


@triton.jit
def _unit(magnitude):
    """The unit of 16-bit integers whose largest is ``magnitude``, and its inverse; NaN for what is no number."""
    top = tl.where(magnitude < TINY, TINY, magnitude)
    return tl.where(top == float("inf"), float("nan"), top * (1.0 / 32512.0)), 32512.0 / top


@triton.jit
def _plane_part(
    x, update, weight, residual, places, factors, eps, n, planes, units, sums, block, plane, n_words,
    SOURCE: tl.constexpr, HAS_UPDATE: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A plane of a block's 1024 columns; the program of the first one also stores the block's unit and sum.

    A warp takes COUNT neighbouring words, a lane one bit of each.
    """
    COUNT: tl.constexpr = 1024 // THREADS
    thread = tl.arange(0, THREADS)
    lane = thread % 32
    word = block * WORDS + thread // 32 * COUNT
    values = _taken(
        x, update, weight, residual, places, factors, word * 32 + lane, 32, word < n_words, eps, n, COUNT, SOURCE,
        HAS_UPDATE, BLOCK, PDL,
    )  # fmt: skip
    unit, inverse = _unit(tl.max(_largest(values, COUNT), 0))
    total = tl.zeros_like(thread)
    bits = tl.zeros_like(thread)
    for index in tl.static_range(COUNT):
        number = (values[index] * inverse + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000  # 1.5 * 2**23: rounds
        total += number
        bits = tl.where(lane == index, _ballot((number >> plane) & 1, ASM), bits)
    tl.store(planes + plane * n_words + word + lane, bits, mask=(lane < COUNT) & (word < n_words))
    if plane == 0:
        tl.store(units + block, unit)
        tl.store(sums + block, tl.sum(total, 0).to(tl.float32) * unit)


@triton.jit
def _over_lanes(value, LARGEST: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, ASM: tl.constexpr):
    """int32: the largest (or sum) of lanes that differ in bits FIRST to LAST - 1 of their number."""
    for exponent in tl.static_range(FIRST, LAST):
        other = of_lane_across(value, 2**exponent, ASM)
        value = tl.maximum(value, other) if LARGEST else value + other
    return value


@triton.constexpr_function
def _log2(number):
    return number.bit_length() - 1


@triton.jit
def _slice_part(
    x, update, weight, residual, places, factors, eps, n_columns, slices, units, sums, first, n, SOURCE: tl.constexpr,
    HAS_UPDATE: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr, THREADS: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Slices for some threads of the product from ``first`` on, of n in all: each has PAIRS * 4 words of four columns.

    A thread here makes one word.
    """
    EACH: tl.constexpr = PAIRS * 4
    here = tl.arange(0, THREADS)
    thread = first + here // EACH
    word = here % EACH
    values = _taken(
        x, update, weight, residual, places, factors, (first * EACH + here) * 4, 1, thread < n, eps, n_columns, 4,
        SOURCE, HAS_UPDATE, BLOCK, PDL,
    )  # fmt: skip
    largest = _largest(values, 4)
    if CHUNK * EACH <= 32:
        bits = _over_lanes(largest.to(tl.int32, bitcast=True), True, 0, _log2(CHUNK * EACH), ASM)
        largest = bits.to(tl.float32, bitcast=True)  # what is not negative has the order of its bits
    else:
        largest = tl.max(tl.reshape(largest, (THREADS // (CHUNK * EACH), CHUNK * EACH)), 1)
        largest = tl.broadcast_to(largest[:, None], (THREADS // (CHUNK * EACH), CHUNK * EACH))
        largest = tl.reshape(largest, (THREADS,))
    unit, inverse = _unit(largest)
    high = tl.zeros_like(here)
    low = tl.zeros_like(here)
    total = tl.zeros_like(here)
    for index in tl.static_range(4):
        # 1.5 * 2**23 + 128 leaves the rounded value + 128 in the last bits: its second byte is the high slice
        moved = (values[index] * inverse + 12583040.0).to(tl.int32, bitcast=True)
        number = moved - 0x4B400080
        high |= ((moved >> 8) & 0xFF) << (8 * index)
        low |= (number & 0xFF) << (8 * index)
        total += number
    target = slices + word // 4 * (8 * n) + thread * 4 + word % 4
    tl.store(target, high, mask=thread < n)
    tl.store(target + 4 * n, low, mask=thread < n)
    n_chunks = (n + CHUNK - 1) // CHUNK
    tl.store(units + thread // CHUNK, unit, mask=(here % (CHUNK * EACH) == 0) & (thread // CHUNK < n_chunks))
    total = _over_lanes(total, False, 0, 2, ASM)  # a pair of planes of a thread
    place = sums + word // 4 * (2 * n_chunks) + thread // 2
    if EACH < 32:  # of two threads
        total = _over_lanes(total, False, _log2(EACH), _log2(EACH) + 1, ASM)
    else:
        both = tl.sum(tl.reshape(total, (THREADS // (2 * EACH), 2, EACH)), 1)
        both = tl.broadcast_to(both[:, None, :], (THREADS // (2 * EACH), 2, EACH))
        total = tl.reshape(both, (THREADS,))
    alone = (word % 4 == 0) & (thread % 2 == 0)
    tl.store(place, total.to(tl.float32), mask=alone & (thread // CHUNK < n_chunks))


@triton.jit(do_not_specialize=["n_columns", "n_words8", "n_blocks", "n_threads", "n_cells", "n_ready", "n_numbers"])
def ready_kernel(
    x, update, weight, residual, places, factors, ready, numbers, eps, n_columns, n_words8, n_blocks, n_threads,
    n_cells, n_ready, n_numbers, SOURCE: tl.constexpr, HAS_UPDATE: tl.constexpr, BLOCK: tl.constexpr,
    PAIRS: tl.constexpr, THREADS: tl.constexpr, ASM: tl.constexpr = True, PDL: tl.constexpr = False,
):  # fmt: skip
    """One row made ready for its copies. Grid (programs of the signs and of the integers, copies).

    Args:
        SOURCE: what the row is. "row": x itself. "gated": silu(gate) * up of x [2 * n_columns]. "norm": weight * RMS
            norm of x + update [n_columns], where the sum goes to ``residual``, another tensor than x. BLOCK: a power
            of two, not less than n_columns.
        places, factors: per copy n_cells: the column of x (-1: zero) and its scale, for each bit of the words of signs
            and for each byte that a thread reads of the integers.
        ready: int32, per copy n_ready: planes [16, n_words]; slices [pairs, 2, threads, 4], high ones, then low ones.
        numbers: float32, per copy n_numbers: units and sums of the blocks of 1024 columns; units of the slices of CHUNK
            threads, and the sums of two threads' in these units [pairs, 2, for each CHUNK].
        n_words8, n_blocks: words / 8 of a row of signs, and its blocks.
        n_threads, PAIRS: of a row of integers; PAIRS 0: there are none.
    """
    if PDL:
        gdc_launch_dependents()
    program = tl.program_id(0)
    copy = tl.program_id(1)
    n_words = n_words8 * 8
    places += copy * n_cells
    factors += copy * n_cells
    ready += copy * n_ready
    numbers += copy * n_numbers
    if program < n_blocks * PLANES:
        _plane_part(
            x, update, weight, residual, places, factors, eps, n_columns, ready, numbers, numbers + n_blocks,
            program // PLANES, program % PLANES, n_words, SOURCE, HAS_UPDATE, BLOCK, THREADS, ASM, PDL,
        )  # fmt: skip
    elif PAIRS > 0:
        skip = n_words * 32
        numbers += 2 * n_blocks
        n_chunks = (n_threads + CHUNK - 1) // CHUNK
        _slice_part(
            x, update, weight, residual, places + skip, factors + skip, eps, n_columns, ready + n_words * PLANES,
            numbers, numbers + n_chunks, (program - n_blocks * PLANES) * (THREADS // (4 * PAIRS)), n_threads, SOURCE,
            HAS_UPDATE, BLOCK, PAIRS, THREADS, ASM, PDL,
        )  # fmt: skip
