"""The product with a packed sign matrix: what the kernels of the sign formats are made of.

A sign matrix is a symmetric one-bit `grouped_int` weight with one group per row, ``scale * (2 c - 1)`` for the stored
bit ``c``; the twin of `grouped_int` multiplies it, from the packed bits and row tile by row tile.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from quantkit.errors import RequestError
from quantkit.kernels.planar_matmul import triton_kernels

_PREPARED_COLUMNS = 1024  # of one program
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sign_matmul(x: Tensor, signs: Tensor, scales: Tensor) -> Tensor:
    """``x (diag(scales) S)^T`` in float32.

    Args:
        x: float32 ``[m, n]``.
        signs: uint8 ``[out, ceil(n / 8)]``, bit 1: +1, bit 0: -1.
        scales: float32 ``[out]``.

    Returns:
        float32 ``[m, out]``.
    """
    n = x.shape[1]
    tensors = [signs, 2 * scales[:, None]]
    product = torch.ops.quantkit.grouped_int_matmul(x, tensors, None, signs.shape[0], n, [1, 1], True)
    return cast(Tensor, product)


def as_rows(x: Tensor, format: str, in_features: int) -> Tensor:
    """``x`` as ``[m, in_features]``. Raises `RequestError` for a wrong last dimension or dtype."""
    if x.shape[-1] != in_features:
        raise RequestError(f"{format}: x has {x.shape[-1]} columns, the weight has {in_features}")
    if x.dtype not in _DTYPES:
        raise RequestError(f"{format}: x is {x.dtype}; use float32, bfloat16 or float16")
    return x.reshape(-1, in_features)


def prepare(x: Tensor, order: Tensor | None, scales: Tensor) -> Tensor:
    """Activations as a kernel reads them, on a GPU.

    Args:
        x: contiguous ``[m, in]``.
        order: int32 ``[n]``, which column of x each column of the result is (beyond the last: 0); None: the same.
        scales: float32 ``[paths, n]`` or ``[n]``.

    Returns:
        ``[paths * m, n]`` in the dtype of x.
    """
    n_paths, n = scales.numel() // scales.shape[-1], scales.shape[-1]
    out = x.new_empty(n_paths * len(x), n)
    grid = (len(out), -(-n // _PREPARED_COLUMNS))
    with torch.cuda.device(x.device):
        sign_kernels().prepare_kernel[grid](
            x,
            scales if order is None else order,
            scales,
            out,
            len(x),
            x.shape[1],
            n,
            ORDERED=order is not None,
            COLUMNS=_PREPARED_COLUMNS,
            num_warps=4,
        )
    return out


def sign_kernels() -> ModuleType:
    """The module of the kernels. Raises `RequestError` where Triton is not installed."""
    triton_kernels()
    return import_module("quantkit.kernels.signs_triton")
