"""Weights and Hessians that aim at trouble, as hypothesis strategies and as plain functions of a seed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

law = settings(max_examples=40, deadline=None)  # for properties of small tensors: no deadline, the machine may be busy

SIZES = (1, 2, 3, 5, 7, 8, 13, 16, 17, 33)  # columns of a group: one, odd, around powers of two

RowKind = Callable[[int, torch.Generator], Tensor]


def _normal(size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64)


def _outlier(size: int, generator: torch.Generator) -> Tensor:
    row = _normal(size, generator)
    row[int(torch.randint(size, (1,), generator=generator))] *= 1e4
    return row


def _negative_zeros(size: int, generator: torch.Generator) -> Tensor:
    row = _normal(size, generator)
    row[torch.rand(size, generator=generator) < 0.7] = -0.0
    return row


ROW_KINDS: dict[str, RowKind] = {
    "normal": _normal,
    "zeros": lambda size, _: torch.zeros(size, dtype=torch.float64),
    "constant": lambda size, generator: _normal(1, generator).expand(size),
    "nearly constant": lambda size, generator: 1 + 1e-6 * _normal(size, generator),
    "one outlier": _outlier,
    "negative zeros": _negative_zeros,
    "positive": lambda size, generator: 0.1 + _normal(size, generator).abs(),
    "negative": lambda size, generator: -0.1 - _normal(size, generator).abs(),
    "two values": lambda size, generator: _normal(size, generator).sign(),
    "subnormal scale": lambda size, generator: 1e-6 * _normal(size, generator),  # range / 3 is subnormal in float16
    "negative, subnormal scale": lambda size, generator: -3e-6 * _normal(size, generator).abs(),  # rounds down far
    "below every scale": lambda size, generator: 1e-12 * _normal(size, generator),
    "subnormal": lambda size, generator: 1e-41 * _normal(size, generator),  # subnormal in float32
    "large": lambda size, generator: 1e4 * _normal(size, generator).clamp(-3, 3),
}

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda w: w.contiguous(),
    "transposed": lambda w: w.t().contiguous().t(),
    "every other column": lambda w: torch.stack([w, torch.full_like(w, 7.0)], -1).flatten(1)[:, ::2],
    "columns of a wider matrix": lambda w: torch.nn.functional.pad(w, (2, 3), value=-5.0)[:, 2 : 2 + w.shape[1]],
}


@st.composite
def group_weights(draw: st.DrawFn, dtype: torch.dtype | None = None) -> Tensor:
    """Weights of one column group, ``[rows, g]``: each row of its own kind, in a contiguous or strided layout."""
    size = draw(st.sampled_from(SIZES))
    kinds = draw(st.lists(st.sampled_from(sorted(ROW_KINDS)), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.stack([ROW_KINDS[kind](size, generator) for kind in kinds])
    chosen = dtype or draw(st.sampled_from([torch.float32, torch.float64]))
    return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](weight.to(chosen))


def random_weight(out_features: int, in_features: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows of different size with a few outliers, as in trained linears."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    weight *= 0.5 + torch.rand(out_features, 1, generator=generator, dtype=torch.float64)
    weight[torch.rand(weight.shape, generator=generator) < 0.01] *= 4
    return weight.to(dtype)


def random_inputs(n_tokens: int, in_features: int, seed: int) -> Tensor:
    """Correlated inputs, float64 ``[n_tokens, in]``: channel energies over 1.2 decades, two outlier channels."""
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    mixing = torch.randn(in_features, in_features, generator=generator, dtype=torch.float64) / in_features**0.5
    spectrum = torch.logspace(0, -1.2, in_features, dtype=torch.float64)
    inputs = torch.randn(n_tokens, in_features, generator=generator, dtype=torch.float64) * spectrum @ mixing
    outliers = torch.randperm(in_features, generator=generator)[:2]
    inputs[:, outliers] *= 8
    return inputs


def random_hessian(in_features: int, seed: int, kind: str = "full", dtype: torch.dtype = torch.float64) -> Tensor:
    """``(2 / n) X^T X`` of `random_inputs` ``[in, in]``.

    Args:
        kind: "full" rank; "deficient": half as many tokens as channels; "duplicated": the second half of the channels
            repeats the first; "dead": every fifth channel is zero; "diagonal": independent channels.
    """
    n_tokens = max(1, in_features // 2) if kind == "deficient" else 4 * in_features + 8
    inputs = random_inputs(n_tokens, in_features, seed)
    if kind == "duplicated":
        half = in_features // 2
        inputs[:, in_features - half :] = inputs[:, :half]
    if kind == "dead":
        inputs[:, ::5] = 0
    hessian = inputs.t() @ inputs * (2 / n_tokens)
    if kind == "diagonal":
        hessian = torch.diag(hessian.diagonal())
    return hessian.to(dtype)


def output_loss(weight: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    """``(w - q) H (w - q)^T`` of each row, in float64: ``[out]``."""
    error = weight.double() - quantized.double()
    return ((error @ hessian.double()) * error).sum(1)
