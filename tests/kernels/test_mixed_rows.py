"""Which weights and activations the one-row kernel for several widths takes, and the shape of its launch."""

from __future__ import annotations

import pytest
import torch
from packed_weights import random_weight

from quantkit.evaluation.random_weights import random_spec
from quantkit.formats.grouped_int import GroupedIntSpec, pack
from quantkit.kernels.gemv import has_gemv
from quantkit.kernels.mixed_rows import (
    MixedConfig,
    choose_mixed_rows,
    cut_launch,
    has_mixed_rows,
    loaded_registers,
    new_ready,
)
from quantkit.kernels.planar import to_planar


def layer(*bits: int, group_size: int = 128, out_features: int = 64) -> GroupedIntSpec:
    shape = {"out_features": out_features, "in_features": 4 * len(bits) * group_size, "group_size": group_size}
    return GroupedIntSpec(**shape, segments=tuple((each, 4) for each in bits), symmetric=True)


@pytest.mark.parametrize(
    ("bits", "group_size", "mixed"),
    [
        ((1, 2, 3), 128, True),
        ((1, 2, 3, 4, 5, 6, 7, 8), 32, True),
        ((2, 8), 96, True),
        ((2, 8), 48, False),
        ((6, 8), 128, False),
        ((2,), 128, False),
    ],
)
def test_several_planar_widths_with_pairs_of_planes_in_a_group(bits, group_size, mixed):
    spec = layer(*bits, group_size=group_size)
    x = torch.zeros(1, spec.in_features, dtype=torch.bfloat16)
    assert has_mixed_rows(x, spec) == mixed
    assert not (mixed and has_gemv(x, spec))


def test_few_rows_of_half_precision():
    spec = layer(1, 2)
    for m in range(4):
        assert has_mixed_rows(torch.zeros(m, 1024, dtype=torch.float16), spec) == (m in (1, 2))
    assert not has_mixed_rows(torch.zeros(1, 1024), spec)


@pytest.mark.parametrize(
    ("shape", "n_tokens", "config"),
    [
        ((14336, 4096), 1, MixedConfig(warps=2, own=4)),
        ((4096, 4096), 1, MixedConfig(warps=2, own=4)),
        ((4096, 14336), 1, MixedConfig(warps=8, own=4)),
        ((28672, 8192), 1, MixedConfig(warps=4, own=4)),
        ((14336, 4096), 2, MixedConfig(warps=2, own=4)),
        ((6144, 4096), 2, MixedConfig(warps=2, own=2)),
        ((4096, 14336), 2, MixedConfig(warps=8, own=4)),
    ],
)
def test_chosen_shapes_are_those_that_were_measured_fastest(shape, n_tokens, config):
    """Or within two percent of them; with two rows of x those without a loop."""
    assert choose_mixed_rows(random_spec("slim-2", *shape), n_tokens) == config


@pytest.mark.parametrize("n_tokens", [1, 2])
@pytest.mark.parametrize("bits", [(1, 2, 3), (2, 3, 4), (3, 8), (1, 2, 3, 4, 8)])
@pytest.mark.parametrize("n_groups", [2, 16, 32, 1024])
def test_words_fit_the_registers_or_are_loaded_step_by_step(bits, n_groups, n_tokens):
    segments = tuple((each, n_groups) for each in bits)
    shape = {"out_features": 8192, "in_features": 128 * n_groups * len(bits), "group_size": 128, "symmetric": False}
    spec = GroupedIntSpec(**shape, segments=segments)
    config = choose_mixed_rows(spec, n_tokens)
    assert config.ahead == (n_groups < 1024)
    assert not config.ahead or loaded_registers(config, spec) <= 160
    assert choose_mixed_rows(layer(*bits)).own == 2  # few rows are shared among more programs


def test_misaligned_activations_are_copied():
    weight = random_weight(0, 8, 64, (4, 2))
    spec = weight.spec()
    tensors = to_planar(spec, pack(weight))
    x = torch.randn(129).half()[1:].reshape(1, 128)
    assert x.data_ptr() % 4
    _, arguments = cut_launch(x, spec, tensors, *new_ready(1, spec, x.device))
    assert arguments["x"].data_ptr() % 4 == 0
    assert torch.equal(arguments["x"].view(torch.float16), x)
