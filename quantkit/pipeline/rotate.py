"""transform=hadamard: parameters are rotated as they are read, and what is not quantized is written rotated.

Nothing is kept between reads, so memory stays what it was, and a run that is resumed reads the same numbers again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.algorithms.rotation import Rotation, fold_input, fold_output, hadamard_rotation, rotate_heads
from quantkit.formats.safetensors_io import TensorRef, read_header, read_tensor, row_pieces, write_pieces
from quantkit.models.skeleton import Skeleton
from quantkit.models.stream import Stream, find_stream

_PIECE_NUMBERS = 1 << 22  # of a matrix that are rotated at once


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A parameter that is stored rotated: its name in the output, and its place in the source."""

    parameter: str
    name: str
    ref: TensorRef


class StreamRotation:
    """The `Transform` of a skeleton whose residual stream is rotated.

    Args:
        skeleton: of the model; its own transform is left alone.
        seed: of the rotation.
        device: where weights are rotated.
        values: whether values are rotated too, head by head; undone by the output projection.
        packed: parameters outside the blocks that are stored packed, by whoever quantizes them.

    Raises:
        RequestError: the model does not compute the same on a rotated stream; no weight has been read.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        seed: int,
        device: torch.device,
        *,
        values: bool = False,
        packed: Collection[str] = frozenset(),
    ) -> None:
        hidden: int = skeleton.config.get_text_config(decoder=True).hidden_size
        self.rotation: Rotation = hadamard_rotation(hidden, seed)
        self._rotate_heads = partial(rotate_heads, seed=seed)
        self.stream: Stream = find_stream(skeleton, self.rotation.apply, self._rotate_heads if values else None)
        self.touched = self.stream.names
        self.skeleton, self.device = skeleton, device
        linears = (linear for block in skeleton.blocks for linear in block.linears)
        self._quantized = {f"{linear.name}.weight" for linear in linears}
        self._stored = _stored(skeleton, self.touched - self._quantized)
        self._outside = [
            item for item in self._stored if not skeleton.in_blocks(item.parameter) and item.parameter not in packed
        ]

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """Weights that are quantized come in float32 (or float64, if they are stored so), others as they are stored."""
        stream = self.stream
        if name in stream.norms:
            return torch.full_like(tensor, 1 - stream.norms[name])
        working = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        dtype = working if name in self._quantized else tensor.dtype
        if name in stream.values or name in stream.mixed:
            tensor = self._with_values(name, tensor.to(working))
        if name in stream.writers and tensor.ndim == 1:
            return fold_output(tensor.to(working), self.rotation).to(dtype)
        if name in stream.writers:
            return _in_pieces(tensor.T, lambda rows: self.rotation.apply(rows.to(working)).to(dtype)).T.contiguous()
        if name in stream.readers or name in stream.embeddings:
            return _in_pieces(tensor, self._rows(name, working, dtype, tensor.device))
        return tensor.to(dtype)

    def _with_values(self, name: str, tensor: Tensor) -> Tensor:
        """Rows that compute values, or columns that read them, in the heads' new bases."""
        if name in self.stream.mixed:
            return self._rotate_heads(tensor, self.stream.mixed[name])
        values = self.stream.values[name]
        rows, changed = values.rows().to(tensor.device), tensor.clone()
        turned = self._rotate_heads(tensor[rows].mT if tensor.ndim == 2 else tensor[rows], values.head_dim)
        changed[rows] = turned.mT if tensor.ndim == 2 else turned
        return changed

    def _rows(
        self, name: str, working: torch.dtype, dtype: torch.dtype, device: torch.device
    ) -> Callable[[Tensor], Tensor]:
        """What is done to rows of an embedding, or of a weight that reads the stream."""
        norm = self.stream.readers.get(name)
        if norm is None:
            return lambda rows: self.rotation.apply(rows.to(working)).to(dtype)
        gain = self.stream.norms[norm] + self.skeleton.read_source(norm).to(device, working)
        return lambda rows: fold_input(rows.to(working), gain, self.rotation).to(dtype)

    def block_tensors(self, index: int) -> dict[str, Tensor]:
        prefix = f"{self.skeleton.blocks[index].name}."
        kept = [item for item in self._stored if item.parameter.startswith(prefix)]
        return {item.name: tensor for item in kept for tensor in self._pieces(item, whole=True)}

    def write_outside(self, folder: Path) -> list[TensorRef]:
        refs: list[TensorRef] = []
        for number, item in enumerate(self._outside):
            path = folder / f"rotated-{number:05d}.safetensors"
            write_pieces(path, replace(item.ref, name=item.name), self._pieces(item))
            refs += read_header(path).values()
        return refs

    @property
    def outside(self) -> list[TensorRef]:
        return [replace(item.ref, name=item.name) for item in self._outside]

    @property
    def extra_bytes(self) -> int:
        stored = {item.ref.name: item.ref.n_bytes for item in self._outside}
        return sum(item.ref.n_bytes for item in self._outside) - sum(stored.values())

    @property
    def config_changes(self) -> dict[str, Any]:
        tied: dict[str, str] = getattr(self.skeleton.model, "all_tied_weights_keys", {})
        unties = any(name in self.touched for pair in tied.items() for name in pair)
        return {"tie_word_embeddings": False} if unties else {}

    @property
    def multiplications(self) -> int:
        return sum(len(factor) for factor in self.rotation.factors)

    def _pieces(self, item: StoredTensor, *, whole: bool = False) -> Iterator[Tensor]:
        """The rotated parameter on the CPU; unless it must be whole, some rows of a matrix at a time."""
        by_rows = item.ref.shape[-1] == self.rotation.size and item.parameter not in self.stream.writers
        for ref in row_pieces(item.ref, _PIECE_NUMBERS) if by_rows and not whole else [item.ref]:
            yield self(item.parameter, read_tensor(ref).to(self.device)).cpu()


def _stored(skeleton: Skeleton, names: Collection[str]) -> list[StoredTensor]:
    """By their names. A head that shared the embedding's tensor can do so no longer: both get runtime names."""
    sources = Counter(skeleton.source_name(name) for name in names)
    found = []
    for name in sorted(names):
        source = skeleton.source_name(name)
        found.append(StoredTensor(name, source if sources[source] == 1 else name, skeleton.tensors[source]))
    return found


def _in_pieces(matrix: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
    """``turn`` of some rows at a time: what it needs on the way is small."""
    n_rows = max(1, _PIECE_NUMBERS // matrix.shape[-1])
    out = turn(matrix[:0]).new_empty(matrix.shape)
    for start in range(0, len(matrix), n_rows):
        out[start : start + n_rows] = turn(matrix[start : start + n_rows])
    return out
