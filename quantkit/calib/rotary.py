"""Rotary position embeddings of any layout: full or partial, halves or neighbours, and their mean over positions.

R_l turns the channel pair (a, b) by the angle of position l: (a cos - b sin, a sin + b cos). Channels are first brought
into an order in which pair i is (i, i + half); channels that do not rotate form pairs with the angle 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rotary:
    """R_l for the positions of one sequence."""

    cos: Tensor  # float32 [seq_len, head_dim / 2]
    sin: Tensor
    order: Tensor  # int64 [head_dim]: channel order[i] rotates with channel order[i + head_dim / 2]

    def rotate(self, x: Tensor, positions: Tensor | None = None, *, back: bool = False) -> Tensor:
        """R_l x_l (``back``: R_l^T x_l) for x ``[..., n, head_dim]`` at ``positions`` [n]; all positions by default."""
        cos = self.cos if positions is None else self.cos[positions]
        sin = self.sin if positions is None else self.sin[positions]
        first, second = x[..., self.order].chunk(2, -1)
        if back:
            sin = -sin
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        return turned[..., self.order.argsort()]

    def mean(self, matrix: Tensor) -> Tensor:
        """The mean over all positions of R_l^T M R_l, for ``[..., head_dim, head_dim]``, in closed form."""
        n = self.cos.shape[0]
        moments = (self.cos.t() @ self.cos / n, self.cos.t() @ self.sin / n, self.sin.t() @ self.sin / n)
        return self._turned(matrix, *moments)

    def weighted_sum(self, matrices: Tensor, weights: Tensor) -> Tensor:
        """sum over l of weights[:, l] R_l^T M R_l, for ``[n, head_dim, head_dim]`` and weights ``[n, seq_len]``."""
        cos, sin = ((weights.unsqueeze(2) * part).mT for part in (self.cos, self.sin))  # [n, half, seq_len]
        return self._turned(matrices, cos @ self.cos, cos @ self.sin, sin @ self.sin)

    def _turned(self, matrix: Tensor, cc: Tensor, cs: Tensor, ss: Tensor) -> Tensor:
        """From the sums over positions of cos cos^T, cos sin^T and sin sin^T, [..., half, half]."""
        sc, inverse = cs.mT, self.order.argsort()
        (m11, m12), (m21, m22) = (
            half.chunk(2, -1) for half in matrix[..., self.order, :][..., self.order].chunk(2, -2)
        )
        upper = torch.cat((cc * m11 + cs * m12 + sc * m21 + ss * m22, -cs * m11 + cc * m12 - ss * m21 + sc * m22), -1)
        lower = torch.cat((-sc * m11 - ss * m12 + cc * m21 + cs * m22, ss * m11 - sc * m12 - cs * m21 + cc * m22), -1)
        return torch.cat((upper, lower), -2)[..., inverse, :][..., inverse]


def no_rotary(seq_len: int, head_dim: int, device: torch.device) -> Rotary:
    """The identity at every position."""
    ones = torch.ones(seq_len, head_dim // 2, device=device)
    return Rotary(ones, torch.zeros_like(ones), torch.arange(head_dim, device=device))


def rotary(cos: Tensor, sin: Tensor, head_dim: int, *, neighbours: bool) -> Rotary:
    """From what a model passes to its blocks.

    Args:
        cos, sin: ``[seq_len, n_rotating]`` with n_rotating <= head_dim; every angle occurs twice.
        neighbours: channels 2i and 2i + 1 rotate together; otherwise i and i + n_rotating / 2.
    """
    seq_len, n_rotating = cos.shape
    half, rest = n_rotating // 2, (head_dim - n_rotating) // 2
    # Models that rotate neighbours list each angle twice in a row, or all angles twice over: both occur.
    in_a_row = neighbours and bool((cos[:, 0::2] == cos[:, 1::2]).all())
    cos, sin = (part.float()[:, 0::2] if in_a_row else part.float()[:, :half] for part in (cos, sin))
    pairs = torch.arange(n_rotating, device=cos.device)
    first, second = (pairs[0::2], pairs[1::2]) if neighbours else (pairs[:half], pairs[half:])
    still = torch.arange(n_rotating, head_dim, device=cos.device)
    return Rotary(
        torch.cat((cos, cos.new_ones(seq_len, rest)), 1),
        torch.cat((sin, sin.new_zeros(seq_len, rest)), 1),
        torch.cat((first, still[:rest], second, still[rest:])),
    )
