"""Compiles the kernels of a decoding step, and the probes, for an H100/H200 without a GPU."""

from __future__ import annotations

import os
import re

import pytest
import torch

from quantkit.kernels.decode_step import WARPS, tokens_at_a_time

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton was imported as interpreter"),
]

EARLY = {"PDL": True, "launch_pdl": True}


def check(compile_kernel, kernel, grid, arguments, **constants):
    metadata, sass, resources = compile_kernel(kernel, grid, arguments, **constants)
    assert metadata.shared <= 232448
    assert resources["STACK"] == 0  # nothing is spilled
    return sass


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("group", "head_dim"), [(4, 128), (8, 64)])
def test_attention(compile_for_sm90, group, head_dim, dtype):
    from quantkit.kernels.decode_step_triton import attention_kernel

    cache, table, numbers = torch.zeros(8, 64, head_dim, dtype=dtype), torch.zeros(64, head_dim), torch.zeros(64)
    integers = torch.zeros(8, dtype=torch.int32)
    names = ("qkv", "cos", "sin", "keys", "values", "out", "partial", "counters", "length", "scale", "max_length")
    values = (cache, table, table, cache, cache, cache, numbers, integers, integers, 0.1, 1024)
    sass = check(
        compile_for_sm90, attention_kernel, (8, 8), dict(zip(names, values, strict=True)),
        GROUP=group, ROWS=16, HEAD_DIM=head_dim, BLOCK=tokens_at_a_time(head_dim, dtype), SPLITS=8, WIDE=False,
        num_warps=WARPS, **EARLY,
    )  # fmt: skip
    assert re.search(r"\bHG?MMA\.", sass)
    assert re.search(r"LDG\S*\.128", sass)
    assert "ACQBULK" in sass  # waits for the kernel before
    assert "PREEXIT" in sass  # and lets the next one start


@pytest.mark.parametrize("update", [True, False])
def test_add_norm_and_gated(compile_for_sm90, update):
    from quantkit.kernels.decode_step_triton import add_norm_kernel, gated_kernel

    x = torch.zeros(1, 8192, dtype=torch.bfloat16)
    norm = {"residual": x, "update": x, "weight": x, "out": x, "n": 4096, "eps": 1e-5}
    sass = check(compile_for_sm90, add_norm_kernel, (1,), norm, HAS_UPDATE=update, BLOCK=4096, num_warps=8, **EARLY)
    assert "LDG.E.128" in sass
    gate = {"gate_up": x, "out": x, "n": 4096}
    assert "LDG" in check(compile_for_sm90, gated_kernel, (1, 4), gate, COLUMNS=1024, num_warps=4, **EARLY)


def test_pick(compile_for_sm90):
    from quantkit.kernels.decode_step_triton import pick_kernel

    logits, numbers, integers = (
        torch.zeros(64, dtype=torch.bfloat16),
        torch.zeros(64),
        torch.zeros(64, dtype=torch.int32),
    )
    values = (logits, torch.zeros(1, 1, dtype=torch.long), numbers, integers, integers, 128256)
    names = ("logits", "token", "highest", "places", "counter", "n")
    given = dict(zip(names, values, strict=True))
    assert "ATOM" in check(compile_for_sm90, pick_kernel, (64,), given, COLUMNS=1024, PROGRAMS=64, num_warps=4, **EARLY)


def test_probes(compile_for_sm90):
    from quantkit.kernels.probe_triton import empty_kernel, read_kernel

    check(compile_for_sm90, empty_kernel, (1,), {}, num_warps=1)
    numbers = torch.zeros(8, dtype=torch.int32)
    read = {"source": numbers, "sink": numbers, "per_program": 16}
    assert "LDG.E.128" in check(compile_for_sm90, read_kernel, (1,), read, BLOCK=4096, num_warps=8)


@pytest.mark.parametrize("every", [True, False])
def test_gather(compile_for_sm90, every):
    from quantkit.kernels.gather_triton import gather_kernel

    x, index, numbers = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.int32), torch.zeros(64)
    given = {"values": x, "more": x, "index": index, "scales": numbers, "bias": x, "out": x, "n": 1 << 16}
    options = {"HAS_MORE": every, "HAS_SCALES": every, "HAS_BIAS": every, "COLUMNS": 512, "num_warps": 4, **EARLY}
    check(compile_for_sm90, gather_kernel, (1,), given, **options)
