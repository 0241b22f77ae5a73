"""The decoding step of Llama-like models with few launches: 8 in a block, 3 around the blocks.

    add + norm | query, key, value | rotate + append + attend | output | add + norm | gate, up | silu * | down

transformers needs some 30 for the same, most of them on a few thousand numbers. The products are those of the model's
own linears, packed or dense, siblings stacked (stacking.py); the rest is ``kernels/decode_step.py``. Products with
signs are two launches; norms and gates are computed in the first of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import RequestError
from quantkit.kernels.decode_step import AttentionState, add_norm, attend, gated, new_scratch, rotate
from quantkit.kernels.ready_row import Source
from quantkit.runtime.sign_stacks import SignStack
from quantkit.runtime.stacking import stack_linears

_FAMILIES = ("llama", "mistral", "qwen2")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # tables that do not depend on the length of the text
_MOST_QUERIES = 16  # heads that share a KV head


@dataclass(frozen=True, slots=True)
class _Block:
    norms: tuple[Tensor, Tensor]
    qkv: nn.Module
    output: nn.Module
    gate_up: nn.Module
    down: nn.Module
    attention: AttentionState


def why_not(model: Any) -> str | None:
    """Why a model has no fused step, in a few words; None if it has one."""
    config = model.config
    if config.model_type not in _FAMILIES:
        return f"{config.model_type} is not one of {', '.join(_FAMILIES)}"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return "it has sliding windows"
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None) is not None:
        return "it has sliding windows"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _ROPE_TYPES:
        return f"its rotary embedding ({rope}) depends on the length of the text"
    head_dim = model.model.layers[0].self_attn.head_dim
    if head_dim & (head_dim - 1) or config.num_attention_heads // config.num_key_value_heads > _MOST_QUERIES:
        return f"heads of {head_dim} numbers, {config.num_attention_heads} for {config.num_key_value_heads}"
    return None if config.hidden_act == "silu" else f"its activation is {config.hidden_act}"


def _of_gated(linear: nn.Module, gate_up: Tensor) -> Tensor:
    """The product with ``silu(gate) * up``."""
    if isinstance(linear, SignStack) and linear.has_row(gate_up, "gated"):
        return linear.row(Source(kind="gated", x=gate_up))[0]
    product: Tensor = linear(gated(gate_up))
    return product


class FusedSteps:
    """Prefill and steps of one sequence.

    Args:
        model: of a family that `why_not` has nothing against. Its linears move into the stacks: afterwards it can be
            neither called nor saved.
        max_length: tokens that there is room for.

    Raises:
        RequestError: there is no fused step for this model.
    """

    def __init__(self, model: Any, max_length: int) -> None:
        reason = why_not(model)
        if reason is not None:
            raise RequestError(f"no fused step for this model: {reason}; decode without fuse")
        inner, config = model.model, model.config
        attention = inner.layers[0].self_attn
        self.head_dim, self.kv_heads = attention.head_dim, config.num_key_value_heads
        self.embedding, self.norm, self.head = inner.embed_tokens, inner.norm, model.lm_head
        self.eps: float = config.rms_norm_eps
        device, dtype = inner.norm.weight.device, inner.norm.weight.dtype
        positions = torch.arange(max_length, device=device)[None]
        cos, sin = inner.rotary_emb(torch.zeros(1, device=device), positions)
        self.cos, self.sin = cos[0].float().contiguous(), sin[0].float().contiguous()
        self.length = torch.zeros(1, dtype=torch.int32, device=device)
        partial, counters = new_scratch(config.num_attention_heads, self.kv_heads, self.head_dim, max_length, device)
        self.blocks = []
        for layer in inner.layers:
            keys, values = torch.zeros(2, self.kv_heads, max_length, self.head_dim, dtype=dtype, device=device)
            state = AttentionState(
                keys=keys,
                values=values,
                cos=self.cos,
                sin=self.sin,
                length=self.length,
                partial=partial,
                counters=counters,
                scale=attention.scaling,
            )
            self.blocks.append(
                _Block(
                    (layer.input_layernorm.weight, layer.post_attention_layernorm.weight),
                    stack_linears(layer.self_attn, ("q_proj", "k_proj", "v_proj")),
                    stack_linears(layer.self_attn, ("o_proj",)),
                    stack_linears(layer.mlp, ("gate_proj", "up_proj")),
                    stack_linears(layer.mlp, ("down_proj",)),
                    state,
                )
            )

    def rewind(self, n_tokens: int) -> None:
        """Forget what is cached beyond ``n_tokens``."""
        self.length.fill_(n_tokens)

    def n_tokens(self) -> int:
        """Cached tokens; waits for the device."""
        return int(self.length)

    def prefill(self, ids: Tensor) -> Tensor:
        """Token ids ``[1, n]`` into an empty cache; logits ``[1, vocabulary]`` of the last."""
        self.rewind(0)
        logits = self._run(ids)
        self.length.add_(ids.shape[1])
        return logits

    def step(self, token: Tensor) -> Tensor:
        """One more token id ``[1, 1]``; logits ``[1, vocabulary]``."""
        logits = self._run(token)
        self.length.add_(1)
        return logits

    def _run(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)[0].contiguous()
        attention = attend if ids.shape[1] == 1 else self._attend_prompt
        update: Tensor | None = None
        for block in self.blocks:
            hidden, qkv = self._of_norm(block.qkv, hidden, update, block.norms[0])
            update = block.output(attention(qkv, block.attention))
            hidden, gate_up = self._of_norm(block.gate_up, hidden, update, block.norms[1])
            update = _of_gated(block.down, gate_up)
        normal = add_norm(hidden, update, self.norm.weight, self.eps)
        logits: Tensor = self.head(normal[-1:])
        return logits

    def _of_norm(
        self, linears: nn.Module, hidden: Tensor, update: Tensor | None, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``hidden + update``, and the product with its norm: signs take the norm in the launch that prepares it."""
        if isinstance(linears, SignStack) and linears.has_row(hidden, "norm"):
            source = Source(kind="norm", x=hidden, update=update, weight=weight, eps=self.eps)
            product, residual = linears.row(source)
            return residual, product
        return hidden, linears(add_norm(hidden, update, weight, self.eps))

    def _attend_prompt(self, qkv: Tensor, state: AttentionState) -> Tensor:
        """All tokens of a prompt ``[n, ...]`` among themselves."""
        n = len(qkv)
        heads = qkv.shape[1] // self.head_dim - 2 * self.kv_heads
        states = qkv.view(n, -1, self.head_dim).transpose(0, 1)
        queries, keys, values = torch.split(states, [heads, self.kv_heads, self.kv_heads])
        queries, keys = (rotate(part, self.cos[:n], self.sin[:n]) for part in (queries, keys))
        state.keys[:, :n], state.values[:, :n] = keys, values
        attended = torch.nn.functional.scaled_dot_product_attention(
            queries[None], keys[None], values[None], is_causal=True, enable_gqa=True, scale=state.scale
        )
        return attended[0].transpose(0, 1).reshape(n, -1)
