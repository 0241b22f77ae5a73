"""Rows of a packed `grouped_int` weight: what an embedding needs, without decoding the rest of the table."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.formats.grouped_int import GroupedIntSpec, symmetric_zero
from quantkit.formats.packing import unpack_bits
from quantkit.kernels.planar import planar_rows


def lookup(ids: Tensor, spec: GroupedIntSpec, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The rows of the weight that ``ids`` names.

    Args:
        ids: integers ``[...]`` from 0 to ``spec.out_features - 1``, on the device of the tensors.
        spec: shape and width; of one segment.
        tensors: the stored tensors of ``spec.tensor_layout()``, or what `planar.to_planar` made of them.
        dtype: of the result.

    Returns:
        ``[..., in_features]``.
    """
    assert len(spec.segments) == 1, spec
    rows = ids.reshape(-1)
    gather = planar_rows if "planar" in tensors else _stored_rows
    codes, scales, zeros = gather(rows, spec, tensors)
    if zeros is None:
        zeros = torch.full_like(scales, symmetric_zero(spec.segments[0][0]))
    grouped = codes.reshape(len(rows), spec.n_groups, spec.group_size).float()
    weight = scales.float().unsqueeze(-1) * (grouped - zeros.float().unsqueeze(-1))
    return weight.to(dtype).reshape(*ids.shape, spec.in_features)


def _stored_rows(
    rows: Tensor, spec: GroupedIntSpec, tensors: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes ``[n, in]``, scales and zeros ``[n, groups]`` of some rows; no zeros where the weight is symmetric."""
    bits = spec.segments[0][0]
    codes = unpack_bits(tensors[f"codes_{bits}b"][rows], bits, spec.in_features)
    scales = tensors["scales"][rows]
    if spec.symmetric:
        return codes, scales, None
    zeros = tensors[f"zeros_{bits}b"]
    if bits == 1:
        return codes, scales, zeros[rows]
    first = rows.unsqueeze(-1) * spec.n_groups + torch.arange(spec.n_groups, device=rows.device)
    return codes, scales, _codes_at(zeros, first, bits)


def _codes_at(stream: Tensor, index: Tensor, bits: int) -> Tensor:
    """Codes at some places of one bit stream; a code lies in one byte or in two neighbours."""
    first_bit = index * bits
    byte = first_bit // 8
    pair = stream[byte].to(torch.int32) | stream[(byte + 1).clamp(max=len(stream) - 1)].to(torch.int32) << 8
    return pair >> (first_bit % 8) & (1 << bits) - 1
