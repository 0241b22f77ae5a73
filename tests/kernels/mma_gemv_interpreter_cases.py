"""The tensor core's one-row kernel in Triton's interpreter. Run by test_interpreter.py in a process of its own."""

from __future__ import annotations

import pytest
import torch
from interpreter_cases import check_sums, hold
from packed_weights import activations, pair_error, random_weight

from quantkit.formats.grouped_int import pack
from quantkit.kernels.mma_gemv import MmaGemvConfig, mma_gemv_launch
from quantkit.kernels.mma_gemv_triton import mma_gemv_kernel
from quantkit.kernels.planar import to_planar


def run(weight, x, *, bias=None, warps=1, rows=16, programs=2):
    """The kernel between guard bands, the result filled with NaN before."""
    spec = weight.spec()
    out = torch.full((len(x), spec.out_features), float("nan"))
    inner, check_bands = hold({"x": x, "out": out, **to_planar(spec, pack(weight))})
    config = MmaGemvConfig(warps=warps, rows=rows, programs=programs)
    grid, arguments = mma_gemv_launch(inner["x"], spec, inner, bias, inner["out"], config)
    mma_gemv_kernel[grid](**arguments, ASM=False)
    check_bands("out")
    return inner["out"].clone()


def check(y, x, weight, bias=None):
    check_sums(y, x, weight, pair_error(x, weight, 64), bias)


@pytest.mark.parametrize(("dtype", "symmetric"), [(torch.float16, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("bits", [2, 4])
def test_every_width(bits, dtype, symmetric):
    weight = random_weight(bits, 5, 128, (bits,) * 8, symmetric)
    x = activations(bits, 2, 1024, dtype=dtype)
    check(run(weight, x, warps=2, programs=1), x, weight)


@pytest.mark.parametrize(("bits", "group_size", "n_groups"), [(4, 256, 3), (2, 1536, 1), (4, 384, 2)])
def test_other_groups_and_columns_that_end_within_a_warp(bits, group_size, n_groups):
    weight = random_weight(1, 5, group_size, (bits,) * n_groups, bits == 2)
    x = activations(2, 1, group_size * n_groups, dtype=torch.float16)
    check(run(weight, x, warps=2), x, weight)


@pytest.mark.parametrize(("warps", "rows", "programs"), [(1, 16, 2), (2, 32, 1), (4, 16, 9)])
def test_every_shape_of_launch(warps, rows, programs):
    """Several tiles for a program, a ragged last tile, a warp's columns one after the other, warps beyond their end."""
    weight = random_weight(3, 37, 128, (2,) * 8, False)
    x = activations(4, 1, 1024, dtype=torch.bfloat16)
    bias = torch.linspace(-1, 1, 37)
    check(run(weight, x, bias=bias, warps=warps, rows=rows, programs=programs), x, weight, bias)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, for what is not finite
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_values_of_x(dtype):
    """Zeros give exactly the bias; what is not finite is not finite in the result."""
    weight = random_weight(7, 3, 128, (4,) * 4, False)
    bias = torch.linspace(-1, 1, 3)
    zeros = torch.zeros(1, 512, dtype=dtype)
    assert torch.equal(run(weight, zeros, bias=bias)[0], bias)
    for number in (torch.finfo(dtype).smallest_normal, torch.finfo(torch.float16).max):
        x = torch.full((1, 512), number, dtype=torch.float32).to(dtype)
        check(run(weight, x), x, weight)
    for value in (float("nan"), float("inf")):
        broken = zeros.clone()
        broken[0, 300] = value
        assert not run(weight, broken).isfinite().any()
