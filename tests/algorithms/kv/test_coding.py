"""The quantizers of keys and values, and the rotation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit.algorithms.kv.coding import MIN_SCALE, Coded, encode
from quantkit.algorithms.kv.hadamard import block_size, rotate
from quantkit.formats.kv_page import WIDTHS, GridSpec

GRIDS = {
    "token": GridSpec(group=16, offsets=True),
    "channel": GridSpec(axis="channel", group=32, offsets=True),
    "shared": GridSpec(group=0, shared=True, offsets=True),
    "symmetric": GridSpec(group=16),
    "symmetric channel": GridSpec(axis="channel", group=32),
    "symmetric shared": GridSpec(group=0, shared=True),
}


def tokens(seed: int, heads: int = 2, n: int = 64, head_dim: int = 16) -> torch.Tensor:
    x = torch.randn(heads, n, head_dim, generator=torch.Generator().manual_seed(seed))
    return x * torch.linspace(0.1, 8, head_dim)


def spread(scales: torch.Tensor, grid: GridSpec) -> torch.Tensor:
    if grid.axis == "channel":
        return scales.float().repeat_interleave(grid.group, 1)
    by_token = scales.float().transpose(1, 2)
    return by_token if by_token.shape[2] == 1 else by_token.repeat_interleave(grid.group, 2)


def decode(coded: Coded, bits: int, grid: GridSpec) -> torch.Tensor:
    scale = spread(coded.scales, grid)
    offset = -scale * ((1 << bits) - 1) / 2 if coded.offsets is None else spread(coded.offsets, grid)
    return coded.codes.float() * scale + offset


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", ["token", "channel", "shared"])
def test_a_range_is_met_within_half_a_step(name: str, bits: int) -> None:
    """Plus the rounding of the offset to float16, by which the range may miss its ends."""
    grid, x = GRIDS[name], tokens(bits)
    coded = encode(x, bits, grid)
    error = (decode(coded, bits, grid) - x).abs()
    assert int(coded.codes.max()) < 1 << bits
    slack = spread(coded.offsets, grid).abs() * 2**-11 + ((1 << bits) - 1) * spread(coded.scales, grid) * 2**-11
    assert (error <= spread(coded.scales, grid) / 2 + slack + 1e-6).all()


@given(st.sampled_from(sorted(GRIDS)), st.sampled_from(WIDTHS), st.integers(0, 1000))
def test_tokens_and_groups_are_coded_alone(name: str, bits: int, seed: int) -> None:
    """All at once, or in units of 32 tokens: the same codes and scales, bit for bit."""
    grid, x = GRIDS[name], tokens(seed, n=96)
    whole = encode(x, bits, grid)
    parts = [encode(x[:, start : start + 32], bits, grid) for start in range(0, 96, 32)]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts], 1))
    dimension = 1 if grid.axis == "channel" else 2
    assert torch.equal(whole.scales, torch.cat([part.scales for part in parts], dimension))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", ["symmetric", "symmetric channel", "symmetric shared"])
def test_the_symmetric_grid_keeps_the_vectors_length_along_itself(name: str, bits: int) -> None:
    """<x, x'> = |x|^2 in every group, up to the rounding of one scale to float16."""
    grid, x = GRIDS[name], tokens(bits)
    y = decode(encode(x, bits, grid), bits, grid)
    if grid.shared:
        ratio = (x * y).sum((0, 2)) / (x * x).sum((0, 2))
    elif grid.axis == "token":
        ratio = (x * y).sum(2) / (x * x).sum(2)
    else:
        ratio = (x * y).unflatten(1, (-1, 32)).sum(2) / (x * x).unflatten(1, (-1, 32)).sum(2)
    assert ((ratio - 1).abs() <= 2**-10).all()


def test_without_that_rescaling_two_bits_shrink_a_normal_vector_by_an_eighth() -> None:
    """Why it is there: the least-squares grid has <x, x'> = |x'|^2, which is 0.88 |x|^2 for normal data."""
    x = torch.randn(1, 400, 128, generator=torch.Generator().manual_seed(0))
    y = decode(encode(x, 2, GridSpec(group=128)), 2, GridSpec(group=128))
    least_squares = (x * y).sum(2, keepdim=True) / (y * y).sum(2, keepdim=True)
    assert float(least_squares.mean()) == pytest.approx(0.88, abs=0.01)


@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize("value", [0.0, 3.0, -1000.0, 1e-9])
def test_constant_groups(name: str, value: float) -> None:
    grid = GRIDS[name]
    x = torch.full((2, 32, 16), value)
    coded = encode(x, 2, grid)
    assert (coded.scales >= MIN_SCALE).all()
    error = (decode(coded, 2, grid) - x).abs().max()
    assert error <= max(abs(value) * 2**-10, 2 * MIN_SCALE)


def test_clipping_shrinks_the_range_about_its_middle() -> None:
    x = torch.tensor([[[3.0, 5.0, 7.0, 7.0]]])
    grid = GridSpec(group=4, offsets=True)
    coded = encode(x, 2, grid, clip=0.5)
    assert float(coded.offsets) == 4.0
    assert float(coded.scales) == pytest.approx(2 / 3, rel=1e-3)
    assert coded.codes.tolist() == [[[0, 2, 3, 3]]] or coded.codes.tolist() == [[[0, 1, 3, 3]]]


@pytest.mark.parametrize("size", [1, 2, 16, 64, 80, 96, 128])
def test_rotation(size: int) -> None:
    """Orthogonal, its own inverse, and Sylvester's matrix in blocks."""
    matrix = rotate(torch.eye(size))
    assert torch.allclose(matrix @ matrix, torch.eye(size), atol=1e-6)
    assert torch.equal(matrix, matrix.T)
    block = block_size(size)
    index = torch.arange(block)
    parity = torch.tensor([[bin(i & j).count("1") % 2 for j in index.tolist()] for i in index.tolist()])
    expected = (1 - 2 * parity.float()) / block**0.5
    assert torch.allclose(matrix[:block, :block], expected, atol=1e-7)
    assert not matrix[:block, block:].any()


def test_rotation_of_a_row_does_not_depend_on_the_others() -> None:
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rotate(x)[3], rotate(x[3]))
