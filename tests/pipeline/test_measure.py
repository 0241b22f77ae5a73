"""What a change of one block does to the model's predictions, measured stream by stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkit.models.structure import Block, Linear
from quantkit.pipeline.budget import Choice, choices_of, units_of
from quantkit.pipeline.measure import Propagation, compared_rows, probe_samples
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


HEAD = torch.randn(WIDTH, 40, generator=torch.Generator().manual_seed(5)) / 8


def predict(hidden: Tensor) -> Tensor:
    return hidden @ HEAD


def divergence(original: list[Tensor], changed: list[Tensor]) -> float:
    """Mean KL of all positions but the first."""
    pairs = [
        (predict(a)[0, 1:].log_softmax(-1), predict(b)[0, 1:].log_softmax(-1))
        for a, b in zip(original, changed, strict=True)
    ]
    return float(torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean())


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
    losses = propagation.losses(predict)
    whole = nn.Sequential(*modules)
    original = [whole(sample) for sample in samples()]
    for index, module in enumerate(modules):
        kept = module.proj.weight.data.clone()
        low, high = kept.amin(1, keepdim=True).clamp_max(0), kept.amax(1, keepdim=True).clamp_min(0)
        scale = ((high - low) / 3).half().float()
        zero = (-low / scale).round()
        module.proj.weight.data = scale * (((kept / scale).round() + zero).clamp(0, 3) - zero)
        found = divergence(original, [whole(sample) for sample in samples()])
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
        losses.append(propagation.losses(predict)[0][0])
    assert losses[0] != pytest.approx(losses[1], rel=0.01)  # what lies behind the block changes what its error does


@torch.no_grad()
def test_only_text_tokens_count() -> None:
    mask = torch.tensor([False, True, True, False, False])
    assert compared_rows(5, mask).tolist() == [3, 4]
    assert compared_rows(5, None).tolist() == [1, 2, 3, 4]
    assert compared_rows(3, torch.ones(3, dtype=torch.bool)).tolist() == []
    assert len(compared_rows(2048, None)) == 256
    recipe = resolve("casp", bits=2.5, group_size=WIDTH, settings=["keep_ratio=1", "solver=rtn", "grid=minmax"])
    masks, everywhere = [torch.ones(24, dtype=torch.bool)] * 4, []
    for image in (masks, None):
        propagation = Propagation(recipe, choices_of(recipe, [2, 3]), image)
        propagation.look_at(units_of(blocks_of(1), recipe)[0], scored(Residual(0.5, 0), samples(), image))
        everywhere.append(propagation.losses(predict)[0][0])
    assert everywhere[0] == 0
    assert everywhere[1] > 0


def test_probes_are_spread() -> None:
    assert probe_samples(3) == [0, 1, 2]
    assert probe_samples(48) == list(range(0, 48, 4))


def test_every_ratio_is_a_choice() -> None:
    recipe = resolve("casp", bits=2.2)
    assert choices_of(recipe, [2]) == [Choice(2, 128, ratio) for ratio in (1, 0.25, 0.5)]
    assert [c.keep_ratio for c in choices_of(resolve("casp", settings=["factor_all=true"]), [2, 3])] == [0.25, 0.25]
    assert {c.keep_ratio for c in choices_of(resolve("layerwise", settings=["keep_ratio=0.5"]), [2, 3])} == {0.5}
    assert {c.keep_ratio for c in choices_of(resolve("casp", settings=["keep_ratio=1"]), [2, 3])} == {1}
