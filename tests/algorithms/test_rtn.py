"""Plain rounding: groups are independent, the metric is the Hessian's block, and broken numbers are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import group_weights, law, output_loss, random_hessian, random_weight
from torch import Tensor

from quantkit.algorithms.grids import GRIDS, Grid, dequantize, quantize
from quantkit.algorithms.rtn import fake_quantize, rtn
from quantkit.errors import NumericalError
from quantkit.formats.grouped_int import GroupedInt, pack, unpack


def assert_equal(left: GroupedInt, right: GroupedInt) -> None:
    assert torch.equal(left.codes, right.codes)
    assert torch.equal(left.scales, right.scales)
    assert torch.equal(left.zeros, right.zeros)


@settings(law, max_examples=20)
@given(weight=group_weights(torch.float32), bits=st.integers(1, 8), symmetric=st.booleans())
@pytest.mark.parametrize("grid", sorted(GRIDS))
def test_result_can_be_packed_and_rounds_to_itself(grid: str, weight: Tensor, bits: int, symmetric: bool) -> None:
    quantized = rtn(weight, (bits,), symmetric, GRIDS[grid])
    assert quantized.codes.dtype == torch.uint8
    assert int(quantized.codes.max()) < 2**bits
    assert_equal(unpack(quantized.spec(), pack(quantized)), quantized)
    levels = Grid(quantized.scales[:, 0], quantized.zeros[:, 0])
    assert torch.equal(quantize(quantized.dequantize(), levels, bits), quantized.codes.float())


@pytest.mark.parametrize("grid", sorted(GRIDS))
@pytest.mark.parametrize("symmetric", [False, True])
def test_each_group_is_rounded_by_itself(grid: str, symmetric: bool) -> None:
    bits = (1, 2, 8, 3)
    weight = random_weight(5, 28, 0, torch.float32)
    quantized = rtn(weight, bits, symmetric, GRIDS[grid])
    assert quantized.bits == bits
    assert quantized.symmetric == symmetric
    for group, width in enumerate(bits):
        columns = slice(7 * group, 7 * group + 7)
        alone = rtn(weight[:, columns], (width,), symmetric, GRIDS[grid])
        assert torch.equal(quantized.codes[:, columns], alone.codes)
        assert torch.equal(quantized.scales[:, [group]], alone.scales)
        assert torch.equal(quantized.zeros[:, [group]], alone.zeros)


@pytest.mark.parametrize("grid", ["minmax", "mse"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_fake_quantize_is_rtn_dequantized(grid: str, bits: int) -> None:
    weight = random_weight(5, 24, 1, torch.float32)
    assert torch.equal(
        fake_quantize(weight, bits, 8, GRIDS[grid]), rtn(weight, (bits,) * 3, False, GRIDS[grid]).dequantize()
    )


@pytest.mark.parametrize("grid", sorted(GRIDS))
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_equally_important_inputs_are_no_hessian(grid: str, bits: int) -> None:
    weight = random_weight(5, 24, 2)
    identity = torch.eye(24, dtype=torch.float64)
    assert_equal(
        rtn(weight, (bits,) * 2, False, GRIDS[grid], 3 * identity), rtn(weight, (bits,) * 2, False, GRIDS[grid])
    )


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_hessian_grid_never_loses_to_minmax_on_its_groups(bits: int, seed: int) -> None:
    """The search's objective is e H_gg e^T, H_gg damped by 1 % of its own mean diagonal."""
    weight, hessian = random_weight(6, 24, seed), random_hessian(24, seed)
    searched, minmax = (rtn(weight, (bits,) * 3, False, GRIDS[name], hessian) for name in ("hessian", "minmax"))
    for start in (0, 8, 16):
        columns = slice(start, start + 8)
        block = hessian[columns, columns]
        block = block + 0.01 * block.diagonal().mean() * torch.eye(8, dtype=torch.float64)
        losses = [output_loss(weight[:, columns], exact(q)[:, columns], block) for q in (searched, minmax)]
        assert (losses[0] <= losses[1] * (1 + 1e-9)).all()


def exact(weight: GroupedInt) -> Tensor:
    grouped = weight.codes.double().reshape(weight.codes.shape[0], len(weight.bits), -1)
    return dequantize(grouped, Grid(weight.scales.double(), weight.zeros.double())).flatten(1)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("exponent", [-60, -30, 30, 60])
def test_scale_of_the_hessian_changes_nothing(bits: int, exponent: int) -> None:
    weight, hessian = random_weight(5, 24, 3, torch.float32), random_hessian(24, 3, dtype=torch.float32)
    plain = rtn(weight, (bits,) * 2, False, GRIDS["hessian"], hessian)
    assert_equal(rtn(weight, (bits,) * 2, False, GRIDS["hessian"], hessian * 2.0**exponent), plain)


@pytest.mark.parametrize("kind", ["deficient", "duplicated", "dead"])
def test_singular_hessians_are_no_obstacle(kind: str) -> None:
    weight, hessian = random_weight(5, 24, 4, torch.float32), random_hessian(24, 4, kind, torch.float32)
    assert torch.isfinite(rtn(weight, (2,) * 3, False, GRIDS["hessian"], hessian).dequantize()).all()


def test_inputs_of_a_group_that_were_never_active() -> None:
    weight, hessian = random_weight(5, 24, 5, torch.float32), random_hessian(24, 5, dtype=torch.float32)
    hessian[:8] = 0
    hessian[:, :8] = 0
    quantized = rtn(weight, (2,) * 3, False, GRIDS["hessian"], hessian)
    identity = rtn(weight[:, :8], (2,), False, GRIDS["hessian"])  # nothing is known: all count alike
    assert torch.equal(quantized.codes[:, :8], identity.codes)
    nothing = rtn(weight, (2,) * 3, False, GRIDS["hessian"], torch.zeros(24, 24))
    assert_equal(nothing, rtn(weight, (2,) * 3, False, GRIDS["hessian"]))


@pytest.mark.parametrize("grid", sorted(GRIDS))
def test_arguments_are_left_alone(grid: str) -> None:
    weight, hessian = random_weight(5, 24, 6, torch.float32), random_hessian(24, 6, dtype=torch.float32)
    kept = weight.clone(), hessian.clone()
    rtn(weight, (2,) * 3, False, GRIDS[grid], hessian)
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_refused(bad: float) -> None:
    weight, hessian = random_weight(2, 8, 0), random_hessian(8, 0)
    broken = weight.clone()
    broken[0, 7] = bad
    with pytest.raises(NumericalError, match="the weight holds NaN or Inf; the checkpoint is damaged"):
        rtn(broken, (2,), False, GRIDS["minmax"])
    hessian[3, 3] = bad
    with pytest.raises(NumericalError, match="the Hessian holds NaN or Inf"):
        rtn(weight, (2,), False, GRIDS["hessian"], hessian)
