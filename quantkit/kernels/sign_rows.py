"""One row of x times packed signs, with integers beside them (sign_rows_triton.py): two launches.

First x is brought into the order and scale of the packed columns and cut into bits and bytes, once for all rows; the
second launch, whose first weights are on their way by then, multiplies. A *copy* is what one of several stacked weights
makes of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.kernels.gemv import row_threads
from quantkit.kernels.launch import early_launch
from quantkit.kernels.planar import PlanarSegment, is_paired, padded_rows, planar_segments
from quantkit.kernels.planar_matmul import constant_zero, triton_kernels

MAX_COPIES = 3
COPY_ROWS = 32  # of a program, at most
_WIDTHS = (1, 2, 4, 8)
_MANY_ROWS = 8192  # from which programs of 16 rows keep a device busy
_BLOCK = 1024  # columns that share a unit
_PLANES_EACH = 1  # of a program of ready_kernel
_SLICED_COLUMNS = 256  # of a program of ready_kernel
_NORM_COLUMNS = 8192  # that four warps hold in registers

Tensors = dict[str, Tensor]


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
    def pairs(self) -> int:
        return planar_segments(self.integers)[0].planes_per_block // 2 if self.integers else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SignRowsConfig:
    """Shape of a launch of the product: 16 * ``tiles`` rows; rows of integers are walked by ``lanes`` threads."""

    tiles: int
    warps: int
    lanes: int = 32
    max_registers: int | None = None


@cache
def counts_bits(device: torch.device) -> bool:
    """Whether the tensor cores count common bits: from sm_80 to sm_90; later ones do it in software."""
    return device.type == "cuda" and (8, 0) <= torch.cuda.get_device_capability(device) < (10, 0)


def has_sign_rows(parts: SignParts, starts: Sequence[int] = ()) -> bool:
    """Whether the kernels take these weights, and copies that start at these rows."""
    fits = not any(start % COPY_ROWS for start in starts)
    fits = fits and (len(starts) < MAX_COPIES or _span(starts, parts.signs.out_features) is not None)
    if parts.integers is None:
        return fits
    segments = planar_segments(parts.integers)
    return fits and is_paired(parts.integers) and len(segments) == 1 and segments[0].bits in _WIDTHS


def _span(starts: Sequence[int], n_rows: int) -> int | None:
    """The rows of each copy, if all have equally many."""
    even = starts and [*starts, n_rows] == [starts[0] * number for number in range(1, len(starts) + 2)]
    return starts[0] if even else None


def choose_sign_rows(parts: SignParts) -> SignRowsConfig:
    """The launch shape for weights, as measured on an H200 (docs/log.md)."""
    blocks = 1 << (parts.blocks - 1).bit_length()
    if parts.integers is None:  # a warp for each block of columns
        return SignRowsConfig(tiles=1, warps=min(16, max(2, blocks)))
    if blocks > 8:
        return SignRowsConfig(tiles=1, warps=8, lanes=64)
    if blocks > 4 or parts.signs.out_features < _MANY_ROWS:
        return SignRowsConfig(tiles=2 if blocks > 4 else 1, warps=4)
    return SignRowsConfig(tiles=2, warps=4, max_registers=128)  # four programs for each multiprocessor


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
        sign_rows_kernels().ready_kernel[grid](**arguments, **early_launch(places.device))
    return ready, numbers, residual


def new_ready(parts: SignParts, places: Tensor) -> tuple[Tensor, Tensor]:
    """Room for `make_ready`'s results: int32 and float32 ``[copies, ...]``."""
    size = 16 * 8 * parts.words8 + 8 * parts.pairs * parts.threads
    numbers = 2 * parts.blocks + (1 + parts.pairs) * parts.threads
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
    count = _SLICED_COLUMNS // (16 * max(parts.pairs, 1))
    n_columns = source.x.shape[1] // (2 if source.kind == "gated" else 1)
    block = 1 << (n_columns - 1).bit_length() if source.kind == "norm" else 1
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
        "COUNT": count,
        "PLANES_EACH": _PLANES_EACH,
        "num_warps": 4 if block <= _NORM_COLUMNS else 8,
    }
    return (parts.blocks * (16 // _PLANES_EACH) + -(-parts.threads // count), len(places)), arguments


def sign_rows(
    ready: Tensor,
    numbers: Tensor,
    parts: SignParts,
    signs: Tensors,
    integers: Tensors | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    starts: Sequence[int] = (),
    config: SignRowsConfig | None = None,
) -> Tensor:
    """Signs and integers side by side times one row, ``[1, out]``, on a GPU.

    Args:
        ready, numbers: of `make_ready`.
        parts: weights for which `has_sign_rows` holds.
        signs: planar ``words``, ``scales`` [rows] (several groups: [groups, rows]) and, if there are, ``means`` [rows],
            of any float dtype. The scales of the specs do not count.
        integers: what `planar.to_planar` made of them, or None.
        bias: ``[out]`` of any float dtype, or None.
        dtype: of the result; sums are float32. x is taken in 16 bits relative to the largest of 1024 columns with
            signs, or of some 32 that are multiplied by integers.
        starts: first rows of the second copy and the third, or of any number of copies of equally many rows.
        config: `choose_sign_rows`'s if None.
    """
    out = torch.empty(1, parts.signs.out_features, dtype=dtype, device=ready.device)
    config = config or choose_sign_rows(parts)
    grid, arguments = rows_launch(ready, numbers, parts, signs, integers, bias, out, starts, config)
    with torch.cuda.device(out.device):
        sign_rows_kernels().sign_rows_kernel[grid](**arguments, ASM=True, **early_launch(out.device))
    return out


def rows_launch(
    ready: Tensor,
    numbers: Tensor,
    parts: SignParts,
    signs: Tensors,
    integers: Tensors | None,
    bias: Tensor | None,
    out: Tensor,
    starts: Sequence[int],
    config: SignRowsConfig,
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments of `sign_rows_kernel`, all but ASM."""
    n_rows = parts.signs.out_features
    span = _span(starts, n_rows)
    second, third = (*(() if span else starts), n_rows, n_rows)[: MAX_COPIES - 1]
    arguments = {
        "ready": ready,
        "numbers": numbers,
        "signs": signs["words"].view(torch.int32),
        "sign_scales": signs["scales"],
        "sign_means": signs.get("means", signs["scales"]),
        **_integer_arguments(parts.integers, integers, signs, config),
        "bias": out if bias is None else bias,
        "y": out,
        "span": span or n_rows,
        "second": second,
        "third": third,
        "n_ready": ready.shape[1],
        "n_numbers": numbers.shape[1],
        "n_rows": n_rows,
        "scale_stride": signs["scales"].stride(0) if parts.signs.n_groups > 1 else 0,
        "stride4": padded_rows(parts.signs) // 4,
        "n_words8": parts.words8,
        "n_blocks": parts.blocks,
        "HAS_MEANS": "means" in signs,
        "PATHS": parts.signs.n_groups,
        "BLOCKS": 1 << (parts.blocks - 1).bit_length(),
        "ONCE": parts.blocks <= config.warps,
        "HAS_BIAS": bias is not None,
        "TILES": config.tiles,
        "LANES": config.lanes,
        "WARPS": config.warps,
        "num_warps": config.warps,
        "maxnreg": config.max_registers,
        "enable_fp_fusion": True,
    }
    return (-(-n_rows // (16 * config.tiles)),), arguments


def _integer_arguments(
    spec: GroupedIntSpec | None, tensors: Tensors | None, signs: Tensors, config: SignRowsConfig
) -> dict[str, Any]:
    if spec is None or tensors is None:
        nothing = dict.fromkeys(("words", "scales", "zeros"), signs["scales"])
        numbers = dict.fromkeys(("n_threads", "stride16", "chunks"), 0)
        return nothing | numbers | {"BITS": 0, "WIDTH": 16, "GROUP": 1, "ZERO": 0.0, "WHOLE": True}
    segment = planar_segments(spec)[0]
    scales = tensors["planar_scales"].flatten().view(torch.int64)
    zeros = tensors.get("planar_zeros")
    if zeros is not None:
        zeros = zeros.flatten().view(torch.int64 if zeros.dtype == torch.float16 else torch.int32)
    threads = row_threads(segment)
    return {
        "words": tensors["planar"].view(torch.int32),
        "scales": scales,
        "zeros": scales if zeros is None else zeros,
        "n_threads": threads,
        "stride16": segment.row_words // 16,
        "chunks": -(-threads // config.lanes),
        "BITS": segment.bits,
        "WIDTH": segment.plane_width,
        "GROUP": spec.group_size,
        "ZERO": None if zeros is not None else constant_zero(spec, segment),
        "WHOLE": threads <= config.lanes,
    }


def sign_rows_kernels() -> Any:
    """The module of the kernels. Raises `RequestError` where Triton is not installed."""
    return triton_kernels("sign_rows_triton")
