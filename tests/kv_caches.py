"""Caches of one sequence with tokens in them, and attention on what they decode to, for the tests of the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.algorithms.kv.registry import parse_kv_spec
from quantkit.kernels.kv_decode import PackedCache
from quantkit.runtime.kv_sequence import SequenceCache


@dataclass
class Case:
    """Arguments of `decode_launches`, and the cache they come from."""

    query: Tensor
    scaling: float
    cache: PackedCache
    sequence: SequenceCache


def filled(
    spec: str, n: int, heads: int = 2, group: int = 4, head_dim: int = 64, device: str = "cpu", seed: int = 0
) -> Case:
    """A cache that was fed n random tokens with outlier channels, and a query that looks at some of them."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, heads, n, head_dim, generator=generator)
    keys[..., :3] *= 8
    keys[..., 5] += 10
    query = torch.randn(heads, group, head_dim, generator=generator)
    keys[:, n // 3] += 2 * query[:, 0]
    everyone = torch.randn(heads, group, n, head_dim, generator=generator) / 8
    sequence = SequenceCache(parse_kv_spec(spec).layer_policy(0), heads, head_dim, torch.float16, torch.device(device))
    sequence.append(keys.to(device), values.to(device), everyone.to(device))
    return Case(query=query.to(device), scaling=head_dim**-0.5, cache=sequence.packed(), sequence=sequence)


def reference(case: Case) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64, over the decoded tokens."""
    keys, values = (x.double() for x in case.sequence.dense())
    scores = case.query.double() * case.scaling @ keys.mT
    return scores.softmax(-1) @ values, scores.logsumexp(-1)
