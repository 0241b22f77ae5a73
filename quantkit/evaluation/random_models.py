"""Language models of random packed weights: what whole decoding is timed on, at no cost of quantizing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantkit.evaluation.random_weights import random_spec, random_tensors
from quantkit.runtime.packed_linear import PackedLinear

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
}


def random_llama(
    shape: dict[str, Any] | None = None,
    format: str | None = None,
    head: str | None = None,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Any:
    """A `LlamaForCausalLM` made on the device.

    Args:
        shape: fields of `LlamaConfig`; None: those of Llama 3 8B.
        format: of every linear in the blocks, a name of `random_weights`; None: dense in ``dtype``.
        head: of the output head.
        device, dtype: of everything.
        seed: of all weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**(LLAMA_3_8B if shape is None else shape), tie_word_embeddings=False)
    config.dtype = dtype
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(seed)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    for number, (name, module) in enumerate(list(model.named_modules())):
        if isinstance(module, nn.Linear):
            chosen = head if name == "lm_head" else format
            if chosen is not None:
                packed = packed_random(chosen, module.out_features, module.in_features, device, dtype, seed + number)
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, packed)
    return model


def packed_random(
    format: str, out_features: int, in_features: int, device: str, dtype: torch.dtype, seed: int
) -> PackedLinear:
    """A linear of random packed weights, in the form that runs on its device."""
    spec = random_spec(format, out_features, in_features)
    linear = PackedLinear(spec, dtype=dtype, device=device)
    for name, tensor in random_tensors(spec, device, seed).items():
        linear.get_buffer(name).copy_(tensor)
    linear.use_device_form()
    return linear.requires_grad_(False).eval()
