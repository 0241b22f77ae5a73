"""Speed of decoding, one token after the other, with whole models on one GPU: packed, and the same in bfloat16.

Batch 1, greedy, a static cache, the step in a CUDA graph (`runtime.graphs`). Weights are random, of the shape of Llama
3 8B; a folder can be measured instead. Time is the median of replays of the step, which all read the whole model: 2
gigabytes and more do not stay in a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from quantkit.errors import RequestError, did_you_mean
from quantkit.evaluation.gpu_timing import REPLAYS, call_microseconds, environment, percentiles, require_gpu
from quantkit.evaluation.random_models import random_llama
from quantkit.runtime.graphs import GraphDecoder
from quantkit.runtime.loading import load

# What is compared: name, format of the blocks, format of the head. The first is what ratios refer to.
VARIANTS = {
    "bf16": (None, None),
    "int2": ("int2", "int4"),
    "int4": ("int4", "int4"),
    "ptq161": ("ptq161", "int4"),
    "littlebit-0.55": ("littlebit-0.55", "int4"),
}
# eager: transformers' own forward; graph: the same in a CUDA graph; compiled: by torch.compile, in a graph; fused: with
# few launches, in a graph (runtime/fused_steps.py). The last takes the model apart.
STEPS = ("eager", "graph", "compiled", "fused")
PROMPT = 128

Progress = Callable[[dict[str, Any]], object]


def bench_decode(
    variants: Sequence[str] = tuple(VARIANTS),
    folders: Sequence[str] = (),
    context: int = PROMPT,
    max_length: int = 1024,
    steps: Sequence[str] = ("graph", "fused"),
    shape: dict[str, Any] | None = None,
    replays: int = REPLAYS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Milliseconds per token of each variant.

    Args:
        variants: names of `VARIANTS`, or of formats (`random_weights`), which then get a head in 4 bits.
        folders: models to load and measure beside them.
        context: tokens in the cache.
        max_length: tokens the cache has room for; attention on a static cache reads all of it.
        steps: of `STEPS`.
        shape: fields of the config of the random model; None: Llama 3 8B.
        replays: steps that are timed.
        progress: called with each row as soon as it is measured.

    Returns:
        ``environment`` and ``rows``: name, step, milliseconds (median, p10, p90),
        tokens_per_second, gigabytes of weights, speedup over the bf16 row of the same step where there is one.

    Raises:
        RequestError: no CUDA device, an unknown variant or step; whatever `load` raises.
    """
    for step in steps:
        if step not in STEPS:
            raise RequestError(f"unknown step {step!r}; {did_you_mean(step, STEPS)}")
    require_gpu("bench decode")
    rows: list[dict[str, Any]] = []
    for name in (*variants, *folders):
        if name in folders:
            model = load(Path(name), device="cuda")
        else:
            blocks, head = VARIANTS.get(name, (name, "int4"))
            model = random_llama(shape, blocks, head)
        nbytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        for step in sorted(steps, key=STEPS.index):
            row = {
                "name": name,
                "step": step,
                "gigabytes": nbytes / 1e9,
                **_time(model, step, context, max_length, replays),
            }
            base = [each for each in rows if each["name"] == "bf16" and each["step"] == step]
            row["speedup"] = 1.0 if name == "bf16" else None
            if base:
                row["speedup"] = base[0]["milliseconds"] / row["milliseconds"]
            rows.append(row)
            if progress is not None:
                progress(row)
        del model
        torch.cuda.empty_cache()
    return {"environment": environment(), "context": context, "max_length": max_length, "rows": rows}


def _time(model: Any, kind: str, context: int, max_length: int, replays: int) -> dict[str, float]:
    decoder = GraphDecoder(model, max_length, fuse=kind == "fused", compile=kind == "compiled")
    decoder.prefill(torch.arange(context)[None] % 1000)
    step = torch.inference_mode()(decoder._step) if kind == "eager" else decoder.step
    for _ in range(5):
        step()
    found = percentiles([call_microseconds(step) for _ in range(replays)])
    assert decoder.logits is not None
    assert bool(torch.isfinite(decoder.logits).all())
    return {
        "milliseconds": found["microseconds"] / 1e3,
        "p10": found["p10"] / 1e3,
        "p90": found["p90"] / 1e3,
        "tokens_per_second": 1e6 / found["microseconds"],
    }
