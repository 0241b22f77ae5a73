"""Launches of the decode kernels (kv_attention_triton.py): one step of one sequence on a GPU.

    decode_kernel   splits of the pages of all segments, and the tokens in 16 bits; takes in the newest token
    merge_kernel    one softmax over all splits

What the kernels can do: `supports`. Everything else is the torch twin's (kv_attention.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from operator import is_not
from typing import Any

import torch
from torch import Tensor

from quantkit.formats.kv_page import GridSpec, PageSpec
from quantkit.kernels.kv_attention import Part

MAX_SPLITS = 246  # of all segments: with those of tokens in 16 bits 256 slots at most, which merge reads at once
HEAD_DIMS = (64, 128, 256)
_WARPS = {2: 8, 4: 8, 8: 6}  # of a multiprocessor, by bits: two for each of its schedulers; a third was slower
_LOG2_E = 1.4426950408889634
_MERGE_TILE = 1 << 13  # numbers that a program of the merge holds at once
ON_DEVICE = {"ASM": True, "launch_pdl": True}  # a launch begins before the one that it waits for has ended
_TENSORS = tuple(f"{which}_{kind}" for which in ("key", "value") for kind in ("words", "scales", "offsets"))


@dataclass(frozen=True, slots=True)
class Pages:
    """A segment: its format, its tensors, and where `lengths` has its number of tokens."""

    spec: PageSpec
    tensors: dict[str, Tensor]
    entry: int

    @property
    def count(self) -> int:
        """Pages that are allocated."""
        return self.tensors["key_words"].shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedCache:
    """Everything that one step of one sequence reads; vectors float16 [heads, 1, head_dim] or None.

    pages: at least one segment, with pages for at least its number of tokens; all on grids of the same kind.
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
    """Shape of the launch.

    splits: of each segment.
    stages: of the pipeline through which words come.
    registers: of a thread, at most; None: as the compiler likes.
    """

    splits: tuple[int, ...]
    warps: int
    stages: int = 3
    registers: int | None = None


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


def choose_config(pages: Sequence[Pages]) -> DecodeConfig:
    """As many programs as keep the schedulers of an H200 (132 multiprocessors) equally busy; what was fastest at 8,192,
    32,768 and 131,072 tokens of 8 heads (docs/results.md)."""
    widths = [each.spec.bits for each in pages]
    warps = 1 if min(widths) == 2 else 2
    total = sum(each.count for each in pages)
    room = max(1, min(MAX_SPLITS, 132 * _WARPS[max(widths)] // warps // pages[0].spec.heads))
    n = total if total <= room else max(1, room - 1 - 2 * warps)  # beside the programs of the tokens in 16 bits
    splits = tuple(max(1, each.count * n // total) for each in pages)
    short = -(-total // n) <= 2
    # left alone, the compiler stops at 168 registers where there are offsets: slower than what it needs by a tenth
    registers = 240 if warps == 1 and pages[0].spec.keys.offsets else None
    return DecodeConfig(
        splits=splits, warps=warps, stages=2 if short or len(set(widths)) > 1 else 3, registers=registers
    )


Launch = tuple[str, tuple[int, int, int], dict[str, Any]]  # the kernel's name, grid, arguments, all but `ON_DEVICE`


@dataclass(frozen=True, slots=True)
class Step:
    """What differs from one step to the next.

    query: heads * n_queries * head_dim numbers, contiguous in this order, n_queries at most 16, original basis.
    keys, values: of the newest token, [..., heads, 1, head_dim], channels contiguous, heads at the same stride: stored
        after the tokens in 16 bits, which have room for it, and counted. None: all tokens are in the cache.
    result: like query, any float dtype, written; lse: float32 [heads, n_queries], written.
    work: float32, at least `work_size`.
    """

    query: Tensor
    keys: Tensor | None
    values: Tensor | None
    result: Tensor
    lse: Tensor
    work: Tensor


_CHANGING = ("query", "new_keys", "new_values", "result", "lse", "work")  # the kernels' names of these


def work_size(query: Tensor, cache: PackedCache, config: DecodeConfig) -> int:
    """Numbers of scratch."""
    heads, n_queries, head_dim = _shape(query, cache)
    return heads * (sum(config.splits) + _float_splits(cache)) * _columns(n_queries) * (head_dim + 2)


def _shape(query: Tensor, cache: PackedCache) -> tuple[int, int, int]:
    heads, _, head_dim = cache.floats[0].shape
    return heads, query.numel() // (heads * head_dim), head_dim


def _unspecialized(*numbers: int) -> tuple[int, ...]:
    """2n + 1 of each n > 0: in tuples Triton compiles anew for 1 and for multiples of 16, whatever it is told."""
    return tuple(2 * n + 1 for n in numbers)


def _float_splits(cache: PackedCache) -> int:
    """Programs for the tokens in 16 bits: each takes a tile of 32 places where they are few."""
    return min(8, -(-cache.floats[0].shape[1] // 32))


def _columns(n_queries: int) -> int:
    return 8 if n_queries <= 8 else 16


def decode_launches(step: Step, scaling: float, cache: PackedCache, config: DecodeConfig) -> list[Launch]:
    """All launches of a step, in order; `scaling` is of the scores."""
    heads, n_queries, d = _shape(step.query, cache)
    n_slots = sum(config.splits) + _float_splits(cache)
    grids = [(pages.spec.keys, pages.spec.values) for pages in cache.pages]
    keys, values = grids[0]
    assert all(pair == grids[0] for pair in grids), "segments on different grids"
    absent = step.lse  # stands for tensors that the kernel is told not to read
    new_keys = absent if step.keys is None else step.keys
    common = {
        "work": step.work,
        "lengths": cache.lengths,
        "n_queries": n_queries,
        "n_slots": n_slots,
        "D": d,
        "COLUMNS": _columns(n_queries),
        "NEW": step.keys is not None,
    }
    first = common | {
        "query": step.query,
        "new_keys": new_keys,
        "new_values": absent if step.values is None else step.values,
        "scaling": scaling * _LOG2_E,
        "mean": absent if cache.key_mean is None else cache.key_mean,
        "channel_scales": absent if cache.value_scale is None else cache.value_scale,
        "segments": tuple(tuple(each.tensors.get(name, absent) for name in _TENSORS) for each in cache.pages),
        "numbers": tuple(
            _unspecialized(each.entry, each.count, n) for each, n in zip(cache.pages, config.splits, strict=True)
        ),
        "float_splits": _float_splits(cache),
        "float_keys": cache.floats[0],
        "float_values": cache.floats[1],
        "capacity": cache.floats[0].shape[1],
        "new_stride": 0 if step.keys is None else step.keys.stride(-3),
        "BITS": tuple(each.spec.bits for each in cache.pages),
        "ROTATE_KEYS": cache.rotate_keys,
        "ROTATE_VALUES": cache.rotate_values,
        "KEY_SHARED": keys.shared,
        "VALUE_SHARED": values.shared,
        "KEY_OFFSETS": keys.offsets,
        "VALUE_OFFSETS": values.offsets,
        "MEAN": cache.key_mean is not None,
        "CHANNEL_SCALES": cache.value_scale is not None,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    if config.registers is not None:
        first["maxnreg"] = config.registers
    slots = 1 << (n_slots - 1).bit_length()
    chunk = max(16, min(d, _MERGE_TILE // slots))
    merge = common | {"result": step.result, "lse": step.lse, "SLOTS": slots, "CHUNK": chunk}
    merge["num_warps"] = 4
    return [
        ("decode_kernel", (n_slots, heads, 1), first),
        ("merge_kernel", (heads * n_queries, d // chunk, 1), merge),
    ]


class Decoder:
    """Runs the steps of one cache. A step whose launches differ from the last one's in their operands alone reuses
    these: binding arguments anew takes Triton longer than most steps take the device."""

    def __init__(self) -> None:
        self._bound: dict[bool, _Bound] = {}  # by whether the step takes in a token

    def run(
        self,
        query: Tensor,
        scaling: float,
        cache: PackedCache,
        dtype: torch.dtype = torch.float32,
        new: tuple[Tensor, Tensor] | None = None,
        config: DecodeConfig | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> Part:
        """Attention over all tokens of a sequence; `new` is the key and value of a token that is not among them yet.

        See `Step`; ``dtype`` and ``shape`` (None: the query's) are of the output.
        """
        device = query.device
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.run(query, scaling, cache, dtype, new, config, shape)
        kind = (query.shape, query.dtype, scaling, dtype, config, new and (new[0].dtype, new[0].stride(-3)))
        bound = self._bound.get(new is not None)
        if bound is None or bound.kind != kind or not bound.serves(cache):
            chosen = config or choose_config(cache.pages)
            bound = _Bound(cache=cache, kind=kind, config=chosen, work_size=work_size(query, cache, chosen))
            self._bound[new is not None] = bound
        keys, values = new or (None, None)
        result = torch.empty(shape or query.shape, dtype=dtype, device=device)
        lse = torch.empty(_shape(query, cache)[:2], dtype=torch.float32, device=device)
        step = Step(query, keys, values, result, lse, torch.empty(bound.work_size, dtype=torch.float32, device=device))
        if bound.launches and _aligned(step):
            bound.replay(step)
        else:
            bound.launch(step, scaling, cache)
        return Part(result, lse)


@dataclass(slots=True, kw_only=True)
class _Bound:
    """Compiled kernels and their arguments, for one kind of step on the tensors of one cache."""

    cache: PackedCache
    kind: tuple[Any, ...]
    config: DecodeConfig
    work_size: int
    launches: list[tuple[Any, list[Any], list[tuple[int, int]]]] = field(default_factory=list)

    def serves(self, cache: PackedCache) -> bool:
        """Whether `cache` has the same tensors."""
        if cache is not self.cache:
            one, two = (
                [*each.floats, each.lengths, *(pages.tensors["key_words"] for pages in each.pages)]
                for each in (self.cache, cache)
            )
            if len(one) != len(two) or any(map(is_not, one, two)):
                return False
            self.cache = cache
        return True

    def launch(self, step: Step, scaling: float, cache: PackedCache) -> None:
        """Launch through Triton's just-in-time compiler, and keep what it made."""
        kernels = import_module("quantkit.kernels.kv_attention_triton")
        made = []
        for name, grid, arguments in decode_launches(step, scaling, cache, self.config):
            kernel = getattr(kernels, name)
            compiled = kernel[grid](**arguments, **ON_DEVICE)
            names = kernel.arg_names
            places = [(place, _CHANGING.index(each)) for place, each in enumerate(names) if each in _CHANGING]
            # tensors of a step are not kept, and of the others the launcher takes addresses sooner than tensors
            values = [None if each in _CHANGING else _addresses((arguments | ON_DEVICE)[each]) for each in names]
            made.append((compiled[grid], values, places))
        if _aligned(step):  # what was compiled may rely on it
            self.launches = made

    def replay(self, step: Step) -> None:
        """Launch what was compiled, on the operands of another step."""
        absent = step.lse  # stands for tensors that are not read
        tensors = (step.query, step.keys, step.values, step.result, step.lse, step.work)
        operands = [(absent if each is None else each).data_ptr() for each in tensors]
        for run, values_held, places in self.launches:
            arguments = values_held.copy()
            for place, number in places:
                arguments[place] = operands[number]
            run(*arguments)


def _addresses(argument: Any) -> Any:
    """The argument with the addresses of tensors in their place."""
    if isinstance(argument, tuple):
        return tuple(_addresses(each) for each in argument)
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


def _aligned(step: Step) -> bool:
    """Whether operands begin at multiples of 16 bytes; those that are not named here are allocated for the step."""
    given = (step.query, step.keys, step.values)
    return all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in given)


def decode(query: Tensor, scaling: float, cache: PackedCache, **options: Any) -> Part:
    """One step of a `Decoder` of its own."""
    return Decoder().run(query, scaling, cache, **options)
