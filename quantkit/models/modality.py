"""Which parts of a model see pictures, and which tokens stand for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.models.structure import Linear

_TOKEN_IDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def sees_images(config: Any) -> bool:
    """Whether the model of this config takes pictures."""
    return getattr(config, "vision_config", None) is not None


def image_tokens(inputs: Mapping[str, Tensor], config: Any) -> Tensor:
    """bool ``[batch, n_tokens]``: the tokens that are replaced by features of a picture or video.

    Processors expand a placeholder to one token per feature, so the mask fits the decoder's hidden states position by
    position. By ``mm_token_type_ids`` where the processor gives them (0 is text), else by the config's token ids.
    """
    if "mm_token_type_ids" in inputs:
        return inputs["mm_token_type_ids"] != 0
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for name in _TOKEN_IDS:
        token = getattr(config, name, None)
        if isinstance(token, int):
            mask |= inputs["input_ids"] == token
    return mask


def vision_linears(model: Any) -> list[Linear]:
    """The linears of vision tower and projector: all outside the text decoder, but for the output head.

    Subclasses of ``nn.Linear`` are left out: attention modules that own one read its weight by themselves.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    inside = {id(module) for module in decoder.modules()} | {id(head)}
    return [
        Linear(name, name, module.out_features, module.in_features)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and id(module) not in inside
    ]
