"""Attention of a few queries over packed pages of keys and values (formats/kv_page.py), without a dense history.

A softmax over many tokens splits into parts that are merged by their log-sum-exp:

    o_i = sum_t exp(s_t - lse_i) v_t over the tokens of part i,     lse_i = log sum_t exp(s_t)
    o   = sum_i exp(lse_i - lse) o_i,                               lse   = log sum_i exp(lse_i)

and does not care about the order of the tokens. So the pages of every precision, and the tokens that are still in 16
bits, are parts of their own; a part's output may be transformed before the merge (rotated back, for one).

The torch twin in this file decodes `CHUNK_PAGES` pages at a time: its scratch does not grow with the history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.formats.kv_page import PAGE, PageSpec, dequantize

CHUNK_PAGES = 8  # 1024 tokens: large enough that decoding and products dominate, small enough for the cache


@dataclass(frozen=True, slots=True)
class Part:
    """The softmax over some tokens: normalized output [heads, m, head_dim] and log-sum-exp [heads, m], float32."""

    output: Tensor
    lse: Tensor


def attend_pages(query: Tensor, spec: PageSpec, tensors: dict[str, Tensor], count: int) -> Part:
    """Attend to the first `count` tokens (at least one) of some pages.

    Args:
        query: float32 [heads, m, head_dim], scaled, in the basis of the stored keys; the m rows are the queries that
            share a KV head.
        spec: of the pages.
        tensors: of ``spec.layout(n_pages)``, n_pages * 128 >= count.
        count: valid tokens.
    """
    parts = []
    for first in range(0, -(-count // PAGE), CHUNK_PAGES):
        here = slice(first, first + CHUNK_PAGES)
        n = min(count - first * PAGE, CHUNK_PAGES * PAGE)
        keys, values = (dequantize(tensors, spec, which, here)[:, :n] for which in ("key", "value"))
        parts.append(attend(query, keys, values))
    return merge(parts)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Part:
    """Attend to keys and values [heads, n, head_dim] of any float dtype; mask bool [m, n], True where a query sees.

    A query that sees nothing gets zeros, and an lse of minus infinity.
    """
    scores = query @ keys.float().transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    return Part(weights @ values.float(), lse)


def merge(parts: Sequence[Part]) -> Part:
    """One softmax over the tokens of all parts."""
    if len(parts) == 1:
        return parts[0]
    every = torch.stack([part.lse for part in parts])
    lse = every.logsumexp(0)
    weights = (every - lse).exp()
    output = sum(weight[..., None] * part.output for weight, part in zip(weights, parts, strict=True))
    assert isinstance(output, Tensor)
    return Part(output, lse)
