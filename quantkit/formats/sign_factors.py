"""`sign_factors`: a product of two sign matrices with a scale per row, latent rank and column (LittleBit).

    weight  ~  sum over paths p of  diag(row_scales[p]) U_p diag(latent_scales_p) V_p diag(column_scales[p])

U_p ``[out, r_p]`` and V_p ``[r_p, in]`` hold +1 and -1. One path, or two: the second one approximates what the first
leaves. The paths are stacked, so that each factor is one matrix: R = r_1 (+ r_2) latent ranks in all.

Stored tensors of a module (see docs/format.md):

    v_signs        uint8   [R, ceil(in / 8)]    bit 1: +1, bit 0: -1; one bit stream per row; rows of path 1 first
    u_signs        uint8   [out, ceil(R / 8)]   columns of path 1 first
    column_scales  float16 [paths, in]
    latent_scales  float16 [R]
    row_scales     float16 [paths, out]

which is, for widths that are multiples of 8, R * (in + out + 16) + 16 * paths * (in + out) bits.

Source: LittleBit, arXiv:2506.13771; ``latent_scales`` is its product of two vectors, stored as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantkit.errors import FileError
from quantkit.formats.packing import pack_bits, packed_size, unpack_bits
from quantkit.formats.spec import Layout, Spec, refuse_nonfinite, refuse_padding_bits, refuse_unknown_fields

NAME = "sign_factors"


@dataclass(frozen=True, slots=True, kw_only=True)
class SignFactorsSpec(Spec):
    """The latent rank of each path."""

    format: ClassVar[str] = NAME
    out_features: int
    in_features: int
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        whole = all(type(rank) is int and rank > 0 for rank in self.ranks)
        if not (self.out_features > 0 and self.in_features > 0 and len(self.ranks) in (1, 2) and whole):
            raise FileError(f"{NAME}: inconsistent module description {self}")

    @property
    def total_rank(self) -> int:
        return sum(self.ranks)

    def tensor_layout(self) -> Layout:
        n_paths = len(self.ranks)
        return {
            "v_signs": (torch.uint8, (self.total_rank, packed_size(self.in_features, 1))),
            "u_signs": (torch.uint8, (self.out_features, packed_size(self.total_rank, 1))),
            "column_scales": (torch.float16, (n_paths, self.in_features)),
            "latent_scales": (torch.float16, (self.total_rank,)),
            "row_scales": (torch.float16, (n_paths, self.out_features)),
        }

    def describe(self) -> str:
        return f"ranks={'+'.join(map(str, self.ranks))}"

    def to_json(self) -> dict[str, Any]:
        return {
            "format": NAME,
            "out_features": self.out_features,
            "in_features": self.in_features,
            "ranks": list(self.ranks),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> SignFactorsSpec:
        """Inverse of `to_json`. Unknown or missing fields raise `FileError` by name."""
        refuse_unknown_fields(NAME, fields, ("format", "out_features", "in_features", "ranks"))
        return cls(out_features=fields["out_features"], in_features=fields["in_features"], ranks=tuple(fields["ranks"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class SignFactors:
    """A factorized weight before packing. Scales are float32, each exactly a float16."""

    u_signs: Tensor  # bool [out_features, R], True: +1; columns of path 1 first
    v_signs: Tensor  # bool [R, in_features]
    row_scales: Tensor  # float32 [paths, out_features]
    latent_scales: Tensor  # float32 [R]
    column_scales: Tensor  # float32 [paths, in_features]
    ranks: tuple[int, ...]  # of the paths, R in all

    def spec(self) -> SignFactorsSpec:
        assert sum(self.ranks) == len(self.v_signs) == self.u_signs.shape[1] == len(self.latent_scales)
        assert len(self.ranks) == len(self.row_scales) == len(self.column_scales)
        return SignFactorsSpec(out_features=self.u_signs.shape[0], in_features=self.v_signs.shape[1], ranks=self.ranks)

    def dequantize(self) -> Tensor:
        """float32 ``[out_features, in_features]``."""
        weight = self.row_scales.new_zeros(self.u_signs.shape[0], self.v_signs.shape[1])
        start = 0
        for path, rank in enumerate(self.ranks):
            latent = slice(start, start + rank)
            U, V = (torch.where(signs, 1.0, -1.0) for signs in (self.u_signs[:, latent], self.v_signs[latent]))
            product = (U * self.latent_scales[latent]) @ V
            weight += self.row_scales[path][:, None] * product * self.column_scales[path]
            start += rank
        return weight


def pack(weight: SignFactors) -> dict[str, Tensor]:
    """The stored tensors of a weight, exactly those of ``weight.spec().tensor_layout()``."""
    tensors = {name: pack_bits(getattr(weight, name).to(torch.uint8), 1) for name in ("v_signs", "u_signs")}
    for name in ("column_scales", "latent_scales", "row_scales"):
        tensors[name] = getattr(weight, name).to(torch.float16)
    return {name: tensors[name].contiguous() for name in weight.spec().tensor_layout()}


def unpack(spec: SignFactorsSpec, tensors: dict[str, Tensor]) -> SignFactors:
    """Inverse of `pack`."""
    return SignFactors(
        u_signs=unpack_bits(tensors["u_signs"], 1, spec.total_rank).to(torch.bool),
        v_signs=unpack_bits(tensors["v_signs"], 1, spec.in_features).to(torch.bool),
        row_scales=tensors["row_scales"].float(),
        latent_scales=tensors["latent_scales"].float(),
        column_scales=tensors["column_scales"].float(),
        ranks=spec.ranks,
    )


def check(spec: SignFactorsSpec, tensors: dict[str, Tensor]) -> None:
    """Refuse stored values that no writer produces. Raises `FileError` with the tensor's name."""
    refuse_nonfinite(tensors, ("column_scales", "latent_scales", "row_scales"))
    refuse_padding_bits(tensors, "v_signs", spec.in_features, 1)
    refuse_padding_bits(tensors, "u_signs", spec.total_rank, 1)
