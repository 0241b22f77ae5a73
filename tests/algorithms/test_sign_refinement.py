"""Signs and scales fitted to the Hessian: every step is the exact minimizer that it says it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import law, random_hessian, random_weight
from torch import Tensor

from quantkit.algorithms.hessian import damped
from quantkit.algorithms.littlebit import Factors, Rank, dual_svid, signs
from quantkit.algorithms.sign_refinement import (
    aligned_start,
    alignment,
    balanced,
    fit_columns,
    fit_latents,
    fit_rows,
    flip_left,
    flip_right,
    objective,
    refine_factors,
)

STEPS = [fit_latents, fit_rows, fit_columns, flip_left, flip_right]
Step = Callable[[Tensor, Tensor, Factors], Factors]


def case(out: int, inputs: int, rank: Rank, seed: int = 0) -> tuple[Tensor, Tensor, Factors]:
    weight = random_weight(out, inputs, seed)
    return weight, damped(random_hessian(inputs, seed), 0.01), dual_svid(weight, rank)


@law
@given(
    st.sampled_from(STEPS),
    st.integers(0, 10_000),
    st.sampled_from([(12, 20), (20, 12), (33, 40), (9, 64)]),
    st.sampled_from([Rank(1, 1), Rank(8, 1), Rank(4, 2), Rank(8, 2)]),
)
def test_no_step_raises_the_objective(step: Step, seed: int, shape: tuple[int, int], rank: Rank) -> None:
    weight, hessian, factors = case(*shape, rank, seed)
    before, after = (objective(weight, hessian, each) for each in (factors, step(weight, hessian, factors)))
    assert after <= before * (1 + 1e-9)


@law
@given(st.integers(0, 10_000), st.sampled_from([Rank(4, 1), Rank(4, 2)]))
def test_rounds_descend(seed: int, rank: Rank) -> None:
    weight, hessian, factors = case(24, 32, rank, seed)
    losses = [float(objective(weight, hessian, refine_factors(weight, hessian, factors, n))) for n in range(4)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("n_paths", [1, 2])
@pytest.mark.parametrize("name", ["latents", "rows", "columns"])
def test_a_scale_step_leaves_no_gradient(name: str, n_paths: int) -> None:
    """At the minimizer of one block of unknowns, the derivative by it vanishes (of the path that was fitted last)."""
    weight, hessian, factors = case(14, 18, Rank(4, n_paths))
    step = {"latents": fit_latents, "rows": fit_rows, "columns": fit_columns}[name]
    fitted = step(weight, hessian, factors)

    def gradient_at(factors: Factors) -> Tensor:
        unknown = getattr(factors, name).clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(weight, hessian, replace(factors, **{name: unknown})), unknown)
        return gradient

    gradient, before = gradient_at(fitted), gradient_at(factors)
    last = gradient if name == "latents" else gradient[-1]
    assert float(last.norm()) < 1e-6 * float(before.norm())


def test_no_single_flip_of_a_converged_row_of_s_helps() -> None:
    weight, hessian, factors = case(8, 16, Rank(6, 1))
    for _ in range(20):
        factors = flip_left(weight, hessian, factors)
    best = objective(weight, hessian, factors)
    for row, rank in itertools.product(range(8), range(6)):
        left = factors.left.clone()
        left[row, rank] *= -1
        assert objective(weight, hessian, replace(factors, left=left)) >= best * (1 - 1e-12)


def test_no_single_flip_of_a_converged_t_helps() -> None:
    weight, hessian, factors = case(8, 16, Rank(6, 1))
    for _ in range(40):
        factors = flip_right(weight, hessian, factors)
    best = objective(weight, hessian, factors)
    for rank, column in itertools.product(range(6), range(16)):
        right = factors.right.clone()
        right[rank, column] *= -1
        assert objective(weight, hessian, replace(factors, right=right)) >= best * (1 - 1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_signs_of_s_are_bounded_by_brute_force(seed: int) -> None:
    """Four ranks, six rows: 16 candidates each. Never below the best, and on average near it."""
    weight, hessian, factors = case(6, 12, Rank(4, 1), seed)
    for _ in range(4):
        found = flip_left(weight, hessian, factors)
        factors = found
    candidates = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
    C = factors.latents.unsqueeze(1) * factors.input_factor()
    best = 0.0
    for row in range(6):
        errors = weight[row] - factors.rows[0, row] * (candidates @ C)
        best += float(((errors @ hessian) * errors).sum(1).min())
    reached = float(objective(weight, hessian, factors))
    assert best * (1 - 1e-9) <= reached <= 1.5 * best


def test_a_start_that_is_the_weight_stays() -> None:
    """A weight that is sign factors already has no error to lower."""
    _, hessian, factors = case(12, 20, Rank(4, 2))
    weight = factors.dense()
    refined = refine_factors(weight, hessian, factors, 2)
    torch.testing.assert_close(refined.dense(), weight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("n_paths", [1, 2])
def test_the_hessian_decides(n_paths: int) -> None:
    """Under an uneven Hessian the refined factors lose less of the output than those of the identity, and reversed."""
    weight, hessian, start = case(40, 32, Rank(8, n_paths))
    identity = torch.eye(32, dtype=torch.float64)
    by_hessian, by_identity = (refine_factors(weight, metric, start, 4) for metric in (hessian, identity))
    assert objective(weight, hessian, by_hessian) < objective(weight, hessian, by_identity)
    assert objective(weight, identity, by_identity) < objective(weight, identity, by_hessian)


def test_dead_rows_and_columns_stay_finite() -> None:
    weight, hessian, _ = case(16, 24, Rank(4, 1))
    weight[3], weight[:, 5] = 0, 0
    for start in (dual_svid(weight, Rank(4, 2)), aligned_start(weight, hessian, Rank(4, 2))):
        refined = refine_factors(weight, hessian, start, 2)
        assert bool(torch.isfinite(refined.dense()).all())
        assert objective(weight, hessian, refined) <= objective(weight, hessian, start) * (1 + 1e-9)


# --- the start ----------------------------------------------------------------------------------------------------


def test_alignment_is_a_rotation_and_repeats() -> None:
    A, B = random_weight(40, 12, 1), random_weight(12, 30, 2)
    R = alignment(A, B, torch.Generator().manual_seed(3))
    torch.testing.assert_close(R @ R.t(), torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-10)
    assert torch.equal(R, alignment(A, B, torch.Generator().manual_seed(3)))


def test_alignment_finds_hidden_signs() -> None:
    """Factors that are a rotation away from signs come back as signs, most of them."""
    generator = torch.Generator().manual_seed(0)
    S = signs(torch.randn(200, 4, generator=generator, dtype=torch.float64))
    Q = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    found = (S @ Q) @ alignment(S @ Q, Q.t() @ S[:60].t(), torch.Generator().manual_seed(0))
    assert float((found.abs() - 1).abs().max()) < 1e-6


def test_the_start_in_the_metric_of_the_hessian_loses_less() -> None:
    """On average over seeds."""
    ratios = []
    for seed in range(8):
        weight, hessian, plain = case(48, 40, Rank(8, 2), seed)
        ratios.append(float(objective(weight, hessian, aligned_start(weight, hessian, Rank(8, 2)))))
        ratios[-1] /= float(objective(weight, hessian, plain))
    assert sum(ratios) / len(ratios) < 0.9


def test_balancing_keeps_the_weight() -> None:
    _, _, factors = case(12, 20, Rank(4, 2))
    uneven = replace(factors, rows=factors.rows * 1e-7, columns=factors.columns * 1e5)
    even = balanced(uneven)
    torch.testing.assert_close(even.dense(), uneven.dense())
    for path in range(2):
        means = (even.rows[path].mean(), even.latents[4 * path : 4 * path + 4].mean(), even.columns[path].mean())
        torch.testing.assert_close(means[0], means[1])
        torch.testing.assert_close(means[0], means[2])
