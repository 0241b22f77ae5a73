"""Linears that read the same activations as one: query, key and value; gate and up. One launch instead of several.

Rows of a `grouped_int` weight are independent, so weights of one width are stacked by putting the rows of one below
those of the other; so are dense ones. The sign formats are stacked in another way (sign_stacks.py). What cannot be
stacked (mixed widths in different orders, factors of integers) is called one after the other, and the results joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import RequestError
from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.formats.packing import pack_bits, unpack_bits
from quantkit.formats.sign_factors import SignFactorsSpec
from quantkit.formats.sign_salient import SALIENT, SignSalientSpec
from quantkit.runtime.packed_linear import PackedLinear
from quantkit.runtime.sign_stacks import FactorStack, SalientStack


class Moved(nn.Module):
    """Where a linear was that is now part of a stack: whoever still calls or saves the model is told."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise RequestError("this model was rebuilt for decoding and cannot be called; load it again")

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise RequestError("this model was rebuilt for decoding and cannot be saved; load it again")


class Joined(nn.Module):
    """Linears whose results are put side by side."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in self.linears], -1)


def stack_linears(parent: nn.Module, names: Sequence[str]) -> nn.Module:
    """One module with the results of the named children side by side; the children are `Moved`.

    It takes ``[m, in]``. A single child that gains nothing stays where it is.
    """
    linears = [parent.get_submodule(name) for name in names]
    if len(names) == 1 and not _has_signs(linears[0]):
        return linears[0]
    for name in names:
        setattr(parent, name, Moved())
    if all(type(linear) is nn.Linear for linear in linears):
        return _stack_dense(linears)
    if all(isinstance(linear, PackedLinear) for linear in linears):
        return _stack_packed(linears) or Joined(linears)
    return Joined(linears)


def _has_signs(linear: nn.Module) -> bool:
    return isinstance(linear, PackedLinear) and isinstance(linear.spec, SignSalientSpec | SignFactorsSpec)


def _stack_dense(linears: Sequence[Any]) -> nn.Linear:
    weight = torch.cat([linear.weight for linear in linears])
    stacked = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    stacked.weight = nn.Parameter(weight, requires_grad=False)
    stacked.register_parameter("bias", _bias(linears))
    return stacked


def _stack_packed(linears: Sequence[Any]) -> nn.Module | None:
    """None where the weights cannot be one."""
    specs = [linear.spec for linear in linears]
    if all(isinstance(spec, SignSalientSpec) for spec in specs) and SalientStack.fits(specs):
        integers = _salient_rows(specs, [each.stored_tensors() for each in linears])
        return SalientStack(linears, integers, _bias(linears))
    if all(isinstance(spec, SignFactorsSpec) for spec in specs) and FactorStack.fits(specs):
        return FactorStack(linears, _bias(linears))
    if not all(isinstance(spec, GroupedIntSpec) for spec in specs):
        return None
    if len({replace(spec, out_features=1) for spec in specs}) > 1:
        return None
    tensors = [linear.stored_tensors() for linear in linears]
    if len(specs[0].segments) > 1 and not all(
        torch.equal(each["group_order"], tensors[0]["group_order"]) for each in tensors
    ):
        return None
    spec = replace(specs[0], out_features=sum(each.out_features for each in specs))
    bias = _bias(linears)
    first = linears[0]
    stacked = PackedLinear(spec, bias=bias is not None, dtype=first.weight.dtype, device=first.weight.device)
    for name, tensor in stack_tensors(specs, tensors).items():
        setattr(stacked, name, tensor)
    stacked.bias = bias
    stacked.use_device_form()
    return stacked


def stack_tensors(specs: Sequence[GroupedIntSpec], tensors: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stored tensors of the rows of all weights, one below the other; specs differ in their rows only."""
    stacked = {}
    for name in tensors[0]:
        parts = [each[name] for each in tensors]
        if name == "group_order":
            stacked[name] = parts[0]
        elif name.startswith("zeros_") and name != "zeros_1b":  # one bit stream over all rows
            bits = int(name.removeprefix("zeros_").removesuffix("b"))
            count = dict(specs[0].segments)[bits]
            codes = [
                unpack_bits(part, bits, spec.out_features * count) for part, spec in zip(parts, specs, strict=True)
            ]
            stacked[name] = pack_bits(torch.cat(codes), bits)
        else:
            stacked[name] = torch.cat(parts)
    return stacked


def _salient_rows(specs: Sequence[SignSalientSpec], tensors: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stored tensors of the integers of all rows; none without salient columns."""
    parts = [spec.salient for spec in specs if spec.salient]
    if not parts:
        return {}
    names = parts[0].tensor_layout()
    return stack_tensors(parts, [{name: each[SALIENT + name] for name in names} for each in tensors])


def _bias(linears: Sequence[Any]) -> nn.Parameter | None:
    if all(linear.bias is None for linear in linears):
        return None
    parts = [linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears]
    return nn.Parameter(torch.cat(parts), requires_grad=False)
