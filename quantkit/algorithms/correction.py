"""Asymmetric calibration: aim at the float model's outputs from the quantized prefix's inputs.

Paper      Li et al., GPTAQ, arXiv:2504.02692 (the objective); the closed form and the partial strength are ours.
Minimizes  ||X~ W^T - X Q^T||^2, X~ [n_tokens, in] the linear's inputs in the float model and X those behind the
           quantized prefix. Its real-valued minimizer is W C H^-1 with C = X~^T X and H = X^T X, so any solver that
           minimizes tr((T - Q) H (T - Q)^T) for a target T does the rest.
Deviates   ``strength`` moves only part of the way from W to that minimizer. All the way overfits small calibration
           sets: it repairs errors of the prefix that other text will not show (docs/log.md, 2026-11-22).
Needs      the Hessian, and the cross product of float and quantized inputs over the same tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.algorithms.hessian import damped_inverse_factor, without_dead_columns


def corrected_target(weight: Tensor, hessian: Tensor, cross: Tensor, strength: float, damping: float) -> Tensor:
    """``W + strength * W (C - H) (H + lambda I)^-1``.

    Args:
        weight: float32 or float64 ``[out_features, in_features]``.
        hessian: ``[in_features, in_features]``, (2 / n_tokens) X^T X.
        cross: same shape and factor, (2 / n_tokens) X~^T X.
        strength: 0 returns the weight, 1 the least-squares target.
        damping: lambda as a fraction of mean(diag(H)); pulls the target towards the weight.

    Returns:
        The target, float ``[out_features, in_features]``.
    """
    if strength == 0:
        return weight
    W, H = without_dead_columns(weight, hessian)
    U, _ = damped_inverse_factor(H, damping)
    drift = cross - hessian  # zero where the prefix changed nothing, and in dead columns
    factor = U.to(torch.float64)
    step = ((W @ drift).to(torch.float64) @ factor.t()) @ factor  # (A U^T) U = A H^-1
    return W + strength * step.to(W.dtype)
