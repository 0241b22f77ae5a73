"""LittleBit: a weight as the product of two sign matrices with three scale vectors, from 1 down to 0.1 bits per weight.

Paper      Lee, Kim, You, Kim, *LittleBit: Ultra Low-Bit Quantization via Latent Factorization*, arXiv:2506.13771.
Form       W ~ diag(h) S diag(l) T diag(g), summed over one or two paths (the second is the residual's): S [out, r] and
           T [r, in] of +1 and -1; h = u1 and g = v2 per row and column; l = u2 v1, one number per latent rank.
Start      Dual-SVID: signs of the factors A = U sqrt(S) and B = sqrt(S) V^T of the SVD; scales from the best rank-one
           approximations of |A| and |B|; the same again on what is left.
Training   the signs by a surrogate gradient (`smooth_sign`), in quantkit/pipeline/distill.py.
Deviates   exact SVD (the authors' code: randomized, without oversampling); ranks are solved for the bytes of the whole
           model, not rounded down linear by linear; one path where a target leaves no room for two.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import NumericalError, RequestError

RANK_STEP = 8  # a row of packed signs ends on a byte
_POWER_ROUNDS = 20
SMOOTHNESS = 100.0  # a of `smooth_sign`, the authors' choice
LATENT_SIZE = 0.02  # mean magnitude where training starts: 2 / a


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """A factorized weight. The paths lie side by side: the ranks of the first one come first.

    Attributes:
        left: float ``[out, n_paths * rank]``, +1 and -1: S.
        right: float ``[n_paths * rank, in]``, +1 and -1: T.
        rows: float ``[n_paths, out]``: h.
        latents: float ``[n_paths * rank]``: l.
        columns: float ``[n_paths, in]``: g.
    """

    left: Tensor
    right: Tensor
    rows: Tensor
    latents: Tensor
    columns: Tensor

    @property
    def n_paths(self) -> int:
        return len(self.rows)

    @property
    def path_of_rank(self) -> Tensor:
        """int64 ``[n_paths * rank]``: which path a rank belongs to."""
        n = self.latents.numel()
        return torch.arange(n, device=self.latents.device) * self.n_paths // n

    def output_factor(self) -> Tensor:
        """diag(h) S, ``[out, n_paths * rank]``."""
        return self.left * self.rows[self.path_of_rank].t()

    def input_factor(self) -> Tensor:
        """T diag(g), ``[n_paths * rank, in]``."""
        return self.right * self.columns[self.path_of_rank]

    def dense(self) -> Tensor:
        """The weight ``[out, in]``."""
        return (self.output_factor() * self.latents) @ self.input_factor()


@dataclass(frozen=True, slots=True)
class Rank:
    """What a linear gets: ``n_paths`` times ``rank``."""

    rank: int
    n_paths: int


def solve_ranks(
    shapes: Sequence[tuple[int, int]], bits: float, n_paths: int, n_bytes: Callable[[int, int, Rank], int]
) -> list[Rank]:
    """Ranks whose stored bytes come to at most ``bits`` per weight over all linears, spread evenly.

    Every linear starts at the smallest rank; then the one with the fewest stored bits per weight gets `RANK_STEP` more,
    until no step fits. With two paths, a linear for which two of the smallest rank exceed the target gets one.

    Args:
        shapes: (out_features, in_features) of each linear.
        bits: stored bits per weight, scales counted.
        n_paths: 1, or 2 with the residual.
        n_bytes: (out_features, in_features, rank) -> stored bytes.

    Raises:
        RequestError: the smallest ranks take more; names the least possible bits.

    >>> solve_ranks([(512, 512)], 1.0, 2, lambda o, i, r: r.n_paths * (r.rank * (o + i + 16) + 16 * (o + i)) // 8)
    [Rank(rank=104, n_paths=2)]
    """
    budget = int(bits * sum(rows * columns for rows, columns in shapes)) // 8
    ranks = []
    for shape in shapes:
        two = Rank(RANK_STEP, 2)
        fits = n_paths == 2 and 8 * n_bytes(*shape, two) <= bits * shape[0] * shape[1]
        ranks.append(two if fits else Rank(RANK_STEP, 1))
    sizes = [n_bytes(*shape, rank) for shape, rank in zip(shapes, ranks, strict=True)]
    left = budget - sum(sizes)
    if left < 0:
        single = [n_bytes(*shape, Rank(RANK_STEP, 1)) for shape in shapes]
        least = 8 * sum(single) / sum(rows * columns for rows, columns in shapes)
        if sum(single) > budget:
            raise RequestError(
                f"{bits:g} bits per weight is less than these layers can be stored in: their scales and a rank of "
                f"{RANK_STEP} take {least:.3f}; use --bits {_rounded_up(least)} or more"
            )
        return solve_ranks(shapes, bits, 1, n_bytes)
    waiting = [
        (size / (rows * columns), index)
        for index, (size, (rows, columns)) in enumerate(zip(sizes, shapes, strict=True))
    ]
    heapq.heapify(waiting)
    while waiting:
        _, index = heapq.heappop(waiting)
        shape, rank = shapes[index], ranks[index]
        larger = Rank(rank.rank + RANK_STEP, rank.n_paths)
        step = n_bytes(*shape, larger) - sizes[index]
        if step > left or larger.rank > min(shape):
            continue  # budgets only shrink: a step that does not fit never will
        ranks[index], sizes[index], left = larger, sizes[index] + step, left - step
        heapq.heappush(waiting, (sizes[index] / (shape[0] * shape[1]), index))
    return ranks


def _rounded_up(bits: float) -> str:
    return f"{-(-bits * 1000 // 1) / 1000:g}"


def dual_svid(weight: Tensor, rank: Rank) -> Factors:
    """The paper's start: Dual-SVID of the weight, and of the residual for a second path.

    Args:
        weight: float ``[out_features, in_features]``.
        rank: at most ``min(weight.shape)``.

    Raises:
        NumericalError: NaN or Inf in the weight.
    """
    check_weight(weight)
    remaining, paths = weight, []
    for _ in range(rank.n_paths):
        path = _single_path(remaining, rank.rank)
        paths.append(path)
        remaining = remaining - path.dense()
    return join_paths(paths)


def check_weight(weight: Tensor) -> None:
    """Raise `NumericalError` when the weight holds NaN or Inf."""
    if not torch.isfinite(weight).all():
        raise NumericalError("the weight holds NaN or Inf; the checkpoint is damaged")


def join_paths(paths: Sequence[Factors]) -> Factors:
    """Paths side by side."""
    return Factors(
        left=torch.cat([path.left for path in paths], 1),
        right=torch.cat([path.right for path in paths]),
        rows=torch.cat([path.rows for path in paths]),
        latents=torch.cat([path.latents for path in paths]),
        columns=torch.cat([path.columns for path in paths]),
    )


def _single_path(weight: Tensor, rank: int) -> Factors:
    U, S, Vt = torch.linalg.svd(weight, full_matrices=False)
    A = U[:, :rank] * S[:rank].sqrt()  # [out, r]
    B = S[:rank].sqrt().unsqueeze(1) * Vt[:rank]  # [r, in]
    return from_latents(A, B)


def from_latents(A: Tensor, B: Tensor) -> Factors:
    """Signs of ``A [out, r]`` and ``B [r, in]``, with scales of the best rank-one fits of ``|A|`` and ``|B|``."""
    u1, u2 = _rank_one(A.abs())
    v1, v2 = _rank_one(B.abs())
    return Factors(left=signs(A), right=signs(B), rows=u1.unsqueeze(0), latents=u2 * v1, columns=v2.unsqueeze(0))


def _rank_one(magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) with ``a b^T`` the nearest rank-one matrix of a non-negative one; both non-negative (Perron).

    By power iteration: the first singular value of such a matrix stands far above the others.
    """
    b = magnitudes.sum(0)
    for _ in range(_POWER_ROUNDS):
        b = torch.nn.functional.normalize(magnitudes.t() @ (magnitudes @ b), dim=0)
    a = magnitudes @ b
    size = a.norm().sqrt()
    return a / size.clamp_min(torch.finfo(a.dtype).tiny), b * size


def folded(factors: Factors) -> Factors:
    """The same weight with no negative scale: signs take over what training has made of them."""
    members = factors.path_of_rank
    left = factors.left * signs(factors.rows)[members].t() * signs(factors.latents)
    right = factors.right * signs(factors.columns)[members]
    return Factors(
        left=left,
        right=right,
        rows=factors.rows.abs(),
        latents=factors.latents.abs(),
        columns=factors.columns.abs(),
    )


def signs(latent: Tensor) -> Tensor:
    """+1 where ``latent >= 0``, else -1, in its dtype.

    >>> signs(torch.tensor([-2.0, -0.0, 0.0, 3.0])).tolist()
    [-1.0, 1.0, 1.0, 1.0]
    """
    return torch.where(latent >= 0, 1.0, -1.0).to(latent.dtype)


def smooth_sign(latent: Tensor) -> Tensor:
    """``signs`` forward; backward the derivative of ``tanh(a x)``: ``g * a * (1 - tanh(a x)^2)``, a = `SMOOTHNESS`."""
    result: Tensor = _SmoothSign.apply(latent)  # type: ignore[no-untyped-call]  # untyped in torch
    return result


class _SmoothSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor) -> Tensor:
        ctx.save_for_backward(latent)
        return signs(latent)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (latent,) = ctx.saved_tensors
        return gradients[0] * SMOOTHNESS * (1 - torch.tanh(SMOOTHNESS * latent).square())


def latent_start(sign: Tensor, generator: torch.Generator) -> Tensor:
    """Latents of given signs for training to start from: magnitudes uniform from 0 to twice `LATENT_SIZE`.

    The surrogate gradient of a latent far from 0 vanishes, and equal magnitudes would all reach 0 in the same step;
    so some signs are free to turn in every step from the first one on. Magnitudes of the factors' own (of the SVD, or
    of each sign's least-squares value) did worse, see docs/log.md.

    Args:
        sign: +1 and -1, float, any shape and device.
        generator: on the CPU.
    """
    return sign * (2 * LATENT_SIZE * torch.rand(sign.shape, generator=generator)).to(sign)
