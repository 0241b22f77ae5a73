"""BoA against brute force on the full Kronecker Hessian, against GPTQ, and against itself in other orders."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.algorithms.boa import BoAConfig, boa, damped_rows, kronecker_loss
from quantkit.algorithms.gptq import GPTQConfig, Solution, gptq
from quantkit.algorithms.grids import GRIDS
from quantkit.algorithms.hessian import damped
from quantkit.algorithms.refine import refine
from quantkit.algorithms.rtn import rtn
from quantkit.algorithms.turboboa import refine_heads
from quantkit.errors import NotPositiveDefiniteError, NumericalError

DAMPING = 0.01


def positive(*shape: int, seed: int, decades: float = 1.0) -> Tensor:
    """Positive definite, with a spectrum over some decades and axes of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    n = shape[-1]
    mixed = torch.randn(*shape, n, generator=generator, dtype=torch.float64)
    lengths = torch.logspace(0, -decades, n, dtype=torch.float64)[torch.randperm(n, generator=generator)]
    root = lengths.unsqueeze(1) * (mixed * torch.logspace(0, -decades, n, dtype=torch.float64))
    return root @ root.mT + 1e-3 * torch.eye(n, dtype=torch.float64)


def problem(heads: int, head_dim: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """weight [heads * head_dim, n], column Hessian [n, n], row Hessians [heads, head_dim, head_dim], float64."""
    generator = torch.Generator().manual_seed(1000 + seed)
    weight = torch.randn(heads * head_dim, n, generator=generator, dtype=torch.float64)
    return weight, positive(n, seed=seed), positive(heads, head_dim, seed=seed + 1)


def solve(
    weight: Tensor,
    hessian: Tensor,
    rows: Tensor | None,
    bits: tuple[int, ...] = (2,),
    grid: str = "minmax",
    **config: Any,
) -> Solution:
    return boa(
        weight, hessian, rows, bits, False, GRIDS[grid], BoAConfig(damping=DAMPING, row_damping=DAMPING, **config)
    )


def same_codes(a: Solution, b: Solution) -> bool:
    return all(torch.equal(getattr(a.weight, name), getattr(b.weight, name)) for name in ("codes", "scales", "zeros"))


# --- oracles ------------------------------------------------------------------------------------------------------


def brute_force(
    W: Tensor, C: Tensor, R: Tensor, order: list[tuple[int, int]], solution: Solution, first: int
) -> Tensor:
    """Textbook OBS on R (x) C of one head: invert what is left of it before every single element."""
    n_rows, n = W.shape
    H, w = torch.kron(R, C), W.flatten().clone()
    codes = torch.empty_like(w)
    left = [row * n + column for row, column in order]
    for row, column in order:
        index, free = row * n + column, torch.tensor(left)
        inverse = torch.linalg.inv(H[free][:, free])
        group = column // solution.weight.group_size
        s, z = (part[first + row, group].double() for part in (solution.weight.scales, solution.weight.zeros))
        codes[index] = (w[index] / s + z).round().clamp(0, 2 ** solution.weight.bits[group] - 1)
        at = left.index(index)
        w[free] -= (w[index] - s * (codes[index] - z)) / inverse[at, at] * inverse[at]
        left.remove(index)
    return codes.reshape(n_rows, n).to(torch.uint8)


@pytest.mark.parametrize("late_grids", [True, False])
@pytest.mark.parametrize("row_block", [1, 2, 4, 6])
@pytest.mark.parametrize(("act_order", "row_order"), [("none", False), ("full", True)])
def test_equals_brute_force(act_order: str, row_order: bool, row_block: int, late_grids: bool) -> None:
    """Whatever the grids are and however rows and columns are blocked: the same integers as element by element."""
    heads, head_dim, n = 2, 6, 10
    weight, hessian, rows = problem(heads, head_dim, n)
    settings = {"act_order": act_order, "row_order": row_order, "row_block": row_block, "late_grids": late_grids}
    for block_size, bits in ((3, (2, 3)), (128, (3,))):
        solution = solve(weight, hessian, rows, bits, block_size=block_size, **settings)
        C, R = damped(hessian, DAMPING), damped_rows(rows, DAMPING)
        columns = hessian.diagonal().argsort(descending=True) if act_order == "full" else torch.arange(n)
        for head in range(heads):
            visited = rows[head].diagonal().argsort(descending=True) if row_order else torch.arange(head_dim)
            order = list(itertools.product(visited.tolist(), columns.tolist()))
            own = slice(head * head_dim, (head + 1) * head_dim)
            expected = brute_force(weight[own], C, R[head], order, solution, own.start)
            assert torch.equal(solution.weight.codes[own], expected)


def test_loss_is_the_quadratic_form() -> None:
    weight, hessian, rows = problem(2, 5, 8)
    solution = solve(weight, hessian, rows)
    error = (weight - solution.weight.dequantize().double()).reshape(2, 5, 8)
    C, R = damped(hessian, DAMPING), damped_rows(rows, DAMPING)
    full = sum(e.flatten() @ torch.kron(r, C) @ e.flatten() for e, r in zip(error, R, strict=True))
    assert solution.loss == pytest.approx(float(full), rel=1e-10)


def test_joint_rows_are_gptq_inside_a_block() -> None:
    """One block of all rows: GPTQ. Blocks of one row: BoA."""
    weight, hessian, rows = problem(3, 8, 24)
    settings = {"bits": (2, 2), "grid": "hessian", "row_order": False}
    plain = gptq(weight, hessian, (2, 2), False, GRIDS["hessian"], GPTQConfig(damping=DAMPING))
    assert same_codes(solve(weight, hessian, rows, joint_rows=True, row_block=8, **settings), plain)
    one_by_one = solve(weight, hessian, rows, row_block=1, **settings)
    assert same_codes(solve(weight, hessian, rows, joint_rows=True, row_block=1, **settings), one_by_one)
    assert not same_codes(one_by_one, plain)


# --- GPTQ where rows are independent ------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", ["none", "group", "full"])
@pytest.mark.parametrize("grid", sorted(GRIDS))
@pytest.mark.parametrize("bits", [(2,), (3, 2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identity_is_gptq(act_order: str, grid: str, bits: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, hessian, _ = (part.to(dtype) for part in problem(3, 8, 48))
    identity = torch.eye(8, dtype=dtype).expand(3, 8, 8)
    expected = gptq(
        weight,
        hessian,
        bits,
        False,
        GRIDS[grid],
        GPTQConfig(damping=DAMPING, act_order=act_order),  # type: ignore[arg-type]
    )
    for rows in (None, identity, torch.diag_embed(torch.arange(24.0, dtype=dtype).reshape(3, 8))):
        assert same_codes(solve(weight, hessian, rows, bits, grid, act_order=act_order), expected)


@pytest.mark.parametrize("act_order", ["none", "group", "full"])
@pytest.mark.parametrize("row_block", [1, 5, 16])
def test_loop_over_anti_diagonals_is_gptq_without_coupling(act_order: str, row_block: int) -> None:
    """Rows coupled by 1e-12, so that the loop of coupled rows runs: in float64 it moves no code."""
    weight, hessian, _ = problem(2, 12, 40)
    rows = torch.eye(12, dtype=torch.float64).expand(2, 12, 12) + 1e-12
    expected = solve(weight, hessian, None, (2, 2), "hessian", act_order=act_order)
    assert same_codes(
        solve(weight, hessian, rows, (2, 2), "hessian", act_order=act_order, row_block=row_block, block_size=9),
        expected,
    )


@pytest.mark.parametrize("act_order", ["none", "group", "full"])
@pytest.mark.parametrize("late_grids", [True, False])
def test_heads_with_inputs_of_their_own(act_order: str, late_grids: bool) -> None:
    """All at once, each in its own order of columns: what each would get alone."""
    weight, _, rows = problem(3, 6, 20)
    hessians = torch.stack([positive(20, seed=10 + head) for head in range(3)])
    hessians[1, 4] = hessians[1, :, 4] = 0  # dead for one head only
    settings: dict[str, Any] = {"bits": (2, 3), "grid": "hessian", "act_order": act_order, "late_grids": late_grids}
    for factor in (None, rows):
        together = solve(weight, hessians, factor, row_block=4, block_size=7, **settings)
        alone = [
            solve(own, hessian, None if factor is None else factor[head : head + 1], row_block=4, **settings)
            for head, (own, hessian) in enumerate(zip(weight.chunk(3), hessians, strict=True))
        ]
        assert torch.equal(together.weight.codes, torch.cat([solution.weight.codes for solution in alone]))
        assert torch.equal(together.weight.scales, torch.cat([solution.weight.scales for solution in alone]))
        assert together.loss == pytest.approx(sum(solution.loss for solution in alone))


# --- invariances --------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    n_groups=st.integers(1, 3),
    group_size=st.integers(1, 7),
    row_block=st.integers(1, 10),
    block_size=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_blocks_change_nothing(
    heads: int, head_dim: int, n_groups: int, group_size: int, row_block: int, block_size: int, seed: int
) -> None:
    """Grids known beforehand: neither the row block nor the column block moves a code."""
    weight, hessian, rows = problem(heads, head_dim, n_groups * group_size, seed)
    bits = (2, 3, 4)[:n_groups]
    whole = solve(weight, hessian, rows, bits, late_grids=False, row_block=16)
    parts = solve(weight, hessian, rows, bits, late_grids=False, row_block=row_block, block_size=block_size)
    assert same_codes(whole, parts)
    late = solve(weight, hessian, rows, bits, row_block=row_block)
    assert same_codes(late, solve(weight, hessian, rows, bits, row_block=row_block, block_size=block_size))


def test_scale_of_the_factors_is_irrelevant() -> None:
    weight, hessian, rows = problem(2, 6, 16)
    expected = solve(weight, hessian, rows, (2, 2), "hessian")
    per_head = rows * torch.tensor([4.0, 0.125], dtype=torch.float64)[:, None, None]
    assert same_codes(solve(weight, 8 * hessian, per_head, (2, 2), "hessian"), expected)


def test_ordered_rows_and_columns_permute() -> None:
    """With both orders on, the order in which rows of a head and columns are stored is irrelevant."""
    weight, hessian, rows = problem(2, 6, 16)
    generator = torch.Generator().manual_seed(5)
    inside, columns = torch.randperm(6, generator=generator), torch.randperm(16, generator=generator)
    shuffled = torch.cat((inside, inside + 6))
    expected = solve(weight, hessian, rows, act_order="full")
    other = solve(
        weight[shuffled][:, columns], hessian[columns][:, columns], rows[:, inside][:, :, inside], act_order="full"
    )
    assert torch.equal(other.weight.codes, expected.weight.codes[shuffled][:, columns])
    assert torch.equal(other.weight.scales, expected.weight.scales[shuffled])


def test_single_and_double_precision_nearly_agree() -> None:
    weight, hessian, rows = problem(2, 16, 96)
    exact = solve(weight, hessian, rows, (3,)).weight.codes
    rounded = solve(weight.float(), hessian.float(), rows.float(), (3,)).weight.codes
    assert (exact != rounded).float().mean() < 0.01


def test_arguments_are_not_changed() -> None:
    parts = problem(2, 4, 8)
    before = [part.clone() for part in parts]
    solve(*parts)
    assert all(torch.equal(part, copy) for part, copy in zip(parts, before, strict=True))


# --- what has no curvature, and what is no number -----------------------------------------------------------------


def test_dead_columns_become_zero() -> None:
    weight, hessian, rows = problem(2, 6, 12)
    hessian[[3, 7]] = 0
    hessian[:, [3, 7]] = 0
    solution = solve(weight, hessian, rows, (2,))
    assert not solution.weight.dequantize()[:, [3, 7]].any()


def test_head_that_nothing_reads_is_rounded_like_gptq() -> None:
    weight, hessian, rows = problem(3, 6, 12)
    rows[1] = 0
    solution = solve(weight, hessian, rows, (2,), "hessian")
    plain = gptq(weight, hessian, (2,), False, GRIDS["hessian"], GPTQConfig(damping=DAMPING))
    assert torch.equal(solution.weight.codes[6:12], plain.weight.codes[6:12])
    assert not torch.equal(solution.weight.codes[:6], plain.weight.codes[:6])


def test_row_that_nothing_reads_disturbs_no_other() -> None:
    weight, hessian, rows = problem(1, 6, 12)
    rows[:, 2] = 0
    rows[:, :, 2] = 0
    others = torch.tensor([0, 1, 3, 4, 5])
    settings = {"late_grids": False, "row_order": False}
    solution = solve(weight, hessian, rows, **settings)
    # The mean of the diagonal, which damping is relative to, is that of the rows that are read.
    alone = solve(weight[others], hessian, rows[:, others][:, :, others], **settings)
    assert torch.equal(solution.weight.codes[others], alone.weight.codes)


@pytest.mark.parametrize(
    ("index", "message"), [(0, "the weight holds NaN or Inf"), (1, "Hessian holds NaN"), (2, "Hessian holds NaN")]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_numbers(index: int, message: str, value: float) -> None:
    parts = list(problem(2, 4, 8))
    parts[index].view(-1)[0] = value
    with pytest.raises(NumericalError, match=message):
        solve(*parts)


def test_indefinite_factor() -> None:
    weight, hessian, rows = problem(2, 4, 8)
    rows[1] = torch.full((4, 4), 100.0).fill_diagonal_(1.0)
    with pytest.raises(NotPositiveDefiniteError, match="the Hessian is not positive definite"):
        solve(weight, hessian, rows)


# --- what it is for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["minmax", "hessian"])
@pytest.mark.parametrize("bits", [2, 3])
def test_order_of_methods(bits: int, grid: str) -> None:
    """On BoA's objective, per channel: ordered rows < rows as they are < GPTQ < rounding; geometric means of 16 seeds.

    Rows taken jointly lie between BoA and GPTQ or below BoA: their grids fit what they quantize exactly.
    """
    logs: dict[str, list[float]] = {"boa": [], "ordered": [], "joint": [], "gptq": [], "rtn": []}
    for seed in range(16):
        weight, hessian, rows = problem(2, 16, 32, seed)
        C, R = damped(hessian, DAMPING), damped_rows(rows, DAMPING)
        found = {
            "boa": solve(weight, hessian, rows, (bits,), grid, row_order=False, row_block=4).weight,
            "ordered": solve(weight, hessian, rows, (bits,), grid, row_block=4).weight,
            "joint": solve(weight, hessian, rows, (bits,), grid, row_order=False, row_block=4, joint_rows=True).weight,
            "gptq": solve(weight, hessian, None, (bits,), grid).weight,
            "rtn": rtn(weight, (bits,), False, GRIDS[grid], hessian),
        }
        for name, quantized in found.items():
            error = (weight - quantized.dequantize().double()).reshape(2, 16, 32)
            logs[name].append(torch.tensor(kronecker_loss(error, C, R)).log().item())
    mean = {name: torch.tensor(values).mean().exp().item() for name, values in logs.items()}
    assert mean["ordered"] < mean["boa"] < mean["gptq"] < mean["rtn"], mean
    assert mean["ordered"] < mean["joint"] < mean["gptq"], mean
    assert mean["ordered"] < 0.7 * mean["gptq"]


# --- refinement ---------------------------------------------------------------------------------------------------


def head_losses(weight: Tensor, C: Tensor, R: Tensor, quantized: Any) -> Tensor:
    error = (weight - quantized.dequantize().double()).reshape(*R.shape[:2], -1)
    return torch.tensor([kronecker_loss(e[None], C, r[None]) for e, r in zip(error, R, strict=True)])


@settings(max_examples=15, deadline=None)
@given(head_dim=st.sampled_from([1, 3, 16, 21]), n_groups=st.integers(1, 3), seed=st.integers(0, 99))
def test_refinement_raises_no_head(head_dim: int, n_groups: int, seed: int) -> None:
    weight, hessian, rows = problem(2, head_dim, 12 * n_groups, seed)
    start = solve(weight, hessian, rows, (2,) * n_groups).weight
    C, R = damped(hessian, DAMPING), damped_rows(rows, DAMPING)
    losses = [
        head_losses(weight, C, R, refine_heads(weight, hessian, rows, start, k, DAMPING, DAMPING)) for k in (0, 1, 2, 3)
    ]
    for before, after in itertools.pairwise(losses):
        assert (after <= before * (1 + 1e-9)).all()
    codes = refine_heads(weight, hessian, rows, start, 2, DAMPING, DAMPING).codes
    assert int(codes.max()) <= 3


def test_refinement_of_heads_with_inputs_of_their_own() -> None:
    weight, _, rows = problem(3, 18, 20)
    hessians = torch.stack([positive(20, seed=10 + head) for head in range(3)])
    start = solve(weight, hessians, rows, (2, 2)).weight
    together = refine_heads(weight, hessians, rows, start, 2, DAMPING, DAMPING)
    for head, (own, hessian) in enumerate(zip(weight.chunk(3), hessians, strict=True)):
        mine = slice(18 * head, 18 * (head + 1))
        first = replace(start, codes=start.codes[mine], scales=start.scales[mine], zeros=start.zeros[mine])
        alone = refine_heads(own, hessian, rows[head : head + 1], first, 2, DAMPING, DAMPING)
        assert torch.equal(together.codes[mine], alone.codes)
        assert torch.equal(together.scales[mine], alone.scales)


def test_refinement_pays() -> None:
    weight, hessian, rows = problem(3, 16, 64)
    start = solve(weight, hessian, rows, (2,))
    better = refine_heads(weight, hessian, rows, start.weight, 2, DAMPING, DAMPING)
    C, R = damped(hessian, DAMPING), damped_rows(rows, DAMPING)
    assert (head_losses(weight, C, R, better) < 0.9 * head_losses(weight, C, R, start.weight)).all()


def test_refinement_without_coupling_is_plain() -> None:
    weight, hessian, _ = problem(2, 20, 150)
    start = solve(weight, hessian, None, (2,)).weight
    expected = refine(weight, damped(hessian, DAMPING), start, 2)
    identity = torch.eye(20, dtype=torch.float64).expand(2, 20, 20)
    per_head = torch.stack((hessian, hessian))
    for columns, rows in ((hessian, None), (hessian, identity), (per_head, None), (per_head, identity)):
        found = refine_heads(weight, columns, rows, start, 2, DAMPING, DAMPING)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scales, expected.scales)


def test_refined_code_is_the_best_given_the_others() -> None:
    """One head, one row: coordinate descent ends where no single code can move to advantage."""
    weight, hessian, rows = problem(1, 3, 10)
    start = solve(weight, hessian, rows, (2,)).weight
    end = refine_heads(weight, hessian, rows, start, 30, DAMPING, DAMPING)
    C, R = damped(hessian, DAMPING), damped_rows(rows, DAMPING)
    least = float(head_losses(weight, C, R, end))
    for row, column in itertools.product(range(3), range(10)):
        for code in range(4):
            codes = end.codes.clone()
            codes[row, column] = code
            assert float(head_losses(weight, C, R, replace(end, codes=codes))) >= least * (1 - 1e-9)
