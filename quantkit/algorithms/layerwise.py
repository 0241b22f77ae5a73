"""Layer-wise quantization beyond integer bits: rank the blocks, give the important ones the higher of two widths.

Paper      Dumitru et al. 2024, arXiv:2406.17415. Scores: LIM (section 3.1), ZD (section 3.2).
Scores     LIM = -mean over tokens of cos(input of the block, output of the block): how much the block changes.
           ZD  = share of the block's weights that lie more than one standard deviation above their mean: *small* means
           heavy tails, so the fewer, the more important. 0.1587 for a normal distribution.
Allocates  hi bits from the most important block on, as far as the budget in bytes reaches, lo bits to the others.
Needs      LIM: one forward pass of the unquantized model. ZD: the weights alone.
Deviates   The cosine is per token, in float32, and the first token of a sequence is left out: an attention sink's huge
           norm holds its cosine near 1 whatever the block does. Where blocks differ in size, a block that no longer
           fits is passed over and the next ones are tried; the paper's blocks are equal, and there it is the same.
           `marginal_widths` (ours) is for more than two widths: the best gain per byte next.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.errors import RequestError


def lim(inputs: Tensor, outputs: Tensor, n_skipped: int = 1) -> Tensor:
    """Minus the cosine of what enters and what leaves a block, averaged over tokens.

    Args:
        inputs: float ``[..., n_tokens, hidden]``, the residual stream before the block.
        outputs: the same shape, after it.
        n_skipped: tokens at the start of each sequence that do not count; ignored where no token would be left.

    Returns:
        float32 scalar in [-1, 1]; higher is more important.

    >>> round(lim(torch.ones(3, 2), -torch.ones(3, 2)).item(), 6)
    1.0
    """
    skip = n_skipped if inputs.shape[-2] > n_skipped else 0
    before, after = inputs[..., skip:, :].float(), outputs[..., skip:, :].float()
    return -torch.cosine_similarity(before, after, dim=-1).mean()


def zd(weights: Sequence[Tensor], two_sided: bool = False) -> float:
    """Share of the weights above mean + standard deviation, both taken over all of them together.

    Args:
        weights: float tensors of any shapes: the linears of a block.
        two_sided: count those below mean - standard deviation too.

    Raises:
        RequestError: no weights.

    >>> zd([torch.tensor([0.0, 0.0, 0.0, 4.0])])
    0.25
    """
    n_weights = sum(weight.numel() for weight in weights)
    if not n_weights:
        raise RequestError("zd: a block without weights has no score")
    mean = sum(float(weight.sum(dtype=torch.float64)) for weight in weights) / n_weights
    squares = sum(float((weight.double() - mean).square().sum()) for weight in weights)
    sigma = (squares / n_weights) ** 0.5
    above = sum(int((weight.double() > mean + sigma).sum()) for weight in weights)
    below = sum(int((weight.double() < mean - sigma).sum()) for weight in weights) if two_sided else 0
    return (above + below) / n_weights


def by_importance(scores: Sequence[float]) -> list[int]:
    """Indices from the highest score to the lowest; the lower index goes first among equals.

    >>> by_importance([0.5, 2.0, 0.5])
    [1, 0, 2]
    """
    return sorted(range(len(scores)), key=lambda index: -scores[index])


def two_widths(
    order: Sequence[int],
    bytes_lo: Sequence[int],
    bytes_hi: Sequence[int],
    budget: int,
    tolerance: int | None = None,
) -> tuple[bool, ...]:
    """Which units get the higher width.

    Args:
        order: units, most important first.
        bytes_lo, bytes_hi: true bytes of each unit at either width, ``bytes_hi[i] >= bytes_lo[i]``.
        budget: bytes of all units together; never exceeded.
        tolerance: when more bytes than this stay unused, swap the least important chosen units for larger ones that
            were left out, as long as that helps. None: never.

    Raises:
        RequestError: the lower width alone exceeds the budget.

    >>> two_widths([2, 0, 1], [10, 10, 10], [20, 20, 20], budget=45)
    (False, False, True)
    """
    steps = [hi - lo for lo, hi in zip(bytes_lo, bytes_hi, strict=True)]
    room = _room(budget, sum(bytes_lo))
    chosen: set[int] = set()
    for unit in order:
        if steps[unit] <= room:
            chosen.add(unit)
            room -= steps[unit]
    while tolerance is not None and room > tolerance:
        swap = _best_swap(order, chosen, steps, room)
        if swap is None:
            break
        out, into = swap
        room -= steps[into] - steps[out]
        chosen = chosen - {out} | {into}
    return tuple(unit in chosen for unit in range(len(steps)))


def _best_swap(order: Sequence[int], chosen: set[int], steps: list[int], room: int) -> tuple[int, int] | None:
    """The pair (out, in) that uses most of the room; among equals the least important out, the most important in."""
    best, found = 0, None
    for out in (unit for unit in reversed(order) if unit in chosen):
        for into in (unit for unit in order if unit not in chosen):
            used = steps[into] - steps[out]
            if best < used <= room:
                best, found = used, (out, into)
    return found


def worthwhile(losses: Sequence[float], n_bytes: Sequence[int]) -> list[int]:
    """The choices on the lower convex hull of loss over bytes, cheapest first: no other is ever best per byte.

    >>> worthwhile([9.0, 8.0, 1.0, 2.0], [10, 11, 12, 20])
    [0, 2]
    """
    hull: list[int] = []
    for index in sorted(range(len(losses)), key=lambda index: (n_bytes[index], losses[index])):
        if hull and losses[index] >= losses[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(losses, n_bytes, hull[-2], hull[-1]) >= _slope(losses, n_bytes, hull[-1], index):
            hull.pop()
        hull.append(index)
    return hull


def _slope(losses: Sequence[float], n_bytes: Sequence[int], first: int, second: int) -> float:
    return (losses[second] - losses[first]) / (n_bytes[second] - n_bytes[first])


def marginal_widths(
    losses: Sequence[Sequence[float]],
    n_bytes: Sequence[Sequence[int]],
    budget: int,
    tolerance: int | None = None,
) -> tuple[int, ...]:
    """For each unit the index of its width, by the greatest fall of the loss per byte, again and again.

    Args:
        losses: ``[units][widths]``, of each unit at each width, widths ascending.
        n_bytes: ``[units][widths]``, true bytes.
        budget: bytes of all units together; never exceeded.
        tolerance: when more bytes than this stay unused, one unit gives up a step for a larger step of another, as long
            as that helps. None: never.

    Raises:
        RequestError: the lowest widths alone exceed the budget.

    >>> marginal_widths([[9.0, 1.0, 0.5], [4.0, 2.0, 1.0]], [[1, 2, 3], [1, 2, 3]], budget=4)
    (1, 1)
    """
    widths = [0] * len(losses)
    room = _room(budget, sum(unit[0] for unit in n_bytes))

    def next_step(unit: int) -> tuple[float, int, int] | None:
        index = widths[unit]
        if index + 1 == len(losses[unit]):
            return None
        step = n_bytes[unit][index + 1] - n_bytes[unit][index]
        return (losses[unit][index + 1] - losses[unit][index]) / max(step, 1), unit, step  # the lower index first

    heap = [step for step in map(next_step, range(len(losses))) if step]
    heapq.heapify(heap)
    while heap:
        _, unit, n_more = heapq.heappop(heap)
        if n_more > room:
            continue  # it will not fit later either
        widths[unit] += 1
        room -= n_more
        following = next_step(unit)
        if following:
            heapq.heappush(heap, following)
    while tolerance is not None and room > tolerance:
        exchange = _best_exchange(losses, n_bytes, widths, room)
        if exchange is None:
            break
        used, _, down, up = exchange
        widths[down] -= 1
        widths[up] += 1
        room -= used
    return tuple(widths)


def _best_exchange(
    losses: Sequence[Sequence[float]], n_bytes: Sequence[Sequence[int]], widths: list[int], room: int
) -> tuple[int, float, int, int] | None:
    """(bytes used, gain, down, up) of the exchange that uses most of the room, among equals the one that gains most."""
    best = None
    for down in (unit for unit, index in enumerate(widths) if index):
        freed = n_bytes[down][widths[down]] - n_bytes[down][widths[down] - 1]
        lost = losses[down][widths[down] - 1] - losses[down][widths[down]]
        for up in (unit for unit, index in enumerate(widths) if index + 1 < len(losses[unit]) and unit != down):
            used = n_bytes[up][widths[up] + 1] - n_bytes[up][widths[up]] - freed
            gain = losses[up][widths[up]] - losses[up][widths[up] + 1] - lost
            if 0 < used <= room and (best is None or (used, gain) > best[:2]):
                best = used, gain, down, up
    return best


def _room(budget: int, least: int) -> int:
    if least > budget:
        raise RequestError(f"the budget of {budget} bytes is below the {least} bytes of the lowest width")
    return budget - least
