"""Coding of keys and values on the grids of a page: the quantizers that the policies share.

range       lo, hi = min, max of the group, shrunk about the middle by `clip`; step s = (hi - lo) / (2**bits - 1),
            code = round((x - lo) / s). Asymmetric: the offset lo is stored. (KIVI, ZipCache, AKVQ-VL 3.4)
symmetric   levels s * (c - (2**bits - 1) / 2), no offset, s by least squares (three rounds of: codes for s, s for
            codes). For rotated, hence nearly normal, data. Rounding to the nearest level shrinks a vector: <x, x'> =
            |x'|^2 < |x|^2, at 2 bits by 12 %, which flattens the softmax. So s is finally scaled until <x, x'> =
            |x|^2: no shrinkage of the part of the error that is common to all queries along x. (ours)

Scales are rounded to float16 and kept above 2**-14, so that a group of zeros codes to zeros and nothing is subnormal.
A group never depends on other groups: a token gives the same bytes alone and in company.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.formats.kv_page import GridSpec
from quantkit.kernels.kv_append import START

MIN_SCALE = 2.0**-14
MAX_FLOAT16 = 65504.0


@dataclass(frozen=True, slots=True)
class Coded:
    """Codes uint8 [heads, n, head_dim] and float16 scales (and offsets) of n tokens.

    Scales are [heads or 1, groups, n] for a grid per token and [heads, n / group, head_dim] per channel.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None


def encode(x: Tensor, bits: int, grid: GridSpec, clip: float = 1.0) -> Coded:
    """Code float32 x [heads, n, head_dim]; with a grid per channel n is a multiple of its group."""
    heads, n, head_dim = x.shape
    if grid.shared:
        grouped = x.transpose(0, 1).reshape(1, n, heads * head_dim)[..., None, :]
    elif grid.axis == "token":
        grouped = x.reshape(heads, n, head_dim // grid.group, grid.group)
    else:
        grouped = x.reshape(heads, n // grid.group, grid.group, head_dim).transpose(-1, -2)
    codes, scales, offsets = _range(grouped, bits, clip) if grid.offsets else (*_symmetric(grouped, bits), None)

    def scales_of(s: Tensor) -> Tensor:
        return s.squeeze(-1).transpose(-1, -2).contiguous() if grid.axis == "token" else s.squeeze(-1)

    if grid.shared:
        codes = codes.reshape(n, heads, head_dim).transpose(0, 1)
    elif grid.axis == "channel":
        codes = codes.transpose(-1, -2)
    codes = codes.reshape(heads, n, head_dim).to(torch.uint8)
    return Coded(codes, scales_of(scales), None if offsets is None else scales_of(offsets))


def _range(x: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    levels = (1 << bits) - 1
    lo, hi = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    reach = (hi - lo) * (clip / 2)
    offsets = ((lo + hi) / 2 - reach).clamp(-MAX_FLOAT16, MAX_FLOAT16).half()
    scales = (2 * reach / levels).clamp(MIN_SCALE, MAX_FLOAT16).half()
    codes = ((x - offsets.float()) / scales.float()).round().clamp(0, levels)
    return codes, scales, offsets


def _symmetric(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    middle = ((1 << bits) - 1) / 2
    square = (x * x).sum(-1, keepdim=True)
    scale = (square / x.shape[-1]).sqrt() * START[bits]
    for _ in range(3):
        level = _nearest(x, scale, middle)
        scale = (x * level).sum(-1, keepdim=True) / (level * level).sum(-1, keepdim=True)
    level = _nearest(x, scale, middle)
    scale = square / (x * level).sum(-1, keepdim=True).clamp_min(MIN_SCALE)
    return level + middle, scale.clamp(MIN_SCALE, MAX_FLOAT16).half()


def _nearest(x: Tensor, scale: Tensor, middle: float) -> Tensor:
    """The nearest of the levels -middle, ..., middle (steps of 1)."""
    return ((x / scale.clamp_min(MIN_SCALE)) + middle).round().clamp(0, 2 * middle) - middle
