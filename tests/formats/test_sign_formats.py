"""The sign formats: exact round trips, sizes that are a formula and the file, definitions, and damage by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sign_weights import SIGN_FACTORS, SIGN_SALIENT, random_sign_factors, random_sign_salient
from strategies import law
from torch import Tensor

from quantkit.errors import FileError
from quantkit.formats import storage
from quantkit.formats.checkpoint import check_values, read_header, write_tensors
from quantkit.formats.sign_factors import SignFactors
from quantkit.formats.sign_salient import SignSalient

Weight = SignSalient | SignFactors
WEIGHTS = st.one_of(SIGN_SALIENT, SIGN_FACTORS)


@law
@given(WEIGHTS)
def test_unpack_inverts_pack(weight: Weight) -> None:
    spec, tensors = weight.spec(), storage.pack(weight)
    assert list(tensors) == list(spec.tensor_layout())
    for name, (dtype, shape) in spec.tensor_layout().items():
        assert (tensors[name].dtype, tuple(tensors[name].shape)) == (dtype, shape), name
    check_values("layer", spec, tensors)
    again = storage.unpack(spec, tensors)
    assert torch.equal(again.dequantize(), weight.dequantize())
    repacked = storage.pack(again)
    assert all(torch.equal(repacked[name], tensors[name]) for name in tensors)


@law
@given(WEIGHTS)
def test_description_goes_through_json(weight: Weight) -> None:
    spec = weight.spec()
    assert storage.spec_from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert (spec.out_features, spec.in_features) == tuple(weight.dequantize().shape)


@law
@given(SIGN_SALIENT)
def test_bits_of_sign_salient(weight: SignSalient) -> None:
    """Signs and mask end on whole bytes; vectors are 16 bits an entry; the salient part is a grouped_int weight."""
    spec = weight.spec()
    out, n_binary = weight.signs.shape
    n_bytes = out * -(-n_binary // 8) + 2 * out * (1 + spec.row_means) + 2 * n_binary * spec.column_scales
    if weight.salient:
        n_bytes += -(-spec.in_features // 8) + weight.salient.spec().n_bytes
    assert spec.n_bytes == n_bytes == sum(t.numel() * t.dtype.itemsize for t in storage.pack(weight).values())
    assert spec.bpw == 8 * n_bytes / (out * spec.in_features)


@law
@given(SIGN_FACTORS)
def test_bits_of_sign_factors(weight: SignFactors) -> None:
    """r (in + out + 16) + 16 (in + out) bits a path, and what rounds rows up to bytes."""
    spec = weight.spec()
    out, in_features, rank = spec.out_features, spec.in_features, sum(weight.ranks)
    bits = rank * (in_features + out + 16) + 16 * len(weight.ranks) * (in_features + out)
    padding = rank * (-in_features % 8) + out * (-rank % 8)
    assert 8 * spec.n_bytes == bits + padding
    assert spec.n_bytes == sum(t.numel() * t.dtype.itemsize for t in storage.pack(weight).values())


def test_bits_of_layers_of_real_size() -> None:
    """The figures of the papers' accounting, with every vector counted."""
    littlebit = random_sign_factors(0, 4096, 4096, (8, 8)).spec()
    assert littlebit.bpw == (16 * (8192 + 16) + 32 * 8192) / 4096**2
    ptq = random_sign_salient(
        0, 512, 384, row_means=True, column_scales=True, salient_bits=(4,), salient_group=128
    ).spec()
    signs, vectors, salient = 512 * 384 / 8, 2 * (2 * 512 + 384) + 512 / 8, 512 * (64 + 2 + 0.5)
    assert ptq.n_bytes == signs + vectors + salient


def test_a_file_is_as_large_as_its_description(tmp_path: Path) -> None:
    for weight in (random_sign_factors(1, 17, 23, (9, 4)), random_sign_salient(1, 7, 21, salient_bits=(4, 4))):
        write_tensors(tmp_path / "file", storage.pack(weight))
        assert sum(ref.n_bytes for ref in read_header(tmp_path / "file").values()) == weight.spec().n_bytes


def test_sign_salient_weight_by_its_definition() -> None:
    weight = random_sign_salient(3, 4, 6, row_means=True, column_scales=True, salient_bits=(4, 2), salient_group=2)
    assert weight.salient_mask is not None
    assert weight.salient is not None
    assert weight.row_means is not None
    assert weight.column_scales is not None
    dense, integers = weight.dequantize(), weight.salient.dequantize()
    n_binary = n_salient = 0
    for column, is_salient in enumerate(weight.salient_mask.tolist()):
        for row in range(4):
            if is_salient:
                expected = integers[row, n_salient]
            else:
                sign = 1.0 if weight.signs[row, n_binary] else -1.0
                value = weight.row_scales[row] * sign + weight.row_means[row]
                expected = value * weight.column_scales[n_binary]
            assert dense[row, column] == expected
        n_salient, n_binary = n_salient + is_salient, n_binary + (not is_salient)


def test_plain_binarization_is_the_case_without_salient_columns() -> None:
    weight = random_sign_salient(0, 5, 13)
    assert list(weight.spec().tensor_layout()) == ["signs", "row_scales"]
    assert torch.equal(weight.dequantize().abs(), weight.row_scales.abs()[:, None].expand(5, 13))


def test_sign_factors_weight_by_its_definition() -> None:
    """Element by element in float64; the float32 sum of 5 terms, each rounded 4 times, errs by at most 9 u of each."""
    weight = random_sign_factors(4, 6, 5, (3, 2))
    U, V = (torch.where(signs, 1.0, -1.0).double() for signs in (weight.u_signs, weight.v_signs))
    expected = torch.zeros(6, 5, dtype=torch.float64)
    for path, ranks in enumerate((range(3), range(3, 5))):
        for k in ranks:
            column = weight.row_scales[path].double() * U[:, k] * weight.latent_scales[k]
            expected += column[:, None] * (V[k] * weight.column_scales[path])
    terms = weight.row_scales.double().abs().T @ weight.column_scales.double().abs() * weight.latent_scales.abs().sum()
    assert bool(((weight.dequantize().double() - expected).abs() <= 9 * 2.0**-24 * terms + 1e-40).all())


SALIENT = random_sign_salient(7, 5, 11, row_means=True, column_scales=True, salient_bits=(4, 3), salient_group=3)
FACTORS = random_sign_factors(7, 5, 11, (3, 2))


def _set(name: str, index: int, value: float) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[index] = value

    return edit


@pytest.mark.parametrize(
    ("weight", "edit", "message"),
    [
        (SALIENT, _set("row_scales", 2, float("nan")), "row_scales holds NaN or Inf"),
        (SALIENT, _set("row_means", 2, float("inf")), "row_means holds NaN or Inf"),
        (SALIENT, _set("column_scales", 0, float("-inf")), "column_scales holds NaN or Inf"),
        (SALIENT, _set("signs", 1, 0xFF), "signs has bits set beyond its last code"),
        (SALIENT, _set("salient_columns", 2, 0xFF), "salient_columns has bits set beyond its last code"),
        (SALIENT, _set("salient_columns", 0, 0xFF), r"salient_columns marks \d+ columns, 6 are stored"),
        (SALIENT, _set("salient_scales", 0, -1.0), r"salient_\*: scales holds NaN, Inf or negative numbers"),
        (SALIENT, _set("salient_group_order", 0, 0), r"salient_\*: .*group_order is not a permutation"),
        (FACTORS, _set("row_scales", 9, float("nan")), "row_scales holds NaN or Inf"),
        (FACTORS, _set("latent_scales", 4, float("nan")), "latent_scales holds NaN or Inf"),
        (FACTORS, _set("column_scales", 21, float("inf")), "column_scales holds NaN or Inf"),
        (FACTORS, _set("v_signs", 1, 0xFF), "v_signs has bits set beyond its last code"),
        (FACTORS, _set("u_signs", 4, 0xFF), "u_signs has bits set beyond its last code"),
    ],
)
def test_damaged_tensor_is_named(weight: Weight, edit: Callable[[dict[str, Tensor]], None], message: str) -> None:
    tensors = storage.pack(weight)
    check_values("layer", weight.spec(), tensors)
    edit(tensors)
    with pytest.raises(FileError, match=f"layer: {message}"):
        check_values("layer", weight.spec(), tensors)


@pytest.mark.parametrize(
    ("weight", "fields", "message"),
    [
        (SALIENT, {"rotation": 1}, r"sign_salient: unknown or missing fields \['rotation'\]"),
        (SALIENT, {"out_features": 0}, "sign_salient: inconsistent"),
        (SALIENT, {"in_features": 6}, "sign_salient: inconsistent"),
        (SALIENT, {"row_means": 1}, "sign_salient: inconsistent"),
        (SALIENT, {"out_features": 6}, "sign_salient: inconsistent"),
        (SALIENT, {"salient": {"format": "sign_factors"}}, "sign_salient: salient must be null or a grouped_int"),
        (SALIENT, {"salient": {"format": "grouped_int"}}, "grouped_int: unknown or missing fields"),
        (FACTORS, {"rank": 8}, r"sign_factors: unknown or missing fields \['rank'\]"),
        (FACTORS, {"ranks": []}, "sign_factors: inconsistent"),
        (FACTORS, {"ranks": [1, 2, 3]}, "sign_factors: inconsistent"),
        (FACTORS, {"ranks": [1.5]}, "sign_factors: inconsistent"),
        (FACTORS, {"ranks": [0, 1]}, "sign_factors: inconsistent"),
        (FACTORS, {"in_features": 0}, "sign_factors: inconsistent"),
        (FACTORS, {"format": "sign"}, "unknown storage format 'sign'; known: grouped_int, sign_salient, sign_factors"),
    ],
)
def test_description_that_cannot_be_right(weight: Weight, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FileError, match=message):
        storage.spec_from_json(weight.spec().to_json() | fields)
    missing = weight.spec().to_json()
    del missing["in_features"]
    with pytest.raises(FileError, match=r"missing fields \['in_features'\]"):
        storage.spec_from_json(missing)
