"""What a CPU multiplies by: codes that lie column after column, and rows decoded by torch's own operation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_weights import activations, product_and_bound, random_weight, rounding
from torch import Tensor

from quantkit.formats.grouped_int import GroupedInt, pack
from quantkit.formats.packing import pack_bits
from quantkit.kernels.column_sums import (
    FEW_ROWS,
    _bags,
    _pieces,
    by_columns,
    column_sums,
    is_by_columns,
    sums_columns,
)
from quantkit.kernels.fused_rows import FusedRows, can_fuse
from quantkit.kernels.grouped_int import codes_by_columns, matmul
from quantkit.kernels.grouped_int_twin import matmul_reference


def held(weight: GroupedInt) -> dict[str, Tensor]:
    """As a CPU holds it."""
    names = codes_by_columns(weight.spec())
    return {name: by_columns(tensor) if name in names else tensor for name, tensor in pack(weight).items()}


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    out_features=st.sampled_from([1, 2, 7, 33, 64, 130]),
    group_size=st.sampled_from([3, 8, 12, 16, 32, 128, 600]),
    bits=st.lists(st.integers(1, 8), min_size=1, max_size=5),
    symmetric=st.booleans(),
    m=st.integers(0, FEW_ROWS + 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scratch_bytes=st.sampled_from([1, 20_000, 1 << 21]),
)
def test_products_with_codes_held_by_columns(seed, out_features, group_size, bits, symmetric, m, dtype, scratch_bytes):
    """Within the bound of any float32 evaluation, however many sums are made at a time."""
    weight = random_weight(seed, out_features, group_size, tuple(bits), symmetric)
    x = activations(seed, m, weight.spec().in_features, dtype=dtype)
    bias = torch.linspace(-1, 1, out_features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantkit.kernels.column_sums._SCRATCH_BYTES", scratch_bytes)
        y = matmul(x, weight.spec(), held(weight), bias)
    product, bound = product_and_bound(x, weight, bias)
    assert (y.dtype, y.shape) == (dtype, product.shape)
    assert ((y.double() - product).abs() <= bound + rounding(product.abs() + bound, dtype)).all()
    assert torch.equal(bias, torch.linspace(-1, 1, out_features))


@pytest.mark.parametrize("zeros", [0.0, 2.0, torch.arange(3.0).repeat(40, 1) + torch.arange(40.0)[:, None] % 2])
@pytest.mark.parametrize(
    ("bits", "n_out"), [(1, 40), (2, 33), (2, 40), (3, 40), (4, 24), (5, 33), (6, 24), (7, 16), (8, 16)]
)
def test_sums_of_integers_are_exact(bits, n_out, zeros):
    """Integers below 2**24 and scales that are powers of two: float32 has no rounding, so every order is the same."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2**bits, (n_out, 3, 64), generator=generator)
    scales = 2.0 ** torch.randint(-3, 3, (n_out, 3), generator=generator)
    x = torch.randint(-50, 50, (5, 3, 64), generator=generator).float()
    each = zeros[:n_out] if isinstance(zeros, Tensor) else torch.full((n_out, 3), zeros)
    zeros = each if isinstance(zeros, Tensor) else zeros
    weight = scales[..., None] * (codes - each[..., None])
    packed = by_columns(pack_bits(codes.byte().flatten(1), bits))
    exact = torch.einsum("mgi,ogi->mo", x.double(), weight.double())
    assert torch.equal(column_sums(x, packed, scales, zeros, bits).double(), exact)
    some = packed[8:16]  # a slice of rows is read in place
    assert sums_columns(some, bits, 64)
    part = each[8:16] if isinstance(zeros, Tensor) else zeros
    assert torch.equal(column_sums(x, some, scales[8:16], part, bits).double(), exact[:, 8:16])


def test_which_codes_are_summed():
    packed = torch.zeros(8, 16, dtype=torch.uint8)
    assert not sums_columns(packed, 2, 32)  # row after row
    assert sums_columns(by_columns(packed), 2, 32)
    assert not sums_columns(by_columns(packed), 2, 3)  # a group ends within a byte
    assert sums_columns(by_columns(packed), 3, 32)
    assert not sums_columns(by_columns(packed), 3, 12)  # 36 bits
    assert not sums_columns(by_columns(packed), 2, 8)  # sums of 8
    assert torch.equal(by_columns(packed), packed)
    assert is_by_columns(by_columns(packed))
    assert not is_by_columns(packed)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_decoded_rows_are_the_dequantized_weight(bits, symmetric):
    """Exactly: a product of a code and a float16, and its difference to the zero's, fit in float32."""
    weight = random_weight(0, 21, 16, (bits,) * 5, symmetric)
    tensors = pack(weight)
    packed = tensors[f"codes_{bits}b"]
    assert can_fuse(packed, tensors["scales"], bits, 16)
    fused = FusedRows(torch.zeros(1, 5, 16), packed, weight.scales, weight.zeros, bits, centred=True)
    tile = fused.new_tile(8)
    decoded = torch.cat([fused.decode(slice(first, first + 8), tile).clone() for first in (0, 8, 16)])
    assert torch.equal(decoded, weight.dequantize())


@pytest.mark.parametrize("rows", [1, 80])
def test_zeros_that_float16_cannot_hold(rows):
    """Offset -2 * 40000 is beyond float16: it is added in float32."""
    weight = random_weight(0, 16, 32, (2, 2), symmetric=True)
    weight = replace(weight, scales=torch.full_like(weight.scales, 40000))
    x = activations(0, rows, 64)
    product, bound = product_and_bound(x, weight)
    for tensors in (pack(weight), held(weight)):
        y = matmul(x, weight.spec(), tensors)
        assert ((y.double() - product).abs() <= bound + rounding(product, torch.float32)).all()


@pytest.mark.parametrize("bits", [(2, 2), (3, 1, 4)])
@pytest.mark.parametrize("rows", [FEW_ROWS + 1, 70])
def test_many_rows_take_the_codes_row_after_row(bits, rows):
    weight = random_weight(0, 50, 32, bits, symmetric=True)
    for dtype in (torch.float32, torch.bfloat16):
        x = activations(0, rows, weight.spec().in_features, dtype=dtype)
        assert torch.equal(
            matmul_reference(x, weight.spec(), held(weight), None),
            matmul_reference(x, weight.spec(), pack(weight), None),
        )


def test_constants_made_in_one_mode_serve_in_all():
    """What is kept between calls is made on the CPU, whatever torch's default, and is not bound to inference mode."""
    weight = random_weight(0, 24, 48, (3, 2))
    spec, tensors = weight.spec(), held(weight)
    x = activations(0, 2, 96)
    _pieces.cache_clear()
    _bags.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        first = matmul(x, spec, tensors)
    assert torch.equal(matmul(x, spec, tensors), first)
    with torch.enable_grad():
        assert torch.equal(matmul(x, spec, tensors), first)


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("bits", [(2, 2), (3, 2, 5)])
def test_gradients_of_x(bits, rows):
    """Of the sum of all outputs: the sums of the weight's columns, to float32's rounding of as many terms."""
    weight = random_weight(0, 24, 48, bits)
    x = activations(0, rows, 48 * len(bits)).requires_grad_()
    matmul_reference(x, weight.spec(), held(weight), None).sum().backward()
    dense = weight.dequantize().double()
    codes = (weight.scales.repeat_interleave(48, 1) * (weight.codes + weight.zeros.repeat_interleave(48, 1))).double()
    assert x.grad is not None
    assert ((x.grad.double() - dense.sum(0)).abs() <= 2 * (24 + 48) * 2.0**-24 * codes.sum(0)).all()
