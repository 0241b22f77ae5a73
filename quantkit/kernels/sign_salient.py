"""Linear layer on `sign_salient` weights: a product with packed signs, and one with packed codes of salient columns.

    y = row_scales * (S (column_scales * x_b)) + row_means * sum(column_scales * x_b) + Q x_s + bias

x_s are the salient columns of x and x_b the others, S the signs and Q the `grouped_int` part. Neither part is ever
decoded as a whole.
"""

from __future__ import annotations

from torch import Tensor

from quantkit.formats.packing import unpack_bits
from quantkit.formats.sign_salient import NAME, SALIENT, SignSalientSpec
from quantkit.formats.spec import without_prefix
from quantkit.kernels import grouped_int
from quantkit.kernels.signs import as_rows, sign_matmul


def matmul(x: Tensor, spec: SignSalientSpec, tensors: dict[str, Tensor], bias: Tensor | None = None) -> Tensor:
    """Multiply activations by a packed weight.

    Args:
        x: float32, bfloat16 or float16 ``[..., in_features]``, on the device of the tensors.
        spec: shape and parts of the packed weight.
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


def column_order(spec: SignSalientSpec, tensors: dict[str, Tensor]) -> Tensor:
    """int64 ``[in_features]``: the columns that are not salient, then the salient ones."""
    return unpack_bits(tensors["salient_columns"], 1, spec.in_features).argsort(stable=True)
