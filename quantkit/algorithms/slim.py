"""SliM-LLM: salience-determined bit allocation (SBA) over groups of input columns.

Paper      Huang et al., ICML 2025, arXiv:2405.14917. The companion scale search (SQC) is `grids.sqc`.
Allocates  N - 1, N or N + 1 bits to each group, as many of the former as of the latter, so that the average stays N.
Minimizes  over k, the number of groups moved either way: a divergence of the linear's output (`criterion`).
               "mse"  tr((W_k - W) H (W_k - W)^T), from the Hessian alone: what the solver minimizes
               "kl"   mean over tokens of KL(softmax(x W_k^T) || softmax(x W^T)), as in the authors' code
Needs      the Hessian of the linear's inputs; "kl" also a sample of inputs.
Cost       "mse": three G x G tables, then each k is a sum over entries. "kl": two rank-g products per k.
Deviates   k = 0 and k = G // 2 are candidates too (the authors skip both), so mixed widths never lose to uniform ones
           by the criterion. Salience is computed once, with the solver's damping. W_k is rounded on the solver's grid
           if `search_grid` says so; the paper's search rounds on min-max.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantkit.algorithms.grids import GridFit, minmax
from quantkit.algorithms.hessian import damped, damped_inverse_factor, without_dead_columns
from quantkit.algorithms.rtn import fake_quantize
from quantkit.errors import NumericalError, RequestError

_FLOOR = 1e-6  # both distributions are clamped here, as in the authors' code


@dataclass(frozen=True, slots=True, kw_only=True)
class SBAConfig:
    bits: int = 2  # N, the average
    group_size: int = 128
    damping: float = 0.01
    criterion: Literal["mse", "kl"] = "mse"
    search_grid: GridFit = minmax


def group_salience(weight: Tensor, factor: Tensor, group_size: int) -> Tensor:
    """Sum of ``W^2 / U[c, c]^2`` over each group's columns and all rows: float ``[n_groups]``."""
    delta = weight.square() / factor.diagonal().square()
    return delta.sum(0).reshape(-1, group_size).sum(1)


def sba(weight: Tensor, hessian: Tensor, config: SBAConfig, inputs: Tensor | None = None) -> tuple[int, ...]:
    """Width of each column group.

    Args:
        weight: float32 ``[out_features, in_features]``.
        hessian: float32 ``[in_features, in_features]``.
        inputs: float32 ``[n_tokens, in_features]``; needed by ``criterion="kl"``.

    Returns:
        ``n_groups`` widths with mean ``config.bits``.

    Raises:
        RequestError: the average leaves no room on one side (1 or 8 bits). NumericalError: NaN or Inf in the weight or
            the Hessian.
    """
    if not 2 <= config.bits <= 7:
        raise RequestError(f"slim mixes {config.bits - 1}, {config.bits} and {config.bits + 1} bits; use --bits 2 to 7")
    if not torch.isfinite(weight).all():
        raise NumericalError("the weight holds NaN or Inf; the checkpoint is damaged")
    W, H = without_dead_columns(weight, hessian)
    U, damping = damped_inverse_factor(H, config.damping)
    order = torch.argsort(group_salience(W, U, config.group_size), stable=True)
    widths = (config.bits - 1, config.bits, config.bits + 1)
    errors = {b: fake_quantize(W, b, config.group_size, config.search_grid) - W for b in widths}
    if config.criterion == "mse":
        divergences = _output_errors(errors, damped(H, damping), order, config)
    else:
        if inputs is None or not len(inputs):
            raise RequestError("slim: criterion=kl needs a sample of the inputs")
        divergences = _output_divergences(W, errors, inputs.to(W), order, config)
    k = int(torch.argmin(divergences))  # the first minimum: the smallest departure from uniform wins a tie
    return widths_for(order, k, config.bits)


def widths_for(order: Tensor, k: int, bits: int) -> tuple[int, ...]:
    """The k least salient groups get one bit less, the k most salient one bit more.

    >>> widths_for(torch.tensor([2, 0, 1, 3]), 1, 2)
    (2, 2, 1, 3)
    """
    widths = torch.full_like(order, bits)
    widths[order[:k]] -= 1
    widths[order[len(order) - k :]] += 1
    return tuple(widths.tolist())


def _output_errors(errors: dict[int, Tensor], H: Tensor, order: Tensor, config: SBAConfig) -> Tensor:
    """tr(E_k H E_k^T) for every k, from the G x G tables of <E_a,j H_jl, E_b,l> for all pairs of widths (a, b)."""
    n_groups = len(order)
    tables = {
        (a, b): ((errors[a].t() @ errors[b]) * H).reshape(n_groups, config.group_size, n_groups, -1).sum((1, 3))
        for a in errors
        for b in errors
    }
    candidates = []
    for k in range(n_groups // 2 + 1):
        widths = widths_for(order, k, config.bits)
        members = {b: torch.tensor([width == b for width in widths], device=H.device).to(H) for b in errors}
        candidates.append(
            sum((members[a] @ tables[a, b] @ members[b] for a in errors for b in errors), H.new_zeros(()))
        )
    return torch.stack(candidates)


def _output_divergences(
    W: Tensor, errors: dict[int, Tensor], inputs: Tensor, order: Tensor, config: SBAConfig
) -> Tensor:
    """The authors' criterion for every k; from k to k + 1 only two groups change, so only their outputs are redone."""
    target = inputs @ W.t()
    output = target + inputs @ errors[config.bits].t()
    change = _output_change(errors, inputs, config)
    candidates = [_divergence(output, target)]
    for k in range(1, len(order) // 2 + 1):
        output += change(int(order[k - 1]), config.bits - 1) + change(int(order[-k]), config.bits + 1)
        candidates.append(_divergence(output, target))
    return torch.stack(candidates)


def _output_change(errors: dict[int, Tensor], inputs: Tensor, config: SBAConfig) -> Callable[[int, int], Tensor]:
    def change(group: int, bits: int) -> Tensor:
        columns = slice(group * config.group_size, (group + 1) * config.group_size)
        return inputs[:, columns] @ (errors[bits] - errors[config.bits])[:, columns].t()

    return change


def _divergence(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of sum_o p_q (log p_q - log p), both clamped."""
    quantized = output.softmax(-1).clamp_min(_FLOOR)
    original = target.softmax(-1).clamp_min(_FLOOR)
    return (quantized * (quantized.log() - original.log())).sum(-1).mean()
