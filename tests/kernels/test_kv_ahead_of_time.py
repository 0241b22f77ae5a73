"""Compiles the decode kernels for an H100/H200 (sm_90) without a GPU and reads the machine code."""

from __future__ import annotations

import os
import re

import pytest
import torch
from kv_caches import filled

from quantkit.kernels.kv_decode import ON_DEVICE, Step, choose_config, decode_launches, work_size

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton was imported as interpreter"),
]


def loops_with_products(sass: str) -> str:
    """The lines of loops that multiply on tensor cores: from the target of a jump back to the jump."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/(.*)$", sass, re.MULTILINE)
    found = []
    for address, text in lines:
        jump = re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < int(address, 16):
            body = [line for at, line in lines if int(jump[1], 16) <= int(at, 16) <= int(address, 16)]
            found += body if any("HMMA" in line for line in body) else []
    assert found
    return "\n".join(found)


@pytest.mark.parametrize("spec", ["akvq-vl", "int4", "zipcache:share=0.5"])
def test_decode(compile_for_sm90, spec):
    from quantkit.kernels import kv_attention_triton as kernels

    case = filled(spec, n=600, heads=1, head_dim=128)
    query = case.query.half()
    config = choose_config(case.cache.pages)
    result, lse = torch.zeros(query.shape), torch.zeros(query.shape[:2])
    work = torch.zeros(work_size(query, case.cache, config))
    new = (query[:, :1], query[:, 1:2])
    step = Step(query, *new, result, lse, work)
    for name, grid, arguments in decode_launches(step, 1.0, case.cache, config):
        metadata, sass, resources = compile_for_sm90(getattr(kernels, name), grid, arguments, **ON_DEVICE)
        assert metadata.shared <= 232448
        # two widths in one kernel fill the registers of its one warp: Triton 3.9 spills a few, outside of the loops
        assert resources["STACK"] <= (16 if len(case.cache.pages) > 1 else 0), name
        if name == "decode_kernel":
            assert not re.search(r"\b(LDL|STL)\b", loops_with_products(sass))
            assert re.search(r"\bHMMA\.", sass)
            assert "LDGSTS.E.BYPASS.128" in sass  # words of keys and values: asynchronous copies of 16 bytes
            assert not re.search(r"\bI2F", sass.split("HMMA")[1])  # no conversion per code


@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("spec", ["akvq-vl", "int4"])
def test_append(compile_for_sm90, spec, which):
    from quantkit.kernels.kv_append import append_launch
    from quantkit.kernels.kv_append_triton import append_kernel

    case = filled(spec, n=200, heads=1, head_dim=128)
    pages = case.cache.pages[0]
    options = {"rotate": case.cache.rotate_keys, "mean": None, "channel_scales": None, "clip": 1.0}
    tokens = torch.zeros(1, 32, 128, dtype=torch.float16)
    grid, arguments = append_launch(which, tokens, 128, pages.tensors, pages.spec, **options)
    metadata, _, resources = compile_for_sm90(append_kernel, grid, arguments)
    assert metadata.shared <= 232448
    assert resources["STACK"] == 0
