"""Launch of the kernel for one or two rows of x and one-bit weights (bit_gemv_triton.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.kernels.launch import early_launch
from quantkit.kernels.planar import PlanarSegment, padded_rows, planar_segments
from quantkit.kernels.planar_matmul import constant_zero, triton_kernels

_GROUP_COLUMNS = 128  # that a lane is at home in; a group is so many, or several times that
_WARP_COLUMNS = 1024
_MAX_WARPS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class BitGemvConfig:
    """Shape of one launch. A warp takes a block of 1024 columns, the warps of a program a row."""

    rows: int  # of a tile: 16, 32 or 64
    programs: int | None = None  # that share the tiles, each with x prepared once; None: one for each tile
    ahead: int = 1  # tiles whose words are on their way while one is multiplied, where programs share them: 1 or 2


def is_bit_weight(spec: GroupedIntSpec) -> bool:
    """Whether the kernel takes the weight: one bit, groups of 128 columns or a multiple of that, rows no longer than a
    program has warps for."""
    if spec.group_size % _GROUP_COLUMNS:
        return False
    segment = planar_segments(spec)[0]
    return segment.bits == 1 and segment.n_groups == spec.n_groups and _row_warps(segment) <= _MAX_WARPS


def has_one_scale(spec: GroupedIntSpec) -> bool:
    """Whether all columns that a warp takes belong to one group."""
    whole = spec.n_groups == 1 or spec.group_size % _WARP_COLUMNS == 0
    return whole and 16 * planar_segments(spec)[0].plane_width == _WARP_COLUMNS


def _row_warps(segment: PlanarSegment) -> int:
    return -(-segment.n_blocks * segment.planes_per_block * segment.plane_width // _WARP_COLUMNS)


def choose_bit_gemv(spec: GroupedIntSpec, multiprocessors: int) -> BitGemvConfig:
    """The launch shape for a weight (measured on an H200, docs/log.md)."""
    warps, one_scale = _row_warps(planar_segments(spec)[0]), has_one_scale(spec)
    if warps > 8:
        return BitGemvConfig(rows=64 if one_scale else 32)
    if one_scale:
        return BitGemvConfig(rows=16 if warps > 4 else 32, programs=2 * multiprocessors, ahead=2)
    return BitGemvConfig(rows=32, programs=multiprocessors if warps > 4 else 2 * multiprocessors)


def bit_gemv(
    x: Tensor,
    spec: GroupedIntSpec,
    tensors: dict[str, Tensor],
    bias: Tensor | None,
    out: Tensor,
    copies: Tensor | None = None,
    copy_rows: int = 0,
) -> None:
    """``x W^T + bias`` into ``out``, in one launch; arguments of `bit_gemv_launch`.

    Raises:
        RequestError: Triton is not installed.
    """
    if copies is None:
        config = choose_bit_gemv(spec, torch.cuda.get_device_properties(x.device).multi_processor_count)
    else:
        config = BitGemvConfig(rows=copy_rows)
    grid, arguments = bit_gemv_launch(x, spec, tensors, bias, out, config, copies, copy_rows)
    with torch.cuda.device(x.device):  # Triton launches on the current device
        kernels = triton_kernels("bit_gemv_triton")
        kernels.bit_gemv_kernel[grid](**arguments, ASM=True, **early_launch(x.device))


def bit_gemv_launch(
    x: Tensor,
    spec: GroupedIntSpec,
    tensors: dict[str, Tensor],
    bias: Tensor | None,
    out: Tensor,
    config: BitGemvConfig,
    copies: Tensor | None = None,
    copy_rows: int = 0,
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and arguments of `bit_gemv_kernel`, all but ASM.

    Args:
        x: float16 or bfloat16 ``[m, in]``.
        spec: a weight for which `is_bit_weight` holds.
        tensors: what `planar.to_planar` made of it.
        bias: ``[out]`` of any float dtype, or None.
        out: ``[m, out]`` of any float dtype; with copies ``[1, out]``.
        config: the shape of the launch.
        copies: int32 ``[out / copy_rows]``: the row of x that each ``copy_rows`` rows of the weight take.
        copy_rows: a multiple of ``config.rows``.
    """
    (segment,) = planar_segments(spec)
    warps = 1 << (_row_warps(segment) - 1).bit_length()
    x = x.contiguous()
    if x.data_ptr() % 16:  # loads are of eight neighbouring values
        x = x.clone()
    scales = tensors["planar_scales"].flatten().view(torch.int64)  # a single group has strides that view refuses
    zeros = tensors.get("planar_zeros")
    n_tiles = -(-spec.out_features // config.rows)
    arguments = {
        "x": x.view(torch.int32),
        "words": tensors["planar"].view(torch.int32),
        "scales": scales,
        "zeros": scales if zeros is None else zeros.flatten().view(torch.int64),
        "bias": out if bias is None else bias,
        "y": out,
        "copies": out if copies is None else copies,
        "n_rows": spec.out_features,
        "n_columns": spec.in_features,
        "row_words16": segment.row_words // 32,
        "n_blocks": segment.n_blocks,
        "stride4": padded_rows(spec) // 4,
        "n_tiles": n_tiles,
        "GROUP": spec.group_size,
        "ZERO": None if zeros is not None else constant_zero(spec, segment),
        "WIDTH": segment.plane_width,
        "HAS_BIAS": bias is not None,
        "COPY_ROWS": None if copies is None else copy_rows,
        "BF16": x.dtype == torch.bfloat16,
        "ROWS": config.rows,
        "WARPS": warps,
        "ONE_SCALE": has_one_scale(spec),
        "AHEAD": 0 if config.programs is None else config.ahead,
        "num_warps": warps,
        "maxnreg": 128 if config.programs is None else None,  # four programs of four warps at a time
        "enable_fp_fusion": True,
    }
    assert copies is None or (copy_rows % config.rows == 0 and config.programs is None)
    return (min(n_tiles, config.programs or n_tiles), len(out)), arguments
