"""The unquantized model, as allocators see it: one block after the other, and what it predicts behind the last one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.calib.hidden_states import run_behind
from quantkit.calib.pictures import CalibrationSet, for_forward
from quantkit.models.skeleton import Skeleton

Predict = Callable[[Tensor], Tensor]  # hidden states [n, n_tokens, hidden] of the last block -> logits [.., vocabulary]
Predicting = Callable[[], AbstractContextManager[Predict]]

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


@contextmanager
def predicting(
    skeleton: Skeleton, calibration: CalibrationSet, device: torch.device, dtype: torch.dtype
) -> Iterator[Predict]:
    """What the original model predicts from what its last block puts out; its blocks need no weights meanwhile."""
    skeleton.load_surroundings(device, dtype, head=True)
    model = skeleton.model
    sample = for_forward(model, next(iter(calibration.inputs())), device, dtype)
    blocks = [skeleton.block_module(index) for index in range(len(skeleton.blocks))]

    def predict(hidden: Tensor) -> Tensor:
        logits: Tensor = run_behind(
            lambda: model(**sample, use_cache=False).logits, blocks, hidden.to(device=device, dtype=dtype)
        )
        return logits

    try:
        yield predict
    finally:
        skeleton.release_surroundings()
