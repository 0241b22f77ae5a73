"""Times ``model.generate`` with quantized KV caches against the stock 16-bit cache, in milliseconds per token.

    python benchmarks/bench_kv_generate.py --contexts 8192 32768 --kv akvq-vl:bits=4 akvq-vl

A model of Llama 3 8B's shape with few layers and random weights in bfloat16, one sequence, greedy, not compiled. The
stock cache runs twice: with the attention that torch chooses, and with its flash kernel alone. The variants take turns;
each turn is one call of `generate`, whose tokens are timed on the host as they come: `generate` waits for each of them.
Beside the median stands what the host and the device need for a step: a loop of the model's forward without waiting,
and the sum of its kernels as the profiler sees them. A line of JSON for each variant.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout without installation

import quantkit
from quantkit.evaluation.random_models import LLAMA_3_8B, random_llama

WARM_UP = 4  # tokens of a turn that do not count
STEPS = 16  # of the loops that are profiled


class Clock:
    """A stopping criterion that never stops: notes when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def make_cache(model: Any, spec: str) -> Any:
    """A cache of one of the variants, and the attention implementation that goes with it."""
    from transformers import DynamicCache

    if spec.startswith("stock"):
        model.config._attn_implementation = "sdpa"
        return DynamicCache(config=model.config)
    return quantkit.kv_cache(model, spec)


def backend(spec: str) -> AbstractContextManager[None]:
    """The flash kernel alone for "stock flash"."""
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if spec == "stock flash" else nullcontext()


def turn(model: Any, ids: Tensor, spec: str, n_tokens: int) -> tuple[list[float], Any]:
    """Milliseconds of each token of one call of `generate`, and the cache."""
    from transformers import StoppingCriteriaList

    clock, cache = Clock(), make_cache(model, spec)
    with backend(spec):
        model.generate(
            ids,
            past_key_values=cache,
            max_new_tokens=n_tokens + WARM_UP,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    times = clock.times[WARM_UP - 1 :]
    return [1e3 * (after - before) for before, after in pairwise(times)], cache


@torch.inference_mode()
def steps(model: Any, ids: Tensor, cache: Any, spec: str) -> dict[str, float]:
    """Milliseconds of a step that goes on from `cache`: of the host, and of the kernels."""
    token, cuda = ids[:, -1:], ids.is_cuda

    def loop() -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            model(token, past_key_values=cache)
        return 1e3 * (time.perf_counter() - start) / STEPS

    with backend(spec):
        found = {"host_ms": statistics.median(synchronized(loop) for _ in range(3))}
        if cuda:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                synchronized(loop)
            kernels = sum(event.self_device_time_total for event in profile.key_averages())
            found["kernels_ms"] = kernels / 1e3 / STEPS
    return found


def synchronized(loop: Callable[[], float]) -> float:
    """What `loop` returns, with nothing of others on the device before and nothing left after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    found = loop()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--kv", nargs="+", default=["akvq-vl:bits=4", "akvq-vl"])
    parser.add_argument("--stock", nargs="*", default=["stock flash", "stock"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="timed tokens of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a tiny model: to try the script itself")
    arguments = parser.parse_args()
    shape = LLAMA_3_8B | {"num_hidden_layers": arguments.layers, "max_position_embeddings": 1 << 17}
    if arguments.small:
        shape |= {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 512, "head_dim": 128}
    model = random_llama(shape, device="cuda" if torch.cuda.is_available() else "cpu")
    model.generation_config.eos_token_id = None
    for context in arguments.contexts:
        ids = torch.randint(shape["vocab_size"], (1, context), generator=torch.Generator().manual_seed(0))
        ids = ids.to(model.device)
        found: dict[str, list[float]] = {spec: [] for spec in (*arguments.kv, *arguments.stock)}
        for _ in range(arguments.turns):
            for spec, times in found.items():
                times += turn(model, ids, spec, arguments.tokens)[0]
        for spec, times in found.items():
            cache = turn(model, ids, spec, 1)[1]
            ordered = sorted(times)
            row = {
                "context": context,
                "cache": spec,
                "ms_per_token": statistics.median(times),
                "mean_ms": statistics.fmean(times),
                "p10_ms": ordered[len(times) // 10],
                "p90_ms": ordered[len(times) * 9 // 10],
                **steps(model, ids, cache, spec),
            }
            print(json.dumps({name: round(x, 3) if isinstance(x, float) else x for name, x in row.items()}), flush=True)
            del cache


if __name__ == "__main__":
    main()
