"""Triton kernels of attention over packed pages. Imported on first use: `import quantkit` does not need Triton.

Split-KV flash decoding for one sequence. Program (split, KV head) takes a range of pages; the query heads of a group
are the columns of the tensor-core products, whose first operand are packed fields, one AND away from the words (a field
with the exponent bits masked is the float16 subnormal code * 2**(p - 24), see grouped_int_triton.py):

    S_e [run, columns]  = field_e(K) [run, D] Q [D, columns]        tokens of plane e
    O   [D, columns]   += field_e(V) [D, run] P_e [run, columns]    the same tokens: nothing is shuffled

Scales multiply scores and probabilities, not codes; offsets are a rank-1 term. The key rotation is done to the query,
in registers. Tokens in 16 bits are one more split, whose output is brought onto the basis of the pages. `merge_kernel`
reads all splits at once: a loop over them would cost one memory latency each.

How many tokens there are is read from the device, and splits without tokens write weights of zero: a captured graph
replays at any length up to the allocated pages.

`ASM=False` replaces the inline PTX by Triton operations with the same result, for the interpreter.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.grouped_int_triton import _field, _field_position, _field_shift

PAGE = tl.constexpr(128)
LOW = tl.constexpr(-1e30)  # stands for minus infinity, whose differences are not numbers


@triton.constexpr_function
def _log2(size):
    return size.bit_length() - 1


@triton.jit
def _rotate(x, D: tl.constexpr):
    """x H for x float32 [columns, D]: each step transforms the highest bit of the index and makes it the lowest."""
    COLUMNS: tl.constexpr = x.shape[0]
    for _ in tl.static_range(_log2(D)):
        first, second = tl.split(tl.permute(tl.reshape(x, (COLUMNS, 2, D // 2)), (0, 2, 1)))
        x = tl.reshape(tl.join(first + second, first - second), (COLUMNS, D))
    return x * (D**-0.5)


@triton.jit
def _plane(words, FIELD: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """float16 operand of one plane: code * 2**(p - 24)."""
    POSITION: tl.constexpr = _field_position(BITS, FIELD, False)
    MASK: tl.constexpr = ((1 << BITS) - 1) << POSITION
    return _field(words, _field_shift(BITS, FIELD, False), MASK, 0, False, ASM)


@triton.constexpr_function
def _power(exponent):
    return 2.0**exponent


@triton.jit
def _store_split(
    output, top, total, outputs, tops, totals, slot, D: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """output [D, columns] and its softmax's maximum and sum, of one split of one head."""
    channel = tl.arange(0, D)
    column = tl.arange(0, COLUMNS)
    tl.store(outputs + slot.to(tl.int64) * (D * COLUMNS) + channel[:, None] * COLUMNS + column[None, :], output)
    tl.store(tops + slot * COLUMNS + column, top)
    tl.store(totals + slot * COLUMNS + column, total)


@triton.jit
def _pages(
    query, key_words, key_scales, key_offsets, value_words, value_scales, value_offsets, count, first, last,
    D: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr, KEY_OFFSETS: tl.constexpr,
    VALUE_OFFSETS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """(output [D, columns] unnormalized, maximum, sum) over pages first .. last - 1; pointers are at the head."""
    FIELDS: tl.constexpr = 16 // BITS
    RUN: tl.constexpr = PAGE // FIELDS
    MIDDLE: tl.constexpr = ((1 << BITS) - 1) / 2
    run = tl.arange(0, RUN)
    channel = tl.arange(0, D)
    operand = query.to(tl.float16)
    query_sum = tl.sum(operand.to(tl.float32), 0)
    top = tl.full((COLUMNS,), LOW, tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    offset = tl.zeros((COLUMNS,), tl.float32)
    output = tl.zeros((D, COLUMNS), tl.float32)
    keys = key_words + first.to(tl.int64) * (RUN * D) + run[:, None] * D + channel[None, :]
    values = value_words + first.to(tl.int64) * (RUN * D) + channel[:, None] * RUN + run[None, :]
    for page in range(first, last):
        words = tl.load(keys, eviction_policy="evict_first")
        keys += RUN * D
        slot = page * PAGE + run
        scores = ()
        new = top
        for field in tl.static_range(FIELDS):
            here = slot + field * RUN
            product = tl.dot(_plane(words, field, BITS, ASM), operand, out_dtype=tl.float32)
            scale = tl.load(key_scales + here).to(tl.float32)
            unit = scale * _power(24 - _field_position(BITS, field, False))
            level = tl.load(key_offsets + here).to(tl.float32) if KEY_OFFSETS else -MIDDLE * scale
            score = product * unit[:, None] + level[:, None] * query_sum[None, :]
            score = tl.where((here < count)[:, None], score, LOW)
            new = tl.maximum(new, tl.max(score, 0))
            scores = scores + (score,)  # noqa: RUF005 - Triton knows no unpacking
        decay = tl.exp2(top - new)
        top = new
        total *= decay
        offset *= decay
        output *= decay[None, :]
        words = tl.load(values, eviction_policy="evict_first")
        values += RUN * D
        for field in tl.static_range(FIELDS):
            here = slot + field * RUN
            weight = tl.exp2(scores[field] - new[None, :])
            total += tl.sum(weight, 0)
            scale = tl.load(value_scales + here).to(tl.float32)
            level = tl.load(value_offsets + here).to(tl.float32) if VALUE_OFFSETS else -MIDDLE * scale
            offset += tl.sum(weight * level[:, None], 0)
            unit = scale * _power(6 - _field_position(BITS, field, False))  # all planes come out times 2**-18
            scaled = (weight * unit[:, None]).to(tl.float16)
            output = tl.dot(_plane(words, field, BITS, ASM), scaled, output, out_dtype=tl.float32)
    return output * 262144.0 + offset[None, :], top, total


@triton.jit
def _floats(
    query, keys, values, count, TILE: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """As `_pages`, over tokens in float16; pointers are at the head."""
    token = tl.arange(0, TILE)
    channel = tl.arange(0, D)
    operand = query.to(tl.float16)
    top = tl.full((COLUMNS,), LOW, tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    output = tl.zeros((D, COLUMNS), tl.float32)
    for start in range(0, count, TILE):
        live = start + token < count
        tile = tl.load(keys + (start + token)[:, None] * D + channel[None, :], mask=live[:, None], other=0.0)
        score = tl.where(live[:, None], tl.dot(tile, operand, out_dtype=tl.float32), LOW)
        new = tl.maximum(top, tl.max(score, 0))
        decay = tl.exp2(top - new)
        top = new
        weight = tl.where(live[:, None], tl.exp2(score - new[None, :]), 0.0)
        total = total * decay + tl.sum(weight, 0)
        tile = tl.load(values + (start + token)[None, :] * D + channel[:, None], mask=live[None, :], other=0.0)
        output = tl.dot(tile, weight.to(tl.float16), output * decay[None, :], out_dtype=tl.float32)
    return output, top, total


@triton.jit(do_not_specialize=["n_queries", "segment", "first_slot", "n_slots", "splits"])
def decode_kernel(
    query, scaling, mean, key_words, key_scales, key_offsets, value_words, value_scales, value_offsets, float_keys,
    float_values, channel_scales, lengths, outputs, tops, totals, n_queries, segment, first_slot, n_slots, splits,
    word_stride, key_scale_stride, value_scale_stride, float_stride,
    D: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr, ROTATE_KEYS: tl.constexpr,
    ROTATE_VALUES: tl.constexpr, KEY_OFFSETS: tl.constexpr, VALUE_OFFSETS: tl.constexpr, MEAN: tl.constexpr,
    CHANNEL_SCALES: tl.constexpr, TILE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Grid (splits, or splits + 1 with the tokens in 16 bits, heads). Writes slots first_slot .. of every head.

    query [heads, n_queries, D] of any float type, original basis; lengths int32: tokens in 16 bits, then of each
    segment. outputs float32 [heads, n_slots, D, COLUMNS] unnormalized, on the basis of the pages' values; tops and
    totals float32 [heads, n_slots, COLUMNS], powers of 2.
    """
    split = tl.program_id(0)
    head = tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    channel = tl.arange(0, D)
    inside = column < n_queries
    row = query + (head * n_queries + column)[:, None] * D + channel[None, :]
    raw = tl.load(row, mask=inside[:, None], other=0.0).to(tl.float32) * scaling
    slot = head * n_slots + first_slot + split
    if split < splits:
        count = tl.load(lengths + segment)
        n_pages = (count + PAGE - 1) // PAGE
        per = (n_pages + splits - 1) // splits
        first = tl.minimum(split * per, n_pages)
        last = tl.minimum(first + per, n_pages)
        inner = raw
        if ROTATE_KEYS:
            inner = _rotate(raw, D)
        output, top, total = _pages(
            tl.trans(inner), key_words + head.to(tl.int64) * word_stride, key_scales + head * key_scale_stride,
            key_offsets + head * key_scale_stride, value_words + head.to(tl.int64) * word_stride,
            value_scales + head * value_scale_stride, value_offsets + head * value_scale_stride, count, first, last,
            D, BITS, COLUMNS, KEY_OFFSETS, VALUE_OFFSETS, ASM,
        )  # fmt: skip
        if MEAN:
            top += tl.sum(raw * tl.load(mean + head * D + channel).to(tl.float32)[None, :], 1)
        _store_split(output, top, total, outputs, tops, totals, slot, D, COLUMNS)
    else:
        output, top, total = _floats(
            tl.trans(raw), float_keys + head * float_stride, float_values + head * float_stride, tl.load(lengths), TILE,
            D, COLUMNS,
        )  # fmt: skip
        if CHANNEL_SCALES:
            output /= tl.load(channel_scales + head * D + channel).to(tl.float32)[:, None]
        if ROTATE_VALUES:
            output = tl.trans(_rotate(tl.trans(output), D))
        _store_split(output, top, total, outputs, tops, totals, slot, D, COLUMNS)


@triton.jit(do_not_specialize=["n_queries", "n_slots"])
def merge_kernel(
    outputs, tops, totals, result, lse, n_queries, n_slots,
    SLOTS: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One softmax over all splits. Grid (heads, D / CHUNK); result [heads, n_queries, D], lse [heads, n_queries]."""
    head = tl.program_id(0)
    channel = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    column = tl.arange(0, COLUMNS)
    split = tl.arange(0, SLOTS)
    live = split < n_slots
    slot = head * n_slots + split
    top = tl.load(tops + slot[:, None] * COLUMNS + column[None, :], mask=live[:, None], other=LOW)
    total = tl.load(totals + slot[:, None] * COLUMNS + column[None, :], mask=live[:, None], other=0.0)
    part = slot.to(tl.int64)[:, None, None] * (D * COLUMNS) + channel[None, :, None] * COLUMNS + column[None, None, :]
    output = tl.load(outputs + part, mask=live[:, None, None], other=0.0)
    best = tl.max(top, 0)
    weight = tl.where(total > 0, tl.exp2(top - best[None, :]), 0.0)
    whole = tl.sum(total * weight, 0)
    merged = tl.sum(output * weight[:, None, :], 0) / whole[None, :]
    inside = column < n_queries
    target = result + (head * n_queries + column)[None, :] * D + channel[:, None]
    tl.store(target, merged.to(result.dtype.element_ty), mask=inside[None, :])
    if tl.program_id(1) == 0:
        tl.store(lse + head * n_queries + column, (best + tl.log2(whole)) * 0.6931471805599453, mask=inside)


@triton.jit(do_not_specialize=["n_queries"])
def finish_kernel(
    merged, channel_scales, result, n_queries,
    D: tl.constexpr, COLUMNS: tl.constexpr, ROTATE: tl.constexpr, CHANNEL_SCALES: tl.constexpr,
):  # fmt: skip
    """The merged output [heads, n_queries, D] on the original basis. Grid (heads,)."""
    head = tl.program_id(0)
    channel = tl.arange(0, D)
    column = tl.arange(0, COLUMNS)
    inside = (column < n_queries)[:, None]
    place = (head * n_queries + column)[:, None] * D + channel[None, :]
    output = tl.load(merged + place, mask=inside, other=0.0)
    if ROTATE:
        output = _rotate(output, D)
    if CHANNEL_SCALES:
        output *= tl.load(channel_scales + head * D + channel).to(tl.float32)[None, :]
    tl.store(result + place, output.to(result.dtype.element_ty), mask=inside)
