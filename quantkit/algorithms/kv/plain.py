"""Plain integers: every token and head on a range grid of its own, in groups of channels. The baseline.

With ``rotate=true`` this is the cache of QuaRot (arXiv:2404.00456): keys rotated after the rotary embedding, values
rotated back after attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.algorithms.kv.policy import KvPolicy
from quantkit.formats.kv_page import GridSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainSettings:
    """`int2`, `int4` and `int8` differ in `bits` alone."""

    bits: int = 4
    group: int = 0  # channels that share a scale; 0: the head
    rotate: bool = False
    window: int = 32  # recent tokens in 16 bits, at least


def plain(settings: PlainSettings, name: str) -> KvPolicy:
    """The policy of these settings."""
    grid = GridSpec(group=settings.group, offsets=True)
    return KvPolicy(
        name=name,
        bits=(settings.bits,),
        keys=grid,
        values=grid,
        rotate_keys=settings.rotate,
        rotate_values=settings.rotate,
        window=settings.window,
    )
