"""What an allocator hands out widths to, and how many bytes it may spend. Known before a weight is read.

--bits B   the bytes that B bits everywhere would take; between whole numbers, in proportion between the neighbours
--bpw X    X stored bits per weight: codes, scales, zeros

Either is a budget in true bytes and is never exceeded. The widths are `lo` and `hi`; where a recipe names none, they
are the neighbours of the budget.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from quantkit.algorithms.casp import rank_of
from quantkit.errors import RequestError
from quantkit.formats.grouped_int import GroupedIntSpec, check_group_size
from quantkit.formats.low_rank import LowRankSpec
from quantkit.formats.spec import Spec
from quantkit.models.structure import Block, Linear
from quantkit.pipeline.binarize import sign_salient_spec
from quantkit.recipe import Recipe

TOLERANCE_BPW = 0.02  # what a budget may leave unused, where the sizes of the units allow
_EXPERT = re.compile(r"\bexperts\.\d+\.")
# Linears that serving engines fuse into one, by the names that they go by.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value"))

_QUERIES_AND_KEYS = ("q_proj", "k_proj", "query", "key", "wq", "wk")


@dataclass(frozen=True, slots=True)
class Unit:
    """Linears that get the same width: a block, a linear, or linears of a block that are tied."""

    name: str
    block: int
    linears: tuple[Linear, ...]


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes for all linears together, and the widths to spend them on."""

    n_bytes: int
    n_weights: int
    lo: int
    hi: int

    @property
    def bpw(self) -> float:
        return 8 * self.n_bytes / self.n_weights

    @property
    def tolerance(self) -> int:
        return int(TOLERANCE_BPW * self.n_weights / 8)


class Choice(NamedTuple):
    """What an allocator gives to a linear."""

    bits: int
    group_size: int | None  # None: one scale per row
    keep_ratio: float = 1.0  # of queries and keys as low-rank factors; 1: codes


def choices_of(recipe: Recipe, widths: Sequence[int]) -> list[Choice]:
    """Every width with the recipe's group size; where the allocator chooses, also with one scale per row, or with
    factors of several ranks for queries and keys."""
    sizes = [recipe.group_size]
    if recipe.chooses_groups and recipe.group_size is not None:
        sizes.insert(0, None)
    return [Choice(bits, size, ratio) for bits in widths for size in sizes for ratio in recipe.factor_ratios]


def units_of(blocks: Sequence[Block], recipe: Recipe) -> list[Unit]:
    """The units of a model in running order."""
    if recipe.granularity == "block" and not recipe.chooses_groups:
        return [Unit(block.name, index, block.linears) for index, block in enumerate(blocks) if block.linears]
    units = []
    for index, block in enumerate(blocks):
        members: dict[str, list[Linear]] = {}
        for linear in block.linears:
            path = _tied_path(linear.path) if recipe.tie else linear.path
            if recipe.chooses_groups:  # one expert sees too few tokens to be told from the others
                path = _EXPERT.sub("experts.*.", path)
            members.setdefault(path, []).append(linear)
        units += [Unit(f"{block.name}.{path}", index, tuple(linears)) for path, linears in members.items()]
    return units


def _tied_path(path: str) -> str:
    """One name for linears that must stay equal; engines fuse experts too.

    >>> _tied_path("self_attn.k_proj"), _tied_path("mlp.experts.7.up_proj")
    ('self_attn.q_proj+k_proj+v_proj', 'mlp.experts.*.gate_proj+up_proj')
    """
    parent, dot, last = _EXPERT.sub("experts.*.", path).rpartition(".")
    fused = next((names for names in _FUSED if last in names), (last,))
    return f"{parent}{dot}{'+'.join(fused)}"


def spec_at(linear: Linear, recipe: Recipe, choice: Choice) -> Spec:
    """What a linear stores at most. Raises `RequestError` when the group size does not divide it."""
    return planned_spec(linear, recipe.at(*choice))


def planned_spec(linear: Linear, recipe: Recipe) -> Spec:
    """What a linear stores at most under a recipe of one width.

    Raises:
        RequestError: the group size does not divide it, or ``keep_ratio`` leaves no rank.
    """
    if recipe.solver == "ptq161":
        return sign_salient_spec(linear, recipe)
    group_size = check_group_size(linear.in_features, recipe.group_size, linear.name)
    if is_factorized(linear, recipe):
        return low_rank_spec(linear, recipe)
    n_groups, bits = linear.in_features // group_size, recipe.width
    n_moved = range(n_groups // 2 + 1) if recipe.allocator == "sba" else (0,)
    mixes = [((bits - 1, k), (bits, n_groups - 2 * k), (bits + 1, k)) for k in n_moved]
    specs = [
        GroupedIntSpec(
            out_features=linear.out_features,
            in_features=linear.in_features,
            group_size=group_size,
            segments=tuple((width, count) for width, count in mix if count),
            symmetric=recipe.symmetric,
        )
        for mix in mixes
    ]
    return max(specs, key=lambda spec: spec.n_bytes)


def is_factorized(linear: Linear, recipe: Recipe) -> bool:
    """Whether a linear computes queries or keys that the recipe stores as low-rank factors."""
    return recipe.factorizes and linear.path.rpartition(".")[2] in _QUERIES_AND_KEYS


def low_rank_spec(linear: Linear, recipe: Recipe) -> LowRankSpec:
    """Rank by ``keep_ratio``, factors of ``qk_bits``; groups of the recipe's size, or of the rank if that is less."""
    try:
        rank = rank_of(linear.out_features, linear.in_features, recipe.keep_ratio)
    except RequestError as error:
        raise RequestError(f"{linear.name}: {error}") from error
    shapes = {"down": (rank, linear.in_features), "up": (linear.out_features, rank)}
    factors = {}
    for name, (rows, columns) in shapes.items():
        whole = recipe.group_size is None or columns <= recipe.group_size
        group_size = columns if whole else math.gcd(columns, recipe.group_size or columns)
        segments = ((recipe.qk_bits, columns // group_size),)
        factors[name] = GroupedIntSpec(
            out_features=rows,
            in_features=columns,
            group_size=group_size,
            segments=segments,
            symmetric=recipe.symmetric,
        )
    return LowRankSpec(out_features=linear.out_features, in_features=linear.in_features, **factors)


def check_factorized(linears: Sequence[Linear], recipe: Recipe) -> None:
    """Raises `RequestError` when the recipe factorizes queries and keys and no linear computes just these."""
    if recipe.factorizes and not any(is_factorized(linear, recipe) for linear in linears):
        raise RequestError(
            "keep_ratio factorizes query and key projections, and this model has none of their own (they may be one "
            "linear with the values); leave keep_ratio at 1"
        )


def bytes_at(linears: Sequence[Linear], recipe: Recipe, choice: Choice) -> int:
    """True bytes of all of them."""
    return sum(spec_at(linear, recipe, choice).n_bytes for linear in linears)


def budget_of(linears: Sequence[Linear], recipe: Recipe) -> Budget:
    """The budget of a recipe that mixes widths.

    Raises:
        RequestError: the budget lies outside what the widths can reach.
    """
    n_weights = sum(linear.n_weights for linear in linears)
    dense = replace(recipe, keep_ratio=1.0, factor_all=False, base="")  # what factors save is there to be spent
    totals = {bits: bytes_at(linears, dense, Choice(bits, recipe.group_size)) for bits in range(1, 9)}
    least_group = None if recipe.chooses_groups else recipe.group_size
    if recipe.bpw is None:
        average = Fraction(str(recipe.bits))
        below, above = math.floor(average), math.ceil(average)
        n_bytes = math.floor(totals[below] + (totals[above] - totals[below]) * (average - below))
    else:
        n_bytes = math.floor(Fraction(str(recipe.bpw)) * n_weights / 8)
        below = max(
            (bits for bits in totals if bytes_at(linears, dense, Choice(bits, least_group)) <= n_bytes), default=1
        )
        above = min((bits for bits in totals if totals[bits] >= n_bytes), default=8)
    lo = recipe.lo or min(below, (recipe.hi or 8) - 1)
    hi = recipe.hi or max(above, lo + 1)
    budget = Budget(n_bytes, n_weights, lo, hi)
    least = min(bytes_at(linears, recipe, choice) for choice in choices_of(recipe, [lo]))
    most = max(bytes_at(linears, recipe, choice) for choice in choices_of(recipe, [hi]))
    if least > n_bytes:
        raise RequestError(_out_of_reach(budget, "below", lo, least, "raise it, or lower lo"))
    if most < n_bytes:
        raise RequestError(_out_of_reach(budget, "above", hi, most, "lower it, or raise hi"))
    return budget


def _out_of_reach(budget: Budget, where: str, bits: int, total: int, advice: str) -> str:
    limit = f"the {8 * total / budget.n_weights:.3f} that {bits}-bit codes store here"
    return f"a budget of {budget.bpw:.3f} stored bits per weight is {where} {limit}; {advice}"
