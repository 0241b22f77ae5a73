"""Torch twin of the `grouped_int` product (grouped_int.py), for the CPU.

It walks over row tiles of bounded size. Codes of 2, 4 and 8 bits are decoded by one operation of torch (fused_rows.py),
and few rows of x need no decoding where the codes lie column after column (column_sums.py). Else *planes* are unpacked:
the bit stream repeats every byte (1, 2, 4, 8 bits) or every few 16-bit words (3, 5, 6, 7), so code f of every such
block sits at the same place, and one mask over whole rows yields all of them (4 bits, two codes per byte):

    byte      0        1        2                plane 0 = byte & 15     columns 0, 2, 4, ...
           |c1 |c0  |c3 |c2  |c5 |c4   ...       plane 1 = byte & 240    columns 1, 3, 5, ..., in units of 16

The codes stay in plane order and in their units; x is brought into the same order and divided by the units once, which
costs far less than interleaving and shifting codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor

from quantkit.formats.grouped_int import GroupedIntSpec, stored_zeros, symmetric_zero
from quantkit.kernels.column_sums import FEW_ROWS, column_sums, sums_columns
from quantkit.kernels.fused_rows import FusedRows, can_fuse

_TILE_BYTES = 4 << 20  # float32 tile of decoded weights while few rows of x share it: stays in cache
_TILE_BYTES_WIDE = 8 << 20  # with many rows of x the matrix product dominates and prefers a wider right-hand side
_WIDE_ROWS = 64  # rows of x from which it does, and bfloat16 is multiplied as such
_ROUNDED_BYTES = 16 << 20  # tile of weights rounded to bfloat16; larger ones would be fresh memory in each call
_DECODED_BYTES = 2 << 20  # float32 weights that are decoded at a time for it
_LONG_RUN = 16  # contiguous columns per scale from which broadcasting is faster than a gathered copy of the scales


def matmul_reference(x: Tensor, spec: GroupedIntSpec, tensors: dict[str, Tensor], bias: Tensor | None) -> Tensor:
    """Torch twin: ``[m, in]`` to ``[m, out]`` in ``x.dtype``, row tile by row tile.

    Float32 products; but many rows of bfloat16 are multiplied by the weight rounded to bfloat16, as in a dense model.
    """
    rounded = x.dtype == torch.bfloat16 and len(x) >= _WIDE_ROWS and not x.is_cuda
    segments = _segments(x if rounded else x.float(), spec, tensors)
    if rounded:
        parts = [_decoder(segment, centred=True) for segment in segments]
        return _rounded_product(parts, spec.out_features, None if bias is None else bias.to(x.dtype))
    out = None if bias is None else bias.float().repeat(len(x), 1)
    for segment in segments:
        out = _plus_segment(out, segment)
    assert out is not None
    return out.to(x.dtype)


@dataclass(frozen=True, slots=True)
class _Segment:
    """The columns of one width."""

    x: Tensor  # [m, count, group_size]
    packed: Tensor  # uint8 [out, bytes]
    scales: Tensor  # float32 [out, count]
    zeros: Tensor | None  # float32 [out, count]; None: symmetric
    bits: int
    fuses: bool  # whether `FusedRows` takes it


def _segments(x: Tensor, spec: GroupedIntSpec, tensors: dict[str, Tensor]) -> list[_Segment]:
    grouped = x.reshape(len(x), spec.n_groups, spec.group_size)
    if "group_order" in tensors:
        grouped = grouped.index_select(1, tensors["group_order"].long())
    scales = tensors["scales"].float()
    zeros = None if spec.symmetric else stored_zeros(spec, tensors)
    segments = []
    start = 0
    for bits, count in spec.segments:
        here = slice(start, start + count)
        packed = tensors[f"codes_{bits}b"]
        fuses = can_fuse(packed, tensors["scales"], bits, spec.group_size)
        mine = None if zeros is None else zeros[:, here]
        segments.append(_Segment(grouped[:, here], packed, scales[:, here], mine, bits, fuses))
        start += count
    return segments


def _plus_segment(out: Tensor | None, segment: _Segment) -> Tensor:
    """Float32 ``out`` [m, out], None for nothing, plus the product with a segment; in place."""
    x, packed, bits = segment.x, segment.packed, segment.bits
    zeros = symmetric_zero(bits) if segment.zeros is None else segment.zeros
    few = 0 < len(x) <= FEW_ROWS and not x.requires_grad  # the sums have no gradient
    if few and sums_columns(packed, bits, x.shape[2]):
        sums = column_sums(x, packed, segment.scales, zeros, bits)
        return sums if out is None else out.add_(sums)
    centred = segment.zeros is None and segment.fuses
    if not centred:  # the part of the zeros, from sums of x alone
        of_zeros = x.sum(-1) @ (segment.scales * -zeros).t()
        out = of_zeros if out is None else out.add_(of_zeros)
    return _plus_product(out, _decoder(segment, centred))


def _decoder(segment: _Segment, centred: bool) -> _Planes | FusedRows:
    zeros = segment.zeros
    if zeros is None:
        zeros = segment.scales.new_full((1, segment.scales.shape[1]), symmetric_zero(segment.bits))
    kind = FusedRows if segment.fuses else _Planes
    return kind(segment.x, segment.packed, segment.scales, zeros, segment.bits, centred)


class _Planes:
    """One segment of a product: x in plane order, and tiles of decoded rows.

    Args:
        x: ``[m, count, group_size]``.
        packed: uint8 ``[out, bytes]``.
        scales, zeros: float32 ``[out, count]``; zeros also ``[1, count]``.
        bits: of the codes.
        centred: whether zeros are subtracted from the codes.
    """

    def __init__(self, x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bits: int, centred: bool) -> None:
        m, count, group_size = x.shape
        packed, self.centred, self.out_features = packed.contiguous(), centred, len(packed)
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

    def decode(self, rows: slice, scratch: tuple[Tensor, Tensor]) -> Tensor:
        """Codes (minus zeros) times scales and units, ``[rows, n_columns]`` in plane order."""
        tile, codes = scratch
        planes = _unpack_planes(self.packed[rows], self.bits, self.n_blocks, codes)
        weight = tile[: len(planes)].copy_(planes)
        groups = self._grouped(weight)
        if self.centred:
            zeros = self._spread(self.zeros if len(self.zeros) == 1 else self.zeros[rows])
            groups.sub_(zeros * self.units.view(-1, *[1] * (zeros.ndim - 2)))
        groups.mul_(self._spread(self.scales[rows]))
        return weight.flatten(1)


def _plus_product(out: Tensor | None, part: _Planes | FusedRows) -> Tensor:
    """The same of decoded weights."""
    m, out_features = len(part.x), part.out_features
    tile_bytes = _TILE_BYTES_WIDE if m >= _WIDE_ROWS else _TILE_BYTES
    step = _even_step(out_features, tile_bytes // (4 * part.n_columns))
    tile: Any = part.new_tile(step)
    fresh = out is None and not part.x.requires_grad  # torch writes into a tensor only what has no gradient
    total = out
    if total is None:
        total = part.x.new_empty(m, out_features) if fresh else part.x.new_zeros(m, out_features)
    for first in range(0, out_features, step):
        rows = slice(first, first + step)
        weight = part.decode(rows, tile).t()
        if fresh:
            torch.mm(part.x, weight, out=total[:, rows])
        else:
            total[:, rows].addmm_(part.x, weight)
    return total


def _rounded_product(parts: list[_Planes | FusedRows], out_features: int, bias: Tensor | None) -> Tensor:
    """``[m, out]`` of x and the weight rounded to its dtype; decoded in small tiles, multiplied in wide ones."""
    x = parts[0].x if len(parts) == 1 else torch.cat([part.x for part in parts], 1)
    wide = _even_step(out_features, _ROUNDED_BYTES // (x.itemsize * x.shape[1]))
    step = _even_step(wide, _DECODED_BYTES // (4 * x.shape[1]))
    tiles: list[Any] = [part.new_tile(step) for part in parts]
    weight = x.new_empty(wide, x.shape[1])
    outs = []
    for first in range(0, out_features, wide):
        last = min(first + wide, out_features)
        for start in range(first, last, step):
            rows = slice(start, min(start + step, last))
            column = 0
            for part, tile in zip(parts, tiles, strict=True):
                here = weight[rows.start - first : rows.stop - first, column : column + part.n_columns]
                here.copy_(part.decode(rows, tile))
                column += part.n_columns
        here = weight[: last - first]
        outs.append(torch.nn.functional.linear(x, here, None if bias is None else bias[first:last]))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def _even_step(n: int, most: int) -> int:
    """Rows of a tile, at most so many, so that all tiles are about equally large; sixteens where there are enough."""
    n_tiles = -(-n // max(1, most))
    even = -(-n // n_tiles)
    rounded = -(-even // 16) * 16
    return rounded if rounded <= most else even


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
