"""LittleBit's pieces: ranks in bytes, Dual-SVID, the surrogate gradient, and sign factors as numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import law, random_weight

from quantkit.algorithms.littlebit import (
    LATENT_SIZE,
    RANK_STEP,
    SMOOTHNESS,
    Factors,
    Rank,
    dual_svid,
    folded,
    from_latents,
    latent_start,
    signs,
    smooth_sign,
    solve_ranks,
)
from quantkit.errors import NumericalError, RequestError
from quantkit.pipeline.factorize import from_stored, sign_factors_spec, to_stored

SHAPES = st.lists(st.tuples(st.sampled_from([64, 72, 100, 256, 520]), st.sampled_from([64, 96, 131, 512])), min_size=1)


def n_bytes(out_features: int, in_features: int, rank: Rank) -> int:
    return sign_factors_spec(out_features, in_features, rank).n_bytes


def random_factors(out: int, inputs: int, rank: Rank, seed: int = 0) -> Factors:
    """Signs at random, scales of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n = rank.n_paths
    total = n * rank.rank
    left, right = signs(normal(out, total)), signs(normal(total, inputs))
    return Factors(left=left, right=right, rows=normal(n, out), latents=normal(total), columns=normal(n, inputs))


# --- ranks --------------------------------------------------------------------------------------------------------


@law
@given(SHAPES, st.floats(0.05, 2), st.sampled_from([1, 2]))
def test_ranks_use_the_budget_and_never_exceed_it(shapes: list[tuple[int, int]], bits: float, n_paths: int) -> None:
    budget = bits * sum(rows * columns for rows, columns in shapes) / 8
    least = sum(n_bytes(*shape, Rank(RANK_STEP, 1)) for shape in shapes)
    try:
        ranks = solve_ranks(shapes, bits, n_paths, n_bytes)
    except RequestError:
        assert least > budget - 1
        return
    used = sum(n_bytes(*shape, rank) for shape, rank in zip(shapes, ranks, strict=True))
    assert used <= budget
    for shape, rank in zip(shapes, ranks, strict=True):
        assert rank.rank % RANK_STEP == 0
        assert rank.n_paths <= n_paths
        larger = Rank(rank.rank + RANK_STEP, rank.n_paths)
        fits = used - n_bytes(*shape, rank) + n_bytes(*shape, larger) <= budget - 1
        assert not fits or larger.rank > min(shape)


@pytest.mark.parametrize("n_paths", [1, 2])
@pytest.mark.parametrize(("out", "inputs", "rank"), [(64, 96, 8), (512, 512, 104), (1408, 512, 168), (100, 131, 24)])
def test_bytes_are_those_of_the_formula(out: int, inputs: int, rank: int, n_paths: int) -> None:
    """n r (in + out + 16) + 16 n (in + out) bits, plus the last byte of each row of signs where it is not full."""
    row_bits = 8 * -(-inputs // 8)
    bits = n_paths * (rank * (row_bits + out + 16) + 16 * (inputs + out))
    assert 8 * n_bytes(out, inputs, Rank(rank, n_paths)) == bits


def test_the_reference_ranks_of_one_linear() -> None:
    """The authors' formula rounds down to a multiple of 8 as well: 512 x 512 at 1.0, 0.8, 0.55 bits, two paths."""
    for bits in (1.0, 0.8, 0.55):
        exact = (512 * 512 * bits - 32 * 1024) / (2 * (1024 + 16))
        assert solve_ranks([(512, 512)], bits, 2, n_bytes) == [Rank(int(exact) // 8 * 8, 2)]


def test_one_path_where_two_have_no_room() -> None:
    assert solve_ranks([(512, 512)], 0.1, 2, n_bytes) == [Rank(8, 1)]


def test_ranks_spread_evenly() -> None:
    shapes = [(512, 512), (1408, 512), (512, 1408), (256, 512)]
    ranks = solve_ranks(shapes, 0.55, 2, n_bytes)
    bpw = [8 * n_bytes(*shape, rank) / (shape[0] * shape[1]) for shape, rank in zip(shapes, ranks, strict=True)]
    steps = [2 * RANK_STEP * (sum(shape) + 16) / (shape[0] * shape[1]) for shape in shapes]
    assert max(bpw) - min(bpw) <= max(steps)


def test_impossible_bits_are_refused_with_the_least_possible() -> None:
    """A rank of 8 in 64 x 64: 8 * 144 + 16 * 128 bits of 4096 weights."""
    least = (8 * 144 + 16 * 128) / 64**2
    message = rf"^0.5 bits per weight is less than these layers can be stored in: .* take {least:.3f}; use --bits 0.782"
    with pytest.raises(RequestError, match=message):
        solve_ranks([(64, 64)], 0.5, 2, n_bytes)
    assert solve_ranks([(64, 64)], 0.782, 2, n_bytes) == [Rank(8, 1)]


def test_rank_stops_at_the_smaller_side() -> None:
    assert solve_ranks([(64, 1024)], 2.0, 1, n_bytes) == [Rank(64, 1)]


# --- Dual-SVID ----------------------------------------------------------------------------------------------------


def test_factors_with_rank_one_magnitudes_are_found_exactly() -> None:
    """Orthogonal signs (Hadamard), distinct latent scales: the SVD finds the factors, up to signs of a rank."""
    H2 = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    H = torch.kron(torch.kron(H2, H2), torch.kron(H2, H2))  # [16, 16]
    latents = torch.arange(8, 0, -1, dtype=torch.float64)
    weight = (H[:, :8] * latents) @ H[3:11]
    found = dual_svid(weight, Rank(8, 1))
    assert (found.dense() - weight).norm() / weight.norm() < 1e-6
    turned = found.left[:, :1] * found.right[:1]
    assert torch.equal(turned, H[:, :1] * H[3:4])


@pytest.mark.parametrize("n_paths", [1, 2])
def test_more_ranks_lose_less(n_paths: int) -> None:
    """On average over seeds; a single draw may not."""
    weights = [random_weight(96, 64, seed) for seed in range(6)]
    errors = [
        sum(
            float((dual_svid(weight, Rank(rank, n_paths)).dense() - weight).norm() / weight.norm())
            for weight in weights
        )
        for rank in (4, 8, 16, 32)
    ]
    assert errors == sorted(errors, reverse=True)


def test_the_second_path_approximates_what_the_first_one_leaves() -> None:
    weight = random_weight(48, 32, 0)
    both, first = dual_svid(weight, Rank(8, 2)), dual_svid(weight, Rank(8, 1))
    torch.testing.assert_close(both.left[:, :8], first.left)
    torch.testing.assert_close(both.dense(), first.dense() + dual_svid(weight - first.dense(), Rank(8, 1)).dense())


def test_scales_are_the_nearest_rank_one_matrix() -> None:
    """Against the SVD of the magnitudes."""
    A, B = random_weight(40, 12, 1), random_weight(12, 30, 2)
    found = from_latents(A, B)
    U, S, _ = torch.linalg.svd(A.abs())
    expected = (U[:, 0] * S[0]).abs()
    torch.testing.assert_close(found.rows[0] / found.rows[0].norm(), expected / expected.norm(), rtol=1e-9, atol=0)
    assert (found.latents > 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_refused(value: float) -> None:
    weight = random_weight(16, 16, 0)
    weight[3, 4] = value
    with pytest.raises(NumericalError, match=r"^the weight holds NaN or Inf; the checkpoint is damaged"):
        dual_svid(weight, Rank(8, 1))


def test_a_weight_of_zeros_stays_zero() -> None:
    factors = dual_svid(torch.zeros(16, 24), Rank(8, 2))
    assert torch.equal(factors.dense(), torch.zeros(16, 24))


# --- signs and their gradient -------------------------------------------------------------------------------------


@law
@given(st.lists(st.floats(-0.2, 0.2), min_size=1, max_size=8), st.integers(0, 1000))
def test_surrogate_gradient_is_that_of_tanh(values: list[float], seed: int) -> None:
    latent = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    smooth_sign(latent).backward(upstream)
    smooth = latent.detach().clone().requires_grad_()
    torch.tanh(SMOOTHNESS * smooth).backward(upstream)
    torch.testing.assert_close(latent.grad, smooth.grad, rtol=1e-6, atol=1e-9)


def test_smooth_sign_computes_signs() -> None:
    latent = torch.tensor([-3.0, -1e-9, 0.0, -0.0, 2.0])
    assert smooth_sign(latent).tolist() == [-1.0, -1.0, 1.0, 1.0, 1.0]


def test_latents_start_on_the_side_of_their_signs_at_seeded_magnitudes() -> None:
    sign = signs(torch.randn(200, 300, generator=torch.Generator().manual_seed(0)))
    first, again, other = (latent_start(sign, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(signs(first), sign) or bool((first == 0).any())
    # 60,000 uniform draws: the mean has a standard deviation of size / sqrt(3 * 60000) = 0.24 %
    assert float(first.abs().mean()) == pytest.approx(LATENT_SIZE, rel=0.012)
    assert float(first.abs().max()) <= 2 * LATENT_SIZE


# --- as numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_paths", [1, 2])
def test_dense_is_the_sum_of_the_paths(n_paths: int) -> None:
    factors = random_factors(10, 14, Rank(8, n_paths))
    expected = torch.zeros(10, 14, dtype=torch.float64)
    for path in range(n_paths):
        span = slice(8 * path, 8 * path + 8)
        h, latents, g = factors.rows[path], factors.latents[span], factors.columns[path]
        product = torch.diag(h) @ factors.left[:, span] @ torch.diag(latents)
        expected += product @ factors.right[span] @ torch.diag(g)
    torch.testing.assert_close(factors.dense(), expected)


@pytest.mark.parametrize("n_paths", [1, 2])
def test_folding_keeps_the_weight_and_leaves_no_negative_scale(n_paths: int) -> None:
    factors = random_factors(10, 14, Rank(8, n_paths))
    after = folded(factors)
    torch.testing.assert_close(after.dense(), factors.dense())
    assert all((scale >= 0).all() for scale in (after.rows, after.latents, after.columns))


@pytest.mark.parametrize("n_paths", [1, 2])
def test_what_is_stored_is_what_was_solved(n_paths: int) -> None:
    """Signs exactly, scales rounded to float16: three roundings of 2**-11 in each product."""
    factors = folded(random_factors(24, 40, Rank(16, n_paths)))
    stored = to_stored(factors)
    again = from_stored(stored, torch.device("cpu"))
    assert torch.equal(again.left.double(), factors.left)
    assert torch.equal(again.right.double(), factors.right)
    magnitude = (factors.rows[factors.path_of_rank].t() * factors.latents) @ factors.columns[factors.path_of_rank]
    error = (stored.dequantize().double() - factors.dense()).abs()
    assert bool((error <= 3.01 * 2**-11 * magnitude + 1e-5).all())
    assert stored.spec() == sign_factors_spec(24, 40, Rank(16, n_paths))
