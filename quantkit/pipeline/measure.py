"""What storing a block at low widths costs the model's predictions, measured: codes, and factors of queries and keys.

All is solved as it will be, on the original model. Each change of one block (all its linears at the lowest width; only
its queries and keys; these as factors of some rank) starts a stream of hidden states of its own, which goes on through
the original blocks behind it. At the end stands the KL divergence of what is predicted at text tokens. The size of an
error where it arises, or in the last hidden states, does not tell: one that moves attention to the wrong place is small
there, and costs the answer.

A block's loss is the sum of its parts; other widths follow from the rate-distortion law, as the divergence is quadratic
in small errors. So a block gets factors where the bytes that they save buy more elsewhere than they cost here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.algorithms.casp import expected_losses
from quantkit.calib.statistics import StatisticsRecorder
from quantkit.models.structure import Linear
from quantkit.pipeline.budget import Choice, Unit, is_factorized
from quantkit.pipeline.modality import token_weights
from quantkit.pipeline.scored import Predict, ScoredBlock
from quantkit.pipeline.solve import solve_linear
from quantkit.recipe import Recipe

N_PROBES = 12  # samples that are carried along
_AT_A_TIME = 8  # streams in one call of a block
_MAX_ROWS = 256  # of a sample at which predictions are compared, evenly spaced
_ALL = 0.0  # of `_Stream.ratio`: all linears of the block at the lowest width


@dataclass(frozen=True, slots=True)
class _Stream:
    """Hidden states of the probe samples with one block changed: as a whole, or its queries and keys."""

    unit: int
    ratio: float  # of the query and key weights kept; 1: as codes
    hidden: list[Tensor]  # per probe, [1, n_tokens, hidden], on the CPU


class Propagation:
    """Gathers block by block, in running order.

    Args:
        choices: of every unit, widths ascending.
        image_masks: bool ``[n_tokens]`` per sample, or None.
    """

    def __init__(self, recipe: Recipe, choices: Sequence[Choice], image_masks: Sequence[Tensor] | None) -> None:
        self._recipe, self._choices, self._masks = recipe, choices, image_masks
        self._streams: list[_Stream] = []
        self._original: list[Tensor] = []
        self._n_units = 0

    def look_at(self, unit: Unit | None, block: ScoredBlock) -> None:
        """The next block; consumes its outcomes.

        Args:
            unit: its linears; None where it has none.
        """
        probes = _Probes(unit, block, self._recipe)
        self._original = [after.cpu() for _, after in probes.pairs]
        probes.advance([stream.hidden for stream in self._streams])
        if unit is None:
            return
        lo, group_size = self._choices[0].bits, self._choices[0].group_size
        attention = [linear for linear in unit.linears if is_factorized(linear, self._recipe)]
        changes = {_ALL: probes.stored(unit.linears, self._recipe.at(lo, group_size, 1.0))}
        for ratio in {choice.keep_ratio for choice in self._choices}:
            if attention:
                changes[ratio] = probes.stored(attention, self._recipe.at(lo, group_size, ratio))
        for ratio, weights in changes.items():
            self._streams.append(_Stream(self._n_units, ratio, probes.outputs(weights)))
        self._n_units += 1

    def losses(self, predict: Predict) -> list[list[float]]:
        """Of each unit under each choice, once all blocks have been looked at.

        Args:
            predict: logits from what the last block puts out.
        """
        sums = [0.0] * len(self._streams)
        n_rows = 0
        for probe, original in enumerate(self._original):
            mask = None if self._masks is None else self._masks[probe_samples(len(self._masks))[probe]]
            rows = compared_rows(original.shape[1], mask)
            expected = predict(original[:, rows]).float().log_softmax(-1)
            n_rows += len(rows)
            for start in range(0, len(self._streams), _AT_A_TIME):
                streams = self._streams[start : start + _AT_A_TIME]
                hidden = torch.cat([stream.hidden[probe][:, rows] for stream in streams])
                found = predict(hidden).float().log_softmax(-1)
                divergences = (expected.exp() * (expected - found)).sum((1, 2))
                for index, divergence in enumerate(divergences.tolist()):
                    sums[start + index] += divergence
        parts: list[dict[float, float]] = [{} for _ in range(self._n_units)]
        for stream, total in zip(self._streams, sums, strict=True):
            parts[stream.unit][stream.ratio] = max(total / max(n_rows, 1), 0.0)
        return [self._losses_of(part) for part in parts]

    def _losses_of(self, part: Mapping[float, float]) -> list[float]:
        widths = sorted({choice.bits for choice in self._choices})
        rest = max(part[_ALL] - part.get(1.0, 0.0), 0.0)
        losses = {}
        for ratio in {choice.keep_ratio for choice in self._choices}:
            own = part.get(ratio, 0.0)
            parts = expected_losses(own, widths) if ratio == 1 else [own] * len(widths)
            for bits, other, mine in zip(widths, expected_losses(rest, widths), parts, strict=True):
                losses[ratio, bits] = other + mine
        return [losses[choice.keep_ratio, choice.bits] for choice in self._choices]


def stream_bytes(recipe: Recipe, n_blocks: int, n_samples: int, seq_len: int, hidden_size: int) -> int:
    """Held in memory while losses are measured; 0 under other allocators."""
    if recipe.allocator != "casp":
        return 0
    n_changes = 1 + (len(recipe.factor_ratios) if recipe.factorizes else 0)
    return 4 * n_blocks * n_changes * min(N_PROBES, n_samples) * seq_len * hidden_size


def probe_samples(n_samples: int) -> list[int]:
    """Evenly spaced."""
    n = min(N_PROBES, n_samples)
    return [at * n_samples // n for at in range(n)]


def compared_rows(n_tokens: int, image_mask: Tensor | None) -> Tensor:
    """Positions of text tokens, evenly spaced if they are many; never the first, which predicts next to nothing."""
    text = torch.ones(n_tokens, dtype=torch.bool) if image_mask is None else ~image_mask.cpu()
    rows = text.nonzero().flatten()
    rows = rows[rows > 0]
    return rows[:: max(1, -(-len(rows) // _MAX_ROWS))]


class _Probes:
    """One block of the original model on the probe samples, with the statistics that its linears are solved by."""

    def __init__(self, unit: Unit | None, block: ScoredBlock, recipe: Recipe) -> None:
        self._block, self._samples = block, probe_samples(block.n_samples)
        paths = [linear.path for linear in unit.linears] if unit else []
        linears = {path: block.module.get_submodule(path) for path in paths}
        self._recorder = StatisticsRecorder(linears, strict=recipe.weighs_tokens)
        self.pairs: list[tuple[Tensor, Tensor]] = []  # per probe: what enters and what leaves the block
        with self._recorder.recording():
            self._recorder.next_call(None, self._weights(recipe, 0))
            for sample, (before, after) in enumerate(block.outcomes):
                if sample in self._samples:
                    self.pairs.append((before.to(after.device, copy=True), after))
                self._recorder.next_call(None, self._weights(recipe, sample + 1))

    def _weights(self, recipe: Recipe, sample: int) -> Tensor | None:
        masks = self._block.image_masks
        return None if masks is None or sample >= len(masks) else token_weights(recipe, masks[sample])

    def stored(self, linears: Sequence[Linear], recipe: Recipe) -> dict[str, Tensor]:
        """By path, the weights as the recipe stores them."""
        found: dict[str, Tensor] = {}
        for linear in linears:
            weight, statistics = self._parameter(linear.path), self._recorder.statistics(linear.path)
            solved = solve_linear(linear, weight.data, statistics, recipe)
            found[linear.path] = solved.weight.dequantize().to(weight.dtype)
        return found

    def advance(self, streams: Sequence[list[Tensor]]) -> None:
        """Each stream's hidden states through the block, in place."""
        for probe, sample in enumerate(self._samples):
            for start in range(0, len(streams), _AT_A_TIME):
                some = streams[start : start + _AT_A_TIME]
                entering = torch.cat([stream[probe] for stream in some])
                leaving = self._block.forward(sample, entering.to(self.pairs[0][1].device)).cpu()
                for stream, hidden in zip(some, torch.split(leaving, 1), strict=True):
                    stream[probe] = hidden

    def outputs(self, weights: Mapping[str, Tensor]) -> list[Tensor]:
        """The block's outputs on the CPU with these weights in place."""
        originals = {path: self._parameter(path).data for path in weights}
        for path, weight in weights.items():
            self._parameter(path).data = weight
        found = [
            self._block.forward(sample, before).cpu()
            for sample, (before, _) in zip(self._samples, self.pairs, strict=True)
        ]
        for path, weight in originals.items():
            self._parameter(path).data = weight
        return found

    def _parameter(self, path: str) -> torch.nn.Parameter:
        return self._block.module.get_submodule(path).get_parameter("weight")
