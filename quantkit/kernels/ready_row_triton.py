"""Triton kernel that makes one row ready for a product with packed signs and integers (sign_rows_triton.py).

It takes the row in the order and scale of the packed columns and cuts it: into planes of bits for the signs
(bit_products_triton.py), into byte slices for the integers (byte_products_triton.py). The row may be the norm or the
gated product of what is given: then two launches of a decoding step are one.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.kernels.byte_products_triton import TINY

PLANES = tl.constexpr(16)
WORDS = tl.constexpr(32)  # of a block: 1024 columns
CHUNK = tl.constexpr(4)  # threads of the product that share a unit of their slices


@triton.jit
def _normed(x, update, weight, residual, place, eps, n, HAS_UPDATE: tl.constexpr, BLOCK: tl.constexpr):
    """Some columns of the RMS norm of x + update, by way of 16 bits as `add_norm_kernel` has them; all of the sum."""
    columns = tl.arange(0, BLOCK)
    row = tl.load(x + columns, mask=columns < n, other=0.0)
    value = tl.load(x + place, mask=place >= 0, other=0.0)
    if HAS_UPDATE:
        row = (row.to(tl.float32) + tl.load(update + columns, mask=columns < n, other=0.0).to(tl.float32)).to(row.dtype)
        more = tl.load(update + place, mask=place >= 0, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(row.dtype)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(residual + columns, row, mask=columns < n)
    wide = row.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / n + eps)
    normal = (value.to(tl.float32) * factor).to(row.dtype).to(tl.float32)
    return (normal * weight.to(tl.float32)).to(row.dtype).to(tl.float32)


@triton.jit
def _taken(
    x, update, weight, residual, places, factors, cell, there, eps, n, SOURCE: tl.constexpr, HAS_UPDATE: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Columns of the source times their scales; 0 where there is none."""
    place = tl.load(places + cell, mask=there, other=-1).to(tl.int32)
    factor = tl.load(factors + cell, mask=there, other=0.0).to(tl.float32)
    weights = factor
    if SOURCE == "norm":
        weights = tl.load(weight + place, mask=place >= 0, other=0.0)
    if PDL:
        gdc_wait()
    if SOURCE == "norm":
        value = _normed(x, update, weights, residual, place, eps, n, HAS_UPDATE, BLOCK)
    elif SOURCE == "gated":
        gate = tl.load(x + place, mask=place >= 0, other=0.0).to(tl.float32)
        up = tl.load(x + n + place, mask=place >= 0, other=0.0).to(tl.float32)
        value = (gate / (1.0 + tl.exp(-gate)) * up).to(x.dtype.element_ty).to(tl.float32)
    else:
        value = tl.load(x + place, mask=place >= 0, other=0.0).to(tl.float32)
    return tl.where(place >= 0, value, 0.0) * factor


@triton.jit
def _unit(magnitude):
    """The unit of 16-bit integers whose largest is ``magnitude``, and its inverse; NaN for what is no number."""
    top = tl.where(magnitude < TINY, TINY, magnitude)
    return tl.where(top == float("inf"), float("nan"), top * (1.0 / 32512.0)), 32512.0 / top


@triton.jit
def _magnitude(value):
    return tl.where(value == value, tl.abs(value), float("inf"))


@triton.jit
def _plane_part(
    x, update, weight, residual, places, factors, eps, n, planes, units, sums, block, first, n_words,
    SOURCE: tl.constexpr, HAS_UPDATE: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """COUNT planes from ``first`` on of a block's 1024 columns; the program of the first also its unit and sum."""
    word = tl.arange(0, WORDS)[:, None]
    bit = tl.arange(0, 32)[None, :]
    value = _taken(
        x, update, weight, residual, places, factors, (block * WORDS + word) * 32 + bit, block * WORDS + word < n_words,
        eps, n, SOURCE, HAS_UPDATE, BLOCK, PDL,
    )  # fmt: skip
    unit, inverse = _unit(tl.max(tl.max(_magnitude(value), 1), 0))
    number = (value * inverse + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000  # 1.5 * 2**23: rounds
    words = block * WORDS + tl.arange(0, WORDS)
    for index in tl.static_range(COUNT):
        plane = tl.sum(((number >> (first + index)) & 1) << bit, 1)
        tl.store(planes + (first + index) * n_words + words, plane, mask=words < n_words)
    if first == 0:
        tl.store(units + block, unit)
        tl.store(sums + block, tl.sum(tl.sum(number, 1), 0).to(tl.float32) * unit)


@triton.jit
def _slice_part(
    x, update, weight, residual, places, factors, eps, n_columns, slices, units, sums, first, n, SOURCE: tl.constexpr,
    HAS_UPDATE: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr, COUNT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Slices for COUNT threads of the product, of n in all; each takes PAIRS * 16 columns."""
    COLUMNS: tl.constexpr = PAIRS * 16
    thread = (first + tl.arange(0, COUNT))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    value = _taken(
        x, update, weight, residual, places, factors, thread * COLUMNS + column, (thread < n) & (column >= 0), eps,
        n_columns, SOURCE, HAS_UPDATE, BLOCK, PDL,
    )  # fmt: skip
    largest = tl.max(tl.reshape(tl.max(_magnitude(value), 1), (COUNT // CHUNK, CHUNK)), 1)
    unit, inverse = _unit(largest)
    inverse = tl.reshape(tl.broadcast_to(inverse[:, None], (COUNT // CHUNK, CHUNK)), (COUNT,))[:, None]
    # 1.5 * 2**23 + 128 leaves the rounded value + 128 in the last bits: its second byte is the high slice
    moved = (value * inverse + 12583040.0).to(tl.int32, bitcast=True)
    number = moved - 0x4B400080
    shift = column % 4 * 8
    high = tl.sum(tl.reshape(((moved >> 8) & 0xFF) << shift, (COUNT, PAIRS * 4, 4)), 2)
    low = tl.sum(tl.reshape((number & 0xFF) << shift, (COUNT, PAIRS * 4, 4)), 2)
    word = tl.arange(0, PAIRS * 4)[None, :]
    target = slices + word // 4 * (8 * n) + thread * 4 + word % 4
    tl.store(target, high, mask=(thread < n) & (word >= 0))
    tl.store(target + 4 * n, low, mask=(thread < n) & (word >= 0))
    # of each pair of planes, two threads together
    total = tl.sum(tl.reshape(number, (COUNT, PAIRS, 16)), 2)
    total = tl.sum(tl.reshape(total, (COUNT // 2, 2, PAIRS)), 1).to(tl.float32)
    half = (first // 2 + tl.arange(0, COUNT // 2))[:, None]
    n_chunks = (n + CHUNK - 1) // CHUNK
    place = sums + tl.arange(0, PAIRS)[None, :] * (2 * n_chunks) + half
    tl.store(place, total, mask=half + 0 * tl.arange(0, PAIRS)[None, :] < 2 * n_chunks)
    chunk = first // CHUNK + tl.arange(0, COUNT // CHUNK)
    tl.store(units + chunk, unit, mask=chunk < n_chunks)


@triton.jit(do_not_specialize=["n_columns", "n_words8", "n_blocks", "n_threads", "n_cells", "n_ready", "n_numbers"])
def ready_kernel(
    x, update, weight, residual, places, factors, ready, numbers, eps, n_columns, n_words8, n_blocks, n_threads,
    n_cells, n_ready, n_numbers, SOURCE: tl.constexpr, HAS_UPDATE: tl.constexpr, BLOCK: tl.constexpr,
    PAIRS: tl.constexpr, COUNT: tl.constexpr, PLANES_EACH: tl.constexpr, PDL: tl.constexpr = False,
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
    EACH: tl.constexpr = PLANES // PLANES_EACH
    if program < n_blocks * EACH:
        _plane_part(
            x, update, weight, residual, places, factors, eps, n_columns, ready, numbers, numbers + n_blocks,
            program // EACH, program % EACH * PLANES_EACH, n_words, SOURCE, HAS_UPDATE, BLOCK, PLANES_EACH, PDL,
        )  # fmt: skip
    elif PAIRS > 0:
        skip = n_words * 32
        numbers += 2 * n_blocks
        n_chunks = (n_threads + CHUNK - 1) // CHUNK
        _slice_part(
            x, update, weight, residual, places + skip, factors + skip, eps, n_columns, ready + n_words * PLANES,
            numbers, numbers + n_chunks, (program - n_blocks * EACH) * COUNT, n_threads, SOURCE, HAS_UPDATE, BLOCK,
            PAIRS, COUNT, PDL,
        )  # fmt: skip
