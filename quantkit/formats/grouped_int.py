"""`grouped_int`: integer codes with one scale and one zero per (row, group of input columns).

    weight[o, i]  ~  scales[o, g] * (codes[o, i] - zeros[o, g]),        g = i // group_size

This sign and offset convention is stated here once; everything else in quantkit follows it.
Widths are constant over the rows of a column group and may differ between groups, so groups of equal width form a
*segment* that is packed at its real size. Groups keep their order inside a segment; segments ascend in width.

Stored tensors of a module, with G groups of which G_b have b bits (see docs/format.md):

    codes_{b}b    uint8   [out, ceil(G_b * group_size * b / 8)]   dense bit stream per row (formats/packing.py)
    scales        float16 [out, G]                                columns in stored (segment) order
    zeros_{b}b    uint8   [ceil(out * G_b * b / 8)]               b >= 2: one bit stream over all rows, row-major
    zeros_1b      float16 [out, G_1]                              1 bit: the zero is not an integer
    group_order   int16   [G]                                     only with several segments: stored -> original group

A symmetric weight stores no zeros: they are ``2 ** (bits - 1)``, and 1/2 for one bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantkit.errors import FileError, RequestError
from quantkit.formats.packing import pack_bits, packed_size, unpack_bits
from quantkit.formats.spec import Layout, Spec, refuse_nonfinite, refuse_padding_bits, refuse_unknown_fields

NAME = "grouped_int"


def symmetric_zero(bits: int) -> float:
    """The fixed zero of a symmetric grid, in code units."""
    return 0.5 if bits == 1 else float(2 ** (bits - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedIntSpec(Spec):
    """Widths of the column groups, in stored order."""

    format: ClassVar[str] = NAME
    out_features: int
    in_features: int
    group_size: int
    segments: tuple[tuple[int, int], ...]  # (bits, number of groups), ascending bits
    symmetric: bool

    def __post_init__(self) -> None:
        widths = [bits for bits, _ in self.segments]
        counted = sum(count for _, count in self.segments)
        consistent = (
            self.out_features > 0
            and self.group_size > 0
            and widths == sorted(set(widths))
            and all(1 <= bits <= 8 and count > 0 for bits, count in self.segments)
            and counted * self.group_size == self.in_features
        )
        if not consistent:
            raise FileError(f"grouped_int: inconsistent module description {self}")

    @property
    def n_groups(self) -> int:
        return self.in_features // self.group_size

    def tensor_layout(self) -> Layout:
        layout: Layout = {}
        for bits, count in self.segments:
            row = packed_size(count * self.group_size, bits)
            layout[f"codes_{bits}b"] = (torch.uint8, (self.out_features, row))
        layout["scales"] = (torch.float16, (self.out_features, self.n_groups))
        for bits, count in self.segments:
            if self.symmetric:
                continue
            if bits == 1:
                layout["zeros_1b"] = (torch.float16, (self.out_features, count))
            else:
                layout[f"zeros_{bits}b"] = (torch.uint8, (packed_size(self.out_features * count, bits),))
        if len(self.segments) > 1:
            layout["group_order"] = (torch.int16, (self.n_groups,))
        return layout

    def describe(self) -> str:
        segments = ", ".join(f"{count}x{bits}b" for bits, count in self.segments)
        return f"groups={segments}, group_size={self.group_size}"

    def to_json(self) -> dict[str, Any]:
        return {
            "format": NAME,
            "out_features": self.out_features,
            "in_features": self.in_features,
            "group_size": self.group_size,
            "segments": [list(segment) for segment in self.segments],
            "symmetric": self.symmetric,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> GroupedIntSpec:
        """Inverse of `to_json`. Unknown or missing fields raise `FileError` by name."""
        known = ("format", "out_features", "in_features", "group_size", "segments", "symmetric")
        refuse_unknown_fields(NAME, fields, known)
        segments = tuple((int(bits), int(count)) for bits, count in fields["segments"])
        return cls(
            out_features=fields["out_features"],
            in_features=fields["in_features"],
            group_size=fields["group_size"],
            segments=segments,
            symmetric=fields["symmetric"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedInt:
    """A quantized weight before packing, in the original column order: what every integer solver returns."""

    codes: Tensor  # uint8 [out_features, in_features], code of column i below 2 ** bits[i // group_size]
    scales: Tensor  # float32 [out_features, n_groups], positive, each exactly a float16
    zeros: Tensor  # float32 [out_features, n_groups], code units; integers where bits >= 2, a float16 where bits == 1
    bits: tuple[int, ...]  # width of each group, length n_groups
    symmetric: bool

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // len(self.bits)

    def spec(self) -> GroupedIntSpec:
        widths = sorted(set(self.bits))
        return GroupedIntSpec(
            out_features=self.codes.shape[0],
            in_features=self.codes.shape[1],
            group_size=self.group_size,
            segments=tuple((bits, self.bits.count(bits)) for bits in widths),
            symmetric=self.symmetric,
        )

    def dequantize(self) -> Tensor:
        """float32 ``[out_features, in_features]``: the weight that the packed module computes with."""
        out_features, in_features = self.codes.shape
        grouped = self.codes.reshape(out_features, len(self.bits), self.group_size).float()
        weight = self.scales.unsqueeze(-1) * (grouped - self.zeros.unsqueeze(-1))
        return weight.reshape(out_features, in_features)


def check_group_size(in_features: int, group_size: int | None, name: str) -> int:
    """The group size in columns (``None``: the whole row); `RequestError` when it does not divide the row.

    >>> check_group_size(512, None, "q_proj")
    512
    """
    if group_size is None:
        return in_features
    if group_size < 1 or in_features % group_size:
        fits = [size for size in (16, 32, 64, 128, 256) if in_features % size == 0]
        use = f"use {', '.join(map(str, fits))} or 0 (one group per row)" if fits else "use 0 (one group per row)"
        rest = f" (remainder {in_features % group_size})" if group_size > 0 else ""
        found = f"in_features {in_features} is not a multiple of group_size {group_size}{rest}"
        raise RequestError(f"{name}: {found}; {use}")
    return group_size


def stored_order(bits: tuple[int, ...]) -> list[int]:
    """Original index of each stored group: stable sort by width."""
    return sorted(range(len(bits)), key=lambda group: bits[group])


def pack(weight: GroupedInt) -> dict[str, Tensor]:
    """The stored tensors of a weight, exactly those of ``weight.spec().tensor_layout()``."""
    spec = weight.spec()
    order = stored_order(weight.bits)
    grouped = weight.codes.reshape(spec.out_features, spec.n_groups, spec.group_size)
    tensors = {"scales": weight.scales[:, order].to(torch.float16)}
    start = 0
    for bits, count in spec.segments:
        members = order[start : start + count]
        tensors[f"codes_{bits}b"] = pack_bits(grouped[:, members].flatten(1), bits)
        zeros = weight.zeros[:, members]
        if not weight.symmetric:
            packed = zeros.to(torch.float16) if bits == 1 else pack_bits(zeros.to(torch.uint8).flatten(), bits)
            tensors[f"zeros_{bits}b"] = packed
        start += count
    if len(spec.segments) > 1:
        tensors["group_order"] = torch.tensor(order, dtype=torch.int16, device=weight.codes.device)
    return {name: tensors[name].contiguous() for name in spec.tensor_layout()}


def unpack(spec: GroupedIntSpec, tensors: dict[str, Tensor]) -> GroupedInt:
    """Inverse of `pack`. Raises `FileError` when ``group_order`` is not a permutation of the groups."""
    order = group_order(spec, tensors)
    zeros = stored_zeros(spec, tensors)
    codes = torch.cat([segment_codes(spec, tensors, bits) for bits, _ in spec.segments], dim=1)
    inverse = torch.argsort(torch.tensor(order, device=codes.device))
    grouped = codes.reshape(spec.out_features, spec.n_groups, spec.group_size)[:, inverse]
    widths = [bits for bits, count in spec.segments for _ in range(count)]
    return GroupedInt(
        codes=grouped.reshape(spec.out_features, spec.in_features),
        scales=tensors["scales"].float()[:, inverse],
        zeros=zeros[:, inverse],
        bits=tuple(widths[position] for position in inverse.tolist()),
        symmetric=spec.symmetric,
    )


def check(spec: GroupedIntSpec, tensors: dict[str, Tensor]) -> None:
    """Refuse stored values that no writer produces; reads scales, zeros and last bytes only, not the codes.

    Raises:
        FileError: a scale that is NaN, infinite or negative, a zero that is NaN or infinite, set padding bits, or a
            ``group_order`` that is not a permutation.
    """
    scales = tensors["scales"]
    if not bool(torch.isfinite(scales).all()) or bool((scales < 0).any()):
        raise FileError("scales holds NaN, Inf or negative numbers; the file is damaged")
    refuse_nonfinite(tensors, ["zeros_1b"])
    for bits, count in spec.segments:
        refuse_padding_bits(tensors, f"codes_{bits}b", count * spec.group_size, bits)
        if f"zeros_{bits}b" in tensors and bits > 1:
            refuse_padding_bits(tensors, f"zeros_{bits}b", spec.out_features * count, bits)
    group_order(spec, tensors)


def group_order(spec: GroupedIntSpec, tensors: dict[str, Tensor]) -> list[int]:
    """Original index of each stored group."""
    if "group_order" not in tensors:
        return list(range(spec.n_groups))
    order: list[int] = tensors["group_order"].tolist()
    if sorted(order) != list(range(spec.n_groups)):
        raise FileError("grouped_int: tensor group_order is not a permutation of the groups; the file is damaged")
    return order


def segment_codes(spec: GroupedIntSpec, tensors: dict[str, Tensor], bits: int) -> Tensor:
    """uint8 ``[out, G_b * group_size]``: the codes of one segment, in stored order."""
    count = dict(spec.segments)[bits]
    return unpack_bits(tensors[f"codes_{bits}b"], bits, count * spec.group_size)


def stored_zeros(spec: GroupedIntSpec, tensors: dict[str, Tensor]) -> Tensor:
    """float32 ``[out, G]`` zeros in stored order, symmetric ones filled in."""
    device = tensors["scales"].device
    columns = []
    for bits, count in spec.segments:
        if spec.symmetric:
            columns.append(torch.full((spec.out_features, count), symmetric_zero(bits), device=device))
        elif bits == 1:
            columns.append(tensors["zeros_1b"].float())
        else:
            flat = unpack_bits(tensors[f"zeros_{bits}b"], bits, spec.out_features * count)
            columns.append(flat.reshape(spec.out_features, count).float())
    return torch.cat(columns, dim=1)
