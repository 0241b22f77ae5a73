"""The cache of one layer of a batch, and the attention function that receives it as a handle.

transformers calls ``update(keys, values)`` and passes what it returns to the model's attention function: here a handle,
in place of both. The function attends, then stores the new tokens: first the stock attention in full precision where
nothing is cached yet, else on packed pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from quantkit.algorithms.kv.policy import KvPolicy
from quantkit.algorithms.kv.registry import check_head
from quantkit.errors import RequestError
from quantkit.kernels.kv_attention import Part, attend, merge
from quantkit.runtime.kv_sequence import SequenceCache

_QUERY_TILE = 512  # queries of a chunk that attend to the history together: bounds the scratch
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # arguments of attention that change scores


@dataclass(frozen=True, slots=True)
class KvHandle:
    """Stands for the keys and values of a layer between the cache and the attention function."""

    layer: QuantizedKvLayer
    keys: Tensor  # the new ones
    values: Tensor


class Images:
    """Which new tokens of the current call are of an image."""

    def __init__(self) -> None:
        self._mask: Tensor | None = None
        self._rows: list[list[bool]] | None = None

    def look(self, mask: Tensor | None) -> None:
        """Another call; bool [batch, n], or None where nobody knows."""
        self._mask, self._rows = mask, None

    def rows(self, batch: int, n: int) -> list[list[bool]] | None:
        """By row and token; None where they are not known. Brought to the host once for all layers."""
        if self._mask is None or self._mask.shape != (batch, n):
            return None
        if self._rows is None:
            self._rows = self._mask.tolist()
        return self._rows


class QuantizedKvLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """The cache of one layer: a `SequenceCache` for each sequence of the batch."""

    is_croppable = True
    is_sliding = False

    def __init__(self, policy: KvPolicy, packed: bool, images: Images, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.policy = policy
        self.packed = packed
        self.storage_dtype = dtype
        self.columns = 0  # tokens of the batch, padding included
        self.sequences: list[SequenceCache] = []
        self._images = images

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        if value_states.shape[-1] != head_dim:
            raise RequestError("this model's keys and values differ in size; its cache cannot be quantized")
        check_head(self.policy, head_dim)
        self.sequences = [
            SequenceCache(self.policy, heads, head_dim, self.storage_dtype, key_states.device) for _ in range(batch)
        ]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n = key_states.shape[2]
        self.columns += n
        if self.packed:
            handle = KvHandle(self, key_states, value_states)
            return handle, handle
        dense = [sequence.dense() for sequence in self.sequences]
        for sequence, keys, values, images in zip(
            self.sequences, key_states, value_states, self._image_rows(len(key_states), n), strict=True
        ):
            sequence.append(keys, values, images=images)
        keys, values = (torch.stack(column).to(key_states.dtype) for column in zip(*dense, strict=True))
        return torch.cat((keys, key_states), 2), torch.cat((values, value_states), 2)

    def _image_rows(self, batch: int, n: int) -> Sequence[list[bool] | None]:
        return (self._images.rows(batch, n) if self.policy.salience == "text" else None) or [None] * batch

    def attend(self, module: nn.Module, query: Tensor, handle: KvHandle, mask: Tensor | None, scaling: float) -> Tensor:
        """Output [batch, n, query heads, head_dim] of new tokens' queries [batch, query heads, n, head_dim]."""
        batch, n_heads, n, head_dim = query.shape
        heads, before = handle.keys.shape[1], self.columns - n
        images = self._image_rows(batch, n)
        if batch == n == 1 and mask is None and before:  # the usual step of generation, without a view
            found = self.sequences[0].step(handle.keys, handle.values, query, scaling, images[0])
            if found is not None:
                return found
        seen = _seen(mask, self.columns)
        if before == 0:  # nothing is quantized yet: the stock attention, on what is new
            output: Tensor = sdpa_attention_forward(module, query, handle.keys, handle.values, mask, scaling=scaling)[0]
        else:
            output = query.new_empty(batch, n, n_heads, head_dim)
        for row, sequence in enumerate(self.sequences):
            own = query[row].reshape(heads, -1, n, head_dim)  # [heads, group, n, head_dim]
            new = Chunk(handle.keys[row], handle.values[row], own, scaling, images[row])
            visible = None
            if seen is not None and not bool(seen[row].all()):
                if int(seen[row, :before].sum()) != sequence.length:
                    raise RequestError("the attention mask hides tokens that were visible before; use another cache")
                visible = seen[row, before:].nonzero().squeeze(1)
            if before and n == 1 and visible is None:
                here = slice(row, row + 1)
                one = sequence.step(handle.keys[here], handle.values[here], query[here], scaling, images[row])
                if one is not None:
                    output[row] = one[0]
                    continue
            if before:
                inner = None if mask is None else _boolean(mask)[min(row, len(mask) - 1), 0, :, before:]
                found = _attend_sequence(sequence, new, inner, visible)
                if batch == 1:
                    return found[None].to(query.dtype)
                output[row] = found
            else:
                new.store(sequence, visible)
        return output

    # ---- what transformers asks

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self.sequences, self.columns, self.is_initialized = [], 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; the count is negative, as transformers passes it."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}")
        for sequence in self.sequences:
            sequence.truncate(max(0, sequence.length + tokens_to_remove))
        self.columns = max(0, self.columns + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        index = indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices
        self._select(index.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([row for row in range(len(self.sequences)) for _ in range(repeats)])

    def _select(self, rows: list[int]) -> None:
        """Rows by index; a row that is taken twice is copied."""
        if not self.is_initialized:
            return
        taken: set[int] = set()
        chosen = []
        for row in rows:
            chosen.append(self.sequences[row].clone() if row in taken else self.sequences[row])
            taken.add(row)
        self.sequences = chosen

    @property
    def nbytes(self) -> int:
        return sum(sequence.nbytes for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of one sequence: keys, values [heads, n, head_dim], queries [heads, group, n, head_dim]."""

    keys: Tensor
    values: Tensor
    query: Tensor
    scaling: float
    images: list[bool] | None

    def store(self, sequence: SequenceCache, visible: Tensor | None) -> None:
        """Append to the cache; of a padded sequence only the tokens at the indices in ``visible``."""
        keys, values, query, images = self.keys, self.values, self.query, self.images
        if visible is not None:
            keys, values, query = keys[:, visible], values[:, visible], query[:, :, visible]
            images = None if images is None else [images[i] for i in visible.tolist()]
        scaled = query.float() * self.scaling if sequence.salience.asks_queries(keys.shape[1]) else None
        sequence.append(keys, values, scaled, images)


def _attend_sequence(sequence: SequenceCache, new: Chunk, mask: Tensor | None, visible: Tensor | None) -> Tensor:
    """Output [n, query heads, head_dim] of new tokens that see the history, then each other; they are stored."""
    heads, group, n, head_dim = new.query.shape
    if n == 1:
        new.store(sequence, visible)
        rows = new.query.reshape(heads, group, head_dim)
        part = sequence.attend(rows, new.scaling)
        if visible is None:
            sequence.probe(rows, new.scaling, part.lse)
        return part.output.reshape(1, heads * group, head_dim)
    if mask is None:
        mask = torch.ones(n, n, dtype=torch.bool, device=new.keys.device).tril()
    tiles = []
    for first in range(0, n, _QUERY_TILE):
        here = slice(first, min(n, first + _QUERY_TILE))
        rows = new.query[:, :, here].float().reshape(heads, -1, head_dim) * new.scaling
        parts: list[Part] = [attend(rows, new.keys, new.values, mask[here].repeat(group, 1))]
        if sequence.length:
            parts.append(sequence.attend(rows))
        tiles.append(merge(parts).output.reshape(heads, group, -1, head_dim))
    new.store(sequence, visible)
    return torch.cat(tiles, 2).permute(2, 0, 1, 3).reshape(n, heads * group, head_dim)


def _boolean(mask: Tensor) -> Tensor:
    """True where a query sees; additive masks have 0 there."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _seen(mask: Tensor | None, columns: int) -> Tensor | None:
    """bool [batch, columns]: the tokens that the newest query sees, hence all that are no padding."""
    return None if mask is None else _boolean(mask)[:, 0, -1, :columns]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that takes handles; ordinary tensors go to the stock one."""
    if not isinstance(key, KvHandle):
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise RequestError(f"this model's attention uses {name}; make the cache with packed=False")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return key.layer.attend(module, query, key, attention_mask, scale), None
