"""The Triton kernels in Triton's interpreter, on CPU tensors. Run by test_interpreter.py in a process of its own.

Triton decides when it is imported whether functions are interpreted, so this needs TRITON_INTERPRET=1 in the
environment: ``TRITON_INTERPRET=1 pytest tests/kernels/interpreter_cases.py``.
"""

from __future__ import annotations

import pytest
import torch
from packed_weights import activations, product_and_bound, random_weight, rounding

from quantkit.formats.grouped_int import pack
from quantkit.kernels.grouped_int_triton import dequantize_kernel, fused_kernel
from quantkit.kernels.planar import planar_segments, to_planar
from quantkit.kernels.planar_matmul import Config, dequantize_launches, fused_launch, partial_size

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


def run_fused(weight, x, *, tokens=8, n_splits, rows=64, bias=None, out_dtype=torch.float32):
    """The kernel between guard bands, results and workspace filled with NaN; checks the bands and the counters."""
    spec = weight.spec()
    tensors = to_planar(spec, pack(weight))
    config = Config(rows=rows, warps=rows // 16, tokens=tokens, stages=2)
    per_split = tuple(-(-segment.n_blocks // n_splits) for segment in planar_segments(spec))
    out = torch.full((x.shape[0], spec.out_features), float("nan"), dtype=out_dtype)
    partial = torch.full((partial_size(x.shape[0], spec, config, per_split),), float("nan"))
    buffers = {"x": x, "out": out, "partial": partial, **tensors}
    held = {name: guarded(tensor) for name, tensor in buffers.items()}
    before = {name: whole.clone() for name, (_, whole) in held.items()}
    inner = {name: tensor for name, (tensor, _) in held.items()}
    grid, arguments = fused_launch(
        inner["x"], spec, inner, bias, inner["out"], inner["partial"], config=config, per_split=per_split
    )
    fused_kernel[grid](**arguments, ASM=False)
    assert all(edges_untouched(whole, before[name]) for name, (_, whole) in held.items())
    unchanged = set(held) - {"out", "partial"}
    assert all(torch.equal(inner[name], buffers[name]) for name in unchanged)  # the counters are zero again
    return inner["out"].clone(), arguments["SPLITS"]


def check(y, x, weight, bias=None):
    """Within the bound of float32 sums. bfloat16 operands add at most 128 (8 bits: 2176) code units and remove them."""
    base = 0.0 if x.dtype == torch.float16 else 2176.0 if max(weight.bits) > 4 else 128.0
    product, bound = product_and_bound(x, weight, bias, base=base)
    assert ((y.double() - product).abs() <= bound + rounding(product.abs() + bound, y.dtype)).all()


WIDTHS = [1, 2, 3, 4, 8]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width(bits, dtype, symmetric):
    weight = random_weight(bits, 40, 32, (bits,) * (3 * 512 // 32 // bits + 1), symmetric)
    x = activations(1, 2, weight.spec().in_features, dtype=dtype)
    y, splits = run_fused(weight, x, n_splits=3)
    assert splits > 1
    check(y, x, weight)


@pytest.mark.parametrize("n_splits", [1, 3])
@pytest.mark.parametrize("m", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_number_of_tokens(bits, m, n_splits):
    weight = random_weight(m, 20, 16, (bits,) * (3 * 256 // 16 // bits + 1))
    x = activations(m, m, weight.spec().in_features, dtype=torch.float16)
    y, _ = run_fused(weight, x, tokens=8 if m <= 8 else 16, n_splits=n_splits)
    check(y, x, weight)


@pytest.mark.parametrize("group_size", [16, 32, 48, 64, 128, 192])
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_group_size(bits, group_size):
    weight = random_weight(bits, 17, group_size, (bits,) * (1 if group_size > 32 else 5))
    x = activations(3, 1, weight.spec().in_features, dtype=torch.float16)
    y, _ = run_fused(weight, x, n_splits=1)
    check(y, x, weight)


@pytest.mark.parametrize("out_features", [1, 15, 63, 64, 65, 70])
def test_ragged_rows(out_features):
    weight = random_weight(out_features, out_features, 32, (4,) * 5)
    x = activations(4, 3, 160, dtype=torch.float16)
    y, _ = run_fused(weight, x, n_splits=2, rows=32)
    check(y, x, weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [(2, 1, 3, 1, 2), (8, 4, 2, 4), (6, 3, 5, 8, 7, 1, 2, 4)])
def test_mixed_widths(bits, symmetric, dtype):
    weight = random_weight(5, 33, 32, bits, symmetric)
    x = activations(5, 2, 32 * len(bits), dtype=dtype)
    y, _ = run_fused(weight, x, n_splits=2)
    check(y, x, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bias_and_output_dtype(dtype):
    weight = random_weight(6, 20, 16, (4,) * 9)
    x = activations(6, 3, 144, dtype=torch.float16)
    bias = torch.linspace(-1, 1, 20).to(torch.bfloat16)
    y, _ = run_fused(weight, x, n_splits=2, bias=bias, out_dtype=dtype)
    product, bound = product_and_bound(x, weight, bias)
    truncation = 2 if dtype == torch.bfloat16 else 1  # the interpreter truncates to bfloat16 instead of rounding
    assert ((y.double() - product).abs() <= bound + truncation * rounding(product.abs() + bound, dtype)).all()


def test_several_token_tiles():
    weight = random_weight(7, 20, 16, (2,) * 20)
    x = activations(7, 21, 320, dtype=torch.float16)
    y, _ = run_fused(weight, x, n_splits=2)
    check(y, x, weight)


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
