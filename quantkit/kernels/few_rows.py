"""Launch of the kernel for few rows of x (few_rows_triton.py): which weights have it, in which shape it runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.kernels.launch import aligned, counts_bits, early_launch
from quantkit.kernels.planar import ROW_TILE, PlanarSegment, is_paired, padded_rows, planar_segments
from quantkit.kernels.planar_matmul import constant_zero, triton_kernels

MAX_FEW_ROWS = 8
_LEAST = {1: 5, 2: 3, 4: 2}  # rows of x from which the kernel is faster than `gemv`, by bits
_SMALL = 1 << 25  # weights of 2 bits from which `planar_product` is faster
_LOAD_WORDS = 32  # of a row, in one load of a warp
_MAX_WARPS = 16
_MAX_STEPS = 16  # tiles of a program, whose sums it adds at the end
_HALF_TYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class FewRowsConfig:
    """Shape of one launch of `few_rows_kernel`."""

    warps: int  # side by side along a row
    loads: int  # of 32 words each of a row, per warp
    tiles: int  # of 8 rows, which a program takes at once
    programs: int = 132  # that share the tiles
    splits: int = 1  # that share a row


def has_few_rows(x: Tensor, spec: GroupedIntSpec) -> bool:
    """Whether `few_rows` is the choice for ``x`` [m, in]."""
    few = x.dtype in _HALF_TYPES and len(x) <= MAX_FEW_ROWS and is_few_rows_weight(spec)
    return few and len(x) >= _least_rows(spec) and counts_bits(x.device)


@lru_cache(maxsize=1024)
def _least_rows(spec: GroupedIntSpec) -> int:
    """Only where a program reaches the end of a row, and soon that of its tiles, the kernel wins at all."""
    config, bits = choose_few_rows(spec), planar_segments(spec)[0].bits
    soon = spec.out_features <= 8 * config.tiles * config.programs * _MAX_STEPS
    small = bits != 2 or spec.out_features * spec.in_features <= _SMALL
    return _LEAST.get(bits, MAX_FEW_ROWS + 1) if config.splits == 1 and soon and small else MAX_FEW_ROWS + 1


@lru_cache(maxsize=1024)
def is_few_rows_weight(spec: GroupedIntSpec) -> bool:
    """One width, not 3 bits, whose planes are as wide as the words that a warp loads at once."""
    if not is_paired(spec) or len(spec.segments) > 1:
        return False
    (segment,) = planar_segments(spec)
    return segment.bits != 3 and segment.plane_width % _LOAD_WORDS == 0


def units(segment: PlanarSegment, config: FewRowsConfig) -> int:
    """Parts of a row, as a warp takes one."""
    return segment.row_words // (_LOAD_WORDS * config.loads)


def is_possible(config: FewRowsConfig, spec: GroupedIntSpec) -> bool:
    """Whether the kernel can run in this shape."""
    (segment,) = planar_segments(spec)
    powers = all(number & (number - 1) == 0 for number in (config.warps, config.loads, config.tiles))
    if not powers or 8 * config.tiles > ROW_TILE or segment.plane_width % (_LOAD_WORDS * config.loads):
        return False
    return config.warps * config.splits >= units(segment, config)


def few_rows(
    x: Tensor,
    spec: GroupedIntSpec,
    tensors: dict[str, Tensor],
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
    config: FewRowsConfig | None = None,
) -> Tensor:
    """``x W^T + bias`` for few rows of x, in one launch, on a GPU.

    Args:
        x: float16 or bfloat16 ``[m, in]``.
        spec: a weight for which `has_few_rows` holds.
        tensors: what `planar.to_planar` made of it.
        bias: ``[out]`` or ``[m, out]`` of any float dtype, or None.
        out_dtype: that of x if None.
        config: `choose_few_rows`'s if None.

    Returns:
        ``[m, out]``. Sums are float32; x is taken in 16 bits relative to the largest of at most 128 neighbours: the
        relative error of a float32 result is of the order of 2**-16.
    """
    out = torch.empty(len(x), spec.out_features, dtype=out_dtype or x.dtype, device=x.device)
    config = config or choose_few_rows(spec)
    grid, arguments = few_rows_launch(x, spec, tensors, bias, out, config)
    with torch.cuda.device(x.device):  # Triton launches on the current device
        triton_kernels("few_rows_triton").few_rows_kernel[grid](**arguments, ASM=True, **early_launch(x.device))
    return out


@lru_cache(maxsize=1024)
def choose_few_rows(spec: GroupedIntSpec, multiprocessors: int = 132) -> FewRowsConfig:
    """The launch shape for a weight, computed (132: multiprocessors of an H100 or H200): one program for each.

    As many fewer as leave none with a tile more than another.
    """
    (segment,) = planar_segments(spec)
    loads = segment.plane_width // _LOAD_WORDS
    needed = segment.row_words // segment.plane_width
    splits = -(-needed // _MAX_WARPS)
    warps = 1 << (-(-needed // splits) - 1).bit_length()
    most = max(1, multiprocessors // splits)
    tiles = 2 if -(-spec.out_features // 16) >= most else 1
    n_tiles = -(-spec.out_features // (8 * tiles))
    programs = -(-n_tiles // -(-n_tiles // most))
    return FewRowsConfig(warps=warps, loads=loads, tiles=tiles, programs=programs, splits=splits)


def few_rows_launch(
    x: Tensor,
    spec: GroupedIntSpec,
    tensors: dict[str, Tensor],
    bias: Tensor | None,
    out: Tensor,
    config: FewRowsConfig,
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and arguments of `few_rows_kernel`, all but ASM."""
    assert is_possible(config, spec)
    (segment,) = planar_segments(spec)
    x = aligned(x)
    scales = tensors["planar_scales"].flatten().view(torch.int32)  # a single group has strides that view refuses
    zeros = tensors.get("planar_zeros")
    if zeros is not None:
        zeros = zeros.flatten().view(torch.int32 if zeros.dtype == torch.float16 else torch.int16)
    token_tiles = -(-len(out) // 8)
    n_tiles = -(-spec.out_features // (8 * config.tiles))
    programs = min(config.programs, n_tiles)
    steps = 1 << (-(-n_tiles // programs) - 1).bit_length()
    assert config.splits == 1 or tensors["counters"].numel() >= programs
    size = programs * config.splits * steps * config.warps * 64 * config.tiles * token_tiles
    partial = torch.empty(size, dtype=torch.float32, device=out.device)
    arguments = {
        "x": x.view(torch.int32),
        "words": tensors["planar"].view(torch.int32),
        "scales": scales,
        "zeros": scales if zeros is None else zeros,
        "bias": out if bias is None else bias,
        "y": out,
        "partial": partial,
        "counters": tensors["counters"],
        "n_tokens": len(out),
        "n_rows": spec.out_features,
        "n_columns": spec.in_features,
        "bias_stride": spec.out_features if bias is not None and bias.ndim == 2 else 0,
        "stride2": padded_rows(spec) // 2,
        "stride16": segment.row_words // 16,
        "n_units": units(segment, config),
        "n_planes": segment.n_planes,
        "n_tiles": n_tiles,
        "BITS": segment.bits,
        "WIDTH": segment.plane_width,
        "RAGGED": segment.n_planes % segment.planes_per_block != 0,
        "ZERO": None if zeros is not None else constant_zero(spec, segment),
        "GROUP": spec.group_size,
        "HAS_BIAS": bias is not None,
        "BF16": x.dtype == torch.bfloat16,
        "TOKEN_TILES": token_tiles,
        "LOADS": config.loads,
        "TILES": config.tiles,
        "SPLITS": config.splits,
        "STEPS": steps,
        "WARPS": config.warps,
        "num_warps": config.warps,
        "enable_fp_fusion": True,
    }
    return (programs, config.splits), arguments
