"""Many rows of x times a planar weight: decoded to the dtype of x, then the vendor's matrix product.

Decoded are slabs of rows, so that no dense weight outlives or dwarfs the call.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import RequestError
from quantkit.formats.grouped_int import GroupedIntSpec, symmetric_zero
from quantkit.kernels.planar import PlanarSegment, has_zeros, padded_rows, planar_segments

_SLAB_BYTES = 1 << 28
_DEQUANTIZE_ROWS = 8  # 43.5 microseconds for 14336 x 4096 at 4 bits on an H200, with 16 it is 45.0


def dequantized_matmul(x: Tensor, spec: GroupedIntSpec, tensors: dict[str, Tensor], bias: Tensor | None) -> Tensor:
    """Slabs of rows, decoded to the dtype of x and multiplied by the vendor's matrix product."""
    if bias is not None:
        bias = bias.to(x.dtype)
    step = max(1, _SLAB_BYTES // (spec.in_features * x.element_size()))
    if step >= spec.out_features:
        return torch.nn.functional.linear(x, dequantize_rows(spec, tensors, 0, spec.out_features, x.dtype), bias)
    out = x.new_empty(x.shape[0], spec.out_features)
    for first in range(0, spec.out_features, step):
        rows = slice(first, min(first + step, spec.out_features))
        weight = dequantize_rows(spec, tensors, rows.start, rows.stop, x.dtype)
        out[:, rows] = torch.nn.functional.linear(x, weight, None if bias is None else bias[rows])
    return out


def triton_kernels(name: str = "grouped_int_triton") -> ModuleType:
    """A module of kernels. Raises `RequestError` where Triton is not installed."""
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError as error:
        raise RequestError("packed weights on a GPU need Triton; run: pip install 'quantkit[kernels]'") from error
    return import_module(f"quantkit.kernels.{name}")


def constant_zero(spec: GroupedIntSpec, segment: PlanarSegment) -> float | None:
    """The zero of every group of a segment, or None where zeros are stored."""
    return None if has_zeros(spec) else symmetric_zero(segment.bits)


def dequantize_rows(
    spec: GroupedIntSpec, tensors: dict[str, Tensor], first: int, last: int, dtype: torch.dtype
) -> Tensor:
    """Rows first .. last - 1 of the weight, ``[last - first, in_features]`` in ``dtype``, original column order."""
    out = tensors["planar_scales"].new_empty(last - first, spec.in_features, dtype=dtype)
    with torch.cuda.device(out.device):
        for grid, arguments in dequantize_launches(spec, tensors, first, out):
            triton_kernels().dequantize_kernel[grid](**arguments, ASM=True)
    return out


def dequantize_launches(
    spec: GroupedIntSpec, tensors: dict[str, Tensor], first: int, out: Tensor
) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """Grid and arguments, all but ASM, of one `dequantize_kernel` per segment; rows from ``first`` on fill ``out``."""
    for segment in planar_segments(spec):
        grid = (segment.n_blocks, -(-out.shape[0] // _DEQUANTIZE_ROWS))
        yield (
            grid,
            {
                "words": tensors["planar"][segment.word_offset :],
                "scales": tensors["planar_scales"],
                "zeros": tensors.get("planar_zeros", tensors["planar_scales"]),
                "order": tensors.get("planar_order", tensors["counters"]),
                "out": out,
                "first_row": first,
                "n_rows": out.shape[0],
                "n_columns": spec.in_features,
                "scale_stride": padded_rows(spec),
                "stride16": segment.row_words // 16,
                "first_group": segment.first_group,
                "n_planes": segment.n_planes,
                "BITS": segment.bits,
                "WIDTH": segment.plane_width,
                "GROUP": spec.group_size,
                "ZERO": constant_zero(spec, segment),
                "ORDERED": len(spec.segments) > 1,
                "ROWS": _DEQUANTIZE_ROWS,
                "num_warps": 4,
                "enable_fp_fusion": True,
            },
        )
