"""Launches of the decode kernels (kv_attention_triton.py): one step of one sequence on a GPU.

    decode_kernel   for each segment: splits of its pages; with the first one also the tokens in 16 bits
    merge_kernel    one softmax over all splits
    finish_kernel   back to the original basis, where values were transformed

What the kernels can do: `supports`. Everything else is the torch twin's (kv_attention.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from quantkit.formats.kv_page import GridSpec, PageSpec
from quantkit.kernels.kv_attention import Part

MAX_SPLITS = 63  # of a segment: with the tokens in 16 bits a power of two, all of which merge reads at once
HEAD_DIMS = (64, 128, 256)
_LOG2_E = 1.4426950408889634
_MERGE_TILE = 1 << 14  # numbers that a program of the merge holds at once


@dataclass(frozen=True, slots=True)
class Pages:
    """A segment: its format, its tensors, and where `lengths` has its number of tokens."""

    spec: PageSpec
    tensors: dict[str, Tensor]
    entry: int


@dataclass(frozen=True, slots=True)
class Basis:
    """The basis of the pages: see algorithms/kv/policy.py. Vectors float16 [heads, 1, head_dim] or None."""

    rotate_keys: bool = False
    rotate_values: bool = False
    key_mean: Tensor | None = None
    value_scale: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """Shape of the launch for one segment."""

    splits: int
    warps: int
    stages: int


def supports(query: Tensor, specs: Sequence[PageSpec]) -> bool:
    """Whether the kernels can attend: CUDA, few queries, one scale for a token and head."""
    _, n_queries, head_dim = query.shape
    return (
        query.is_cuda
        and find_spec("triton") is not None
        and bool(specs)
        and n_queries <= 16
        and head_dim in HEAD_DIMS
        and all(_one_scale(grid, head_dim) for spec in specs for grid in (spec.keys, spec.values))
    )


def _one_scale(grid: GridSpec, head_dim: int) -> bool:
    return grid.axis == "token" and (grid.shared or grid.group == head_dim)


def choose_config(spec: PageSpec, n_pages: int) -> DecodeConfig:
    """About 4 programs for each of 132 multiprocessors, and never less than a page for each."""
    splits = max(1, min(MAX_SPLITS, n_pages, -(-528 // spec.heads)))
    return DecodeConfig(splits=splits, warps=1 if spec.bits == 2 else 2, stages=3)


Launch = tuple[str, tuple[int, ...], dict[str, Any]]  # the kernel's name, grid, arguments (all but ASM)


def decode_launches(
    query: Tensor,
    scaling: float,
    segments: Sequence[Pages],
    floats: tuple[Tensor, Tensor],
    lengths: Tensor,
    basis: Basis,
    result: Tensor,
    lse: Tensor,
    configs: Sequence[DecodeConfig],
) -> list[Launch]:
    """All launches of a step, in order, on a workspace that is made here.

    Args:
        query: [heads, n_queries, head_dim], n_queries at most 16, original basis, contiguous.
        scaling: of the scores.
        segments: at least one; pages that hold at least their number of tokens.
        floats: keys and values in float16 [heads, capacity, head_dim], original basis, contiguous.
        lengths: int32: the number of tokens in `floats`, then those of the segments at their entries; not all 0.
        basis: of the pages.
        result: [heads, n_queries, head_dim], any float dtype, written.
        lse: float32 [heads, n_queries], written.
        configs: of each segment.
    """
    heads, n_queries, d = query.shape
    columns = 8 if n_queries <= 8 else 16
    n_slots = sum(config.splits for config in configs) + 1
    outputs = query.new_empty((heads, n_slots, d, columns), dtype=torch.float32)
    tops, totals = query.new_empty((2, heads, n_slots, columns), dtype=torch.float32)
    absent = lse  # stands for tensors that the kernel is told not to read
    launches: list[Launch] = []
    first_slot = 0
    for index, (pages, config) in enumerate(zip(segments, configs, strict=True)):
        spec, tensors = pages.spec, pages.tensors
        last = index == len(segments) - 1  # brings the tokens in 16 bits along: their slot is the last one
        arguments: dict[str, Any] = {
            "query": query,
            "scaling": scaling * _LOG2_E,
            "mean": absent if basis.key_mean is None else basis.key_mean,
            "channel_scales": absent if basis.value_scale is None else basis.value_scale,
            "float_keys": floats[0],
            "float_values": floats[1],
            "lengths": lengths,
            "outputs": outputs,
            "tops": tops,
            "totals": totals,
            "n_queries": n_queries,
            "segment": pages.entry,
            "first_slot": first_slot,
            "n_slots": n_slots,
            "splits": config.splits,
            "word_stride": tensors["key_words"].stride(0),
            "key_scale_stride": _head_stride(tensors["key_scales"]),
            "value_scale_stride": _head_stride(tensors["value_scales"]),
            "float_stride": floats[0].stride(0),
            "D": d,
            "BITS": spec.bits,
            "COLUMNS": columns,
            "ROTATE_KEYS": basis.rotate_keys,
            "ROTATE_VALUES": basis.rotate_values,
            "MEAN": basis.key_mean is not None,
            "CHANNEL_SCALES": basis.value_scale is not None,
            "TILE": 32,
            "num_warps": config.warps,
            "num_stages": config.stages,
        }
        for which, grid in (("key", spec.keys), ("value", spec.values)):
            arguments[f"{which}_words"] = tensors[f"{which}_words"]
            arguments[f"{which}_scales"] = tensors[f"{which}_scales"]
            arguments[f"{which}_offsets"] = tensors.get(f"{which}_offsets", absent)
            arguments[f"{which.upper()}_OFFSETS"] = grid.offsets
        launches.append(("decode_kernel", (config.splits + last, heads), arguments))
        first_slot += config.splits
    finish = basis.rotate_values or basis.value_scale is not None
    merged = torch.empty_like(result, dtype=torch.float32) if finish else result
    shape = {"D": d, "COLUMNS": columns}
    slots = 1 << max(1, (n_slots - 1).bit_length())
    merge = {"outputs": outputs, "tops": tops, "totals": totals, "result": merged, "lse": lse, "n_queries": n_queries}
    merge |= {
        "n_slots": n_slots,
        "SLOTS": slots,
        "CHUNK": max(4, min(16, _MERGE_TILE // (slots * columns))),
        "num_warps": 4,
    } | shape
    launches.append(("merge_kernel", (heads, d // merge["CHUNK"]), merge))
    if finish:
        scales = absent if basis.value_scale is None else basis.value_scale
        back = {"merged": merged, "channel_scales": scales, "result": result, "n_queries": n_queries} | shape
        back |= {"ROTATE": basis.rotate_values, "CHANNEL_SCALES": basis.value_scale is not None, "num_warps": 1}
        launches.append(("finish_kernel", (heads,), back))
    return launches


def _head_stride(scales: Tensor) -> int:
    return 0 if scales.shape[0] == 1 else scales.stride(0)


def decode(
    query: Tensor,
    scaling: float,
    segments: Sequence[Pages],
    floats: tuple[Tensor, Tensor],
    lengths: Tensor,
    basis: Basis,
    configs: Sequence[DecodeConfig] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Part:
    """Attention over all tokens of a sequence, on a GPU; arguments as `decode_launches`."""
    if configs is None:
        configs = [choose_config(pages.spec, pages.tensors["key_words"].shape[1]) for pages in segments]
    result = torch.empty_like(query, dtype=dtype)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    kernels = import_module("quantkit.kernels.kv_attention_triton")
    launches = decode_launches(query, scaling, segments, floats, lengths, basis, result, lse, configs)
    with torch.cuda.device(query.device):
        for name, grid, arguments in launches:
            extra = {"ASM": True} if name == "decode_kernel" else {}
            getattr(kernels, name)[grid](**arguments, **extra)
    return Part(result, lse)
