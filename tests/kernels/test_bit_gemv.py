"""Which weights and devices bit products are for, and the shape of their launch."""

from __future__ import annotations

import pytest
import torch

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.kernels.bit_gemv import (
    BitGemvConfig,
    bit_gemv_launch,
    choose_bit_gemv,
    has_one_scale,
    is_bit_weight,
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
        assert (arguments["WARPS"], arguments["n_tiles"]) == (4, -(-100 // rows))
        assert arguments["AHEAD"] == (0 if programs is None else 1)


@pytest.mark.parametrize("group_size", [128, 1024])
@pytest.mark.parametrize(("rows", "columns"), [(64, 1024), (4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)])
def test_computed_shapes_are_possible(rows, columns, group_size):
    spec = layer(1, rows, group_size, columns // group_size)
    config = choose_bit_gemv(spec, 132)
    assert config.rows in (16, 32, 64)
    assert config.programs in (None, 132, 264)
    assert (config.programs is None) == (columns > 8192)  # rows longer than what two programs could keep
