"""Which launch shape of a kernel is the fastest for a weight on this machine's GPU, by measuring (`bench tune`).

Each kernel names its candidates, pruned by what cannot be the fastest (`gemv.gemv_candidates`). Every candidate is
checked against a float64 product and timed in a CUDA graph over copies that no cache holds; the fastest few and the
shape that is computed without measuring are then replayed in turns, and the winner is remembered
(`kernels/launch_shapes.py`). Compiling takes longer than measuring: about a second per candidate, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import RequestError
from quantkit.evaluation.gpu_timing import REPLAYS, Call, capture, n_copies, percentiles, replay_in_turns, require_gpu
from quantkit.evaluation.random_weights import random_spec, random_tensors
from quantkit.formats.grouped_int import GroupedIntSpec, unpack
from quantkit.kernels.bit_gemv import counts_tokens
from quantkit.kernels.few_rows import has_few_rows
from quantkit.kernels.gemv import MAX_GEMV_TOKENS, choose_gemv, gemv, gemv_candidates, subject
from quantkit.kernels.launch import multiplies_bytes
from quantkit.kernels.launch_shapes import Row, Subject, remember
from quantkit.kernels.mma_gemv import has_mma_gemv
from quantkit.kernels.planar import to_planar
from quantkit.kernels.planar_product import (
    MAX_PRODUCT_TOKENS,
    choose_product,
    planar_product,
    product_candidates,
    product_subject,
)
from quantkit.kernels.wide_product import has_wide_product

SHAPES = ((4096, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336), (28672, 8192), (128256, 4096))
WIDTHS = (2, 3, 4, 8)
_FINALISTS = 4
_FIRST_REPLAYS = 5
_WORST = 0.02  # relative error that a right product in 16 bits never reaches
_GAIN = 0.99  # of the computed shape's time: what is not faster than that is noise

Progress = Callable[[dict[str, Any]], object]


@dataclass(frozen=True, slots=True)
class Tunable:
    """A kernel with launch shapes to choose from."""

    most_tokens: int
    subject: Callable[[GroupedIntSpec, int], Subject]
    computed: Callable[[GroupedIntSpec, int], Any]
    candidates: Callable[[GroupedIntSpec, int, int], list[Any]]  # weight, tokens, multiprocessors
    run: Callable[[Tensor, GroupedIntSpec, dict[str, Tensor], Any], Tensor]


TUNABLES = (
    Tunable(
        most_tokens=MAX_GEMV_TOKENS,
        subject=lambda spec, tokens: subject(spec),
        computed=lambda spec, tokens: choose_gemv(spec),
        candidates=lambda spec, tokens, multiprocessors: gemv_candidates(spec, multiprocessors),
        run=lambda x, spec, tensors, config: gemv(x, spec, tensors, None, config=config),
    ),
    Tunable(
        most_tokens=MAX_PRODUCT_TOKENS,
        subject=lambda spec, tokens: product_subject(tokens, spec),
        computed=lambda spec, tokens: choose_product(tokens, spec),
        candidates=lambda spec, tokens, multiprocessors: product_candidates(tokens, spec, multiprocessors),
        run=lambda x, spec, tensors, config: planar_product(x, spec, tensors, None, config=config),
    ),
)


def tune(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    widths: Sequence[int] = WIDTHS,
    tokens: Sequence[int] = (1,),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure and remember the fastest launch shape of every weight.

    Args:
        shapes: ``(out_features, in_features)``.
        widths: bits of the codes; groups of 128 columns, symmetric, bfloat16 activations.
        tokens: rows of x.
        progress: called with each row as soon as it is measured.

    Returns:
        ``device``, ``file`` and ``rows``: kernel, bits, out_features, in_features, tokens, shape, microseconds,
        computed_microseconds, candidates (how many were measured).

    Raises:
        RequestError: no CUDA device, inside the capture of a CUDA graph, a shape or width that there is no kernel for.
        FileError: the result cannot be written.
    """
    specs = [random_spec(f"int{bits}", *shape) for shape in shapes for bits in widths]
    chosen = [(m, _tunable(m)) for m in tokens]
    require_gpu("bench tune")
    if torch.cuda.is_current_stream_capturing():
        raise RequestError("launch shapes cannot be measured while a CUDA graph is captured; run bench tune before")
    subjects = [
        (spec, m, tunable)
        for spec in specs
        for m, tunable in chosen
        if isinstance(spec, GroupedIntSpec) and not _in_a_computed_shape(spec, m)
    ]
    if not subjects:
        raise RequestError(
            "nothing to choose: the tensor core's kernels for few tokens and asynchronous ones run in computed shapes"
        )
    name, file, found = torch.cuda.get_device_name(), "", []
    for spec, m, tunable in subjects:
        with torch.inference_mode():
            row, count = _fastest(tunable, spec, m)
        file = str(remember([row], name))  # what is found is not lost with what is interrupted
        found.append(_report(row, count))
        if progress is not None:
            progress(found[-1])
        torch.cuda.empty_cache()
    return {"device": name, "file": file, "rows": found}


def _in_a_computed_shape(spec: GroupedIntSpec, n_tokens: int) -> bool:
    """Whether a kernel takes the product whose launch shape is not looked up."""
    x = torch.empty(n_tokens, spec.in_features, dtype=torch.bfloat16, device="cuda")
    few = n_tokens <= MAX_GEMV_TOKENS and has_mma_gemv(n_tokens, spec) and multiplies_bytes(x.device)
    return few or counts_tokens(n_tokens, spec, x.device) or has_few_rows(x, spec) or has_wide_product(x, spec)


def _tunable(tokens: int) -> Tunable:
    for tunable in TUNABLES:
        if 1 <= tokens <= tunable.most_tokens:
            return tunable
    most = max(tunable.most_tokens for tunable in TUNABLES)
    raise RequestError(f"{tokens} tokens have no launch shape to choose; use 1 to {most}")


def _fastest(tunable: Tunable, spec: GroupedIntSpec, n_tokens: int) -> tuple[Row, int]:
    """The winner, and how many candidates there were."""
    stored = random_tensors(spec, "cuda")
    tensors = to_planar(spec, stored)
    x = torch.randn(n_tokens, spec.in_features, device="cuda", dtype=torch.bfloat16)
    expected = x.double() @ unpack(spec, stored).dequantize().double().t()
    count = n_copies(sum(tensor.nbytes for tensor in tensors.values()))
    copies = [tensors] + [{name: tensor.clone() for name, tensor in tensors.items()} for _ in range(count - 1)]
    computed = tunable.computed(spec, n_tokens)
    candidates = tunable.candidates(spec, n_tokens, torch.cuda.get_device_properties(0).multi_processor_count)
    graphs = {}
    for config in dict.fromkeys([computed, *candidates]):
        y = tunable.run(x, spec, tensors, config).double()
        error = float((y - expected).norm() / expected.norm())
        if not error < _WORST:
            raise AssertionError(f"{config}: relative error {error:.2g}")
        calls: list[Call] = [partial(tunable.run, x, spec, each, config) for each in copies]
        graphs[config] = capture(calls)
    times = _medians(graphs, list(graphs), _FIRST_REPLAYS)
    finalists = list(dict.fromkeys([computed, *sorted(times, key=lambda config: times[config])[:_FINALISTS]]))
    times = _medians(graphs, finalists, REPLAYS)
    best = min(times, key=lambda config: times[config])
    if times[best] > _GAIN * times[computed]:
        best = computed
    per_call = {config: time / count for config, time in times.items()}
    row = Row(
        subject=tunable.subject(spec, n_tokens),
        shape=asdict(best),
        microseconds=round(per_call[best], 3),
        computed_microseconds=round(per_call[computed], 3),
    )
    return row, len(graphs)


def _medians(graphs: dict[Any, torch.cuda.CUDAGraph], configs: list[Any], replays: int) -> dict[Any, float]:
    columns = replay_in_turns([graphs[config] for config in configs], replays)
    return {config: percentiles(column)["microseconds"] for config, column in zip(configs, columns, strict=True)}


def _report(row: Row, n_candidates: int) -> dict[str, Any]:
    times = {"microseconds": row.microseconds, "computed_microseconds": row.computed_microseconds}
    return asdict(row.subject) | {"shape": dict(row.shape), **times, "candidates": n_candidates}
