"""solver=ptq161: how many channels of a linear are salient, what it then stores, and its solution."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.algorithms.grids import GRIDS
from quantkit.algorithms.ptq161 import PTQ161Config, Solution, n_salient, ptq161, salience, salient_mask
from quantkit.calib.statistics import InputStatistics
from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.formats.sign_salient import SignSalientSpec
from quantkit.models.structure import Linear
from quantkit.recipe import Recipe


def sign_salient_spec(linear: Linear, recipe: Recipe) -> SignSalientSpec:
    """What the linear will store, to the byte."""
    k = n_salient(linear.in_features, recipe.bits, recipe.salient_bits)
    salient = None
    if k:
        salient = GroupedIntSpec(
            out_features=linear.out_features,
            in_features=k,
            group_size=k,
            segments=((recipe.salient_bits, 1),),
            symmetric=False,
        )
    return SignSalientSpec(
        out_features=linear.out_features,
        in_features=linear.in_features,
        row_means=True,
        column_scales=True,
        salient=salient,
    )


def binarize(weight: Tensor, hessian: Tensor, statistics: InputStatistics | None, recipe: Recipe) -> Solution:
    """One linear by the recipe.

    Args:
        weight: float32 ``[out_features, in_features]``.
        hessian: of its inputs, the identity where no token reached it.
    """
    absmax = statistics.absmax if statistics else None
    if absmax is None:
        absmax = torch.ones(weight.shape[1], device=weight.device)
    mask = salient_mask(
        salience(recipe.salience, weight, hessian, absmax), n_salient(weight.shape[1], recipe.bits, recipe.salient_bits)
    )
    config = PTQ161Config(
        damping=recipe.damping,
        compensate=recipe.compensate,
        rounds=recipe.refine_rounds,
        salient_bits=recipe.salient_bits,
    )
    return ptq161(weight, hessian, mask, GRIDS[recipe.grid_name], config)
