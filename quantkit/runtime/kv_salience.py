"""Which tokens of a sequence matter: what a policy's salience asks about them, while they are in the window.

pivots      keys that the mean query of the first tokens looks at          (algorithms/kv/akvq_vl.py)
probes      tokens with the most attention from probe queries              (algorithms/kv/zipcache.py)
text        tokens that are not of an image
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from quantkit.algorithms.kv.akvq_vl import pivot_scores
from quantkit.algorithms.kv.policy import PINNED, KvPolicy
from quantkit.algorithms.kv.zipcache import PROBE_EVERY, most_salient, probe_positions, probe_scores


class Salience:
    """What one layer remembers of one sequence. Queries are float32, scaled."""

    def __init__(self, policy: KvPolicy, device: torch.device) -> None:
        self.policy = policy
        self._begun = False
        self._first_queries: list[Tensor] = []
        self._mean_query: Tensor | None = None
        self._bars = (0.0, 0.0)  # scores of a pivot: the least among the first tokens, and what later ones must reach
        # For each recent token: the attention that probes paid to it and how many saw it; whether it is of an image.
        self._scores = torch.zeros(2, 0, device=device)
        self._images: list[bool] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        mean = 0 if self._mean_query is None else self._mean_query.nbytes
        return self._scores.nbytes + mean + sum(query.nbytes for query in self._first_queries)

    def clone(self) -> Salience:
        """A copy that shares nothing that changes."""
        other = copy(self)
        other._first_queries, other._images = list(self._first_queries), list(self._images)
        other._scores = self._scores.clone()
        return other

    def asks_queries(self, n: int) -> bool:
        """Whether `watch` has a use for the queries of n new tokens."""
        salience = self.policy.salience
        return (salience == "pivots" and not self._begun) or (salience == "probes" and n > 1)

    @torch.inference_mode(False)
    @torch.no_grad()
    def watch(self, keys: Tensor, query: Tensor | None = None, images: list[bool] | None = None) -> None:
        """New tokens: keys [heads, n, head_dim], query [heads, group, n, head_dim] where it is asked for."""
        salience, n = self.policy.salience, keys.shape[1]
        if salience == "text":
            self._images += images or [False] * n
        asked = query if self.asks_queries(n) else None
        if salience == "pivots" and asked is not None:
            seen = sum(part.shape[2] for part in self._first_queries)
            self._first_queries.append(asked[:, :, : self.policy.window + self.policy.unit - seen].clone())
        if salience == "probes":
            scores = torch.zeros(2, n, device=self._scores.device)
            if asked is not None:
                probes = probe_positions(n)
                scores = torch.stack(probe_scores(asked[:, :, probes.to(asked.device)], keys, probes))
            self._scores = torch.cat((self._scores, scores), 1)

    def begin(self, first: Tensor) -> None:
        """Fix what is derived from the keys [heads, n, head_dim] of the first tokens."""
        self._begun = True
        if self._first_queries:
            mean = torch.cat(self._first_queries, 2)[:, :, : first.shape[1]].mean(2).half()
            self._mean_query, self._first_queries = mean, []
            best = pivot_scores(first, mean).topk(min(self.policy.pinned, first.shape[1])).values
            self._bars = (float(best[-1]), float(best.mean()))

    def classify(self, keys: Tensor, positions: list[int], n_pinned: int) -> list[int]:
        """`PINNED` or the index of a class, for the oldest tokens, which leave the window; `n_pinned` are pinned."""
        n, salience = len(positions), self.policy.salience
        if salience == "text":
            return [int(image) for image in self._images[:n]]
        if salience == "probes":
            total, seen = self._scores[:, :n]
            salient = most_salient(total / seen.clamp_min(1), round(self.policy.share * n))
            return [1 - int(each) for each in salient.tolist()]
        classes = [0] * n
        room = 2 * self.policy.pinned - n_pinned
        if salience == "pivots" and room > 0:  # else nobody has to wait for the scores
            for index in self._pivots(keys, positions)[:room]:
                classes[index] = PINNED
        return classes

    def _pivots(self, keys: Tensor, positions: list[int]) -> list[int]:
        """Indices of tokens that are pivots, if there is room; the first token of a sequence always is."""
        if self._mean_query is None:
            return [i for i, position in enumerate(positions) if position < self.policy.pinned]
        scores = pivot_scores(keys, self._mean_query).tolist()
        n_first = self.policy.window + self.policy.unit
        bars = [self._bars[position >= n_first] for position in positions]
        return [i for i, position in enumerate(positions) if position == 0 or scores[i] >= bars[i]]

    def left(self, n: int) -> None:
        """The n oldest tokens left the window."""
        if self.policy.salience == "probes":
            self._scores = self._scores[:, n:].clone()
        self._images = self._images[n:]

    def truncate(self, n_recent: int, length: int) -> None:
        """Only the `n_recent` oldest recent tokens remain, and `length` tokens in all."""
        if self.policy.salience == "probes":
            self._scores = self._scores[:, :n_recent]
        self._images = self._images[:n_recent]
        if self._first_queries:
            self._first_queries = [torch.cat(self._first_queries, 2)[:, :, :length]]

    def is_probe(self, length: int) -> bool:
        """Whether the query of the newest of `length` tokens is a probe."""
        return self.policy.salience == "probes" and length % PROBE_EVERY == 0

    @torch.inference_mode(False)
    @torch.no_grad()
    def credit(self, query: Tensor, lse: Tensor, keys: Tensor) -> None:
        """Credit recent tokens, keys [heads, n, head_dim], with the attention of a query [heads, group, head_dim] that
        saw them; lse [heads, group] is over all tokens."""
        scores = query @ keys.float().transpose(-1, -2)
        self._scores[0] += (scores - lse[..., None]).exp().sum((0, 1))
        self._scores[1] += scores.shape[0] * scores.shape[1]
