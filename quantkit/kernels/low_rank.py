"""Linear layer on `low_rank` weights: two chained `grouped_int` products.

    z = down x  [.., rank],     y = up z + bias

Each runs on the kernel of `grouped_int`, on CUDA from its planar form; the weight itself is never made. A token costs
rank * (in + out) multiplications instead of in * out. The latents z are in the dtype of ``x``.
"""

from __future__ import annotations

from torch import Tensor

from quantkit.formats.low_rank import DOWN, UP, LowRankSpec
from quantkit.formats.spec import with_prefix, without_prefix
from quantkit.kernels import grouped_int, planar


def matmul(x: Tensor, spec: LowRankSpec, tensors: dict[str, Tensor], bias: Tensor | None = None) -> Tensor:
    """Multiply activations by a packed weight.

    Args:
        x: float32, bfloat16 or float16 ``[..., in_features]``, on the device of the tensors.
        spec: both factors' shapes and storage.
        tensors: the stored tensors, or those of `to_planar`.
        bias: ``[out_features]`` or None.

    Returns:
        ``[..., out_features]`` in ``x.dtype``.

    Raises:
        RequestError: wrong last dimension or dtype of ``x``.
    """
    latents = grouped_int.matmul(x, spec.down, without_prefix(DOWN, tensors))
    return grouped_int.matmul(latents, spec.up, without_prefix(UP, tensors), bias)


def codes_by_columns(spec: LowRankSpec) -> list[str]:
    """Stored tensors that a CPU multiplies faster when they lie column after column in memory."""
    down, up = grouped_int.codes_by_columns(spec.down), grouped_int.codes_by_columns(spec.up)
    return [DOWN + name for name in down] + [UP + name for name in up]


def is_planar(spec: LowRankSpec) -> bool:
    """Whether both factors have a planar form."""
    return planar.is_planar(spec.down) and planar.is_planar(spec.up)


def to_planar(spec: LowRankSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The form that CUDA kernels read."""
    down = planar.to_planar(spec.down, without_prefix(DOWN, tensors))
    return with_prefix(DOWN, down) | with_prefix(UP, planar.to_planar(spec.up, without_prefix(UP, tensors)))


def from_planar(spec: LowRankSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Exact inverse of `to_planar`."""
    down = planar.from_planar(spec.down, without_prefix(DOWN, tensors))
    return with_prefix(DOWN, down) | with_prefix(UP, planar.from_planar(spec.up, without_prefix(UP, tensors)))
