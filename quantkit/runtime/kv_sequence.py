"""The cache of one layer for one sequence: a window in 16 bits, and segments of coded tokens (algorithms/kv/policy.py).

    floats      pinned | waiting for a whole group, by class | recent           float16, original basis
    segments    one per class, packed pages in the transformed basis            coded once

The order of tokens does not matter to attention; positions are in the keys. Sequences of a batch share nothing, so a
sequence gives the same bytes alone and in a batch, and padding is never stored.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from quantkit.algorithms.kv.policy import FLOAT_BITS, PINNED, KvPolicy, Transform, fit_transform
from quantkit.formats.kv_page import PageSpec
from quantkit.kernels.kv_attention import Part, merge
from quantkit.kernels.kv_decode import Decoder, PackedCache, Pages, supports
from quantkit.runtime.kv_salience import Salience
from quantkit.runtime.kv_segment import FloatSegment, PackedSegment, Tokens, join


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
        self.salience = Salience(policy, device)
        room = 2 * policy.pinned + policy.window + policy.unit + len(policy.bits) * (policy.key_group - 1)
        self.floats = FloatSegment.empty(heads, head_dim, room if policy.bits else 0, dtype, device)
        self.n_pinned = 0
        self.n_waiting = [0] * len(policy.bits)
        self.segments = [self._segment(bits, index) for index, bits in enumerate(policy.bits)]
        self._lengths = torch.zeros(1 + len(policy.bits), dtype=torch.int32, device=device)  # for kernels: of all parts
        self._decoder = Decoder()
        self._handed: PackedCache | None = None  # what `step` gives to kernels, as long as the tensors are the same

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
        held = [self.floats, self.salience, self._lengths, *self.segments]
        return sum(each.nbytes for each in held) + (0 if self.transform is None else self.transform.nbytes)

    @torch.inference_mode(False)
    @torch.no_grad()
    def clone(self) -> SequenceCache:
        """A copy that shares nothing that changes."""
        other = copy(self)
        other.floats = self.floats.clone()
        other.segments = [segment.clone() for segment in self.segments]
        other.n_waiting = list(self.n_waiting)
        other.salience, other._lengths, other._decoder = self.salience.clone(), self._lengths.clone(), Decoder()
        other._handed = None
        return other

    # ---- new tokens

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
        self._handed = None
        new = Tokens(keys, values, list(range(self.length, self.length + keys.shape[1])))
        self.length += len(new)
        self.salience.watch(keys, query, images)
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
            first = recent.part(0, self.policy.window + self.policy.unit)
            self.transform = fit_transform(self.policy, first.keys, first.values)
            self.salience.begin(first.keys)
        leaving = recent.part(0, n_out)
        classes = self.salience.classify(leaving.keys, leaving.positions, self.n_pinned)
        layout = [kept.part(0, self.n_pinned), leaving.of(classes, PINNED)]
        self.n_pinned = sum(map(len, layout))
        start = len(layout[0])
        for index, waiting in enumerate(self.n_waiting):
            before = kept.part(start, start + waiting)
            start += waiting
            now = leaving.of(classes, index)
            tokens = join((before, now)) if len(before) else now
            whole = len(tokens) - len(tokens) % self.policy.key_group
            self._store(index, tokens.part(0, whole))
            layout.append(tokens.part(whole))
            self.n_waiting[index] = len(tokens) - whole
        self.floats.replace([*layout, recent.part(n_out)])
        self.salience.left(n_out)
        self._count()

    def _count(self) -> None:
        for entry, segment in enumerate((self.floats, *self.segments)):
            self._lengths[entry].fill_(segment.count)  # a copy from the host would wait for the device

    def _store(self, index: int, tokens: Tokens) -> None:
        segment, transform = self.segments[index], self.transform
        if len(tokens) == 0:
            return
        assert transform is not None
        if isinstance(segment, PackedSegment):
            segment.append(tokens.keys, tokens.values, tokens.positions, transform)
        else:
            segment.append(transform.keys(tokens.keys), transform.values(tokens.values), tokens.positions)

    # ---- attention

    def attend(self, query: Tensor, scaling: float = 1.0) -> Part:
        """Attention of queries that see every token of the cache, on the original basis.

        query is of any float dtype [heads, m, head_dim], times `scaling`. The kernels' output is of the same dtype, the
        torch twin's float32.
        """
        if self._kernels_attend(query):
            return self._decoder.run(query.contiguous(), scaling, self.packed(), query.dtype)
        coded = [segment for segment in self.segments if segment.count]
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

    def step(
        self, keys: Tensor, values: Tensor, query: Tensor, scaling: float, images: list[bool] | None = None
    ) -> Tensor | None:
        """`append` of one token, and `attend` with its own query, in as few launches as can be.

        None where the kernels cannot do it; nothing has changed then.

        Args:
            keys, values: [1, heads, 1, head_dim], as transformers has them: what makes no view saves time.
            query: [1, query heads, 1, head_dim].
            scaling: of the scores.
            images: whether the token is of an image, as in `append`.

        Returns:
            [1, 1, query heads, head_dim].
        """
        if self.transform is None or keys.stride(1) != values.stride(1) or keys.stride(3) != 1 or values.stride(3) != 1:
            return None
        _, n_heads, _, head_dim = query.shape
        query = query.contiguous()
        if self._handed is None and not self._kernels_attend(query.view(keys.shape[1], -1, head_dim)):
            return None
        if self.n_recent + 1 >= self.policy.window + self.policy.unit or self.floats.count == self.floats.keys.shape[1]:
            self._make_room()
        if self._handed is None:
            self._handed = self.packed()
        part = self._decoder.run(
            query, scaling, self._handed, query.dtype, (keys, values), shape=(1, 1, n_heads, head_dim)
        )
        self.floats.positions.append(self.length)
        self.length += 1
        if self.policy.salience in ("text", "probes"):
            self.salience.watch(keys[0], images=images)
        if self.salience.is_probe(self.length):
            self.probe(query.view(keys.shape[1], -1, head_dim), scaling, part.lse)
        return part.output

    @torch.inference_mode(False)
    @torch.no_grad()
    def _make_room(self) -> None:
        """For one more token in 16 bits."""
        self._handed = None
        if self.n_recent + 1 >= self.policy.window + self.policy.unit:
            held = Tokens(*self.floats.dense(), self.floats.positions)
            first = self.floats.count - self.n_recent
            self._retire(held.part(0, first), held.part(first), self.policy.unit)
        self.floats.reserve(1)

    def _kernels_attend(self, query: Tensor) -> bool:
        coded = [segment for segment in self.segments if segment.count]
        packed = [segment.spec for segment in coded if isinstance(segment, PackedSegment)]
        return len(packed) == len(coded) and supports(query, packed, self.floats.keys.dtype)

    def packed(self) -> PackedCache:
        """What the kernels read: the tensors as they are now; appending may replace them, lengths stay in place."""
        transform = self.transform
        assert transform is not None
        pages = [
            Pages(segment.spec, dict(segment.tensors), 1 + index)  # a copy: growing replaces the segment's own entries
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

    def probe(self, query: Tensor, scaling: float, lse: Tensor) -> None:
        """Let the newest token's query be a probe, where it is one; lse [heads, m] is over all tokens."""
        if self.salience.is_probe(self.length):
            recent = self.floats.dense()[0][:, self.floats.count - self.n_recent :]
            self.salience.credit(query.float() * scaling, lse, recent)

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
        self.length, self._handed = length, None
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
        self.floats.replace(areas)
        self.salience.truncate(len(areas[-1]), length)
        self._count()
