"""One linear: its weight and the statistics of its inputs in, codes and measured errors out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.algorithms.correction import corrected_target
from quantkit.algorithms.gptq import GPTQConfig, gptq
from quantkit.algorithms.grids import GRIDS
from quantkit.algorithms.hessian import damped, without_dead_columns
from quantkit.algorithms.refine import refine
from quantkit.algorithms.rtn import rtn
from quantkit.algorithms.slim import SBAConfig, sba
from quantkit.calib.statistics import InputStatistics
from quantkit.errors import QuantkitError
from quantkit.formats.grouped_int import GroupedInt
from quantkit.models.structure import Linear
from quantkit.recipe import Recipe

SAMPLE_ROWS = 8192  # inputs kept per linear when an allocator looks at outputs


class Solved(NamedTuple):
    """A quantized linear, ||X (T - Q)^T|| / ||X T^T|| with T the weight (or the corrected target), and the damping that the solver needed (0: none)."""

    weight: GroupedInt
    relative_error: float
    damping: float


def solve_linear(linear: Linear, weight: Tensor, statistics: InputStatistics | None, recipe: Recipe) -> Solved:
    """Quantize one linear by the recipe.

    Args:
        weight: float ``[out_features, in_features]``.
        statistics: of its inputs; None when the recipe needs no calibration.

    Raises:
        QuantkitError: with the linear's name in front.
    """
    try:
        return _solve(linear, weight.float(), statistics, recipe)
    except QuantkitError as error:
        raise type(error)(f"{linear.name}: {error}") from error


def _solve(linear: Linear, weight: Tensor, statistics: InputStatistics | None, recipe: Recipe) -> Solved:
    hessian = statistics.hessian() if statistics else None
    if hessian is None and recipe.needs_calibration:
        # An expert that no calibration token reached: all inputs count alike, which is plain rounding.
        hessian = torch.eye(linear.in_features, device=weight.device)
    group_size = recipe.group_size or linear.in_features
    bits = (recipe.width,) * (linear.in_features // group_size)
    if recipe.allocator == "sba":
        bits = _allocate_sba(weight, hessian, statistics, group_size, recipe)
    fit = GRIDS[recipe.grid_name]
    cross = statistics.cross() if statistics else None
    if cross is not None and hessian is not None:
        weight = corrected_target(weight, hessian, cross, recipe.correction, recipe.damping)
    if recipe.solver == "rtn":
        quantized, damping = rtn(weight, bits, recipe.symmetric, fit, hessian), 0.0
    else:
        assert hessian is not None
        config = GPTQConfig(damping=recipe.damping, act_order=recipe.act_order)  # type: ignore[arg-type]
        solution = gptq(weight, hessian, bits, recipe.symmetric, fit, config)
        quantized, damping = solution.weight, solution.damping
    if recipe.refine:
        assert hessian is not None
        target, metric = without_dead_columns(weight, hessian)
        quantized = refine(target, damped(metric, max(damping, recipe.damping)), quantized, recipe.refine)
    return Solved(quantized, relative_error(weight, quantized.dequantize(), hessian), damping)


def _allocate_sba(
    weight: Tensor, hessian: Tensor | None, statistics: InputStatistics | None, group_size: int, recipe: Recipe
) -> tuple[int, ...]:
    assert hessian is not None
    rows = statistics.rows() if statistics and recipe.criterion == "kl" else weight.new_empty(0, 0)
    config = SBAConfig(
        bits=recipe.width,
        group_size=group_size,
        damping=recipe.damping,
        criterion="kl" if len(rows) else "mse",  # an expert that no token reached has no outputs to compare
        search_grid=GRIDS[recipe.grid_name],
    )
    return sba(weight, hessian, config, rows)


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor | None) -> float:
    error = weight - quantized
    if hessian is None:
        return float(error.norm() / weight.norm().clamp_min(1e-30))
    lost = (error @ hessian).mul_(error).sum().clamp_min(0)
    total = (weight @ hessian).mul_(weight).sum().clamp_min(1e-30)
    return float((lost / total).sqrt())
