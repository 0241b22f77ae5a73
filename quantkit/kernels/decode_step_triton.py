"""Triton kernels of a decoding step (decode_step.py). Imported on first use: `import quantkit` does not need Triton.

PDL: see launch.py. These kernels wait before they touch what another kernel of the step writes. The length of the text,
the rotary tables and the cached tokens are written between steps, which no early launch crosses.
"""

# ruff: noqa: RUF005 - tuples are built by addition: Triton does not unpack
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def take_turn(PDL: tl.constexpr):
    """Let the next kernel be scheduled, and wait for the one before."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def add_norm_kernel(
    residual, update, weight, out, n, eps, HAS_UPDATE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """residual += update; out = weight * RMS norm of residual. One program per row of n numbers."""
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    if PDL:
        gdc_launch_dependents()
    gain = tl.load(weight + columns, mask=inside, other=0.0)  # far away in memory, and there before the step began
    if PDL:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64) * n
    x = tl.load(residual + row + columns, mask=inside, other=0.0)
    if HAS_UPDATE:
        x = (x.to(tl.float32) + tl.load(update + row + columns, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(residual + row + columns, x, mask=inside)
    wide = x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / n + eps)
    normal = (wide * factor).to(x.dtype).to(tl.float32)
    tl.store(out + row + columns, (normal * gain.to(tl.float32)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_kernel(gate_up, out, n, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    """out [m, n] = silu(gate) * up of gate_up [m, 2 n]. Grid (m, column tiles)."""
    take_turn(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < n
    gate = tl.load(gate_up + row * 2 * n + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * n + n + columns, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * n + columns, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dot(a, b, WIDE: tl.constexpr):
    """a @ b, float32. WIDE: operands are float32 (on a CPU the interpreter has no bfloat16 products)."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee", out_dtype=tl.float32)
    else:
        return tl.dot(a, b, out_dtype=tl.float32)


@triton.jit
def _add_shares(
    partial, out, first, n_shares, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """Attention of up to four rows from all their shares.

    Every thread reads what it needs of all shares at once and adds in registers: sums across threads take longer.
    """
    columns = tl.arange(0, HEAD_DIM)[None, :]
    row = first + tl.arange(0, 4)[:, None]
    there = partial + row * (HEAD_DIM + 2) + columns * 0
    peaks = ()
    weights = ()
    parts = ()
    for share in tl.static_range(SPLITS):
        written = row < tl.where(share < n_shares, GROUP, 0)
        place = there + share * GROUP * (HEAD_DIM + 2)
        peaks = peaks + (tl.load(place + HEAD_DIM, mask=written, other=-1e30, cache_modifier=".cg"),)
        weights = weights + (tl.load(place + HEAD_DIM + 1, mask=written, other=1.0, cache_modifier=".cg"),)
        parts = parts + (tl.load(place + columns, mask=written, other=0.0, cache_modifier=".cg"),)
    peak = peaks[0]
    for share in tl.static_range(1, SPLITS):
        peak = tl.maximum(peak, peaks[share])
    result = tl.zeros_like(peak)
    weight = tl.zeros_like(peak)
    for share in tl.static_range(SPLITS):
        fade = tl.exp(peaks[share] - peak)
        result += parts[share] * fade
        weight += weights[share] * fade
    tl.store(out + row * HEAD_DIM + columns, (result / weight).to(out.dtype.element_ty), mask=row < GROUP)


@triton.jit
def _merge(
    partial, counter, out, split, n_shares, acc, highest, total_weight, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Write one share of a head's attention; the last program to arrive adds all and divides by their weight."""
    WIDTH: tl.constexpr = HEAD_DIM + 2
    columns = tl.arange(0, HEAD_DIM)
    rows = tl.arange(0, acc.shape[0])
    here = partial + (split * GROUP + rows) * WIDTH
    tl.store(here[:, None] + columns[None, :], acc, mask=(rows < GROUP)[:, None])
    tl.store(here + HEAD_DIM, highest, mask=rows < GROUP)
    tl.store(here + HEAD_DIM + 1, total_weight, mask=rows < GROUP)
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == n_shares - 1:
        for first in tl.static_range(0, GROUP, 4):
            _add_shares(partial, out, first, n_shares, GROUP, HEAD_DIM, SPLITS)
        tl.store(counter, 0)


@triton.jit
def attention_kernel(
    qkv, cos, sin, keys, values, out, partial, counters, length, scale, max_length, GROUP: tl.constexpr,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Rotary embedding, append and attention of one token. Grid (kv heads, SPLITS).

    Program i takes the blocks i, i + SPLITS, ... of the cached tokens; the first one also takes the new token, which it
    reads from qkv and appends. Where several have tokens the last program of a head to arrive merges their shares.
    """
    if PDL:  # what the kernels of this step do not write is asked for before they have ended
        gdc_launch_dependents()
    head = tl.program_id(0)
    split = tl.program_id(1)
    n_heads = tl.num_programs(0)
    columns = tl.arange(0, HEAD_DIM)
    cached = head.to(tl.int64) * max_length * HEAD_DIM
    token = split * BLOCK + tl.arange(0, BLOCK)
    place = cached + token[:, None] * HEAD_DIM + columns[None, :]
    position = tl.load(length)
    if split < 2:  # these do not wait to learn how many tokens there are; what lies behind the last one is masked below
        next_key = tl.load(keys + place, mask=(token < max_length)[:, None], other=0.0)
        next_value = tl.load(values + place, mask=(token < max_length)[:, None], other=0.0)
    else:
        next_key = tl.load(keys + place, mask=(token < position)[:, None], other=0.0)
        next_value = tl.load(values + place, mask=(token < position)[:, None], other=0.0)
    n_shares = tl.maximum(tl.minimum((position + BLOCK - 1) // BLOCK, SPLITS), 1)
    partner = (columns + HEAD_DIM // 2) % HEAD_DIM
    turn_cos = tl.load(cos + position * HEAD_DIM + columns)
    turn_sin = tl.load(sin + position * HEAD_DIM + columns) * tl.where(columns < HEAD_DIM // 2, -1.0, 1.0)
    if PDL:
        gdc_wait()
    rows = tl.arange(0, ROWS)
    real = (rows < GROUP)[:, None]
    q_rows = qkv + (head * GROUP + rows)[:, None] * HEAD_DIM
    k_row = qkv + (n_heads * GROUP + head) * HEAD_DIM
    q = tl.load(q_rows + columns[None, :], mask=real, other=0.0)
    q_partner = tl.load(q_rows + partner[None, :], mask=real, other=0.0)
    new_key = tl.load(k_row + columns)
    key_partner = tl.load(k_row + partner)
    new_value = tl.load(qkv + (n_heads * (GROUP + 1) + head) * HEAD_DIM + columns)
    q = q.to(tl.float32) * turn_cos[None, :] + q_partner.to(tl.float32) * turn_sin[None, :]
    q = q.to(qkv.dtype.element_ty)
    new_key = (new_key.to(tl.float32) * turn_cos + key_partner.to(tl.float32) * turn_sin).to(qkv.dtype.element_ty)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total_weight = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    if split == 0:
        tl.store(keys + cached + position * HEAD_DIM + columns, new_key)
        tl.store(values + cached + position * HEAD_DIM + columns, new_value)
        highest = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale
        total_weight += 1.0
        acc += new_value.to(tl.float32)[None, :]
    for start in range(split * BLOCK, position, SPLITS * BLOCK):
        token = start + tl.arange(0, BLOCK)
        key = next_key
        value = tl.where((token < position)[:, None], next_value, 0.0)
        following = token + SPLITS * BLOCK
        place = cached + following[:, None] * HEAD_DIM + columns[None, :]
        next_key = tl.load(keys + place, mask=(following < position)[:, None], other=0.0)
        next_value = tl.load(values + place, mask=(following < position)[:, None], other=0.0)
        scores = _dot(q, tl.trans(key), WIDE) * scale
        scores = tl.where((token < position)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(highest - higher)
        acc = acc * fade[:, None] + _dot(weights.to(value.dtype), value, WIDE)
        total_weight = total_weight * fade + tl.sum(weights, 1)
        highest = higher
    if n_shares == 1:
        if split == 0:
            rows_out = out + (head * GROUP + rows)[:, None] * HEAD_DIM + columns[None, :]
            tl.store(rows_out, (acc / total_weight[:, None]).to(out.dtype.element_ty), mask=real)
    elif split < n_shares:
        _merge(
            partial + head * (SPLITS * GROUP * (HEAD_DIM + 2)), counters + head, out + head * GROUP * HEAD_DIM, split,
            n_shares, acc, highest, total_weight, GROUP, HEAD_DIM, SPLITS,
        )  # fmt: skip


@triton.jit
def pick_kernel(
    logits, token, highest, places, counter, n, COLUMNS: tl.constexpr, PROGRAMS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """token = index of the largest of n logits, the first of equals. Grid (PROGRAMS,), a power of two."""
    take_turn(PDL)
    program = tl.program_id(0)
    best = tl.full((COLUMNS,), float("-inf"), tl.float32)
    where = tl.zeros((COLUMNS,), tl.int32)
    for start in range(program * COLUMNS, n, PROGRAMS * COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        value = tl.load(logits + column, mask=column < n, other=float("-inf")).to(tl.float32)
        where = tl.where(value > best, column, where)
        best = tl.maximum(value, best)
    top = tl.max(best, 0)
    tl.store(highest + program, top)
    tl.store(places + program, tl.min(tl.where(best == top, where, n), 0))
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == PROGRAMS - 1:
        programs = tl.arange(0, PROGRAMS)
        tops = tl.load(highest + programs, cache_modifier=".cg")
        found = tl.load(places + programs, cache_modifier=".cg")
        tl.store(token, tl.min(tl.where(tops == tl.max(tops, 0), found, n), 0).to(tl.int64))
        tl.store(counter, 0)
