"""`low_rank`: exact round trips, sizes that are the factors', products by the kernel, and damage by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_weights import random_weight
from strategies import law

from quantkit.errors import FileError, RequestError
from quantkit.formats import storage
from quantkit.formats.checkpoint import check_values
from quantkit.formats.low_rank import LowRank
from quantkit.kernels.low_rank import from_planar, is_planar, matmul, to_planar


def random_low_rank(seed: int, out: int, rank: int, n: int, bits: tuple[int, int] = (3, 4)) -> LowRank:
    down = random_weight(seed, rank, n // 2, (bits[0],) * 2)
    return LowRank(down=down, up=random_weight(seed + 1, out, rank, (bits[1],)))


WEIGHTS = st.builds(
    random_low_rank,
    st.integers(0, 99),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 12).map(lambda half: 2 * half),
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
)


@law
@given(WEIGHTS)
def test_unpack_inverts_pack(weight: LowRank) -> None:
    spec, tensors = weight.spec(), storage.pack(weight)
    assert list(tensors) == list(spec.tensor_layout())
    for name, (dtype, shape) in spec.tensor_layout().items():
        assert (tensors[name].dtype, tuple(tensors[name].shape)) == (dtype, shape), name
    check_values("layer", spec, tensors)
    assert torch.equal(storage.unpack(spec, tensors).dequantize(), weight.dequantize())
    assert storage.spec_from_json(json.loads(json.dumps(spec.to_json()))) == spec


@law
@given(WEIGHTS)
def test_bytes_are_those_of_the_factors(weight: LowRank) -> None:
    spec = weight.spec()
    factors = weight.down.spec().n_bytes + weight.up.spec().n_bytes
    assert spec.n_bytes == factors == sum(t.numel() * t.dtype.itemsize for t in storage.pack(weight).values())
    assert spec.bpw == 8 * factors / (spec.out_features * spec.in_features)
    assert (spec.out_features, spec.in_features) == tuple(weight.dequantize().shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matmul_is_the_product(dtype: torch.dtype) -> None:
    weight = random_low_rank(0, 24, 16, 64)
    spec, tensors = weight.spec(), storage.pack(weight)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.arange(24.0).to(dtype)
    got = matmul(x, spec, tensors, bias)
    down, up = weight.down.dequantize().double(), weight.up.dequantize().double()
    expected = x.double() @ down.t() @ up.t() + bias.double()
    # float32 sums; one rounding of latents and of the output each to dtype, the factors' to half precision included
    scale = x.double().abs() @ down.abs().t() @ up.abs().t() + bias.double().abs()
    assert got.dtype == dtype
    assert got.shape == (2, 5, 24)
    assert bool(((got.double() - expected).abs() <= 4 * torch.finfo(dtype).eps * scale + 1e-5).all())
    with pytest.raises(RequestError):
        matmul(x[..., :32], spec, tensors)


def test_planar_form_and_back() -> None:
    weight = random_low_rank(3, 70, 32, 64)
    spec, tensors = weight.spec(), storage.pack(weight)
    assert is_planar(spec)
    back = from_planar(spec, to_planar(spec, tensors))
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert not is_planar(random_low_rank(0, 8, 8, 64).spec())  # groups of 8 columns


def bad(change: dict[str, Any]) -> dict[str, Any]:
    return {**random_low_rank(0, 8, 4, 6).spec().to_json(), **change}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (bad({"rank": 3}), r"low_rank: unknown or missing fields \['rank'\]"),
        (bad({"down": None}), "low_rank: down must be a grouped_int description, not None"),
        (bad({"up": {"format": "low_rank"}}), "low_rank: up must be a grouped_int description"),
        (bad({"in_features": 7}), "low_rank: inconsistent module description"),
    ],
)
def test_bad_descriptions(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FileError, match=message):
        storage.spec_from_json(fields)


@pytest.mark.parametrize("factor", ["down_", "up_"])
def test_damage_is_named(factor: str) -> None:
    weight = random_low_rank(0, 8, 4, 6)
    tensors = storage.pack(weight)
    tensors[f"{factor}scales"].view(-1)[0] = torch.nan
    with pytest.raises(FileError, match=rf"layer: {factor}\*: scales holds NaN"):
        check_values("layer", weight.spec(), tensors)
