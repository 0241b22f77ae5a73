"""Linear layer on `grouped_int` weights: ``y = x W^T + bias`` from packed codes, never from a dense weight.

    weight[o, i]  ~  scales[o, g] * (codes[o, i] - zeros[o, g]),        g = i // group_size

so a row of the product splits into a part that needs the codes and a part that needs only group sums of x:

    y[m, o] = sum_g scales[o, g] * (sum_{i in g} codes[o, i] x[m, i])  -  sum_g scales[o, g] zeros[o, g] X[m, g]
    X[m, g] = sum_{i in g} x[m, i]

The torch twin in this file runs on the CPU. It walks over row tiles of bounded size and unpacks *planes*: a dense
bit stream of b-bit codes repeats every ``lcm(b, 8)`` bits, so code f of every period sits at the same bit of the same
byte, and one shift-and-mask over whole rows yields all of them (4 bits, two codes per byte):

    byte      0        1        2                plane 0 = byte & 15     columns 0, 2, 4, ...
           |c1 |c0  |c3 |c2  |c5 |c4   ...       plane 1 = byte >> 4     columns 1, 3, 5, ...

The codes stay in plane order; x is brought into the same order once, which costs far less than interleaving codes.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from quantkit.errors import RequestError
from quantkit.formats.grouped_int import GroupedIntSpec, stored_zeros

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TILE_BYTES = 2 << 20  # float32 tile of decoded weights while few rows of x share it: stays in the L2 of two cores
_TILE_BYTES_WIDE = 16 << 20  # with many rows of x the matrix product dominates and prefers a wider right-hand side
_WIDE_ROWS = 64  # rows of x from which the wide tile is used


def matmul(x: Tensor, spec: GroupedIntSpec, tensors: dict[str, Tensor], bias: Tensor | None = None) -> Tensor:
    """Multiply activations by a packed weight.

    Args:
        x: float32, bfloat16 or float16 ``[..., in_features]``, on the device of the tensors.
        spec: shape and widths of the packed weight.
        tensors: the stored tensors of ``spec.tensor_layout()``.
        bias: ``[out_features]`` or None.

    Returns:
        ``[..., out_features]`` in ``x.dtype``; products and sums are float32.

    Raises:
        RequestError: wrong last dimension or dtype of ``x``.
    """
    if x.shape[-1] != spec.in_features:
        raise RequestError(f"grouped_int: x has {x.shape[-1]} columns, the weight has {spec.in_features}")
    if x.dtype not in _DTYPES:
        raise RequestError(f"grouped_int: x is {x.dtype}; use float32, bfloat16 or float16")
    rows = x.reshape(-1, spec.in_features)
    product = matmul_reference(rows, spec, tensors, bias)
    return product.reshape(*x.shape[:-1], spec.out_features)


def matmul_reference(x: Tensor, spec: GroupedIntSpec, tensors: dict[str, Tensor], bias: Tensor | None) -> Tensor:
    """Torch twin: ``[m, in]`` to ``[m, out]`` in ``x.dtype``, row tile by row tile, in float32."""
    m = x.shape[0]
    grouped = x.float().reshape(m, spec.n_groups, spec.group_size)
    if "group_order" in tensors:
        grouped = grouped.index_select(1, tensors["group_order"].long())
    scales = tensors["scales"].float()
    out = -(grouped.sum(-1) @ (scales * stored_zeros(spec, tensors)).t())
    if bias is not None:
        out += bias.float()
    start = 0
    for bits, count in spec.segments:
        columns = grouped[:, start : start + count]
        _add_segment(out, columns, tensors[f"codes_{bits}b"], scales[:, start : start + count], bits)
        start += count
    return out.to(x.dtype)


def _add_segment(out: Tensor, x: Tensor, packed: Tensor, scales: Tensor, bits: int) -> None:
    """Add one segment's code products to ``out`` [m, out]; x [m, count, group_size], scales [out, count]."""
    m, count, group_size = x.shape
    period = 8 // gcd(bits, 8)  # codes per repetition of the bit stream; it spans bits * period / 8 bytes
    n_columns = count * group_size
    n_blocks = -(-n_columns // period)
    padded = torch.nn.functional.pad(x.reshape(m, n_columns), (0, n_blocks * period - n_columns))
    x_planes = padded.reshape(m, n_blocks, period).transpose(1, 2).reshape(m, -1)
    tile_bytes = _TILE_BYTES_WIDE if m >= _WIDE_ROWS else _TILE_BYTES
    step = max(1, tile_bytes // (4 * n_blocks * period))
    tile = x.new_empty(min(step, out.shape[1]), period, n_blocks)
    column_group = None
    if group_size % period:  # a period straddles two groups: look every column's scale up
        column = torch.arange(period)[:, None] + torch.arange(n_blocks)[None, :] * period
        column_group = (column // group_size).clamp_(max=count - 1).flatten()
    for first in range(0, out.shape[1], step):
        planes = _unpack_planes(packed[first : first + step], bits, n_blocks)
        weight = tile[: planes.shape[0]].copy_(planes)
        tile_scales = scales[first : first + step]
        if column_group is None:
            weight.view(-1, period, count, group_size // period).mul_(tile_scales[:, None, :, None])
        else:
            weight.view(planes.shape[0], -1).mul_(tile_scales[:, column_group])
        out[:, first : first + step] += x_planes @ weight.flatten(1).t()


def _unpack_planes(packed: Tensor, bits: int, n_blocks: int) -> Tensor:
    """uint8 rows of a bit stream to codes ``[rows, period, n_blocks]``: plane f holds code f of every period."""
    n_bytes = bits // gcd(bits, 8)
    period = 8 * n_bytes // bits
    missing = n_blocks * n_bytes - packed.shape[1]
    if missing:
        packed = torch.nn.functional.pad(packed, (0, missing))
    blocks = packed.reshape(packed.shape[0], n_blocks, n_bytes)
    if period == 1:
        return blocks.transpose(1, 2)
    planes = packed.new_empty(packed.shape[0], period, n_blocks)
    for field in range(period):
        byte, shift = divmod(field * bits, 8)
        plane = planes[:, field]
        torch.bitwise_right_shift(blocks[:, :, byte], shift, out=plane)
        if shift + bits > 8:  # the code's high bits are the low bits of the next byte
            plane |= blocks[:, :, byte + 1] << (8 - shift)
        if shift + bits != 8:
            plane &= (1 << bits) - 1
    return planes
