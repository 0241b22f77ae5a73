"""Forward and backward on a GPU, recorded once as a CUDA graph and replayed: one launch instead of thousands."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from quantkit.errors import first_line

_WARM_UP = 3  # passes before recording: libraries allocate and choose in their first ones


class Captured:
    """Calls ``work``, from the first call on as a replay where that can be.

    ``work`` must do the same with every input of a shape: no branch on values, nothing read back. What it reads and
    writes besides (parameters, gradients) has to stay where it is in memory. Other shapes than the first are computed
    as they come, and so is everything if recording fails, which is said once.

    Args:
        work: a tensor on the device in, a scalar out; adds gradients to those of the parameters.
        parameters: of which ``work`` makes gradients.
        device: where all of them are.
    """

    def __init__(
        self, work: Callable[[Tensor], Tensor], parameters: Sequence[nn.Parameter], device: torch.device
    ) -> None:
        self._work, self._parameters, self._device = work, parameters, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._input: Tensor | None = None
        self._output: Tensor | None = None

    @property
    def records(self) -> bool:
        """Whether batches of the first one's shape are replayed."""
        return self._graph is not None

    def __call__(self, batch: Tensor) -> Tensor:
        if self._input is None:
            return self._first(batch)
        if self._graph is None or self._output is None or batch.shape != self._input.shape:
            return self._work(batch)
        self._input.copy_(batch)
        self._graph.replay()
        return self._output.clone()

    def _first(self, batch: Tensor) -> Tensor:
        """Compute, then record; the gradients are left as one pass makes them."""
        self._input = batch.clone()
        result = self._work(batch)
        kept = {parameter: parameter.grad.clone() for parameter in self._parameters if parameter.grad is not None}
        try:
            self._record(self._input)
        except RuntimeError as error:
            self._graph = None
            message = f"training runs without a CUDA graph, which is slower: {first_line(error)}"
            warnings.warn(message, stacklevel=2)
        for parameter, gradient in kept.items():
            assert parameter.grad is not None
            parameter.grad.copy_(gradient)
        return result

    def _record(self, batch: Tensor) -> None:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # untyped in torch
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    self._work(batch)
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._output = self._work(batch)
            self._graph = graph
