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

_LEAST_ROW_BLOCK = 16  # less costs time: every block is a pass over all columns


@dataclass(frozen=True, slots=True, kw_only=True)
class BoAConfig:
    damping: float = 0.01  # of C, as a fraction of its mean diagonal
    row_damping: float = 0.01  # of R, likewise: the larger, the closer to GPTQ
    act_order: ActOrder = "none"  # order of the columns by diag(C)
    row_order: bool = True  # rows of a head by descending diag(R)
    row_block: int | None = None  # rows of a head whose grids are fitted together; None: a quarter of them, at least 16
    joint_rows: bool = False  # TurboBoA: rows of a block do not compensate each other
    late_grids: bool = True  # fit grids on compensated weights; False: on the original weights (BoA's code)
    block_size: int = 128  # lazy-update width of the columns; changes speed, not codes
    shortlist: int = 8  # grid=hessian: candidates per group that are tried in GPTQ's loop


class _Problem(NamedTuple):
    """All heads of a projection; rows and columns in the order of visit where nothing else is said.

    The first dimension of U and C is the number of heads, or 1 where they share their inputs.
    """

    U: Tensor  # [heads or 1, in, in]
    V: Tensor  # [heads, head_dim, head_dim]
    C: Tensor  # [heads or 1, in, in], original order, dead columns repaired
    perm: Tensor  # [heads, in]: position -> original column
    bits: tuple[int, ...]
    symmetric: bool
    grid_fit: GridFit
    damping: float

    def sharing(self, heads: int) -> Iterator[tuple[int, slice]]:
        """Index into U and C, and the heads that it is for."""
        each = heads // len(self.U)
        return ((index, slice(index * each, (index + 1) * each)) for index in range(len(self.U)))


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
        The codes, the loss under the damped factors, and the damping that C needed (R's, where that had to be raised).

    Raises:
        NumericalError: NaN or Inf in the weight or a factor. NotPositiveDefiniteError: no damping helped.
    """
    if row_hessian is None or not row_hessian.triu(1).any():  # nothing couples the rows
        return _gptq(weight, hessian, bits, symmetric, grid_fit, config)
    if not torch.isfinite(weight).all():
        raise NumericalError("the weight holds NaN or Inf; the checkpoint is damaged")
    check_finite(row_hessian)
    heads = len(row_hessian)
    W, C = live_columns(weight, hessian, heads)
    R = live_rows(row_hessian)
    order = [column_order(part.diagonal(), W.shape[2] // len(bits), config.act_order) for part in C]
    rows = _row_order(R, config.row_order)
    columns = [damped_inverse_factor(part[o][:, o], config.damping) for part, o in zip(C, order, strict=True)]
    factors = [damped_inverse_factor(part, config.row_damping) for part in _permute_both(R, rows)]
    damping, row_damping = (max(fraction for _, fraction in part) for part in (columns, factors))
    problem = _Problem(
        U=torch.stack([factor for factor, _ in columns]),
        V=torch.stack([factor for factor, _ in factors]),
        C=C,
        perm=torch.stack(order).expand(heads, -1),
        bits=bits,
        symmetric=symmetric,
        grid_fit=grid_fit,
        damping=damping,
    )
    back = rows.argsort(1)
    solved = _solve(_take_rows(W, rows), problem, config)
    codes, scales, zeros = (_take_rows(part, back).flatten(0, 1) for part in solved)
    quantized = GroupedInt(
        codes=codes.to(torch.uint8), scales=scales.float(), zeros=zeros.float(), bits=bits, symmetric=symmetric
    )
    error = W - quantized.dequantize().to(W).reshape(W.shape)
    loss = kronecker_loss(error, torch.stack([damped(part, damping) for part in C]), damped_rows(R, row_damping))
    return Solution(quantized, loss, max(damping, row_damping) if row_damping > config.row_damping else damping)


def _gptq(
    weight: Tensor, hessian: Tensor, bits: tuple[int, ...], symmetric: bool, grid_fit: GridFit, config: BoAConfig
) -> Solution:
    """Rows that nothing couples; head by head, where heads have inputs of their own."""
    plain = GPTQConfig(
        damping=config.damping,
        act_order=config.act_order,
        block_size=config.block_size,
        shortlist=config.shortlist,
    )
    if hessian.ndim == 2:
        return gptq(weight, hessian, bits, symmetric, grid_fit, plain)
    heads = weight.reshape(len(hessian), -1, weight.shape[1])
    parts = [gptq(rows, H, bits, symmetric, grid_fit, plain) for rows, H in zip(heads, hessian, strict=True)]
    quantized = GroupedInt(
        codes=torch.cat([part.weight.codes for part in parts]),
        scales=torch.cat([part.weight.scales for part in parts]),
        zeros=torch.cat([part.weight.zeros for part in parts]),
        bits=bits,
        symmetric=symmetric,
    )
    return Solution(quantized, sum(part.loss for part in parts), max(part.damping for part in parts))


def live_columns(weight: Tensor, hessian: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Weight [heads, head_dim, in] and C [heads or 1, in, in] with dead columns decoupled."""
    if hessian.ndim == 2:
        W, C = without_dead_columns(weight, hessian)
        return W.reshape(heads, -1, W.shape[1]), C.unsqueeze(0)
    per_head = weight.reshape(heads, -1, weight.shape[1])
    parts = [without_dead_columns(rows, H) for rows, H in zip(per_head, hessian, strict=True)]
    return torch.stack([W for W, _ in parts]), torch.stack([C for _, C in parts])


def kronecker_loss(error: Tensor, hessian: Tensor, row_hessian: Tensor) -> float:
    """sum over heads of tr(R E C E^T): error [heads, head_dim, in], C [(heads or 1,) in, in], R one per head."""
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
    row_block = config.row_block or max(_LEAST_ROW_BLOCK, head_dim // 4)
    remaining = W.clone()
    codes = torch.empty_like(W)
    scales = W.new_empty(*W.shape[:2], len(problem.bits))
    zeros = torch.empty_like(scales)
    early = None if config.late_grids else _fit_all(W, problem)
    for first in range(0, head_dim, row_block):
        block, rest = slice(first, min(first + row_block, head_dim)), slice(first + row_block, None)
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
    scales, zeros = [], []
    for index, heads in problem.sharing(len(W)):
        rows, C = W[heads].flatten(0, 1), problem.C[index]
        grids = static_grids(rows, C, problem.bits, problem.symmetric, problem.grid_fit, problem.damping)
        scales.append(torch.stack([grid.scales for grid in grids], 1))
        zeros.append(torch.stack([grid.zeros for grid in grids], 1))
    return Grid(*(torch.cat(parts).reshape(*W.shape[:2], -1) for parts in (scales, zeros)))


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
    U, n_groups, n_columns = problem.U, len(problem.bits), W.shape[2]
    group_size = n_columns // n_groups
    fits_late = grid is None and config.act_order != "full"
    if grid is None:
        empty = Grid(*(W.new_empty(*W.shape[:2], n_groups) for _ in range(2)))
        grid = empty if fits_late else _fit_all(W, problem)
    target = W.gather(2, problem.perm.unsqueeze(1).expand(W.shape))
    pulled = torch.zeros_like(target)  # what the errors of earlier columns of the same row take away
    codes = torch.empty_like(W)
    groups = problem.perm // group_size  # [heads, in]
    top = 2.0 ** torch.tensor(problem.bits, dtype=W.dtype, device=W.device)[groups] - 1
    for tile in _tiles(n_columns, group_size if fits_late else n_columns, config.block_size):
        if fits_late and tile.start % group_size == 0:
            span = slice(tile.start, tile.start + group_size)
            _fit_groups((target - pulled)[:, :, span], U[:, span, span], groups[:, tile.start], grid, problem, config)
        spread = groups[:, None, tile].expand(-1, W.shape[1], -1)
        tile_grid = Grid(*(part.gather(2, spread) for part in grid))
        codes[:, :, tile], errors = solve_tile(
            target[:, :, tile], pulled[:, :, tile], U[:, tile, tile], coupling, tile_grid, top[:, tile]
        )
        later = U[:, tile, tile.stop :]
        pulled[:, :, tile.stop :] += errors @ (later if len(later) > 1 else later[0])
    return codes.gather(2, problem.perm.argsort(1).unsqueeze(1).expand(W.shape)), grid


def _tiles(n_columns: int, group_size: int, block_size: int) -> Iterator[slice]:
    """Column ranges of at most ``block_size`` that do not cross a group."""
    for start in range(0, n_columns, group_size):
        for first in range(start, start + group_size, block_size):
            yield slice(first, min(first + block_size, start + group_size))


def _fit_groups(w: Tensor, U: Tensor, groups: Tensor, grid: Grid, problem: _Problem, config: BoAConfig) -> None:
    """Sets the grid of one group of each head, as GPTQ would choose it for these rows.

    Args:
        w: [heads, n, g]. U: [heads or 1, g, g]. groups: [heads], the group's number. grid: [heads, n, n_groups].
    """
    identity = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
    for index, heads in problem.sharing(len(w)):
        rows, group = w[heads].flatten(0, 1), int(groups[heads.start])
        bits, metric = problem.bits[group], torch.linalg.solve_triangular(U[index], identity, upper=True)
        found = grid_candidates(rows, bits, problem.symmetric, metric, problem.grid_fit, config.shortlist)
        best = Grid(*(part[0] for part in found))
        if len(found.scales) > 1:
            plain = GPTQConfig(block_size=config.block_size, shortlist=config.shortlist)
            best, _, _ = quantize_group(rows, U[index], found, bits, plain)
        for part, fitted in zip(grid, best, strict=True):
            part[heads, :, group] = fitted.reshape(-1, w.shape[1])
