"""Linear layer on `sign_factors` weights: two chained products with packed sign matrices.

    z = latent_scales * (V (column_scales * x)),     y = row_scales * (U z) + bias,     summed over the paths

Neither the weight nor a factor is ever decoded as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.formats.sign_factors import NAME, SignFactorsSpec
from quantkit.kernels.signs import as_rows, sign_matmul


def matmul(x: Tensor, spec: SignFactorsSpec, tensors: dict[str, Tensor], bias: Tensor | None = None) -> Tensor:
    """Multiply activations by a packed weight.

    Args:
        x: float32, bfloat16 or float16 ``[..., in_features]``, on the device of the tensors.
        spec: shape and ranks of the packed weight.
        tensors: the stored tensors of ``spec.tensor_layout()``.
        bias: ``[out_features]`` or None.

    Returns:
        ``[..., out_features]`` in ``x.dtype``; sums are float32.

    Raises:
        RequestError: wrong last dimension or dtype of ``x``.
    """
    rows = as_rows(x, NAME, spec.in_features)
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
