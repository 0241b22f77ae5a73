"""The one-row kernels in Triton's interpreter, on CPU tensors. Run by test_interpreter.py in a process of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interpreter_cases import check_sums, hold
from packed_weights import activations, product_and_bound, random_weight, rounding, slice_error

from quantkit.formats.grouped_int import pack
from quantkit.kernels import gemv_triton
from quantkit.kernels.gemv import choose_gemv, gemv_launch, has_gemv
from quantkit.kernels.planar import is_paired, to_planar

WIDTHS = [1, 2, 3, 4, 8]


def run(weight, x, *, bias=None, out_dtype=torch.float32, **shape):
    """The kernel between guard bands, the result filled with NaN before; tiles of four rows, for speed."""
    spec = weight.spec()
    config = replace(choose_gemv(spec), **{"rows": 4, "programs": None} | shape)
    assert is_paired(spec)
    tensors = to_planar(spec, pack(weight))
    out = torch.full((len(x), spec.out_features), float("nan"), dtype=out_dtype)
    inner, check_bands = hold({"x": x, "out": out, **tensors})
    name, grid, arguments = gemv_launch(inner["x"], spec, inner, bias, inner["out"], config)
    getattr(gemv_triton, name)[grid](**arguments, ASM=False)
    check_bands("out")
    return inner["out"].clone()


def check(y, x, weight, bias=None):
    """x within its slices, everything else within the bound of float32 sums."""
    check_sums(y, x, weight, slice_error(x, weight), bias)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width(bits, dtype, symmetric):
    weight = random_weight(bits, 6, 64, (bits,) * 9, symmetric)
    x = activations(bits, 1, weight.spec().in_features, dtype=dtype)
    check(run(weight, x), x, weight)


@pytest.mark.parametrize("group_size", [32, 96, 128, 256])
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_every_group_size(bits, group_size):
    weight = random_weight(bits, 5, group_size, (bits,) * 5)
    x = activations(3, 1, weight.spec().in_features, dtype=torch.float16)
    check(run(weight, x), x, weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 4])
def test_one_group_for_a_row(bits, symmetric):
    """Not between guard bands: the one row of scales is taken as `to_planar` leaves it, strides and all."""
    weight = random_weight(bits, 9, 384, (bits,), symmetric)
    spec, x = weight.spec(), activations(2, 1, 384, dtype=torch.float16)
    out = torch.full((1, 9), float("nan"))
    name, grid, arguments = gemv_launch(x, spec, to_planar(spec, pack(weight)), None, out, choose_gemv(spec))
    getattr(gemv_triton, name)[grid](**arguments, ASM=False)
    check(out, x, weight)


@pytest.mark.parametrize("rows", [4, 8, 16])
def test_every_part_of_the_rows_takes_a_copy_of_its_own(rows):
    weight = random_weight(3, 48, 64, (2,) * 6)
    spec, x = weight.spec(), activations(3, 3, 384, dtype=torch.float16)
    bias = torch.linspace(-1, 1, 48)
    copies = torch.tensor([2, 0, 1], dtype=torch.int32)
    tensors, out = to_planar(spec, pack(weight)), torch.full((1, 48), float("nan"))
    config = replace(choose_gemv(spec), rows=rows, programs=None)
    name, grid, arguments = gemv_launch(x, spec, tensors, bias, out, config, copies)
    getattr(gemv_triton, name)[grid](**arguments, ASM=False)
    every = run(weight, x, bias=bias)
    assert torch.equal(out[0], torch.cat([every[2, :16], every[0, 16:32], every[1, 32:]]))


def test_group_sizes_that_no_pair_of_planes_divides():
    weight = random_weight(0, 17, 48, (2,) * 5)
    assert not has_gemv(torch.zeros(1, 240, dtype=torch.float16), weight.spec())


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_rows_longer_than_the_threads_reach(bits):
    weight = random_weight(bits, 5, 128, (bits,) * 24, False)
    x = activations(4, 1, 24 * 128, dtype=torch.bfloat16)
    check(run(weight, x, rows=8, warps=1), x, weight)


@pytest.mark.parametrize(("bits", "programs"), [(1, 2), (2, 1), (3, 3), (4, 2), (8, 99)])
def test_several_tiles_of_rows_for_one_preparation(bits, programs):
    """Tiles that do not divide among the programs, a ragged last one, and more programs than tiles."""
    weight = random_weight(bits, 17, 64, (bits,) * 9, bits % 2 == 0)
    x = activations(bits, 1, 9 * 64, dtype=torch.float16)
    bias = torch.linspace(-1, 1, 17)
    y = run(weight, x, bias=bias, programs=programs)
    check(y, x, weight, bias)
    assert torch.equal(y, run(weight, x, bias=bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [(6, 8, 5, 7, 8), (8, 7, 8, 7)])
def test_widths_that_share_planes(bits, symmetric, dtype):
    """Of eight bits, in an order of their own."""
    weight = random_weight(5, 3, 64, bits, symmetric)
    x = activations(5, 1, 64 * len(bits), dtype=dtype)
    check(run(weight, x), x, weight)


@pytest.mark.parametrize("out_features", [1, 15])
def test_ragged_rows(out_features):
    weight = random_weight(out_features, out_features, 64, (4,) * 5)
    x = activations(4, 2, 320, dtype=torch.float16)
    check(run(weight, x), x, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bias_and_output_dtype(dtype):
    weight = random_weight(6, 4, 64, (4,) * 9)
    x = activations(6, 2, 576, dtype=torch.float16)
    bias = torch.linspace(-1, 1, 4).to(torch.bfloat16)
    y = run(weight, x, bias=bias, out_dtype=dtype)
    lost = slice_error(x, weight) @ weight.dequantize().double().abs().t()
    product, bound = product_and_bound(x, weight, bias)
    bound = bound + lost
    truncation = 2 if dtype == torch.bfloat16 else 1  # the interpreter truncates to bfloat16 instead of rounding
    assert ((y.double() - product).abs() <= bound + truncation * rounding(product.abs() + bound, dtype)).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, for what is not finite
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_values_of_x(dtype):
    """Zeros give exactly the bias; what is not finite is not finite in the result."""
    weight = random_weight(7, 3, 128, (2,) * 4, False)
    bias = torch.linspace(-1, 1, 3)
    zeros = torch.zeros(1, 512, dtype=dtype)
    assert torch.equal(run(weight, zeros, bias=bias)[0], bias)
    smallest = torch.full((1, 512), torch.finfo(dtype).smallest_normal, dtype=dtype)
    check(run(weight, smallest), smallest, weight)
    largest = torch.full((1, 512), torch.finfo(torch.float16).max, dtype=torch.float32).to(dtype)
    check(run(weight, largest), largest, weight)
    for value in (float("nan"), float("inf")):
        broken = zeros.clone()
        broken[0, 300] = value
        assert not run(weight, broken).isfinite().any()
