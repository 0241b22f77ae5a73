"""What the tests of GPTQ share: orders, grids, one call, and the quantized weight in float64."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from quantkit.algorithms.gptq import ActOrder, GPTQConfig, Solution, gptq
from quantkit.algorithms.grids import GRIDS, GridFit
from quantkit.formats.grouped_int import GroupedInt

ORDERS: tuple[ActOrder, ...] = get_args(ActOrder)
every_order = pytest.mark.parametrize("act_order", ORDERS)
every_grid = pytest.mark.parametrize("grid", sorted(GRIDS))


def value(weight: GroupedInt) -> Tensor:
    """The quantized weight in float64, where scale * (code - zero) is exact."""
    grouped = weight.codes.double().reshape(weight.codes.shape[0], len(weight.bits), -1)
    levels = weight.scales.double().unsqueeze(-1) * (grouped - weight.zeros.double().unsqueeze(-1))
    return levels.flatten(1)


def visiting_order(diagonal: Tensor, n_groups: int, act_order: ActOrder) -> list[int]:
    """As documented: by falling diag H; by groups of falling mean, and inside a group by falling diag H."""
    d = diagonal.tolist()
    columns = range(len(d))
    if act_order == "none":
        return list(columns)
    if act_order == "full":
        return sorted(columns, key=lambda c: -d[c])
    size = len(d) // n_groups
    groups = [range(start, start + size) for start in range(0, len(d), size)]
    groups.sort(key=lambda group: -sum(d[c] for c in group) / size)
    return [c for group in groups for c in sorted(group, key=lambda c: -d[c])]


def assert_same_codes(left: GroupedInt, right: GroupedInt) -> None:
    assert torch.equal(left.codes, right.codes)
    assert torch.equal(left.scales, right.scales)
    assert torch.equal(left.zeros, right.zeros)


def solve(
    weight: Tensor,
    hessian: Tensor,
    bits: tuple[int, ...] = (3, 3),
    grid: str | GridFit = "minmax",
    *,
    symmetric: bool = False,
    config: GPTQConfig | None = None,
) -> Solution:
    fit = GRIDS[grid] if isinstance(grid, str) else grid
    return gptq(weight, hessian, bits, symmetric, fit, config or GPTQConfig())
