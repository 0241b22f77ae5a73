"""One row of x in slices, in Triton's interpreter, on CPU tensors. Run by test_interpreter.py."""

from __future__ import annotations

import pytest
import torch
from interpreter_cases import edges_untouched, guarded
from packed_weights import activations, product_and_bound, random_weight, rounding, slice_error

from quantkit.formats.grouped_int import pack
from quantkit.kernels.planar import to_planar
from quantkit.kernels.sliced import SlicedConfig, has_sliced, new_slices, product_launch, slice_launch, slice_table
from quantkit.kernels.sliced_triton import slice_kernel, sliced_product_kernel

PLAIN = SlicedConfig(rows=4, warps=1, lanes=32)


def reading(seed, weights, n_columns, dtype):
    """Columns of x in any order, some twice, some absent (-1), with scales that float16 holds."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [weight.spec().in_features for weight in weights]
    columns = [torch.randint(-1, n_columns, (size,), generator=generator) for size in sizes]
    return columns, [torch.randn(size, generator=generator).half().float() for size in sizes]


def product(weights, x, tables, bias=None, *, starts=(), config=PLAIN, out_dtype=torch.float32):
    """Both kernels, everything between guard bands, what they write filled with NaN (integers: the largest) before."""
    specs = [weight.spec() for weight in weights]
    assert has_sliced(specs)
    tensors = [to_planar(spec, pack(weight)) for spec, weight in zip(specs, weights, strict=True)]
    places, factors = (
        torch.stack(parts) for parts in zip(*(slice_table(specs, *table) for table in tables), strict=True)
    )
    slices, numbers = new_slices(specs, places)
    slices.fill_(torch.iinfo(torch.int32).max)
    buffers = {"x": x, "places": places, "factors": factors, "slices": slices, "numbers": numbers.fill_(float("nan"))}
    buffers["out"] = torch.full((1, specs[0].out_features), float("nan"), dtype=out_dtype)
    buffers |= {f"{name}{part}": tensor for part, each in enumerate(tensors) for name, tensor in each.items()}
    held = {name: guarded(tensor) for name, tensor in buffers.items()}
    before = {name: whole.clone() for name, (_, whole) in held.items()}
    inner = {name: tensor for name, (tensor, _) in held.items()}
    sliced = inner["slices"], inner["numbers"]
    grid, arguments = slice_launch(inner["x"], specs, inner["places"], inner["factors"], *sliced)
    slice_kernel[grid](**arguments)
    parts = [{name: inner[f"{name}{part}"] for name in each} for part, each in enumerate(tensors)]
    grid, arguments = product_launch(sliced, specs, parts, bias, inner["out"], starts, config)
    sliced_product_kernel[grid](**arguments, ASM=False)
    assert all(edges_untouched(whole, before[name]) for name, (_, whole) in held.items())
    unchanged = set(buffers) - {"slices", "numbers", "out"}
    assert all(torch.equal(inner[name].view(torch.uint8), buffers[name].view(torch.uint8)) for name in unchanged)
    return inner["out"].clone()


def check(y, x, weights, tables, bias=None, starts=()):
    """Each part of the rows within the slices of its copy of x, and within the bound of float32 sums."""
    bounds = [0, *starts, y.shape[1]]
    for (columns, scales), first, last in zip(tables, bounds, bounds[1:], strict=False):
        expected, allowed = (0.0 if bias is None else bias.double()), 0.0
        for weight, order, scale in zip(weights, columns, scales, strict=True):
            own = torch.where(order < 0, 0.0, x.double()[:, order.clamp(min=0)] * scale.double())
            exact, bound = product_and_bound(own, weight)
            bound = bound + slice_error(own, weight) @ weight.dequantize().double().abs().t() + 2.0**-20 * bound
            expected, allowed = expected + exact, allowed + bound
        allowed = allowed + 2.0**-22 * (expected.abs() + allowed)
        allowed = allowed + rounding(expected.abs() + allowed, y.dtype)
        assert ((y.double() - expected).abs() <= allowed)[:, first:last].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_signs_beside_every_width(bits, dtype):
    weights = [random_weight(bits, 9, 384, (1,)), random_weight(bits + 1, 9, 64, (bits,) * 3, bits == 2)]
    x = activations(bits, 1, 500, dtype=dtype)
    tables = [reading(bits, weights, 500, dtype)]
    bias = torch.linspace(-1, 1, 9)
    check(product(weights, x, tables, bias), x, weights, tables, bias)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 96, 128, 640])
def test_one_weight_of_one_bit(group_size, symmetric):
    weights = [random_weight(2, 5, group_size, (1,) * (640 // group_size), symmetric)]
    x = activations(1, 1, 640, dtype=torch.float16)
    tables = [reading(3, weights, 640, torch.float16)]
    check(product(weights, x, tables), x, weights, tables)


@pytest.mark.parametrize(
    "config",
    [
        SlicedConfig(rows=8, warps=1, lanes=32),
        SlicedConfig(rows=4, warps=2, lanes=32),
        SlicedConfig(rows=4, warps=1, lanes=8),
        SlicedConfig(rows=4, warps=2, lanes=64),
    ],
)
def test_launch_shapes(config):
    """Rows of several threads' groups, columns in several chunks, a last tile that is not full."""
    weights = [random_weight(4, 37, 1408, (1,)), random_weight(5, 37, 128, (4,) * 5)]
    x = activations(3, 1, 900, dtype=torch.bfloat16)
    tables = [reading(1, weights, 900, torch.bfloat16)]
    check(product(weights, x, tables, config=config, out_dtype=torch.float16), x, weights, tables)


def test_parts_of_the_rows_take_copies_of_their_own():
    weights = [random_weight(4, 24, 256, (1,)), random_weight(5, 24, 32, (2,) * 3)]
    x = activations(3, 1, 300, dtype=torch.float16)
    tables = [reading(seed, weights, 300, torch.float16) for seed in range(3)]
    check(product(weights, x, tables, starts=(8, 20)), x, weights, tables, starts=(8, 20))


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, where it meets them
def test_what_is_no_number_shows():
    weights = [random_weight(4, 5, 256, (1,))]
    for bad in (float("nan"), float("inf")):
        x = torch.ones(1, 256, dtype=torch.float16)
        x[0, 100] = bad
        tables = [([torch.arange(256)], [torch.ones(256)])]
        assert product(weights, x, tables).isnan().all()
