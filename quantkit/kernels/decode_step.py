"""What lies between the products of a decoding step, each in one launch: norms, attention, gated activations.

On a GPU these are the Triton kernels of ``decode_step_triton.py``; on the CPU the torch twins below, which are written
for reading. Sums are float32; results have the dtype of the activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from quantkit.kernels.launch import early_launch
from quantkit.kernels.planar_matmul import triton_kernels

# Programs of the attention are small, so that they find room beside the products before and after: with 128
# tokens they are faster alone and slower in a step (docs/log.md).
WARPS = 8  # of such a program
_BLOCK_BYTES = 1 << 14  # of keys, and of values, that it takes at a time
_MAX_BLOCK = 64  # tokens
_ROWS = 16  # query rows of a tile: the tensor core takes no fewer
_COLUMNS = 1024
_PICKERS = 64  # programs that look for the largest logit


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionState:
    """One sequence's cache of one layer, the rotary tables, and scratch that layers share.

    Attributes:
        keys, values: ``[kv_heads, max_length, head_dim]``; keys are stored rotated.
        cos, sin: float32 ``[max_length, head_dim]``, both halves alike.
        length: int32 ``[1]``, the tokens that are cached before this step.
        partial: float32 ``[heads, splits, head_dim + 2]``, any content; splits: programs that share a KV head's tokens.
        counters: int32 ``[kv_heads]``, zeros before and after.
        scale: of the scores.
    """

    keys: Tensor
    values: Tensor
    cos: Tensor
    sin: Tensor
    length: Tensor
    partial: Tensor
    counters: Tensor
    scale: float


def new_scratch(
    heads: int, kv_heads: int, head_dim: int, max_length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """``partial`` and ``counters`` of `AttentionState`. Few splits are merged faster, many read long texts faster."""
    partial = torch.empty(heads, 8 if max_length <= 2048 else 16, head_dim + 2, device=device)
    return partial, torch.zeros(kv_heads, dtype=torch.int32, device=device)


def tokens_at_a_time(head_dim: int, dtype: torch.dtype) -> int:
    """Cached tokens that a program of the attention takes in one step, and the fewest that one is started for."""
    return min(_MAX_BLOCK, _BLOCK_BYTES // (head_dim * dtype.itemsize))


def add_norm(residual: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add ``update`` to ``residual`` in place, and return its RMS norm times ``weight``.

    Args:
        residual: contiguous ``[m, n]``, changed.
        update: the same shape, or None.
        weight: ``[n]``.
        eps: added to the mean square.
    """
    if not residual.is_cuda:
        if update is not None:
            residual += update
        wide = residual.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(residual.dtype)
    out = torch.empty_like(residual)
    n = residual.shape[1]
    block = 1 << (n - 1).bit_length()
    with torch.cuda.device(residual.device):  # Triton launches on the current device
        _kernels().add_norm_kernel[(len(residual),)](
            residual,
            residual if update is None else update,
            weight,
            out,
            n,
            eps,
            HAS_UPDATE=update is not None,
            BLOCK=block,
            **early_launch(residual.device),
            num_warps=min(16, max(1, block // 512)),
        )
    return out


def gated(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[m, 2 n]``, gate first: ``[m, n]``."""
    n = gate_up.shape[1] // 2
    if not gate_up.is_cuda:
        return torch.nn.functional.silu(gate_up[:, :n].float()).mul(gate_up[:, n:].float()).to(gate_up.dtype)
    out = gate_up.new_empty(len(gate_up), n)
    grid = (len(gate_up), -(-n // _COLUMNS))
    with torch.cuda.device(gate_up.device):
        _kernels().gated_kernel[grid](gate_up, out, n, COLUMNS=_COLUMNS, **early_launch(gate_up.device), num_warps=4)
    return out


def attend(qkv: Tensor, state: AttentionState) -> Tensor:
    """Rotate queries and key of the newest token, append key and value, attend to all tokens.

    Args:
        qkv: contiguous ``[1, (heads + 2 kv_heads) * head_dim]``: queries, key, value.
        state: where the token goes; ``length`` is left for the caller to advance.

    Returns:
        ``[1, heads * head_dim]``.
    """
    kv_heads, max_length, head_dim = state.keys.shape
    heads, splits = qkv.shape[1] // head_dim - 2 * kv_heads, state.partial.shape[1]
    if not qkv.is_cuda:
        return _attend_reference(qkv, state, heads)
    out = qkv.new_empty(1, heads * head_dim)
    with torch.cuda.device(qkv.device):
        _kernels().attention_kernel[(kv_heads, splits)](
            qkv,
            state.cos,
            state.sin,
            state.keys,
            state.values,
            out,
            state.partial,
            state.counters,
            state.length,
            state.scale,
            max_length,
            GROUP=heads // kv_heads,
            ROWS=_ROWS,
            HEAD_DIM=head_dim,
            BLOCK=tokens_at_a_time(head_dim, qkv.dtype),
            SPLITS=splits,
            WIDE=qkv.dtype == torch.float32,
            **early_launch(qkv.device),
            num_warps=WARPS,
        )
    return out


@dataclass(frozen=True, slots=True)
class PickScratch:
    """What `pick` needs besides the logits; counter: zero before and after."""

    highest: Tensor
    places: Tensor
    counter: Tensor

    @classmethod
    def on(cls, device: torch.device) -> PickScratch:
        places = torch.empty(_PICKERS, dtype=torch.int32, device=device)
        return cls(torch.empty(_PICKERS, device=device), places, torch.zeros(1, dtype=torch.int32, device=device))


def pick(logits: Tensor, token: Tensor, scratch: PickScratch) -> None:
    """Write the index of the largest of ``[1, n]`` finite logits, the first of equals, into ``token`` [1, 1]."""
    if not logits.is_cuda:
        token.copy_(logits.argmax(-1, keepdim=True))
        return
    with torch.cuda.device(logits.device):
        _kernels().pick_kernel[(_PICKERS,)](
            logits.contiguous(),
            token,
            scratch.highest,
            scratch.places,
            scratch.counter,
            logits.shape[1],
            COLUMNS=_COLUMNS,
            PROGRAMS=_PICKERS,
            **early_launch(logits.device),
            num_warps=4,
        )


def _attend_reference(qkv: Tensor, state: AttentionState, heads: int) -> Tensor:
    kv_heads, _, head_dim = state.keys.shape
    position = int(state.length)
    queries, key, value = torch.split(qkv.view(-1, head_dim), [heads, kv_heads, kv_heads])
    cos, sin = state.cos[position], state.sin[position]
    state.keys[:, position] = rotate(key, cos, sin)
    state.values[:, position] = value
    keys, values = (cache[:, : position + 1].float() for cache in (state.keys, state.values))
    rows = rotate(queries, cos, sin).float().view(kv_heads, -1, head_dim)
    weights = (rows @ keys.mT * state.scale).softmax(-1)
    return (weights @ values).to(qkv.dtype).view(1, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``[..., head_dim]``: halves (a, b) become (a cos - b sin, b cos + a sin)."""
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def _kernels() -> ModuleType:
    triton_kernels()  # raises where Triton is not installed
    return import_module("quantkit.kernels.decode_step_triton")
