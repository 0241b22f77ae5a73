"""ZipCache: salient tokens at more bits, values on channel-separable token grids.

Paper      He et al. 2024, arXiv:2405.14256 (NeurIPS). Saliency of a token: the mean attention that it gets from the
           queries that see it (normalized score; the sum would favour early tokens), over probe queries only: the
           last 5 % and a random 5 % of the prompt. The most salient tokens get `high` bits, the others `low`.
Values     divided by c = sqrt(max_t |v|) of their channel, then one scale for a token over all heads and channels.
Keys       rotated, a symmetric grid per token and head; with ``key_axis=channel`` as in the paper: one range per
           channel, over `group` tokens of a class (which wait for each other in 16 bits: more bytes, more loss).
Decode     new tokens gather attention from every tenth query while they are in the window, and are sorted into the
           classes when they leave it.
Deviates   the authors recode all tokens with new ranges every 100 tokens, and divide the score by the number of all
           queries although only a tenth was summed; here a token is coded once, and divided by the probes that saw it.
           Ranges of keys are those of a group of tokens, not of the prompt: frozen groups have half the error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantkit.algorithms.kv.policy import KvPolicy
from quantkit.formats.kv_page import GridSpec

MAX_PROBES = 512
PROBE_EVERY = 10  # decode: 1 query of 10 is a probe


@dataclass(frozen=True, slots=True, kw_only=True)
class ZipCacheSettings:
    """The paper's settings."""

    high: int = 4  # bits of salient tokens
    low: int = 2
    share: float = 0.1  # of the tokens that are salient
    key_axis: Literal["token", "channel"] = "token"
    group: int = 32  # tokens of a class that share a key range, with key_axis=channel
    window: int = 32


def zipcache(settings: ZipCacheSettings, name: str = "zipcache") -> KvPolicy:
    """The policy of these settings."""
    by_channel = settings.key_axis == "channel"
    return KvPolicy(
        name=name,
        bits=(settings.high, settings.low),
        keys=GridSpec(axis="channel", group=settings.group, offsets=True) if by_channel else GridSpec(group=0),
        values=GridSpec(group=0, shared=True),
        rotate_keys=not by_channel,
        channel_scales=True,
        window=settings.window,
        salience="probes",
        share=settings.share,
    )


def probe_positions(n: int, seed: int = 0) -> Tensor:
    """The probe queries of a prompt of n tokens: the last 5 %, and as many at random among the others; ascending."""
    recent = min(n, MAX_PROBES // 2, max(8, math.ceil(0.05 * n)))
    generator = torch.Generator().manual_seed(seed)
    others = torch.randperm(n - recent, generator=generator)[:recent]
    return torch.cat((others, torch.arange(n - recent, n))).sort().values


def probe_scores(query: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Attention that each token gets from the probe queries.

    Args:
        query: float [heads, group, n_probes, head_dim] of the probes, scaled.
        keys: [heads, n, head_dim].
        positions: int64 [n_probes], the probes' own positions among the n tokens.

    Returns:
        float32 [n]: the sum over probes, heads and query heads of the causal attention probability, and the number of
        terms in it. Their ratio is the normalized score.
    """
    heads, group, n_probes, head_dim = query.shape
    n = keys.shape[1]
    seen = torch.arange(n, device=keys.device) <= positions.to(keys.device)[:, None]  # [n_probes, n]
    total = torch.zeros(n, device=keys.device)
    for first in range(0, n_probes, 64):  # scratch of 64 rows, whatever the prompt
        rows = slice(first, first + 64)
        here = query[:, :, rows].float().reshape(heads, -1, head_dim)
        scores = (here @ keys.float().transpose(-1, -2)).reshape(heads, group, -1, n)
        total += scores.masked_fill(~seen[rows], float("-inf")).softmax(-1).sum((0, 1, 2))
    return total, seen.sum(0).float() * (heads * group)


def most_salient(scores: Tensor, count: int) -> Tensor:
    """bool [n]: the `count` tokens with the highest scores, the earlier one where they are equal."""
    order = torch.sort(scores, descending=True, stable=True).indices
    chosen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    chosen[order[:count]] = True
    return chosen
