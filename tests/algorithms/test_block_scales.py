"""Training of a block's scales: gradients against finite differences, what never rises, what never moves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from strategies import random_hessian, random_inputs, random_weight
from torch import Tensor

from quantkit.algorithms.block_scales import BlockConfig, Optimized, block_loss, optimize_scales
from quantkit.algorithms.grids import GRIDS
from quantkit.algorithms.ptq161 import PTQ161Config, ptq161, salient_mask
from quantkit.errors import NumericalError
from quantkit.formats.sign_salient import SignSalient, pack

OUT, IN, TOKENS, SAMPLES = 12, 20, 30, 9


def signs(seed: int, k: int = 4) -> SignSalient:
    weight, hessian = random_weight(OUT, IN, seed, torch.float32), random_hessian(IN, seed, dtype=torch.float32)
    mask = salient_mask(hessian.diagonal(), k)
    return ptq161(weight, hessian, mask, GRIDS["minmax"], PTQ161Config(compensate=False, rounds=0)).weight


class Toy:
    """A block of one linear and a nonlinearity; targets are what the float weight makes of the same inputs."""

    def __init__(self, seed: int = 0) -> None:
        self.weight = random_weight(OUT, IN, seed, torch.float32)
        inputs = random_inputs(SAMPLES * TOKENS, IN, seed).float()
        self.inputs = inputs.reshape(SAMPLES, 1, TOKENS, IN)
        self.seen: list[int] = []

    def forward(self, sample: int, weights: Mapping[str, Tensor]) -> Tensor:
        if torch.is_grad_enabled():
            self.seen.append(sample)
        return torch.nn.functional.silu(self.inputs[sample] @ weights["proj"].t())

    def targets(self, sample: int) -> list[Tensor]:
        return [torch.nn.functional.silu(self.inputs[sample] @ self.weight.t())]

    def train(self, start: SignSalient, **settings: object) -> Optimized:
        config = BlockConfig(**settings)  # type: ignore[arg-type]
        return optimize_scales({"proj": start}, self.forward, self.targets, SAMPLES, config)


# --- the loss -----------------------------------------------------------------------------------------------------


def test_the_loss_is_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    y, t = (torch.randn(1, 7, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    mse = ((y - t) ** 2).sum() / 35
    cosines = [float(y[0, i] @ t[0, i] / (y[0, i].norm() * t[0, i].norm())) for i in range(7)]
    torch.testing.assert_close(block_loss(y, t, False), mse)
    torch.testing.assert_close(block_loss(y, t, True), mse - math.log(abs(sum(cosines) / 7)))


def test_equal_outputs_cost_nothing_and_opposite_ones_are_defined() -> None:
    y = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert block_loss(y, y, True).abs() < 1e-12
    assert torch.isfinite(block_loss(torch.zeros_like(y), y, True))  # the cosine is 0: its logarithm is bounded


def test_gradient_of_the_angular_loss_against_finite_differences() -> None:
    generator = torch.Generator().manual_seed(2)
    y, t = (torch.randn(1, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda value: block_loss(value, t, True), y.requires_grad_(True))


@pytest.mark.parametrize("name", ["row_scales", "row_means", "column_scales"])
def test_gradients_reach_every_scale(name: str) -> None:
    """In float64, against finite differences, through the dequantized weight and the loss."""
    start, toy = signs(3), Toy(3)
    salient = replace(start.salient, scales=start.salient.scales.double())  # type: ignore[type-var, union-attr]
    double = replace(
        start,
        row_scales=start.row_scales.double(),
        row_means=start.row_means.double(),  # type: ignore[union-attr]
        column_scales=start.column_scales.double(),  # type: ignore[union-attr]
        salient=salient,
    )
    inputs, target = toy.inputs[0].double(), toy.targets(0)[0].double()

    def loss(values: Tensor) -> Tensor:
        return block_loss(inputs @ replace(double, **{name: values}).dequantize().t(), target, True)

    assert torch.autograd.gradcheck(loss, getattr(double, name).clone().requires_grad_(True))


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", ["paper", "all"])
@pytest.mark.parametrize("seed", range(3))
def test_training_lowers_the_held_out_loss_and_keeps_signs_and_codes(parameters: str, seed: int) -> None:
    start, toy = signs(seed), Toy(seed)
    result = toy.train(start, steps=64, parameters=parameters)
    after = result.weights["proj"]
    assert result.after < result.before
    assert torch.equal(after.signs, start.signs)
    assert torch.equal(after.salient.codes, start.salient.codes)  # type: ignore[union-attr]
    assert torch.equal(after.salient.zeros, start.salient.zeros)  # type: ignore[union-attr]
    assert not torch.equal(after.row_scales, start.row_scales)
    assert not torch.equal(after.column_scales, start.column_scales)  # type: ignore[arg-type]
    if parameters == "paper":
        assert torch.equal(after.salient.scales, start.salient.scales)  # type: ignore[union-attr]


def test_what_is_reported_is_the_loss_of_what_is_stored() -> None:
    start, toy = signs(1), Toy(1)
    result = toy.train(start, steps=24)
    held = SAMPLES - 1
    for weight, loss in ((start, result.before), (result.weights["proj"], result.after)):
        output = toy.forward(held, {"proj": weight.dequantize()})
        assert loss == pytest.approx(float(block_loss(output, toy.targets(held)[0], True)), rel=1e-6)
    for name in ("row_scales", "row_means", "column_scales"):
        values = getattr(result.weights["proj"], name)
        assert torch.equal(values, values.half().float())


def test_the_held_out_eighth_is_never_trained_on_and_all_else_is() -> None:
    toy = Toy()
    toy.train(signs(0), steps=16)
    assert set(toy.seen) == set(range(SAMPLES - 1))
    assert len(toy.seen) == 16
    assert sorted(toy.seen[:8]) == list(range(8))  # an epoch has every sample once


def test_the_budget_is_never_exceeded_and_a_useless_rate_stops_early() -> None:
    assert Toy().train(signs(0), steps=3).steps == 3
    harmful = Toy().train(signs(0), steps=400, lr=0.5)  # every step overshoots
    assert harmful.after <= harmful.before
    stalled = Toy().train(signs(0), steps=400, lr=1e-9)  # below what float16 resolves: nothing changes
    assert stalled.steps == 2 * (SAMPLES - 1)
    assert torch.equal(stalled.weights["proj"].dequantize(), signs(0).dequantize())
    assert stalled.after == stalled.before


def test_one_sample_serves_for_both() -> None:
    toy = Toy()
    result = optimize_scales({"proj": signs(0)}, toy.forward, toy.targets, 1, BlockConfig(steps=8))
    assert set(toy.seen) == {0}
    assert result.after < result.before


def test_same_inputs_same_bytes() -> None:
    first, second = (pack(Toy(2).train(signs(2), steps=20).weights["proj"]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_progress_is_told_after_every_epoch() -> None:
    told: list[tuple[int, int, float]] = []
    toy = Toy()
    result = optimize_scales(
        {"proj": signs(0)},
        toy.forward,
        toy.targets,
        SAMPLES,
        BlockConfig(steps=20),
        lambda step, n_steps, loss: told.append((step, n_steps, loss)),
    )
    assert [(step, n_steps) for step, n_steps, _ in told] == [(8, 20), (16, 20), (20, 20)]
    assert min(loss for _, _, loss in told) == result.after


def test_without_salient_channels_too() -> None:
    result = Toy(4).train(signs(4, k=0), steps=32)
    assert result.after < result.before
    assert result.weights["proj"].salient is None


def test_divergence_is_an_error() -> None:
    toy = Toy()
    toy.inputs[SAMPLES - 1, 0, 0, 0] = float("inf")
    with pytest.raises(NumericalError, match="training of the block's scales diverged; use a lower --set block_lr"):
        toy.train(signs(0), steps=8)
