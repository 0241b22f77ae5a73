"""Grids: which scale and zero a row of a column group gets. Four ways to choose, one signature.

    fit(weight [rows, g], bits, symmetric, metric [g, g]) -> Grid(scales [rows], zeros [rows])

    minmax    the range of the weights, 0 included                                  (GPTQ, arXiv:2210.17323, code)
    mse       the range shrunk to minimize sum |q - w|^2.4                          (GPTQ's --mse)
    sqc       the range varied by +-10 % to minimize the same, salient elements weighted (SliM-LLM, arXiv:2405.14917)
    hessian   range and zero varied to minimize ||(q - w) metric||^2                (ours; see below)

``metric`` L turns an error row e into the loss it causes, ||e L||^2. A solver that compensates passes the inverse of
its factor's diagonal block, L = U_gg^-1: then ||e L||^2 is the loss that remains *after* all later columns have
been re-optimized (the Schur complement of the Hessian), not just e H_gg e^T. Plain rounding passes a Cholesky factor
of H_gg. Every searched grid starts from the min-max candidate, so it never loses to it on its own objective.

Scales leave this file already rounded to float16, as they are stored: codes are chosen for the stored scale.
One bit has two free levels: the least-squares ones of the row (SliM-LLM's code sets them at mean -+ mean |w|; even
mean -+ mean |w - mean| costs 3 % more squared error and 6 % more loss after GPTQ, over the linears of a small llama).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.errors import NumericalError
from quantkit.formats.grouped_int import symmetric_zero

_SMALLEST_SCALE = 2.0**-24  # smallest positive float16
_SCRATCH_BYTES = 1 << 27  # bound of the [candidates, rows, g] tensors of a search
_HESSIAN_FACTORS = tuple(1.1 - 0.02 * step for step in range(45))  # 1.1 down to 0.22 of the range
_MSE_FACTORS = tuple(1 - step / 100 for step in range(80))
_SQC_FACTORS = tuple(1 + 0.002 * step for step in range(51)) + tuple(1 - 0.002 * step for step in range(1, 51))
_NORM = 2.4
_BINARY_ROUNDS = 4
_LARGEST_LEVEL = 3e4  # of a searched binary grid: twice this still fits float16


class Grid(NamedTuple):
    """Levels ``scales * (code - zeros)``; scales are float16 values, zeros integers (float16 values at one bit)."""

    scales: Tensor  # [rows]
    zeros: Tensor  # [rows]


GridFit = Callable[[Tensor, int, bool, Tensor], Grid]


def quantize(weight: Tensor, grid: Grid, bits: int) -> Tensor:
    """Nearest codes, as floats. ``weight`` [..., rows, g] or [..., rows, 1]; half rounds to even."""
    scales, zeros = grid.scales.unsqueeze(-1), grid.zeros.unsqueeze(-1)
    return (weight / scales + zeros).round_().clamp_(0, 2**bits - 1)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """``scales * (codes - zeros)``."""
    return grid.scales.unsqueeze(-1) * (codes - grid.zeros.unsqueeze(-1))


def storable_scales(scales: Tensor) -> Tensor:
    """Round to float16 and back, never to zero. Raises `NumericalError` above the float16 range."""
    rounded = scales.to(torch.float16).to(scales.dtype)
    if not torch.isfinite(rounded).all():
        raise NumericalError(f"a scale of {scales.abs().max():g} does not fit float16; the weights are out of range")
    return rounded.clamp_min(_SMALLEST_SCALE)


def _range(weight: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    lo = weight.amin(-1).clamp_max(0)
    hi = weight.amax(-1).clamp_min(0)
    if symmetric:
        hi = torch.maximum(-lo, hi)
        lo = -hi
    empty = hi == lo  # a row of zeros: any positive scale represents it exactly
    return lo.masked_fill(empty, -1.0), hi.masked_fill(empty, 1.0)


def _grid_of_range(lo: Tensor, hi: Tensor, bits: int, symmetric: bool) -> Grid:
    scales = storable_scales((hi - lo) / (2**bits - 1))
    zeros = torch.full_like(scales, symmetric_zero(bits)) if symmetric else (-lo / scales).round_()
    return Grid(scales, zeros.clamp_(0, 2**bits - 1))


def binary(weight: Tensor, symmetric: bool) -> Grid:
    """The two levels of each row with the least squared error; symmetric: at -+ mean |w|, which is least there."""
    if symmetric:
        scales = storable_scales(2 * weight.abs().mean(-1))
        return Grid(scales, torch.full_like(scales, symmetric_zero(1)))
    lower, upper = _two_means(weight)
    grid = _two_levels((lower + upper) / 2, (upper - lower) / 2)
    # A row of equal weights needs one level; with 0 as the other one it is as exact as float16 allows.
    flat = weight.amin(-1) == weight.amax(-1)
    scales = torch.where(flat, storable_scales(lower.abs()), grid.scales)
    return Grid(scales, torch.where(flat, (lower < 0).to(scales), grid.zeros))


def _two_means(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the k least and of the other weights of each row, for the k that separates them best: exact 2-means."""
    size = weight.shape[-1]
    if size == 1:
        return weight[..., 0], weight[..., 0]
    mean = weight.mean(-1, keepdim=True)
    below = (weight - mean).sort(-1).values.cumsum(-1)[..., :-1]  # sums of the k least deviations; all of them sum to 0
    count = torch.arange(1, size, dtype=weight.dtype, device=weight.device)
    cut = (below.square() / (count * (size - count))).argmax(-1, keepdim=True)
    moved, k = below.gather(-1, cut), (cut + 1).to(weight.dtype)
    return (mean + moved / k).squeeze(-1), (mean - moved / (size - k)).squeeze(-1)


def _two_levels(center: Tensor, half_step: Tensor) -> Grid:
    """Levels center -+ half_step, the step kept so large that the zero, 1/2 - center / step, fits float16."""
    scales = storable_scales(torch.maximum(2 * half_step, center.abs() / 1024))
    return Grid(scales, (0.5 - center / scales).to(torch.float16).to(center.dtype))


def minmax(weight: Tensor, bits: int, symmetric: bool, metric: Tensor | None = None) -> Grid:
    """The range of each row, extended to contain 0."""
    if bits == 1:
        return binary(weight, symmetric)
    return _grid_of_range(*_range(weight, symmetric), bits, symmetric)


def mse(weight: Tensor, bits: int, symmetric: bool, metric: Tensor | None = None) -> Grid:
    """The shrunk range with the least sum of |q - w|^2.4."""
    if bits == 1:
        return binary(weight, symmetric)
    return _search(weight, bits, symmetric, _MSE_FACTORS, (0,), _norm_loss)


def hessian(weight: Tensor, bits: int, symmetric: bool, metric: Tensor) -> Grid:
    """The scale and zero with the least ||(q - w) metric||^2: 45 scales, and at most one step of the zero."""
    if bits == 1:
        return _search_binary(weight, symmetric, metric)
    offsets = (0,) if symmetric else (0, -1, 1)
    return _search(weight, bits, symmetric, _HESSIAN_FACTORS, offsets, lambda e: (e @ metric).square_().sum(-1))


def hessian_shortlist(weight: Tensor, bits: int, symmetric: bool, metric: Tensor, n: int) -> Grid:
    """The ``n`` best candidates of `hessian` per row, best first: Grid of [n, rows].

    The metric rates plain rounding inside the group. A solver that compensates inside the group as well can try each of
    a few and keep what is best for itself.
    """
    if bits == 1:
        return Grid(*(part.unsqueeze(0) for part in hessian(weight, bits, symmetric, metric)))
    lo, hi = _range(weight, symmetric)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    step = max(1, _SCRATCH_BYTES // (8 * weight.numel()))
    for start in range(0, len(_HESSIAN_FACTORS), step):
        factor = torch.tensor(_HESSIAN_FACTORS[start : start + step], dtype=weight.dtype, device=weight.device)
        base = _grid_of_range(factor.unsqueeze(-1) * lo, factor.unsqueeze(-1) * hi, bits, symmetric)
        for offset in (0,) if symmetric else (0, -1, 1):
            zeros = base.zeros if symmetric else (base.zeros + offset).clamp_(0, 2**bits - 1)
            grid = Grid(base.scales, zeros)
            losses = (dequantize(quantize(weight, grid, bits), grid).sub_(weight) @ metric).square_().sum(-1)
            kept = [_best(n, *kept, (losses, grid.scales, zeros))]
    _, scales, zeros = kept[0]
    return Grid(scales, zeros)


def _best(n: int, *parts: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The n least losses per row of all parts, with their scales and zeros."""
    losses, scales, zeros = (torch.cat(column) for column in zip(*parts, strict=True))
    losses, index = losses.sort(dim=0, stable=True)
    index = index[:n]
    return losses[:n], scales.gather(0, index), zeros.gather(0, index)


def sqc(weight: Tensor, bits: int, symmetric: bool, metric: Tensor, salient_weight: float = 1.0) -> Grid:
    """SliM-LLM's salience-weighted search over 0.9 .. 1.1 of the range.

    An element is salient when its z-score of ``delta = w^2 * metric_column_weight`` over the whole block lies above
    2 (or below -2); salient errors count ``salient_weight`` times. Paper and released code differ: the code's
    default weighs both parts alike.
    """
    if bits == 1:
        return binary(weight, symmetric)
    delta = weight.square() * metric.diagonal().square()
    score = (delta - delta.mean()) / delta.std(correction=0).clamp_min(torch.finfo(delta.dtype).tiny)
    outliers = delta[score.abs() > 2]
    mask = delta >= outliers.min() if outliers.numel() else torch.zeros_like(delta, dtype=torch.bool)
    element_weight = torch.where(mask, salient_weight, 1.0).to(weight.dtype)
    return _search(
        weight, bits, symmetric, _SQC_FACTORS, (0,), lambda e: (e.abs_().pow_(_NORM) * element_weight).sum(-1)
    )


def _norm_loss(error: Tensor) -> Tensor:
    return error.abs_().pow_(_NORM).sum(-1)


def _search(
    weight: Tensor,
    bits: int,
    symmetric: bool,
    factors: tuple[float, ...],
    offsets: tuple[int, ...],
    loss: Callable[[Tensor], Tensor],
) -> Grid:
    """The candidate with the least loss per row; the first wins a tie, and min-max is the first."""
    lo, hi = _range(weight, symmetric)
    best = _grid_of_range(lo, hi, bits, symmetric)
    best_loss = loss(dequantize(quantize(weight, best, bits), best) - weight)
    step = max(1, _SCRATCH_BYTES // (8 * weight.numel()))
    for start in range(0, len(factors), step):
        factor = torch.tensor(factors[start : start + step], dtype=weight.dtype, device=weight.device).unsqueeze(-1)
        base = _grid_of_range(factor * lo, factor * hi, bits, symmetric)
        for offset in offsets:
            zeros = base.zeros if symmetric else (base.zeros + offset).clamp_(0, 2**bits - 1)
            grid = Grid(base.scales, zeros)
            losses = loss(dequantize(quantize(weight, grid, bits), grid).sub_(weight))
            best, best_loss = _keep_better(best, best_loss, grid, losses)
    return best


def _keep_better(best: Grid, best_loss: Tensor, candidates: Grid, losses: Tensor) -> tuple[Grid, Tensor]:
    """Per row, the incumbent or the first best of ``candidates`` [n, rows], if strictly better."""
    least, index = losses.min(0)
    better = least < best_loss
    pick = index.unsqueeze(0)
    scales = torch.where(better, candidates.scales.gather(0, pick)[0], best.scales)
    zeros = torch.where(better, candidates.zeros.gather(0, pick)[0], best.zeros)
    return Grid(scales, zeros), torch.where(better, least, best_loss)


def _search_binary(weight: Tensor, symmetric: bool, metric: Tensor) -> Grid:
    """Two levels re-fitted by weighted least squares in turn with the signs; the best of a few rounds."""
    metric = metric / metric.abs().amax()  # products of four entries follow; only ratios of losses matter
    grid = best = binary(weight, symmetric)
    best_loss = ((dequantize(quantize(weight, best, 1), best) - weight) @ metric).square_().sum(-1)
    target, ones = weight @ metric, metric.sum(0)
    for _ in range(_BINARY_ROUNDS):
        signs = (2 * quantize(weight, grid, 1) - 1) @ metric
        half_step, center = _fit_line(signs, torch.zeros_like(ones) if symmetric else ones, target)
        usable = (half_step > 0) & (half_step + center.abs() < _LARGEST_LEVEL)
        grid = _two_levels(center.where(usable, 0), half_step.where(usable, 0))
        losses = ((dequantize(quantize(weight, grid, 1), grid) - weight) @ metric).square_().sum(-1)
        best, best_loss = _keep_better(best, best_loss, Grid(grid.scales[None], grid.zeros[None]), losses[None])
    return best


def _fit_line(slope: Tensor, intercept: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Per row the least-squares (a, b) of ``target ~ a * slope + b * intercept``; b = 0 where they are parallel."""
    ss, si, ii = slope.square().sum(-1), slope @ intercept, intercept @ intercept
    st, it = (slope * target).sum(-1), target @ intercept
    determinant = ss * ii - si * si
    # Signs that are all alike are parallel to the constant row: the determinant is rounding noise, of either sign.
    solvable = determinant > 1e-6 * ss * ii
    determinant = determinant.where(solvable, 1)
    a = ((st * ii - it * si) / determinant).where(solvable, st / ss)
    b = ((it * ss - st * si) / determinant).where(solvable, 0)
    return a, b


# Grids that can offer several candidates to a compensating solver.
SHORTLISTS: dict[GridFit, Callable[[Tensor, int, bool, Tensor, int], Grid]] = {hessian: hessian_shortlist}
GRIDS: dict[str, GridFit] = {"minmax": minmax, "mse": mse, "sqc": sqc, "hessian": hessian}
