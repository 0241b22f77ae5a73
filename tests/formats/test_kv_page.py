"""Pages of the KV cache: packing, layout, and the bytes they take."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import law

from quantkit.formats.kv_page import (
    PAGE,
    WIDTHS,
    GridSpec,
    PageSpec,
    dequantize,
    pack_keys,
    pack_values,
    unpack_keys,
    unpack_values,
)

TOKEN = GridSpec(group=8)
CHANNEL = GridSpec(axis="channel", group=32, offsets=True)


def spec_of(bits: int, heads: int = 2, head_dim: int = 8, **grids: GridSpec) -> PageSpec:
    return PageSpec(heads=heads, head_dim=head_dim, bits=bits, **{"keys": TOKEN, "values": TOKEN, **grids})


@law
@given(st.sampled_from(WIDTHS), st.integers(1, 300), st.integers(0, 2**32))
def test_codes_come_back_and_missing_tokens_are_zero(bits: int, n: int, seed: int) -> None:
    spec = spec_of(bits)
    codes = torch.randint(0, 1 << bits, (2, n, 8), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    for pack, unpack in ((pack_keys, unpack_keys), (pack_values, unpack_values)):
        words = pack(codes, spec)
        assert words.dtype == torch.int16
        back = unpack(words, spec)
        assert torch.equal(back[:, :n], codes)
        assert not back[:, n:].any()


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_field_is_a_run_of_consecutive_tokens(bits: int) -> None:
    """The picture of the module: field e of word j is token e * run + j, for keys and values."""
    spec = spec_of(bits)
    for token in (0, 1, spec.run - 1, spec.run, PAGE - 1):
        codes = torch.zeros(2, PAGE, 8, dtype=torch.uint8)
        codes[1, token, 3] = (1 << bits) - 1
        field, word = divmod(token, spec.run)
        value = ((1 << bits) - 1) << (field * bits)
        value -= 1 << 16 if value >= 1 << 15 else 0
        keys, values = pack_keys(codes, spec), pack_values(codes, spec)
        assert keys[1, 0, word, 3] == value == values[1, 0, 3, word]
        assert (keys != 0).sum() == 1 == (values != 0).sum()


@pytest.mark.parametrize(
    ("bits", "grids", "head_dim", "heads", "expected"),
    [
        (2, {"keys": GridSpec(group=128, offsets=True), "values": GridSpec(group=128, offsets=True)}, 128, 8, 2.25),
        (4, {"keys": GridSpec(group=128, offsets=True), "values": GridSpec(group=128, offsets=True)}, 128, 8, 4.25),
        (2, {"keys": CHANNEL, "values": GridSpec(group=32, offsets=True)}, 128, 8, 3.0),  # KIVI, groups of 32
        (4, {"keys": CHANNEL, "values": GridSpec(group=32, offsets=True)}, 64, 4, 5.0),
        (2, {"keys": GridSpec(group=128), "values": GridSpec(group=128)}, 128, 8, 2.125),
        (
            2,
            {"keys": GridSpec(group=64), "values": GridSpec(group=0, shared=True)},
            64,
            4,
            2 + (16 / 64 + 16 / 256) / 2,
        ),
    ],
)
def test_bits_per_element(bits: int, grids: dict, head_dim: int, heads: int, expected: float) -> None:
    spec = spec_of(bits, heads, head_dim, **grids)
    assert spec.bits_per_element == expected
    tensors = [torch.zeros(shape, dtype=dtype) for dtype, shape in spec.layout(5).values()]
    assert sum(tensor.nbytes for tensor in tensors) == 5 * spec.page_bytes()


def test_dequantize_is_scale_times_code_plus_offset() -> None:
    generator = torch.Generator().manual_seed(0)
    spec = spec_of(4, keys=CHANNEL, values=GridSpec(group=4))
    tensors = {}
    for name, (dtype, shape) in spec.layout(3).items():
        tensors[name] = torch.randn(shape, generator=generator).to(dtype)
    codes = torch.randint(0, 16, (2, 3 * PAGE, 8), generator=generator).to(torch.uint8)
    tensors["key_words"], tensors["value_words"] = pack_keys(codes, spec), pack_values(codes, spec)
    keys = dequantize(tensors, spec, "key", slice(1, 3))
    values = dequantize(tensors, spec, "value", slice(1, 3))
    for head, token, channel in ((0, 0, 0), (1, 77, 5), (1, 255, 7)):
        slot = PAGE + token
        code = float(codes[head, slot, channel])
        scale, offset = (float(tensors[f"key_{name}"][head, slot // 32, channel]) for name in ("scales", "offsets"))
        assert float(keys[head, token, channel]) == pytest.approx(code * scale + offset, rel=1e-6)
        place = slot // PAGE * PAGE + slot % 32 * 4 + slot % PAGE // 32  # word, then field
        scale = float(tensors["value_scales"][head, channel // 4, place])
        assert float(values[head, token, channel]) == pytest.approx((code - 7.5) * scale, rel=1e-6)
