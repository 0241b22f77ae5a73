"""solver=littlebit: the rank of every linear, and one linear's weight in, sign factors and the measured error out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.algorithms.hessian import damped, damped_inverse_factor, without_dead_columns
from quantkit.algorithms.littlebit import Factors, Rank, dual_svid, solve_ranks
from quantkit.algorithms.sign_refinement import aligned_start, balanced, refine_factors
from quantkit.calib.statistics import InputStatistics
from quantkit.errors import QuantkitError
from quantkit.formats.sign_factors import SignFactors, SignFactorsSpec
from quantkit.models.structure import Linear
from quantkit.pipeline.solve import Solved, relative_error
from quantkit.recipe import Recipe


def ranks_of(linears: Sequence[Linear], recipe: Recipe) -> dict[str, Rank]:
    """By name. Raises `RequestError` when the least that the linears can be stored in exceeds the target."""
    shapes = [(linear.out_features, linear.in_features) for linear in linears]
    bits = recipe.bits if recipe.bpw is None else recipe.bpw
    ranks = solve_ranks(shapes, bits, recipe.paths, lambda *shape_and_rank: sign_factors_spec(*shape_and_rank).n_bytes)
    return {linear.name: rank for linear, rank in zip(linears, ranks, strict=True)}


def sign_factors_spec(out_features: int, in_features: int, rank: Rank) -> SignFactorsSpec:
    """What a linear of that rank stores."""
    return SignFactorsSpec(out_features=out_features, in_features=in_features, ranks=(rank.rank,) * rank.n_paths)


def factorize_linear(
    linear: Linear, weight: Tensor, statistics: InputStatistics | None, recipe: Recipe, rank: Rank
) -> Solved:
    """One linear by the recipe, training excepted.

    Args:
        weight: float ``[out_features, in_features]``.
        statistics: of its inputs; None when the recipe needs no calibration.

    Raises:
        QuantkitError: with the linear's name in front.
    """
    try:
        return _factorize(weight.float(), statistics.hessian() if statistics else None, recipe, rank)
    except QuantkitError as error:
        raise type(error)(f"{linear.name}: {error}") from error


def _factorize(weight: Tensor, hessian: Tensor | None, recipe: Recipe, rank: Rank) -> Solved:
    if recipe.refine == "none":
        stored = to_stored(balanced(dual_svid(weight, rank)))
        return Solved(stored, relative_error(weight, stored.dequantize(), hessian), 0.0)
    if hessian is None:  # an expert that no calibration token reached: all inputs count alike
        hessian = torch.eye(weight.shape[1], device=weight.device)
    target, live = without_dead_columns(weight, hessian)
    _, damping = damped_inverse_factor(live, recipe.damping)
    metric = damped(live, damping)
    start = aligned_start(target, metric, rank) if recipe.rounds_of_signs else dual_svid(target, rank)
    stored = to_stored(refine_factors(target, metric, start, recipe.rounds_of_signs))
    return Solved(stored, relative_error(weight, stored.dequantize(), hessian), damping)


def to_stored(factors: Factors) -> SignFactors:
    """With scales rounded to float16 and signs as bits."""
    return SignFactors(
        u_signs=factors.left > 0,
        v_signs=factors.right > 0,
        row_scales=factors.rows.to(torch.float16).float(),
        latent_scales=factors.latents.to(torch.float16).float(),
        column_scales=factors.columns.to(torch.float16).float(),
        ranks=(len(factors.latents) // factors.n_paths,) * factors.n_paths,
    )


def from_stored(stored: SignFactors, device: torch.device) -> Factors:
    """Inverse of `to_stored` up to the rounding of the scales; float32."""
    return Factors(
        left=torch.where(stored.u_signs, 1.0, -1.0).to(device),
        right=torch.where(stored.v_signs, 1.0, -1.0).to(device),
        rows=stored.row_scales.to(device),
        latents=stored.latent_scales.to(device),
        columns=stored.column_scales.to(device),
    )
