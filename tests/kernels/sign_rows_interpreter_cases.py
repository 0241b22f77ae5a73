"""One row of x times signs and integers, in Triton's interpreter, on CPU tensors. Run by test_interpreter.py."""

from __future__ import annotations

import pytest
import torch
from interpreter_cases import hold
from packed_weights import activations, product_and_bound, random_weight, rounding

from quantkit.formats.grouped_int import pack
from quantkit.kernels.decode_step import add_norm, gated
from quantkit.kernels.planar import to_planar
from quantkit.kernels.ready_row import SignParts, Source, new_ready, ready_launch, row_table
from quantkit.kernels.ready_row_triton import ready_kernel
from quantkit.kernels.sign_rows import SignRowsConfig, has_sign_rows, rows_launch
from quantkit.kernels.sign_rows_triton import sign_rows_kernel

PLAIN = SignRowsConfig(tiles=1, warps=1)


def reading(seed, weights, n_columns):
    """Columns of x in any order, some twice, some absent (-1), with scales that float16 holds."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [weight.spec().in_features for weight in weights]
    columns = [torch.randint(-1, n_columns, (size,), generator=generator) for size in sizes]
    return columns, [torch.randn(size, generator=generator).half().float() for size in sizes]


def product(weights, x, tables, bias=None, *, starts=(), config=PLAIN, out_dtype=torch.float32):
    """Both kernels, everything between guard bands, what they write filled with NaN (integers: the largest) before."""
    parts = SignParts(signs=weights[0].spec(), integers=weights[1].spec() if len(weights) > 1 else None)
    assert has_sign_rows(parts, starts)
    planar = [to_planar(weight.spec(), pack(weight)) for weight in weights]
    scales, zeros = weights[0].scales[:, 0], weights[0].zeros[:, 0]
    signs = {"words": planar[0]["planar"], "scales": scales / 2}  # scale * (c - zero) = scale / 2 * (2 c - 1) + mean
    if not weights[0].symmetric:
        signs["means"] = scales * (0.5 - zeros)
    read = [row_table(parts, *table) for table in tables]
    places, factors = (torch.stack(tensors) for tensors in zip(*read, strict=True))
    ready, numbers = new_ready(parts, places)
    buffers = {"x": x, "places": places, "factors": factors}
    buffers |= {"ready": ready.fill_(torch.iinfo(torch.int32).max), "numbers": numbers.fill_(float("nan"))}
    buffers["out"] = torch.full((1, parts.signs.out_features), float("nan"), dtype=out_dtype)
    buffers |= {f"signs {name}": tensor for name, tensor in signs.items()}
    buffers |= {f"integers {name}": tensor for each in planar[1:] for name, tensor in each.items()}
    inner, check_bands = hold(buffers)
    made = inner["ready"], inner["numbers"]
    source = Source(x=inner["x"])
    grid, arguments = ready_launch(source, parts, inner["places"], inner["factors"], *made, inner["x"])
    ready_kernel[grid](**arguments, ASM=False)
    signs = {name: inner[f"signs {name}"] for name in signs}
    integers = {name: inner[f"integers {name}"] for each in planar[1:] for name in each} or None
    grid, arguments = rows_launch(*made, parts, signs, integers, bias, inner["out"], starts, config)
    sign_rows_kernel[grid](**arguments, ASM=False)
    check_bands("ready", "numbers", "out")
    return inner["out"].clone()


def check(y, x, weights, tables, bias=None, starts=()):
    """Each part of the rows within the integers of its copy of x, and within the bound of float32 sums.

    Half a unit of x is lost (a little more: the quotient is rounded too); of each weight the largest unit is taken.
    """
    bounds = [0, *starts, y.shape[1]]
    for (columns, scales), first, last in zip(tables, bounds, bounds[1:], strict=False):
        expected, allowed = (0.0 if bias is None else bias.double()), 0.0
        for weight, order, scale in zip(weights, columns, scales, strict=True):
            own = torch.where(order < 0, 0.0, x.double()[:, order.clamp(min=0)] * scale.double())
            lost = torch.full_like(own, 0.501 * float(own.abs().max()) / 32512)
            exact, bound = product_and_bound(own, weight)
            bound = bound + lost @ weight.dequantize().double().abs().t() + 2.0**-20 * bound
            expected, allowed = expected + exact, allowed + bound
        allowed = allowed + 2.0**-22 * (expected.abs() + allowed)
        allowed = allowed + rounding(expected.abs() + allowed, y.dtype)
        assert ((y.double() - expected).abs() <= allowed)[:, first:last].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_signs_beside_every_width(bits, dtype):
    weights = [random_weight(bits, 9, 384, (1,)), random_weight(bits + 1, 9, 64, (bits,) * 3, bits == 2)]
    x = activations(bits, 1, 500, dtype=dtype)
    tables = [reading(bits, weights, 500)]
    bias = torch.linspace(-1, 1, 9)
    check(product(weights, x, tables, bias), x, weights, tables, bias)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [128, 640, 1024, 2304])
def test_signs_alone(columns, symmetric):
    weights = [random_weight(2, 5, columns, (1,), symmetric)]
    x = activations(1, 1, 2000, dtype=torch.float16)
    tables = [reading(3, weights, 2000)]
    check(product(weights, x, tables), x, weights, tables)


@pytest.mark.parametrize(
    "config",
    [
        SignRowsConfig(tiles=2, warps=2),
        SignRowsConfig(tiles=1, warps=4),
        SignRowsConfig(tiles=4, warps=4),
    ],
)
def test_launch_shapes(config):
    """Several blocks for a warp and idle warps, integers in several chunks, a last tile that is not full."""
    weights = [random_weight(4, 37, 2432, (1,)), random_weight(5, 37, 128, (4,) * 5)]
    x = activations(3, 1, 900, dtype=torch.bfloat16)
    tables = [reading(1, weights, 900)]
    check(product(weights, x, tables, config=config, out_dtype=torch.float16), x, weights, tables)


@pytest.mark.parametrize("config", [PLAIN, SignRowsConfig(tiles=2, warps=2)])
def test_parts_of_the_rows_take_copies_of_their_own(config):
    weights = [random_weight(4, 80, 256, (1,)), random_weight(5, 80, 32, (2,) * 3)]
    x = activations(3, 1, 300, dtype=torch.float16)
    tables = [reading(seed, weights, 300) for seed in range(3)]
    check(product(weights, x, tables, starts=(32, 64), config=config), x, weights, tables, starts=(32, 64))


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, where it meets them
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_shows(bad):
    weights = [random_weight(4, 5, 256, (1,)), random_weight(5, 5, 64, (4,))]
    for place in (100, 300):
        x = torch.ones(1, 320, dtype=torch.float16)
        x[0, place] = bad
        tables = [([torch.arange(256), torch.arange(256, 320)], [torch.ones(256), torch.ones(64)])]
        assert product(weights, x, tables).isnan().all()


@pytest.mark.parametrize("kind", ["norm", "first norm", "gated"])
def test_what_comes_before_in_the_same_launch(kind):
    """Planes, slices and their numbers are those of the row that the launch before would have written."""
    weights = [random_weight(4, 16, 1152, (1,)), random_weight(5, 16, 64, (4,) * 3)]
    parts = SignParts(signs=weights[0].spec(), integers=weights[1].spec())
    table = row_table(parts, *reading(1, weights, 900))
    places, factors = (torch.stack([each, each]) for each in table)
    update = activations(4, 1, 900, dtype=torch.float16) if kind == "norm" else None
    if kind == "gated":
        x = activations(3, 1, 1800, dtype=torch.float16).clamp(-6, 6)
        source, residual, expected = Source(x=x, kind="gated"), x, gated(x)
    else:
        x, weight = activations(3, 1, 900, dtype=torch.float16), torch.linspace(0.5, 2, 900).half()
        source = Source(x=x.clone(), kind="norm", update=update, weight=weight, eps=1e-5)
        residual = torch.full_like(x, float("nan")) if kind == "norm" else source.x
        expected = add_norm(x, update, weight, 1e-5)
    results = []
    for each, sum_of in ((source, residual), (Source(x=expected), expected)):
        made = [part.fill_(0) for part in new_ready(parts, places)]
        grid, arguments = ready_launch(each, parts, places, factors, *made, sum_of)
        ready_kernel[grid](**arguments, ASM=False)
        results.append(made)
    if kind != "gated":
        assert torch.equal(residual, x)
    (ready, numbers), (wanted, wanted_numbers) = results
    # a row that is rounded to float16 may differ in the last place of few numbers: float32 sums and exp
    torch.testing.assert_close(numbers, wanted_numbers, rtol=2.0**-10, atol=float(expected.abs().max()) * 2.0**-9)
    assert float((ready == wanted).float().mean()) > 0.8
