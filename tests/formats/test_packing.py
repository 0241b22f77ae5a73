"""Bit streams: exact bytes, round trips at every width, and agreement with arithmetic on Python integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit.formats.packing import pack_bits, packed_size, unpack_bits

bit_widths = st.integers(1, 8)


@st.composite
def code_matrices(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """uint8 ``[rows, n]`` with values below ``2 ** bits``; sizes around byte and word boundaries."""
    bits = draw(bit_widths)
    rows = draw(st.integers(1, 4))
    n = draw(st.sampled_from([1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100]))
    seed = draw(st.integers(0, 2**31))
    codes = torch.randint(0, 2**bits, (rows, n), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    fill = draw(st.sampled_from(["random", "zeros", "ones"]))
    return codes * 0 if fill == "zeros" else torch.full_like(codes, 2**bits - 1) if fill == "ones" else codes, bits


@given(code_matrices())
def test_unpack_inverts_pack(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    packed = pack_bits(codes, bits)
    assert packed.shape == (codes.shape[0], packed_size(codes.shape[1], bits))
    assert torch.equal(unpack_bits(packed, bits, codes.shape[1]), codes)


@given(code_matrices())
def test_row_is_the_little_endian_number_of_its_codes(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    for row, packed in zip(codes.tolist(), pack_bits(codes, bits).tolist(), strict=True):
        number = sum(code << (i * bits) for i, code in enumerate(row))
        assert bytes(packed) == number.to_bytes(packed_size(len(row), bits), "little")


@given(code_matrices())
def test_layout_of_the_input_in_memory_does_not_matter(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    strided = torch.stack([codes, 255 - codes], dim=-1)[..., 0]
    transposed = codes.t().contiguous().t()
    expected = pack_bits(codes, bits)
    assert torch.equal(pack_bits(strided, bits), expected)
    assert torch.equal(pack_bits(transposed, bits), expected)
    wide = torch.stack([expected, 255 - expected], dim=-1)[..., 0]
    assert torch.equal(unpack_bits(wide, bits, codes.shape[1]), codes)


def test_leading_dimensions_are_kept() -> None:
    codes = torch.arange(2 * 3 * 10, dtype=torch.uint8).reshape(2, 3, 10) % 32
    packed = pack_bits(codes, 5)
    assert packed.shape == (2, 3, 7)
    assert torch.equal(unpack_bits(packed, 5, 10), codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_many_rows_are_packed_in_several_steps(bits: int) -> None:
    """More codes than one step's scratch holds (2 ** 22), so the chunk boundary is crossed."""
    codes = torch.arange(5 * (1 << 20), dtype=torch.int64).mul_(2654435761).bitwise_right_shift_(7)
    codes = codes.remainder_(2**bits).to(torch.uint8).reshape(-1, 1 << 10)
    packed = pack_bits(codes, bits)
    assert torch.equal(packed[-1:], pack_bits(codes[-1:], bits))
    assert torch.equal(unpack_bits(packed, bits, codes.shape[1]), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (1, [1, 0, 1, 1, 0, 0, 0, 1, 1], "8d01"),
        (2, [3, 0, 1, 2, 1], "9301"),
        (3, [1, 2, 3, 4, 5, 6, 7, 0], "d1581f"),
        (4, [1, 2, 15], "210f"),
        (5, [31, 0, 17], "1f44"),
        (6, [63, 1, 32, 2], "7f000a"),
        (7, [127, 1], "ff00"),
        (8, [7, 255], "07ff"),
    ],
)
def test_golden_bytes(bits: int, codes: list[int], expected: str) -> None:
    assert bytes(pack_bits(torch.tensor(codes, dtype=torch.uint8), bits).tolist()).hex() == expected
