"""The factor of the inverse Hessian: identities, an independent route, every way in which a Hessian can be broken."""

from __future__ import annotations

import pytest
import torch
from strategies import random_hessian, random_weight

from quantkit.algorithms.hessian import (
    check_finite,
    damped,
    damped_inverse_factor,
    inverse_factor,
    without_dead_columns,
)
from quantkit.errors import NotPositiveDefiniteError, NumericalError

SIZES = [1, 2, 3, 17, 64]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_inverse_is_the_factor_transposed_times_itself(size: int, seed: int) -> None:
    hessian = damped(random_hessian(size, seed), 0.01)
    factor = inverse_factor(hessian)
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() > 0).all()
    # Both triangular steps are backward stable: the residual is at most about size * eps * condition.
    tolerance = size * torch.finfo(torch.float64).eps * float(torch.linalg.cond(hessian))
    residual = factor.t() @ factor @ hessian - torch.eye(size, dtype=torch.float64)
    assert residual.abs().max() <= 4 * tolerance


@pytest.mark.parametrize("size", SIZES)
def test_factor_equals_the_classic_route_through_the_inverse(size: int) -> None:
    """The upper Cholesky factor with positive diagonal is unique, so two routes must meet."""
    hessian = damped(random_hessian(size, seed=7), 0.01)
    classic = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    torch.testing.assert_close(inverse_factor(hessian), classic, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [5, 24])
def test_rows_are_the_inverses_of_the_trailing_hessians(size: int) -> None:
    """Row c of U, times U[c, c], is the first row of the inverse of H[c:, c:]: what one OBS step needs."""
    hessian = damped(random_hessian(size, seed=1), 0.01)
    factor = inverse_factor(hessian)
    for c in range(size):
        first_row = torch.linalg.inv(hessian[c:, c:])[0]
        torch.testing.assert_close(factor[c, c] * factor[c, c:], first_row, rtol=1e-8, atol=1e-12)


def test_factor_of_float32_is_computed_in_float64() -> None:
    """At condition number 1e6 a float32 factorization keeps two digits; the result must be the float64 one, rounded."""
    basis = torch.linalg.qr(random_hessian(48, seed=0)).Q
    hessian = ((basis * torch.logspace(0, -6, 48, dtype=torch.float64)) @ basis.t()).float()
    hessian = (hessian + hessian.t()) / 2
    factor = inverse_factor(hessian)
    assert factor.dtype == torch.float32
    assert torch.equal(factor, inverse_factor(hessian.double()).float())


def test_scaling_the_hessian_by_four_halves_the_factor() -> None:
    hessian = damped(random_hessian(24, seed=2), 0.01)
    assert torch.equal(inverse_factor(4 * hessian), inverse_factor(hessian) / 2)


def test_damping_is_a_fraction_of_the_mean_diagonal() -> None:
    hessian = random_hessian(24, seed=3)
    raised = damped(hessian, 0.25) - hessian
    torch.testing.assert_close(raised, 0.25 * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64))
    assert torch.equal(damped(hessian, 0.0), hessian)


def test_factor_of_an_indefinite_matrix_raises() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        inverse_factor(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))


# --- dead columns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_columns_are_zeroed_and_decoupled(dtype: torch.dtype) -> None:
    weight, hessian = random_weight(4, 23, 0, dtype), random_hessian(23, 0, "dead", dtype)
    kept_weight, kept_hessian = weight.clone(), hessian.clone()
    dead = hessian.diagonal() == 0
    assert dead.sum() == 5
    W, H = without_dead_columns(weight, hessian)
    assert torch.equal(weight, kept_weight)  # arguments are left alone
    assert torch.equal(hessian, kept_hessian)
    assert (W[:, dead] == 0).all()
    assert torch.equal(W[:, ~dead], weight[:, ~dead])
    assert torch.equal(H[~dead][:, ~dead], hessian[~dead][:, ~dead])
    live_mean = hessian.diagonal()[~dead].mean()
    assert torch.equal(H[dead][:, dead], torch.diag(live_mean.expand(5)))
    assert (H[dead][:, ~dead] == 0).all()
    torch.testing.assert_close(H.diagonal().mean(), live_mean)  # so the damping is that of the live columns


def test_factor_of_live_columns_does_not_see_the_dead() -> None:
    """Deleting the dead columns first gives the same factor, hence the same codes."""
    hessian = random_hessian(23, 0, "dead")
    live = hessian.diagonal() > 0
    _, H = without_dead_columns(torch.zeros(1, 23, dtype=torch.float64), hessian)
    factor, _ = damped_inverse_factor(H, 0.01)
    deleted, _ = damped_inverse_factor(hessian[live][:, live], 0.01)
    torch.testing.assert_close(factor[live][:, live], deleted, rtol=1e-12, atol=1e-14)
    assert (factor[live][:, ~live] == 0).all()
    assert (factor[~live][:, live] == 0).all()


def test_nothing_to_do_without_dead_columns() -> None:
    weight, hessian = random_weight(2, 9, 0), random_hessian(9, 0)
    W, H = without_dead_columns(weight, hessian)
    assert W is weight
    assert H is hessian


def test_all_columns_dead() -> None:
    W, H = without_dead_columns(random_weight(2, 6, 0), torch.zeros(6, 6, dtype=torch.float64))
    assert torch.equal(H, torch.eye(6, dtype=torch.float64))
    assert (W == 0).all()


# --- broken Hessians ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["deficient", "duplicated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_hessian_is_damped_more_and_says_so(kind: str, dtype: torch.dtype) -> None:
    hessian = random_hessian(40, 4, kind, dtype)
    indefinite = hessian - 1e-3 * hessian.diagonal().mean() * torch.eye(40, dtype=dtype)  # rounding, made certain
    factor, damping = damped_inverse_factor(indefinite, 0.0)
    assert damping > 0
    assert torch.equal(factor, inverse_factor(damped(indefinite, damping)))
    with pytest.raises(torch.linalg.LinAlgError):  # the damping before the one that is reported had failed
        inverse_factor(damped(indefinite, damping / 2))


@pytest.mark.parametrize("kind", ["deficient", "duplicated", "dead"])
def test_singular_hessian_passes_with_the_default_damping(kind: str) -> None:
    hessian = random_hessian(40, 5, kind, torch.float32)
    _, hessian = without_dead_columns(torch.zeros(1, 40), hessian)
    factor, damping = damped_inverse_factor(hessian, 0.01)
    assert damping == 0.01
    assert torch.isfinite(factor).all()


def test_hopeless_hessian_raises_with_the_last_damping_tried() -> None:
    """Eigenvalue -99 against a mean diagonal of 1: ten doublings from 0.01 end at 5.12."""
    hopeless = torch.tensor([[1.0, 100.0], [100.0, 1.0]])
    message = r"not positive definite at damping 5\.12; use more calibration text or --set damping=1"
    with pytest.raises(NotPositiveDefiniteError, match=message):
        damped_inverse_factor(hopeless, 0.01)
    with pytest.raises(NotPositiveDefiniteError, match=r"at damping 0\.0256"):
        damped_inverse_factor(hopeless, 0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (1, 2)])
def test_nan_and_inf_are_refused(bad: float, place: tuple[int, int]) -> None:
    hessian = random_hessian(4, 0, dtype=torch.float32)
    check_finite(hessian)
    hessian[place] = bad
    message = "the Hessian holds NaN or Inf: calibration activations overflowed; use --dtype float32"
    with pytest.raises(NumericalError, match=message):
        check_finite(hessian)
    with pytest.raises(NumericalError, match=message):
        without_dead_columns(torch.zeros(1, 4), hessian)
