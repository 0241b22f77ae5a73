"""What a KV-cache policy decides, as data; the cache (runtime) carries it out, for one layer of one sequence:

    new token -> recent window (16 bits) -> classified -> pinned (16 bits for good) | a page of its class's width

Tokens leave the window in units of `unit` tokens, when it holds `window + unit`; a token is coded once, and never
again. Keys and values are transformed before they are coded. For queries q and any fixed vectors mu and c > 0

    k' = H (k - mu)        q k^T = (H q) k'^T + q mu
    v' = H (v / c)         sum_t p_t v_t = c * H (sum_t p_t v'_t)

are exact, with H the Hadamard rotation (or the identity). mu and c are those of the first `window + unit` tokens, hence
the same whether a prompt comes at once or token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from quantkit.algorithms.kv.hadamard import rotate
from quantkit.formats.kv_page import GridSpec

FLOAT_BITS = 16  # the width of a class whose pages are not quantized
WHOLE_HEAD = GridSpec(group=0)
PINNED = -1  # the class of tokens that stay in 16 bits

Salience = Literal["none", "pivots", "probes", "text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvPolicy:
    """How one layer's cache is kept. A grid per token with group 0 takes the whole head."""

    name: str
    bits: tuple[int, ...]  # of the classes, highest first; () for a cache that is never quantized
    keys: GridSpec = WHOLE_HEAD
    values: GridSpec = WHOLE_HEAD
    clip: tuple[float, ...] = (1.0, 1.0)  # of the ranges, by class
    rotate_keys: bool = False
    rotate_values: bool = False
    centre: float | None = None  # keys of a head whose squared mean is this many times their variance; None: none
    channel_scales: bool = False  # values: c = sqrt(max_t |v|) of each channel
    window: int = 32  # tokens that are always in 16 bits
    unit: int = 32  # tokens that leave the window together
    pinned: int = 0  # tokens among the first that stay in 16 bits; at most twice as many of a whole sequence
    # What chooses pinned tokens (pivots: keys that the mean query looks at) or the first class (probes: tokens with the
    # most attention; text: those that are not of an image)
    salience: Salience = "none"
    share: float = 0.0  # of the tokens in the first class

    @property
    def key_group(self) -> int:
        """Tokens of a class that must come together: keys with a scale per channel are coded in groups."""
        return self.keys.group if self.keys.axis == "channel" else 1


@dataclass(frozen=True, slots=True)
class Transform:
    """The exact change of basis of one layer of one sequence; vectors float16 [heads, 1, head_dim] or None."""

    rotate_keys: bool
    rotate_values: bool
    key_mean: Tensor | None
    value_scale: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.key_mean, self.value_scale) if x is not None)

    def keys(self, keys: Tensor) -> Tensor:
        """k' of [heads, n, head_dim], float32."""
        centred = keys.float() if self.key_mean is None else keys.float() - self.key_mean.float()
        return rotate(centred) if self.rotate_keys else centred

    def original_keys(self, keys: Tensor) -> Tensor:
        """The inverse of `keys`."""
        x = rotate(keys) if self.rotate_keys else keys
        return x if self.key_mean is None else x + self.key_mean.float()

    def values(self, values: Tensor) -> Tensor:
        """v' of [heads, n, head_dim], float32."""
        x = values.float() if self.value_scale is None else values.float() / self.value_scale.float()
        return rotate(x) if self.rotate_values else x

    def original_values(self, values: Tensor) -> Tensor:
        """The inverse of `values`; also of their weighted sums."""
        x = rotate(values) if self.rotate_values else values
        return x if self.value_scale is None else x * self.value_scale.float()

    def query(self, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """H q of float32 [heads, m, head_dim], and what the scores lack: q mu [heads, m], or None if mu = 0."""
        shift = None if self.key_mean is None else (query * self.key_mean.float()).sum(-1)
        return (rotate(query) if self.rotate_keys else query), shift


def fit_transform(policy: KvPolicy, keys: Tensor, values: Tensor) -> Transform:
    """The transform of a sequence from its first tokens, float16 [heads, n, head_dim].

    Centring pays where an offset dwarfs what differs between keys (projections with large biases); elsewhere it only
    moves the error away from the keys' common direction, where a symmetric grid that keeps <k, k'> has none. The first
    token is left out of the mean where there are others: its key is unlike all others in most models.
    """
    key_mean = value_scale = None
    if policy.centre is not None:
        rest = keys[:, 1:].float() if keys.shape[1] > 1 else keys.float()
        mean = rest.mean(1, keepdim=True)
        variance = (rest - mean).square().sum(-1).mean(1, keepdim=True)  # [heads, 1]
        offset = mean.square().sum(-1) >= policy.centre * variance
        key_mean = (mean * offset[..., None]).half()
    if policy.channel_scales:
        value_scale = values.float().abs().amax(1, keepdim=True).sqrt().clamp_min(2.0**-7).half()
    return Transform(policy.rotate_keys, policy.rotate_values, key_mean, value_scale)
