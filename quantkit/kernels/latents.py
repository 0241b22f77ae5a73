"""Launch of the kernel for the first product of `sign_factors` for one row of x (latents_triton.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.kernels.launch import early_launch
from quantkit.kernels.planar import planar_segments
from quantkit.kernels.planar_matmul import triton_kernels

_MAX_WARPS = 8
_ROWS = 4


def latent_product(
    x: Tensor, spec: GroupedIntSpec, words: Tensor, columns: Tensor, scales: Tensor, span: int
) -> Tensor:
    """``scales * (signs @ (columns * x))`` for one row of x, on a GPU.

    Args:
        x: float16 or bfloat16 ``[1, n]``.
        spec: the signs as a one-bit weight ``[copies * span, at least n]``, a multiple of 128 columns.
        words: its planar words.
        columns: float16 ``[copies, in_features of spec]``, 0 from column n on.
        scales: float32 ``[copies * span]``.
        span: rows that share scales of columns, a multiple of 64.

    Returns:
        ``[1, copies * span]`` in the dtype of x. Sums are float32; the scaled x is taken in 16 bits relative to the
        largest of 32 neighbouring values.
    """
    out = x.new_empty(1, spec.out_features)
    grid, arguments = latent_launch(x, spec, words, columns, scales, span, out)
    with torch.cuda.device(x.device):  # Triton launches on the current device
        latent_kernels().latent_product_kernel[grid](**arguments, ASM=True, **early_launch(x.device))
    return out


def latent_launch(
    x: Tensor, spec: GroupedIntSpec, words: Tensor, columns: Tensor, scales: Tensor, span: int, out: Tensor
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments of the kernel, all but ASM."""
    (segment,) = planar_segments(spec)
    threads = segment.row_words // 2
    warps = min(_MAX_WARPS, 1 << (-(-threads // 32) - 1).bit_length())
    missing = spec.in_features - x.shape[1]
    if missing or x.data_ptr() % 4:
        x = pad(x, (0, missing)) if missing else x.clone()
    assert span % _ROWS == 0
    arguments = {
        "x": x.view(torch.int32),
        "factors": columns.view(torch.int32),
        "words": words.view(torch.int32),
        "scales": scales,
        "y": out,
        "n_rows": spec.out_features,
        "stride16": segment.row_words // 16,
        "n_threads": threads,
        "n_planes": segment.n_planes,
        "span": span,
        "factor_stride": columns.shape[1] // 2,
        "WIDTH": segment.plane_width,
        "BF16": x.dtype == torch.bfloat16,
        "ROWS": _ROWS,
        "THREADS": 32 * warps,
        "CHUNKS": -(-threads // (32 * warps)),
        "num_warps": warps,
        "enable_fp_fusion": True,
    }
    return (spec.out_features // _ROWS,), arguments


def latent_kernels() -> Any:
    """The module of the kernel. Raises `RequestError` where Triton is not installed."""
    return triton_kernels("latents_triton")
