"""Which weights and devices bit products are for, and the shape of their launch."""

from __future__ import annotations

import pytest
import torch

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.kernels.bit_gemv import (
    BitGemvConfig,
    bit_gemv_launch,
    choose_bit_gemv,
    counts_tokens,
    has_one_scale,
    is_bit_weight,
    most_tokens,
    x_bits,
)
from quantkit.kernels.launch import counts_bits
from quantkit.kernels.planar import to_planar


def layer(bits: int, out_features: int, group_size: int, n_groups: int, symmetric: bool = True) -> GroupedIntSpec:
    return GroupedIntSpec(
        out_features=out_features,
        in_features=group_size * n_groups,
        group_size=group_size,
        segments=((bits, n_groups),),
        symmetric=symmetric,
    )


@pytest.mark.parametrize(
    ("bits", "group_size", "n_groups", "taken"),
    [
        (1, 128, 32, True),
        (1, 4096, 1, True),
        (1, 896, 2, True),
        (1, 14336, 1, True),
        (1, 128, 9, True),
        (1, 128, 128, True),
        (1, 64, 64, False),  # two groups where a lane has one scale
        (1, 192, 32, False),
        (1, 128, 129, False),  # more than 16 warps
        (2, 128, 32, False),
    ],
)
def test_weights_whose_lanes_have_one_group(bits, group_size, n_groups, taken):
    assert is_bit_weight(layer(bits, 64, group_size, n_groups)) == taken


def test_one_width():
    spec = GroupedIntSpec(
        out_features=8, in_features=2048, group_size=128, segments=((1, 8), (2, 8)), symmetric=True
    )  # fmt: skip
    assert not is_bit_weight(spec)


@pytest.mark.parametrize(
    ("group_size", "n_groups", "one"),
    [
        (128, 8, False),
        (896, 2, False),
        (1024, 2, True),
        (2048, 2, True),
        (1920, 1, True),
        (1152, 1, False),
    ],  # narrow planes
)
def test_blocks_with_one_scale(group_size, n_groups, one):
    assert has_one_scale(layer(1, 64, group_size, n_groups)) == one


def test_not_on_the_cpu():
    assert not counts_bits(torch.device("cpu"))


@pytest.mark.parametrize("group_size", [128, 4096])
def test_programs_share_the_tiles_or_have_one_each(group_size):
    spec = layer(1, 100, group_size, 4096 // group_size)
    stored = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in spec.tensor_layout().items()}
    x, out = torch.zeros(2, 4096, dtype=torch.bfloat16), torch.zeros(2, 100)
    for rows, programs, wanted in ((16, None, 7), (32, None, 4), (16, 5, 5), (16, 9, 7)):
        config = BitGemvConfig(rows=rows, programs=programs)
        grid, arguments = bit_gemv_launch(x, spec, to_planar(spec, stored), None, out, config)
        assert grid == (wanted, 2)
        assert (arguments["num_warps"], arguments["n_tiles"]) == (4, -(-100 // rows))
        assert arguments["SLOTS"] == (1 if programs is None or programs > 7 else 2)


@pytest.mark.parametrize(("programs", "each", "slots", "spans"), [(9, 1, 2, False), (1, 1, 16, True), (2, 2, 8, True)])
def test_results_wait_in_registers_as_far_as_these_reach(programs, each, slots, spans):
    spec = layer(1, 17 * 16, 128, 32)
    stored = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in spec.tensor_layout().items()}
    x, out = torch.zeros(3, 4096, dtype=torch.bfloat16), torch.zeros(3, 17 * 16)
    config = BitGemvConfig(rows=16, programs=programs, tokens=2 * each, each=each)
    grid, arguments = bit_gemv_launch(x, spec, to_planar(spec, stored), None, out, config)
    assert grid == (programs, -(-3 // (2 * each)))
    assert (arguments["SLOTS"], arguments["SPANS"], arguments["num_warps"]) == (slots, spans, 8)


@pytest.mark.parametrize(
    ("dtype", "group_size", "bits"), [(torch.bfloat16, 128, 12), (torch.float16, 128, 16), (torch.bfloat16, 4096, 16)]
)
def test_bits_of_x(dtype, group_size, bits):
    """bfloat16 has eight bits of its own; with one scale for all columns sixteen cost no more."""
    assert x_bits(layer(1, 64, group_size, 4096 // group_size), dtype) == bits


@pytest.mark.parametrize("group_size", [128, 1024])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(64, 1024), (4096, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336), (28672, 8192)],
)
@pytest.mark.parametrize("bits", [12, 16])
def test_computed_shapes_are_possible(rows, columns, group_size, bits):
    spec = layer(1, rows, group_size, columns // group_size)
    blocks = {1024: 1, 4096: 4, 8192: 8, 14336: 16}[columns]
    for n_tokens in range(1, most_tokens(spec) + 1):
        config = choose_bit_gemv(spec, 132, n_tokens, bits)
        warps = blocks * config.tokens // config.each
        assert (
            warps * 32 * (config.registers or (255 if warps <= 8 else 128)) <= 1 << 16
        )  # registers of a multiprocessor
        assert config.tokens <= 2 * n_tokens
        assert (config.programs is None) or config.programs % 66 == 0


def test_a_device_that_does_not_count_bits_has_no_bit_products():
    assert not counts_tokens(1, layer(1, 64, 128, 32), torch.device("cpu"))
