"""CASP: the factors are the optimum, the accounting is the paper's, the measures are what they say."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.algorithms.casp import (
    SolveFactor,
    attention_density,
    expected_losses,
    quantized_factors,
    rank_of,
    redundancy,
    whitened_factors,
)
from quantkit.algorithms.grids import GRIDS
from quantkit.algorithms.layerwise import marginal_widths
from quantkit.algorithms.rtn import rtn
from quantkit.errors import NumericalError, RequestError
from quantkit.formats.grouped_int import GroupedInt


def anisotropic(out: int = 24, n: int = 16, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, inputs, and their Hessian; the inputs' scales span a factor of 30."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, n, generator=generator)
    inputs = torch.randn(tokens, n, generator=generator) @ torch.randn(n, n, generator=generator)
    inputs *= torch.logspace(-0.75, 0.75, n)
    return weight, inputs, 2 / tokens * inputs.t() @ inputs


def lost_share(weight: Tensor, product: Tensor, inputs: Tensor) -> float:
    outputs = inputs.double() @ weight.double().t()
    return float(((inputs.double() @ product.double().t() - outputs).norm() / outputs.norm()).square())


@pytest.mark.parametrize("rank", [1, 5, 15])
def test_whitened_factors_reach_eckart_and_young(rank: int) -> None:
    """||X (W - AB)^T||^2 is the sum of the squared singular values of X W^T beyond the rank: the least there is."""
    weight, inputs, hessian = anisotropic()
    factors = whitened_factors(weight, hessian, rank)
    singular = torch.linalg.svdvals(inputs.double() @ weight.double().t()).square()
    optimum = float(singular[rank:].sum() / singular.sum())
    # the damping, 1e-6 of the mean diagonal, adds at most so much to what is minimized
    damping = 1e-6 * float(hessian.diagonal().mean() * weight.square().sum() / (weight @ hessian * weight).sum())
    assert lost_share(weight, factors.up @ factors.down, inputs) == pytest.approx(optimum, rel=1e-3, abs=damping)
    assert factors.lost == pytest.approx(optimum, rel=1e-3, abs=damping)
    torch.testing.assert_close(factors.up.t() @ factors.up, torch.eye(rank), rtol=0, atol=1e-5)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 8))
def test_no_other_factors_of_that_rank_lose_less(seed: int, rank: int) -> None:
    weight, inputs, hessian = anisotropic(12, 8, seed=seed)
    factors = whitened_factors(weight, hessian, rank)
    best = lost_share(weight, factors.up @ factors.down, inputs)
    left, singular, right = torch.linalg.svd(weight, full_matrices=False)
    plain = (left[:, :rank] * singular[:rank]) @ right[:rank]
    assert best <= lost_share(weight, plain, inputs) + 1e-5
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        step = 0.01 * torch.randn(factors.up.shape, generator=generator)
        assert best <= lost_share(weight, (factors.up + step) @ factors.down, inputs) + 1e-5


def test_isotropic_inputs_give_the_plain_svd() -> None:
    weight, _, _ = anisotropic()
    factors = whitened_factors(weight, 3 * torch.eye(16), 4)
    left, singular, right = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(factors.up @ factors.down, (left[:, :4] * singular[:4]) @ right[:4], rtol=0, atol=1e-4)


def test_full_rank_is_the_weight() -> None:
    weight, _, hessian = anisotropic()
    factors = whitened_factors(weight, hessian, 16)
    torch.testing.assert_close(factors.up @ factors.down, weight, rtol=0, atol=1e-4)


def test_fewer_tokens_than_channels() -> None:
    """A singular Hessian: nothing is lost on the inputs once the rank is theirs."""
    weight, inputs, hessian = anisotropic(tokens=5)
    factors = whitened_factors(weight, hessian, 5)
    assert lost_share(weight, factors.up @ factors.down, inputs) < 1e-4
    dead = hessian.clone()
    dead[3], dead[:, 3] = 0, 0
    assert torch.isfinite(whitened_factors(weight, dead, 5).down).all()
    hessian[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="NaN or Inf"):
        whitened_factors(weight, hessian, 5)


def test_ranks() -> None:
    """floor(m d rho / (m + d)), rounded down; kept parameters never exceed the share."""
    assert [rank_of(d, d, 0.25) for d in (4096, 5120)] == [512, 640]
    assert rank_of(4096, 4096, 0.5) == 1024
    for out, n, ratio in ((512, 512, 0.25), (256, 512, 0.25), (1024, 4096, 0.25), (64, 64, 0.9), (96, 160, 0.5)):
        rank = rank_of(out, n, ratio)
        assert rank * (out + n) <= ratio * out * n
        assert rank % 8 == 0
    with pytest.raises(RequestError, match=r"keep_ratio=0\.1 leaves a rank of 3 of a 64 x 64 weight; raise it"):
        rank_of(64, 64, 0.1)


def rounding(bits: int) -> SolveFactor:
    def solve(weight: Tensor, hessian: Tensor) -> GroupedInt:
        return rtn(weight, (bits,), False, GRIDS["minmax"], hessian)

    return solve


def test_the_second_factor_makes_up_for_the_first() -> None:
    """With an exact second factor, the product is the least-squares fit on what the first factor became."""
    weight, inputs, hessian = anisotropic()
    kept: list[Tensor] = []

    def exact(target: Tensor, metric: Tensor) -> GroupedInt:
        kept.append(target)
        return rtn(target, (8,), False, GRIDS["minmax"], metric)

    found = quantized_factors(weight, hessian, 8, rounding(3), exact)
    D = found.down.dequantize()
    fitted = torch.linalg.lstsq((inputs @ D.t()).double(), (inputs @ weight.t()).double()).solution.t()
    best = lost_share(weight, fitted @ D.double(), inputs)
    assert min(float((up - fitted).norm() / fitted.norm()) for up in kept) < 1e-2
    assert lost_share(weight, found.dequantize(), inputs) < 1.05 * best + 1e-4


def test_more_bits_and_more_rank_lose_less() -> None:
    weight, inputs, hessian = anisotropic(64, 64, 500)
    losses = [
        lost_share(weight, quantized_factors(weight, hessian, rank, *[rounding(bits)] * 2).dequantize(), inputs)
        for rank, bits in ((16, 3), (16, 8), (48, 8))
    ]
    assert losses[0] > losses[1] > losses[2]


def test_queries_and_keys_have_factors_of_their_own() -> None:
    """The authors' released code lets those of the keys overwrite those of the queries."""
    query, _, hessian = anisotropic(seed=1)
    key, _, _ = anisotropic(seed=2)
    factors = [whitened_factors(weight, hessian, 4) for weight in (query, key)]
    assert not torch.allclose(factors[0].down, factors[1].down, atol=0.1)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 2), min_size=2, max_size=6), st.integers(0, 40))
def test_allocation_is_brute_force_on_equal_blocks(measured: list[float], extra: int) -> None:
    """Greedy by gain per byte is optimal for equal sizes and convex losses."""
    widths = [2, 3, 4]
    losses = [expected_losses(each, widths) for each in measured]
    n_bytes = [[20, 30, 40]] * len(measured)
    budget = 20 * len(measured) + extra
    picks = marginal_widths(losses, n_bytes, budget)
    total = sum(loss[pick] for loss, pick in zip(losses, picks, strict=True))
    every = itertools.product(range(3), repeat=len(measured))
    fitting = [each for each in every if sum(n_bytes[0][pick] for pick in each) <= budget]
    assert sum(n_bytes[0][pick] for pick in picks) <= budget
    best = min(sum(loss[pick] for loss, pick in zip(losses, each, strict=True)) for each in fitting)
    assert total == pytest.approx(best)


def test_the_papers_average() -> None:
    """LLaMA-7B, target 2: 8 of 32 blocks at 3 bits and factors of 3 bits average 2.001 ideal bits (official code)."""
    d, ffn, n_layers, rank = 4096, 11008, 32, rank_of(4096, 4096, 0.25)
    weights, rest = 4 * d * d + 3 * d * ffn, 2 * d * d + 3 * d * ffn
    bits = n_layers * 2 * 3 * rank * 2 * d + rest * (8 * 3 + 24 * 2)
    assert round(bits / (n_layers * weights), 3) == 2.001


def test_attention_density() -> None:
    row = torch.arange(1, 9).unsqueeze(1)
    uniform = torch.ones(2, 8, 8).tril() / row
    assert attention_density(uniform) == 1
    first = torch.zeros(1, 8, 8)
    first[..., 0] = 1
    assert attention_density(first) == pytest.approx(8 / 36)
    assert attention_density(torch.cat([uniform[:1], first])) == pytest.approx((36 + 8) / 72)


def test_redundancy() -> None:
    rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    assert redundancy(rows) == pytest.approx(1 / 3)
    assert redundancy(torch.ones(5, 3)) == pytest.approx(1)
    orthogonal = redundancy(torch.eye(6))
    assert abs(orthogonal) < 1e-12
