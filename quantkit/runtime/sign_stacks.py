"""Linears of the sign formats that read the same activations: their rows below one another, for one token at a time.

Siblings differ in what they do to the activations: scales of columns, which columns are salient. So each has its own
copy of the token, and a row of the stack multiplies the copy of its own sibling (`OwnRows`).

    sign_salient   planes and slices of the copies -> signs and integers
    sign_factors   V, with the scales of columns and latents -> U, each of which makes its row ready itself

Several tokens (a prompt) are multiplied sibling by sibling, each with its own rows of the stack.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.formats.packing import pack_bits, unpack_bits
from quantkit.formats.sign_factors import SignFactorsSpec
from quantkit.formats.sign_salient import SignSalientSpec, salient_mask
from quantkit.kernels import grouped_int
from quantkit.kernels.gather import gather
from quantkit.kernels.gemv import COPY_ROWS, HALF_TYPES, gemv, has_gemv
from quantkit.kernels.launch import counts_bits
from quantkit.kernels.planar import to_planar
from quantkit.kernels.planar_matmul import dequantize_rows
from quantkit.kernels.ready_row import SignParts, Source, make_ready, row_table
from quantkit.kernels.sign_planar import has_planar_form, sign_spec
from quantkit.kernels.sign_product import sign_product, takes_copies, takes_source
from quantkit.kernels.sign_rows import has_sign_rows, sign_rows

_COLUMNS = 128  # columns and latents are padded to a multiple: two planes of the kernels


class OwnRows(nn.Module):
    """A stacked `grouped_int` weight and copies of a token: every part of the rows times its own copy.

    Args:
        spec, stored: the weight ``[rows, in]``; held in the planar form.
        sizes: rows of each part, in all as many as the weight has.
    """

    kept: Tensor
    copies: Tensor | None

    def __init__(self, spec: GroupedIntSpec, stored: dict[str, Tensor], sizes: Sequence[int]) -> None:
        super().__init__()
        assert sum(sizes) == spec.out_features
        self.spec, self.names = spec, []
        for name, tensor in to_planar(spec, stored).items():
            self.register_buffer(name, tensor, persistent=False)
            self.names.append(name)
        ends = torch.tensor(sizes).cumsum(0)
        self.bounds: list[tuple[int, int]] = list(
            zip((ends - torch.tensor(sizes)).tolist(), ends.tolist(), strict=True)
        )
        own = [
            torch.full(((last - first) // COPY_ROWS,), copy, dtype=torch.int32)
            for copy, (first, last) in enumerate(self.bounds)
        ]
        # which copy each COPY_ROWS rows take, if no such rows belong to two parts
        even = all(size % COPY_ROWS == 0 for size in sizes)
        copies = torch.cat(own).to(stored["scales"].device) if even else None
        self.register_buffer("copies", copies, persistent=False)
        kept = torch.cat([torch.arange(*bounds) + copy * spec.out_features for copy, bounds in enumerate(self.bounds)])
        self.register_buffer("kept", kept.to(torch.int32).to(stored["scales"].device)[None], persistent=False)

    def tensors(self) -> dict[str, Tensor]:
        buffers = self._buffers
        return {name: cast(Tensor, buffers[name]) for name in self.names}

    def forward(self, copies: Tensor, bias: Tensor | None) -> Tensor:
        """``[parts, in]`` to ``[1, rows]``; ``bias`` is ``[rows]``."""
        if len(self.bounds) == 1:
            return grouped_int.matmul(copies, self.spec, self.tensors(), bias)
        if self.copies is not None and copies.is_cuda and has_gemv(copies[:1], self.spec):
            return gemv(copies, self.spec, self.tensors(), bias, copies=self.copies)
        every = grouped_int.matmul(copies, self.spec, self.tensors())
        return gather(every, self.kept, bias=None if bias is None else bias[None])

    def part(self, x: Tensor, number: int) -> Tensor:
        """``[m, in]`` times the rows of one part, which on a GPU are decoded for it."""
        first, last = self.bounds[number]
        if not x.is_cuda:
            return grouped_int.matmul(x, self.spec, self.tensors())[:, first:last]
        return linear(x, dequantize_rows(self.spec, self.tensors(), first, last, x.dtype))


class SignStack(nn.Module, ABC):
    """What both formats share: copies of a token, and a prompt sibling by sibling."""

    bias: Tensor | None
    order: Tensor
    scales: Tensor

    def __init__(self, sizes: Sequence[int], order: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.register_buffer("order", order.contiguous(), persistent=False)  # int32, -1: zero
        self.register_buffer("scales", scales.contiguous(), persistent=False)  # float32
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[m, in]`` to the results of all siblings side by side, ``[m, rows]``."""
        if self.has_row(x):
            return self.row(Source(x=x))[0]
        if len(x) == 1:
            return self.one(gather(x, self.order, scales=self.scales))
        out = torch.cat([self.several(pad(x, (0, 1)), sibling) for sibling in range(len(self.sizes))], 1)
        return out if self.bias is None else out + self.bias

    def has_row(self, x: Tensor, kind: str = "row") -> bool:
        """Whether `row` has kernels for a source like x ``[m, n]`` of that kind."""
        return len(x) == 1 and x.dtype in HALF_TYPES and counts_bits(x.device)

    @abstractmethod
    def row(self, source: Source) -> tuple[Tensor, Tensor]:
        """Results of all siblings, ``[1, rows]``, for one token on a GPU, and x + update of a norm (otherwise x)."""

    @abstractmethod
    def one(self, copies: Tensor) -> Tensor:
        """Results of all siblings, ``[1, rows]``, from their copies of one token."""

    @abstractmethod
    def several(self, padded: Tensor, sibling: int) -> Tensor:
        """Results of one sibling for tokens ``[m, in + 1]``, the last column zero; without bias."""


def columns_of(padded: Tensor, order: Tensor, scales: Tensor) -> Tensor:
    """Columns of several tokens in the order and scale of one copy."""
    return (padded[:, order.long()].float() * scales).to(padded.dtype)


class SalientStack(SignStack):
    """`sign_salient` siblings with equally many salient columns, stored alike. ``salient``: stored tensors, stacked."""

    row_scales: Tensor
    row_means: Tensor | None
    places: Tensor | None  # of `row_table`, for each copy; None: there are no kernels for one row
    factors: Tensor

    def __init__(self, linears: Sequence[Any], salient: dict[str, Tensor], bias: Tensor | None) -> None:
        specs: list[SignSalientSpec] = [each.spec for each in linears]
        stored = [each.stored_tensors() for each in linears]
        sizes, device = [spec.out_features for spec in specs], stored[0]["signs"].device
        n = -(-specs[0].n_binary // _COLUMNS) * _COLUMNS
        order = torch.full((len(specs), n + specs[0].n_salient), -1, dtype=torch.int32, device=device)
        scales = torch.ones(order.shape, device=device)
        for copy, (spec, tensors) in enumerate(zip(specs, stored, strict=True)):
            mask = salient_mask(spec, tensors)
            if mask is None:
                mask = torch.zeros(spec.in_features, dtype=torch.bool, device=device)
            order[copy, : spec.n_binary] = (~mask).nonzero()[:, 0].to(torch.int32)
            order[copy, n:] = mask.nonzero()[:, 0].to(torch.int32)
            if spec.column_scales:
                scales[copy, : spec.n_binary] = tensors["column_scales"].float()
        # first the columns with signs of all copies, then the salient ones: one gather, two contiguous parts
        split = [torch.cat([table[:, :n].flatten(), table[:, n:].flatten()]) for table in (order, scales)]
        super().__init__(sizes, split[0], split[1], bias)
        self.shapes = (len(specs), n), (len(specs), specs[0].n_salient)
        self.signs = OwnRows(*_one_bit(specs, stored, n), sizes)
        for name in ("row_scales", "row_means"):
            held = torch.cat([tensors[name] for tensors in stored]) if name in stored[0] else None
            self.register_buffer(name, held, persistent=False)
        self.integers = OwnRows(_stacked(specs), salient, sizes) if salient else None
        self.first = SignParts(signs=self.signs.spec, integers=self.integers.spec if self.integers else None)
        self.starts = [first for first, _ in self.signs.bounds[1:]]
        places = factors = None
        if has_sign_rows(self.first, self.starts):
            own = zip(*(zip(*self._split(table), strict=True) for table in (self.order, self.scales)), strict=True)
            tables = [row_table(self.first, columns, factors) for columns, factors in own]
            places, factors = (torch.stack(parts) for parts in zip(*tables, strict=True))
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("factors", factors, persistent=False)

    @staticmethod
    def fits(specs: Sequence[SignSalientSpec]) -> bool:
        """Whether siblings can be stacked."""
        alike = {(each.in_features, each.row_means, each.column_scales, each.n_salient) for each in specs}
        parts = {(each.salient.segments, each.salient.symmetric) if each.salient else None for each in specs}
        return len(alike) == len(parts) == 1 and has_planar_form(specs[0])

    def has_row(self, x: Tensor, kind: str = "row") -> bool:
        return super().has_row(x, kind) and self.places is not None

    def row(self, source: Source) -> tuple[Tensor, Tensor]:
        assert self.places is not None
        integers = self.integers.tensors() if self.integers else None
        signs = {"words": self.signs.tensors()["planar"], "scales": self.row_scales}
        if self.row_means is not None:
            signs["means"] = self.row_means
        ready, numbers, residual = make_ready(source, self.first, self.places, self.factors)
        out = source.x.new_empty(1, sum(self.sizes))
        sign_rows(ready, numbers, self.first, signs, integers, self.bias, out, self.starts)
        return out, residual

    def one(self, copies: Tensor) -> Tensor:
        signed, salient = self._split(copies)
        out: Tensor = self.signs(signed, self.bias)
        if self.row_means is not None:
            sums = signed.sum(1, dtype=torch.float32)
            shares = [sums[part].expand(size) for part, size in enumerate(self.sizes)]
            out = (out + self.row_means * torch.cat(shares)).to(signed.dtype)
        return out if self.integers is None else cast(Tensor, self.integers(salient, out[0]))

    def several(self, padded: Tensor, sibling: int) -> Tensor:
        orders, scales = self._split(self.order), self._split(self.scales)
        signed, salient = (columns_of(padded, a[sibling], b[sibling]) for a, b in zip(orders, scales, strict=True))
        out = self.signs.part(signed, sibling)
        if self.row_means is not None:
            means = self.row_means[slice(*self.signs.bounds[sibling])].to(out.dtype)
            out = out.addmm(signed.sum(1, keepdim=True, dtype=torch.float32).to(out.dtype), means[None])
        return out if self.integers is None else out + self.integers.part(salient, sibling)

    def _split(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        signed, salient = self.shapes
        size = signed[0] * signed[1]
        return flat[:size].view(signed), flat[size:].view(salient)


def _stacked(specs: Sequence[SignSalientSpec]) -> GroupedIntSpec:
    part = specs[0].salient
    assert part is not None
    return GroupedIntSpec(
        out_features=sum(spec.out_features for spec in specs),
        in_features=part.in_features,
        group_size=part.group_size,
        segments=part.segments,
        symmetric=part.symmetric,
    )


def _one_bit(
    specs: Sequence[SignSalientSpec], stored: Sequence[dict[str, Tensor]], columns: int
) -> tuple[GroupedIntSpec, dict[str, Tensor]]:
    """Signs and scales of all rows as a one-bit weight with one group per row, without their means."""
    bits = torch.cat([unpack_bits(tensors["signs"], 1, specs[0].n_binary) for tensors in stored])
    alpha = torch.cat([tensors["row_scales"].float() for tensors in stored])
    codes = pack_bits(pad(bits, (0, columns - bits.shape[1])), 1)
    return sign_spec(len(bits), columns), {"codes_1b": codes, "scales": (2 * alpha).half()[:, None]}


class FactorStack(SignStack):
    """`sign_factors` siblings with equally many paths; every path is given as many latents as the largest has."""

    latents: Tensor
    row_scales: Tensor
    columns: Tensor

    def __init__(self, linears: Sequence[Any], bias: Tensor | None) -> None:
        specs: list[SignFactorsSpec] = [each.spec for each in linears]
        stored = [each.stored_tensors() for each in linears]
        pairs = list(zip(specs, stored, strict=True))
        sizes, device = [spec.out_features for spec in specs], stored[0]["v_signs"].device
        n, n_paths = specs[0].in_features, len(specs[0].ranks)
        span = -(-max(rank for spec in specs for rank in spec.ranks) // _COLUMNS) * _COLUMNS
        missing = -n % _COLUMNS
        copies = len(specs) * n_paths
        order = pad(torch.arange(n, dtype=torch.int32, device=device), (0, missing), value=-1).repeat(copies, 1)
        scales = pad(torch.cat([tensors["column_scales"].float() for tensors in stored]), (0, missing))
        super().__init__(sizes, order, scales, bias)
        self.paths, self.span = n_paths, span
        v_codes = torch.cat([_v_codes(spec, tensors, span, missing) for spec, tensors in pairs])
        u_codes = torch.cat([_u_codes(spec, tensors, span) for spec, tensors in pairs])
        self.register_buffer(
            "row_scales", torch.cat([tensors["row_scales"] for tensors in stored], 1), persistent=False
        )
        u_scales = (2 * self.row_scales.float().t()).half()
        latents = torch.cat(
            [
                pad(part, (0, span - len(part)))
                for spec, tensors in pairs
                for part in torch.split(tensors["latent_scales"].float(), list(spec.ranks))
            ]
        )
        self.register_buffer("latents", latents, persistent=False)
        v_scales = (2 * latents).half()[:, None]
        v, u = sign_spec(len(v_codes), n + missing), sign_spec(len(u_codes), self.paths * span, self.paths)
        self.v = OwnRows(v, {"codes_1b": v_codes, "scales": v_scales}, [span] * copies)
        self.register_buffer("columns", scales.half(), persistent=False)
        self.u = OwnRows(u, {"codes_1b": u_codes, "scales": u_scales}, sizes)

    @staticmethod
    def fits(specs: Sequence[SignFactorsSpec]) -> bool:
        """Whether siblings can be stacked."""
        return len({(spec.in_features, len(spec.ranks)) for spec in specs}) == 1

    def has_row(self, x: Tensor, kind: str = "row") -> bool:
        n = x.shape[1] // 2 if kind == "gated" else x.shape[1]
        return super().has_row(x, kind) and takes_source(self.v.spec, kind, n)

    def row(self, source: Source) -> tuple[Tensor, Tensor]:
        starts, dtype = [first for first, _ in self.u.bounds[1:]], source.x.dtype
        words, together = self.u.tensors()["planar"], takes_copies(starts)
        first = self.v.tensors()["planar"], self.latents, self.columns
        z, residual = sign_product(source, self.v.spec, *first, None, dtype)
        if not together:
            return cast(Tensor, self.u(z.view(len(self.sizes), -1), self.bias)), residual
        second = words, self.row_scales, None, self.bias
        return sign_product(Source(x=z), self.u.spec, *second, dtype, starts)[0], residual

    def one(self, copies: Tensor) -> Tensor:
        latents: Tensor = self.v(copies, None)
        return cast(Tensor, self.u(latents.view(len(self.sizes), -1), self.bias))

    def several(self, padded: Tensor, sibling: int) -> Tensor:
        own = range(sibling * self.paths, (sibling + 1) * self.paths)
        latents = [self.v.part(columns_of(padded, self.order[path], self.scales[path]), path) for path in own]
        return self.u.part(torch.cat(latents, 1), sibling)


def _v_codes(spec: SignFactorsSpec, tensors: dict[str, Tensor], span: int, missing: int) -> Tensor:
    bits = unpack_bits(tensors["v_signs"], 1, spec.in_features)
    rows = [pad(part, (0, missing, 0, span - len(part))) for part in torch.split(bits, list(spec.ranks))]
    return pack_bits(torch.cat(rows), 1)


def _u_codes(spec: SignFactorsSpec, tensors: dict[str, Tensor], span: int) -> Tensor:
    bits = unpack_bits(tensors["u_signs"], 1, spec.total_rank)
    parts = [pad(part, (0, span - part.shape[1])) for part in torch.split(bits, list(spec.ranks), dim=1)]
    return pack_bits(torch.cat(parts, 1), 1)
