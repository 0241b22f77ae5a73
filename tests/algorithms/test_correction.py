"""The corrected target is the ridge regression from quantized inputs to float outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.algorithms.correction import corrected_target


def streams(seed: int, tokens: int = 400, features: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(tokens, features, generator=generator, dtype=torch.float64)
    noisy = clean + 0.3 * torch.randn(tokens, features, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, features, generator=generator, dtype=torch.float64)
    return weight, clean, noisy


def products(clean: Tensor, noisy: Tensor) -> tuple[Tensor, Tensor]:
    factor = 2 / clean.shape[0]
    return factor * noisy.t() @ noisy, factor * clean.t() @ noisy


@pytest.mark.parametrize("seed", range(4))
def test_full_strength_is_least_squares(seed: int) -> None:
    weight, clean, noisy = streams(seed)
    hessian, cross = products(clean, noisy)
    target = corrected_target(weight, hessian, cross, strength=1.0, damping=0.0)
    expected = torch.linalg.lstsq(noisy, clean @ weight.t()).solution.t()
    assert torch.allclose(target, expected, rtol=1e-9, atol=1e-11)


def test_partial_strength_lies_on_the_line() -> None:
    weight, clean, noisy = streams(0)
    hessian, cross = products(clean, noisy)
    full = corrected_target(weight, hessian, cross, strength=1.0, damping=0.01)
    half = corrected_target(weight, hessian, cross, strength=0.5, damping=0.01)
    assert torch.allclose(half, (weight + full) / 2, rtol=1e-12, atol=1e-14)


def test_nothing_to_correct() -> None:
    weight, clean, _ = streams(1)
    hessian, cross = products(clean, clean)
    assert torch.equal(corrected_target(weight, hessian, cross, strength=0.0, damping=0.01), weight)
    assert torch.equal(corrected_target(weight, hessian, cross, strength=1.0, damping=0.01), weight)


def test_dead_columns_stay_zero_and_apart() -> None:
    weight, clean, noisy = streams(2)
    clean[:, 3] = 0
    noisy[:, 3] = 0
    hessian, cross = products(clean, noisy)
    target = corrected_target(weight, hessian, cross, strength=1.0, damping=0.0)
    live = [column for column in range(12) if column != 3]
    alone = corrected_target(weight[:, live], hessian[live][:, live], cross[live][:, live], strength=1.0, damping=0.0)
    assert (target[:, 3] == 0).all()
    assert torch.allclose(target[:, live], alone, rtol=1e-9)


def test_strong_damping_returns_the_weight() -> None:
    weight, clean, noisy = streams(3)
    hessian, cross = products(clean, noisy)
    target = corrected_target(weight, hessian, cross, strength=1.0, damping=1e9)
    assert torch.allclose(target, weight, rtol=1e-6, atol=1e-7)
