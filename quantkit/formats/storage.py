"""Every storage format by its name: how to describe, pack, unpack and check a weight.

Adding a format is one file in this folder, one line in `FORMATS`, one line in the kernels' table
(``kernels/storage.py``), its tests, and its section in ``docs/format.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from quantkit.errors import FileError
from quantkit.formats import grouped_int, low_rank, sign_factors, sign_salient
from quantkit.formats.spec import QuantizedWeight, Spec


class StorageFormat(NamedTuple):
    """The functions of one format; each takes and returns the types of its own file."""

    spec_from_json: Callable[[dict[str, Any]], Spec]
    pack: Callable[[Any], dict[str, Tensor]]
    unpack: Callable[[Any, dict[str, Tensor]], QuantizedWeight]
    check: Callable[[Any, dict[str, Tensor]], None]


FORMATS: dict[str, StorageFormat] = {
    grouped_int.NAME: StorageFormat(
        grouped_int.GroupedIntSpec.from_json, grouped_int.pack, grouped_int.unpack, grouped_int.check
    ),
    sign_salient.NAME: StorageFormat(
        sign_salient.SignSalientSpec.from_json, sign_salient.pack, sign_salient.unpack, sign_salient.check
    ),
    sign_factors.NAME: StorageFormat(
        sign_factors.SignFactorsSpec.from_json, sign_factors.pack, sign_factors.unpack, sign_factors.check
    ),
    low_rank.NAME: StorageFormat(low_rank.LowRankSpec.from_json, low_rank.pack, low_rank.unpack, low_rank.check),
}


def spec_from_json(fields: dict[str, Any]) -> Spec:
    """The description that ``spec.to_json()`` wrote.

    Raises:
        FileError: an unknown ``format``, or fields that are unknown, missing or inconsistent, by name.
        TypeError, ValueError: a field of the wrong type.
    """
    name = fields.get("format")
    if name not in FORMATS:
        raise FileError(f"unknown storage format {name!r}; known: {', '.join(FORMATS)}; update quantkit")
    return FORMATS[name].spec_from_json(fields)


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The stored tensors of a weight, exactly those of ``weight.spec().tensor_layout()``."""
    return FORMATS[weight.spec().format].pack(weight)


def unpack(spec: Spec, tensors: dict[str, Tensor]) -> QuantizedWeight:
    """Inverse of `pack`; the tensors are those of ``spec.tensor_layout()``, on any device."""
    return FORMATS[spec.format].unpack(spec, tensors)


def check(spec: Spec, tensors: dict[str, Tensor]) -> None:
    """Refuse stored values that no writer produces. Raises `FileError` with the tensor's name."""
    FORMATS[spec.format].check(spec, tensors)
