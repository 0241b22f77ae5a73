"""The inner loop of BoA: rows that compensate one another, columns that do, and all of it along anti-diagonals.

Element (r, c) of a tile needs the errors of (r, < c), which pull at it through U, and of (< r, c), which pull at it
through T. At time t all elements (r, t - r) are ready: n rows take ``width + n - 1`` steps, not ``n * width``, with the
codes of the sequential loop.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit.algorithms.grids import Grid


def solve_tile(
    target: Tensor, pulled: Tensor, U: Tensor, coupling: Tensor, grid: Grid, top: Tensor
) -> tuple[Tensor, Tensor]:
    """The loop over a tile, anti-diagonal after anti-diagonal: at time t, element (r, t - r) of every row r.

    Rows are stored last to first and skewed by one step each, so that everything that a step reads or writes is a
    slice: with rho = n - 1 - r, the columns of a step ascend with rho, and both the rows that row r corrects and the
    columns that column c corrects lie at the same place of later steps.

    Args:
        target: [heads, n, width] before, pulled: after subtraction of what earlier columns took from the row.
        U: [heads or 1, width, width]. coupling: T [heads, n, n]. grid: [heads, n, width].
        top: largest code of each column [heads, width].

    Returns:
        codes, errors E with E[r, c] = (w - q) / U[c, c]; [heads, n, width].
    """
    heads, n, width = target.shape
    margin = (n - 1, n - 1)
    S, G, scales, zeros = (_skew(part) for part in (target, pulled, grid.scales, grid.zeros))  # [steps, heads, n]
    codes, errors = torch.empty_like(S), torch.empty_like(S)
    steps, couples = S.shape[0], bool(coupling.any())
    scales[scales == 0] = 1.0  # outside of the tile, where target, zeros and top are 0 and so is what follows from them
    top = pad(top, margin)
    bottom = torch.zeros_like(top)
    diagonal = pad(U.diagonal(dim1=1, dim2=2), margin, value=1.0)
    band = _band(U, n)  # [width, heads or 1, width + 2 (n - 1)]: band[k, :, n - 1 + c] = U[:, c, c + k]
    corrections = _corrections(coupling)  # [n - 1, heads, n]
    S, G = pad(S, (0, 0, 0, 0, 0, n)), pad(G, (0, 0, 0, 0, 0, width))
    D = target.new_zeros(heads, 2 * n)
    shifted = D.as_strided((n - 1, heads, n), (1, 2 * n, 1), 1)  # shifted[k - 1, :, rho] = D[:, rho + k]
    for t in range(steps):
        columns = slice(t, t + n)
        w = S[t] - G[t]
        code = (w / scales[t]).add_(zeros[t]).round_()
        torch.clamp(code, bottom[:, columns], top[:, columns], out=codes[t])
        q = (codes[t] - zeros[t]).mul_(scales[t])
        torch.div(w.sub_(q), diagonal[:, columns], out=errors[t])
        if couples:
            torch.sub(S[t], q, out=D[:, :n])
            S[t + 1 : t + n].addcmul_(corrections, shifted, value=-1)
        reach = width - max(0, t - n + 1)
        G[t + 1 : t + reach].addcmul_(band[1:reach, :, columns], errors[t])
    return _unskew(codes, width), _unskew(errors, width)


def _skew(part: Tensor) -> Tensor:
    """[heads, n, width] -> [width + n - 1, heads, n]: element (r, c) at time r + c, rows last to first; else 0."""
    heads, n, width = part.shape
    steps = width + n - 1
    flat = pad(part, (0, n)).flatten(1)[:, : n * steps]  # a row is one longer than the steps: each starts one later
    return flat.reshape(heads, n, steps).flip(1).permute(2, 0, 1).contiguous()


def _unskew(part: Tensor, width: int) -> Tensor:
    steps, heads, n = part.shape
    flat = part.permute(1, 2, 0).flip(1).flatten(1)
    return pad(flat, (0, n)).reshape(heads, n, steps + 1)[:, :, :width]


def _band(U: Tensor, n: int) -> Tensor:
    """U's diagonals as rows: [width, heads or 1, width + 2 (n - 1)], band[k, :, n - 1 + c] = U[:, c, c + k], else 0."""
    count, width = U.shape[:2]
    wide = pad(U.triu(), (0, width))  # [heads or 1, width, 2 width]
    rows = wide.as_strided((count, width, width), (2 * width * width, 2 * width + 1, 1))  # row c from its diagonal on
    return pad(rows.permute(2, 0, 1), (n - 1, n - 1)).contiguous()


def _corrections(coupling: Tensor) -> Tensor:
    """[n - 1, heads, n]: at [k - 1, :, rho] the T[r, r - k] of row r = n - 1 - rho; 0 where there is no row r - k."""
    n = coupling.shape[1]
    reversed_rows = coupling.flip(1, 2)  # [rho, rho'] with rho' = rho + k for row r - k
    flat = pad(reversed_rows, (0, n)).flatten(1)
    diagonals = flat.as_strided((coupling.shape[0], n, n), (2 * n * n, 2 * n + 1, 1))
    return diagonals[:, :, 1:].permute(2, 0, 1).contiguous()
