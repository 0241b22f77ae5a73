"""Torch twin of the `grouped_int` product (grouped_int.py), for the CPU.

It walks over row tiles of bounded size and unpacks *planes*: the bit stream repeats every byte (1, 2, 4, 8 bits) or
every few 16-bit words (3, 5, 6, 7), so code f of every such block sits at the same place, and one mask over whole rows
yields all of them (4 bits, two codes per byte):

    byte      0        1        2                plane 0 = byte & 15     columns 0, 2, 4, ...
           |c1 |c0  |c3 |c2  |c5 |c4   ...       plane 1 = byte & 240    columns 1, 3, 5, ..., in units of 16

The codes stay in plane order and in their units; x is brought into the same order and divided by the units once, which
costs far less than interleaving and shifting codes.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import torch
from torch import Tensor

from quantkit.formats.grouped_int import GroupedIntSpec, stored_zeros, symmetric_zero

_TILE_BYTES = 4 << 20  # float32 tile of decoded weights while few rows of x share it: stays in cache
_TILE_BYTES_WIDE = 16 << 20  # with many rows of x the matrix product dominates and prefers a wider right-hand side
_LONG_RUN = 16  # contiguous columns per scale from which broadcasting is faster than a gathered copy of the scales
_WIDE_ROWS = 64  # rows of x from which the wide tile is used, and bfloat16 is multiplied as such


def matmul_reference(x: Tensor, spec: GroupedIntSpec, tensors: dict[str, Tensor], bias: Tensor | None) -> Tensor:
    """Torch twin: ``[m, in]`` to ``[m, out]`` in ``x.dtype``, row tile by row tile.

    Float32 products; but many rows of bfloat16 are multiplied by the weight rounded to bfloat16, as in a dense model.
    """
    m = x.shape[0]
    rounded = x.dtype == torch.bfloat16 and m >= _WIDE_ROWS and not x.is_cuda
    grouped = (x if rounded else x.float()).reshape(m, spec.n_groups, spec.group_size)
    if "group_order" in tensors:
        grouped = grouped.index_select(1, tensors["group_order"].long())
    scales = tensors["scales"].float()
    zeros = _zeros(spec, tensors)
    parts = []
    start = 0
    for bits, count in spec.segments:
        here = slice(start, start + count)
        parts.append(_Part(grouped[:, here], tensors[f"codes_{bits}b"], scales[:, here], zeros[:, here], bits))
        start += count
    if rounded:
        return _rounded_product(parts, spec.out_features, None if bias is None else bias.to(x.dtype))
    sums = grouped.sum(-1)
    out = -((sums * zeros) @ scales.t() if spec.symmetric else sums @ (scales * zeros).t())
    if bias is not None:
        out += bias.float()
    for part in parts:
        _add_codes(out, part)
    return out.to(x.dtype)


def _zeros(spec: GroupedIntSpec, tensors: dict[str, Tensor]) -> Tensor:
    """float32 ``[out, G]`` in stored order; symmetric ones, which are the same in every row, ``[1, G]``."""
    if not spec.symmetric:
        return stored_zeros(spec, tensors)
    columns = [symmetric_zero(bits) for bits, count in spec.segments for _ in range(count)]
    return torch.tensor([columns], device=tensors["scales"].device)


class _Part:
    """One segment of a product: x in plane order, and tiles of decoded rows.

    Args:
        x: ``[m, count, group_size]``.
        packed: uint8 ``[out, bytes]``.
        scales, zeros: float32 ``[out, count]``; zeros also ``[1, count]``.
        bits: of the codes.
    """

    def __init__(self, x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> None:
        m, count, group_size = x.shape
        self.packed, self.scales, self.zeros, self.bits = packed, scales, zeros, bits
        self.period, _ = _block(bits)
        self.n_blocks = -(-count * group_size // self.period)
        self.n_columns = self.n_blocks * self.period
        columns = x.reshape(m, count * group_size)
        padded = torch.nn.functional.pad(columns, (0, self.n_columns - count * group_size))
        self.units = _plane_units(bits, self.period, x.device)
        planes = padded.reshape(m, self.n_blocks, self.period).transpose(1, 2)
        self.x = (planes / self.units.to(x.dtype)).flatten(1)  # powers of two: exact
        self._grouped, self._spread = _group_view(count, group_size, self.period, x.device)

    def new_tile(self, rows: int) -> tuple[Tensor, Tensor]:
        """Float32 ``[rows, period, n_blocks]``, and uint8 scratch for the codes of as many rows."""
        tile = self.scales.new_empty(rows, self.period, self.n_blocks)
        return tile, self.packed.new_empty(rows * self.period * -(-self.n_blocks // 8) * 8)

    def decode(self, rows: slice, tile: Tensor, scratch: Tensor, centred: bool) -> Tensor:
        """Codes (``centred``: minus zeros) times scales and units, ``[rows, n_columns]`` in plane order."""
        planes = _unpack_planes(self.packed[rows], self.bits, self.n_blocks, scratch)
        weight = tile[: len(planes)].copy_(planes)
        groups = self._grouped(weight)
        if centred:
            zeros = self._spread(self.zeros if len(self.zeros) == 1 else self.zeros[rows])
            groups.sub_(zeros * self.units.view(-1, *[1] * (zeros.ndim - 2)))
        groups.mul_(self._spread(self.scales[rows]))
        return weight.flatten(1)


def _add_codes(out: Tensor, part: _Part) -> None:
    """Add the products of x and scaled codes of one segment to float32 ``out`` [m, out]."""
    tile_bytes = _TILE_BYTES_WIDE if len(out) >= _WIDE_ROWS else _TILE_BYTES
    step = max(1, tile_bytes // (4 * part.n_columns))
    tile, scratch = part.new_tile(min(step, out.shape[1]))
    for first in range(0, out.shape[1], step):
        rows = slice(first, first + step)
        out[:, rows] += part.x @ part.decode(rows, tile, scratch, centred=False).t()


def _rounded_product(parts: list[_Part], out_features: int, bias: Tensor | None) -> Tensor:
    """``[m, out]`` of x and the weight rounded to its dtype; decoded in small tiles, multiplied in wide ones."""
    x = torch.cat([part.x for part in parts], 1)
    out = x.new_empty(len(x), out_features)
    step = min(max(1, _TILE_BYTES // (4 * x.shape[1])), out_features)
    wide = min(step * max(1, _TILE_BYTES_WIDE // (x.itemsize * step * x.shape[1])), out_features)
    tiles = [part.new_tile(step) for part in parts]
    weight = x.new_empty(wide, x.shape[1])
    for first in range(0, out_features, wide):
        last = min(first + wide, out_features)
        for start in range(first, last, step):
            rows = slice(start, min(start + step, last))
            column = 0
            for part, (tile, scratch) in zip(parts, tiles, strict=True):
                here = weight[rows.start - first : rows.stop - first, column : column + part.n_columns]
                here.copy_(part.decode(rows, tile, scratch, centred=True))
                column += part.n_columns
        here = weight[: last - first]
        out[:, first:last] = torch.nn.functional.linear(x, here, None if bias is None else bias[first:last])
    return out


def _group_view(
    count: int, group_size: int, period: int, device: torch.device
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """How to view a tile ``[rows, period, n_blocks]`` and groups' numbers ``[rows, count]``, so that they broadcast."""
    run, rest = divmod(group_size, period)
    if rest == 0 and run >= _LONG_RUN:
        return lambda tile: tile.view(len(tile), period, count, run), lambda each: each[:, None, :, None]
    n_blocks = -(-count * group_size // period)
    column_group = torch.arange(n_blocks * period, device=device).reshape(n_blocks, period).t() // group_size
    column_group.clamp_(max=count - 1)  # the padding after the last group
    if rest == 0:  # every block lies in one group
        return lambda tile: tile, lambda each: each[:, None, column_group[0]]
    return lambda tile: tile, lambda each: each[:, column_group]


def _block(bits: int) -> tuple[int, int]:
    """Codes and bytes of one repetition of the bit stream: a byte where codes divide it, else whole 16-bit words."""
    if 8 % bits == 0:
        return 8 // bits, 1
    period = 16 // gcd(bits, 16)
    return period, period * bits // 8


def _plane_units(bits: int, period: int, device: torch.device) -> Tensor:
    """What a code of each plane counts as it is unpacked, ``[period, 1]``: fields of a byte stay at their bits."""
    shift = bits if 8 % bits == 0 else 0
    return torch.tensor([[2.0 ** (shift * plane)] for plane in range(period)], device=device)


def _unpack_planes(packed: Tensor, bits: int, n_blocks: int, scratch: Tensor) -> Tensor:
    """Rows of a bit stream to integers ``[rows, period, n_blocks]``: plane f holds code f of every block, in its unit.

    ``scratch``: uint8 ``[rows * period * n_blocks]``, n_blocks rounded up to eights, for widths that divide a byte.
    """
    period, n_bytes = _block(bits)
    if period == 1:
        return packed.unsqueeze(1)
    planes = _byte_planes(packed, bits, period, scratch) if n_bytes == 1 else _word_planes(packed, bits, period)
    return planes[:, :, :n_blocks]


def _byte_planes(packed: Tensor, bits: int, period: int, scratch: Tensor) -> Tensor:
    """uint8 planes for 1, 2 and 4 bits: one AND of eight bytes at once for each, fields are not moved."""
    words = _as_words(packed, torch.int64, 8)
    fields = torch.tensor([[(1 << bits) - 1 << bits * plane] * 8 for plane in range(period)], dtype=torch.uint8)
    planes = scratch.view(torch.int64)[: words.numel() * period].view(len(words), period, -1)
    torch.bitwise_and(words[:, None], fields.to(packed.device).view(torch.int64), out=planes)
    return planes.view(torch.uint8)


def _word_planes(packed: Tensor, bits: int, period: int) -> Tensor:
    """int16 planes for 3, 5, 6 and 7 bits."""
    n_words = period * bits // 16
    words = _as_words(packed, torch.int16, 2 * n_words)
    words = words.view(len(words), -1, n_words).permute(2, 0, 1).contiguous()
    planes = words.new_empty(words.shape[1], period, words.shape[2])
    position = torch.arange(period, dtype=torch.int16, device=packed.device) * bits
    for index in range(n_words):
        first = -(-16 * index // bits)  # first code that starts in this word; the last may end in the next one
        last = -(-16 * (index + 1) // bits)
        shifts = position[first:last, None] - 16 * index
        torch.bitwise_right_shift(words[index, :, None], shifts, out=planes[:, first:last])
        tail = last * bits - 16 * (index + 1)  # bits of the last code that lie in the next word
        if tail > 0:
            low = planes[:, last - 1].bitwise_and_((1 << (bits - tail)) - 1)  # undo the sign of the shift
            low |= words[index + 1] << (bits - tail)
    return planes.bitwise_and_((1 << bits) - 1)


def _as_words(packed: Tensor, dtype: torch.dtype, n_bytes: int) -> Tensor:
    """The bytes of each row as words, padded with zeros to a multiple of ``n_bytes``."""
    missing = -packed.shape[1] % n_bytes
    if missing or packed.storage_offset() % dtype.itemsize or not packed.is_contiguous():
        padded = packed.new_zeros(packed.shape[0], packed.shape[1] + missing)
        padded[:, : packed.shape[1]] = packed
        packed = padded
    return packed.view(dtype)
