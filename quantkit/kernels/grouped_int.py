"""Linear layer on `grouped_int` weights: ``y = x W^T + bias`` from packed codes, never from a dense weight.

    weight[o, i]  ~  scales[o, g] * (codes[o, i] - zeros[o, g]),        g = i // group_size

so a row of the product splits into a part that needs the codes and a part that needs only group sums of x:

    y[m, o] = sum_g scales[o, g] * (sum_{i in g} codes[o, i] x[m, i])  -  sum_g scales[o, g] zeros[o, g] X[m, g]
    X[m, g] = sum_{i in g} x[m, i]

On a CPU the torch twin multiplies (grouped_int_twin.py), on a GPU Triton kernels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from quantkit.errors import RequestError
from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.kernels.column_sums import may_sum_columns
from quantkit.kernels.few_rows import few_rows, has_few_rows
from quantkit.kernels.gemv import gemv, has_gemv
from quantkit.kernels.grouped_int_twin import matmul_reference
from quantkit.kernels.launch import multiplies_bytes
from quantkit.kernels.mixed_rows import has_mixed_rows, mixed_rows
from quantkit.kernels.planar import from_planar
from quantkit.kernels.planar_matmul import dequantized_matmul
from quantkit.kernels.planar_product import has_planar_product, planar_product
from quantkit.kernels.wide_product import has_wide_product, wide_product

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def matmul(x: Tensor, spec: GroupedIntSpec, tensors: dict[str, Tensor], bias: Tensor | None = None) -> Tensor:
    """Multiply activations by a packed weight.

    Args:
        x: float32, bfloat16 or float16 ``[..., in_features]``, on the device of the tensors.
        spec: shape and widths of the packed weight.
        tensors: the stored tensors of ``spec.tensor_layout()``, or what `planar.to_planar` made of them.
        bias: ``[out_features]`` or None.

    Returns:
        ``[..., out_features]`` in ``x.dtype``; sums are float32. Stored tensors are multiplied by the torch twin on any
        device, with float32 products, or on a CPU, for many rows of bfloat16, with the weight rounded to bfloat16.
        Planar tensors on a GPU are multiplied by Triton kernels: for few rows of x products with x in 16 (one bit: 12)
        bits relative to its largest neighbours (gemv.py, mixed_rows.py, few_rows.py), up to 64 to 256 rows exact
        products of half precision activations (planar_product.py, wide_product.py), and above (or in float32) products
        with the weight rounded to the dtype of x.

    Raises:
        RequestError: wrong last dimension or dtype of ``x``.
    """
    if x.shape[-1] != spec.in_features:
        raise RequestError(f"grouped_int: x has {x.shape[-1]} columns, the weight has {spec.in_features}")
    if x.dtype not in _DTYPES:
        raise RequestError(f"grouped_int: x is {x.dtype}; use float32, bfloat16 or float16")
    rows = x.reshape(-1, spec.in_features)
    segments = [number for segment in spec.segments for number in segment]
    shape = (spec.out_features, spec.group_size, segments, spec.symmetric)
    if "planar" in tensors:
        product = torch.ops.quantkit.grouped_int_planar_matmul(
            rows,
            tensors["planar"],
            tensors["planar_scales"],
            tensors.get("planar_zeros"),
            tensors.get("planar_order"),
            tensors["counters"],
            bias,
            *shape,
        )
    else:
        stored = [tensors[name] for name in spec.tensor_layout()]
        product = torch.ops.quantkit.grouped_int_matmul(rows, stored, bias, *shape)
    return cast(Tensor, product).reshape(*x.shape[:-1], spec.out_features)


def codes_by_columns(spec: GroupedIntSpec) -> list[str]:
    """Stored tensors that a CPU multiplies faster when they lie column after column in memory."""
    return [f"codes_{bits}b" for bits, _ in spec.segments if may_sum_columns(bits, spec.group_size)]


@lru_cache(maxsize=1024)
def _spec(out_features: int, group_size: int, segments: tuple[int, ...], symmetric: bool) -> GroupedIntSpec:
    pairs = tuple(zip(segments[::2], segments[1::2], strict=True))
    return GroupedIntSpec(
        out_features=out_features,
        in_features=group_size * sum(segments[1::2]),
        group_size=group_size,
        segments=pairs,
        symmetric=symmetric,
    )


def _stored_op(
    x: Tensor,
    tensors: list[Tensor],
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    segments: list[int],
    symmetric: bool,
) -> Tensor:
    spec = _spec(out_features, group_size, tuple(segments), symmetric)
    return matmul_reference(x, spec, dict(zip(spec.tensor_layout(), tensors, strict=True)), bias)


def planar_matmul(x: Tensor, spec: GroupedIntSpec, tensors: dict[str, Tensor], bias: Tensor | None) -> Tensor:
    """``[m, in]`` to ``[m, out]`` in the dtype of x, on a GPU, from the tensors of `to_planar`."""
    if len(x) == 0:
        return x.new_empty(0, spec.out_features)
    if has_few_rows(x, spec):
        return few_rows(x, spec, tensors, bias)
    if has_gemv(x, spec):
        return gemv(x, spec, tensors, bias)
    if has_mixed_rows(x, spec) and multiplies_bytes(x.device):
        return mixed_rows(x, spec, tensors, bias)
    if has_wide_product(x, spec):
        return wide_product(x.contiguous(), spec, tensors, bias)
    if has_planar_product(x, spec):
        return planar_product(x.contiguous(), spec, tensors, bias)
    return dequantized_matmul(x, spec, tensors, bias)


def _planar_op(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    counters: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    segments: list[int],
    symmetric: bool,
) -> Tensor:
    spec = _spec(out_features, group_size, tuple(segments), symmetric)
    tensors = {"planar": words, "planar_scales": scales, "counters": counters}
    if zeros is not None:
        tensors["planar_zeros"] = zeros
    if order is not None:
        tensors["planar_order"] = order
    if x.is_cuda:
        return planar_matmul(x, spec, tensors, bias)
    return matmul_reference(x, spec, from_planar(spec, tensors), bias)


def _fake_op(x: Tensor, *arguments: Any) -> Tensor:
    out_features = arguments[-4]
    return x.new_empty(x.shape[0], out_features)


# Operators, so that torch.compile keeps the calls as they are and CUDA graphs record them. `counters` is scratch whose
# value a call does not change, hence not declared as mutated. Plain Library: half the dispatch cost of custom_op.
_LIBRARY = torch.library.Library("quantkit", "FRAGMENT")  # type: ignore[no-untyped-call]
_SHAPE = "Tensor? bias, int out_features, int group_size, int[] segments, bool symmetric) -> Tensor"
_OPERATORS = {
    "grouped_int_matmul": ("Tensor x, Tensor[] tensors", _stored_op),
    "grouped_int_planar_matmul": (
        "Tensor x, Tensor words, Tensor scales, Tensor? zeros, Tensor? order, Tensor counters",
        _planar_op,
    ),
}
for _name, (_arguments, _function) in _OPERATORS.items():
    _LIBRARY.define(f"{_name}({_arguments}, {_SHAPE}")  # type: ignore[no-untyped-call]
    for _device in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _function, _device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"quantkit::{_name}", _fake_op, lib=_LIBRARY)
