"""Segments: the tokens of one class of one sequence, in the order in which they came. They are coded once.

Capacity grows by whole pages, a sixty-fourth of the present size at a time: what is allocated exceeds what is used by
at most a page and 1.6 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quantkit.algorithms.kv.coding import Coded, encode
from quantkit.algorithms.kv.policy import Transform
from quantkit.formats.kv_page import PAGE, GridSpec, PageSpec, dequantize, pack_keys, pack_values, scale_places
from quantkit.kernels.kv_append import Appender, supports_append
from quantkit.kernels.kv_attention import Part, attend, attend_pages

FLOAT_STEP = 32  # tokens by which a segment in 16 bits grows


@dataclass(frozen=True, slots=True)
class Tokens:
    """Keys and values [heads, n, head_dim] and the positions of their tokens."""

    keys: Tensor
    values: Tensor
    positions: list[int]

    def __len__(self) -> int:
        return len(self.positions)

    def part(self, start: int, stop: int | None = None) -> Tokens:
        """The tokens of a slice."""
        here = slice(start, stop)
        return Tokens(self.keys[:, here], self.values[:, here], self.positions[here])

    def copy(self) -> Tokens:
        """The same in tensors of their own."""
        return Tokens(self.keys.clone(), self.values.clone(), self.positions)

    def of(self, classes: list[int], wanted: int) -> Tokens:
        """The tokens of a class."""
        index = [i for i, each in enumerate(classes) if each == wanted]
        if len(index) in (0, len(self)):  # no index on the device
            return self.part(0, len(index))
        where = torch.tensor(index, device=self.keys.device)
        return Tokens(self.keys[:, where], self.values[:, where], [self.positions[i] for i in index])


def join(parts: Sequence[Tokens]) -> Tokens:
    """All tokens in order."""
    keys, values = (torch.cat(column, 1) for column in zip(*((part.keys, part.values) for part in parts), strict=True))
    return Tokens(keys, values, [position for part in parts for position in part.positions])


@dataclass
class PackedSegment:
    """Tokens in packed pages."""

    spec: PageSpec
    clip: float
    tensors: dict[str, Tensor]
    positions: list[int] = field(default_factory=list)  # by slot, ascending; on the host
    appender: Appender = field(default_factory=Appender)

    @classmethod
    def empty(cls, spec: PageSpec, clip: float, device: torch.device) -> PackedSegment:
        """A segment without pages."""
        layout = spec.layout(0).items()
        return cls(
            spec, clip, {name: torch.zeros(shape, dtype=dtype, device=device) for name, (dtype, shape) in layout}
        )

    @property
    def count(self) -> int:
        return len(self.positions)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def clone(self) -> PackedSegment:
        """A copy that shares nothing."""
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, positions=list(self.positions))

    def append(self, keys: Tensor, values: Tensor, positions: list[int], transform: Transform) -> None:
        """Transform and code keys and values [heads, n, head_dim], on the original basis, after the tokens here."""
        start, spec = self.count, self.spec
        self.positions += positions
        self._reserve(-(-self.count // PAGE))
        if supports_append(keys, spec.keys):
            options = {"rotate": transform.rotate_keys, "mean": transform.key_mean, "channel_scales": None}
            self.appender.append("key", keys, start, self.tensors, spec, clip=self.clip, **options)
        else:
            self._write("key", spec.keys, encode(transform.keys(keys), spec.bits, spec.keys, self.clip), start)
        if supports_append(values, spec.values):
            options = {"rotate": transform.rotate_values, "mean": None, "channel_scales": transform.value_scale}
            self.appender.append("value", values, start, self.tensors, spec, clip=self.clip, **options)
        else:
            self._write(
                "value", spec.values, encode(transform.values(values), spec.bits, spec.values, self.clip), start
            )

    def _write(self, which: str, grid: GridSpec, coded: Coded, start: int) -> None:
        first, before = divmod(start, PAGE)
        pack = pack_keys if which == "key" else pack_values
        words = pack(torch.nn.functional.pad(coded.codes, (0, 0, before, 0)), self.spec)
        self.tensors[f"{which}_words"][:, first : first + words.shape[1]] |= words  # the fields there are still 0
        for name, new in (("scales", coded.scales), ("offsets", coded.offsets)):
            if new is not None and grid.axis == "token":
                places = scale_places(start, start + new.shape[2], self.spec, new.device)
                self.tensors[f"{which}_{name}"][:, :, places] = new
            elif new is not None:
                group = start // grid.group
                self.tensors[f"{which}_{name}"][:, group : group + new.shape[1]] = new

    def _reserve(self, n_pages: int) -> None:
        held = self.tensors["key_words"].shape[1]
        if n_pages <= held:
            return
        target = n_pages if held == 0 else max(n_pages, held + held // 64)
        for name, (dtype, shape) in self.spec.layout(target - held).items():
            old = self.tensors[name]
            more = torch.zeros(shape, dtype=dtype, device=old.device)
            self.tensors[name] = torch.cat((old, more), _token_dimension(name, self.spec))

    def attend(self, query: Tensor) -> Part:
        """Attention of float32 queries [heads, m, head_dim] in the basis of the pages."""
        return attend_pages(query, self.spec, self.tensors, self.count)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Decoded keys and values, float32 [heads, count, head_dim] in the basis of the pages."""
        pages = slice(0, -(-self.count // PAGE))
        keys, values = (
            dequantize(self.tensors, self.spec, which, pages)[:, : self.count] for which in ("key", "value")
        )
        return keys, values

    def truncate(self, length: int) -> tuple[Tensor, Tensor, list[int]]:
        """Forget tokens at positions from `length` on.

        Returns decoded keys, values and positions of tokens that have to leave too: the rest of a group of keys that
        was cut, which cannot be extended in place.
        """
        keep = sum(position < length for position in self.positions)
        group = self.spec.keys.group if self.spec.keys.axis == "channel" else 1
        whole = keep - keep % group
        keys, values = (x[:, whole:keep].clone() for x in self.dense())
        rest = self.positions[whole:keep]
        self.positions = self.positions[:whole]
        self._clear_from(whole)
        return keys, values, rest

    def _clear_from(self, count: int) -> None:
        """Free the pages after the first `count` tokens; zero the unused fields of the last page."""
        n_pages, spec = -(-count // PAGE), self.spec
        for name in self.tensors:
            stop = spec.layout(n_pages)[name][1][_token_dimension(name, spec)]
            self.tensors[name] = self.tensors[name].narrow(_token_dimension(name, spec), 0, stop).clone()
        if count % PAGE:
            live = torch.zeros(
                spec.heads, PAGE, spec.head_dim, dtype=torch.uint8, device=self.tensors["key_words"].device
            )
            live[:, : count % PAGE] = (1 << spec.bits) - 1
            self.tensors["key_words"][:, -1:] &= pack_keys(live, spec)
            self.tensors["value_words"][:, -1:] &= pack_values(live, spec)
            free = scale_places(count, n_pages * PAGE, spec, live.device)
            for which, grid in (("key", spec.keys), ("value", spec.values)):
                for name in {f"{which}_scales", f"{which}_offsets"} & self.tensors.keys():
                    if grid.axis == "token":
                        self.tensors[name][:, :, free] = 0
                    else:
                        self.tensors[name][:, count // grid.group :] = 0


def _token_dimension(name: str, spec: PageSpec) -> int:
    """The dimension of a stored tensor that grows with the tokens."""
    which, _, kind = name.partition("_")
    grid = spec.keys if which == "key" else spec.values
    return 2 if kind != "words" and grid.axis == "token" else 1


@dataclass
class FloatSegment:
    """Tokens in 16 bits: float16 [heads, capacity, head_dim], of which the first `count` are used."""

    keys: Tensor
    values: Tensor
    positions: list[int] = field(default_factory=list)

    @classmethod
    def empty(cls, heads: int, head_dim: int, capacity: int, dtype: torch.dtype, device: torch.device) -> FloatSegment:
        """A segment with room for `capacity` tokens."""
        keys, values = (torch.zeros(heads, capacity, head_dim, dtype=dtype, device=device) for _ in range(2))
        return cls(keys, values)

    @property
    def count(self) -> int:
        return len(self.positions)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def clone(self) -> FloatSegment:
        """A copy that shares nothing."""
        return FloatSegment(self.keys.clone(), self.values.clone(), list(self.positions))

    def append(self, keys: Tensor, values: Tensor, positions: list[int]) -> None:
        """Keep keys and values [heads, n, head_dim] of any float dtype, rounded to 16 bits."""
        start = self.count
        self.reserve(len(positions))
        self.positions += positions
        self.keys[:, start : self.count] = keys
        self.values[:, start : self.count] = values

    def reserve(self, n: int) -> None:
        """Room for n more tokens."""
        missing = self.count + n - self.keys.shape[1]
        if missing > 0:
            more = -(-max(missing, self.keys.shape[1] // 32) // FLOAT_STEP) * FLOAT_STEP
            self.keys, self.values = (torch.nn.functional.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))

    def replace(self, parts: Sequence[Tokens]) -> None:
        """Keep these tokens in place of all others; parts may be views of what is here."""
        parts = [part for part in parts if len(part)]
        start = 0
        while parts and parts[0].keys.data_ptr() == self.keys[:, start:].data_ptr():  # stays where it is
            start += len(parts.pop(0))
        kept = self.positions[:start]
        self.positions = kept
        if parts:
            laid = join(parts) if len(parts) > 1 else parts[0].copy()
            self.append(laid.keys, laid.values, laid.positions)

    def attend(self, query: Tensor) -> Part:
        """Attention of float32 queries [heads, m, head_dim] in the basis of the tokens."""
        return attend(query, *self.dense())

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values [heads, count, head_dim], views."""
        return self.keys[:, : self.count], self.values[:, : self.count]

    def truncate(self, length: int) -> tuple[Tensor, Tensor, list[int]]:
        """Forget tokens at positions from `length` on; nothing else has to leave."""
        self.positions = [position for position in self.positions if position < length]
        return self.keys[:, :0], self.values[:, :0], []
