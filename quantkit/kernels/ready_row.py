"""A row made ready for a product with signs and integers (ready_row_triton.py): the first of two launches.

The row is brought into the order and scale of the packed columns and cut into bits and bytes, once for all rows of the
weight. A *copy* is what one of several stacked weights makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.kernels.gemv import row_threads
from quantkit.kernels.launch import early_launch
from quantkit.kernels.planar import PlanarSegment, planar_segments
from quantkit.kernels.planar_matmul import triton_kernels

_PLANES = 16
_NORM_COLUMNS = 8192  # that four warps hold in registers


@dataclass(frozen=True, slots=True, kw_only=True)
class SignParts:
    """Two weights side by side: signs with one scale for each row, and integers or None.

    Signs may have several groups; then rows have a scale for each, and as many copies of x, 0 outside of its group.
    """

    signs: GroupedIntSpec
    integers: GroupedIntSpec | None = None

    @property
    def words8(self) -> int:
        """Eights of 32-bit words in a row of signs."""
        return planar_segments(self.signs)[0].row_words // 16

    @property
    def blocks(self) -> int:
        return -(-self.words8 // 4)

    @property
    def threads(self) -> int:
        """That a row of integers takes, and the pairs of planes of each."""
        return row_threads(planar_segments(self.integers)[0]) if self.integers else 0

    @property
    def chunks(self) -> int:
        """Fours of these threads."""
        return -(-self.threads // 4)

    @property
    def pairs(self) -> int:
        return planar_segments(self.integers)[0].planes_per_block // 2 if self.integers else 0


def row_table(parts: SignParts, columns: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What `make_ready` does to x: for each bit of a row of signs and each byte of integers a column and a scale.

    Args:
        parts: the weights.
        columns: of either weight int ``[in]``, the column of x that each of its columns takes; -1: zero.
        scales: of either weight float ``[in]``, that float16 holds.

    Returns:
        int16 (or int32 for more than 32767 columns) and float16, ``[cells]``.
    """
    places, factors = [], []
    tables = [_bit_columns(planar_segments(parts.signs)[0])]
    if parts.integers:
        tables.append(_byte_columns(planar_segments(parts.integers)[0]))
    for table, order, scale in zip(tables, columns, scales, strict=False):
        cells = table.to(order.device)
        inside = cells < len(order)
        cells = torch.where(inside, cells, 0)
        places.append(torch.where(inside, order[cells].to(torch.int32), -1))
        factors.append(torch.where(inside, scale[cells].float(), 0.0).half())
    place = torch.cat(places)
    return place.to(torch.int16) if int(place.max()) < 2**15 else place, torch.cat(factors)


def _grid(*sizes: int) -> list[Tensor]:
    """Indices along each of some axes, to be combined."""
    return [
        torch.arange(size).view([-1 if axis == own else 1 for axis in range(len(sizes))])
        for own, size in enumerate(sizes)
    ]


def _bit_columns(segment: PlanarSegment) -> Tensor:
    """int64 ``[words * 32]``: the column that each bit of a row's 32-bit words holds."""
    half = segment.plane_width // 2  # words of a block of planes
    word, upper, odd, pair = _grid(segment.row_words // 2, 2, 2, 8)
    plane = word // half * 16 + 2 * pair + odd
    column: Tensor = plane * segment.plane_width + word % half * 2 + upper
    return column.flatten()


def _byte_columns(segment: PlanarSegment) -> Tensor:
    """int64 ``[threads * pairs * 16]``: the column that each byte of a thread's slices stands for."""
    pairs, width = segment.planes_per_block // 2, segment.plane_width
    thread, pair, word, half, odd = _grid(row_threads(segment), pairs, 4, 2, 2)
    per_block = width // 8  # threads, of eight columns of each plane
    plane = (thread // per_block * pairs + pair) * 2 + odd
    column: Tensor = plane * width + thread % per_block * 8 + 2 * word + half
    return column.flatten()


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a row is made of, in the launch that makes it ready.

    Attributes:
        x: float16 or bfloat16 ``[1, n]``; for "gated" ``[1, 2 n]``.
        kind: "row": x. "gated": silu(first half) * second half. "norm": RMS norm of x + update, times weight.
        update: ``[1, n]``, or None for nothing; weight: ``[n]``; eps: added to the mean square.
    """

    x: Tensor
    kind: Literal["row", "gated", "norm"] = "row"
    update: Tensor | None = None
    weight: Tensor | None = None
    eps: float = 0.0


def make_ready(source: Source, parts: SignParts, places: Tensor, factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A row made ready for `sign_rows`, all copies of it, on a GPU.

    Args:
        source: the row.
        parts: weights that it will be multiplied by.
        places, factors: ``[copies, cells]`` of `row_table`.

    Returns:
        What `sign_rows` takes (two tensors), and x + update of a norm (otherwise x).
    """
    ready, numbers = new_ready(parts, places)
    residual = source.x if source.update is None else torch.empty_like(source.x)
    grid, arguments = ready_launch(source, parts, places, factors, ready, numbers, residual)
    with torch.cuda.device(places.device):  # Triton launches on the current device
        triton_kernels("ready_row_triton").ready_kernel[grid](**arguments, **early_launch(places.device))
    return ready, numbers, residual


def new_ready(parts: SignParts, places: Tensor) -> tuple[Tensor, Tensor]:
    """Room for `make_ready`'s results: int32 and float32 ``[copies, ...]``."""
    size = 16 * 8 * parts.words8 + 8 * parts.pairs * parts.threads
    numbers = 2 * parts.blocks + (1 + 2 * parts.pairs) * parts.chunks
    return (
        torch.empty(len(places), size, dtype=torch.int32, device=places.device),
        torch.empty(len(places), numbers, dtype=torch.float32, device=places.device),
    )


def ready_launch(
    source: Source,
    parts: SignParts,
    places: Tensor,
    factors: Tensor,
    ready: Tensor,
    numbers: Tensor,
    residual: Tensor,
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and arguments of `ready_kernel`."""
    n_columns = source.x.shape[1] // (2 if source.kind == "gated" else 1)
    block = 1 << (n_columns - 1).bit_length() if source.kind == "norm" else 1
    warps = 4 if block <= _NORM_COLUMNS else 8
    sliced = -(-4 * parts.pairs * parts.threads // (32 * warps))
    arguments = {
        "x": source.x,
        "update": source.x if source.update is None else source.update,
        "weight": source.x if source.weight is None else source.weight,
        "residual": residual,
        "places": places,
        "factors": factors,
        "ready": ready,
        "numbers": numbers,
        "eps": source.eps,
        "n_columns": n_columns,
        "n_words8": parts.words8,
        "n_blocks": parts.blocks,
        "n_threads": parts.threads,
        "n_cells": places.shape[1],
        "n_ready": ready.shape[1],
        "n_numbers": numbers.shape[1],
        "SOURCE": source.kind,
        "HAS_UPDATE": source.update is not None,
        "BLOCK": block,
        "PAIRS": parts.pairs,
        "THREADS": 32 * warps,
        "num_warps": warps,
    }
    return (parts.blocks * _PLANES + sliced, len(places)), arguments
