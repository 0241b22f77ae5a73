"""Which linear gets how many bits: scores of the unquantized model, gathered block by block, and what they decide.

The outcome is written to the work folder before the first block is quantized, so that a run that is resumed goes on
with the same widths, and to the final folder's ``report.json``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.algorithms.grids import GRIDS
from quantkit.algorithms.layerwise import (
    by_importance,
    lim,
    marginal_widths,
    two_widths,
    worthwhile,
    zd,
)
from quantkit.algorithms.luq import KMeansConfig, by_entropy, histogram_entropy, kmeans_labels, label_entropy
from quantkit.algorithms.rtn import rtn
from quantkit.calib.statistics import StatisticsRecorder
from quantkit.formats.files import read_json, write_json
from quantkit.models.structure import Block, Linear
from quantkit.pipeline.budget import Budget, Choice, Unit, budget_of, bytes_at, choices_of, units_of
from quantkit.pipeline.measure import Propagation
from quantkit.pipeline.request import Listener
from quantkit.pipeline.scored import Predicting, ScoredBlock
from quantkit.pipeline.sparsity import N_PROBES, Condition
from quantkit.recipe import Recipe

FILE = "allocation.json"  # of the work folder
_MAX_TOKENS = 4096  # of a block's outputs that are clustered: seconds per block on a CPU
_N_ROWS = 64  # of a weight on which allocator=adaptive compares widths and group sizes
_N_PROBES = 2  # samples on which allocator=error looks at a block's output
_NO_ACTIVATIONS = ("zd", "random")

Score = list[float]  # one number, or with allocator=error the loss at each width


def needs_activations(recipe: Recipe) -> bool:
    """Whether the scores need the calibration set to run through the unquantized model."""
    return recipe.allocator not in _NO_ACTIVATIONS


def random_scores(units: Sequence[Unit], seed: int) -> list[Score]:
    """Of ``allocator=random``: a seeded order."""
    return [[float(rank)] for rank in torch.randperm(len(units), generator=torch.Generator().manual_seed(seed))]


class Allocator:
    """Decides the widths of a run, once.

    Args:
        recipe: one that mixes widths.
        blocks: of the model.
        seed: of clusterings and random orders.
        listener: told what is decided.

    Raises:
        RequestError: the budget is out of reach of the widths.
    """

    def __init__(self, recipe: Recipe, blocks: Sequence[Block], seed: int, listener: Listener) -> None:
        self.recipe, self.seed, self.listener = recipe, seed, listener
        self.units = units_of(blocks, recipe)
        self.budget = budget_of([linear for block in blocks for linear in block.linears], recipe)

    def choices(
        self, folder: Path, originals: Iterable[ScoredBlock], predicting: Predicting | None = None
    ) -> dict[str, Choice]:
        """What each linear gets, by its name: as decided before in this folder, or by the scores of ``originals``.

        Args:
            predicting: opens what follows the blocks; needed for ``allocator=casp``.
        """
        path = folder / FILE
        if not path.exists():
            details: dict[str, dict[str, float]] = {}
            condition = Condition() if self.recipe.factorizes and needs_activations(self.recipe) else None
            scores = self._scores(originals, details, condition, predicting)
            allocation = allocate(self.units, scores, self.budget, self.recipe)
            for unit in allocation["units"]:
                unit.update(details.get(unit["name"], {}))
            if condition:
                allocation["condition"] = condition.to_json()
                self.listener.note(condition.describe())
            write_json(path, allocation)
            self.listener.note(describe(allocation))
        decided = read_json(path)
        sizes, ratios = decided.get("group_sizes", {}), decided.get("keep_ratios", {})
        return {
            name: Choice(bits, sizes.get(name, self.recipe.group_size), ratios.get(name, self.recipe.keep_ratio))
            for name, bits in decided["widths"].items()
        }

    def _scores(
        self,
        originals: Iterable[ScoredBlock],
        details: dict[str, dict[str, float]],
        condition: Condition | None,
        predicting: Predicting | None,
    ) -> list[Score]:
        if self.recipe.allocator == "random":
            return random_scores(self.units, self.seed)
        self.listener.note(f"allocator={self.recipe.allocator}: scoring the unquantized model")
        scores: list[Score] = []
        propagation: Propagation | None = None
        for index, block in enumerate(originals):
            if not index and self.recipe.allocator == "luq" and block.image_masks is None:
                self.listener.note("luq: scored on text tokens; the paper's setting is multimodal prompts")
            units = [unit for unit in self.units if unit.block == index]
            if condition is not None and block.entering is not None:
                before = [block.entering(sample) for sample in range(min(N_PROBES, block.n_samples))]
                condition.look_at(block.module, block.forward, before, block.image_masks)
            if self.recipe.allocator == "casp":
                choices = choices_of(self.recipe, _widths(self.recipe, self.budget))
                propagation = propagation or Propagation(self.recipe, choices, block.image_masks)
                propagation.look_at(units[0] if units else None, block)
                continue
            scores += score_block(units, block, self.recipe, self.budget, self.seed, details)
        if propagation is None:
            return scores
        assert predicting is not None
        with predicting() as predict:
            return propagation.losses(predict)


def score_block(
    units: Sequence[Unit],
    block: ScoredBlock,
    recipe: Recipe,
    budget: Budget,
    seed: int,
    details: dict[str, dict[str, float]] | None = None,
) -> list[Score]:
    """Scores of the units of one block: all of it, or one unit for each of its linears (or of the tied ones).

    What else is worth reporting goes into ``details`` under the unit's name.
    """
    if not units:
        for _ in block.outcomes:  # the hidden states advance all the same
            pass
        return []
    if recipe.allocator == "zd":
        return [[zd([_weight(block.module, linear) for linear in unit.linears], recipe.two_sided)] for unit in units]
    if recipe.allocator == "adaptive":
        return _expected_losses(units, block, recipe, budget)
    if recipe.allocator == "error":
        return _losses(units, block, recipe, budget)
    if recipe.allocator == "lim":
        scores = [float(lim(before.to(after.device), after)) for before, after in block.outcomes]
        return [[sum(scores) / len(scores)]]
    rows, image = _sampled_outputs(block, seed)
    if recipe.entropy == "histogram":
        return [[histogram_entropy(rows)]]
    config = KMeansConfig()
    labels = kmeans_labels(rows, torch.Generator().manual_seed(seed), config)
    if details is not None and image is not None:
        parts = {"image_entropy": labels[image], "text_entropy": labels[~image]}
        details[units[0].name] = {name: label_entropy(part, config.n_clusters) for name, part in parts.items()}
    return [[label_entropy(labels, config.n_clusters)]]


def allocate(units: Sequence[Unit], scores: Sequence[Score], budget: Budget, recipe: Recipe) -> dict[str, Any]:
    """The allocation as JSON: what the budget allows, each unit's score and width, and the width of each linear."""
    choices = choices_of(recipe, _widths(recipe, budget))
    n_bytes = [[bytes_at(unit.linears, recipe, choice) for choice in choices] for unit in units]
    if recipe.allocator in ("error", "adaptive", "casp"):
        picks: Sequence[int] = _pick(scores, n_bytes, budget)
    else:
        order = _order([score[0] for score in scores], recipe)
        lo, hi = zip(*n_bytes, strict=True)
        picks = two_widths(order, lo, hi, budget.n_bytes, budget.tolerance)
    chosen = [choices[pick] for pick in picks]
    rows: list[dict[str, Any]] = [
        {"name": unit.name, "score": score if len(score) > 1 else score[0], "bits": choice.bits}
        for unit, score, choice in zip(units, scores, chosen, strict=True)
    ]
    by_linear = {linear.name: choice for unit, choice in zip(units, chosen, strict=True) for linear in unit.linears}
    groups: dict[str, Any] = {}
    if recipe.chooses_groups:
        groups["group_sizes"] = {name: choice.group_size for name, choice in by_linear.items()}
        for row, choice in zip(rows, chosen, strict=True):
            row["group_size"] = choice.group_size
    if len(recipe.factor_ratios) > 1:
        groups["keep_ratios"] = {name: choice.keep_ratio for name, choice in by_linear.items()}
        for row, choice in zip(rows, chosen, strict=True):
            row["keep_ratio"] = choice.keep_ratio
    used = sum(sizes[pick] for sizes, pick in zip(n_bytes, picks, strict=True))
    uniform = {
        str(choice.bits): 8 * sum(sizes[at] for sizes in n_bytes) / budget.n_weights
        for at, choice in enumerate(choices)
        if choice.group_size == recipe.group_size and choice.keep_ratio == max(recipe.factor_ratios)
    }
    return {
        "allocator": recipe.allocator,
        "budget_bpw": budget.bpw,
        "bpw": 8 * used / budget.n_weights,
        "uniform_bpw": uniform,
        "units": rows,
        "widths": {name: choice.bits for name, choice in by_linear.items()},
        **groups,
    }


def _pick(scores: Sequence[Score], n_bytes: Sequence[Sequence[int]], budget: Budget) -> list[int]:
    """The index of each unit's choice, by the greatest fall of the loss per byte."""
    hulls = [worthwhile(*unit) for unit in zip(scores, n_bytes, strict=True)]
    losses = [[unit[index] for index in hull] for unit, hull in zip(scores, hulls, strict=True)]
    sizes = [[unit[index] for index in hull] for unit, hull in zip(n_bytes, hulls, strict=True)]
    found = marginal_widths(losses, sizes, budget.n_bytes, budget.tolerance)
    return [hull[index] for hull, index in zip(hulls, found, strict=True)]


def describe(allocation: dict[str, Any]) -> str:
    """One line for the log."""
    counts: dict[int, int] = {}
    for unit in allocation["units"]:
        counts[unit["bits"]] = counts.get(unit["bits"], 0) + 1
    shares = ", ".join(f"{counts[bits]} at {bits} bits" for bits in sorted(counts))
    if "group_sizes" in allocation:
        shares += f", {sum(unit['group_size'] is None for unit in allocation['units'])} of them per channel"
    if "keep_ratios" in allocation:
        shares += f", queries and keys of {sum(unit['keep_ratio'] < 1 for unit in allocation['units'])} as factors"
    stored = f"{allocation['bpw']:.3f} of {allocation['budget_bpw']:.3f} stored bits per weight"
    return f"allocator={allocation['allocator']}: of {len(allocation['units'])} units {shares}; {stored}"


def _widths(recipe: Recipe, budget: Budget) -> list[int]:
    every = recipe.allocator in ("error", "adaptive", "casp")
    return list(range(budget.lo, budget.hi + 1)) if every else [budget.lo, budget.hi]


def _order(scores: list[float], recipe: Recipe) -> list[int]:
    """Units, the first to get the higher width first."""
    if recipe.allocator == "luq":
        order = by_entropy(scores)
    elif recipe.allocator == "zd":
        order = by_importance([-score for score in scores])  # few weights far out: heavy tails
    else:
        order = by_importance(scores)
    return order[::-1] if recipe.reverse else order


def _sampled_outputs(block: ScoredBlock, seed: int) -> tuple[Tensor, Tensor | None]:
    """About `_MAX_TOKENS` rows at most, as many of each sample; the same positions for every block, never the first.

    With pictures also which of the rows are image tokens, bool.
    """
    generator = torch.Generator().manual_seed(seed)
    per_sample = -(-_MAX_TOKENS // block.n_samples)
    rows, image = [], []
    for sample, (_, after) in enumerate(block.outcomes):
        tokens = after.reshape(-1, after.shape[-1])
        first = 1 if len(tokens) > 1 else 0
        picked = torch.randperm(len(tokens) - first, generator=generator)[:per_sample].sort().values + first
        rows.append(tokens[picked.to(tokens.device)].float())
        if block.image_masks is not None:
            image.append(block.image_masks[sample][picked])
    return torch.cat(rows), torch.cat(image).to(rows[0].device) if image else None


def _losses(units: Sequence[Unit], block: ScoredBlock, recipe: Recipe, budget: Budget) -> list[Score]:
    """For each unit and width: the squared error of the block's output, relative to it, with this unit alone rounded.

    The block's output is the residual stream. So an error counts by what it does there, which the error of the linear's
    own output does not show: the first blocks write most of the stream, and the same relative error weighs more there.
    """
    linears = [linear for unit in units for linear in unit.linears]
    recorder = StatisticsRecorder({linear.path: block.module.get_submodule(linear.path) for linear in linears})
    probes: list[tuple[Tensor, Tensor]] = []
    with recorder.recording():
        for before, after in block.outcomes:
            recorder.next_call()
            if len(probes) < _N_PROBES:
                probes.append((before.to(after.device, copy=True), after))
    recipes = [recipe.at(bits) for bits in range(budget.lo, budget.hi + 1)]
    return [[_loss(block, unit, recorder, probes, one) for one in recipes] for unit in units]


def _expected_losses(units: Sequence[Unit], block: ScoredBlock, recipe: Recipe, budget: Budget) -> list[Score]:
    """The loss at the lowest width in groups, as `_losses` measures it, and what other choices will make of it.

    A block's output is looked at once per unit, as every look rounds and runs the block; how much better or worse a
    width or a group size is, the weights themselves tell, on a sample of their rows.
    """
    choices = choices_of(recipe, _widths(recipe, budget))
    measured = _losses(units, block, recipe.at(budget.lo), replace(budget, hi=budget.lo))
    scores = []
    for unit, (loss,) in zip(units, measured, strict=True):
        rows = [_some_rows(_weight(block.module, linear)) for linear in unit.linears]
        errors = [sum(_rounding_error(part, recipe.at(*choice)) for part in rows) for choice in choices]
        base = max(errors[choices.index(Choice(budget.lo, recipe.group_size))], 1e-30)
        scores.append([loss * error / base for error in errors])
    return scores


def _some_rows(weight: Tensor) -> Tensor:
    """Evenly spaced, float32."""
    return weight[:: max(1, len(weight) // _N_ROWS)][:_N_ROWS].float()


def _rounding_error(rows: Tensor, recipe: Recipe) -> float:
    """Squared, with scales searched for the least of it."""
    widths = (recipe.width,) * (rows.shape[1] // (recipe.group_size or rows.shape[1]))
    rounded = rtn(rows, widths, recipe.symmetric, GRIDS["mse"]).dequantize()
    return float((rounded - rows).square().sum())


def _loss(
    block: ScoredBlock,
    unit: Unit,
    recorder: StatisticsRecorder,
    probes: list[tuple[Tensor, Tensor]],
    recipe: Recipe,
) -> float:
    originals = {linear.path: _weight(block.module, linear).data for linear in unit.linears}
    for linear in unit.linears:
        weight = originals[linear.path]
        hessian = recorder.statistics(linear.path).hessian()
        if hessian is None:  # no calibration token reached this expert
            hessian = torch.eye(linear.in_features, device=weight.device)
        n_groups = linear.in_features // (recipe.group_size or linear.in_features)
        widths = (recipe.width,) * n_groups
        rounded = rtn(weight.float(), widths, recipe.symmetric, GRIDS[recipe.grid_name], hessian)
        _weight(block.module, linear).data = rounded.dequantize().to(weight.dtype)
    losses = []
    for sample, (before, after) in enumerate(probes):
        error = (block.forward(sample, before).float() - after.float()).square().sum(-1)
        losses.append(float((error / after.float().square().sum(-1).clamp_min(1e-30))[..., 1:].mean()))
    for linear in unit.linears:
        _weight(block.module, linear).data = originals[linear.path]
    return sum(losses) / len(losses)


def _weight(module: nn.Module, linear: Linear) -> Tensor:
    return module.get_submodule(linear.path).get_parameter("weight")
