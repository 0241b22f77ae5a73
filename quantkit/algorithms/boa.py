"""BoA: attention-aware rounding. Query, key and value weights are compensated across the rows of a head as well.

Paper      Kim, Kim, Cho, Lee, Kim, Jeon 2025, arXiv:2406.13474 (ICML 2025). Rows jointly and late grids: TurboBoA,
           arXiv:2602.04929 (`quantkit.algorithms.turboboa` has its other features).
Minimizes  sum over heads of tr(R (W - Q) C (W - Q)^T): C [in, in] of the projection's inputs, as in GPTQ; R [head_dim,
           head_dim] of its outputs, from what attention multiplies them with (`quantkit.calib.attention` gathers both).
Needs      C, shared or per head, and R per head. R = identity is GPTQ, and is handed to it.
Cost       GPTQ's, plus O(out * in * head_dim) for the rows; about in * head_dim / row_block steps in sequence.
Deviates   The authors quantize in * head_dim elements one after the other, on grids of the original weights. Here
           element (r, c) of a row block waits for (r, < c) and (< r, c) only, so that a block takes its anti-diagonals
           in in + row_block steps, with the codes of the sequential loop. The grids of a row block are fitted when it
           is reached, on weights that earlier rows have corrected (so does TurboBoA).

One head, with C^-1 = U^T U and R^-1 = V^T V, both factors upper triangular; rows and columns in the order of visit:

    inside row j        w[c+1:] -= (w_c - q_c) / U[c, c] * U[c, c+1:]         GPTQ
    after row j         W[r, :] -= V[j, r] / V[j, j] * (w_j - q_j), r > j     w_j: row j before its own loop
    after a block B     W[F, :] -= V[B, F]^T V[B, B]^-T (W_B - Q_B)           the same for all rows of B at once
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.algorithms.gptq import (
    ActOrder,
    GPTQConfig,
    Solution,
    column_order,
    gptq,
    grid_candidates,
    quantize_group,
    static_grids,
)
from quantkit.algorithms.grids import Grid, GridFit
from quantkit.algorithms.hessian import check_finite, damped, damped_inverse_factor, without_dead_columns
from quantkit.algorithms.wavefront import solve_tile
from quantkit.errors import NumericalError
from quantkit.formats.grouped_int import GroupedInt


@dataclass(frozen=True, slots=True, kw_only=True)
class BoAConfig:
    damping: float = 0.01  # of both factors, as a fraction of their mean diagonal
    act_order: ActOrder = "none"  # order of the columns by diag(C)
    row_order: bool = True  # rows of a head by descending diag(R)
    row_block: int = 16  # rows of a head whose grids are fitted together
    joint_rows: bool = False  # TurboBoA: rows of a block do not compensate each other
    late_grids: bool = True  # fit grids on compensated weights; False: on the original weights (BoA's code)
    block_size: int = 128  # lazy-update width of the columns; changes speed, not codes
    shortlist: int = 8  # grid=hessian: candidates per group that are tried in GPTQ's loop


class _Problem(NamedTuple):
    """Heads that share their inputs, rows and columns in the order of visit. ``perm``: position -> original column."""

    U: Tensor  # [in, in]
    V: Tensor  # [heads, head_dim, head_dim]
    C: Tensor  # [in, in], original order, dead columns repaired
    perm: Tensor  # [in]
    bits: tuple[int, ...]
    symmetric: bool
    grid_fit: GridFit
    damping: float


def boa(
    weight: Tensor,
    hessian: Tensor,
    row_hessian: Tensor | None,
    bits: tuple[int, ...],
    symmetric: bool,
    grid_fit: GridFit,
    config: BoAConfig,
) -> Solution:
    """Quantize the query, key or value projection of an attention module.

    Args:
        weight: float32 or float64 ``[heads * head_dim, in_features]``.
        hessian: same dtype, ``[in_features, in_features]``, or one per head ``[heads, in_features, in_features]``.
        row_hessian: same dtype, ``[heads, head_dim, head_dim]``; None: rows are independent.
        bits: width of each group of ``in_features // len(bits)`` neighbouring columns.
        symmetric: zero fixed at the middle of the grid.
        grid_fit: one of `quantkit.algorithms.grids.GRIDS`.

    Returns:
        The codes, the loss under the damped factors, and the largest damping that a factor needed.

    Raises:
        NumericalError: NaN or Inf in the weight or a factor. NotPositiveDefiniteError: no damping helped.
    """
    if hessian.ndim == 3:
        return _each_head(weight, hessian, row_hessian, bits, symmetric, grid_fit, config)
    if row_hessian is None or not row_hessian.triu(1).any():  # nothing couples the rows
        plain = GPTQConfig(
            damping=config.damping,
            act_order=config.act_order,
            block_size=config.block_size,
            shortlist=config.shortlist,
        )
        return gptq(weight, hessian, bits, symmetric, grid_fit, plain)
    if not torch.isfinite(weight).all():
        raise NumericalError("the weight holds NaN or Inf; the checkpoint is damaged")
    check_finite(row_hessian)
    W, C = without_dead_columns(weight, hessian)
    heads, head_dim = row_hessian.shape[:2]
    W = W.reshape(heads, head_dim, -1)
    R = live_rows(row_hessian)
    perm = column_order(C.diagonal(), W.shape[2] // len(bits), config.act_order)
    rows = _row_order(R, config.row_order)
    U, damping = damped_inverse_factor(C[perm][:, perm], config.damping)
    ordered = _permute_both(R, rows)
    factors = [damped_inverse_factor(one, config.damping) for one in ordered]
    V = torch.stack([factor for factor, _ in factors])
    damping = max(damping, *(fraction for _, fraction in factors))
    problem = _Problem(U, V, C, perm, bits, symmetric, grid_fit, damping)
    solved = _solve(_take_rows(W, rows), problem, config)
    back = rows.argsort(1)
    codes, scales, zeros = (_take_rows(part, back).flatten(0, 1) for part in solved)
    quantized = GroupedInt(
        codes=codes.to(torch.uint8), scales=scales.float(), zeros=zeros.float(), bits=bits, symmetric=symmetric
    )
    error = W - quantized.dequantize().to(W).reshape(W.shape)
    return Solution(quantized, kronecker_loss(error, damped(C, damping), damped_rows(R, damping)), damping)


def _each_head(
    weight: Tensor,
    hessian: Tensor,
    row_hessian: Tensor | None,
    bits: tuple[int, ...],
    symmetric: bool,
    grid_fit: GridFit,
    config: BoAConfig,
) -> Solution:
    """Heads with inputs of their own have nothing in common."""
    heads = hessian.shape[0]
    parts = []
    for index, rows in enumerate(weight.reshape(heads, -1, weight.shape[1])):
        row_factor = None if row_hessian is None else row_hessian[index : index + 1]
        parts.append(boa(rows, hessian[index], row_factor, bits, symmetric, grid_fit, config))
    quantized = GroupedInt(
        codes=torch.cat([part.weight.codes for part in parts]),
        scales=torch.cat([part.weight.scales for part in parts]),
        zeros=torch.cat([part.weight.zeros for part in parts]),
        bits=bits,
        symmetric=symmetric,
    )
    return Solution(quantized, sum(part.loss for part in parts), max(part.damping for part in parts))


def kronecker_loss(error: Tensor, hessian: Tensor, row_hessian: Tensor) -> float:
    """sum over heads of tr(R E C E^T): error [heads, head_dim, in], C [in, in], R [heads, head_dim, head_dim]."""
    return float(((row_hessian @ error) * (error @ hessian)).sum())


def live_rows(row_hessian: Tensor) -> Tensor:
    """R with the identity in place of a head that nothing reads; a row that nothing reads is decoupled likewise."""
    diagonal = row_hessian.diagonal(dim1=1, dim2=2)
    live = (diagonal > 0).sum(1, keepdim=True)
    mean = torch.where(live > 0, diagonal.clamp_min(0).sum(1, keepdim=True) / live.clamp_min(1), 1.0)
    return row_hessian + torch.diag_embed(torch.where(diagonal > 0, 0.0, mean))


def damped_rows(row_hessian: Tensor, damping: float) -> Tensor:
    """Every head's R plus ``damping * mean(diag R)`` on its diagonal."""
    return torch.stack([damped(R, damping) for R in row_hessian])


def _row_order(row_hessian: Tensor, by_diagonal: bool) -> Tensor:
    """[heads, head_dim]: position -> original row of the head."""
    diagonal = row_hessian.diagonal(dim1=1, dim2=2)
    if by_diagonal:
        return torch.argsort(diagonal, dim=1, descending=True, stable=True)
    return torch.arange(diagonal.shape[1], device=diagonal.device).expand(diagonal.shape)


def _take_rows(part: Tensor, rows: Tensor) -> Tensor:
    """part [heads, head_dim, n] with the rows of each head reordered."""
    return part.gather(1, rows.unsqueeze(2).expand(part.shape))


def _permute_both(matrices: Tensor, rows: Tensor) -> Tensor:
    return _take_rows(_take_rows(matrices, rows).mT, rows).mT


def _solve(W: Tensor, problem: _Problem, config: BoAConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Row block after row block.

    Args:
        W: [heads, head_dim, in], rows in the order of visit, columns in the original order.

    Returns:
        codes [heads, head_dim, in], scales and zeros [heads, head_dim, n_groups]; rows and columns as in ``W``.
    """
    V, head_dim = problem.V, W.shape[1]
    remaining = W.clone()
    codes = torch.empty_like(W)
    scales = W.new_empty(*W.shape[:2], len(problem.bits))
    zeros = torch.empty_like(scales)
    early = None if config.late_grids else _fit_all(W, problem)
    for first in range(0, head_dim, config.row_block):
        block, rest = slice(first, min(first + config.row_block, head_dim)), slice(first + config.row_block, None)
        grid = None if early is None else Grid(*(part[:, block] for part in early))
        coupling = torch.zeros_like(V[:, block, block]) if config.joint_rows else _coupling(V[:, block, block])
        solved, grid = _solve_block(remaining[:, block], coupling, grid, problem, config)
        codes[:, block], scales[:, block], zeros[:, block] = solved, grid.scales, grid.zeros
        error = remaining[:, block] - _dequantize(solved, grid)
        transfer = torch.linalg.solve_triangular(V[:, block, block], V[:, block, rest], upper=True)
        remaining[:, rest] -= transfer.mT @ error
    return codes, scales, zeros


def _coupling(V: Tensor) -> Tensor:
    """T [heads, n, n], strictly lower: row r is corrected by -T[r, j] times the error of row j."""
    return (V / V.diagonal(dim1=1, dim2=2).unsqueeze(2)).mT.tril(-1)


def _dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """codes [heads, rows, in], grid [heads, rows, n_groups] -> weights [heads, rows, in]."""
    grouped = codes.reshape(*grid.scales.shape, -1)
    return torch.flatten(grid.scales.unsqueeze(3) * (grouped - grid.zeros.unsqueeze(3)), 2)


def _fit_all(W: Tensor, problem: _Problem) -> Grid:
    """Grids of all groups on the given weights [heads, rows, in], original column order: [heads, rows, n_groups]."""
    grids = static_grids(W.flatten(0, 1), problem.C, problem.bits, problem.symmetric, problem.grid_fit, problem.damping)
    return Grid(*(torch.stack(parts, 1).reshape(*W.shape[:2], -1) for parts in zip(*grids, strict=True)))


def _solve_block(
    W: Tensor, coupling: Tensor, grid: Grid | None, problem: _Problem, config: BoAConfig
) -> tuple[Tensor, Grid]:
    """A few rows of every head, tile after tile of columns.

    Args:
        W: [heads, n, in], corrected by all earlier rows; columns in the original order.
        coupling: T [heads, n, n] between these rows.
        grid: [heads, n, n_groups]; None: fitted here.

    Returns:
        codes [heads, n, in], the grid.
    """
    perm, U = problem.perm, problem.U
    group_size = W.shape[2] // len(problem.bits)
    fits_late = grid is None and config.act_order != "full"
    if grid is None:
        grid = (
            Grid(*(W.new_empty(*W.shape[:2], len(problem.bits)) for _ in range(2)))
            if fits_late
            else _fit_all(W, problem)
        )
    target = W[:, :, perm]
    pulled = torch.zeros_like(target)  # what the errors of earlier columns of the same row take away
    codes = torch.empty_like(W)
    column_groups = perm // group_size
    widths = torch.tensor(problem.bits, device=W.device)[column_groups]
    for tile in _tiles(W.shape[2], group_size if fits_late else W.shape[2], config.block_size):
        group = int(column_groups[tile.start])
        if fits_late and tile.start % group_size == 0:
            span = slice(tile.start, tile.start + group_size)
            fitted = _fit_group((target - pulled)[:, :, span], U[span, span], problem.bits[group], problem, config)
            grid.scales[:, :, group], grid.zeros[:, :, group] = fitted
        tile_grid = Grid(*(part[:, :, column_groups[tile]] for part in grid))
        top = (2.0 ** widths[tile] - 1).to(W)
        solved, errors = solve_tile(target[:, :, tile], pulled[:, :, tile], U[tile, tile], coupling, tile_grid, top)
        codes[:, :, perm[tile]] = solved
        pulled[:, :, tile.stop :] += errors @ U[tile, tile.stop :]
    return codes, grid


def _tiles(n_columns: int, group_size: int, block_size: int) -> Iterator[slice]:
    """Column ranges of at most ``block_size`` that do not cross a group."""
    for start in range(0, n_columns, group_size):
        for first in range(start, start + group_size, block_size):
            yield slice(first, min(first + block_size, start + group_size))


def _fit_group(w: Tensor, U: Tensor, bits: int, problem: _Problem, config: BoAConfig) -> Grid:
    """w [heads, n, g] -> [heads, n], as GPTQ would choose them for these rows."""
    rows = w.flatten(0, 1)
    metric = torch.linalg.solve_triangular(U, torch.eye(U.shape[0], dtype=U.dtype, device=U.device), upper=True)
    candidates = grid_candidates(rows, bits, problem.symmetric, metric, problem.grid_fit, config.shortlist)
    if candidates.scales.shape[0] > 1:
        plain = GPTQConfig(block_size=config.block_size, shortlist=config.shortlist)
        grid, _, _ = quantize_group(rows, U, candidates, bits, plain)
    else:
        grid = Grid(*(part[0] for part in candidates))
    return Grid(*(part.reshape(w.shape[:2]) for part in grid))
