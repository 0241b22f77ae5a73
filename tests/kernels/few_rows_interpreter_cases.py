"""The kernel for few rows in Triton's interpreter, on CPU tensors. Run by test_interpreter.py in its own process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interpreter_cases import check_sums, hold
from packed_weights import activations, pair_error, random_weight

from quantkit.formats.grouped_int import pack
from quantkit.kernels.few_rows import FewRowsConfig, choose_few_rows, few_rows_launch, is_few_rows_weight, is_possible
from quantkit.kernels.few_rows_triton import few_rows_kernel
from quantkit.kernels.planar import to_planar


def run(weight, x, *, bias=None, out_dtype=torch.float32, **shape):
    """The kernel between guard bands, the result filled with NaN before; twice where it leaves counters behind."""
    spec = weight.spec()
    config = replace(choose_few_rows(spec), **{"programs": 2, "splits": 1} | shape)
    assert is_few_rows_weight(spec)
    tensors = to_planar(spec, pack(weight))
    out = torch.full((len(x), spec.out_features), float("nan"), dtype=out_dtype)
    inner, check_bands = hold({"x": x, "out": out, **tensors})
    for _ in range(1 if config.splits == 1 else 2):
        inner["out"].fill_(float("nan"))
        grid, arguments = few_rows_launch(inner["x"], spec, inner, bias, inner["out"], config)
        few_rows_kernel[grid](**arguments, ASM=False)
        check_bands("out")  # the counters are zero again
    return inner["out"].clone()


def check(y, x, weight, config_loads, bias=None):
    check_sums(y, x, weight, pair_error(x, weight, 32 * config_loads), bias)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "loads"), [(1, 1), (2, 1), (2, 2), (4, 2), (8, 2)])
def test_every_width(bits, loads, dtype, symmetric):
    weight = random_weight(bits, 5, 128, (bits,) * 8, symmetric)
    x = activations(bits, 8, weight.spec().in_features, dtype=dtype)
    check(run(weight, x, loads=loads, warps=8, tiles=1), x, weight, loads)


@pytest.mark.parametrize(("m", "splits", "warps"), [(1, 1, 4), (7, 3, 2), (9, 2, 2), (16, 4, 1)])
def test_rows_of_x_and_shared_rows(m, splits, warps):
    weight = random_weight(m, 11, 128, (4,) * 8)
    x = activations(m, m, 1024, dtype=torch.bfloat16)
    check(run(weight, x, loads=2, splits=splits, warps=warps, tiles=1), x, weight, 2)


@pytest.mark.parametrize(("tiles", "programs"), [(1, 3), (2, 50), (8, 1)])
def test_tiles(tiles, programs):
    weight = random_weight(3, 73, 128, (2,) * 4)
    x = activations(3, 3, 512, dtype=torch.float16)
    bias = torch.linspace(-1, 1, 73)
    result = run(weight, x, bias=bias, warps=2, loads=1, tiles=tiles, programs=programs, out_dtype=torch.float16)
    check(result, x, weight, 1, bias)


@pytest.mark.parametrize("group_size", [64, 256, 512])
def test_every_group_size(group_size):
    weight = random_weight(5, 9, group_size, (2,) * 3)
    x = activations(5, 5, 3 * group_size, dtype=torch.float16)
    loads = choose_few_rows(weight.spec()).loads
    bias = torch.linspace(-1, 1, 45).view(5, 9)
    check(run(weight, x, bias=bias), x, weight, loads, bias)


def test_same_bits_however_rows_are_shared_out():
    weight = random_weight(7, 15, 128, (4,) * 8)
    x = activations(8, 8, 1024, dtype=torch.bfloat16)
    first = run(weight, x, loads=2, warps=4, tiles=1)
    assert torch.equal(first, run(weight, x, loads=2, warps=4, tiles=4, programs=7))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_infinities_and_nan_stay_in_their_row():
    weight = random_weight(7, 16, 128, (4,) * 4)
    x = activations(8, 4, 512, dtype=torch.bfloat16)
    clean = run(weight, x)
    x[1, 5], x[3, 400] = float("inf"), float("nan")
    y = run(weight, x)
    assert not y[1].isfinite().any()
    assert not y[3].isfinite().any()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


def test_impossible_shapes():
    spec = random_weight(7, 16, 128, (4,) * 4).spec()
    fits = FewRowsConfig(warps=2, loads=2, tiles=1)
    assert is_possible(fits, spec)
    assert not any(is_possible(replace(fits, **other), spec) for other in ({"warps": 1}, {"loads": 4}, {"tiles": 3}))
