"""Grids: levels that can be stored, exact least squares at one bit, and searches against literal loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import SIZES, group_weights, law, random_hessian, random_weight
from torch import Tensor

from quantkit.algorithms.grids import GRIDS, SHORTLISTS, Grid, dequantize, hessian, mse, quantize, sqc, storable_scales
from quantkit.algorithms.hessian import damped, inverse_factor
from quantkit.algorithms.registry import GRID_CHOICES
from quantkit.errors import NumericalError
from quantkit.formats.grouped_int import symmetric_zero

widths = st.integers(1, 8)
grid_names = st.sampled_from(sorted(GRIDS))


def metric_of(size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """U_gg^-1 of the first ``size`` of more columns, as a compensating solver passes it: upper triangular."""
    factor = inverse_factor(damped(random_hessian(2 * size, seed), 0.01))
    return torch.linalg.inv(factor[:size, :size]).to(dtype)


def fit(name: str, weight: Tensor, bits: int, symmetric: bool) -> Grid:
    return GRIDS[name](weight, bits, symmetric, metric_of(weight.shape[-1], dtype=weight.dtype))


def rounded(weight: Tensor, grid: Grid, bits: int) -> Tensor:
    return dequantize(quantize(weight, grid, bits), grid)


def exact_error(weight: Tensor, grid: Grid, bits: int) -> Tensor:
    """q - w in float64; float16 scales, zeros and codes are exact there."""
    double = Grid(grid.scales.double(), grid.zeros.double())
    return rounded(weight.double(), double, bits) - weight.double()


def test_every_choice_is_a_grid() -> None:
    assert set(GRID_CHOICES) == {"auto", *GRIDS}
    assert set(SHORTLISTS) <= set(GRIDS.values())


# --- laws of every grid -------------------------------------------------------------------------------------------


@law
@given(weight=group_weights(), bits=widths, symmetric=st.booleans(), name=grid_names)
@example(weight=torch.zeros(1, 1), bits=1, symmetric=False, name="hessian")
@example(weight=torch.full((2, 5), 0.3), bits=1, symmetric=False, name="hessian")  # signs all alike: a singular fit
@example(weight=torch.tensor([[1.0, 1.0, 1.0, 1.00001]]), bits=1, symmetric=False, name="hessian")
@example(weight=torch.tensor([[-0.0, -0.0]]), bits=2, symmetric=False, name="sqc")
@example(weight=torch.tensor([[-15 * 1.45 * 2.0**-24, 0.0]]), bits=4, symmetric=False, name="minmax")  # -lo / s = 21.75
def test_grid_can_be_stored_and_codes_are_in_range(weight: Tensor, bits: int, symmetric: bool, name: str) -> None:
    kept = weight.clone()
    grid = fit(name, weight, bits, symmetric)
    assert torch.equal(weight, kept)
    assert grid.scales.shape == grid.zeros.shape == weight.shape[:1]
    assert grid.scales.dtype == grid.zeros.dtype == weight.dtype
    assert (grid.scales > 0).all()
    assert torch.equal(grid.scales.half().to(weight.dtype), grid.scales)
    assert torch.equal(grid.zeros.half().to(weight.dtype), grid.zeros)
    if symmetric:
        assert (grid.zeros == symmetric_zero(bits)).all()
    elif bits > 1:
        assert torch.equal(grid.zeros.round().clamp(0, 2**bits - 1), grid.zeros)
    codes = quantize(weight, grid, bits)
    assert torch.equal(codes.round().clamp(0, 2**bits - 1), codes)
    assert torch.isfinite(dequantize(codes, grid)).all()


@law
@given(weight=group_weights(), bits=widths, symmetric=st.booleans(), name=grid_names)
def test_rounding_a_rounded_weight_changes_nothing(weight: Tensor, bits: int, symmetric: bool, name: str) -> None:
    grid = fit(name, weight, bits, symmetric)
    codes = quantize(weight, grid, bits)
    assert torch.equal(quantize(dequantize(codes, grid), grid, bits), codes)


@law
@given(weight=group_weights(torch.float64), bits=widths, symmetric=st.booleans(), name=grid_names)
def test_codes_are_the_nearest_levels(weight: Tensor, bits: int, symmetric: bool, name: str) -> None:
    """Against all levels of the row, one by one."""
    grid = fit(name, weight, bits, symmetric)
    error = (rounded(weight, grid, bits) - weight).abs()
    levels = dequantize(torch.arange(2**bits, dtype=weight.dtype).expand(len(weight), -1), grid)  # [rows, 2 ** bits]
    least = (levels.unsqueeze(1) - weight.unsqueeze(2)).abs().amin(-1)
    # w / s + z rounds once per operation, relative to its size: at most 2 eps (|w| + |s z|) off the midpoint.
    slack = 4 * torch.finfo(weight.dtype).eps * (weight.abs() + (grid.scales * (grid.zeros.abs() + 1)).unsqueeze(1))
    assert (error <= least + slack).all()


@law
@given(size=st.sampled_from(SIZES), bits=widths, symmetric=st.booleans(), name=grid_names, negative=st.booleans())
def test_zero_rows_stay_exactly_zero(size: int, bits: int, symmetric: bool, name: str, negative: bool) -> None:
    """And zeros of other rows too, from two bits on; a symmetric bit has no zero among its levels."""
    weight = random_weight(3, size, 0, torch.float32)
    weight[1] = -0.0 if negative else 0.0
    weight[2, 0] = 0.0
    quantized = rounded(weight, fit(name, weight, bits, symmetric), bits)
    if bits > 1:
        assert quantized[2, 0] == 0
    if bits > 1 or not symmetric:
        assert (quantized[1] == 0).all()
    else:
        assert (quantized[1].abs() <= 2.0**-24).all()


@law
@given(weight=group_weights(torch.float64), bits=st.integers(2, 8), symmetric=st.booleans())
def test_minmax_error_is_at_most_half_a_scale(weight: Tensor, bits: int, symmetric: bool) -> None:
    """Inside the levels half a scale; outside, the part of the range that rounding the scale to float16 cut off.

    With S = (hi - lo) / (2^b - 1) and s its float16: lo misses its level by at most s / 2 (the zero is rounded), and hi
    by that plus (2^b - 1) (S - s). Symmetric: hi = (2^b - 1) S / 2 lies (2^b - 1) (S - s) / 2 + s / 2 above the top.
    """
    grid = fit("minmax", weight, bits, symmetric)
    scales = grid.scales.unsqueeze(1)
    lo, hi = weight.amin(1).clamp_max(0), weight.amax(1).clamp_min(0)
    width = 2 * torch.maximum(-lo, hi) if symmetric else hi - lo
    width = torch.where(width == 0, 2.0, width).unsqueeze(1)
    cut_off = (width - scales * (2**bits - 1)).clamp_min(0)
    error = (rounded(weight, grid, bits) - weight).abs()
    slack = 1 + 1e-9  # rounding of the division above, about 2^b eps
    assert (error <= (scales / 2 + cut_off) * slack).all()
    position = weight / scales + grid.zeros.unsqueeze(1)
    inside = (position >= 0) & (position <= 2**bits - 1)
    assert (error[inside] <= (scales / 2 * slack).expand_as(error)[inside]).all()


@settings(law, max_examples=15)
@given(weight=group_weights(torch.float64), bits=widths, symmetric=st.booleans(), name=grid_names)
def test_rows_do_not_see_each_other(weight: Tensor, bits: int, symmetric: bool, name: str) -> None:
    """With the default weight of salient elements: their mask is drawn over the whole block, but changes nothing."""
    together = fit(name, weight, bits, symmetric)
    for row in range(len(weight)):
        alone = fit(name, weight[row : row + 1], bits, symmetric)
        # Sums over a row may be taken in another order, so a tie between candidates may fall otherwise: compare losses.
        loss = own_loss(name, weight[row : row + 1])
        mine = loss(exact_error(weight[row : row + 1], alone, bits))
        theirs = loss(exact_error(weight[row : row + 1], Grid(together.scales[[row]], together.zeros[[row]]), bits))
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_twice_the_weight_has_twice_the_scale(name: str, bits: int, symmetric: bool) -> None:
    """Powers of two commute with every rounding on the way, as long as no scale leaves float16's normal range."""
    weight = random_weight(6, 16, 3)
    once, twice = fit(name, weight, bits, symmetric), fit(name, 2 * weight, bits, symmetric)
    assert torch.equal(twice.scales, 2 * once.scales)
    assert torch.equal(twice.zeros, once.zeros)


@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_scaling_the_metric_changes_nothing(name: str, bits: int) -> None:
    weight, metric = random_weight(6, 16, 4), metric_of(16)
    grid = GRIDS[name](weight, bits, False, metric)
    for exponent in (-60, -20, 20, 60):
        scaled = GRIDS[name](weight, bits, False, metric * 2.0**exponent)
        assert torch.equal(scaled.scales, grid.scales)
        assert torch.equal(scaled.zeros, grid.zeros)


@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_scale_beyond_float16_is_refused(name: str, bits: int) -> None:
    weight = random_weight(2, 8, 0) * 1e9
    with pytest.raises(NumericalError, match=r"a scale of .* does not fit float16; the weights are out of range"):
        fit(name, weight, bits, False)


def test_storable_scales_are_positive_float16() -> None:
    scales = torch.tensor([0.0, 1e-12, 2.0**-25, 0.1, 65504.0])
    assert torch.equal(storable_scales(scales), scales.half().float().clamp(min=2.0**-24))
    with pytest.raises(NumericalError, match="a scale of 65520 does not fit float16"):
        storable_scales(torch.tensor([1.0, 65520.0]))


# --- one bit ------------------------------------------------------------------------------------------------------

POSITIVE_HALVES = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).double()  # every finite one


@pytest.mark.parametrize("size", [1, 2, 5, 16])
@pytest.mark.parametrize("seed", range(3))
def test_symmetric_bit_is_the_best_of_all_float16_scales(size: int, seed: int) -> None:
    weight = random_weight(2, size, seed)
    grid = fit("minmax", weight, 1, True)
    best = exact_error(weight, grid, 1).square().sum(1)
    for row, least in zip(weight, best, strict=True):
        candidates = ((row.abs() - POSITIVE_HALVES.unsqueeze(1) / 2) ** 2).sum(1)
        assert least <= candidates.min() * (1 + 1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 6, 9])
@pytest.mark.parametrize("kind", ["random", "skewed", "outlier", "offset"])
def test_free_bit_is_the_least_squares_partition(size: int, kind: str) -> None:
    """Against all 2^g ways to give each weight one of two levels, each level at the mean of its weights.

    Storage moves a level by at most d: half a float16 ulp of the scale and of the zero. The levels are means, so the
    squared error grows by at most g d^2.
    """
    weight = random_weight(4, size, 5)
    if kind == "skewed":
        weight = weight.abs() ** 3
    if kind == "outlier":
        weight[:, 0] = 20.0
    if kind == "offset":
        weight += 3
    grid = fit("minmax", weight, 1, False)
    error = exact_error(weight, grid, 1).square().sum(1)
    magnitude = grid.scales * (grid.zeros.abs() + 1)
    allowed = size * (magnitude * 2.0**-10) ** 2
    for row in range(len(weight)):
        best = float("inf")
        for upper in itertools.product([False, True], repeat=size):
            mask = torch.tensor(upper)
            parts = [part for part in (weight[row, mask], weight[row, ~mask]) if part.numel()]
            best = min(best, sum(float(((part - part.mean()) ** 2).sum()) for part in parts))
        assert error[row] <= best + allowed[row] + 1e-12


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_searched_bit_beats_a_refit_by_hand(symmetric: bool, seed: int) -> None:
    """Signs of the plain fit, then the levels that minimize ||(q - w) L||^2 for these signs, then the nearest codes."""
    weight, metric = random_weight(6, 16, seed), metric_of(16, seed)
    plain = GRIDS["minmax"](weight, 1, symmetric, metric)
    searched = hessian(weight, 1, symmetric, metric)
    signs = 2 * quantize(weight, plain, 1) - 1
    refit = []
    for row in range(6):
        design = torch.stack([signs[row] @ metric] + ([] if symmetric else [metric.sum(0)]), dim=1)
        solution = torch.linalg.lstsq(design, (weight[row] @ metric).unsqueeze(1)).solution.flatten().tolist()
        half_step, center = solution[0], 0.0 if symmetric else solution[1]
        levels = torch.tensor([center - half_step, center + half_step], dtype=torch.float64)
        nearest = levels[(weight[row].unsqueeze(1) - levels).abs().argmin(1)]
        refit.append(((nearest - weight[row]) @ metric).square().sum())
    losses = [(exact_error(weight, grid, 1) @ metric).square().sum(1) for grid in (searched, plain)]
    assert (losses[0] <= torch.stack(refit) * (1 + 0.01)).all()  # levels are stored in float16
    assert losses[0].sum() < losses[1].sum()


# --- searches -----------------------------------------------------------------------------------------------------


def salient_mask(weight: Tensor, metric: Tensor) -> Tensor:
    """SliM-LLM: elements whose salience is at least that of the least z-score outlier, over the whole block."""
    delta = weight**2 * metric.diagonal() ** 2
    outlier = ((delta - delta.mean()) / delta.std(correction=0)).abs() > 2
    return delta >= delta[outlier].min() if outlier.any() else torch.zeros_like(outlier)


def own_loss(name: str, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """What a grid minimizes, per row of errors; min-max and the free bit of mse and sqc the square."""
    metric = metric_of(weight.shape[-1])
    if name == "hessian":
        return lambda error: (error @ metric).square().sum(-1)
    power = 2.0 if name == "minmax" else 2.4
    return lambda error: error.abs().pow(power).sum(-1)


@law
@given(weight=group_weights(torch.float64), bits=widths, symmetric=st.booleans())
@pytest.mark.parametrize("name", sorted(set(GRIDS) - {"minmax"}))
def test_searched_grid_never_loses_to_minmax(name: str, weight: Tensor, bits: int, symmetric: bool) -> None:
    loss = own_loss(name, weight)
    searched = loss(exact_error(weight, fit(name, weight, bits, symmetric), bits))
    baseline = loss(exact_error(weight, fit("minmax", weight, bits, symmetric), bits))
    assert (searched <= baseline * (1 + 1e-9)).all()


def literal_grids(weight: Tensor, bits: int, symmetric: bool, factor: float, offset: int) -> Grid:
    """One candidate of a search, written for a single row."""
    lo, hi = min(float(weight.min()), 0.0), max(float(weight.max()), 0.0)
    if symmetric:
        hi = max(-lo, hi)
        lo = -hi
    scale = float(torch.tensor(factor * (hi - lo) / (2**bits - 1)).half())
    zero = 2 ** (bits - 1) if symmetric else min(max(round(-factor * lo / scale) + offset, 0), 2**bits - 1)
    return Grid(torch.tensor([scale], dtype=torch.float64), torch.tensor([zero], dtype=torch.float64))


SEARCHES: dict[str, tuple[list[float], tuple[int, ...]]] = {
    "mse": ([1 - step / 100 for step in range(80)], (0,)),
    "sqc": ([1 + 0.002 * step for step in range(-50, 51)], (0,)),
    "hessian": ([1.1 - 0.02 * step for step in range(45)], (0, -1, 1)),
}


@pytest.mark.parametrize("name", sorted(SEARCHES))
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_search_is_at_least_as_good_as_a_literal_loop(name: str, bits: int, symmetric: bool) -> None:
    """Over every documented candidate; a search may look at more, never at fewer."""
    weight = random_weight(3, 64, 8)
    weight[2, 5] = 2.5 * weight[2].abs().max()  # worth clipping
    loss = own_loss(name, weight)
    found = loss(exact_error(weight, fit(name, weight, bits, symmetric), bits))
    factors, offsets = SEARCHES[name]
    for row in range(len(weight)):
        candidates = [
            literal_grids(weight[row], bits, symmetric, factor, offset)
            for factor in factors
            for offset in ((0,) if symmetric else offsets)
        ]
        least = min(float(loss(exact_error(weight[row : row + 1], grid, bits))) for grid in candidates)
        assert found[row] <= least * (1 + 1e-9)


@pytest.mark.parametrize("share", [0.25, 0.4, 0.7])
@pytest.mark.parametrize("name", ["mse", "hessian"])
def test_weights_on_the_levels_of_a_narrow_range_are_found(name: str, share: float) -> None:
    """All but one weight lie on the four levels of [0, share], many enough to give up the one at 1."""
    levels = share / 3 * torch.arange(4, dtype=torch.float64)
    weight = torch.cat([levels.repeat(500), torch.ones(1, dtype=torch.float64)]).unsqueeze(0)
    grid = GRIDS[name](weight, 2, False, torch.eye(2001, dtype=torch.float64))
    error = exact_error(weight, grid, 2)[0]
    assert error[:-1].abs().max() <= 0.011  # the candidates lie 1 or 2 % of the range apart
    assert error[-1] == pytest.approx(share - 1, abs=0.02)


@pytest.mark.parametrize(("name", "rows"), [("mse", 3400), ("hessian", 6000)])
def test_search_in_chunks_equals_search_at_once(name: str, rows: int) -> None:
    """Enough rows that the candidates do not fit the scratch memory at once; a row's result is that of a small call."""
    weight = random_weight(rows, 64, 9, torch.float32)
    grid = fit(name, weight, 2, False)
    some = slice(rows // 2, rows // 2 + 16)
    part = fit(name, weight[some], 2, False)
    loss = own_loss(name, weight)
    # Equal up to float32 sums in another order, which may swap candidates that are equally good.
    found = loss(exact_error(weight[some], Grid(grid.scales[some], grid.zeros[some]), 2))
    torch.testing.assert_close(found, loss(exact_error(weight[some], part, 2)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_salient_error_falls_as_its_weight_grows(bits: int, seed: int) -> None:
    """argmin of A + t B over a fixed set: B never grows with t (exchange argument), nor is A + t B above min-max's."""
    weight, metric = random_weight(8, 32, seed), metric_of(32, seed)
    mask = salient_mask(weight, metric)
    assert 0 < mask.sum() < mask.numel()

    def losses(grid: Grid) -> tuple[Tensor, Tensor]:
        powered = exact_error(weight, grid, bits).abs() ** 2.4
        return (powered * ~mask).sum(1), (powered * mask).sum(1)

    plain, plain_salient = losses(fit("minmax", weight, bits, False))
    previous = torch.full((8,), float("inf"), dtype=torch.float64)
    for salient_weight in (0.25, 1.0, 4.0, 64.0, 1e6):
        rest, salient = losses(sqc(weight, bits, False, metric, salient_weight))
        assert (salient <= previous * (1 + 1e-9)).all()
        assert (rest + salient_weight * salient <= (plain + salient_weight * plain_salient) * (1 + 1e-9)).all()
        previous = salient


def test_no_salient_element_is_no_error() -> None:
    """Equal magnitudes have no outlier; the search is then that of the plain norm."""
    weight = torch.tensor([[0.5, -0.5, 0.5, -0.5]], dtype=torch.float64)
    metric = torch.eye(4, dtype=torch.float64)
    assert not salient_mask(weight, metric).any()
    light, heavy = (sqc(weight, 2, False, metric, salient_weight) for salient_weight in (1.0, 1e6))
    assert torch.equal(light.scales, heavy.scales)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_shortlist_starts_with_the_best_and_ascends(bits: int, symmetric: bool) -> None:
    weight, metric = random_weight(5, 16, 10), metric_of(16)
    loss = own_loss("hessian", weight)
    best = hessian(weight, bits, symmetric, metric)
    scales, zeros = SHORTLISTS[hessian](weight, bits, symmetric, metric, 6)
    assert scales.shape == zeros.shape == (6, 5)
    losses = torch.stack([loss(exact_error(weight, Grid(*pair), bits)) for pair in zip(scales, zeros, strict=True)])
    assert (losses[0] <= loss(exact_error(weight, best, bits)) * (1 + 1e-9)).all()
    assert (losses.diff(dim=0) >= -1e-9 * losses[0]).all()
    assert torch.equal(scales.half().double(), scales)


# --- the metric ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (4, 8), (3, 5), (8, 12), (0, 12)])
def test_metric_is_the_loss_after_the_later_columns_are_re_optimized(start: int, stop: int) -> None:
    """With L = U_gg^-1, ||e L||^2 = min over y of [e, y] H_FF [e, y]^T, F the columns from ``start`` on.

    The minimum is found numerically, as a least-squares problem in a factor of H_FF = C C^T.
    """
    H = damped(random_hessian(12, seed=6), 0.01)
    U = inverse_factor(H)
    L = torch.linalg.inv(U[start:stop, start:stop])
    errors = random_weight(5, stop - start, 11)
    C = torch.linalg.cholesky(H[start:, start:])
    own, later = C[: stop - start], C[stop - start :]
    if len(later):
        y = torch.linalg.lstsq(later.t(), -(errors @ own).t()).solution.t()
        residual = errors @ own + y @ later
    else:
        residual = errors @ own
    torch.testing.assert_close((errors @ L).square().sum(1), residual.square().sum(1), rtol=1e-10, atol=0)
    # Columns that may still move can only help: never more than the group's own quadratic form.
    assert ((errors @ L).square().sum(1) <= (errors @ own).square().sum(1) * (1 + 1e-12)).all()


def test_metric_diagonal_is_the_salience_weight() -> None:
    """sqc's delta = w^2 / U_cc^2 needs the diagonal of U_gg^-1, which is 1 / U_cc as U is triangular."""
    U = inverse_factor(damped(random_hessian(12, seed=6), 0.01))
    L = torch.linalg.inv(U[4:8, 4:8])
    torch.testing.assert_close(L.diagonal(), 1 / U.diagonal()[4:8], rtol=1e-12, atol=0)


def test_mse_ignores_the_metric() -> None:
    weight = random_weight(3, 8, 12)
    assert torch.equal(mse(weight, 3, False).scales, mse(weight, 3, False, metric_of(8)).scales)
