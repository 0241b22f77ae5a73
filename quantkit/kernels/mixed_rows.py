"""Launch of the kernels for one or two rows of x and weights of several widths (mixed_rows_triton.py)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.kernels.gemv import HALF_TYPES, MAX_GEMV_TOKENS, row_threads
from quantkit.kernels.launch import early_launch
from quantkit.kernels.planar import PlanarSegment, is_paired, padded_rows, planar_segments
from quantkit.kernels.planar_matmul import constant_zero, triton_kernels

_MAX_SEGMENTS = 5  # all widths that there are
_VIEWS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_LOADED_REGISTERS = 160  # of a thread, for what is asked for before x is waited for
_BUSY_WARPS = 256  # for each row of x: programs of 32 rows of the weight where there are no fewer


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedConfig:
    """Shape of one launch of the product: programs of 8 * ``own`` rows, whose ``warps`` share the columns."""

    warps: int
    own: int  # 2 or 4
    ahead: bool = True  # all words are asked for before x is waited for; else those of a segment one step ahead


def has_mixed_rows(x: Tensor, spec: GroupedIntSpec) -> bool:
    """Whether the kernels are there for ``x`` [m, in] and the weight."""
    few = 0 < len(x) <= MAX_GEMV_TOKENS and x.dtype in HALF_TYPES
    return few and is_paired(spec) and len(planar_segments(spec)) > 1


@lru_cache(maxsize=1024)
def choose_mixed_rows(spec: GroupedIntSpec, n_tokens: int = 1) -> MixedConfig:
    """The launch shape for a weight: the fewest instructions for a row, among those whose words fit the registers.

    Of equals the one with more warps. Where none fits, words are loaded one step ahead. Measured on an H200:
    docs/log.md.
    """
    tiles = -(-spec.out_features // 32)
    shapes = [MixedConfig(warps=warps, own=own) for own in (4, 2) for warps in (16, 8, 4, 2, 1)]
    shapes = [config for config in shapes if config.own == 2 or tiles * config.warps >= _BUSY_WARPS * n_tokens]
    fitting = [config for config in shapes if loaded_registers(config, spec) <= _LOADED_REGISTERS]
    if not fitting:
        return MixedConfig(warps=8, own=2, ahead=False)
    return min(fitting, key=lambda config: _instructions(config, spec))


def loaded_registers(config: MixedConfig, spec: GroupedIntSpec) -> int:
    """Of a thread, for words, scales and zeros of all steps along a row."""
    total = 0
    for segment in planar_segments(spec):
        words = 4 * _parts(segment) * config.own
        total += _steps(segment, config) * (words + _sets(segment) * config.own)
    return total


def _instructions(config: MixedConfig, spec: GroupedIntSpec) -> float:
    """About what all warps of a program execute, for each of its rows."""
    total = 0
    for segment in planar_segments(spec):
        pairs, sets = _pairs(segment), _sets(segment)
        each = 6 * pairs + 8 * sets + 4 * _parts(segment) + (28 if segment.bits == 3 else 0)
        total += _steps(segment, config) * (4 * pairs + 20 * sets + config.own * each)
    return config.warps * total / config.own


def _parts(segment: PlanarSegment) -> int:
    return 3 if segment.bits == 3 else 1


def _pairs(segment: PlanarSegment) -> int:
    return segment.planes_per_block // 2


def _sets(segment: PlanarSegment) -> int:
    """Of four pairs, that a chunk has; planes of 16 columns make up half a chunk."""
    return max(1, _pairs(segment) * (2 if segment.plane_width == 16 else 1) // 4)


def _chunks(segment: PlanarSegment) -> int:
    """Of the words of four threads, in a row."""
    return -(-row_threads(segment) // 4)


def _steps(segment: PlanarSegment, config: MixedConfig) -> int:
    return -(-_chunks(segment) // config.warps)


def mixed_rows(
    x: Tensor,
    spec: GroupedIntSpec,
    tensors: dict[str, Tensor],
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
    config: MixedConfig | None = None,
) -> Tensor:
    """``x W^T + bias`` for few rows of x, in two launches, on a GPU.

    Args:
        x: float16 or bfloat16 ``[m, in]``.
        spec: a weight for which `has_mixed_rows` holds.
        tensors: what `planar.to_planar` made of it.
        bias: ``[out]`` of any float dtype, or None.
        out_dtype: that of x if None.
        config: `choose_mixed_rows`'s if None.

    Returns:
        ``[m, out]``. Sums are float32; x is taken in 16 bits relative to the largest of 64 columns (32 where the group
        size has no larger power of two as divisor), which share a group.
    """
    out = torch.empty(len(x), spec.out_features, dtype=out_dtype or x.dtype, device=x.device)
    config = config or choose_mixed_rows(spec, len(x))
    ready, numbers = new_ready(len(x), spec, x.device)
    early = early_launch(x.device)
    with torch.cuda.device(x.device):  # Triton launches on the current device
        grid, arguments = cut_launch(x, spec, tensors, ready, numbers)
        triton_kernels("mixed_cut_triton").cut_kernel[grid](**arguments, ASM=True, **early)
        tiles, arguments = rows_launch(ready, numbers, spec, tensors, bias, out, config)
        triton_kernels("mixed_rows_triton").mixed_rows_kernel[tiles](**arguments, ASM=True, **early)
    return out


def new_ready(n_tokens: int, spec: GroupedIntSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for what `cut_kernel` makes of x: int32 and float32 ``[m, ...]``."""
    segments = planar_segments(spec)
    n_ready = sum(32 * _chunks(segment) * _pairs(segment) for segment in segments)
    n_numbers = sum(8 * _chunks(segment) * _sets(segment) for segment in segments)
    both = torch.empty(n_tokens * (n_ready + n_numbers), dtype=torch.int32, device=device)
    ready, numbers = torch.split(both, [n_tokens * n_ready, n_tokens * n_numbers])
    return ready.view(n_tokens, n_ready), numbers.view(torch.float32).view(n_tokens, n_numbers)


def _sizes(spec: GroupedIntSpec) -> dict[str, int]:
    """Blocks and groups of every segment."""
    sizes = {f"{name}_{index}": 0 for name in ("blocks", "groups") for index in range(_MAX_SEGMENTS)}
    for index, segment in enumerate(planar_segments(spec)):
        sizes |= {f"blocks_{index}": segment.n_blocks, f"groups_{index}": segment.n_groups}
    return sizes


def cut_launch(
    x: Tensor, spec: GroupedIntSpec, tensors: dict[str, Tensor], ready: Tensor, numbers: Tensor
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and arguments of `cut_kernel`, all but ASM."""
    segments = planar_segments(spec)
    x = x.contiguous()
    if x.data_ptr() % 4:  # two values are loaded at a time
        x = x.clone()
    arguments = {
        "x": x.view(torch.int32),
        "order": tensors["planar_order"],
        "ready": ready,
        "numbers": numbers,
        "n_columns": spec.in_features,
        "n_ready": ready.shape[1],
        "n_numbers": numbers.shape[1],
        **_sizes(spec),
        "BITS": tuple(segment.bits for segment in segments),
        "WIDTHS": tuple(segment.plane_width for segment in segments),
        "GROUP": spec.group_size,
        "BF16": x.dtype == torch.bfloat16,
        "num_warps": 1,
    }
    programs = sum(-(-_chunks(segment) * _pairs(segment) // 2) for segment in segments)
    return (programs, len(x)), arguments


def rows_launch(
    ready: Tensor,
    numbers: Tensor,
    spec: GroupedIntSpec,
    tensors: dict[str, Tensor],
    bias: Tensor | None,
    out: Tensor,
    config: MixedConfig,
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments of `mixed_rows_kernel`, all but ASM."""
    segments = planar_segments(spec)
    scales, zeros = tensors["planar_scales"], tensors.get("planar_zeros")
    steps = tuple(_steps(segment, config) for segment in segments)
    arguments = {
        "ready": ready,
        "numbers": numbers,
        "words": tensors["planar"].view(torch.int32),
        "scales": scales.flatten().view(_VIEWS[2 * config.own]),
        "zeros": scales if zeros is None else zeros.flatten().view(_VIEWS[zeros.element_size() * config.own]),
        "bias": out if bias is None else bias,
        "y": out,
        "n_rows": spec.out_features,
        "n_padded": padded_rows(spec),
        "stride": padded_rows(spec) // config.own,
        "n_ready": ready.shape[1],
        "n_numbers": numbers.shape[1],
        **_sizes(spec),
        "BITS": tuple(segment.bits for segment in segments),
        "WIDTHS": tuple(segment.plane_width for segment in segments),
        "GROUP": spec.group_size,
        "ZEROS": tuple(None if zeros is not None else constant_zero(spec, segment) for segment in segments),
        "HALF": zeros is None or zeros.dtype == torch.float16,
        "STEPS": steps if config.ahead else (0,) * len(steps),
        "HAS_BIAS": bias is not None,
        "TOKENS": len(out),
        "OWN": config.own,
        "WARPS": config.warps,
        "num_warps": config.warps,
        "enable_fp_fusion": True,
    }
    return (-(-spec.out_features // (8 * config.own)),), arguments
