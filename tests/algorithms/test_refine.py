"""Refinement: every step is an exact minimizer, so nothing may rise."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from quantkit.algorithms.gptq import GPTQConfig, gptq
from quantkit.algorithms.grids import GRIDS
from quantkit.algorithms.hessian import damped
from quantkit.algorithms.refine import descend, objective, refine, refit_scales
from quantkit.formats.grouped_int import GroupedInt


def problem(
    seed: int, out: int = 6, features: int = 32, groups: int = 2, bits: int = 2
) -> tuple[Tensor, Tensor, GroupedInt]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, features, generator=generator, dtype=torch.float64)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64) / features**0.5
    inputs = torch.randn(256, features, generator=generator, dtype=torch.float64) @ (torch.eye(features) + mixing)
    hessian = damped(2 / 256 * inputs.t() @ inputs, 0.01)
    start = gptq(weight, hessian, (bits,) * groups, False, GRIDS["minmax"], GPTQConfig(damping=0.0))
    return weight, hessian, start.weight


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_no_row_ever_gets_worse(seed: int, bits: int) -> None:
    weight, hessian, quantized = problem(seed, bits=bits)
    loss = objective(weight, hessian, quantized)
    for step in (refit_scales, descend, refit_scales, descend):
        quantized = step(weight, hessian, quantized)
        now = objective(weight, hessian, quantized)
        assert (now <= loss * (1 + 1e-6)).all()  # dequantize rounds to float32
        loss = now


def test_rounds_help_on_average() -> None:
    gains = []
    for seed in range(16):
        weight, hessian, quantized = problem(seed)
        refined = refine(weight, hessian, quantized, rounds=3)
        gains.append(float(objective(weight, hessian, refined).sum() / objective(weight, hessian, quantized).sum()))
    assert sum(gains) / len(gains) < 0.9


def test_zero_rounds_change_nothing() -> None:
    weight, hessian, quantized = problem(0)
    assert refine(weight, hessian, quantized, rounds=0) is quantized


def test_a_sweep_leaves_no_better_code_of_the_last_column() -> None:
    weight, hessian, quantized = problem(3)
    swept = descend(weight, hessian, quantized)
    for code in range(4):
        codes = swept.codes.clone()
        codes[:, -1] = code
        other = GroupedInt(
            codes=codes, scales=swept.scales, zeros=swept.zeros, bits=swept.bits, symmetric=swept.symmetric
        )
        assert (objective(weight, hessian, swept) <= objective(weight, hessian, other) * (1 + 1e-6)).all()


def test_brute_force_bounds_it_from_below() -> None:
    weight, hessian, quantized = problem(1, out=3, features=6, groups=1)
    refined = refine(weight, hessian, quantized, rounds=4)
    for row in range(3):
        levels = refined.scales[row, 0] * (torch.arange(4) - refined.zeros[row, 0])
        grid = torch.tensor(list(itertools.product(levels.tolist(), repeat=6)), dtype=torch.float64)
        errors = grid - weight[row]
        best = (errors @ hessian * errors).sum(1).min()
        assert objective(weight, hessian, refined)[row] >= best * (1 - 1e-6)


def test_blocks_give_the_codes_of_the_literal_sweep() -> None:
    weight, hessian, quantized = problem(2, features=192, groups=3)
    whole = descend(weight, hessian, quantized)
    column_by_column = literal_sweep(weight, hessian, quantized)
    assert torch.equal(whole.codes, column_by_column)


def literal_sweep(weight: Tensor, hessian: Tensor, quantized: GroupedInt) -> Tensor:
    codes = quantized.codes.double()
    scales = quantized.scales.double().repeat_interleave(quantized.group_size, 1)
    zeros = quantized.zeros.double().repeat_interleave(quantized.group_size, 1)
    for c in range(weight.shape[1]):
        error = scales * (codes - zeros) - weight
        target = weight[:, c] - (error @ hessian[:, c] - error[:, c] * hessian[c, c]) / hessian[c, c]
        codes[:, c] = (target / scales[:, c] + zeros[:, c]).round().clamp(0, 3)
    return codes.to(torch.uint8)
