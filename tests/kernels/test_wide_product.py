"""Which weights the kernel of asynchronous products takes, and in which shapes; it runs on a GPU only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.kernels.planar import padded_rows, planar_segments
from quantkit.kernels.planar_product import blocks_per_split
from quantkit.kernels.wide_product import WideConfig, choose_wide, has_wide_product, is_possible, is_wide_weight

SHAPES = [
    (64, 128),
    (192, 4096),
    (1000, 33 * 128),
    (4096, 4096),
    (14336, 4096),
    (4096, 14336),
    (8192, 28672),
    (128256, 4096),
]


def weight(bits: int, out_features: int, in_features: int, group_size: int = 128, symmetric: bool = True):
    segments = ((bits, in_features // group_size),)
    shape = {"out_features": out_features, "in_features": in_features, "group_size": group_size}
    return GroupedIntSpec(**shape, segments=segments, symmetric=symmetric)


@pytest.mark.parametrize("n_tokens", [9, 17, 32, 33, 64, 65, 128, 129, 256])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_weight_has_a_shape(bits, n_tokens):
    for rows, columns in SHAPES:
        for group_size in (128, 384, columns):
            if columns % group_size or not is_wide_weight(spec := weight(bits, rows, columns, group_size, False)):
                continue
            config = choose_wide(n_tokens, spec)
            assert is_possible(config, spec)
            assert config.splits <= planar_segments(spec)[0].n_blocks
            tiles = padded_rows(spec) // config.rows * -(-n_tokens // config.tokens)
            assert tiles <= padded_rows(spec) // 2  # counters
            assert blocks_per_split(spec, config.splits)[1] * tiles <= max(2 * tiles, 320)


def test_which_weights():
    wide = weight(4, 4096, 4096)
    assert is_wide_weight(wide)
    assert is_wide_weight(replace(wide, symmetric=False))
    assert not is_wide_weight(weight(3, 4096, 4096))
    assert not is_wide_weight(weight(1, 4096, 4096))
    assert not is_wide_weight(weight(4, 4096, 4096, 64))  # planes of 32 columns
    assert not is_wide_weight(replace(wide, segments=((2, 16), (4, 16))))
    assert not has_wide_product(torch.zeros(64, 4096, dtype=torch.bfloat16), wide)  # on a CPU


def test_impossible_shapes():
    fits = WideConfig(rows=128, tokens=64, distance=4)
    assert is_possible(fits, weight(4, 4096, 4096))
    assert not is_possible(fits, weight(4, 4096 + 64, 4096))
    assert not is_possible(replace(fits, distance=12), weight(4, 4096, 4096))  # shared memory
    assert not is_possible(replace(fits, rows=256), weight(4, 4096, 4096))
