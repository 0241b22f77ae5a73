"""The cache of one layer for one sequence: a window in 16 bits, and segments of coded tokens (algorithms/kv/policy.py).

    floats      pinned | waiting for a whole group, by class | recent           float16, original basis
    segments    one per class, packed pages in the transformed basis            coded once

The order of tokens does not matter to attention; positions are in the keys. Sequences of a batch share nothing, so a
sequence gives the same bytes alone and in a batch, and padding is never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.algorithms.kv.akvq_vl import pivot_scores
from quantkit.algorithms.kv.policy import FLOAT_BITS, PINNED, KvPolicy, Transform, fit_transform
from quantkit.algorithms.kv.zipcache import PROBE_EVERY, most_salient, probe_positions, probe_scores
from quantkit.formats.kv_page import PageSpec
from quantkit.kernels.kv_attention import Part, merge
from quantkit.kernels.kv_decode import PackedCache, Pages, decode, supports
from quantkit.runtime.kv_segment import FloatSegment, PackedSegment


@dataclass(frozen=True, slots=True)
class Tokens:
    """Keys and values [heads, n, head_dim] and the positions of their tokens."""

    keys: Tensor
    values: Tensor
    positions: list[int]

    def __len__(self) -> int:
        return len(self.positions)

    def part(self, start: int, stop: int | None = None) -> Tokens:
        """The tokens of a slice."""
        here = slice(start, stop)
        return Tokens(self.keys[:, here], self.values[:, here], self.positions[here])

    def pick(self, index: Tensor) -> Tokens:
        """The tokens at int64 indices."""
        return Tokens(self.keys[:, index], self.values[:, index], [self.positions[i] for i in index.tolist()])


def join(parts: Sequence[Tokens]) -> Tokens:
    """All tokens in order."""
    keys, values = (torch.cat(column, 1) for column in zip(*((part.keys, part.values) for part in parts), strict=True))
    return Tokens(keys, values, [position for part in parts for position in part.positions])


class SequenceCache:
    """See the module. Queries are float32 [heads, m, head_dim], scaled; new tokens [heads, n, head_dim].

    What is stored is made outside inference mode: a cache that was begun in one mode can go on in another.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, policy: KvPolicy, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.policy = policy
        self.length = 0  # tokens that were appended and not truncated
        self.transform: Transform | None = None
        room = 2 * policy.pinned + policy.window + policy.unit + len(policy.bits) * (policy.key_group - 1)
        self.floats = FloatSegment.empty(heads, head_dim, room if policy.bits else 0, dtype, device)
        self.n_pinned = 0
        self.n_waiting = [0] * len(policy.bits)
        self.segments = [self._segment(bits, index) for index, bits in enumerate(policy.bits)]
        self._first_queries: list[Tensor] = []
        self._mean_query: Tensor | None = None
        self._bars = (0.0, 0.0)  # scores of a pivot: the least among the first tokens, and what later ones must reach
        # For each recent token: the attention that probes paid to it and how many saw it; whether it is of an image.
        self._scores = torch.zeros(2, 0, device=device)
        self._images: list[bool] = []
        self._lengths = torch.zeros(1 + len(policy.bits), dtype=torch.int32, device=device)  # for kernels: of all parts

    def _segment(self, bits: int, index: int) -> PackedSegment | FloatSegment:
        heads, _, head_dim = self.floats.keys.shape
        device = self.floats.keys.device
        if bits == FLOAT_BITS:
            return FloatSegment.empty(heads, head_dim, 0, self.floats.keys.dtype, device)
        grids = (self.policy.keys, self.policy.values)
        keys, values = (grid.for_head(head_dim) for grid in grids)
        spec = PageSpec(heads=heads, head_dim=head_dim, bits=bits, keys=keys, values=values)
        return PackedSegment.empty(spec, self.policy.clip[index], device)

    @property
    def n_recent(self) -> int:
        return self.floats.count - self.n_pinned - sum(self.n_waiting)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache holds."""
        held = [
            self.floats.nbytes,
            self._scores.nbytes,
            self._lengths.nbytes,
            *(segment.nbytes for segment in self.segments),
        ]
        held += [query.nbytes for query in self._first_queries]
        held += [x.nbytes for x in (self._mean_query, self.transform) if x is not None]
        return sum(held)

    @torch.inference_mode(False)
    @torch.no_grad()
    def clone(self) -> SequenceCache:
        """A copy that shares nothing that changes."""
        other = copy(self)
        other.floats = self.floats.clone()
        other.segments = [segment.clone() for segment in self.segments]
        other.n_waiting = list(self.n_waiting)
        other._first_queries, other._images = list(self._first_queries), list(self._images)
        other._scores, other._lengths = self._scores.clone(), self._lengths.clone()
        return other

    # ---- new tokens

    def asks_queries(self, n: int) -> bool:
        """Whether `append` has a use for the queries of n new tokens."""
        salience = self.policy.salience
        return (salience == "pivots" and self.transform is None) or (salience == "probes" and n > 1)

    @torch.inference_mode(False)
    @torch.no_grad()
    def append(
        self, keys: Tensor, values: Tensor, query: Tensor | None = None, images: list[bool] | None = None
    ) -> None:
        """Add tokens; those that leave the window are coded.

        Args:
            keys, values: any float dtype [heads, n, head_dim].
            query: float32 [heads, group, n, head_dim], scaled: the new tokens' own queries, for the salience of
                tokens; None where nobody knows them, then the first tokens count as salient.
            images: whether each token is of an image; None: none is.
        """
        new = Tokens(keys, values, list(range(self.length, self.length + keys.shape[1])))
        self.length += len(new)
        self._watch(new, query, images)
        n_out = 0
        if self.policy.bits:
            unit = self.policy.unit
            n_out = max(0, (self.n_recent + len(new) - self.policy.window) // unit * unit)
        if n_out == 0:
            self.floats.append(new.keys, new.values, new.positions)
            self._lengths[:1].add_(len(new))
        else:
            dtype = self.floats.keys.dtype
            new = Tokens(keys.to(dtype), values.to(dtype), new.positions)  # rounded before anything is derived
            held = Tokens(*self.floats.dense(), self.floats.positions)
            first = self.floats.count - self.n_recent
            self._retire(held.part(0, first), join((held.part(first), new)), n_out)

    def _retire(self, kept: Tokens, recent: Tokens, n_out: int) -> None:
        """Let the oldest `n_out` of the recent tokens go where they belong, and lay out the rest anew."""
        if self.transform is None:
            self._begin(recent.part(0, self.policy.window + self.policy.unit))
        leaving = recent.part(0, n_out)
        classes = self._classify(leaving)
        chosen = [leaving.pick((classes == PINNED).nonzero().squeeze(1))] if self.policy.pinned else []
        layout = [kept.part(0, self.n_pinned), *chosen]
        self.n_pinned = sum(map(len, layout))
        start = len(layout[0])
        for index, waiting in enumerate(self.n_waiting):
            before = kept.part(start, start + waiting)
            start += waiting
            one_class = len(self.n_waiting) == 1 and not self.policy.pinned
            now = leaving if one_class else leaving.pick((classes == index).nonzero().squeeze(1))
            tokens = join((before, now)) if len(before) else now
            whole = len(tokens) - len(tokens) % self.policy.key_group
            self._store(index, tokens.part(0, whole))
            layout.append(tokens.part(whole))
            self.n_waiting[index] = len(tokens) - whole
        laid = join((*layout, recent.part(n_out)))
        self.floats.positions = []
        self.floats.append(laid.keys, laid.values, laid.positions)
        self._scores, self._images = self._scores[:, n_out:].clone(), self._images[n_out:]
        self._count()

    def _count(self) -> None:
        counts = [self.floats.count, *(segment.count for segment in self.segments)]
        self._lengths.copy_(torch.tensor(counts, dtype=torch.int32))

    def _store(self, index: int, tokens: Tokens) -> None:
        segment, transform = self.segments[index], self.transform
        if len(tokens) == 0:
            return
        assert transform is not None
        if isinstance(segment, PackedSegment):
            segment.append(tokens.keys, tokens.values, tokens.positions, transform)
        else:
            segment.append(transform.keys(tokens.keys), transform.values(tokens.values), tokens.positions)

    def _begin(self, first: Tokens) -> None:
        """Fix what is derived from the first tokens."""
        self.transform = fit_transform(self.policy, first.keys, first.values)
        if self._first_queries:
            mean = torch.cat(self._first_queries, 2)[:, :, : len(first)].mean(2).half()
            self._mean_query, self._first_queries = mean, []
            best = pivot_scores(first.keys, mean).topk(min(self.policy.pinned, len(first))).values
            self._bars = (float(best[-1]), float(best.mean()))

    # ---- which token goes where

    def _watch(self, new: Tokens, query: Tensor | None, images: list[bool] | None) -> None:
        """Remember what classification will ask about the new tokens."""
        salience = self.policy.salience
        if salience == "text":
            self._images += images or [False] * len(new)
        asked = query if self.asks_queries(len(new)) else None
        if salience == "pivots" and asked is not None:
            seen = sum(part.shape[2] for part in self._first_queries)
            self._first_queries.append(asked[:, :, : self.policy.window + self.policy.unit - seen].clone())
        if salience == "probes":
            scores = torch.zeros(2, len(new), device=self._scores.device)
            if asked is not None:
                probes = probe_positions(len(new))
                scores = torch.stack(probe_scores(asked[:, :, probes.to(asked.device)], new.keys, probes))
            self._scores = torch.cat((self._scores, scores), 1)

    def _classify(self, leaving: Tokens) -> Tensor:
        """int64 [n]: `PINNED` or the index of a class, for tokens that leave the window."""
        device = self.floats.keys.device
        n, salience = len(leaving), self.policy.salience
        classes = torch.zeros(n, dtype=torch.int64, device=device)
        if salience == "text":
            classes = torch.tensor(self._images[:n], dtype=torch.int64, device=device)
        elif salience == "probes":
            total, seen = self._scores[:, :n]
            count = round(self.policy.share * n)
            classes = 1 - most_salient(total / seen.clamp_min(1), count).long()
        elif salience == "pivots":
            classes[self._pivots(leaving)] = PINNED
        return classes

    def _pivots(self, leaving: Tokens) -> Tensor:
        """int64 indices of the tokens that become pivots; the first token of a sequence always does."""
        pinned = self.policy.pinned
        if self._mean_query is None:
            chosen = [i for i, position in enumerate(leaving.positions) if position < pinned]
        else:
            scores = pivot_scores(leaving.keys, self._mean_query).tolist()
            n_first = self.policy.window + self.policy.unit
            bars = [self._bars[position >= n_first] for position in leaving.positions]
            chosen = [i for i, position in enumerate(leaving.positions) if position == 0 or scores[i] >= bars[i]]
        room = max(0, 2 * pinned - self.n_pinned)
        return torch.tensor(chosen[:room], dtype=torch.int64, device=leaving.keys.device)

    # ---- attention

    def attend(self, query: Tensor, scaling: float = 1.0) -> Part:
        """Attention of queries that see every token of the cache, on the original basis.

        query is of any float dtype [heads, m, head_dim], times `scaling`. The kernels' output is of the same dtype, the
        torch twin's float32.
        """
        coded = [segment for segment in self.segments if segment.count]
        packed = [segment for segment in coded if isinstance(segment, PackedSegment)]
        specs = [segment.spec for segment in packed]
        if len(packed) == len(coded) and supports(query, specs, self.floats.keys.dtype):
            return decode(query.contiguous(), scaling, self.packed(), dtype=query.dtype)
        query = query.float() * scaling
        parts = [self.floats.attend(query)] if self.floats.count else []
        if coded:
            assert self.transform is not None
            inner, shift = self.transform.query(query)
            part = merge([segment.attend(inner) for segment in coded])
            parts.append(
                Part(self.transform.original_values(part.output), part.lse if shift is None else part.lse + shift)
            )
        return merge(parts)

    def packed(self) -> PackedCache:
        """What the kernels read: the tensors as they are now; appending may replace them, lengths stay in place."""
        transform = self.transform
        assert transform is not None
        pages = [
            Pages(segment.spec, segment.tensors, 1 + index)
            for index, segment in enumerate(self.segments)
            if isinstance(segment, PackedSegment) and segment.count
        ]
        return PackedCache(
            pages=pages,
            floats=(self.floats.keys, self.floats.values),
            lengths=self._lengths,
            rotate_keys=transform.rotate_keys,
            rotate_values=transform.rotate_values,
            key_mean=transform.key_mean,
            value_scale=transform.value_scale,
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def probe(self, query: Tensor, scaling: float, lse: Tensor) -> None:
        """Credit recent tokens with the attention of the newest token's query; lse [heads, m] is over all tokens."""
        if self.policy.salience == "probes" and self.length % PROBE_EVERY == 0:
            recent = self.floats.dense()[0][:, self.floats.count - self.n_recent :]
            scores = (query.float() * scaling) @ recent.float().transpose(-1, -2)
            self._scores[0] += (scores - lse[..., None]).exp().sum((0, 1))
            self._scores[1] += scores.shape[0] * scores.shape[1]

    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys and values, float32 [heads, length, head_dim], in the order of their positions."""
        floats = self.floats.dense()
        keys, values, positions = [floats[0].float()], [floats[1].float()], list(self.floats.positions)
        for segment in self.segments:
            if segment.count:
                assert self.transform is not None
                inner_keys, inner_values = segment.dense()
                keys.append(self.transform.original_keys(inner_keys.float()))
                values.append(self.transform.original_values(inner_values.float()))
                positions += segment.positions
        order = torch.tensor(positions, dtype=torch.int64, device=keys[0].device).argsort()
        return torch.cat(keys, 1)[:, order], torch.cat(values, 1)[:, order]

    # ---- going back

    @torch.inference_mode(False)
    @torch.no_grad()
    def truncate(self, length: int) -> None:
        """Forget the tokens from position `length` on. Coded tokens that remain stay as they are."""
        if length >= self.length:
            return
        self.length = length
        held = Tokens(*self.floats.dense(), self.floats.positions)
        bounds = [0, self.n_pinned]
        for waiting in self.n_waiting:
            bounds.append(bounds[-1] + waiting)
        areas = [held.part(*pair) for pair in zip(bounds, [*bounds[1:], held.keys.shape[1]], strict=True)]
        areas = [area.part(0, sum(position < length for position in area.positions)) for area in areas]
        for index, segment in enumerate(self.segments):
            keys, values, positions = segment.truncate(length)
            if positions:  # the rest of a group that was cut: it waits for a whole group again
                assert self.transform is not None
                dtype = held.keys.dtype
                back = (self.transform.original_keys(keys).to(dtype), self.transform.original_values(values).to(dtype))
                areas[1 + index] = join((Tokens(*back, positions), areas[1 + index]))
        self.n_pinned = len(areas[0])
        self.n_waiting = [len(area) for area in areas[1:-1]]
        laid = join(areas)
        self.floats.positions = []
        self.floats.append(laid.keys.clone(), laid.values.clone(), laid.positions)
        self._scores, self._images = self._scores[:, : len(areas[-1])], self._images[: len(areas[-1])]
        if self._first_queries:
            self._first_queries = [torch.cat(self._first_queries, 2)[:, :, :length]]
        self._count()
