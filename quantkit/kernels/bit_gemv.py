"""Launch of the kernel for few rows of x and one-bit weights (bit_gemv_triton.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.kernels.launch import aligned, counts_bits, early_launch
from quantkit.kernels.planar import PlanarSegment, padded_rows, planar_segments
from quantkit.kernels.planar_matmul import constant_zero, triton_kernels

_GROUP_COLUMNS = 128  # that a lane is at home in; a group is so many, or several times that
_WARP_COLUMNS = 1024
_MAX_WARPS = 16
_MAX_SLOTS = 16  # registers of a lane for what tiles summed up to


@dataclass(frozen=True, slots=True, kw_only=True)
class BitGemvConfig:
    """Shape of one launch. A warp takes a block of 1024 columns, the warps of a program one or several rows of x."""

    rows: int  # of a tile: 16, 32 or 64
    programs: int | None = None  # that share the tiles, each with x prepared once; None: one for each tile
    ahead: int = 2  # tiles whose words are on their way while one is multiplied, where programs share them: 1 to 3
    tokens: int = 1  # rows of x of a program
    each: int = 1  # of these, of a warp
    registers: int | None = None  # of a thread at most


def is_bit_weight(spec: GroupedIntSpec) -> bool:
    """Whether the kernel takes the weight: one bit, groups of 128 columns or a multiple of that, rows no longer than a
    program has warps for."""
    if spec.group_size % _GROUP_COLUMNS:
        return False
    segment = planar_segments(spec)[0]
    return segment.bits == 1 and segment.n_groups == spec.n_groups and _row_warps(segment) <= _MAX_WARPS


def counts_tokens(n_tokens: int, spec: GroupedIntSpec, device: torch.device) -> bool:
    """Whether so many rows of x are multiplied by bit products: on devices that count bits, where nothing is faster."""
    return is_bit_weight(spec) and n_tokens <= most_tokens(spec) and counts_bits(device)


def has_one_scale(spec: GroupedIntSpec) -> bool:
    """Whether all columns that a warp takes belong to one group."""
    whole = spec.n_groups == 1 or spec.group_size % _WARP_COLUMNS == 0
    return whole and 16 * planar_segments(spec)[0].plane_width == _WARP_COLUMNS


def x_bits(spec: GroupedIntSpec, dtype: torch.dtype) -> int:
    """Bits of the integers that x is taken in (bit_planes_triton.py)."""
    return 12 if dtype == torch.bfloat16 and not has_one_scale(spec) else 16


def _row_warps(segment: PlanarSegment) -> int:
    return -(-segment.n_blocks * segment.planes_per_block * segment.plane_width // _WARP_COLUMNS)


def _blocks(spec: GroupedIntSpec) -> int:
    """Warps for a row, a power of two."""
    return 1 << (_row_warps(planar_segments(spec)[0]) - 1).bit_length()


def most_tokens(spec: GroupedIntSpec) -> int:
    """Rows of x up to which nothing is faster (measured on an H200, docs/results.md)."""
    return 4 if _blocks(spec) <= 8 and not has_one_scale(spec) else 2


def choose_bit_gemv(spec: GroupedIntSpec, multiprocessors: int, n_tokens: int, bits: int) -> BitGemvConfig:
    """The launch shape for a weight and so many rows of x, in so many bits (measured on an H200, docs/log.md).

    Each program prepares x, which takes as long as dozens of rows: eight warps for each multiprocessor are best,
    sixteen where 128 registers are enough and rows are many, four where they are few.
    """
    blocks, twice = _blocks(spec), 2 * multiprocessors
    if has_one_scale(spec):
        return _one_scale(blocks, twice, spec.out_features <= 16 * twice, n_tokens)
    few = spec.out_features <= 24 * twice
    if blocks > 8:
        return BitGemvConfig(rows=32, registers=128)
    if n_tokens > 1:
        tokens = 4 if n_tokens > 2 and blocks <= 4 else 2
        shares = -(-n_tokens // tokens) * tokens * blocks // 8
        programs = twice // max(1, shares, 2 if few else 1)
        return BitGemvConfig(rows=16, programs=programs, ahead=1, tokens=tokens, each=2)
    light = bits == 12 and spec.symmetric  # 128 registers are enough for a tile of sixteen rows
    if blocks > 4:
        if not light:
            return BitGemvConfig(rows=16, programs=multiprocessors, ahead=3)
        return BitGemvConfig(rows=16, programs=twice, ahead=1, registers=128)
    if few:
        return BitGemvConfig(rows=16, programs=multiprocessors, ahead=1 if spec.out_features <= twice * 16 else 2)
    if light and 24 <= spec.out_features // twice // 4 <= 64:  # three to eight tiles for each of four programs
        return BitGemvConfig(rows=16, programs=2 * twice, ahead=1, registers=128)
    return BitGemvConfig(rows=32, programs=twice, ahead=1)


def _one_scale(blocks: int, twice: int, few: bool, n_tokens: int) -> BitGemvConfig:
    if blocks > 8 or (blocks > 2 and few):
        return BitGemvConfig(rows=64, registers=128)
    if n_tokens > 1 and blocks <= 4:
        return BitGemvConfig(rows=32, programs=twice, ahead=1, tokens=2, each=2)
    return BitGemvConfig(rows=16 if blocks > 4 else 32, programs=twice)


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
        multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
        config = choose_bit_gemv(spec, multiprocessors, len(x), x_bits(spec, x.dtype))
    else:
        config = BitGemvConfig(rows=copy_rows, registers=128)
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
    blocks = _blocks(spec)
    x = aligned(x)
    scales = tensors["planar_scales"].flatten().view(torch.int64)  # a single group has strides that view refuses
    zeros = tensors.get("planar_zeros")
    n_tiles = -(-spec.out_features // config.rows)
    programs = min(n_tiles, config.programs or n_tiles)
    slots = min(_MAX_SLOTS // config.each, 1 << (-(-n_tiles // programs) - 1).bit_length())
    arguments = {
        "x": x.view(torch.int32),
        "words": tensors["planar"].view(torch.int32),
        "scales": scales,
        "zeros": scales if zeros is None else zeros.flatten().view(torch.int64),
        "bias": out if bias is None else bias,
        "y": out,
        "copies": out if copies is None else copies,
        "n_tokens": len(out),
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
        "X_BITS": x_bits(spec, x.dtype),
        "ROWS": config.rows,
        "BLOCKS": blocks,
        "TOKENS": config.tokens // config.each,
        "EACH": config.each,
        "ONE_SCALE": has_one_scale(spec),
        "SLOTS": slots,
        "SPANS": n_tiles > slots * programs,
        "AHEAD": config.ahead,
        "num_warps": blocks * config.tokens // config.each,
        "maxnreg": config.registers,
        "enable_fp_fusion": True,
    }
    assert copies is None or (copy_rows % config.rows == 0 and config.programs is None and config.tokens == 1)
    return (programs, -(-len(out) // config.tokens)), arguments
