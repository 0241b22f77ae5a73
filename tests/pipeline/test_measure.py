"""What a change of one block does to the model's last hidden states, measured stream by stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkit.models.structure import Block, Linear
from quantkit.pipeline.budget import Choice, choices_of, units_of
from quantkit.pipeline.measure import Propagation, probe_samples
from quantkit.pipeline.modality import squared_error
from quantkit.pipeline.scored import ScoredBlock
from quantkit.recipe import resolve

WIDTH = 64


class Residual(nn.Module):
    """x + gain W x."""

    def __init__(self, gain: float, seed: int) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)
        generator = torch.Generator().manual_seed(seed)
        self.proj.weight.data = gain * torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.proj(hidden)


def samples(n: int = 4, n_tokens: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(1, n_tokens, WIDTH, generator=generator) for _ in range(n)]


def scored(module: nn.Module, hidden: list[Tensor], masks: Any = None) -> ScoredBlock:
    def outcomes() -> Iterator[tuple[Tensor, Tensor]]:
        for sample, before in enumerate(hidden):
            after = module(before)
            yield before, after
            hidden[sample] = after

    forward: Callable[[int, Tensor], Tensor] = lambda sample, before: module(before)  # noqa: E731
    return ScoredBlock(module, len(hidden), outcomes(), forward, masks)


def blocks_of(n: int) -> list[Block]:
    linears = [(Linear(f"layers.{i}.proj", "proj", WIDTH, WIDTH),) for i in range(n)]
    return [Block(f"layers.{i}", each, ()) for i, each in enumerate(linears)]


@torch.no_grad()
def test_losses_are_those_of_the_whole_model() -> None:
    """One block rounded, the others original: the same error as running the whole model so; 4^-b for other widths."""
    modules = [Residual(0.5, seed) for seed in range(3)]
    recipe = resolve("casp", bits=2.5, group_size=WIDTH, settings=["keep_ratio=1", "solver=rtn", "grid=minmax"])
    units, choices = units_of(blocks_of(3), recipe), choices_of(recipe, [2, 3, 4])
    propagation, hidden = Propagation(recipe, choices, None), samples()
    for unit, module in zip(units, modules, strict=True):
        propagation.look_at(unit, scored(module, hidden))
    losses = propagation.losses()
    whole = nn.Sequential(*modules)
    original = [whole(sample) for sample in samples()]
    for index, module in enumerate(modules):
        kept = module.proj.weight.data.clone()
        low, high = kept.amin(1, keepdim=True).clamp_max(0), kept.amax(1, keepdim=True).clamp_min(0)
        scale = ((high - low) / 3).half().float()
        zero = (-low / scale).round()
        module.proj.weight.data = scale * (((kept / scale).round() + zero).clamp(0, 3) - zero)
        found = squared_error(original, [whole(sample) for sample in samples()], None)
        module.proj.weight.data = kept
        assert losses[index][0] == pytest.approx(found, rel=0.05)
        assert losses[index] == pytest.approx([losses[index][0] / 4**more for more in range(3)])


@torch.no_grad()
def test_a_block_without_linears_passes_the_streams_on() -> None:
    recipe = resolve("casp", bits=2.5, group_size=WIDTH, settings=["keep_ratio=1", "solver=rtn", "grid=minmax"])
    units, choices = units_of(blocks_of(1), recipe), choices_of(recipe, [2, 3])
    losses = []
    for gain in (0.0, 3.0):
        propagation, hidden = Propagation(recipe, choices, None), samples()
        propagation.look_at(units[0], scored(Residual(0.5, 0), hidden))
        propagation.look_at(None, scored(nn.Identity() if not gain else nn.Threshold(gain, 0.0), hidden))
        losses.append(propagation.losses()[0][0])
    assert losses[0] != pytest.approx(losses[1], rel=0.01)  # what lies behind the block changes what its error does


def test_only_text_tokens_count() -> None:
    before = torch.ones(1, 4, 2)
    after = before.clone()
    after[0, 0], after[0, 1], after[0, 2] = 9, 5, 2  # position 0 never counts
    mask = torch.tensor([False, True, False, False])
    assert squared_error([before], [after], [mask]) == pytest.approx(0.5)
    assert squared_error([before], [after], None) == pytest.approx((16 + 1) / 3)
    assert squared_error([before], [after], [torch.ones(4, dtype=torch.bool)]) == 0


def test_probes_are_spread() -> None:
    assert probe_samples(3) == [0, 1, 2]
    assert probe_samples(64) == [0, 8, 16, 24, 32, 40, 48, 56]


def test_every_ratio_is_a_choice() -> None:
    recipe = resolve("casp", bits=2.2)
    assert choices_of(recipe, [2]) == [Choice(2, 128, ratio) for ratio in (1, 0.25, 0.375, 0.5)]
    assert [c.keep_ratio for c in choices_of(resolve("casp", settings=["factor_all=true"]), [2, 3])] == [0.25, 0.25]
    assert {c.keep_ratio for c in choices_of(resolve("layerwise", settings=["keep_ratio=0.5"]), [2, 3])} == {0.5}
    assert {c.keep_ratio for c in choices_of(resolve("casp", settings=["keep_ratio=1"]), [2, 3])} == {1}
