"""Timing on one GPU: CUDA graphs that are replayed in turns, and the ceilings that a number is compared with.

A graph holds calls on different copies of the same data, together more than `ROTATED_BYTES`, so that what is read comes
from memory and not from the L2 cache. Competitors take turns, replay by replay; the median counts, with the 10th and
90th percentile beside it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import RequestError

ROTATED_BYTES = 512 << 20  # copies of what is read, together: more than 8 times the L2 cache of an H200
WARM_UPS = 10
REPLAYS = 30

Call = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Competitor:
    """One way to compute: calls on different copies of the same data, and the bytes that one call must move."""

    name: str
    calls: list[Call]
    nbytes: int


def require_gpu(what: str) -> None:
    """Raises `RequestError` where there is no CUDA device."""
    if not torch.cuda.is_available():
        raise RequestError(f"{what} needs a CUDA device")


def n_copies(nbytes: int) -> int:
    """Copies of data of that size that no cache holds."""
    return max(2, -(-ROTATED_BYTES // nbytes))


def measure(competitors: Sequence[Competitor], replays: int = REPLAYS) -> list[dict[str, Any]]:
    """Microseconds per call of each competitor, in its order."""
    graphs = [capture(competitor.calls) for competitor in competitors]
    columns = replay_in_turns(graphs, replays)
    return [
        {
            "name": competitor.name,
            **percentiles([time / len(competitor.calls) for time in column]),
            "bytes": competitor.nbytes,
            "terabytes_per_second": competitor.nbytes
            * len(competitor.calls)
            / (sorted(column)[len(column) // 2] * 1e6),
        }
        for competitor, column in zip(competitors, columns, strict=True)
    ]


def percentiles(times: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile of microseconds."""
    ordered = sorted(times)
    p10, median, p90 = (ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.5, 0.9))
    return {"microseconds": median, "p10": p10, "p90": p90}


def replay_in_turns(graphs: Sequence[torch.cuda.CUDAGraph], replays: int = REPLAYS) -> list[list[float]]:
    """Microseconds of every replay of every graph, after `WARM_UPS` that do not count."""
    times: list[list[float]] = [[] for _ in graphs]
    for replay in range(WARM_UPS + replays):
        for graph, column in zip(graphs, times, strict=True):
            microseconds = call_microseconds(graph.replay)
            if replay >= WARM_UPS:
                column.append(microseconds)
    return times


def call_microseconds(call: Callable[[], object]) -> float:
    """Microseconds on the device of what one call launches, between a pair of events."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) * 1e3


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph of the calls, which have run once (and are compiled) before; their results belong to the graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    gc.disable()  # a kernel that is destroyed during capture ends it
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    finally:
        gc.enable()
    return graph


def environment() -> dict[str, Any]:
    """The device and the versions that a number belongs to."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": metadata.version("triton"),
    }


def ceilings() -> dict[str, float]:
    """What this process finds the device to be capable of.

    Returns:
        ``copy_tb_s`` (bytes read and written), ``read_tb_s``, ``bf16_tflop_s`` (8192 cubed, random numbers), and
        ``t0_us``, an empty kernel of one program per multiprocessor inside a graph.
    """
    kernels = import_module("quantkit.kernels.probe_triton")
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    empty = capture([lambda: kernels.empty_kernel[(programs,)](num_warps=1)] * 1000)
    source = torch.empty(1 << 30, dtype=torch.int32, device="cuda").random_()
    target, sink = torch.empty_like(source), torch.zeros(4096, dtype=torch.int32, device="cuda")
    read = capture([lambda: kernels.read_kernel[(1 << 14,)](source, sink, 1 << 4, BLOCK=4096, num_warps=8)])
    factor = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = capture([lambda: factor @ factor] * 4)
    times = [percentiles(column)["microseconds"] for column in replay_in_turns([empty, read, product], 10)]
    copies = sorted(call_microseconds(lambda: target.copy_(source)) for _ in range(10))[5]
    return {
        "copy_tb_s": 2 * source.nbytes / copies / 1e6,  # not in a graph: a copy node there is slower than a kernel
        "read_tb_s": source.nbytes / times[1] / 1e6,
        "bf16_tflop_s": 4 * 2 * 8192**3 / times[2] / 1e6,
        "t0_us": times[0] / 1000,
    }
