"""`PackedLinear`: an ``nn.Linear`` that keeps its weight as the packed tensors of a storage format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.formats.checkpoint import TRIPWIRE
from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.kernels.grouped_int import matmul


class PackedLinear(nn.Module):
    """``y = x W^T + bias`` from packed codes; the dense weight never exists.

    Buffers, all saved: the stored tensors exactly as ``spec.tensor_layout()`` names, types and shapes them, and a
    zero-element ``weight``, which is the checkpoint's tripwire and tells code that peeks at ``linear.weight.dtype`` and
    ``.device`` what it wants to know (it is in the compute dtype here, and float16 in a file).

    Args:
        spec: shape and storage of the weight.
        bias: whether there is a bias, a parameter in ``dtype``.
        dtype: compute dtype of the model around this module; converting the model never touches the packed tensors.
        tripwire: whether a state dict holds the zero-element ``weight``.
        device: of all tensors, uninitialized until loaded; "meta" works.
    """

    scales: Tensor
    weight: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        spec: GroupedIntSpec,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        tripwire: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        for name, (stored_dtype, shape) in spec.tensor_layout().items():
            self.register_buffer(name, torch.empty(shape, dtype=stored_dtype, device=device))
        self.register_buffer(TRIPWIRE, torch.empty(0, dtype=dtype, device=device), persistent=tripwire)
        value = nn.Parameter(torch.empty(spec.out_features, dtype=dtype, device=device), requires_grad=False)
        self.register_parameter("bias", value if bias else None)

    def stored_tensors(self) -> dict[str, Tensor]:
        """The tensors of ``spec.tensor_layout()``."""
        return {name: self.get_buffer(name) for name in self.spec.tensor_layout()}

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]`` in the dtype of ``x``."""
        return matmul(x, self.spec, self.stored_tensors(), self.bias)

    def extra_repr(self) -> str:
        segments = ", ".join(f"{count}x{bits}b" for bits, count in self.spec.segments)
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, groups={segments}, group_size={self.spec.group_size}, bpw={self.spec.bpw:.3f}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Moves between devices reach every tensor; conversions (``.half()``, ``.to(dtype)``) spare the packed ones."""
        stored = {id(tensor) for tensor in self.stored_tensors().values()}

        def spare(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in stored and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(spare, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if prefix + TRIPWIRE in destination:
            destination[prefix + TRIPWIRE] = destination[prefix + TRIPWIRE].to(torch.float16)
