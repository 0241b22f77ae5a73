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

from quantkit.algorithms.boa import damped_rows, live_columns, live_rows
from quantkit.algorithms.hessian import damped
from quantkit.algorithms.refine import refine, refit_scales
from quantkit.formats.grouped_int import GroupedInt

_TILE = 128  # columns whose products with C are updated together; changes speed, not codes
_ROWS = 16  # rows of a head that descend together


def refine_heads(
    weight: Tensor,
    hessian: Tensor,
    row_hessian: Tensor | None,
    quantized: GroupedInt,
    rounds: int,
    damping: float,
    row_damping: float,
) -> GroupedInt:
    """Improve codes and scales; zeros and widths stay.

    Args:
        weight: float32 or float64 ``[heads * head_dim, in_features]``, what the codes approximate.
        hessian: same dtype, ``[in_features, in_features]``, or one per head ``[heads, in_features, in_features]``.
        row_hessian: same dtype, ``[heads, head_dim, head_dim]``; None: rows are independent.
        rounds: of scales, then codes; 0 returns the input.
        damping, row_damping: of the two factors, as a fraction of their mean diagonal.

    Returns:
        A weight whose objective under the damped factors is, head by head, at most the input's.
    """
    if row_hessian is None:
        return _refine_plainly(weight, hessian, quantized, rounds, damping)
    heads = len(row_hessian)
    W, C = live_columns(weight, hessian, heads)
    C = torch.stack([damped(part, damping) for part in C])
    R = damped_rows(live_rows(row_hessian), row_damping)
    for _ in range(rounds):
        quantized = _descend(W, C, R, _refit_rows(W, C, R, quantized))
    return quantized


def _refine_plainly(weight: Tensor, hessian: Tensor, quantized: GroupedInt, rounds: int, damping: float) -> GroupedInt:
    """Independent rows; head by head, where heads have inputs of their own."""
    heads = 1 if hessian.ndim == 2 else len(hessian)
    W, C = live_columns(weight, hessian, heads)
    rows = torch.arange(len(weight), device=weight.device).chunk(heads)
    parts = [
        refine(own, damped(H, damping), _rows(quantized, index), rounds)
        for own, H, index in zip(W, C, rows, strict=True)
    ]
    return replace(
        quantized,
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
    )


def _rows(quantized: GroupedInt, rows: Tensor) -> GroupedInt:
    return replace(quantized, codes=quantized.codes[rows], scales=quantized.scales[rows], zeros=quantized.zeros[rows])


def _times(part: Tensor, C: Tensor) -> Tensor:
    """[heads, n, k] by C [heads or 1, k, in]."""
    return part @ (C if len(C) > 1 else C[0])


def _refit_rows(W: Tensor, C: Tensor, R: Tensor, quantized: GroupedInt) -> GroupedInt:
    """Row after row of every head: with all other rows fixed, row j is a least-squares problem with a moved target."""
    heads, head_dim = R.shape[:2]
    E = quantized.dequantize().to(W).reshape(W.shape) - W
    first = torch.arange(heads, device=W.device) * head_dim
    scales = quantized.scales.clone()
    identity = torch.eye(head_dim, dtype=R.dtype, device=R.device)
    for j in range(head_dim):
        others = R[:, j] / R[:, j, j : j + 1] - identity[j]  # [heads, head_dim]
        moved = W[:, j] - (others.unsqueeze(1) @ E).squeeze(1)
        for index, own in enumerate(first.chunk(len(C))):
            span = slice(index * len(own), (index + 1) * len(own))
            row = refit_scales(moved[span], C[index], _rows(quantized, own + j))
            scales[own + j] = row.scales
            E[span, j] = row.dequantize().to(W) - W[span, j]
    return replace(quantized, scales=scales)


def _descend(W: Tensor, C: Tensor, R: Tensor, quantized: GroupedInt) -> GroupedInt:
    """One sweep over the codes, row block after row block; a head takes a block's new codes only if they are better."""
    E = quantized.dequantize().to(W).reshape(W.shape) - W
    scales, zeros = (
        part.to(W).repeat_interleave(quantized.group_size, 1).reshape(W.shape)
        for part in (quantized.scales, quantized.zeros)
    )
    top = (
        2.0 ** torch.tensor(quantized.bits, dtype=W.dtype, device=W.device).repeat_interleave(quantized.group_size) - 1
    )
    codes = quantized.codes.reshape(W.shape).clone()
    pulled = _times(E, C)
    for start in range(0, W.shape[1], _ROWS):
        block = slice(start, start + _ROWS)
        gradient = R[:, block] @ pulled
        state = _Block(W[:, block], scales[:, block], zeros[:, block], top, R[:, block, block], C)
        new_codes, new_errors = state.sweep(E[:, block], gradient.clone())
        change = new_errors - E[:, block]
        risen = (change * (2 * gradient + R[:, block, block] @ _times(change, C))).sum((1, 2)) >= 0
        keep = risen[:, None, None]
        codes[:, block] = torch.where(keep, codes[:, block], new_codes.to(torch.uint8))
        E[:, block] = torch.where(keep, E[:, block], new_errors)
        pulled[:, block] = _times(E[:, block], C)
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
            gradient[:, :, tile.stop :] += _times(moved, self.C[:, tile, tile.stop :])
        return codes, errors

    def _tile(self, tile: slice, E: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Anti-diagonal after anti-diagonal: on one, no two elements share a row or a column, and they move at once."""
        heads, n, width = E.shape
        margin = n - 1
        parts = (E, gradient, self.W[:, :, tile], self.scales[:, :, tile], self.zeros[:, :, tile])
        errors, G, W, scales, zeros = (pad(part, (margin, margin)).contiguous() for part in parts)
        codes = torch.zeros_like(errors)
        stride = width + 2 * margin
        C = pad(self.C[:, tile, tile], (margin, margin, margin, margin))
        inside = pad(torch.ones(width, dtype=E.dtype, device=E.device), (margin, margin))
        top, diagonal = pad(self.top[tile], (margin, margin)), C.diagonal(dim1=1, dim2=2) + (1 - inside)
        curvature = self.R.diagonal(dim1=1, dim2=2)
        for t in range(width + margin):
            shape, strides = (heads, n), (n * stride, stride - 1)
            e, g, w, s, z, code = (
                part.as_strided(shape, strides, margin + t) for part in (errors, G, W, scales, zeros, codes)
            )
            columns = slice(t, t + n)  # of the diagonal's elements, last row first
            valid = inside[columns].flip(0)
            best = w + e - g / (curvature * diagonal[:, columns].flip(1))
            new = (best / (s + (1 - valid)) + z).round_().clamp_(min=0).minimum(top[columns].flip(0))
            change = (s * (new - z) - w - e) * valid
            code.copy_(new)
            e.add_(change)
            G.baddbmm_(self.R * change.unsqueeze(1), C[:, columns].flip(1).expand(heads, -1, -1))
        return codes[:, :, margin : margin + width], errors[:, :, margin : margin + width]
