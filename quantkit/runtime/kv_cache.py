"""`kv_cache`: a quantized KV cache for any transformers model, without dequantizing the history at every step.

    cache = quantkit.kv_cache(model, "akvq-vl")
    model.generate(**inputs, past_key_values=cache)

A cache layer returns a handle in place of keys and values, and a registered attention function receives it: the first
tokens are attended to by the stock attention, in full precision, then stored; later queries attend to the packed pages.
Where a model touches keys and values between cache and attention, or needs scores that the pages cannot give, the layer
returns dequantized tensors instead: memory is saved, time is not. `KvCache.reason` says so.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer
from transformers.masking_utils import sdpa_mask

from quantkit.algorithms.kv.registry import KvSpec, parse_kv_spec
from quantkit.errors import RequestError
from quantkit.runtime.kv_layer import Images, QuantizedKvLayer, attention

ATTENTION = "quantkit_kv"
# Models that change keys or values between the cache and the attention function, or read them there.
_TOUCHES_KEYS = (
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "diffllama", "doge", "glm_moe_dsa", "glm4_moe_lite", "idefics",
    "inkling", "kimi_linear", "longcat_flash", "minicpm3", "mistral4", "moonshine", "youtu",
)  # fmt: skip


class KvCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """A transformers cache whose full-attention layers are quantized.

    Attributes:
        spec: what was asked for.
        reason: why dequantized tensors are handed to the model's attention; None where it reads packed pages.
    """

    def __init__(self, layers: list[Any], spec: KvSpec, reason: str | None) -> None:
        super().__init__(layers=layers)
        self.spec = spec
        self.reason = reason

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache holds, stock layers included."""
        return sum(
            layer.nbytes if isinstance(layer, QuantizedKvLayer) else _stock_bytes(layer) for layer in self.layers
        )


def _stock_bytes(layer: Any) -> int:
    return sum(x.nbytes for x in (layer.keys, layer.values) if x is not None)


def kv_cache(
    model: Any, spec: str = "akvq-vl", *, packed: bool | None = None, dtype: torch.dtype = torch.float16
) -> KvCache:
    """A quantized KV cache for `model`, to be passed as ``past_key_values``; for one batch at a time.

    Layers with sliding-window attention keep their stock cache. The model's attention implementation is set to one
    that takes both packed caches and ordinary tensors.

    Args:
        model: a transformers model, packed by quantkit or not.
        spec: a policy and its settings: ``akvq-vl``, ``zipcache``, ``kivi:bits=2,group=32``, ``int4``, ``fp16``.
        packed: attend to packed pages; False hands dequantized tensors to the model's own attention; None: packed
            where the model allows it.
        dtype: of tokens that are not quantized; with another than float16 the torch twins do the work on a GPU too.

    Raises:
        RequestError: an unknown policy or setting; a model with layers that are neither full nor sliding attention.
    """
    parsed = parse_kv_spec(spec)
    config = model.config.get_text_config(decoder=True)
    reason = _why_not_packed(model, config)
    if packed and reason is not None:
        raise RequestError(f"{reason}; pass packed=False")
    if packed is False:
        reason = reason or "packed=False was asked for"
    image_token = getattr(model.config, "image_token_id", None)
    image_token = getattr(model.config, "image_token_index", None) if image_token is None else image_token
    sees_images = getattr(model.config, "vision_config", None) is not None and image_token is not None
    images = Images()
    layers: list[Any] = []
    for index, kind in enumerate(_layer_types(config)):
        if kind == "sliding_attention":
            layers.append(DynamicSlidingWindowLayer(sliding_window=config.sliding_window))
        elif kind == "full_attention":
            layers.append(QuantizedKvLayer(parsed.layer_policy(index, sees_images), reason is None, images, dtype))
        else:
            raise RequestError(f"layer {index} has {kind}; only full and sliding attention caches are supported")
    cache = KvCache(layers, parsed, reason)
    if reason is None:
        _register()
        config._attn_implementation = ATTENTION
    if sees_images and image_token is not None:
        _watch_images(model, cache, images, image_token)
    return cache


def _register() -> None:
    """Make transformers know the attention function; a second call changes nothing."""
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # without it padding would be ignored in silence


def _why_not_packed(model: Any, config: Any) -> str | None:
    if config.model_type in _TOUCHES_KEYS:
        return f"{config.model_type} changes keys or values after the cache"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"{config.model_type} caps its attention scores"
    if not getattr(model, "_supports_attention_backend", False) or not getattr(model, "_supports_sdpa", False):
        return f"{config.model_type} takes no attention function of others"
    return None


def _layer_types(config: Any) -> list[str]:
    kinds: list[str] | None = getattr(config, "layer_types", None)
    if kinds is None:
        sliding = getattr(config, "sliding_window", None) is not None
        kinds = ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    return list(kinds)[: len(kinds) - shared]


def _watch_images(model: nn.Module, cache: KvCache, images: Images, image_token: int) -> None:
    """Before each call with this cache, note which tokens are of an image; ends with the cache."""
    reference = weakref.ref(cache)

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("past_key_values") is not None and kwargs["past_key_values"] is reference():
            ids = kwargs.get("input_ids")
            images.look(None if ids is None else ids == image_token)

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    weakref.finalize(cache, hook.remove)
