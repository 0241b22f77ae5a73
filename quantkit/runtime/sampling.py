"""Choosing the next token at random, as transformers' ``generate(do_sample=True)`` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_TOP_K = 50  # transformers' own default, where a generation config says nothing


def sampler(generation_config: Any, temperature: float) -> Callable[[Tensor], Tensor]:
    """A function from logits ``[1, vocabulary]`` to a token id ``[1, 1]``, drawn from torch's global generator.

    Args:
        generation_config: of the model; its ``top_k`` and ``top_p`` count.
        temperature: that logits are divided by, above 0.
    """
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    top_k = _TOP_K if generation_config.top_k is None else generation_config.top_k
    warpers = LogitsProcessorList()
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if generation_config.top_p is not None and generation_config.top_p < 1:
        warpers.append(TopPLogitsWarper(generation_config.top_p))

    def choose(logits: Tensor) -> Tensor:
        return torch.multinomial(warpers(None, logits.float()).softmax(-1), 1)

    return choose
