"""One block of the unquantized model, as allocators see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

Outcomes = Iterable[tuple[Tensor, Tensor]]  # per sample: what enters and what leaves a block, [1, n_tokens, hidden]


@dataclass(frozen=True, slots=True)
class ScoredBlock:
    """One block of the unquantized model.

    Attributes:
        module: the block with its original weights.
        n_samples: of the calibration set; 0 where none is needed.
        outcomes: runs the block on one sample at a time; the hidden states advance as it is consumed.
        forward: (sample, input) -> output of the block.
        image_masks: bool ``[n_tokens]`` per sample, true for image tokens; None without pictures.
        entering: sample -> what enters the block, as long as `outcomes` has not been consumed.
    """

    module: nn.Module
    n_samples: int
    outcomes: Outcomes
    forward: Callable[[int, Tensor], Tensor]
    image_masks: Sequence[Tensor] | None = None
    entering: Callable[[int], Tensor] | None = None
