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


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedCache:
    """Everything that one step of one sequence reads; vectors float16 [heads, 1, head_dim] or None.

    pages: at least one segment, with pages for at least its number of tokens.
    floats: keys and values in float16 [heads, capacity, head_dim], on the original basis, contiguous.
    lengths: int32, the number of tokens in `floats`, then those of the segments at their entries; not all 0.
    The others are the basis of the pages: see algorithms/kv/policy.py.
    """

    pages: Sequence[Pages]
    floats: tuple[Tensor, Tensor]
    lengths: Tensor
    rotate_keys: bool
    rotate_values: bool
    key_mean: Tensor | None
    value_scale: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """Shape of the launch for one segment."""

    splits: int
    warps: int
    stages: int


def supports(query: Tensor, specs: Sequence[PageSpec], dtype: torch.dtype) -> bool:
    """Whether the kernels can attend: CUDA, few queries, one scale for a token and head, uncoded tokens in float16."""
    _, n_queries, head_dim = query.shape
    return (
        query.is_cuda
        and dtype == torch.float16
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
    cache: PackedCache,
    result: Tensor,
    lse: Tensor,
    configs: Sequence[DecodeConfig],
) -> list[Launch]:
    """All launches of a step, in order, on a workspace that is made here.

    Args:
        query: [heads, n_queries, head_dim], n_queries at most 16, original basis, contiguous.
        scaling: of the scores.
        cache: what is attended to.
        result: [heads, n_queries, head_dim], any float dtype, written.
        lse: float32 [heads, n_queries], written.
        configs: of each segment.
    """
    heads, n_queries, d = query.shape
    columns = 8 if n_queries <= 8 else 16
    n_slots = sum(config.splits for config in configs) + 1
    split = {
        "outputs": query.new_empty((heads, n_slots, d, columns), dtype=torch.float32),
        "tops": query.new_empty((heads, n_slots, columns), dtype=torch.float32),
        "totals": query.new_empty((heads, n_slots, columns), dtype=torch.float32),
        "n_queries": n_queries,
        "n_slots": n_slots,
        "D": d,
        "COLUMNS": columns,
    }
    launches = _decode_launches(query, scaling, cache, lse, configs, split)
    finish = cache.rotate_values or cache.value_scale is not None
    merged = torch.empty_like(result, dtype=torch.float32) if finish else result
    slots = 1 << max(1, (n_slots - 1).bit_length())
    chunk = max(4, min(16, _MERGE_TILE // (slots * columns)))
    merge = split | {"result": merged, "lse": lse, "SLOTS": slots, "CHUNK": chunk, "num_warps": 4}
    launches.append(("merge_kernel", (heads, d // chunk), merge))
    if finish:
        back = {"merged": merged, "result": result, "n_queries": n_queries, "D": d, "COLUMNS": columns, "num_warps": 1}
        back["channel_scales"] = lse if cache.value_scale is None else cache.value_scale
        back |= {"ROTATE": cache.rotate_values, "CHANNEL_SCALES": cache.value_scale is not None}
        launches.append(("finish_kernel", (heads,), back))
    return launches


def _decode_launches(
    query: Tensor,
    scaling: float,
    cache: PackedCache,
    absent: Tensor,  # stands for tensors that the kernel is told not to read
    configs: Sequence[DecodeConfig],
    split: dict[str, Any],
) -> list[Launch]:
    launches: list[Launch] = []
    first_slot = 0
    common = split | {
        "query": query,
        "scaling": scaling * _LOG2_E,
        "mean": absent if cache.key_mean is None else cache.key_mean,
        "channel_scales": absent if cache.value_scale is None else cache.value_scale,
        "float_keys": cache.floats[0],
        "float_values": cache.floats[1],
        "float_stride": cache.floats[0].stride(0),
        "lengths": cache.lengths,
        "ROTATE_KEYS": cache.rotate_keys,
        "ROTATE_VALUES": cache.rotate_values,
        "MEAN": cache.key_mean is not None,
        "CHANNEL_SCALES": cache.value_scale is not None,
        "TILE": 32,
    }
    for index, (pages, config) in enumerate(zip(cache.pages, configs, strict=True)):
        last = index == len(configs) - 1  # brings the tokens in 16 bits along: their slot is the last one
        arguments = common | {
            "segment": pages.entry,
            "first_slot": first_slot,
            "splits": config.splits,
            "BITS": pages.spec.bits,
            "num_warps": config.warps,
            "num_stages": config.stages,
            "word_stride": pages.tensors["key_words"].stride(0),
        }
        for which, grid in (("key", pages.spec.keys), ("value", pages.spec.values)):
            scales = pages.tensors[f"{which}_scales"]
            arguments[f"{which}_words"] = pages.tensors[f"{which}_words"]
            arguments[f"{which}_scales"] = scales
            arguments[f"{which}_scale_stride"] = 0 if scales.shape[0] == 1 else scales.stride(0)
            arguments[f"{which}_offsets"] = pages.tensors.get(f"{which}_offsets", absent)
            arguments[f"{which.upper()}_OFFSETS"] = grid.offsets
        launches.append(("decode_kernel", (config.splits + last, query.shape[0]), arguments))
        first_slot += config.splits
    return launches


def decode(
    query: Tensor,
    scaling: float,
    cache: PackedCache,
    configs: Sequence[DecodeConfig] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Part:
    """Attention over all tokens of a sequence, on a GPU; arguments as `decode_launches`."""
    if configs is None:
        configs = [choose_config(pages.spec, pages.tensors["key_words"].shape[1]) for pages in cache.pages]
    result = torch.empty_like(query, dtype=dtype)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    kernels = import_module("quantkit.kernels.kv_attention_triton")
    with torch.cuda.device(query.device):
        for name, grid, arguments in decode_launches(query, scaling, cache, result, lse, configs):
            extra = {"ASM": True} if name == "decode_kernel" else {}
            getattr(kernels, name)[grid](**arguments, **extra)
    return Part(result, lse)
