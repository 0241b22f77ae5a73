"""A Llama for the tests of decoding: large enough for the kernels, and a prompt for it."""

from __future__ import annotations

import torch

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
PROMPT = torch.arange(7, 12)[None]
