"""Products of few rows of x with packed codes whose *columns* lie one after the other in memory, on a CPU.

The product of a row of x with a weight is a sum of the weight's columns, weighted by x, and inside a group of columns
the codes can be summed before they are scaled:

    y[o] = sum_g scales[o, g] * sum_{i in g} (codes[o, i] - zeros[o, g]) x[i]

torch sums weighted rows of a table of bytes in one operation, vectorized, in parallel and in float32
(``quantized::embedding_bag_byte_rowwise_offsets``); behind the bytes of a row stand a scale and an offset of its own. A
table row is a column of codes here. One mask over bytes ``[columns / 4, out]`` yields every fourth of them (2 bits), in
units of 1, 4, 16 or 64, by which x is divided.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

FEW_ROWS = 8  # rows of x up to which this is faster than decoding
_SCRATCH_BYTES = 2 << 20  # codes that are unpacked at a time, per thread: stay in cache
_LONGEST_RUN = 512  # columns in one sum, at most
_TAIL_BYTES = 8  # of scale and offset, float32


def may_sum_columns(bits: int, group_size: int) -> bool:
    """Whether codes can be held for it: of a power of two bits, in groups of whole bytes, with sums of 16 or more."""
    return 8 % bits == 0 and group_size * bits % 8 == 0 and _run(bits, group_size) * 8 >= 16 * bits


def by_columns(packed: Tensor) -> Tensor:
    """Packed codes ``[out, bytes]``, the same, but column after column in memory."""
    return packed.t().contiguous().t()


def is_by_columns(packed: Tensor) -> bool:
    """Whether they are, or are a slice of the rows of such."""
    return packed.stride(0) == 1 and packed.stride(1) >= len(packed) > 1


def sums_columns(packed: Tensor, bits: int, group_size: int) -> bool:
    """Whether `column_sums` takes these codes."""
    return is_by_columns(packed) and packed.device.type == "cpu" and may_sum_columns(bits, group_size)


def column_sums(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | float, bits: int) -> Tensor:
    """``sum_g scales[:, g] * sum_{i in g} (codes[:, i] - zeros[:, g]) x[:, i]``.

    Args:
        x: float32 ``[m, count, group_size]``.
        packed: uint8 ``[out, bytes]`` of which `sums_columns` is true.
        scales: float32 ``[out, count]``.
        zeros: the same, or one for all codes.
        bits: of the codes.

    Returns:
        float32 ``[m, out]``.
    """
    m, count, group_size = x.shape
    table = packed.t()
    planes, n_out, run = 8 // bits, len(packed), _run(bits, group_size)
    n_runs = len(table) // run
    aligned = n_out % 8 == 0 and packed.storage_offset() % 8 == 0 and packed.stride(1) % 8 == 0
    word = torch.int64 if aligned else torch.uint8
    units, masks, tails = _constants(bits, zeros if isinstance(zeros, float) else 0.0, word)
    weights = (x.reshape(m, n_runs, run, planes) * units).transpose(2, 3).contiguous()
    step = min(n_runs, max(1, _SCRATCH_BYTES // (n_out * run * planes)) * torch.get_num_threads())
    scratch = table.new_empty(step, planes, run, n_out + _TAIL_BYTES)
    words = table.view(word).view(n_runs, 1, run, -1)
    codes, ends = scratch.view(word).tensor_split([words.shape[3]], 3)
    ends.copy_(tails)
    rows = scratch.view(-1, scratch.shape[3])
    sums = []
    for first in range(0, n_runs, step):
        here = min(step, n_runs - first)
        torch.bitwise_and(words[first : first + here], masks, out=codes[:here])
        part = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            rows,
            *_bags(m, here, run * planes),
            False,  # not by frequency of rows
            0,  # sums
            False,  # no rows left out
            weights[:, first : first + here].reshape(-1),
            None,
            True,  # the last of the bags' offsets is the end
        )
        sums.append(part.view(m, here, n_out))
    grouped = (sums[0] if len(sums) == 1 else torch.cat(sums, 1)).view(m, count, -1, n_out)
    total = grouped.squeeze(2) if grouped.shape[2] == 1 else grouped.sum(2)
    if isinstance(zeros, Tensor):
        total.addcmul_(x.sum(2, keepdim=True), zeros.t(), value=-1)
    return total.mul_(scales.t()).sum(1)


@lru_cache(maxsize=64)
def _run(bits: int, group_size: int) -> int:
    """Bytes of the codes of one output that are summed at once: a divisor of a group's."""
    n_bytes = group_size * bits // 8
    return max(run for run in range(1, _LONGEST_RUN * bits // 8 + 1) if n_bytes % run == 0)


@lru_cache(maxsize=64)
def _constants(bits: int, zero: float, word: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of each plane: what x is multiplied by, float32 ``[planes]``; its mask and its tail, words ``[planes, 1, n]``."""
    shifts = range(0, 8, bits)
    units = torch.tensor([0.5**shift for shift in shifts])
    masks = torch.tensor([[[(1 << bits) - 1 << shift] * word.itemsize] for shift in shifts], dtype=torch.uint8)
    tails = torch.tensor([[[1.0, -zero * 2.0**shift]] for shift in shifts])
    return units, masks.view(word), tails.view(word)


@lru_cache(maxsize=64)
def _bags(m: int, n_bags: int, size: int) -> tuple[Tensor, Tensor]:
    """Rows of the table and where each sum begins, for ``m`` times the same rows."""
    rows = torch.arange(n_bags * size, dtype=torch.int32).repeat(m)
    return rows, torch.arange(0, len(rows) + 1, size, dtype=torch.int32)
