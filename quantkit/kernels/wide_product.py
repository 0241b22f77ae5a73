"""Launch of the kernel of asynchronous products, for more rows of x than few (wide_product_gluon.py).

An H100 or H200 multiplies with these; other devices, other weights and fewer rows have `planar_product`. Workspace and
counters are as there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.kernels.launch import early_launch, multiplies_asynchronously
from quantkit.kernels.planar import padded_rows, planar_segments
from quantkit.kernels.planar_matmul import constant_zero, triton_kernels
from quantkit.kernels.planar_product import Prepared, ProductConfig, blocks_per_split, prepare_launch, workspace

MAX_WIDE_TOKENS = 256
_LEAST, _LEAST_SMALL = 17, 9  # rows of x from which the kernel is faster than `planar_product`
_SMALL = 1 << 25  # weights
_WIDTH = 64  # columns of a plane: what a row of a tile in shared memory has
_UNROLLED_CHAINS = 4  # between two pauses of the tensor core; more take registers
_SHARED_MEMORY = 232448  # bytes that a program of an H100 or H200 may have


@dataclass(frozen=True, slots=True, kw_only=True)
class WideConfig:
    """Shape of one launch of `wide_product_kernel`."""

    rows: int  # of the weight that a program multiplies at once, 16 for each of its warps: 64 or 128
    tokens: int  # columns of x per program
    distance: int  # chains of products that are loaded ahead
    splits: int = 1  # programs that share a row tile
    unroll: int = 2  # blocks between two pauses of the tensor core


def has_wide_product(x: Tensor, spec: GroupedIntSpec) -> bool:
    """Whether `wide_product` is the choice for ``x`` [m, in]."""
    least = _LEAST_SMALL if spec.out_features * spec.in_features <= _SMALL else _LEAST
    many = least <= len(x) <= MAX_WIDE_TOKENS and x.dtype in (torch.float16, torch.bfloat16)
    return many and is_wide_weight(spec) and multiplies_asynchronously(x.device)


@lru_cache(maxsize=1024)
def is_wide_weight(spec: GroupedIntSpec) -> bool:
    """One width of 2, 4 or 8 bits, two planes of 64 columns in every group, or a part of it."""
    if spec.group_size % (2 * _WIDTH) or len(planar_segments(spec)) > 1 or len(spec.segments) > 1:
        return False
    (segment,) = planar_segments(spec)
    return segment.plane_width == _WIDTH and segment.bits in (2, 4, 8)


def is_possible(config: WideConfig, spec: GroupedIntSpec) -> bool:
    """Whether the kernel can run in this shape."""
    known = config.rows in (64, 128) and config.tokens in (16, 32, 64, 128)
    whole = padded_rows(spec) % config.rows == 0
    return known and whole and shared_memory(config, spec) <= _SHARED_MEMORY


def shared_memory(config: WideConfig, spec: GroupedIntSpec) -> int:
    """Bytes that a program holds: x and words of what is loaded ahead; scales and zeros of all its groups."""
    (segment,) = planar_segments(spec)
    chains = segment.planes_per_block // 2
    x = (config.distance + 2) * config.tokens * 4 * _WIDTH
    words = (-(-config.distance // chains) + 1) * config.rows * 2 * _WIDTH
    lines = _groups(config, spec) * config.rows
    return x + words + lines * (2 if constant_zero(spec, segment) is not None else 3)


def choose_wide(n_tokens: int, spec: GroupedIntSpec, multiprocessors: int = 132) -> WideConfig:
    """The launch shape for a weight and a number of rows of x, computed (132: multiprocessors of an H100 or H200).

    One or two programs for each multiprocessor; what was measured: docs/results.md.
    """
    (segment,) = planar_segments(spec)
    rows = 128 if n_tokens > 64 and padded_rows(spec) % 128 == 0 else 64
    tokens = next((most for most in (16, 32, 64) if n_tokens <= most), 64)
    if n_tokens > 64 and padded_rows(spec) // rows * -(-n_tokens // 128) > multiprocessors * 3 // 4:
        tokens = 128
    programs = padded_rows(spec) // rows * -(-n_tokens // tokens)
    wanted = multiprocessors * (2 if n_tokens <= 32 else 1)
    splits = min(max(1, round(wanted / programs)), segment.n_blocks)
    few = tokens == 128 or (tokens == 64 and rows == 64 and programs > multiprocessors)  # shared memory is for others
    unroll = 1 if tokens == 128 else max(1, _UNROLLED_CHAINS // (segment.planes_per_block // 2))
    distance = 2 if few else 4
    config = WideConfig(rows=rows, tokens=tokens, distance=distance, splits=splits, unroll=unroll)
    while shared_memory(config, spec) > _SHARED_MEMORY:  # scales of a long row
        config = replace(config, splits=config.splits + 1)
    return config


def _groups(config: WideConfig, spec: GroupedIntSpec) -> int:
    """Groups of a program, to a power of two."""
    (segment,) = planar_segments(spec)
    (per_split,), _ = blocks_per_split(spec, config.splits)
    columns = per_split * segment.planes_per_block * _WIDTH
    touched = -(-columns // spec.group_size) + (1 if columns % spec.group_size else 0)
    return 1 << (touched - 1).bit_length()


def wide_product(
    x: Tensor,
    spec: GroupedIntSpec,
    tensors: dict[str, Tensor],
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
    config: WideConfig | None = None,
) -> Tensor:
    """``x W^T + bias``, in two launches, on an H100 or H200.

    Args:
        x: float16 or bfloat16 ``[m, in]``, neighbours in a row next to each other, m at least 1.
        spec: a weight for which `is_wide_weight` holds.
        tensors: what `planar.to_planar` made of it.
        bias: ``[out]`` or ``[m, out]`` of any float dtype, or None.
        out_dtype: that of x if None.
        config: `choose_wide`'s if None.

    Returns:
        ``[m, out]``, as exact as `planar_product`'s.
    """
    out = torch.empty(len(x), spec.out_features, dtype=out_dtype or x.dtype, device=x.device)
    config = config or choose_wide(len(x), spec)
    shape = ProductConfig(rows=config.rows, warps=config.rows // 16, tokens=config.tokens, stages=2)
    prepared, _ = workspace(len(x), spec, shape, x.device)
    early = early_launch(x.device)
    with torch.cuda.device(x.device):  # Triton launches on the current device
        tokens, arguments = prepare_launch(x, spec, tensors, prepared)
        triton_kernels("planar_product_triton").prepare_kernel[tokens](**arguments, **early)
        grid, arguments = wide_launch(spec, tensors, bias, out, prepared, config)
        triton_kernels("wide_product_gluon").wide_product_kernel[grid](**arguments, **early)
    return out


def wide_launch(
    spec: GroupedIntSpec,
    tensors: dict[str, Tensor],
    bias: Tensor | None,
    out: Tensor,
    prepared: Prepared,
    config: WideConfig,
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Grid and arguments of `wide_product_kernel`."""
    assert is_possible(config, spec)
    (segment,) = planar_segments(spec)
    (per_split,), n_splits = blocks_per_split(spec, config.splits)
    rows = config.rows
    grid = (padded_rows(spec) // rows, n_splits, -(-len(out) // config.tokens))
    partial = out
    if n_splits > 1:
        assert tensors["counters"].numel() >= grid[0] * grid[2]
        size = grid[0] * grid[1] * grid[2] * rows * config.tokens
        partial = torch.empty(size, dtype=torch.float32, device=out.device)
    zeros = tensors.get("planar_zeros")
    arguments = {
        "x": prepared.values,
        "words": tensors["planar"],
        "scales": tensors["planar_scales"],
        "zeros": tensors["planar_scales"] if zeros is None else zeros,
        "factors": prepared.factors,
        "bias": out if bias is None else bias,
        "y": out,
        "partial": partial,
        "counters": tensors["counters"],
        "n_tokens": len(out),
        "n_rows": spec.out_features,
        "n_prepared": prepared.values.shape[1],
        "scale_stride": padded_rows(spec),
        "bias_stride": spec.out_features if bias is not None and bias.ndim == 2 else 0,
        "stride16": segment.row_words // 16,
        "n_blocks": segment.n_blocks,
        "per_split": per_split,
        "BITS": segment.bits,
        "WIDTH": segment.plane_width,
        "ZERO": constant_zero(spec, segment),
        "GROUP": spec.group_size,
        "GROUPS": _groups(config, spec),
        "HAS_BIAS": bias is not None,
        "SPLITS": n_splits,
        "ROWS": config.rows,
        "TOKENS": config.tokens,
        "DISTANCE": config.distance,
        "UNROLL": next(n for n in (config.unroll, 2, 1) if segment.n_blocks % n == per_split % n == 0),
        "WARPS": config.rows // 16,
        "num_warps": config.rows // 16,
    }
    return grid, arguments
