"""RTN: round every weight to the nearest level of its grid. No data, no compensation; the baseline of the field."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.algorithms.grids import GridFit, dequantize, quantize
from quantkit.algorithms.hessian import check_finite
from quantkit.errors import NumericalError
from quantkit.formats.grouped_int import GroupedInt

_DAMPING = 0.01


def rtn(
    weight: Tensor, bits: tuple[int, ...], symmetric: bool, grid_fit: GridFit, hessian: Tensor | None = None
) -> GroupedInt:
    """Quantize one linear by rounding.

    Args:
        weight: float32 ``[out_features, in_features]``.
        bits: width of each group of ``in_features // len(bits)`` neighbouring columns.
        symmetric: zero fixed at the middle of the grid.
        grid_fit: one of `quantkit.algorithms.grids.GRIDS`.
        hessian: float32 ``[in_features, in_features]``, the metric of ``grid=hessian``; None: all inputs count alike.

    Raises:
        NumericalError: NaN or Inf in the weight or the Hessian.
    """
    if not torch.isfinite(weight).all():
        raise NumericalError("the weight holds NaN or Inf; the checkpoint is damaged")
    if hessian is not None:
        check_finite(hessian)
    group_size = weight.shape[1] // len(bits)
    codes, scales, zeros = [], [], []
    for group, width in enumerate(bits):
        columns = slice(group * group_size, (group + 1) * group_size)
        grid = grid_fit(weight[:, columns], width, symmetric, _metric(hessian, columns, weight))
        codes.append(quantize(weight[:, columns], grid, width))
        scales.append(grid.scales)
        zeros.append(grid.zeros)
    return GroupedInt(
        codes=torch.cat(codes, 1).to(torch.uint8),
        scales=torch.stack(scales, 1).float(),
        zeros=torch.stack(zeros, 1).float(),
        bits=bits,
        symmetric=symmetric,
    )


def _metric(hessian: Tensor | None, columns: slice, weight: Tensor) -> Tensor:
    size = columns.stop - columns.start
    if hessian is None:
        return torch.eye(size, dtype=weight.dtype, device=weight.device)
    block = hessian[columns, columns]
    # Relative to the group's inputs; to all inputs if the group's were never active; to 1 if none was.
    ridge = max(float(block.diagonal().mean()), float(hessian.diagonal().mean()) * 1e-6) or 1.0
    identity = torch.eye(size, dtype=torch.float64, device=block.device)
    factor: Tensor = torch.linalg.cholesky(block.double() + ridge * _DAMPING * identity)
    return factor.to(weight.dtype)


def fake_quantize(weight: Tensor, bits: int, group_size: int, grid_fit: GridFit) -> Tensor:
    """Rounded and dequantized weight ``[out, in]``, all groups at one width; for searches over widths."""
    out_features, in_features = weight.shape
    grouped = weight.reshape(-1, group_size)
    metric = torch.eye(group_size, dtype=weight.dtype, device=weight.device)
    grid = grid_fit(grouped, bits, False, metric)
    return dequantize(quantize(grouped, grid, bits), grid).reshape(out_features, in_features)
