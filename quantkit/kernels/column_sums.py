"""Products of few rows of x with packed codes whose *columns* lie one after the other in memory, on a CPU.

The product of a row of x with a weight is a sum of the weight's columns, weighted by x, and inside a group of columns
the codes can be summed before they are scaled:

    y[o] = sum_g scales[o, g] * sum_{i in g} (codes[o, i] - zeros[o, g]) x[i]

torch sums weighted rows of a table of bytes in one operation, vectorized, in parallel and in float32
(``quantized::embedding_bag_byte_rowwise_offsets``); behind the bytes of a row stand a scale and an offset of its own. A
table row is a column of codes here. One mask over bytes ``[columns / 4, out]`` yields every fourth of them (2 bits), in
units of 1, 4, 16 or 64, by which x is divided. A code that crosses into the next byte is two such *pieces*.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import torch
from torch import Tensor

FEW_ROWS = 8  # rows of x up to which this is faster than decoding
_SCRATCH_BYTES = 2 << 20  # codes that are unpacked at a time, per thread: stay in cache
_SHORTEST_RUN = 16  # columns in one sum
_LONGEST_RUN = 512
_TAIL_BYTES = 8  # of scale and offset, float32


def may_sum_columns(bits: int, group_size: int) -> bool:
    """Whether codes can be held for it: groups of whole periods of the bit stream, sums of 16 columns or more."""
    n_codes = _period(bits)[1]
    return group_size % n_codes == 0 and _run(n_codes, group_size) * n_codes >= _SHORTEST_RUN


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
    n_bytes, n_codes = _period(bits)
    n_out, run = len(packed), _run(n_codes, group_size)
    n_runs = packed.shape[1] // (run * n_bytes)
    aligned = n_out % 8 == 0 and packed.storage_offset() % 8 == 0 and packed.stride(1) % 8 == 0
    word = torch.int64 if aligned else torch.uint8
    zero = zeros if isinstance(zeros, float) else 0.0
    columns, units, tails, masks = _pieces(bits, zero, word)
    each = x.reshape(m, n_runs, run, n_codes)
    each = each if n_bytes == 1 else each.index_select(3, columns)
    weights = (each * units).transpose(2, 3).contiguous()
    size = run * len(units)
    step = min(n_runs, max(1, _SCRATCH_BYTES // (n_out * size)) * torch.get_num_threads())
    words = packed.t().view(word).view(n_runs, run, n_bytes, -1).unsqueeze(1)
    scratch = packed.new_empty(step, len(units), run, n_out + _TAIL_BYTES)
    fields, ends = scratch.view(word).tensor_split([words.shape[4]], 3)
    ends.copy_(tails)
    rows = scratch.view(-1, scratch.shape[3])
    sums = []
    for first in range(0, n_runs, step):
        here = min(step, n_runs - first)
        for byte, (some, mask) in enumerate(masks):
            torch.bitwise_and(words[first : first + here, :, :, byte], mask, out=fields[:here, some])
        part = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            rows,
            *_bags(m, here, size),
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
def _run(n_codes: int, group_size: int) -> int:
    """Periods that are summed at once: a divisor of those of a group."""
    periods = group_size // n_codes
    return max(run for run in range(1, max(1, _LONGEST_RUN // n_codes) + 1) if periods % run == 0)


def _period(bits: int) -> tuple[int, int]:
    """Bytes and codes after which the bit stream of a row repeats."""
    n_bytes = bits // gcd(bits, 8)
    return n_bytes, 8 * n_bytes // bits


@lru_cache(maxsize=64)
def _pieces(bits: int, zero: float, word: torch.dtype) -> tuple[Tensor, Tensor, Tensor, list[tuple[slice, Tensor]]]:
    """The pieces of a period: parts of codes that lie in one byte.

    Returns:
        Of which code each is, and what that column of x is multiplied by, ``[pieces]``; their tails, words
        ``[pieces, 1, n]``; of each byte, which pieces are its, and their masks ``[pieces of the byte, 1, n]``.
    """
    columns, units, tails = [], [], []
    fields: list[list[int]] = []
    for byte in range(_period(bits)[0]):
        fields.append([])
        for code in range(8 * byte // bits, -(-8 * (byte + 1) // bits)):
            shift = code * bits - 8 * byte  # where the code begins; before the byte where it crossed into it
            columns.append(code)
            units.append(0.5**shift)
            tails.append([1.0, -zero * 2.0**shift if shift >= 0 else 0.0])
            fields[byte].append((1 << min(shift + bits, 8)) - (1 << max(shift, 0)))
    with torch.inference_mode(False), torch.device("cpu"):  # whatever the first call runs in: the next ones use these
        masks: list[tuple[slice, Tensor]] = []
        for mine in fields:
            first = masks[-1][0].stop if masks else 0
            mask = torch.tensor([[[field] * word.itemsize] for field in mine], dtype=torch.uint8).view(word)
            masks.append((slice(first, first + len(mine)), mask))
        tail = torch.tensor(tails).unsqueeze(1).view(torch.uint8).view(word)
        return torch.tensor(columns), torch.tensor(units), tail, masks


@lru_cache(maxsize=64)
def _bags(m: int, n_bags: int, size: int) -> tuple[Tensor, Tensor]:
    """Rows of the table and where each sum begins, for ``m`` times the same rows."""
    with torch.inference_mode(False), torch.device("cpu"):
        rows = torch.arange(n_bags * size, dtype=torch.int32).repeat(m)
        return rows, torch.arange(0, len(rows) + 1, size, dtype=torch.int32)
