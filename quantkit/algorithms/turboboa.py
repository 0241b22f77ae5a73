"""TurboBoA: what it adds to BoA once all codes are known. Scales are refitted and codes revisited, across rows.

Paper      The authors of BoA 2026, arXiv:2602.04929 (ICLR 2026). Its other features are settings elsewhere: rows of a
           block together (`BoAConfig.joint_rows`), grids fitted late (`BoAConfig.late_grids`), and the error of earlier
           blocks (`quantkit.algorithms.correction`, a target that works with every solver).
Minimizes  sum over heads of tr(R (W - Q) C (W - Q)^T), from any solver's codes; see `quantkit.algorithms.boa`.
Cost       One round: about as much as BoA.
Deviates   The authors refit scales of whole rows only; here also of groups, all groups of a row at once. Their codes
           stay; here every code is visited again with all others fixed, as `quantkit.algorithms.refine` does without R.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit.algorithms.boa import damped_rows, live_rows
from quantkit.algorithms.hessian import damped, without_dead_columns
from quantkit.algorithms.refine import refine, refit_scales
from quantkit.formats.grouped_int import GroupedInt

_TILE = 128  # columns whose products with C are updated together; changes speed, not codes
_ROWS = 16  # rows of a head that descend together


def refine_heads(
    weight: Tensor, hessian: Tensor, row_hessian: Tensor | None, quantized: GroupedInt, rounds: int, damping: float
) -> GroupedInt:
    """Improve codes and scales; zeros and widths stay.

    Args:
        weight: float32 or float64 ``[heads * head_dim, in_features]``, what the codes approximate.
        hessian: same dtype, ``[in_features, in_features]``, or one per head ``[heads, in_features, in_features]``.
        row_hessian: same dtype, ``[heads, head_dim, head_dim]``; None: rows are independent.
        rounds: of scales, then codes; 0 returns the input.
        damping: of both factors, as a fraction of their mean diagonal.

    Returns:
        A weight whose objective under the damped factors is, head by head, at most the input's.
    """
    if hessian.ndim == 3:
        heads, parts = len(hessian), []
        for index, rows in enumerate(torch.arange(len(weight), device=weight.device).chunk(heads)):
            R = None if row_hessian is None else row_hessian[index : index + 1]
            parts.append(refine_heads(weight[rows], hessian[index], R, _rows(quantized, rows), rounds, damping))
        return _stack(parts)
    W, C = without_dead_columns(weight, hessian)
    C = damped(C, damping)
    if row_hessian is None:
        return refine(W, C, quantized, rounds)
    R = damped_rows(live_rows(row_hessian), damping)
    for _ in range(rounds):
        quantized = _descend(W, C, R, _refit_rows(W, C, R, quantized))
    return quantized


def _rows(quantized: GroupedInt, rows: Tensor) -> GroupedInt:
    return replace(quantized, codes=quantized.codes[rows], scales=quantized.scales[rows], zeros=quantized.zeros[rows])


def _stack(parts: list[GroupedInt]) -> GroupedInt:
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=torch.cat([part.zeros for part in parts]),
    )


def _refit_rows(W: Tensor, C: Tensor, R: Tensor, quantized: GroupedInt) -> GroupedInt:
    """Row after row of every head: with all other rows fixed, row j is a least-squares problem with a moved target."""
    heads, head_dim = R.shape[:2]
    E = (quantized.dequantize().to(W) - W).reshape(heads, head_dim, -1)
    first = torch.arange(heads, device=W.device) * head_dim
    scales = quantized.scales.clone()
    for j in range(head_dim):
        others = R[:, j : j + 1] / R[:, j : j + 1, j : j + 1]
        others = others - torch.eye(head_dim, dtype=R.dtype, device=R.device)[j]
        moved = W[first + j] - (others @ E).squeeze(1)
        row = refit_scales(moved, C, _rows(quantized, first + j))
        scales[first + j] = row.scales
        E[:, j] = row.dequantize().to(W) - W[first + j]
    return replace(quantized, scales=scales)


def _descend(W: Tensor, C: Tensor, R: Tensor, quantized: GroupedInt) -> GroupedInt:
    """One sweep over the codes, row block after row block; a head takes a block's new codes only if they are better."""
    heads, head_dim = R.shape[:2]
    shape = (heads, head_dim, -1)
    E = (quantized.dequantize().to(W) - W).reshape(shape)
    spread = (quantized.scales.to(W), quantized.zeros.to(W))
    scales, zeros = (part.repeat_interleave(quantized.group_size, 1).reshape(shape) for part in spread)
    top = 2.0 ** torch.tensor(quantized.bits, device=W.device).repeat_interleave(quantized.group_size) - 1
    codes = quantized.codes.reshape(shape).clone()
    pulled = E @ C
    for start in range(0, head_dim, _ROWS):
        block = slice(start, start + _ROWS)
        gradient = R[:, block] @ pulled
        state = _Block(W.reshape(shape)[:, block], scales[:, block], zeros[:, block], top.to(W), R[:, block, block], C)
        new_codes, new_errors = state.sweep(E[:, block], gradient.clone())
        change = new_errors - E[:, block]
        risen = (change * (2 * gradient + R[:, block, block] @ (change @ C))).sum((1, 2)) >= 0
        keep = risen[:, None, None]
        codes[:, block] = torch.where(keep, codes[:, block], new_codes.to(torch.uint8))
        E[:, block] = torch.where(keep, E[:, block], new_errors)
        pulled[:, block] = E[:, block] @ C
    return replace(quantized, codes=codes.flatten(0, 1))


class _Block:
    """A few rows of every head: [heads, n, in] each; gradient (R E C) of the objective, halved."""

    def __init__(self, W: Tensor, scales: Tensor, zeros: Tensor, top: Tensor, R: Tensor, C: Tensor) -> None:
        self.W, self.scales, self.zeros, self.top, self.R, self.C = W, scales, zeros, top, R, C

    def sweep(self, E: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """New codes and errors after one visit of every element; ``gradient`` is overwritten."""
        codes, errors = torch.empty_like(E), E.clone()
        for start in range(0, E.shape[2], _TILE):
            tile = slice(start, min(start + _TILE, E.shape[2]))
            codes[:, :, tile], errors[:, :, tile] = self._tile(tile, E[:, :, tile], gradient[:, :, tile])
            moved = self.R @ (errors[:, :, tile] - E[:, :, tile])
            gradient[:, :, tile.stop :] += moved @ self.C[tile, tile.stop :]
        return codes, errors

    def _tile(self, tile: slice, E: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Anti-diagonal after anti-diagonal: on one, no two elements share a row or a column, and they move at once."""
        heads, n, width = E.shape
        margin = n - 1
        parts = (E, gradient, self.W[:, :, tile], self.scales[:, :, tile], self.zeros[:, :, tile])
        errors, G, W, scales, zeros = (pad(part, (margin, margin)).contiguous() for part in parts)
        codes = torch.zeros_like(errors)
        row_stride = width + 2 * margin
        C = pad(self.C[tile, tile], (margin, margin, margin, margin))
        curvature = self.R.diagonal(dim1=1, dim2=2)
        inside = pad(torch.ones(width, dtype=E.dtype, device=E.device), (margin, margin))
        top, diagonal = pad(self.top[tile], (margin, margin)), C.diagonal() + (1 - inside)
        for t in range(width + margin):
            shape, strides = (heads, n), (n * row_stride, row_stride - 1)
            e, g, w, s, z, code = (
                part.as_strided(shape, strides, margin + t) for part in (errors, G, W, scales, zeros, codes)
            )
            columns = slice(t, t + n)  # of the diagonal's elements, last row first
            valid = inside[columns].flip(0)
            step = s + (1 - valid)
            best = w + e - g / (curvature * diagonal[columns].flip(0))
            new = (best / step + z).round_().clamp_(min=0).minimum(top[columns].flip(0))
            change = (s * (new - z) - w - e) * valid
            code.copy_(new)
            e.add_(change)
            G.baddbmm_(self.R * change.unsqueeze(1), C[columns].flip(0).expand(heads, -1, -1))
        return codes[:, :, margin : margin + width], errors[:, :, margin : margin + width]
