"""Linear layer on `sign_factors` weights: two chained products with packed sign matrices.

    z = latent_scales * (V (column_scales * x)),     y = row_scales * (U z) + bias,     summed over the paths

Neither the weight nor a factor is ever decoded as a whole, but for many rows of x on a GPU (see `matmul`).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantkit.formats.sign_factors import NAME, SignFactorsSpec
from quantkit.kernels.column_sums import may_sum_columns
from quantkit.kernels.gemv import HALF_TYPES
from quantkit.kernels.launch import counts_bits
from quantkit.kernels.planar_matmul import dequantize_rows
from quantkit.kernels.planar_product import has_planar_product, planar_product
from quantkit.kernels.ready_row import Source
from quantkit.kernels.sign_planar import factor, factor_specs, factors_from_planar, latent_span
from quantkit.kernels.sign_product import has_sign_product, sign_product
from quantkit.kernels.signs import as_rows, prepare, sign_kernels, sign_matmul

_LATENT_COLUMNS = 256
_FEW_ROWS = 4  # up to which a launch that reads the weight once for each is the fastest


def matmul(x: Tensor, spec: SignFactorsSpec, tensors: dict[str, Tensor], bias: Tensor | None = None) -> Tensor:
    """Multiply activations by a packed weight.

    Args:
        x: float32, bfloat16 or float16 ``[..., in_features]``, on the device of the tensors.
        spec: shape and ranks of the packed weight.
        tensors: the stored tensors of ``spec.tensor_layout()``, or what `sign_planar.factors_to_planar` made of them.
        bias: ``[out_features]`` or None.

    Returns:
        ``[..., out_features]`` in ``x.dtype``; sums are float32. Stored tensors are multiplied by the torch twin on any
        device. Planar tensors on a GPU are multiplied by Triton kernels, with ``column_scales * x`` and ``z`` rounded
        to the dtype of x; for many rows of x (or in float32) each factor is decoded once and multiplied.

    Raises:
        RequestError: wrong last dimension or dtype of ``x``.
    """
    rows = as_rows(x, NAME, spec.in_features)
    if "v_planar" in tensors:
        shape = (spec.out_features, spec.in_features, list(spec.ranks))
        held = [tensors[name] for name in PLANAR_TENSORS]
        product = cast(Tensor, torch.ops.quantkit.sign_factors_planar_matmul(rows, bias, *held, *shape))
    else:
        product = matmul_reference(rows, spec, tensors, bias)
    return product.reshape(*x.shape[:-1], spec.out_features)


def matmul_reference(x: Tensor, spec: SignFactorsSpec, tensors: dict[str, Tensor], bias: Tensor | None) -> Tensor:
    """Torch twin: ``[m, in]`` to ``[m, out]`` in ``x.dtype``, through float32 latents."""
    columns, latent_scales = tensors["column_scales"].float(), tensors["latent_scales"].float()
    latents = x.new_zeros(len(spec.ranks), len(x), spec.total_rank, dtype=torch.float32)
    start = 0
    for path, rank in enumerate(spec.ranks):  # zero in the ranks of the other path: U is then read once for both
        own = slice(start, start + rank)
        latents[path, :, own] = sign_matmul(x.float() * columns[path], tensors["v_signs"][own], latent_scales[own])
        start += rank
    ones = latents.new_ones(spec.out_features)
    products = sign_matmul(latents.flatten(0, 1), tensors["u_signs"], ones)
    out = (products.view(len(spec.ranks), len(x), spec.out_features) * tensors["row_scales"].float()[:, None]).sum(0)
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype)


def codes_by_columns(spec: SignFactorsSpec) -> list[str]:
    """Stored tensors that a CPU multiplies faster when they lie column after column in memory."""
    columns = {"v_signs": spec.in_features, "u_signs": spec.total_rank}
    return [name for name, n in columns.items() if may_sum_columns(1, n)]


def planar_matmul(x: Tensor, spec: SignFactorsSpec, tensors: dict[str, Tensor], bias: Tensor | None) -> Tensor:
    """``[m, in]`` to ``[m, out]`` in the dtype of x, on a GPU, from the tensors of `factors_to_planar`."""
    if len(x) == 0:
        return x.new_empty(0, spec.out_features)
    v, u = factor_specs(spec)
    if len(x) <= _FEW_ROWS and x.dtype in HALF_TYPES and has_sign_product(u) and counts_bits(x.device):
        words, scales = tensors["u_planar"], tensors["row_scales"]
        first = tensors["v_planar"], tensors["z_scales"], tensors["x_scales"]
        z, _ = sign_product(Source(x=x), v, *first, None, x.dtype)
        return sign_product(Source(x=z), u, words, scales, None, bias, x.dtype)[0]
    scaled = prepare(x, None, tensors["x_scales"])
    if not has_planar_product(x, v):
        return _decoded_matmul(scaled, spec, tensors, bias)
    latents = planar_product(scaled, v, factor(tensors, "v_"), None, torch.float32)
    z = select_latents(latents, tensors["z_scales"], len(x), latent_span(spec), x.dtype)
    return planar_product(z, u, factor(tensors, "u_"), bias)


def select_latents(latents: Tensor, scales: Tensor, n_tokens: int, span: int, dtype: torch.dtype) -> Tensor:
    """``[paths * n_tokens, n]`` to scaled ``[n_tokens, n]``: of each latent, what the activations of its path gave."""
    out = latents.new_empty(n_tokens, latents.shape[1], dtype=dtype)
    grid = (n_tokens, -(-out.shape[1] // _LATENT_COLUMNS))
    with torch.cuda.device(latents.device):
        sign_kernels().latent_kernel[grid](
            latents, scales, out, n_tokens, out.shape[1], span, COLUMNS=_LATENT_COLUMNS, num_warps=4
        )
    return out


def _decoded_matmul(scaled: Tensor, spec: SignFactorsSpec, tensors: dict[str, Tensor], bias: Tensor | None) -> Tensor:
    """``scaled`` [paths * m, padded in]: the factors in its dtype, one after the other."""
    (v, u), span, dtype = factor_specs(spec), latent_span(spec), scaled.dtype
    parts = scaled.chunk(len(spec.ranks))
    z = scaled.new_empty(len(parts[0]), v.out_features)
    for path, part in enumerate(parts):
        rows = slice(path * span, (path + 1) * span)
        product = linear(part, dequantize_rows(v, factor(tensors, "v_"), rows.start, rows.stop, dtype))
        z[:, rows] = (product.float() * tensors["z_scales"][rows]).to(dtype)
    weight = dequantize_rows(u, factor(tensors, "u_"), 0, u.out_features, dtype)
    return linear(z, weight, None if bias is None else bias.to(dtype))


# What `sign_planar.factors_to_planar` holds, in the order of the operator's arguments.
PLANAR_TENSORS = (
    *("v_planar", "v_scales", "v_counters", "u_planar", "u_scales", "u_counters"),
    *("x_scales", "z_scales", "column_scales", "latent_scales", "row_scales"),
)


def _planar_op(x: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    out_features, in_features, ranks = arguments[len(PLANAR_TENSORS) :]
    spec = SignFactorsSpec(out_features=out_features, in_features=in_features, ranks=tuple(ranks))
    tensors = dict(zip(PLANAR_TENSORS, arguments[: len(PLANAR_TENSORS)], strict=True))
    if x.is_cuda:
        return planar_matmul(x.contiguous(), spec, tensors, bias)
    return matmul_reference(x, spec, factors_from_planar(spec, tensors), bias)


def _fake_op(x: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape[0], arguments[len(PLANAR_TENSORS)])


_LIBRARY = torch.library.Library("quantkit", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "sign_factors_planar_matmul(Tensor x, Tensor? bias, "
    + "".join(f"Tensor {name}, " for name in PLANAR_TENSORS)
    + "int out_features, int in_features, int[] ranks) -> Tensor"
)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("sign_factors_planar_matmul", _planar_op, _device)  # type: ignore[no-untyped-call]
torch.library.register_fake("quantkit::sign_factors_planar_matmul", _fake_op, lib=_LIBRARY)
