"""Refinement of given codes: least-squares scales and coordinate descent on codes, in turn.

Papers     Coordinate descent on the layer objective: Behdin et al., QuantEase, arXiv:2309.01885. The scale step is the
           classical normal equation.
Minimizes  tr((W - Q) H (W - Q)^T), starting from any solver's codes. GPTQ visits a column once, when the later ones are
           still free; here every column is visited again with all others fixed, so the objective only falls.
Needs      the Hessian of the linear's inputs.
Cost       one round: about twice GPTQ's loop. Peak: three float32 [out, in] matrices.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantkit.algorithms.grids import storable_scales
from quantkit.formats.grouped_int import GroupedInt

_BLOCK = 128  # columns whose products with H are updated together; changes speed, not codes


def objective(weight: Tensor, hessian: Tensor, quantized: GroupedInt) -> Tensor:
    """``(w - q) H (w - q)^T`` per row: ``[out_features]``."""
    error = quantized.dequantize().to(weight.dtype) - weight
    return (error @ hessian).mul_(error).sum(1)


def refine(weight: Tensor, hessian: Tensor, quantized: GroupedInt, rounds: int) -> GroupedInt:
    """Improve codes and scales; zeros and widths stay.

    Args:
        weight: float32 or float64 ``[out_features, in_features]``, what the codes approximate.
        hessian: same dtype, ``[in_features, in_features]``, damped and positive definite.
        rounds: of scales, then codes; 0 returns the input.

    Returns:
        A weight whose objective is, row by row, at most the input's.
    """
    for _ in range(rounds):
        quantized = refit_scales(weight, hessian, quantized)
        quantized = descend(weight, hessian, quantized)
    return quantized


def refit_scales(weight: Tensor, hessian: Tensor, quantized: GroupedInt) -> GroupedInt:
    """The least-squares scales of each row given its codes; a row keeps its old ones if rounding eats the gain.

    With D_g = codes - zeros of group g: solve ``sum_g' <D_g, H_gg' D_g'> s_g' = <D_g, (H w)_g>`` per row.
    """
    out_features, n_groups = quantized.scales.shape
    group_size = quantized.group_size
    levels = quantized.codes.reshape(out_features, n_groups, group_size) - quantized.zeros.unsqueeze(-1)
    levels = levels.to(weight.dtype)
    gram = weight.new_empty(out_features, n_groups, n_groups)
    target = weight.new_empty(out_features, n_groups)
    weighted = (weight @ hessian).reshape(out_features, n_groups, group_size)
    for group in range(n_groups):
        rows = levels[:, group] @ hessian[group * group_size : (group + 1) * group_size]
        gram[:, group] = (rows.reshape(out_features, n_groups, group_size) * levels).sum(-1)
        target[:, group] = (levels[:, group] * weighted[:, group]).sum(-1)
    ridge = gram.diagonal(dim1=1, dim2=2).mean(1).mul(1e-6).clamp_min(1e-12)
    gram.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
    scales = torch.linalg.solve(gram.double(), target.double()).to(quantized.scales.dtype)
    usable = (scales > 0.2 * quantized.scales) & (scales < 5 * quantized.scales)
    scales = storable_scales(torch.where(usable, scales, quantized.scales))
    candidate = replace(quantized, scales=scales)
    better = objective(weight, hessian, candidate) < objective(weight, hessian, quantized)
    return replace(quantized, scales=torch.where(better.unsqueeze(1), scales, quantized.scales))


def descend(weight: Tensor, hessian: Tensor, quantized: GroupedInt) -> GroupedInt:
    """One sweep over the columns: each gets the best code given all others, for all rows at once.

    With e = q - w, the best real value of column c is ``q_c - (e H)_c / H_cc``; the nearest level minimizes exactly.
    """
    group_size = quantized.group_size
    scales = quantized.scales.t().to(weight.dtype)
    zeros = quantized.zeros.t().to(weight.dtype)
    # Transposed: a column becomes a contiguous row.
    codes = quantized.codes.t().to(weight.dtype).contiguous()
    W = weight.t().contiguous()
    E = quantized.dequantize().to(weight.dtype).t() - W
    P = hessian @ E  # (e H)_c as rows; kept up to date block by block
    diagonal = hessian.diagonal().tolist()
    for start in range(0, W.shape[0], _BLOCK):
        span = slice(start, min(start + _BLOCK, W.shape[0]))
        before = E[span].clone()
        products = P[span].clone()
        H = hessian[span, span]
        for row, c in enumerate(range(span.start, span.stop)):
            s, z = scales[c // group_size], zeros[c // group_size]
            best = W[c] + E[c] - products[row] / diagonal[c]
            codes[c] = (best / s + z).round_().clamp_(0, 2 ** quantized.bits[c // group_size] - 1)
            change = s * (codes[c] - z) - W[c] - E[c]
            E[c] += change
            products.addr_(H[row], change)
        P.addmm_(hessian[:, span], E[span] - before)
    return replace(quantized, codes=codes.t().to(torch.uint8).contiguous())
