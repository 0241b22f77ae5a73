"""Speed of the packed products on a GPU, beside the dense product and other people's kernels, on the same weights.

A cell is a shape, a storage format and a number of tokens. Every output is compared with a float64 product before
anything is timed; a competitor that is absent, fails or is wrong is named with the reason. Times are those of
`gpu_timing`: a graph of calls, each on its own copy of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import RequestError, did_you_mean
from quantkit.evaluation.gpu_timing import (
    REPLAYS,
    Call,
    Competitor,
    ceilings,
    environment,
    measure,
    n_copies,
    require_gpu,
)
from quantkit.evaluation.kernel_peers import PEERS, PeerWeight, dense_weight, one_line, unavailable
from quantkit.evaluation.random_weights import random_spec, random_tensors
from quantkit.formats import storage
from quantkit.formats.grouped_int import GroupedInt
from quantkit.formats.spec import Spec
from quantkit.kernels.storage import kernel_of

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))  # [out, in]: layers of 8B and 70B models
FORMATS = ("int1", "int2", "int3", "int4", "int8", "slim-2", "ptq161", "littlebit-0.55", "littlebit-1", "casp-4")
TOKENS = (1, 16, 2048)
_FEW = 256  # tokens from which arithmetic dominates: fewer copies do
_WORST = 0.02  # relative error that a right product in 16 bits never reaches
_ROWS = 4096  # of a weight in float64 at a time

Progress = Callable[[dict[str, Any]], object]


def bench_kernels(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    formats: Sequence[str] = FORMATS,
    tokens: Sequence[int] = TOKENS,
    peers: Sequence[str] = tuple(PEERS),
    dtype: torch.dtype = torch.bfloat16,
    search: bool = False,
    replays: int = REPLAYS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Times of all cells.

    Args:
        shapes: ``(out_features, in_features)`` of the weights.
        formats: names of `random_weights`.
        tokens: rows of x.
        peers: of `kernel_peers.PEERS`; cuBLAS is always there.
        dtype: of our activations.
        search: let peers search their whole list of settings.
        replays: of each graph.
        progress: called with each cell as soon as it is measured.

    Returns:
        ``environment``, ``ceilings``, ``peers`` (why one is absent, or None) and ``cells``. Ratios are ours over the
        other's time: below 1 we are faster. ``floor_us`` is the time to move the stored bytes, x and y at the copy
        bandwidth that was measured, or of the arithmetic, whichever is longer.

    Raises:
        RequestError: no CUDA device, an unknown format or peer, a shape that no format has.
    """
    for name in peers:
        if name not in PEERS:
            raise RequestError(f"unknown peer {name!r}; {did_you_mean(name, PEERS)}")
    specs = {(shape, name): random_spec(name, *shape) for shape in shapes for name in formats}
    require_gpu("bench kernels")
    absent = {name: unavailable(PEERS[name]) for name in peers}
    present = [name for name in peers if absent[name] is None]
    with torch.inference_mode():
        limits, cells = ceilings(), []
        for (_, name), spec in specs.items():
            for cell in _cells(name, spec, tokens, present, dtype, search, replays, limits):
                cells.append(cell)
                if progress is not None:
                    progress(cell)
            torch.cuda.empty_cache()
    return {"environment": environment(), "ceilings": limits, "peers": absent, "cells": cells}


def _cells(
    name: str,
    spec: Spec,
    tokens: Sequence[int],
    peers: Sequence[str],
    dtype: torch.dtype,
    search: bool,
    replays: int,
    limits: dict[str, float],
) -> list[dict[str, Any]]:
    """All numbers of tokens of one weight."""
    stored = random_tensors(spec, "cuda")
    weight = storage.unpack(spec, stored)
    kernel = kernel_of(spec)
    planar = kernel.to_planar(spec, stored) if kernel.is_planar(spec) else stored
    names = list(planar)

    def product(x: Tensor, *tensors: Tensor) -> Tensor:
        return kernel.matmul(x, spec, dict(zip(names, tensors, strict=True)), None)

    dense = weight.dequantize()
    candidates = {"quantkit": (PeerWeight(product, list(planar.values()), dense), dtype)}
    candidates["cublas"] = (dense_weight(dense), torch.bfloat16)
    failed: dict[str, str] = {}
    for peer in (PEERS[each] for each in peers):
        if not (isinstance(weight, GroupedInt) and _takes(weight, peer.widths)):
            continue
        try:
            candidates[peer.name] = (peer.convert(weight, search), peer.dtype)
        except Exception as error:  # foreign code: the line is shown and the peer is left out
            failed[peer.name] = one_line(error)
    return [_cell(name, spec, m, candidates, dict(failed), replays, limits) for m in tokens]


def _takes(weight: GroupedInt, widths: tuple[int, ...]) -> bool:
    """Whether a peer with kernels of these widths can hold the weight."""
    return weight.symmetric and len(set(weight.bits)) == 1 and weight.bits[0] in widths


def _cell(
    name: str,
    spec: Spec,
    n_tokens: int,
    candidates: dict[str, tuple[PeerWeight, torch.dtype]],
    failed: dict[str, str],
    replays: int,
    limits: dict[str, float],
) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(n_tokens)
    x = torch.randn(n_tokens, spec.in_features, generator=generator, device="cuda")
    competitors, errors = [], []
    for who, (weight, dtype) in candidates.items():
        if who in PEERS and n_tokens > PEERS[who].most_tokens:
            continue
        try:
            off = relative_error(weight, x.to(dtype))
            if not off < _WORST:
                raise ArithmeticError(f"relative error {off:.2g}")
            competitors.append(_competitor(who, weight, x.to(dtype), spec if who == "quantkit" else None))
            errors.append(off)
        except Exception as error:
            if who == "quantkit":
                raise
            failed[who] = one_line(error)  # foreign code, see above
    results = measure(competitors, replays)
    for result, off in zip(results, errors, strict=True):
        result["relative_error"] = off
    return _summary(name, spec, n_tokens, results, failed, limits)


def _summary(
    name: str,
    spec: Spec,
    n_tokens: int,
    results: list[dict[str, Any]],
    failed: dict[str, str],
    limits: dict[str, float],
) -> dict[str, Any]:
    """What a cell says: times, the floor, and ours against everyone else's."""
    times = {result["name"]: result["microseconds"] for result in results}
    others = {name: times["quantkit"] / time for name, time in times.items() if name != "quantkit"}
    best_peer = max(others, key=lambda each: others[each])
    moved = spec.n_bytes + 2 * n_tokens * (spec.in_features + spec.out_features)
    arithmetic = 2 * n_tokens * n_multiplied(spec) / limits["bf16_tflop_s"] / 1e6
    floor = max(moved / limits["copy_tb_s"] / 1e6, arithmetic)
    return {
        "out_features": spec.out_features,
        "in_features": spec.in_features,
        "format": name,
        "bpw": spec.bpw,
        "tokens": n_tokens,
        "microseconds": times["quantkit"],
        "floor_us": floor,
        "fraction_of_floor": floor / times["quantkit"],
        "best_peer": best_peer,
        "ratio_to_best_peer": others[best_peer],
        "ratios": others,
        "results": results,
        "failed": failed,
    }


def n_multiplied(spec: Spec) -> int:
    """Weights that a token is multiplied by: of factors, theirs."""
    rank = getattr(spec, "total_rank", None) or getattr(spec, "rank", None)
    return rank * (spec.in_features + spec.out_features) if rank else spec.n_weights


def relative_error(weight: PeerWeight, x: Tensor) -> float:
    """Of the product with x against float64, in the Frobenius norm."""
    y = weight.product(x, *weight.tensors)
    wide, wrong, size = x.double(), 0.0, 0.0
    for first in range(0, len(weight.dense), _ROWS):
        expected = wide @ weight.dense[first : first + _ROWS].double().t()
        wrong += float((y[:, first : first + _ROWS].double() - expected).square().sum())
        size += float(expected.square().sum())
    return float((wrong / size) ** 0.5)


def _competitor(name: str, weight: PeerWeight, x: Tensor, spec: Spec | None) -> Competitor:
    """Calls on copies; bytes as stored for our formats, as held for the others."""
    held = sum(tensor.nbytes for tensor in weight.tensors)
    count = n_copies(held) if len(x) < _FEW else 2
    copies = [weight.tensors] + [[tensor.clone() for tensor in weight.tensors] for _ in range(count - 1)]
    y_bytes = len(x) * len(weight.dense) * x.element_size()
    calls: list[Call] = [partial(weight.product, x, *tensors) for tensors in copies]
    return Competitor(name, calls, (spec.n_bytes if spec else held) + x.nbytes + y_bytes)
