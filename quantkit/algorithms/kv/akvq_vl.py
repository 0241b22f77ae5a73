"""AKVQ-VL: 2-bit keys and values for vision-language models, precision by what attention looks at.

Paper      Su et al. 2025, arXiv:2501.15021 (ICME). The first layers look at text (text-salient): there text tokens get
           `text_bits`, image tokens `bits`. All other layers look at a few pivot tokens: these stay in 16 bits, the
           rest gets `bits`. The newest tokens stay in 16 bits everywhere. Keys and values are rotated.
Text only  without image tokens no layer is text-salient: all layers keep pivots and code the rest at `bits`.
Pivots     the paper takes tokens with massive activations, without a threshold. Here a pivot is a key that the mean
           query looks at: a_t = sum_h exp(mean_q . k_t), over the first tokens' queries; the `pivots` largest among
           the first tokens, and later ones that reach the mean of these, up to twice as many. It is known when a
           token leaves the window, and the same whether a prompt comes at once or token by token.
Grid       the paper's is a clipped range per token and head (`symmetric=false`, with `clip`). Default is a symmetric
           grid without an offset, scaled to keep <k, k'> = |k|^2 (coding.py): fewer bytes, and less loss.
Deviates   values are rotated back at the output of attention and not in the weights, which works for packed weights.
           Layers that look at text are the first `text_layers`, as the paper found for LLaVA, not measured per model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.algorithms.kv.policy import KvPolicy
from quantkit.formats.kv_page import GridSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class AkvqSettings:
    """The paper's settings, and ours."""

    bits: int = 2
    text_bits: int = 4  # of text tokens in text-salient layers, or `bits` if that is more
    text_layers: int = 2  # leading layers that are text-salient in models that see images
    pivots: int = 4  # tokens of a sequence that stay in 16 bits
    group: int = 0  # channels that share a scale; 0: the head
    symmetric: bool = True
    clip: float = 0.8  # of 2-bit ranges; wider codes are not clipped
    rotate: bool = True
    centre: float = 4.0  # subtract the mean key from heads whose squared mean is this many times the variance
    window: int = 32


def akvq_vl(settings: AkvqSettings, name: str = "akvq-vl", text_salient: bool = False) -> KvPolicy:
    """The policy of these settings in one layer."""
    grid = GridSpec(group=settings.group, offsets=not settings.symmetric)
    bits = (max(settings.text_bits, settings.bits), settings.bits) if text_salient else (settings.bits,)
    return KvPolicy(
        name=name,
        bits=bits,
        keys=grid,
        values=grid,
        clip=tuple(settings.clip if width == 2 else 1.0 for width in bits),
        rotate_keys=settings.rotate,
        rotate_values=settings.rotate,
        centre=settings.centre,
        window=settings.window,
        pinned=0 if text_salient else settings.pivots,
        salience="text" if text_salient else "pivots" if settings.pivots else "none",
    )


def pivot_scores(keys: Tensor, mean_query: Tensor) -> Tensor:
    """How much the mean query looks at each key: float32 [n], of keys [heads, n, head_dim].

    mean_query is [heads, group, head_dim] of any float dtype, scaled. In logarithms, over all query heads.
    """
    return torch.einsum("hgd,hnd->hgn", mean_query.float(), keys.float()).flatten(0, 1).logsumexp(0)
