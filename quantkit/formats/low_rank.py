"""`low_rank`: a weight as the product of two `grouped_int` factors.

    weight  ~  up @ down,     down [rank, in_features], up [out_features, rank]

Stored tensors of a module: those of each factor with ``down_`` or ``up_`` in front of their names (see
docs/format.md). Bits per weight count the weights of the product, not of the factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantkit.errors import FileError
from quantkit.formats import grouped_int
from quantkit.formats.grouped_int import GroupedInt, GroupedIntSpec
from quantkit.formats.spec import Layout, Spec, refuse_unknown_fields, with_prefix, without_prefix

NAME = "low_rank"
DOWN, UP = "down_", "up_"  # prefixes of the factors' tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankSpec(Spec):
    """The descriptions of both factors."""

    format: ClassVar[str] = NAME
    out_features: int
    in_features: int
    down: GroupedIntSpec  # of shape [rank, in_features]
    up: GroupedIntSpec  # of shape [out_features, rank]

    def __post_init__(self) -> None:
        shapes = (self.up.out_features, self.up.in_features, self.down.in_features)
        if shapes != (self.out_features, self.rank, self.in_features):
            raise FileError(f"{NAME}: inconsistent module description {self}")

    @property
    def rank(self) -> int:
        return self.down.out_features

    def tensor_layout(self) -> Layout:
        return with_prefix(DOWN, self.down.tensor_layout()) | with_prefix(UP, self.up.tensor_layout())

    def describe(self) -> str:
        return f"rank={self.rank}, down: {self.down.describe()}, up: {self.up.describe()}"

    def to_json(self) -> dict[str, Any]:
        return {
            "format": NAME,
            "out_features": self.out_features,
            "in_features": self.in_features,
            "down": self.down.to_json(),
            "up": self.up.to_json(),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> LowRankSpec:
        """Inverse of `to_json`. Unknown or missing fields raise `FileError` by name."""
        refuse_unknown_fields(NAME, fields, ("format", "out_features", "in_features", "down", "up"))
        for name in ("down", "up"):
            factor = fields[name]
            if not isinstance(factor, dict) or factor.get("format") != grouped_int.NAME:
                raise FileError(f"{NAME}: {name} must be a grouped_int description, not {factor!r}")
        return cls(
            out_features=fields["out_features"],
            in_features=fields["in_features"],
            down=GroupedIntSpec.from_json(fields["down"]),
            up=GroupedIntSpec.from_json(fields["up"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """A factorized weight before packing."""

    down: GroupedInt  # [rank, in_features]
    up: GroupedInt  # [out_features, rank]

    def spec(self) -> LowRankSpec:
        down, up = self.down.spec(), self.up.spec()
        return LowRankSpec(out_features=up.out_features, in_features=down.in_features, down=down, up=up)

    def dequantize(self) -> Tensor:
        """float32 ``[out_features, in_features]``: the product."""
        product: Tensor = torch.matmul(self.up.dequantize(), self.down.dequantize())
        return product


def pack(weight: LowRank) -> dict[str, Tensor]:
    """The stored tensors of a weight, exactly those of ``weight.spec().tensor_layout()``."""
    return with_prefix(DOWN, grouped_int.pack(weight.down)) | with_prefix(UP, grouped_int.pack(weight.up))


def unpack(spec: LowRankSpec, tensors: dict[str, Tensor]) -> LowRank:
    """Inverse of `pack`."""
    down = grouped_int.unpack(spec.down, without_prefix(DOWN, tensors))
    return LowRank(down=down, up=grouped_int.unpack(spec.up, without_prefix(UP, tensors)))


def check(spec: LowRankSpec, tensors: dict[str, Tensor]) -> None:
    """Refuse stored values that no writer produces. Raises `FileError` with the factor's prefix."""
    for prefix, factor in ((DOWN, spec.down), (UP, spec.up)):
        try:
            grouped_int.check(factor, without_prefix(prefix, tensors))
        except FileError as error:
            raise FileError(f"{prefix}*: {error}") from None
