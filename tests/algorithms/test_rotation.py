"""Rotations: orthogonal at every size, flat where a Hadamard matrix exists, and nothing changes but the basis."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.algorithms.grids import GRIDS
from quantkit.algorithms.rotation import fold_input, fold_output, hadamard_rotation, rotate_heads
from quantkit.algorithms.rtn import rtn

# Hidden sizes of models, or small ones of their form, and odd ones.
SIZES = [1, 2, 3, 12, 64, 93, 576, 640, 896, 1152, 1536]
HADAMARD_ODDS = range(1, 23, 2)


def matrix(size: int, seed: int = 0) -> torch.Tensor:
    return hadamard_rotation(size, seed).apply(torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", SIZES)
def test_orthogonal(size: int) -> None:
    Q = matrix(size)
    # entries of Q are products of a few factors with relative errors of some eps; rows have norm 1
    torch.testing.assert_close(Q @ Q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 200), seed=st.integers(0, 2**40))
def test_orthogonal_at_any_size(size: int, seed: int) -> None:
    Q = matrix(size, seed)
    torch.testing.assert_close(Q @ Q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(matrix(size, seed), Q)


@pytest.mark.parametrize("odd", HADAMARD_ODDS)
@pytest.mark.parametrize("power", [8, 32])
def test_all_entries_have_the_same_size(odd: int, power: int) -> None:
    """A Hadamard matrix: what makes the bound on outliers hold."""
    Q = matrix(odd * power)
    torch.testing.assert_close(Q.abs(), torch.full_like(Q, (odd * power) ** -0.5), rtol=1e-12, atol=0)


def test_the_seed_chooses_the_signs() -> None:
    first, second = hadamard_rotation(64, 0), hadamard_rotation(64, 1)
    assert not torch.equal(first.signs, second.signs)
    assert set(first.signs.tolist()) == {1.0, -1.0}
    assert first.size == 64


@pytest.mark.parametrize("size", [12, 64, 93])
def test_any_shape_and_dtype(size: int) -> None:
    rotation, Q = hadamard_rotation(size, 3), matrix(size, 3)
    x = torch.randn(2, 5, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(rotation.apply(x), x @ Q, rtol=0, atol=1e-13)
    torch.testing.assert_close(rotation.apply(x[0, 0]), x[0, 0] @ Q, rtol=0, atol=1e-13)
    strided = x.transpose(0, 1)
    torch.testing.assert_close(rotation.apply(strided), strided @ Q, rtol=0, atol=1e-13)
    assert rotation.apply(x[:, :0]).shape == (2, 0, size)
    half = rotation.apply(x.bfloat16())
    assert half.dtype == torch.bfloat16
    # three roundings of 2^-9 relative, each of a vector of norm |x|
    assert (half.double() - x @ Q).norm() < 3 * 2**-8 * x.norm()


@pytest.mark.parametrize("size", [24, 93])
def test_folding_changes_nothing_but_the_basis(size: int) -> None:
    """x + down(act(up(norm(x)))) in both bases, gain and biases included."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, gain, up, down, bias = random(7, size), random(size), random(40, size), random(size, 40), random(size)
    rotation = hadamard_rotation(size, 0)

    def block(x: torch.Tensor, gain: torch.Tensor, up: torch.Tensor, down: torch.Tensor, bias: torch.Tensor):  # type: ignore[no-untyped-def]
        normed = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain
        return x + torch.tanh(normed @ up.T) @ down.T + bias

    turned = block(
        rotation.apply(x),
        torch.ones(size, dtype=torch.float64),
        fold_input(up, gain, rotation),
        fold_output(down, rotation),
        fold_output(bias, rotation),
    )
    torch.testing.assert_close(turned, rotation.apply(block(x, gain, up, down, bias)), rtol=0, atol=1e-11)


def test_heads_turn_alike() -> None:
    x = torch.randn(3, 6 * 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Q = torch.block_diag(*[matrix(16, 5)] * 6)
    torch.testing.assert_close(rotate_heads(x, 16, 5), x @ Q, rtol=0, atol=1e-13)
    torch.testing.assert_close(rotate_heads(x[0], 16, 5), x[0] @ Q, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [512, 896, 4096])
def test_no_outlier_survives(size: int) -> None:
    """Hoeffding: a row's largest entry exceeds rms sqrt(2 log(2 n / delta)) with probability delta over the signs.

    With 64 rows and delta = 1e-6 / 64 the bound on all of them fails for one seed in a million.
    """
    rows = 64
    weight = torch.randn(rows, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spikes = torch.randint(0, size, (rows,), generator=torch.Generator().manual_seed(1))
    weight[torch.arange(rows), spikes] = 10 * size**0.5  # nearly all of the row's norm
    turned = hadamard_rotation(size, 0).apply(weight)

    def peak(matrix: torch.Tensor) -> torch.Tensor:
        return matrix.abs().amax(1) / matrix.square().mean(1).sqrt()

    assert peak(weight).min() > 0.9 * size**0.5
    assert peak(turned).max() < math.sqrt(2 * math.log(2 * size * rows / 1e-6))


def test_a_spiked_weight_rounds_better_rotated() -> None:
    """Min-max rounding to b bits errs by at most range / (2 (2^b - 1)) per weight: the range is what rotation shrinks.

    One spike of s = 10 sqrt(n) in a row of unit noise: range about s before, at most 2 sqrt(2 log(2 n / delta)) rms
    after, where rms = sqrt(1 + 100). So the error, in squares, must fall below its bound after; before, all that is not
    the spike rounds to zero, which costs the whole noise.
    """
    size, bits = 512, 4
    weight = torch.randn(8, size, generator=torch.Generator().manual_seed(0))
    weight[:, 7] = 10 * size**0.5
    rotation = hadamard_rotation(size, 0)

    def error(matrix: torch.Tensor) -> float:
        return float((rtn(matrix, (bits,), False, GRIDS["minmax"], None).dequantize() - matrix).square().mean())

    rms = float(weight.square().mean().sqrt())
    widest = 2 * rms * math.sqrt(2 * math.log(2 * size * 8 / 1e-6))
    scale = widest / (2**bits - 1)
    assert error(rotation.apply(weight)) <= (scale / 2) ** 2 * 1.01  # float16 scales
    assert error(weight) > 0.9
