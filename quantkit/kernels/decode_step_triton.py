"""Triton kernels of a decoding step (decode_step.py). Imported on first use: `import quantkit` does not need Triton.

PDL: see launch.py; these kernels wait before they touch memory.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

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
    take_turn(PDL)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    row = tl.program_id(0).to(tl.int64) * n
    x = tl.load(residual + row + columns, mask=inside, other=0.0)
    if HAS_UPDATE:
        x = (x.to(tl.float32) + tl.load(update + row + columns, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(residual + row + columns, x, mask=inside)
    wide = x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / n + eps)
    normal = (wide * factor).to(x.dtype).to(tl.float32)
    scaled = normal * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + columns, scaled.to(out.dtype.element_ty), mask=inside)


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
def attention_kernel(
    qkv, cos, sin, keys, values, out, partial, counters, length, scale, max_length, GROUP: tl.constexpr,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Rotary embedding, append and attention of one token. Grid (kv heads, SPLITS).

    A program takes its share of the cached tokens and of the new one, which it reads from qkv: nobody waits for the
    program that appends it. The last program of a head merges the shares, all read at once.
    """
    take_turn(PDL)
    head = tl.program_id(0)
    split = tl.program_id(1)
    n_heads = tl.num_programs(0)
    position = tl.load(length)
    columns = tl.arange(0, HEAD_DIM)
    partner = (columns + HEAD_DIM // 2) % HEAD_DIM
    turn_cos = tl.load(cos + position * HEAD_DIM + columns)
    turn_sin = tl.load(sin + position * HEAD_DIM + columns) * tl.where(columns < HEAD_DIM // 2, -1.0, 1.0)
    rows = tl.arange(0, ROWS)
    real = (rows < GROUP)[:, None]
    q_rows = qkv + (head * GROUP + rows)[:, None] * HEAD_DIM
    q = tl.load(q_rows + columns[None, :], mask=real, other=0.0).to(tl.float32) * turn_cos[None, :]
    q += tl.load(q_rows + partner[None, :], mask=real, other=0.0).to(tl.float32) * turn_sin[None, :]
    q = q.to(qkv.dtype.element_ty)
    k_row = qkv + (n_heads * GROUP + head) * HEAD_DIM
    new_key = tl.load(k_row + columns).to(tl.float32) * turn_cos + tl.load(k_row + partner).to(tl.float32) * turn_sin
    new_key = new_key.to(qkv.dtype.element_ty)
    new_value = tl.load(qkv + (n_heads * (GROUP + 1) + head) * HEAD_DIM + columns)
    total = position + 1
    share = (total + BLOCK * SPLITS - 1) // (BLOCK * SPLITS) * BLOCK
    first = split * share
    last = tl.minimum(first + share, total)
    cached = head.to(tl.int64) * max_length * HEAD_DIM
    if (position >= first) & (position < last):
        tl.store(keys + cached + position * HEAD_DIM + columns, new_key)
        tl.store(values + cached + position * HEAD_DIM + columns, new_value)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total_weight = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    for start in range(first, last, BLOCK):
        token = start + tl.arange(0, BLOCK)
        old = (token < position)[:, None]
        newest = (token == position)[:, None]
        place = cached + token[:, None] * HEAD_DIM + columns[None, :]
        key = tl.where(newest, new_key[None, :], tl.load(keys + place, mask=old, other=0.0))
        scores = _dot(q, tl.trans(key), WIDE) * scale
        scores = tl.where((token < last)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(highest - higher)
        value = tl.where(newest, new_value[None, :], tl.load(values + place, mask=old, other=0.0))
        acc = acc * fade[:, None] + _dot(weights.to(value.dtype), value, WIDE)
        total_weight = total_weight * fade + tl.sum(weights, 1)
        highest = higher
    mine = partial + head * (SPLITS * ROWS * (HEAD_DIM + 2)) + rows * (HEAD_DIM + 2)
    here = mine + split * (ROWS * (HEAD_DIM + 2))
    tl.store(here[:, None] + columns[None, :], acc, mask=real)
    tl.store(here + HEAD_DIM, highest, mask=rows < GROUP)
    tl.store(here + HEAD_DIM + 1, total_weight, mask=rows < GROUP)
    tl.debug_barrier()
    if tl.atomic_add(counters + head, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
        acc = tl.zeros((ROWS, HEAD_DIM), tl.float32)
        total_weight = tl.zeros((ROWS,), tl.float32)
        highest = tl.full((ROWS,), float("-inf"), tl.float32)
        for other in tl.static_range(SPLITS):
            there = mine + other * (ROWS * (HEAD_DIM + 2))
            peak = tl.load(there + HEAD_DIM, mask=rows < GROUP, other=0.0, cache_modifier=".cg")
            highest = tl.maximum(highest, peak)
        for other in tl.static_range(SPLITS):
            there = mine + other * (ROWS * (HEAD_DIM + 2))
            peak = tl.load(there + HEAD_DIM, mask=rows < GROUP, other=0.0, cache_modifier=".cg")
            weight = tl.load(there + HEAD_DIM + 1, mask=rows < GROUP, other=0.0, cache_modifier=".cg")
            part = tl.load(there[:, None] + columns[None, :], mask=real, other=0.0, cache_modifier=".cg")
            fade = tl.exp(peak - highest)
            acc += part * fade[:, None]
            total_weight += weight * fade
        result = acc / tl.where(rows < GROUP, total_weight, 1.0)[:, None]
        target = out + (head * GROUP + rows)[:, None] * HEAD_DIM + columns[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=real)
        tl.store(counters + head, 0)
