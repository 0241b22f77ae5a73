"""Walsh-Hadamard rotation along channels: spreads outlier channels before low-bit coding.

H is Sylvester's matrix over sqrt(n): symmetric, its own inverse. (q H)(k H)^T = q k^T, so keys are stored rotated,
and the query is rotated once per step. It must follow the rotary embedding, with which it does not commute.

A head dimension that is not a power of two is rotated in blocks of its largest power-of-two factor (96: three of 32).

>>> rotate(rotate(torch.tensor([[3.0, 1.0, 4.0, 1.0]]))).tolist()
[[3.0, 1.0, 4.0, 1.0]]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def block_size(head_dim: int) -> int:
    """The largest power of two that divides `head_dim`.

    >>> block_size(128), block_size(80)
    (128, 16)
    """
    return head_dim & -head_dim


def rotate(x: Tensor) -> Tensor:
    """x H along the last dimension, float32, by butterflies: the same sums for every row, whatever the batch."""
    size = block_size(x.shape[-1])
    y = x.float().reshape(-1, size)
    step = 1
    while step < size:
        pairs = y.reshape(-1, size // (2 * step), 2, step)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        y = torch.stack((first + second, first - second), 2)
        step *= 2
    return y.reshape(x.shape) * (1 / math.sqrt(size))
