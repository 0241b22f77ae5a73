"""GPTQ: second-order rounding, one input column at a time.

Paper      Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv:2210.17323. Update: eq. (2), (3). Loop: Algorithm 1.
Minimizes  tr((W - Q) H (W - Q)^T) over Q on the grid, H = (2 / n_tokens) X^T X, X [n_tokens, in_features].
Needs      the Hessian of the linear's inputs. The loss is a sum over rows and a mean over calibration tokens.
Cost       O(in^3) once, then O(out * in^2). Peak: two float64 [in, in] matrices beside the weight.
Deviates   The grid of a group is fitted on the weights as compensated by *all* earlier columns, also by those of the
           same lazy block (the authors' code misses these), so the block size never changes the codes.
           act_order="full" fits every grid beforehand on the original weights and keeps groups contiguous in memory;
           act_order="group" visits whole groups by descending mean(diag H), and the columns inside a group by
           descending diag H, so that grids can still be fitted on compensated weights.
           Where a grid offers a shortlist (grid=hessian), the loop runs under each candidate and each row keeps the
           one with the least loss ||E||^2: rounding with compensation rates a scale otherwise than plain rounding does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from quantkit.algorithms.grids import SHORTLISTS, Grid, GridFit
from quantkit.algorithms.hessian import damped_inverse_factor, without_dead_columns
from quantkit.errors import NumericalError
from quantkit.formats.grouped_int import GroupedInt

ActOrder = Literal["none", "group", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTQConfig:
    damping: float = 0.01  # lambda, as a fraction of mean(diag(H))
    act_order: ActOrder = "none"  # order of the columns by diag(H)
    block_size: int = 128  # lazy-update width; changes speed, not codes
    shortlist: int = 8  # grid=hessian: candidates per group that are tried in the loop itself


class Solution(NamedTuple):
    """What a solver returns: the codes, and tr((W - Q) H (W - Q)^T) with the damped Hessian."""

    weight: GroupedInt
    loss: float
    damping: float


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: tuple[int, ...],
    symmetric: bool,
    grid_fit: GridFit,
    config: GPTQConfig,
) -> Solution:
    """Quantize one linear.

    Args:
        weight: float32 or float64 ``[out_features, in_features]``.
        hessian: same dtype, ``[in_features, in_features]``, any positive multiple of X^T X.
        bits: width of each group of ``in_features // len(bits)`` neighbouring columns.
        symmetric: zero fixed at the middle of the grid.
        grid_fit: one of `quantkit.algorithms.grids.GRIDS`.

    Raises:
        NumericalError: NaN or Inf in the weight or the Hessian. NotPositiveDefiniteError: no damping helped.
    """
    if not torch.isfinite(weight).all():
        raise NumericalError("the weight holds NaN or Inf; the checkpoint is damaged")
    W, H = without_dead_columns(weight, hessian)
    group_size = W.shape[1] // len(bits)
    perm = column_order(H.diagonal(), group_size, config.act_order)
    U, damping = damped_inverse_factor(H[perm][:, perm], config.damping)
    if config.act_order == "full":
        columns = _solve_columns(W, U, perm, bits, static_grids(W, H, bits, symmetric, grid_fit, damping), config)
    else:
        columns = _solve_groups(W, U, perm, bits, symmetric, grid_fit, config)
    codes, grids, loss = columns
    quantized = GroupedInt(
        codes=codes.to(torch.uint8),
        scales=torch.stack([grid.scales for grid in grids], 1).float(),
        zeros=torch.stack([grid.zeros for grid in grids], 1).float(),
        bits=bits,
        symmetric=symmetric,
    )
    return Solution(quantized, loss, damping)


def column_order(diagonal: Tensor, group_size: int, act_order: ActOrder) -> Tensor:
    """perm [in]: position in the visiting order -> original column."""
    if act_order == "none":
        return torch.arange(diagonal.numel(), device=diagonal.device)
    if act_order == "full":
        return torch.argsort(diagonal, descending=True, stable=True)
    grouped = diagonal.reshape(-1, group_size)
    groups = torch.argsort(grouped.mean(1), descending=True, stable=True)
    inside = torch.argsort(grouped, dim=1, descending=True, stable=True)
    return (groups.unsqueeze(1) * group_size + inside[groups]).flatten()


def static_grids(
    W: Tensor, H: Tensor, bits: tuple[int, ...], symmetric: bool, grid_fit: GridFit, damping: float
) -> list[Grid]:
    """One grid per group from the original weights; the metric is H_gg, as nothing is compensated yet."""
    group_size = W.shape[1] // len(bits)
    grids = []
    for group, width in enumerate(bits):
        columns = slice(group * group_size, (group + 1) * group_size)
        H_gg = H[columns, columns] + torch.diag((damping * H.diagonal().mean()).expand(group_size))
        # float64, like the factor: what is positive definite there may fail to be in float32.
        grids.append(grid_fit(W[:, columns], width, symmetric, torch.linalg.cholesky(H_gg.double()).to(W.dtype)))
    return grids


def _solve_groups(
    W: Tensor, U: Tensor, perm: Tensor, bits: tuple[int, ...], symmetric: bool, grid_fit: GridFit, config: GPTQConfig
) -> tuple[Tensor, list[Grid], float]:
    """Whole groups in the order of ``perm``; each grid is fitted when its group is reached."""
    group_size = W.shape[1] // len(bits)
    remaining = W[:, perm]  # columns in visiting order, compensated as we go
    codes = torch.empty_like(W)
    grids: dict[int, Grid] = {}
    loss = 0.0
    for start in range(0, W.shape[1], group_size):
        stop = start + group_size
        group = int(perm[start]) // group_size
        identity = torch.eye(group_size, dtype=W.dtype, device=W.device)
        metric = torch.linalg.solve_triangular(U[start:stop, start:stop], identity, upper=True)
        span = slice(start, stop)
        candidates = grid_candidates(remaining[:, span], bits[group], symmetric, metric, grid_fit, config.shortlist)
        grids[group], group_codes, E = quantize_group(
            remaining[:, span], U[span, span], candidates, bits[group], config
        )
        codes[:, perm[span]] = group_codes
        remaining[:, stop:] -= E @ U[span, stop:]
        loss += E.square().sum().item()
    return codes, [grids[group] for group in range(len(bits))], loss


def grid_candidates(w: Tensor, bits: int, symmetric: bool, metric: Tensor, grid_fit: GridFit, n: int) -> Grid:
    """[n, rows] grids to try; one where the grid offers no shortlist."""
    shortlist = SHORTLISTS.get(grid_fit)
    if shortlist is not None and n > 1:
        return shortlist(w, bits, symmetric, metric, n)
    return Grid(*(part.unsqueeze(0) for part in grid_fit(w, bits, symmetric, metric)))


def quantize_group(
    w: Tensor, U: Tensor, candidates: Grid, bits: int, config: GPTQConfig
) -> tuple[Grid, Tensor, Tensor]:
    """Run the loop under every candidate grid at once and keep, per row, the one with the least loss.

    Returns:
        grid [rows], codes [rows, g], E [rows, g].
    """
    n, rows = candidates.scales.shape
    flat = Grid(candidates.scales.flatten(), candidates.zeros.flatten())
    remaining = w.repeat(n, 1)
    codes, E = torch.empty_like(remaining), torch.empty_like(remaining)
    for first in range(0, w.shape[1], config.block_size):
        span = slice(first, min(first + config.block_size, w.shape[1]))
        widths = [(flat, bits)] * (span.stop - first)
        codes[:, span], E[:, span] = _quantize_block(remaining[:, span], U[span, span], widths)
        remaining[:, span.stop :] -= E[:, span] @ U[span, span.stop :]
    pick = E.square().sum(1).reshape(n, rows).argmin(0, keepdim=True)  # the first of equals: the metric's favourite
    grid = Grid(candidates.scales.gather(0, pick)[0], candidates.zeros.gather(0, pick)[0])
    row = pick[0] * rows + torch.arange(rows, device=w.device)
    return grid, codes[row], E[row]


def _solve_columns(
    W: Tensor, U: Tensor, perm: Tensor, bits: tuple[int, ...], grids: list[Grid], config: GPTQConfig
) -> tuple[Tensor, list[Grid], float]:
    """Single columns in the order of ``perm`` with grids that are known beforehand."""
    group_size = W.shape[1] // len(bits)
    remaining = W[:, perm]
    codes = torch.empty_like(W)
    loss = 0.0
    for first in range(0, W.shape[1], config.block_size):
        last = min(first + config.block_size, W.shape[1])
        span = slice(first, last)
        groups = (perm[span] // group_size).tolist()
        widths = [(grids[group], bits[group]) for group in groups]
        codes[:, perm[span]], E = _quantize_block(remaining[:, span], U[span, span], widths)
        remaining[:, last:] -= E @ U[span, last:]
        loss += E.square().sum().item()
    return codes, grids, loss


def _quantize_block(block: Tensor, U: Tensor, widths: list[tuple[Grid, int]]) -> tuple[Tensor, Tensor]:
    """Column by column with compensation inside the block.

    Args:
        block: [out, n]. U: [n, n]. widths: grid and bits of each column.

    Returns:
        codes [out, n] as floats, E [out, n] with E[:, c] = (w_c - q_c) / U[c, c].
    """
    # Work on the transpose: a column becomes a contiguous row, four times faster on a CPU.
    columns = block.t().clone(memory_format=torch.contiguous_format)
    codes = torch.empty_like(columns)
    errors = torch.empty_like(columns)
    diagonal = U.diagonal().tolist()
    for c, ((scales, zeros), bits) in enumerate(widths):
        w = columns[c]
        code = (w / scales + zeros).round_().clamp_(0, 2**bits - 1)
        codes[c] = code
        e = (w - scales * (code - zeros)) / diagonal[c]
        errors[c] = e
        columns[c + 1 :].addr_(U[c, c + 1 :], e, alpha=-1)  # eq. (3)
    return codes.t(), errors.t()
