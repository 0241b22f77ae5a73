"""PTQ1.61: the mask, exact scale steps against least squares, signs against brute force, and what never rises."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import ROW_KINDS, law, output_loss, random_hessian, random_weight
from torch import Tensor

from quantkit.algorithms.grids import GRIDS, minmax, quantize
from quantkit.algorithms.hessian import damped
from quantkit.algorithms.ptq161 import (
    Parts,
    PTQ161Config,
    descend,
    n_salient,
    objective,
    plain,
    ptq161,
    rank_one_scales,
    refit_columns,
    refit_rows,
    salience,
    salient_mask,
)
from quantkit.errors import NumericalError
from quantkit.formats.sign_salient import pack, unpack

OUT, IN, K = 6, 24, 5


def problem(seed: int, out: int = OUT, features: int = IN, k: int = K) -> tuple[Tensor, Tensor, Parts]:
    """A weight, a damped metric, and parts that no one has fitted: random signs, scales of about the right size."""
    generator = torch.Generator().manual_seed(seed)
    weight = random_weight(out, features, seed)
    hessian = damped(random_hessian(features, seed), 0.01)
    parts = plain(weight, hessian, k, 4, GRIDS["minmax"])
    signs = torch.where(torch.rand(parts.signs.shape, generator=generator) < 0.2, -parts.signs, parts.signs)
    r = (0.5 + torch.rand(features - k, generator=generator, dtype=torch.float64)).half().double()
    return weight, hessian, replace(parts, signs=signs, r=r)


def solve(weight: Tensor, hessian: Tensor, mask: Tensor, **settings: object) -> Tensor:
    config = PTQ161Config(**settings)  # type: ignore[arg-type]
    return ptq161(weight, hessian, mask, GRIDS["hessian"], config).weight.dequantize()


# --- the mask -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.floats(1, 4), st.integers(0, 2**31))
@law
def test_the_mask_has_exactly_k_columns_and_takes_the_largest(size: int, bits: float, seed: int) -> None:
    statistic = torch.randint(0, 5, (size,), generator=torch.Generator().manual_seed(seed)).float()  # many ties
    k = n_salient(size, bits, 4)
    mask = salient_mask(statistic, k)
    assert int(mask.sum()) == k <= size - 1 or size == 1
    if k > 0:
        assert statistic[mask].min() >= statistic[~mask].max()
        edge = statistic[mask].min()
        tied = (statistic == edge).nonzero().flatten()
        chosen = mask[tied]
        assert torch.equal(chosen, chosen.sort(descending=True, stable=True).values)  # the first of equal ones
    assert torch.equal(mask, salient_mask(8 * statistic, k))


@pytest.mark.parametrize(
    ("features", "bits", "salient_bits", "expected"),
    [(4096, 1.6, 4, 819), (512, 1.6, 4, 102), (512, 1.6, 2, 307), (10, 1, 4, 0), (10, 4, 4, 9), (1, 4, 4, 0)],
)
def test_how_many_columns_a_width_pays_for(features: int, bits: float, salient_bits: int, expected: int) -> None:
    assert n_salient(features, bits, salient_bits) == expected


@pytest.mark.parametrize("kind", ["absmax", "rms", "hessian"])
def test_a_channel_of_hundredfold_activation_is_salient(kind: str) -> None:
    inputs = torch.randn(64, IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inputs[:, 17] *= 100
    hessian, weight = inputs.t() @ inputs * (2 / 64), random_weight(OUT, IN, 3)
    assert salient_mask(salience(kind, weight, hessian, inputs.abs().amax(0)), 1).nonzero().item() == 17


def test_hessian_salience_is_what_the_objective_loses_without_the_channel() -> None:
    weight, hessian = random_weight(OUT, IN, 5), random_hessian(IN, 5)
    for column in (0, 7, IN - 1):
        without = weight.clone()
        without[:, column] = 0
        expected = output_loss(weight, without, hessian).sum()
        torch.testing.assert_close(salience("hessian", weight, hessian)[column], expected)


# --- the paper's start --------------------------------------------------------------------------------------------


def test_plain_signs_scales_and_means_are_the_papers() -> None:
    weight = random_weight(OUT, IN, 1).half().double()
    parts = plain(weight, torch.eye(IN, dtype=torch.float64), K, 4, GRIDS["minmax"])
    binary, rest = weight[:, :-K], weight[:, -K:]
    assert torch.equal(parts.mu, binary.mean(1).half().double())
    assert torch.equal(parts.alpha, binary.abs().mean(1).half().double())
    assert torch.equal(parts.signs > 0, binary >= parts.mu[:, None])
    assert torch.equal(parts.r, torch.ones(IN - K, dtype=torch.float64))
    grid = minmax(rest, 4, False)
    assert torch.equal(parts.codes, quantize(rest, grid, 4))
    assert torch.equal(parts.scales, grid.scales)
    assert torch.equal(parts.zeros, grid.zeros)


def test_mean_magnitude_is_the_least_squares_scale_of_rows_without_mean() -> None:
    half = random_weight(OUT, 12, 2)
    weight = torch.cat([half, -half], 1)  # mu = 0
    parts = plain(weight, torch.eye(24, dtype=torch.float64), 0, 4, GRIDS["minmax"])
    fitted = (weight * parts.signs).sum(1) / 24
    torch.testing.assert_close(parts.alpha, fitted, rtol=2**-11, atol=0)


def test_without_salient_columns_nothing_is_stored_of_them() -> None:
    weight, hessian = random_weight(OUT, IN, 4), random_hessian(IN, 4)
    none = torch.zeros(IN, dtype=torch.bool)
    solution = ptq161(weight, hessian, none, GRIDS["hessian"], PTQ161Config(compensate=False, rounds=0))
    assert solution.weight.salient is None
    assert solution.weight.salient_mask is None
    mu, alpha = weight.mean(1, keepdim=True), weight.abs().mean(1, keepdim=True)
    expected = torch.where(weight >= mu, alpha, -alpha) + mu
    torch.testing.assert_close(solution.weight.dequantize().double(), expected, rtol=2**-9, atol=2**-10)


# --- exact steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_rows_are_refitted_to_the_least_squares_solution(seed: int) -> None:
    weight, hessian, parts = problem(seed)
    n, factor = IN - K, torch.linalg.cholesky(hessian)  # ||e factor||^2 = e H e^T
    refitted = refit_rows(weight, hessian, parts)
    for row in range(OUT):
        basis = torch.zeros(3, IN, dtype=torch.float64)
        basis[0, :n] = parts.r * parts.signs[row]
        basis[1, :n] = parts.r
        basis[2, n:] = parts.codes[row] - parts.zeros[row]
        system, target = (basis @ factor).t(), weight[row] @ factor
        exact = torch.linalg.lstsq(system, target.unsqueeze(1)).solution.flatten()
        scale = exact[2] if 0.2 < exact[2] / parts.scales[row] < 5 else parts.scales[row]  # integers need positive ones
        torch.testing.assert_close(refitted.scales[row], scale, rtol=2**-11 + 1e-5, atol=0)
        left = (target - system[:, 2] * refitted.scales[row]).unsqueeze(1)
        exact = torch.linalg.lstsq(system[:, :2], left).solution.flatten()
        found = torch.stack([refitted.alpha[row], refitted.mu[row]])
        torch.testing.assert_close(found, exact, rtol=2**-11 + 1e-5, atol=2e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("seed", range(6))
def test_columns_are_refitted_to_the_least_squares_solution(seed: int) -> None:
    weight, hessian, parts = problem(seed)
    n, factor = IN - K, torch.linalg.cholesky(hessian)
    Z = torch.zeros(OUT, IN, dtype=torch.float64)
    Z[:, :n] = parts.alpha[:, None] * parts.signs + parts.mu[:, None]
    rest = parts.values()
    rest[:, :n] = 0
    system = torch.cat([(torch.diag(Z[row]) @ factor)[:n].t() for row in range(OUT)])
    target = torch.cat([(weight[row] - rest[row]) @ factor for row in range(OUT)])
    exact = torch.linalg.lstsq(system, target.unsqueeze(1)).solution.flatten()
    found = refit_columns(weight, hessian, parts).r
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


@pytest.mark.parametrize("seed", range(12))
def test_no_step_raises_the_objective(seed: int) -> None:
    weight, hessian, parts = problem(seed)
    rows = objective(weight, hessian, parts)
    for step in (refit_rows, refit_columns, descend, refit_rows, refit_columns, descend):
        parts = step(weight, hessian, parts)
        now = objective(weight, hessian, parts)
        assert now.sum() <= rows.sum() * (1 + 1e-12)
        if step is not refit_columns:  # rows share the column scales, all else is their own
            assert (now <= rows * (1 + 1e-12)).all()
        rows = now


@pytest.mark.parametrize("seed", range(4))
def test_blocks_of_the_descent_give_the_literal_sweep(seed: int) -> None:
    weight, hessian, parts = problem(seed, features=150, k=20)
    swept, n = descend(weight, hessian, parts), 130
    signs, codes = parts.signs.clone(), parts.codes.clone()
    for c in range(150):
        error = replace(parts, signs=signs, codes=codes).values() - weight
        best = weight[:, c] - (error @ hessian[:, c] - error[:, c] * hessian[c, c]) / hessian[c, c]
        if c < n:
            levels = parts.r[c] * (parts.alpha[:, None] * torch.tensor([-1.0, 1.0]) + parts.mu[:, None])
            distance = (levels - best[:, None]).abs()
            signs[:, c] = torch.where(distance[:, 1] <= distance[:, 0], 1.0, -1.0)
        else:
            codes[:, c - n] = (best / parts.scales + parts.zeros).round().clamp(0, 15)
    assert torch.equal(swept.signs, signs)
    assert torch.equal(swept.codes, codes)


def all_signs(n: int) -> Tensor:
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(6))
def test_brute_force_over_all_signs_bounds_the_descent(seed: int) -> None:
    weight, hessian, parts = problem(seed, out=3, features=8, k=0)
    for _ in range(5):
        parts = descend(weight, hessian, parts)
    for row in range(3):
        candidates = parts.r * (parts.alpha[row] * all_signs(8) + parts.mu[row])
        best = ((candidates - weight[row]) @ hessian * (candidates - weight[row])).sum(1).min()
        assert objective(weight, hessian, parts)[row] >= best * (1 - 1e-12)


def test_with_independent_channels_one_sweep_finds_the_best_signs() -> None:
    weight, _, parts = problem(7, out=4, features=8, k=0)
    hessian = random_hessian(8, 7, "diagonal")
    swept = descend(weight, hessian, parts)
    for row in range(4):
        candidates = parts.r * (parts.alpha[row] * all_signs(8) + parts.mu[row])
        best = ((candidates - weight[row]) @ hessian * (candidates - weight[row])).sum(1).min()
        torch.testing.assert_close(objective(weight, hessian, swept)[row], best)


def test_rank_one_scales_recover_a_product() -> None:
    generator = torch.Generator().manual_seed(0)
    a, r = (0.5 + torch.rand(size, generator=generator, dtype=torch.float64) for size in (OUT, IN))
    signs = torch.where(torch.rand(OUT, IN, generator=generator) < 0.5, -1.0, 1.0)
    found = rank_one_scales(a[:, None] * signs * r)
    torch.testing.assert_close(found, r / r.mean(), rtol=2**-11, atol=0)


# --- the whole ----------------------------------------------------------------------------------------------------


def test_rounds_only_help() -> None:
    weight, hessian = random_weight(16, 64, 9), random_hessian(64, 9)
    mask = salient_mask(salience("hessian", weight, hessian), 13)
    losses = [ptq161(weight, hessian, mask, GRIDS["hessian"], PTQ161Config(rounds=rounds)).loss for rounds in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[3] < losses[0]


def test_compensation_halves_the_loss_on_average() -> None:
    """Correlated channels: what plain signs get wrong in one, compensated signs and 4-bit codes make up for."""
    ratios = []
    for seed in range(8):
        weight, hessian = random_weight(32, 64, seed), random_hessian(64, seed)
        mask = salient_mask(salience("hessian", weight, hessian), 13)
        signs, compensated = (
            float(output_loss(weight, solve(weight, hessian, mask, compensate=way, rounds=0), hessian).sum())
            for way in (False, True)
        )
        ratios.append(compensated / signs)
    assert sum(ratios) / len(ratios) < 0.5


@given(
    st.lists(st.sampled_from(sorted(ROW_KINDS)), min_size=1, max_size=4),
    st.integers(0, 2**31),
    st.booleans(),
    st.integers(2, 8),
)
@example(["one outlier", "below every scale", "large"], 0, True, 2)  # candidates wider than float16
@law
def test_troublesome_rows_are_stored_exactly_as_solved(
    kinds: list[str], seed: int, compensate: bool, bits: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.stack([ROW_KINDS[kind](IN, generator) for kind in kinds]).float()
    kind = ("full", "deficient", "duplicated", "dead", "diagonal")[seed % 5]
    hessian = random_hessian(IN, seed, kind, torch.float32)
    mask = salient_mask(salience("hessian", weight, hessian), seed % (IN - 1))
    solved = ptq161(
        weight, hessian, mask, GRIDS["hessian"], PTQ161Config(compensate=compensate, salient_bits=bits)
    ).weight
    assert torch.isfinite(solved.dequantize()).all()
    assert torch.equal(unpack(solved.spec(), pack(solved)).dequantize(), solved.dequantize())
    stored = pack(solved)
    assert sum(tensor.numel() * tensor.itemsize for tensor in stored.values()) == solved.spec().n_bytes


def test_rows_of_zeros_stay_small() -> None:
    weight, hessian = random_weight(OUT, IN, 2), random_hessian(IN, 2)
    weight[1] = 0
    mask = salient_mask(hessian.diagonal(), K)
    for compensate in (False, True):
        assert solve(weight, hessian, mask, compensate=compensate)[1].abs().max() < 1e-5


@pytest.mark.parametrize("name", ["weight", "hessian"])
def test_not_a_number_is_refused(name: str) -> None:
    weight, hessian = random_weight(OUT, IN, 2), random_hessian(IN, 2)
    (weight if name == "weight" else hessian)[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=f"the {name}|the Hessian holds NaN"):
        solve(weight, hessian, torch.arange(IN) < K)


def test_weights_beyond_float16_are_refused() -> None:
    weight = torch.full((OUT, IN), 1e6, dtype=torch.float64)
    with pytest.raises(NumericalError, match="does not fit float16"):
        solve(weight, random_hessian(IN, 2), torch.arange(IN) < K, compensate=False, rounds=0)


def test_nothing_depends_on_the_unit_of_the_hessian() -> None:
    weight, hessian = random_weight(OUT, IN, 6), random_hessian(IN, 6)
    mask = salient_mask(salience("hessian", weight, hessian), K)
    assert torch.equal(solve(weight, hessian, mask), solve(weight, 1024 * hessian, mask))


def test_same_inputs_same_bytes_and_arguments_untouched() -> None:
    weight, hessian = random_weight(OUT, IN, 8, torch.float32), random_hessian(IN, 8, dtype=torch.float32)
    mask = salient_mask(hessian.diagonal(), K)
    copies = [item.clone() for item in (weight, hessian, mask)]
    first, second = (pack(ptq161(weight, hessian, mask, GRIDS["hessian"], PTQ161Config()).weight) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(item, copy) for item, copy in zip((weight, hessian, mask), copies, strict=True))
