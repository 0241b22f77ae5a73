"""GPTQ: the identities of the paper, a textbook loop that inverts afresh, and what may not change the codes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from gptq_cases import assert_same_codes, every_grid, every_order, solve, value, visiting_order
from strategies import output_loss, random_hessian, random_weight
from torch import Tensor

from quantkit.algorithms.gptq import ActOrder, GPTQConfig
from quantkit.algorithms.grids import GRIDS, Grid, quantize, storable_scales
from quantkit.algorithms.hessian import damped, inverse_factor, without_dead_columns
from quantkit.algorithms.rtn import rtn
from quantkit.formats.grouped_int import GroupedInt

# --- the loss -----------------------------------------------------------------------------------------------------


@every_order
@every_grid
@pytest.mark.parametrize("bits", [(1,), (2, 2), (3, 3, 3, 3), (1, 4, 2, 8), (8,)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_reported_loss_is_the_quadratic_form(
    act_order: ActOrder, grid: str, bits: tuple[int, ...], symmetric: bool
) -> None:
    """tr((W - Q) H (W - Q)^T) = ||E||^2 with the damped Hessian, although E is never multiplied back."""
    weight, hessian = random_weight(6, 24, 1), random_hessian(24, 1)
    solution = solve(weight, hessian, bits, grid, symmetric=symmetric, config=GPTQConfig(act_order=act_order))
    expected = output_loss(weight, value(solution.weight), damped(hessian, 0.01)).sum()
    assert solution.loss == pytest.approx(float(expected), rel=1e-10)
    assert solution.damping == 0.01


@every_order
@pytest.mark.parametrize("kind", ["deficient", "duplicated", "dead", "diagonal"])
def test_loss_identity_on_broken_hessians(act_order: ActOrder, kind: str) -> None:
    weight, hessian = random_weight(5, 30, 2), random_hessian(30, 2, kind)
    solution = solve(weight, hessian, (2,) * 3, "hessian", config=GPTQConfig(act_order=act_order, damping=0.001))
    W, H = without_dead_columns(weight, hessian)
    expected = output_loss(W, value(solution.weight), damped(H, solution.damping)).sum()
    assert solution.loss == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("grid", ["minmax", "hessian"])
def test_loss_in_float32(grid: str) -> None:
    """Half the digits: each of the in_features steps rounds once more, relative to the weights."""
    weight, hessian = random_weight(8, 96, 3, torch.float32), random_hessian(96, 3, dtype=torch.float32)
    solution = solve(weight, hessian, (3,) * 3, grid)
    expected = output_loss(weight, value(solution.weight), damped(hessian, 0.01)).sum()
    assert solution.loss == pytest.approx(float(expected), rel=96 * 10 * torch.finfo(torch.float32).eps)


# --- what must not change the codes -------------------------------------------------------------------------------


@every_order
@pytest.mark.parametrize("grid", ["minmax", "hessian"])
@pytest.mark.parametrize("n_groups", [1, 2, 6])
def test_block_size_changes_no_code(act_order: ActOrder, grid: str, n_groups: int) -> None:
    weight, hessian = random_weight(6, 36, 4), random_hessian(36, 4)
    solutions = [
        solve(weight, hessian, (3,) * n_groups, grid, config=GPTQConfig(act_order=act_order, block_size=block_size))
        for block_size in (1, 3, 36, 128)
    ]
    for other in solutions[1:]:
        assert_same_codes(other.weight, solutions[0].weight)
        assert other.loss == pytest.approx(solutions[0].loss, rel=1e-12)


@every_order
@every_grid
def test_same_call_same_bits_and_arguments_are_left_alone(act_order: ActOrder, grid: str) -> None:
    weight, hessian = random_weight(5, 24, 5, torch.float32), random_hessian(24, 5, "dead", torch.float32)
    kept = weight.clone(), hessian.clone()
    config = GPTQConfig(act_order=act_order)
    first, second = (solve(weight, hessian, (2, 2), grid, config=config) for _ in range(2))
    assert_same_codes(first.weight, second.weight)
    assert first.loss == second.loss
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])


@every_order
@every_grid
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_scale_of_the_hessian_changes_no_code(act_order: ActOrder, grid: str, bits: int) -> None:
    weight, hessian = random_weight(5, 24, 6), random_hessian(24, 6)
    config = GPTQConfig(act_order=act_order)
    base = solve(weight, hessian, (bits,) * 2, grid, config=config)
    for factor in (2.0**-40, 1e-6, 3.7, 1e6, 2.0**40):
        scaled = solve(weight, factor * hessian, (bits,) * 2, grid, config=config)
        assert_same_codes(scaled.weight, base.weight)
        assert scaled.loss == pytest.approx(factor * base.loss, rel=1e-10)


@pytest.mark.parametrize("act_order", ["group", "full"])
@every_grid
@pytest.mark.parametrize("seed", range(2))
def test_permuted_inputs_give_permuted_codes(act_order: ActOrder, grid: str, seed: int) -> None:
    """Groups are permuted as wholes, columns inside groups freely; the order of the visit is the same columns'."""
    weight, hessian = random_weight(5, 24, seed), random_hessian(24, seed)
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randperm(3, generator=generator)
    inside = torch.stack([torch.randperm(8, generator=generator) for _ in range(3)])
    shuffle = (groups.unsqueeze(1) * 8 + inside).flatten()
    bits = (2, 3, 4)
    config = GPTQConfig(act_order=act_order)
    plain = solve(weight, hessian, bits, grid, config=config)
    permuted = solve(
        weight[:, shuffle], hessian[shuffle][:, shuffle], tuple(bits[g] for g in groups.tolist()), grid, config=config
    )
    assert torch.equal(permuted.weight.codes, plain.weight.codes[:, shuffle])
    assert torch.equal(permuted.weight.scales, plain.weight.scales[:, groups])
    assert torch.equal(permuted.weight.zeros, plain.weight.zeros[:, groups])


@every_order
@every_grid
def test_rows_are_independent(act_order: ActOrder, grid: str) -> None:
    weight, hessian = random_weight(7, 24, 8), random_hessian(24, 8)
    config = GPTQConfig(act_order=act_order)
    together = solve(weight, hessian, (2, 3), grid, config=config)
    alone = [solve(weight[[row]], hessian, (2, 3), grid, config=config) for row in range(7)]
    assert torch.equal(together.weight.codes, torch.cat([solution.weight.codes for solution in alone]))
    assert together.loss == pytest.approx(sum(solution.loss for solution in alone), rel=1e-12)


@every_order
@pytest.mark.parametrize("grid", ["minmax", "mse", "sqc"])
def test_independent_inputs_make_it_plain_rounding(act_order: ActOrder, grid: str) -> None:
    """A diagonal Hessian leaves nothing to compensate."""
    weight, hessian = random_weight(6, 24, 9), random_hessian(24, 9, "diagonal")
    solution = solve(weight, hessian, (2, 3, 4), grid, config=GPTQConfig(act_order=act_order))
    assert_same_codes(solution.weight, rtn(weight, (2, 3, 4), False, GRIDS[grid], hessian))


@every_order
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_independent_inputs_with_the_hessian_grid(act_order: ActOrder, bits: int) -> None:
    """One group, so that both damp by the same mean and hence weigh columns alike."""
    weight, hessian = random_weight(6, 24, 10), random_hessian(24, 10, "diagonal")
    solution = solve(weight, hessian, (bits,), "hessian", config=GPTQConfig(act_order=act_order))
    assert_same_codes(solution.weight, rtn(weight, (bits,), False, GRIDS["hessian"], hessian))


# --- oracles ------------------------------------------------------------------------------------------------------


def textbook(weight: Tensor, H: Tensor, order: list[int], grid_of: Callable[[int, Tensor], Grid], bits: int) -> Tensor:
    """Optimal Brain Surgeon with a fixed order: the Hessian of the free columns is inverted afresh at every step.

    Args:
        grid_of: column and current weights to the grid of that column.

    Returns:
        codes ``[out, in]``.
    """
    W = weight.clone()
    codes = torch.zeros_like(W)
    for step, c in enumerate(order):
        free = order[step:]
        inverse = torch.linalg.inv(H[free][:, free])
        grid = grid_of(c, W)
        codes[:, c] = quantize(W[:, [c]], grid, bits)[:, 0]
        q = grid.scales * (codes[:, c] - grid.zeros)
        W[:, free] -= torch.outer(W[:, c] - q, inverse[0] / inverse[0, 0])
    return codes


@every_order
@every_grid
@pytest.mark.parametrize(("in_features", "n_groups"), [(1, 1), (5, 1), (8, 2), (12, 3)])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_textbook_loop_gives_the_same_codes(
    act_order: ActOrder, grid: str, in_features: int, n_groups: int, bits: int
) -> None:
    weight, hessian = random_weight(6, in_features, 11), random_hessian(in_features, 11)
    solution = solve(weight, hessian, (bits,) * n_groups, grid, config=GPTQConfig(act_order=act_order)).weight
    size = in_features // n_groups

    def grid_of(column: int, _: Tensor) -> Grid:
        group = column // size
        return Grid(solution.scales[:, group].double(), solution.zeros[:, group].double())

    order = visiting_order(hessian.diagonal(), n_groups, act_order)
    codes = textbook(weight, damped(hessian, 0.01), order, grid_of, bits)
    assert torch.equal(codes, solution.codes.double())


@pytest.mark.parametrize("act_order", ["none", "group"])
@pytest.mark.parametrize("grid", ["minmax", "mse"])
def test_textbook_loop_fits_the_same_grids_on_compensated_weights(act_order: ActOrder, grid: str) -> None:
    """The grid of a group is fitted when the loop reaches it, on what all earlier columns left behind."""
    weight, hessian = random_weight(6, 12, 12), random_hessian(12, 12)
    solution = solve(weight, hessian, (3,) * 3, grid, config=GPTQConfig(act_order=act_order)).weight
    fitted: dict[int, Grid] = {}

    def grid_of(column: int, current: Tensor) -> Grid:
        group = column // 4
        if group not in fitted:
            columns = current[:, 4 * group : 4 * group + 4]
            fitted[group] = GRIDS[grid](columns, 3, False, torch.eye(4, dtype=torch.float64))
        return fitted[group]

    order = visiting_order(hessian.diagonal(), 3, act_order)
    codes = textbook(weight, damped(hessian, 0.01), order, grid_of, 3)
    assert torch.equal(codes, solution.codes.double())
    for group, (scales, zeros) in fitted.items():
        assert torch.equal(solution.scales[:, group].double(), scales)
        assert torch.equal(solution.zeros[:, group].double(), zeros)


@every_grid
def test_full_order_fits_grids_on_the_original_weights(grid: str) -> None:
    """Each grid is that of the group alone, in the metric of its block of the damped Hessian."""
    weight, hessian = random_weight(6, 24, 13), random_hessian(24, 13)
    solution = solve(weight, hessian, (3,) * 3, grid, config=GPTQConfig(act_order="full")).weight
    H = damped(hessian, 0.01)
    for group in range(3):
        span = slice(8 * group, 8 * group + 8)
        scales, zeros = GRIDS[grid](weight[:, span], 3, False, torch.linalg.cholesky(H[span, span]))
        assert torch.equal(solution.scales[:, group].double(), scales)
        assert torch.equal(solution.zeros[:, group].double(), zeros)


@every_order
@pytest.mark.parametrize("grid", ["minmax", "hessian"])
def test_every_code_is_nearest_to_the_conditional_optimum(act_order: ActOrder, grid: str) -> None:
    """After k columns the weights left are the exact minimizer given these k; column k is then rounded to its grid.

    The minimizer is computed from Q alone, as a least-squares problem: W_F = W0_F + (W0 - Q)_done H_done,F H_FF^-1.
    """
    weight, hessian = random_weight(6, 20, 14), random_hessian(20, 14)
    solution = solve(weight, hessian, (2, 3), grid, config=GPTQConfig(act_order=act_order)).weight
    root = torch.linalg.cholesky(damped(hessian, 0.01))  # H = C C^T
    order = visiting_order(hessian.diagonal(), 2, act_order)
    error = weight - value(solution)
    for k, c in enumerate(order):
        done, free = order[:k], order[k:]
        shift = torch.linalg.lstsq(root[free].t(), -(error[:, done] @ root[done]).t()).solution.t()
        optimum = weight[:, c] - shift[:, 0]  # [W0 - Q on the done, shift on the free columns] has the least loss
        group = c // 10
        grid_c = Grid(solution.scales[:, group].double(), solution.zeros[:, group].double())
        code = quantize(optimum.unsqueeze(1), grid_c, solution.bits[group])[:, 0]
        assert torch.equal(code, solution.codes[:, c].double()), k


def test_gap_between_rounding_and_the_best_codes_narrows() -> None:
    """Against all 4^6 codes of each row on the same grid, over 96 rows of 12 layers: at least 30 % of the gap."""
    codes = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.float64)
    total = {"best": 0.0, "gptq": 0.0, "rounded": 0.0}
    for seed in range(12):
        weight, hessian = random_weight(8, 6, seed), random_hessian(6, seed)
        solution = solve(weight, hessian, (2,), "hessian").weight
        H = damped(hessian, 0.01)
        scale = 1 / float(output_loss(weight, torch.zeros_like(weight), H).sum())  # each layer counts alike
        total["gptq"] += scale * float(output_loss(weight, value(solution), H).sum())
        plain = replace(solution, codes=nearest_codes(weight, solution))
        total["rounded"] += scale * float(output_loss(weight, value(plain), H).sum())
        for row in range(8):
            levels = solution.scales[row].double() * (codes - solution.zeros[row].double())
            total["best"] += scale * float(output_loss(weight[row].expand(len(codes), -1), levels, H).min())
    assert total["best"] < total["gptq"]
    assert total["gptq"] - total["best"] < 0.7 * (total["rounded"] - total["best"])


# --- bounds -------------------------------------------------------------------------------------------------------


def wide(weight: Tensor, bits: int, symmetric: bool, metric: Tensor) -> Grid:
    """A grid with so much room on both sides that compensation clips nothing."""
    scales = storable_scales(6 * weight.abs().amax(-1) / 2**bits)
    return Grid(scales, torch.full_like(scales, 2 ** (bits - 1)))


@every_order
def test_unclipped_loss_is_bounded_and_a_third_of_the_bound_on_average(act_order: ActOrder) -> None:
    """|E[:, c]| <= s / (2 U_cc): row loss <= sum_c s_c^2 / (4 U_cc^2). Rounding errors are uniform: a third of it."""
    n_rows, in_features, n_groups = 400, 32, 2
    weight, hessian = random_weight(n_rows, in_features, 15), random_hessian(in_features, 15)
    solution = solve(weight, hessian, (6,) * n_groups, wide, config=GPTQConfig(act_order=act_order)).weight
    assert solution.codes.min() > 0
    assert solution.codes.max() < 63
    H = damped(hessian, 0.01)
    losses = output_loss(weight, value(solution), H)
    order = torch.tensor(visiting_order(hessian.diagonal(), n_groups, act_order))
    steps = solution.scales.double()[:, order // (in_features // n_groups)]
    terms = steps**2 / 4 / inverse_factor(H[order][:, order]).diagonal() ** 2  # [rows, in]
    assert (losses <= terms.sum(1) * (1 + 1e-9)).all()
    # u^2 of u uniform on [-1, 1] has mean 1/3 and variance 4/45; six standard deviations of the weighted mean.
    deviation = (4 / 45 * terms.square().sum()).sqrt() / terms.sum()
    assert abs(losses.sum() / terms.sum() - 1 / 3) < 6 * deviation


@pytest.mark.parametrize("bits", [2, 3])
def test_compensation_beats_rounding_beats_minmax_in_the_mean(bits: int) -> None:
    """Not a law for a single layer; the geometric mean over 16 layers, each ratio with a margin of 15 %."""
    n_seeds, n_groups = 16, 2
    logs = torch.zeros(n_seeds, 5, dtype=torch.float64)
    for seed in range(n_seeds):
        weight, hessian = random_weight(16, 64, seed), random_hessian(64, seed)
        widths = (bits,) * n_groups
        static = solve(weight, hessian, widths, "hessian", config=GPTQConfig(act_order="full")).weight
        same_grid = replace(static, codes=nearest_codes(weight, static))
        candidates = [
            solve(weight, hessian, widths, "hessian").weight,
            static,
            same_grid,
            rtn(weight, widths, False, GRIDS["hessian"], hessian),
            rtn(weight, widths, False, GRIDS["minmax"], hessian),
        ]
        logs[seed] = torch.tensor([float(output_loss(weight, value(q), hessian).sum().log()) for q in candidates])
    dynamic, ordered, rounded, searched, minmax = logs.mean(0).exp().tolist()
    assert 1.15 * dynamic < searched
    assert 1.15 * ordered < rounded  # literally the same scales and zeros
    assert 1.15 * rounded < minmax
    assert 1.15 * searched < minmax


def nearest_codes(weight: Tensor, like: GroupedInt) -> Tensor:
    """Plain rounding onto the grids of ``like``."""
    grouped = weight.reshape(weight.shape[0], len(like.bits), -1)
    grid = Grid(like.scales.double(), like.zeros.double())
    return quantize(grouped, grid, like.bits[0]).flatten(1).to(torch.uint8)


@pytest.mark.parametrize("bits", [2, 3])
def test_shortlist_never_costs_a_row_of_one_group(bits: int) -> None:
    """Each row keeps the best of its candidates, and the candidate of a shorter list is among them."""
    weight, hessian = random_weight(12, 24, 16), random_hessian(24, 16)
    H = damped(hessian, 0.01)
    previous = torch.full((12,), float("inf"), dtype=torch.float64)
    for shortlist in (1, 2, 8):
        solution = solve(weight, hessian, (bits,), "hessian", config=GPTQConfig(shortlist=shortlist))
        losses = output_loss(weight, value(solution.weight), H)
        assert (losses <= previous * (1 + 1e-9)).all()
        previous = losses
