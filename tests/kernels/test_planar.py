"""planar-16: exact round trips, the documented place of every code, and what padding costs."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_weights import random_weight

from quantkit.errors import RequestError
from quantkit.formats.grouped_int import GroupedIntSpec, pack, segment_codes, stored_zeros
from quantkit.kernels.planar import (
    ROW_TILE,
    from_planar,
    has_zeros,
    is_planar,
    padded_rows,
    planar_segments,
    to_planar,
)
from quantkit.kernels.planar_matmul import triton_kernels


def round_trip(weight):
    spec, tensors = weight.spec(), pack(weight)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    restored = from_planar(spec, to_planar(spec, tensors))
    assert list(restored) == list(spec.tensor_layout())
    for name, tensor in restored.items():
        assert tensor.dtype == tensors[name].dtype
        assert tensor.is_contiguous()
        assert torch.equal(tensor, tensors[name])
        assert torch.equal(before[name], tensors[name])


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    out_features=st.sampled_from([1, 3, 64, 65]),
    group_size=st.sampled_from([16, 32, 48, 96, 128, 7]),
    bits=st.lists(st.integers(1, 8), min_size=1, max_size=12),
    symmetric=st.booleans(),
)
def test_stored_tensors_come_back_byte_for_byte(seed, out_features, group_size, bits, symmetric):
    round_trip(random_weight(seed, out_features, group_size, tuple(bits), symmetric))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_chunks_of_rows(bits, monkeypatch):
    monkeypatch.setattr("quantkit.kernels.planar._CHUNK_BYTES", 1 << 14)
    round_trip(random_weight(0, 200, 64, (bits,) * 9))


def code_at(words: torch.Tensor, segment, row: int, column: int) -> int:
    """A code read by the formula of the documentation, with Python integers."""
    width, per_block = segment.plane_width, segment.planes_per_block
    plane, word = divmod(column, width)
    block, field = divmod(plane, per_block)
    start = segment.word_offset + row * segment.row_words

    def load(index: int) -> int:
        return int(words[start + index]) & 0xFFFF

    pair, byte = field // 2, field % 2 * 8
    if segment.bits != 3:
        return load(block * width + word) >> byte + pair * segment.bits & (1 << segment.bits) - 1
    first, second, third = (load((3 * block + part) * width + word) for part in range(3))
    if pair == 6:
        return first >> byte + 6 & 3 | (second >> byte + 6 & 1) << 2
    if pair == 7:
        return third >> byte + 6 & 3 | (second >> byte + 7 & 1) << 2
    return (first, second, third)[pair // 2] >> byte + pair % 2 * 3 & 7


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_code_is_where_the_documentation_says(symmetric):
    weight = random_weight(0, 5, 16, (3, 1, 4, 2, 6, 3, 8, 1, 3), symmetric)
    spec, tensors = weight.spec(), pack(weight)
    planar = to_planar(spec, tensors)
    for segment in planar_segments(spec):
        codes = torch.cat([segment_codes(spec, tensors, bits) for bits, _ in segment.stored], dim=1)
        for row in range(5):
            read = [code_at(planar["planar"], segment, row, column) for column in range(codes.shape[1])]
            assert read == codes[row].tolist()
    n_groups = spec.n_groups
    assert torch.equal(planar["planar_scales"][:n_groups, :5], tensors["scales"].t())
    assert torch.equal(planar["planar_order"][:n_groups], tensors["group_order"])
    assert has_zeros(spec)  # 6 bits in an 8-bit plane
    assert torch.equal(planar["planar_zeros"][:n_groups, :5].float(), stored_zeros(spec, tensors).t())


@settings(max_examples=200, deadline=None)
@given(
    out_features=st.integers(1, 300),
    group_size=st.integers(1, 20).map(lambda n: 16 * n),
    counts=st.dictionaries(st.integers(1, 8), st.integers(1, 70), min_size=1, max_size=8),
)
def test_segments_tile_memory(out_features, group_size, counts):
    spec = GroupedIntSpec(
        out_features=out_features,
        in_features=group_size * sum(counts.values()),
        group_size=group_size,
        segments=tuple(sorted(counts.items())),
        symmetric=True,
    )
    offset = first_group = 0
    for segment in planar_segments(spec):
        assert segment.word_offset == offset
        assert segment.word_offset % 16 == segment.row_words % 16 == 0  # loads of 32 bytes stay aligned
        assert segment.first_group == first_group
        assert group_size % segment.plane_width == 0
        assert segment.n_planes * segment.plane_width == segment.n_groups * group_size
        assert 0 <= segment.n_blocks * segment.planes_per_block - segment.n_planes < segment.planes_per_block
        offset += padded_rows(spec) * segment.row_words
        first_group += segment.n_groups
    assert first_group == spec.n_groups


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_a_real_layer_costs_what_its_file_costs(bits):
    weight = GroupedIntSpec(
        out_features=4096, in_features=14336, group_size=128, segments=((bits, 112),), symmetric=True
    )
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in weight.tensor_layout().items()}
    planar = to_planar(weight, tensors)
    assert sum(tensor.nbytes for tensor in planar.values()) <= 1.002 * weight.n_bytes


def test_group_sizes_without_planar_form_keep_the_stored_tensors():
    weight = random_weight(0, 4, 24, (4, 4))
    tensors = pack(weight)
    assert not is_planar(weight.spec())
    assert to_planar(weight.spec(), tensors) == tensors


def test_rows_are_padded_to_whole_tiles():
    spec = random_weight(0, ROW_TILE + 1, 16, (4,)).spec()
    assert padded_rows(spec) == 2 * ROW_TILE


def test_without_triton_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RequestError, match=re.escape("need Triton; run: pip install 'quantkit[kernels]'")):
        triton_kernels()
