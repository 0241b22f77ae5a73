"""Speed of attention over a quantized cache on a GPU, beside the stock 16-bit kernels on the same tensors.

One decode step of one sequence: queries of one token, 8 KV heads, head dimension 128. Every measured graph works
through copies of the cache that together exceed the L2 cache by far, so what is read comes from memory. Times are
those of `gpu_timing`. Every output is compared with attention in float32 first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.algorithms.kv.registry import parse_kv_spec
from quantkit.evaluation.gpu_timing import REPLAYS, Call, Competitor, measure, n_copies, require_gpu
from quantkit.kernels.kv_decode import DecodeConfig, Decoder
from quantkit.runtime.kv_sequence import SequenceCache

HEADS, HEAD_DIM = 8, 128
_STEP = 4096  # tokens that are appended at a time


def bench_attention(
    contexts: Sequence[int] = (8192, 32768, 131072),
    groups: Sequence[int] = (4, 8),
    specs: Sequence[str] = ("akvq-vl:bits=4", "akvq-vl", "zipcache", "int4", "int2"),
    replays: int = REPLAYS,
    progress: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Times of a decode step, by context length and query heads per KV head.

    Args:
        contexts: tokens in the cache.
        groups: query heads for each of the 8 KV heads.
        specs: KV policies.
        replays: of every graph, that are timed.
        progress: called with each cell as soon as it is measured.

    Raises:
        RequestError: no CUDA device.
    """
    require_gpu("bench attention")
    cells = []
    for context in contexts:
        keys, values = random_cache(context)
        for group in groups:
            generator = torch.Generator("cuda").manual_seed(group)
            query = torch.randn(HEADS, group, HEAD_DIM, generator=generator, device="cuda", dtype=torch.bfloat16)
            competitors = [*stock(query, keys, values), *(quantized(spec, query, keys, values) for spec in specs)]
            cells.append({"context": context, "group": group, "results": measure(competitors, replays)})
            if progress is not None:
                progress(cells[-1])
            del competitors
    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "heads": HEADS, "cells": cells}


def random_cache(context: int) -> tuple[Tensor, Tensor]:
    """Keys and values [HEADS, context, HEAD_DIM], bfloat16, random."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (HEADS, context, HEAD_DIM)
    keys, values = (torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return keys, values


def stock(query: Tensor, keys: Tensor, values: Tensor) -> list[Competitor]:
    """The flash and cuDNN kernels of torch, bfloat16."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    nbytes = keys.nbytes + values.nbytes
    copies = [(keys[None].clone(), values[None].clone()) for _ in range(n_copies(nbytes))]
    rows = query.reshape(1, -1, 1, HEAD_DIM)

    def call(backend: Any, k: Tensor, v: Tensor) -> Call:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(rows, k, v, enable_gqa=True)

        return run

    backends = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
    return [
        Competitor(name, [call(backend, *copy) for copy in copies], nbytes)
        for name, backend in backends.items()
        if _runs(call(backend, *copies[0]))
    ]


def _runs(call: Call) -> bool:
    try:
        call()
    except RuntimeError:  # this build or device has no such kernel
        return False
    return True


def quantized(
    spec: str, query: Tensor, keys: Tensor, values: Tensor, config: DecodeConfig | None = None, name: str = ""
) -> Competitor:
    """Attention of a policy's cache over the packed pages; its newest tokens are in 16 bits."""
    policy = parse_kv_spec(spec).layer_policy(0)
    sequence = SequenceCache(policy, HEADS, HEAD_DIM, torch.float16, keys.device)
    for start in range(0, keys.shape[1], _STEP):
        here = slice(start, start + _STEP)
        sequence.append(keys[:, here], values[:, here], keys[:, None, here].float())
    nbytes = sequence.nbytes
    calls = [_call(sequence, query, config)]
    calls += [_call(sequence.clone(), query, config) for _ in range(n_copies(nbytes) - 1)]
    expected = _dense(sequence, query)
    error = float((calls[0]().float() - expected).norm() / expected.norm())
    assert error < 5e-3, (spec, error)
    return Competitor(name or spec, calls, nbytes)


def _call(sequence: SequenceCache, query: Tensor, config: DecodeConfig | None) -> Call:
    cache, decoder = sequence.packed(), Decoder()
    return lambda: decoder.run(query, HEAD_DIM**-0.5, cache, torch.bfloat16, config=config).output


def _dense(sequence: SequenceCache, query: Tensor) -> Tensor:
    """Attention on the decoded tokens, float32."""
    keys, values = sequence.dense()
    scores = query.float() * HEAD_DIM**-0.5 @ keys.mT
    output: Tensor = scores.softmax(-1) @ values
    return output
