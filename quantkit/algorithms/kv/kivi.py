"""KIVI: keys per channel, values per token.

Paper      Liu et al. 2024, arXiv:2402.02750 (ICML). Keys have outlier channels, so `group` consecutive tokens of a
           channel share a range; values have none, so `group` channels of a token do. A window stays in 16 bits.
Deviates   the authors flush a full window of `window` keys at once, so that their key window shrinks to nothing every
           `window` tokens, and values one by one; here both leave in units of `group` tokens, and the newest `window`
           tokens are in 16 bits at all times. A constant group has the least scale and not 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.algorithms.kv.policy import KvPolicy
from quantkit.formats.kv_page import GridSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class KiviSettings:
    """The paper's settings."""

    bits: int = 2
    group: int = 32  # tokens (keys) or channels (values) that share a range
    rotate: bool = False
    window: int = 128


def kivi(settings: KiviSettings, name: str = "kivi") -> KvPolicy:
    """The policy of these settings."""
    return KvPolicy(
        name=name,
        bits=(settings.bits,),
        keys=GridSpec(axis="channel", group=settings.group, offsets=True),
        values=GridSpec(group=settings.group, offsets=True),
        rotate_keys=settings.rotate,
        rotate_values=settings.rotate,
        window=settings.window,
        unit=settings.group,
    )
