"""The torch twin and the operators: error bounds against float64, edges, errors, torch.compile."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_weights import activations, product_and_bound, random_weight, rounding
from torch.utils._python_dispatch import TorchDispatchMode

from quantkit.errors import RequestError
from quantkit.formats.grouped_int import pack
from quantkit.kernels.column_sums import by_columns
from quantkit.kernels.grouped_int import matmul
from quantkit.kernels.grouped_int_twin import matmul_reference
from quantkit.kernels.planar import to_planar

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(x, weight, tensors, bias=None):
    y = matmul(x, weight.spec(), tensors, bias)
    product, bound = product_and_bound(x, weight, bias)
    assert y.dtype == x.dtype
    assert y.shape == product.shape
    assert ((y.double() - product).abs() <= bound + rounding(product.abs() + bound, x.dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_every_width(bits, symmetric, dtype):
    weight = random_weight(0, 33, 64, (bits,) * 3, symmetric)
    check(activations(1, 5, 192, dtype=dtype), weight, pack(weight), torch.linspace(-1, 1, 33))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    out_features=st.sampled_from([1, 2, 7, 64, 130]),
    group_size=st.sampled_from([1, 3, 8, 12, 16, 31, 32, 128]),
    bits=st.lists(st.integers(1, 8), min_size=1, max_size=6),
    symmetric=st.booleans(),
    lead=st.sampled_from([(1,), (3,), (2, 3), (0,), (2, 0), (70,), ()]),
)
def test_mixed_widths_in_any_order(seed, out_features, group_size, bits, symmetric, lead):
    weight = random_weight(seed, out_features, group_size, tuple(bits), symmetric)
    check(activations(seed, *lead, group_size * len(bits)), weight, pack(weight))


@pytest.mark.parametrize(("symmetric", "bits"), [(True, (2, 2, 2)), (False, (3, 1, 4, 6))])
def test_many_rows_of_bfloat16_meet_the_weight_in_bfloat16(symmetric, bits, monkeypatch):
    """As in a dense model: each weight is rounded once, sums are float32; tiles of rows do not matter."""
    monkeypatch.setattr("quantkit.kernels.grouped_int_twin._DECODED_BYTES", 4 * 32 * len(bits) * 7)
    monkeypatch.setattr("quantkit.kernels.grouped_int_twin._ROUNDED_BYTES", 2 * 32 * len(bits) * 20)
    weight = random_weight(0, 50, 32, bits, symmetric)
    x = activations(0, 70, weight.spec().in_features, dtype=torch.bfloat16)
    bias = torch.linspace(-1, 1, 50)
    y = matmul(x, weight.spec(), pack(weight), bias)
    product, bound = product_and_bound(x, weight, bias.bfloat16())
    bound = bound + x.double().abs() @ rounding(weight.dequantize().double(), torch.bfloat16).t()
    assert y.dtype == torch.bfloat16
    # the product is rounded before the bias is added where the library has no fused sum
    worst = rounding(product.abs() + bound + 1, torch.bfloat16)
    assert ((y.double() - product).abs() <= bound + 2 * worst).all()
    bare = matmul(x, weight.spec(), pack(weight))
    product, bound = product_and_bound(x, weight)
    bound = bound + x.double().abs() @ rounding(weight.dequantize().double(), torch.bfloat16).t()
    assert ((bare.double() - product).abs() <= bound + rounding(product.abs() + bound, torch.bfloat16)).all()


def test_row_tiles_do_not_change_the_result(monkeypatch):
    weight = random_weight(0, 50, 32, (3, 4, 2, 4))
    x = activations(0, 4, 128)
    whole = matmul(x, weight.spec(), pack(weight))
    monkeypatch.setattr("quantkit.kernels.grouped_int_twin._TILE_BYTES", 4 * 128 * 7)
    tiled = matmul(x, weight.spec(), pack(weight))
    product, bound = product_and_bound(x, weight)
    assert ((tiled.double() - product).abs() <= bound + rounding(product, torch.float32)).all()
    assert torch.allclose(whole, tiled, rtol=1e-4, atol=1e-6)


class LargestOutput(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    n_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.n_bytes = max(self.n_bytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("by", [lambda tensor: tensor, by_columns])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_dense_weight_never_exists(bits, by):
    weight = random_weight(0, 2048, 128, (bits,) * 16)
    tensors = pack(weight)
    name = f"codes_{bits}b"
    x = activations(0, 1, 2048)
    with LargestOutput() as largest:
        matmul_reference(x, weight.spec(), tensors | {name: by(tensors[name])}, None)
    packed = max(tensor.nbytes for tensor in tensors.values())
    assert largest.n_bytes <= max(packed, 4 << 20)  # the dense float32 weight would take 16 MiB


def test_a_view_of_a_larger_file_and_unaligned_tensors():
    weight = random_weight(0, 9, 16, (4, 4, 4))
    tensors = pack(weight)
    shifted = torch.empty(tensors["codes_4b"].nbytes + 3, dtype=torch.uint8)[3:].view_as(tensors["codes_4b"])
    shifted.copy_(tensors["codes_4b"])
    x = activations(0, 2, 48)
    assert torch.equal(matmul(x, weight.spec(), {**tensors, "codes_4b": shifted}), matmul(x, weight.spec(), tensors))


def test_x_may_be_a_strided_view():
    weight = random_weight(0, 9, 16, (4, 2))
    x = activations(0, 32, 4).t()
    assert torch.equal(matmul(x, weight.spec(), pack(weight)), matmul(x.contiguous(), weight.spec(), pack(weight)))


def test_arguments_are_not_changed():
    weight = random_weight(0, 9, 16, (4, 2, 1))
    tensors = pack(weight)
    x, bias = activations(0, 3, 48), torch.ones(9)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    x_before = x.clone()
    matmul(x, weight.spec(), tensors, bias)
    assert torch.equal(x, x_before)
    assert torch.equal(bias, torch.ones(9))
    assert all(torch.equal(before[name], tensors[name]) for name in tensors)


def test_wrong_inputs_are_named():
    weight = random_weight(0, 9, 16, (4, 4))
    with pytest.raises(RequestError, match=re.escape("grouped_int: x has 16 columns, the weight has 32")):
        matmul(torch.zeros(1, 16), weight.spec(), pack(weight))
    with pytest.raises(RequestError, match=r"x is torch\.float64; use float32, bfloat16 or float16"):
        matmul(torch.zeros(1, 32, dtype=torch.float64), weight.spec(), pack(weight))


@pytest.mark.parametrize("bits", [(4, 4), (3, 2, 3), (1, 1)])
def test_operators_pass_torchs_own_checks(bits):
    weight = random_weight(0, 9, 16, bits)
    spec, tensors = weight.spec(), pack(weight)
    planar = to_planar(spec, tensors)
    segments = [number for segment in spec.segments for number in segment]
    shape = (spec.out_features, spec.group_size, segments, spec.symmetric)
    x, bias = activations(0, 3, spec.in_features), torch.ones(9)
    torch.library.opcheck(torch.ops.quantkit.grouped_int_matmul, (x, list(tensors.values()), bias, *shape))
    held = [planar.get(name) for name in ("planar", "planar_scales", "planar_zeros", "planar_order", "counters")]
    torch.library.opcheck(torch.ops.quantkit.grouped_int_planar_matmul, (x, *held, None, *shape))


def test_planar_tensors_work_on_a_cpu_too():
    weight = random_weight(0, 9, 16, (4, 2, 8))
    tensors = pack(weight)
    x = activations(0, 3, 48)
    planar = to_planar(weight.spec(), tensors)
    assert torch.equal(matmul(x, weight.spec(), planar), matmul(x, weight.spec(), tensors))


def test_one_graph_under_torch_compile():
    weight = random_weight(0, 9, 16, (4, 2, 8))
    spec, tensors = weight.spec(), pack(weight)
    compiled = torch.compile(lambda x: matmul(x * 2, spec, tensors).relu(), fullgraph=True, backend="aot_eager")
    for rows in (1, 3, 4):
        x = activations(0, 2, rows, 48)
        assert torch.equal(compiled(x), matmul(x * 2, spec, tensors).relu())
