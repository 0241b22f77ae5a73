"""One row of x times weights that are read in an order and scale of their own (sliced_triton.py): two launches.

First x is brought into that order and scale, and cut into byte slices, once for all rows; the second launch, whose
first weights are on their way by then, multiplies. A *copy* is what one of several stacked weights makes of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.kernels.gemv import row_threads
from quantkit.kernels.launch import early_launch
from quantkit.kernels.planar import PlanarSegment, is_paired, padded_rows, planar_segments
from quantkit.kernels.planar_matmul import constant_zero, triton_kernels

MAX_COPIES = 3
_WIDTHS = (1, 2, 4, 8)
_ROWS = 8  # of a tile, at most
_MANY_ROWS = 8192
_SLICED_COLUMNS = 256  # of a program of slice_kernel

Specs = Sequence[GroupedIntSpec]
Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicedConfig:
    """Shape of a launch of the product: ``rows`` of each group of ``lanes`` threads."""

    rows: int
    warps: int
    lanes: int


def has_sliced(specs: Specs, starts: Sequence[int] = ()) -> bool:
    """Whether the kernels take one or two weights with these columns side by side, and copies that start there."""
    segments = [planar_segments(spec) for spec in specs]
    widths = all(len(each) == 1 and each[0].bits in _WIDTHS for each in segments)
    return widths and all(map(is_paired, specs)) and len(starts) < MAX_COPIES and not any(s % _ROWS for s in starts)


def choose_sliced(specs: Specs) -> SlicedConfig:
    """The launch shape for weights side by side: threads for whole rows if those are short, rows for large weights."""
    threads = max(row_threads(planar_segments(spec)[0]) for spec in specs)
    lanes = 64 if 32 < threads <= 64 else 32
    many = threads <= lanes and specs[0].out_features >= _MANY_ROWS
    return SlicedConfig(rows=_ROWS if many else 4, warps=lanes // 32, lanes=lanes)


def slice_table(specs: Specs, columns: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What `slice_row` does to x: for each byte that a thread reads a column of x and a scale.

    Args:
        specs: weights side by side.
        columns: of each weight (more are left out) int ``[in]``, the column of x that each column takes; -1: zero.
        scales: of each weight float ``[in]``, that float16 holds.

    Returns:
        int16 (or int32 for more than 32767 columns) and float16, ``[cells]``.
    """
    places, factors = [], []
    for spec, order, scale in zip(specs, columns, scales, strict=False):
        cells = _thread_columns(planar_segments(spec)[0], order.device)
        inside = cells < len(order)
        cells = torch.where(inside, cells, 0)
        places.append(torch.where(inside, order[cells].to(torch.int32), -1))
        factors.append(torch.where(inside, scale[cells].float(), 0.0).half())
    place = torch.cat(places)
    return place.to(torch.int16) if int(place.max()) < 2**15 else place, torch.cat(factors)


def _thread_columns(segment: PlanarSegment, device: torch.device) -> Tensor:
    """int64 ``[threads * pairs * 16]``: the column that each byte of a thread's slices stands for."""
    pairs, width = segment.planes_per_block // 2, segment.plane_width
    shape = (row_threads(segment), pairs, 4, 4)
    thread, pair, word, byte = (
        torch.arange(size, device=device).view([-1 if axis == own else 1 for axis in range(4)])
        for own, size in enumerate(shape)
    )
    per_block = width // 8  # threads, of eight columns of each plane
    plane = (thread // per_block * pairs + pair) * 2 + byte % 2
    column: Tensor = plane * width + thread % per_block * 8 + 2 * word + byte // 2
    return column.flatten()


def slice_row(x: Tensor, specs: Specs, places: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """The slices of all copies of x ``[1, n]``, for `sliced_product`; tables ``[copies, cells]`` of `slice_table`."""
    slices, numbers = new_slices(specs, places)
    grid, arguments = slice_launch(x, specs, places, factors, slices, numbers)
    with torch.cuda.device(x.device):  # Triton launches on the current device
        sliced_kernels().slice_kernel[grid](**arguments, **early_launch(x.device))
    return slices, numbers


def new_slices(specs: Specs, places: Tensor) -> tuple[Tensor, Tensor]:
    """Room for `slice_row`'s results: int32 and float32 ``[copies, ...]``."""
    counts = _thread_counts(specs)
    slices = sum(8 * pairs * threads for threads, pairs in counts)
    numbers = sum((1 + pairs) * threads for threads, pairs in counts)
    return (
        torch.empty(len(places), slices, dtype=torch.int32, device=places.device),
        torch.empty(len(places), numbers, dtype=torch.float32, device=places.device),
    )


def _thread_counts(specs: Specs) -> list[tuple[int, int]]:
    """Threads along a row, and pairs of planes of each, of every weight."""
    segments = [planar_segments(spec)[0] for spec in specs]
    return [(row_threads(segment), segment.planes_per_block // 2) for segment in segments]


def slice_launch(
    x: Tensor, specs: Specs, places: Tensor, factors: Tensor, slices: Tensor, numbers: Tensor
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and arguments of `slice_kernel`."""
    counts = _thread_counts(specs)
    shares = [_SLICED_COLUMNS // (16 * pairs) for _, pairs in counts]
    programs = [-(-threads // share) for (threads, _), share in zip(counts, shares, strict=True)]
    arguments = {
        "x": x,
        "places": places,
        "factors": factors,
        "slices": slices,
        "numbers": numbers,
        "n0": counts[0][0],
        "n1": counts[-1][0],
        "programs0": programs[0],
        "n_cells": places.shape[1],
        "n_slices": slices.shape[1],
        "n_numbers": numbers.shape[1],
        "PAIRS": tuple(pairs for _, pairs in counts),
        "COUNTS": tuple(shares),
        "num_warps": 4,
    }
    return (sum(programs), len(places)), arguments


def sliced_product(
    sliced: tuple[Tensor, Tensor],
    specs: Specs,
    tensors: Sequence[Tensors],
    bias: Tensor | None,
    dtype: torch.dtype,
    starts: Sequence[int] = (),
    config: SlicedConfig | None = None,
) -> Tensor:
    """The weights side by side times one row, ``[1, out]``, on a GPU.

    Args:
        sliced: of `slice_row`.
        specs: one or two weights for which `has_sliced` holds, with equally many rows.
        tensors: what `planar.to_planar` made of each.
        bias: ``[out]`` of any float dtype, or None.
        dtype: of the result; sums are float32.
        starts: first rows of the second and the third copy, multiples of the rows of a program.
    """
    out = torch.empty(1, specs[0].out_features, dtype=dtype, device=sliced[0].device)
    grid, arguments = product_launch(sliced, specs, tensors, bias, out, starts, config or choose_sliced(specs))
    with torch.cuda.device(out.device):
        sliced_kernels().sliced_product_kernel[grid](**arguments, ASM=True, **early_launch(out.device))
    return out


def product_launch(
    sliced: tuple[Tensor, Tensor],
    specs: Specs,
    tensors: Sequence[Tensors],
    bias: Tensor | None,
    out: Tensor,
    starts: Sequence[int],
    config: SlicedConfig,
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments of `sliced_product_kernel`, all but ASM."""
    segments = [planar_segments(spec)[0] for spec in specs]
    tile = config.rows * config.warps * 32 // config.lanes
    assert not any(start % tile for start in starts)
    second, third = (*starts, *[specs[0].out_features] * (MAX_COPIES - 1))[: MAX_COPIES - 1]
    arguments: dict[str, Any] = {"slices": sliced[0], "numbers": sliced[1]}
    for number in range(2):
        held, segment = tensors[min(number, len(specs) - 1)], segments[min(number, len(specs) - 1)]
        arguments |= {f"{name}{number}": tensor for name, tensor in _four_rows(held).items()}
        threads = row_threads(segment)
        arguments |= {f"n{number}": threads, f"stride{number}": segment.row_words // 16}
        arguments[f"chunks{number}"] = -(-threads // config.lanes)
    arguments |= {
        "bias": out if bias is None else bias,
        "y": out,
        "second": second,
        "third": third,
        "n_slices": sliced[0].shape[1],
        "n_numbers": sliced[1].shape[1],
        "n_rows": specs[0].out_features,
        "stride4": padded_rows(specs[0]) // 4,
        "BITS": tuple(segment.bits for segment in segments),
        "WIDTHS": tuple(segment.plane_width for segment in segments),
        "GROUPS": tuple(spec.group_size for spec in specs),
        "ZEROS": tuple(
            None if "planar_zeros" in held else constant_zero(spec, segment)
            for spec, held, segment in zip(specs, tensors, segments, strict=True)
        ),
        "ONE_GROUP": tuple(spec.n_groups == 1 for spec in specs),
        "WHOLE": tuple(row_threads(segment) <= config.lanes for segment in segments),
        "HAS_BIAS": bias is not None,
        "ROWS": config.rows,
        "LANES": config.lanes,
        "THREADS": 32 * config.warps,
        "num_warps": config.warps,
        "enable_fp_fusion": True,
    }
    return (-(-specs[0].out_features // tile),), arguments


def _four_rows(tensors: Tensors) -> Tensors:
    """Words, and scales and zeros of four rows as one number."""
    scales = tensors["planar_scales"].flatten().view(torch.int64)
    zeros = tensors.get("planar_zeros")
    if zeros is not None:
        zeros = zeros.flatten().view(torch.int64 if zeros.dtype == torch.float16 else torch.int32)
    return {
        "words": tensors["planar"].view(torch.int32),
        "scales": scales,
        "zeros": scales if zeros is None else zeros,
    }


def sliced_kernels() -> Any:
    """The module of the kernels. Raises `RequestError` where Triton is not installed."""
    return triton_kernels("sliced_triton")
