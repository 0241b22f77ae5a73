"""Launch of the kernels for one or two rows of x (gemv_triton.py): which weights have one, in which shape it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.kernels.bit_gemv import bit_gemv, counts_tokens
from quantkit.kernels.launch import aligned, early_launch, multiplies_bytes
from quantkit.kernels.launch_shapes import Subject, device_name, measured_config
from quantkit.kernels.mma_gemv import has_mma_gemv, mma_gemv
from quantkit.kernels.planar import ROW_TILE, PlanarSegment, is_paired, padded_rows, planar_segments
from quantkit.kernels.planar_matmul import constant_zero, triton_kernels

MAX_GEMV_TOKENS = 2
COPY_ROWS = 16  # of a weight, that take the same row of x where each takes one of its own
_MAX_WARPS, _KEPT_WARPS = 16, 8  # a program's threads lie along a row; more wait for each other longer
_WALKING_WARPS = 4  # where they do not reach its end and walk: more wait for each other longer than they help
_MAX_CHUNKS = 4  # of a row, if a program keeps x for all of them
_CANDIDATE_WARPS, _CANDIDATE_ROWS = (_WALKING_WARPS, 8, _MAX_WARPS), (4, 8)
_REGISTERS = 1 << 14  # of a quarter of a multiprocessor
HALF_TYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class GemvConfig:
    """Shape of one launch."""

    warps: int
    rows: int  # of a tile
    programs: int | None = None  # that share the tiles, each with x prepared for a whole row; None: one for each tile


def has_gemv(x: Tensor, spec: GroupedIntSpec) -> bool:
    """Whether the kernels are there for ``x`` [m, in] and the weight; several widths have others (mixed_rows.py).

    One or two rows, of one bit in groups up to four on a device that counts bits.
    """
    if x.dtype not in HALF_TYPES or not is_paired(spec) or len(planar_segments(spec)) > 1:
        return False
    return len(x) <= MAX_GEMV_TOKENS or counts_tokens(len(x), spec, x.device)


def row_threads(segment: PlanarSegment) -> int:
    """Threads of four 32-bit words that a row of the segment takes; with 3 bits, four of each of the three parts."""
    return segment.row_words // (24 if segment.bits == 3 else 8)


def launch_config(spec: GroupedIntSpec, device: str) -> GemvConfig:
    """The launch shape measured for the weight's class on a device of that name, else `choose_gemv`'s."""
    measured = measured_config(GemvConfig, subject(spec), device)
    return measured if measured is not None and is_possible(measured, spec) else choose_gemv(spec)


def subject(spec: GroupedIntSpec) -> Subject:
    """What a measured launch shape of a weight of one width is filed under."""
    bits = planar_segments(spec)[0].bits
    return Subject(kernel="gemv", bits=bits, out_features=spec.out_features, in_features=spec.in_features)


def is_possible(config: GemvConfig, spec: GroupedIntSpec) -> bool:
    """Whether the kernels can run in this shape."""
    (segment,) = planar_segments(spec)
    powers = all(number & (number - 1) == 0 for number in (config.rows, config.warps))
    if not powers or not 4 <= config.rows <= ROW_TILE:
        return False
    return config.programs is None or chunks(segment, config.warps) <= _MAX_CHUNKS


def gemv_candidates(spec: GroupedIntSpec, multiprocessors: int) -> list[GemvConfig]:
    """Launch shapes worth measuring for a weight of one width.

    Left out is what cannot be the fastest: threads that walk where few reach the end of a row, fewer programs than
    multiprocessors or far more than fit, more words in flight than registers hold.
    """
    (segment,) = planar_segments(spec)
    reach = spanning_warps(row_threads(segment))
    found = []
    for warps, rows in product(sorted({min(reach, each) for each in _CANDIDATE_WARPS}), _CANDIDATE_ROWS):
        tiles = -(-spec.out_features // rows)
        if tiles < multiprocessors:
            continue
        if warps in (reach, _WALKING_WARPS):
            found.append(GemvConfig(warps=warps, rows=rows))
        if 2 * warps >= reach and needed_registers(segment, rows, warps) <= 255:
            fit = resident_programs(segment, warps, rows)
            counts = {multiprocessors * each for each in range(1, fit + 3)} | {
                -(-tiles // each) for each in range(2, 9)
            }
            most = min(tiles - 1, multiprocessors * (fit + 2))
            found += [
                GemvConfig(warps=warps, rows=rows, programs=count)
                for count in sorted(counts)
                if multiprocessors <= count <= most
            ]
    return found


def spanning_warps(threads: int) -> int:
    """The power of two of warps that have so many threads."""
    return 1 << (-(-threads // 32) - 1).bit_length()


def chunks(segment: PlanarSegment, warps: int) -> int:
    """Steps in which the threads of so many warps reach the end of a row."""
    return -(-row_threads(segment) // (32 * warps))


def needed_registers(segment: PlanarSegment, rows: int, warps: int) -> int:
    """About what compilers were seen to give a thread that keeps x for a row and loads words one tile ahead."""
    pairs, parts = segment.planes_per_block // 2, 3 if segment.bits == 3 else 1
    slices, words, scales = 8 * pairs, 2 * 4 * parts * rows, pairs * rows
    return chunks(segment, warps) * (slices + words + scales) + 16


def resident_programs(segment: PlanarSegment, warps: int, rows: int) -> int:
    """How many programs fit a multiprocessor at the same time, whose four quarters have registers of their own."""
    return max(1, 4 * (_REGISTERS // (32 * needed_registers(segment, rows, warps))) // warps)


def choose_gemv(spec: GroupedIntSpec, multiprocessors: int = 132) -> GemvConfig:
    """The launch shape for a weight, computed: as many programs as fit, or two tiles for each if that needs fewer.

    In the second case a launch leaves room for the next one, which begins early (launch.py). Always a multiple of the
    multiprocessors (132: of an H100 or H200).
    """
    (segment,) = planar_segments(spec)
    warps = spanning_warps(row_threads(segment))
    if warps == 2 * _KEPT_WARPS:
        warps = _KEPT_WARPS
    if warps > _KEPT_WARPS:
        return GemvConfig(rows=8, warps=_WALKING_WARPS)
    rows = 8 if segment.bits == 2 and warps < _KEPT_WARPS else 4
    tiles = -(-spec.out_features // rows)
    per_multiprocessor = min(resident_programs(segment, warps, rows), -(-tiles // (2 * multiprocessors)))
    programs = per_multiprocessor * multiprocessors if tiles > multiprocessors else None
    return GemvConfig(rows=rows, warps=warps, programs=programs)


def gemv(
    x: Tensor,
    spec: GroupedIntSpec,
    tensors: dict[str, Tensor],
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
    config: GemvConfig | None = None,
    copies: Tensor | None = None,
) -> Tensor:
    """``x W^T + bias`` for few rows of x, in one launch, on a GPU.

    Args:
        x: float16 or bfloat16 ``[m, in]``.
        spec: a weight for which `has_gemv` holds.
        tensors: what `planar.to_planar` made of it.
        bias: ``[out]`` of any float dtype, or None.
        out_dtype: that of x if None.
        config: of `gemv_triton`'s kernels. If None, bit products where weight and device are fit for them (`bit_gemv`),
            byte products on the tensor core where they are faster (`mma_gemv`), else the shape that was measured for a
            weight like this, or computed; with copies, one program per tile.
        copies: int32 ``[out / COPY_ROWS]``: the row of x that each `COPY_ROWS` rows of the weight take, instead of all
            rows of x one after the other. The result is then ``[1, out]``.

    Returns:
        ``[m, out]``. Sums are float32; x is taken in 16 bits relative to the largest of some 64 neighbours (on the
        tensor core: 128, or 1024): the relative error of a float32 result is of the order of 2**-16. Bit products with
        groups of 128 take bfloat16 in 12 bits: of the order of 2**-11, a quarter of what bfloat16 itself loses.
    """
    n_rows = len(x) if copies is None else 1
    out = torch.empty(n_rows, spec.out_features, dtype=out_dtype or x.dtype, device=x.device)
    if config is None and counts_tokens(n_rows, spec, x.device):
        bit_gemv(x, spec, tensors, bias, out, copies, COPY_ROWS)
        return out
    if config is None and copies is None and has_mma_gemv(n_rows, spec) and multiplies_bytes(x.device):
        mma_gemv(x, spec, tensors, bias, out)
        return out
    config = config or launch_config(spec, device_name(x.device))
    if copies is not None:
        config = replace(config, programs=None, rows=8)
    kernel, grid, arguments = gemv_launch(x, spec, tensors, bias, out, config, copies)
    with torch.cuda.device(x.device):  # Triton launches on the current device
        getattr(gemv_kernels(), kernel)[grid](**arguments, ASM=True, **early_launch(x.device))
    return out


def gemv_kernels() -> Any:
    """The module of the kernels. Raises `RequestError` where Triton is not installed."""
    return triton_kernels("gemv_triton")


def gemv_launch(
    x: Tensor,
    spec: GroupedIntSpec,
    tensors: dict[str, Tensor],
    bias: Tensor | None,
    out: Tensor,
    config: GemvConfig,
    copies: Tensor | None = None,
) -> tuple[str, tuple[int, int], dict[str, Any]]:
    """Name, grid and arguments of the kernel, all but ASM."""
    (segment,) = planar_segments(spec)
    x = aligned(x)
    scales = tensors["planar_scales"].flatten().view(torch.int64)  # a single group has strides that view refuses
    zeros = tensors.get("planar_zeros")
    if zeros is not None:
        zeros = zeros.flatten().view(torch.int64 if zeros.dtype == torch.float16 else torch.int32)
    arguments = {
        "x": x.view(torch.int32),
        "words": tensors["planar"].view(torch.int32),
        "scales": scales,
        "zeros": scales if zeros is None else zeros,
        "order": tensors.get("planar_order", tensors["planar"]),
        "bias": out if bias is None else bias,
        "y": out,
        "n_rows": spec.out_features,
        "n_columns": spec.in_features,
        "stride4": padded_rows(spec) // 4,
        "stride16": segment.row_words // 16,
        "n_threads": row_threads(segment),
        "n_planes": segment.n_planes,
        "BITS": segment.bits,
        "WIDTH": segment.plane_width,
        "RAGGED": segment.n_planes % segment.planes_per_block != 0,
        "ZERO": None if zeros is not None else constant_zero(spec, segment),
        "GROUP": spec.group_size,
        "ORDERED": len(spec.segments) > 1,
        "HAS_BIAS": bias is not None,
        "BF16": x.dtype == torch.bfloat16,
        "ROWS": config.rows,
        "THREADS": 32 * config.warps,
        "num_warps": config.warps,
        "enable_fp_fusion": True,
    }
    tiles = -(-spec.out_features // config.rows)
    if config.programs is None:
        assert copies is None or COPY_ROWS % config.rows == 0
        arguments |= {"copies": out if copies is None else copies, "COPY_ROWS": None if copies is None else COPY_ROWS}
        return "gemv_kernel", (tiles, len(out)), arguments
    assert copies is None
    arguments |= {"n_tiles": tiles, "CHUNKS": chunks(segment, config.warps)}
    return "resident_gemv_kernel", (min(config.programs, tiles), len(out)), arguments
