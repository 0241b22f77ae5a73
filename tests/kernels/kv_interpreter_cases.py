"""The decode kernels in Triton's interpreter, on CPU tensors. Run by test_interpreter.py in a process of its own."""

from __future__ import annotations

import pytest
import torch
from kv_caches import filled, reference

from quantkit.kernels import kv_attention_triton as kernels
from quantkit.kernels.kv_decode import DecodeConfig, decode_launches


def run(case, splits: int = 2, n_pages_more: int = 0):
    """The kernels with results and workspace filled with NaN; against attention on decoded tokens in float64."""
    shape = case.query.shape
    result, lse = torch.full(shape, float("nan")), torch.full(shape[:2], float("nan"))
    configs = [DecodeConfig(splits=splits, warps=1, stages=1)] * len(case.segments)
    launches = decode_launches(
        case.query, case.scaling, case.segments, case.floats, case.lengths, case.basis, result, lse, configs
    )
    launches[0][2]["outputs"].fill_(float("nan"))
    for name, grid, arguments in launches:
        extra = {"ASM": False} if name == "decode_kernel" else {}
        getattr(kernels, name)[grid](**arguments, **extra)
    output, expected = reference(case)
    # float16 operands: query, probabilities and scales of values are rounded once each, 2^-11
    assert torch.allclose(lse.double(), expected, atol=4e-3)
    assert float((result - output).norm() / output.norm()) <= 2e-3


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("spec", ["int4", "akvq-vl"])
def test_widths_and_grids(spec, bits):
    run(filled(f"{spec}:bits={bits}", n=300))


@pytest.mark.parametrize("spec", ["zipcache:share=0.3", "akvq-vl:centre=0", "int2:rotate=yes"])
def test_policies(spec):
    run(filled(spec, n=400))


@pytest.mark.parametrize("n", [65, 159, 160, 161, 400])
@pytest.mark.parametrize("splits", [1, 3, 5])
def test_ragged_pages_and_empty_splits(n, splits):
    run(filled("akvq-vl:pivots=1", n=n), splits)


@pytest.mark.parametrize("group", [1, 5, 8, 12])
def test_query_heads(group):
    run(filled("int4", n=200, group=group))


def test_head_of_128():
    run(filled("akvq-vl", n=200, heads=1, head_dim=128))
