"""One row of x times several widths, in Triton's interpreter, on CPU tensors. Run by test_interpreter.py."""

from __future__ import annotations

import pytest
import torch
from interpreter_cases import check_sums, hold
from packed_weights import activations, random_weight, rounding, slice_error

from quantkit.formats.grouped_int import pack
from quantkit.kernels.mixed_cut_triton import cut_kernel
from quantkit.kernels.mixed_rows import MixedConfig, cut_launch, has_mixed_rows, new_ready, rows_launch
from quantkit.kernels.mixed_rows_triton import mixed_rows_kernel
from quantkit.kernels.planar import to_planar


def run(weight, x, *, bias=None, out_dtype=torch.float32, warps=1, own=2, ahead=False):
    """Both kernels, everything between guard bands, what they write filled with NaN (integers: the largest) before."""
    spec = weight.spec()
    assert has_mixed_rows(x, spec)
    ready, numbers = new_ready(len(x), spec, x.device)
    buffers = {"x": x, **to_planar(spec, pack(weight))}
    buffers |= {"ready": ready.fill_(torch.iinfo(torch.int32).max), "numbers": numbers.fill_(float("nan"))}
    buffers["out"] = torch.full((len(x), spec.out_features), float("nan"), dtype=out_dtype)
    inner, check_bands = hold(buffers)
    grid, arguments = cut_launch(inner["x"], spec, inner, inner["ready"], inner["numbers"])
    cut_kernel[grid](**arguments, ASM=False)
    config = MixedConfig(warps=warps, own=own, ahead=ahead)
    grid, arguments = rows_launch(inner["ready"], inner["numbers"], spec, inner, bias, inner["out"], config)
    mixed_rows_kernel[grid](**arguments, ASM=False)
    check_bands("ready", "numbers", "out")
    return inner["out"].clone()


def check(y, x, weight, bias=None):
    check_sums(y, x, weight, slice_error(x, weight, chunks=True), bias)


@pytest.mark.parametrize(
    ("bits", "dtype", "symmetric"),
    [
        ((1, 2, 3, 2), torch.bfloat16, False),
        ((4, 2, 3), torch.float16, True),
        ((6, 3, 2, 8, 4, 1), torch.float16, False),
        ((2, 3, 2), torch.bfloat16, True),
    ],
)
def test_mixed_widths(bits, dtype, symmetric):
    weight = random_weight(len(bits), 9, 64, bits, symmetric)
    x = activations(1, 2, weight.spec().in_features, dtype=dtype)
    check(run(weight, x), x, weight)


@pytest.mark.parametrize("group_size", [32, 96, 128, 256])
@pytest.mark.parametrize("bits", [(2, 1, 3), (8, 4)])
def test_every_group_size(bits, group_size):
    weight = random_weight(3, 5, group_size, bits)
    x = activations(3, 1, weight.spec().in_features, dtype=torch.float16)
    check(run(weight, x), x, weight)


@pytest.mark.parametrize(("warps", "own", "ahead"), [(2, 4, True), (1, 2, False)])
def test_launch_shapes(warps, own, ahead):
    """Warps without columns, several steps along a row, a last tile that is not full; the order of sums differs."""
    weight = random_weight(3, 37, 128, (1, 2, 2, 3) * 2)
    x = activations(3, 1, weight.spec().in_features, dtype=torch.bfloat16)
    bias = torch.linspace(-1, 1, 37)
    check(run(weight, x, bias=bias, warps=warps, own=own, ahead=ahead), x, weight, bias)


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16])
def test_output_dtype(out_dtype):
    weight = random_weight(2, 9, 64, (2, 4))
    x = activations(5, 1, 128, dtype=torch.float16)
    bias = torch.linspace(-1, 1, 9).to(torch.bfloat16)
    y = run(weight, x, bias=bias, out_dtype=out_dtype).double()
    exact = run(weight, x, bias=bias).double()
    truncation = 2 if out_dtype == torch.bfloat16 else 1  # the interpreter truncates to bfloat16 instead of rounding
    assert ((y - exact).abs() <= truncation * rounding(exact, out_dtype)).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, for what is not finite
def test_extreme_values_of_x():
    """Zeros give exactly the bias; what is not finite is not finite in the result."""
    weight = random_weight(7, 3, 128, (2, 3), False)
    bias = torch.linspace(-1, 1, 3)
    zeros = torch.zeros(1, 256, dtype=torch.bfloat16)
    assert torch.equal(run(weight, zeros, bias=bias)[0], bias)
    largest = torch.full((1, 256), torch.finfo(torch.float16).max, dtype=torch.float16)
    check(run(weight, largest), largest, weight)
    for value in (float("nan"), float("inf")):
        broken = zeros.clone()
        broken[0, 200] = value
        assert not run(weight, broken).isfinite().any()
