"""GPTQ on dead columns, singular and indefinite Hessians, damaged weights and odd shapes."""

from __future__ import annotations

import pytest
import torch
from gptq_cases import assert_same_codes, every_grid, every_order, solve, value
from strategies import output_loss, random_hessian, random_weight

from quantkit.algorithms.gptq import ActOrder, GPTQConfig
from quantkit.algorithms.hessian import damped
from quantkit.errors import NotPositiveDefiniteError, NumericalError


@every_order
@every_grid
@pytest.mark.parametrize("symmetric", [False, True])
def test_dead_columns_become_zero_and_change_nothing(act_order: ActOrder, grid: str, symmetric: bool) -> None:
    weight, hessian = random_weight(6, 25, 17), random_hessian(25, 17, "dead")
    dead = hessian.diagonal() == 0
    config = GPTQConfig(act_order=act_order)
    solution = solve(weight, hessian, (3,), grid, symmetric=symmetric, config=config).weight
    assert (value(solution)[:, dead] == 0).all()
    assert (solution.dequantize()[:, dead] == 0).all()

    louder = torch.where(dead, 50 * weight, weight)
    assert_same_codes(solve(louder, hessian, (3,), grid, symmetric=symmetric, config=config).weight, solution)

    deleted = solve(weight[:, ~dead], hessian[~dead][:, ~dead], (3,), grid, symmetric=symmetric, config=config).weight
    assert torch.equal(deleted.codes, solution.codes[:, ~dead])
    assert torch.equal(deleted.scales, solution.scales)


@every_order
def test_all_inputs_dead(act_order: ActOrder) -> None:
    solution = solve(
        random_weight(3, 8, 0), torch.zeros(8, 8, dtype=torch.float64), config=GPTQConfig(act_order=act_order)
    )
    assert (value(solution.weight) == 0).all()
    assert solution.loss == 0


@every_order
@every_grid
@pytest.mark.parametrize("kind", ["deficient", "duplicated"])
def test_singular_hessian_is_retried_and_recorded(act_order: ActOrder, grid: str, kind: str) -> None:
    weight, hessian = random_weight(4, 32, 18), random_hessian(32, 18, kind)
    hessian -= 1e-3 * hessian.diagonal().mean() * torch.eye(32, dtype=torch.float64)  # rounding, made certain
    solution = solve(weight, hessian, (2, 2), grid, config=GPTQConfig(act_order=act_order, damping=1e-6))
    assert solution.damping > 1e-6
    expected = output_loss(weight, value(solution.weight), damped(hessian, solution.damping)).sum()
    assert solution.loss == pytest.approx(float(expected), rel=1e-6)  # condition number about 1e5


@every_order
def test_hessian_that_only_float64_can_factor(act_order: ActOrder) -> None:
    """Rank 3 plus 1e-7 of the diagonal, undamped: float32 loses definiteness, no step may depend on it."""
    for seed in range(30, 40):
        v = torch.randn(128, 3, generator=torch.Generator().manual_seed(seed))
        hessian = v @ v.t()
        hessian += 6e-7 * hessian.diagonal().mean() * torch.eye(128)
        solution = solve(torch.ones(1, 128), hessian, (3,), config=GPTQConfig(act_order=act_order, damping=0.0))
        assert solution.loss >= 0


def test_indefinite_hessian_is_refused() -> None:
    hessian = torch.full((8, 8), 100.0) - 99 * torch.eye(8)
    hessian[0, 1:] *= -1
    with pytest.raises(NotPositiveDefiniteError, match="use more calibration text or --set damping=1"):
        solve(torch.ones(2, 8), hessian)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_refused(bad: float) -> None:
    weight, hessian = random_weight(2, 8, 0), random_hessian(8, 0)
    broken = weight.clone()
    broken[1, 3] = bad
    with pytest.raises(NumericalError, match="the weight holds NaN or Inf; the checkpoint is damaged"):
        solve(broken, hessian)
    hessian[2, 3] = bad
    with pytest.raises(NumericalError, match="the Hessian holds NaN or Inf"):
        solve(weight, hessian)


def test_weights_beyond_float16_scales_are_refused() -> None:
    with pytest.raises(NumericalError, match="does not fit float16"):
        solve(1e9 * random_weight(2, 8, 0), random_hessian(8, 0))


@pytest.mark.parametrize("out_features", [1, 3])
@pytest.mark.parametrize(("in_features", "n_groups"), [(1, 1), (7, 7), (7, 1), (15, 5)])
@every_order
def test_odd_shapes(out_features: int, in_features: int, n_groups: int, act_order: ActOrder) -> None:
    weight, hessian = random_weight(out_features, in_features, 19), random_hessian(in_features, 19)
    strided = weight.t().contiguous().t()
    config = GPTQConfig(act_order=act_order)
    solution = solve(weight, hessian, (2,) * n_groups, "hessian", config=config).weight
    assert solution.codes.shape == weight.shape
    assert solution.codes.dtype == torch.uint8
    assert solution.scales.shape == solution.zeros.shape == (out_features, n_groups)
    assert solution.scales.dtype == solution.zeros.dtype == torch.float32
    assert_same_codes(solve(strided, hessian.t(), (2,) * n_groups, "hessian", config=config).weight, solution)
