"""Linear layer on `grouped_int` weights: ``y = x W^T + bias`` from packed codes, never from a dense weight.

    weight[o, i]  ~  scales[o, g] * (codes[o, i] - zeros[o, g]),        g = i // group_size

so a row of the product splits into a part that needs the codes and a part that needs only group sums of x:

    y[m, o] = sum_g scales[o, g] * (sum_{i in g} codes[o, i] x[m, i])  -  sum_g scales[o, g] zeros[o, g] X[m, g]
    X[m, g] = sum_{i in g} x[m, i]

The torch twin in this file runs on the CPU. It walks over row tiles of bounded size and unpacks *planes*: the bit
stream repeats every byte (1, 2, 4, 8 bits) or every few 16-bit words (3, 5, 6, 7), so code f of every such block sits
at the same place, and one shift-and-mask over whole rows yields all of them (4 bits, two codes per byte):

    byte      0        1        2                plane 0 = byte & 15     columns 0, 2, 4, ...
           |c1 |c0  |c3 |c2  |c5 |c4   ...       plane 1 = byte >> 4     columns 1, 3, 5, ...

The codes stay in plane order; x is brought into the same order once, which costs far less than interleaving codes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import gcd
from typing import Any, cast

import torch
from torch import Tensor

from quantkit.errors import RequestError
from quantkit.formats.grouped_int import GroupedIntSpec, stored_zeros, symmetric_zero
from quantkit.kernels.gemv import gemv, has_gemv
from quantkit.kernels.planar import from_planar
from quantkit.kernels.planar_matmul import dequantized_matmul
from quantkit.kernels.planar_product import has_planar_product, planar_product

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TILE_BYTES = 4 << 20  # float32 tile of decoded weights while few rows of x share it: stays in cache
_TILE_BYTES_WIDE = 16 << 20  # with many rows of x the matrix product dominates and prefers a wider right-hand side
_LONG_RUN = 16  # contiguous columns per scale from which broadcasting is faster than a gathered copy of the scales
_WIDE_ROWS = 64  # rows of x from which the wide tile is used, and bfloat16 is multiplied as such


def matmul(x: Tensor, spec: GroupedIntSpec, tensors: dict[str, Tensor], bias: Tensor | None = None) -> Tensor:
    """Multiply activations by a packed weight.

    Args:
        x: float32, bfloat16 or float16 ``[..., in_features]``, on the device of the tensors.
        spec: shape and widths of the packed weight.
        tensors: the stored tensors of ``spec.tensor_layout()``, or what `planar.to_planar` made of them.
        bias: ``[out_features]`` or None.

    Returns:
        ``[..., out_features]`` in ``x.dtype``; sums are float32. Stored tensors are multiplied by the torch twin on any
        device, with float32 products, or on a CPU, for many rows of bfloat16, with the weight rounded to bfloat16.
        Planar tensors on a GPU are multiplied by Triton kernels: for one or two rows of x products with x in 16 bits
        relative to its largest neighbours (gemv.py), up to 64 or 128 rows exact products of half precision
        activations (planar_product.py), and above (or in float32) products with the weight rounded to the dtype of x.

    Raises:
        RequestError: wrong last dimension or dtype of ``x``.
    """
    if x.shape[-1] != spec.in_features:
        raise RequestError(f"grouped_int: x has {x.shape[-1]} columns, the weight has {spec.in_features}")
    if x.dtype not in _DTYPES:
        raise RequestError(f"grouped_int: x is {x.dtype}; use float32, bfloat16 or float16")
    rows = x.reshape(-1, spec.in_features)
    segments = [number for segment in spec.segments for number in segment]
    shape = (spec.out_features, spec.group_size, segments, spec.symmetric)
    if "planar" in tensors:
        product = torch.ops.quantkit.grouped_int_planar_matmul(
            rows,
            tensors["planar"],
            tensors["planar_scales"],
            tensors.get("planar_zeros"),
            tensors.get("planar_order"),
            tensors["counters"],
            bias,
            *shape,
        )
    else:
        stored = [tensors[name] for name in spec.tensor_layout()]
        product = torch.ops.quantkit.grouped_int_matmul(rows, stored, bias, *shape)
    return cast(Tensor, product).reshape(*x.shape[:-1], spec.out_features)


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
        self.x = padded.reshape(m, self.n_blocks, self.period).transpose(1, 2).flatten(1)
        self._spread = _group_spread(count, group_size, self.period, x.device)

    def new_tile(self, rows: int) -> tuple[Tensor, Tensor]:
        """Float32 ``[rows, period, n_blocks]``, and uint8 scratch for the codes of as many rows."""
        tile = self.scales.new_empty(rows, self.period, self.n_blocks)
        return tile, self.packed.new_empty(rows * self.period * -(-self.n_blocks // 8) * 8)

    def decode(self, rows: slice, tile: Tensor, scratch: Tensor, centred: bool) -> Tensor:
        """Codes (``centred``: minus zeros) times scales of some rows, ``[rows, n_columns]`` in plane order."""
        planes = _unpack_planes(self.packed[rows], self.bits, self.n_blocks, scratch)
        weight = tile[: len(planes)].copy_(planes)
        if centred:
            self._spread(torch.Tensor.sub_, weight, self.zeros if len(self.zeros) == 1 else self.zeros[rows])
        self._spread(torch.Tensor.mul_, weight, self.scales[rows])
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


def _group_spread(
    count: int, group_size: int, period: int, device: torch.device
) -> Callable[[Callable[[Tensor, Tensor], object], Tensor, Tensor], object]:
    """How to change a tile ``[rows, period, n_blocks]`` in place by a number per group, ``[rows, count]``."""
    run, rest = divmod(group_size, period)
    if rest == 0 and run >= _LONG_RUN:
        return lambda change, tile, each: change(tile.view(len(tile), -1, count, run), each[:, None, :, None])
    n_blocks = -(-count * group_size // period)
    column_group = torch.arange(n_blocks * period, device=device).reshape(n_blocks, period).t() // group_size
    column_group.clamp_(max=count - 1)  # the padding after the last group
    if rest == 0:  # every block lies in one group
        return lambda change, tile, each: change(tile, each[:, None, column_group[0]])
    return lambda change, tile, each: change(tile, each[:, column_group])


def _block(bits: int) -> tuple[int, int]:
    """Codes and bytes of one repetition of the bit stream: a byte where codes divide it, else whole 16-bit words."""
    if 8 % bits == 0:
        return 8 // bits, 1
    period = 16 // gcd(bits, 16)
    return period, period * bits // 8


def _unpack_planes(packed: Tensor, bits: int, n_blocks: int, scratch: Tensor) -> Tensor:
    """Rows of a bit stream to integer codes ``[rows, period, n_blocks]``: plane f holds code f of every block.

    ``scratch``: uint8 ``[rows * period * n_blocks]``, n_blocks rounded up to eights, for widths that divide a byte.
    """
    period, n_bytes = _block(bits)
    if period == 1:
        return packed.unsqueeze(1)
    planes = _byte_planes(packed, bits, period, scratch) if n_bytes == 1 else _word_planes(packed, bits, period)
    return planes[:, :, :n_blocks]


def _byte_planes(packed: Tensor, bits: int, period: int, scratch: Tensor) -> Tensor:
    """uint8 planes for 1, 2 and 4 bits; eight bytes are shifted at once, the mask removes what the neighbour lent."""
    words = _as_words(packed, torch.int64, 8)
    mask = ((1 << bits) - 1) * 0x0101010101010101
    shifts = torch.arange(0, period * bits, bits, device=packed.device)
    planes = scratch.view(torch.int64)[: words.numel() * period].view(len(words), period, -1)
    torch.bitwise_right_shift(words[:, None], shifts[:, None], out=planes)
    return planes.bitwise_and_(mask).view(torch.uint8)


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


@lru_cache(maxsize=1024)
def _spec(out_features: int, group_size: int, segments: tuple[int, ...], symmetric: bool) -> GroupedIntSpec:
    pairs = tuple(zip(segments[::2], segments[1::2], strict=True))
    return GroupedIntSpec(
        out_features=out_features,
        in_features=group_size * sum(segments[1::2]),
        group_size=group_size,
        segments=pairs,
        symmetric=symmetric,
    )


def _stored_op(
    x: Tensor,
    tensors: list[Tensor],
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    segments: list[int],
    symmetric: bool,
) -> Tensor:
    spec = _spec(out_features, group_size, tuple(segments), symmetric)
    return matmul_reference(x, spec, dict(zip(spec.tensor_layout(), tensors, strict=True)), bias)


def planar_matmul(x: Tensor, spec: GroupedIntSpec, tensors: dict[str, Tensor], bias: Tensor | None) -> Tensor:
    """``[m, in]`` to ``[m, out]`` in the dtype of x, on a GPU, from the tensors of `to_planar`."""
    if len(x) == 0:
        return x.new_empty(0, spec.out_features)
    if has_gemv(x, spec):
        return gemv(x, spec, tensors, bias)
    if has_planar_product(x, spec):
        return planar_product(x.contiguous(), spec, tensors, bias)
    return dequantized_matmul(x, spec, tensors, bias)


def _planar_op(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    counters: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    segments: list[int],
    symmetric: bool,
) -> Tensor:
    spec = _spec(out_features, group_size, tuple(segments), symmetric)
    tensors = {"planar": words, "planar_scales": scales, "counters": counters}
    if zeros is not None:
        tensors["planar_zeros"] = zeros
    if order is not None:
        tensors["planar_order"] = order
    if x.is_cuda:
        return planar_matmul(x, spec, tensors, bias)
    return matmul_reference(x, spec, from_planar(spec, tensors), bias)


def _fake_op(x: Tensor, *arguments: Any) -> Tensor:
    out_features = arguments[-4]
    return x.new_empty(x.shape[0], out_features)


# Operators, so that torch.compile keeps the calls as they are and CUDA graphs record them. `counters` is scratch whose
# value a call does not change, hence not declared as mutated. Plain Library: half the dispatch cost of custom_op.
_LIBRARY = torch.library.Library("quantkit", "FRAGMENT")  # type: ignore[no-untyped-call]
_SHAPE = "Tensor? bias, int out_features, int group_size, int[] segments, bool symmetric) -> Tensor"
_OPERATORS = {
    "grouped_int_matmul": ("Tensor x, Tensor[] tensors", _stored_op),
    "grouped_int_planar_matmul": (
        "Tensor x, Tensor words, Tensor scales, Tensor? zeros, Tensor? order, Tensor counters",
        _planar_op,
    ),
}
for _name, (_arguments, _function) in _OPERATORS.items():
    _LIBRARY.define(f"{_name}({_arguments}, {_SHAPE}")  # type: ignore[no-untyped-call]
    for _device in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _function, _device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"quantkit::{_name}", _fake_op, lib=_LIBRARY)
