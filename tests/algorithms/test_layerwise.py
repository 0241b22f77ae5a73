"""LIM and ZD against their closed forms, and allocations that never exceed their budget."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import law

from quantkit.algorithms.layerwise import (
    by_importance,
    lim,
    marginal_widths,
    two_widths,
    worthwhile,
    zd,
)
from quantkit.errors import RequestError


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_lim_of_identity_negation_and_a_right_angle() -> None:
    hidden = normal(3, 20, 16)
    assert lim(hidden, hidden).item() == pytest.approx(-1, abs=1e-6)
    assert lim(hidden, -hidden).item() == pytest.approx(1, abs=1e-6)
    turned = torch.stack([-hidden[..., 1::2], hidden[..., ::2]], -1).flatten(-2)
    assert lim(hidden, turned).item() == pytest.approx(0, abs=1e-6)


def test_lim_averages_cosines_of_tokens_not_of_their_sum() -> None:
    before, after = normal(9, 5), normal(9, 5, seed=1)
    before[4] *= 1000  # one huge token counts like every other
    cosines = [float(b @ a / (b.norm() * a.norm())) for b, a in zip(before[1:], after[1:], strict=True)]
    assert lim(before, after).item() == pytest.approx(-sum(cosines) / len(cosines), abs=1e-6)
    assert lim(7 * before, 0.5 * after).item() == pytest.approx(lim(before, after).item(), abs=1e-6)


def test_lim_leaves_out_the_first_token_of_each_sequence() -> None:
    before, after = normal(2, 6, 8), normal(2, 6, 8, seed=1)
    moved = after.clone()
    moved[:, 0] = -before[:, 0]
    assert torch.equal(lim(before, after), lim(before, moved))
    assert not torch.equal(lim(before, after, n_skipped=0), lim(before, moved, n_skipped=0))
    assert lim(before[:, :1], before[:, :1]).item() == pytest.approx(-1, abs=1e-6)  # one token: nothing to leave out


def test_lim_in_half_precision_is_computed_in_float32() -> None:
    before, after = normal(50, 8).half() * 1000, normal(50, 8, seed=1).half() * 1000  # squares overflow float16
    assert lim(before, after).item() == pytest.approx(lim(before.float(), after.float()).item(), abs=1e-6)


def test_zd_of_known_distributions() -> None:
    gaussian = normal(1000, 1000)
    assert zd([gaussian]) == pytest.approx(0.158655, abs=0.001)
    assert zd([gaussian], two_sided=True) == pytest.approx(0.317311, abs=0.0015)
    uniform = torch.rand(1_000_000, generator=torch.Generator().manual_seed(1))
    signs = torch.where(normal(1_000_000, seed=2) < 0, -1.0, 1.0)
    laplace = signs * -(1 - uniform).log()  # heavier tails: less mass beyond one sigma, exp(-sqrt(2)) / 2
    assert zd([laplace]) == pytest.approx(0.121559, abs=0.001)


def test_zd_takes_mean_and_deviation_over_all_weights_together() -> None:
    weight = normal(40, 30)
    parts = [weight[:10], weight[10:].t()]
    assert zd(parts) == zd([weight])
    assert zd([3 * weight + 0.25]) == zd([weight])
    assert zd([weight[:20], 10 * weight[20:]]) != zd([weight])
    assert zd([torch.full((4, 4), 0.3)]) == 0


def test_zd_of_nothing_is_refused() -> None:
    with pytest.raises(RequestError, match="a block without weights has no score"):
        zd([])


def test_ties_go_to_the_lower_index() -> None:
    assert by_importance([1.0, 2.0, 2.0, 1.0]) == [1, 2, 0, 3]
    assert two_widths(by_importance([0.0] * 4), [1] * 4, [3] * 4, budget=8) == (True, True, False, False)
    assert marginal_widths([[1.0, 0.0]] * 4, [[1, 3]] * 4, budget=8) == (1, 1, 0, 0)


SIZES = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30), st.floats(-1, 1)), min_size=1, max_size=12)


@law
@given(SIZES, st.floats(0, 1.2), st.none() | st.integers(0, 20))
def test_budget_is_never_exceeded_nor_missed_by_a_unit_that_would_fit(
    units: list[tuple[int, int, float]], share: float, tolerance: int | None
) -> None:
    lo, steps, scores = ([unit[field] for unit in units] for field in range(3))
    hi = [size + step for size, step in zip(lo, steps, strict=True)]
    budget = sum(lo) + int(share * sum(steps))
    order = by_importance(scores)
    chosen = two_widths(order, lo, hi, budget, tolerance)
    unused = budget - sum(hi[unit] if up else lo[unit] for unit, up in enumerate(chosen))
    assert unused >= 0
    assert all(up or steps[unit] > unused for unit, up in enumerate(chosen))
    assert chosen == two_widths(order, lo, hi, budget, tolerance)
    if tolerance is not None and unused > tolerance:  # then no swap could have used more
        outs = [steps[unit] for unit, up in enumerate(chosen) if up]
        ins = [steps[unit] for unit, up in enumerate(chosen) if not up]
        assert not any(0 < into - out <= unused for out, into in product(outs, ins))


@law
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40), st.floats(0, 1))
def test_equal_blocks_are_the_most_important_ones(scores: list[float], share: float) -> None:
    """The paper's formula: m = floor(L (B - lo) / (hi - lo)) blocks."""
    n, order = len(scores), by_importance(scores)
    budget = 20 * n + int(share * 10 * n)
    chosen = two_widths(order, [20] * n, [30] * n, budget, tolerance=0)
    m = (budget - 20 * n) // 10
    assert [unit for unit in range(n) if chosen[unit]] == sorted(order[:m])
    reverse = two_widths(order[::-1], [20] * n, [30] * n, 30 * n - 10 * m)
    assert reverse == tuple(not up for up in chosen)


def test_a_swap_comes_closer_to_the_budget() -> None:
    order, lo, hi = [0, 1, 2], [0, 0, 0], [4, 6, 9]
    assert two_widths(order, lo, hi, budget=9) == (True, False, False)
    assert two_widths(order, lo, hi, budget=9, tolerance=5) == (True, False, False)
    assert two_widths(order, lo, hi, budget=9, tolerance=4) == (False, False, True)


CURVES = st.lists(st.lists(st.floats(0.01, 10), min_size=3, max_size=3), min_size=1, max_size=5)


@law
@given(CURVES, st.integers(0, 12))
def test_marginal_widths_are_optimal_for_convex_losses_and_equal_steps(falls: list[list[float]], n_steps: int) -> None:
    losses = []
    for fall in falls:
        first, second, third = sorted(fall, reverse=True)
        losses.append([first + second + third, second + third, third, 0.0])
    n_bytes = [[10, 15, 20, 25]] * len(losses)
    budget = 10 * len(losses) + 5 * n_steps + 4
    picks = marginal_widths(losses, n_bytes, budget)
    assert sum(sizes[pick] for sizes, pick in zip(n_bytes, picks, strict=True)) <= budget
    best = min(
        sum(loss[pick] for loss, pick in zip(losses, combination, strict=True))
        for combination in product(range(4), repeat=len(losses))
        if sum(combination) <= n_steps
    )
    assert sum(loss[pick] for loss, pick in zip(losses, picks, strict=True)) == pytest.approx(best, abs=1e-9)


@law
@given(SIZES, st.floats(0, 1.2))
def test_marginal_widths_leave_out_only_what_does_not_fit(units: list[tuple[int, int, float]], share: float) -> None:
    n_bytes = [[lo, lo + step, lo + 2 * step + 1] for lo, step, _ in units]
    losses = [[score, -score, 0.0] for _, _, score in units]  # whatever they are, also rising ones
    budget = sum(sizes[0] for sizes in n_bytes) + int(share * sum(sizes[2] - sizes[0] for sizes in n_bytes))
    picks = marginal_widths(losses, n_bytes, budget)
    unused = budget - sum(sizes[pick] for sizes, pick in zip(n_bytes, picks, strict=True))
    assert unused >= 0
    assert all(pick == 2 or sizes[pick + 1] - sizes[pick] > unused for sizes, pick in zip(n_bytes, picks, strict=True))


def test_an_exchange_comes_closer_to_the_budget() -> None:
    losses, n_bytes = [[9.0, 1.0], [5.0, 4.0], [5.0, 3.0]], [[0, 4], [0, 9], [0, 9]]
    assert marginal_widths(losses, n_bytes, budget=9) == (1, 0, 0)
    assert marginal_widths(losses, n_bytes, budget=9, tolerance=5) == (1, 0, 0)
    assert marginal_widths(losses, n_bytes, budget=9, tolerance=4) == (0, 0, 1)


@law
@given(SIZES, st.floats(0, 1.2), st.integers(0, 20))
def test_exchanges_use_more_and_never_too_much(
    units: list[tuple[int, int, float]], share: float, tolerance: int
) -> None:
    n_bytes = [[lo, lo + step, lo + 2 * step + 1] for lo, step, _ in units]
    losses = [[score + 2, score + 1, score] for _, _, score in units]
    budget = sum(sizes[0] for sizes in n_bytes) + int(share * sum(sizes[2] - sizes[0] for sizes in n_bytes))
    plain, closer = (
        sum(sizes[pick] for sizes, pick in zip(n_bytes, marginal_widths(losses, n_bytes, budget, each), strict=True))
        for each in (None, tolerance)
    )
    assert plain <= closer <= budget
    assert closer == plain or budget - plain > tolerance


def test_a_budget_below_the_lowest_width_is_refused() -> None:
    with pytest.raises(RequestError, match="the budget of 5 bytes is below the 6 bytes of the lowest width"):
        two_widths([0, 1], [3, 3], [4, 4], budget=5)
    with pytest.raises(RequestError, match="below the 6 bytes"):
        marginal_widths([[1.0, 0.0]] * 2, [[3, 4]] * 2, budget=5)


@law
@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), min_size=1, max_size=8))
def test_worthwhile_choices_are_the_lower_hull(points: list[tuple[float, int]]) -> None:
    """For any price of a byte the cheapest choice is among them; losses fall and sizes grow along them."""
    losses, sizes = [loss for loss, _ in points], [size for _, size in points]
    kept = worthwhile(losses, sizes)
    for price in (0.0, 0.01, 0.3, 1.0, 7.0, 1000.0):
        costs = [loss + price * size for loss, size in points]
        assert min(costs[index] for index in kept) <= min(costs) + 1e-9
    assert all(sizes[a] < sizes[b] and losses[a] > losses[b] for a, b in pairwise(kept))
