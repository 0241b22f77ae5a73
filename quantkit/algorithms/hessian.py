"""Second-order statistics of a linear's inputs, prepared for the solvers.

H = (2 / n_tokens) X^T X, X [n_tokens, in_features]. Solvers need U, the upper triangular factor with H^-1 = U^T U:
row c of U holds everything that the update after quantizing column c needs (GPTQ, arXiv:2210.17323, section 3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.errors import NotPositiveDefiniteError, NumericalError

_RETRIES = 10


def check_finite(hessian: Tensor) -> None:
    """Raise `NumericalError` when the Hessian holds NaN or Inf; no damping cures that."""
    if not torch.isfinite(hessian).all():
        raise NumericalError("the Hessian holds NaN or Inf: calibration activations overflowed; use --dtype float32")


def without_dead_columns(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Decouple input channels that were never active (``H[c, c] == 0``).

    Args:
        weight: float ``[out, in]``.
        hessian: float ``[in, in]``.

    Returns:
        (weight, hessian), the arguments themselves if no column is dead. Dead columns of the weight become 0 (they
        multiply zeros, and 0 is on every integer grid), their diagonal the mean of the live ones, so that they change
        neither factor nor damping.

    Raises:
        NumericalError: the Hessian holds NaN or Inf (activations overflowed).
    """
    check_finite(hessian)
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    if not dead.any():
        return weight, hessian
    live_mean = diagonal[~dead].mean() if not dead.all() else diagonal.new_ones(())
    weight = weight.masked_fill(dead, 0.0)
    hessian = hessian + torch.diag(torch.where(dead, live_mean, torch.zeros_like(diagonal)))
    return weight, hessian


def damped(hessian: Tensor, damping: float) -> Tensor:
    """``H + damping * mean(diag H) * I``; ``damping`` is a fraction of the mean diagonal."""
    return hessian + torch.diag((damping * hessian.diagonal().mean()).expand(hessian.shape[0]))


def inverse_factor(hessian: Tensor) -> Tensor:
    """U ``[in, in]``, upper triangular with positive diagonal and ``H^-1 = U^T U``, from one Cholesky of flipped H.

    Computed in float64 (the factor of a Hessian with condition number 1e6 has only two good digits in float32) and
    returned in the dtype of ``hessian``.

    Raises:
        torch.linalg.LinAlgError: H is not positive definite.
    """
    flipped = hessian.to(torch.float64).flip(0, 1)
    upper = torch.linalg.cholesky(flipped).flip(0, 1)  # H = R R^T, R upper
    identity = torch.eye(hessian.shape[0], dtype=torch.float64, device=hessian.device)
    factor: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return factor.to(hessian.dtype)


def damped_inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """`inverse_factor` of the damped Hessian; a failed Cholesky is retried with twice the damping.

    Returns:
        (U, the damping that succeeded, as a fraction of the mean diagonal).

    Raises:
        NotPositiveDefiniteError: no damping helped.
    """
    fraction = damping
    for _ in range(_RETRIES):
        try:
            factor = inverse_factor(damped(hessian, fraction))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            fraction = max(2 * fraction, 1e-4)
            continue
        if torch.isfinite(factor).all():
            return factor, fraction
        fraction = max(2 * fraction, 1e-4)
    raise NotPositiveDefiniteError(
        f"the Hessian is not positive definite at damping {fraction / 2:g}; "
        "use more calibration text or --set damping=1"
    )
