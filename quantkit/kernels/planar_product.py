"""Few rows of x times a planar weight (planar_product_triton.py): which launch shape, workspace, the two launches.

Workspace is allocated per call (inside a captured graph it comes from the graph's pool); the counters belong to the
weight, start as zeros and are zeros again after every call. Two streams must not run the same weight at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.kernels.launch import early_launch
from quantkit.kernels.launch_shapes import Subject, device_name, measured_config
from quantkit.kernels.planar import PlanarSegment, is_paired, padded_rows, planar_segments
from quantkit.kernels.planar_matmul import constant_zero, triton_kernels

MAX_PRODUCT_TOKENS = 128
_TILES = ((64, 4), (128, 8))  # rows and warps: four warps issue products of 64 rows at once
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
_SHARED_MEMORY = 232448  # bytes that a program of an H100 or H200 may have
_PREPARING = 128  # programs that prepare x, about
_FEW_CHAINS = 8  # of a row, for which no more programs are started
_LONG_ROW = 8192  # columns from which a program that prepares a row of x has twice the warps


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductConfig:
    """Shape of one launch of `product_kernel`."""

    rows: int  # weight rows per program, at most `planar.ROW_TILE`
    warps: int
    tokens: int  # columns of x per program
    stages: int  # of the load pipeline
    splits: int = 1  # programs that share a row tile
    zeros_in_loop: bool = False  # or by a product before the loop


@dataclass(frozen=True, slots=True)
class Prepared:
    """x as `prepare_kernel` leaves it."""

    values: Tensor  # float16 [m, prepared columns]
    sums: Tensor  # float32 [prepared columns / columns of a chain, m]
    factors: Tensor  # float32 [m]


def planar_product(
    x: Tensor,
    spec: GroupedIntSpec,
    tensors: dict[str, Tensor],
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
    config: ProductConfig | None = None,
) -> Tensor:
    """``x W^T + bias`` for few rows of x, in two launches, on a GPU.

    Args:
        x: float16 or bfloat16 ``[m, in]``, neighbours in a row next to each other, m at least 1.
        spec: a weight with a planar form.
        tensors: what `planar.to_planar` made of it.
        bias: ``[out]`` or ``[m, out]`` of any float dtype, or None.
        out_dtype: that of x if None.
        config: `launch_config`'s if None.

    Returns:
        ``[m, out]``. Sums are float32, products are exact but for what of x lies below 2**-28 of its row's largest,
        which is rounded to 2**-38 of it.
    """
    out = torch.empty(len(x), spec.out_features, dtype=out_dtype or x.dtype, device=x.device)
    config = config or launch_config(len(x), spec, device_name(x.device))
    prepared, partial = workspace(len(x), spec, config, x.device)
    early = early_launch(x.device)
    kernels = triton_kernels("planar_product_triton")
    with torch.cuda.device(x.device):  # Triton launches on the current device
        tokens, arguments = prepare_launch(x, spec, tensors, prepared)
        kernels.prepare_kernel[tokens](**arguments, **early)
        grid, arguments = product_launch(spec, tensors, bias, out, prepared, partial, config)
        kernels.product_kernel[grid](**arguments, ASM=True, **early)
    return out


def has_planar_product(x: Tensor, spec: GroupedIntSpec) -> bool:
    """Whether `planar_product` is the choice for ``x`` [m, in], not decoding the weight for the vendor's product."""
    return len(x) <= (64 if _planes(spec) == 16 else MAX_PRODUCT_TOKENS) and x.dtype in (torch.float16, torch.bfloat16)


def choose_product(n_tokens: int, spec: GroupedIntSpec) -> ProductConfig:
    """The launch shape for a weight and a number of tokens, computed; what was measured: docs/results.md."""
    rows, planes = padded_rows(spec), _planes(spec)
    small = planes < 8  # little of x meets a word
    narrow = int(all(segment.plane_width < 64 for segment in planar_segments(spec)))  # a stage holds fewer words
    many_codes = any(segment.bits == 3 for segment in planar_segments(spec))
    if n_tokens <= 8 and many_codes:  # or mixed widths: registers are for few rows
        # sixteen groups in a block of planes: a loop with their zeros takes a minute to compile
        return _shared(ProductConfig(rows=32, warps=2, tokens=8, stages=3, zeros_in_loop=is_paired(spec)), rows, 448)
    if n_tokens <= 8 and planes > 2:
        shape = ProductConfig(rows=64, warps=4, tokens=8, stages=3 + narrow, zeros_in_loop=planes < 16)
        return _shared(shape, rows, 512)
    if n_tokens <= 16:
        stages = 4 if planes == 8 else 3 + narrow
        shape = ProductConfig(rows=64, warps=4, tokens=16, stages=stages, zeros_in_loop=True)
        return _shared(shape, rows, 512 if small else 256)
    if planes == 16:
        wide = rows % 128 == 0
        shape = ProductConfig(rows=128 if wide else 64, warps=8 if wide else 4, tokens=32, stages=2 + narrow)
        return _shared(shape, rows, 128 if wide else 256)
    if n_tokens <= 32:
        stages = 4 if small else 3
        return _shared(ProductConfig(rows=64, warps=4, tokens=32, stages=stages, zeros_in_loop=not small), rows, 256)
    if rows % 128 or (small and n_tokens <= 64):
        return _shared(ProductConfig(rows=64, warps=4, tokens=64, stages=3 if small else 2), rows, 256)
    if small:
        return _shared(ProductConfig(rows=128, warps=8, tokens=128, stages=2), rows, 128)
    return _shared(ProductConfig(rows=128, warps=8, tokens=64, stages=3), rows, 128)


def launch_config(n_tokens: int, spec: GroupedIntSpec, device: str) -> ProductConfig:
    """The launch shape measured for the weight's class on a device of that name, else `choose_product`'s."""
    if len(spec.segments) > 1:
        return choose_product(n_tokens, spec)
    measured = measured_config(ProductConfig, product_subject(n_tokens, spec), device)
    return measured if measured is not None and is_possible(measured, spec) else choose_product(n_tokens, spec)


def product_subject(n_tokens: int, spec: GroupedIntSpec) -> Subject:
    """What a measured launch shape of a weight of one width is filed under."""
    bits, shape = planar_segments(spec)[0].bits, {"out_features": spec.out_features, "in_features": spec.in_features}
    return Subject(kernel="product", bits=bits, tokens=n_tokens, **shape)


def is_possible(config: ProductConfig, spec: GroupedIntSpec) -> bool:
    """Whether `product_kernel` can run in this shape."""
    powers = all(number & (number - 1) == 0 for number in (config.rows, config.warps, config.tokens))
    fits = shared_memory(config, spec) <= _SHARED_MEMORY
    return powers and config.tokens >= 8 and config.rows >= 16 and padded_rows(spec) % config.rows == 0 and fits


def shared_memory(config: ProductConfig, spec: GroupedIntSpec) -> int:
    """Bytes that the pipeline of a program holds, at most: x of all stages, words of all but one."""
    held = []
    for segment in planar_segments(spec):
        x = segment.planes_per_block * config.tokens * config.stages
        words = (3 if segment.bits == 3 else 1) * config.rows * (config.stages - 1)
        held.append(2 * segment.plane_width * (x + words))
    return max(held)


def product_candidates(n_tokens: int, spec: GroupedIntSpec, multiprocessors: int) -> list[ProductConfig]:
    """Launch shapes worth measuring for a weight of one width.

    Left out is what cannot be the fastest: tiles of far more columns than there are tokens, fewer programs than three
    quarters of the multiprocessors, rows shared where there are more than six times as many.
    """
    widths = {8: (8, 16), 16: (16,), 32: (32,), 64: (32, 64), 128: (32, 64, 128)}
    tokens = widths[min(max(8, _power_of_two(n_tokens)), 128)]
    most = max(segment.n_blocks for segment in planar_segments(spec))
    found = []
    for (rows, warps), columns, stages, splits in product(_TILES, tokens, (2, 3, 4), _SPLITS):
        programs = padded_rows(spec) // rows * splits * -(-n_tokens // columns)
        if splits > most or 4 * programs < 3 * multiprocessors or (splits > 1 and programs > 6 * multiprocessors):
            continue
        shape = ProductConfig(rows=rows, warps=warps, tokens=columns, stages=stages, splits=splits)
        found += [replace(shape, zeros_in_loop=True)] if columns <= 32 else []
        found += [shape] if columns >= 32 else []
    return [config for config in found if is_possible(config, spec)]


def _planes(spec: GroupedIntSpec) -> int:
    return max(segment.planes_per_block for segment in planar_segments(spec))


def _shared(config: ProductConfig, rows: int, programs: int) -> ProductConfig:
    """With as many programs to a row tile as make that number in all."""
    return replace(config, splits=min(max(1, round(programs * config.rows / rows)), _SPLITS[-1]))


@lru_cache(maxsize=1024)
def blocks_per_split(spec: GroupedIntSpec, splits: int) -> tuple[tuple[int, ...], int]:
    """Blocks of each segment that a program takes, and how many programs share a row tile: ``splits`` at most."""
    segments = planar_segments(spec)
    per_split = tuple(-(-segment.n_blocks // splits) for segment in segments)
    counts = [-(-segment.n_blocks // per) for segment, per in zip(segments, per_split, strict=True)]
    return per_split, max(counts)


def workspace(
    n_tokens: int, spec: GroupedIntSpec, config: ProductConfig, device: torch.device
) -> tuple[Prepared, Tensor]:
    """Uninitialized memory for prepared x, and the partial sums (empty if one program does a whole row)."""
    n_columns = sum(map(_segment_columns, planar_segments(spec)))
    _, splits = blocks_per_split(spec, config.splits)
    padded_tokens = -(-n_tokens // config.tokens) * config.tokens
    partial = padded_tokens * splits * spec.out_features if splits > 1 else 0
    sizes = (n_tokens * n_columns // 2, partial, n_columns // _chain(spec) * n_tokens, n_tokens)
    aligned = [-(-size // 4) * 4 for size in sizes]  # what starts at 16 bytes is not compiled for twice
    parts = torch.split(torch.empty(sum(aligned), dtype=torch.float32, device=device), aligned)
    values, partial_sums, sums, factors = (part[:size] for part, size in zip(parts, sizes, strict=True))
    values = values.view(torch.float16).view(n_tokens, n_columns)
    return Prepared(values, sums.view(-1, n_tokens), factors), partial_sums


def prepare_launch(
    x: Tensor, spec: GroupedIntSpec, tensors: dict[str, Tensor], prepared: Prepared
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and arguments of `prepare_kernel`."""
    assert x.stride(1) == 1
    chain = _chain(spec)
    numbers, padding, start = [], [], 0
    for segment in planar_segments(spec):
        first, n_columns = segment.first_group * spec.group_size, segment.n_groups * spec.group_size
        padded = _segment_columns(segment) - n_columns
        numbers.append((first // chain, (start - first) // chain, padded, start + n_columns))
        padding.append(_power_of_two(padded) if padded else 0)
        start += n_columns + padded
    n_chains = spec.in_features // chain
    parts = max(1, min(_PREPARING // len(x), n_chains // _FEW_CHAINS))
    chains = _power_of_two(-(-n_chains // parts))
    arguments = {
        "x": x,
        "order": tensors.get("planar_order", tensors["planar"]),
        "prepared": prepared.values,
        "sums": prepared.sums,
        "factors": prepared.factors,
        "stride": x.stride(0),
        "n_columns": spec.in_features,
        "n_prepared": start,
        "n_tokens": len(x),
        "segments": tuple(numbers),
        "GROUP": spec.group_size,
        "CHAIN": chain,
        "CHAINS": chains,
        "COLUMNS": _power_of_two(spec.in_features),
        "ORDERED": len(spec.segments) > 1,
        "PADDING": tuple(padding),
        "num_warps": 4 if spec.in_features <= _LONG_ROW else 8,
    }
    return (len(x), -(-n_chains // chains)), arguments


def product_launch(
    spec: GroupedIntSpec,
    tensors: dict[str, Tensor],
    bias: Tensor | None,
    out: Tensor,
    prepared: Prepared,
    partial: Tensor,
    config: ProductConfig,
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Grid and arguments of `product_kernel`, all but ASM."""
    segments = planar_segments(spec)
    per_split, n_splits = blocks_per_split(spec, config.splits)
    grid = (padded_rows(spec) // config.rows, n_splits, -(-len(out) // config.tokens))
    assert n_splits == 1 or tensors["counters"].numel() >= grid[0] * grid[2]
    zeros = tensors.get("planar_zeros")
    numbers, start = [], 0
    for segment, per in zip(segments, per_split, strict=True):
        place = (segment.word_offset // 16, segment.row_words // 16, segment.n_blocks)
        numbers.append((*place, per, segment.first_group, start // 16))
        start += _segment_columns(segment)
    arguments = {
        "x": prepared.values,
        "words": tensors["planar"],
        "scales": tensors["planar_scales"],
        "zeros": tensors["planar_scales"] if zeros is None else zeros,
        "sums": prepared.sums,
        "factors": prepared.factors,
        "bias": out if bias is None else bias,
        "y": out,
        "partial": partial,
        "counters": tensors["counters"],
        "n_tokens": len(out),
        "n_rows": spec.out_features,
        "n_prepared": start,
        "scale_stride": padded_rows(spec),
        "bias_stride": spec.out_features if bias is not None and bias.ndim == 2 else 0,
        "segments": tuple(numbers),
        "BITS": tuple(segment.bits for segment in segments),
        "WIDTHS": tuple(segment.plane_width for segment in segments),
        "CONSTANT_ZEROS": tuple(constant_zero(spec, segment) for segment in segments),
        "GROUP": spec.group_size,
        "CHAIN": _chain(spec),
        "HAS_BIAS": bias is not None,
        "SPLITS": n_splits,
        "ROWS": config.rows,
        "TOKENS": config.tokens,
        "IN_LOOP": config.zeros_in_loop,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }
    return grid, arguments


def _segment_columns(segment: PlanarSegment) -> int:
    """Of prepared x: whole blocks."""
    return segment.n_blocks * segment.planes_per_block * segment.plane_width


@lru_cache(maxsize=1024)
def _chain(spec: GroupedIntSpec) -> int:
    """Columns that every chain of products consists of: one plane, or two where they share a group (`_span`)."""
    widths = [segment.plane_width for segment in planar_segments(spec)]
    return min(width * (2 if spec.group_size % (2 * width) == 0 else 1) for width in widths)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
