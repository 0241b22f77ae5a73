"""Launch of the tensor core's kernel for one row of x (mma_gemv_triton.py): which weights take it, in which shape."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.kernels.launch import aligned, early_launch
from quantkit.kernels.planar import is_planar, padded_rows, planar_segments
from quantkit.kernels.planar_matmul import constant_zero, triton_kernels

_COLUMNS, _GROUP, _PLANE_WIDTH = 512, 128, 64  # of a warp at a time; of x that share a unit; of a plane
_WARPS = 8  # of a program, which lie along a row; more would wait for each other longer
_MOST_CHUNKS = {2: 4, 4: 2}  # columns of a warp / 512, by bits
_MANY_ROWS, _FEW_ROWS = 1 << 14, 1 << 12


@dataclass(frozen=True, slots=True, kw_only=True)
class MmaGemvConfig:
    """Shape of one launch of `mma_gemv_kernel`."""

    warps: int
    rows: int  # of a tile, 16 or 32
    programs: int  # that share the tiles


@lru_cache(maxsize=1024)
def has_mma_gemv(n_tokens: int, spec: GroupedIntSpec) -> bool:
    """Whether so many rows of x take this kernel rather than those of gemv_triton.py.

    It is there for one width of 2 or 4 bits in groups that 128 divides, up to 16384 and 8192 columns: the words of a
    tile stay in registers. On an H200 it was faster in rows of more than 4096 columns; in shorter ones for 2 bits with
    two rows of x, or many of the weight, and for 4 bits with few of the weight (docs/log.md).
    """
    if not is_planar(spec) or len(spec.segments) > 1:
        return False
    (segment,) = planar_segments(spec)
    if spec.group_size % _GROUP or segment.plane_width != _PLANE_WIDTH:
        return False
    chunks = _chunks(spec)
    if chunks > _MOST_CHUNKS.get(segment.bits, 0):
        return False
    if chunks > 1:
        return True
    if segment.bits == 2:
        return n_tokens > 1 or spec.out_features > _MANY_ROWS
    return spec.out_features <= _FEW_ROWS


def _chunks(spec: GroupedIntSpec) -> int:
    return -(-spec.in_features // (_COLUMNS * _WARPS))


def choose_mma_gemv(spec: GroupedIntSpec, multiprocessors: int = 132) -> MmaGemvConfig:
    """The launch shape for a weight: what was fastest on an H200 (132 multiprocessors) for layers of 8B and 70B models.

    Wider tiles where registers allow; two programs for each multiprocessor, or one where a program's words, or the few
    tiles of a small weight, keep it busy.
    """
    bits, chunks = planar_segments(spec)[0].bits, _chunks(spec)
    rows = 32 if bits == 2 and chunks == 1 else 16
    tiles = -(-spec.out_features // rows)
    alone = chunks > 2 or (bits == 4 and (chunks == 2 or tiles <= 2 * multiprocessors))
    return MmaGemvConfig(warps=_WARPS, rows=rows, programs=min(tiles, multiprocessors * (1 if alone else 2)))


def mma_gemv(x: Tensor, spec: GroupedIntSpec, tensors: dict[str, Tensor], bias: Tensor | None, out: Tensor) -> None:
    """``x W^T + bias`` into ``out``, in one launch; arguments of `mma_gemv_launch`.

    Raises:
        RequestError: Triton is not installed.
    """
    config = choose_mma_gemv(spec, torch.cuda.get_device_properties(x.device).multi_processor_count)
    grid, arguments = mma_gemv_launch(x, spec, tensors, bias, out, config)
    with torch.cuda.device(x.device):  # Triton launches on the current device
        kernels = triton_kernels("mma_gemv_triton")
        kernels.mma_gemv_kernel[grid](**arguments, ASM=True, **early_launch(x.device))


def mma_gemv_launch(
    x: Tensor, spec: GroupedIntSpec, tensors: dict[str, Tensor], bias: Tensor | None, out: Tensor, config: MmaGemvConfig
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and arguments of `mma_gemv_kernel`, all but ASM.

    Args:
        x: float16 or bfloat16 ``[m, in]``.
        spec: a weight for which `has_mma_gemv` holds.
        tensors: what `planar.to_planar` made of it.
        bias: ``[out]`` of any float dtype, or None.
        out: ``[m, out]`` of any float dtype.
        config: the shape of the launch.
    """
    (segment,) = planar_segments(spec)
    x = aligned(x)
    scales = tensors["planar_scales"].flatten().view(torch.int32)  # a single group has strides that view refuses
    zeros = tensors.get("planar_zeros")
    if zeros is not None:
        zeros = zeros.flatten().view(torch.int16)
    n_tiles = -(-spec.out_features // config.rows)
    arguments = {
        "x": x.view(torch.int32),
        "words": tensors["planar"].view(torch.int32),
        "scales": scales,
        "zeros": scales if zeros is None else zeros,
        "bias": out if bias is None else bias,
        "y": out,
        "n_rows": spec.out_features,
        "n_columns": spec.in_features,
        "row_words16": segment.row_words // 32,
        "stride2": padded_rows(spec) // 2,
        "n_tiles": n_tiles,
        "BITS": segment.bits,
        "ZERO": None if zeros is not None else constant_zero(spec, segment),
        "GROUP": spec.group_size,
        "HAS_BIAS": bias is not None,
        "BF16": x.dtype == torch.bfloat16,
        "ROWS": config.rows,
        "WARPS": config.warps,
        "CHUNKS": -(-spec.in_features // (_COLUMNS * config.warps)),
        "num_warps": config.warps,
        "enable_fp_fusion": True,
    }
    return (min(n_tiles, config.programs), len(out)), arguments
