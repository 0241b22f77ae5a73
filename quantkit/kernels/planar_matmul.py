"""Dispatch and launch of the planar kernels: how many tokens take which path, tile sizes, splits of a row.

    tokens        path
    1, 2          the kernels of gemv_triton.py, where planes come in pairs (grouped_int.py chooses)
    1 .. 64       `fused_kernel`: reads the packed words, float16 or bfloat16 activations
    more, and     `dequantize_kernel` into a temporary weight in the dtype of x, then the vendor's matrix product;
    float32       row slabs of at most `_SLAB_BYTES`, so that no dense weight outlives or dwarfs the call

Workspace: partial sums are allocated per call (inside a captured graph they come from the graph's pool); the counters
belong to the module, start as zeros and are zeros again after every call. Two streams must not run the same module at
the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import RequestError
from quantkit.formats.grouped_int import GroupedIntSpec, symmetric_zero
from quantkit.kernels.planar import PlanarSegment, has_zeros, padded_rows, planar_segments

MAX_FUSED_TOKENS = 64
_SLAB_BYTES = 1 << 28
_TARGET_WARPS = 1600  # about 12 for each of 132 multiprocessors: enough loads in flight, few enough partial sums
_MAX_SPLITS = 16
_DEQUANTIZE_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Shape of one launch of the fused kernel."""

    rows: int  # weight rows per program: 16 per warp
    warps: int
    tokens: int  # columns of x per program
    stages: int  # of the load pipeline
    max_registers: int | None = None


# By tokens, then by the planes of a block (16 for 1 and 3 bits, 8, 4, 2): more planes need more registers.
_CONFIGS = {
    8: {16: Config(rows=32, warps=2, tokens=8, stages=3)},
    16: {16: Config(rows=64, warps=4, tokens=16, stages=2)},
    64: {8: Config(rows=64, warps=4, tokens=32, stages=2), 16: Config(rows=64, warps=4, tokens=16, stages=2)},
}


def choose_config(n_tokens: int, segments: tuple[PlanarSegment, ...]) -> Config:
    """The launch shape for 1 to `MAX_FUSED_TOKENS` tokens."""
    by_planes = next(configs for most, configs in _CONFIGS.items() if n_tokens <= most)
    planes = max(segment.planes_per_block for segment in segments)
    return next(config for most, config in by_planes.items() if planes <= most)


def choose_splits(segments: tuple[PlanarSegment, ...], n_rows: int, config: Config) -> tuple[int, ...]:
    """Blocks per program, by segment. Programs number about `_TARGET_WARPS` / warps, each in one segment."""
    tiles = n_rows // config.rows
    wanted = min(max(1, round(_TARGET_WARPS / config.warps / tiles)), _MAX_SPLITS)
    total = sum(segment.row_words for segment in segments)
    per_split = []
    for segment in segments:
        splits = max(1, round(wanted * segment.row_words / total))
        per_split.append(-(-segment.n_blocks // min(splits, segment.n_blocks)))
    return tuple(per_split)


def planar_matmul(x: Tensor, spec: GroupedIntSpec, tensors: dict[str, Tensor], bias: Tensor | None) -> Tensor:
    """``[m, in]`` to ``[m, out]`` in the dtype of x, on a GPU, from the tensors of `to_planar`."""
    if x.shape[0] == 0:
        return x.new_empty(0, spec.out_features)
    if x.shape[0] > MAX_FUSED_TOKENS or x.dtype == torch.float32:
        return dequantized_matmul(x, spec, tensors, bias)
    segments = planar_segments(spec)
    config = choose_config(x.shape[0], segments)
    per_split = choose_splits(segments, padded_rows(spec), config)
    return fused_matmul(x.contiguous(), spec, tensors, bias, config=config, per_split=per_split)


def dequantized_matmul(x: Tensor, spec: GroupedIntSpec, tensors: dict[str, Tensor], bias: Tensor | None) -> Tensor:
    """Slabs of rows, decoded to the dtype of x and multiplied by the vendor's matrix product."""
    if bias is not None:
        bias = bias.to(x.dtype)
    step = max(1, _SLAB_BYTES // (spec.in_features * x.element_size()))
    if step >= spec.out_features:
        return torch.nn.functional.linear(x, dequantize_rows(spec, tensors, 0, spec.out_features, x.dtype), bias)
    out = x.new_empty(x.shape[0], spec.out_features)
    for first in range(0, spec.out_features, step):
        rows = slice(first, min(first + step, spec.out_features))
        weight = dequantize_rows(spec, tensors, rows.start, rows.stop, x.dtype)
        out[:, rows] = torch.nn.functional.linear(x, weight, None if bias is None else bias[rows])
    return out


def fused_matmul(
    x: Tensor,
    spec: GroupedIntSpec,
    tensors: dict[str, Tensor],
    bias: Tensor | None,
    *,
    config: Config,
    per_split: tuple[int, ...],
) -> Tensor:
    """One launch of `fused_kernel`; x is contiguous, float16 or bfloat16. ``per_split``: as `choose_splits`."""
    out = x.new_empty(x.shape[0], spec.out_features)
    partial = x.new_empty(partial_size(x.shape[0], spec, config, per_split), dtype=torch.float32)
    grid, arguments = fused_launch(x, spec, tensors, bias, out, partial, config=config, per_split=per_split)
    with torch.cuda.device(x.device):  # Triton launches on the current device
        triton_kernels().fused_kernel[grid](**arguments, ASM=True)
    return out


def triton_kernels(name: str = "grouped_int_triton") -> ModuleType:
    """A module of kernels. Raises `RequestError` where Triton is not installed."""
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError as error:
        raise RequestError("packed weights on a GPU need Triton; run: pip install 'quantkit[kernels]'") from error
    return import_module(f"quantkit.kernels.{name}")


def partial_size(n_tokens: int, spec: GroupedIntSpec, config: Config, per_split: tuple[int, ...]) -> int:
    """Numbers of the workspace of partial sums; none if one program does a whole row."""
    splits = sum(_split_counts(spec, per_split))
    return -(-n_tokens // config.tokens) * config.tokens * splits * spec.out_features if splits > 1 else 0


def _split_counts(spec: GroupedIntSpec, per_split: tuple[int, ...]) -> list[int]:
    return [-(-segment.n_blocks // per) for segment, per in zip(planar_segments(spec), per_split, strict=True)]


def fused_launch(
    x: Tensor,
    spec: GroupedIntSpec,
    tensors: dict[str, Tensor],
    bias: Tensor | None,
    out: Tensor,
    partial: Tensor,
    *,
    config: Config,
    per_split: tuple[int, ...],
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Grid and arguments of `fused_kernel`, all but ASM."""
    segments = planar_segments(spec)
    splits = _split_counts(spec, per_split)
    grid = (padded_rows(spec) // config.rows, sum(splits), -(-x.shape[0] // config.tokens))
    assert x.is_contiguous()
    assert tensors["counters"].numel() >= grid[0] * grid[2]
    arguments = {
        "x": x,
        "words": tensors["planar"],
        "scales": tensors["planar_scales"],
        "zeros": tensors.get("planar_zeros", tensors["planar_scales"]),
        "order": tensors.get("planar_order", tensors["counters"]),
        "bias": out if bias is None else bias,
        "y": out,
        "partial": partial,
        "counters": tensors["counters"],
        "n_tokens": x.shape[0],
        "n_rows": spec.out_features,
        "n_columns": spec.in_features,
        "scale_stride": padded_rows(spec),
        "segments": tuple(map(_segment_numbers, segments, per_split, splits)),
        "BITS": tuple(segment.bits for segment in segments),
        "WIDTHS": tuple(segment.plane_width for segment in segments),
        "RAGGED": tuple(segment.n_planes % segment.planes_per_block != 0 for segment in segments),
        "CONSTANT_ZEROS": tuple(constant_zero(spec, segment) for segment in segments),
        "GROUP": spec.group_size,
        "ORDERED": len(spec.segments) > 1,
        "HAS_BIAS": bias is not None,
        "SPLITS": sum(splits),
        "ROWS": config.rows,
        "TOKENS": config.tokens,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "maxnreg": config.max_registers,
        "enable_fp_fusion": True,
    }
    return grid, arguments


def _segment_numbers(segment: PlanarSegment, per_split: int, splits: int) -> tuple[int, ...]:
    first, planes = segment.first_group, segment.n_planes
    return segment.word_offset // 16, segment.row_words // 16, segment.n_blocks, per_split, splits, first, planes


def constant_zero(spec: GroupedIntSpec, segment: PlanarSegment) -> float | None:
    """The zero of every group of a segment, or None where zeros are stored."""
    return None if has_zeros(spec) else symmetric_zero(segment.bits)


def dequantize_rows(
    spec: GroupedIntSpec, tensors: dict[str, Tensor], first: int, last: int, dtype: torch.dtype
) -> Tensor:
    """Rows first .. last - 1 of the weight, ``[last - first, in_features]`` in ``dtype``, original column order."""
    out = tensors["planar_scales"].new_empty(last - first, spec.in_features, dtype=dtype)
    with torch.cuda.device(out.device):
        for grid, arguments in dequantize_launches(spec, tensors, first, out):
            triton_kernels().dequantize_kernel[grid](**arguments, ASM=True)
    return out


def dequantize_launches(
    spec: GroupedIntSpec, tensors: dict[str, Tensor], first: int, out: Tensor
) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """Grid and arguments, all but ASM, of one `dequantize_kernel` per segment; rows from ``first`` on fill ``out``."""
    for segment in planar_segments(spec):
        grid = (-(-out.shape[0] // _DEQUANTIZE_ROWS), segment.n_blocks)
        yield (
            grid,
            {
                "words": tensors["planar"][segment.word_offset :],
                "scales": tensors["planar_scales"],
                "zeros": tensors.get("planar_zeros", tensors["planar_scales"]),
                "order": tensors.get("planar_order", tensors["counters"]),
                "out": out,
                "first_row": first,
                "n_rows": out.shape[0],
                "n_columns": spec.in_features,
                "scale_stride": padded_rows(spec),
                "stride16": segment.row_words // 16,
                "first_group": segment.first_group,
                "n_planes": segment.n_planes,
                "BITS": segment.bits,
                "WIDTH": segment.plane_width,
                "GROUP": spec.group_size,
                "ZERO": constant_zero(spec, segment),
                "ORDERED": len(spec.segments) > 1,
                "ROWS": _DEQUANTIZE_ROWS,
                "num_warps": 4,
                "enable_fp_fusion": True,
            },
        )
