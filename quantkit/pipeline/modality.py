"""Image and text tokens told apart: what each counts in statistics, and what quantizing a block does to each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.recipe import Recipe

N_PROBES = 8  # samples on which a block's output is compared


def token_weights(recipe: Recipe, image_mask: Tensor) -> Tensor | None:
    """What each token of a sample counts, float32 ``[n_tokens]``; None: all alike.

    By default the image tokens of a sample together count as much as its text tokens: they are some ten times as many,
    much like each other, and answers are read off text tokens. Where image tokens are fewer, all count alike.

    Args:
        image_mask: bool ``[n_tokens]``.
    """
    if recipe.solver == "boa":
        return None  # it looks at whole attention maps
    n_image = int(image_mask.sum())
    n_text = len(image_mask) - n_image
    balanced = min(1.0, n_text / n_image) if n_text and n_image else 1.0
    weight = balanced if recipe.image_weight is None else recipe.image_weight
    if recipe.tokens == "all" and weight == 1:
        return None
    image = {"all": weight, "text": 0.0, "image": 1.0}[recipe.tokens]
    text = {"all": 1.0, "text": 1.0, "image": 0.0}[recipe.tokens]
    return torch.where(image_mask, image, text).float()


def probes(image_masks: Sequence[Tensor] | None) -> list[int]:
    """Samples to compare a block's output on, evenly spaced; none where no token stands for a picture."""
    if image_masks is None:
        return []
    n = min(N_PROBES, len(image_masks))
    return [at * len(image_masks) // n for at in range(n)]


def modality_errors(before: Sequence[Tensor], after: Sequence[Tensor], masks: Sequence[Tensor]) -> dict[str, float]:
    """Mean over image and over text tokens of |quantized - original| / |original| of a block's output rows.

    The output is the residual stream, so a block that adds little to it shows a small error. Position 0 is left out:
    its norm is hundreds of times that of the others in most models. A modality without tokens has no entry.

    Args:
        before, after: float ``[1, n_tokens, hidden]`` per sample, of the block with its original and quantized weights
            on the same inputs.
        masks: bool ``[n_tokens]`` per sample, true for image tokens.
    """
    errors = []
    for original, quantized in zip(before, after, strict=True):
        rows = original.float().flatten(0, 1)
        errors.append(((quantized.float().flatten(0, 1) - rows).norm(dim=1) / rows.norm(dim=1).clamp_min(1e-30))[1:])
    error = torch.cat(errors).cpu()
    image = torch.cat([mask[1:] for mask in masks])
    parts = {"image_error": error[image], "text_error": error[~image]}
    return {name: float(part.double().mean()) for name, part in parts.items() if len(part)}
