"""What every storage format has: a description from which its tensors can be allocated, and a weight before packing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from quantkit.errors import FileError
from quantkit.formats.packing import packed_size

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Spec(ABC):
    """Everything a reader must know to allocate and decode a module; lives in ``config.json``.

    Subclasses are frozen dataclasses with the fields ``out_features`` and ``in_features``, the shape of the weight.
    """

    __slots__ = ()
    format: ClassVar[str]  # as config.json names it
    out_features: int
    in_features: int

    @abstractmethod
    def tensor_layout(self) -> Layout:
        """Name to (dtype, shape) of every stored tensor, in the order in which they are written."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Plain values, the format's name among them; ``from_json`` of the format is the inverse."""

    @abstractmethod
    def describe(self) -> str:
        """What is particular about it, in a few words: ``groups=3x2b, 1x4b, group_size=32``."""

    @property
    def n_weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def n_bytes(self) -> int:
        """Bytes of all stored tensors: what the module costs on disk and in memory."""
        return sum(dtype.itemsize * prod(shape) for dtype, shape in self.tensor_layout().values())

    @property
    def bpw(self) -> float:
        """Stored bits per weight: codes, signs, scales, zeros and indices."""
        return 8 * self.n_bytes / self.n_weights


class QuantizedWeight(Protocol):
    """A quantized weight before packing: what a solver returns."""

    def spec(self) -> Spec:
        """How it will be stored."""

    def dequantize(self) -> Tensor:
        """float32 ``[out_features, in_features]``: the weight that the packed module computes with."""


def refuse_unknown_fields(format: str, fields: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises `FileError` by name for fields of a description that are unknown or missing."""
    if set(fields) != set(known):
        wrong = sorted(set(fields) ^ set(known))
        raise FileError(f"{format}: unknown or missing fields {wrong} in a module description")


def refuse_nonfinite(tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Raises `FileError` for those of the named tensors that are there and hold NaN or Inf."""
    for name in names:
        if name in tensors and not bool(torch.isfinite(tensors[name]).all()):
            raise FileError(f"{name} holds NaN or Inf; the file is damaged")


def refuse_padding_bits(tensors: Mapping[str, Tensor], name: str, n_codes: int, bits: int) -> None:
    """Raises `FileError` when the last byte of a row of ``n_codes`` packed codes has bits beyond its last code."""
    used = n_codes * bits % 8  # of the last byte; 0: all of it
    assert tensors[name].shape[-1] == packed_size(n_codes, bits)
    if used and bool((tensors[name][..., -1] >> used).any()):
        raise FileError(f"{name} has bits set beyond its last code; the file is damaged")


def with_prefix(prefix: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a weight that is part of another one, under their names there."""
    return {f"{prefix}{name}": entry for name, entry in entries.items()}


def without_prefix(prefix: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `with_prefix`; entries without the prefix are left out."""
    return {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}
