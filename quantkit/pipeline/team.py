"""The processes that train together: one, or those that ``accelerate launch -m quantkit quantize ...`` has started.

The first one (the leader) does everything; the others wait for the training stage, take their share of every batch, and
end without a word.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

_PATIENCE = timedelta(days=30)  # followers wait as long as the leader calibrates


def rank() -> int:
    """Of this process among those of a launch; 0 for one alone."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """Processes of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Team:
    """Joins the processes. In a launch of several, creating it waits for all of them.

    Args:
        device: of a process alone; in a team each has the GPU of its local rank, or the CPU if ``device`` is that.
        sparse: some parameters get no gradient in some batches, as experts do.
    """

    def __init__(self, device: torch.device, *, sparse: bool) -> None:
        self.rank, self.size, self.device = rank(), size(), device
        self._accelerator: Any = None
        if self.size == 1:
            return
        from accelerate import Accelerator  # sets up process groups: only where there are several
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        handlers = [
            InitProcessGroupKwargs(timeout=_PATIENCE),
            DistributedDataParallelKwargs(find_unused_parameters=sparse, broadcast_buffers=False),
        ]
        self._accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=handlers)
        self.device = self._accelerator.device

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass averages gradients over the team."""
        if self._accelerator is None:
            return model
        wrapped: nn.Module = self._accelerator.prepare(model)
        return wrapped

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """A backward pass in here adds to this process's gradients only."""
        if self._accelerator is None:
            return nullcontext()
        context: AbstractContextManager[Any] = self._accelerator.no_sync(model)
        return context

    def mean(self, value: Tensor) -> float:
        """Of a scalar over the team."""
        if self._accelerator is not None:
            value = self._accelerator.reduce(value, reduction="mean")
        return float(value)

    def wait(self) -> None:
        """Until all are here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()
