"""One linear: its weight and the statistics of its inputs in, codes and measured errors out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.algorithms.boa import BoAConfig, boa
from quantkit.algorithms.casp import SolveFactor, quantized_factors
from quantkit.algorithms.correction import corrected_target
from quantkit.algorithms.gptq import GPTQConfig, gptq
from quantkit.algorithms.grids import GRIDS
from quantkit.algorithms.hessian import damped, without_dead_columns
from quantkit.algorithms.refine import refine
from quantkit.algorithms.rtn import rtn
from quantkit.algorithms.slim import SBAConfig, sba
from quantkit.algorithms.turboboa import refine_heads
from quantkit.calib.attention import HeadFactors
from quantkit.calib.statistics import InputStatistics
from quantkit.errors import QuantkitError
from quantkit.formats.grouped_int import GroupedInt, GroupedIntSpec
from quantkit.formats.spec import QuantizedWeight
from quantkit.models.structure import Linear
from quantkit.pipeline.binarize import binarize
from quantkit.pipeline.budget import is_factorized, low_rank_spec
from quantkit.recipe import Recipe

SAMPLE_ROWS = 8192  # inputs kept per linear when an allocator looks at outputs


class Solved(NamedTuple):
    """A quantized linear, its ||X (T - Q)^T|| / ||X T^T||, and the damping that the solver needed (0: none).

    T is the weight, or what a correction aims at instead.
    """

    weight: QuantizedWeight  # of any storage format
    relative_error: float
    damping: float


def solve_linear(
    linear: Linear,
    weight: Tensor,
    statistics: InputStatistics | None,
    recipe: Recipe,
    heads: Sequence[HeadFactors] = (),
) -> Solved:
    """Quantize one linear by the recipe.

    Args:
        weight: float ``[out_features, in_features]``.
        statistics: of its inputs; None when the recipe needs no calibration.
        heads: for ``solver=boa``, what attention does with its outputs; all rows, each once. Without it BoA is GPTQ.

    Raises:
        QuantkitError: with the linear's name in front.
    """
    try:
        return _solve(linear, weight.float(), statistics, recipe, heads)
    except QuantkitError as error:
        raise type(error)(f"{linear.name}: {error}") from error


def _solve(
    linear: Linear,
    weight: Tensor,
    statistics: InputStatistics | None,
    recipe: Recipe,
    heads: Sequence[HeadFactors],
) -> Solved:
    hessian = statistics.hessian() if statistics else None
    if hessian is None and recipe.needs_calibration:
        # An expert that no calibration token reached: all inputs count alike, which is plain rounding.
        hessian = torch.eye(linear.in_features, device=weight.device)
    if recipe.solver == "ptq161":
        return _solve_signs(weight, hessian, statistics, recipe)
    group_size = recipe.group_size or linear.in_features
    if is_factorized(linear, recipe):
        return _solve_low_rank(linear, weight, hessian, statistics, recipe)
    bits = (recipe.width,) * (linear.in_features // group_size)
    if recipe.allocator == "sba":
        bits = _allocate_sba(weight, hessian, statistics, group_size, recipe)
    cross = statistics.cross() if statistics else None
    if cross is not None and hessian is not None:
        weight = corrected_target(weight, hessian, cross, recipe.correction, recipe.damping)
    if heads:
        assert hessian is not None
        quantized, damping = _solve_heads(weight, hessian, heads, bits, recipe)
        return Solved(quantized, relative_error(weight, quantized.dequantize(), hessian), damping)
    quantized, damping = _solve_grouped(weight, hessian, bits, recipe)
    return Solved(quantized, relative_error(weight, quantized.dequantize(), hessian), damping)


def _solve_signs(weight: Tensor, hessian: Tensor | None, statistics: InputStatistics | None, recipe: Recipe) -> Solved:
    assert hessian is not None
    cross = statistics.cross() if statistics else None
    if cross is not None:
        weight = corrected_target(weight, hessian, cross, recipe.correction, recipe.damping)
    solution = binarize(weight, hessian, statistics, recipe)
    return Solved(solution.weight, relative_error(weight, solution.weight.dequantize(), hessian), solution.damping)


def _solve_grouped(
    weight: Tensor, hessian: Tensor | None, bits: tuple[int, ...], recipe: Recipe
) -> tuple[GroupedInt, float]:
    """Codes, and the damping that they needed."""
    fit = GRIDS[recipe.grid_name]
    if recipe.solver == "rtn":
        quantized, damping = rtn(weight, bits, recipe.symmetric, fit, hessian), 0.0
    else:
        assert hessian is not None
        config = GPTQConfig(damping=recipe.damping, act_order=recipe.act_order)  # type: ignore[arg-type]
        solution = gptq(weight, hessian, bits, recipe.symmetric, fit, config)
        quantized, damping = solution.weight, solution.damping
    if recipe.refine_rounds:
        assert hessian is not None
        target, metric = without_dead_columns(weight, hessian)
        quantized = refine(target, damped(metric, max(damping, recipe.damping)), quantized, recipe.refine_rounds)
    return quantized, damping


def _solve_low_rank(
    linear: Linear, weight: Tensor, hessian: Tensor | None, statistics: InputStatistics | None, recipe: Recipe
) -> Solved:
    """Queries or keys as two factors, each solved by the recipe at ``qk_bits``."""
    assert hessian is not None
    cross = statistics.cross() if statistics else None
    if cross is not None:
        weight = corrected_target(weight, hessian, cross, recipe.correction, recipe.damping)
    spec, dampings = low_rank_spec(linear, recipe), [0.0]

    def solver(factor: GroupedIntSpec) -> SolveFactor:
        def solve(target: Tensor, metric: Tensor) -> GroupedInt:
            bits = (recipe.qk_bits,) * (factor.in_features // factor.group_size)
            quantized, damping = _solve_grouped(target, metric, bits, recipe.for_factors(factor.group_size))
            dampings.append(damping)
            return quantized

        return solve

    quantized = quantized_factors(weight, hessian, spec.rank, solver(spec.down), solver(spec.up))
    return Solved(quantized, relative_error(weight, quantized.dequantize(), hessian), max(dampings))


def _solve_heads(
    weight: Tensor, hessian: Tensor, heads: Sequence[HeadFactors], bits: tuple[int, ...], recipe: Recipe
) -> tuple[GroupedInt, float]:
    """Queries, keys and values each by their own Hessian, whether they share a linear or not."""
    config = BoAConfig(
        damping=recipe.damping,
        row_damping=recipe.row_damping,
        act_order=recipe.act_order,  # type: ignore[arg-type]
        row_order=recipe.row_order,
        joint_rows=recipe.joint_rows,
        late_grids=recipe.late_grids,
    )
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales, zeros = (torch.empty(len(weight), len(bits), device=weight.device) for _ in range(2))
    damping = recipe.damping
    for part in heads:
        rows = part.rows.to(weight.device)
        columns = hessian if part.columns is None else part.columns
        own, R = weight[rows], part.row_factors
        solution = boa(own, columns, R, bits, recipe.symmetric, GRIDS[recipe.grid_name], config)
        damping = max(damping, solution.damping)
        raised = solution.damping if solution.damping > recipe.damping else 0.0
        column_damping, row_damping = max(recipe.damping, raised), max(recipe.row_damping, raised)
        solved = refine_heads(own, columns, R, solution.weight, recipe.refine_rounds, column_damping, row_damping)
        codes[rows], scales[rows], zeros[rows] = solved.codes, solved.scales, solved.zeros
    return GroupedInt(codes=codes, scales=scales, zeros=zeros, bits=bits, symmetric=recipe.symmetric), damping


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
