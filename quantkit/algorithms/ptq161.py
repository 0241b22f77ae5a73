"""PTQ1.61: salient input channels keep 4 bits, every other weight keeps its sign.

Paper      Zhao et al., ACL 2025, arXiv:2502.13179. The mask names whole input channels, so that it costs 1 / out bits
           per weight. Elsewhere ``w ~ r_c (alpha_o b + mu_o)``, b = +-1, with a scale r of each channel.
Minimizes  tr((W - Q) H (W - Q)^T), H = (2 / n_tokens) X^T X, like every solver here. The paper keeps the signs of the
           weights and trains alpha and r by gradients; `quantkit.algorithms.block_scales` does that, after this or not.
Deviates   Signs are chosen column by column with compensation, as GPTQ does it, under several candidate steps per row;
           salient channels come last, so that 4-bit codes absorb what signs got wrong. Then scales (least squares) and
           codes (coordinate descent) are improved in turn; no step raises the objective.
           ``compensate=False`` without rounds is the paper's start, with the sign of 0 taken as +1.
Needs      the Hessian of the linear's inputs, and which channels are salient.
Cost       GPTQ's loop times the number of candidates; per round one [in, in] solve and two products with H.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.algorithms.gptq import GPTQConfig, grid_candidates, quantize_group
from quantkit.algorithms.grids import GRIDS, Grid, GridFit, quantize, storable_scales
from quantkit.algorithms.hessian import damped, damped_inverse_factor, without_dead_columns
from quantkit.errors import NumericalError
from quantkit.formats.grouped_int import GroupedInt
from quantkit.formats.sign_salient import SignSalient

_STEPS = (1.0, 0.8, 0.9, 1.1, 1.2, 1.35, 1.5, 1.75)  # times the step that is best without compensation inside the row
_SMALLEST_COLUMN = 1e-3  # of the mean column scale; a channel of zeros would divide by zero
_BLOCK = 128  # columns whose products with H are updated together; changes speed, not codes
_RANK1_ROUNDS = 8
_SCRATCH_BYTES = 1 << 29  # of rows that are tried under all candidates at once


@dataclass(frozen=True, slots=True, kw_only=True)
class PTQ161Config:
    damping: float = 0.01  # lambda, as a fraction of mean(diag(H))
    compensate: bool = True  # signs with compensation; False: signs of the weights, the paper's start
    rounds: int = 2  # of scales, then codes, after that
    salient_bits: int = 4  # of the codes of salient channels
    shortlist: int = 8  # 4-bit grids per row that are tried in the loop itself, where the grid offers several


class Solution(NamedTuple):
    """The weight, its tr((W - Q) H (W - Q)^T) with the damped Hessian, and the damping that was needed."""

    weight: SignSalient
    loss: float
    damping: float


@dataclass(frozen=True, slots=True)
class Parts:
    """A weight ``[out, n + k]`` of n binary and k salient columns, in this order; all in the dtype of the weight."""

    signs: Tensor  # [out, n], -1 or 1
    alpha: Tensor  # [out], of either sign
    mu: Tensor  # [out]
    r: Tensor  # [n]
    codes: Tensor  # [out, k], 0 to 2 ** bits - 1
    scales: Tensor  # [out]
    zeros: Tensor  # [out]
    bits: int  # of the codes

    def values(self) -> Tensor:
        """``[out, n + k]``."""
        binary = self.r * (self.alpha.unsqueeze(1) * self.signs + self.mu.unsqueeze(1))
        return torch.cat([binary, self.scales.unsqueeze(1) * (self.codes - self.zeros.unsqueeze(1))], 1)


def n_salient(in_features: int, bits: float, salient_bits: int) -> int:
    """How many channels get ``salient_bits`` when codes and signs take ``bits`` per weight; one at least gets signs.

    >>> n_salient(4096, 1.6, 4)
    819
    """
    return min(round((bits - 1) / (salient_bits - 1) * in_features), in_features - 1)


def salience(kind: str, weight: Tensor, hessian: Tensor, absmax: Tensor | None = None) -> Tensor:
    """``[in]``, how much a channel deserves 4 bits.

    Args:
        kind: ``absmax`` the largest |x| over the calibration tokens (paper); ``rms`` the diagonal of H; ``hessian``
            what the layer objective loses without the channel, ``H_cc ||W[:, c]||^2``.
        absmax: ``[in]``, needed for its kind alone.
    """
    if kind == "absmax":
        assert absmax is not None
        return absmax
    diagonal = hessian.diagonal()
    return diagonal if kind == "rms" else diagonal * weight.square().sum(0)


def salient_mask(statistic: Tensor, k: int) -> Tensor:
    """bool ``[in]``: the k largest; of equal ones the first."""
    mask = torch.zeros(statistic.numel(), dtype=torch.bool, device=statistic.device)
    mask[torch.argsort(statistic, descending=True, stable=True)[:k]] = True
    return mask


def ptq161(weight: Tensor, hessian: Tensor, salient: Tensor, grid_fit: GridFit, config: PTQ161Config) -> Solution:
    """Quantize one linear.

    Args:
        weight: float32 or float64 ``[out_features, in_features]``.
        hessian: same dtype, ``[in_features, in_features]``, any positive multiple of X^T X.
        salient: bool ``[in_features]``; one channel at least is not salient.
        grid_fit: of the 4-bit codes, one of `quantkit.algorithms.grids.GRIDS`.

    Raises:
        NumericalError: NaN or Inf in the weight or the Hessian. NotPositiveDefiniteError: no damping helped.
    """
    if not torch.isfinite(weight).all():
        raise NumericalError("the weight holds NaN or Inf; the checkpoint is damaged")
    W, H = without_dead_columns(weight, hessian)
    k = int(salient.sum())
    columns = _visiting_order(H.diagonal(), salient)
    W = W[:, columns]
    U, damping = damped_inverse_factor(H[columns][:, columns], config.damping)
    H = damped(H, damping)[columns][:, columns]
    bits = config.salient_bits
    if config.compensate:
        parts = _compensated(W, U, k, bits, grid_fit, config.shortlist)
    else:
        parts = plain(W, H, k, bits, grid_fit)
    for _ in range(config.rounds):
        parts = descend(W, H, refit_columns(W, H, refit_rows(W, H, parts)))
    if config.rounds:
        parts = refit_rows(W, H, parts)
    return Solution(_stored(parts, columns, salient), float(objective(W, H, parts).sum()), damping)


def _visiting_order(diagonal: Tensor, salient: Tensor) -> Tensor:
    """Binary columns, then salient ones; the most active of each first, while most others can still make up for it."""
    order = torch.argsort(diagonal, descending=True, stable=True)
    return torch.cat([order[~salient[order]], order[salient[order]]])


def _stored(parts: Parts, columns: Tensor, salient: Tensor) -> SignSalient:
    """Both parts in the order of the weight's columns."""
    n = parts.signs.shape[1]
    binary, rest = columns[:n].argsort(), columns[n:].argsort()
    codes = GroupedInt(
        codes=parts.codes[:, rest].to(torch.uint8),
        scales=parts.scales.float().unsqueeze(1),
        zeros=parts.zeros.float().unsqueeze(1),
        bits=(parts.bits,),
        symmetric=False,
    )
    return SignSalient(
        signs=parts.signs[:, binary] > 0,
        row_scales=parts.alpha.float(),
        row_means=parts.mu.float(),
        column_scales=parts.r[binary].float(),
        salient_mask=salient if len(rest) else None,
        salient=codes if len(rest) else None,
    )


def plain(weight: Tensor, metric: Tensor, k: int, bits: int, grid_fit: GridFit) -> Parts:
    """Signs around the mean of each row, alpha the mean of |w|, no column scales; the last k columns rounded.

    Args:
        weight: ``[out, in]``, salient columns last. metric: H in the same order, for grids that ask.
    """
    n = weight.shape[1] - k
    binary, rest = weight[:, :n], weight[:, n:]
    mu, alpha = _half(binary.mean(1)), _half(binary.abs().mean(1))
    signs = torch.where(binary >= mu.unsqueeze(1), 1.0, -1.0).to(weight.dtype)
    grid = _no_grid(weight)
    if k:
        grid = grid_fit(rest, bits, False, torch.linalg.cholesky(metric[n:, n:].double()).to(weight.dtype))
    return Parts(signs, alpha, mu, weight.new_ones(n), quantize(rest, grid, bits), grid.scales, grid.zeros, bits)


def _compensated(weight: Tensor, U: Tensor, k: int, bits: int, grid_fit: GridFit, shortlist: int) -> Parts:
    """GPTQ over two groups: signs of the columns divided by their scale, then integers.

    Dividing column c by r_c multiplies row and column c of H by r_c, and so divides column c of U by it.
    """
    n = weight.shape[1] - k
    r = rank_one_scales(weight[:, :n])
    factor, config = U[:n, :n] / r, GPTQConfig()
    metrics, steps = (_inverse(factor), _inverse(U[n:, n:])), U[:n, n:]
    pieces = []
    for rows in torch.split(weight, max(1, _SCRATCH_BYTES // (24 * len(_STEPS) * n))):  # rows know nothing of others
        binary = rows[:, :n] / r
        grid, signs, E = quantize_group(binary, factor, _sign_candidates(binary, metrics[0]), 1, config)
        rest = rows[:, n:] - E @ steps
        salient, codes = _no_grid(rows), rest
        if k:
            candidates = grid_candidates(rest, bits, False, metrics[1], grid_fit, shortlist)
            salient, codes, _ = quantize_group(rest, U[n:, n:], candidates, bits, config)
        alpha, mu = _half(grid.scales / 2), _half(grid.scales * (0.5 - grid.zeros))
        pieces.append((2 * signs - 1, alpha, mu, codes, salient.scales, salient.zeros))
    signs, alpha, mu, codes, scales, zeros = (torch.cat(piece) for piece in zip(*pieces, strict=True))
    return Parts(signs, alpha, mu, r, codes, scales, zeros, bits)


def _sign_candidates(binary: Tensor, metric: Tensor) -> Grid:
    """[n, out] two-level grids around the best one for plain signs."""
    base = GRIDS["hessian"](binary, 1, False, metric)
    center = base.scales * (0.5 - base.zeros)
    steps = torch.tensor(_STEPS, dtype=binary.dtype, device=binary.device).unsqueeze(1)
    largest = torch.finfo(torch.float16).max  # where a wider grid cannot be stored, the widest that can be
    scales = storable_scales((steps * base.scales).clamp_max(largest))
    return Grid(scales, 0.5 - center / scales)


def _inverse(upper: Tensor) -> Tensor:
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse


def _no_grid(weight: Tensor) -> Grid:
    return Grid(weight.new_ones(len(weight)), weight.new_zeros(len(weight)))


def rank_one_scales(weight: Tensor) -> Tensor:
    """r ``[n]``, mean 1, of the least-squares ``|weight| ~ a r^T``, by power iteration from ones."""
    magnitude = weight.abs()
    r = weight.new_ones(weight.shape[1])
    for _ in range(_RANK1_ROUNDS):
        r = (magnitude @ r) @ magnitude
        r /= r.mean().clamp_min(1e-30)
    return _half(r.clamp_min(_SMALLEST_COLUMN))


def objective(weight: Tensor, hessian: Tensor, parts: Parts) -> Tensor:
    """``(w - q) H (w - q)^T`` per row: ``[out]``."""
    error = parts.values() - weight
    return (error @ hessian).mul_(error).sum(1)


def refit_rows(weight: Tensor, hessian: Tensor, parts: Parts) -> Parts:
    """The least-squares alpha, mu and 4-bit scale of each row, given the rest; a row that would lose keeps its own.

    Three normal equations per row, with the basis ``r b``, ``r`` and ``codes - zeros``.
    """
    n = parts.signs.shape[1]
    basis = weight.new_zeros(3, *weight.shape)
    basis[0, :, :n] = parts.r * parts.signs
    basis[1, :, :n] = parts.r
    basis[2, :, n:] = parts.codes - parts.zeros.unsqueeze(1)
    products = basis @ hessian
    gram = torch.einsum("aoc,boc->oab", products, basis).double()
    target = torch.einsum("aoc,oc->oa", products, weight).double()
    ridge = gram.diagonal(dim1=1, dim2=2).mul(1e-6).clamp_min(1e-12)  # signs that are all alike equal the constant
    gram = gram + torch.diag_embed(ridge)
    scales = torch.linalg.solve(gram, target)[:, 2].to(weight.dtype)
    usable = (scales > 0.2 * parts.scales) & (scales < 5 * parts.scales)
    scales = storable_scales(torch.where(usable, scales, parts.scales))
    target = target[:, :2] - gram[:, :2, 2] * scales.unsqueeze(1)  # once more, given the scale that is stored
    alpha, mu = _half(torch.linalg.solve(gram[:, :2, :2], target).to(weight.dtype)).unbind(1)
    candidate = replace(parts, alpha=alpha, mu=mu, scales=scales)
    better = objective(weight, hessian, candidate) < objective(weight, hessian, parts)
    return replace(
        parts,
        alpha=torch.where(better, alpha, parts.alpha),
        mu=torch.where(better, mu, parts.mu),
        scales=torch.where(better, scales, parts.scales),
    )


def refit_columns(weight: Tensor, hessian: Tensor, parts: Parts) -> Parts:
    """The least-squares r given the rest, or the old one if it is better: ``((Z^T Z) * H) r = sum_o Z_o * (H t_o)``.

    Z = alpha b + mu, t the weight without its salient part.
    """
    n = parts.signs.shape[1]
    Z = parts.alpha.unsqueeze(1) * parts.signs + parts.mu.unsqueeze(1)
    rest = parts.values()
    rest[:, :n] = 0
    system = ((Z.t() @ Z) * hessian[:n, :n]).double()
    target = (Z * ((weight - rest) @ hessian[:, :n])).sum(0).double()
    system.diagonal().add_(system.diagonal().mean() * 1e-6 + 1e-30)
    candidate = replace(parts, r=_half(torch.linalg.solve(system, target).to(weight.dtype)))
    better = objective(weight, hessian, candidate).sum() < objective(weight, hessian, parts).sum()
    return candidate if bool(better) else parts


def descend(weight: Tensor, hessian: Tensor, parts: Parts) -> Parts:
    """One sweep over the columns: each gets the best signs or codes given all others, for all rows at once.

    With e = q - w, the best real value of column c is ``q_c - (e H)_c / H_cc``; the nearest level minimizes exactly.
    """
    signs, codes = parts.signs.t().contiguous(), parts.codes.t().contiguous()
    n, r, diagonal = len(signs), parts.r.tolist(), hessian.diagonal().tolist()
    W = weight.t().contiguous()  # transposed: a column becomes a contiguous row
    E = parts.values().t() - W
    P = hessian @ E  # (e H)_c as rows; kept up to date block by block
    for start in range(0, len(W), _BLOCK):
        span = slice(start, min(start + _BLOCK, len(W)))
        before, products, H = E[span].clone(), P[span].clone(), hessian[span, span]
        for row, c in enumerate(range(span.start, span.stop)):
            best = W[c] + E[c] - products[row] / diagonal[c]
            if c < n:
                alpha, mu = r[c] * parts.alpha, r[c] * parts.mu
                signs[c] = torch.where((best - mu) * alpha < 0, -1.0, 1.0)
                value = alpha * signs[c] + mu
            else:
                code = (best / parts.scales + parts.zeros).round_().clamp_(0, 2**parts.bits - 1)
                codes[c - n] = code
                value = parts.scales * (code - parts.zeros)
            change = value - W[c] - E[c]
            E[c] += change
            products.addr_(H[row], change)
        P.addmm_(hessian[:, span], E[span] - before)
    return replace(parts, signs=signs.t().contiguous(), codes=codes.t().contiguous())


def _half(values: Tensor) -> Tensor:
    """As stored: rounded to float16, in the dtype of the computation."""
    return values.to(torch.float16).to(values.dtype)
