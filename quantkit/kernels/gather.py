"""Numbers brought into another order and scale in one launch: what stands between the products of stacked linears."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from quantkit.kernels.launch import early_launch
from quantkit.kernels.planar_matmul import triton_kernels

_COLUMNS = 512  # of one program


def gather(
    values: Tensor,
    index: Tensor,
    *,
    scales: Tensor | None = None,
    more: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``(values[index] + more[index]) * scales + bias``, computed in float32.

    Args:
        values: contiguous, of any shape; indices count its elements.
        index: int32 ``[...]``, the shape of the result; -1: zero instead of a value.
        scales: float32, of the shape of ``index``.
        more: of the shape of ``values``.
        bias: of the shape of ``index``.

    Returns:
        The shape of ``index``, the dtype of ``values``.
    """
    if values.is_cuda:
        return _launch(values, index, scales, more, bias)
    flat = values.flatten().float()
    if more is not None:
        flat = flat + more.flatten().float()
    picked = torch.where(index < 0, 0.0, flat[index.clamp(min=0).long()])
    if scales is not None:
        picked = picked * scales
    if bias is not None:
        picked = picked + bias.float()
    return picked.to(values.dtype)


def _launch(values: Tensor, index: Tensor, scales: Tensor | None, more: Tensor | None, bias: Tensor | None) -> Tensor:
    triton_kernels()  # raises where Triton is not installed
    out = torch.empty(index.shape, dtype=values.dtype, device=values.device)
    with torch.cuda.device(values.device):
        import_module("quantkit.kernels.gather_triton").gather_kernel[(-(-out.numel() // _COLUMNS),)](
            values,
            values if more is None else more,
            index,
            values if scales is None else scales,
            values if bias is None else bias,
            out,
            out.numel(),
            HAS_MORE=more is not None,
            HAS_SCALES=scales is not None,
            HAS_BIAS=bias is not None,
            COLUMNS=_COLUMNS,
            **early_launch(values.device),
            num_warps=4,
        )
    return out
