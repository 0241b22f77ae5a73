"""`sign_salient`: signs with a scale per row for most input columns, integer codes for the salient ones (PTQ1.61).

    weight[o, i]  ~  (row_scales[o] * signs[o, i] + row_means[o]) * column_scales[i]       i not salient, signs +1 or -1
    weight[o, i]  ~  a `grouped_int` weight over the salient columns alone                 i salient

The salient columns are the same for all rows, so marking them costs one bit per column and not one per weight. Both
parts keep the order of the columns. Plain binarization (a sign and a scale per row) is the case without salient
columns, means and column scales.

Stored tensors of a module with n salient columns out of `in_features` (see docs/format.md):

    signs            uint8   [out, ceil((in - n) / 8)]   bit 1: +1, bit 0: -1; one bit stream per row
    row_scales       float16 [out]
    row_means        float16 [out]                       only with means
    column_scales    float16 [in - n]                    only with column scales
    salient_columns  uint8   [ceil(in / 8)]              bit i: column i is salient; only with salient columns
    salient_*        the stored tensors of the `grouped_int` weight [out, n]; only with salient columns

Source: PTQ1.61, arXiv:2502.13179 (row and column multipliers are folded into what is stored).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantkit.errors import FileError
from quantkit.formats import grouped_int
from quantkit.formats.grouped_int import GroupedInt, GroupedIntSpec
from quantkit.formats.packing import pack_bits, packed_size, unpack_bits
from quantkit.formats.spec import (
    Layout,
    Spec,
    refuse_nonfinite,
    refuse_padding_bits,
    refuse_unknown_fields,
    with_prefix,
    without_prefix,
)

NAME = "sign_salient"
SALIENT = "salient_"  # prefix of the tensors of the integer part


@dataclass(frozen=True, slots=True, kw_only=True)
class SignSalientSpec(Spec):
    """Which vectors a module stores beside its signs, and how its salient columns are stored."""

    format: ClassVar[str] = NAME
    out_features: int
    in_features: int
    row_means: bool
    column_scales: bool
    salient: GroupedIntSpec | None  # of shape [out_features, number of salient columns]

    def __post_init__(self) -> None:
        consistent = (
            self.out_features > 0
            and self.n_binary > 0
            and all(isinstance(flag, bool) for flag in (self.row_means, self.column_scales))
            and (self.salient is None or self.salient.out_features == self.out_features)
        )
        if not consistent:
            raise FileError(f"{NAME}: inconsistent module description {self}")

    @property
    def n_salient(self) -> int:
        return self.salient.in_features if self.salient else 0

    @property
    def n_binary(self) -> int:
        return self.in_features - self.n_salient

    def tensor_layout(self) -> Layout:
        layout: Layout = {"signs": (torch.uint8, (self.out_features, packed_size(self.n_binary, 1)))}
        layout["row_scales"] = (torch.float16, (self.out_features,))
        if self.row_means:
            layout["row_means"] = (torch.float16, (self.out_features,))
        if self.column_scales:
            layout["column_scales"] = (torch.float16, (self.n_binary,))
        if self.salient:
            layout["salient_columns"] = (torch.uint8, (packed_size(self.in_features, 1),))
            layout |= with_prefix(SALIENT, self.salient.tensor_layout())
        return layout

    def describe(self) -> str:
        salient = f", {self.n_salient} columns: {self.salient.describe()}" if self.salient else ""
        return f"{self.n_binary} columns: signs{salient}"

    def to_json(self) -> dict[str, Any]:
        return {
            "format": NAME,
            "out_features": self.out_features,
            "in_features": self.in_features,
            "row_means": self.row_means,
            "column_scales": self.column_scales,
            "salient": self.salient.to_json() if self.salient else None,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> SignSalientSpec:
        """Inverse of `to_json`. Unknown or missing fields raise `FileError` by name."""
        known = ("format", "out_features", "in_features", "row_means", "column_scales", "salient")
        refuse_unknown_fields(NAME, fields, known)
        salient = fields["salient"]
        if salient is not None and (not isinstance(salient, dict) or salient.get("format") != grouped_int.NAME):
            raise FileError(f"{NAME}: salient must be null or a grouped_int description, not {salient!r}")
        return cls(
            out_features=fields["out_features"],
            in_features=fields["in_features"],
            row_means=fields["row_means"],
            column_scales=fields["column_scales"],
            salient=None if salient is None else GroupedIntSpec.from_json(salient),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SignSalient:
    """A binarized weight before packing. Scales, means and column scales are float32, each exactly a float16."""

    signs: Tensor  # bool [out_features, n_binary], True: +1; the columns that are not salient, in their order
    row_scales: Tensor  # float32 [out_features]
    row_means: Tensor | None = None  # float32 [out_features]; None: all zero, not stored
    column_scales: Tensor | None = None  # float32 [n_binary]; None: all one, not stored
    salient_mask: Tensor | None = None  # bool [in_features]; None: no column is salient
    salient: GroupedInt | None = None  # of the salient columns, in their order

    def spec(self) -> SignSalientSpec:
        assert (self.salient is None) == (self.salient_mask is None)
        salient = self.salient.spec() if self.salient else None
        n_binary = self.signs.shape[1]
        return SignSalientSpec(
            out_features=self.signs.shape[0],
            in_features=n_binary if salient is None else n_binary + salient.in_features,
            row_means=self.row_means is not None,
            column_scales=self.column_scales is not None,
            salient=salient,
        )

    def dequantize(self) -> Tensor:
        """float32 ``[out_features, in_features]``."""
        binary = torch.where(self.signs, 1.0, -1.0) * self.row_scales[:, None]
        if self.row_means is not None:
            binary = binary + self.row_means[:, None]
        if self.column_scales is not None:
            binary = binary * self.column_scales
        if self.salient is None or self.salient_mask is None:
            return binary
        weight = binary.new_empty(len(binary), len(self.salient_mask))
        weight[:, ~self.salient_mask] = binary
        weight[:, self.salient_mask] = self.salient.dequantize()
        return weight


def pack(weight: SignSalient) -> dict[str, Tensor]:
    """The stored tensors of a weight, exactly those of ``weight.spec().tensor_layout()``."""
    tensors = {"signs": pack_bits(weight.signs.to(torch.uint8), 1), "row_scales": weight.row_scales.to(torch.float16)}
    for name in ("row_means", "column_scales"):
        vector = getattr(weight, name)
        if vector is not None:
            tensors[name] = vector.to(torch.float16)
    if weight.salient is not None and weight.salient_mask is not None:
        assert int(weight.salient_mask.sum()) == weight.salient.codes.shape[1]
        tensors["salient_columns"] = pack_bits(weight.salient_mask.to(torch.uint8), 1)
        tensors |= with_prefix(SALIENT, grouped_int.pack(weight.salient))
    return {name: tensors[name].contiguous() for name in weight.spec().tensor_layout()}


def unpack(spec: SignSalientSpec, tensors: dict[str, Tensor]) -> SignSalient:
    """Inverse of `pack`. Raises `FileError` when the salient columns are not as many as the description says."""
    mask = salient_mask(spec, tensors)
    salient = grouped_int.unpack(spec.salient, without_prefix(SALIENT, tensors)) if spec.salient else None
    return SignSalient(
        signs=unpack_bits(tensors["signs"], 1, spec.n_binary).to(torch.bool),
        row_scales=tensors["row_scales"].float(),
        row_means=tensors["row_means"].float() if spec.row_means else None,
        column_scales=tensors["column_scales"].float() if spec.column_scales else None,
        salient_mask=mask,
        salient=salient,
    )


def salient_mask(spec: SignSalientSpec, tensors: dict[str, Tensor]) -> Tensor | None:
    """bool ``[in_features]``; None where no column is salient."""
    if spec.salient is None:
        return None
    mask = unpack_bits(tensors["salient_columns"], 1, spec.in_features).to(torch.bool)
    if int(mask.sum()) != spec.n_salient:
        raise FileError(
            f"salient_columns marks {int(mask.sum())} columns, {spec.n_salient} are stored; the file is damaged"
        )
    return mask


def check(spec: SignSalientSpec, tensors: dict[str, Tensor]) -> None:
    """Refuse stored values that no writer produces. Raises `FileError` with the tensor's name."""
    refuse_nonfinite(tensors, ("row_scales", "row_means", "column_scales"))
    refuse_padding_bits(tensors, "signs", spec.n_binary, 1)
    if spec.salient is None:
        return
    refuse_padding_bits(tensors, "salient_columns", spec.in_features, 1)
    salient_mask(spec, tensors)
    try:
        grouped_int.check(spec.salient, without_prefix(SALIENT, tensors))
    except FileError as error:
        raise FileError(f"{SALIENT}*: {error}") from None
