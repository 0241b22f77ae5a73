"""Which weights and activations the one-row kernels take, and the shape of their launch."""

from __future__ import annotations

import pytest
import torch
from packed_weights import random_weight

from quantkit.formats.grouped_int import GroupedIntSpec, pack
from quantkit.kernels.gemv import MAX_GEMV_TOKENS, choose_gemv, gemv_launch, has_gemv, is_possible, row_threads
from quantkit.kernels.launch import aligned, multiplies_bytes
from quantkit.kernels.mma_gemv import choose_mma_gemv, has_mma_gemv
from quantkit.kernels.planar import planar_segments, to_planar


def layer(bits: int, out_features: int, in_features: int, group_size: int = 128) -> GroupedIntSpec:
    segments = ((bits, in_features // group_size),)
    return GroupedIntSpec(
        out_features=out_features, in_features=in_features, group_size=group_size, segments=segments, symmetric=True
    )


@pytest.mark.parametrize(("group_size", "paired"), [(16, False), (32, True), (48, False), (64, True), (4096, True)])
def test_groups_of_which_two_planes_are_a_part(group_size, paired):
    spec = layer(4, 64, 16 * group_size, group_size)
    assert has_gemv(torch.zeros(1, spec.in_features, dtype=torch.float16), spec) == paired
    if paired:
        assert all(group_size % (2 * segment.plane_width) == 0 for segment in planar_segments(spec))


def test_one_width():
    """Several widths would leave most threads of a program without words; they have a kernel of their own."""
    x = torch.zeros(1, 384, dtype=torch.float16)
    shape = {"out_features": 8, "in_features": 384, "group_size": 128, "symmetric": True}
    assert not has_gemv(x, GroupedIntSpec(**shape, segments=((2, 1), (3, 2))))
    assert has_gemv(x, GroupedIntSpec(**shape, segments=((6, 1), (8, 2))))


def test_few_rows_of_half_precision():
    spec = layer(4, 64, 256)
    for m in range(4):
        assert has_gemv(torch.zeros(m, 256, dtype=torch.bfloat16), spec) == (m <= MAX_GEMV_TOKENS)
    assert not has_gemv(torch.zeros(1, 256), spec)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)])
def test_threads_of_a_program_reach_a_row_or_walk_along_it(bits, rows, columns):
    spec = layer(bits, rows, columns)
    config = choose_gemv(spec)
    (segment,) = planar_segments(spec)
    loaded = row_threads(segment) * 16 * (3 if bits == 3 else 1)  # bytes
    assert loaded == 2 * segment.row_words
    assert is_possible(config, spec)
    assert config.programs is None or 132 <= config.programs < rows // config.rows
    assert row_threads(segment) > 16 * config.warps or config.warps == 1  # no more than half of the threads idle


def test_misaligned_activations_are_copied():
    weight = random_weight(0, 8, 64, (4, 4))
    tensors = to_planar(weight.spec(), pack(weight))
    x = torch.randn(129).half()[1:].reshape(1, 128)
    assert x.data_ptr() % 16
    out = torch.empty(1, 8)
    _, _, arguments = gemv_launch(x, weight.spec(), tensors, None, out, choose_gemv(weight.spec()))
    assert arguments["x"].data_ptr() % 16 == 0
    assert torch.equal(arguments["x"].view(torch.float16), x)


@pytest.mark.parametrize(
    ("bits", "rows", "columns", "group_size", "taken"),
    [(2, 28672, 4096, 128, True), (2, 14336, 4096, 128, False), (2, 4096, 14336, 256, True),
     (2, 4096, 28672, 128, False), (2, 28672, 4096, 64, False), (2, 28672, 640, 128, False),
     (3, 28672, 4096, 128, False), (4, 4096, 8192, 8192, True), (4, 4096, 4096, 128, True),
     (4, 14336, 4096, 128, False), (4, 4096, 14336, 128, False), (8, 4096, 4096, 128, False)],
)  # fmt: skip
def test_weights_for_the_tensor_core(bits, rows, columns, group_size, taken):
    """Widths and shapes at which it is faster; planes as wide as the kernel has them."""
    spec = layer(bits, rows, columns, group_size)
    assert has_mma_gemv(1, spec) == taken
    if taken:
        config = choose_mma_gemv(spec)
        assert config.rows in (16, 32)
        assert 128 <= config.programs <= rows // config.rows


@pytest.mark.parametrize(
    ("bits", "columns", "taken"), [(2, 4096, True), (2, 28672, False), (4, 4096, False), (8, 4096, False)]
)
def test_two_rows_on_the_tensor_core(bits, columns, taken):
    assert has_mma_gemv(2, layer(bits, 14336, columns)) == taken


def test_bytes_are_multiplied_on_devices_that_can():
    assert not multiplies_bytes(torch.device("cpu"))
    if torch.cuda.is_available():
        assert multiplies_bytes(torch.device("cuda")) == (torch.cuda.get_device_capability() >= (8, 0))


def test_aligned_rows_are_not_copied():
    x = torch.randn(2, 64).half()
    assert aligned(x) is x
    assert torch.equal(aligned(x[:, 1:33]), x[:, 1:33])
    assert aligned(x[1:, 1:33]).data_ptr() % 16 == 0
