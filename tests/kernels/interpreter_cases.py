"""The Triton kernels in Triton's interpreter, on CPU tensors. Run by test_interpreter.py in a process of its own.

Triton decides when it is imported whether functions are interpreted, so this needs TRITON_INTERPRET=1 in the
environment: ``TRITON_INTERPRET=1 pytest tests/kernels/interpreter_cases.py``.
"""

from __future__ import annotations

import pytest
import torch
from packed_weights import activations, half_error, product_and_bound, random_weight, rounding

from quantkit.formats.grouped_int import pack
from quantkit.kernels.grouped_int_triton import dequantize_kernel
from quantkit.kernels.planar import to_planar
from quantkit.kernels.planar_matmul import dequantize_launches
from quantkit.kernels.planar_product import Prepared, ProductConfig, prepare_launch, product_launch, workspace
from quantkit.kernels.planar_product_triton import prepare_kernel, product_kernel

GUARD = 64  # elements on each side of every buffer of a kernel, filled with what must not be read or written


def guarded(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of ``tensor`` inside a larger buffer of NaN (integers: the largest), and that buffer."""
    poison = torch.finfo(tensor.dtype).max if tensor.dtype.is_floating_point else torch.iinfo(tensor.dtype).max
    poison = float("nan") if tensor.dtype.is_floating_point else poison
    whole = torch.full((tensor.numel() + 2 * GUARD,), poison, dtype=tensor.dtype)
    inner = whole[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    inner.copy_(tensor)
    return inner, whole


def edges_untouched(whole: torch.Tensor, reference: torch.Tensor) -> bool:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[whole.element_size()]
    edges = [torch.cat([t[:GUARD], t[-GUARD:]]).view(integers) for t in (whole, reference)]
    return torch.equal(*edges)


def hold(buffers):
    """Every buffer between guard bands, and a function that checks the bands and, byte by byte, what is not written."""
    held = {name: guarded(tensor) for name, tensor in buffers.items()}
    before = {name: whole.clone() for name, (_, whole) in held.items()}
    inner = {name: tensor for name, (tensor, _) in held.items()}

    def check_bands(*written):
        assert all(edges_untouched(whole, before[name]) for name, (_, whole) in held.items())
        for name in set(buffers) - set(written):
            assert torch.equal(inner[name].view(torch.uint8), buffers[name].contiguous().view(torch.uint8))

    return inner, check_bands


def check_sums(y, x, weight, lost, bias=None):
    """Within what is lost of x [m, in], and the bound of float32 sums."""
    product, bound = product_and_bound(x, weight, bias)
    bound = bound + lost @ weight.dequantize().double().abs().t() + 2.0**-20 * bound
    assert ((y.double() - product).abs() <= bound + rounding(product.abs() + bound, y.dtype)).all()


def run_product(weight, x, *, tokens=8, splits=1, rows=64, bias=None, out_dtype=torch.float32):
    """The product with a weight, and the number of programs that shared a row tile."""
    config = ProductConfig(
        rows=rows, warps=rows // 16, tokens=tokens, stages=2, splits=splits, zeros_in_loop=splits > 1
    )
    return guarded_product(x, weight.spec(), to_planar(weight.spec(), pack(weight)), config, bias, out_dtype)


def guarded_product(x, spec, tensors, config, bias=None, out_dtype=torch.float32):
    """Both kernels between guard bands, results and workspace filled with NaN; checks the bands and the counters."""
    prepared, partial = workspace(len(x), spec, config, x.device)
    work = {name: getattr(prepared, name) for name in ("values", "sums", "factors")} | {"partial": partial}
    work["out"] = torch.empty(len(x), spec.out_features, dtype=out_dtype)
    buffers = {"x": x, **{name: torch.full_like(tensor, float("nan")) for name, tensor in work.items()}, **tensors}
    inner, check_bands = hold(buffers)
    prepared = Prepared(inner["values"], inner["sums"], inner["factors"])
    grid, arguments = prepare_launch(inner["x"], spec, inner, prepared)
    prepare_kernel[grid](**arguments)
    grid, arguments = product_launch(spec, inner, bias, inner["out"], prepared, inner["partial"], config)
    product_kernel[grid](**arguments, ASM=False)
    check_bands(*work)  # the counters are zero again
    return inner["out"].clone(), grid[1]


def check(y, x, weight, bias=None):
    """Within the bound of float32 sums of exact products, and of what is lost of small x beside large ones."""
    product, bound = product_and_bound(x, weight, bias)
    bound = bound + half_error(x) @ weight.dequantize().double().abs().t()
    assert ((y.double() - product).abs() <= bound + rounding(product.abs() + bound, y.dtype)).all()


WIDTHS = [1, 2, 3, 4, 8]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width(bits, dtype, symmetric):
    weight = random_weight(bits, 40, 32, (bits,) * (3 * 512 // 32 // bits + 1), symmetric)
    x = activations(1, 2, weight.spec().in_features, dtype=dtype)
    y, splits = run_product(weight, x, splits=3)
    assert splits > 1
    check(y, x, weight)


@pytest.mark.parametrize("n_splits", [1, 3])
@pytest.mark.parametrize("m", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_number_of_tokens(bits, m, n_splits):
    weight = random_weight(m, 20, 16, (bits,) * (3 * 256 // 16 // bits + 1))
    x = activations(m, m, weight.spec().in_features, dtype=torch.float16)
    y, _ = run_product(weight, x, tokens=8 if m <= 8 else 16, splits=n_splits)
    check(y, x, weight)


@pytest.mark.parametrize("group_size", [16, 32, 48, 64, 128, 192])
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_group_size(bits, group_size):
    weight = random_weight(bits, 17, group_size, (bits,) * (1 if group_size > 32 else 5))
    x = activations(3, 1, weight.spec().in_features, dtype=torch.float16)
    y, _ = run_product(weight, x)
    check(y, x, weight)


@pytest.mark.parametrize("out_features", [1, 15, 63, 64, 65, 70])
def test_ragged_rows(out_features):
    weight = random_weight(out_features, out_features, 32, (4,) * 5)
    x = activations(4, 3, 160, dtype=torch.float16)
    y, _ = run_product(weight, x, splits=2, rows=32)
    check(y, x, weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("bits", [(2, 1, 3, 1, 2), (8, 4, 2, 4), (6, 3, 5, 8, 7, 1, 2, 4) * 4])
def test_mixed_widths(bits, splits, symmetric, dtype):
    weight = random_weight(5, 33, 32, bits, symmetric)
    x = activations(5, 2, 32 * len(bits), dtype=dtype)
    y, _ = run_product(weight, x, splits=splits)
    check(y, x, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bias_and_output_dtype(dtype):
    weight = random_weight(6, 20, 16, (4,) * 9)
    x = activations(6, 3, 144, dtype=torch.float16)
    bias = torch.linspace(-1, 1, 20).to(torch.bfloat16)
    y, _ = run_product(weight, x, splits=2, bias=bias, out_dtype=dtype)
    product, bound = product_and_bound(x, weight, bias)
    truncation = 2 if dtype == torch.bfloat16 else 1  # the interpreter truncates to bfloat16 instead of rounding
    assert ((y.double() - product).abs() <= bound + truncation * rounding(product.abs() + bound, dtype)).all()


def test_several_token_tiles():
    weight = random_weight(7, 20, 16, (2,) * 20)
    x = activations(7, 21, 320, dtype=torch.float16)
    y, _ = run_product(weight, x, splits=2)
    check(y, x, weight)


def test_a_bias_for_every_token():
    weight = random_weight(8, 20, 16, (4,) * 9)
    x = activations(8, 11, 144, dtype=torch.bfloat16)
    bias = torch.linspace(-1, 1, 220).view(11, 20)
    y, _ = run_product(weight, x, splits=2, bias=bias)
    check(y, x, weight, bias)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-20, 2.0**30, 2.0**100])
def test_activations_of_any_size(scale):
    """A power of two of all activations is one of the result; rows far apart do not meet."""
    weight = random_weight(10, 20, 32, (2,) * 9, symmetric=True)
    x = activations(10, 3, 288).clamp(-300, 300).to(torch.bfloat16)
    x[2] = 0
    other = x * torch.tensor([[scale], [1.0], [1.0]], dtype=torch.bfloat16)
    y, _ = run_product(weight, x)
    scaled, _ = run_product(weight, other)
    assert torch.equal(scaled, y * torch.tensor([[scale], [1.0], [1.0]]))
    assert not y[2].any()


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter's arithmetic
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_stay_in_their_row(value):
    weight = random_weight(11, 20, 32, (4,) * 5)
    x = activations(11, 3, 160, dtype=torch.float16)
    clean, _ = run_product(weight, x)
    x[1, 77] = value
    y, _ = run_product(weight, x)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [(1,) * 9, (2,) * 9, (3,) * 17, (4,) * 3, (8,) * 3, (2, 6, 1, 3, 4, 1)])
def test_dequantize(bits, symmetric, dtype):
    weight = random_weight(9, 21, 32, bits, symmetric)
    spec = weight.spec()
    tensors = to_planar(spec, pack(weight))
    out, whole = guarded(torch.full((13, spec.in_features), float("nan"), dtype=dtype))
    before = whole.clone()
    for grid, arguments in dequantize_launches(spec, tensors, 5, out):
        dequantize_kernel[grid](**arguments, ASM=False)
    assert edges_untouched(whole, before)
    expected = weight.dequantize()[5:18]  # scale * (code - zero), rounded once: exactly what the kernel computes
    if dtype == torch.bfloat16:  # truncated in the interpreter
        assert ((out.float() - expected).abs() <= 2 * rounding(expected, dtype)).all()
    else:
        assert torch.equal(out, expected.to(dtype))
