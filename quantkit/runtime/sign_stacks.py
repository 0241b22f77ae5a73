"""Linears of the sign formats that read the same activations: their rows below one another, for one token at a time.

Siblings differ in what they do to the activations: scales of columns, which columns are salient. So each has its own
copy of the token, and one product takes all copies as if they were several tokens: the tensor core has columns to
spare. Of the result, every row is kept for its own copy only.

    sign_salient   copies -> signs and integers -> of both, the rows of each copy, added
    sign_factors   copies, one per path -> V -> the latents of each path, scaled -> U -> the rows of each copy

Several tokens (a prompt) are multiplied sibling by sibling, each with its own rows of the stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.formats.packing import pack_bits, unpack_bits
from quantkit.formats.sign_factors import SignFactorsSpec
from quantkit.formats.sign_salient import SALIENT, SignSalientSpec
from quantkit.formats.spec import with_prefix, without_prefix
from quantkit.kernels import grouped_int
from quantkit.kernels.gather import gather
from quantkit.kernels.planar import to_planar
from quantkit.kernels.planar_matmul import dequantize_rows
from quantkit.kernels.sign_planar import binary_part, binary_spec, has_planar_form, salient_to_planar, sign_spec

_RANKS = 64  # latents of a path are padded to a multiple


class SignStack(nn.Module):
    """What both formats share: rows of the siblings, and which of a product's results they keep."""

    kept: Tensor
    bias: Tensor | None
    order: Tensor
    scales: Tensor

    def __init__(self, linears: Sequence[Any], bias: Tensor | None) -> None:
        super().__init__()
        sizes = [each.spec.out_features for each in linears]
        self.ends = torch.tensor(sizes).cumsum(0).tolist()
        self.starts = [end - size for end, size in zip(self.ends, sizes, strict=True)]
        own = [start + copy * self.ends[-1] for copy, start in enumerate(self.starts)]
        kept = torch.cat([torch.arange(first, first + size) for first, size in zip(own, sizes, strict=True)])
        self.register_buffer("kept", kept.to(torch.int32).to(linears[0].weight.device)[None])
        self.register_buffer("bias", bias)

    def hold(self, prefix: str, tensors: dict[str, Tensor]) -> None:
        """Buffers of one product."""
        for name, tensor in with_prefix(prefix, tensors).items():
            self.register_buffer(name, tensor, persistent=False)

    def held(self, prefix: str) -> dict[str, Tensor]:
        return without_prefix(prefix, cast(dict[str, Tensor], self._buffers))

    def bias_of(self, copy: int) -> Tensor | None:
        return None if self.bias is None else self.bias[self.starts[copy] : self.ends[copy]]


def rows_product(x: Tensor, spec: GroupedIntSpec, tensors: dict[str, Tensor], first: int, last: int) -> Tensor:
    """x by rows first .. last - 1 of a planar weight, which on a GPU are decoded for it."""
    if not x.is_cuda:
        return grouped_int.matmul(x, spec, tensors)[:, first:last]
    return linear(x, dequantize_rows(spec, tensors, first, last, x.dtype))


class SalientStack(SignStack):
    """`sign_salient` siblings with equally many salient columns, stored alike."""

    def __init__(self, linears: Sequence[Any], stacked: dict[str, Tensor], bias: Tensor | None) -> None:
        super().__init__(linears, bias)
        first: SignSalientSpec = linears[0].spec
        rows = self.ends[-1]
        salient = replace(first.salient, out_features=rows) if first.salient else None
        spec = replace(first, out_features=rows, salient=salient)
        planar = salient_to_planar(spec, stacked)
        means = {"planar_zeros": planar["sign_zeros"]} if spec.row_means else {}
        self.binary, self.salient = replace(binary_spec(spec), symmetric=not spec.row_means), salient
        self.hold("signs_", binary_part(planar) | means)
        self.hold("integers_", without_prefix(SALIENT, planar) if salient else {})
        each = [salient_to_planar(linear.spec, linear.stored_tensors()) for linear in linears]
        order = torch.stack([tensors["x_order"] for tensors in each])
        n = self.binary.in_features
        order[order == first.in_features] = -1
        scales = torch.stack([tensors["x_scales"] for tensors in each])
        # of all copies first the columns with signs, then the salient ones: one gather, two contiguous parts
        self.parts = [len(order), n], [len(order), order.shape[1] - n]
        for name, table in (("order", order), ("scales", scales)):
            flat = torch.cat([table[:, :n].flatten(), table[:, n:].flatten()])
            self.register_buffer(name, flat, persistent=False)

    @staticmethod
    def fits(specs: Sequence[SignSalientSpec]) -> bool:
        """Whether siblings can be stacked."""
        shapes = {replace(spec, out_features=1, salient=None) for spec in specs}
        parts = {replace(spec.salient, out_features=1) if spec.salient else None for spec in specs}
        return len(shapes) == len(parts) == 1 and has_planar_form(specs[0])

    def forward(self, x: Tensor) -> Tensor:
        """``[m, in]`` to the results of all siblings side by side, ``[m, rows]``."""
        if len(x) > 1:
            return torch.cat([self._own(x, copy) for copy in range(len(self.starts))], 1)
        copies = gather(x, self.order, scales=self.scales)
        signed, salient = self._split(copies)
        if len(self.starts) == 1:  # the bias of the second product is what the first one gave
            binary = grouped_int.matmul(signed, self.binary, self.held("signs_"), self.bias)
            if self.salient is None:
                return binary
            return grouped_int.matmul(salient, self.salient, self.held("integers_"), binary[0])
        binary = grouped_int.matmul(signed, self.binary, self.held("signs_"))
        more = grouped_int.matmul(salient, self.salient, self.held("integers_")) if self.salient else None
        return gather(binary, self.kept, more=more, bias=None if self.bias is None else self.bias[None])

    def _split(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        signed, salient = self.parts
        size = signed[0] * signed[1]
        return flat[:size].view(signed), flat[size:].view(salient)

    def _own(self, x: Tensor, copy: int) -> Tensor:
        """Several tokens by the rows of one sibling."""
        rows = self.starts[copy], self.ends[copy]
        (signed, salient), (scales, _) = self._split(self.order), self._split(self.scales)
        padded = pad(x, (0, 1))  # column -1 is zero
        own = (padded[:, signed[copy].long()].float() * scales[copy]).to(x.dtype)
        out = rows_product(own, self.binary, self.held("signs_"), *rows)
        if self.salient:
            out = out + rows_product(padded[:, salient[copy].long()], self.salient, self.held("integers_"), *rows)
        bias = self.bias_of(copy)
        return out if bias is None else out + bias


class FactorStack(SignStack):
    """`sign_factors` siblings with equally many paths; every path is given as many latents as the largest has."""

    own: Tensor
    latent_scales: Tensor

    def __init__(self, linears: Sequence[Any], bias: Tensor | None) -> None:
        super().__init__(linears, bias)
        specs: list[SignFactorsSpec] = [linear.spec for linear in linears]
        stored = [linear.stored_tensors() for linear in linears]
        self.paths = len(specs[0].ranks)
        self.span = -(-max(rank for spec in specs for rank in spec.ranks) // _RANKS) * _RANKS
        columns = -(-specs[0].in_features // _RANKS) * _RANKS
        copies, latents = len(specs) * self.paths, self.paths * self.span
        self.v = sign_spec(copies * self.span, columns)
        self.u = sign_spec(self.ends[-1], latents, self.paths)
        v_codes = torch.cat([self._v_codes(*pair, columns) for pair in zip(specs, stored, strict=True)])
        u_codes = torch.cat([self._u_codes(*pair) for pair in zip(specs, stored, strict=True)])
        u_scales = torch.cat([2 * tensors["row_scales"].float().t() for tensors in stored])
        twice = u_scales.new_full((len(v_codes), 1), 2.0)
        self.hold("v_", to_planar(self.v, {"codes_1b": v_codes, "scales": twice}))
        self.hold("u_", to_planar(self.u, {"codes_1b": u_codes, "scales": u_scales}))
        device = v_codes.device
        missing = columns - specs[0].in_features
        order = pad(torch.arange(specs[0].in_features, dtype=torch.int32, device=device), (0, missing), value=-1)
        scales = torch.cat([tensors["column_scales"].float() for tensors in stored])
        own = torch.arange(copies, device=device)[:, None] * (len(v_codes) + self.span)
        own = own + torch.arange(self.span, device=device)
        parts = [
            pad(part, (0, self.span - len(part)))
            for spec, tensors in zip(specs, stored, strict=True)
            for part in torch.split(tensors["latent_scales"].float(), list(spec.ranks))
        ]
        self.register_buffer("order", order.repeat(copies, 1), persistent=False)
        self.register_buffer("scales", pad(scales, (0, missing)).contiguous(), persistent=False)
        self.register_buffer("own", own.view(len(specs), latents).to(torch.int32), persistent=False)
        self.register_buffer("latent_scales", torch.cat(parts).view(len(specs), latents), persistent=False)

    @staticmethod
    def fits(specs: Sequence[SignFactorsSpec]) -> bool:
        """Whether siblings can be stacked; copies beyond 8 would be a second tile of the tensor core."""
        return len({len(spec.ranks) for spec in specs}) == 1 and len(specs) * len(specs[0].ranks) <= 8

    def _v_codes(self, spec: SignFactorsSpec, tensors: dict[str, Tensor], columns: int) -> Tensor:
        bits = unpack_bits(tensors["v_signs"], 1, spec.in_features)
        rows = [pad(part, (0, 0, 0, self.span - len(part))) for part in torch.split(bits, list(spec.ranks))]
        return pack_bits(pad(torch.cat(rows), (0, columns - spec.in_features)), 1)

    def _u_codes(self, spec: SignFactorsSpec, tensors: dict[str, Tensor]) -> Tensor:
        bits = unpack_bits(tensors["u_signs"], 1, spec.total_rank)
        parts = [pad(part, (0, self.span - part.shape[1])) for part in torch.split(bits, list(spec.ranks), dim=1)]
        return pack_bits(torch.cat(parts, 1), 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[m, in]`` to the results of all siblings side by side, ``[m, rows]``."""
        if len(x) > 1:
            return torch.cat([self._own(x, copy) for copy in range(len(self.starts))], 1)
        latents = grouped_int.matmul(gather(x, self.order, scales=self.scales), self.v, self.held("v_"))
        scaled = gather(latents, self.own, scales=self.latent_scales)
        if len(self.starts) == 1:
            return grouped_int.matmul(scaled, self.u, self.held("u_"), self.bias)
        product = grouped_int.matmul(scaled, self.u, self.held("u_"))
        return gather(product, self.kept, bias=None if self.bias is None else self.bias[None])

    def _own(self, x: Tensor, copy: int) -> Tensor:
        """Several tokens by the factors of one sibling."""
        padded = pad(x, (0, self.v.in_features - x.shape[1])).float()
        latents = []
        for path in range(copy * self.paths, (copy + 1) * self.paths):
            scaled = (padded * self.scales[path]).to(x.dtype)
            latents.append(rows_product(scaled, self.v, self.held("v_"), path * self.span, (path + 1) * self.span))
        scaled = (torch.cat(latents, 1).float() * self.latent_scales[copy]).to(x.dtype)
        out = rows_product(scaled, self.u, self.held("u_"), self.starts[copy], self.ends[copy])
        bias = self.bias_of(copy)
        return out if bias is None else out + bias
