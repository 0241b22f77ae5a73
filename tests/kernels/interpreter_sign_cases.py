"""The kernels of the sign formats in Triton's interpreter, on CPU tensors; see interpreter_cases.py."""

from __future__ import annotations

import pytest
import torch
from interpreter_cases import guarded_product, hold
from packed_weights import activations
from sign_weights import random_sign_factors, random_sign_salient

from quantkit.formats.storage import pack
from quantkit.kernels.planar_product import ProductConfig
from quantkit.kernels.sign_planar import factor, factor_specs, factors_to_planar, latent_span, salient_to_planar
from quantkit.kernels.sign_salient import few_rows_parts
from quantkit.kernels.signs_triton import latent_kernel, prepare_kernel

UNIT = 2.0**-24
HALF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}  # rounding of an operand; the interpreter truncates bfloat16


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype)


def prepared(x, order, scales):
    """What `prepare` does, in the interpreter: several column tiles, everything between guard bands."""
    n_paths, n = scales.numel() // scales.shape[-1], scales.shape[-1]
    buffers = {"x": x, "scales": scales, "out": poisoned(n_paths * len(x), n, dtype=x.dtype)}
    if order is not None:
        buffers["order"] = order
    inner, check_bands = hold(buffers)
    prepare_kernel[(n_paths * len(x), -(-n // 64))](
        inner["x"], inner.get("order", inner["scales"]), inner["scales"], inner["out"], len(x), x.shape[1], n,
        ORDERED=order is not None, COLUMNS=64,
    )  # fmt: skip
    check_bands("out")
    return inner["out"].clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 3])
def test_prepare(m, dtype):
    x = activations(0, m, 150, dtype=dtype)
    scales = torch.cat([torch.linspace(-2, 2, 150), torch.zeros(42)]).repeat(2, 1)
    scales[1] *= 3
    expected = torch.nn.functional.pad(x.float(), (0, 42)).repeat(2, 1) * scales.repeat_interleave(m, 0)
    got = prepared(x, None, scales).float()
    assert ((got - expected).abs() <= expected.abs() * HALF.get(dtype, 0.0) + 2.0**-24).all()
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    order = torch.cat([order[:70], torch.full((26,), 150, dtype=torch.int32), order[70:]])
    got = prepared(x, order, torch.ones(176))
    assert torch.equal(got[:, :70], x[:, order[:70].long()])
    assert torch.equal(got[:, 96:], x[:, order[96:].long()])
    assert not got[:, 70:96].any()


def factors_product(weight, x, bias=None):
    """The chain of `sign_factors.planar_matmul`, kernel by kernel."""
    spec = weight.spec()
    tensors = factors_to_planar(spec, pack(weight))
    scaled = prepared(x, None, tensors["x_scales"])
    v, u = factor_specs(spec)
    config = ProductConfig(rows=64, warps=4, tokens=8, stages=2, splits=2)
    latents, _ = guarded_product(scaled, v, factor(tensors, "v_"), config)
    inner, check_bands = hold(
        {"z": latents, "scales": tensors["z_scales"], "out": poisoned(len(x), v.out_features, dtype=x.dtype)}
    )
    latent_kernel[(len(x), -(-v.out_features // 64))](
        inner["z"], inner["scales"], inner["out"], len(x), v.out_features, latent_span(spec), COLUMNS=64
    )
    check_bands("out")
    return guarded_product(inner["out"].clone(), u, factor(tensors, "u_"), config, bias)[0]


def factors_bound(weight, x):
    """Operands are rounded twice (column_scales * x, and z), each by `HALF`; float32 sums are small beside that.

    Errors of the operands go through the product like the operands: at most HALF times the product of magnitudes. With
    bfloat16 a code carries a base of 128 that is subtracted again.
    """
    total = torch.zeros(len(x), len(weight.u_signs), dtype=torch.float64)
    for path, latent in enumerate(weight.latent_scales.double().abs().split(weight.ranks)):
        z = (x.double().abs() @ weight.column_scales[path].double().abs())[:, None] * latent
        total += z.sum(1, keepdim=True) * weight.row_scales[path].double().abs()
    n_terms = x.shape[1] + sum(weight.ranks) + 64
    base = 1 + 2 * 128 if x.dtype == torch.bfloat16 else 1
    underflow = 2.0**-24 * weight.row_scales.abs().max() * (1 + weight.latent_scales.abs().sum() * x.shape[1])
    sums = 2 * HALF[x.dtype] * (1 + HALF[x.dtype]) + 4 * n_terms * UNIT * base
    return total * sums + (float(underflow) * 4 * sum(weight.ranks) if x.dtype == torch.float16 else 0) + 1e-30


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("out_features", "in_features", "ranks", "m"),
    [(40, 70, (8,), 1), (33, 64, (40, 24), 1), (64, 130, (5, 32), 3), (100, 1100, (64, 64), 2), (7, 3, (1, 1), 9)],
)
def test_chained_sign_factors(out_features, in_features, ranks, m, dtype):
    weight = random_sign_factors(m, out_features, in_features, ranks)
    x = activations(m, m, in_features, dtype=dtype).clamp(-8, 8)
    bias = torch.linspace(-1, 1, out_features)
    y = factors_product(weight, x, bias)
    expected = x.double() @ weight.dequantize().double().t() + bias
    assert ((y.double() - expected).abs() <= factors_bound(weight, x) + 1e-6).all()


def salient_product(weight, x, bias=None, *, splits=2, rows=64):
    """The products of `sign_salient.planar_matmul`; the second adds the first."""
    spec = weight.spec()
    tensors = salient_to_planar(spec, pack(weight))
    columns = prepared(x, tensors["x_order"], tensors["x_scales"])
    config = ProductConfig(rows=rows, warps=rows // 16, tokens=8, stages=2, splits=splits)
    total = bias
    for part, first, held in few_rows_parts(spec, tensors):
        total, _ = guarded_product(columns[:, first : first + part.in_features].contiguous(), part, held, config, total)
    return total


def salient_bound(weight, x):
    """column_scales * x is rounded by `HALF`; sums in float32, of sign products, codes and zeros apart."""
    x = x.double().abs()
    spec = weight.spec()
    binary = x if weight.salient_mask is None else x[:, ~weight.salient_mask]
    if weight.column_scales is not None:
        binary = binary * weight.column_scales.double().abs()
    rows = weight.row_scales.double().abs()
    if weight.row_means is not None:
        rows = rows + weight.row_means.double().abs()
    total = binary.sum(1, keepdim=True) * rows
    sums = 3 * total
    if weight.salient is not None:
        part = weight.salient
        scales, zeros = (t.double().repeat_interleave(part.group_size, 1) for t in (part.scales, part.zeros))
        sums = sums + x[:, weight.salient_mask] @ (scales * (part.codes.double() + zeros.abs())).t()
        sums = sums + 2 * 2176 * (x[:, weight.salient_mask] @ scales.t())
    return total, 4 * (2 * spec.in_features + 64) * UNIT * (sums + 2 * 128 * total)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"n_binary": 70},
        {"n_binary": 40, "row_means": True, "column_scales": True},
        {"n_binary": 100, "salient_bits": (4, 4, 4), "salient_group": 16},
        {"n_binary": 1100, "salient_bits": (4,), "salient_group": 192, "row_means": True, "column_scales": True},
        {"n_binary": 33, "salient_bits": (8, 8), "salient_group": 32, "row_means": True},
        {"n_binary": 64, "salient_bits": (2,) * 3, "salient_group": 48, "column_scales": True},
    ],
)
def test_signs_and_salient_columns(options, splits, dtype):
    weight = random_sign_salient(3, 70, **options)
    x = activations(1, 3, weight.spec().in_features, dtype=dtype).clamp(-60, 60)
    bias = torch.linspace(-1, 1, 70)
    y = salient_product(weight, x, bias, splits=splits, rows=32)
    expected = x.double() @ weight.dequantize().double().t() + bias
    rounded, sums = salient_bound(weight, x)
    operands = HALF[dtype] * rounded + (2.0**-25 * x.shape[1] if dtype == torch.float16 else 0.0)
    if weight.column_scales is None:
        operands = 0.0 * operands  # exact: x is only reordered
    assert ((y.double() - expected).abs() <= operands + sums + 1e-6).all()


@pytest.mark.parametrize("m", [1, 8, 21])
def test_rows_without_scale_keep_their_mean(m):
    """A row scale of 0 in a weight with means: the row is its mean exactly, whatever its signs are."""
    weight = random_sign_salient(5, 20, 90, row_means=True)
    weight.row_scales[::3] = 0.0
    x = activations(2, m, 90, dtype=torch.float16)
    y = salient_product(weight, x, splits=1)
    expected = x.double() @ weight.dequantize().double().t()
    _, sums = salient_bound(weight, x)
    assert ((y.double() - expected).abs() <= sums + 1e-6).all()
