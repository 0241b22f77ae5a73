"""`PackedLinear`: an ``nn.Linear`` that keeps its weight as the packed tensors of a storage format.

`PackedWeight` is what it shares with `packed_embedding.PackedEmbedding`: buffers, device forms, moves, state dicts.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.formats.checkpoint import TRIPWIRE
from quantkit.formats.spec import Spec
from quantkit.kernels.column_sums import by_columns, is_by_columns
from quantkit.kernels.storage import kernel_of


class PackedWeight(nn.Module):
    """A module whose weight is held as the packed tensors of a storage format; the dense weight never exists.

    Buffers: the stored tensors exactly as ``spec.tensor_layout()`` names, types and shapes them, and a zero-element
    ``weight``, which is the checkpoint's tripwire and tells code that peeks at ``linear.weight.dtype`` and ``.device``
    what it wants to know. On a CUDA device the stored tensors are replaced by their planar equal (kernels/planar.py)
    where the format has one: one copy is held, never both. On a CPU the codes of a linear lie column after column in
    memory (kernels/column_sums.py), shape and values as stored. A state dict always has the stored tensors, byte for
    byte.

    Args:
        spec: shape and storage of the weight.
        dtype: compute dtype of the model around this module; converting the model never touches the packed tensors.
        tripwire: whether a state dict holds the zero-element ``weight``, there always float16.
        device: of all tensors, uninitialized until loaded; "meta" works.
    """

    weight: Tensor
    orders_columns = False  # whether the CPU's order is used; not for tables whose rows are looked up

    def __init__(
        self,
        spec: Spec,
        *,
        dtype: torch.dtype = torch.float32,
        tripwire: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.kernel = kernel_of(spec)
        self.packed_names = tuple(spec.tensor_layout())  # the buffers that hold the weight, in the present form
        for name, (stored_dtype, shape) in spec.tensor_layout().items():
            self.register_buffer(name, torch.empty(shape, dtype=stored_dtype, device=device))
        self.register_buffer(TRIPWIRE, torch.empty(0, dtype=dtype, device=device), persistent=tripwire)

    def packed_tensors(self) -> dict[str, Tensor]:
        """The weight's buffers in the form in which they are held."""
        buffers = self._buffers  # not get_buffer: its checks would cost more than a small product
        return {name: buffers[name] for name in self.packed_names}  # type: ignore[misc]  # None only for unset ones

    def stored_tensors(self) -> dict[str, Tensor]:
        """The tensors of ``spec.tensor_layout()``, contiguous; computed when the module holds them otherwise."""
        if not self.is_planar:
            return {name: tensor.contiguous() for name, tensor in self.packed_tensors().items()}
        return self.kernel.from_planar(self.spec, self.packed_tensors())

    @property
    def is_planar(self) -> bool:
        return self.packed_names != tuple(self.spec.tensor_layout())

    def use_planar_form(self) -> None:
        """Hold the kernels' planar form instead of the stored tensors, where there is one."""
        if not self.is_planar and self.kernel.is_planar(self.spec):
            self._replace_buffers(self.kernel.to_planar(self.spec, self.stored_tensors()), persistent=False)

    def use_stored_form(self) -> None:
        """Hold the stored tensors again."""
        if self.is_planar:
            self._replace_buffers(self.stored_tensors(), persistent=True)

    def use_device_form(self) -> None:
        """The form that runs where the tensors are: planar on CUDA, stored elsewhere and without Triton."""
        device = self.get_buffer(self.packed_names[0]).device.type
        if device == "cuda" and find_spec("triton") is not None:
            self.use_planar_form()
            return
        self.use_stored_form()
        for name in self.kernel.by_columns(self.spec) if self.orders_columns and device == "cpu" else ():
            if not is_by_columns(self.get_buffer(name)):
                setattr(self, name, by_columns(self.get_buffer(name)))

    def _replace_buffers(self, tensors: dict[str, Tensor], persistent: bool) -> None:
        for name in self.packed_names:
            delattr(self, name)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=persistent)
        self.packed_names = tuple(tensors)

    def extra_repr(self) -> str:
        shape = f"in_features={self.spec.in_features}, out_features={self.spec.out_features}"
        return f"{shape}, {self.spec.describe()}, bpw={self.spec.bpw:.3f}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """Moves between devices reach every tensor; conversions (``.half()``, ``.to(dtype)``) spare the packed ones."""
        self.use_stored_form()
        packed = {id(tensor) for tensor in self.packed_tensors().values()}

        def spare(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in packed and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(spare, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        self.use_device_form()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_planar:  # on the CPU: the device has no room for a second copy of every module
            destination |= {prefix + name: tensor.cpu() for name, tensor in self.stored_tensors().items()}
        elif self.orders_columns:
            destination |= {prefix + name: tensor for name, tensor in self.stored_tensors().items()}
        if prefix + TRIPWIRE in destination:
            destination[prefix + TRIPWIRE] = destination[prefix + TRIPWIRE].to(torch.float16)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.use_stored_form()
        super()._load_from_state_dict(*args, **kwargs)
        self.use_device_form()


class PackedLinear(PackedWeight):
    """``y = x W^T + bias`` from packed bytes of any storage format.

    Args:
        spec, dtype, tripwire, device: see `PackedWeight`.
        bias: whether there is a bias, a parameter in ``dtype``.
    """

    bias: nn.Parameter | None
    orders_columns = True

    def __init__(
        self,
        spec: Spec,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        tripwire: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(spec, dtype=dtype, tripwire=tripwire, device=device)
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        value = nn.Parameter(torch.empty(spec.out_features, dtype=dtype, device=device), requires_grad=False)
        self.register_parameter("bias", value if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]`` in the dtype of ``x``."""
        return self.kernel.matmul(x, self.spec, self.packed_tensors(), self.bias)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {self.spec.describe()}, bpw={self.spec.bpw:.3f}"
