"""Signs and scales of a factorized weight, re-fitted to calibration data without gradients. Ours.

Minimizes  f = tr((W - Q) H (W - Q)^T),  Q = A diag(l) B,  A = diag(h) S,  B = T diag(g),  H = (2 / n_tokens) X^T X.
Start      Dual-SVID of the whitened weight, its factors rotated towards signs (`aligned_start`).
Steps      each is an exact minimizer of one block of unknowns with all others fixed, so f never rises:
             latents  l: ((A^T A) * (B H B^T)) l = diag(A^T W H B^T)
             rows     h: one number per row and path;  columns  g: one linear system [in, in] per path
             left     S: rows are independent; rank by rank, every row takes the better sign
             right    T: columns are coupled through H, ranks through (A l)^T (A l); for a few columns at a
                      time the best of nested sets of flips, by the exact change of f (nothing, one flip, two, four)
Needs      the Hessian of the linear's inputs, positive definite (damped).
Cost       a round is O(R^2 (out + in) + R in^2 + in^3) for R ranks of all paths.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantkit.algorithms.littlebit import Factors, Rank, check_weight, from_latents, join_paths, signs

_ALIGNMENT_ROUNDS = 12
_QUINTIC, _CUBIC = 9, 6  # steps towards a rotation
_FLIP_COLUMNS = 64  # columns whose flips are chosen together
_FLIP_ROUNDS = 6  # sets of flips taken in a block of columns before the next one


def objective(weight: Tensor, hessian: Tensor, factors: Factors) -> Tensor:
    """``tr((W - Q) H (W - Q)^T)``, a scalar in the dtype of the weight."""
    error = weight - factors.dense()
    return ((error @ hessian) * error).sum()


def aligned_start(weight: Tensor, hessian: Tensor, rank: Rank, seed: int = 0) -> Factors:
    """Dual-SVID in the metric of the Hessian, of factors turned towards their signs; path by path.

    The SVD is that of ``W L`` with ``H = L L^T``, and ``L^-1`` is taken back from B. Its factors may be rotated, as
    ``(A R)(R^T B) = A B``: R is chosen by iterative quantization (Gong, Lazebnik, CVPR 2011), so that a matrix of signs
    loses less. Of the factors as they are and turned, those with the lower objective are kept.

    Raises:
        NumericalError: NaN or Inf in the weight.
    """
    check_weight(weight)
    L = torch.linalg.cholesky(hessian.double())
    remaining, paths = weight, []
    for path in range(rank.n_paths):
        A, whitened = _top_factors(remaining.double() @ L, rank.rank)
        B = torch.linalg.solve_triangular(L, whitened, upper=False, left=False).to(weight.dtype)
        A = A.to(weight.dtype)
        R = alignment(A, B, torch.Generator().manual_seed(seed + path))
        plain, turned = from_latents(A, B), from_latents(A @ R, R.t() @ B)
        best = min((turned, plain), key=lambda one: float(objective(remaining, hessian, one)))
        paths.append(best)
        remaining = remaining - best.dense()
    return join_paths(paths)


def alignment(A: Tensor, B: Tensor, generator: torch.Generator) -> Tensor:
    """An orthogonal R ``[r, r]`` for which the rows of ``A R`` and columns of ``R^T B`` are nearly signs times a scale.

    Starts at a random rotation; in turn the signs and, by an orthogonal Procrustes problem, R.
    """
    r = A.shape[1]
    rows = torch.nn.functional.normalize(torch.cat([A, B.t()]), dim=1)
    start = torch.randn(r, r, generator=generator, dtype=torch.float64)
    R: Tensor = torch.linalg.qr(start).Q.to(dtype=A.dtype, device=A.device)
    for _ in range(_ALIGNMENT_ROUNDS):
        R = _nearest_rotation(rows.t() @ signs(rows @ R))
    return R


def _top_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``U sqrt(S)`` and ``sqrt(S) V^T`` of the first singular triples, by the eigenvectors of the smaller Gram matrix.

    Much faster than an SVD on a GPU; small singular values are less exact, which a start does not mind.
    """
    if matrix.shape[0] > matrix.shape[1]:
        right, left = _top_factors(matrix.t(), rank)
        return left.t(), right.t()
    values, vectors = torch.linalg.eigh(matrix @ matrix.t())
    U = vectors[:, -rank:].flip(1)
    root = values[-rank:].flip(0).clamp_min(0).sqrt().sqrt().clamp_min(torch.finfo(matrix.dtype).tiny ** 0.25)
    return U * root, U.t() @ matrix / root.unsqueeze(1)


def _nearest_rotation(matrix: Tensor) -> Tensor:
    """The orthogonal polar factor ``M (M^T M)^(-1/2)``, by Newton-Schulz iteration: products only, for a GPU's sake.

    Quintic steps lift small singular values fast, cubic ones converge to 1 (Higham, *Functions of Matrices*, 8.3).
    Directions with less than 1e-7 of the norm stay short of 1, which a start does not mind.
    """
    X: Tensor = matrix / matrix.norm()
    for _ in range(_QUINTIC):
        G = X.t() @ X
        X = torch.addmm(X, X, torch.addmm(G, G, G, beta=-4.775, alpha=2.0315), beta=3.4445)
    for _ in range(_CUBIC):
        X = torch.addmm(X, X, X.t() @ X, beta=1.5, alpha=-0.5)
    return X


def refine_factors(weight: Tensor, hessian: Tensor, factors: Factors, n_rounds: int) -> Factors:
    """Rounds of all five steps.

    Args:
        weight: float32 or float64 ``[out_features, in_features]``.
        hessian: same dtype ``[in_features, in_features]``, positive definite.
        factors: the start, same dtype.
        n_rounds: 0 returns the start.
    """
    for _ in range(n_rounds):
        for step in (fit_latents, fit_rows, fit_columns, flip_left, flip_right):
            factors = step(weight, hessian, factors)
    if n_rounds:
        for step in (fit_latents, fit_rows, fit_columns):
            factors = step(weight, hessian, factors)
    return balanced(factors)


def fit_latents(weight: Tensor, hessian: Tensor, factors: Factors) -> Factors:
    """The best ``l``; where it is negative, the rank's column of S turns its signs."""
    A, B = factors.output_factor(), factors.input_factor()
    BH = B @ hessian
    gram = (A.t() @ A) * (BH @ B.t())
    rhs = ((A.t() @ weight) * BH).sum(1)
    latents = _solve(gram, rhs, factors.latents)
    return replace(factors, latents=latents.abs(), left=factors.left * signs(latents))


def fit_rows(weight: Tensor, hessian: Tensor, factors: Factors) -> Factors:
    """The best ``h`` of each path, one after the other; where it is negative, the row of S turns its signs."""
    for path in range(factors.n_paths):
        members = factors.path_of_rank == path
        target = weight - _without(factors, path).dense()
        C = (factors.left[:, members] * factors.latents[members]) @ factors.input_factor()[members]  # a_i as rows
        CH = C @ hessian
        energy = (CH * C).sum(1)
        rows = torch.where(energy > 0, (CH * target).sum(1) / energy, factors.rows[path])
        factors = _with_row(factors, "rows", path, rows.abs())
        factors = replace(factors, left=torch.where(members, factors.left * signs(rows).unsqueeze(1), factors.left))
    return factors


def fit_columns(weight: Tensor, hessian: Tensor, factors: Factors) -> Factors:
    """The best ``g`` of each path, one after the other; where it is negative, the column of T turns its signs."""
    for path in range(factors.n_paths):
        members = factors.path_of_rank == path
        target = weight - _without(factors, path).dense()
        M = (factors.output_factor()[:, members] * factors.latents[members]) @ factors.right[members]
        columns = _solve((M.t() @ M) * hessian, (M * (target @ hessian)).sum(0), factors.columns[path])
        factors = _with_row(factors, "columns", path, columns.abs())
        turned = factors.right * signs(columns)
        factors = replace(factors, right=torch.where(members.unsqueeze(1), turned, factors.right))
    return factors


def flip_left(weight: Tensor, hessian: Tensor, factors: Factors) -> Factors:
    """Each sign of S in turn, all rows at once: coordinate descent on the row's binary quadratic problem."""
    C = factors.latents.unsqueeze(1) * factors.input_factor()  # [R, in]
    CH = C @ hessian
    K, P = CH @ C.t(), weight @ CH.t()  # [R, R], [out, R]
    A = factors.output_factor()
    pull = P - A @ K  # half of the negative gradient by A
    scale, diagonal = factors.rows[factors.path_of_rank].t(), K.diagonal()
    for k in range(A.shape[1]):
        old = A[:, k]
        wanted = torch.addcmul(pull[:, k], old, diagonal[k])  # the negative gradient without this rank
        better = torch.where(wanted == 0, old, torch.copysign(scale[:, k], wanted))
        pull.addr_(better - old, K[k], alpha=-1)
        A[:, k] = better
    return replace(factors, left=torch.where(scale > 0, signs(A), factors.left))


def flip_right(weight: Tensor, hessian: Tensor, factors: Factors) -> Factors:
    """Block by block of columns of T: of nested sets of flips, the one after which f is least; a few times each."""
    C = factors.output_factor() * factors.latents
    B = factors.input_factor()
    Q = C.t() @ C
    G = (Q @ B - C.t() @ weight) @ hessian  # half of the gradient by B, [R, in]
    for start in range(0, B.shape[1], _FLIP_COLUMNS):
        span = slice(start, start + _FLIP_COLUMNS)
        b, g, H = B[:, span], G[:, span], hessian[span, span]
        curvature = Q.diagonal().unsqueeze(1) * H.diagonal()
        sizes = _set_sizes(b)
        moved = torch.zeros_like(b)
        for _ in range(_FLIP_ROUNDS):
            alone = 4 * b * (curvature * b - g)  # change of f by one flip
            D = _nested_sets(alone, sizes) * (-2 * b)  # [sets, R, columns]
            DQ = Q @ D
            change = 2 * (D * g).sum((1, 2)) + (DQ * (D @ H)).sum((1, 2))
            best = change.argmin(0, keepdim=True)  # the first set is empty
            step = D.index_select(0, best)[0]  # by a tensor: a number would have to be waited for
            b, g, moved = b + step, g + (Q @ step) @ H, moved + step
        B[:, span] = b
        G += Q @ moved @ hessian[span]
    return replace(factors, right=torch.where(B == 0, factors.right, signs(B)))  # a scale of 0 says nothing


def _set_sizes(like: Tensor) -> Tensor:
    """0, 1, 2, 4, ... up to at least half of the entries of a matrix; on its device."""
    return torch.tensor([0, *(1 << power for power in range(like.numel().bit_length()))], device=like.device)


def _nested_sets(change: Tensor, sizes: Tensor) -> Tensor:
    """[sets, *change.shape] of 0 and 1: for each size so many entries, those with the least change.

    Only entries with a negative change belong to a set.
    """
    place = torch.argsort(torch.argsort(change.flatten()))
    chosen = (place < sizes.unsqueeze(1)).reshape(-1, *change.shape)
    return (chosen & (change < 0)).to(change.dtype)


def balanced(factors: Factors) -> Factors:
    """The same weight with the means of h, l and g of each path equal, so that none leaves the range of float16."""
    path_of_rank, parts = factors.path_of_rank, []
    for path in range(factors.n_paths):
        members = path_of_rank == path
        trio = (factors.rows[path], factors.latents[members], factors.columns[path])
        means = [part.mean() for part in trio]
        common = (means[0] * means[1] * means[2]) ** (1 / 3)
        parts.append([part * (common / mean) if mean > 0 else part for part, mean in zip(trio, means, strict=True)])
    return replace(
        factors,
        rows=torch.stack([part[0] for part in parts]),
        latents=torch.cat([part[1] for part in parts]),
        columns=torch.stack([part[2] for part in parts]),
    )


def _without(factors: Factors, path: int) -> Factors:
    return replace(factors, latents=torch.where(factors.path_of_rank == path, 0.0, factors.latents))


def _with_row(factors: Factors, name: str, path: int, values: Tensor) -> Factors:
    changed = getattr(factors, name).clone()
    changed[path] = values
    return replace(factors, **{name: changed})


def _solve(gram: Tensor, rhs: Tensor, fallback: Tensor) -> Tensor:
    """The minimizer of ``x^T gram x - 2 rhs x``, in float64; where it is not unique, one near ``fallback``."""
    exact = gram.double()
    ridge = 1e-10 * exact.diagonal().mean()
    shifted = exact + ridge * torch.eye(len(rhs), dtype=torch.float64, device=rhs.device)
    residual = rhs.double() - exact @ fallback.double()
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if failed:
        return fallback
    step = torch.cholesky_solve(residual.unsqueeze(1), factor).squeeze(1)
    return (fallback.double() + step).to(fallback.dtype)
