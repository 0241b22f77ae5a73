"""Which linear gets how many bits: scores of the unquantized model, gathered block by block, and what they decide.

The outcome is written to the work folder before the first block is quantized, so that a run that is resumed goes on
with the same widths, and to the final folder's ``report.json``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.algorithms.grids import GRIDS
from quantkit.algorithms.layerwise import by_importance, lim, marginal_widths, two_widths, zd
from quantkit.algorithms.luq import by_entropy, histogram_entropy, kmeans_entropy
from quantkit.algorithms.rtn import rtn
from quantkit.calib.statistics import StatisticsRecorder
from quantkit.models.structure import Linear
from quantkit.pipeline.budget import Budget, Unit, bytes_at
from quantkit.pipeline.solve import relative_error
from quantkit.recipe import Recipe

FILE = "allocation.json"  # of the work folder
_MAX_TOKENS = 4096  # of a block's outputs that are clustered: seconds per block on a CPU
_NO_ACTIVATIONS = ("zd", "random")

Score = list[float]  # one number, or with allocator=error the loss at each width
Outcomes = Iterable[tuple[Tensor, Tensor]]  # per sample: what enters and what leaves a block, [1, n_tokens, hidden]


def needs_activations(recipe: Recipe) -> bool:
    """Whether the scores need the calibration set to run through the unquantized model."""
    return recipe.allocator not in _NO_ACTIVATIONS


def random_scores(units: Sequence[Unit], seed: int) -> list[Score]:
    """Of ``allocator=random``: a seeded order."""
    return [[float(rank)] for rank in torch.randperm(len(units), generator=torch.Generator().manual_seed(seed))]


def score_block(
    units: Sequence[Unit],
    module: nn.Module,
    outcomes: Outcomes,
    n_samples: int,
    recipe: Recipe,
    budget: Budget,
    seed: int,
) -> list[Score]:
    """Scores of the units of one block.

    Args:
        units: those of the block; all its linears, or one unit for each.
        module: the block with its original weights.
        outcomes: runs the block on one sample at a time, ``n_samples`` in all; consumed to its end, or not at all.
    """
    if not units:
        for _ in outcomes:  # the hidden states advance all the same
            pass
        return []
    if recipe.allocator == "zd":
        return [[zd([_weight(module, linear) for linear in unit.linears], recipe.two_sided)] for unit in units]
    if recipe.allocator == "error":
        return _losses(units, module, outcomes, recipe, budget)
    if recipe.allocator == "lim":
        scores = [float(lim(before.to(after.device), after)) for before, after in outcomes]
        return [[sum(scores) / len(scores)]]
    rows = _sampled_outputs(outcomes, n_samples, seed)
    if recipe.entropy == "histogram":
        return [[histogram_entropy(rows)]]
    return [[kmeans_entropy(rows, torch.Generator().manual_seed(seed))]]


def allocate(units: Sequence[Unit], scores: Sequence[Score], budget: Budget, recipe: Recipe) -> dict[str, Any]:
    """The allocation as JSON: what the budget allows, each unit's score and width, and the width of each linear."""
    widths = _widths(recipe, budget)
    n_bytes = [[bytes_at(unit.linears, recipe, bits) for bits in widths] for unit in units]
    if recipe.allocator == "error":
        picks: Sequence[int] = marginal_widths(scores, n_bytes, budget.n_bytes)
    else:
        order = _order([score[0] for score in scores], recipe)
        lo, hi = zip(*n_bytes, strict=True)
        picks = two_widths(order, lo, hi, budget.n_bytes, budget.tolerance)
    rows = [
        {"name": unit.name, "score": score if len(score) > 1 else score[0], "bits": widths[pick]}
        for unit, score, pick in zip(units, scores, picks, strict=True)
    ]
    by_linear = {linear.name: widths[pick] for unit, pick in zip(units, picks, strict=True) for linear in unit.linears}
    used = sum(sizes[pick] for sizes, pick in zip(n_bytes, picks, strict=True))
    uniform = {str(bits): 8 * sum(sizes[at] for sizes in n_bytes) / budget.n_weights for at, bits in enumerate(widths)}
    return {
        "allocator": recipe.allocator,
        "budget_bpw": budget.bpw,
        "bpw": 8 * used / budget.n_weights,
        "uniform_bpw": uniform,
        "units": rows,
        "widths": by_linear,
    }


def describe(allocation: dict[str, Any]) -> str:
    """One line for the log."""
    counts: dict[int, int] = {}
    for unit in allocation["units"]:
        counts[unit["bits"]] = counts.get(unit["bits"], 0) + 1
    shares = ", ".join(f"{counts[bits]} at {bits} bits" for bits in sorted(counts))
    stored = f"{allocation['bpw']:.3f} of {allocation['budget_bpw']:.3f} stored bits per weight"
    return f"allocator={allocation['allocator']}: of {len(allocation['units'])} units {shares}; {stored}"


def _widths(recipe: Recipe, budget: Budget) -> list[int]:
    return list(range(budget.lo, budget.hi + 1)) if recipe.allocator == "error" else [budget.lo, budget.hi]


def _order(scores: list[float], recipe: Recipe) -> list[int]:
    """Units, the first to get the higher width first."""
    if recipe.allocator == "luq":
        order = by_entropy(scores)
    elif recipe.allocator == "zd":
        order = by_importance([-score for score in scores])  # few weights far out: heavy tails
    else:
        order = by_importance(scores)
    return order[::-1] if recipe.reverse else order


def _sampled_outputs(outcomes: Outcomes, n_samples: int, seed: int) -> Tensor:
    """About `_MAX_TOKENS` rows at most, as many of each sample; the same positions for every block, never the first."""
    generator = torch.Generator().manual_seed(seed)
    per_sample = -(-_MAX_TOKENS // n_samples)
    rows = []
    for _, after in outcomes:
        tokens = after.reshape(-1, after.shape[-1])
        first = 1 if len(tokens) > 1 else 0
        picked = torch.randperm(len(tokens) - first, generator=generator)[:per_sample].sort().values + first
        rows.append(tokens[picked.to(tokens.device)].float())
    return torch.cat(rows)


def _losses(
    units: Sequence[Unit], module: nn.Module, outcomes: Outcomes, recipe: Recipe, budget: Budget
) -> list[Score]:
    """Squared relative output error of rounding, summed over a unit's linears, at each width."""
    linears = [linear for unit in units for linear in unit.linears]
    recorder = StatisticsRecorder({linear.path: module.get_submodule(linear.path) for linear in linears})
    with recorder.recording():
        for _ in outcomes:
            recorder.next_call()

    def loss(linear: Linear, bits: int) -> float:
        weight = _weight(module, linear).float()
        hessian = recorder.statistics(linear.path).hessian()
        if hessian is None:  # no calibration token reached this expert
            hessian = torch.eye(linear.in_features, device=weight.device)
        groups = linear.in_features // (recipe.group_size or linear.in_features)
        fit = GRIDS[recipe.at(bits).grid_name]
        rounded = rtn(weight, (bits,) * groups, recipe.symmetric, fit, hessian)
        return relative_error(weight, rounded.dequantize(), hessian) ** 2

    return [[sum(loss(linear, bits) for linear in unit.linears) for bits in _widths(recipe, budget)] for unit in units]


def _weight(module: nn.Module, linear: Linear) -> Tensor:
    return module.get_submodule(linear.path).get_parameter("weight")
