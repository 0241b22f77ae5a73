"""Statistics of the inputs of a block's linears, gathered while calibration data runs through it.

Linears that receive the same tensor (q/k/v, gate/up) share one accumulator: it is gathered once, and a solver that
factors it factors it once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantkit.errors import RequestError


@dataclass(slots=True)
class InputStatistics:
    """What is known about one input: its Hessian, and optionally a sample of its rows."""

    in_features: int
    n_tokens: float = 0  # the sum of the tokens' weights, where they are weighted
    gram: Tensor | None = None  # float32 [in, in], sum of x x^T, each token by its weight
    cross_gram: Tensor | None = None  # float32 [in, in], sum of x~ x^T, x~ the same token's input in the float model
    absmax: Tensor | None = None  # float32 [in], the largest |x| of each channel
    sample: list[Tensor] = field(default_factory=list)  # float32 [<= sample_rows, in] in pieces

    def hessian(self) -> Tensor | None:
        """(2 / n_tokens) X^T X, float32 ``[in, in]``; None when no token arrived."""
        return None if self.gram is None or not self.n_tokens else self.gram * (2 / self.n_tokens)

    def cross(self) -> Tensor | None:
        """(2 / n_tokens) X~^T X, float32 ``[in, in]``; None where the float model's inputs were not offered."""
        return None if self.cross_gram is None or not self.n_tokens else self.cross_gram * (2 / self.n_tokens)

    def rows(self) -> Tensor:
        """The sampled rows, float32 ``[n, in]``."""
        return torch.cat(self.sample) if self.sample else torch.empty(0, self.in_features)


class StatisticsRecorder:
    """Hooks on the linears of one block.

    Args:
        linears: name to module.
        rows_per_call: rows of each input kept as a sample, evenly spaced over the call's tokens; 0 keeps none.
        absmax: keep the largest magnitude of each channel too.
        strict: refuse weights for a linear that does not receive every token; else all that it receives count alike.
    """

    def __init__(
        self, linears: Mapping[str, nn.Module], rows_per_call: int = 0, absmax: bool = False, strict: bool = True
    ) -> None:
        self._linears, self._strict = linears, strict
        self._rows_per_call, self._absmax = rows_per_call, absmax
        self._leader: dict[str, str] = {}  # linear -> the linear whose statistics it shares
        self._seen: list[tuple[Tensor, str]] = []  # inputs of the running call; kept alive so that identity is sound
        self._statistics: dict[str, InputStatistics] = {}
        self._float_inputs: Mapping[str, Tensor] = {}
        self._weights: Tensor | None = None

    def leader(self, name: str) -> str:
        """The linear under whose name the statistics of ``name`` were gathered."""
        return self._leader.get(name, name)

    def first_calls(self) -> list[str]:
        """The linears in the order in which they were first called."""
        return list(self._leader)

    def statistics(self, name: str) -> InputStatistics:
        in_features: int = self._linears[name].in_features  # type: ignore[assignment]
        return self._statistics.get(self.leader(name), InputStatistics(in_features))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record everything that runs through the block inside this context."""
        handles = [self._hook(name, linear) for name, linear in self._linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()

    def next_call(self, float_inputs: Mapping[str, Tensor] | None = None, weights: Tensor | None = None) -> None:
        """Before each call of the block: forget which inputs were seen.

        Args:
            float_inputs: what the same linears receive in the float model for the same tokens; gathers `cross_gram`.
            weights: float ``[n_tokens]``, what each token of this call counts; 0 leaves it out. None: 1 each.
        """
        self._seen.clear()
        self._float_inputs = float_inputs or {}
        self._weights = weights

    def _hook(self, name: str, linear: nn.Module) -> RemovableHandle:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._record(name, args[0])

        return linear.register_forward_pre_hook(record)

    def _record(self, name: str, inputs: Tensor) -> None:
        if inputs.numel() == 0:
            return
        shared = next((other for tensor, other in self._seen if tensor is inputs), None)
        if name not in self._leader:
            self._leader[name] = shared or name
        if self._leader[name] != name:
            return
        self._seen.append((inputs, name))
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        entry = self._statistics.setdefault(name, InputStatistics(rows.shape[1]))
        rows, n_tokens = self._weighted(name, rows)
        gram = rows.t() @ rows
        entry.gram = gram if entry.gram is None else entry.gram.add_(gram)
        entry.n_tokens += n_tokens
        if name in self._float_inputs:
            float_rows, _ = self._weighted(name, self._float_inputs[name].reshape(-1, rows.shape[1]).float())
            cross = float_rows.t() @ rows
            entry.cross_gram = cross if entry.cross_gram is None else entry.cross_gram.add_(cross)
        if self._absmax and len(rows):
            largest = rows.abs().amax(0)
            entry.absmax = largest if entry.absmax is None else torch.maximum(entry.absmax, largest)
        if self._rows_per_call:
            n = min(self._rows_per_call, rows.shape[0])
            entry.sample.append(rows[torch.arange(n, device=rows.device) * rows.shape[0] // n].cpu())

    def _weighted(self, name: str, rows: Tensor) -> tuple[Tensor, float]:
        """Rows that count, each times the root of its weight, and the sum of the weights."""
        if self._weights is None:
            return rows, rows.shape[0]
        weights = self._weights.to(rows)
        if len(weights) != len(rows):
            if not self._strict:
                return rows, rows.shape[0]
            raise RequestError(
                f"{name} does not receive every token, so these cannot be told apart here; use tokens=all"
            )
        kept = weights > 0
        return rows[kept] * weights[kept].sqrt().unsqueeze(1), float(weights.sum())


@contextmanager
def inputs_of(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collects the latest input of each linear while a block runs inside this context."""
    latest: dict[str, Tensor] = {}

    def hook(name: str, linear: nn.Module) -> RemovableHandle:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            latest[name] = args[0].detach()

        return linear.register_forward_pre_hook(keep)

    handles = [hook(name, linear) for name, linear in linears.items()]
    try:
        yield latest
    finally:
        for handle in handles:
            handle.remove()
