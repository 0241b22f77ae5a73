"""The grouped_int storage format: exact round trips, exact bytes, and a size that equals the file's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from quantkit.errors import FileError, RequestError
from quantkit.formats.checkpoint import check_values, read_header, write_tensors
from quantkit.formats.grouped_int import GroupedInt, GroupedIntSpec, check_group_size, pack, symmetric_zero, unpack
from quantkit.formats.packing import packed_size


def random_weight(bits: tuple[int, ...], out_features: int, group_size: int, symmetric: bool, seed: int) -> GroupedInt:
    """Uniform codes, float16 scales down to the subnormals, and zeros over the whole allowed range."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.tensor(bits)
    shape = (out_features, len(bits))
    levels = (2**width).unsqueeze(-1).expand(len(bits), group_size).reshape(-1)
    codes = (torch.rand(out_features, len(bits) * group_size, generator=generator) * levels).floor().to(torch.uint8)
    scales = (10.0 ** (torch.rand(shape, generator=generator) * 11 - 7)).half().clamp(min=2**-24).float()
    zeros = (torch.rand(shape, generator=generator) * 2**width).floor()
    real = (torch.randn(shape, generator=generator) * 3).half().float()
    zeros = torch.where(width == 1, real, zeros)
    if symmetric:
        zeros = torch.tensor([symmetric_zero(b) for b in bits]).expand(shape).contiguous()
    return GroupedInt(codes=codes, scales=scales, zeros=zeros, bits=bits, symmetric=symmetric)


weights = st.builds(
    random_weight,
    bits=st.lists(st.integers(1, 8), min_size=1, max_size=6).map(tuple),
    out_features=st.integers(1, 9),
    group_size=st.sampled_from([1, 2, 3, 7, 8, 16, 33]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**31),
)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())


@given(weights)
@example(random_weight((3,), 1, 1, False, 0))
@example(random_weight((4, 2, 1, 2, 8), 3, 3, False, 1))
def test_unpack_inverts_pack(weight: GroupedInt) -> None:
    tensors = pack(weight)
    again = unpack(weight.spec(), tensors)
    assert again.bits == weight.bits
    assert again.symmetric == weight.symmetric
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scales, weight.scales)
    assert torch.equal(again.zeros, weight.zeros)
    assert torch.equal(again.dequantize(), weight.dequantize())


@given(weights)
def test_stored_tensors_are_exactly_the_declared_layout(weight: GroupedInt) -> None:
    spec = weight.spec()
    tensors = pack(weight)
    assert list(tensors) == list(spec.tensor_layout())
    for name, (dtype, shape) in spec.tensor_layout().items():
        assert (tensors[name].dtype, tuple(tensors[name].shape)) == (dtype, shape), name
        assert tensors[name].is_contiguous()
    check_values("layer", spec, tensors)


@given(weights)
def test_bits_per_weight_is_the_size_of_the_tensors(weight: GroupedInt) -> None:
    stored = sum(tensor.numel() * tensor.dtype.itemsize for tensor in pack(weight).values())
    assert weight.spec().n_bytes == stored
    assert weight.spec().bpw == 8 * stored / weight.codes.numel()


@given(weights)
def test_description_survives_json(weight: GroupedInt) -> None:
    spec = weight.spec()
    assert GroupedIntSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@given(weights)
def test_weight_is_scale_times_code_minus_zero(weight: GroupedInt) -> None:
    dequantized = weight.dequantize()
    n_columns = weight.codes.shape[1]
    for column in {0, n_columns // 2, n_columns - 1}:
        group = column // weight.group_size
        expected = weight.scales[:, group] * (weight.codes[:, column].float() - weight.zeros[:, group])
        assert torch.equal(dequantized[:, column], expected)


def test_bpw_equals_the_bytes_of_the_file(tmp_path: Path) -> None:
    """The bits per weight of a module are the data section of a file that holds nothing else, times 8, per weight."""
    weight = random_weight((2, 3, 2, 4), 24, 32, False, seed=3)
    path = tmp_path / "layer.safetensors"
    write_tensors(path, pack(weight))
    header = read_header(path)
    data_bytes = path.stat().st_size - min(ref.offset for ref in header.values())
    assert weight.spec().bpw == 8 * data_bytes / weight.codes.numel()


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "expected"),
    [
        ((4,) * 4, 128, True, 4 + 16 / 128),
        ((4,) * 4, 128, False, 4 + (16 + 4) / 128),
        ((2,) * 8, 64, False, 2 + (16 + 2) / 64),
        ((1,) * 4, 128, False, 1 + (16 + 16) / 128),
        ((2, 3) * 4, 32, False, 2.5 + (16 + 2.5) / 32 + 16 * 8 / (256 * 256)),
    ],
)
def test_bpw_by_hand(bits: tuple[int, ...], group_size: int, symmetric: bool, expected: float) -> None:
    assert random_weight(bits, 256, group_size, symmetric, seed=0).spec().bpw == pytest.approx(expected, abs=1e-12)


GOLDEN = GroupedInt(
    codes=torch.tensor([[1, 0, 7, 5, 3, 2], [0, 1, 0, 6, 1, 3]], dtype=torch.uint8),
    scales=torch.tensor([[0.5, 1.0, 2.0], [0.25, 4.0, 8.0]]),
    zeros=torch.tensor([[0.5, 3.0, 2.0], [-1.5, 7.0, 0.0]]),
    bits=(1, 3, 2),
    symmetric=False,
)


def test_golden_bytes() -> None:
    """Stored order is by width: group 0 (1 bit), group 2 (2 bits), group 1 (3 bits)."""
    assert {name: tensor_bytes(tensor).hex() for name, tensor in pack(GOLDEN).items()} == {
        "codes_1b": "0102",  # rows 1 0 | 0 1
        "codes_2b": "0b0d",  # rows 3 2 | 1 3
        "codes_3b": "2f30",  # rows 7 5 | 0 6
        "scales": "0038" + "0040" + "003c" + "0034" + "0048" + "0044",  # 0.5 2 1 | 0.25 8 4
        "zeros_1b": "0038" + "00be",  # 0.5 | -1.5
        "zeros_2b": "02",  # 2, 0
        "zeros_3b": "3b",  # 3, 7
        "group_order": "0000" + "0200" + "0100",
    }


def test_group_order_must_be_a_permutation() -> None:
    tensors = pack(GOLDEN)
    tensors["group_order"] = torch.tensor([0, 1, 1], dtype=torch.int16)
    with pytest.raises(FileError, match="group_order is not a permutation"):
        unpack(GOLDEN.spec(), tensors)


@pytest.mark.parametrize(
    "change",
    [
        {"out_features": 0},
        {"group_size": 0},
        {"group_size": 3},
        {"in_features": 8},
        {"segments": [[3, 1], [2, 1], [1, 1]]},
        {"segments": [[1, 1], [1, 2]]},
        {"segments": [[1, 1], [2, 1], [9, 1]]},
        {"segments": [[0, 1], [2, 1], [3, 1]]},
        {"segments": [[1, 0], [2, 2], [3, 1]]},
        {"segments": []},
    ],
)
def test_inconsistent_description_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(FileError, match="inconsistent module description"):
        GroupedIntSpec.from_json(GOLDEN.spec().to_json() | change)


def test_unknown_and_missing_fields_are_refused_by_name() -> None:
    fields = GOLDEN.spec().to_json()
    with pytest.raises(FileError, match=r"unknown or missing fields \['rotation'\]"):
        GroupedIntSpec.from_json(fields | {"rotation": True})
    del fields["symmetric"]
    with pytest.raises(FileError, match=r"unknown or missing fields \['symmetric'\]"):
        GroupedIntSpec.from_json(fields)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scales", float("nan"), "layer: scales holds NaN, Inf or negative"),
        ("scales", float("inf"), "layer: scales holds NaN, Inf or negative"),
        ("scales", -1.0, "layer: scales holds NaN, Inf or negative"),
        ("zeros_1b", float("nan"), "layer: zeros_1b holds NaN or Inf"),
        ("zeros_2b", 0x1F, "layer: zeros_2b has bits set beyond its last code"),
        ("zeros_3b", 0x7B, "layer: zeros_3b has bits set beyond its last code"),
        ("codes_1b", 0x04, "layer: codes_1b has bits set beyond its last code"),
        ("codes_3b", 0x70, "layer: codes_3b has bits set beyond its last code"),
        ("group_order", 2, "layer: .*group_order is not a permutation"),
        ("group_order", 3, "layer: .*group_order is not a permutation"),
    ],
)
def test_values_that_no_writer_produces_are_refused(name: str, value: float, message: str) -> None:
    tensors = {key: tensor.clone() for key, tensor in pack(GOLDEN).items()}
    tensors[name].view(-1)[-1] = value
    with pytest.raises(FileError, match=message):
        check_values("layer", GOLDEN.spec(), tensors)


def test_group_size_messages_name_what_fits() -> None:
    assert check_group_size(4096, 128, "q_proj") == 128
    with pytest.raises(RequestError, match=r"11008 is not a multiple of group_size 96 \(remainder 64\); use 16, 32"):
        check_group_size(11008, 96, "down_proj")
    with pytest.raises(RequestError, match=r"use 0 \(one group per row\)"):
        check_group_size(17, 16, "odd")
    with pytest.raises(RequestError, match="not a multiple of group_size -1;"):
        check_group_size(64, -1, "q_proj")


def test_packed_size_of_a_row() -> None:
    assert [packed_size(n, 3) for n in (1, 2, 3, 8, 9)] == [1, 1, 2, 3, 4]
