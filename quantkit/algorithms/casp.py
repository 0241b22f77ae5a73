"""CASP: query and key projections as low-rank factors; the bytes that this saves go to the blocks that matter.

Paper      Gholami et al. 2025, arXiv:2503.05936. Factors: whitened SVD, as in SVD-LLM (arXiv:2403.07378).
Minimizes  ||X (W - up down)^T||^2 over factors of one rank: with H = L L^T (H a multiple of X^T X) it is
           ||(W - up down) L||^2, and the truncated SVD of W L is the optimum (Eckart, Young).
Allocates  the least sum of losses under a budget in bytes: what storing a block at the lowest width, or its queries and
           keys as factors, does to the model's predictions, measured, and 4^-b of it for other widths
           (rate-distortion); `layerwise.marginal_widths` spends the bytes.
Needs      the Hessian of the projections' inputs.
Cost       one Cholesky [in, in] and one SVD [out, in] per projection, in float64.
Deviates   The paper's allocation and importance are not public; these are ours (pipeline/measure.py), and they decide
           too in which blocks factors pay; the paper has them in all. Where keys have fewer heads than queries the
           factors stay separate. `down` is quantized first, `up` is then fitted anew by least squares to the quantized
           one and quantized with the Hessian D H D^T of its own inputs (the authors' code uses the unquantized factor
           there). An orthogonal mixing of the latents, exact before quantization, spreads the singular values; the
           split with the lesser loss is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.algorithms.hessian import damped, without_dead_columns
from quantkit.errors import NotPositiveDefiniteError, RequestError
from quantkit.formats.grouped_int import GroupedInt
from quantkit.formats.low_rank import LowRank

_DAMPING = 1e-6  # of the whitening, as a fraction of mean(diag(H)); ten times more until the Cholesky succeeds
_RETRIES = 6
_NEGLIGIBLE = 0.1  # of the uniform probability: attention below it counts as none

SolveFactor = Callable[[Tensor, Tensor], GroupedInt]  # (weight, Hessian of its inputs) -> codes


class Factors(NamedTuple):
    """``up [out, rank]`` with orthonormal columns, ``down [rank, in]``, float32, and the share of the output lost."""

    up: Tensor
    down: Tensor
    lost: float  # ||X (W - up down)^T||^2 / ||X W^T||^2, with the damped Hessian


def rank_of(out_features: int, in_features: int, keep_ratio: float) -> int:
    """Rank whose factors hold at most ``keep_ratio`` of the weights, a multiple of 32 (128 from there on; else of 8).

    Raises:
        RequestError: less than 8 remain.

    >>> rank_of(4096, 4096, 0.25), rank_of(512, 512, 0.25), rank_of(256, 512, 0.25), rank_of(64, 64, 0.25)
    (512, 64, 32, 8)
    """
    exact = int(out_features * in_features * keep_ratio / (out_features + in_features))
    step = next((step for step in (128, 32, 8) if exact >= step), 0)
    if not step:
        raise RequestError(
            f"keep_ratio={keep_ratio:g} leaves a rank of {exact} of a {out_features} x {in_features} weight; raise it"
        )
    return exact // step * step


def whitened_factors(weight: Tensor, hessian: Tensor, rank: int) -> Factors:
    """The best factors of one rank for the calibration inputs.

    Args:
        weight: float ``[out_features, in_features]``.
        hessian: float ``[in_features, in_features]``, any positive multiple of X^T X.
        rank: at most min(out_features, in_features).

    Raises:
        NotPositiveDefiniteError: no damping up to 1 made the Hessian positive definite.
        NumericalError: NaN or Inf in it.
    """
    live, H = without_dead_columns(weight.double(), hessian.double())
    root = _root(H)
    left, singular, right = torch.linalg.svd(live @ root, full_matrices=False)
    scaled = singular[:rank, None] * right[:rank]
    down = torch.linalg.solve_triangular(root, scaled, upper=False, left=False)  # scaled root^-1
    energy = singular.square()
    lost = float(energy[rank:].sum() / energy.sum().clamp_min(1e-300))
    return Factors(left[:, :rank].float(), down.float(), lost)


def _root(hessian: Tensor) -> Tensor:
    """L, lower triangular, L L^T = H + damping."""
    fraction = _DAMPING
    for _ in range(_RETRIES + 1):
        factor, failed = torch.linalg.cholesky_ex(damped(hessian, fraction))
        if not int(failed):
            root: Tensor = factor
            return root
        fraction *= 10
    raise NotPositiveDefiniteError("casp: the Hessian is not positive definite; use more calibration samples")


def quantized_factors(
    weight: Tensor,
    hessian: Tensor,
    rank: int,
    solve_down: SolveFactor,
    solve_up: SolveFactor,
) -> LowRank:
    """Factorize and quantize: the latents as they come or mixed, whichever loses less.

    Args:
        weight: float32 ``[out_features, in_features]``.
        hessian: float32 ``[in_features, in_features]``, (2 / n_tokens) X^T X.
        rank: see `rank_of`.
        solve_down, solve_up: quantize the factors.
    """
    factors = whitened_factors(weight, hessian, rank)
    candidates = []
    for mixing in (None, _mixing(rank).to(weight.device)):
        down = factors.down if mixing is None else mixing @ factors.down
        stored_down = solve_down(down, hessian)
        D = stored_down.dequantize()
        latent_hessian = D @ hessian @ D.t()
        up = _least_squares(weight @ hessian @ D.t(), latent_hessian)
        candidate = LowRank(down=stored_down, up=solve_up(up, latent_hessian))
        error = candidate.dequantize() - weight
        candidates.append((float((error @ hessian).mul_(error).sum()), candidate))
    return min(candidates, key=lambda pair: pair[0])[1]


def _mixing(rank: int) -> Tensor:
    """A seeded orthogonal matrix: independent of weights and device, so that the same run gives the same bytes."""
    normal = torch.randn(rank, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    orthogonal: Tensor = q * r.diagonal().sign()
    return orthogonal.float()


def _least_squares(target: Tensor, hessian: Tensor) -> Tensor:
    """``target H^-1`` with a little damping, in float64."""
    root = _root(hessian.double())
    solution: Tensor = torch.cholesky_solve(target.double().t(), root)
    return solution.t().float()


def expected_losses(lowest: float, widths: Sequence[int]) -> list[float]:
    """The rate-distortion law: ``lowest 4^-(b - b_0)`` for each width, from the loss measured at the first one.

    >>> expected_losses(0.32, [2, 3, 4])
    [0.32, 0.08, 0.02]
    """
    return [lowest * 4.0 ** (widths[0] - bits) for bits in widths]


def attention_density(probabilities: Tensor) -> float:
    """Share of the causal entries of attention maps that are not negligible: at least a tenth of uniform attention.

    Args:
        probabilities: float ``[heads, n_tokens, n_tokens]``, rows sum to 1.

    >>> attention_density(torch.ones(1, 4, 4).tril() / torch.arange(1, 5).unsqueeze(1))
    1.0
    """
    n_tokens = probabilities.shape[-1]
    row = torch.arange(1, n_tokens + 1, device=probabilities.device).unsqueeze(1)
    causal = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=probabilities.device).tril()
    kept = (probabilities * row >= _NEGLIGIBLE) & causal
    return float(kept.sum() / (len(probabilities) * causal.sum()))


def redundancy(rows: Tensor) -> float:
    """Mean cosine between different rows: 1 when all point the same way, about 0 when they share nothing.

    Args:
        rows: float ``[n, hidden]``, n at least 2.
    """
    units = torch.nn.functional.normalize(rows.double(), dim=1)
    n = len(units)
    return float((units.sum(0).square().sum() - n) / (n * (n - 1)))
