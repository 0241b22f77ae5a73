"""Scales of a whole block, trained on what the block puts out. Signs, means, codes and zeros stay.

Paper      PTQ1.61, arXiv:2502.13179, and the authors' settings: AdamW without decay, one sequence a step, row scales at
           5e-4, row and column multipliers at 1e-3.
Minimizes  for each target t: ``MSE(y, t) - log |mean cos(y, t)|``, the cosine along the hidden dimension. The paper has
           two targets: the float block on the float model's inputs, and on the inputs that y sees too.
Deviates   ``parameters="all"`` trains multipliers alone (of row scales, means, column scales and 4-bit scales), so that
           a step is relative to what it changes. An eighth of the sequences is held out; what is returned is the stored
           (float16) state with the least loss on it, the start included, and training stops when ``patience`` epochs in
           a row have not improved it. The authors take the last state.
Needs      a differentiable forward of the block; the only gradients here are those of one block.
Cost       a step is a forward and a backward of the block on one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.errors import NumericalError
from quantkit.formats.sign_salient import SignSalient

Forward = Callable[[int, Mapping[str, Tensor]], Tensor]  # (sample, weights by name) -> output of the block
Targets = Callable[[int], Sequence[Tensor]]  # sample -> what that output should be

_SMALLEST_COSINE = 1e-6  # its logarithm is taken


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockConfig:
    steps: int = 256  # at most
    lr_rows: float = 5e-4  # of row scales
    lr: float = 1e-3  # of multipliers
    parameters: Literal["paper", "all"] = "all"
    angular: bool = True  # with the term -log |mean cos|
    patience: int = 2  # epochs


class Optimized(NamedTuple):
    """The weights as they will be stored, the loss on held-out sequences before and after, and the steps taken."""

    weights: dict[str, SignSalient]
    before: float
    after: float
    steps: int


def block_loss(output: Tensor, target: Tensor, angular: bool) -> Tensor:
    """``MSE(y, t) - log |mean cos(y, t)|``, a scalar; [..., hidden] each."""
    loss = F.mse_loss(output, target)
    if angular:
        cosine = F.cosine_similarity(output, target, dim=-1).mean()
        loss = loss - torch.log(cosine.abs().clamp_min(_SMALLEST_COSINE))
    return loss


def optimize_scales(
    weights: Mapping[str, SignSalient],
    forward: Forward,
    targets: Targets,
    n_samples: int,
    config: BlockConfig,
    progress: Callable[[int, int, float], None] | None = None,
) -> Optimized:
    """Train the scales of the linears of one block.

    Args:
        weights: by name.
        forward: differentiable in the weights it is given, float32 ``[out, in]`` each.
        targets: without gradients.
        progress: after every epoch told the steps done, the most there will be, and the held-out loss.

    Raises:
        NumericalError: the loss became NaN or infinite.
    """
    scales = {name: _Scales(weight, config) for name, weight in weights.items()}
    optimizer = torch.optim.AdamW([group for item in scales.values() for group in item.groups()], weight_decay=0.0)
    n_held = max(1, n_samples // 8) if n_samples > 1 else 0
    training, held = list(range(n_samples - n_held)), list(range(n_samples - n_held, n_samples)) or [0]

    def loss_of(sample: int, current: Mapping[str, SignSalient]) -> Tensor:
        output = forward(sample, {name: weight.dequantize() for name, weight in current.items()})
        return torch.stack([block_loss(output, target, config.angular) for target in targets(sample)]).sum()

    def held_loss(current: Mapping[str, SignSalient]) -> float:
        with torch.no_grad():
            return sum(float(loss_of(sample, current)) for sample in held) / len(held)

    best, before = dict(weights), held_loss(weights)
    least, waited, step = before, 0, 0
    generator = torch.Generator().manual_seed(0)
    while step < config.steps and waited < config.patience:
        order = [training[index] for index in torch.randperm(len(training), generator=generator).tolist()]
        for sample in order[: config.steps - step]:
            optimizer.zero_grad()
            with torch.enable_grad():
                loss_of(sample, {name: item.weight() for name, item in scales.items()}).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
        stored = {name: item.stored() for name, item in scales.items()}
        now = held_loss(stored)
        if not torch.isfinite(torch.tensor(now)):
            raise NumericalError(
                "training of the block's scales diverged; use a lower --set block_lr, or block_steps=0"
            )
        if progress is not None:
            progress(step, config.steps, now)
        waited += 1
        if now < least:
            best, least, waited = stored, now, 0
    return Optimized(best, before, least, step)


class _Scales:
    """What is trained of one weight. Multipliers of a row act on its scale and its mean alike."""

    def __init__(self, weight: SignSalient, config: BlockConfig) -> None:
        assert weight.row_means is not None
        assert weight.column_scales is not None
        self._weight, self._config = weight, config
        self._means, self._given_columns = weight.row_means, weight.column_scales
        paper = config.parameters == "paper"
        self._rows = _leaf(weight.row_scales if paper else torch.ones_like(weight.row_scales))
        self._multipliers = _leaf(torch.ones_like(weight.row_scales))  # paper: r1; else of the means
        self._columns = _leaf(torch.ones_like(weight.column_scales))
        self._salient = _leaf(torch.ones_like(weight.row_scales)) if weight.salient and not paper else None

    def groups(self) -> list[dict[str, object]]:
        """For the optimizer."""
        multipliers = [item for item in (self._multipliers, self._columns, self._salient) if item is not None]
        lr_rows = self._config.lr_rows if self._config.parameters == "paper" else self._config.lr
        return [{"params": [self._rows], "lr": lr_rows}, {"params": multipliers, "lr": self._config.lr}]

    def weight(self) -> SignSalient:
        """With the present scales, differentiable in them."""
        given = self._weight
        paper = self._config.parameters == "paper"
        rows = self._rows * (self._multipliers if paper else given.row_scales)
        salient = given.salient
        if salient is not None and self._salient is not None:
            salient = replace(salient, scales=salient.scales * self._salient.unsqueeze(1))
        return replace(
            given,
            row_scales=rows,
            row_means=self._means * self._multipliers,
            column_scales=self._given_columns * self._columns,
            salient=salient,
        )

    @torch.no_grad()
    def stored(self) -> SignSalient:
        """The present scales rounded to float16."""
        now = self.weight()
        salient = now.salient
        if salient is not None:
            salient = replace(salient, scales=salient.scales.to(torch.float16).float().clamp_min(2.0**-24))
        assert now.row_means is not None
        assert now.column_scales is not None
        return replace(
            now,
            row_scales=now.row_scales.to(torch.float16).float(),
            row_means=now.row_means.to(torch.float16).float(),
            column_scales=now.column_scales.to(torch.float16).float(),
            salient=salient,
        )


def _leaf(values: Tensor) -> Tensor:
    return values.detach().clone().requires_grad_(True)
