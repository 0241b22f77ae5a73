"""SliM-LLM's allocation: against literal loops over k, and what it must do on layers made for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from strategies import random_hessian, random_inputs, random_weight
from torch import Tensor

from quantkit.algorithms.gptq import GPTQConfig, gptq
from quantkit.algorithms.grids import GRIDS, Grid
from quantkit.algorithms.hessian import damped, damped_inverse_factor, without_dead_columns
from quantkit.algorithms.rtn import rtn
from quantkit.algorithms.slim import SBAConfig, group_salience, sba, widths_for
from quantkit.errors import NumericalError, RequestError
from quantkit.formats.grouped_int import GroupedInt

GROUP = 6
# On the last two the other direction of the divergence would choose another k.
CASES = [(bits, n_groups, seed) for bits in (2, 3, 7) for n_groups in (1, 2, 5, 8) for seed in range(3)]
CASES += [(2, 5, 30), (2, 8, 3)]


def layer(n_groups: int, seed: int, n_rows: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, inputs and Hessian; the groups' inputs differ in size, so that mixed widths pay."""
    weight = random_weight(n_rows, GROUP * n_groups, seed)
    loudness = torch.logspace(-1, 1, n_groups, dtype=torch.float64)
    loudness = loudness[torch.randperm(n_groups, generator=torch.Generator().manual_seed(seed))]
    inputs = random_inputs(200, GROUP * n_groups, seed) * loudness.repeat_interleave(GROUP)
    return weight, inputs, inputs.t() @ inputs * (2 / len(inputs))


def salience(weight: Tensor, hessian: Tensor, damping: float = 0.01) -> Tensor:
    """sum of W^2 / U_cc^2 per group, with loops."""
    W, H = without_dead_columns(weight, hessian)
    U, _ = damped_inverse_factor(H, damping)
    columns = [float((W[:, c] ** 2).sum() / U[c, c] ** 2) for c in range(W.shape[1])]
    return torch.tensor([sum(columns[start : start + GROUP]) for start in range(0, len(columns), GROUP)])


def dequantized(weight: GroupedInt) -> Tensor:
    grouped = weight.codes.double().reshape(weight.codes.shape[0], len(weight.bits), -1)
    return (weight.scales.double().unsqueeze(-1) * (grouped - weight.zeros.double().unsqueeze(-1))).flatten(1)


def literal_search(weight: Tensor, bits: int, order: list[int], divergence: Callable[[Tensor], float]) -> list[float]:
    """The divergence of every k, each from a full re-quantization of the layer."""
    n_groups = len(order)
    found = []
    for k in range(n_groups // 2 + 1):
        widths = [bits] * n_groups
        for group in order[:k]:
            widths[group] = bits - 1
        for group in order[n_groups - k :]:
            widths[group] = bits + 1
        found.append(divergence(dequantized(rtn(weight, tuple(widths), False, GRIDS["minmax"]))))
    return found


def assert_least(widths: tuple[int, ...], bits: int, divergences: list[float]) -> None:
    """The chosen k is the first minimum, up to the rounding with which two routes sum (1e-5)."""
    k = widths.count(bits + 1)
    assert divergences[k] <= min(divergences) * (1 + 1e-5)
    assert all(earlier > divergences[k] * (1 - 1e-5) for earlier in divergences[:k])


# --- the search ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.01, 1.0])
@pytest.mark.parametrize(("bits", "n_groups", "seed"), [*CASES, (2, 5, 8), (2, 5, 13)])
def test_table_search_equals_a_literal_loop(bits: int, n_groups: int, seed: int, damping: float) -> None:
    """On the last two the undamped Hessian would choose another k than the one damped by its mean diagonal."""
    weight, _, hessian = layer(n_groups, seed)
    H = damped(hessian, damping)

    def lost(quantized: Tensor) -> float:
        error = quantized - weight
        return float(torch.trace(error @ H @ error.t()))

    order = torch.argsort(salience(weight, hessian, damping), stable=True).tolist()
    widths = sba(weight, hessian, SBAConfig(bits=bits, group_size=GROUP, damping=damping))
    assert_least(widths, bits, literal_search(weight, bits, order, lost))


@pytest.mark.parametrize(("bits", "n_groups", "seed"), CASES)
def test_incremental_search_equals_a_literal_loop(bits: int, n_groups: int, seed: int) -> None:
    weight, inputs, hessian = layer(n_groups, seed)
    target = (inputs @ weight.t()).softmax(-1).clamp_min(1e-6)

    def divergence(quantized: Tensor) -> float:
        output = (inputs @ quantized.t()).softmax(-1).clamp_min(1e-6)
        return float((output * (output / target).log()).sum(1).mean())

    order = torch.argsort(salience(weight, hessian), stable=True).tolist()
    widths = sba(weight, hessian, SBAConfig(bits=bits, group_size=GROUP, criterion="kl"), inputs)
    assert_least(widths, bits, literal_search(weight, bits, order, divergence))


def test_cases_try_different_answers() -> None:
    """The loops above would prove little if every layer answered k = 0."""
    counts = set()
    for bits, n_groups, seed in CASES:
        weight, inputs, hessian = layer(n_groups, seed)
        for criterion in ("mse", "kl"):
            config = SBAConfig(bits=bits, group_size=GROUP, criterion=criterion)
            counts.add(sba(weight, hessian, config, inputs).count(bits + 1))
    assert {0, 1, 2, 3, 4} <= counts


@pytest.mark.parametrize("criterion", ["mse", "kl"])
@pytest.mark.parametrize(("bits", "n_groups", "seed"), CASES)
def test_average_is_kept_and_the_most_salient_get_more(criterion: str, bits: int, n_groups: int, seed: int) -> None:
    weight, inputs, hessian = layer(n_groups, seed)
    config = SBAConfig(bits=bits, group_size=GROUP, criterion=criterion)  # type: ignore[arg-type]
    widths = sba(weight, hessian, config, inputs)
    assert len(widths) == n_groups
    assert sum(widths) == bits * n_groups
    assert set(widths) <= {bits - 1, bits, bits + 1}
    k = widths.count(bits + 1)
    order = torch.argsort(salience(weight, hessian), stable=True).tolist()
    assert {g for g, width in enumerate(widths) if width == bits + 1} == set(order[n_groups - k :])
    assert {g for g, width in enumerate(widths) if width == bits - 1} == set(order[:k])


def test_group_salience_is_the_documented_sum() -> None:
    weight, _, hessian = layer(5, 0)
    U, _ = damped_inverse_factor(hessian, 0.01)
    torch.testing.assert_close(group_salience(weight, U, GROUP), salience(weight, hessian).double())


def test_widths_for() -> None:
    order = torch.tensor([2, 0, 3, 1, 4])
    assert widths_for(order, 0, 3) == (3,) * 5
    assert widths_for(order, 1, 3) == (3, 3, 2, 3, 4)
    assert widths_for(order, 2, 3) == (2, 4, 2, 3, 4)


# --- layers made for it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planted", [0, 3, 7])
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("criterion", ["mse", "kl"])
def test_loud_group_gets_one_bit_more(planted: int, bits: int, criterion: str) -> None:
    """Equal groups but for one with ten times the inputs: a hundred times the loss of each other group."""
    generator = torch.Generator().manual_seed(planted)
    weight = 0.1 * torch.randn(24, 8 * GROUP, generator=generator, dtype=torch.float64)
    inputs = torch.randn(400, 8 * GROUP, generator=generator, dtype=torch.float64)
    inputs[:, planted * GROUP : (planted + 1) * GROUP] *= 10
    hessian = inputs.t() @ inputs * (2 / 400)
    config = SBAConfig(bits=bits, group_size=GROUP, criterion=criterion)  # type: ignore[arg-type]
    assert sba(weight, hessian, config, inputs)[planted] == bits + 1


@pytest.mark.parametrize("bits", [2, 3])
def test_equal_groups_stay_equal_and_solve_like_gptq(bits: int) -> None:
    """All groups alike: a bit less costs more than a bit more gains, so k = 0, and SliM on min-max is GPTQ."""
    weight = random_weight(8, GROUP, 1).repeat(1, 6)
    identity = torch.eye(6 * GROUP, dtype=torch.float64)
    widths = sba(weight, identity, SBAConfig(bits=bits, group_size=GROUP))
    assert widths == (bits,) * 6
    hessian = random_hessian(6 * GROUP, 1)
    slim, plain = (gptq(weight, hessian, w, False, GRIDS["minmax"], GPTQConfig()) for w in (widths, (bits,) * 6))
    assert torch.equal(slim.weight.codes, plain.weight.codes)


@pytest.mark.parametrize("criterion", ["mse", "kl"])
@pytest.mark.parametrize("seed", range(5))
def test_permuted_groups_get_permuted_widths(criterion: str, seed: int) -> None:
    """Exact for independent inputs, where a group's salience does not depend on its place.

    (In general U_cc conditions on the columns before c, so salience, like the paper's, depends on the order.)
    """
    weight, inputs, hessian = layer(8, seed)
    hessian = torch.diag(hessian.diagonal())
    groups = torch.randperm(8, generator=torch.Generator().manual_seed(seed + 50))
    shuffle = (groups.unsqueeze(1) * GROUP + torch.arange(GROUP)).flatten()
    config = SBAConfig(bits=2, group_size=GROUP, criterion=criterion)  # type: ignore[arg-type]
    plain = sba(weight, hessian, config, inputs)
    permuted = sba(weight[:, shuffle], hessian[shuffle][:, shuffle], config, inputs[:, shuffle])
    assert permuted == tuple(plain[g] for g in groups.tolist())


def test_rows_do_not_matter_in_order() -> None:
    weight, _, hessian = layer(8, 3)
    config = SBAConfig(bits=2, group_size=GROUP)
    assert sba(weight.flip(0), hessian, config) == sba(weight, hessian, config)


def test_dead_groups_are_the_least_salient() -> None:
    """Their weights count as zero: no salience, no error, so the first to give a bit away."""
    weight, inputs, _ = layer(4, 0)
    weight = weight * torch.tensor([1.0, 100.0, 1.0, 1.0], dtype=torch.float64).repeat_interleave(GROUP)
    inputs[:, GROUP : 2 * GROUP] = 0
    hessian = inputs.t() @ inputs
    widths = sba(weight, hessian, SBAConfig(bits=3, group_size=GROUP))
    assert widths[1] == 2
    assert widths[int(salience(weight, hessian).argmax())] == 4


def test_search_grid_is_used() -> None:
    """The errors that are compared are those of the grid that the solver will use."""
    seen: list[int] = []

    def spy(weight: Tensor, bits: int, symmetric: bool, metric: Tensor) -> Grid:
        seen.append(bits)
        return GRIDS["mse"](weight, bits, symmetric, metric)

    weight, _, hessian = layer(4, 1)
    config = SBAConfig(bits=3, group_size=GROUP, search_grid=spy)
    assert sba(weight, hessian, config) == sba(
        weight, hessian, SBAConfig(bits=3, group_size=GROUP, search_grid=GRIDS["mse"])
    )
    assert sorted(seen) == [2, 3, 4]


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 8])
def test_no_room_on_one_side(bits: int) -> None:
    weight, _, hessian = layer(2, 0)
    message = f"slim mixes {bits - 1}, {bits} and {bits + 1} bits; use --bits 2 to 7"
    with pytest.raises(RequestError, match=message):
        sba(weight, hessian, SBAConfig(bits=bits, group_size=GROUP))


@pytest.mark.parametrize("inputs", [None, torch.empty(0, 2 * GROUP)])
def test_divergence_of_outputs_needs_inputs(inputs: Tensor | None) -> None:
    weight, _, hessian = layer(2, 0)
    with pytest.raises(RequestError, match="slim: criterion=kl needs a sample of the inputs"):
        sba(weight, hessian, SBAConfig(group_size=GROUP, criterion="kl"), inputs)


def test_nan_and_inf_are_refused() -> None:
    weight, _, hessian = layer(2, 0)
    with pytest.raises(NumericalError, match="the weight holds NaN or Inf; the checkpoint is damaged"):
        sba(weight / 0, hessian, SBAConfig(group_size=GROUP))
    hessian[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="the Hessian holds NaN or Inf"):
        sba(weight, hessian, SBAConfig(group_size=GROUP))
