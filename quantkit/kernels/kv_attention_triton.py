"""Triton kernels of attention over packed pages. Imported on first use: `import quantkit` does not need Triton.

Split-KV flash decoding for one sequence. Program (split, KV head) takes a range of pages; the query heads of a group
are the columns of the tensor-core products, whose first operand are bytes of packed words, cut off above a field
(kv_planes_triton.py):

    T_e [run, columns]  = byte(K) up to field e [run, D] Q [D, columns]     scores of plane e: (T_e - T_(e-1)) / 2^place
    O   [D, columns]   += byte(V) up to field e [D, run] (P_e - P_(e+1))    P_e: probabilities / 2^place of plane e

The same tokens meet in both products: nothing is shuffled.
Scales multiply scores and probabilities, not codes; offsets are a rank-1 term. The key rotation is done to the query,
and the value rotation undone to what a split found, in registers. Tokens in 16 bits are splits of their own, and one
of these may also take in the newest token. `merge_kernel` reads all splits at once: a loop over them would cost one
memory latency each.

How many tokens there are is read from the device, where the count of tokens in 16 bits is also advanced: a captured
graph goes on where it is, at any length up to the allocated pages.

`ASM=False` replaces the inline PTX by Triton operations with the same result, for the interpreter.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.kernels.kv_planes_triton import (
    is_last,
    load_scales,
    place,
    plane_operand,
    scales_of_planes,
    step_of,
    sum_of_steps,
)
from quantkit.kernels.kv_rotation_triton import rotate_columns

PAGE = tl.constexpr(128)
LOW = tl.constexpr(-1e30)  # stands for minus infinity, whose differences are not numbers


@triton.jit
def _prefetch(pointer, nbytes, ASM: tl.constexpr):
    """Thread 0 has nbytes, a multiple of 16, brought to the L2 cache; nobody waits."""
    if ASM:
        tl.inline_asm_elementwise(
            "{.reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; "
            "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;}",
            "=r,l,r",
            [pointer.to(tl.int64), nbytes],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _cut(scores, left, FIELDS: tl.constexpr, RUN: tl.constexpr):
    """The scores of a page, by plane, of which the first `left` tokens count."""
    token = tl.arange(0, RUN)
    kept = ()
    for field in tl.static_range(FIELDS):
        kept = kept + (tl.where((token + field * RUN < left)[:, None], scores[field], LOW),)  # noqa: RUF005
    return kept


@triton.jit
def _pages(
    operand, key_words, key_scales, key_offsets, value_words, value_scales, value_offsets, count, first, last,
    BITS: tl.constexpr, KEY_OFFSETS: tl.constexpr, VALUE_OFFSETS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """(output [D, columns] unnormalized, maximum, sum) over pages first .. last - 1, for queries float16 [D, columns];
    pointers are at the head. Sums over tokens are finished after the loop: each costs a barrier. On a symmetric grid
    the products bring the middle of the codes along: as what the sums of keys start from, and as one row of the values.
    A page's scales are loaded while the page before is worked on.
    """
    D: tl.constexpr = operand.shape[0]
    COLUMNS: tl.constexpr = operand.shape[1]
    FIELDS: tl.constexpr = 16 // BITS
    RUN: tl.constexpr = PAGE // FIELDS
    MIDDLE: tl.constexpr = ((1 << BITS) - 1) / 2
    CUT: tl.constexpr = (
        BITS == 2 and not KEY_OFFSETS
    )  # the last page in a branch: elsewhere a mask in the sum is faster
    run = tl.arange(0, RUN)
    channel = tl.arange(0, D)
    query_sum = tl.sum(operand.to(tl.float32), 0)
    top = tl.full((COLUMNS,), LOW, tl.float32)
    total = tl.zeros((RUN, COLUMNS), tl.float32)
    offset = tl.zeros((RUN, COLUMNS), tl.float32)
    middle = tl.zeros((16, COLUMNS), tl.float32)
    output = tl.zeros((D, COLUMNS), tl.float32)
    keys = key_words + first.to(tl.int64) * (RUN * D) + run[:, None] * D + channel[None, :]
    values = value_words + first.to(tl.int64) * (RUN * D) + channel[:, None] * RUN + run[None, :]
    next_key_scale = load_scales(key_scales + first * PAGE, FIELDS, RUN)
    next_value_scale = load_scales(value_scales + first * PAGE, FIELDS, RUN)
    for page in range(first, last):
        key_scale = scales_of_planes(next_key_scale, FIELDS, ASM)
        value_scale = scales_of_planes(next_value_scale, FIELDS, ASM)
        following = tl.minimum(page + 1, last - 1) * PAGE
        next_key_scale = load_scales(key_scales + following, FIELDS, RUN)
        next_value_scale = load_scales(value_scales + following, FIELDS, RUN)
        if KEY_OFFSETS:
            key_level = scales_of_planes(load_scales(key_offsets + page * PAGE, FIELDS, RUN), FIELDS, ASM)
        if VALUE_OFFSETS:
            value_level = scales_of_planes(load_scales(value_offsets + page * PAGE, FIELDS, RUN), FIELDS, ASM)
        words = tl.load(keys, eviction_policy="evict_first")
        keys += RUN * D
        left = count - page * PAGE
        scores = ()
        lower = tl.zeros((RUN, COLUMNS), tl.float32)
        for field in tl.static_range(FIELDS):
            if KEY_OFFSETS:
                start = tl.zeros((RUN, COLUMNS), tl.float32)
            else:
                start = tl.broadcast_to((query_sum * (-MIDDLE * sum_of_steps(BITS, field)))[None, :], (RUN, COLUMNS))
            product = tl.dot(plane_operand(words, field, BITS, ASM), operand, start, out_dtype=tl.float32)
            score = product if place(BITS, field) == 0 else product - lower
            lower = product
            unit = (key_scale[field].to(tl.float32) * (1 / step_of(BITS, field)))[:, None]
            if CUT:
                score *= unit
            else:
                level = tl.where(run + field * RUN < left, 0.0, LOW)[:, None]
                if KEY_OFFSETS:
                    level = level + key_level[field].to(tl.float32)[:, None] * query_sum[None, :]
                score = score * unit + level
            scores = scores + (score,)  # noqa: RUF005
        if CUT and left < PAGE:
            scores = _cut(scores, left, FIELDS, RUN)
        peak = tl.full((RUN, COLUMNS), LOW, tl.float32)
        for field in tl.static_range(FIELDS):
            peak = tl.maximum(peak, scores[field])
        new = tl.maximum(top, tl.max(peak, 0))
        decay = tl.exp2(top - new)
        top = new
        total *= decay[None, :]
        output *= decay[None, :]
        if VALUE_OFFSETS:
            offset *= decay[None, :]
        else:
            middle *= decay[None, :]
        words = tl.load(values, eviction_policy="evict_first")
        values += RUN * D
        upper = tl.zeros((RUN, COLUMNS), tl.float32)
        for field in tl.static_range(FIELDS - 1, -1, -1):
            weight = tl.exp2(scores[field] - new[None, :])
            total += weight
            unit = value_scale[field].to(tl.float32) * (2**-18 / step_of(BITS, field))  # all come out times 2**-18
            own = weight * unit[:, None]
            scaled = (own if is_last(BITS, field) else own - upper).to(tl.float16)
            upper = own
            output = tl.dot(plane_operand(words, field, BITS, ASM), scaled, output, out_dtype=tl.float32)
            if VALUE_OFFSETS:
                offset += weight * value_level[field].to(tl.float32)[:, None]
            else:
                sums = tl.full((16, RUN), sum_of_steps(BITS, field) * 2**24, tl.float16)
                middle = tl.dot(sums, scaled, middle, out_dtype=tl.float32)
    shift = tl.sum(offset, 0) if VALUE_OFFSETS else tl.max(middle, 0) * (-MIDDLE / 64)  # of 16 equal rows
    return output * 262144.0 + shift[None, :], top, tl.sum(total, 0)


@triton.jit
def _floats(
    operand, keys, values, new_keys, new_values, held, first, last, NEW: tl.constexpr,
):  # fmt: skip
    """As `_pages`, over places first .. last - 1 of tokens in float16, of which `held` are taken; pointers are at the
    head. The token at `new_keys` comes after these, and is kept in their place."""
    D: tl.constexpr = operand.shape[0]
    COLUMNS: tl.constexpr = operand.shape[1]
    TILE: tl.constexpr = 16
    token = tl.arange(0, TILE)
    channel = tl.arange(0, D)
    top = tl.full((COLUMNS,), LOW, tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    output = tl.zeros((D, COLUMNS), tl.float32)
    count = held
    if NEW:
        count += 1
        new_key = tl.load(new_keys + channel).to(tl.float16)
        new_value = tl.load(new_values + channel).to(tl.float16)
        if (first <= held) & (held < last):
            tl.store(keys + held * D + channel, new_key)
            tl.store(values + held * D + channel, new_value)
    for start in tl.range(first, last, TILE, num_stages=1):  # once, usually: a pipeline's buffers would cost the others
        here = start + token
        inside = here < last
        key = tl.load(keys + here[:, None] * D + channel[None, :], mask=inside[:, None], other=0.0)
        value = tl.load(values + here[None, :] * D + channel[:, None], mask=inside[None, :], other=0.0)
        if NEW:
            key = tl.where((here == held)[:, None], new_key[None, :], key)
            value = tl.where((here == held)[None, :], new_value[:, None], value)
        live = inside & (here < count)
        score = tl.where(live[:, None], tl.dot(key, operand, out_dtype=tl.float32), LOW)
        new = tl.maximum(top, tl.max(score, 0))
        decay = tl.exp2(top - new)
        top = new
        weight = tl.where(live[:, None], tl.exp2(score - new[None, :]), 0.0)
        total = total * decay + tl.sum(weight, 0)
        output = tl.dot(value, weight.to(tl.float16), output * decay[None, :], out_dtype=tl.float32)
    return output, top, total


@triton.jit
def _halves(numbers):
    return numbers[0] >> 1, numbers[1] >> 1, numbers[2] >> 1


@triton.jit
def _ask(
    tensors, numbers, local, head, D: tl.constexpr, BITS: tl.constexpr, KEY_SHARED: tl.constexpr,
    VALUE_SHARED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Have the first pages of split `local`, and its scales, brought to the L2 cache, while the query is prepared."""
    key_words, key_scales, _, value_words, value_scales, _ = tensors
    _, n_pages, splits = _halves(numbers)
    WORDS: tl.constexpr = PAGE * BITS // 16 * D
    first = local * n_pages // splits
    n = (local + 1) * n_pages // splits - first
    if n > 0:
        words = (head.to(tl.int64) * n_pages + first) * WORDS
        keys = (first if KEY_SHARED else head * n_pages + first) * PAGE
        values = (first if VALUE_SHARED else head * n_pages + first) * PAGE
        _prefetch(key_words + words, tl.minimum(n, 2) * (WORDS * 2), ASM)
        _prefetch(value_words + words, tl.minimum(n, 2) * (WORDS * 2), ASM)
        _prefetch(key_scales + keys, tl.minimum(n, 64) * (PAGE * 2), ASM)
        _prefetch(value_scales + values, tl.minimum(n, 64) * (PAGE * 2), ASM)


@triton.jit
def _segment(
    tensors, numbers, local, head, operand, lengths, BITS: tl.constexpr, KEY_SHARED: tl.constexpr,
    VALUE_SHARED: tl.constexpr, KEY_OFFSETS: tl.constexpr, VALUE_OFFSETS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """`_pages` of split `local` of one segment."""
    key_words, key_scales, key_offsets, value_words, value_scales, value_offsets = tensors
    entry, n_pages, splits = _halves(numbers)
    words = head.to(tl.int64) * n_pages * (PAGE * BITS // 16 * operand.shape[0])
    keys = 0 if KEY_SHARED else head * n_pages * PAGE
    values = 0 if VALUE_SHARED else head * n_pages * PAGE
    return _pages(
        operand, key_words + words, key_scales + keys, key_offsets + keys, value_words + words, value_scales + values,
        value_offsets + values, tl.load(lengths + entry), local * n_pages // splits, (local + 1) * n_pages // splits,
        BITS, KEY_OFFSETS, VALUE_OFFSETS, ASM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_queries", "n_slots", "numbers", "float_splits", "capacity", "new_stride"])
def decode_kernel(
    query, new_keys, new_values, work, scaling, mean, channel_scales, segments, numbers, float_keys, float_values,
    lengths, n_queries, n_slots, float_splits, capacity, new_stride,
    D: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr, ROTATE_KEYS: tl.constexpr,
    ROTATE_VALUES: tl.constexpr, KEY_SHARED: tl.constexpr, VALUE_SHARED: tl.constexpr, KEY_OFFSETS: tl.constexpr,
    VALUE_OFFSETS: tl.constexpr, MEAN: tl.constexpr, CHANNEL_SCALES: tl.constexpr, NEW: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Grid (splits of the tokens in 16 bits, then of all segments; heads).

    Args:
        query: [heads, n_queries, D] of any float type, original basis.
        new_keys, new_values: the newest token [heads, D] of any float type, or not read.
        work: float32 [heads, n_slots, COLUMNS, D] outputs, unnormalized, then [heads, n_slots, COLUMNS] maxima, powers
            of 2, and as many sums.
        segments: of each segment the words, scales and offsets of keys, then of values.
        numbers: of each segment 2n + 1 of its entry in `lengths`, of its pages, and of its splits.
        lengths: int32, tokens in 16 bits, then of each segment.
        capacity: of `float_keys` and `float_values` [heads, capacity, D].
        BITS: of each segment.
    """
    slot = tl.program_id(0)
    head = tl.program_id(1)
    if ASM:
        gdc_launch_dependents()
    local = slot - float_splits
    for index in tl.static_range(len(BITS)):
        if (local >= 0) & (local < (numbers[index][2] >> 1)):
            _ask(segments[index], numbers[index], local, head, D, BITS[index], KEY_SHARED, VALUE_SHARED, ASM)
        local -= numbers[index][2] >> 1
    if ASM:
        gdc_wait()
    column = tl.arange(0, COLUMNS)
    channel = tl.arange(0, D)
    inside = column < n_queries
    row = query + (head * n_queries + column)[None, :] * D + channel[:, None]
    operand = tl.load(row, mask=inside[None, :], other=0.0).to(tl.float32)
    output = tl.zeros((D, COLUMNS), tl.float32)
    top = tl.full((COLUMNS,), LOW, tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    if slot < float_splits:
        output, top, total = _floats(
            (operand * scaling).to(tl.float16), float_keys + head * capacity * D, float_values + head * capacity * D,
            new_keys + head * new_stride, new_values + head * new_stride, tl.load(lengths),
            slot * capacity // float_splits, (slot + 1) * capacity // float_splits, NEW,
        )  # fmt: skip
    else:
        shift = tl.zeros((COLUMNS,), tl.float32)
        if MEAN:
            shift = tl.sum(operand * tl.load(mean + head * D + channel).to(tl.float32)[:, None], 0) * scaling
        if ROTATE_KEYS:
            operand = rotate_columns(operand, D, D == 128)
        local = slot - float_splits
        for index in tl.static_range(len(BITS)):
            if (local >= 0) & (local < (numbers[index][2] >> 1)):
                output, top, total = _segment(
                    segments[index], numbers[index], local, head, (operand * scaling).to(tl.float16), lengths,
                    BITS[index], KEY_SHARED, VALUE_SHARED, KEY_OFFSETS, VALUE_OFFSETS, ASM,
                )  # fmt: skip
            local -= numbers[index][2] >> 1
        top += shift
        if ROTATE_VALUES:
            output = rotate_columns(output, D)
        if CHANNEL_SCALES:
            output *= tl.load(channel_scales + head * D + channel).to(tl.float32)[:, None]
    at = (head * n_slots + slot) * COLUMNS + column
    tl.store(work + at[None, :] * D + channel[:, None], output, mask=inside[None, :])
    tops = work + tl.num_programs(1) * n_slots * (COLUMNS * D)
    tl.store(tops + at, top)
    tl.store(tops + tl.num_programs(1) * n_slots * COLUMNS + at, total)


@triton.jit(do_not_specialize=["n_queries", "n_slots"])
def merge_kernel(
    work, result, lse, lengths, n_queries, n_slots,
    SLOTS: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, NEW: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """One softmax over all splits. Grid (heads * n_queries, D / CHUNK).

    work as `decode_kernel` left it; result [heads, n_queries, D]; lse [heads, n_queries]; lengths[0] counts the newest
    token from here on.
    """
    row = tl.program_id(0)
    heads = tl.num_programs(0) // n_queries
    if ASM:
        gdc_wait()
    channel = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    split = tl.arange(0, SLOTS)
    live = split < n_slots
    at = (row // n_queries * n_slots + split) * COLUMNS + row % n_queries
    tops = work + heads * n_slots * (COLUMNS * D)
    top = tl.load(tops + at, mask=live, other=LOW)
    total = tl.load(tops + heads * n_slots * COLUMNS + at, mask=live, other=0.0)
    output = tl.load(work + at[:, None] * D + channel[None, :], mask=live[:, None], other=0.0)
    best = tl.max(top, 0)
    weight = tl.where(total > 0, tl.exp2(top - best), 0.0)
    whole = tl.sum(total * weight, 0)
    merged = tl.sum(output * weight[:, None], 0) / whole
    tl.store(result + row * D + channel, merged.to(result.dtype.element_ty))
    if tl.program_id(1) == 0:
        tl.store(lse + row, (best + tl.log2(whole)) * 0.6931471805599453)
        if NEW and row == 0:
            tl.store(lengths, tl.load(lengths) + 1)
