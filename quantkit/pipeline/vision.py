"""Vision tower and projector: left in 16 bits, or rounded to 8 or 4 bits on request (``vision_bits``).

They are few weights and see every picture, so they are rounded to nearest; no statistics of theirs are gathered. The
calibration of the language model sees the rounded ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantkit.errors import RequestError
from quantkit.models.modality import vision_linears
from quantkit.models.skeleton import Skeleton
from quantkit.models.structure import Linear
from quantkit.pipeline.solve import Solved, solve_linear
from quantkit.recipe import Recipe, resolve

_SMALLEST_GROUP = 32


def rounded_linears(skeleton: Skeleton, recipe: Recipe) -> list[Linear]:
    """The linears that ``vision_bits`` asks to round. Raises `RequestError` when the model has none."""
    if recipe.vision_bits is None:
        return []
    linears = vision_linears(skeleton.model)
    if not linears:
        raise RequestError(
            f"vision_bits: {type(skeleton.model).__name__} has no vision tower with linear layers; leave it out"
        )
    return linears


def vision_recipe(linear: Linear, recipe: Recipe) -> Recipe:
    """Rounding with groups of the recipe's size, or of the largest power of two below it that fits, or one per row."""
    group = recipe.group_size or 0
    if group and linear.in_features % group:
        group = next((size for size in _powers_below(group) if linear.in_features % size == 0), 0)
    settings = ["grid=mse"] if recipe.vision_bits == 4 else []
    return resolve("rtn", bits=recipe.vision_bits, group_size=group, settings=settings)


def _powers_below(group: int) -> Iterator[int]:
    size = 1 << (group.bit_length() - 1)
    while size >= _SMALLEST_GROUP:
        yield size
        size //= 2


def solve_vision(
    skeleton: Skeleton, recipe: Recipe, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Linear, Solved]]:
    """One linear after the other, from the source files."""
    for linear in rounded_linears(skeleton, recipe):
        weight = skeleton.read_parameter(f"{linear.name}.weight", device, dtype)
        yield linear, solve_linear(linear, weight, None, vision_recipe(linear, recipe))


def round_vision(skeleton: Skeleton, recipe: Recipe) -> None:
    """Put the rounded weights in place; the parts around the blocks are loaded."""
    for linear in rounded_linears(skeleton, recipe):
        weight = skeleton.model.get_submodule(linear.name).weight
        weight.data = solve_linear(linear, weight, None, vision_recipe(linear, recipe)).weight.dequantize().to(weight)
