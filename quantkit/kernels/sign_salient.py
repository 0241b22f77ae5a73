"""Linear layer on `sign_salient` weights: a product with packed signs, and one with packed codes of salient columns.

    y = row_scales * (S (column_scales * x_b)) + row_means * sum(column_scales * x_b) + Q x_s + bias

x_s are the salient columns of x and x_b the others, S the signs and Q the `grouped_int` part. Neither part is ever
decoded as a whole, but for many rows of x on a GPU (see `matmul`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.formats.packing import unpack_bits
from quantkit.formats.sign_salient import NAME, SALIENT, SignSalientSpec
from quantkit.formats.spec import without_prefix
from quantkit.kernels import grouped_int
from quantkit.kernels.column_sums import may_sum_columns
from quantkit.kernels.launch import counts_bits
from quantkit.kernels.planar_matmul import dequantize_rows, dequantized_matmul
from quantkit.kernels.planar_product import has_planar_product, planar_product
from quantkit.kernels.ready_row import Source, make_ready
from quantkit.kernels.sign_planar import binary_part, binary_spec, row_signs, salient_from_planar, salient_parts
from quantkit.kernels.sign_rows import sign_rows
from quantkit.kernels.signs import as_rows, prepare, sign_matmul

_FEW_ROWS = 2  # up to which one after the other is the fastest
_SLAB_BYTES = 1 << 28  # of decoded weight at a time


def matmul(x: Tensor, spec: SignSalientSpec, tensors: dict[str, Tensor], bias: Tensor | None = None) -> Tensor:
    """Multiply activations by a packed weight.

    Args:
        x: float32, bfloat16 or float16 ``[..., in_features]``, on the device of the tensors.
        spec: shape and parts of the packed weight.
        tensors: the stored tensors of ``spec.tensor_layout()``, or what `sign_planar.salient_to_planar` made of them.
        bias: ``[out_features]`` or None.

    Returns:
        ``[..., out_features]`` in ``x.dtype``; sums are float32. Stored tensors are multiplied by the torch twin on any
        device. Planar tensors on a GPU are multiplied by a Triton kernel, with ``column_scales * x_b`` rounded to the
        dtype of x; for many rows of x (or in float32) each part is decoded in slabs and multiplied as it is.

    Raises:
        RequestError: wrong last dimension or dtype of ``x``.
    """
    rows = as_rows(x, NAME, spec.in_features)
    if "sign_scales" in tensors:
        numbers = (spec.out_features, spec.in_features, spec.row_means, spec.column_scales, *_salient_numbers(spec))
        product = cast(
            Tensor,
            torch.ops.quantkit.sign_salient_planar_matmul(rows, bias, *map(tensors.get, PLANAR_TENSORS), *numbers),
        )
    else:
        product = matmul_reference(rows, spec, tensors, bias)
    return product.reshape(*x.shape[:-1], spec.out_features)


def matmul_reference(x: Tensor, spec: SignSalientSpec, tensors: dict[str, Tensor], bias: Tensor | None) -> Tensor:
    """Torch twin: ``[m, in]`` to ``[m, out]`` in ``x.dtype``, in float32."""
    columns = x.float()
    if spec.salient:
        columns = columns[:, column_order(spec, tensors)]
    binary = columns[:, : spec.n_binary]
    if spec.column_scales:
        binary = binary * tensors["column_scales"].float()
    out = sign_matmul(binary, tensors["signs"], tensors["row_scales"].float())
    if spec.row_means:
        out += binary.sum(1, keepdim=True) * tensors["row_means"].float()
    if spec.salient:
        out += grouped_int.matmul(columns[:, spec.n_binary :], spec.salient, without_prefix(SALIENT, tensors))
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype)


def codes_by_columns(spec: SignSalientSpec) -> list[str]:
    """Stored tensors that a CPU multiplies faster when they lie column after column in memory."""
    salient = [SALIENT + name for name in grouped_int.codes_by_columns(spec.salient)] if spec.salient else []
    return ["signs"] * may_sum_columns(1, spec.n_binary) + salient


def column_order(spec: SignSalientSpec, tensors: dict[str, Tensor]) -> Tensor:
    """int64 ``[in_features]``: the columns that are not salient, then the salient ones."""
    return unpack_bits(tensors["salient_columns"], 1, spec.in_features).argsort(stable=True)


def planar_matmul(x: Tensor, spec: SignSalientSpec, tensors: dict[str, Tensor], bias: Tensor | None) -> Tensor:
    """``[m, in]`` to ``[m, out]`` in the dtype of x, on a GPU, from the tensors of `salient_to_planar`."""
    if len(x) == 0:
        return x.new_empty(0, spec.out_features)
    if len(x) <= _FEW_ROWS and "x_places" in tensors and x.dtype != torch.float32 and counts_bits(x.device):
        return _row_by_row(x, spec, tensors, bias)
    prepared = prepare(x, tensors["x_order"], tensors["x_scales"])
    if not has_planar_product(x, binary_spec(spec)):
        return _decoded_matmul(prepared, spec, tensors, bias)
    total, weights = bias, few_rows_parts(spec, tensors)
    for index, (weight, first, held) in enumerate(weights):
        dtype = x.dtype if index == len(weights) - 1 else torch.float32
        total = planar_product(prepared[:, first : first + weight.in_features], weight, held, total, dtype)
    assert total is not None
    return total


def _row_by_row(x: Tensor, spec: SignSalientSpec, tensors: dict[str, Tensor], bias: Tensor | None) -> Tensor:
    parts, integers = salient_parts(spec), without_prefix(SALIENT, tensors)
    places, factors = tensors["x_places"][None], tensors["x_factors"][None]
    out = x.new_empty(len(x), spec.out_features)
    for row in range(len(x)):
        ready, numbers, _ = make_ready(Source(x=x[row : row + 1]), parts, places, factors)
        sign_rows(ready, numbers, parts, row_signs(tensors), integers, bias, out[row : row + 1])
    return out


def few_rows_parts(
    spec: SignSalientSpec, tensors: dict[str, Tensor]
) -> list[tuple[GroupedIntSpec, int, dict[str, Tensor]]]:
    """The weights whose products add up: (spec, its first column in prepared x, planar tensors)."""
    binary, signs = _with_means(spec, tensors)
    parts = [(binary, 0, signs)]
    if spec.salient:
        parts.append((spec.salient, binary.in_features, without_prefix(SALIENT, tensors)))
    return parts


def _with_means(spec: SignSalientSpec, tensors: dict[str, Tensor]) -> tuple[GroupedIntSpec, dict[str, Tensor]]:
    """The columns with signs; their means, if any, as zeros of a one-bit weight: no pass over the result."""
    binary, signs = binary_spec(spec), binary_part(tensors)
    if spec.row_means:
        return replace(binary, symmetric=False), signs | {"planar_zeros": tensors["sign_zeros"]}
    return binary, signs


def _decoded_matmul(x: Tensor, spec: SignSalientSpec, tensors: dict[str, Tensor], bias: Tensor | None) -> Tensor:
    """x as `prepare` leaves it; the parts in its dtype, slab by slab, the second added to the first by the product."""
    binary, signs = _with_means(spec, tensors)
    out = dequantized_matmul(x[:, : binary.in_features], binary, signs, bias)
    if spec.salient:
        salient, part = x[:, binary.in_features :], without_prefix(SALIENT, tensors)
        step = max(1, _SLAB_BYTES // (spec.n_salient * x.element_size()))
        for first in range(0, spec.out_features, step):
            last = min(first + step, spec.out_features)
            weight = dequantize_rows(spec.salient, part, first, last, x.dtype)
            out[:, first:last].addmm_(salient, weight.t())
    return out


def _salient_numbers(spec: SignSalientSpec) -> tuple[int, int, int, bool]:
    """Salient columns, group size, bits and symmetry: operators take plain values."""
    if spec.salient is None:
        return 0, 0, 0, False
    return spec.n_salient, spec.salient.group_size, spec.salient.segments[0][0], spec.salient.symmetric


@lru_cache(maxsize=1024)
def _spec(
    out_features: int,
    in_features: int,
    row_means: bool,
    column_scales: bool,
    n_salient: int,
    group_size: int,
    bits: int,
    symmetric: bool,
) -> SignSalientSpec:
    salient = None
    if n_salient:
        salient = GroupedIntSpec(
            out_features=out_features,
            in_features=n_salient,
            group_size=group_size,
            segments=((bits, n_salient // group_size),),
            symmetric=symmetric,
        )
    return SignSalientSpec(
        out_features=out_features,
        in_features=in_features,
        row_means=row_means,
        column_scales=column_scales,
        salient=salient,
    )


# What `sign_planar.salient_to_planar` may hold, in the order of the operator's arguments: absent ones are None.
PLANAR_TENSORS = (
    "planar",
    "sign_scales",
    "sign_zeros",
    "counters",
    "salient_planar",
    "salient_planar_scales",
    "salient_planar_zeros",
    "salient_counters",
    "x_order",
    "x_scales",
    "x_places",
    "x_factors",
    "row_scales",
    "row_means",
    "column_scales",
    "salient_columns",
)


def _planar_op(x: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    spec = _spec(*arguments[len(PLANAR_TENSORS) :])
    held = zip(PLANAR_TENSORS, arguments[: len(PLANAR_TENSORS)], strict=True)
    tensors = {name: tensor for name, tensor in held if tensor is not None}
    if x.is_cuda:
        return planar_matmul(x.contiguous(), spec, tensors, bias)
    return matmul_reference(x, spec, salient_from_planar(spec, tensors), bias)


def _fake_op(x: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape[0], arguments[len(PLANAR_TENSORS)])


_LIBRARY = torch.library.Library("quantkit", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "sign_salient_planar_matmul(Tensor x, Tensor? bias, "
    + "".join(f"Tensor? {name}, " for name in PLANAR_TENSORS)
    + "int out_features, int in_features, bool has_means, bool has_column_scales, int n_salient, int group_size, "
    "int bits, bool symmetric) -> Tensor"
)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("sign_salient_planar_matmul", _planar_op, _device)  # type: ignore[no-untyped-call]
torch.library.register_fake("quantkit::sign_salient_planar_matmul", _fake_op, lib=_LIBRARY)
